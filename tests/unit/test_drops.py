"""One dropped packet to its cause, and how it is shown; table-driven, on raw events."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODE_B, POD, SPORT, TARGET_PORT, Recorder, calico_state, state_of
from tests.unit.test_verdict import A_NS, B_NS, CALI, NO_SOCKET, REASONS, RULE, TC_EGRESS, TC_INGRESS, UPLINK, topology

from calitrace.calico import pods, state
from calitrace.cli import drops
from calitrace.correlate import noise
from calitrace.correlate.drops import Cause, Confidence, Dropped, Joiner, Names, Place, explain, stack
from calitrace.decode import decode
from calitrace.events import NO_REASON
from calitrace.kernel.collectors import Collectors, Plan
from calitrace.model import Cell
from calitrace.report import drops as report
from calitrace.report.pcapng import LINKTYPE_RAW, Writer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calitrace.model import Topology

SYN = packets.syn(dst=POD, dport=TARGET_PORT)
FLOW = (CLIENT, SPORT, POD, TARGET_PORT)
TUNNEL = (NODE_A, 50000, NODE_B, 4789)
DENIED_LOG = (
    "cali1-----------E: New packet at ifindex=3; mark=0",
    f"cali1-----------E: TCP; ports: s={SPORT} d={TARGET_PORT}",
    "cali1-----------E: Final result=DENY (11). Program execution time: 7ns",
)


def joined(recorder: Recorder) -> list[Dropped]:
    """All drops of a recording, in order."""
    joiner = Joiner()
    found: list[Dropped] = []
    for raw in recorder.records:
        found += joiner.feed(decode(raw), raw)
    return found + list(joiner.flush(everything=True))


def causes(recorder: Recorder, where: Topology | None = None, rules: dict[int, str] | None = None) -> list[Cause]:
    """Their causes."""
    names = Names(REASONS, {0: "some_function+0x1"}, rules or {})
    return [explain(d.event, d.passages, d.state, where or topology(), names) for d in joined(recorder)]


def with_conntrack(rc: int, raw: bytes) -> bytes:
    """A state whose ct_result.rc is *rc*."""
    changed = bytearray(raw)
    struct.pack_into("<h", changed, 376, rc)
    return bytes(changed)


@pytest.mark.parametrize(
    ("kept", "reason", "detail", "confidence"),
    [
        (calico_state(pol_rc=2, rules=(7, RULE)), "DROPPED_BY_POLICY", "denied by policy: deny-all rule 0", "proven"),
        (calico_state(reason=12), "RT_UNKNOWN", "the backend is not in Calico's routes map", "proven"),
        (with_conntrack(6, calico_state()), "", "invalid in conntrack", "proven"),
        (with_conntrack(1, calico_state()), "", "mid-flow packet without conntrack entry", "proven"),
        (with_conntrack(1, calico_state(result=-1)), "", "cause not recorded", "likely"),  # Linux decides
        (
            with_conntrack(0x202, calico_state()),
            "",
            "reverse path filter: it came in by an interface that conntrack does not expect",
            "proven",
        ),
        (calico_state(pol_rc=1), "", "cause not recorded (policy allow, conntrack NEW)", "proven"),
        (calico_state(result=0), "", "cause not recorded", "likely"),  # left by a program that let it pass
        (bytes(444) + struct.pack("<iII", 2, 0, 8) + bytes(56), "IP_MALFORMED", "malformed IP packet", "likely"),
        (calico_state(number=9, reason=11), "", "cause not recorded", "likely"),  # of another packet: not believed
    ],
)
def test_what_calicos_state_tells(kept: bytes, reason: str, detail: str, confidence: str) -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, kept)
    (cause,) = causes(recorder, rules={RULE: "deny-all rule 0"})
    assert (cause.by_calico, cause.calico_reason, cause.detail) == (True, reason, detail)
    assert (cause.confidence.value, cause.skb_drop_reason) == (confidence, "TC_EGRESS")
    seems = ", it seems" if cause.evidence[-1].endswith("let the packet pass") else ""
    assert cause.text == f"dropped by Calico{seems}: {detail}"


@pytest.mark.parametrize(
    ("kind", "ports", "said"),
    [
        (60, (SPORT, TARGET_PORT), True),
        (44, (3, 4), True),  # those that Calico reads, 8 bytes too far
        (44, (SPORT, TARGET_PORT), False),
    ],
)
def test_ipv6_extension_headers_as_calico_reads_them(kind: int, ports: tuple[int, int], said: bool) -> None:
    payload = struct.pack("!8H", SPORT, TARGET_PORT, 16, 0, 3, 4, 0, 0)
    raw = packets.ip6("fd00::1", "fd00::2", 17, (kind, bytes(7)), payload=payload)
    recorder = Recorder()
    recorder.drop(B_NS, CALI, raw, TC_EGRESS)
    recorder.state(B_NS, state_of(state.LAYOUTS[0], ("fd00::1", ports[0], "fd00::2", ports[1]), 17, reason=11))
    recorder.log(
        "IPv6 cali1-----------I: New packet at ifindex=3; mark=0",
        f"IPv6 cali1-----------I: UDP; ports: s={ports[0]} d={ports[1]}",
        "IPv6 cali1-----------I: Final result=DENY (11). Program execution time: 7ns",
    )
    recorder.drop(B_NS, CALI, raw, TC_EGRESS)
    for cause, source in zip(causes(recorder), ("state", "log"), strict=True):
        assert (cause.calico_reason, cause.sources) == (("UNAUTH_SOURCE", (source,)) if said else ("", ("hook",)))


@pytest.mark.parametrize(
    ("vni", "calico", "left"),
    [
        (4096, True, "VXLAN on UDP 4789 with VNI 4096: Calico's NodePort tunnel has 13242816, and no VXLAN device here "
         "that one"),
        (0xCA11C0, False, "VXLAN on UDP 4789: no Calico program is at eth0 tc ingress to take it out of its tunnel"),
        (0xCA11C0, True, "VXLAN on UDP 4789: Calico's program did not take it for its tunnel: has this node another "
         "vxlanPort?"),
    ],
)  # fmt: skip
def test_a_tunnel_that_is_left_to_the_host(vni: int, calico: bool, left: str) -> None:
    """What the packet inside has in common with NO_SOCKET is nothing: the tunnel was not recognised."""
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, packets.vxlan(NODE_A, NODE_B, packets.syn(), vni), NO_SOCKET, location=0xF00)
    where = topology()
    if not calico:
        node = where.namespaces[B_NS]
        node.links[UPLINK] = replace(node.links[UPLINK], calico={})
    (dropped,) = joined(recorder)
    cause = explain(dropped.event, [], None, where, Names(REASONS, {0xF00: "__udp4_lib_rcv+0x4bc"}))
    assert cause.text == f"dropped by the kernel, not by Calico: NO_SOCKET in __udp4_lib_rcv+0x4bc; {left}"
    assert cause.detail == f"{left} in __udp4_lib_rcv"


@pytest.mark.parametrize(
    ("reason", "meaning"), [("UDP_CSUM", ""), ("SOCKET_RCVBUFF", " (the socket's receive buffer is full)")]
)
def test_a_tunnel_that_a_socket_did_not_take_was_not_left_to_nobody(reason: str, meaning: str) -> None:
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, packets.vxlan(NODE_A, NODE_B, packets.syn(), 4096), 9, location=0xF00)
    (dropped,) = joined(recorder)
    cause = explain(dropped.event, [], None, topology(), Names({9: reason}, {0xF00: "udp_queue_rcv_one_skb+0x12"}))
    assert cause.text == f"dropped by the kernel, not by Calico: {reason} in udp_queue_rcv_one_skb+0x12{meaning}"
    assert cause.detail == f"{reason} in udp_queue_rcv_one_skb"


@pytest.mark.parametrize(
    ("function", "reason", "said"),
    [
        ("__udp4_lib_rcv", NO_REASON, "; no socket, it seems: VXLAN on UDP 4789 with VNI 4096: "),
        ("udp_queue_rcv_one_skb", NO_REASON, ""),  # there was a socket, whose buffer may be full
        ("__udp4_lib_rcv", 2, ""),  # not specified: this kernel would say that there is no socket
    ],
)
def test_a_kernel_without_reasons_does_not_say_that_nothing_wanted_a_tunnel(
    function: str, reason: int, said: str
) -> None:
    """What UDP drops there may have a wrong checksum as well, and be a tunnel that is taken else."""
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, packets.vxlan(NODE_A, NODE_B, packets.syn(), 4096), reason, location=0xF00)
    (dropped,) = joined(recorder)
    cause = explain(dropped.event, [], None, topology(), Names(REASONS, {0xF00: f"{function}+0x12"}))
    assert (said in cause.text, "VXLAN" in cause.text, "VXLAN" in cause.detail) == (True, bool(said), bool(said))
    assert cause.confidence is (Confidence.LIKELY if said else Confidence.PROVEN)


def test_a_later_fragment_has_no_ports() -> None:
    """What Calico takes for ports in it is payload: the state is known by its addresses."""
    recorder = Recorder()
    fragment = bytearray(packets.udp(CLIENT, 1, POD, 2, bytes(64)))
    fragment[7] = 100
    recorder.drop(B_NS, CALI, bytes(fragment), TC_EGRESS)
    recorder.state(B_NS, state_of(state.LAYOUTS[0], (CLIENT, 777, POD, 888), 17, reason=4, result=2, pol_rc=2))
    recorder.drop(B_NS, CALI, bytes(fragment), TC_EGRESS)
    recorder.state(B_NS, state_of(state.LAYOUTS[0], (CLIENT, 777, POD, 888), 17, reason=21, result=2))
    recorder.drop(B_NS, CALI, bytes(fragment), TC_EGRESS)
    recorder.state(B_NS, state_of(state.LAYOUTS[0], (CLIENT, 777, POD, 888), 17, reason=12, result=2))
    cause, reordered, unroutable = causes(recorder)
    assert unroutable.detail == "the backend is not in Calico's routes map"
    assert reordered.detail == "a fragment came before the first one of its packet"
    assert (cause.calico_reason, cause.sources) == ("DROPPED_BY_POLICY", ("state",))
    assert cause.detail.startswith("denied by policy; a later fragment has no ports")
    dropped, *_ = joined(recorder)
    assert str(dropped.event.packet.inner) == f"udp later fragment {CLIENT} > {POD}"


@pytest.mark.parametrize(
    ("port", "table", "meaning"),
    [
        (51820, state.LAYOUTS[0], "UDP to WireGuard's port"),
        (51000, state.LAYOUTS[0], "the source is not allowed"),
        (51820, state.LAYOUTS[1], "the source is not allowed"),  # before v3.32
    ],
)
def test_wireguard_from_no_node(port: int, table: state.Layout, meaning: str) -> None:
    recorder = Recorder()
    recorder.log(
        "eth0------------I: New packet at ifindex=2; mark=0",
        f"eth0------------I: UDP; ports: s=51820 d={port}",
        "eth0------------I: Final result=DENY (11). Program execution time: 7ns",
    )
    recorder.drop(B_NS, UPLINK, packets.udp(CLIENT, 51820, NODE_B, port), TC_INGRESS)
    flow = (CLIENT, 51820, NODE_B, port)
    recorder.state(B_NS, state_of(table, flow, 17, reason=11, result=2))
    where = topology()
    node = where.namespaces[B_NS]
    where.namespaces[B_NS] = replace(node, state_name=table.map_name, state_bytes=table.size)
    (cause,) = causes(recorder, where)
    assert cause.calico_reason == "UNAUTH_SOURCE"
    assert cause.detail.startswith(meaning)


def test_the_kernels_reasons_in_words() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, SYN, NO_SOCKET)
    recorder.drop(B_NS, UPLINK, packets.udp(*FLOW), NO_SOCKET, location=0xF00)
    names = Names(REASONS, {0xF00: "__udp4_lib_rcv+0x4bc"})
    texts = [explain(each.event, [], None, topology(), names).text for each in joined(recorder)]
    assert [text.partition(" in ")[2] for text in texts] == [
        "0x0 (nothing listens there)",
        "__udp4_lib_rcv+0x4bc (nothing listens there)",
    ]


def test_the_capture_is_what_a_filter_reads() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    assert joined(recorder)[0].capture == SYN


def test_the_state_of_another_buffer_is_left_out() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS, skb=0xAA)
    recorder.state(B_NS, calico_state(reason=11), skb=0xBB)
    assert [each.sources for each in causes(recorder)] == [("hook",)]


def test_log_and_state_and_their_disagreement() -> None:
    recorder = Recorder()
    recorder.log(*DENIED_LOG)
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, calico_state(reason=12))
    recorder.log(*DENIED_LOG)
    recorder.drop(B_NS, CALI, packets.syn(3, dst=POD, dport=TARGET_PORT), TC_EGRESS)  # not the packet of that log
    recorder.log(*DENIED_LOG[:2])
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    first, second, third = causes(recorder)
    assert (first.calico_reason, first.sources) == ("UNAUTH_SOURCE", ("log", "state"))
    assert "the log and the state disagree: the state says reason 12" in first.evidence
    assert (second.calico_reason, second.sources, second.confidence) == ("", ("hook",), Confidence.LIKELY)
    assert (third.calico_reason, third.sources) == ("", ("hook",))


def test_a_reason_of_a_release_without_counters_has_its_name() -> None:
    recorder = Recorder()
    recorder.log("calif00d-I: Final result=DENY (ed). Program execution time: 1622ns")
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    found = topology()
    node = found.namespaces[B_NS]
    found.namespaces[B_NS] = replace(node, reasons=0, links={CALI: replace(node.links[CALI], name="calif00dbeef012")})
    (cause,) = causes(recorder, found)
    assert (cause.calico_reason, cause.sources) == ("UNAUTH_SOURCE", ("log",))


def test_a_state_without_addresses_is_taken_only_where_calico_is_alone() -> None:
    """It may be of any packet: a left-over one must not blame Calico for another program's drop."""
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, state_of(state.LAYOUTS[0], ("0.0.0.0", 0, "0.0.0.0", 0), 0, reason=8, result=2))
    for where, by_calico in (
        (topology(), True),
        (topology(foreign=True), False),
        (topology(foreign=True, calico=False), False),
    ):
        (cause,) = causes(recorder, where)
        assert (cause.by_calico, cause.calico_reason) == (by_calico, "IP_MALFORMED" if by_calico else "")


def test_a_state_that_let_pass_where_only_calico_is() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, calico_state(pol_rc=1, result=0))
    (cause,) = causes(recorder)
    assert (cause.text, cause.confidence) == ("dropped by Calico, it seems: cause not recorded", Confidence.LIKELY)
    assert cause.evidence[-1] == "Calico's program that wrote this state let the packet pass"


def test_only_the_last_passage_can_have_led_to_the_drop() -> None:
    recorder = Recorder()
    recorder.log(*DENIED_LOG)
    recorder.log(*(line.replace("DENY (11)", "ALLOW rc 0") for line in DENIED_LOG))
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    assert [each.sources for each in causes(recorder)] == [("hook",)]


@pytest.mark.parametrize(
    ("line", "sources"),
    [
        (f"no counters for {CALI}: DROP", ("log",)),
        (f"no counters for {CALI + 1}: DROP", ("hook",)),
        ("Main program not loaded for IP packet version 2048, DROP", ("log",)),
    ],
)
def test_a_denial_without_a_tag(line: str, sources: tuple[str, ...]) -> None:
    recorder = Recorder()
    recorder.log(line)
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    (cause,) = causes(recorder)
    assert (cause.by_calico, cause.sources, cause.recorded) == (True, sources, sources == ("log",))
    assert (f"untagged: {line}" in cause.evidence) == (sources == ("log",))


@pytest.mark.parametrize(
    ("where", "detail", "confidence"),
    [
        (topology(foreign=True), "tc program: cali_tc_preambl, other_prog; which of them is not known", "none"),
        (topology(foreign=True, calico=False), "tc program: other_prog; none of them is Calico's", "likely"),
        (topology(calico=False), "a tc program that we did not see attached", "none"),
        (topology(without_b=True), "a tc program that we did not see attached", "none"),
    ],
)
def test_other_programs_at_the_hook(where: Topology, detail: str, confidence: str) -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    (cause,) = causes(recorder, where)
    assert (cause.by_calico, cause.detail, cause.confidence.value) == (False, detail, confidence)


def test_what_calico_let_pass_to_another_program() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, calico_state(result=-1))
    (cause,) = causes(recorder, topology(foreign=True))
    assert (cause.by_calico, cause.confidence) == (False, Confidence.LIKELY)
    assert cause.detail == "tc program: other_prog, which Calico's program let it pass to"


def test_an_icmp_error_does_not_take_the_state_of_what_it_quotes() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, packets.icmp_error(NODE_A, CLIENT, SYN), TC_EGRESS)
    recorder.state(B_NS, calico_state(pol_rc=2, rules=(RULE,)))
    (cause,) = causes(recorder)
    assert cause.sources == ("hook",)
    assert "Calico's state held another packet by then: not used" in cause.evidence


@pytest.mark.parametrize("table", state.LAYOUTS, ids=lambda each: each.releases)
@pytest.mark.parametrize("proto", [6, 17, 1])
def test_the_state_of_every_release_is_evidence(table: state.Layout, proto: int) -> None:
    echo = packets.ip(CLIENT, POD, 1, b"\x08\0" * 4)
    raw = {6: SYN, 17: packets.udp(CLIENT, SPORT, POD, TARGET_PORT), 1: echo}[proto]
    flow = (CLIENT, SPORT, POD, TARGET_PORT) if proto != 1 else (CLIENT, 0, POD, 8)
    kept = state_of(table, flow, proto, nat=("10.65.9.9", 99), pol_rc=2, rules=(7, RULE), flags=4, reason=4)
    recorder = Recorder()
    recorder.drop(B_NS, CALI, raw, TC_EGRESS)
    recorder.state(B_NS, kept)
    (cause,) = causes(recorder, with_state(table), {7: "first", RULE: "deny-all rule 0"})
    assert (cause.calico_reason, cause.confidence, cause.sources) == (
        "DROPPED_BY_POLICY", Confidence.PROVEN, ("state",)
    )  # fmt: skip
    assert cause.rules == (("deny-all rule 0",) if table.rule_ids is not None else ())
    (line,) = [each for each in cause.evidence if each.startswith("Calico's state of this packet: ")]
    assert "policy deny" in line
    assert f"NAT to {'10.65.9.9:99' if proto != 1 else '10.65.9.9'}" in line
    assert "flags to this host" in line
    assert ("rules hit first, deny-all rule 0" in line) == (table.rule_ids is not None)
    assert ("reason DROPPED_BY_POLICY" in line) == (table.fwd is not None)
    assert ("reason not kept by this release" in line) == (table.fwd is None)


def with_state(table: state.Layout) -> Topology:
    """The topology with that release's state map on node B."""
    found = topology()
    node = replace(found.namespaces[B_NS], state_name=table.map_name, state_bytes=table.size)
    return replace(found, namespaces={**found.namespaces, B_NS: node})


def test_a_pod_and_its_host() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_INGRESS)
    flow = (CLIENT, SPORT, POD, TARGET_PORT)
    recorder.state(B_NS, state_of(state.LAYOUTS[0], flow, 6, pol_rc=1, flags=4))
    (cause,) = causes(recorder)
    assert cause.text == (
        "dropped by Calico, it seems: from a pod to its own host, which defaultEndpointToHostAction forbids"
    )
    assert (cause.confidence, cause.recorded, cause.sources) == (Confidence.LIKELY, False, ("state",))


def test_a_pod_without_a_policy_program() -> None:
    recorder = Recorder()
    for reason in (TC_EGRESS, TC_INGRESS):
        recorder.drop(B_NS, CALI, SYN, reason)
        recorder.state(B_NS, calico_state())
    to_pod, from_pod = causes(recorder)
    assert to_pod.text == "dropped by Calico, it seems: no policy program is loaded for the workload"
    assert (to_pod.confidence, to_pod.recorded, to_pod.sources) == (Confidence.LIKELY, False, ("state",))
    assert from_pod.detail == (
        "the source is not this pod's (reverse path), or no policy program is loaded for the workload"
    )


@pytest.mark.parametrize(
    ("raw", "kept", "ranges"),
    [
        (SYN, calico_state(reason=11), True),
        (packets.udp(CLIENT, SPORT, POD, TARGET_PORT), state_of(state.LAYOUTS[0], FLOW, 17, reason=11), False),
        (packets.vxlan(NODE_A, NODE_B, SYN), calico_state(reason=11), True),
        (packets.vxlan(NODE_A, NODE_B, SYN), state_of(state.LAYOUTS[0], TUNNEL, 17, reason=11), False),
    ],
)
def test_a_source_that_is_refused(raw: bytes, kept: bytes, ranges: bool) -> None:
    """Calico has one reason for the client of a service and for the other end of a tunnel."""
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, raw, TC_INGRESS)
    recorder.state(B_NS, kept)
    (cause,) = causes(recorder)
    known = "the source is not in the service's source ranges"
    assert cause.calico_reason == "UNAUTH_SOURCE"
    assert (cause.detail == known) is ranges
    tunnel = "VXLAN from a source that is no known node, or with a checksum"
    either = "the source is not allowed: source ranges, or a tunnel from an unknown node"
    assert ranges or cause.detail == (tunnel if dropped_in_tunnel(raw) else either)


def dropped_in_tunnel(raw: bytes) -> bool:
    """Whether the packet is VXLAN."""
    return raw[22:24] == (4789).to_bytes(2, "big")


@pytest.mark.parametrize("function", ["do_xdp_generic+0x12", "netif_receive_generic_xdp+0x1"])
def test_generic_xdp(function: str) -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, 2, location=5)
    (dropped,) = joined(recorder)
    where = topology()
    names = Names(REASONS, {5: function})
    cause = explain(dropped.event, [], None, where, names)
    assert (cause.by_calico, cause.detail) == (False, "an XDP program that we did not see attached")
    links = where.namespaces[B_NS].links
    links[CALI] = replace(links[CALI], calico={"xdp": ("cali_xdp_preamb",)})
    cause = explain(dropped.event, [], None, where, names)
    assert (cause.by_calico, cause.confidence, cause.place.hook) == (True, Confidence.LIKELY, "XDP")
    assert " xdp " in report.table_lines(dropped, cause, "12:00:00.123", names)[0]


def test_what_the_kernel_drops_is_never_calicos() -> None:
    recorder = Recorder()
    recorder.log(*DENIED_LOG)
    recorder.drop(B_NS, CALI, SYN, NO_SOCKET)
    recorder.state(B_NS, calico_state(reason=11))
    (cause,) = causes(recorder)
    assert (cause.by_calico, cause.calico_reason, cause.detail) == (False, "", "NO_SOCKET in some_function")


@pytest.mark.parametrize("lost", [0, 3])
def test_a_denial_is_not_joined_to_a_packet_before_lost_lines(lost: int) -> None:
    recorder = Recorder()
    other = ("New packet at ifindex=2; mark=0", f"IP s={CLIENT} d={NODE_A}", "TCP; ports: s=7 d=9")
    recorder.log(*(f"ens192----------I: {text}" for text in other))
    recorder.log("ens192----------I: Final result=DENY (11). Program execution time: 7ns", lost=lost)
    recorder.drop(A_NS, UPLINK, SYN, TC_INGRESS)
    (cause,) = causes(recorder)
    assert (cause.calico_reason, "log" in cause.sources) == (("UNAUTH_SOURCE", True) if lost else ("", False))


def test_a_drop_waits_for_its_state_until_the_second_flush() -> None:
    recorder, joiner = Recorder(), Joiner()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, calico_state(reason=12))
    first, second = recorder.records
    assert list(joiner.feed(decode(first), first)) == []
    assert list(joiner.flush()) == []
    assert [d.state is not None for d in joiner.feed(decode(second), second)] == [True]
    assert list(joiner.feed(decode(first), first)) == []
    assert list(joiner.flush()) == []
    assert [d.state for d in joiner.flush()] == [None]
    assert list(joiner.flush()) == []


@pytest.mark.parametrize(
    ("reason", "function", "raw", "why"),
    [
        ("NOT_SPECIFIED", "unix_release_sock+0x1", b"", "a UNIX socket was closed with data in it"),
        ("NO_SOCKET", "tcp_v4_rcv+0x91", packets.tcp(CLIENT, 1, NODE_A, 2, 0x14), "a RST for a connection"),
        ("NO_SOCKET", "tcp_v4_rcv+0x91", SYN, ""),
        ("NO_SOCKET", "tcp_v4_rcv+0x91", b"", ""),
        ("NO_SOCKET", "udp_queue_rcv_one_skb", packets.udp(CLIENT, 1, NODE_A, 2), ""),
        ("OTHERHOST", "ip_rcv_core", SYN, "flooded by a switch"),
        ("SOCKET_FILTER", "raw_rcv", SYN, "a raw socket"),
        ("SOCKET_FILTER", "udp_queue_rcv_one_skb", SYN, ""),
        ("UNHANDLED_PROTO", "__netif_receive_skb_core", b"", "a link-layer protocol"),
        ("UNHANDLED_PROTO", "__netif_receive_skb_core", SYN, ""),
        ("TC_INGRESS", "__netif_receive_skb_core", SYN, ""),
        ("NOT_SPECIFIED", "dev_queue", SYN, ""),
    ],
)
def test_harmless(reason: str, function: str, raw: bytes, why: str) -> None:
    recorder = Recorder()
    recorder.drop(A_NS, UPLINK, raw, 77, location=5)
    (dropped,) = joined(recorder)
    found = noise.why_harmless(dropped.event, Names({77: f"SKB_DROP_REASON_{reason}"}, {5: function}))
    assert found.startswith(why)
    assert bool(found) == bool(why)


def test_tc_drops_are_never_harmless() -> None:
    assert not {name for row in noise.TABLE for name in row.reasons} & {"TC_INGRESS", "TC_EGRESS"}


def test_conntrack_in_words() -> None:
    held = state.decode(with_conntrack(0x102, calico_state()), state.LAYOUTS[0])
    assert (held.conntrack, held.problem(None)) == ("ESTABLISHED, related", "")
    assert state.decode(with_conntrack(99, calico_state()), state.LAYOUTS[0]).conntrack == "result 99"


# -- shown ----------------------------------------------------------------------------------------------


def test_the_stack_begins_where_the_packet_was_dropped() -> None:
    recorder = Recorder()
    recorder.stack(B_NS, 5, 7, 8)
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS, location=7)
    recorder.state(B_NS, calico_state(pol_rc=2, rules=(RULE,)))
    recorder.stack(B_NS, 8, skb=1)
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS, skb=1, location=7)
    recorder.stack(B_NS, 8, skb=1)
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS, skb=2)
    recorder.stack(B_NS, 8, skb=3)
    recorder.now_ns += 1
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS, skb=3)  # another packet at that address: the stack's own drop was lost
    found = joined(recorder)
    assert [list(stack(each, Names(symbols={7: "f+0x1"}))) for each in found] == [["f+0x1", "0x8"], ["0x8"], [], []]
    assert [each.state is not None for each in found] == [True, False, False, False]


def test_lines_and_objects() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, calico_state(pol_rc=2, rules=(RULE,)))
    recorder.drop(A_NS, UPLINK, packets.vxlan(NODE_A, CLIENT, packets.udp(CLIENT, 5, POD, 53)), TC_INGRESS)
    recorder.drop(A_NS, 99, b"\0" * 40, NO_SOCKET)
    recorder.drop(A_NS, UPLINK, b"", NO_SOCKET)
    found = list(zip(joined(recorder), causes(recorder), strict=True))
    lines = [
        report.table_lines(dropped, cause, "12:00:00.123", Names(pods={"cali1": "default/web"}))[0].split(maxsplit=1)[1]
        for dropped, cause in found
    ]
    assert lines[0] == (
        f"cali1 out           tcp SYN {CLIENT}:{SPORT} > {POD}:8080 calico DROPPED_BY_POLICY rule {RULE:#018x} [state]"
        " default/web"
    )
    head, why = f"cali1 out           tcp SYN {CLIENT}:{SPORT} > {POD}:8080", "calico DROPPED_BY_POLICY"
    rule = f"{RULE:#018x} [state]"
    for width, shown in (
        (len(lines[0]) + 13, [lines[0]]),
        (len(lines[0]) + 12, [lines[0].removesuffix(" default/web")]),
        (120, [f"{head} {why} rule 0x000… [state]"]),
        (110, [f"{head} calico DROPPED_BY_POLICY … [state]"]),
        (109, [head, f"{why} rule {rule} default/web"]),
        (81, [head, f"{why} rule {rule} default/web"]),
        (80, [head, f"{why} rule {rule}"]),
        (70, [f"{head[:56]}…", f"{why} rule {rule}"]),
        (50, [f"{head[:36]}…", "calico DROPPED_BY_POLICY rul… [state]"]),
    ):
        found_lines = report.table_lines(*found[0], "12:00:00.123", Names(pods={"cali1": "default/web"}), width)
        assert max(map(len, found_lines)) <= width
        assert [line[13:] for line in found_lines] == shown
    assert report.short(found[0][1]) == f"{why} rule {rule}"
    titles = [len(report.header(width)) for width in (0, 80, 109, 110)]
    assert titles == [1, 2, 2, 1]
    assert report.fit("12345", 4) == "123…"
    assert [line.split("  ")[-1].strip() for line in lines[1:]] == [
        "calico cause not recorded [hook]",
        "NO_SOCKET in some_function [kernel]",
        "NO_SOCKET in some_function [kernel]",
    ]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["ens192", "in", "udp"],
        ["-", "40", "bytes,"],
        ["ens192", "no", "packet"],
    ]
    objects = [json.loads(report.dump(report.drop_object(d, c, "", 5, Names()))) for d, c in found]
    assert [o["calico_reason"] for o in objects] == ["DROPPED_BY_POLICY", None, None, None]
    assert (objects[0]["src"], objects[0]["sport"], objects[0]["proto"]) == (CLIENT, SPORT, "tcp")
    assert (objects[2]["src"], objects[2]["proto"], objects[2]["harmless"]) == (None, None, None)
    assert list(report.iter_explanation(found[0][1], "why"))[:2] == [
        f"    lab-node-b cali1 tc egress: dropped by Calico: denied by policy: rule {RULE:#018x} (proven)",
        "    harmless: why",
    ]
    assert len(list(report.iter_explanation(found[0][1], ""))) == 1 + len(found[0][1].evidence)
    assert next(report.iter_explanation(found[0][1], "", "default/web")).startswith(
        "    lab-node-b cali1 tc egress, pod default/web: dropped"
    )


def test_a_state_that_is_not_read_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Unwatching(Collectors):
        def watch_state(self, maps: Mapping[int, int]) -> dict[int, str]:
            return {A_NS: "its map has gone"} if maps == {A_NS: 7, B_NS: 8} else {}

    session = drops._Session(drops.Settings(**drops.command.make_context("drops", []).params))
    for _ in range(2):
        session._watch(topology(), Unwatching(Plan()))
    assert capsys.readouterr().err == "warning: Calico's own reasons are not read on lab-node-a: its map has gone\n"


def test_the_closing_line() -> None:
    assert report.Sums(9, 3, 2, 4).line() == "9 drops seen: 3 shown, 2 harmless, 4 filtered, 0 lost"
    interrupted = report.Sums(9, 3, 2, lost=1)
    interrupted.settle()
    assert interrupted.line() == "9 drops seen: 3 shown, 2 harmless, 0 filtered, 3 not looked at, 1 lost"
    sums = report.Sums(20, 3, 2, 4, 5, 1, 4, 2, 1, 0, 1, 10, 4567)
    assert sums.line() == (
        "20 drops seen: 3 shown, 2 harmless, 4 filtered, 5 rate-limited, 1 not sampled, 1 not decoded, 4 lost; "
        "2 stacks lost; 1 more in an interrupted program; our cost 457 ns a drop"
    )
    assert sums.to_object()["cost_ns"] == 456.7
    assert report.Sums().to_object()["cost_ns"] is None


def test_top() -> None:
    names = Names(REASONS, {1: "tcp_v4_rcv+0x91"})
    counts = {Cell(1, NO_SOCKET, UPLINK, A_NS, 6): 40, Cell(2, TC_EGRESS, 0, 0, 0): 2, Cell(2, 99, 7, A_NS, 99): 1}
    lines = list(report.iter_top(counts, 3, Counter({"calico X [state]": 2}), topology(), names, 2))
    assert lines == [
        "DROPS  REASON      FUNCTION    INTERFACE          PROTO",
        "   40  NO_SOCKET   tcp_v4_rcv  lab-node-a ens192  tcp",
        "    2  TC_EGRESS   0x2         -                  -",
        "    4  all others",
        "",
        "DETAILED  CAUSE [EVIDENCE]",
        "       2  calico X [state]",
    ]
    assert len(list(report.iter_top({}, 0, Counter(), topology(), names, 2))) == 1
    twice = {Cell(1, NO_SOCKET, UPLINK, A_NS, 6): 40, Cell(3, NO_SOCKET, UPLINK, A_NS, 6): 2}
    both = Names(REASONS, {1: "tcp_v4_rcv+0x91", 3: "tcp_v4_rcv+0x100"})
    assert [line.split()[0] for line in report.iter_top(twice, 0, Counter(), topology(), both, 2)] == ["DROPS", "42"]
    objects = [report.cell_object(cell, number, topology(), names) for cell, number in counts.items()]
    assert [(o["drops"], o["interface"], o["namespace"], o["hook"]) for o in objects] == [
        (40, "ens192", "lab-node-a", ""),
        (2, None, None, "tc egress"),
        (1, None, "lab-node-a", ""),
    ]


def test_place_as_text() -> None:
    assert str(Place("node", "eth0", "tc ingress")) == "node eth0 tc ingress"


# -- pcapng ---------------------------------------------------------------------------------------------


def blocks(raw: bytes) -> list[tuple[int, bytes]]:
    """(type, body) of each block; the lengths at both ends must agree."""
    found = []
    while raw:
        kind, length = struct.unpack_from("<II", raw)
        assert length % 4 == 0
        assert struct.unpack_from("<I", raw, length - 4) == (length,)
        found.append((kind, raw[8 : length - 4]))
        raw = raw[length:]
    return found


@given(st.binary(max_size=128), st.integers(0, 2**63), st.text(max_size=20))
def test_pcapng_blocks(raw: bytes, time_ns: int, comment: str) -> None:
    writer = Writer()
    text = writer.header("calitrace") + writer.packet("eth0", time_ns, raw, 1500, comment)
    text += writer.packet("eth0", time_ns, raw, 3, comment) + writer.packet("eth1", 0, raw, 3, "x" * 70000)
    section, first, packet, second, other, third = blocks(text)
    assert [each[0] for each in (section, first, packet, second, other, third)] == [0x0A0D0D0A, 1, 6, 6, 1, 6]
    assert struct.unpack_from("<IHH", section[1]) == (0x1A2B3C4D, 1, 0)
    assert struct.unpack_from("<H", first[1]) == (LINKTYPE_RAW,)
    interface, high, low, captured, length = struct.unpack_from("<IIIII", packet[1])
    assert (interface, high << 32 | low, captured, length) == (0, time_ns, len(raw), 1500)
    assert packet[1][20 : 20 + len(raw)] == raw
    at = 20 + len(raw) + -len(raw) % 4
    assert struct.unpack_from("<HH", packet[1], at) == (1, len(comment.encode()))
    assert packet[1][at + 4 :].startswith(comment.encode())
    assert struct.unpack_from("<IIIII", second[1])[4] == max(3, len(raw))
    assert struct.unpack_from("<I", third[1]) == (1,)


CNI = {
    "kind": "cniCacheV1",
    "ifName": "eth0",
    "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", "web-0"]],
    "result": {"interfaces": [{"name": "cali12d4a061371"}, {"name": "eth0"}], "ips": [{"address": "10.65.0.2/32"}]},
}


def test_pods_of_interfaces() -> None:
    assert pods.from_cni_result(json.dumps(CNI).encode()) == {"cali12d4a061371": "shop/web-0"}
    aws = [{"name": "eni5a1"}, {"name": "eth0", "sandbox": "/ns"}, {"name": "dummy5a1", "mac": "0", "sandbox": "0"}]
    assert pods.from_cni_result(json.dumps({**CNI, "result": {"interfaces": aws}}).encode()) == {"eni5a1": "shop/web-0"}
    for other in (b"", b"[]", b"{}", b'{"cniArgs": [], "result": null}', b"\xff"):
        assert pods.from_cni_result(other) == {}
    assert pods.interface_of("default", "podA") == "cali7f94ce7c295"  # as in Calico's own tests


@pytest.mark.parametrize(
    ("workloads", "hosts", "found"),
    [
        ("eni5a1 enifd02 eni0b3", "eth0 ens5", "eni"),
        ("eniabcdef123", "eth0", "eni"),
        ("gkeab12 lxccafe vethdeadbeef", "eth0", "gke lxc veth"),
        ("calicoab1 tapad2b1c", "eth0 tap0", "calico tapad2b1c"),
        ("azv5a1 cali9c2", "eth0", "azv cali"),
        ("veth5a1 p4p1 LXC7", "veth0 p1p1", "LXC7 p4p1 veth5a1"),  # the host's begin so too, or there is no beginning
        ("", "eth0", ""),
    ],
)
def test_how_pods_interfaces_begin(workloads: str, hosts: str, found: str) -> None:
    rows = [(each, True) for each in workloads.split()] + [(each, False) for each in hosts.split()]
    assert pods.prefixes(rows) == tuple(found.split())
