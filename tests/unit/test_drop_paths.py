"""Every path on which Calico's programs drop a packet or let it pass: the state they leave, and what we make of it.

Fields as felix/bpf-gpl/tc.c, conntrack.h, parsing*.h and fib_co_re.h of master leave them. What these set in another
release is said beside the row.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODE_B, NODEPORT, POD, SPORT, TARGET_PORT, Recorder, state_of
from tests.unit.test_drops import joined, with_state
from tests.unit.test_verdict import B_NS, CALI, REASONS, TC_EGRESS, TC_INGRESS, UPLINK, topology

from calitrace.calico import reasons
from calitrace.calico.state import LAYOUTS, Layout, Side
from calitrace.correlate.drops import Cause, Confidence, Names, explain
from calitrace.report import drops as report

SHOT, UNSPEC, REDIR_BACK = 2, -1, 108
DENY, ALLOW, TAIL_CALL_FAILED = 2, 1, 10
MID_FLOW_MISS, ESTABLISHED, SNAT, DNAT, INVALID, MAGLEV_MISS = 1, 2, 4, 5, 6, 7
SYN_BIT, RPF_FAILED, TUNNEL_CHANGED = 0x1000, 0x200, 0x400
MAGLEV = 0x10000
TO_HOST, SUPPRESS_CT, SKIP_POLICY, HOST_PSNAT = 0x04, 0x10, 0x20, 0x40
AT = {
    Side.FROM_WEP: (CALI, TC_INGRESS),
    Side.TO_WEP: (CALI, TC_EGRESS),
    Side.FROM_HEP: (UPLINK, TC_INGRESS),
    Side.TO_HEP: (UPLINK, TC_EGRESS),
}
FROM_WEP, TO_WEP, FROM_HEP, TO_HEP = Side.FROM_WEP, Side.TO_WEP, Side.FROM_HEP, Side.TO_HEP

TO_POD = (CLIENT, SPORT, POD, TARGET_PORT)
TO_SERVICE = (CLIENT, SPORT, NODE_A, NODEPORT)
FROM_POD = (POD, TARGET_PORT, CLIENT, SPORT)
SYN, SERVICE_SYN = packets.tcp(*TO_POD, 2), packets.tcp(*TO_SERVICE, 2)
ACK, SERVICE_ACK, REPLY = packets.tcp(*TO_POD, 16), packets.tcp(*TO_SERVICE, 16), packets.tcp(*FROM_POD, 18)
BACKEND = (POD, TARGET_PORT)
PASSED = "cause not recorded"
CHAIN = "a program of Calico's tail-call chain is missing"
MID_FLOW = "mid-flow packet without conntrack entry"
NO_POLICY = "no policy program is loaded for the workload"


def fragment(raw: bytes, offset: int) -> bytes:
    """The same with a fragment's offset: at 0 more of them follow."""
    return raw[:6] + struct.pack("!H", offset or 0x2000) + raw[8:]


@dataclass
class Path:
    """One path. *raw*: the packet as it is when it is freed; *flow*, *kept*: of the state; *code*: its reason."""

    name: str
    side: Side
    raw: bytes
    flow: tuple[str, int, str, int]
    detail: str = ""  # the code's, if empty
    code: int = 0
    proto: int = 6
    sure: bool = True
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> str:
        return self.detail or reasons.MEANING[reasons.name(self.code, 27)]


def path(
    name: str, side: Side, raw: bytes, flow: tuple[str, int, str, int], detail: str = "", *, code: int = 0,
    proto: int = 6, sure: bool = True, **kept: Any,
) -> Path:  # fmt: skip
    return Path(name, side, raw, flow, detail, code, proto, sure, kept)


NOTHING = ("0.0.0.0", 0, "0.0.0.0", 0)
UDP_FIRST = fragment(packets.udp(*TO_POD, b"x" * 64), 0)
UDP_LATER = fragment(packets.udp(*TO_POD, b"x" * 64), 100)
ADDRESSES = (CLIENT, 0, POD, 0)
DENIED_IN_POLICY: dict[str, Any] = {"pol_rc": DENY, "result": UNSPEC, "rules": (7,)}
PATHS = [
    # calico_tc_main and pre_policy_processing
    path("QoS, before anything is read", FROM_WEP, REPLY, NOTHING, code=23, proto=0, sure=False),
    path("QoS, ARP", FROM_WEP, b"\0\1\x08\0", NOTHING, code=23, proto=0, sure=False),
    path("too short for an IP header", TO_WEP, SYN, NOTHING, code=5, proto=0, sure=False),
    path("IP header of less than 20 bytes", FROM_HEP, b"\x44" + SYN[1:], NOTHING, code=8, proto=0, sure=False),
    path("too short for TCP", FROM_HEP, SYN[:30], ADDRESSES, code=5, proto=6),
    path("no IP at a pod", FROM_WEP, b"\x81\0", NOTHING, "not an IP packet, from or to a pod", proto=0, sure=False),
    path("IPIP from an unknown host", FROM_HEP, packets.ip(CLIENT, NODE_B, 4, SYN), (CLIENT, 0, NODE_B, 0), "IPIP from or to a host that is no known node, or inside a tunnel", code=11, proto=4),
    path("IPIP from a pod", FROM_WEP, packets.ip(POD, NODE_B, 4, SYN), (POD, 0, NODE_B, 0), "a pod sends IPIP", code=11, proto=4),
    path("no frag program", FROM_HEP, UDP_FIRST, NOTHING, "cause not recorded", proto=0, sure=False),
    path("first fragment waits", FROM_HEP, UDP_FIRST, ADDRESSES, code=20, proto=17),
    path("fragment that is not supported", FROM_HEP, UDP_LATER, ADDRESSES, code=22, proto=17),
    path("later fragment without the first", FROM_WEP, UDP_LATER, ADDRESSES, code=21, proto=17),
    path("the same, its payload taken for ports", FROM_WEP, UDP_LATER, (CLIENT, 0x7878, POD, 0x7878), code=21, proto=17),
    path("tunnel from an unknown node", FROM_HEP, packets.vxlan(CLIENT, NODE_B, SYN), (CLIENT, 50000, NODE_B, 4789), "VXLAN from a source that is no known node, or with a checksum", code=11, proto=17),
    path("decapsulation failed", FROM_HEP, packets.vxlan(NODE_A, NODE_B, SYN), (NODE_A, 50000, NODE_B, 4789), code=10, proto=17, tunnel=NODE_A),
    # calico_ct_lookup and calico_tc_process_ct_lookup
    path("too short in the conntrack lookup", FROM_WEP, REPLY, FROM_POD, code=5, result=UNSPEC),
    path("the tunnel's source changed", FROM_HEP, ACK, TO_POD, "the source of the tunnel changed", ct_rc=DNAT | TUNNEL_CHANGED, tunnel=NODE_A),
    path("known flow, other host interface", FROM_HEP, ACK, TO_POD, "reverse path filter: it came in by an interface that conntrack does not expect", ct_rc=ESTABLISHED | RPF_FAILED),
    path("known flow, other pod", FROM_WEP, REPLY, FROM_POD, "reverse path filter: it came in by an interface that conntrack does not expect", ct_rc=ESTABLISHED | RPF_FAILED),
    path("mid-flow to a pod", TO_WEP, ACK, TO_POD, MID_FLOW, ct_rc=MID_FLOW_MISS),
    path("mid-flow out of an interface with policy", TO_HEP, REPLY, FROM_POD, f"{MID_FLOW}, to an interface that has policy", pol_rc=ALLOW, flags=SUPPRESS_CT, result=UNSPEC),
    path("no Maglev program", FROM_HEP, SERVICE_ACK, TO_SERVICE, CHAIN, ct_rc=MID_FLOW_MISS),
    path("source ranges", FROM_HEP, SERVICE_SYN, TO_SERVICE, reasons.NOT_IN_SOURCE_RANGES, code=11, nat=("0.0.0.0", 0)),
    path("host reverse path", FROM_HEP, SYN, TO_POD, "reverse path: its source may not come in by this interface (bpfEnforceRPF)", sure=False),
    path("host reverse path, a SYN of a known flow", FROM_HEP, SYN, TO_POD, "reverse path: its source may not come in by this interface (bpfEnforceRPF)", sure=False, ct_rc=ESTABLISHED | SYN_BIT),
    path("pod's reverse path", FROM_WEP, REPLY, FROM_POD, f"the source is not this pod's (reverse path), or {NO_POLICY}", sure=False),
    path("blackhole, Drop", FROM_HEP, SERVICE_SYN, TO_SERVICE, code=13),
    path("no policy program, from a pod", FROM_WEP, REPLY, FROM_POD, NO_POLICY, sure=False, flags=TO_HOST),
    path("no policy program, to a pod", TO_WEP, SYN, TO_POD, NO_POLICY, sure=False),
    path("no accepted program", TO_WEP, ACK, TO_POD, "cause not recorded (policy allow, conntrack ESTABLISHED)", ct_rc=ESTABLISHED, pol_rc=ALLOW, flags=SKIP_POLICY),
    # policy
    path("denied by policy", TO_WEP, SYN, TO_POD, "denied by policy: rule 0x0000000000000007", **DENIED_IN_POLICY),
    path("denied by policy, masqueraded to itself", TO_WEP, packets.tcp(NODE_B, SPORT, POD, TARGET_PORT, 2), (POD, SPORT, POD, TARGET_PORT), "denied by policy: rule 0x0000000000000007", masq=NODE_B, **DENIED_IN_POLICY),
    path("allowed, and no program behind it", TO_WEP, SYN, TO_POD, CHAIN, pol_rc=TAIL_CALL_FAILED, result=UNSPEC),
    # the accepted program
    path("too short when accepted", TO_WEP, SYN, TO_POD, code=5, pol_rc=ALLOW, result=UNSPEC),
    path("DSCP could not be set", FROM_WEP, REPLY, FROM_POD, code=6, pol_rc=ALLOW, result=UNSPEC),
    path("approved by one side only", TO_WEP, ACK, TO_POD, "invalid in conntrack", ct_rc=INVALID, pol_rc=ALLOW, flags=SKIP_POLICY),
    path("endpoint to host", FROM_WEP, REPLY, FROM_POD, "from a pod to its own host, which defaultEndpointToHostAction forbids", sure=False, pol_rc=ALLOW, flags=TO_HOST),
    path("conntrack is full", TO_WEP, SYN, TO_POD, code=16, pol_rc=ALLOW),
    # do_nat, which rewrites the packet
    path("backend without route", FROM_HEP, SERVICE_SYN, TO_SERVICE, code=12, nat=BACKEND, pol_rc=ALLOW),
    path("conntrack is full, towards a tunnel", FROM_HEP, SERVICE_SYN, (CLIENT, SPORT, NODE_B, NODEPORT), code=16, nat=BACKEND, pre_nat=(NODE_A, NODEPORT), pol_rc=ALLOW),
    path("the node's address is not known", FROM_HEP, SERVICE_SYN, (CLIENT, SPORT, NODE_B, NODEPORT), code=26, nat=BACKEND, pre_nat=(NODE_A, NODEPORT), pol_rc=ALLOW, ct_nat=("0.0.0.0", 0, CLIENT, SPORT)),
    path("encapsulation failed", FROM_HEP, SERVICE_SYN, (NODE_A, SPORT, NODE_B, NODEPORT), code=9, nat=BACKEND, pre_nat=(NODE_A, NODEPORT), pol_rc=ALLOW, ct_nat=("0.0.0.0", 0, CLIENT, SPORT)),
    path("encapsulation failed, source port changed", FROM_HEP, SERVICE_SYN, (NODE_A, SPORT, NODE_B, NODEPORT), code=9, nat=BACKEND, pre_nat=(NODE_A, NODEPORT), pol_rc=ALLOW, ct_nat=("0.0.0.0", 0, CLIENT, 20001)),
    path("encapsulation failed on the way back", FROM_WEP, packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 18), (NODE_B, TARGET_PORT, NODE_A, SPORT), code=9, pre_nat=(CLIENT, SPORT), pol_rc=ALLOW, ct_rc=SNAT, ct_nat=(NODE_A, NODEPORT, CLIENT, SPORT)),
    path("the node's address is not known, back", FROM_WEP, packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 18), FROM_POD, code=26, pol_rc=ALLOW, ct_rc=SNAT, ct_nat=(NODE_A, NODEPORT, CLIENT, 0)),
    path("checksum, back, source port restored", TO_HEP, packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 18), (POD, TARGET_PORT, CLIENT, 20001), code=6, pol_rc=ALLOW, ct_rc=SNAT, ct_nat=(NODE_A, NODEPORT, CLIENT, SPORT)),
    # forward_or_drop, which leaves the result as it was
    path("the way out is no ready interface", FROM_HEP, SYN, TO_POD, code=28, pre_nat=(NODE_A, NODEPORT), nat=BACKEND, pol_rc=ALLOW, result=UNSPEC, ct_nat=("0.0.0.0", 0, CLIENT, SPORT)),
    path("the same, source port changed", FROM_HEP, packets.tcp(CLIENT, 20001, *BACKEND, 2), TO_POD, code=28, pre_nat=(NODE_A, NODEPORT), nat=BACKEND, pol_rc=ALLOW, result=UNSPEC, ct_nat=("0.0.0.0", 0, CLIENT, 20001)),
    path("the path through bpfin.cali", TO_HEP, SYN, TO_POD, code=29, pol_rc=ALLOW, result=UNSPEC),
    path("too short to forward", FROM_HEP, SYN, TO_POD, code=5, pol_rc=ALLOW, result=UNSPEC),
    path("too short for an ICMP error", FROM_WEP, SYN, TO_POD, code=5, pol_rc=ALLOW, result=REDIR_BACK),
    # Maglev and host source port conflicts
    path("Maglev without backend", FROM_HEP, SERVICE_SYN, TO_SERVICE, code=25, result=UNSPEC),
    path("Maglev's backend without route", FROM_HEP, SERVICE_ACK, TO_SERVICE, "Maglev's backend is not in Calico's routes map", ct_rc=MID_FLOW_MISS, ct_flags=MAGLEV, nat=BACKEND, result=UNSPEC),
    path("conflict that conntrack does not know", TO_HEP, ACK, TO_POD, "unexpected conntrack result", ct_rc=INVALID, flags=HOST_PSNAT, result=UNSPEC),
]  # fmt: skip
# What Calico let pass: that it was dropped then, no word of its state says why.
LET_PASS = [
    path("mid-flow to the host: Linux decides", FROM_HEP, ACK, TO_POD, ct_rc=MID_FLOW_MISS, result=UNSPEC),
    path("mid-flow from a pod: Linux decides", FROM_WEP, REPLY, FROM_POD, ct_rc=MID_FLOW_MISS, result=UNSPEC),
    path("not conntracked, to the host", FROM_HEP, ACK, TO_POD, ct_rc=INVALID, pol_rc=ALLOW, flags=SKIP_POLICY, result=UNSPEC),
    path("Maglev takes a flow over", FROM_HEP, ACK, TO_POD, ct_rc=MAGLEV_MISS, ct_flags=MAGLEV, pol_rc=ALLOW, result=UNSPEC),
    path("Maglev from another node", FROM_HEP, ACK, TO_POD, ct_rc=DNAT | TUNNEL_CHANGED, ct_flags=MAGLEV, pol_rc=ALLOW, result=UNSPEC),
    path("mid-flow out of an interface without policy", TO_HEP, REPLY, FROM_POD, pol_rc=ALLOW, flags=SUPPRESS_CT | SKIP_POLICY, result=UNSPEC),
    path("a source that a pod may have", FROM_WEP, REPLY, FROM_POD, pol_rc=ALLOW, flags=SUPPRESS_CT, result=UNSPEC),
    path("blackhole, Reject: an ICMP error", FROM_HEP, packets.icmp_error(NODE_A, CLIENT, SERVICE_SYN), (NODE_A, 0, CLIENT, 0), code=13, proto=1, result=UNSPEC),
    path("no backend: an ICMP error", FROM_HEP, packets.icmp_error(NODE_A, CLIENT, SERVICE_SYN), (NODE_A, 0, CLIENT, 0), proto=1, result=UNSPEC),
    path("too big: back to the pod", FROM_WEP, packets.icmp_error(NODE_B, POD, REPLY, 3, 4), (NODE_B, 0, POD, 0), proto=1, result=REDIR_BACK),
    path("a limit of connections: a RST", TO_WEP, packets.tcp(*FROM_POD, 20), FROM_POD, pol_rc=ALLOW, result=REDIR_BACK),
    path("into the tunnel", FROM_HEP, packets.vxlan(NODE_A, NODE_B, SERVICE_SYN), (NODE_A, 50000, NODE_B, 4789), proto=17, pol_rc=ALLOW, result=109, pre_nat=(NODE_A, NODEPORT), nat=BACKEND),
]  # fmt: skip


def cause_of(case: Path, table: Layout = LAYOUTS[0]) -> Cause:
    """What we make of it, where Calico's program is alone at the hook."""
    ifindex, reason = AT[case.side]
    recorder = Recorder()
    recorder.drop(B_NS, ifindex, case.raw, reason)
    recorder.state(B_NS, state_of(table, case.flow, case.proto, reason=case.code, **case.kept))
    (dropped,) = joined(recorder)
    return explain(dropped.event, [], dropped.state, with_state(table), Names(REASONS, {0: "f+0x1"}))


@pytest.mark.parametrize("case", PATHS, ids=lambda each: each.name)
def test_a_drop_of_calicos(case: Path) -> None:
    cause = cause_of(case)
    assert (cause.detail, cause.by_calico) == (case.expected, True)
    assert cause.confidence is (Confidence.PROVEN if case.sure else Confidence.LIKELY)
    assert cause.calico_reason == (
        reasons.name(case.code, 27) if case.code else "DROPPED_BY_POLICY" * bool(cause.rules)
    )


@pytest.mark.parametrize("case", LET_PASS, ids=lambda each: each.name)
def test_what_calico_let_pass_is_no_cause(case: Path) -> None:
    cause = cause_of(case)
    assert (cause.detail, cause.sources, cause.recorded) == (PASSED, ("hook",), False)
    assert cause.evidence[-1] == "Calico's program that wrote this state let the packet pass"


ALSO_FOREIGN = [each for each in PATHS if each.side is TO_WEP and each.sure]


@pytest.mark.parametrize("case", ALSO_FOREIGN, ids=lambda each: each.name)
def test_another_program_at_the_hook_is_not_blamed_for_it(case: Path) -> None:
    """Where the state says so by itself, whoever else is there."""
    recorder = Recorder()
    recorder.drop(B_NS, CALI, case.raw, TC_EGRESS)
    recorder.state(B_NS, state_of(LAYOUTS[0], case.flow, case.proto, reason=case.code, **case.kept))
    (dropped,) = joined(recorder)
    where = topology(foreign=True)
    cause = explain(dropped.event, [], dropped.state, where, Names(REASONS, {0: "f+0x1"}))
    assert (cause.detail, cause.by_calico) == (case.expected, True)


OLDER = [each for each in LAYOUTS if each.fwd is None and each.has_pre_nat]


@pytest.mark.parametrize("table", OLDER, ids=lambda each: each.releases)
@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("known flow, other host interface", ""),
        ("mid-flow to a pod", ""),
        ("mid-flow out of an interface with policy", ""),
        ("approved by one side only", ""),
        ("endpoint to host", ""),
        ("allowed, and no program behind it", ""),
        ("conntrack is full", "cause not recorded (policy allow, conntrack NEW)"),
        ("no policy program, to a pod", "cause not recorded (policy no match, conntrack NEW)"),
        ("mid-flow to the host: Linux decides", "cause not recorded (policy no match, conntrack MID_FLOW_MISS)"),
        ("not conntracked, to the host", "cause not recorded (policy allow, conntrack INVALID)"),
    ],
)
def test_releases_that_keep_no_result(table: Layout, name: str, detail: str) -> None:
    """Up to v3.31 the state tells neither reason nor result: what it tells besides is the same."""
    (case,) = (each for each in PATHS + LET_PASS if each.name == name)
    assert cause_of(case, table).detail == (detail or case.expected)


def test_no_reverse_path_is_asked_of_what_comes_through_bpfout() -> None:
    found = topology()
    node = found.namespaces[B_NS]
    for name, detail in (("eth1", "reverse path"), ("bpfout.cali", "cause not recorded (policy no match")):
        found.namespaces[B_NS] = replace(node, links={UPLINK: replace(node.links[UPLINK], name=name)})
        recorder = Recorder()
        recorder.drop(B_NS, UPLINK, SYN, TC_INGRESS)
        recorder.state(B_NS, state_of(LAYOUTS[0], TO_POD, 6))
        (dropped,) = joined(recorder)
        assert explain(dropped.event, [], dropped.state, found, Names(REASONS)).detail.startswith(detail)


def test_ipv6_to_a_pod_where_only_ipv4_is_loaded() -> None:
    """The program for IPv4 wrote the state, in its layout."""
    six = b"\x60\0\0\0\0\x08\x11\x40" + bytes(15) + b"\1" + bytes(15) + b"\2" + struct.pack("!HHHH", 1, 2, 8, 0)
    for side, detail in ((TO_WEP, "IPv6 traffic of a pod while IPv6 is off"), (TO_HEP, "cause not recorded")):
        case = path("", side, six, NOTHING, detail, proto=0)
        cause = cause_of(case)
        assert (cause.detail, cause.confidence) == (detail, Confidence.LIKELY)
    ours = path("", TO_WEP, six, ("::", 0, "::", 0), code=23, proto=0)  # and here the one for IPv6
    assert cause_of(ours).calico_reason == "DROPPED_BY_QOS"


def test_xdp_s_pass_has_the_number_of_tc_s_drop() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, SYN, 2, location=5)
    recorder.state(B_NS, state_of(LAYOUTS[0], TO_POD, 6, pol_rc=ALLOW, result=2))
    recorder.drop(B_NS, UPLINK, SYN, 2, location=5)
    recorder.state(B_NS, state_of(LAYOUTS[0], TO_POD, 6, pol_rc=DENY, result=2))
    names = Names(REASONS, {5: "do_xdp_generic+0x2"})
    accepted, denied = (explain(each.event, [], each.state, topology(), names) for each in joined(recorder))
    assert (accepted.by_calico, denied.by_calico, denied.detail) == (False, True, "denied by policy")


@pytest.mark.parametrize("function", ["skb_do_redirect+0x1", "__bpf_redirect+0x9", "bpf_out_neigh_v4+0x5"])
def test_a_redirect_that_the_kernel_could_not_do(function: str) -> None:
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, SYN, 2, location=5)
    (dropped,) = joined(recorder)
    cause = explain(dropped.event, [], None, topology(), Names(REASONS, {5: function}))
    assert cause.text == (
        f"dropped by the kernel, which could not redirect it as a BPF program told it to: NOT_SPECIFIED in {function}"
    )
    assert (cause.by_calico, cause.place.hook) == (False, "")


def test_a_netkit_device_drops_as_its_program_does() -> None:
    names = Names(REASONS, {5: "netkit_xmit+0x1"})
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, 2, location=5)
    recorder.drop(B_NS, CALI, SYN, 2, location=5)
    recorder.state(B_NS, state_of(LAYOUTS[0], TO_POD, 6, pol_rc=DENY, result=UNSPEC))
    drops = joined(recorder)
    unseen, calicos = (explain(each.event, [], each.state, topology(), names) for each in drops)
    assert " cali1 nk " in report.table_lines(drops[0], unseen, "12:00:00.123", names)[0]
    assert unseen.detail == "netkit device: by its program, which we do not see, or because its peer is down"
    assert (unseen.by_calico, unseen.confidence, unseen.place.hook) == (False, Confidence.NONE, "netkit")
    assert (calicos.by_calico, calicos.detail) == (True, "denied by policy")


def test_the_kernels_reason_for_xdp() -> None:
    recorder = Recorder()
    recorder.drop(B_NS, UPLINK, SYN, 60)
    (dropped,) = joined(recorder)
    cause = explain(dropped.event, [], None, topology(xdp=True), Names({**REASONS, 60: "SKB_DROP_REASON_XDP"}))
    assert (cause.place.hook, cause.detail) == ("XDP", "XDP program: x; none of them is Calico's")
