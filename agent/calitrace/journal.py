"""The journal, ``*.calitrace``: a msgpack stream of frames, append-only and readable when cut short.

A frame is a two-element array: its kind, and a map. The first is the header (kind ``calitrace``); it carries all
that is needed to read the rest on another machine. Events are stored as the bytes that came out of the ring
buffer, so that a mended decoder also mends old recordings. Frames of unknown kind are counted and kept apart.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import msgpack

from calitrace.calico.maps import RawMap
from calitrace.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

SCHEMA = 1
HEADER, EVENTS, TEXT, PROBES, SYMBOLS = "calitrace", "events", "text", "probes", "symbols"
TOTALS, MAPS, SNAPSHOT, COUNTERS, END = "totals", "maps", "snapshot", "counters", "end"
STATEMENT, WALK = "statement", "walk"
KINDS = (HEADER, EVENTS, TEXT, PROBES, SYMBOLS, TOTALS, MAPS, SNAPSHOT, COUNTERS, STATEMENT, WALK, END)
_CHUNK = 1 << 20
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def frame(kind: str, body: Mapping[str, Any]) -> bytes:
    """One frame, ready to append."""
    packed: bytes = msgpack.packb([kind, body], use_bin_type=True, unicode_errors="surrogateescape")
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
    """A journal read back. *probes*: by number. *statements*: by time and sk_buff of a drop, see correlate.witness.
    *walks*: of a probe that was refused or lost, in the maps of each node, by its namespace, see correlate.walk.

    *cut_at*: byte at which it was cut short, None when it has its end frame. *broken*: what garbage ended it, see
    :func:`read`.
    """

    header: dict[str, Any]
    events: list[bytes] = field(default_factory=list)
    probes: dict[int, dict[str, Any]] = field(default_factory=dict)
    symbols: dict[int, str] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    snapshot: dict[str, Any] | None = None
    maps: list[RawMap] = field(default_factory=list)
    counters: list[dict[str, Any]] = field(default_factory=list)
    statements: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    walks: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    complete: bool = False
    cut_at: int | None = None
    broken: Malformed | None = None

    @property
    def gap(self) -> str:
        """What of it could not be read, in words; empty when nothing is missing."""
        if self.broken is not None:
            return f"is damaged at byte {self.broken.offset}: what follows was not read"
        return f"was cut short at byte {self.cut_at}: what follows is missing" if self.cut_at is not None else ""


def map_bodies(raw: RawMap, blocks: Iterable[tuple[int, bytes, bytes]]) -> Iterator[dict[str, Any]]:
    """The bodies of a map's MAPS frames, one for each block: (number of entries, packed keys, packed values).

    An empty map has one frame too.
    """
    about = {
        "name": raw.name,
        "pin": raw.pin,
        "map_type": raw.map_type,
        "key_size": raw.key_size,
        "value_size": raw.value_size,
        "max_entries": raw.max_entries,
        "cpus": raw.cpus,
        "notes": list(raw.notes),
    }
    first = True
    for _, keys, values in blocks:
        yield {**about, "first": first, "keys": keys, "values": values}
        first = False
    if first:
        yield {**about, "first": True, "keys": b"", "values": b""}


@dataclass(frozen=True)
class Stored:
    """The entries of a map of a journal: packed *keys* and *values*, of these sizes each, block by block."""

    key_size: int
    value_size: int
    blocks: list[tuple[int, bytes, bytes]] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        for count, keys, values in self.iter_blocks():
            for index in range(count):
                yield (
                    keys[index * self.key_size : (index + 1) * self.key_size],
                    values[index * self.value_size : (index + 1) * self.value_size],
                )

    def iter_blocks(self) -> Iterator[tuple[int, bytes, bytes]]:
        """(number of entries, packed keys, packed values)."""
        yield from self.blocks


def iter_frames(chunks: Iterable[bytes]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(byte at which it ends, kind, body) of each frame, the header first.

    Raises Malformed when it does not begin with a header of a schema we know, or has garbage inside; a tail that is
    merely missing is no error.
    """
    unpacker = msgpack.Unpacker(
        raw=False, strict_map_key=False, max_buffer_size=1 << 30, unicode_errors="surrogateescape"
    )
    done = 0
    for chunk in chunks:
        unpacker.feed(chunk)
        try:
            for item in unpacker:
                kind, body = _checked(item, done)
                done = unpacker.tell()
                yield done, kind, body
        except (KeyError, TypeError, ValueError, msgpack.UnpackException) as wrong:
            raise Malformed(done, "a frame", f"{type(wrong).__name__}", "journal") from wrong
    if not done:
        raise Malformed(0, "a calitrace journal", "no complete frame", "journal")


def read(stream: BinaryIO, *, keep: bool = False) -> Journal:
    """Read all that is there.

    Raises Malformed as iter_frames does; with *keep* garbage after the header is no error: the journal has what came
    before, and ``broken`` says what was found. ``cut_at`` says where a tail is missing.
    """
    journal: Journal | None = None
    end = 0
    try:
        for end, kind, body in iter_frames(iter(lambda: stream.read(_CHUNK), b"")):
            if journal is None:
                journal = Journal(body)
                continue
            try:
                _take(journal, kind, body, end)
            except (KeyError, TypeError, ValueError) as wrong:
                raise Malformed(
                    end, f"a frame of kind {kind!r}", f"{type(wrong).__name__} {wrong}", "journal"
                ) from wrong
    except Malformed as wrong:
        if not keep or journal is None:
            raise
        journal.broken = wrong
    assert journal is not None  # or iter_frames raised
    if not journal.complete:
        journal.cut_at = end
    return journal


def _checked(item: object, at: int) -> tuple[str, dict[str, Any]]:
    if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict)):
        raise Malformed(at, "a frame [kind, map]", type(item).__name__, "journal")
    kind, body = item
    if at == 0 and kind != HEADER:
        raise Malformed(at, f"a frame of kind {HEADER!r}", repr(kind), "journal")
    if at != 0 and kind == HEADER:  # files that were joined: numbers of one mean nothing in the other
        raise Malformed(at, "frames of one journal", "the header of another", "journal")
    if at == 0 and body.get("schema") != SCHEMA:
        raise Malformed(at, f"schema {SCHEMA}", f"schema {body.get('schema')}", "journal")
    raw = body.get("raw")
    if kind == EVENTS and not (isinstance(raw, list) and all(isinstance(each, bytes) for each in raw)):
        raise Malformed(at, "a list of event records", type(raw).__name__, "journal")
    if kind == TEXT and not isinstance(raw, bytes):
        raise Malformed(at, "bytes of text", type(raw).__name__, "journal")
    return kind, body


def _take(journal: Journal, kind: str, body: dict[str, Any], at: int) -> None:
    if kind == EVENTS:
        journal.events += body["raw"]
    elif kind == PROBES:
        for probe in body.get("probes", ()):  # a later record of the same probe knows its outcome
            journal.probes[probe["number"]] = probe
    elif kind == SYMBOLS:
        journal.symbols.update(typed(body.get("names", {}), int, str))
    elif kind == TOTALS:
        journal.totals = checked_totals(body)
    elif kind == SNAPSHOT:
        journal.snapshot = body
    elif kind == COUNTERS:
        journal.counters.append(body)
    elif kind == STATEMENT:
        journal.statements[body["ktime_ns"], body["skbaddr"]] = body["said"]
    elif kind == WALK:
        journal.walks[body["netns"]] = body["steps"]
    elif kind == MAPS:
        _take_map(journal, body, at)
    elif kind == END:
        journal.complete = True
    elif kind != TEXT:  # whose reader is `calitrace log`
        journal.unknown[kind] += 1


def checked_totals(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a TOTALS frame: its ``stats`` and ``lost`` are numbers by name. Raises Malformed."""
    try:
        return {**body, **{name: typed(body[name], str, int) for name in ("stats", "lost") if name in body}}
    except TypeError as wrong:
        raise Malformed(0, "totals", str(wrong), "journal") from wrong


def typed(plain: object, key: type[_Key], value: type[_Value]) -> dict[_Key, _Value]:
    """*plain* as a dict of these types. Raises TypeError: what is in a journal may be anybody's."""
    if not isinstance(plain, dict) or not all(isinstance(k, key) and isinstance(v, value) for k, v in plain.items()):
        raise TypeError(f"{type(plain).__name__} for {key.__name__} to {value.__name__}")
    return plain


def _take_map(journal: Journal, body: dict[str, Any], at: int) -> None:
    keys, values = body["keys"], body["values"]
    numbers = {name: body[name] for name in ("map_type", "key_size", "value_size", "max_entries", "cpus")}
    texts = {name: body[name] for name in ("name", "pin")}
    if not (
        isinstance(keys, bytes)
        and isinstance(values, bytes)
        and all(isinstance(each, int) and each >= 0 for each in numbers.values())
        and min(numbers[name] for name in ("key_size", "value_size", "cpus")) > 0
        and all(isinstance(each, str) for each in (*texts.values(), *body["notes"]))
    ):
        raise Malformed(at, "a block of a map", "other types", "journal")
    if body["first"]:
        each_cpu = -(-body["value_size"] // 8) * 8
        width = body["value_size"] if body["cpus"] == 1 else body["cpus"] * each_cpu
        entries = Stored(body["key_size"], width)
        journal.maps.append(RawMap(**texts, **numbers, entries=entries, notes=tuple(body["notes"])))
    if not journal.maps or journal.maps[-1].pin != body["pin"]:
        raise Malformed(at, "the first block of a map", "a later one", "journal")
    stored = journal.maps[-1].entries
    assert isinstance(stored, Stored)
    count, rest = divmod(len(keys), stored.key_size)
    if rest or len(values) != count * stored.value_size:
        raise Malformed(at, f"{count} values", f"{len(values)} bytes", "journal")
    if count:
        stored.blocks.append((count, keys, values))
