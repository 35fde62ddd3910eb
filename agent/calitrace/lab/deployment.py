"""Puts the dataplane on the lab's nodes and tells it what Felix would: services, routes, policy.

Programs and maps outlive the process that loads them, so every command opens them afresh from the record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calitrace.lab import network, policy
from calitrace.lab.dataplane import Dataplane, Interface, NodeConfig, Protocol, RouteFlags, Rpf, Workload
from calitrace.lab.topology import NODE_A, NODES, SERVICES, Lab, Node, Service

if TYPE_CHECKING:
    from calitrace.lab.state import State

DEBUG, OFF = "debug", "off"
RPF_FAULT = "rpf"


def on_node(lab: Lab, node: Node, record: State) -> Dataplane:
    """The node's dataplane as the record wants it, not yet loaded."""
    with network.inside(lab.namespace(node.name)) as route:
        uplink = Interface(node.interface, network.index_of(route, node.interface))
        workload = Workload(node.workload, network.index_of(route, node.workload), node.pod_address)
    return Dataplane(
        lab.pins / node.name,
        NodeConfig(node.address, uplink, (workload,)),
        log_debug=record.log_level == DEBUG,
        rpf=Rpf.STRICT if record.fault == RPF_FAULT and node is NODE_A else Rpf.DISABLED,
    )


def load(lab: Lab, node: Node, record: State) -> Dataplane:
    """Compile, verify and attach; replaces what is attached and keeps what the maps hold."""
    dataplane = on_node(lab, node, record)
    dataplane.load()
    with network.inside(lab.namespace(node.name)):
        dataplane.attach()
    return dataplane


def deploy(lab: Lab, node: Node, record: State) -> None:
    """Load the node's dataplane and write all its maps."""
    dataplane = load(lab, node, record)
    others = [other for other in NODES if other is not node]
    dataplane.set_host_routes([other.address for other in others])
    for other in others:
        dataplane.set_route(other.pod_cidr, RouteFlags.REMOTE_WORKLOAD, via=other.address)
    for service in SERVICES:
        _set_service(dataplane, node, service, service.backend)
    dataplane.set_policy(node.workload, allow=True, rule_id=policy.ALLOW_INGRESS.id)


def set_endpoints(lab: Lab, service: Service, record: State, *, present: bool) -> None:
    """Give a service its endpoint on every node, or take it away."""
    for node in NODES:
        backend = service.backend if present else None
        _set_service(on_node(lab, node, record), node, service, backend)


def set_policy(lab: Lab, node: Node, record: State, rule: policy.Rule) -> None:
    """Let *rule* decide about new flows to the node's pod."""
    dataplane = on_node(lab, node, record)
    dataplane.set_policy(node.workload, allow=rule.action == "allow", rule_id=rule.id)


def _set_service(dataplane: Dataplane, node: Node, service: Service, backend: tuple[str, int] | None) -> None:
    dataplane.set_service(
        service.id,
        service.node_port,
        Protocol[service.proto.upper()],
        [backend] if backend else [],
        local=int(backend is not None and backend[0] == node.pod_address),
    )
