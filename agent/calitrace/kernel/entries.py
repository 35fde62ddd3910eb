"""All entries of a BPF map, in batches where the kernel can (Linux 5.6), one by one where it cannot."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

from calitrace.kernel import syscall
from calitrace.kernel.syscall import MapInfo

_GET_NEXT_KEY, _LOOKUP_BATCH = 4, 24
_BATCH = 4096
_PER_CPU = (5, 6, 10)  # BPF_MAP_TYPE_PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH


def value_size(info: MapInfo) -> int:
    """Bytes that a look-up returns: for per-CPU maps the values of all CPUs, each padded to 8 bytes."""
    return -(-info.value_size // 8) * 8 * syscall.possible_cpus() if info.type in _PER_CPU else info.value_size


def iter_entries(descriptor: int, info: MapInfo) -> Iterator[tuple[bytes, bytes]]:
    """Key and value of every entry, in the kernel's order; entries that come or go meanwhile may be missed.

    Raises OSError.
    """
    size = value_size(info)
    try:
        yield from _batches(descriptor, info.key_size, size)
    except OSError as failure:
        if failure.errno not in (errno.EINVAL, errno.ENOTSUPP if hasattr(errno, "ENOTSUPP") else 524, errno.EOPNOTSUPP):
            raise
        yield from _one_by_one(descriptor, info, size)


def _batches(descriptor: int, key_size: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    count, cursor_in, first = _BATCH, ctypes.create_string_buffer(max(key_size, 8)), True
    cursor_out = ctypes.create_string_buffer(max(key_size, 8))
    while True:
        keys, values = ctypes.create_string_buffer(count * key_size), ctypes.create_string_buffer(count * size)
        attr = syscall._Attr()
        attr.u64[0] = 0 if first else ctypes.addressof(cursor_in)
        attr.u64[1] = ctypes.addressof(cursor_out)
        attr.u64[2], attr.u64[3] = ctypes.addressof(keys), ctypes.addressof(values)
        attr.u32[8], attr.u32[9] = count, descriptor
        done = False
        try:
            syscall._call(_LOOKUP_BATCH, attr)
        except OSError as failure:
            if failure.errno == errno.ENOSPC:  # a bucket holds more than fits
                count *= 2
                continue
            if failure.errno != errno.ENOENT:
                raise
            done = True
        raw_keys, raw_values = keys.raw, values.raw
        for n in range(attr.u32[8]):
            yield raw_keys[n * key_size : (n + 1) * key_size], raw_values[n * size : (n + 1) * size]
        if done:
            return
        cursor_in, cursor_out, first = cursor_out, cursor_in, False


def _one_by_one(descriptor: int, info: MapInfo, size: int) -> Iterator[tuple[bytes, bytes]]:
    key: bytes | None = None
    for _ in range(info.max_entries):  # a key deleted under us starts the walk anew: bounded
        key = _next_key(descriptor, key, info.key_size)
        if key is None:
            return
        value = syscall.map_lookup(descriptor, key, size)
        if value is not None:
            yield key, value


def _next_key(descriptor: int, key: bytes | None, key_size: int) -> bytes | None:
    attr = syscall._Attr()
    following = ctypes.create_string_buffer(key_size)
    before = ctypes.create_string_buffer(key or b"", key_size)
    attr.u32[0] = descriptor
    attr.u64[1] = 0 if key is None else ctypes.addressof(before)
    attr.u64[2] = ctypes.addressof(following)
    try:
        syscall._call(_GET_NEXT_KEY, attr)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return None
        raise
    return following.raw
