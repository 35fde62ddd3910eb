"""Calico's maps in words: one object for each entry, which JSON prints as it is and text puts into Calico's own lines.

The text stays close to ``calico-node -bpf`` (calico felix/cmd/calico-bpf/commands, v3.24 to master).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from ipaddress import ip_address
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from calitrace.calico import maptables, reasons
from calitrace.calico.maps import MOST_BACKENDS, identify
from calitrace.calico.maptables import Layout, Table
from calitrace.calico.timeouts import Timeouts
from calitrace.packet import PROTOCOLS
from calitrace.report.folding import WIDTH, folded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from calitrace.calico.maps import RawMap
    from calitrace.correlate.walk import Step

NORMAL, NAT_FWD, NAT_REV = 0, 1, 2
_TYPES = {NORMAL: "normal", NAT_FWD: "nat-fwd", NAT_REV: "nat-rev"}
# felix/bpf-gpl/conntrack_types.h; 0x40 since v3.19, up to 0x200 since v3.24, to 0x2000 v3.26, the last ones v3.32.
CT_FLAGS = {
    0x1: "nat-out", 0x2: "fwd-dsr", 0x4: "np-fwd", 0x8: "skip-fib", 0x10: "res-0x10", 0x20: "res-0x20",
    0x40: "ext-local", 0x80: "via-nat-iface", 0x100: "B-A", 0x200: "host-psnat", 0x400: "svc-self",
    0x800: "np-loop", 0x1000: "np-remote", 0x2000: "no-dsr", 0x4000: "no-redir-peer", 0x8000: "dscp",
    0x10000: "maglev", 0x20000: "send-rst", 0x40000: "connlimit-in", 0x80000: "connlimit-in-rej",
    0x100000: "connlimit-out", 0x200000: "connlimit-dec",
}  # fmt: skip
_DSR, _B_A = 0x2, 0x100
LEG_FLAGS = {1: "syn", 2: "ack", 4: "fin", 8: "rst", 16: "approved", 32: "opener", 64: "workload"}
_SYN_ACK, _FIN, _RST, _OPENER = 3, 4, 8, 32
ROUTE_FLAGS = {
    0x1: "in-pool", 0x2: "nat-out", 0x4: "workload", 0x8: "local", 0x10: "host", 0x20: "same-subnet",
    0x40: "tunneled", 0x80: "no-dsr", 0x100: "blackhole-drop", 0x200: "blackhole-reject", 0x400: "vxlan",
    0x800: "skip-ingress-redir",
}  # fmt: skip
NAT_FLAGS = {1: "external-local", 2: "internal-local", 4: "nat-exclude", 8: "maglev"}
IFACE_FLAGS = {
    1: "workload", 2: "v4Ready", 4: "v6Ready", 8: "host", 0x10: "bond", 0x20: "bondslave", 0x40: "vxlan",
    0x80: "ipip", 0x100: "wg", 0x200: "l3", 0x400: "notmanaged",
}  # fmt: skip
_IFACE_FLAGS_2 = {1: "workload", 2: "ready"}
HOOKS = {0: "tc ingress", 1: "tc egress", 2: "xdp"}
_KINDS = {0: "ingress new", 1: "ingress est", 2: "egress new", 3: "egress est"}
DROP_COUNT = 0xFFFFFFFF
_S = 1_000_000_000
_FORWARD4 = "0 u32 rev_proto;4 ip4 rev_addr_a;8 ip4 rev_addr_b;12 u16 rev_port_a;14 u16 rev_port_b;16 u16 nat_sport"
_FORWARD6 = "0 u32 rev_proto;4 ip6 rev_addr_a;20 ip6 rev_addr_b;36 u16 rev_port_a;38 u16 rev_port_b;40 u16 nat_sport"
FORWARD = {False: Table(_FORWARD4, 20), True: Table(_FORWARD6, 44)}
_LEG = ("bytes", "packets", "seqno", "ifindex")


@dataclass(frozen=True)
class Context:
    """What gives numbers their names. *now_ns*: CLOCK_MONOTONIC when the maps were read, 0 when unknown."""

    now_ns: int = 0
    interfaces: dict[int, str] = field(default_factory=dict)
    rules: dict[int, str] = field(default_factory=dict)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def interface(self, ifindex: int) -> str:
        """The name of an interface, or its number in words."""
        return self.interfaces.get(ifindex) or f"ifindex {ifindex}"

    def leg_interface(self, ifindex: int) -> str | None:
        """Where a conntrack leg's packets came in: None for 0, which is the host itself or no packet yet."""
        return self.interface(ifindex) if ifindex else None


def names(flags: int, known: dict[int, str]) -> list[str]:
    """Flags by name; bits without one as hexadecimal numbers."""
    found = [name for bit, name in known.items() if flags & bit]
    rest = flags & ~sum(known)
    return [*found, hex(rest)] if rest else found


def protocol(number: int) -> str:
    """``tcp``, ``udp``, ``icmp``, ``icmp6`` or ``proto-N``."""
    return PROTOCOLS.get(number, f"proto-{number}")


def number(proto: str) -> str:
    """The number of a protocol that :func:`protocol` named."""
    return next((str(n) for n, name in PROTOCOLS.items() if name == proto), proto.removeprefix("proto-"))


def state(proto: int, flags: int, ab_bits: int, ba_bits: int) -> str:
    """A TCP entry's state as Felix words it, "" for other protocols."""
    if proto != 6:
        return ""
    fins = (ab_bits & _FIN, ba_bits & _FIN)
    if all(fins) or (flags & _DSR and any(fins)):
        return "CLOSED"
    if (ab_bits | ba_bits) & _RST:
        return "RESET"
    return "ESTABLISHED" if ab_bits & ba_bits & _SYN_ACK == _SYN_ACK else "SYN-SENT"


def entry_type(number: int) -> str:
    """``normal``, ``nat-fwd``, ``nat-rev`` or ``type-N``."""
    return _TYPES.get(number, f"type-{number}")


def judged(layout: Layout, context: Context, proto: int, flags: int, ab: int, ba: int, first: int) -> dict[str, Any]:
    """What the bits of an entry that is no forward entry mean. *ab*, *ba*: the legs'; *first*: its first member."""
    limit, why = context.timeouts.limit(layout.version, proto, flags, ab, ba, first)
    client = "b" if flags & _B_A or (ba & _OPENER and not ab & _OPENER) else "a"
    return {"from": client, "state": state(proto, flags, ab, ba), "timeout_s": limit, "timeout": why}


def iter_objects(raw: RawMap, context: Context) -> Iterator[dict[str, Any]]:
    """The entries of a map, in words. Raises LayoutMismatch for a map of no known version."""
    layout = maptables.resolve(raw)
    explain = _EXPLAIN.get(_kind(layout), _plain) if layout.origin != "members" else _members
    about = {"map": raw.name, **_place(raw.pin)}
    if layout.origin:
        about["layout"] = layout.origin
    for key, value in raw.entries:
        yield {**about, **explain(layout, key, maptables.summed(raw, value), context)}


def _place(pin: str) -> dict[str, str]:
    """Interface and hook of a map that is pinned for these alone, as counters were before v3.26."""
    directory = pin.rpartition("/")[0].rpartition("/")[2]
    interface, _, hook = directory.rpartition("_")
    return {"interface": interface, "hook": _PIN_HOOKS[hook]} if interface and hook in _PIN_HOOKS else {}


_PIN_HOOKS = {"igr": "tc ingress", "egr": "tc egress", "xdp": "xdp"}


def _kind(layout: Layout) -> str:
    return layout.base.removeprefix("cali_").removeprefix("v4_").removeprefix("v6_")


def _plain(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    found = layout.decode(key, value)
    for member, text in (("proto", protocol), ("ifindex", context.interface)):
        if member in found:
            found["interface" if member == "ifindex" else member] = text(found[member])
    return found


def _members(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    return {"key": layout.key.decode(key), "value": layout.value.decode(value)}


def _conntrack(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    proto, kind = entry["proto"], entry["type"]
    flags = sum(entry.get(f"flags{index}", 0) << 8 * index for index in range(4))
    found = {name: entry[name] for name in ("addr_a", "port_a", "addr_b", "port_b")}
    found = {
        "proto": protocol(proto),
        **found,
        "type": entry_type(kind),
        "flags": names(flags, CT_FLAGS),
    }
    # v3.30 has the time of the first RST in place of the creation: small maps do not tell which, so both are one name.
    found |= {"created_or_rst_ns": entry["created_ns"], "last_seen_ns": entry["last_seen_ns"]}
    found["age_ns"] = max(context.now_ns - entry["last_seen_ns"], 0) if context.now_ns else None
    if kind == NAT_FWD:
        table = FORWARD[layout.ipv6]
        forward = table.decode(value[layout.forward_at : layout.forward_at + table.size])
        reverse = {name: forward[name] for name in forward if name != "rev_proto"}
        # Calico leaves its flags empty: the client is the end that the reverse entry's key has too, with its port
        # where that was not changed; a host-networked backend may have the address of the other end.
        others = [(reverse[f"rev_addr_{end}"], reverse[f"rev_port_{end}"]) for end in "ab"]
        same = [(found[f"addr_{end}"], found[f"port_{end}"]) in others for end in "ab"]
        client = "ab"[same[1]] if any(same) else "ab"[found["addr_b"] in (others[0][0], others[1][0])]
        return {**found, "from": client, **reverse}
    ab, ba = entry["ab_bits"], entry["ba_bits"]
    found |= judged(layout, context, proto, flags, ab, ba, entry["created_ns"])
    for leg in ("ab", "ba"):
        found[leg] = {name: entry[f"{leg}_{name}"] for name in _LEG if f"{leg}_{name}" in entry}
        if "ifindex" in found[leg]:
            found[leg]["interface"] = context.leg_interface(found[leg]["ifindex"])
        found[leg]["flags"] = names(entry[f"{leg}_bits"], LEG_FLAGS)
    return found | {
        name: entry[name] for name in ("orig_dst", "orig_dport", "orig_sport", "orig_src", "tun_ip") if name in entry
    }


def _frontend(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = _plain(layout, key, value, context)
    length = entry.pop("prefixlen", 0)
    fixed = 152 if layout.ipv6 else 56
    source = entry.pop("source", None)
    entry["source"] = f"{source}/{length - fixed}" if length > fixed else None
    entry["drop"] = entry["count"] == DROP_COUNT
    entry["flags"] = names(entry.get("flags", 0), NAT_FLAGS)
    return entry


def _route(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    flags = entry["flags"]
    found: dict[str, Any] = {"cidr": f"{entry['addr']}/{entry['prefixlen']}", "flags": names(flags, ROUTE_FLAGS)}
    if flags & 0xC == 0xC:
        index = int.from_bytes(value[4:8], "little")
        return {**found, "ifindex": index, "interface": context.interface(index)}
    return {**found, "next_hop": entry["next_hop"]}


def _ip_set(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    found: dict[str, Any] = {"set_id": f"{entry['set_id']:#x}"}
    if entry["prefixlen"] - 64 > (128 if layout.ipv6 else 32):
        return {**found, "addr": entry["addr"], "port": entry["port"], "proto": protocol(entry["proto"])}
    return {**found, "cidr": f"{entry['addr']}/{entry['prefixlen'] - 64}"}


def _failsafe(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    found = {"proto": protocol(entry["proto"]), "port": entry["port"]}
    found["direction"] = "outbound" if entry["flags"] & 1 else "inbound"
    return {**found, "cidr": f"{entry['addr']}/{entry['prefixlen'] - 32}"} if "addr" in entry else found


def _spoofing(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    found = {"ifindex": entry["ifindex"], "interface": context.interface(entry["ifindex"])}
    return {**found, "cidr": f"{entry['addr']}/{max(entry['prefixlen'] - 32, 0)}"}


def _interface(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    entry["flags"] = names(entry["flags"], _IFACE_FLAGS_2 if layout.version == 2 else IFACE_FLAGS)
    return entry


def _counters(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    count = layout.value.size // 8
    found: dict[str, Any] = {}
    if "hook" in entry:
        found = {"ifindex": entry["ifindex"], "interface": context.interface(entry["ifindex"])}
        found["hook"] = HOOKS.get(entry["hook"], f"hook {entry['hook']}")
    return {**found, "counters": {reasons.counter_name(index, count): entry[str(index)] for index in range(count)}}


def _rule(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = layout.decode(key, value)
    return {"rule_id": entry["rule_id"], "rule": context.rules.get(entry["rule_id"]), "packets": entry["packets"]}


def _profile(layout: Layout, key: bytes, value: bytes, context: Context) -> dict[str, Any]:
    entry = _plain(layout, key, value, context)
    mean = entry["total_ns"] / entry["samples"] if entry["samples"] else None
    return {**entry, "kind": _KINDS.get(entry["kind"], f"kind {entry['kind']}"), "mean_ns": mean}


_EXPLAIN: dict[str, Callable[[Layout, bytes, bytes, Context], dict[str, Any]]] = {
    "ct": _conntrack, "nat_fe": _frontend, "routes": _route, "ip_sets": _ip_set, "fsafes": _failsafe,
    "iface": _interface, "counters": _counters, "rule_ctrs": _rule, "profiling": _profile,
    "sprefix": _spoofing,
}  # fmt: skip


def text(kind: str, entry: dict[str, Any], *, raw: bool = False) -> str:
    """One entry as one line. *kind*: the map's base name without ``cali_v4_``."""
    if entry.get("layout") == "members":
        parts = (f"{name} {value}" for part in ("key", "value") for name, value in entry[part].items())
        return "  ".join(parts)
    if kind == "ct":
        return _raw_conntrack(entry) if raw else _conntrack_line(entry)
    if kind == "routes":
        return f"{entry['cidr']:>15}: {_route_words(entry)}"
    if kind == "arp":
        return f"dev {entry['ifindex']:4d}: {entry['addr']:>15} : {entry['mac_src']} -> {entry['mac_dst']}"
    if kind == "iface":
        names_of = {"xdp": "XDPPolicy", "ingress": "IngressPolicy", "egress": "EgressPolicy"}
        policies = "".join(
            f"{names_of[where]}{family.upper()}: {entry[f'{where}_{family}']}, "
            for family in ("v4", "v6")
            for where in names_of
            if f"{where}_{family}" in entry
        )
        filters = "".join(
            f"{name}: {entry[key]}, "
            for name, key in (("IngressFilter", "filter_in"), ("EgressFilter", "filter_eg"))
            if key in entry
        )
        flags = ",".join(entry["flags"]) or "host"  # which has a flag of its own since v3.30
        return f"{entry['ifindex']:5d} : {{flags: {flags}, {policies}{filters}name: {entry['name']}}}"
    if kind == "nat_aff":
        return (
            f"client {entry['client']} svc proto {number(entry['proto'])} {_end(entry['addr'], entry['port'])} -> "
            f"{_end(entry['backend'], entry['backend_port'])} ts {duration(entry['ts_ns'])}"
        )
    if kind == "mglv":
        return f"svc {entry['id']} ordinal {entry['ordinal']} -> {_end(entry['addr'], entry['port'])}"
    if kind == "rule_ctrs":
        return f"{entry['rule_id']:#018x}  {entry['packets']:>10}  {entry['rule'] or '(no policy debug file names it)'}"
    return "  ".join(f"{name} {_word(value)}" for name, value in entry.items() if name != "map" and value is not None)


_BLACKHOLES = ("blackhole-drop", "blackhole-reject")
# In Calico's order, which is not that of the bits.
_ROUTE_WORDS = ("in-pool", "nat-out", "same-subnet", "no-dsr", "tunneled", "skip-ingress-redir")


def _route_words(entry: dict[str, Any]) -> str:
    flags = entry["flags"]
    words = ["local"] if "local" in flags else [] if set(_BLACKHOLES) & set(flags) else ["remote"]
    words += [word for word in ("host", "workload") if word in flags][:1]
    words += [word for word in _ROUTE_WORDS if word in flags]
    words += [word for word in flags if word not in {"local", "host", "workload", *_ROUTE_WORDS, *_BLACKHOLES}]
    if "ifindex" in entry:
        words += ["idx", str(entry["ifindex"])]
    elif "workload" in flags or not ip_address(entry["next_hop"]).is_unspecified:
        words += ["nh", entry["next_hop"]]
    return " ".join([*words, *(word for word in _BLACKHOLES if word in flags)])


def route_order(entry: dict[str, Any]) -> tuple[bytes, int]:
    """What Calico sorts routes by."""
    address, _, length = entry["cidr"].rpartition("/")
    return ip_address(address).packed, int(length)


def _word(value: object) -> str:
    return ",".join(str(each) for each in value) if isinstance(value, list) else str(value)


def _end(address: str, port: int) -> str:
    """As Go's net.JoinHostPort."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def duration(nanoseconds: int) -> str:
    """As Go prints a duration: ``1h0m5.25s``, ``250ms``."""
    for unit, size in (("ns", 1), ("µs", 1000), ("ms", 1_000_000)):
        if nanoseconds < 1000 * size:
            return "0s" if not nanoseconds else f"{_decimal(nanoseconds, size)}{unit}"
    minutes, rest = divmod(nanoseconds, 60 * _S)
    hours = f"{minutes // 60}h" if minutes >= 60 else ""
    return f"{hours}{f'{minutes % 60}m' if minutes else ''}{_decimal(rest, _S)}s"


def _decimal(number: int, unit: int) -> str:
    whole, part = divmod(number, unit)
    digits = str(unit + part)[1:].rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def _ago(entry: dict[str, Any]) -> str:
    return "" if entry["age_ns"] is None else f" Active ago {duration(entry['age_ns'])}"


def _ends(entry: dict[str, Any]) -> tuple[str, str]:
    """Source and destination of a conntrack entry."""
    a, b = (f"{entry[f'addr_{end}']}:{entry[f'port_{end}']}" for end in "ab")
    return (b, a) if entry["from"] == "b" else (a, b)


def _conntrack_line(entry: dict[str, Any]) -> str:
    source, target = _ends(entry)
    line = f"{entry['proto'].upper().replace('PROTO', 'Proto')} {source} -> "
    if entry["type"] == "nat-fwd":
        line += f"{target}  forward to {entry['rev_addr_a']}:{entry['rev_port_a']} <-> "
        return line + f"{entry['rev_addr_b']}:{entry['rev_port_b']} {_ago(entry)}".rstrip()
    if entry["type"] == "nat-rev":
        line += f"{entry['orig_dst']}:{entry['orig_dport']} -> "
    line += f"{target} "
    if entry["type"] == "nat-rev" and not ip_address(entry["tun_ip"]).is_unspecified:
        line += f"external client, service forwarded to/from {entry['tun_ip']} "
    sport = int(source.rpartition(":")[2])
    if entry.get("orig_sport") and entry["orig_sport"] != sport:
        line += f"source port changed from {entry['orig_sport']} "
    line = f"{line}{_ago(entry)}".rstrip() + (f" {entry['state']}" if entry["state"] else "")
    expiry = _expiry(entry)
    return f"{line}  {expiry}" if expiry else line


def _expiry(entry: dict[str, Any]) -> str:
    """When Felix removes an entry, "" when the time of reading is not known."""
    if entry["age_ns"] is None:
        return ""
    left = entry["timeout_s"] - entry["age_ns"] / _S
    return f"expires in {_seconds(left)}" if left >= 0 else "expired: Felix removes it at its next sweep"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def iter_connection(entry: dict[str, Any], partners: Sequence[dict[str, Any]], timeouts: Timeouts) -> Iterator[str]:
    """One conntrack entry at length: state, expiry, flags, both directions, and the *partners* of its NAT pair."""
    yield _conntrack_line(entry)
    if entry["type"] != "nat-fwd":
        yield f"  time-out   {_seconds(entry['timeout_s'])} ({entry['timeout']}, {timeouts.set_by})"
    yield f"  flags      {' '.join(entry['flags']) or 'none'}"
    request = "b" if entry["from"] == "b" else "a"
    for title, end in (("request", request), ("reply", "a" if request == "b" else "b")):
        leg = entry.get("ab" if end == "a" else "ba")
        if leg is not None:
            straight = title == "reply" and "fwd-dsr" in entry["flags"]
            dsr = ": with DSR it goes straight to the client" if straight else ""
            yield f"  {title:10} {_leg(entry, leg, end)}{dsr}"
    for each in partners:
        yield f"  pair       {each['type']}: {_pair(each)}"
    if not partners and entry["type"] == "nat-fwd":
        yield "  pair       its reverse entry is missing: Felix removes this one at its next sweep"
    if not partners and entry["type"] == "nat-rev":
        yield "  pair       its forward entry is missing: a packet to the service starts a new connection"


def _leg(entry: dict[str, Any], leg: dict[str, Any], end: str) -> str:
    from_end = f"from {entry[f'addr_{end}']}:{entry[f'port_{end}']}"
    place = f" by {leg['interface']}" if leg.get("interface") else ""
    count = f", {leg['packets']} packets, {leg['bytes']} bytes" if "packets" in leg else ""
    return f"{from_end}{place}{count}, {' '.join(leg['flags']) or 'nothing seen'}"


def _pair(entry: dict[str, Any]) -> str:
    source, target = _ends(entry)
    return f"{source} -> {target}" + (f", {entry['state']}" if entry.get("state") else "")


def partner_keys(layout: Layout, key: bytes, value: bytes) -> tuple[bytes, ...]:
    """The keys that the other entry of a NAT pair may have; none for an entry without NAT.

    A forward entry holds its reverse entry's key. A reverse entry holds the service's address and, where Calico
    changed it, the client's port: both orders of the ends are given.
    """
    kind, size = _member(layout, value, "type", 1)[0], layout.key.size
    if kind == NAT_FWD:
        return (value[layout.forward_at : layout.forward_at + size],)
    if kind != NAT_REV:
        return ()
    entry = layout.decode(key, value)
    flags = entry["flags0"] | entry.get("flags1", 0) << 8
    client = int(bool(flags & _B_A or (entry["ba_bits"] & _OPENER and not entry["ab_bits"] & _OPENER)))
    width = 16 if layout.ipv6 else 4
    port = 4 + 2 * width + 2 * client
    sport = entry["orig_sport"].to_bytes(2, "little") if entry.get("orig_sport") else key[port : port + 2]
    sources = [key[4 + client * width : 4 + (client + 1) * width], _member(layout, value, "orig_src", width)]
    service = (_member(layout, value, "orig_dst", width), _member(layout, value, "orig_dport", 2))
    pairs = [
        (ends, ends[::-1]) for source in dict.fromkeys(sources) if any(source) for ends in [((source, sport), service)]
    ]
    return tuple(key[:4] + a[0] + b[0] + a[1] + b[1] for both in pairs for a, b in both)


def _member(layout: Layout, value: bytes, name: str, size: int) -> bytes:
    at = next((offset for offset, _, each in layout.value.rows if each == name), len(value))
    return value[at : at + size]


class Pairing:
    """Pairs NAT forward and reverse entries as they come, and names those that stay alone."""

    def __init__(self, context: Context) -> None:
        self._now = context.now_ns
        self._alone: dict[tuple[Any, ...], dict[str, Any]] = {}

    def feed(self, entry: dict[str, Any]) -> None:
        """One entry of the map, in words."""
        if entry["type"] not in ("nat-fwd", "nat-rev"):
            return
        prefix = "rev_" if entry["type"] == "nat-fwd" else ""
        ends = (entry[f"{prefix}{name}"] for name in ("addr_a", "port_a", "addr_b", "port_b"))
        key = (entry["proto"], *ends)
        other = self._alone.get(key)
        if other is not None and other["type"] != entry["type"]:
            del self._alone[key]
        else:
            self._alone[key] = entry

    def iter_notes(self) -> Iterator[str]:
        """What is without its partner; entries that came while the map was read may have theirs by now."""
        for kind, lost, then in _ALONE:
            found = [e for e in self._alone.values() if e["type"] == kind and not 0 < self._now < e["last_seen_ns"]]
            if found:
                shown = "; ".join(_pair(each) for each in found[:3]) + ("; ..." if len(found) > 3 else "")
                yield f"{len(found)} {kind} entries without {lost}: {then}: {shown}"


_ALONE = (
    ("nat-fwd", "their reverse entry", "Felix removes them at its next sweep"),
    ("nat-rev", "their forward entry", "a packet to the service starts a new connection"),
)


def _raw_conntrack(entry: dict[str, Any]) -> str:
    proto = number(entry["proto"])
    kind = next((n for n, name in _TYPES.items() if name == entry["type"]), entry["type"])
    bits = sum(bit for bit, name in CT_FLAGS.items() if name in entry["flags"])
    bits |= sum(int(word, 16) for word in entry["flags"] if word not in CT_FLAGS.values())
    flags = " ".join([hex(bits), *entry["flags"]]) if bits else "<none>"
    version = identify(entry["map"])[1]
    reset = any("rst" in entry[leg]["flags"] for leg in ("ab", "ba") if leg in entry)
    old = version < _RST_OR_CREATED or (version == _RST_OR_CREATED and entry["created_or_rst_ns"] and not reset)
    created = f"Created:{entry['created_or_rst_ns']}, " if old else ""
    line = f"{_raw_key(proto, entry)} -> Entry{{Type:{kind}, {created}LastSeen:{entry['last_seen_ns']}, Flags: {flags} "
    age = ""
    if old and entry["age_ns"] is not None:
        age = f" Age: {duration(max(entry['age_ns'] + entry['last_seen_ns'] - entry['created_or_rst_ns'], 0))}"
    if kind == NAT_FWD:
        reverse = {name.removeprefix("rev_"): value for name, value in entry.items() if name.startswith("rev_")}
        return f"{line}REVKey: {_raw_key(proto, reverse)} NATSPort: {entry['nat_sport']}}}{age}{_ago(entry)}"
    seen = _RAW_BITS[:-1] if old else _RAW_BITS
    legs = " ".join(f"{name}:{{{_raw_leg(leg, seen)}}}" for name, leg in (("A2B", entry["ab"]), ("B2A", entry["ba"])))
    rest = " ".join(f"{label}:{entry[name]}" for label, name in _RAW_MEMBERS if name in entry)
    return f"{line}Data: {{{legs} {rest}}}}}{age}{_ago(entry)} {entry['state']}".rstrip()


def _raw_key(proto: str, ends: dict[str, Any]) -> str:
    return f"ConntrackKey{{proto={proto} {ends['addr_a']}:{ends['port_a']} <-> {ends['addr_b']}:{ends['port_b']}}}"


def _raw_leg(leg: dict[str, Any], bits: Sequence[tuple[str, str]]) -> str:
    """What a leg of that version has; before v3 its approval was called another name."""
    approved = "Approved" if "bytes" in leg else "Whitelisted"
    cells = [f"{label}:{leg[name]}" for label, name in _RAW_COUNTS if name in leg]
    cells += [f"{label or approved}:{str(flag in leg['flags']).lower()}" for label, flag in bits]
    return " ".join([*cells, *([f"Ifindex:{leg['ifindex']}"] if "ifindex" in leg else [])])


_RST_OR_CREATED = 3  # the version whose first member is the creation up to v3.29, in v3.30 the first RST
_RAW_COUNTS = (("Bytes", "bytes"), ("Packets", "packets"), ("Seqno", "seqno"))
_RAW_MEMBERS = (
    ("OrigDst", "orig_dst"), ("OrigSrc", "orig_src"), ("OrigPort", "orig_dport"), ("OrigSPort", "orig_sport"),
    ("TunIP", "tun_ip"),
)  # fmt: skip
# The last one since v3.30, which no longer has the time of creation.
_RAW_BITS = (
    ("SynSeen", "syn"), ("AckSeen", "ack"), ("FinSeen", "fin"), ("RstSeen", "rst"), ("", "approved"),
    ("Opener", "opener"), ("Workload", "workload"),
)  # fmt: skip


def with_backends(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entries of the NAT maps; each frontend with its ``backends``, null for one that is missing."""
    kept = list(entries)
    known = {(e["id"], e["ordinal"]): {"addr": e["addr"], "port": e["port"]} for e in kept if "ordinal" in e}
    for entry in kept:
        if "ordinal" in entry:
            yield entry
            continue
        count = 0 if entry["drop"] else min(entry["count"], MOST_BACKENDS)
        yield {**entry, "backends": [known.get((entry["id"], ordinal)) for ordinal in range(count)]}


def siblings(entries: Iterable[dict[str, Any]], addr: str, port: int, proto: str) -> list[dict[str, Any]]:
    """The NAT entries of the service that has this frontend: its other frontends too, and its backends."""
    kept = list(entries)
    wanted = {e["id"] for e in kept if (e["addr"], e["port"], e.get("proto")) == (addr, port, proto)}
    return [entry for entry in kept if entry["id"] in wanted]


def iter_groups(entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Frontends that share a service's id, with its backends."""
    services: dict[int, list[dict[str, Any]]] = {}
    for entry in with_backends(entries):
        if "ordinal" not in entry:
            services.setdefault(entry["id"], []).append(entry)
    for service, fronts in sorted(services.items()):
        longest = max((front["backends"] for front in fronts), key=len)
        bare = [{name: value for name, value in front.items() if name != "backends"} for front in fronts]
        yield {"id": service, "frontends": bare, "backends": longest}


def iter_nat(entries: Iterable[dict[str, Any]], *, both: bool = True, grouped: bool = False) -> Iterator[str]:
    """Frontends with their backends; those that are missing are named.

    *both*: both maps were there, not one. *grouped*: a service's backends once, after all of its frontends.
    """
    kept = list(entries) if both else sorted(entries, key=lambda e: (e["id"], e.get("ordinal", -1)))
    if grouped:
        for each in iter_groups(kept):
            yield from map(_frontend_line, each["frontends"])
            yield from _backend_lines(each["id"], each["backends"], both=both)
        return
    for entry in with_backends(kept):
        if "ordinal" in entry:
            if not both:
                yield f"{entry['id']}:{entry['ordinal']}\t {_end(entry['addr'], entry['port'])}"
            continue
        yield _frontend_line(entry)
        yield from _backend_lines(entry["id"], entry["backends"], both=both)
        if not entry["drop"] and entry["count"] > MOST_BACKENDS:
            yield f"\t... and {entry['count'] - MOST_BACKENDS} more: is that count right?"


def _frontend_line(front: dict[str, Any]) -> str:
    count = -1 if front["drop"] else front["count"]
    flags = f" flags {', '.join(front['flags'])}" if front["flags"] else ""
    source = f" src {front['source']}" if front["source"] else ""
    source += f" affinity {front['affinity_s']}s" if front["affinity_s"] else ""
    return (
        f"{front['addr']} port {front['port']} proto {number(front['proto'])} id {front['id']} count {count} "
        f"local {front['local']}{flags}{source}"
    )


def _backend_lines(service: int, backends: Iterable[dict[str, Any] | None], *, both: bool) -> Iterator[str]:
    lost = "is missing" if both else "(backends were not read)"
    for ordinal, backend in enumerate(backends):
        yield f"\t{service}:{ordinal}\t {lost if backend is None else _end(backend['addr'], backend['port'])}"


def iter_walk(steps: Iterable[Step]) -> Iterator[str]:
    """A walk, a lookup after the other and last what becomes of the packet; of 80 columns, as it is no dump."""
    for step in steps:
        told = f"{step.key}: {step.found}"
        if step.lookup == "verdict":
            yield from folded(told, WIDTH, 8)
            continue
        yield from folded(f"{'BROKEN' if step.broken else 'ok':7} {step.lookup:13} {told}", WIDTH, 24)
        if step.broken:
            yield from folded(f"{'':22}{step.broken}: {step.suffers}", WIDTH, 24)


def iter_ip_sets(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """IP sets, each with its members."""
    sets: dict[int, list[str]] = {}
    for entry in entries:
        member = entry.get("cidr") or f"{entry['addr']}:{entry['port']} (proto {number(entry['proto'])})"
        sets.setdefault(int(entry["set_id"], 16), []).append(member)
    for name in sorted(sets):
        yield f"IP set {name:#x}"
        yield from (f"   {member}" for member in sorted(sets[name]))
        yield ""
    if not sets:
        yield "No IP sets found."


def per_second(
    before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]], seconds: float
) -> Iterator[dict[str, Any]]:
    """The counters of *after* with their rates since *before*. What went down was reset: its new value counts."""
    old = {(e["map"], e.get("interface"), e.get("hook")): e["counters"] for e in before}
    for entry in after:
        past = old.get((entry["map"], entry.get("interface"), entry.get("hook")), {})
        moved = {name: count - past.get(name, 0) for name, count in entry["counters"].items()}
        rates = {name: (change if change >= 0 else entry["counters"][name]) / seconds for name, change in moved.items()}
        yield {**entry, "per_second": rates}


_COLUMNS = ("INGRESS", "EGRESS", "XDP")
_CAPTION_WIDTH = 40  # for the table to fit a terminal of 80 columns


def iter_counters(entries: Iterable[dict[str, Any]], interface: str | None = None) -> Iterator[str]:
    """One table for each interface, with Calico's categories, types and columns; of rates where entries have them."""
    tables: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        hook = entry.get("hook", "tc").removeprefix("tc ").upper()
        tables.setdefault(entry.get("interface", "(no pin)"), {})[hook] = entry
    for name, hooks in sorted(tables.items()):
        if interface not in (None, name):
            continue
        known = max((entry["counters"] for entry in hooks.values()), key=len)
        columns = [*_COLUMNS, *(hook for hook in hooks if hook not in _COLUMNS)]
        rows: list[tuple[str, ...]] = []
        for reason in sorted(known, key=_caption):
            if reason in reasons.CAPTIONS or any(entry["counters"].get(reason) for entry in hooks.values()):
                category, kind = _caption(reason)
                first, *more = wrap(kind, _CAPTION_WIDTH)
                rows.append((category, first, *(_cell(hooks.get(hook), reason) for hook in columns)))
                rows += [(category, rest, *("" for _ in columns)) for rest in more]
        yield from _bordered(("CATEGORY", "TYPE", *columns), rows)
        rates = any("per_second" in entry for entry in hooks.values())
        yield f"dumped {name} counters{' in packets per second' if rates else ''}."
        yield ""


def _caption(reason: str) -> tuple[str, str]:
    return reasons.CAPTIONS.get(reason, ("Other", reason))


def _cell(entry: dict[str, Any] | None, reason: str) -> str:
    if entry is None or reason not in entry["counters"]:
        return "N/A"
    return f"{entry['per_second'][reason]:.1f}" if "per_second" in entry else str(entry["counters"][reason])


def _bordered(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table as Calico's; a category is named once. Numbers stand to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    line = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    yield line
    yield "| " + " | ".join(f"{each:^{width}}" for each, width in zip(header, widths, strict=True)) + " |"
    yield line
    last = ""
    for category, *rest in rows:
        words = ["" if category == last else category, rest[0]]
        cells = [f"{each:<{width}}" for each, width in zip(words, widths, strict=False)]
        cells += [
            f"{each:>{width}}" if each[:1].isdigit() else f"{each:<{width}}"
            for each, width in zip(rest[1:], widths[2:], strict=True)
        ]
        yield "| " + " | ".join(cells) + " |"
        last = category
    yield line


def conntrack_summary(raw: RawMap) -> dict[str, Any]:
    """How many entries of each protocol, type and state, as ``conntrack stats`` counts them."""
    layout = maptables.resolve(raw)
    wanted = ("type", "flags0", "ab_bits", "ba_bits")
    rows = [row for row in layout.value.rows if row[2] in wanted]
    bits: Counter[tuple[int, ...]] = Counter()
    narrow = Table(";".join(f"{at} {kind} {name}" for at, kind, name in rows), layout.value.size)
    for _, keys, values in maptables.blocks(raw):
        protos = keys[:: layout.key.size]
        columns = dict(narrow.iter_columns(values))
        bits.update(zip(protos, *(columns[name] for name in wanted), strict=True))
    found: dict[str, Any] = {"entries": sum(bits.values()), "max_entries": raw.max_entries or None}
    found |= dict.fromkeys(("connections", "nat_connections"), 0)
    found |= dict.fromkeys(("tcp", "udp", "others", "established", "closed", "reset", "syn_sent"), 0)
    for (proto, kind, flags, ab, ba), count in bits.items():
        if kind == NAT_FWD:
            continue
        found["connections"] += count
        found["nat_connections"] += count if kind == NAT_REV else 0
        found[PROTOCOLS[proto] if proto in (6, 17) else "others"] += count
        if proto == 6:
            found[state(proto, flags, ab, ba).lower().replace("-", "_")] += count
    return found


def iter_stats(found: dict[str, Any]) -> Iterator[str]:
    """A conntrack summary as ``calico-node -bpf conntrack stats`` prints it: NAT connections are forward entries."""
    forwards = found["entries"] - found["connections"]
    yield f"Conntrack map size: {found['max_entries'] or 'unknown'}"
    yield f"Total connections: {found['connections']}"
    yield f"Total entries: {found['entries']}"
    yield f"NAT connections: {forwards}"
    yield ""
    yield from (f"{title} : {found[title.lower()]}" for title in ("TCP", "UDP", "Others"))
    yield ""
    for title in ("Established", "Closed", "Reset", "Syn-sent"):
        yield f"TCP {title}: {found[title.lower().replace('-', '_')]}"


def iter_latency(entries: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Mean time of Calico's programs for each interface, as ``calico-node -bpf profiling e2e`` prints it."""
    rows: dict[str, dict[str, tuple[str, str]]] = {}
    for entry in entries:
        mean = "---" if entry["mean_ns"] is None else f"{entry['mean_ns']:.3f} ns"
        rows.setdefault(entry["interface"], {})[entry["kind"]] = (mean, str(entry["samples"]))
    kinds = _KINDS.values()
    titles = (kind.replace("ingress", "INGRESS").replace("egress", "EGRESS") for kind in kinds)
    header = ["IFACE", *(cell for title in titles for cell in (title, "#"))]
    cells = [
        [name, *(cell for kind in kinds for cell in found.get(kind, ("---", "---")))]
        for name, found in sorted(rows.items())
    ]
    yield from _bordered(header, cells)


def summary(raw: RawMap) -> dict[str, Any]:
    """How full a map is, as far as that is known; for conntrack what is in it."""
    layout = maptables.resolve(raw)
    if _kind(layout) == "ct" and layout.origin != "members":
        return {"map": raw.name, **conntrack_summary(raw)}
    count = sum(n for n, _, _ in maptables.blocks(raw))
    return {"map": raw.name, "entries": count, "max_entries": raw.max_entries or None}
