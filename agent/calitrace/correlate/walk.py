"""Calico's own lookups for one packet, in their order, over maps that were read: where the chain breaks.

Order of calico felix/bpf-gpl/tc.c and nat_lookup.h: the interface's state; failsafe ports; conntrack; NAT frontend, for
the packet's source and then, when the destination is a host, for any node; reverse path; policy program; affinity,
Maglev or backend; route; the backend's interface and its policy program.
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
_INGRESS, _EGRESS = "ingress", "egress"
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
        self.ingress = packet.ingress
        if not self.ingress and self.source is not None and "ifindex" in self.source:
            self.ingress = self._name(self.source)  # a pod of this node sends it
        self.entry = next((i for i in tables.interfaces or () if i["name"] == self.ingress), None)

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
        if self.ingress and not self._interface(self.ingress, self.entry, _INGRESS, policy=False):
            return
        self._failsafe()
        tracked = self._tracked()
        front = self._frontend() if tracked is None else self._lookup()[1]
        if tracked is not None:
            self._established(tracked, front)
            return
        if not self._reverse_path():
            return
        if self.ingress and not self._policy(self.ingress, self.entry, _INGRESS):
            return
        if front is None:
            self._without_frontend()
        elif "nat-exclude" in front["flags"]:
            self._forward(packet.dst, packet.dport, backend=False)
        else:
            self._backends(front)

    def _name(self, route: dict[str, Any]) -> str:
        """The interface of a local pod's route, by the name that ifstate has."""
        row = self._row(route)
        return str(row["name"] if row else route["interface"])

    def _row(self, route: dict[str, Any]) -> dict[str, Any] | None:
        return next((i for i in self.tables.interfaces or () if i["ifindex"] == route["ifindex"]), None)

    def _interface(self, name: str, row: dict[str, Any] | None, hook: str, *, policy: bool = True) -> bool:
        """Whether an interface of Calico's lets packets through."""
        if self.tables.interfaces is None:
            return True
        if row is None:
            self._break("ifstate", name, "none", NO_INTERFACE, f"dropped: {name} is unknown to Calico")
            return False
        shown = " ".join(row["flags"]) or "no flags"
        if not {"ready", f"v{self.packet.version}Ready"} & set(row["flags"]):
            self._break("ifstate", name, f"{shown}: not ready", NO_INTERFACE,
                        f"dropped until Felix has attached its programs to {name}")  # fmt: skip
            return False
        self._ok("ifstate", name, shown)
        return not policy or self._policy(name, row, hook)

    def _policy(self, name: str, row: dict[str, Any] | None, hook: str) -> bool:
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
            self._break("policy", key, where, NO_POLICY, "dropped, as with any pod without one")
            return False
        else:
            self._ok("policy", key, "none: everything is allowed")
        return True

    def _failsafe(self) -> None:
        packet = self.packet
        key = f"{packet.proto} {packet.dport} from {packet.src}"
        if self.tables.failsafes is None:
            self._ok("failsafe", key, "their map is not here")
            return
        for row in self.tables.failsafes:
            wanted = (packet.proto, packet.dport, "inbound")
            if (row["proto"], row["port"], row["direction"]) == wanted and _inside(packet.src, row.get("cidr")):
                self._ok("failsafe", key, "it is one: no host policy applies")
                return
        self._ok("failsafe", key, "none")

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
        addr, port = next((end for end in ends if end[0] != packet.src), ends[0])
        found = f"nat-fwd to {_end(addr, port)}"
        if reverse is None:
            self._break("conntrack", self._flow(), f"{found} without its reverse entry", STALE,
                        "a SYN starts anew, any other TCP packet is dropped")  # fmt: skip
            return
        found = f"{found}, {reverse['state'] or reverse['type']}{self._expired(reverse)}"
        valid = {(b["addr"], b["port"]) for b in self.tables.backends}
        own = {(b["addr"], b["port"]) for b in self.tables.backends
               if front is not None and b["id"] == front["id"] and b["ordinal"] < front["count"]}  # fmt: skip
        if (addr, port) not in valid:
            self._break("conntrack", self._flow(), f"{found}: no service has that backend any more", STALE,
                        f"sent to {_end(addr, port)}, which is dead, until Felix's next sweep")  # fmt: skip
        elif (addr, port) not in own:
            other = "no frontend" if front is None else f"service {front['id']} has other backends"
            self._break("conntrack", self._flow(), f"{found}, but {_end(packet.dst, packet.dport)}: {other}", DISAGREE,
                        f"sent to {_end(addr, port)}, where new connections do not go")  # fmt: skip
        else:
            self._ok("conntrack", self._flow(), found)
            self._forward(addr, port, backend=True, tunnel=reverse.get("tun_ip"))

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
            if not ip_address(tunnel).is_unspecified and "np-fwd" not in entry["flags"]:
                straight = f"with DSR sent straight to {_end(packet.dst, packet.dport)}"
                self.ends.append(f"{back}, tunnelled back to node {tunnel}, {straight}")
            else:
                self.ends.append(f"{back}, sent to {_end(packet.dst, packet.dport)}")
            return
        self._forward(packet.dst, packet.dport, backend=False)

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
            self._ok("NAT frontend", key, f"service {front['id']}{ranged}: {counts}{flags}")
            break
        return front

    def _lookup(self) -> tuple[list[str], dict[str, Any] | None]:
        """(addresses that are looked up, the frontend with the longest source range at the first that has one)."""
        packet = self.packet
        places = [packet.dst]
        route = self._route(packet.dst)
        if route is not None and "host" in route["flags"]:
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

    def _reverse_path(self) -> bool:
        """Whether the source belongs to the workload that sends; of host interfaces the kernel's routes decide."""
        row, packet = self.entry, self.packet
        if self.ends:
            return False
        if row is None:
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
        self._break("RPF", key, found, SPOOFED, "dropped, and no counter tells it")
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
            if local and self.entry is not None and "workload" in self.entry["flags"]:
                where = "dropped when defaultEndpointToHostAction is Drop, its default; else the host itself answers"
        if _BLACKHOLES & flags:
            where = "dropped, BLACK_HOLE: a service address without a service"
        self._break("route", packet.dst, _shown(route), NO_FRONTEND, where)

    def _backends(self, front: dict[str, Any]) -> None:
        key = f"service {front['id']}"
        only = self._local_only()
        count = front["local"] if only in front["flags"] else front["count"]
        if not count:
            limited = f" on this node ({only})" if front["count"] else ""
            self._break("NAT backend", key, f"none{limited}", NO_BACKEND, "refused with an ICMP error")
            return
        chosen = self._sticky(front)
        if chosen is not None:
            self._forward(*chosen, backend=True)
            return
        table = [m for m in self.tables.maglev if m["id"] == front["id"]] if "maglev" in front["flags"] else []
        if "maglev" in front["flags"]:
            if not table:
                self._break("maglev", key, "no rows", NO_BACKEND, "dropped, MAGLEV_NO_BACKEND")
                return
            self._ok("maglev", key, f"{len(table)} rows")
            for addr, port in sorted({(m["addr"], m["port"]) for m in table}):
                self._forward(addr, port, backend=True)
            return
        known = {(b["id"], b["ordinal"]): (b["addr"], b["port"]) for b in self.tables.backends}
        missing = []
        for ordinal in range(min(count, MOST_BACKENDS)):
            backend = known.get((front["id"], ordinal))
            if backend is None:
                missing.append(ordinal)
                continue
            self._ok("NAT backend", f"{front['id']}:{ordinal}", _end(*backend))
            self._forward(*backend, backend=True)
        if missing:
            key = f"{front['id']}:{missing[0]}" + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
            self._break("NAT backend", key, "missing", NO_BACKEND, "refused with an ICMP error", len(missing))

    def _local_only(self) -> str:
        """The flag that keeps this packet to local backends; sources that are hosts or pods have one of their own."""
        inside = self.source is not None and bool({"host", "workload"} & set(self.source["flags"]))
        return "internal-local" if inside else "external-local"

    def _sticky(self, front: dict[str, Any]) -> tuple[str, int] | None:
        if not front["affinity_s"]:
            return None
        key = f"{self.packet.src} at {_end(front['addr'], front['port'])}"
        for row in self.tables.affinity:
            ends = (row["addr"], row["port"], row["proto"], row["client"])
            if ends != (front["addr"], front["port"], front["proto"], self.packet.src):
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

    def _forward(self, address: str, port: int, *, backend: bool, tunnel: str | None = None) -> None:
        """The way to an address: its route, and for a local pod its interface.

        *backend*: it was chosen by NAT, which needs a route of Calico's; any other address the host may route.
        """
        route = self._route(address)
        target = _end(address, port)
        if route is None and backend:
            self._break("route", address, "none", NO_ROUTE, "dropped, RT_UNKNOWN")
            return
        if route is not None and _BLACKHOLES & set(route["flags"]):
            self._break("route", address, _shown(route), BLACKHOLE, "dropped, BLACK_HOLE")
            return
        self._ok("route", address, _shown(route))
        if route is None:
            self.ends.append(f"routed to {target} by the host")
        elif "ifindex" in route:
            name = self._name(route)
            if self._interface(name, self._row(route), _EGRESS):
                self.ends.append(f"delivered to {target} by {name}")
        elif not {"local", "host"} - set(route["flags"]):
            self.ends.append(f"delivered to this host, {target}")
        else:
            node = tunnel if tunnel and not ip_address(tunnel).is_unspecified else route["next_hop"]
            outside = backend and self._local_only() == "external-local"
            by = f"in Calico's VXLAN to node {node}" if outside else "by the host's routes"
            self.ends.append(f"forwarded {by}, for {target}")


def _translated(front: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether new connections to a frontend are translated."""
    return front is not None and not front["drop"] and "nat-exclude" not in front["flags"] and front["count"] > 0


def _shown(route: dict[str, Any] | None) -> str:
    if route is None:
        return "none"
    where = f", {route['interface']}" if "ifindex" in route else ""
    hop = route.get("next_hop", "")
    if hop and not ip_address(hop).is_unspecified:
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
