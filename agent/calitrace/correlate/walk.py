"""Calico's own lookups for one packet, in their order, over maps that were read: where the chain breaks.

Order of calico felix/bpf-gpl/tc.c, nat_lookup.h and fib_common.h, v3.24 to master: conntrack; NAT frontend, for the
packet's source and then, when that may be a node's, for any node; affinity, Maglev or backend; reverse path; blackhole
routes; failsafe ports, which are of the host itself; policy program; route; the backend's interface and its policy
program. A connection that is tracked has none of these but its entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, TypeGuard

from calitrace.calico.maps import MOST_BACKENDS

_ANY_NODE = {4: "255.255.255.255", 6: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}
NO_FRONTEND, NO_BACKEND, NO_ROUTE, NO_INTERFACE = "no frontend", "frontend without backend", "no route", "no ifstate"
STALE, DISAGREE, BAD_SOURCE, BLACKHOLE = (
    "stale conntrack",
    "conntrack and NAT disagree",
    "source not allowed",
    "blackhole",
)
SPOOFED, NO_POLICY = "not an address of this pod", "no policy program"
_BLACKHOLES = {"blackhole-drop", "blackhole-reject"}
REFUSED = "refused with an ICMP error"
_INGRESS, _EGRESS = "ingress", "egress"
# Interfaces at which Calico neither makes nor opens NodePort tunnels.
_TUNNELS = {"vxlan", "ipip", "wg", "l3"}
# Up to v3.31 one jump map serves both hooks; netkit devices have theirs, whose hooks are seen from the pod.
_NETKIT = ("cali_j_nk_ing", "cali_j_nk_egr")
JUMPS = {_INGRESS: ("cali_jump_ing", "cali_jump", *_NETKIT), _EGRESS: ("cali_jump_egr", "cali_jump", *_NETKIT)}


@dataclass(frozen=True)
class Packet:
    """Addresses as text in their usual spelling; *sport* 0: some new connection. *ingress*: interface or ""."""

    src: str
    sport: int
    dst: str
    dport: int
    proto: str
    ingress: str = ""

    @property
    def version(self) -> int:
        """4 or 6."""
        return ip_address(self.dst).version


@dataclass(frozen=True)
class Tables:
    """The entries of each map, in the words of report.mapdump. None: that map was not there to be read.

    *spoofing*: what workloads may send from besides their own addresses. *programs*: of the jump maps, by base name:
    program ids by index, of the indices in ifstate. *now_ns*: CLOCK_MONOTONIC of the reading, 0 when unknown.
    """

    conntrack: list[dict[str, Any]] = field(default_factory=list)
    frontends: list[dict[str, Any]] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)
    affinity: list[dict[str, Any]] = field(default_factory=list)
    routes: list[dict[str, Any]] = field(default_factory=list)
    interfaces: list[dict[str, Any]] | None = None
    failsafes: list[dict[str, Any]] | None = field(default_factory=list)
    maglev: list[dict[str, Any]] = field(default_factory=list)
    spoofing: list[dict[str, Any]] = field(default_factory=list)
    programs: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    now_ns: int = 0


@dataclass(frozen=True)
class Step:
    """One lookup. *key*: what for. *broken*: the kind of breakage, "" when the chain goes on.

    *suffers*: what the packet does then. The last step's lookup is ``verdict``: what becomes of the packet.
    """

    lookup: str
    key: str
    found: str
    broken: str = ""
    suffers: str = ""

    def __str__(self) -> str:
        suffers = f": {self.suffers}" if self.suffers else ""
        return f"{self.lookup} {self.key}: {self.found}{suffers}"


def walk(packet: Packet, tables: Tables) -> list[Step]:
    """The lookups for this packet and the verdict.

    Several backends give several routes: any new connection may get any of them.
    """
    walker = _Walk(packet, tables)
    walker.run()
    return [*walker.steps, Step("verdict", str(_where(packet)), walker.verdict())]


def _where(packet: Packet) -> str:
    return f"{packet.proto} {_end(packet.src, packet.sport)} -> {_end(packet.dst, packet.dport)}"


def _end(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{port}" if port else address


class _Walk:
    def __init__(self, packet: Packet, tables: Tables) -> None:
        self.packet = packet
        self.tables = tables
        self.steps: list[Step] = []
        self.ends: list[str] = []
        self.source = self._route(packet.src)
        owner = self._name(self.source) if self.source is not None and "ifindex" in self.source else ""
        self.ingress = packet.ingress or owner  # without one a pod of this node sends it
        self.entry = next((i for i in tables.interfaces or () if i["name"] == self.ingress), None)
        flags = set(self.entry["flags"]) if self.entry is not None else set()
        self.workload = "workload" in flags or (self.entry is None and self.ingress == owner != "")
        self.host = not self.ingress and _is(self.source, "local", "host")
        # Calico tells whether a packet came in by a host interface, and puts it into its own tunnel only then.
        self.outside = not self.workload and not self.host
        self.encaps = self.outside and not flags & _TUNNELS
        target = self._route(packet.dst)
        # Another node's address reaches this one in a NodePort tunnel, in which that node has put it.
        self.tunnelled = self.encaps and _is(target, "host") and not _is(target, "local")

    # --- What is said ---

    def _ok(self, lookup: str, key: str, found: str) -> None:
        self.steps.append(Step(lookup, key, found))

    def _break(self, lookup: str, key: str, found: str, broken: str, suffers: str, ways: int = 1) -> None:
        """A breakage, which ends this way of the packet, or so many of its ways."""
        self.steps.append(Step(lookup, key, found, broken, suffers))
        self.ends += [f"{suffers} ({broken})"] * ways

    def verdict(self) -> str:
        """What becomes of the packet: one sentence, or one for each kind of end with its share."""
        counted = Counter(self.ends)
        if len(counted) == 1:
            return next(iter(counted))
        return "; ".join(f"{count} of {len(self.ends)} new connections: {end}" for end, count in counted.items())

    # --- The chain ---

    def run(self) -> None:
        """Do the lookups up to the first that ends the packet."""
        packet = self.packet
        if self.ingress and not self._arrives():
            return
        tracked = self._tracked()
        if tracked is not None:
            self._established(tracked, self._lookup()[1])
            return
        front = self._frontend()
        if front is not None and front["drop"]:
            return
        excluded = front is not None and "nat-exclude" in front["flags"]
        targets = [(packet.dst, packet.dport)] if front is None or excluded else self._backends(front)
        if not targets or not self._reverse_path(len(targets)):
            return
        if not excluded:
            targets = [each for each in targets if not self._blackholed(each[0], backend=front is not None)]
        if not targets or not self._allowed([] if excluded else targets, len(targets)):
            return
        if excluded:
            self.ends.append(f"not translated, and left to the host, for {_end(packet.dst, packet.dport)}")
        elif front is None:
            self._without_frontend()
        else:
            for address, port in targets:
                self._forward(address, port, backend=True)

    def _name(self, route: dict[str, Any]) -> str:
        """The interface of a local pod's route, by the name that ifstate has."""
        row = self._row(route)
        return str(row["name"] if row else route["interface"])

    def _row(self, route: dict[str, Any]) -> dict[str, Any] | None:
        return next((i for i in self.tables.interfaces or () if i["ifindex"] == route["ifindex"]), None)

    def _arrives(self) -> bool:
        """Whether Calico has its programs at the interface by which the packet comes in."""
        name = self.ingress
        return self._ready(
            name,
            self.entry,
            f"dropped until Felix has attached its programs to {name}"
            if self.workload
            else f"not translated: Calico has no programs at {name}, the host routes it",
        )

    def _delivers(self, name: str, row: dict[str, Any] | None) -> bool:
        """Whether a pod's interface lets packets through to it."""
        suffers = f"dropped until Felix has attached its programs to {name}"
        if row is None:
            suffers = f"dropped: {name} is unknown to Calico"
        if not self._ready(name, row, suffers):
            return False
        if self.host:
            self._ok("policy", f"{name}, tc {_EGRESS}", "not asked: pods are always open to their own host")
            return True
        return self._policy(name, row, _EGRESS)

    def _ready(self, name: str, row: dict[str, Any] | None, suffers: str) -> bool:
        if self.tables.interfaces is None:
            return True
        shown = "none" if row is None else " ".join(row["flags"]) or "no flags"
        if row is not None and {"ready", f"v{self.packet.version}Ready"} & set(row["flags"]):
            self._ok("ifstate", name, shown)
            return True
        self._break("ifstate", name, shown if row is None else f"{shown}: not ready", NO_INTERFACE, suffers)
        return False

    def _policy(self, name: str, row: dict[str, Any] | None, hook: str, ways: int = 1) -> bool:
        """Whether there is a policy program where one is needed; what it decides is not looked at."""
        index = None if row is None else row.get(f"{hook}_v{self.packet.version}")
        bases = [each for each in JUMPS[hook] if each in self.tables.programs]
        if row is None or index is None or not bases:
            return True  # a release, or a reading, without them
        key = f"{name}, tc {hook}"
        base = next((each for each in bases if index in self.tables.programs[each]), bases[0])
        program = self.tables.programs[base].get(index)
        if program is not None:
            self._ok("policy", key, f"program {program} at {index} of {base} decides")
        elif index < 0:
            # The programs do not read it here: it is what Felix wrote down, and whoever else loads them does not.
            self._ok("policy", key, "not known: ifstate names none")
        elif "workload" in row["flags"]:
            where = f"{base} is empty at {index}"
            self._break("policy", key, where, NO_POLICY, "dropped, as with any pod without one", ways)
            return False
        else:
            self._ok("policy", key, "none: everything is allowed")
        return True

    def _allowed(self, targets: list[tuple[str, int]], ways: int) -> bool:
        """Whether failsafe ports or a policy program let it in, or out of the host itself."""
        if targets and all(self._failsafe(address, port) for address, port in targets):
            return True
        return not self.ingress or self._policy(self.ingress, self.entry, _INGRESS, ways)

    def _failsafe(self, address: str, port: int) -> bool:
        """Whether it is the host's own port that no policy closes; asked of what has been translated already."""
        route, packet = self._route(address), self.packet
        own = _is(route, "local", "host")
        if self.outside and own:
            direction, other, key = "inbound", packet.src, f"{packet.proto} {port} from {packet.src}"
        elif self.host and not own and not _is(route, "local", "workload"):
            direction, other, key = "outbound", address, f"{packet.proto} {port} to {address}"
        else:
            return False
        if self.tables.failsafes is None:
            self._ok("failsafe", key, "their map is not here")
            return False
        for row in self.tables.failsafes:
            wanted = (packet.proto, port, direction)
            if (row["proto"], row["port"], row["direction"]) == wanted and _inside(other, row.get("cidr")):
                self._ok("failsafe", key, "it is one: no host policy applies")
                return True
        self._ok("failsafe", key, "none")
        return False

    def _tracked(self) -> dict[str, Any] | None:
        """The entry with these ends; none for a packet without a source port, which stands for a new connection."""
        packet = self.packet
        ends = {(packet.src, packet.sport), (packet.dst, packet.dport)}
        for entry in self.tables.conntrack if packet.sport else ():
            there = {(entry["addr_a"], entry["port_a"]), (entry["addr_b"], entry["port_b"])}
            if entry["proto"] == packet.proto and there == ends:
                return entry
        rest = ", which another TCP packet than a SYN cannot begin" if packet.sport and packet.proto == "tcp" else ""
        self._ok("conntrack", self._flow(), f"none: a new connection{rest}")
        return None

    def _flow(self) -> str:
        packet = self.packet
        ends = (_end(packet.src, packet.sport), _end(packet.dst, packet.dport))
        return f"{packet.proto} {' <-> '.join(ends)}"

    def _established(self, entry: dict[str, Any], front: dict[str, Any] | None) -> None:
        packet = self.packet
        if entry["type"] != "nat-fwd":
            self._answer(entry, front)
            return
        ends = [(entry["rev_addr_a"], entry["rev_port_a"]), (entry["rev_addr_b"], entry["rev_port_b"])]
        reverse = next(
            (e for e in self.tables.conntrack if e["type"] == "nat-rev" and e["proto"] == entry["proto"]
             and [(e["addr_a"], e["port_a"]), (e["addr_b"], e["port_b"])] == ends),
            None,
        )  # fmt: skip
        # Of a reverse entry the end that did not open it: the client's address may have been translated too.
        addr, port = (
            ends[reverse["from"] == "a"]
            if reverse is not None
            else next((end for end in ends if end[0] != packet.src), ends[0])
        )
        found = f"nat-fwd to {_end(addr, port)}"
        if reverse is None:
            self._break("conntrack", self._flow(), f"{found} without its reverse entry", STALE,
                        "a SYN starts anew, any other TCP packet is dropped" if packet.proto == "tcp" else
                        "starts anew")  # fmt: skip
            return
        found = f"{found}, {reverse['state'] or reverse['type']}{self._expired(reverse)}"
        valid = {(b["addr"], b["port"]) for b in self.tables.backends}
        own = {(b["addr"], b["port"]) for b in self.tables.backends
               if front is not None and b["id"] == front["id"] and b["ordinal"] < front["count"]}  # fmt: skip
        if (addr, port) not in valid:
            suffers = f"sent to {_end(addr, port)}, which is dead, until Felix's next sweep"
            if "send-rst" in reverse["flags"]:
                suffers = "answered with a TCP RST"
            self._break("conntrack", self._flow(), f"{found}: no service has that backend any more", STALE, suffers)
        elif (addr, port) not in own:
            other = "no frontend" if front is None else f"service {front['id']} has other backends"
            self._break("conntrack", self._flow(), f"{found}, but {_end(packet.dst, packet.dport)}: {other}", DISAGREE,
                        f"sent to {_end(addr, port)}, where new connections do not go")  # fmt: skip
        else:
            self._ok("conntrack", self._flow(), found)
            self._forward(addr, port, backend=True, tracked=reverse)

    def _answer(self, entry: dict[str, Any], front: dict[str, Any] | None) -> None:
        """A flow without NAT, or the reply of one with it."""
        packet = self.packet
        found = f"{entry['type']} {entry['state']}".strip() + self._expired(entry)
        opener = (entry["addr_b"], entry["port_b"]) if entry["from"] == "b" else (entry["addr_a"], entry["port_a"])
        if entry["type"] == "normal" and opener == (packet.src, packet.sport) and _translated(front):
            suffers = f"not translated, and sent to {_end(packet.dst, packet.dport)} as before"
            found = f"{found}: older than service {front['id']} at its destination"
            self._break("conntrack", self._flow(), found, DISAGREE, suffers)
            return
        self._ok("conntrack", self._flow(), found)
        if entry["type"] == "nat-rev" and opener != (packet.src, packet.sport):
            back = f"source becomes {_end(entry['orig_dst'], entry['orig_dport'])}"
            tunnel = entry["tun_ip"]
            if _specified(tunnel) and "np-fwd" not in entry["flags"]:
                straight = f"with DSR sent straight to {_end(packet.dst, packet.dport)}"
                self.ends.append(f"{back}, tunnelled back to node {tunnel}, {straight}")
            else:
                self.ends.append(f"{back}, sent to {_end(packet.dst, packet.dport)}")
            return
        self._forward(packet.dst, packet.dport, backend=False, tracked=entry)

    def _expired(self, entry: dict[str, Any]) -> str:
        late = entry.get("age_ns") is not None and entry["age_ns"] / 1e9 > entry["timeout_s"]
        return ", expired" if late else ""

    def _frontend(self) -> dict[str, Any] | None:
        places, front = self._lookup()
        for place in places:
            key = f"{_end(place, self.packet.dport)}/{self.packet.proto} from {self.packet.src}"
            if front is None or front["addr"] != place:
                self._ok("NAT frontend", key, "none")
                continue
            ranged = f", for {front['source']}" if front["source"] else ""
            if front["drop"]:
                self._break("NAT frontend", key, f"service {front['id']}, but not for this source", BAD_SOURCE,
                            "dropped, UNAUTH_SOURCE: the source is in no loadBalancerSourceRanges")  # fmt: skip
                break
            flags = f", {' '.join(front['flags'])}" if front["flags"] else ""
            counts = f"count {front['count']}, local {front['local']}"
            flags += ", in a NodePort tunnel" if self.tunnelled else ""
            self._ok("NAT frontend", key, f"service {front['id']}{ranged}: {counts}{flags}")
            break
        return front

    def _lookup(self) -> tuple[list[str], dict[str, Any] | None]:
        """(addresses that are looked up, the frontend with the longest source range at the first that has one)."""
        packet = self.packet
        places = [packet.dst]
        route = self._route(packet.dst)
        # Its own addresses have frontends of their own: only what the node sends may find another node's.
        if _is(route, "host") and (self.tunnelled or not self.outside):
            places.append(_ANY_NODE[packet.version])
        for place in places:
            found = [
                f
                for f in self.tables.frontends
                if (f["addr"], f["port"], f["proto"]) == (place, packet.dport, packet.proto)
                and _inside(packet.src, f["source"])
            ]
            if found:
                return places, max(found, key=lambda f: _length(f["source"]) if f["source"] else -1)
        return places, None

    def _reverse_path(self, ways: int) -> bool:
        """Whether the source belongs to the workload that sends; of host interfaces the kernel's routes decide."""
        row, packet = self.entry, self.packet
        if row is None or self.tunnelled:
            return True
        key = f"{packet.src} at {self.ingress}"
        if "workload" not in row["flags"]:
            self._ok("RPF", key, "left to the kernel's routes (bpfEnforceRPF)")
            return True
        allowed = [s for s in self.tables.spoofing
                   if s["interface"] == row["name"] and _inside(packet.src, s["cidr"])]  # fmt: skip
        if (self.source or {}).get("ifindex") == row["ifindex"] or allowed:
            self._ok("RPF", key, "allowed to send from it" if allowed else "its own address")
            return True
        found = "no route" if self.source is None else f"{self.source['cidr']} is elsewhere"
        self._break("RPF", key, found, SPOOFED, "dropped, and no counter tells it", ways)
        return False

    def _without_frontend(self) -> None:
        packet = self.packet
        route = self._route(packet.dst)
        flags = set(route["flags"]) if route is not None else set()
        if "workload" in flags:
            self._forward(packet.dst, packet.dport, backend=False)
            return
        where = "routed by the host as any other packet"
        if "host" in flags:
            local = "local" in flags
            where = "the host itself answers, and refuses when nothing listens" if local else "goes to another node"
            if local and self.workload:
                where = "dropped when defaultEndpointToHostAction is Drop, its default; else the host itself answers"
        self._break("route", packet.dst, _shown(route), NO_FRONTEND, where)

    def _blackholed(self, address: str, *, backend: bool) -> bool:
        """Whether a route of Calico's refuses it: of service addresses that no service uses (serviceLoopPrevention)."""
        route = self._route(address)
        found = _BLACKHOLES & set(route["flags"]) if route is not None else set()
        if not found:
            return False
        suffers = "dropped, BLACK_HOLE" if "blackhole-drop" in found else f"{REFUSED}, BLACK_HOLE"
        if backend:
            self._break("route", address, _shown(route), BLACKHOLE, suffers)
        else:
            self._break("route", address, _shown(route), NO_FRONTEND,
                        f"{suffers}: a service address without a service")  # fmt: skip
        return True

    def _backends(self, front: dict[str, Any]) -> list[tuple[str, int]]:
        """The backends that a new connection may get; none when it is refused."""
        key = f"service {front['id']}"
        # Maglev is for clients outside of the cluster, whatever the traffic policy.
        maglev = "maglev" in front["flags"] and self.outside and not self.tunnelled
        only = "in a NodePort tunnel" if self.tunnelled else self._local_only()
        count = front["local"] if not maglev and (self.tunnelled or only in front["flags"]) else front["count"]
        if not count:
            limited = f" on this node ({only})" if front["count"] else ""
            self._break("NAT backend", key, f"none{limited}", NO_BACKEND, REFUSED)
            return []
        chosen = self._sticky(front)
        if chosen is not None:
            return [chosen]
        if maglev:
            table = [m for m in self.tables.maglev if m["id"] == front["id"]]
            if not table:
                self._break("maglev", key, "no rows", NO_BACKEND, "dropped, MAGLEV_NO_BACKEND")
                return []
            self._ok("maglev", key, f"{len(table)} rows")
            return sorted({(m["addr"], m["port"]) for m in table})
        known = {(b["id"], b["ordinal"]): (b["addr"], b["port"]) for b in self.tables.backends}
        missing, found = [], []
        for ordinal in range(min(count, MOST_BACKENDS)):
            backend = known.get((front["id"], ordinal))
            if backend is None:
                missing.append(ordinal)
                continue
            self._ok("NAT backend", f"{front['id']}:{ordinal}", _end(*backend))
            found.append(backend)
        if missing:
            key = f"{front['id']}:{missing[0]}" + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
            self._break("NAT backend", key, "missing", NO_BACKEND, REFUSED, len(missing))
        return found

    def _local_only(self) -> str:
        """The flag that keeps this packet to local backends; what hosts and pods send has one of its own."""
        inside = not self.outside or _is(self.source, "host") or _is(self.source, "workload")
        return "internal-local" if inside else "external-local"

    def _sticky(self, front: dict[str, Any]) -> tuple[str, int] | None:
        if not front["affinity_s"]:
            return None
        packet = self.packet
        key = f"{packet.src} at {_end(packet.dst, packet.dport)}"
        for row in self.tables.affinity:
            # By the packet's own destination, though the frontend may be that of any node.
            ends = (row["addr"], row["port"], row["proto"], row["client"])
            if ends != (packet.dst, packet.dport, packet.proto, packet.src):
                continue
            backend = (row["backend"], row["backend_port"])
            if self.tables.now_ns and self.tables.now_ns - row["ts_ns"] > front["affinity_s"] * 1_000_000_000:
                self._ok("affinity", key, f"{_end(*backend)}, but older than {front['affinity_s']} s: chosen anew")
                return None
            self._ok("affinity", key, _end(*backend))
            return backend
        self._ok("affinity", key, "none: chosen anew")
        return None

    def _route(self, address: str) -> dict[str, Any] | None:
        found = [r for r in self.tables.routes if _inside(address, r["cidr"])]
        return max(found, key=lambda r: _length(r["cidr"]), default=None)

    def _forward(self, address: str, port: int, *, backend: bool, tracked: dict[str, Any] | None = None) -> None:
        """The way to an address: its route, and for a local pod its interface.

        *backend*: it was chosen by NAT. *tracked*: the entry of a connection that is not new: nothing is asked again.
        """
        route = self._route(address)
        target = _end(address, port)
        encaps = backend and self.encaps and tracked is None
        if route is None and encaps:
            self._break("route", address, "none", NO_ROUTE, "dropped, RT_UNKNOWN")
            return
        if tracked is not None and self._blackholed(address, backend=True):
            return
        self._ok("route", address, _shown(route))
        if route is None:
            self.ends.append(f"routed to {target} by the host")
        elif "ifindex" in route:
            name = self._name(route)
            if tracked is not None or self._delivers(name, self._row(route)):
                self.ends.append(f"delivered to {target} by {name}")
        elif not {"local", "host"} - set(route["flags"]):
            self.ends.append(f"delivered to this host, {target}")
        else:
            node = _specified(route["next_hop"]) or address
            if tracked is not None:
                node = _specified(tracked.get("tun_ip", "")) if backend else ""
                encaps = node != ""
            by = f"in Calico's VXLAN to node {node}" if encaps else "by the host's routes"
            self.ends.append(f"forwarded {by}, for {target}")


def _is(route: dict[str, Any] | None, *flags: str) -> bool:
    """Whether a route has all of these flags."""
    return route is not None and set(flags) <= set(route["flags"])


def _specified(address: str) -> str:
    """An address; "" for none, or for one of zeros."""
    return "" if not address or ip_address(address).is_unspecified else address


def _translated(front: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether new connections to a frontend are translated."""
    return front is not None and not front["drop"] and "nat-exclude" not in front["flags"] and front["count"] > 0


def _shown(route: dict[str, Any] | None) -> str:
    if route is None:
        return "none"
    where = f", {route['interface']}" if "ifindex" in route else ""
    hop = _specified(route.get("next_hop", ""))
    if hop:
        where = f", next hop {hop}"
    return f"{route['cidr']} {' '.join(route['flags'])}{where}"


@lru_cache(maxsize=1 << 18)
def network(cidr: str) -> IPv4Network | IPv6Network | None:
    """A network as text; None for a prefix length that no network has, which a map may hold all the same."""
    try:
        return ip_network(cidr, strict=False)
    except ValueError:
        return None


def _length(cidr: str) -> int:
    return int(cidr.rpartition("/")[2])


def _inside(address: str, cidr: str | None) -> bool:
    if cidr is None:
        return True
    found = network(cidr)
    return found is not None and ip_address(address) in found
