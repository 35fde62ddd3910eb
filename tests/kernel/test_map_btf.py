"""Maps of versions to come: real ones, with BTF of their own or of a program that uses them."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from calitrace import btf
from calitrace.kernel import syscall
from tests.kernel.test_maps import bpffs, calitrace, pin
from tests.unit.test_mapbtf import KEY, Types, conntrack

__all__ = ["bpffs"]
pytestmark = pytest.mark.root
_MAP_CREATE, _PROG_LOAD, _BTF_LOAD = 0, 5, 18
HASH, SOCKET_FILTER, LPM_TRIE = 1, 1, 11
NAME = "cali_v4_ct9"


def reverse(offset: int, size: int) -> bytes:
    """An established connection; the legs begin at *offset*."""
    value = bytearray(size)
    struct.pack_into("<QQBxxxI", value, 0, 0, 5, 2, 0x100)
    for leg, packets in ((offset, 4), (offset + 24, 6)):
        struct.pack_into("<QIIII", value, leg, 100, packets, 0, 3, 7)
    return bytes(value)


def call(command: int, buffers: dict[int, bytes], numbers: dict[int, int], name: tuple[int, str] | None = None) -> int:
    """bpf(2). *buffers*: by the number of their u64, *numbers*: by that of their u32."""
    attr = syscall.Attr()
    held = {at: ctypes.create_string_buffer(raw, len(raw)) for at, raw in buffers.items()}
    for at, buffer in held.items():
        attr.u64[at] = ctypes.addressof(buffer)
    for at, number in numbers.items():
        attr.u32[at] = number
    for index, byte in enumerate(name[1].encode() if name else b""):
        attr.bytes[name[0] + index] = byte  # type: ignore[index]
    return syscall.call(command, attr)


@contextmanager
def closing(*descriptors: int) -> Iterator[None]:
    """Close them at the end."""
    try:
        yield
    finally:
        for each in descriptors:
            os.close(each)


def loaded(types: Types) -> int:
    """The BTF in the kernel."""
    raw = types.raw()
    return call(_BTF_LOAD, {0: raw}, {4: len(raw)})


def make(where: Path, types: int, ids: tuple[int, int], name: str = NAME, value_bytes: int = 96) -> int:
    """A pinned map with this BTF, or with none."""
    numbers = {0: HASH, 1: 16, 2: value_bytes, 3: 10, 4: 1, 12: types, 13: ids[0], 14: ids[1]}
    descriptor = call(_MAP_CREATE, {}, numbers, (28, name))
    syscall.object_pin(descriptor, where / "tc" / "globals" / name)
    return descriptor


def program(types: int, function: int, used: int) -> int:
    """A loaded program of Calico's name that uses a map and has BTF."""
    load = struct.pack("<BBhiBBhi", 0x18, 0x11, 0, used, 0, 0, 0, 0)
    code = load + struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    buffers = {1: code, 2: b"GPL\0", 10: struct.pack("<II", 0, function)}
    return call(_PROG_LOAD, buffers, {0: SOCKET_FILTER, 1: 4, 18: types, 19: 8, 22: 1}, (48, "cali_tc_main"))


def dump(where: Path, *words: str) -> tuple[list[dict[str, Any]], str]:
    """The entries, and what was said about them."""
    done = calitrace(*words, "-j", "--bpffs", str(where))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_a_map_describes_itself(bpffs: Path, tmp_path: Path) -> None:
    types = Types()
    ids = conntrack(types)
    blob = loaded(types)
    descriptor = make(bpffs, blob, ids)
    with closing(blob, descriptor):
        syscall.map_update(descriptor, KEY, reverse(32, 96))
        (entry,), said = dump(bpffs, "conntrack", "dump")
        assert (entry["layout"], entry["state"], entry["ba"]["packets"]) == ("btf", "ESTABLISHED", 6)
        assert "cali_v4_ct9 is of no version that we know (v9 16+96): decoded by its BTF" in said
        shown = calitrace("conntrack", "dump", "--bpffs", str(bpffs)).stdout
        assert "TCP 10.0.0.2:4000 -> 0.0.0.0:0 -> 10.0.0.1:80" in shown
        assert dump(bpffs, "conntrack", "summary")[0][0]["established"] == 1
        file = str(tmp_path / "snapshot")
        assert calitrace("snapshot", "-w", file, "--bpffs", str(bpffs)).returncode == 0
        offline = calitrace("conntrack", "dump", "-r", file, "-j")
        (stored,) = [json.loads(line) for line in offline.stdout.splitlines()]
        assert (stored["layout"], stored["ba"]) == ("btf", {**entry["ba"], "interface": stored["ba"]["interface"]})


def test_a_program_describes_the_map_that_it_uses(bpffs: Path) -> None:
    types = Types()
    ids = conntrack(types)
    ends = [types.new(btf.KIND_PTR, "", each) for each in ids]
    whole = types.struct("", 16, ("key", ends[0], 0), ("value", ends[1], 8))
    types.new(btf.KIND_VAR, NAME, whole, tail=struct.pack("<I", 1))
    proto = types.new(btf.KIND_FUNC_PROTO, "", types.ids["s32"])
    function = types.new(btf.KIND_FUNC, "cali_tc_main", proto)
    blob = loaded(types)
    descriptor = make(bpffs, 0, (0, 0))
    user = program(blob, function, descriptor)
    with closing(blob, descriptor, user):
        syscall.map_update(descriptor, KEY, reverse(32, 96))
        (entry,), said = dump(bpffs, "conntrack", "dump")
        assert (entry["layout"], entry["state"]) == ("btf", "ESTABLISHED")
        assert "decoded by the BTF of the programs that use it" in said


def test_btf_wins_over_a_table_that_it_contradicts(bpffs: Path) -> None:
    """Sizes of a version that we know; its flags are in another place."""
    types = Types()
    ids = conntrack(types, value_bytes=88, at=24)
    blob = loaded(types)
    descriptor = make(bpffs, blob, ids, "cali_v4_ct4", 88)
    with closing(blob, descriptor):
        syscall.map_update(descriptor, KEY, reverse(24, 88))
        (entry,), said = dump(bpffs, "conntrack", "dump")
        assert (entry["flags"], entry["state"]) == (["B-A"], "ESTABLISHED")
        assert "differs from our table (BTF has no member where our table has flags1 at byte 23)" in said


def test_btf_that_contradicts_and_is_not_understood_is_refused(bpffs: Path) -> None:
    types = Types()
    key, _ = conntrack(types)
    value = types.struct("mine", 88, ("other", types.array("u32", 22), 0))
    blob = loaded(types)
    descriptor = make(bpffs, blob, (key, value), "cali_v4_ct4", 88)
    with closing(blob, descriptor):
        refused = calitrace("conntrack", "dump", "--bpffs", str(bpffs))
        assert refused.returncode == 3
        assert "its BTF differs from our table: BTF has no member where our table has" in refused.stderr


def test_members_that_we_do_not_know_are_shown_and_not_interpreted(bpffs: Path) -> None:
    types = Types()
    key, _ = conntrack(types)
    value = types.struct("mine", 24, ("hits", "u64", 0), ("last", "u64", 8), ("more", "u32", 16))
    blob = loaded(types)
    for name, kind, sizes in (("cali_v4_nat_fe3", LPM_TRIE, (16, 20)), ("cali_v4_nat_be", HASH, (8, 8)),
                              ("cali_v4_routes", LPM_TRIE, (8, 8))):  # fmt: skip
        pin(bpffs, name, kind, sizes, 10)
    descriptor = make(bpffs, blob, (key, value), NAME, 24)
    with closing(blob, descriptor):
        syscall.map_update(descriptor, KEY, struct.pack("<QQII", 11, 12, 13, 0))
        for verb in ("dump", "get"):
            words = ("conntrack", verb, *(("4000",) if verb == "get" else ()))
            done = calitrace(*words, "--bpffs", str(bpffs))
            assert done.stdout == (
                "protocol 6  addr_a 10.0.0.1  addr_b 10.0.0.2  port_a 80  port_b 4000  hits 11  last 12  more 13\n"
            )
        walked = calitrace("walk", "10.0.0.2:4000", "10.0.0.1:80/tcp", "--bpffs", str(bpffs))
        assert walked.returncode == 3
        assert "lacks members that we need" in walked.stderr
        assert "layout v9 BTF" in calitrace("versions", "dump", "--bpffs", str(bpffs)).stdout
