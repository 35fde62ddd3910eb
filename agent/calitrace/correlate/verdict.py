"""From a journey to a located cause, with the evidence that carries it.

| seen                                   | verdict                                                    |
|----------------------------------------|------------------------------------------------------------|
| sent at A, dropped at A                | DROPPED: hook, interface, Calico's reason, rule, log lines |
| left A encapsulated, never arrived at B| UNDERLAY: the nodes' network loses VXLAN                   |
| arrived at B, dropped at B             | DROPPED                                                    |
| delivered to the pod, no reply         | NO_REPLY: application or pod                               |
| reply left B, never reached A or client| RETURN_PATH                                                |
| refused by Calico: no endpoints        | NO_BACKEND                                                 |
| an ICMP error says that it does not fit| TOO_BIG: who has no room for it, and how much there is     |
| refused, and that never reached A      | what refused it, and where that was lost                   |
| evidence does not carry                | UNKNOWN                                                    |

An absence proves something only where we looked and lost nothing: with lost events, in a journal without its end, or
at a node that is not observed, the confidence falls. Of a probe whose time was not up it says nothing at all. A drop
is Calico's only when a Calico program sits at that hook and no foreign one does, or when Calico's own log or state
says so of this very packet. "I don't know" is a verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from calitrace.correlate import walk
from calitrace.correlate.drops import Confidence, Place, explain, place_of
from calitrace.correlate.journey import Direction, Journey, Step
from calitrace.events import HopKind
from calitrace.model import Drop, Hop, Outcome, Role
from calitrace.packet import PROTOCOLS, TCP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from calitrace.calico.passage import Passage
    from calitrace.correlate.drops import Cause, Names
    from calitrace.model import Namespace, Topology
    from calitrace.packet import Layer


_SMALL = 576  # bytes: what any IPv4 network carries; RFC 791
_SENT = (HopKind.QUEUE, HopKind.XMIT)


class Kind(str, Enum):
    """What is claimed."""

    ANSWERED = "answered"
    DROPPED = "dropped"
    NO_BACKEND = "no-backend"
    TOO_BIG = "too-big"
    REFUSED = "refused"
    UNDERLAY = "underlay"
    NO_REPLY = "no-reply"
    RETURN_PATH = "return-path"
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verdict:
    """*cause*: one sentence. *calico_reason*: name of Calico's code; *rules*: those that decided, named if known.

    *next*: a command that shows more, or nothing.
    """

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
    next: str = ""


def judge(
    journey: Journey,
    topology: Topology,
    names: Names,
    lost: int,
    walks: Mapping[int, Sequence[walk.Step]],
    *,
    cut: bool = False,
    changed: frozenset[int] = frozenset(),
) -> Verdict:
    """The verdict on one probe. *lost*: number of events that were lost while it was on its way.

    *walks*: by namespace, what the maps of a node say about such a probe. *cut*: the journal has no end, and so perhaps
    not all events. *changed*: namespaces that went meanwhile, or lost an interface.
    """
    return _Judge(journey, topology, names, lost, walks, cut, changed).verdict()


class _Judge:
    def __init__(
        self,
        journey: Journey,
        topology: Topology,
        names: Names,
        lost: int,
        walks: Mapping[int, Sequence[walk.Step]],
        cut: bool,
        changed: frozenset[int],
    ) -> None:
        self.journey = journey
        self.topology = topology
        self.names = names
        self.lost = lost
        self.gaps = cut or lost > 0
        self.walks = walks
        self.changed = changed

    def verdict(self) -> Verdict:
        probe = self.journey.probe
        if probe.outcome is Outcome.SEND_ERROR:
            return Verdict(Kind.NOT_SENT, Confidence.PROVEN, f"the probe could not be sent: {probe.detail}")
        if probe.outcome is Outcome.ANSWERED:
            took = f" in {probe.rtt_ns / 1e6:.2f} ms" if probe.rtt_ns is not None else ""
            return Verdict(Kind.ANSWERED, Confidence.PROVEN, f"answered{took}", evidence=self._path())
        if probe.outcome is Outcome.REFUSED:
            return self._refused(probe.detail)
        if probe.outcome is Outcome.OPEN:
            return self._still_open()
        refusals = [step for step in self.journey.way(Direction.REPLY) if self._is_refusal(step)]
        if refusals:
            return self._refusal_lost(refusals[-1])
        for direction in (Direction.REPLY, Direction.REQUEST):
            way = list(_iter_conclusive(self.journey.way(direction)))
            if way:
                return self._ended(way[-1])
        for step in self.journey.way(Direction.REQUEST):
            return Verdict(
                Kind.NOT_SENT,
                Confidence.LIKELY,
                f"{self._place(step).namespace} has not sent it: the next hop does not answer ARP",
                place=self._place(step),
            )
        return self._unknown("the probe was not seen at any observed place")

    # -- refused ----------------------------------------------------------------------------------------

    def _is_refusal(self, step: Step) -> bool:
        """Whether it is an error about the probe, not about an answer to it."""
        quoted = step.event.packet.quoted
        return step.error and (quoted is None or str(quoted.dst) != self.journey.probe.src)

    def _refusal_lost(self, last: Step) -> Verdict:
        """Refused, and the one who asked never heard of it: what it sees is a timeout."""
        probe = self.journey.probe
        error, event = last.event.packet.inner, last.event
        assert error is not None  # or it would have joined no probe
        verdict = self._refused(error.refusal)
        what = "that ICMP error" if error.is_icmp_error else "that RST"
        target = self.topology.owner(probe.src)
        name = target.name if target else probe.src
        sure = self._absence(target) if target else Confidence.LIKELY
        if isinstance(event, Drop):
            how = explain(event, last.passages, last.state, self.topology, self.names).text
            lost = f"{what} was lost at {self._place(last)}: {how}"
        elif event.netns == (target.inum if target else -1) and event.kind is not HopKind.QUEUE:
            quoted, why = event.packet.quoted, "a firewall there, or it came too late"
            if quoted is not None and str(quoted.dst) != probe.dst:
                why = f"it is about {quoted.dst}:{quoted.dport}, as translated, where nobody there has sent to"
            lost = f"{what} reached {name}, which did not take it: {why}"
        else:
            seen = "left" if event.kind in _SENT else "was last seen arriving at"
            lost = f"{what} {seen} {self._place(last)} as {error.src} and never reached {name}"
        if error.is_too_big:
            lost += "; it goes on sending packets of that size (projectcalico/calico#4439)"
        return replace(
            verdict,
            confidence=sure if verdict.confidence is Confidence.PROVEN else verdict.confidence,
            cause=f"{verdict.cause}; {lost}",
            to=Place(name),
        )

    def _refused(self, detail: str) -> Verdict:
        """The verdict on a probe that was refused. *detail*: by what, in words."""
        probe = self.journey.probe
        errors = [s for s in self.journey.way(Direction.REPLY) if s.error]
        requests = self.journey.way(Direction.REQUEST)
        if not errors or not requests:
            return Verdict(
                Kind.REFUSED,
                Confidence.LIKELY,
                f"refused: {detail}; where, was not seen",
                evidence=self._path(),
            )
        first = errors[0]
        namespace = self.topology.namespace(first.event.netns)
        name = namespace.name if namespace else "?"
        last = next((s for s in reversed(requests) if s.event.ktime_ns <= first.event.ktime_ns), requests[-1])
        in_place = (last.event.netns, last.event.skbaddr) == (first.event.netns, first.event.skbaddr)
        said = any(p.no_backend() for s in self.journey.steps for p in s.passages)
        by_calico = namespace is not None and namespace.role is Role.NODE and in_place
        error = first.event.packet.inner
        assert error is not None  # or it would have joined no probe
        became = f"{name}: the probe's own sk_buff became the ICMP error ({error})"
        if error.is_too_big:
            return self._too_big(error, by_calico, last if by_calico else first, became)
        if by_calico and error.proto == TCP:
            return self._reset(name, last, became)
        rejected = self._lines("Packet hit a black hole route: REJECT")
        # Calico answers both alike: a service without endpoints, and an address that no service uses.
        steps = self.walks.get(first.event.netns, ()) if by_calico and error.is_port_unreachable else ()
        maps = tuple(f"Calico's maps after it: {each}" for each in steps if each.suffers)
        unused = any(s.broken == walk.NO_FRONTEND and s.suffers.startswith(walk.REFUSED) for s in steps)
        if by_calico and (rejected or (unused and not said)):
            return Verdict(
                Kind.REFUSED,
                Confidence.PROVEN if rejected else Confidence.LIKELY,
                f"no service uses {probe.dst}:{probe.dport}: Calico at {name} refuses it (serviceLoopPrevention)",
                place=self._place(last, "tc ingress"),
                by_calico=True,
                calico_reason="BLACK_HOLE",
                evidence=(became, *(f"{p.name}: {line}" for p, line in rejected), *maps, *self._path()),
            )
        if (by_calico and error.is_port_unreachable) or (namespace and namespace.role is Role.NODE and said):
            evidence = [became]
            evidence += [f"{p.name}: {line}" for p, line in self._lines("NAT: ")]
            evidence += maps
            if not said and not any(each.broken == walk.NO_BACKEND for each in steps):
                evidence.append("not told from an address that no service uses, where serviceLoopPrevention is Reject")
            return Verdict(
                Kind.NO_BACKEND,
                Confidence.PROVEN if said else Confidence.LIKELY,
                f"the service at {probe.dst}:{probe.dport} has no endpoint that {name} may use: "
                f"Calico there answered {detail or 'ICMP port unreachable'}",
                place=self._place(last, "tc ingress"),
                by_calico=True,
                evidence=tuple(evidence) + self._path(),
            )
        drops = [s.event for s in requests if isinstance(s.event, Drop) and s.event.netns == first.event.netns]
        seen_at = namespace.role if namespace else Role.OTHER
        by_itself = namespace is not None and seen_at is Role.CLIENT and namespace.has(str(error.src))
        from_outside = not by_itself if seen_at is Role.CLIENT else self._is_from_outside(first, error)
        if by_itself:
            cause = f"{name} itself refused: {detail}"
            if drops and self.names.drop_reason(drops[-1]) == "NEIGH_FAILED":
                cause += "; the next hop does not answer ARP"
        elif seen_at is Role.CLIENT:
            cause = f"refused: {detail}; the side that refused is not observed"
        elif from_outside:
            cause = f"refused: {detail}; it came in at {self._place(first)}: the side that refused is not observed"
        else:
            where = "the pod" if seen_at is Role.POD else "the node itself"
            cause = f"{where} ({name}) refused: {detail}"
            # To a SYN without a listener the kernel itself answers with a RST.
            by_rule = error.is_port_unreachable and probe.proto == TCP
            if by_rule or any(self.names.drop_reason(drop) == "NETFILTER_DROP" for drop in drops):
                cause += "; a rule of iptables or nftables there rejects it"
            elif error.proto == TCP or error.is_port_unreachable:
                cause += "; nothing listens there"
        return Verdict(
            Kind.REFUSED,
            Confidence.LIKELY if from_outside else Confidence.PROVEN,
            cause,
            place=self._place(first),
            skb_drop_reason=self.names.drop_reason(drops[-1]) if drops else "",
            evidence=self._path(),
        )

    def _is_from_outside(self, first: Step, error: Layer) -> bool:
        """Whether a refusal that was first seen there was made elsewhere, where nobody looked.

        Its source alone does not tell: Calico has turned it back into the service's address before it is sent, also
        when it comes in a tunnel.
        """
        kind = first.event.kind if isinstance(first.event, Hop) else None
        if kind is HopKind.RECEIVE:
            return True
        namespace = self.topology.namespaces[first.event.netns]  # steps are of observed namespaces only
        return not namespace.has(str(error.src)) and (kind not in _SENT or self.gaps)

    def _reset(self, name: str, step: Step, became: str) -> Verdict:
        """Calico made the RST of the probe itself: a host that refuses makes one of its own."""
        said = [
            (p, line)
            for start in ("Egress connection limit", "Ingress connection limit", "Sending TCP RST")
            for p, line in self._lines(start)
        ]
        why = "a pod's limit of connections, or a backend that is gone"
        if said:
            why = "its backend is gone" if said[-1][1].startswith("Sending") else "the pod's limit of connections"
        return Verdict(
            Kind.REFUSED,
            Confidence.PROVEN if said else Confidence.LIKELY,
            f"Calico at {name} answered with a TCP RST: {why}",
            place=self._place(step),
            by_calico=True,
            evidence=(became, *(f"{p.name}: {line}" for p, line in said), *self._path()),
        )

    def _too_big(self, error: Layer, by_calico: bool, step: Step, became: str) -> Verdict:
        size, room = self.journey.probe.size_bytes, f"; MTU {error.mtu}" if error.mtu else ""
        said = self._lines("SKB too long") + self._lines("Return ICMP mtu is too big")
        if by_calico:
            cause = f"the probe's {size} bytes do not fit into Calico's tunnel to the backend{room}"
        else:
            cause = f"the probe's {size} bytes are too many for {error.src}{room}"
        evidence = [became] if by_calico else []
        evidence += [f"{p.name}: {line}" for p, line in said]
        return Verdict(
            Kind.TOO_BIG,
            Confidence.PROVEN if said or not by_calico else Confidence.LIKELY,
            cause,
            place=self._place(step, "tc ingress" if by_calico else ""),
            by_calico=by_calico,
            evidence=tuple(evidence) + self._path(),
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
                self._absence(namespace),
                f"delivered to {namespace.name}, which did not answer: application or pod{self._went(namespace)}",
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
                self._absence(namespace),
                f"the reply reached {namespace.name} and was not taken: a firewall there, or it came too late"
                f"{self._went(namespace)}",
                place=self._place(last),
                evidence=self._path(),
            )
        if last.event.kind is HopKind.CONSUME and reply:
            way = f"; {namespace.name} reaches the client by {namespace.way_back}" if namespace.way_back else ""
            return Verdict(
                Kind.RETURN_PATH,
                Confidence.LIKELY,
                f"the reply ended at {namespace.name}: it took it for its own, or the next hop towards "
                f"{self.journey.probe.src} does not answer ARP{way}",
                place=self._place(last),
                evidence=self._path(),
            )
        if last.event.kind is HopKind.CONSUME:
            return Verdict(
                Kind.NO_REPLY,
                self._absence(namespace),
                f"{namespace.name} took the packet itself: no service was found for it there",
                place=self._place(last),
                evidence=self._path(),
            )
        return self._unknown(f"last seen arriving at {self._place(last)}; no drop was seen")

    def _still_open(self) -> Verdict:
        """Nothing came back, but it still might have: only a drop tells what became of it."""
        ways = [step for each in (Direction.REQUEST, Direction.REPLY) for step in self.journey.way(each)]
        last = next(reversed(list(_iter_conclusive(ways))), None)
        if last is not None and isinstance(last.event, Drop):
            return self._dropped(last, last.event)
        return self._unknown("its time was not up when the recording ended")

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
            f"to {target.name if target else 'the node'} ({outer.dst}){back}{self._by_size()}"
        )
        if target is None:
            cause = (
                f"left {namespace.name} ({outer.src}) in VXLAN (UDP {outer.dport}) for {outer.dst}, which is "
                f"not observed: the underlay or that node{back}{self._by_size()}"
            )
        confidence = self._absence(target) if target else Confidence.LIKELY
        if target and any("xdp" in link.foreign or "xdp" in link.calico for link in target.links.values()):
            confidence = Confidence.LIKELY
            cause += f", or an XDP program of {target.name}: what XDP drops is not seen arriving"
        down = self._down(target, str(outer.dst)) if target else ""
        if down:
            confidence = Confidence.LIKELY
        cause += down + self._went(target)
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
        if reply and layer and self._came_in_a_tunnel(last.event.netns):
            owner = self.topology.owner(str(layer.src))
            whose = f" ({owner.name})" if owner else ""
            cause = (
                f"the request came to {namespace.name} in the tunnel, the reply left it as {layer.src}{whose} outside, "
                f"as DSR does, and never reached {name}: what is between must let a node send as another "
                "(source/destination check, anti-spoofing, stateful firewall, load balancer)"
            )
        elif reply:
            cause += ": return path (a firewall or load balancer between, or rp_filter there)"
        down = self._down(target, destination) if target else ""
        cause += self._by_size() + down + self._went(target)
        return Verdict(
            Kind.RETURN_PATH if reply else Kind.UNDERLAY,
            self._absence(target) if target and not down else Confidence.LIKELY,
            cause,
            place=self._place(last),
            to=Place(name),
            evidence=self._path(),
        )

    def _came_in_a_tunnel(self, netns: int) -> bool:
        received = (step for step in self.journey.way(Direction.REQUEST) if _is_received(step, netns))
        return any(step.tunnelled for step in received)

    # -- dropped ----------------------------------------------------------------------------------------

    def _dropped(self, step: Step, drop: Drop) -> Verdict:
        cause = explain(drop, step.passages, step.state, self.topology, self.names)
        back = self._way_back(step, cause)
        return Verdict(
            Kind.DROPPED,
            cause.confidence,
            cause.text + back,
            place=cause.place,
            by_calico=cause.by_calico,
            calico_reason=cause.calico_reason,
            skb_drop_reason=cause.skb_drop_reason,
            rules=cause.rules,
            evidence=cause.evidence + self._path(),
        )

    def _way_back(self, step: Step, cause: Cause) -> str:
        """Why a reverse path fails: the node reaches the client by another interface than it came in by."""
        namespace = self.topology.namespaces[step.event.netns]  # steps are of observed namespaces only
        of_the_client = step.direction is Direction.REQUEST and not step.tunnelled and "reverse path" in cause.text
        if not of_the_client or namespace.way_back in ("", cause.place.interface):
            return ""
        return f"; {namespace.name} reaches {self.journey.probe.src} by {namespace.way_back}"

    # -- shared -----------------------------------------------------------------------------------------

    def _by_size(self) -> str:
        """What to try where a large probe was lost without a word."""
        size = self.journey.probe.size_bytes
        return f"; of {size} bytes: does a small probe come through (MTU)?" if size > _SMALL else ""

    def _absence(self, there: Namespace) -> Confidence:
        """How far "not seen" can be trusted."""
        return Confidence.LIKELY if self.gaps or there.inum in self.changed else Confidence.PROVEN

    def _went(self, there: Namespace | None) -> str:
        """That one need not look further than to a place that is no more."""
        return f"; {there.name} went, or lost an interface, meanwhile" if there and there.inum in self.changed else ""

    def _down(self, there: Namespace, address: str) -> str:
        """That its interface with *address* was down when we looked."""
        down = [link.name for link in there.links.values() if address in link.addresses and not link.up]
        return f"; {there.name}'s {down[0]} is down" if down else ""

    def _unknown(self, why: str) -> Verdict:
        lost = f"; {self.lost} events were lost" if self.lost else ""
        return Verdict(Kind.UNKNOWN, Confidence.NONE, f"not known: {why}{lost}", evidence=self._path())

    def _place(self, step: Step, hook: str = "") -> Place:
        return place_of(step.event, self.topology, hook)

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


def _is_received(step: Step, netns: int) -> bool:
    return step.event.netns == netns and isinstance(step.event, Hop) and step.event.kind is HopKind.RECEIVE


def _iter_conclusive(way: Iterable[Step]) -> Iterator[Step]:
    """The steps that a packet may have ended at.

    Not that the driver took it: the other end may have received it before that. Nor that it was freed where it was not
    received, or after it was sent on: so a driver ends what it has transmitted, and the kernel what it only copied
    to ask for the next hop's address.
    """
    last: dict[int, HopKind] = {}  # by namespace: whether it was received or sent there
    for step in way:
        event = step.event
        if step.error or (isinstance(event, Hop) and event.kind is HopKind.XMIT and event.rc == 0):
            continue
        if isinstance(event, Hop) and event.kind is HopKind.CONSUME and last.get(event.netns) is not HopKind.RECEIVE:
            continue
        if isinstance(event, Hop):
            last[event.netns] = event.kind
        yield step


def tuple_of(journey: Journey) -> str:
    """``tcp 10.10.0.100:40001 > 10.10.0.1:30080``."""
    probe = journey.probe
    name = PROTOCOLS.get(probe.proto, str(probe.proto))
    return f"{name} {probe.src}:{probe.sport} > {probe.dst}:{probe.dport}"
