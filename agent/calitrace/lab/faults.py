"""Breaks the lab in one known way at a time, and heals it.

A fault is written into the record before it is put in; healing undoes all of them, whatever the record says of
which is in, so that an interrupted fault leaves nothing.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import tc
from calitrace.lab import deployment, network, policy, state
from calitrace.lab.topology import FABRIC, NODE_A, NODE_B, NODES, SERVICES, VXLAN_PORT, Lab

if TYPE_CHECKING:
    from collections.abc import Callable

    from calitrace.lab.state import State

FAULTS = {
    "vxlan-blocked": "the fabric drops UDP 4789 between the nodes",
    "policy-deny": "policy at pod-b denies traffic from outside the cluster",
    "no-backend": "service 30080 loses its endpoints",
    "rpf": "node-a checks sources strictly and routes the client elsewhere",
}


def loaded(lab: Lab) -> State:
    """The record of a lab that is up. Raises EnvironmentUnfit otherwise."""
    found = state.load(lab)
    if found is None:
        raise EnvironmentUnfit(f"there is no lab {lab.name}", f"start it with `{lab.command('up')}`")
    if found.phase != state.COMPLETE:
        raise EnvironmentUnfit(
            f"lab {lab.name} is incomplete ({found.phase})",
            f"remove it with `{lab.command('down')}` and start it again",
        )
    return found


def inject(lab: Lab, name: str) -> None:
    """Put one fault in. Raises UsageError for an unknown one, EnvironmentUnfit while another is in."""
    if name not in FAULTS:
        raise UsageError(f"unknown fault {name!r}", f"choose one of {', '.join(FAULTS)}")
    with state.locked(lab):
        found = loaded(lab)
        if found.fault == name:
            return
        if found.fault:
            raise EnvironmentUnfit(
                f"fault {found.fault} is in already; the lab takes one at a time",
                f"undo it with `{lab.command('heal')}`",
            )
        found.fault = name
        state.save(lab, found)
        try:
            _INJECT[name](lab, found)
        except BaseException:
            _HEAL[name](lab, found)
            found.fault = ""
            state.save(lab, found)
            raise


def heal(lab: Lab) -> str:
    """Undo every fault; returns the name of the one that was in, or nothing."""
    with state.locked(lab):
        found = loaded(lab)
        for undo in _HEAL.values():
            undo(lab, found)
        was, found.fault = found.fault, ""
        state.save(lab, found)
        return was


def set_log_level(lab: Lab, level: str) -> None:
    """Load the programs that print Calico's debug lines (``debug``), or those that do not (``off``)."""
    with state.locked(lab):
        found = loaded(lab)
        if found.log_level != level:
            found.log_level = level
            state.save(lab, found)
            for node in NODES:
                deployment.load(lab, node, found)


def _block_vxlan(lab: Lab, _record: State) -> None:
    from bcc import BPF

    from calitrace.kernel.loader import bpf_source, compile_bpf

    program = compile_bpf(bpf_source("lab/fabric.bpf.c"), defines={"VXLAN_PORT": str(VXLAN_PORT)})
    function = program.load_func(b"fabric_vxlan", BPF.SCHED_CLS)
    with network.inside(lab.namespace(FABRIC)) as route:
        for index in _node_ports(route):
            route.tc("add", "clsact", index)
            route.tc(
                "add-filter",
                "bpf",
                index,
                fd=function.fd,
                name="fabric_vxlan",
                parent=tc.HOOKS["ingress"],
                direct_action=True,
            )


def _unblock_vxlan(lab: Lab, _record: State) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    with network.inside(lab.namespace(FABRIC)) as route:
        for index in _node_ports(route):
            try:
                route.tc("del", "clsact", index)
            except NetlinkError as gone:
                if gone.code not in (errno.ENOENT, errno.EINVAL):  # it was not there
                    raise


def _node_ports(route: Any) -> list[int]:
    return [int(route.link_lookup(ifname=node.name)[0]) for node in NODES]


def _deny(lab: Lab, record: State) -> None:
    policy.write_debug_files(lab, denied=True)
    deployment.set_policy(lab, NODE_B, record, policy.DENY_INGRESS)


def _allow(lab: Lab, record: State) -> None:
    deployment.set_policy(lab, NODE_B, record, policy.ALLOW_INGRESS)
    policy.write_debug_files(lab, denied=False)


def _remove_backend(lab: Lab, record: State) -> None:
    deployment.set_endpoints(lab, SERVICES[0], record, present=False)


def _restore_backend(lab: Lab, record: State) -> None:
    deployment.set_endpoints(lab, SERVICES[0], record, present=True)


def _divert(lab: Lab, record: State) -> None:
    network.divert_client_route(lab, NODE_A, diverted=True)
    deployment.load(lab, NODE_A, record)


def _restore_route(lab: Lab, record: State) -> None:
    network.divert_client_route(lab, NODE_A, diverted=False)
    if record.fault == deployment.RPF_FAULT:
        deployment.load(lab, NODE_A, replace(record, fault=""))


_INJECT: dict[str, Callable[[Lab, State], None]] = {
    "vxlan-blocked": _block_vxlan,
    "policy-deny": _deny,
    "no-backend": _remove_backend,
    "rpf": _divert,
}
_HEAL: dict[str, Callable[[Lab, State], None]] = {
    "vxlan-blocked": _unblock_vxlan,
    "policy-deny": _allow,
    "no-backend": _restore_backend,
    "rpf": _restore_route,
}
