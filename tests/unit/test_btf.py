"""BTF: small blobs made here, and the running kernel's own."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import btf
from calitrace.btf import Btf
from calitrace.errors import Malformed

VMLINUX = Path("/sys/kernel/btf/vmlinux")


class Blob:
    """Builds a BTF blob; ``add`` returns the new type's id."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"
        self.count = 0

    def string(self, text: str) -> int:
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at if text else 0

    def add(self, name: str, kind: int, size: int, tail: bytes = b"", vlen: int = 0, flag: int = 0) -> int:
        info = flag << 31 | kind << 24 | vlen
        self.types += struct.pack("<III", self.string(name), info, size) + tail
        self.count += 1
        return self.count

    def struct(self, name: str, size: int, *members: tuple[str, int, int], kind: int = btf.KIND_STRUCT) -> int:
        tail = b"".join(struct.pack("<III", self.string(n), t, bits) for n, t, bits in members)
        return self.add(name, kind, size, tail, len(members))

    def raw(self) -> bytes:
        head = struct.pack("<HBBIIIII", btf.MAGIC, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return head + self.types + self.strings


def sample() -> tuple[Blob, dict[str, int]]:
    """struct outer { int a; union { int b; struct inner *c; }; int d[3]; u4 e:4; const T f; }"""
    blob = Blob()
    ids = {"int": blob.add("int", btf.KIND_INT, 4, struct.pack("<I", 1 << 24 | 32))}
    ids["inner"] = blob.struct("inner", 8, ("x", ids["int"], 0))
    ids["pointer"] = blob.add("", btf.KIND_PTR, ids["inner"])
    ids["union"] = blob.struct("", 8, ("b", ids["int"], 0), ("c", ids["pointer"], 0), kind=btf.KIND_UNION)
    ids["array"] = blob.add("", btf.KIND_ARRAY, 0, struct.pack("<III", ids["int"], ids["int"], 3))
    ids["T"] = blob.add("T", btf.KIND_TYPEDEF, ids["int"])
    ids["const"] = blob.add("", btf.KIND_CONST, ids["T"])
    tail = b"".join(
        struct.pack("<III", blob.string(name), kind, bits)
        for name, kind, bits in (
            ("a", ids["int"], 0),
            ("", ids["union"], 64),
            ("d", ids["array"], 128),
            ("e", ids["int"], 4 << 24 | 224),
            ("f", ids["const"], 256),
        )
    )
    ids["outer"] = blob.add("outer", btf.KIND_STRUCT, 40, tail, 5, flag=1)
    values = struct.pack("<IiIi", blob.string("ONE"), 1, blob.string("MINUS"), -1)
    ids["enum"] = blob.add("verdict", btf.KIND_ENUM, 4, values, 2, flag=1)
    wide = struct.pack("<III", blob.string("WIDE"), 1, 2)
    ids["enum64"] = blob.add("wide", btf.KIND_ENUM64, 8, wide, 1)
    proto = struct.pack("<IIII", 0, ids["pointer"], 0, ids["enum"])
    ids["proto"] = blob.add("", btf.KIND_FUNC_PROTO, 0, proto, 2)
    ids["handler"] = blob.add("", btf.KIND_PTR, ids["proto"])
    ids["hook"] = blob.add("btf_trace_hook", btf.KIND_TYPEDEF, ids["handler"])
    ids["not_a_hook"] = blob.add("btf_trace_none", btf.KIND_TYPEDEF, ids["pointer"])
    return blob, ids


def test_members_at_true_offsets() -> None:
    blob, ids = sample()
    types = Btf(blob.raw())
    assert len(types) == blob.count + 1
    outer = types.struct("outer")
    assert outer is not None
    assert {name: member.offset for name, member in outer.items()} == {
        "a": 0, "b": 8, "c": 8, "d": 16, "e": 28, "f": 32,
    }  # fmt: skip
    assert outer["e"].bitfield_bits == 4
    assert types.size(outer["d"].type_id) == 12
    assert types.size(outer["c"].type_id) == 8
    assert types.size(outer["f"].type_id) == 4
    assert types.signed(ids["int"])
    assert types.spelling(outer["c"].type_id) == "struct inner *"
    assert types.spelling(outer["f"].type_id) == "T"
    assert types.spelling(0) == "void"
    assert types.name(0) == "void"
    assert types.kind(0) == 0
    assert types.struct("absent") is None


def test_enums_and_prototypes() -> None:
    blob, _ = sample()
    types = Btf(blob.raw())
    assert types.enum("verdict") == {1: "ONE", -1: "MINUS"}
    assert types.enum("wide") == {1 | 2 << 32: "WIDE"}
    assert types.enum("absent") is None
    assert types.parameters("btf_trace_hook") == ["struct inner *", "enum verdict"]
    assert types.parameters("btf_trace_absent") is None
    with pytest.raises(Malformed, match="a function prototype"):
        types.parameters("btf_trace_none")


def test_what_has_no_size_or_members() -> None:
    blob, ids = sample()
    types = Btf(blob.raw())
    with pytest.raises(Malformed, match="a type with a size"):
        types.size(ids["proto"])
    with pytest.raises(Malformed, match="a struct or union"):
        types.members(ids["int"])
    with pytest.raises(Malformed, match="a type id below"):
        types.kind(999)


def test_broken_blobs() -> None:
    raw = sample()[0].raw()
    with pytest.raises(Malformed, match="a 24-byte BTF header"):
        Btf(b"short")
    with pytest.raises(Malformed, match="magic"):
        Btf(b"\0\0" + raw[2:])
    with pytest.raises(Malformed, match="sections inside the blob"):
        Btf(raw[:-1])
    unknown = Blob()
    unknown.add("x", 31, 0)
    with pytest.raises(Malformed, match="a known BTF kind"):
        Btf(unknown.raw())
    across = Blob()
    across.add("x", btf.KIND_STRUCT, 0, b"", 1)
    with pytest.raises(Malformed, match="type section to end"):
        Btf(across.raw())


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_give_types_or_malformed(noise: bytes, at: int) -> None:
    raw = sample()[0].raw()
    try:
        types = Btf(raw[:at] + noise + raw[at + len(noise) :])
    except Malformed:
        return
    assert len(types) >= 1


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")
def test_the_running_kernel() -> None:
    types = Btf(VMLINUX.read_bytes())
    skb = types.struct("sk_buff")
    assert skb is not None
    assert {"dev", "len", "network_header"} <= skb.keys()
    assert (types.parameters("btf_trace_kfree_skb") or [])[1] == "struct sk_buff *"
