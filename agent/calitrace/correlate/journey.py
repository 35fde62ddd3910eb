"""One probe's way through the kernel, hop by hop.

Joining: an event belongs to the probe whose number its payload identity or TCP sequence number carries; a packet
without one (a reply that is no echo, a RST) to the probe that last used the client port it names, if it was sent
before. Direction: towards the client's address and port is REPLY, away from it REQUEST; an ICMP error that quotes
the request is a REPLY. A packet of ours after the answer (the RST that closes) is CLOSE and proves nothing.

What breaks a join: lost events (the verdict then says so) and a namespace that was not looked at (its events are
counted as outside, never located).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

from calitrace import identity
from calitrace.calico.log import Reader
from calitrace.calico.passage import Assembler, Passage
from calitrace.events import HopKind
from calitrace.model import Drop, Event, Hop, LogLine, PacketEvent, StateCopy
from calitrace.packet import RST, SYN, TCP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from calitrace.model import Probe, Topology
    from calitrace.packet import Layer


class Direction(str, Enum):
    """Of a packet, seen from the one who probes."""

    REQUEST = "request"
    REPLY = "reply"
    CLOSE = "close"


@dataclass
class Step:
    """One event of the journey. *passages*: what Calico logged on that CPU just before it.

    *state*: Calico's state copied at a drop. *error*: an ICMP error, or a RST from the far side.
    """

    event: Hop | Drop
    direction: Direction
    error: bool = False
    passages: list[Passage] = field(default_factory=list)
    state: StateCopy | None = None

    @property
    def tunnelled(self) -> bool:
        """Whether the packet was inside VXLAN here."""
        return self.event.packet.tunnel is not None


@dataclass
class Journey:
    """A probe and all that was seen of it, in order of time."""

    probe: Probe
    steps: list[Step] = field(default_factory=list)

    def way(self, direction: Direction) -> list[Step]:
        """The steps in one direction."""
        return [step for step in self.steps if step.direction is direction]

    def without_flooded(self, otherhost: int | None) -> Journey:
        """The journey without the copies that a switch flooded to hosts which then found them not to be theirs.

        *otherhost*: this kernel's number of SKB_DROP_REASON_OTHERHOST.
        """
        ended = {
            (step.event.netns, step.event.skbaddr): step.event.ktime_ns
            for step in self.steps
            if isinstance(step.event, Drop) and step.event.skb_drop_reason == otherhost is not None
        }
        return Journey(
            self.probe,
            [
                step
                for step in self.steps
                if step.event.ktime_ns > ended.get((step.event.netns, step.event.skbaddr), -1)
            ],
        )


class Journeys:
    """Joins a stream of events, in ring-buffer order, to the journeys of known probes."""

    def __init__(self, run_id: int, probes: Iterable[Probe], topology: Topology) -> None:
        self._run_id = run_id
        self.journeys = {probe.number: Journey(probe) for probe in probes}
        self._topology = topology
        self._by_port: dict[tuple[int, int], list[Probe]] = {}
        for journey in self.journeys.values():
            probe = journey.probe
            self._by_port.setdefault((probe.proto, probe.sport), []).append(probe)
        self._reader = Reader()
        self._assembler = Assembler()
        self._passages: dict[int, list[Passage]] = {}
        self._last_step: dict[int, Step] = {}  # by CPU, for the state that follows its drop
        self._queued: dict[tuple[int, int, int], Hop] = {}  # by address and device, until XMIT
        self.outside = 0  # probe packets in namespaces that are not ours to judge
        self.unjoined = 0  # packets that matched in the kernel and are no probe of this run

    def feed(self, event: Event | LogLine) -> None:
        """Take the next event."""
        if isinstance(event, LogLine):
            for line in self._reader.lines(event):
                self._passages.setdefault(event.cpu, []).extend(self._assembler.feed(line))
        elif isinstance(event, StateCopy):
            step = self._last_step.get(event.cpu)
            if step is not None and step.event.skbaddr == event.skbaddr and isinstance(step.event, Drop):
                step.state = event
        elif isinstance(event, Hop) and event.kind is HopKind.XMIT:
            queued = self._queued.pop((event.skbaddr, event.netns, event.ifindex), None)
            if queued is None:
                self.unjoined += 1
            else:
                self._packet(replace(queued, ktime_ns=event.ktime_ns, cpu=event.cpu, kind=event.kind, rc=event.rc))
        elif isinstance(event, (Hop, Drop)):
            if isinstance(event, Hop) and event.kind is HopKind.QUEUE:
                self._queued[event.skbaddr, event.netns, event.ifindex] = event
            self._packet(event)

    def _packet(self, event: Hop | Drop) -> None:
        # Calico's lines on this CPU since the last packet led to this event, whichever packet it is.
        passages = self._passages.pop(event.cpu, []) + self._assembler.cut(event.cpu)
        self._last_step.pop(event.cpu, None)
        found = self._join(event)
        if found is None:
            self.unjoined += 1
            return
        probe, direction, error = found
        if not self._topology.observed(event.netns):
            self.outside += 1
            return
        step = Step(event, direction, error, [p for p in passages if self._concerns(p, probe, event)])
        self.journeys[probe.number].steps.append(step)
        self._last_step[event.cpu] = step

    def _join(self, event: PacketEvent) -> tuple[Probe, Direction, bool] | None:
        packet = event.packet
        layer = packet.inner
        if layer is None:
            return None
        if layer.is_icmp_error:
            quoted = packet.quoted
            probe = self._probe_of(quoted, event.ktime_ns) if quoted else None
            return (probe, Direction.REPLY, True) if probe else None
        probe = self._probe_of(layer, event.ktime_ns)
        if probe is None:
            return None
        if (layer.dport, str(layer.dst)) == (probe.sport, probe.src):
            return probe, Direction.REPLY, bool(layer.proto == TCP and layer.flags & RST)
        if layer.proto == TCP and not layer.flags & SYN:
            return probe, Direction.CLOSE, False
        return probe, Direction.REQUEST, False

    def _probe_of(self, layer: Layer, ktime_ns: int) -> Probe | None:
        named = [self.journeys[n].probe for n in self._numbers(layer) if n in self.journeys]
        named = [probe for probe in named if probe.proto == layer.proto]
        for probe in named:
            if probe.sport in (layer.sport, layer.dport):
                return probe
        for port in (layer.sport, layer.dport):
            users = [p for p in self._by_port.get((layer.proto, port), ()) if p.sent_ns <= ktime_ns]
            if users:
                return users[-1]
        # Calico may have changed the source port (a collision): the number alone must do.
        return named[0] if named else None

    def _numbers(self, layer: Layer) -> Iterator[int]:
        """The probe numbers that a packet may carry."""
        if layer.identity is not None and layer.identity.run_id == self._run_id:
            yield layer.identity.sequence
        elif layer.proto == TCP:
            for sequence in (layer.seq, layer.seq - 1, layer.ack - 1):
                number = identity.tcp_number(sequence & 0xFFFFFFFF, self._run_id)
                if number is not None:
                    yield number

    def _concerns(self, passage: Passage, probe: Probe, event: PacketEvent) -> bool:
        """Whether a passage is about this packet: its lines name the client's port, or a layer's pair of ports.

        The programs print ports before they translate them, the event shows them after; only the client's stays.
        Some end before the ports are read (a bypass, a drop): those ran where the event was seen.
        """
        pairs = passage.ports()
        if not pairs:
            here = self._topology.namespaces[event.netns].links.values()
            ran_here = any(link.calico and passage.is_at(link.name, link.ifindex) for link in here)
            return ran_here and passage.may_be_of(event.packet.layers)
        return any(probe.sport in pair for pair in pairs) or any(
            (layer.sport, layer.dport) in pairs for layer in event.packet.layers
        )
