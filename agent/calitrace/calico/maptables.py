"""Layouts of Calico's maps, one table for each version, and the decoder that all of them share.

A table says ``offset type name`` for each member. Integers are little-endian; ``be32`` and ``be64`` and addresses are
in network order, ports in host order unless the type is ``port_be``. Members that we do not show have no row.
Sources: calico felix/bpf (conntrack/v1..v4, nat, routes, arp, ipsets, ifstate, counters, failsafes, profiling, qos,
ipfrags, maps) and felix/bpf-gpl/*.h, releases v3.13 to v3.32 and master.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any

from calitrace.btf import KIND_ARRAY, KIND_STRUCT, KIND_UNION, Btf
from calitrace.calico.maps import RawMap, identify
from calitrace.errors import LayoutMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

_CODES = {
    "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "s16": "h", "s32": "i",
    "be16": "2s", "be32": "4s", "be64": "8s", "port_be": "4s", "ip4": "4s", "ip6": "16s", "mac": "6s", "name": "16s",
}  # fmt: skip


def _big(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def _port_be(raw: bytes) -> int:
    return int.from_bytes(raw[:2], "big")


def _mac(raw: bytes) -> str:
    return raw.hex(":")


def _name(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")


def _ip4(raw: bytes) -> str:
    return f"{raw[0]}.{raw[1]}.{raw[2]}.{raw[3]}"


def _ip6(raw: bytes) -> str:
    return str(IPv6Address(raw))


_MEANING: dict[str, Callable[[bytes], Any]] = {
    "be16": _big, "be32": _big, "be64": _big, "port_be": _port_be, "ip4": _ip4, "ip6": _ip6, "mac": _mac,
    "name": _name,
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The members of a key or a value of *size* bytes. *text*: ``offset type name`` rows, separated by ``;``."""

    text: str
    size: int
    rows: tuple[tuple[int, str, str], ...] = field(init=False)
    _struct: struct.Struct = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = (part.split() for part in self.text.split(";") if part)
        rows = tuple((int(offset), kind, name) for offset, kind, name in parts)
        object.__setattr__(self, "rows", rows)
        code, at = "<", 0
        for offset, kind, _ in rows:
            code += f"{offset - at}x{_CODES[kind]}"
            at = offset + struct.calcsize(f"<{_CODES[kind]}")
        object.__setattr__(self, "_struct", struct.Struct(f"{code}{self.size - at}x"))

    def decode(self, raw: bytes) -> dict[str, Any]:
        """The members by name: numbers, and text for addresses and names."""
        return {
            name: _MEANING[kind](value) if kind in _MEANING else value
            for (_, kind, name), value in zip(self.rows, self._struct.unpack(raw), strict=True)
        }

    def encode(self, members: Mapping[str, bytes]) -> bytes:
        """A record with these members, each as it lies in memory; all else is zero."""
        raw = bytearray(self.size)
        for offset, _, name in self.rows:
            if name in members:
                raw[offset : offset + len(members[name])] = members[name]
        return bytes(raw)

    def iter_columns(self, raw: bytes) -> Iterator[tuple[str, Sequence[Any]]]:
        """Packed records of numbers, member by member: (name, its value in each record)."""
        columns = zip(*self._struct.iter_unpack(raw), strict=True)
        yield from ((name, column) for (_, _, name), column in zip(self.rows, columns, strict=True))


@dataclass(frozen=True)
class Layout:
    """One version of a map: its key's and its value's table.

    *origin*: "" for a table of ours; "btf" when BTF gave it, with our names; "members" with the names that BTF has.
    *forward_at*: where a conntrack value's key of the reverse entry begins.
    """

    base: str
    version: int
    key: Table
    value: Table
    origin: str = ""
    forward_at: int = 24

    @property
    def ipv6(self) -> bool:
        """Whether its addresses are IPv6."""
        return "_v6_" in self.base

    def decode(self, key: bytes, value: bytes) -> dict[str, Any]:
        """One entry, key and value together."""
        return {**self.key.decode(key), **self.value.decode(value)}


def _leg16(at: int, name: str) -> str:
    return (
        f"{at} u64 {name}_bytes;{at + 8} u32 {name}_packets;{at + 12} be32 {name}_seqno;"
        f"{at + 16} u32 {name}_bits;{at + 20} u32 {name}_ifindex;"
    )


def _leg12(at: int, name: str) -> str:
    return f"{at} be32 {name}_seqno;{at + 4} u32 {name}_bits;{at + 8} u32 {name}_ifindex;"


def _leg8(at: int, name: str) -> str:
    return f"{at} be32 {name}_seqno;{at + 4} u32 {name}_bits;"


_CT_HEAD = "0 u64 created_ns;8 u64 last_seen_ns;16 u8 type;17 u8 flags0;"
_CT_FLAGS3 = "18 u8 flags2;19 u8 flags3;23 u8 flags1;"
_CT_KEY4 = "0 u32 proto;4 ip4 addr_a;8 ip4 addr_b;12 u16 port_a;14 u16 port_b"
_CT_KEY6 = "0 u32 proto;4 ip6 addr_a;20 ip6 addr_b;36 u16 port_a;38 u16 port_b"
_BACK4, _BACK6 = "0 ip4 addr;4 u16 port", "0 ip6 addr;16 u16 port"
_POL = ("xdp_v4", "ingress_v4", "egress_v4", "xdp_v6", "ingress_v6", "egress_v6", "filter_in", "filter_eg")


def _policies(last: int) -> str:
    return ";".join(f"{20 + 4 * index} s32 {name}" for index, name in enumerate(_POL[:last]))


def _layouts() -> Iterator[Layout]:
    def layout(base: str, version: int, key: tuple[int, str], value: tuple[int, str]) -> Layout:
        return Layout(base, version, Table(key[1], key[0]), Table(value[1], value[0]))

    ct4, ct6 = (16, _CT_KEY4), (40, _CT_KEY6)
    yield layout("cali_v4_ct", 1, ct4, (56, _CT_HEAD + _leg8(24, "ab") + _leg8(32, "ba")
        + "40 ip4 orig_dst;44 u16 orig_dport;48 ip4 tun_ip"))  # fmt: skip
    yield layout("cali_v4_ct", 2, ct4, (64, _CT_HEAD + _leg12(24, "ab") + _leg12(36, "ba")
        + "48 ip4 orig_dst;52 u16 orig_dport;54 u16 orig_sport;56 ip4 tun_ip;60 ip4 orig_src"))  # fmt: skip
    v3 = _CT_HEAD + _CT_FLAGS3 + _leg16(24, "ab") + _leg16(48, "ba")
    for version in (3, 4):
        yield layout("cali_v4_ct", version, ct4, (88, v3
            + "72 ip4 tun_ip;76 ip4 orig_dst;80 u16 orig_dport;82 u16 orig_sport;84 ip4 orig_src"))  # fmt: skip
        yield layout("cali_v6_ct", version, ct6, (128, v3
            + "72 ip6 tun_ip;88 ip6 orig_dst;104 u16 orig_dport;106 u16 orig_sport;108 ip6 orig_src"))  # fmt: skip
    counts = "0 u32 id;4 u32 count;8 u32 local;12 u32 affinity_s"
    fe4 = (16, "0 u32 prefixlen;4 ip4 addr;8 u16 port;10 u8 proto;11 ip4 source")
    yield layout("cali_v4_nat_fe", 1, (8, "0 ip4 addr;4 u16 port;6 u8 proto"), (16, counts))
    yield layout("cali_v4_nat_fe", 2, fe4, (16, counts))
    yield layout("cali_v4_nat_fe", 3, fe4, (20, counts + ";16 u32 flags"))
    yield layout("cali_v6_nat_fe", 3, (40, "0 u32 prefixlen;4 ip6 addr;20 u16 port;22 u8 proto;23 ip6 source"),
        (20, counts + ";16 u32 flags"))  # fmt: skip
    ordinal = (8, "0 u32 id;4 u32 ordinal")
    for base, version in (("nat_be", 1), ("mglv", 2)):
        yield layout(f"cali_v4_{base}", version, ordinal, (8, _BACK4))
        yield layout(f"cali_v6_{base}", version, ordinal, (20, _BACK6))
    yield layout("cali_v4_nat_aff", 1, (16, "0 ip4 addr;4 u16 port;6 u8 proto;8 ip4 client"),
        (16, "0 ip4 backend;4 u16 backend_port;8 u64 ts_ns"))  # fmt: skip
    yield layout("cali_v6_nat_aff", 1, (40, "0 ip6 addr;16 u16 port;18 u8 proto;20 ip6 client"),
        (32, "0 ip6 backend;16 u16 backend_port;24 u64 ts_ns"))  # fmt: skip
    yield layout("cali_v4_routes", 1, (8, "0 u32 prefixlen;4 ip4 addr"), (8, "0 u32 flags;4 ip4 next_hop"))
    yield layout("cali_v6_routes", 1, (20, "0 u32 prefixlen;4 ip6 addr"), (20, "0 u32 flags;4 ip6 next_hop"))
    macs = (12, "0 mac mac_src;6 mac mac_dst")
    yield layout("cali_v4_arp", 2, (8, "0 ip4 addr;4 u32 ifindex"), macs)
    yield layout("cali_v6_arp", 2, (20, "0 ip6 addr;16 u32 ifindex"), macs)
    one = (4, "0 u32 value")
    yield layout("cali_v4_ip_sets", 1,
        (20, "0 u32 prefixlen;4 be64 set_id;12 ip4 addr;16 u16 port;18 u8 proto"), one)  # fmt: skip
    yield layout("cali_v6_ip_sets", 1,
        (32, "0 u32 prefixlen;4 be64 set_id;12 ip6 addr;28 u16 port;30 u8 proto"), one)  # fmt: skip
    yield layout("cali_v4_fsafes", 1, (4, "0 u16 port;2 u8 proto;3 u8 flags"), one)
    yield layout("cali_v4_fsafes", 2, (12, "0 u32 prefixlen;4 u16 port;6 u8 proto;7 u8 flags;8 ip4 addr"), one)
    yield layout("cali_v6_fsafes", 2, (24, "0 u32 prefixlen;4 u16 port;6 u8 proto;7 u8 flags;8 ip6 addr"), one)
    ifindex = (4, "0 u32 ifindex")
    yield layout("cali_iface", 2, ifindex, (20, "0 u32 flags;4 name name"))
    yield layout("cali_iface", 3, ifindex, (44, "0 u32 flags;4 name name;" + _policies(6)))
    yield layout("cali_iface", 4, ifindex, (52, "0 u32 flags;4 name name;" + _policies(8)))
    hook = (8, "0 u32 ifindex;4 u32 hook")
    for version, count in ((1, 14), (2, 14), (3, 17), (5, 25), (6, 26), (6, 27)):
        cells = ";".join(f"{8 * index} u64 {index}" for index in range(count))
        yield layout("cali_counters", version, (4, "0 u32 zero") if version == 1 else hook, (8 * count, cells))
    yield layout("cali_rule_ctrs", 2, (8, "0 u64 rule_id"), (8, "0 u64 packets"))
    yield layout("cali_profiling", 2, (8, "0 u32 ifindex;4 u32 kind"), (16, "0 u64 total_ns;8 u64 samples"))
    before4, before6 = (8, "0 ip4 orig_dst;4 port_be orig_dport"), (20, "0 ip6 orig_dst;16 port_be orig_dport")
    yield layout("cali_v4_srmsg", 1, (16, "0 u64 cookie;8 ip4 addr;12 port_be port"), before4)
    yield layout("cali_v6_srmsg", 1, (32, "0 u64 cookie;8 ip6 addr;24 port_be port"), before6)
    yield layout("cali_v4_ct_nats", 1, (24, "0 u64 cookie;8 ip4 addr;12 port_be port;16 u8 proto"), before4)
    yield layout("cali_v6_ct_nats", 1, (32, "0 u64 cookie;8 ip6 addr;24 port_be port;28 u8 proto"), before6)
    for version in (1, 2):
        for base, key, rev, at, size in (("v4", ct4, "ip4", 16, 32), ("v6", ct6, "ip6", 40, 56)):
            wide = 4 if rev == "ip4" else 16
            yield layout(f"cali_{base}_ccq", version, key, (size,
                f"4 {rev} rev_addr_a;{4 + wide} {rev} rev_addr_b;{4 + 2 * wide} u16 rev_port_a;"
                f"{6 + 2 * wide} u16 rev_port_b;{at} u64 last_seen_ns;{at + 8} u64 rev_last_seen_ns"))  # fmt: skip
    qos = (8, "0 u32 ifindex;4 u16 ingress;6 u16 family")
    rates = "4 s16 rate;6 s16 burst;8 s16 tokens;16 u64 last_update_ns"
    yield layout("cali_qos", 1, (8, "0 u32 ifindex;4 u32 ingress"), (24, rates))
    yield layout("cali_qos", 2, qos, (24, rates))
    # Of master before cali_qos_conn took the connections over.
    yield layout("cali_qos", 2, qos, (32, rates + ";24 u32 most;28 u32 current"))
    yield layout("cali_qos_conn", 1, qos, (12, "4 u32 most;8 u32 current"))
    yield layout("cali_v4_sprefix", 1, (12, "0 u32 prefixlen;4 u32 ifindex;8 ip4 addr"), one)
    yield layout("cali_v6_sprefix", 1, (24, "0 u32 prefixlen;4 u32 ifindex;8 ip6 addr"), one)
    for version in (2, 3):
        yield layout("cali_v4_frags", version, (12, "0 ip4 src;4 ip4 dst;8 be16 id;10 u16 offset"),
            (1512, "0 u16 more_frags;2 u16 len"))  # fmt: skip
    for version in (2, 3, 4):
        yield layout("cali_v4_frgfwd", version, (16, "0 ip4 src;4 ip4 dst;8 u32 ifindex;12 be16 id"),
            (32, "16 u16 sport;18 u16 dport;20 u32 marks;24 u32 flags"))  # fmt: skip


@lru_cache(maxsize=1)
def layouts() -> tuple[Layout, ...]:
    """All layouts known, of every version."""
    return tuple(_layouts())


def resolve(raw: RawMap) -> Layout:
    """The layout of a map: that which BTF gave where no table fits, else by name, version and both sizes.

    Raises LayoutMismatch that names the sizes seen and the versions known.
    """
    base, version, _ = identify(raw.name)
    if raw.described is not None:
        return raw.described
    known = [each for each in layouts() if each.base == base]
    for each in known:
        if each.version == version and (each.key.size, each.value.size) == (raw.key_size, raw.value_size):
            return each
    expected = ", ".join(f"v{e.version} {e.key.size}+{e.value.size}" for e in known) or "a map we know"
    raise LayoutMismatch(
        0, f"key+value bytes of {expected}", f"v{version} {raw.key_size}+{raw.value_size}", f"map {raw.name}"
    )


def disagreement(table: Table, types: Btf, type_id: int) -> str:
    """What a map's own BTF says against a table: its size, or a member of ours where BTF has none; "" when both agree.

    Names are not compared: Calico renames members, and what it means by an array of bytes BTF cannot say.
    Raises Malformed for a broken BTF.
    """
    if types.size(type_id) != table.size:
        return f"BTF has {types.size(type_id)} bytes, our table {table.size}"
    starts = set(_starts(types, type_id, 0))
    lost = [f"{name} at byte {offset}" for offset, _, name in table.rows if offset not in starts]
    return f"BTF has no member where our table has {', '.join(lost)}" if lost else ""


def _starts(types: Btf, type_id: int, at: int) -> Iterator[int]:
    """The bytes at which a member, or an element of an array, begins."""
    inner = types.resolve(type_id)
    kind = types.kind(inner)
    yield at
    if kind in (KIND_STRUCT, KIND_UNION):
        for member in types.members(inner):
            yield from _starts(types, member.type_id, at + member.offset)
    elif kind == KIND_ARRAY:
        element, count = types.array(inner)
        width = types.size(element)
        for index in range(count):
            yield from _starts(types, element, at + index * width)


def summed(raw: RawMap, value: bytes) -> bytes:
    """One value of a per-CPU map of u64 counts: the sum over CPUs. Other maps' values as they are."""
    if raw.cpus == 1:
        return value
    count = -(-raw.value_size // 8)
    cells = struct.unpack(f"<{count * raw.cpus}Q", value)
    total = (sum(cells[index::count]) & 0xFFFFFFFFFFFFFFFF for index in range(count))
    return struct.pack(f"<{count}Q", *total)[: raw.value_size]


def at(raw: RawMap, keys: Collection[bytes]) -> list[tuple[bytes, bytes]]:
    """The entries with these keys: looked up where the map's source can do that, else looked for."""
    source = getattr(raw.entries, "at", None)
    if source is not None:
        found: list[tuple[bytes, bytes]] = source(keys)
        return found
    return [(key, value) for key, value in raw.entries if key in keys]


def iter_entries(raw: RawMap, layout: Layout) -> Iterator[dict[str, Any]]:
    """The entries of a map, decoded; a per-CPU map's counts summed."""
    for key, value in raw.entries:
        yield layout.decode(key, summed(raw, value))


def blocks(raw: RawMap) -> Iterable[tuple[int, bytes, bytes]]:
    """(number, packed keys, packed values) of a map's entries, as its source has them or in blocks of our own."""
    source = getattr(raw.entries, "iter_blocks", None)
    if source is not None:
        found: Iterable[tuple[int, bytes, bytes]] = source()
        return found
    pairs = list(raw.entries)
    return [(len(pairs), b"".join(key for key, _ in pairs), b"".join(value for _, value in pairs))] if pairs else []
