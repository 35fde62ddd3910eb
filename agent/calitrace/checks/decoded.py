"""The rows of the NAT, route and interface-state maps that checks compare. Other layouts than these are refused.

Addresses in network order, numbers little-endian. Source: felix/bpf/nat/maps.go (cali_v4_nat_fe3, cali_v4_nat_be),
felix/bpf/routes/map.go, felix/bpf/ifstate/map.go, v3.22 to master.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from calitrace.checks.snapshot import Map, Missing

ANY_NODE = "255.255.255.255"
DROP = 0xFFFFFFFF
EXTERNAL_LOCAL, INTERNAL_LOCAL, EXCLUDE = 1, 2, 4
WORKLOAD, V4_READY, HOST = 0x1, 0x2, 0x8
LOCAL_HOST, REMOTE_HOST = 0x18, 0x10
_NAT_REV = 2
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
    """A NodePort connection that this node handed to another: *tun_ip* of that node, packets each way, last seen."""

    client: str
    backend: str
    tun_ip: str
    sent: int
    answered: int
    last_seen_ns: int


def nat(maps: Iterable[Map]) -> Nat | Missing:
    """The NAT tables, from the pinned maps."""
    frontend = _one(maps, r"cali_v4_nat_fe\d*", {(16, 20), (16, 16)})
    backend = _one(maps, r"cali_v4_nat_be", {(8, 8)})
    if isinstance(frontend, Missing):
        return frontend
    if isinstance(backend, Missing):
        return backend
    return Nat(
        tuple(_frontend(key, value) for key, value in frontend.raw),
        {
            struct.unpack("<II", key): (str(IPv4Address(value[:4])), struct.unpack_from("<H", value, 4)[0])
            for key, value in backend.raw
        },
    )


def _frontend(key: bytes, value: bytes) -> Frontend:
    prefix, address, port, proto, source = struct.unpack("<I4sHB4sx", key)
    identifier, count, local, _affinity, *flags = struct.unpack(f"<{len(value) // 4}I", value)
    length = min(max(prefix - 56, 0), 32)  # 56 bits of address, port and protocol stand before the source
    return Frontend(
        str(IPv4Address(address)),
        port,
        proto,
        f"{IPv4Address(source)}/{length}",
        identifier,
        count,
        local,
        flags[0] if flags else 0,
    )


def interfaces(maps: Iterable[Map]) -> tuple[Interface, ...] | Missing:
    """The interface-state map, from v3.24 on."""
    found = _one(maps, r"cali_iface\d+", {(4, 20), (4, 44), (4, 52)})
    if isinstance(found, Missing):
        return found
    return tuple(
        Interface(
            int.from_bytes(key, "little"),
            value[4:20].partition(b"\0")[0].decode(errors="replace"),
            int.from_bytes(value[:4], "little"),
        )
        for key, value in found.raw
    )


def routes(maps: Iterable[Map]) -> tuple[NodeRoute, ...] | Missing:
    """The routes map."""
    found = _one(maps, r"cali_v4_routes", {(8, 8)})
    if isinstance(found, Missing):
        return found
    rows = []
    for key, value in found.raw:
        prefix, address = struct.unpack("<I4s", key)
        network = IPv4Network((address, min(prefix, 32)), strict=False)
        rows.append(NodeRoute(network, int.from_bytes(value[:4], "little")))
    return tuple(rows)


def forwarded(maps: Iterable[Map]) -> tuple[Forwarded, ...] | Missing:
    """Conntrack entries of NodePort connections to other nodes, v3.24 and later; those of DSR are left out.

    In DSR mode the replies do not come back this way. Source: felix/bpf/conntrack/v3 and v4.
    """
    found = _one(maps, r"cali_v4_ct[34]", {(16, 88)})
    if isinstance(found, Missing):
        return found
    rows = []
    for key, value in found.raw:
        flags = value[17] | value[23] << 8
        tunnel = value[72:76]
        if value[16] != _NAT_REV or not flags & _NP_FWD or flags & _FWD_DSR or tunnel == bytes(4):
            continue
        a_to_b, b_to_a = (int.from_bytes(value[at + 8 : at + 12], "little") for at in (24, 48))
        client, backend = _end(key, 4, 12), _end(key, 8, 14)
        if flags & _B_TO_A:
            a_to_b, b_to_a, client, backend = b_to_a, a_to_b, backend, client
        seen = int.from_bytes(value[8:16], "little")
        rows.append(Forwarded(client, backend, str(IPv4Address(tunnel)), a_to_b, b_to_a, seen))
    return tuple(rows)


def _end(key: bytes, address: int, port: int) -> str:
    return f"{IPv4Address(key[address : address + 4])}:{int.from_bytes(key[port : port + 2], 'little')}"


def _one(maps: Iterable[Map], pattern: str, sizes: set[tuple[int, int]]) -> Map | Missing:
    """The map of that name with the highest version, if its sizes are known."""
    named = re.compile(pattern)
    found = sorted((each for each in maps if named.fullmatch(each.name)), key=lambda each: each.name)
    if not found:
        return Missing(f"no map {pattern} is pinned")
    newest = found[-1]
    if (newest.key_size, newest.value_size) not in sizes:
        return Missing(f"{newest.name} has an unknown layout: key {newest.key_size}, value {newest.value_size} bytes")
    if newest.entries is None:
        return Missing(f"{newest.name} was not read")
    if any((len(key), len(value)) != (newest.key_size, newest.value_size) for key, value in newest.raw):
        return Missing(f"{newest.name} has rows of another size than it says")
    return newest
