"""The command behind a verdict: with the names of the machine that recorded, and none where one is not known."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODEPORT, POD, RUN_ID, SPORT, TARGET_PORT, Recorder
from tests.unit.test_verdict import (
    A_NS,
    B_NS,
    CALI,
    CLIENT_NS,
    NO_SOCKET,
    POD_NS,
    REASONS,
    TC_INGRESS,
    UPLINK,
    denied_at_the_pod,
    to_node_b,
    to_pod,
    topology,
)

from calitrace import identity, journal
from calitrace.correlate.analysis import analyse
from calitrace.events import HopKind
from calitrace.model import Outcome

if TYPE_CHECKING:
    from calitrace.model import Topology

WALK = f"calitrace maps walk {CLIENT} {NODE_A}:{NODEPORT}/tcp --ingress ens192"
RULES = "/var/run/calico/bpf/policy/cali1_ingress_v4.json"


def advised(
    recorder: Recorder, outcome: Outcome = Outcome.UNANSWERED, *, where: Topology | None = None, proto: int = 6,
    sport: int = SPORT, detail: str = "", **header: Any,
) -> str:  # fmt: skip
    """The command behind the verdict on probe 0, in a report that shortens the namespaces' names."""
    probe = {
        "number": 0, "proto": proto, "src": CLIENT, "sport": sport, "dst": NODE_A, "dport": NODEPORT, "sent_ns": 1,
        "size_bytes": 40, "outcome": outcome.value, "rtt_ns": None, "detail": detail,
    }  # fmt: skip
    about = {"run_id": RUN_ID, "vxlan_port": 4789, "drop_reasons": REASONS, "topology": (where or topology()).to_map()}
    analysis = analyse(journal.Journal({**about, **header}, recorder.records, {0: probe}), short_names=True)
    return analysis.verdicts[0].next


def arrived(*lines: str) -> Recorder:
    """The probe is at node-a's uplink, where Calico has said this of it."""
    recorder = Recorder()
    recorder.hop(HopKind.QUEUE, CLIENT_NS, UPLINK, packets.syn())
    recorder.hop(HopKind.RECEIVE, A_NS, UPLINK, packets.syn())
    begin = (f"IP s={CLIENT} d={NODE_A}", f"TCP; ports: s={SPORT} d={NODEPORT}")
    recorder.log(*(f"ens192----------I: {each}" for each in ("New packet at ifindex=2; mark=0", *begin, *lines)))
    return recorder


def dropped(*lines: str) -> Recorder:
    """The same, and it is dropped there."""
    recorder = arrived(*lines)
    recorder.drop(A_NS, UPLINK, packets.syn(), TC_INGRESS)
    return recorder


NO_ROUTE = "Final result=DENY (12). Program execution time: 7ns"
REVERSE = ("Host RPF check rc 0 result 0", "Final result=DENY (0). Program execution time: 7ns")


def renamed(inum: int, name: str) -> Topology:
    """One namespace has another name."""
    where = topology()
    where.namespaces[inum] = replace(where.namespaces[inum], name=name)
    return where


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ([RULES], ""),
        (["/run/x y/cali1_ingress.json", "/run/x y/cali1_egress.json"], " --policy-dir '/run/x y'"),
        ([], None),
        ([RULES, "/run/other/cali1_ingress_v4.json"], None),  # of which node?
    ],
)
def test_the_rules_that_denied(files: list[str], options: str | None) -> None:
    recorder = Recorder()
    denied_at_the_pod(recorder, log=True, state=None)
    wanted = "" if options is None else f"calitrace maps policy dump cali1 ingress{options} --netns lab-node-b"
    assert advised(recorder, policy_files=files) == wanted


def test_of_a_host_endpoint_the_rules_file_is_not_known() -> None:
    recorder = dropped("DENY due to policy")
    assert advised(recorder, policy_files=["/p/ens192_ingress_v4.json", "/p/ens192_egress_v4.json"]) == ""


def test_the_lookups_that_found_nothing() -> None:
    assert advised(dropped(NO_ROUTE)) == f"{WALK} --netns lab-node-a"
    assert advised(dropped(NO_ROUTE), where=renamed(A_NS, "n1"), node="n1") == WALK
    refused = arrived("NAT: no backend")
    refused.hop(HopKind.QUEUE, A_NS, UPLINK, packets.icmp_error(NODE_A, CLIENT, packets.syn()))
    assert advised(refused, Outcome.REFUSED, detail="ICMP") == f"{WALK} --netns lab-node-a"


def test_what_the_node_took_for_itself() -> None:
    recorder = arrived()
    recorder.drop(A_NS, UPLINK, packets.syn(), NO_SOCKET)
    rst = packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(HopKind.QUEUE, A_NS, UPLINK, rst, skb=0xBB)
    assert advised(recorder, Outcome.REFUSED, detail="TCP RST") == f"{WALK} --netns lab-node-a"


def test_a_refusal_that_only_passed_through_is_not_the_nodes() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    rst = packets.tcp(NODE_A, NODEPORT, CLIENT, SPORT, 0x14, 0, identity.tcp_sequence(RUN_ID, 0) + 1)
    recorder.hop(HopKind.RECEIVE, A_NS, UPLINK, rst, skb=0xBB)
    assert advised(recorder, Outcome.REFUSED, detail="TCP RST") == ""


@pytest.mark.parametrize(
    ("name", "file"), [("lab-node-a", "/run/netns/lab-node-a"), ("/proc/7/ns/net", "/proc/7/ns/net"), ("n1", "")]
)
def test_the_way_back(name: str, file: str) -> None:
    inside = f"nsenter --net={file} " if file else ""
    found = advised(dropped(*REVERSE), where=renamed(A_NS, name), node="n1")
    assert found == f"{inside}ip route get {CLIENT}"
    recorder = arrived()
    recorder.drop(A_NS, UPLINK, packets.syn(), 60)
    kernels = advised(recorder, where=renamed(A_NS, name), node="n1", drop_reasons={60: "SKB_DROP_REASON_IP_RPFILTER"})
    assert kernels == found


def test_what_listens_in_the_pod() -> None:
    recorder = Recorder()
    to_pod(recorder)
    assert advised(recorder) == f"nsenter --net=/run/netns/lab-pod-b ss -lntp 'sport = :{TARGET_PORT}'"
    recorder = Recorder()
    payload = identity.encode(identity.Identity(RUN_ID, 0, 0))
    recorder.hop(HopKind.RECEIVE, POD_NS, UPLINK, packets.udp(CLIENT, SPORT, POD, 53, payload))
    assert advised(recorder, proto=17) == "nsenter --net=/run/netns/lab-pod-b ss -lnup 'sport = :53'"


def test_no_command_where_a_name_is_not_known_or_none_helps() -> None:
    assert advised(Recorder()) == ""  # not seen anywhere
    inside = Recorder()
    inside.hop(HopKind.RECEIVE, B_NS, UPLINK, to_node_b(inside))
    inside.drop(B_NS, UPLINK, packets.vxlan(NODE_A, "10.10.0.2", packets.syn()), TC_INGRESS)
    assert advised(inside) == ""  # came in a tunnel
    assert advised(dropped("Final result=DENY (7). Program execution time: 7ns")) == ""  # malformed
    unknown = topology()
    del unknown.namespaces[A_NS].links[UPLINK]
    assert advised(dropped(NO_ROUTE), where=unknown) == ""
    del unknown.namespaces[B_NS].links[CALI]
    denied = Recorder()
    denied_at_the_pod(denied, log=True, state=None)
    assert advised(denied, where=unknown, policy_files=[RULES]) == ""
