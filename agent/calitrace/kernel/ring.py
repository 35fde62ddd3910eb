"""The reader of a BPF ring buffer: whole batches by one copy, where a callback for each record costs ten times that.

Layout and protocol: Linux kernel/bpf/ringbuf.c. A page with the consumer's position (ours to write), a page with the
producer's, and the data mapped twice in a row, so that a record is never in two pieces. Each record has a header of
8 bytes: its length with two flags, and an offset of the kernel's own.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading

_POSITION = struct.Struct("=Q")
_HEADER = struct.Struct("=I")
_HEADER_BYTES = 8
_BUSY, _DISCARD = 1 << 31, 1 << 30


class Ring:
    """*descriptor*: of a map of type BPF_MAP_TYPE_RINGBUF with *size* bytes; it stays the caller's."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._mask = size - 1
        self._consumer = mmap.mmap(descriptor, self._page)
        # Stored in one piece. (struct.pack_into clears the bytes first, and a program that sees 0 there finds no room.)
        self._position = memoryview(self._consumer).cast("Q")
        self._data = mmap.mmap(descriptor, self._page + 2 * size, prot=mmap.PROT_READ, offset=self._page)
        self._epoll = select.epoll()
        self._epoll.register(descriptor, select.EPOLLIN)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Unmap."""
        self._epoll.close()
        self._data.close()
        self._position.release()
        self._consumer.close()

    def wait(self, timeout_ms: int) -> None:
        """Return when the kernel wakes us, at the latest after *timeout_ms*."""
        self._epoll.poll(timeout_ms / 1000)

    def read(self) -> list[bytes]:
        """All records that are whole, oldest first, without waiting."""
        begin = self._position[0]
        (end,) = _POSITION.unpack_from(self._data)
        self._fence()
        data, base, at = self._data, self._page + (begin & self._mask), 0
        found = []
        while at < end - begin:
            (length,) = _HEADER.unpack_from(data, base + at)
            if length & _BUSY:
                break
            body = at + _HEADER_BYTES
            if not length & _DISCARD:
                found.append((body, body + length))
            at = body + ((length & ~_DISCARD) + 7 & ~7)
        self._fence()
        chunk = data[base : base + at]
        self._fence()
        self._position[0] = begin + at
        return [chunk[first:last] for first, last in found]

    def _fence(self) -> None:
        """Order what was read or written before against what follows: Python has no barrier of its own but its locks.

        What precedes the first release is over before the second acquire. On x86-64 nothing of this would be needed.
        """
        for _ in range(2):
            with self._lock:
                pass
