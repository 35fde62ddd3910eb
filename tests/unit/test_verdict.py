"""A packet's life, row by row of the verdict table."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODE_B, NODEPORT, POD, RUN_ID, SPORT, TARGET_PORT, Recorder

from calitrace import events, identity, journal
from calitrace.cli.probe import to_ask_for
from calitrace.correlate import walk
from calitrace.correlate.analysis import analyse
from calitrace.correlate.drops import Confidence, Place
from calitrace.correlate.verdict import Kind, Verdict
from calitrace.events import HopKind
from calitrace.model import Link, Namespace, Outcome, Probe, Role, Topology
from calitrace.report import folding, jsonlines, text

RECEIVE, QUEUE, XMIT, CONSUME = HopKind.RECEIVE, HopKind.QUEUE, HopKind.XMIT, HopKind.CONSUME
CLIENT_NS, A_NS, B_NS, POD_NS, FABRIC_NS = 1, 2, 3, 4, 5
UPLINK, CALI = 2, 3
REASONS = {2: "SKB_DROP_REASON_NOT_SPECIFIED", 3: "SKB_DROP_REASON_NO_SOCKET", 50: "SKB_DROP_REASON_TC_EGRESS",
           51: "SKB_DROP_REASON_TC_INGRESS", 52: "SKB_DROP_REASON_OTHERHOST",
           53: "SKB_DROP_REASON_NEIGH_FAILED"}  # fmt: skip
NO_SOCKET, TC_EGRESS, TC_INGRESS, OTHERHOST, NEIGH_FAILED = 3, 50, 51, 52, 53
BOTH: dict[str, tuple[str, ...]] = {"ingress": ("cali_tc_preambl",), "egress": ("cali_tc_preambl",)}
RULE = 0x1234


def topology(*, without_b: bool = False, foreign: bool = False, calico: bool = True, xdp: bool = False) -> Topology:
    """Client, node-a, node-b with its pod, and the fabric between them."""
    hooks: dict[str, tuple[str, ...]] = BOTH if calico else {}
    other: dict[str, tuple[str, ...]] = {"egress": ("other_prog",)} if foreign else {}
    found = {
        CLIENT_NS: Namespace(CLIENT_NS, "lab-client", Role.CLIENT, {UPLINK: Link(UPLINK, "eth0", (CLIENT,))}),
        A_NS: Namespace(
            A_NS, "lab-node-a", Role.NODE, {UPLINK: Link(UPLINK, "ens192", (NODE_A,), BOTH)}, 7, "cali_state6", 512, 27
        ),
        B_NS: Namespace(
            B_NS,
            "lab-node-b",
            Role.NODE,
            {
                UPLINK: Link(UPLINK, "eth0", (NODE_B,), BOTH, {"xdp": ("x",)} if xdp else {}),
                CALI: Link(CALI, "cali1", (), hooks, other, workload=True),
            },
            8,
            "cali_state6",
            512,
            27,
        ),
        POD_NS: Namespace(POD_NS, "lab-pod-b", Role.POD, {UPLINK: Link(UPLINK, "eth0", (POD,))}),
        FABRIC_NS: Namespace(FABRIC_NS, "lab-fabric", Role.OTHER, {}),
    }
    if without_b:
        del found[B_NS]
    return Topology(found)


def judged(
    recorder: Recorder, outcome: Outcome = Outcome.UNANSWERED, *, lost: int = 0, where: Topology | None = None,
    detail: str = "", size: int = 40, rules: dict[int, str] | None = None, reasons: dict[int, str] | None = None,
    symbols: dict[int, str] | None = None, walks: dict[int, list[dict[str, Any]]] | None = None, complete: bool = True,
    changed: tuple[int, ...] = (),
) -> Verdict:  # fmt: skip
    """The verdict on probe 0; rendering it must work and fit 80 columns."""
    probe: dict[str, Any] = {
        "number": 0, "proto": 6, "src": CLIENT, "sport": SPORT, "dst": NODE_A, "dport": NODEPORT, "sent_ns": 1_000_000,
        "size_bytes": size, "outcome": outcome.value, "rtt_ns": 5 if outcome is Outcome.ANSWERED else None,
        "detail": detail,
    }  # fmt: skip
    header = {
        "run_id": RUN_ID, "vxlan_port": 4789, "drop_reasons": REASONS if reasons is None else reasons,
        "rules": rules or {}, "topology": (where or topology()).to_map(),
    }  # fmt: skip
    recorded = journal.Journal(
        header,
        recorder.records,
        {0: probe},
        symbols or {},
        totals={"lost": {"hop": lost}, "changed": list(changed)},
        complete=complete,
        walks=walks or {},
    )
    analysis = analyse(recorded, short_names=True)
    for verbose in (False, True):
        for line in text.iter_report(analysis, verbose=verbose):
            assert verbose or len(line) <= folding.WIDTH
    assert list(jsonlines.iter_objects(analysis))
    return analysis.verdicts[0]


def to_node_b(recorder: Recorder) -> bytes:
    """From the client through node-a into the tunnel; returns the tunnelled SYN."""
    tunnelled = packets.vxlan(NODE_A, NODE_B, packets.syn())
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn())
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    recorder.log(
        "ens192----------I: New packet at ifindex=2; mark=0",
        f"ens192----------I: IP s={CLIENT} d={NODE_A}",
        f"ens192----------I: TCP; ports: s={SPORT} d={NODEPORT}",
        f"ens192----------I: CT: DNAT to {POD}:{TARGET_PORT}",
        "ens192----------I: vxlan encap a0a0001 : a0a0002",
        "ens192----------I: Final result=ALLOW rc 7. Program execution time: 172987ns",
    )
    recorder.hop(QUEUE, A_NS, UPLINK, tunnelled)
    recorder.hop(XMIT, A_NS, UPLINK, tunnelled)
    return tunnelled


def to_pod(recorder: Recorder) -> None:
    """And on to the pod's interface."""
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    recorder.hop(QUEUE, B_NS, CALI, packets.syn(dst=POD, dport=TARGET_PORT))
    recorder.hop(RECEIVE, POD_NS, UPLINK, packets.syn(dst=POD, dport=TARGET_PORT))


def back_to_node_b(recorder: Recorder) -> None:
    """The pod answers."""
    recorder.hop(QUEUE, POD_NS, UPLINK, packets.syn_ack(src=POD, sport=TARGET_PORT), skb=0xBB)
    recorder.hop(RECEIVE, B_NS, CALI, packets.syn_ack(src=POD, sport=TARGET_PORT), skb=0xBB)


def test_healthy() -> None:
    recorder = Recorder()
    to_pod(recorder)
    back_to_node_b(recorder)
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, packets.syn_ack(), skb=0xBB)
    verdict = judged(recorder, Outcome.ANSWERED)
    assert (verdict.kind, verdict.confidence) == (Kind.ANSWERED, Confidence.PROVEN)
    assert "client eth0 > node-a ens192 > node-b eth0 > node-b cali1 > pod-b eth0" in verdict.evidence[-1]


def test_the_underlay_loses_vxlan() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    recorder.drop(FABRIC_NS, 9, packets.vxlan(NODE_A, NODE_B, packets.syn()), TC_INGRESS)  # nobody sees that
    verdict = judged(recorder)
    assert (verdict.kind, verdict.confidence) == (Kind.UNDERLAY, Confidence.PROVEN)
    assert (verdict.place, verdict.to) == (Place("node-a", "ens192"), Place("node-b"))
    assert verdict.cause == "the underlay loses VXLAN (UDP 4789) from node-a (10.10.0.1) to node-b (10.10.0.2)"


def test_lost_events_and_unobserved_nodes_lower_the_confidence() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    assert judged(recorder, lost=1).confidence is Confidence.LIKELY
    verdict = judged(recorder, where=topology(without_b=True))
    assert (verdict.kind, verdict.confidence) == (Kind.UNDERLAY, Confidence.LIKELY)
    assert "not observed" in verdict.cause


def test_a_journal_without_its_end_proves_no_absence() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    verdict = judged(recorder, complete=False)
    assert (verdict.kind, verdict.confidence) == (Kind.UNDERLAY, Confidence.LIKELY)


def test_what_went_meanwhile_is_not_blamed_on_others() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    verdict = judged(recorder, changed=(B_NS,))
    assert (verdict.kind, verdict.confidence) == (Kind.UNDERLAY, Confidence.LIKELY)
    assert verdict.cause.endswith("; node-b went, or lost an interface, meanwhile")
    assert judged(recorder, changed=(POD_NS,)).confidence is Confidence.PROVEN
    recorder = Recorder()
    to_pod(recorder)
    verdict = judged(recorder, changed=(POD_NS,))
    assert (verdict.kind, verdict.confidence) == (Kind.NO_REPLY, Confidence.LIKELY)
    recorder = Recorder()
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn())
    assert judged(recorder, changed=(A_NS,)).cause == (
        "the probe left client and never reached node-a; node-a went, or lost an interface, meanwhile"
    )


def test_of_a_probe_whose_time_was_not_up_only_a_drop_tells_what_became_of_it() -> None:
    recorder = Recorder()
    assert judged(recorder, Outcome.OPEN).kind is Kind.UNKNOWN
    to_pod(recorder)
    verdict = judged(recorder, Outcome.OPEN)
    assert (verdict.kind, verdict.confidence) == (Kind.UNKNOWN, Confidence.NONE)
    assert verdict.cause == "not known: its time was not up when the recording ended"
    assert verdict.evidence[-1].endswith("> pod-b eth0")
    recorder = Recorder()
    denied_at_the_pod(recorder, log=True, state=None)
    verdict = judged(recorder, Outcome.OPEN)
    assert (verdict.kind, verdict.confidence) == (Kind.DROPPED, Confidence.PROVEN)


def test_the_underlay_loses_the_reply() -> None:
    recorder = Recorder()
    to_pod(recorder)
    back_to_node_b(recorder)
    recorder.hop(QUEUE, B_NS, UPLINK, packets.vxlan(NODE_B, NODE_A, packets.syn_ack()), skb=0xBB)
    verdict = judged(recorder)
    assert (verdict.kind, verdict.place, verdict.to) == (
        Kind.UNDERLAY,
        Place("node-b", "eth0"),
        Place("node-a"),
    )
    assert verdict.cause.endswith("the reply is lost")


def denied_at_the_pod(recorder: Recorder, *, log: bool, state: bytes | None) -> None:
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    if log:
        recorder.log(
            "cali1-----------I: New packet at ifindex=3; mark=1000000",
            f"cali1-----------I: IP s={CLIENT} d={POD}",
            f"cali1-----------I: TCP; ports: s={SPORT} d={TARGET_PORT}",
            "cali1-----------I: DENY due to policy",
        )
    recorder.drop(B_NS, CALI, packets.syn(dst=POD, dport=TARGET_PORT), TC_EGRESS)
    if state is not None:
        recorder.state(B_NS, state)


@pytest.mark.parametrize("log", [True, False])
def test_policy_denies_at_the_pod(log: bool) -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=log, state=packets.calico_state(pol_rc=2, rules=(1, RULE)))
    verdict = judged(recorder, rules={RULE: "default.deny rule 0 (deny)"})
    assert (verdict.kind, verdict.confidence) == (Kind.DROPPED, Confidence.PROVEN)
    assert verdict.place == Place("node-b", "cali1", "tc egress")
    assert (verdict.calico_reason, verdict.skb_drop_reason) == ("DROPPED_BY_POLICY", "TC_EGRESS")
    assert verdict.rules == ("default.deny rule 0 (deny)",)
    assert verdict.cause == "dropped by Calico: denied by policy: default.deny rule 0 (deny)"


def test_policy_by_log_alone() -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=True, state=None)
    verdict = judged(recorder)
    assert verdict.calico_reason == "DROPPED_BY_POLICY"
    assert verdict.cause == "dropped by Calico: denied by policy"


def test_a_stale_state_is_not_believed() -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=False, state=packets.calico_state(number=1, pol_rc=2, rules=(RULE,)))
    verdict = judged(recorder)
    assert (verdict.rules, verdict.calico_reason, verdict.confidence) == ((), "", Confidence.LIKELY)
    assert verdict.cause == "dropped by Calico: cause not recorded"
    assert any("another packet" in each for each in verdict.evidence)


def test_a_state_of_unknown_layout_is_refused_and_named() -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=False, state=bytes(500))
    verdict = judged(recorder)
    assert any("cali_state6 500 B" in each for each in verdict.evidence)


def test_a_foreign_program_is_not_calico() -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=False, state=None)
    verdict = judged(recorder, where=topology(foreign=True, calico=False))
    assert (verdict.by_calico, verdict.confidence) == (False, Confidence.LIKELY)
    assert verdict.cause.endswith("other_prog; none of them is Calico's")
    verdict = judged(recorder, where=topology(foreign=True))
    assert (verdict.by_calico, verdict.confidence) == (False, Confidence.NONE)
    assert verdict.cause.endswith("which of them is not known")


def test_calico_says_so_though_a_foreign_program_is_there() -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=False, state=packets.calico_state(pol_rc=2, rules=(RULE,)))
    assert judged(recorder, where=topology(foreign=True)).by_calico


@pytest.mark.parametrize("log", [True, False])
def test_reverse_path_check(log: bool) -> None:
    recorder = Recorder()
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn())
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    if log:
        recorder.log(
            "ens192----------I: New packet at ifindex=2; mark=0",
            f"ens192----------I: IP s={CLIENT} d={NODE_A}",
            f"ens192----------I: TCP; ports: s={SPORT} d={NODEPORT}",
            "ens192----------I: Host RPF check rc 0 result 0",
            "ens192----------I: Final result=DENY (0). Program execution time: 27491ns",
        )
    recorder.drop(A_NS, UPLINK, packets.syn(), TC_INGRESS)
    verdict = judged(recorder)
    assert verdict.place == Place("node-a", "ens192", "tc ingress")
    assert verdict.by_calico
    if log:
        assert verdict.confidence is Confidence.PROVEN
        assert "reverse path check" in verdict.cause
    else:
        assert verdict.confidence is Confidence.LIKELY
        assert verdict.cause == "dropped by Calico: cause not recorded"


def by(way: str) -> Topology:
    """Node-a reaches the client by this interface."""
    where = topology()
    where.namespaces[A_NS] = replace(where.namespaces[A_NS], way_back=way)
    return where


@pytest.mark.parametrize(
    ("way", "said"), [("bond0", "; node-a reaches 10.10.0.100 by bond0"), ("ens192", ""), ("", "")]
)
def test_a_reverse_path_says_which_way_back_there_is(way: str, said: str) -> None:
    reasons = {**REASONS, 60: "SKB_DROP_REASON_IP_RPFILTER"}
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    recorder.drop(A_NS, UPLINK, packets.syn(), 60)
    cause = judged(recorder, where=by(way), reasons=reasons).cause
    assert cause.endswith(f"(the kernel's own reverse path filter, rp_filter){said}")
    recorder.drop(A_NS, UPLINK, packets.syn(), NO_SOCKET)
    assert "reaches" not in judged(recorder, where=by(way), reasons=reasons).cause


@pytest.mark.parametrize(("way", "said"), [("cali1", "; node-a reaches the client by cali1"), ("", "")])
def test_a_reply_that_ends_at_a_node(way: str, said: str) -> None:
    """It is no request for a service: it waits for a next hop, or is taken for the node's own."""
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    recorder.hop(RECEIVE, A_NS, CALI, packets.syn_ack(), skb=0xBB)
    recorder.hop(CONSUME, A_NS, CALI, packets.syn_ack(), skb=0xBB)
    verdict = judged(recorder, where=by(way))
    assert (verdict.kind, verdict.confidence) == (Kind.RETURN_PATH, Confidence.LIKELY)
    assert verdict.cause == (
        "the reply ended at node-a: it took it for its own, or the next hop towards 10.10.0.100 does not answer "
        f"ARP{said}"
    )


def test_a_kernel_drop_is_never_blamed_on_calico() -> None:
    recorder = Recorder()
    to_pod(recorder)
    recorder.drop(POD_NS, UPLINK, packets.syn(dst=POD, dport=TARGET_PORT), 2, location=0xFFFF)
    verdict = judged(recorder)
    assert (verdict.by_calico, verdict.kind) == (False, Kind.DROPPED)
    assert verdict.cause == "dropped by the kernel, not by Calico: NOT_SPECIFIED in 0xffff"


@pytest.mark.parametrize("log", [True, False])
def test_no_backend(log: bool) -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    if log:
        recorder.log(
            "ens192----------I: New packet at ifindex=2; mark=0",
            f"ens192----------I: IP s={CLIENT} d={NODE_A}",
            f"ens192----------I: TCP; ports: s={SPORT} d={NODEPORT}",
            "ens192----------I: NAT: no backend",
            "ens192----------I: Final result=ALLOW rc -1. Program execution time: 37786ns",
        )
    recorder.hop(QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn()))
    verdict = judged(recorder, Outcome.REFUSED, detail="ICMP port unreachable from 10.10.0.1")
    assert verdict.kind is Kind.NO_BACKEND
    assert verdict.confidence is (Confidence.PROVEN if log else Confidence.LIKELY)


@pytest.mark.parametrize("log", [True, False])
def test_too_big_for_the_tunnel(log: bool) -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    if log:
        recorder.log(
            "ens192----------I: New packet at ifindex=2; mark=0",
            f"ens192----------I: IP s={CLIENT} d={NODE_A}",
            f"ens192----------I: TCP; ports: s={SPORT} d={NODEPORT}",
            "ens192----------I: SKB too long (len=1512) vs limit=1464",
            "ens192----------I: Final result=ALLOW rc 7. Program execution time: 37786ns",
        )
    recorder.hop(QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn(), code=4, mtu=1450))
    verdict = judged(recorder, Outcome.REFUSED, detail="ICMP fragmentation needed (MTU 1450) from 10.10.0.1")
    assert (verdict.kind, verdict.by_calico) == (Kind.TOO_BIG, True)
    assert verdict.cause == "the probe's 40 bytes do not fit into Calico's tunnel to the backend; MTU 1450"
    assert verdict.confidence is (Confidence.PROVEN if log else Confidence.LIKELY)


@pytest.mark.parametrize("mtu", [1400, 0])
def test_too_big_for_a_router(mtu: int) -> None:
    recorder = Recorder()
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn())
    error = packets.icmp_error("10.10.0.254", CLIENT, packets.syn(), code=4, mtu=mtu)
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, error, skb=0xBB)
    verdict = judged(recorder, Outcome.REFUSED, detail="ICMP fragmentation needed from 10.10.0.254")
    assert (verdict.kind, verdict.by_calico, verdict.confidence) == (Kind.TOO_BIG, False, Confidence.PROVEN)
    assert verdict.cause == "the probe's 40 bytes are too many for 10.10.0.254" + ("; MTU 1400" if mtu else "")


@pytest.mark.parametrize(("code", "kind"), [(3, Kind.NO_BACKEND), (4, Kind.TOO_BIG)])
def test_a_refusal_that_is_lost_on_its_way_back(code: int, kind: Kind) -> None:
    """The client sees a timeout; what happened is known all the same."""
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    error = packets.icmp_error(NODE_A, CLIENT, packets.syn(), code=code, mtu=1450 if code == 4 else 0)
    recorder.hop(QUEUE, A_NS, UPLINK, error)
    recorder.hop(XMIT, A_NS, UPLINK, error)
    verdict = judged(recorder)
    assert (verdict.kind, verdict.by_calico, verdict.to) == (kind, True, Place("client"))
    assert "that ICMP error left node-a ens192 as 10.10.0.1 and never reached client" in verdict.cause
    assert verdict.cause.endswith("(projectcalico/calico#4439)") == (kind is Kind.TOO_BIG)
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, error)
    reached = "that ICMP error reached client, which did not take it: a firewall there, or it came too late"
    assert reached in judged(recorder).cause
    recorder.drop(CLIENT_NS, UPLINK, error, NO_SOCKET)
    assert "was lost at client eth0: dropped by the kernel, not by Calico: NO_SOCKET" in judged(recorder).cause


def test_a_lost_refusal_of_a_client_that_is_not_observed() -> None:
    where = topology()
    del where.namespaces[CLIENT_NS]
    recorder = Recorder()
    to_pod(recorder)
    reset = packets.tcp(POD, TARGET_PORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(QUEUE, POD_NS, UPLINK, reset, skb=0xBB)
    verdict = judged(recorder, where=where)
    assert (verdict.kind, verdict.confidence) == (Kind.REFUSED, Confidence.LIKELY)
    assert verdict.cause == (
        "the pod (pod-b) refused: TCP RST from 10.65.1.2; nothing listens there; "
        "that RST left pod-b eth0 as 10.65.1.2 and never reached 10.10.0.100"
    )


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.UNANSWERED])
def test_a_refusal_that_comes_in_from_a_node_that_is_not_observed(outcome: Outcome) -> None:
    """As on a real cluster: only the node that the probe came to is observed."""
    where = topology(without_b=True)
    del where.namespaces[POD_NS]
    recorder = Recorder()
    to_node_b(recorder)
    reset = packets.tcp(POD, TARGET_PORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.vxlan(NODE_B, NODE_A, reset), skb=0xBB)
    verdict = judged(recorder, outcome, where=where, detail="TCP RST from 10.65.1.2")
    assert (verdict.kind, verdict.confidence) == (Kind.REFUSED, Confidence.LIKELY)
    refused = "refused: TCP RST from 10.65.1.2; it came in at node-a ens192: the side that refused is not observed"
    lost = "; that RST was last seen arriving at node-a ens192 as 10.65.1.2 and never reached client"
    assert verdict.cause == refused + (lost if outcome is Outcome.UNANSWERED else "")


@pytest.mark.parametrize(
    ("src", "lost", "confidence"),
    [(NODE_B, 0, "proven"), (NODE_A, 0, "proven"), (NODE_B, 1, "proven"), (NODE_A, 1, "likely")],
)
def test_who_refused_as_another_address(src: str, lost: int, confidence: str) -> None:
    """A backend in the node's own network: what it sends is the service's by then. Unless it came in unseen."""
    recorder = Recorder()
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    reset = packets.tcp(src, NODEPORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(QUEUE, B_NS, UPLINK, reset, skb=0xBB)
    verdict = judged(recorder, Outcome.REFUSED, detail="TCP RST", lost=lost)
    assert verdict.confidence.value == confidence
    assert verdict.cause.startswith("the node itself (node-b)") == (confidence == "proven")


def test_a_refusal_that_is_dropped_before_it_is_sent() -> None:
    recorder = Recorder()
    to_pod(recorder)
    reset = packets.tcp(POD, TARGET_PORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.drop(POD_NS, UPLINK, reset, TC_EGRESS, skb=0xBB)
    verdict = judged(recorder)
    assert verdict.cause.startswith("the pod (pod-b) refused: TCP RST from 10.65.1.2; nothing listens there; that RST")


@pytest.mark.parametrize(
    ("icmp", "dropped", "why"),
    [
        (True, False, "; a rule of iptables or nftables there rejects it"),
        (False, True, "; a rule of iptables or nftables there rejects it"),
        (False, False, "; nothing listens there"),
    ],
)
def test_a_rule_that_rejects_is_not_for_want_of_a_listener(icmp: bool, dropped: bool, why: str) -> None:
    recorder = Recorder()
    to_pod(recorder)
    syn = packets.syn(dst=POD, dport=TARGET_PORT)
    reset = packets.tcp(POD, TARGET_PORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    error = packets.icmp_error(POD, CLIENT, syn, code=3) if icmp else reset
    recorder.hop(QUEUE, POD_NS, UPLINK, error, skb=0xBB)
    recorder.drop(POD_NS, UPLINK, syn, 54 if dropped else NO_SOCKET)
    reasons = {**REASONS, 54: "SKB_DROP_REASON_NETFILTER_DROP"}
    verdict = judged(recorder, Outcome.REFUSED, detail="it", reasons=reasons)
    assert verdict.cause == f"the pod (pod-b) refused: it{why}"


@pytest.mark.parametrize(
    ("about", "why"),
    [
        (packets.syn(), "a firewall there, or it came too late"),
        (
            packets.syn(dst=POD, dport=TARGET_PORT),
            f"it is about {POD}:{TARGET_PORT}, as translated, where nobody there has sent to",
        ),
    ],
)
def test_a_refusal_that_comes_untranslated(about: bytes, why: str) -> None:
    recorder = Recorder()
    to_pod(recorder)
    error = packets.icmp_error(POD, CLIENT, about, code=3)
    recorder.hop(QUEUE, POD_NS, UPLINK, error, skb=0xBB)
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, error, skb=0xBB)
    assert judged(recorder).cause.endswith(f"; that ICMP error reached client, which did not take it: {why}")


def test_an_interface_that_is_down_is_named() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    where = topology()
    node = where.namespaces[B_NS]
    down = replace(node, links={**node.links, UPLINK: replace(node.links[UPLINK], up=False)})
    verdict = judged(recorder, where=Topology({**where.namespaces, B_NS: down}))
    assert (verdict.kind, verdict.confidence) == (Kind.UNDERLAY, Confidence.LIKELY)
    assert verdict.cause.endswith("; node-b's eth0 is down")
    recorder = Recorder()
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn(dst=NODE_B))
    verdict = judged(recorder, where=Topology({**where.namespaces, B_NS: down}))
    assert verdict.confidence is Confidence.LIKELY
    assert verdict.cause == "the probe left client and never reached node-b; node-b's eth0 is down"


def test_an_error_about_the_answer_refuses_nothing() -> None:
    recorder = Recorder()
    to_pod(recorder)
    back_to_node_b(recorder)
    answer = packets.syn_ack(src=POD, sport=TARGET_PORT)
    recorder.hop(QUEUE, B_NS, CALI, packets.icmp_error(NODE_B, POD, answer, code=1), skb=0xCC)
    assert judged(recorder).kind is Kind.UNKNOWN


def test_another_error_in_place_is_not_for_want_of_endpoints() -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    recorder.hop(QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn(), kind=11, code=0))
    verdict = judged(recorder, Outcome.REFUSED, detail="ICMP type 11 code 0 from 10.10.0.1")
    assert verdict.kind is Kind.REFUSED
    assert verdict.cause == "the node itself (node-a) refused: ICMP type 11 code 0 from 10.10.0.1"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("Ingress connection limit exceeded, rejecting with TCP RST", "the pod's limit of connections"),
        ("Sending TCP RST due to CT state", "its backend is gone"),
        ("", "a pod's limit of connections, or a backend that is gone"),
    ],
)
def test_refused_by_calico_itself(line: str, why: str) -> None:
    recorder = Recorder()
    to_pod(recorder)
    del recorder.records[-1]  # it did not get that far
    if line:
        recorder.log(
            "cali1-----------I: New packet at ifindex=3; mark=0",
            f"cali1-----------I: TCP; ports: s={SPORT} d={TARGET_PORT}",
            f"cali1-----------I: {line}",
            "cali1-----------I: Final result=ALLOW rc 7. Program execution time: 37786ns",
        )
    rst = packets.tcp(POD, TARGET_PORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(RECEIVE, B_NS, CALI, rst)
    verdict = judged(recorder, Outcome.REFUSED, detail="TCP RST")
    assert (verdict.kind, verdict.by_calico) == (Kind.REFUSED, True)
    assert verdict.cause == f"Calico at node-b answered with a TCP RST: {why}"
    assert verdict.confidence is (Confidence.PROVEN if line else Confidence.LIKELY)


def test_a_service_address_without_service_is_not_one_without_endpoints() -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    recorder.log(
        "ens192----------I: New packet at ifindex=2; mark=0",
        f"ens192----------I: IP s={CLIENT} d={NODE_A}",
        f"ens192----------I: TCP; ports: s={SPORT} d={NODEPORT}",
        "ens192----------I: Packet hit a black hole route: REJECT",
        "ens192----------I: Final result=ALLOW rc -1. Program execution time: 37786ns",
    )
    recorder.hop(QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn()))
    verdict = judged(recorder, Outcome.REFUSED, detail="ICMP port unreachable from 10.10.0.1")
    assert (verdict.kind, verdict.by_calico, verdict.calico_reason) == (Kind.REFUSED, True, "BLACK_HOLE")
    assert verdict.cause == ("no service uses 10.10.0.1:30080: Calico at node-a refuses it (serviceLoopPrevention)")
    assert verdict.confidence is Confidence.PROVEN


ICMP = "refused with an ICMP error"
UNUSED = walk.Step("route", NODE_A, "10.10.0.0/16 blackhole-reject", walk.NO_FRONTEND, f"{ICMP}, BLACK_HOLE: none")
EMPTY = walk.Step("NAT backend", "service 7", "none", walk.NO_BACKEND, ICMP)
ELSEWHERE = walk.Step("route", NODE_A, "local host", walk.NO_FRONTEND, "the host itself answers")


@pytest.mark.parametrize(
    ("step", "log", "kind", "confidence"),
    [
        (UNUSED, False, Kind.REFUSED, "likely"),
        (UNUSED, True, Kind.NO_BACKEND, "proven"),  # the maps have changed since
        (EMPTY, False, Kind.NO_BACKEND, "likely"),
        (ELSEWHERE, False, Kind.NO_BACKEND, "likely"),
    ],
)
def test_without_its_log_calicos_maps_tell_why_it_refused(
    step: walk.Step, log: bool, kind: Kind, confidence: str
) -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    if log:
        recorder.log(
            f"ens192----------I: TCP; ports: s={SPORT} d={NODEPORT}",
            "ens192----------I: NAT: no backend",
            "ens192----------I: Final result=ALLOW rc -1. Program execution time: 37786ns",
        )
    recorder.hop(QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn()))
    verdict = judged(
        recorder, Outcome.REFUSED, detail="ICMP port unreachable from 10.10.0.1", walks={A_NS: [asdict(step)]}
    )
    assert (verdict.kind, verdict.confidence.value, verdict.by_calico) == (kind, confidence, True)
    assert verdict.calico_reason == ("BLACK_HOLE" if kind is Kind.REFUSED else "")
    assert f"Calico's maps after it: {step}" in verdict.evidence
    assert any("not told from" in each for each in verdict.evidence) == (step is ELSEWHERE)


@pytest.mark.parametrize("step", [UNUSED, EMPTY])
def test_the_maps_tell_it_of_a_lost_refusal_too(step: walk.Step) -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    recorder.hop(QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn()))
    verdict = judged(recorder, walks={A_NS: [asdict(step)]})
    assert verdict.kind is (Kind.REFUSED if step is UNUSED else Kind.NO_BACKEND)
    assert verdict.cause.endswith("that ICMP error left node-a ens192 as 10.10.0.1 and never reached client")


@pytest.mark.parametrize(
    ("outcomes", "asked"),
    [
        ("answered unanswered unanswered", [1]),
        ("unanswered refused unanswered refused", [1]),
        ("answered send_error", []),
    ],
)
def test_the_maps_are_asked_for_one_probe(outcomes: str, asked: list[int]) -> None:
    probes = [
        Probe(number, 6, CLIENT, SPORT, NODE_A, NODEPORT, 0, 40, Outcome(each), detail=ICMP * (each == "refused"))
        for number, each in enumerate(outcomes.split())
    ]
    assert [each.number for each in to_ask_for(probes)] == asked
    assert to_ask_for([replace(each, detail="TCP RST") for each in probes if each.outcome is Outcome.REFUSED]) == []


def test_refused_by_the_pod() -> None:
    recorder = Recorder()
    to_pod(recorder)
    recorder.drop(POD_NS, UPLINK, packets.syn(dst=POD, dport=TARGET_PORT), NO_SOCKET)
    rst = packets.tcp(POD, TARGET_PORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(QUEUE, POD_NS, UPLINK, rst, skb=0xBB)
    verdict = judged(recorder, Outcome.REFUSED, detail="TCP RST")
    assert (verdict.kind, verdict.skb_drop_reason) == (Kind.REFUSED, "NO_SOCKET")
    assert verdict.cause == "the pod (pod-b) refused: TCP RST; nothing listens there"


def test_refused_where_nobody_looked() -> None:
    verdict = judged(Recorder(), Outcome.REFUSED, detail="TCP RST")
    assert (verdict.kind, verdict.confidence) == (Kind.REFUSED, Confidence.LIKELY)
    recorder = Recorder()
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn())
    rst = packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, rst, skb=0xBB)
    assert judged(recorder, Outcome.REFUSED, detail="TCP RST").cause.endswith("is not observed")


def test_the_pod_does_not_answer() -> None:
    recorder = Recorder()
    to_pod(recorder)
    verdict = judged(recorder)
    assert (verdict.kind, verdict.place) == (Kind.NO_REPLY, Place("pod-b", "eth0"))


def test_return_path() -> None:
    recorder = Recorder()
    to_pod(recorder)
    back_to_node_b(recorder)
    recorder.hop(QUEUE, B_NS, UPLINK, packets.syn_ack(), skb=0xBB)  # direct server return
    verdict = judged(recorder)
    assert (verdict.kind, verdict.to) == (Kind.RETURN_PATH, Place("client"))
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, packets.syn_ack(), skb=0xBB)
    assert judged(recorder).cause.startswith("the reply reached client and was not taken")


def test_a_reply_that_goes_past_the_tunnel() -> None:
    """In DSR it has to; where it may not (a source/destination check), or should not, that is the finding."""
    recorder = Recorder()
    to_pod(recorder)
    back_to_node_b(recorder)
    recorder.hop(QUEUE, B_NS, UPLINK, packets.syn_ack(), skb=0xBB)
    verdict = judged(recorder)
    assert (verdict.kind, verdict.confidence, verdict.to) == (Kind.RETURN_PATH, Confidence.PROVEN, Place("client"))
    said = "the request came to node-b in the tunnel, the reply left it as 10.10.0.1"
    assert verdict.cause.startswith(f"{said} (node-a) outside, as DSR does, and never reached client")
    where = topology()
    del where.namespaces[A_NS]
    assert judged(recorder, where=where).cause.startswith(f"{said} outside, as DSR does")


def test_a_reply_that_came_back_through_the_tunnel_is_no_dsr() -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.vxlan(NODE_B, NODE_A, packets.syn_ack()), skb=0xBB)
    recorder.hop(QUEUE, A_NS, UPLINK, packets.syn_ack(), skb=0xBB)
    assert judged(recorder).cause.startswith("the reply left node-a and never reached client: return path")


def test_a_reply_from_an_address_of_no_interface_is_no_dsr() -> None:
    """A load balancer's address is on no interface, and the node that was asked answers with it."""
    recorder = Recorder()
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn(dst="203.0.113.5"))
    recorder.hop(QUEUE, A_NS, UPLINK, packets.syn_ack(src="203.0.113.5"), skb=0xBB)
    assert judged(recorder).cause == (
        "the reply left node-a and never reached client: return path (a firewall or load balancer between, or "
        "rp_filter there)"
    )


@pytest.mark.parametrize("observed", [True, False])
def test_a_large_probe_may_be_lost_for_its_size(observed: bool) -> None:
    recorder = Recorder()
    to_node_b(recorder)
    verdict = judged(recorder, size=1428, where=topology(without_b=not observed))
    assert verdict.kind is Kind.UNDERLAY
    assert verdict.cause.endswith("; of 1428 bytes: does a small probe come through (MTU)?")


def test_other_ends() -> None:
    recorder = Recorder()
    assert judged(recorder).kind is Kind.UNKNOWN
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, packets.syn())
    verdict = judged(recorder)
    assert verdict.cause == "the probe left client and never reached node-a"
    recorder.hop(XMIT, CLIENT_NS, UPLINK, packets.syn(), rc=16)
    assert "driver refused" in judged(recorder).cause
    recorder.hop(RECEIVE, A_NS, UPLINK, packets.syn())
    assert judged(recorder).kind is Kind.UNKNOWN
    recorder.hop(CONSUME, A_NS, UPLINK, packets.syn())
    assert judged(recorder).cause.startswith("node-a took the packet itself")
    assert judged(Recorder(), Outcome.SEND_ERROR, detail="no route").kind is Kind.NOT_SENT


def test_a_packet_that_its_driver_freed_was_sent() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    recorder.hop(CONSUME, A_NS, UPLINK, packets.vxlan(NODE_A, NODE_B, packets.syn()))
    assert judged(recorder).kind is Kind.UNDERLAY


def test_the_next_hop_does_not_answer_arp() -> None:
    recorder = Recorder()
    recorder.hop(CONSUME, CLIENT_NS, UPLINK, packets.syn())  # the kernel's copy, to ask with
    verdict = judged(recorder)
    assert (verdict.kind, verdict.confidence) == (Kind.NOT_SENT, Confidence.LIKELY)
    assert verdict.cause == "client has not sent it: the next hop does not answer ARP"
    assert verdict.place == Place("client", "eth0")
    recorder.hop(QUEUE, CLIENT_NS, 1, packets.icmp_error(CLIENT, CLIENT, packets.syn(), code=1), skb=0xEE)
    detail = f"ICMP host unreachable from {CLIENT}"
    verdict = judged(recorder, Outcome.REFUSED, detail=detail)
    assert (verdict.cause, verdict.confidence) == (f"client itself refused: {detail}", Confidence.PROVEN)
    recorder.drop(CLIENT_NS, UPLINK, packets.syn(), NEIGH_FAILED)
    verdict = judged(recorder, Outcome.REFUSED, detail=detail)
    assert verdict.cause == f"client itself refused: {detail}; the next hop does not answer ARP"


def test_flooded_copies_are_left_out() -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, B_NS, UPLINK, packets.syn(), skb=0xCC)
    recorder.drop(B_NS, UPLINK, packets.syn(), OTHERHOST, skb=0xCC)
    to_pod(recorder)
    assert judged(recorder).kind is Kind.NO_REPLY


@pytest.mark.parametrize(
    ("function", "reasons", "hook"),
    [
        ("__dev_queue_xmit", {}, "tc egress"),
        ("sch_handle_ingress", {2: "SKB_DROP_REASON_NOT_SPECIFIED"}, "tc ingress"),
        ("tcp_v4_rcv", {}, ""),
        ("__dev_queue_xmit", REASONS, ""),
    ],
)
def test_without_tc_reasons_the_function_tells(function: str, reasons: dict[int, str], hook: str) -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    reason = 2 if reasons else events.NO_REASON
    recorder.drop(B_NS, CALI, packets.syn(dst=POD, dport=TARGET_PORT), reason, location=0xF00)
    verdict = judged(recorder, reasons=reasons, symbols={0xF00: f"{function}+0x10"})
    assert verdict.place == Place("node-b", "cali1", hook)
    assert verdict.by_calico == bool(hook)


def test_only_the_passage_that_denied_counts() -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    recorder.log(
        "cali1-----------I: New packet at ifindex=3; mark=0",
        "cali1-----------I: Final result=DENY (5). Program execution time: 9ns",
        "eth0------------I: New packet at ifindex=2; mark=0",
        "eth0------------I: Final result=ALLOW rc 7. Program execution time: 9ns",
    )
    recorder.drop(B_NS, CALI, packets.syn(dst=POD, dport=TARGET_PORT), TC_EGRESS)
    recorder.state(B_NS, packets.calico_state(reason=5))
    assert judged(recorder).calico_reason == "SHORT"
    assert judged(recorder).cause == "dropped by Calico: the packet is too short"


def test_the_client_closes_what_was_answered() -> None:
    recorder = Recorder()
    to_pod(recorder)
    back_to_node_b(recorder)
    recorder.hop(RECEIVE, CLIENT_NS, UPLINK, packets.syn_ack(), skb=0xBB)
    recorder.drop(CLIENT_NS, UPLINK, packets.syn_ack(), NO_SOCKET, skb=0xBB)
    rst = packets.tcp(CLIENT, SPORT, NODE_A, NODEPORT, 0x04, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(QUEUE, CLIENT_NS, UPLINK, rst, skb=0xDD)
    assert judged(recorder, Outcome.ANSWERED).kind is Kind.ANSWERED


def test_the_receiver_may_be_faster_than_the_senders_driver() -> None:
    recorder = Recorder()
    tunnelled = packets.vxlan(NODE_A, NODE_B, packets.syn())
    recorder.hop(QUEUE, A_NS, UPLINK, tunnelled)
    recorder.hop(RECEIVE, B_NS, UPLINK, tunnelled)
    recorder.hop(XMIT, A_NS, UPLINK, tunnelled)
    assert judged(recorder).cause == "not known: last seen arriving at node-b eth0; no drop was seen"


def test_xdp_at_the_receiver_leaves_a_doubt() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    verdict = judged(recorder, where=topology(xdp=True))
    assert (verdict.kind, verdict.confidence) == (Kind.UNDERLAY, Confidence.LIKELY)
    assert "XDP program of node-b" in verdict.cause


def test_a_passage_without_an_end_says_nothing() -> None:
    recorder = Recorder()
    recorder.hop(RECEIVE, B_NS, UPLINK, to_node_b(recorder))
    recorder.log("cali1-----------I: New packet at ifindex=3; mark=1000000")
    recorder.drop(B_NS, CALI, packets.syn(dst=POD, dport=TARGET_PORT), TC_EGRESS)
    verdict = judged(recorder)
    assert (verdict.confidence, verdict.cause) == (Confidence.LIKELY, "dropped by Calico: cause not recorded")
