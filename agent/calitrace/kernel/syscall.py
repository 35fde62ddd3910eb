"""bpf(2): programs, maps and BTF by id, without libbpf and without pins.

Structures from include/uapi/linux/bpf.h. The kernel fills in as much of an info struct as it knows and
leaves the rest zero, so newer members simply read 0 on older kernels.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from calitrace.errors import EnvironmentUnfit

_NR_BPF = {"x86_64": 321, "aarch64": 280}
_MAP_CREATE, _OBJ_PIN, _OBJ_GET = 0, 6, 7
_PROG_GET_NEXT_ID, _MAP_GET_NEXT_ID = 11, 12
_PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID = 13, 14
_OBJ_GET_INFO_BY_FD = 15
_PROG_LOAD, _RAW_TRACEPOINT_OPEN = 5, 17
_PROG_QUERY = 16
_BTF_GET_FD_BY_ID = 19
_MAP_LOOKUP_ELEM, _MAP_UPDATE_ELEM, _MAP_DELETE_ELEM, _MAP_GET_NEXT_KEY = 1, 2, 3, 4
_MAP_LOOKUP_BATCH, _MAP_UPDATE_BATCH = 24, 26
_ENABLE_STATS = 32

MAP_TYPE_PROG_ARRAY = 3
_TCX = {"ingress": 46, "egress": 47}  # enum bpf_attach_type
_PROG_TYPE_RAW_TRACEPOINT, _PROG_TYPE_TRACING, _TRACE_RAW_TP = 17, 26, 23
_LOG_BYTES = 1 << 20
_MOST_PROGRAMS = 64  # the kernel's BPF_MPROG_MAX

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
_ALL_IDS = ["0", "0", "4294967295"]  # /proc/self/uid_map outside of every user namespace

_POSSIBLE = Path("/sys/devices/system/cpu/possible")

_libc = ctypes.CDLL(None, use_errno=True)


class _ProgInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("gpl_compatible", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("nr_jited_ksyms", ctypes.c_uint32),
        ("nr_jited_func_lens", ctypes.c_uint32),
        ("jited_ksyms", ctypes.c_uint64),
        ("jited_func_lens", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("nr_func_info", ctypes.c_uint32),
        ("nr_line_info", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("jited_line_info", ctypes.c_uint64),
        ("nr_jited_line_info", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("jited_line_info_rec_size", ctypes.c_uint32),
        ("nr_prog_tags", ctypes.c_uint32),
        ("prog_tags", ctypes.c_uint64),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
        ("recursion_misses", ctypes.c_uint64),
    )


class _MapInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _BtfInfo(ctypes.Structure):
    _fields_ = (("btf", ctypes.c_uint64), ("btf_size", ctypes.c_uint32), ("id", ctypes.c_uint32))


class Attr(ctypes.Union):
    """The parts of union bpf_attr that we use, as 128 zeroed bytes."""

    _fields_ = (("bytes", ctypes.c_uint8 * 128), ("u32", ctypes.c_uint32 * 32), ("u64", ctypes.c_uint64 * 16))


@dataclass(frozen=True)
class ProgramInfo:
    """A loaded program. *run_time_ns* and *run_count* grow only while kernel statistics are on.

    *jited_bytes*: size of its machine code, 0 when it is interpreted or may not be known."""

    id: int
    type: int
    name: str
    tag: str
    load_time_ns: int
    map_ids: tuple[int, ...]
    btf_id: int
    run_time_ns: int
    run_count: int
    recursion_misses: int
    jited_bytes: int = 0


@dataclass(frozen=True)
class MapInfo:
    """A map. *name* is cut by the kernel at 15 characters. Sizes in bytes."""

    id: int
    type: int
    name: str
    key_size: int
    value_size: int
    max_entries: int
    btf_id: int
    flags: int = 0
    btf_key_type_id: int = 0
    btf_value_type_id: int = 0


def call(command: int, attr: Attr) -> int:
    """bpf(2). Raises OSError; EnvironmentUnfit on a machine on which we do not know its number."""
    machine = platform.machine()
    if machine not in _NR_BPF:
        raise EnvironmentUnfit(f"bpf(2) has no known number on {machine}")
    result = int(_libc.syscall(_NR_BPF[machine], command, ctypes.byref(attr), ctypes.sizeof(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _fd_by_id(command: int, identifier: int) -> int:
    attr = Attr()
    attr.u32[0] = identifier
    return call(command, attr)


def _info(descriptor: int, info: ctypes.Structure) -> None:
    attr = Attr()
    attr.u32[0] = descriptor
    attr.u32[1] = ctypes.sizeof(info)
    attr.u64[1] = ctypes.addressof(info)
    call(_OBJ_GET_INFO_BY_FD, attr)


def object_get(path: Path) -> int:
    """A file descriptor of a pinned program or map. Raises OSError."""
    attr = Attr()
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr.u64[0] = ctypes.addressof(name)
    return call(_OBJ_GET, attr)


def program_fd(identifier: int) -> int:
    """A file descriptor of the program with this id. Raises OSError."""
    return _fd_by_id(_PROG_GET_FD_BY_ID, identifier)


def map_fd(identifier: int) -> int:
    """A file descriptor of the map with this id. Raises OSError."""
    return _fd_by_id(_MAP_GET_FD_BY_ID, identifier)


def program_info(descriptor: int) -> ProgramInfo:
    """Describe a program by file descriptor. Raises OSError."""
    info = _ProgInfo()
    _info(descriptor, info)
    ids: tuple[int, ...] = ()
    if info.nr_map_ids:
        array = (ctypes.c_uint32 * info.nr_map_ids)()
        info = _ProgInfo(nr_map_ids=len(array), map_ids=ctypes.addressof(array))
        _info(descriptor, info)
        ids = tuple(array)
    return ProgramInfo(
        info.id,
        info.type,
        info.name.decode(errors="replace"),
        bytes(info.tag).hex(),
        info.load_time,
        ids,
        info.btf_id,
        info.run_time_ns,
        info.run_cnt,
        info.recursion_misses,
        info.jited_prog_len,
    )


def map_info(descriptor: int) -> MapInfo:
    """Describe a map by file descriptor. Raises OSError."""
    info = _MapInfo()
    _info(descriptor, info)
    return MapInfo(
        info.id,
        info.type,
        info.name.decode(errors="replace"),
        info.key_size,
        info.value_size,
        info.max_entries,
        info.btf_id,
        info.map_flags,
        info.btf_key_type_id,
        info.btf_value_type_id,
    )


def program_by_id(identifier: int) -> ProgramInfo:
    """Describe the program with this id. Raises OSError: FileNotFoundError when it has gone."""
    descriptor = program_fd(identifier)
    try:
        return program_info(descriptor)
    finally:
        os.close(descriptor)


def map_by_id(identifier: int) -> MapInfo:
    """Describe the map with this id. Raises OSError: FileNotFoundError when it has gone."""
    descriptor = map_fd(identifier)
    try:
        return map_info(descriptor)
    finally:
        os.close(descriptor)


def btf_bytes(identifier: int) -> bytes:
    """The BTF blob with this id, as a loaded program or map names it. Raises OSError."""
    descriptor = _fd_by_id(_BTF_GET_FD_BY_ID, identifier)
    try:
        size = _BtfInfo()
        _info(descriptor, size)
        blob = ctypes.create_string_buffer(size.btf_size)
        _info(descriptor, _BtfInfo(btf=ctypes.addressof(blob), btf_size=size.btf_size))
        return blob.raw
    finally:
        os.close(descriptor)


def map_update(descriptor: int, key: bytes, value: bytes) -> None:
    """Set one entry; *key* and *value* must have the map's sizes. Raises OSError."""
    attr = Attr()
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value, len(value))
    attr.u32[0] = descriptor
    attr.u64[1] = ctypes.addressof(key_buffer)
    attr.u64[2] = ctypes.addressof(value_buffer)
    call(_MAP_UPDATE_ELEM, attr)


def map_lookup(descriptor: int, key: bytes, value_size: int) -> bytes | None:
    """One entry's value, or None when there is none. *value_size*: for per-CPU maps all CPUs' together."""
    attr = Attr()
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value_buffer = ctypes.create_string_buffer(value_size)
    attr.u32[0] = descriptor
    attr.u64[1] = ctypes.addressof(key_buffer)
    attr.u64[2] = ctypes.addressof(value_buffer)
    try:
        call(_MAP_LOOKUP_ELEM, attr)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return None
        raise
    return value_buffer.raw


def map_delete(descriptor: int, key: bytes) -> bool:
    """Remove one entry; False when there was none. Raises OSError."""
    attr = Attr()
    key_buffer = ctypes.create_string_buffer(key, len(key))
    attr.u32[0] = descriptor
    attr.u64[1] = ctypes.addressof(key_buffer)
    try:
        call(_MAP_DELETE_ELEM, attr)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return False
        raise
    return True


def map_next_key(descriptor: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after *key* (None: the first), or None at the end.

    The kernel starts again at the first key when *key* has gone: the caller bounds the loop. Raises OSError.
    """
    attr = Attr()
    following = ctypes.create_string_buffer(key_size)
    attr.u32[0] = descriptor
    if key is not None:
        key_buffer = ctypes.create_string_buffer(key, key_size)
        attr.u64[1] = ctypes.addressof(key_buffer)
    attr.u64[2] = ctypes.addressof(following)
    try:
        call(_MAP_GET_NEXT_KEY, attr)
    except OSError as failure:
        if failure.errno == errno.ENOENT:
            return None
        raise
    return following.raw


class Batch:
    """Reads a map in blocks, thousands of entries for one call (Linux 5.6; per-CPU and LPM maps later).

    *value_size*: for per-CPU maps all CPUs' together. *at_once*: entries to ask for; it grows where a hash bucket
    holds more.
    """

    def __init__(self, descriptor: int, key_size: int, value_size: int, at_once: int) -> None:
        self._descriptor = descriptor
        self._sizes = key_size, value_size
        self.grow(at_once)
        # A hash map's cursor is a bucket number, that of other maps a key.
        self._cursors = [ctypes.create_string_buffer(max(key_size, 8)) for _ in range(2)]
        self._started = False
        self.done = False

    def grow(self, at_once: int) -> None:
        """Ask for this many entries from now on."""
        self._at_once = at_once
        self._keys = ctypes.create_string_buffer(at_once * self._sizes[0])
        self._values = ctypes.create_string_buffer(at_once * self._sizes[1])

    def read(self) -> tuple[int, bytes, bytes]:
        """(number of entries, their keys, their values), packed; sets *done* with the last. Raises OSError."""
        while True:
            attr = Attr()
            attr.u64[0] = ctypes.addressof(self._cursors[0]) if self._started else 0
            attr.u64[1] = ctypes.addressof(self._cursors[1])
            attr.u64[2] = ctypes.addressof(self._keys)
            attr.u64[3] = ctypes.addressof(self._values)
            attr.u32[8] = self._at_once
            attr.u32[9] = self._descriptor
            try:
                call(_MAP_LOOKUP_BATCH, attr)
            except OSError as failure:
                if failure.errno == errno.ENOSPC:  # one bucket alone holds more than we made room for
                    self.grow(2 * self._at_once)
                    continue
                if failure.errno != errno.ENOENT:
                    raise
                self.done = True
            self._started = True
            self._cursors.reverse()
            count = int(attr.u32[8])
            key_size, value_size = self._sizes
            return (
                count,
                ctypes.string_at(self._keys, count * key_size),
                ctypes.string_at(self._values, count * value_size),
            )


def load_tracepoint(instructions: bytes, name: str, *, btf_id: int = 0) -> int:
    """A file descriptor of a raw tracepoint's program; with *btf_id* of one that knows the types (Linux 5.5).

    *btf_id*: of the tracepoint's typedef ``btf_trace_NAME``. Raises OSError; its text ends with the verifier's log.
    """
    attr = Attr()
    code, log = ctypes.create_string_buffer(instructions, len(instructions)), ctypes.create_string_buffer(_LOG_BYTES)
    licence = ctypes.create_string_buffer(b"GPL")
    attr.u32[0:2] = (_PROG_TYPE_TRACING if btf_id else _PROG_TYPE_RAW_TRACEPOINT, len(instructions) // 8)
    attr.u64[1:3] = (ctypes.addressof(code), ctypes.addressof(licence))
    for index, byte in enumerate(name.encode()[:15]):
        attr.bytes[48 + index] = byte
    if btf_id:
        attr.u32[17] = _TRACE_RAW_TP
        attr.u32[27] = btf_id
    try:
        return call(_PROG_LOAD, attr)
    except OSError:
        attr.u32[6:8] = (1, len(log))  # once more, to be told why
        attr.u64[4] = ctypes.addressof(log)
        try:
            return call(_PROG_LOAD, attr)
        except OSError as failure:
            raise OSError(failure.errno, f"{failure.strerror}\n{log.value.decode(errors='replace')}") from None


def attach_tracepoint(program: int, name: str = "") -> int:
    """A descriptor that keeps the program attached while it is open. *name*: "" for a program that knows it by type.

    Raises OSError.
    """
    attr = Attr()
    text = ctypes.create_string_buffer(name.encode())
    attr.u64[0] = ctypes.addressof(text) if name else 0
    attr.u32[2] = program
    return call(_RAW_TRACEPOINT_OPEN, attr)


def map_create(
    map_type: int, key_size: int, value_size: int, max_entries: int, *, name: str = "", flags: int = 0, inner: int = 0
) -> int:
    """A file descriptor of a new map without BTF. *inner*: of a map like those in a map of maps. Raises OSError."""
    attr = Attr()
    attr.u32[0:6] = (map_type, key_size, value_size, max_entries, flags, inner)
    for index, byte in enumerate(name.encode()[:15]):
        attr.bytes[28 + index] = byte
    return call(_MAP_CREATE, attr)


def object_pin(descriptor: int, path: Path) -> None:
    """Pin a map or program on a bpffs. Raises OSError."""
    attr = Attr()
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr.u64[0] = ctypes.addressof(name)
    attr.u32[2] = descriptor
    call(_OBJ_PIN, attr)


def map_update_batch(descriptor: int, count: int, keys: bytes, values: bytes) -> None:
    """Set *count* entries from packed *keys* and *values* (Linux 5.6). Raises OSError."""
    attr = Attr()
    key_buffer = ctypes.create_string_buffer(keys, len(keys))
    value_buffer = ctypes.create_string_buffer(values, len(values))
    attr.u64[2] = ctypes.addressof(key_buffer)
    attr.u64[3] = ctypes.addressof(value_buffer)
    attr.u32[8] = count
    attr.u32[9] = descriptor
    call(_MAP_UPDATE_BATCH, attr)


def attached_programs(ifindex: int, hook: str) -> list[int]:
    """Program ids at a tcx *hook* (``ingress``, ``egress``) of an interface of this thread's namespace, in order.

    Raises OSError; EINVAL before Linux 6.6.
    """
    attr = Attr()
    ids = (ctypes.c_uint32 * _MOST_PROGRAMS)()
    attr.u32[0] = ifindex
    attr.u32[1] = _TCX[hook]
    attr.u64[2] = ctypes.addressof(ids)
    attr.u32[6] = len(ids)
    call(_PROG_QUERY, attr)
    return list(ids[: attr.u32[6]])


def capabilities() -> dict[str, bool]:
    """Which of the capabilities that we need this process holds.

    None in a user namespace, such as that of a rootless container: there they are of no use for BPF.
    """
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff")).split()[1], 16)
    if Path("/proc/self/uid_map").read_text().split() != _ALL_IDS:
        effective = 0
    return {name: bool(effective >> bit & 1) for name, bit in _CAPABILITIES.items()}


def possible_cpus() -> int:
    """How many values an entry of a per-CPU map has, each padded to 8 bytes."""
    count = 0
    for part in _POSSIBLE.read_text().split(","):  # 0-3, or 0,2-5 where numbers are left out
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def enable_stats() -> int:
    """Switch run-time statistics on for as long as the returned descriptor is open. Raises OSError."""
    return call(_ENABLE_STATS, Attr())


def program_ids() -> list[int]:
    """Ids of all loaded programs. Raises OSError."""
    return _ids(_PROG_GET_NEXT_ID)


def map_ids() -> list[int]:
    """Ids of all maps. Raises OSError."""
    return _ids(_MAP_GET_NEXT_ID)


def _ids(command: int) -> list[int]:
    found: list[int] = []
    while True:
        attr = Attr()
        attr.u32[0] = found[-1] if found else 0
        try:
            call(command, attr)
        except OSError as failure:
            if failure.errno == errno.ENOENT:
                return found
            raise
        found.append(attr.u32[1])
