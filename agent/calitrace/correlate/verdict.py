"""From a journey to a located cause, with the evidence that carries it.

| seen                                   | verdict                                                    |
|----------------------------------------|------------------------------------------------------------|
| sent at A, dropped at A                | DROPPED: hook, interface, Calico's reason, rule, log lines |
| left A encapsulated, never arrived at B| UNDERLAY: the nodes' network loses VXLAN                   |
| arrived at B, dropped at B             | DROPPED                                                    |
| delivered to the pod, no reply         | NO_REPLY: application or pod                               |
| reply left B, never reached A or client| RETURN_PATH                                                |
| refused by Calico: no endpoints        | NO_BACKEND                                                 |
| evidence does not carry                | UNKNOWN                                                    |

An absence proves something only where we looked and lost nothing: with lost events, or at a node that is not
observed, the confidence falls. A drop is Calico's only when a Calico program sits at that hook and no foreign one
does, or when Calico's own log or state says so of this very packet. "I don't know" is a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from calitrace.calico import reasons, state
from calitrace.correlate.journey import Direction, Journey, Step
from calitrace.errors import LayoutMismatch
from calitrace.events import HopKind
from calitrace.model import Drop, Hop, Outcome, Role
from calitrace.packet import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calitrace.calico.passage import Passage
    from calitrace.model import Link, Namespace, Topology


class Kind(str, Enum):
    """What is claimed."""

    ANSWERED = "answered"
    DROPPED = "dropped"
    NO_BACKEND = "no-backend"
    REFUSED = "refused"
    UNDERLAY = "underlay"
    NO_REPLY = "no-reply"
    RETURN_PATH = "return-path"
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Confidence(str, Enum):
    """PROVEN: the kernel or Calico said it. LIKELY: it follows, unless something unseen happened."""

    PROVEN = "proven"
    LIKELY = "likely"
    NONE = "none"


@dataclass(frozen=True)
class Place:
    """Where. *hook*: ``tc ingress``, ``tc egress``, or empty when no hook took part."""

    namespace: str
    interface: str = ""
    hook: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.namespace, self.interface, self.hook) if part)


@dataclass(frozen=True)
class Verdict:
    """*cause*: one sentence. *calico_reason*: name of Calico's code; *rules*: those that decided, named if known."""

    kind: Kind
    confidence: Confidence
    cause: str
    place: Place | None = None
    to: Place | None = None
    by_calico: bool = False
    calico_reason: str = ""
    skb_drop_reason: str = ""
    rules: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """What numbers mean on the machine that recorded. *rules*: Calico rule id to rule."""

    drop_reasons: Mapping[int, str] = field(default_factory=dict)
    symbols: Mapping[int, str] = field(default_factory=dict)
    rules: Mapping[int, str] = field(default_factory=dict)

    def drop_reason(self, drop: Drop) -> str:
        """The kernel's name of a drop reason, without its prefix; its number when the kernel has no name."""
        if drop.skb_drop_reason is None:
            return ""
        name = self.drop_reasons.get(drop.skb_drop_reason, f"reason {drop.skb_drop_reason}")
        return name.removeprefix("SKB_DROP_REASON_")

    def symbol(self, drop: Drop) -> str:
        """The function that dropped, ``name+0xoffset``, or its address."""
        return self.symbols.get(drop.location, f"{drop.location:#x}")

    def rule(self, rule_id: int) -> str:
        """A rule by name, or its id."""
        return self.rules.get(rule_id) or f"rule {rule_id:#018x}"


_TC_REASONS = {"TC_INGRESS": "ingress", "TC_EGRESS": "egress"}
# Without these reasons (they came in v5.18): the functions that run tc.
_TC_FUNCTIONS = {
    "__netif_receive_skb_core": "ingress",
    "sch_handle_ingress": "ingress",
    "__dev_queue_xmit": "egress",
    "sch_handle_egress": "egress",
}


def judge(journey: Journey, topology: Topology, names: Names, lost: int = 0) -> Verdict:
    """The verdict on one probe. *lost*: number of events that were lost while it was on its way."""
    return _Judge(journey, topology, names, lost).verdict()


class _Judge:
    def __init__(self, journey: Journey, topology: Topology, names: Names, lost: int) -> None:
        self.journey = journey
        self.topology = topology
        self.names = names
        self.lost = lost

    def verdict(self) -> Verdict:
        probe = self.journey.probe
        if probe.outcome is Outcome.SEND_ERROR:
            return Verdict(Kind.NOT_SENT, Confidence.PROVEN, f"the probe could not be sent: {probe.detail}")
        if probe.outcome is Outcome.ANSWERED:
            took = f" in {probe.rtt_ns / 1e6:.2f} ms" if probe.rtt_ns is not None else ""
            return Verdict(Kind.ANSWERED, Confidence.PROVEN, f"answered{took}", evidence=self._path())
        if probe.outcome is Outcome.REFUSED:
            return self._refused()
        for direction in (Direction.REPLY, Direction.REQUEST):
            way = [s for s in self.journey.way(direction) if not s.error and not _handed_over(s)]
            if way:
                return self._ended(way[-1])
        return self._unknown("the probe was not seen at any observed place")

    # -- refused ----------------------------------------------------------------------------------------

    def _refused(self) -> Verdict:
        probe = self.journey.probe
        errors = [s for s in self.journey.way(Direction.REPLY) if s.error]
        requests = self.journey.way(Direction.REQUEST)
        if not errors or not requests:
            return Verdict(
                Kind.REFUSED,
                Confidence.LIKELY,
                f"refused: {probe.detail}; where, was not seen",
                evidence=self._path(),
            )
        first = errors[0]
        namespace = self.topology.namespace(first.event.netns)
        name = namespace.name if namespace else "?"
        last = next((s for s in reversed(requests) if s.event.ktime_ns <= first.event.ktime_ns), requests[-1])
        in_place = (last.event.netns, last.event.skbaddr) == (first.event.netns, first.event.skbaddr)
        said = any(p.no_backend() for s in self.journey.steps for p in s.passages)
        if namespace and namespace.role is Role.NODE and (in_place or said):
            evidence = [f"{name}: the probe's own sk_buff became the ICMP error ({first.event.packet.inner})"]
            evidence += [f"{p.interface}-{p.direction}: {line}" for p, line in self._lines("NAT: ")]
            return Verdict(
                Kind.NO_BACKEND,
                Confidence.PROVEN if said else Confidence.LIKELY,
                f"the service at {probe.dst}:{probe.dport} has no endpoint that {name} may use: "
                f"Calico there answered {probe.detail or 'ICMP port unreachable'}",
                place=self._place(last, "tc ingress"),
                by_calico=True,
                evidence=tuple(evidence) + self._path(),
            )
        drops = [s.event for s in requests if isinstance(s.event, Drop) and s.event.netns == first.event.netns]
        seen_at = namespace.role if namespace else Role.OTHER
        if seen_at is Role.CLIENT:
            cause = f"refused: {probe.detail}; the side that refused is not observed"
        else:
            where = "the pod" if seen_at is Role.POD else "the node itself"
            cause = f"{where} ({name}) refused: {probe.detail}; nothing listens there"
        return Verdict(
            Kind.REFUSED,
            Confidence.LIKELY if seen_at is Role.CLIENT else Confidence.PROVEN,
            cause,
            place=self._place(first),
            skb_drop_reason=self.names.drop_reason(drops[-1]) if drops else "",
            evidence=self._path(),
        )

    # -- unanswered -------------------------------------------------------------------------------------

    def _ended(self, last: Step) -> Verdict:
        """The verdict where *last* is the last that was seen of request or reply."""
        if isinstance(last.event, Drop):
            return self._dropped(last, last.event)
        namespace = self.topology.namespaces[last.event.netns]  # steps are of observed namespaces only
        leaving = last.event.kind is HopKind.QUEUE
        reply = last.direction is Direction.REPLY
        if last.event.kind is HopKind.XMIT and last.event.rc != 0:
            return Verdict(
                Kind.DROPPED,
                Confidence.PROVEN,
                f"the driver refused the packet (return code {last.event.rc})",
                place=self._place(last),
                evidence=self._path(),
            )
        if namespace.role is Role.POD and not reply:
            return Verdict(
                Kind.NO_REPLY,
                self._absence(),
                f"delivered to {namespace.name}, which did not answer: application or pod",
                place=self._place(last),
                evidence=self._path(),
            )
        if leaving and last.tunnelled:
            return self._lost_in_underlay(last, namespace)
        if leaving:
            return self._lost_outside(last, namespace)
        if reply and namespace.role is Role.CLIENT:
            return Verdict(
                Kind.RETURN_PATH,
                self._absence(),
                f"the reply reached {namespace.name} and was not taken: a firewall there, or it came too late",
                place=self._place(last),
                evidence=self._path(),
            )
        if last.event.kind is HopKind.CONSUME:
            return Verdict(
                Kind.NO_REPLY,
                self._absence(),
                f"{namespace.name} took the packet itself: no service was found for it there",
                place=self._place(last),
                evidence=self._path(),
            )
        return self._unknown(f"last seen arriving at {self._place(last)}; no drop was seen")

    def _lost_in_underlay(self, last: Step, namespace: Namespace) -> Verdict:
        outer = last.event.packet.tunnel
        assert outer is not None
        target = self.topology.owner(str(outer.dst))
        back = "; the reply is lost" if last.direction is Direction.REPLY else ""
        evidence = (
            f"{self._place(last)} sent it encapsulated: {outer} VNI {outer.vni}",
            f"{target.name if target else outer.dst} never received it"
            if target
            else f"{outer.dst} is not observed from here",
        )
        cause = (
            f"the underlay loses VXLAN (UDP {outer.dport}) from {namespace.name} ({outer.src}) "
            f"to {target.name if target else 'the node'} ({outer.dst}){back}"
        )
        if target is None:
            cause = (
                f"left {namespace.name} ({outer.src}) in VXLAN (UDP {outer.dport}) for {outer.dst}, which is "
                f"not observed: the underlay or that node{back}"
            )
        confidence = self._absence() if target else Confidence.LIKELY
        if target and any("xdp" in link.foreign or "xdp" in link.calico for link in target.links.values()):
            confidence = Confidence.LIKELY
            cause += f", or an XDP program of {target.name}: what XDP drops is not seen arriving"
        return Verdict(
            Kind.UNDERLAY,
            confidence,
            cause,
            place=self._place(last),
            to=Place(target.name if target else str(outer.dst)),
            evidence=evidence + self._path(),
        )

    def _lost_outside(self, last: Step, namespace: Namespace) -> Verdict:
        layer = last.event.packet.outer
        destination = str(layer.dst) if layer else "?"
        target = self.topology.owner(destination)
        reply = last.direction is Direction.REPLY
        what = "the reply" if reply else "the probe"
        name = target.name if target else destination
        cause = f"{what} left {namespace.name} and never reached {name}"
        if reply:
            cause += ": return path (source/destination check, rp_filter, load balancer)"
        return Verdict(
            Kind.RETURN_PATH if reply else Kind.UNDERLAY,
            self._absence() if target else Confidence.LIKELY,
            cause,
            place=self._place(last),
            to=Place(name),
            evidence=self._path(),
        )

    # -- dropped ----------------------------------------------------------------------------------------

    def _dropped(self, step: Step, drop: Drop) -> Verdict:
        reason, symbol = self.names.drop_reason(drop), self.names.symbol(drop)
        hook = self._tc_hook(reason, symbol)
        place = self._place(step, f"tc {hook}" if hook else "")
        evidence = [f"skb:kfree_skb {reason or 'without reason'} in {symbol}"]
        if not hook:
            return Verdict(
                Kind.DROPPED,
                Confidence.PROVEN,
                f"dropped by the kernel, not by Calico: {reason or 'no reason given'} in {symbol}",
                place=place,
                skb_drop_reason=reason,
                evidence=tuple(evidence) + self._path(),
            )
        link = self.topology.link(drop.netns, drop.ifindex)
        namespace = self.topology.namespace(drop.netns)
        passage = self._denial(step, link)
        held = self._held(step, namespace, evidence)
        code, rules = self._reason(passage, held)
        counters = namespace.reasons if namespace else 0
        calico_reason = reasons.name(code, counters) if code else ""
        ours = link.calico.get(hook, ()) if link else ()
        foreign = link.foreign.get(hook, ()) if link else ()
        said = passage is not None or (held is not None and held.denied)
        if passage is not None:
            evidence += [f"{passage.interface}-{passage.direction}: {line}" for line in passage.texts[-6:]]
        if not said and (foreign or not ours):
            who = ", ".join((*ours, *foreign)) or "a program that we did not see attached"
            return Verdict(
                Kind.DROPPED,
                Confidence.LIKELY if foreign and not ours else Confidence.NONE,
                f"dropped by a tc program at {place}: {who}"
                + ("; none of them is Calico's" if not ours else "; which of them is not known"),
                place=place,
                skb_drop_reason=reason,
                evidence=tuple(evidence) + self._path(),
            )
        cause = (passage.cause() if passage else "") or reasons.MEANING.get(calico_reason, "")
        named = tuple(self.names.rule(rule) for rule in rules)
        text = f"dropped by Calico: {cause or 'cause not recorded'}"
        if named:
            text += f": {', '.join(named)}"
        return Verdict(
            Kind.DROPPED,
            Confidence.PROVEN if said else Confidence.LIKELY,
            text,
            place=place,
            by_calico=True,
            calico_reason=calico_reason,
            skb_drop_reason=reason,
            rules=named,
            evidence=tuple(evidence) + self._path(),
        )

    def _tc_hook(self, reason: str, symbol: str) -> str:
        """``ingress``, ``egress``, or empty. The reason says it, or, where the kernel has none, the function."""
        if reason in _TC_REASONS:
            return _TC_REASONS[reason]
        if any(each.endswith("TC_INGRESS") for each in self.names.drop_reasons.values()):
            return ""
        function = symbol.split("+", 1)[0]
        return next((hook for name, hook in _TC_FUNCTIONS.items() if function.startswith(name)), "")

    def _denial(self, step: Step, link: Link | None) -> Passage | None:
        for passage in reversed(step.passages):
            denied = passage.verdict == "DENY" or (not passage.verdict and passage.cause())
            if denied and (link is None or passage.tag.is_of(link.name)):
                return passage
        return None

    def _held(self, step: Step, namespace: Namespace | None, evidence: list[str]) -> state.CalicoState | None:
        """Calico's state at the drop, if it is about this packet; what stands against it goes to *evidence*."""
        if step.state is None or namespace is None:
            return None
        try:
            table = state.layout(namespace.state_name, len(step.state.raw))
        except LayoutMismatch as unknown:
            evidence.append(str(unknown))
            return None
        held = state.decode(step.state.raw, table)
        for layer in step.event.packet.layers:
            if held.holds(layer.proto, str(layer.src), layer.sport, str(layer.dst), layer.dport):
                policy = state.POLICY_RESULTS.get(held.pol_rc, str(held.pol_rc))
                evidence.append(
                    f"Calico's state of this packet: policy {policy}, rules hit {len(held.rule_ids)}, "
                    f"reason {held.calico_reason if held.calico_reason is not None else 'not kept'}"
                )
                return held
        evidence.append("Calico's state held another packet by then: not used")
        return None

    def _reason(self, passage: Passage | None, held: state.CalicoState | None) -> tuple[int, tuple[int, ...]]:
        """Calico's reason code (0: none recorded) and the ids of the rules that denied."""
        code = 0
        if passage is not None and passage.verdict == "DENY" and passage.code is not None:
            code = passage.code
        if held is not None:
            code = code or held.calico_reason or 0
            if held.pol_rc == 2:
                return code or _DROPPED_BY_POLICY, held.rule_ids[-1:]
        if passage is not None and passage.cause() == reasons.MEANING["DROPPED_BY_POLICY"]:
            code = code or _DROPPED_BY_POLICY
        return code, ()

    # -- shared -----------------------------------------------------------------------------------------

    def _absence(self) -> Confidence:
        """How far "not seen" can be trusted."""
        return Confidence.PROVEN if not self.lost else Confidence.LIKELY

    def _unknown(self, why: str) -> Verdict:
        lost = f"; {self.lost} events were lost" if self.lost else ""
        return Verdict(Kind.UNKNOWN, Confidence.NONE, f"not known: {why}{lost}", evidence=self._path())

    def _place(self, step: Step, hook: str = "") -> Place:
        namespace = self.topology.namespace(step.event.netns)
        link = self.topology.link(step.event.netns, step.event.ifindex)
        return Place(namespace.name if namespace else "?", link.name if link else "", hook)

    def _lines(self, start: str) -> list[tuple[Passage, str]]:
        return [
            (p, line)
            for step in self.journey.steps
            for p in step.passages
            for line in p.texts
            if line.startswith(start)
        ]

    def _path(self) -> tuple[str, ...]:
        """One line of evidence: the places it was seen at, in order."""
        places: list[str] = []
        for step in self.journey.steps:
            if step.direction is Direction.CLOSE or (
                isinstance(step.event, Hop) and step.event.kind is HopKind.CONSUME
            ):
                continue
            place = str(self._place(step))
            if not places or places[-1] != place:
                places.append(place)
        return (f"path: {' > '.join(places)}",) if places else ()


_DROPPED_BY_POLICY = 4


def _handed_over(step: Step) -> bool:
    """Whether it only says that the driver took the packet: the other end may have received it before that."""
    return isinstance(step.event, Hop) and step.event.kind is HopKind.XMIT and step.event.rc == 0


def tuple_of(journey: Journey) -> str:
    """``tcp 10.10.0.100:40001 > 10.10.0.1:30080``."""
    probe = journey.probe
    name = PROTOCOLS.get(probe.proto, str(probe.proto))
    return f"{name} {probe.src}:{probe.sport} > {probe.dst}:{probe.dport}"
