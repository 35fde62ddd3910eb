"""Real clients through the lab's NodePorts, healthy and under each fault."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator

import pytest

from calitrace.calico.policy import rule_names
from calitrace.kernel import netns
from calitrace.lab import deployment, faults, policy
from calitrace.lab.servers import body
from calitrace.lab.topology import NODES, Lab, Node
from tests.netns.conftest import LOST_S, REACHES_S, http_get, on, tcp, tcp_echo, udp_echo

pytestmark = pytest.mark.root
NODE = "10.10.0.1"
PAYLOAD = bytes(range(251)) * 40  # 10,040 bytes: several segments
REMOTE, LOCAL, NO_BACKEND, NO_ROUTE = 30080, 30081, 30082, 30087
UDP_REMOTE, UDP_LOCAL, HTTP_REMOTE, HTTP_LOCAL = 30053, 30054, 30088, 30089


@pytest.fixture
def broken(lab: Lab) -> Iterator[Lab]:
    """The lab, healed when the test has ended."""
    yield lab
    faults.heal(lab)
    assert tcp_echo(lab, "client", NODE, REMOTE, b"healed") == b"healed"
    assert tcp_echo(lab, "client", NODE, LOCAL, b"healed") == b"healed"
    assert udp_echo(lab, "client", NODE, UDP_REMOTE, b"healed") == b"healed"


def is_lost(lab: Lab, port: int) -> bool:
    """Whether a connection attempt gets no answer of any kind."""
    try:
        tcp(lab, "client", NODE, port, LOST_S).close()
    except TimeoutError:
        return True
    return False


def is_refused(lab: Lab, port: int) -> bool:
    """Whether the node refuses on behalf of a service without endpoints."""
    try:
        tcp(lab, "client", NODE, port).close()
    except OSError as refused:
        return refused.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH)
    return False


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.pod)
def test_a_pod_answers_its_own_node(lab: Lab, node: Node) -> None:
    assert tcp_echo(lab, node.name, node.pod_address, 8080, PAYLOAD) == PAYLOAD
    assert udp_echo(lab, node.name, node.pod_address, 5353, PAYLOAD[:1400]) == PAYLOAD[:1400]
    assert http_get(lab, node.name, node.pod_address, 8000, "/10MB") == body()


@pytest.mark.parametrize("port", [REMOTE, LOCAL])
def test_tcp_echo_through_a_nodeport(lab: Lab, port: int) -> None:
    for _ in range(5):
        assert tcp_echo(lab, "client", NODE, port, PAYLOAD) == PAYLOAD


@pytest.mark.parametrize("port", [UDP_REMOTE, UDP_LOCAL])
def test_udp_echo_through_a_nodeport(lab: Lab, port: int) -> None:
    for size in (1, 100, 1400):
        assert udp_echo(lab, "client", NODE, port, PAYLOAD[:size]) == PAYLOAD[:size]


@pytest.mark.parametrize("port", [HTTP_REMOTE, HTTP_LOCAL])
def test_ten_megabytes_through_a_nodeport_byte_for_byte(lab: Lab, port: int) -> None:
    assert http_get(lab, "client", NODE, port, "/10MB") == body()


def test_services_without_a_way_to_a_pod(lab: Lab) -> None:
    assert is_refused(lab, NO_BACKEND)
    assert is_lost(lab, NO_ROUTE)


def test_vxlan_blocked_cuts_only_the_remote_pod(broken: Lab) -> None:
    faults.inject(broken, "vxlan-blocked")
    assert is_lost(broken, REMOTE)
    with pytest.raises(TimeoutError):
        udp_echo(broken, "client", NODE, UDP_REMOTE, b"x", LOST_S)
    assert tcp_echo(broken, "client", NODE, LOCAL, PAYLOAD) == PAYLOAD
    assert udp_echo(broken, "client", NODE, UDP_LOCAL, b"x") == b"x"
    assert tcp_echo(broken, "node-a", "10.65.0.2", 8080, b"x") == b"x"


def test_policy_deny_cuts_only_pod_b(broken: Lab) -> None:
    faults.inject(broken, "policy-deny")
    assert is_lost(broken, REMOTE)
    assert tcp_echo(broken, "client", NODE, LOCAL, PAYLOAD) == PAYLOAD


def test_no_backend_cuts_only_its_service(broken: Lab) -> None:
    faults.inject(broken, "no-backend")
    assert is_refused(broken, REMOTE)
    assert http_get(broken, "client", NODE, HTTP_REMOTE, "/") == b"calitrace lab\n"


def test_rpf_cuts_the_client_off(broken: Lab) -> None:
    faults.inject(broken, "rpf")
    assert is_lost(broken, REMOTE)
    assert is_lost(broken, LOCAL)


def test_one_fault_at_a_time(broken: Lab) -> None:
    assert on(broken, "fault", "rpf").returncode == 0
    assert on(broken, "fault", "rpf").returncode == 0
    refused = on(broken, "fault", "no-backend")
    assert refused.returncode == 3
    assert refused.stderr.splitlines() == [
        "error: fault rpf is in already; the lab takes one at a time",
        f"hint: undo it with `calitrace lab heal --name {broken.name}`",
    ]
    assert json.loads(on(broken, "status", "-o", "json").stdout)["fault"] == "rpf"
    assert on(broken, "heal").stderr == "healed: rpf\n"
    assert on(broken, "heal").stderr == "no fault was in\n"


def test_log_level_changes_under_traffic_and_keeps_connections(lab: Lab) -> None:
    with tcp(lab, "client", NODE, REMOTE) as connection:
        for level in ("debug", "off"):
            assert on(lab, "log-level", level).returncode == 0
            assert json.loads(on(lab, "status", "-o", "json").stdout)["log_level"] == level
            connection.sendall(level.encode())
            assert connection.recv(100) == level.encode()


def test_a_denied_flow_names_its_rule(broken: Lab) -> None:
    faults.inject(broken, "policy-deny")
    node_b = deployment.on_node(broken, NODES[1], faults.loaded(broken))
    before = node_b.rule_hits(policy.DENY_INGRESS.id)
    assert is_lost(broken, REMOTE)
    assert node_b.rule_hits(policy.DENY_INGRESS.id) > before
    file = broken.policy_directory("node-b") / f"{NODES[1].workload}_ingress_v4.json"
    assert rule_names(file.read_bytes())[policy.DENY_INGRESS.id] == "default.deny-lab-clients rule 0 (deny)"


def test_a_node_sees_no_frame_that_is_for_the_other(lab: Lab) -> None:
    every_protocol = 3  # ETH_P_ALL taps come before tc ingress; the others after
    with netns.inside(lab.namespace("node-b")):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(every_protocol))
    with tap:
        tap.bind((NODES[1].interface, every_protocol))
        tap.settimeout(REACHES_S)
        assert tcp_echo(lab, "client", NODE, LOCAL, PAYLOAD) == PAYLOAD
        assert udp_echo(lab, "client", NODE, UDP_REMOTE, b"last") == b"last"
        frames: list[bytes] = []
        while not frames or b"last" not in frames[-1]:
            frame, (_, _, kind, *_) = tap.recvfrom(2048)
            if kind != socket.PACKET_OUTGOING:
                frames.append(frame)
    assert {frame[:6].hex(":") for frame in frames} == {NODES[1].mac}
