"""Packets as pcapng (draft-ietf-opsawg-pcapng), each with its verdict as a comment.

Little-endian; an interface block for each interface, times in nanoseconds; packets begin with their IP header.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

LINKTYPE_RAW = 101
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_MAGIC = 0x1A2B3C4D
_COMMENT, _IF_NAME, _IF_TSRESOL, _USER_APPLICATION = 1, 2, 9, 4
_NANOSECONDS = b"\x09"
_LONGEST = 0xFFFF


class Writer:
    """Makes the bytes of a file: header() first, then packet() for each."""

    def __init__(self) -> None:
        self._interfaces: dict[Hashable, int] = {}

    def header(self, application: str) -> bytes:
        """The section header."""
        return _block(_SECTION, struct.pack("<IHHq", _MAGIC, 1, 0, -1), [(_USER_APPLICATION, application.encode())])

    def packet(self, interface: str, time_ns: int, raw: bytes, len_bytes: int, comment: str) -> bytes:
        """A packet, behind its interface's block when that is new. *time_ns*: since 1970; *raw*: from the IP header."""
        out = b""
        if interface not in self._interfaces:
            self._interfaces[interface] = len(self._interfaces)
            options = [(_IF_NAME, interface.encode(errors="surrogateescape")), (_IF_TSRESOL, _NANOSECONDS)]
            out = _block(_INTERFACE, struct.pack("<HHI", LINKTYPE_RAW, 0, 0), options)
        high, low = divmod(time_ns, 1 << 32)
        fixed = struct.pack("<IIIII", self._interfaces[interface], high, low, len(raw), max(len_bytes, len(raw)))
        return out + _block(_PACKET, fixed + _padded(raw), [(_COMMENT, comment.encode(errors="surrogateescape"))])


def _block(kind: int, body: bytes, options: list[tuple[int, bytes]]) -> bytes:
    for code, value in options:
        value = value[:_LONGEST]
        body += struct.pack("<HH", code, len(value)) + _padded(value)
    body += bytes(4)  # end of options
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def _padded(raw: bytes) -> bytes:
    return raw + bytes(-len(raw) % 4)
