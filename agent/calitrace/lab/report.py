"""What there is of a lab: its record compared with the machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from calitrace.kernel import syscall
from calitrace.lab import network, processes, state
from calitrace.lab.topology import FABRIC, NODE_A, NODES, OUTSIDE, SERVICES, Lab


def inspect(lab: Lab) -> dict[str, Any]:
    """A plain mapping, the same keys whether or not the lab is there. *state*: up, incomplete or absent."""
    record = state.load(lab)
    missing: list[str] = []
    if record is not None:
        missing += [f"namespace {each}" for each in lab.namespaces if not network.namespace_exists(each)]
        alive = {server.pod: processes.is_running(server) for server in record.servers}
        missing += [f"server in {node.pod}" for node in NODES if not alive.get(node.pod)]
    attached = _attached(lab)
    if record is not None and syscall.capabilities()["CAP_SYS_ADMIN"]:
        hooked = {(each.part, each.interface, each.hook) for each in attached}
        missing += [
            f"program at {node.name} {interface} {hook}"
            for node in NODES
            for interface in (node.interface, node.workload)
            for hook in ("ingress", "egress")
            if (node.name, interface, hook) not in hooked
        ]
    whole = record is not None and record.phase == state.COMPLETE and not missing
    return {
        "name": lab.name,
        "state": "absent" if record is None else "up" if whole else "incomplete",
        "missing": missing,
        "fault": record.fault if record else "",
        "log_level": record.log_level if record else "",
        "mtu": record.mtu if record else 0,
        "pins": str(lab.pins),
        "client": {"namespace": lab.namespace(OUTSIDE.name), "address": OUTSIDE.address},
        "fabric": {"namespace": lab.namespace(FABRIC)},
        "nodes": [
            {
                "name": node.name,
                "namespace": lab.namespace(node.name),
                "address": node.address,
                "uplink": node.interface,
                "workload": node.workload,
                "pod": node.pod,
                "pod_namespace": lab.namespace(node.pod),
                "pod_address": node.pod_address,
                "policy_directory": str(lab.policy_directory(node.name)),
            }
            for node in NODES
        ],
        "services": [
            {
                "id": service.id,
                "proto": service.proto,
                "address": f"{NODE_A.address}:{service.node_port}",
                "backend": ":".join(map(str, service.backend)) if service.backend else None,
                "purpose": service.purpose,
            }
            for service in SERVICES
        ],
        "attached": [asdict(each) for each in attached],
        "servers": [
            {"pod": server.pod, "pid": server.pid, "running": alive[server.pod]}
            for server in (record.servers if record else ())
        ],
    }


def _attached(lab: Lab) -> list[network.Attachment]:
    if not syscall.capabilities()["CAP_SYS_ADMIN"]:
        return []  # entering a namespace takes it; the record does not
    parts = (FABRIC, *(node.name for node in NODES))
    return [
        each
        for part in parts
        if network.namespace_exists(lab.namespace(part))
        for each in network.iter_attached(lab, part)
    ]


def lines(seen: dict[str, Any]) -> list[str]:
    """The same for people, at most 80 columns."""
    if seen["state"] == "absent":
        return [f"lab {seen['name']}: not there"]
    shown = [f"lab {seen['name']}: {seen['state']}, fault {seen['fault'] or 'none'}, log {seen['log_level']}"]
    shown += [f"  missing: {each}" for each in seen["missing"]]
    shown += ["", f"{'':8} {'ADDRESS':13} {'NAMESPACE':20} INTERFACES"]
    shown.append(f"{'client':8} {seen['client']['address']:13} {seen['client']['namespace']:20} eth0")
    for node in seen["nodes"]:
        shown += [
            f"{node['name']:8} {node['address']:13} {node['namespace']:20} {node['uplink']}, {node['workload']}",
            f"{node['pod']:8} {node['pod_address']:13} {node['pod_namespace']:20} eth0",
        ]
    shown += ["", f"{'PROTO':5} {'NODEPORT':17} {'BACKEND':17} ID"]
    shown += [
        f"{each['proto']:5} {each['address']:17} {each['backend'] or '-':17} {each['id']}  {each['purpose']}"
        for each in seen["services"]
    ]
    if seen["attached"]:
        shown += ["", f"{'PROGRAM':24} {'HOOK':8} {'NODE':8} {'INTERFACE':16} ID"]
    shown += [
        f"{each['program']:24} {each['hook']:8} {each['part']:8} {each['interface']:16} {each['id']}"
        for each in seen["attached"]
    ]
    return shown
