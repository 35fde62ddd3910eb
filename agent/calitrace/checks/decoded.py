"""What checks compare of the NAT, route, interface-state and conntrack maps; layouts are those of calico.maptables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from calitrace.calico import maptables
from calitrace.calico.maps import RawMap, identify
from calitrace.checks.snapshot import Map, Missing
from calitrace.errors import LayoutMismatch

ANY_NODE = "255.255.255.255"
DROP = 0xFFFFFFFF
EXTERNAL_LOCAL, INTERNAL_LOCAL, EXCLUDE = 1, 2, 4
V4_READY = 0x2
HOST, LOCAL_HOST = 0x10, 0x18
_NORMAL, _NAT_REV, _TCP = 0, 2, 6
_FWD_DSR, _NP_FWD, _B_TO_A = 0x2, 0x4, 0x100


@dataclass(frozen=True)
class Frontend:
    """An address and port that is a service's. *count*: backends, DROP for sources that may not use it; *source*: the
    clients it is for.
    """

    address: str
    port: int
    proto: int
    source: str
    id: int
    count: int
    local: int
    flags: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port} proto {self.proto}"


@dataclass(frozen=True)
class Nat:
    """Frontends in the map's order; backends by service id and ordinal."""

    frontends: tuple[Frontend, ...]
    backends: dict[tuple[int, int], tuple[str, int]]


@dataclass(frozen=True)
class Interface:
    """A row of the interface-state map."""

    index: int
    name: str
    flags: int


@dataclass(frozen=True)
class NodeRoute:
    """A row of the routes map. *flags*: 0x18 local host, 0x10 remote host, 0xc local workload."""

    network: IPv4Network
    flags: int


@dataclass(frozen=True)
class Forwarded:
    """A NodePort connection that this node handed to another: *tun_ip* of that node, packets each way, last seen.

    *frontend*: the address and port that the client asked for.
    """

    client: str
    backend: str
    frontend: str
    tun_ip: str
    sent: int
    answered: int
    last_seen_ns: int


@dataclass(frozen=True)
class Connection:
    """A conntrack entry of a flow from *client* to *server*. *translated*: it is part of a NATed connection.

    *to_backend*: *server* is the backend that was chosen.
    """

    proto: int
    client: str
    server: tuple[str, int]
    translated: bool
    to_backend: bool = False


def nat(maps: Iterable[Map]) -> Nat | Missing:
    """The NAT tables."""
    every = tuple(maps)
    frontends, backends = _rows(every, "cali_v4_nat_fe"), _rows(every, "cali_v4_nat_be")
    if isinstance(frontends, Missing):
        return frontends
    if isinstance(backends, Missing):
        return backends
    return Nat(
        tuple(_frontend(row) for row in frontends),
        {(row["id"], row["ordinal"]): (row["addr"], row["port"]) for row in backends},
    )


def _frontend(row: dict[str, Any]) -> Frontend:
    # 56 bits of address, port and protocol stand before the source; v3.13 has no source.
    length = min(max(row.get("prefixlen", 56) - 56, 0), 32)
    source = f"{row.get('source', '0.0.0.0')}/{length}"
    return Frontend(
        row["addr"], row["port"], row["proto"], source, row["id"], row["count"], row["local"], row.get("flags", 0)
    )


def interfaces(maps: Iterable[Map]) -> tuple[Interface, ...] | Missing:
    """The interface-state map, from v3.24 on."""
    found = _rows(maps, "cali_iface")
    if isinstance(found, Missing):
        return found
    return tuple(Interface(row["ifindex"], row["name"], row["flags"]) for row in found)


def routes(maps: Iterable[Map]) -> tuple[NodeRoute, ...] | Missing:
    """The routes map."""
    found = _rows(maps, "cali_v4_routes")
    if isinstance(found, Missing):
        return found
    return tuple(
        NodeRoute(IPv4Network((row["addr"], min(row["prefixlen"], 32)), strict=False), row["flags"]) for row in found
    )


def forwarded(maps: Iterable[Map]) -> tuple[Forwarded, ...] | Missing:
    """Conntrack entries of NodePort connections (TCP) to other nodes, v3.24 and later; those of DSR are left out.

    In DSR mode the replies do not come back this way; and with UDP, such as a stream of log lines, there need be none.
    """
    found = _rows(maps, "cali_v4_ct")
    if isinstance(found, Missing):
        return found
    rows = []
    for row in found:
        flags = row["flags0"] | row.get("flags1", 0) << 8
        if "ab_packets" not in row:
            return Missing("conntrack entries before v3.24 do not count packets")
        if row["type"] != _NAT_REV or row["proto"] != _TCP or row["tun_ip"] == "0.0.0.0":
            continue
        if not flags & _NP_FWD or flags & _FWD_DSR:
            continue
        ends = [(f"{row[f'addr_{end}']}:{row[f'port_{end}']}", row[packets]) for end, packets in _LEGS]
        (client, sent), (backend, answered) = reversed(ends) if flags & _B_TO_A else ends
        frontend = f"{row['orig_dst']}:{row['orig_dport']}"
        rows.append(Forwarded(client, backend, frontend, row["tun_ip"], sent, answered, row["last_seen_ns"]))
    return tuple(rows)


def connections(maps: Iterable[Map]) -> tuple[Connection, ...] | Missing:
    """All conntrack entries; before v3.24 none tells its direction, and A is taken for the client."""
    found = _rows(maps, "cali_v4_ct")
    if isinstance(found, Missing):
        return found
    rows = []
    for row in found:
        ends = [(row[f"addr_{end}"], row[f"port_{end}"]) for end in ("a", "b")]
        client, server = reversed(ends) if row.get("flags1", 0) << 8 & _B_TO_A else ends
        name, kind = f"{client[0]}:{client[1]}", row["type"]
        rows.append(Connection(row["proto"], name, server, kind != _NORMAL, kind == _NAT_REV))
    return tuple(rows)


_LEGS = (("a", "ab_packets"), ("b", "ba_packets"))


def _rows(maps: Iterable[Map], base: str) -> list[dict[str, Any]] | Missing:
    """The rows of the map of that name with the highest version."""
    named = [(identify(each.name), each) for each in maps]
    found = sorted(((version, each) for (name, version, old), each in named if name == base and not old), key=_version)
    if not found:
        return Missing(f"there is no map {base}")
    newest = found[-1][1]
    if newest.entries is None:
        return Missing(f"{newest.name} was not read")
    raw = RawMap(
        newest.name,
        newest.path,
        newest.type,
        newest.key_size,
        newest.value_size,
        newest.max_entries,
        1,
        newest.raw,
    )
    try:
        layout = maptables.resolve(raw)
    except LayoutMismatch as unknown:
        return Missing(f"the layout of {newest.name} is not known: {unknown.actual}; known: {unknown.expected}")
    if any((len(key), len(value)) != (newest.key_size, newest.value_size) for key, value in newest.raw):
        return Missing(f"{newest.name} has rows of another size than it says")
    return list(maptables.iter_entries(raw, layout))


def _version(found: tuple[int, Map]) -> int:
    return found[0]
