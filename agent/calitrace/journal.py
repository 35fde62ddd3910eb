"""The journal, ``*.calitrace``: a msgpack stream of frames, append-only and readable when cut short.

A frame is a two-element array: its kind, and a map. The first is the header (kind ``calitrace``); it carries all
that is needed to read the rest on another machine. Events are stored as the bytes that came out of the ring
buffer, so that a mended decoder also mends old recordings. Frames of unknown kind are counted and kept apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

import msgpack

from calitrace.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SCHEMA = 1
HEADER, EVENTS, PROBES, SYMBOLS, TOTALS, END = "calitrace", "events", "probes", "symbols", "totals", "end"
SNAPSHOT = "snapshot"
KINDS = (HEADER, EVENTS, PROBES, SYMBOLS, TOTALS, END, SNAPSHOT)
_CHUNK = 1 << 20


def frame(kind: str, body: Mapping[str, Any]) -> bytes:
    """One frame, ready to append."""
    packed: bytes = msgpack.packb([kind, body], use_bin_type=True)
    return packed


class Writer:
    """Writes frames to a binary stream; flushed after each, so that a kill loses at most the frame in hand."""

    def __init__(self, stream: BinaryIO, header: Mapping[str, Any]) -> None:
        self._stream = stream
        self.write(HEADER, {"schema": SCHEMA, **header})

    def write(self, kind: str, body: Mapping[str, Any]) -> None:
        """Append a frame."""
        self._stream.write(frame(kind, body))
        self._stream.flush()

    def events(self, records: Iterable[bytes]) -> None:
        """Append raw event records; nothing is written for none."""
        batch = list(records)
        if batch:
            self.write(EVENTS, {"raw": batch})


@dataclass
class Journal:
    """A journal read back. *probes*: by number.

    *cut_at*: byte at which it was cut short, None when it has its end frame."""

    header: dict[str, Any]
    events: list[bytes] = field(default_factory=list)
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)
    symbols: dict[int, str] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    snapshot: dict[str, Any] | None = None
    unknown: Counter[str] = field(default_factory=Counter)
    complete: bool = False
    cut_at: int | None = None


def read(stream: BinaryIO) -> Journal:
    """Read all that is there.

    Raises Malformed when it does not begin with a header of a schema we know, or has garbage inside; a tail
    that is merely missing is no error: ``cut_at`` says where.
    """
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=1 << 30)
    journal: Journal | None = None
    done = 0
    while True:
        chunk = stream.read(_CHUNK)
        if chunk:
            unpacker.feed(chunk)
        try:
            for item in unpacker:
                journal = _take(journal, item, done)
                done = unpacker.tell()
        except (KeyError, TypeError, ValueError, msgpack.UnpackException) as wrong:
            raise Malformed(done, "a frame", f"{type(wrong).__name__}", "journal") from wrong
        if not chunk:
            break
    if journal is None:
        raise Malformed(0, "a calitrace journal", "no complete frame", "journal")
    if not journal.complete:
        journal.cut_at = done
    return journal


def _take(journal: Journal | None, item: object, at: int) -> Journal:
    if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)):
        raise Malformed(at, "a frame [kind, map]", type(item).__name__, "journal")
    kind, body = item
    if journal is None:
        if kind != HEADER:
            raise Malformed(at, f"a frame of kind {HEADER!r}", repr(kind), "journal")
        if body.get("schema") != SCHEMA:
            raise Malformed(at, f"schema {SCHEMA}", f"schema {body.get('schema')}", "journal")
        return Journal(body)
    if kind == EVENTS:
        raw = body.get("raw")
        if not isinstance(raw, list) or not all(isinstance(each, bytes) for each in raw):
            raise Malformed(at, "a list of event records", type(raw).__name__, "journal")
        journal.events += raw
    elif kind == PROBES:
        for probe in body.get("probes", ()):  # a later record of the same probe knows its outcome
            journal.probes[probe["number"]] = probe
    elif kind == SYMBOLS:
        journal.symbols.update(body.get("names", {}))
    elif kind == TOTALS:
        journal.totals = body
    elif kind == SNAPSHOT:
        journal.snapshot = body
    elif kind == END:
        journal.complete = True
    else:
        journal.unknown[kind] += 1
    return journal
