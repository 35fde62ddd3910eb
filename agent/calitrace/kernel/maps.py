"""Calico's maps on this machine: where they are pinned, and their bytes.

A node's maps lie below one bpffs: ``tc/globals/`` and, before v3.26, one directory for each interface and hook
(``tc/eth0_igr/``). Maps that are not pinned are found through the programs that use them. Which of several
versions is alive is seen from the same programs. Nothing is decoded here.
"""

from __future__ import annotations

import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calitrace.calico.maps import RawMap
from calitrace.errors import EnvironmentUnfit, NotCalico, UsageError
from calitrace.kernel import netns, syscall

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BPFFS = Path("/sys/fs/bpf")
_NETFILTER = Path("/proc/sys/net/netfilter")
_PREFIXES = ("cali", "xdp_cali")
_PER_INTERFACE = ("_igr", "_egr", "_xdp")
_DEEPEST = 6
# enum bpf_map_type: these have one value for each CPU; those iterate by bucket, so no key comes twice.
_PER_CPU = {5, 6, 10, 21}
_BY_BUCKET = {1, 5, 9, 10}
_NOT_READABLE = {3, 4, 26, 27}  # program and perf event arrays, a perf or BPF ring
_NO_BATCH = {errno.EINVAL, errno.EOPNOTSUPP, 524}  # 524: the kernel's own ENOTSUPP
_BLOCK_BYTES = 1 << 20
_FIRST_BLOCK = 512


@dataclass(frozen=True)
class Found:
    """A map. *pin*: its path below the bpffs, "" when it is not pinned. *in_use*: a loaded Calico program uses it.

    *program_btf*: id of the BTF of such a program, 0 without one.
    """

    name: str
    pin: str
    path: Path | None
    info: syscall.MapInfo
    in_use: bool
    program_btf: int = 0

    @property
    def directory(self) -> str:
        """Where it is pinned, below the bpffs."""
        return self.pin.rpartition("/")[0]


def root(bpffs: Path | None, namespace: str, pid: int | None = None) -> Path:
    """The bpffs that the options ask for. *namespace*: "" for ours.

    Raises UsageError for a process or namespace that is not there.
    A namespace has no mounts of its own: of its processes' views and ours the first with pins of Calico is taken. What
    `ip netns exec` starts has a /sys of its own, without a bpffs.
    """
    where = bpffs or BPFFS
    if pid is not None:
        if not Path(f"/proc/{pid}/root").exists():
            raise UsageError(f"no process {pid}", "name one of the node's own processes, such as calico-node's")
        return _seen_by(pid, where)
    if not namespace:
        return where
    views = [*(_seen_by(each, where) for each in _processes_in(namespace)), where]
    return next((each for each in views if _has_pins(each)), views[0])


def _seen_by(pid: int, where: Path) -> Path:
    """A path as that process has it."""
    return Path(f"/proc/{pid}/root") / (where.relative_to("/") if where.is_absolute() else where)


def _has_pins(where: Path) -> bool:
    """Whether there is anything named like Calico's; where we may not look there may be."""
    try:
        return next(_iter_pins(where), None) is not None
    except PermissionError:
        return True


def _processes_in(namespace: str) -> list[int]:
    """Processes of that network namespace, one for each set of mounts among them."""
    wanted = netns.inum(namespace)
    found: dict[int, int] = {}
    for process in sorted(int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()):
        spaces = Path(f"/proc/{process}/ns")
        with suppress(OSError):  # it ended while we looked
            if (spaces / "net").stat().st_ino == wanted:
                found.setdefault((spaces / "mnt").stat().st_ino, process)
    return list(found.values())


def interfaces(namespace: str) -> dict[int, str]:
    """ifindex to name in a namespace, "" for ours. Raises UsageError, EnvironmentUnfit."""
    with netns.inside(namespace):
        return dict(socket.if_nameindex())


def sysctls(names: Iterable[str], namespace: str) -> dict[str, int]:
    """Numbers below /proc/sys/net/netfilter, without those that are not there. Raises as :func:`interfaces`."""
    with netns.inside(namespace):
        found = {name: _NETFILTER / name for name in names}
        return {name: int(path.read_text()) for name, path in found.items() if path.exists()}


def find(where: Path, namespace: str = "") -> list[Found]:
    """All of a node's maps, sorted by pin. *namespace*: the node's, by name or process id, "" for ours: where several
    nodes' maps lie below *where*, those are taken beside which are the ones that its programs use. Where nothing is
    pinned, as `ip netns exec` has it, those are all.

    Raises NotCalico when there are none, UsageError when those of several nodes lie below *where*,
    EnvironmentUnfit without the privilege to look.
    """
    try:
        used = _used_by_calico()
        pins = list(_iter_pins(where))
    except PermissionError:
        raise _no_privilege() from None
    found = [_open_pin(path, where, used) for path in pins]
    maps = [each for each in found if each is not None]
    if not maps and where == BPFFS:
        maps = [
            Found(info.name, "", None, info, True, btf)
            for info, btf in used.values()
            if info.name.startswith(_PREFIXES)
        ]
    if _several_nodes(maps):
        here = _attached_maps(namespace)
        homes = {each.directory for each in maps if each.pin and each.info.id in here}
        maps = [each for each in maps if (each.directory in homes if each.pin else each.info.id in here)] or maps
    _one_node(maps, where)
    if not maps:
        raise NotCalico(
            f"no Calico maps below {where}",
            "is bpfEnabled set, and the bpffs mounted here? --bpffs, --pid and --netns look elsewhere",
        )
    return sorted(maps, key=lambda each: (each.pin, each.name))


def of_node(state_map: int) -> list[Found]:
    """The maps of the node whose state map has this id: those pinned beside it, and those that its programs use."""
    used = _used_by_calico(state_map)
    pins = [each for path in _iter_pins(BPFFS) if (each := _open_pin(path, BPFFS, used)) is not None]
    homes = {each.directory for each in pins if each.info.id == state_map}
    found = {each.info.id: each for each in pins if each.directory in homes}
    return [*found.values(), *(Found(i.name, "", None, i, True, btf) for i, btf in used.values() if i.id not in found)]


def named(beginning: str) -> list[Found]:
    """All maps of this machine whose names begin so, whichever node's. Raises OSError."""
    found = []
    for identifier in syscall.map_ids():
        with suppress(FileNotFoundError):  # it went while we looked
            info = syscall.map_by_id(identifier)
            if info.name.startswith(beginning):
                found.append(Found(info.name, "", None, info, True))
    return found


def _no_privilege() -> EnvironmentUnfit:
    return EnvironmentUnfit("no permission to read BPF maps", "run as root or with CAP_BPF and CAP_SYS_ADMIN")


def _iter_pins(where: Path) -> Iterator[Path]:
    """Paths below *where* that are named like Calico's; those of tc/ alone when a node keeps its maps there."""
    if (where / "tc" / "globals").is_dir():
        where = where / "tc"

    def fail(failure: OSError) -> None:
        if isinstance(failure, PermissionError):
            raise failure

    for directory, folders, files in os.walk(where, onerror=fail):
        if len(Path(directory).relative_to(where).parts) >= _DEEPEST:
            folders.clear()
        yield from (Path(directory) / name for name in sorted(files) if name.startswith(_PREFIXES))


def _open_pin(path: Path, where: Path, used: dict[int, tuple[syscall.MapInfo, int]]) -> Found | None:
    """The map pinned there; None for a program or a link, and for what was unpinned while we looked."""
    try:
        descriptor = syscall.object_get(path)
    except PermissionError:
        raise _no_privilege() from None
    except OSError:
        return None
    try:
        if "bpf-map" not in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115  # not a path
            return None
        info = syscall.map_info(descriptor)
    finally:
        os.close(descriptor)
    return Found(path.name, str(path.relative_to(where)), path, info, info.id in used, used.get(info.id, (info, 0))[1])


def _attached_maps(namespace: str) -> set[int]:
    """Ids of the maps of the programs attached to interfaces of a namespace, and of those in their chains."""
    from calitrace.kernel import attached

    found: set[int] = set()
    waiting = {each for ids in attached.calico_programs(namespace).values() for each in ids}
    seen: set[int] = set()
    while waiting:
        identifier = waiting.pop()
        seen.add(identifier)
        with suppress(FileNotFoundError):  # it was unloaded while we looked
            maps = set(syscall.program_by_id(identifier).map_ids) - found
            found |= maps
            waiting |= {program for each in maps for program in chained(each)} - seen
    return found


def chained(identifier: int) -> set[int]:
    """Ids of the programs in this map, if it is an array of Calico's own programs."""
    descriptor = syscall.map_fd(identifier)
    try:
        info = syscall.map_info(descriptor)
        if info.type != syscall.MAP_TYPE_PROG_ARRAY or not info.name.startswith("cali_progs"):
            return set()
        slots = [syscall.map_lookup(descriptor, each.to_bytes(4, "little"), 4) for each in range(info.max_entries)]
        return {int.from_bytes(each, "little") for each in slots if each}
    finally:
        os.close(descriptor)


def _several_nodes(maps: list[Found]) -> list[str]:
    """Where maps of one name are: they are two nodes', except those that old releases kept for each interface."""
    places: dict[str, set[str]] = {}
    for each in maps:
        if not each.directory.endswith(_PER_INTERFACE):
            places.setdefault(each.name, set()).add(each.directory if each.pin else str(each.info.id))
    return sorted({place for group in places.values() if len(group) > 1 for place in group})


def _one_node(maps: list[Found], where: Path) -> None:
    several = _several_nodes(maps)
    if several and maps[0].pin:
        raise UsageError(
            f"the maps of {len(several)} nodes lie below {where}",
            "choose one: " + "  ".join(f"--bpffs {where / place}" for place in several[:4]),
        )
    if several:
        raise UsageError(
            "the maps of several nodes are loaded, none is pinned here, and none is of a program of this namespace",
            "choose one with --pid or --netns",
        )


def _used_by_calico(beside: int = 0) -> dict[int, tuple[syscall.MapInfo, int]]:
    """The maps that loaded Calico programs use, by id, with the id of such a program's BTF.

    *beside*: only of programs that use the map with this id.
    """
    found: dict[int, tuple[syscall.MapInfo, int]] = {}
    for identifier in syscall.program_ids():
        try:
            program = syscall.program_by_id(identifier)
        except FileNotFoundError:
            continue  # it was unloaded while we looked
        if not program.name.startswith(_PREFIXES) or (beside and beside not in program.map_ids):
            continue
        for each in program.map_ids:
            if each not in found:
                with suppress(FileNotFoundError):
                    found[each] = syscall.map_by_id(each), program.btf_id
    return found


def types(identifier: int) -> bytes | None:
    """The BTF with this id, None for 0 or when it has gone."""
    try:
        return syscall.btf_bytes(identifier) if identifier else None
    except OSError:  # before Linux 4.19, or what held it has gone
        return None


def open_map(found: Found) -> int:
    """A file descriptor. Raises EnvironmentUnfit when the map has gone meanwhile, or may not be opened."""
    try:
        return syscall.object_get(found.path) if found.path else syscall.map_fd(found.info.id)
    except PermissionError:
        raise _no_privilege() from None
    except OSError as failure:
        raise EnvironmentUnfit(
            f"map {found.pin or found.name} has gone: {failure.strerror}", "Felix may be upgrading it: try again"
        ) from None


def readable(found: Found) -> bool:
    """Whether it holds data: program arrays and rings do not."""
    return found.info.type not in _NOT_READABLE


def programs_at(found: Found, indices: Iterable[int]) -> dict[int, int]:
    """The ids of the programs in a program array at these indices, without those that are empty."""
    descriptor = open_map(found)
    try:
        slots = {each: syscall.map_lookup(descriptor, each.to_bytes(4, "little"), 4) for each in sorted(indices)}
        return {index: int.from_bytes(value, "little") for index, value in slots.items() if value is not None}
    finally:
        os.close(descriptor)


def read(found: Found) -> RawMap:
    """A map whose entries are read from the kernel as they are asked for.

    What happened while they were read is in the notes of :class:`Entries` (``raw.entries``) afterwards.
    """
    info = found.info
    cpus = syscall.possible_cpus() if info.type in _PER_CPU else 1
    return RawMap(
        found.name, found.pin, info.type, info.key_size, info.value_size, info.max_entries, cpus, Entries(found)
    )


def _value_bytes(info: syscall.MapInfo) -> int:
    """Size of a value as the kernel hands it out: of a per-CPU map those of all CPUs, each padded to 8 bytes."""
    return syscall.possible_cpus() * (-(-info.value_size // 8) * 8) if info.type in _PER_CPU else info.value_size


class Entries:
    """The (key, value) pairs of a map, read anew each time it is iterated.

    *notes*: what befell the last reading: keys that came twice, an end forced because keys vanish faster than we read.
    """

    def __init__(self, found: Found) -> None:
        self._found = found
        self._value_size = _value_bytes(found.info)
        self.notes: list[str] = []
        self.complete = True

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        key_size, value_size = self._found.info.key_size, self._value_size
        for count, keys, values in self.iter_blocks():
            for index in range(count):
                yield (
                    keys[index * key_size : (index + 1) * key_size],
                    values[index * value_size : (index + 1) * value_size],
                )

    def iter_blocks(self) -> Iterator[tuple[int, bytes, bytes]]:
        """(number, packed keys, packed values), some thousands at once; each key once.

        Raises EnvironmentUnfit when the map cannot be opened or read.
        """
        self.notes, self.complete = [], True
        info = self._found.info
        if info.type in _NOT_READABLE:
            raise EnvironmentUnfit(f"map {self._found.name} holds no data that can be read")
        descriptor = open_map(self._found)
        try:
            yield from self._iter_blocks(descriptor)
        except PermissionError:
            raise _no_privilege() from None
        except OSError as failure:
            raise EnvironmentUnfit(f"cannot read map {self._found.name}: {failure.strerror}") from failure
        finally:
            os.close(descriptor)

    def at(self, keys: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
        """Those with these keys. Raises as :meth:`iter_blocks`."""
        descriptor = open_map(self._found)
        try:
            found = [(key, syscall.map_lookup(descriptor, key, self._value_size)) for key in keys]
        except OSError as failure:
            raise EnvironmentUnfit(f"cannot read map {self._found.name}: {failure.strerror}") from failure
        finally:
            os.close(descriptor)
        return [(key, value) for key, value in found if value is not None]

    def _iter_blocks(self, descriptor: int) -> Iterator[tuple[int, bytes, bytes]]:
        info = self._found.info
        most = max(_BLOCK_BYTES // (info.key_size + self._value_size), 16)
        batch = syscall.Batch(descriptor, info.key_size, self._value_size, min(_FIRST_BLOCK, most))
        try:
            block = batch.read()
        except OSError as failure:
            if failure.errno not in _NO_BATCH:
                raise
            yield from self._once(self._iter_single(descriptor))
            return
        if info.type in _BY_BUCKET:
            yield from _rest(batch, block, most)
        else:
            yield from self._once(_rest(batch, block, most))

    def _iter_single(self, descriptor: int) -> Iterator[tuple[int, bytes, bytes]]:
        """Without batches: key after key."""
        key = None
        while (key := syscall.map_next_key(descriptor, key, self._found.info.key_size)) is not None:
            value = syscall.map_lookup(descriptor, key, self._value_size)
            yield (0, key, b"") if value is None else (1, key, value)

    def _once(self, blocks: Iterator[tuple[int, bytes, bytes]]) -> Iterator[tuple[int, bytes, bytes]]:
        """Each key once, and an end: these maps start again when the key at the cursor is deleted."""
        seen: set[bytes] = set()
        key_size, value_size = self._found.info.key_size, self._value_size
        steps = again = 0
        for count, keys, values in blocks:
            steps += max(count, 1)
            fresh = []
            for index in range(count):
                key = keys[index * key_size : (index + 1) * key_size]
                if key in seen:
                    again += 1
                else:
                    seen.add(key)
                    fresh.append(index)
            if len(fresh) < count:
                keys = b"".join(keys[i * key_size : (i + 1) * key_size] for i in fresh)
                values = b"".join(values[i * value_size : (i + 1) * value_size] for i in fresh)
            if fresh:
                yield len(fresh), keys, values
            if steps > 2 * self._found.info.max_entries:
                self.complete = False
                self.notes.append("entries vanished faster than they could be read: some may be missing")
                break
        if again:
            self.notes.append(f"{again} entries came twice because the map changed while it was read; shown once")


def _rest(batch: syscall.Batch, block: tuple[int, bytes, bytes], most: int) -> Iterator[tuple[int, bytes, bytes]]:
    """The blocks of a batch from its first on: that one is small, for the first line to be soon.

    The kernel copies the next block, which takes as long as putting one into words, while the last one is looked at.
    """
    batch.grow(most)
    with ThreadPoolExecutor(max_workers=1) as ahead:
        while True:
            coming = None if batch.done else ahead.submit(batch.read)
            if block[0]:
                yield block
            if coming is None:
                return
            block = coming.result()


def delete(found: Found, keys: list[bytes]) -> int:
    """Remove entries; how many of them were still there. Raises EnvironmentUnfit."""
    descriptor = open_map(found)
    try:
        return sum(syscall.map_delete(descriptor, key) for key in keys)
    except OSError as failure:
        raise EnvironmentUnfit(f"cannot change map {found.name}: {failure.strerror}") from failure
    finally:
        os.close(descriptor)


def clear(found: Found, keys: list[bytes]) -> None:
    """Set the values of these keys to zeros, on all CPUs. Raises EnvironmentUnfit."""
    size = _value_bytes(found.info)
    descriptor = open_map(found)
    try:
        for key in keys:
            syscall.map_update(descriptor, key, bytes(size))
    except OSError as failure:
        raise EnvironmentUnfit(f"cannot change map {found.name}: {failure.strerror}") from failure
    finally:
        os.close(descriptor)
