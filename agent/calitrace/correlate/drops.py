"""One dropped packet to its cause, with the evidence that carries it.

Evidence: the kernel's reason and the function that dropped; what Calico logged on that CPU last; Calico's per-CPU
state at that moment, where it is about this very packet; and the programs on the hook. A drop is Calico's only when
a Calico program sits at that hook and no foreign one does, or when Calico's own log or state says so.

Many of Calico's drops leave no reason code. Then what else its state keeps may tell it: the conntrack result, policy's
result and flags, which mean something else at each side of an interface. Else the cause is not recorded, and is not
guessed.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from calitrace.calico import reasons, state
from calitrace.calico.log import Reader
from calitrace.calico.passage import Assembler
from calitrace.errors import LayoutMismatch
from calitrace.events import CAPTURE_BYTES, DROP
from calitrace.model import Drop, LogLine, StackCopy, StateCopy
from calitrace.packet import CALICO_VNI, UDP

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from calitrace.calico.passage import Passage
    from calitrace.model import Event, Link, Namespace, PacketEvent, Topology
    from calitrace.packet import Layer, Packet


class Confidence(str, Enum):
    """PROVEN: the kernel or Calico said it. LIKELY: it follows, unless something unseen happened."""

    PROVEN = "proven"
    LIKELY = "likely"
    NONE = "none"


@dataclass(frozen=True)
class Place:
    """Where. *hook*: ``tc ingress``, ``tc egress``, ``XDP``, ``netkit``, or empty when no hook took part."""

    namespace: str
    interface: str = ""
    hook: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.namespace, self.interface, self.hook) if part)


@dataclass(frozen=True)
class Names:
    """What numbers mean on the machine that recorded. *rules*: Calico rule id to rule.

    *pods*: interface to ``namespace/pod``.
    """

    drop_reasons: Mapping[int, str] = field(default_factory=dict)
    symbols: Mapping[int, str] = field(default_factory=dict)
    rules: Mapping[int, str] = field(default_factory=dict)
    pods: Mapping[str, str] = field(default_factory=dict)

    def reason(self, number: int) -> str:
        """The kernel's name of a drop reason, without its prefix; its number when the kernel has no name."""
        return self.drop_reasons.get(number, f"reason {number}").removeprefix("SKB_DROP_REASON_")

    def drop_reason(self, drop: Drop) -> str:
        """The same of a drop; empty where the kernel tells none."""
        return "" if drop.skb_drop_reason is None else self.reason(drop.skb_drop_reason)

    def symbol(self, drop: Drop) -> str:
        """The function that dropped, ``name+0xoffset``, or its address."""
        return self.symbols.get(drop.location, f"{drop.location:#x}")

    def rule(self, rule_id: int) -> str:
        """A rule by name, or its id."""
        return self.rules.get(rule_id) or f"rule {rule_id:#018x}"


@dataclass(frozen=True)
class Cause:
    """Why a packet was dropped. *text*: one sentence; *detail*: the same without who did it.

    *calico_reason*: name of Calico's code, empty where it recorded none; *rules*: those that decided, named if known.
    *sources*: which kinds of evidence carry it (``log``, ``state``, ``counters``, ``maps``, ``hook``, ``kernel``).
    *recorded*: whether Calico or the kernel left more than that it was dropped; *reasonless*: whether Calico's log or
    state says that it had no reason of its own. Before v3.32 the state keeps none: then it does not say so.
    """

    text: str
    detail: str
    place: Place
    confidence: Confidence
    by_calico: bool = False
    calico_reason: str = ""
    skb_drop_reason: str = ""
    symbol: str = ""
    rules: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("kernel",)
    evidence: tuple[str, ...] = ()
    recorded: bool = True
    reasonless: bool = False


_TC_REASONS = {"TC_INGRESS": "tc ingress", "TC_EGRESS": "tc egress"}
# Without these reasons (they came in v5.18): the functions that run tc.
_TC_FUNCTIONS = {
    "__netif_receive_skb_core": "tc ingress",
    "sch_handle_ingress": "tc ingress",
    "__dev_queue_xmit": "tc egress",
    "sch_handle_egress": "tc egress",
}
# Generic XDP, which runs where there is an sk_buff already; it drops without a reason. Source: net/core/dev.c
_XDP_FUNCTIONS = ("do_xdp_generic", "netif_receive_generic_xdp", "bpf_prog_run_generic_xdp")
# Where the kernel fails to do what a program's redirect said: the device is gone or down, or no neighbour answers.
# Source: net/core/filter.c
_REDIRECTS = ("skb_do_redirect", "__bpf_redirect", "bpf_out_neigh_v")
# The host's own UDP, which gets a packet of Calico's tunnel only where no program took it. It drops here what no socket
# wants; also a wrong checksum and what IPsec refuses, which only a reason tells apart. What a socket was found for is
# dropped elsewhere. Source: net/ipv4/udp.c
_NO_SOCKET, _UDP_RECEIVES = "NO_SOCKET", ("__udp4_lib_rcv", "udp_rcv")
# The kernel's reasons that an operator can do something about. Source: include/net/dropreason-core.h
_KERNEL = {
    "FRAG_REASM_TIMEOUT": "the rest of its fragments never came",
    "IP_INADDRERRORS": "not this machine's address, and it does not forward: net.ipv4.ip_forward",
    "IP_INNOROUTES": "no route",
    "IP_OUTNOROUTES": "no route",
    "IP_RPFILTER": "the kernel's own reverse path filter, rp_filter",
    "NEIGH_FAILED": "the next hop does not answer ARP",
    "NETFILTER_DROP": "a rule of iptables or nftables there",
    _NO_SOCKET: "nothing listens there",
    "PKT_TOO_BIG": "larger than the MTU",
    "SOCKET_RCVBUFF": "the socket's receive buffer is full",
}
# A netkit device frees what its program drops as it does what it cannot deliver. Source: drivers/net/netkit.c
_NETKIT = "netkit_xmit"
_NOT_SAID = ("", "NOT_SPECIFIED")
# In Link.calico, .foreign and .chain, which know no programs of netkit devices; and what stands there.
_AT = {"tc ingress": "ingress", "tc egress": "egress", "XDP": "xdp", "netkit": ""}
_KINDS = {"XDP": "an XDP program", "netkit": "a netkit device"}
_SIDES = {
    ("ingress", True): state.Side.FROM_WEP,
    ("egress", True): state.Side.TO_WEP,
    ("ingress", False): state.Side.FROM_HEP,
    ("egress", False): state.Side.TO_HEP,
}
_NO_REVERSE_PATH = ("lo", "bpfout.cali", "bpfnatout")  # Calico checks it at all other host interfaces
_OF_PODS = (state.Side.FROM_WEP, state.Side.TO_WEP)
_DROPPED_BY_POLICY = reasons.CODES["DROPPED_BY_POLICY"]
_OF_A_FRAGMENT = (
    "a later fragment has no ports, which rules and services ask for; Calico puts fragments together from v3.31 on "
    "(projectcalico/calico#8821, #10737)"
)
_IPIP, _TCP = 4, 6


def place_of(event: PacketEvent, topology: Topology, hook: str = "") -> Place:
    """Where an event was seen."""
    namespace, link = topology.namespace(event.netns), topology.link(event.netns, event.ifindex)
    return Place(namespace.name if namespace else "?", link.name if link else "", hook)


def explain(drop: Drop, passages: Sequence[Passage], copy: StateCopy | None, topology: Topology, names: Names) -> Cause:
    """The cause of a drop. *passages*: those of Calico's log that led to it; *copy*: Calico's state just then."""
    reason, symbol = names.drop_reason(drop), names.symbol(drop)
    hook = hook_of(reason, symbol, names)
    place = place_of(drop, topology, hook)
    link, namespace = topology.link(drop.netns, drop.ifindex), topology.namespace(drop.netns)
    evidence = [f"skb:kfree_skb {reason or 'without reason'} in {symbol}"]
    if not hook:
        said_by_kernel = reason or "no reason given"
        who, function = "not by Calico", symbol.split("+", 1)[0]
        if function.startswith(_REDIRECTS):
            who = "which could not redirect it as a BPF program told it to"
        unwanted = function.startswith(_UDP_RECEIVES) and reason in (_NO_SOCKET, "")
        left = _left_to_the_host(drop, link) if unwanted else ""
        likely = left and not reason
        left = f"no socket, it seems: {left}" if likely else left
        meaning = f"; {left}" if left else f" ({_KERNEL[reason]})" if reason in _KERNEL else ""
        return Cause(
            f"dropped by the kernel, {who}: {said_by_kernel} in {symbol}{meaning}",
            f"{left or said_by_kernel} in {function}",
            place,
            Confidence.LIKELY if likely else Confidence.PROVEN,
            skb_drop_reason=reason,
            symbol=symbol,
            evidence=tuple(evidence),
        )
    at, kind = _AT[hook], _KINDS.get(hook, "a tc program")
    side = state.Side.XDP if hook == "XDP" else _SIDES.get((at, link.workload)) if link else None
    evidence += [f"at this hook: {each}" for each in (link.chain.get(at, ()) if link else ())]
    passage = _denial(passages, link, drop)
    ours = link.calico.get(at, ()) if link else ()
    foreign = link.foreign.get(at, ()) if link else ()
    held, let_pass = _held(drop, copy, namespace, side, bool(ours and not foreign), names, evidence)
    code, rules = _reason(passage, held)
    said = passage is not None or (held is not None and held.denied(side))
    if passage is not None:
        evidence += [f"{passage.name}: {line}" for line in passage.texts[-6:]]
    if not said and (foreign or not ours):
        if foreign and let_pass:
            ours = ()
        who = ", ".join((*ours, *foreign))
        which = "; which of them is not known"
        if not ours:
            which = ", which Calico's program let it pass to" if let_pass else "; none of them is Calico's"
        if not who:
            who, which = "a program that we did not see attached", ""
        if hook == "netkit":
            who = "by its program, which we do not see, or because its peer is down"
        return Cause(
            f"dropped by {kind} at {place}: {who}{which}",
            f"{kind.split(' ', 1)[1]}: {who}{which}"
            if ours or foreign or hook == "netkit"
            else f"{kind} that we did not see attached",
            place,
            Confidence.LIKELY if foreign and not ours else Confidence.NONE,
            skb_drop_reason=reason,
            symbol=symbol,
            sources=("hook",),
            evidence=tuple(evidence),
        )
    numbering = namespace.reasons if namespace else 0
    calico_reason = reasons.name(code, numbering) if code else ""
    if not numbering and passage is not None and code and code == passage.code:
        calico_reason = passage.calico_reason  # before v3.24 there are no counters, but the line shows its age
    detail = (passage.cause() if passage else "") or _meaning(calico_reason, drop.packet, held, side)
    detail = detail or (held.problem(side) if held is not None and not held.unread else "")
    recorded = bool(detail or rules)
    inferred = ""
    if not recorded and held is not None:
        inferred = _not_ip(drop.packet) if held.unread else held.silent(side)
        if side is state.Side.FROM_HEP and link is not None and link.name in _NO_REVERSE_PATH:
            inferred = ""
        detail = inferred or f"cause not recorded (policy {_policy(held)}, conntrack {held.conntrack})"
    if passage is not None and held is not None and held.calico_reason not in (None, 0, code):
        evidence.append(f"the log and the state disagree: the state says reason {held.calico_reason}")
    named = tuple(names.rule(rule) for rule in rules)
    detail = ": ".join(part for part in (detail or "cause not recorded", ", ".join(named)) if part)
    inner = drop.packet.inner
    if inner is not None and inner.fragment and inner.src.version == 4 and calico_reason == "DROPPED_BY_POLICY":
        detail += "; " + _OF_A_FRAGMENT
    found = {"log": passage, "state": held}
    sure = said and not inferred and not (passage is None and held and held.unread)
    return Cause(
        f"dropped by Calico{', it seems' if inferred or let_pass else ''}: {detail}",
        detail,
        place,
        Confidence.PROVEN if sure else Confidence.LIKELY,
        True,
        calico_reason,
        reason,
        symbol,
        named,
        tuple(name for name, source in found.items() if source is not None) or ("hook",),
        tuple(evidence),
        recorded,
        (passage is not None and code == 0) or (held is not None and held.calico_reason == 0),
    )


def _left_to_the_host(drop: Drop, link: Link | None) -> str:
    """Why a packet in VXLAN came to the host's own UDP and not out of the tunnel; empty where it was in none.

    Calico takes out what has its VNI and the port that it knows; all else it leaves to the host, where a VXLAN device
    may want it. Source: vxlan_attempt_decap in felix/bpf-gpl/nat.h.
    """
    tunnel = drop.packet.tunnel
    if tunnel is None:
        return ""
    where = f"VXLAN on UDP {tunnel.dport}"
    if tunnel.vni != CALICO_VNI:
        ours = f"Calico's NodePort tunnel has {CALICO_VNI}, and no VXLAN device here that one"
        return f"{where} with VNI {tunnel.vni}: {ours}"
    if link is not None and not link.calico.get("ingress"):
        return f"{where}: no Calico program is at {link.name} tc ingress to take it out of its tunnel"
    return f"{where}: Calico's program did not take it for its tunnel: has this node another vxlanPort?"


def hook_of(reason: str, symbol: str, names: Names) -> str:
    """The hook whose program dropped, or empty. The reason says it, or, where the kernel has none, the function."""
    if reason in _TC_REASONS:
        return _TC_REASONS[reason]
    function = symbol.split("+", 1)[0]
    if reason == "XDP" or function.startswith(_XDP_FUNCTIONS):
        return "XDP"
    if reason in _NOT_SAID and function.startswith(_NETKIT):
        return "netkit"
    if any(each.endswith("TC_INGRESS") for each in names.drop_reasons.values()):
        return ""
    return next((hook for name, hook in _TC_FUNCTIONS.items() if function.startswith(name)), "")


def _denial(passages: Sequence[Passage], link: Link | None, drop: Drop) -> Passage | None:
    for passage in reversed(passages):
        denied = passage.verdict == "DENY" or (not passage.verdict and passage.cause())
        if denied and (link is None or passage.is_at(link.name, drop.ifindex)):
            return passage
    return None


def _held(
    drop: Drop,
    copy: StateCopy | None,
    namespace: Namespace | None,
    side: state.Side | None,
    alone: bool,
    names: Names,
    evidence: list[str],
) -> tuple[state.CalicoState | None, bool]:
    """Calico's state at the drop, if it is about this packet, and whether it says that Calico let the packet pass.

    *alone*: only Calico's programs are at that hook. A state without addresses may be of any packet, and is taken only
    then. What stands against it goes to *evidence*.
    """
    if copy is None or namespace is None:
        return None, False
    try:
        table = state.layout(namespace.state_name, len(copy.raw))
    except LayoutMismatch as unknown:
        evidence.append(str(unknown))
        return None, False
    packet = drop.packet
    # What an ICMP error quotes is another packet, whose state may still be there.
    for layer in (each for each in packet.layers if each is not packet.quoted):
        held = state.decode(copy.raw, table, layer.src.version)
        if held.holds(*_flow(layer), layer.fragment and layer.calico is None):
            evidence.append(f"Calico's state of this packet: {_shown(held, namespace, names)}")
            if held.passed(side):
                evidence.append("Calico's program that wrote this state let the packet pass")
                return None, True
            return held, False
    # Where only programs for IPv4 are loaded, they see all the rest too.
    for version in sorted({4, *(layer.src.version for layer in packet.layers)}, reverse=True):
        held = state.decode(copy.raw, table, version)
        if alone and held.unread and (held.calico_reason or (_not_ip(packet) and side in _OF_PODS)):
            reason = f"reason {held.calico_reason}, denied" if held.calico_reason else "denied without a reason,"
            evidence.append(f"Calico's state: {reason} before the packet's addresses were read")
            return held, False
    evidence.append("Calico's state held another packet by then: not used")
    return None, False


def _not_ip(packet: Packet) -> str:
    """Why a program at a pod's interface may deny such a packet as soon as it sees it; empty for IPv4."""
    if not packet.outer:
        return "not an IP packet, from or to a pod"
    return "IPv6 traffic of a pod while IPv6 is off" if packet.outer.src.version == 6 else ""


def _policy(held: state.CalicoState) -> str:
    return state.POLICY_RESULTS.get(held.pol_rc, str(held.pol_rc))


def _shown(held: state.CalicoState, namespace: Namespace, names: Names) -> str:
    code = held.calico_reason
    reason = reasons.name(code, namespace.reasons) if code else "none" if code == 0 else "not kept by this release"
    parts = [f"reason {reason}", f"policy {_policy(held)}"]
    parts += [f"rules hit {', '.join(map(names.rule, held.rule_ids))}"] * bool(held.rule_ids)
    parts += [f"conntrack {held.conntrack}"]
    parts += [f"NAT to {held.nat}"] * bool(held.nat)
    parts += [f"flags {', '.join(held.flag_names)}"] * bool(held.flags)
    return ", ".join(parts)


def _reason(passage: Passage | None, held: state.CalicoState | None) -> tuple[int, tuple[int, ...]]:
    """Calico's reason code (0: none recorded) and the ids of the rules that denied."""
    code = 0
    if passage is not None and passage.verdict == "DENY" and passage.code is not None:
        code = passage.code
    if held is not None:
        code = code or held.calico_reason or 0
        if _policy(held) == "deny":
            return code or _DROPPED_BY_POLICY, held.rule_ids[-1:]
    if passage is not None and passage.cause() == reasons.MEANING["DROPPED_BY_POLICY"]:
        code = code or _DROPPED_BY_POLICY
    return code, ()


def _meaning(calico_reason: str, packet: Packet, held: state.CalicoState | None, side: state.Side | None) -> str:
    """A reason in words. What Calico refuses as a tunnel is the packet outside: not TCP, nor what comes in a tunnel."""
    inner, tunnel = packet.inner, packet.tunnel
    if calico_reason == "UNAUTH_SOURCE" and held is not None:
        if held.proto == _IPIP:
            of_pod = side is state.Side.FROM_WEP
            return reasons.IPIP_OF_A_POD if of_pod else f"{reasons.IPIP_OF_NO_NODE}, or inside a tunnel"
        if tunnel is not None and held.holds(*_flow(tunnel)):
            return reasons.VXLAN_OF_NO_NODE
        of_v3_32 = held.calico_reason is not None  # before it no state keeps a reason, and WireGuard is let in
        if of_v3_32 and side is state.Side.FROM_HEP and held.proto == UDP and held.dport in reasons.WIREGUARD_PORTS:
            return reasons.WIREGUARD_OF_NO_NODE
        if inner is not None and held.holds(*_flow(inner)) and (tunnel or inner.proto == _TCP):
            return reasons.NOT_IN_SOURCE_RANGES
    return reasons.MEANING.get(calico_reason, calico_reason)


def _flow(layer: Layer) -> tuple[int, str, int, str, int]:
    """A layer as Calico reads it."""
    proto, sport, dport = layer.calico or (layer.proto, layer.sport, layer.dport)
    return proto, str(layer.src), sport, str(layer.dst), dport


@dataclass
class Dropped:
    """A drop with what belongs to it. *raw*: the event's record, whose capture a filter reads."""

    event: Drop
    raw: bytes
    passages: list[Passage]
    state: StateCopy | None = None
    stack: tuple[int, ...] = ()

    @property
    def capture(self) -> bytes:
        """The packet's first bytes, from its network header on."""
        (length,) = struct.unpack_from("=I", self.raw, DROP.offset("capture_bytes"))
        begin = DROP.offset("capture")
        return self.raw[begin : begin + min(length, CAPTURE_BYTES)]


def stack(dropped: Dropped, names: Names) -> Iterator[str]:
    """The functions that led to a drop, innermost first, from the one that dropped; without our own program's."""
    addresses, location = dropped.stack, dropped.event.location
    begin = addresses.index(location) if location in addresses else 0
    for address in addresses[begin:]:
        yield names.symbols.get(address, f"{address:#x}")


class Joiner:
    """Puts drops together with the log lines and stack before them and the state after them; in ring-buffer order."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._assembler = Assembler()
        self._passages: dict[int, Passage] = {}  # by CPU: the last one, since only that can have led to the drop
        self._stacks: dict[int, StackCopy] = {}  # by CPU: of the drop that comes next
        self._waiting: dict[int, Dropped] = {}  # by CPU: for the state that may follow
        self._fresh: set[int] = set()

    def feed(self, event: Event | LogLine, raw: bytes) -> Iterator[Dropped]:
        """Take the next event; gives what is complete."""
        if isinstance(event, LogLine):
            for line in self._reader.lines(event):
                for passage in self._assembler.feed(line):
                    self._passages[event.cpu] = passage
            return
        if isinstance(event, StackCopy):
            self._stacks[event.cpu] = event
            return
        waiting = self._waiting.get(event.cpu)
        if waiting is not None:
            if isinstance(event, StateCopy) and event.skbaddr == waiting.event.skbaddr:
                waiting.state = event
            yield self._waiting.pop(event.cpu)
        if isinstance(event, Drop):
            cut = self._assembler.cut(event.cpu)
            last = deque([self._passages.pop(event.cpu, None), *cut], maxlen=1)
            passages = [each for each in last if each is not None and _concerns(each, event)]
            self._waiting[event.cpu] = found = Dropped(event, raw, passages)
            stack = self._stacks.pop(event.cpu, None)
            if stack is not None and (stack.skbaddr, stack.ktime_ns) == (event.skbaddr, event.ktime_ns):
                found.stack = stack.addresses
            self._fresh.add(event.cpu)

    def flush(self, *, everything: bool = False) -> Iterator[Dropped]:
        """What still waits for a state, if it did so at the last flush already. To be called after each batch."""
        due = [cpu for cpu in self._waiting if everything or cpu not in self._fresh]
        self._fresh.clear()
        for cpu in due:
            yield self._waiting.pop(cpu)


def _concerns(passage: Passage, drop: Drop) -> bool:
    """Whether a passage is about this packet: its lines name the ports of a layer, or end before they are read."""
    pairs = passage.ports()
    if not pairs:
        return passage.may_be_of(drop.packet.layers)
    return any((sport, dport) in pairs for _, _, sport, _, dport in map(_flow, drop.packet.layers))
