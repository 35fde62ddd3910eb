"""Which probe, and which direction, an event belongs to."""

from __future__ import annotations

from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODEPORT, RUN_ID, SPORT, Recorder

from calitrace import identity
from calitrace.correlate.journey import Direction, Journeys
from calitrace.decode import Decoder
from calitrace.events import HopKind
from calitrace.identity import Identity
from calitrace.model import Event, Link, Namespace, Outcome, Probe, Role, Topology
from calitrace.packet import TCP, UDP

NS = 1
NODE = Topology({NS: Namespace(NS, "node", Role.NODE, {2: Link(2, "eth0", calico={"egress": ("cali_tc_preambl",)})})})
HERE = Topology({NS: Namespace(NS, "node", Role.NODE, {2: Link(2, "eth0")})})


def probes(proto: int, count: int = 2) -> list[Probe]:
    """Probes 0 and up, a port each, a microsecond apart."""
    return [
        Probe(n, proto, CLIENT, SPORT + n, NODE_A, NODEPORT, 1_000_000 + n, 40, Outcome.UNANSWERED)
        for n in range(count)
    ]


def joined(
    raw: bytes, proto: int = TCP, ktime_ns: int = 1_000_000
) -> tuple[Journeys, list[tuple[int, Direction, bool]]]:
    """Feed one packet; returns (probe, direction, error) of what it became."""
    recorder = Recorder()
    recorder.now_ns = ktime_ns
    recorder.hop(HopKind.RECEIVE, NS, 2, raw)
    journeys = Journeys(RUN_ID, probes(proto), HERE)
    for event in Decoder().iter_events(recorder.records):
        journeys.feed(event)
    found = [(n, s.direction, s.error) for n, j in journeys.journeys.items() for s in j.steps]
    return journeys, found


def test_by_identity_in_the_payload() -> None:
    payload = identity.encode(Identity(RUN_ID, 0, 1))
    assert joined(packets.udp(CLIENT, SPORT + 1, NODE_A, NODEPORT, payload), UDP)[1] == [(1, Direction.REQUEST, False)]
    assert joined(packets.udp(NODE_A, NODEPORT, CLIENT, SPORT + 1, payload), UDP)[1] == [(1, Direction.REPLY, False)]


def test_by_the_client_port_where_there_is_no_identity() -> None:
    reply = packets.udp(NODE_A, NODEPORT, CLIENT, SPORT + 1, b"pong")
    assert joined(reply, UDP)[1] == [(1, Direction.REPLY, False)]
    journeys, found = joined(reply, UDP, ktime_ns=0)  # before the probe was sent
    assert (found, journeys.unjoined) == ([], 1)


def test_by_sequence_number_though_the_port_was_changed() -> None:
    sequence = identity.tcp_sequence(RUN_ID, 1)
    assert joined(packets.tcp(CLIENT, 20000, NODE_A, NODEPORT, 0x02, sequence))[1] == [(1, Direction.REQUEST, False)]


def test_a_reset_that_acknowledges_data_is_joined_by_its_port() -> None:
    reset = packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 2)
    assert joined(reset)[1] == [(0, Direction.REPLY, True)]


def test_icmp_errors() -> None:
    assert joined(packets.icmp_error(NODE_A, CLIENT, packets.syn(1)))[1] == [(1, Direction.REPLY, True)]
    journeys, found = joined(packets.icmp_error(NODE_A, CLIENT, b""))
    assert (found, journeys.unjoined) == ([], 1)


def test_what_is_not_ours() -> None:
    for raw in (b"\x00" * 20, packets.tcp(CLIENT, 1, NODE_A, 2, 0x02), packets.ip(CLIENT, NODE_A, 47, b"")):
        journeys, found = joined(raw)
        assert (found, journeys.unjoined) == ([], 1)


def test_a_state_without_its_drop_is_left_out() -> None:
    recorder = Recorder()
    recorder.hop(HopKind.RECEIVE, NS, 2, packets.syn())
    recorder.state(NS, bytes(512))
    journeys = Journeys(RUN_ID, probes(TCP), HERE)
    for event in Decoder().iter_events(recorder.records):
        journeys.feed(event)
    journeys.feed(Event(1, 0, 0))
    (step,) = journeys.journeys[0].steps
    assert step.state is None


def test_a_passage_of_another_packet_is_left_out() -> None:
    recorder = Recorder()
    recorder.log("eth0------------I: IP s=1.1.1.1 d=2.2.2.2", "eth0------------I: TCP; ports: s=1 d=2")
    recorder.hop(HopKind.QUEUE, NS, 2, packets.syn())
    recorder.log("eth0------------I: TCP; ports: s=40001 d=30080")
    recorder.hop(HopKind.QUEUE, NS, 2, packets.syn())
    journeys = Journeys(RUN_ID, probes(TCP), HERE)
    for event in Decoder().iter_events(recorder.records):
        journeys.feed(event)
    first, second = journeys.journeys[0].steps
    assert first.passages == []
    assert [passage.interface for passage in second.passages] == ["eth0"]


def test_a_passage_without_ports_is_of_a_packet_seen_there_with_its_addresses() -> None:
    bypass = ("eth0------------E: New packet at ifindex=2; mark=3000000",
              "eth0------------E: Final result=ALLOW (3). Bypass mark set.")  # fmt: skip
    for passage, there, here in (
        (bypass, NODE, ["eth0"]),
        (bypass, HERE, []),  # no program of Calico's in this namespace
        (tuple(line.replace("eth0", "eth1") for line in bypass), NODE, []),
        ((bypass[0], f"eth0------------E: IP s={CLIENT} d=9.9.9.9", bypass[1]), NODE, ["eth0"]),  # before DNAT
        ((bypass[0], "eth0------------E: IP s=9.9.9.9 d=8.8.8.8", bypass[1]), NODE, []),
        (
            (bypass[0], f"eth0------------E: IP s={CLIENT} d={NODE_A}", "eth0------------E: ICMP; type=8 code=0"),
            NODE,
            [],
        ),
        ((bypass[0], "eth0------------E: ARP: allowing packet", bypass[1]), NODE, []),
    ):
        recorder = Recorder()
        recorder.log(*passage)
        recorder.hop(HopKind.QUEUE, NS, 2, packets.syn())
        journeys = Journeys(RUN_ID, probes(TCP), there)
        for event in Decoder().iter_events(recorder.records):
            journeys.feed(event)
        (step,) = journeys.journeys[0].steps
        assert [each.interface for each in step.passages] == here, passage


def test_xmit_without_its_queue_is_counted() -> None:
    recorder = Recorder()
    recorder.hop(HopKind.XMIT, NS, 2, packets.syn())
    journeys = Journeys(RUN_ID, probes(TCP), HERE)
    for event in Decoder().iter_events(recorder.records):
        journeys.feed(event)
    assert (journeys.unjoined, journeys.journeys[0].steps) == (1, [])
