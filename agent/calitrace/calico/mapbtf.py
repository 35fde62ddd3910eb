"""Layouts of Calico's maps out of BTF: for versions that no table of ours knows, and beside those that one does.

A map may have BTF of its own (libbpf gives it its key's and value's types); else the programs that use it declare it:
a variable of its name in ``.maps``, whose members ``key`` and ``value`` point to the types. Members are taken over by
Calico's names for them; a key or value without all that its words need is shown member by member, as BTF has it.
Source of the names: calico felix/bpf-gpl/{conntrack_types,nat_types,routes,ifstate,arp,counters}.h, v3.24 to master.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calitrace.btf import KIND_ARRAY, KIND_ENUM, KIND_INT, KIND_PTR, KIND_STRUCT, KIND_UNION, KIND_VAR, Btf
from calitrace.calico.maps import RawMap, identify
from calitrace.calico.maptables import Layout, Table
from calitrace.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_LEG = {"bytes": "bytes", "packets": "packets", "seqno": "seqno", "syn_seen": "bits", "ifindex": "ifindex"}
# Calico's path of a member to the name that our tables have for it, by base name without cali_ and family.
_NAMES = {
    "ct": {
        "protocol": "proto", "addr_a": "addr_a", "addr_b": "addr_b", "port_a": "port_a", "port_b": "port_b",
        "created": "created_ns", "rst_seen": "created_ns", "last_seen": "last_seen_ns", "type": "type",
        "flags": "flags0", "flags2": "flags1", "flags3": "flags2", "flags4": "flags3", "tun_ip": "tun_ip",
        "orig_ip": "orig_dst", "orig_port": "orig_dport", "orig_sport": "orig_sport", "orig_sip": "orig_src",
        **{f"{leg}.{theirs}": f"{ours}_{name}" for leg, ours in (("a_to_b", "ab"), ("b_to_a", "ba"))
           for theirs, name in _LEG.items()},
    },
    "nat_fe": {
        "prefixlen": "prefixlen", "addr": "addr", "port": "port", "protocol": "proto", "saddr": "source", "id": "id",
        "count": "count", "local": "local", "affinity_timeo": "affinity_s", "flags": "flags",
    },
    "nat_be": {"id": "id", "ordinal": "ordinal", "addr": "addr", "port": "port"},
    "nat_aff": {
        "nat_key.addr": "addr", "nat_key.port": "port", "nat_key.protocol": "proto", "client_ip": "client",
        "nat_dest.addr": "backend", "nat_dest.port": "backend_port", "ts": "ts_ns",
    },
    "routes": {"prefixlen": "prefixlen", "addr": "addr", "flags": "flags", "next_hop": "next_hop"},
    "iface": {
        "": "ifindex", "ifindex": "ifindex", "flags": "flags", "name": "name", "tc_filter_ingress": "filter_in",
        "tc_filter_egress": "filter_eg",
        **{f"{where}_policy_{family}": f"{where}_{family}" for where in ("xdp", "ingress", "egress")
           for family in ("v4", "v6")},
    },
    "arp": {"ip": "addr", "ifindex": "ifindex", "mac_src": "mac_src", "mac_dst": "mac_dst"},
    "counters": {"ifindex": "ifindex", "hook": "hook"},
}  # fmt: skip
_OPTIONAL = {
    "flags1", "flags2", "flags3", "orig_sport", "orig_src", "filter_in", "filter_eg",
    *(f"{leg}_{name}" for leg in ("ab", "ba") for name in ("bytes", "packets", "ifindex")),
}  # fmt: skip
_ADDRESSES = {
    "addr", "addr_a", "addr_b", "saddr", "tun_ip", "orig_ip", "orig_sip", "client_ip", "next_hop", "ip", "src", "dst",
    "vip", "daddr",
}  # fmt: skip
_INTEGERS = {(1, False): "u8", (2, False): "u16", (4, False): "u32", (8, False): "u64",
             (1, True): "u8", (2, True): "s16", (4, True): "s32", (8, True): "u64"}  # fmt: skip
_IP = {4: "ip4", 16: "ip6"}
_MOST_ELEMENTS = 64
_REVERSE_KEY = "nat_rev_key"


@dataclass(frozen=True)
class _Leaf:
    offset: int
    size: int
    kind: str
    path: str


def declared(types: Btf, name: str) -> tuple[int, int] | None:
    """(key type id, value type id) of the map that a program declares under this name, None when it declares none."""
    variable = types.find(name, KIND_VAR)
    if variable is None:
        return None
    outer = types.resolve(types.target(variable))
    if types.kind(outer) != KIND_STRUCT:
        return None
    found = {m.name: types.resolve(m.type_id) for m in types.members(outer) if m.name in ("key", "value")}
    if len(found) != 2 or any(types.kind(each) != KIND_PTR for each in found.values()):
        return None
    return types.target(found["key"]), types.target(found["value"])


def describe(raw: RawMap, types: Btf, key_type: int, value_type: int) -> Layout | None:
    """A map's layout as BTF has it; None when its sizes are not the map's, as then it describes something else.

    Raises Malformed for a broken BTF.
    """
    if (types.size(key_type), types.size(value_type)) != (raw.key_size, raw.value_size):
        return None
    base, version, _ = identify(raw.name)
    kind = base.removeprefix("cali_").removeprefix("v4_").removeprefix("v6_")
    names = _NAMES.get(kind, {})
    value_leaves = list(_leaves(types, value_type, 0, ""))
    if kind == "counters":
        names = {**names, **{f"[{index}]": str(index) for index in range(raw.value_size // 8)}}
    key = _renamed(list(_leaves(types, key_type, 0, "")), names)
    value = _renamed(value_leaves, names)
    needed = {*_NAMES.get(kind, {}).values()} - _OPTIONAL
    if kind in _NAMES and needed <= {name for _, _, name in (*key, *value)}:
        forward = next((leaf.offset for leaf in value_leaves if leaf.path.startswith(f"{_REVERSE_KEY}.")), None)
        if kind != "ct" or forward is not None:
            tables = (_table(key, raw.key_size), _table(value, raw.value_size))
            return Layout(base, version, *tables, origin="btf", forward_at=forward or 0)
    plain = [[(leaf.offset, leaf.kind, leaf.path or part) for leaf in _leaves(types, each, 0, "")]
             for part, each in (("key", key_type), ("value", value_type))]  # fmt: skip
    return Layout(base, version, _table(plain[0], raw.key_size), _table(plain[1], raw.value_size), origin="members")


def _table(rows: Iterable[tuple[int, str, str]], size: int) -> Table:
    """A table of these rows. Of members of a union that overlap the first declared stays."""
    kept: list[tuple[int, str, str]] = []
    for offset, kind, name in rows:
        end = offset + _WIDTHS[kind]
        if all(end <= at or at + _WIDTHS[other] <= offset for at, other, _ in kept):
            kept.append((offset, kind, name))
    return Table(";".join(f"{offset} {kind} {name}" for offset, kind, name in sorted(kept)), size)


_WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "s16": 2, "s32": 4, "be32": 4, "ip4": 4, "ip6": 16, "mac": 6,
           "name": 16}  # fmt: skip


def _renamed(leaves: list[_Leaf], names: dict[str, str]) -> list[tuple[int, str, str]]:
    """Rows of the leaves that we have a name for: by their path, or by its end."""
    found = []
    for leaf in leaves:
        parts = leaf.path.split(".")
        ends = (".".join(parts[index:]) for index in range(len(parts)))
        ours = next((names[end] for end in ends if end in names), None)
        if ours is not None and _REVERSE_KEY not in parts:
            found.append((leaf.offset, leaf.kind, ours))
    return found


def _leaves(types: Btf, type_id: int, at: int, path: str) -> Iterator[_Leaf]:
    """Members that hold a number, an address or a name, those of inner structs and unions included, in order."""
    inner = types.resolve(type_id)
    kind, size = types.kind(inner), types.size(inner)
    name = path.rpartition(".")[2]
    if name in _ADDRESSES and size in _IP:
        yield _Leaf(at, size, _IP[size], path)
    elif kind in (KIND_STRUCT, KIND_UNION):
        seen: set[int] = set()
        for member in types.members(inner):
            where = at + member.offset
            if member.bitfield_bits:
                width = types.size(member.type_id)
                where = at + member.offset // width * width
                if where in seen:
                    continue  # another bit of the same word
                seen.add(where)
            step = f"{path}.{member.name}" if path and member.name else path or member.name
            yield from _leaves(types, member.type_id, where, step)
    elif kind == KIND_ARRAY:
        yield from _elements(types, inner, at, path)
    elif kind == KIND_INT:
        code = "be32" if name == "seqno" else _INTEGERS[size, types.signed(inner)]
        yield _Leaf(at, size, code, path)
    elif kind in (KIND_ENUM, KIND_PTR):
        yield _Leaf(at, size, _INTEGERS[size, False], path)


def _elements(types: Btf, array: int, at: int, path: str) -> Iterator[_Leaf]:
    element, count = types.array(array)
    width, name = types.size(element), path.rpartition(".")[2]
    if name.startswith("mac") and (width, count) == (1, 6):
        yield _Leaf(at, 6, "mac", path)
    elif name == "name" and (width, count) == (1, 16):
        yield _Leaf(at, 16, "name", path)
    elif count <= _MOST_ELEMENTS and not name.startswith(("pad", "__pad")):
        for index in range(count):
            yield from _leaves(types, element, at + index * width, f"{path}[{index}]")


def to_plain(layout: Layout) -> dict[str, str | int]:
    """What a journal keeps of a layout that BTF gave."""
    return {
        "key": layout.key.text, "value": layout.value.text, "origin": layout.origin, "forward_at": layout.forward_at,
    }  # fmt: skip


def from_plain(raw: RawMap, plain: Mapping[str, Any]) -> Layout:
    """The layout of a map of a journal, from :func:`to_plain`. Raises Malformed when it is none."""
    base, version, _ = identify(raw.name)
    try:
        tables = (Table(plain["key"], raw.key_size), Table(plain["value"], raw.value_size))
        return Layout(base, version, *tables, origin=str(plain["origin"]), forward_at=int(plain["forward_at"]))
    except (KeyError, ValueError, TypeError, AttributeError, struct.error) as wrong:
        raise Malformed(0, "a layout", f"{type(wrong).__name__}: {wrong}", f"map {raw.name}") from wrong
