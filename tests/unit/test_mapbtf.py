"""Layouts out of BTF, which is made here as Calico's programs have it."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from tests.unit.test_btf import Blob

from calitrace import btf
from calitrace.btf import Btf
from calitrace.calico import mapbtf, maptables
from calitrace.calico.maps import RawMap
from calitrace.errors import Malformed
from calitrace.report import conntrack_json, mapdump

KEY = struct.pack("<I4s4sHH", 6, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 80, 4000)


class Types(Blob):
    """BTF with the integers that Calico's structs have."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        sizes = (("u8", 1), ("u16", 2), ("u32", 4), ("u64", 8), ("char", 1), ("s32", 4))
        self.ids = {name: self.new(btf.KIND_INT, name, size, tail=struct.pack(
            "<I", (1 << 24 if name == "s32" else 0) | 8 * size)) for name, size in sizes}  # fmt: skip

    def new(self, *words: Any, **named: Any) -> int:
        """The id of a type, added."""
        self.add(*words, **named)
        self.count += 1
        return self.count

    def array(self, element: str, count: int) -> int:
        """An array of integers."""
        return self.new(btf.KIND_ARRAY, tail=struct.pack("<III", self.ids[element], self.ids["u32"], count))

    def struct(self, name: str, size: int, *members: tuple[str, int | str, int], kind: int = btf.KIND_STRUCT) -> int:
        """A struct of (name, type, byte offset)."""
        rows = [(n, self.ids[t] if isinstance(t, str) else t, 8 * at) for n, t, at in members]
        return self.new(kind, name, size, len(rows), self.members(*rows))


def conntrack(types: Types, *, value_bytes: int = 96, at: int = 32) -> tuple[int, int]:
    """A version to come: flags in one word; the union begins *at*, eight bytes later than today."""
    key = types.struct("calico_ct_key", 16, ("protocol", "u32", 0), ("addr_a", "u32", 4), ("addr_b", "u32", 8),
                       ("port_a", "u16", 12), ("port_b", "u16", 14))  # fmt: skip
    bits = [(name, types.ids["u32"], 1 << 24 | 128 + i) for i, name in enumerate(("syn_seen", "ack_seen", "fin_seen"))]
    whole = [("bytes", 4, 0), ("packets", 3, 64), ("seqno", 3, 96)]
    rows = types.members(*whole, *bits, ("ifindex", 3, 160))
    leg = types.new(btf.KIND_STRUCT, "calico_ct_leg", 24, 7, rows, flag=1)
    tracking = types.struct("", 64, ("a_to_b", leg, 0), ("b_to_a", leg, 24), ("tun_ip", "u32", 48),
                            ("orig_ip", "u32", 52), ("orig_port", "u16", 56), ("orig_sport", "u16", 58))  # fmt: skip
    forward = types.struct(
        "", 64, ("nat_rev_key", key, 0), ("nat_sport", "u16", 16), ("pad2", types.array("u8", 46), 18)
    )
    union = types.struct("", 64, ("", tracking, 0), ("", forward, 0), kind=btf.KIND_UNION)
    head = [("rst_seen", "u64", 0), ("last_seen", "u64", 8), ("type", "u8", 16), ("flags", "u32", 20)]
    padding = ("pad0", types.array("u8", 3), 17)
    value = types.struct("calico_ct_value", value_bytes, *head[:3], padding, head[3], ("", union, at))
    return key, value


def raw(name: str, *entries: tuple[bytes, bytes]) -> RawMap:
    """A map of these entries."""
    return RawMap(name, name, 1, len(entries[0][0]), len(entries[0][1]), 10, 1, list(entries))


def described(name: str, types: Types, ids: tuple[int, int], *entries: tuple[bytes, bytes]) -> RawMap:
    """A map with the layout that the BTF gives."""
    found = raw(name, *entries)
    layout = mapbtf.describe(found, Btf(types.raw()), *ids)
    assert layout is not None
    return RawMap(**{**vars(found), "described": layout})


def test_a_conntrack_version_to_come() -> None:
    types = Types()
    ids = conntrack(types)
    reverse = bytearray(96)
    struct.pack_into("<QQBxxxI", reverse, 0, 0, 5, 2, 0x8104)
    struct.pack_into("<QIIII", reverse, 32, 100, 2, 0, 3, 7)
    struct.pack_into("<QIIII", reverse, 56, 200, 3, 0, 3, 8)
    struct.pack_into("<4s4sHH", reverse, 80, bytes([10, 9, 9, 9]), bytes([10, 9, 0, 1]), 443, 0)
    forward = bytearray(96)
    struct.pack_into("<QQBxxxI8x16sH", forward, 0, 0, 5, 1, 0, KEY, 0)
    service = struct.pack("<I4s4sHH", 6, bytes([10, 9, 0, 1]), bytes([10, 0, 0, 2]), 443, 4000)
    found = described("cali_v4_ct9", types, ids, (KEY, bytes(reverse)), (service, bytes(forward)))
    first, second = mapdump.iter_objects(found, mapdump.Context())
    assert (first["layout"], first["type"], first["state"]) == ("btf", "nat-rev", "ESTABLISHED")
    assert first["flags"] == ["np-fwd", "B-A", "dscp"]
    assert (first["ab"]["packets"], first["ba"]["ifindex"], first["orig_dst"]) == (2, 8, "10.9.0.1")
    assert (second["type"], second["rev_addr_a"], second["rev_port_b"]) == ("nat-fwd", "10.0.0.1", 4000)
    layout = maptables.resolve(found)
    assert mapdump.partner_keys(layout, service, bytes(forward)) == (KEY,)
    assert service in mapdump.partner_keys(layout, KEY, bytes(reverse))
    assert list(conntrack_json.iter_blocks(found, mapdump.Context())) == [
        json.dumps(each).encode() + b"\n" for each in (first, second)
    ]
    assert mapdump.summary(found)["established"] == 1
    stored = mapbtf.from_plain(found, json.loads(json.dumps(mapbtf.to_plain(layout))))
    assert stored == layout


def test_other_sizes_are_something_else() -> None:
    types = Types()
    ids = conntrack(types, value_bytes=104)
    assert mapbtf.describe(raw("cali_v4_ct9", (KEY, bytes(96))), Btf(types.raw()), *ids) is None


def test_what_lacks_members_is_shown_by_its_own_names() -> None:
    types = Types()
    key, _ = conntrack(types)
    colour = types.new(btf.KIND_ENUM, "colour", 4, 1, struct.pack("<Ii", types.string("RED"), 0))
    pointer = types.new(btf.KIND_PTR, "", 0)
    function = types.struct("", 8, ("low", "u32", 0), ("high", "s32", 4))
    value = types.struct("other", 64, ("colour", colour, 0), ("marks", types.array("u16", 2), 4), ("where", pointer, 8),
                         ("pair", function, 16), ("huge", types.array("char", 40), 24))  # fmt: skip
    bytes_of_it = struct.pack("<IHHQIi40s", 1, 2, 3, 4, 5, -6, b"x")
    found = described("cali_v4_ct9", types, (key, value), (KEY, bytes_of_it))
    (entry,) = mapdump.iter_objects(found, mapdump.Context())
    assert entry["layout"] == "members"
    assert entry["key"] == {"protocol": 6, "addr_a": "10.0.0.1", "addr_b": "10.0.0.2", "port_a": 80, "port_b": 4000}
    whole = {"colour": 1, "marks[0]": 2, "marks[1]": 3, "where": 4, "pair.low": 5, "pair.high": -6, "huge[0]": 120}
    assert {name: entry["value"][name] for name in whole} == whole
    line = mapdump.text("ct", entry)
    assert line.startswith("protocol 6  addr_a 10.0.0.1  ")
    assert "pair.high -6" in line
    assert mapdump.summary(found) == {"map": "cali_v4_ct9", "entries": 1, "max_entries": 10}
    assert list(conntrack_json.iter_blocks(found, mapdump.Context())) == [json.dumps(entry).encode() + b"\n"]


def test_a_conntrack_value_without_the_reverse_key_is_not_understood() -> None:
    types = Types()
    key, _ = conntrack(types)
    rows = [("created", "u64", 0), ("last_seen", "u64", 8), ("type", "u8", 16), ("flags", "u8", 17)]
    leg = types.struct("leg", 16, ("syn_seen", "u32", 0), ("seqno", "u32", 4))
    value = types.struct("v", 64, *rows, ("a_to_b", leg, 24), ("b_to_a", leg, 40), ("tun_ip", "u32", 56),
                         ("orig_ip", "u32", 60), ("orig_port", "u16", 20))  # fmt: skip
    found = described("cali_v4_ct9", types, (key, value), (KEY, bytes(64)))
    assert maptables.resolve(found).origin == "members"


def test_interfaces_counters_routes_and_neighbours() -> None:
    types = Types()
    names = [f"{where}_policy_{family}" for family in ("v4", "v6") for where in ("xdp", "ingress", "egress")]
    policies = [(name, "s32", 24 + 4 * index) for index, name in enumerate(names)]
    state = types.struct("ifstate_val", 56, ("flags", "u32", 0), ("news", "u32", 4),
                         ("name", types.array("char", 16), 8), *policies)  # fmt: skip
    value = struct.pack("<II16s6i8x", 3, 9, b"cali1", 1, 2, 3, 4, 5, 6)
    found = described("cali_iface9", types, (types.ids["u32"], state), (struct.pack("<I", 7), value))
    (entry,) = mapdump.iter_objects(found, mapdump.Context())
    assert (entry["ifindex"], entry["name"], entry["egress_v6"], entry["flags"]) == (
        7,
        "cali1",
        6,
        ["workload", "v4Ready"],
    )

    hook = types.struct("counters_key", 8, ("ifindex", "u32", 0), ("hook", "u32", 4))
    cells = types.array("u64", 29)
    found = described("cali_counters9", types, (hook, cells), (bytes(8), struct.pack("<29Q", *range(29))))
    (entry,) = mapdump.iter_objects(found, mapdump.Context())
    assert entry["counters"]["RT_UNKNOWN"] == 12
    assert entry["counters"]["reason 28"] == 28

    lpm = types.struct("bpf_lpm_trie_key", 4, ("prefixlen", "u32", 0), ("data", types.array("u8", 0), 4))
    inner = types.struct("cali_rt_key", 20, ("prefixlen", "u32", 0), ("addr", types.array("u8", 16), 4))
    key = types.struct("cali_rt_lpm_key", 20, ("lpm", lpm, 0), ("key", inner, 0), kind=btf.KIND_UNION)
    hop = types.struct("", 16, ("next_hop", types.array("u8", 16), 0), ("if_index", "u32", 0), kind=btf.KIND_UNION)
    route = types.struct("cali_rt", 24, ("flags", "u32", 0), ("", hop, 8))
    entry_key = struct.pack("<I16s", 64, bytes.fromhex("fd" + "00" * 15))
    found = described("cali_v6_routes9", types, (key, route), (entry_key, struct.pack("<II16s", 0x10, 0, b"\xfd" * 16)))
    (entry,) = mapdump.iter_objects(found, mapdump.Context())
    assert (entry["cidr"], entry["next_hop"]) == ("fd00::/64", "fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd:fdfd")

    near = types.struct("arp_key", 8, ("ip", "u32", 0), ("ifindex", "u32", 4))
    macs = types.struct("arp_value", 16, ("mac_src", types.array("char", 6), 0), ("mac_dst", types.array("char", 6), 6),
                        ("age", "u32", 12))  # fmt: skip
    found = described("cali_v4_arp9", types, (near, macs), (bytes(8), bytes(range(16))))
    (entry,) = mapdump.iter_objects(found, mapdump.Context())
    assert entry["mac_dst"] == "06:07:08:09:0a:0b"

    void = types.new(btf.KIND_FLOAT, "double", 8)
    found = described("cali_new", types, (types.ids["u32"], void), (bytes(4), bytes(8)))
    (entry,) = mapdump.iter_objects(found, mapdump.Context())
    assert (entry["key"], entry["value"]) == ({"key": 0}, {})


def test_maps_that_programs_declare() -> None:
    types = Types()
    key, value = conntrack(types)
    ends = [types.new(btf.KIND_PTR, "", each) for each in (key, value)]
    whole = types.struct("", 16, ("key", ends[0], 0), ("value", ends[1], 8))
    half = types.struct("", 8, ("key", ends[0], 0))
    wrong = types.struct("", 16, ("key", key, 0), ("value", ends[1], 8))
    for name, kind in (("cali_v4_ct9", whole), ("half", half), ("wrong", wrong), ("number", types.ids["u32"])):
        types.new(btf.KIND_VAR, name, kind, tail=struct.pack("<I", 1))
    found = Btf(types.raw())
    assert mapbtf.declared(found, "cali_v4_ct9") == (key, value)
    assert [mapbtf.declared(found, name) for name in ("half", "wrong", "number", "absent")] == [None] * 4


@pytest.mark.parametrize(
    "plain",
    [{}, {"key": 1, "value": "", "origin": "btf", "forward_at": 24}, {"key": "0 what a", "value": "", "origin": "btf"},
     {"key": "x y z", "value": "", "origin": "btf", "forward_at": 24}],
)  # fmt: skip
def test_a_broken_layout_of_a_journal(plain: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match="map cali_v4_ct9"):
        mapbtf.from_plain(raw("cali_v4_ct9", (KEY, bytes(96))), plain)
