"""The BTF reader against small blobs made here, and against the running kernel."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import btf
from calitrace.btf import Btf, Member
from calitrace.calico import maptables
from calitrace.errors import Malformed

_VMLINUX = Path("/sys/kernel/btf/vmlinux")


class Blob:
    """Encodes types; ids count from 1 in the order of the calls."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"

    def string(self, text: str) -> int:
        """Offset of a string, added."""
        if not text:
            return 0
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def add(self, kind: int, name: str = "", size: int = 0, vlen: int = 0, tail: bytes = b"", flag: int = 0) -> None:
        """One type. *size*: or the id of the type it refers to."""
        self.types += struct.pack("<III", self.string(name), flag << 31 | kind << 24 | vlen, size) + tail

    def members(self, *found: tuple[str, int, int]) -> bytes:
        """(name, type id, offset) of each."""
        return b"".join(struct.pack("<III", self.string(name), type_id, bits) for name, type_id, bits in found)

    def raw(self) -> bytes:
        """The blob."""
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("<HBBIIIII", btf.MAGIC, 1, 0, 24, *sizes) + self.types + self.strings


def sample() -> bytes:
    """One of each kind that is read."""
    b = Blob()
    b.add(btf.KIND_INT, "int", 4, tail=struct.pack("<I", 1 << 24 | 32))  # 1
    b.add(btf.KIND_STRUCT, "pair", 16, 3, b.members(("a", 1, 0), ("", 3, 32), ("p", 4, 64)))  # 2
    b.add(btf.KIND_UNION, "", 4, 2, b.members(("u", 1, 0), ("", 1, 0)))  # 3
    b.add(btf.KIND_PTR, "", 2)  # 4
    b.add(btf.KIND_STRUCT, "bits", 4, 2, b.members(("x", 1, 3 << 24), ("y", 1, 5 << 24 | 3)), flag=1)  # 5
    b.add(btf.KIND_ARRAY, tail=struct.pack("<III", 2, 1, 3))  # 6
    b.add(btf.KIND_ENUM, "colour", 4, 2, struct.pack("<IiIi", b.string("RED"), -1, b.string("BLUE"), 2), flag=1)  # 7
    b.add(btf.KIND_ENUM64, "wide", 8, 1, struct.pack("<III", b.string("BIG"), 1, 2))  # 8
    b.add(btf.KIND_CONST, "", 1)  # 9
    b.add(btf.KIND_FUNC_PROTO, "", 0, 3, struct.pack("<IIIIII", 0, 11, 0, 9, 0, 7))  # 10
    b.add(btf.KIND_PTR, "", 0)  # 11: void *
    b.add(btf.KIND_PTR, "", 10)  # 12
    b.add(btf.KIND_TYPEDEF, "btf_trace_it", 12)  # 13
    b.add(btf.KIND_TYPEDEF, "not_a_function", 4)  # 14
    b.add(btf.KIND_FWD, "later")  # 15
    b.add(btf.KIND_ENUM, "bits32", 4, 1, struct.pack("<II", b.string("TOP"), 0xFFFFFFFF))  # 16
    return b.raw()


SAMPLE = Btf(sample())


def test_members_at_true_offsets() -> None:
    assert len(SAMPLE) == 17
    assert SAMPLE.struct("pair") == {
        "a": Member("a", 1, 0, 0),
        "u": Member("u", 1, 32, 0),
        "": Member("", 1, 32, 0),
        "p": Member("p", 4, 64, 0),
    }
    assert [m.offset for m in SAMPLE.members(2)] == [0, 4, 8]
    assert SAMPLE.members(5) == [Member("x", 1, 0, 3), Member("y", 1, 3, 5)]
    assert SAMPLE.struct("absent") is None
    assert SAMPLE.find("pair", btf.KIND_UNION) is None
    assert SAMPLE.find("int", btf.KIND_INT) == 1


def test_sizes_and_spellings() -> None:
    assert [SAMPLE.size(i) for i in (1, 2, 4, 6, 7, 9)] == [4, 16, 8, 48, 4, 4]
    assert [SAMPLE.spelling(i) for i in (0, 2, 4, 7, 9, 11)] == [
        "void", "struct pair", "struct pair *", "enum colour", "int", "void *"
    ]  # fmt: skip
    assert SAMPLE.array(6) == (2, 3)
    assert SAMPLE.signed(1)
    assert (SAMPLE.kind(0), SAMPLE.name(0)) == (0, "void")
    assert SAMPLE.resolve(0) == 0


def test_enums() -> None:
    assert SAMPLE.enum("colour") == {-1: "RED", 2: "BLUE"}
    assert SAMPLE.enum("wide") == {1 | 2 << 32: "BIG"}
    assert SAMPLE.enum("bits32") == {0xFFFFFFFF: "TOP"}
    assert SAMPLE.enum("absent") is None


def test_parameters_of_a_tracepoint() -> None:
    assert SAMPLE.parameters("btf_trace_it") == ["void *", "int", "enum colour"]
    assert SAMPLE.parameters("absent") is None
    with pytest.raises(Malformed, match="a function prototype"):
        SAMPLE.parameters("not_a_function")


def test_what_a_type_cannot_tell() -> None:
    with pytest.raises(Malformed, match="a type with a size"):
        SAMPLE.size(15)
    with pytest.raises(Malformed, match="a struct or union"):
        SAMPLE.members(1)
    with pytest.raises(Malformed, match="a type id below 17"):
        SAMPLE.name(99)


def test_a_name_twice_in_the_strings() -> None:
    b = Blob()
    b.add(btf.KIND_TYPEDEF, "same", 2)
    b.add(btf.KIND_STRUCT, "same", 8)
    assert Btf(b.raw()).find("same", btf.KIND_STRUCT) == 2


def test_a_cycle_is_malformed() -> None:
    b = Blob()
    b.add(btf.KIND_TYPEDEF, "a", 2)
    b.add(btf.KIND_TYPEDEF, "b", 1)
    with pytest.raises(Malformed, match="cycle"):
        Btf(b.raw()).resolve(1)


@pytest.mark.parametrize("cut", range(len(sample())))
def test_cut_short(cut: int) -> None:
    with pytest.raises(Malformed):
        Btf(sample()[:cut])


def test_wrong_magic_kind_and_length() -> None:
    with pytest.raises(Malformed, match="magic"):
        Btf(b"\0" * 24)
    unknown, across = Blob(), Blob()
    unknown.add(31)
    across.add(btf.KIND_STRUCT, "", 4, 2)
    with pytest.raises(Malformed, match="kind 31"):
        Btf(unknown.raw())
    with pytest.raises(Malformed, match="across the end"):
        Btf(across.raw())


@given(st.binary(max_size=200))
def test_any_types_give_a_table_or_malformed(types: bytes) -> None:
    b = Blob()
    b.types = types
    try:
        found = Btf(b.raw())
    except Malformed:
        return
    assert len(found) >= 1


def test_strings_that_are_no_text() -> None:
    b = Blob()
    b.add(btf.KIND_INT, "x", 4, tail=bytes(4))
    raw = bytearray(b.raw())
    raw[-2] = 0xFF
    assert Btf(bytes(raw)).name(1) == "�"


@pytest.mark.skipif(not _VMLINUX.exists(), reason="this kernel has no BTF")
def test_sk_buff_of_this_kernel() -> None:
    kernel = Btf(_VMLINUX.read_bytes())
    members = kernel.struct("sk_buff")
    assert members is not None
    assert {"dev", "len", "mark", "skb_iif", "head", "network_header", "protocol"} <= members.keys()
    assert kernel.spelling(members["dev"].type_id) == "struct net_device *"
    assert (members["len"].offset + 4, kernel.size(members["len"].type_id)) == (members["data_len"].offset, 4)
    type_id = kernel.find("sk_buff", btf.KIND_STRUCT)
    assert type_id is not None
    assert max(m.offset for m in members.values()) < kernel.size(type_id)


def test_a_table_beside_the_btf_of_its_map() -> None:
    blob = Blob()
    blob.add(btf.KIND_INT, "u32", 4, tail=struct.pack("<I", 32))
    blob.add(btf.KIND_INT, "u8", 1, tail=struct.pack("<I", 8))
    blob.add(btf.KIND_ARRAY, tail=struct.pack("<III", 2, 1, 4))
    blob.add(btf.KIND_STRUCT, "value", 8, 2, blob.members(("flags", 1, 0), ("addr", 3, 32)))
    types = Btf(blob.raw())
    assert maptables.disagreement(maptables.Table("0 u32 flags;6 u16 half", 8), types, 4) == ""
    moved = maptables.disagreement(maptables.Table("0 u16 low;2 u16 half", 8), types, 4)
    assert moved == "BTF has no member where our table has half at byte 2"
    assert maptables.disagreement(maptables.Table("0 u32 flags", 12), types, 4) == "BTF has 8 bytes, our table 12"
