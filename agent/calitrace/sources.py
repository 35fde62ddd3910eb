"""Chunks of bytes from anywhere, told apart by what is in them, and cut into lines. Memory does not grow with them."""

from __future__ import annotations

import zlib
from itertools import chain
from typing import TYPE_CHECKING

from calitrace import journal
from calitrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK_BYTES = 1 << 17  # to read at once: its lines still stand in the CPU's cache when they are looked at
LONGEST_LINE = 1 << 20  # characters; what is longer is given in pieces
_GZIP = b"\x1f\x8b"
_JOURNAL = journal.frame(journal.HEADER, {})[:-1]  # up to the map
_GZIP_WINDOW = 31  # zlib: 15 bits, with gzip's header


def told_apart(chunks: Iterable[bytes], name: str) -> tuple[bool, Iterator[bytes]]:
    """(whether it is a journal of ours, the same bytes unpacked if they were gzip). *name*: of the file, for errors."""
    beginning, rest = _beginning(chunks, len(_GZIP))
    if beginning.startswith(_GZIP):
        beginning, rest = _beginning(_unpacked(rest, name), len(_JOURNAL))
    else:
        beginning, rest = _beginning(rest, len(_JOURNAL))
    return beginning.startswith(_JOURNAL), rest


def _beginning(chunks: Iterable[bytes], count: int) -> tuple[bytes, Iterator[bytes]]:
    iterator, head = iter(chunks), b""
    for chunk in iterator:
        head += chunk
        if len(head) >= count:
            break
    return head, chain([head] if head else [], iterator)


def _unpacked(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Raises UsageError where the file is damaged or cut short, after what could be read."""
    unpacker = zlib.decompressobj(_GZIP_WINDOW)
    for chunk in chunks:
        data = chunk
        while data:
            if unpacker.eof:  # gzip files may follow each other
                unpacker = zlib.decompressobj(_GZIP_WINDOW)
            try:
                yield unpacker.decompress(data)
            except zlib.error as failure:
                raise UsageError(f"{name}: damaged gzip: {failure}", "what could be read was used") from failure
            data = unpacker.unused_data
    if not unpacker.eof:
        yield unpacker.flush()
        raise UsageError(f"{name}: the gzip file is cut short", "what could be read was used")


class Lines:
    """Chunks to lines without their newline. Bytes that are no UTF-8 survive as surrogates."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[str]:
        """The lines that are now whole."""
        whole, newline, rest = chunk.rpartition(b"\n")
        if not newline:
            self._rest += chunk
            lines = []
        else:
            lines = (self._rest + whole).decode(errors="surrogateescape").split("\n")
            self._rest = rest
        while len(self._rest) > LONGEST_LINE:
            lines.append(self._rest[:LONGEST_LINE].decode(errors="surrogateescape"))
            self._rest = self._rest[LONGEST_LINE:]
        return lines

    def flush(self) -> list[str]:
        """The last line, if it has no newline."""
        rest, self._rest = self._rest, b""
        return [rest.decode(errors="surrogateescape")] if rest else []
