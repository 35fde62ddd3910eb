"""Calico's own lookups for one packet, in their order, over maps that were read: where the chain breaks.

Order of calico felix/bpf-gpl/tc.c and nat_lookup.h: conntrack; NAT frontend, for the packet's source and then, when
the destination is a host, for any node; affinity; backend; route; the interface's state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

_ANY_NODE = {4: "255.255.255.255", 6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}
NO_FRONTEND, NO_BACKEND, NO_ROUTE, NO_INTERFACE = "no frontend", "frontend without backend", "no route", "no ifstate"
STALE, DISAGREE, BAD_SOURCE, BLACKHOLE = (
    "stale conntrack",
    "conntrack and NAT disagree",
    "source not allowed",
    "blackhole",
)


@dataclass(frozen=True)
class Packet:
    """Addresses as text in their usual spelling; *sport* 0: some new connection. *ingress*: interface or ""."""

    src: str
    sport: int
    dst: str
    dport: int
    proto: str
    ingress: str = ""


@dataclass(frozen=True)
class Tables:
    """The entries of each map, in the words of report.mapdump. None: that map was not there to be read."""

    conntrack: list[dict[str, Any]] = field(default_factory=list)
    frontends: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)
    affinity: list[dict[str, Any]] = field(default_factory=list)
    routes: list[dict[str, Any]] = field(default_factory=list)
    interfaces: list[dict[str, Any]] | None = None
    failsafes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """One lookup. *broken*: the kind of breakage, "" when the chain goes on; *suffers*: what the packet does then."""

    lookup: str
    found: str
    broken: str = ""
    suffers: str = ""


def walk(packet: Packet, tables: Tables) -> list[Step]:
    """The lookups for this packet. Several backends give several routes: any connection may get any of them."""
    steps = [*_ingress(packet, tables), _failsafe(packet, tables)]
    tracked = _conntrack(packet, tables)
    front = _frontend(packet, tables)
    if tracked is not None:
        return [*steps, *_tracked(packet, tracked, front, tables)]
    steps.append(Step("conntrack", "no entry: a new connection"))
    if front is None:
        return [*steps, *_no_frontend(packet, tables)]
    name = f"{front['addr']}:{front['port']} is service {front['id']}"
    if front["drop"]:
        return [*steps, Step("NAT frontend", f"{name}, but not for {packet.src}", BAD_SOURCE,
                             "dropped, UNAUTH_SOURCE: the source is in no loadBalancerSourceRanges")]  # fmt: skip
    steps.append(Step("NAT frontend", f"{name}, {front['count']} backends, {front['local']} local"))
    policy = _local_only(packet, tables)
    count = front["local"] if policy in front["flags"] else front["count"]
    if not count:
        only = f" on this node ({policy})" if front["count"] else ""
        return [*steps, Step("NAT backend", f"none{only}", NO_BACKEND, "refused with an ICMP error, or dropped")]
    known = {(b["id"], b["ordinal"]): (b["addr"], b["port"]) for b in tables.backends}
    chosen = _sticky(packet, front, tables)
    if chosen is not None:
        steps.append(Step("affinity", f"{packet.src} sticks to {chosen[0]}:{chosen[1]}"))
        return [*steps, *_deliver(*chosen, tables)]
    for ordinal in range(count):
        backend = known.get((front["id"], ordinal))
        if backend is None:
            lost = f"dropped: 1 of {count} new connections" if count > 1 else "dropped"
            steps.append(Step("NAT backend", f"{front['id']}:{ordinal} is missing", NO_BACKEND, lost))
        else:
            steps.append(Step("NAT backend", f"{front['id']}:{ordinal} is {backend[0]}:{backend[1]}"))
            steps += _deliver(*backend, tables)
    return steps


def _ingress(packet: Packet, tables: Tables) -> list[Step]:
    if not packet.ingress or tables.interfaces is None:
        return []
    return [_ready(packet.ingress, next((i for i in tables.interfaces if i["name"] == packet.ingress), None))]


def _ready(name: str, row: dict[str, Any] | None) -> Step:
    if row is None:
        return Step("ifstate", f"{name} is not there", NO_INTERFACE, "dropped: the interface is unknown to Calico")
    if not {"ready", "v4Ready", "v6Ready"} & set(row["flags"]):
        return Step("ifstate", f"{name} is not ready", NO_INTERFACE, "dropped until Felix has attached its programs")
    policy = row.get("ingress_v4", row.get("ingress_v6"))
    told = "" if policy is None else f", policy program {policy}" if policy >= 0 else ", no policy program"
    return Step("ifstate", f"{name}: {','.join(row['flags'])}{told}")


def _failsafe(packet: Packet, tables: Tables) -> Step:
    for row in tables.failsafes:
        wanted = (packet.proto, packet.dport, "inbound")
        if (row["proto"], row["port"], row["direction"]) == wanted and _inside(packet.src, row.get("cidr")):
            return Step("failsafe", f"port {packet.dport}/{packet.proto} is one: no host policy applies")
    return Step("failsafe", "not a failsafe port")


def _inside(address: str, cidr: str | None) -> bool:
    return cidr is None or ip_address(address) in ip_network(cidr, strict=False)


def _conntrack(packet: Packet, tables: Tables) -> dict[str, Any] | None:
    """The entry with these ends; none for a packet without a source port, which stands for a new connection."""
    ends = {(packet.src, packet.sport), (packet.dst, packet.dport)}
    for entry in tables.conntrack if packet.sport else ():
        there = {(entry["addr_a"], entry["port_a"]), (entry["addr_b"], entry["port_b"])}
        if entry["proto"] == packet.proto and there == ends:
            return entry
    return None


def _tracked(packet: Packet, entry: dict[str, Any], front: dict[str, Any] | None, tables: Tables) -> list[Step]:
    if entry["type"] != "nat-fwd":
        steps = [Step("conntrack", f"{entry['type']} {entry['state']}".strip())]
        return [*steps, *_deliver(packet.dst, packet.dport, tables)]
    ends = [(entry["rev_addr_a"], entry["rev_port_a"]), (entry["rev_addr_b"], entry["rev_port_b"])]
    reverse = next((e for e in tables.conntrack if e["type"] == "nat-rev" and e["proto"] == entry["proto"]
                    and [(e["addr_a"], e["port_a"]), (e["addr_b"], e["port_b"])] == ends), None)  # fmt: skip
    addr, port = next((end for end in ends if end[0] != packet.src), ends[0])
    if reverse is None:
        return [Step("conntrack", f"forward entry to {addr}:{port} without its reverse entry", STALE,
                     "treated as a new connection in mid-flow: dropped unless it is a SYN")]  # fmt: skip
    found = f"forward entry to {addr}:{port}, {reverse['state'] or reverse['type']}"
    valid = {(b["addr"], b["port"]) for b in tables.backends}
    own = {(b["addr"], b["port"]) for b in tables.backends
           if front is not None and b["id"] == front["id"] and b["ordinal"] < front["count"]}  # fmt: skip
    if (addr, port) not in valid:
        return [Step("conntrack", f"{found}: no service has that backend any more", STALE,
                     "goes to a dead backend until the entry expires")]  # fmt: skip
    if (addr, port) not in own:
        return [Step("conntrack", f"{found}: the service of {packet.dst}:{packet.dport} has other backends", DISAGREE,
                     "old connections go to another backend than new ones")]  # fmt: skip
    return [Step("conntrack", found), *_deliver(addr, port, tables)]


def _frontend(packet: Packet, tables: Tables) -> dict[str, Any] | None:
    """The frontend with the longest source range; that of any node when the destination is a host."""
    places = [packet.dst]
    route = _route(packet.dst, tables)
    if route is not None and "host" in route["flags"]:
        places.append(_ANY_NODE[ip_address(packet.dst).version])
    for place in places:
        found = [
            f
            for f in tables.frontends
            if (f["addr"], f["port"], f["proto"]) == (place, packet.dport, packet.proto)
            and _inside(packet.src, f["source"])
        ]
        if found:
            return max(found, key=lambda f: ip_network(f["source"], strict=False).prefixlen if f["source"] else -1)
    return None


def _no_frontend(packet: Packet, tables: Tables) -> list[Step]:
    route = _route(packet.dst, tables)
    if route is not None and "workload" in route["flags"]:
        return [Step("NAT frontend", "none: straight to the pod"), *_deliver(packet.dst, packet.dport, tables)]
    where = "the host itself answers, and refuses when nothing listens"
    if route is None or "host" not in route["flags"]:
        where = "routed by the host as any other packet"
    if route is not None and {"blackhole-drop", "blackhole-reject"} & set(route["flags"]):
        where = "dropped, BLACK_HOLE: a service address without a service"
    return [Step("NAT frontend", f"none for {packet.dst}:{packet.dport}/{packet.proto}", NO_FRONTEND, where)]


def _local_only(packet: Packet, tables: Tables) -> str:
    """The flag that keeps this packet to local backends; sources that are hosts or pods have one of their own."""
    route = _route(packet.src, tables)
    inside = route is not None and bool({"host", "workload"} & set(route["flags"]))
    return "internal-local" if inside else "external-local"


def _sticky(packet: Packet, front: dict[str, Any], tables: Tables) -> tuple[str, int] | None:
    if not front["affinity_s"]:
        return None
    for row in tables.affinity:
        key = (row["addr"], row["port"], row["proto"], row["client"])
        if key == (front["addr"], front["port"], front["proto"], packet.src):
            return row["backend"], row["backend_port"]
    return None


def _route(address: str, tables: Tables) -> dict[str, Any] | None:
    found = [r for r in tables.routes if _inside(address, r["cidr"])]
    return max(found, key=lambda r: ip_network(r["cidr"], strict=False).prefixlen, default=None)


def _deliver(address: str, port: int, tables: Tables) -> list[Step]:
    """The way to a backend: its route, and for a local one its interface."""
    route = _route(address, tables)
    if route is None:
        return [Step("route", f"none for {address}", NO_ROUTE, "dropped, RT_UNKNOWN")]
    shown = f"{address}:{port} by {route['cidr']}: {' '.join(route['flags'])}"
    if {"blackhole-drop", "blackhole-reject"} & set(route["flags"]):
        return [Step("route", shown, BLACKHOLE, "dropped, BLACK_HOLE")]
    if "ifindex" not in route:
        return [Step("route", f"{shown}, next hop {route['next_hop']}")]
    steps = [Step("route", f"{shown}, {route['interface']}")]
    if tables.interfaces is not None:
        row = next((i for i in tables.interfaces if i["ifindex"] == route["ifindex"]), None)
        steps.append(_ready(row["name"] if row else route["interface"], row))
    return steps
