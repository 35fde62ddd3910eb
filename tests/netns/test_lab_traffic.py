"""Real clients through the lab's NodePorts, healthy and under each fault."""

from __future__ import annotations

import pytest

from calitrace.lab.servers import body
from calitrace.lab.topology import NODES, Lab, Node
from tests.netns.conftest import http_get, tcp_echo, udp_echo

pytestmark = pytest.mark.root
NODE = "10.10.0.1"
PAYLOAD = bytes(range(251)) * 40  # 10,040 bytes: several segments


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.pod)
def test_a_pod_answers_its_own_node(lab: Lab, node: Node) -> None:
    assert tcp_echo(lab, node.name, node.pod_address, 8080, PAYLOAD) == PAYLOAD
    assert udp_echo(lab, node.name, node.pod_address, 5353, PAYLOAD[:1400]) == PAYLOAD[:1400]
    assert http_get(lab, node.name, node.pod_address, 8000, "/10MB") == body()
