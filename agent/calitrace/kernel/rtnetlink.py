"""Dumps of rtnetlink for what is read every second: pyroute2 takes a quarter of a millisecond for each interface.

Layouts from include/uapi/linux/netlink.h and rtnetlink.h; integers are the machine's.
"""

from __future__ import annotations

import os
import socket
import struct

RTM_GETQDISC, RTM_GETSTATS = 38, 94
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_NUMBER = struct.Struct("=i")
_REQUEST_DUMP, _INTERRUPTED = 0x301, 0x10
_ERROR, _DONE = 2, 3
_TRIES = 4


def dump(kind: int, body: bytes) -> list[bytes]:
    """The payloads of all messages that answer a dump of *kind* in this thread's namespace.

    When things change while the kernel lists them, it is asked again; what it says the last time is taken as it is.
    Raises OSError.
    """
    found: list[bytes] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as route:
        for _ in range(_TRIES):
            route.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_DUMP, 0, 0) + body)
            found, whole = _answer(route)
            if whole:
                break
    return found


def _answer(route: socket.socket) -> tuple[list[bytes], bool]:
    """The payloads up to the end of a dump, and whether nothing changed meanwhile."""
    found: list[bytes] = []
    whole = True
    while True:
        raw = route.recv(1 << 18)
        at = 0
        while at < len(raw):
            size, kind, flags, _, _ = _HEADER.unpack_from(raw, at)
            payload = raw[at + _HEADER.size : at + size]
            whole = whole and not flags & _INTERRUPTED
            if kind in (_DONE, _ERROR):
                number = _NUMBER.unpack_from(payload)[0]
                if number:
                    raise OSError(-number, os.strerror(-number))
                return found, whole
            found.append(payload)
            at += max(-(-size // 4) * 4, _HEADER.size)


def attributes(raw: bytes) -> dict[int, bytes]:
    """Attributes by their number."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(raw):
        size, kind = _ATTRIBUTE.unpack_from(raw, at)
        found[kind] = raw[at + _ATTRIBUTE.size : at + size]
        at += max(-(-size // 4) * 4, _ATTRIBUTE.size)
    return found
