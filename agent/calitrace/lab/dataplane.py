"""One node's share of the lab's dataplane: compile, pin, attach, and write its maps as Felix would.

The programs are bpf/lab/calico.bpf.c. The process may end after :meth:`Dataplane.attach`: the tc filters keep the
programs and the pins keep the maps. Loading again, for another log level or RPF mode, finds the pinned maps with
all they hold and puts the new programs in the place of the old ones without a gap.

Layouts: calico master, felix/bpf (nat, routes, ifstate, counters). Integers little-endian, addresses network order.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Any

from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import loader, syscall

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_INGRESS, _EGRESS = 0, 1
_PINNED = re.compile(r'PINNED\("\w+", "(\w+)"\)')
_PARENTS = {_INGRESS: 0xFFFFFFF2, _EGRESS: 0xFFFFFFF3}
_PRIORITY = 49152  # what the kernel gives the first filter without one, and so what Calico's have
_TAG_LENGTH = 15
_COUNTERS = 27
_COUNTERS_SIZE = 8 * _COUNTERS
_IFACE_SIZE = 56
_VERDICT_AT = 40
_ALLOW, _DENY = 1, 2
_IFSTATE_UPLINK, _IFSTATE_WORKLOAD = 0x2 | 0x8, 0x1 | 0x2
_NODEPORT_OF_ANY_NODE = IPv4Address("255.255.255.255")
_ANY_SOURCE = 56  # bits of address, port, protocol and padding before the source in a frontend key

UNAUTHORISED_SOURCE = 0xFFFFFFFF
"""Frontend count that means: drop, the source is in no loadBalancerSourceRanges."""


class Rpf(IntEnum):
    """bpfEnforceRPF: what an uplink does with a source whose reverse path is elsewhere."""

    DISABLED = 0
    STRICT = 1
    LOOSE = 2


class Protocol(IntEnum):
    """IP protocol of a service."""

    TCP = 6
    UDP = 17


class RouteFlags(IntEnum):
    """Sets of the flags of ``cali_v4_routes`` that the lab uses, as Felix writes them."""

    REMOTE_HOST = 0x10
    LOCAL_HOST = 0x18
    LOCAL_WORKLOAD = 0x0F
    REMOTE_WORKLOAD = 0x27


@dataclass(frozen=True)
class Interface:
    """An interface of the node's namespace."""

    name: str
    ifindex: int


@dataclass(frozen=True)
class Workload(Interface):
    """The node's end of a pod's veth, and the pod's address."""

    ip: str


@dataclass(frozen=True)
class NodeConfig:
    """What the programs of one node must know. *host_ip*: the tunnel's source."""

    host_ip: str
    uplink: Interface
    workloads: tuple[Workload, ...]


class Dataplane:
    """The programs and maps of one node. *pin_dir*: its own directory on a bpffs."""

    def __init__(self, pin_dir: Path, node: NodeConfig, log_debug: bool = False, rpf: Rpf = Rpf.DISABLED) -> None:
        self.pin_dir = pin_dir
        self.node = node
        self.log_debug = log_debug
        self.rpf = rpf
        self._bpf: Any = None

    def load(self) -> None:
        """Compile and verify the programs, make or find the pinned maps, write the interfaces' rows.

        Raises CompileFailed; EnvironmentUnfit when *pin_dir* is not on a bpffs.
        """
        try:
            self.pin_dir.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise EnvironmentUnfit(
                f"cannot make {self.pin_dir}: {os.strerror(failure.errno or errno.EIO)}",
                "mount a bpffs there: mount -t bpf bpf /sys/fs/bpf",
            ) from None
        source = loader.bpf_source("lab/calico.bpf.c")
        self._pin_maps(source)
        self._bpf = loader.compile_bpf(
            source,
            defines={
                "PIN_DIR": f'"{self.pin_dir}"',
                "HOST_IP": hex(int.from_bytes(IPv4Address(self.node.host_ip).packed, "little")),
                "LOG_DEBUG": str(int(self.log_debug)),
                "RPF_MODE": str(int(self.rpf)),
            },
        )
        self._write_interface(self.node.uplink, _IFSTATE_UPLINK)
        for workload in self.node.workloads:
            self._write_interface(workload, _IFSTATE_WORKLOAD)

    def _pin_maps(self, source: str) -> None:
        """Make and pin those maps that are not there yet."""
        missing = [name for name in _PINNED.findall(source) if not (self.pin_dir / name).exists()]
        if missing:
            maps = loader.compile_bpf(source)
            for name in missing:
                syscall.object_pin(maps[name.encode()].map_fd, self.pin_dir / name)
            maps.cleanup()

    def attach(self) -> None:
        """Put the loaded programs on the interfaces' clsact hooks, replacing those of an earlier load.

        Call it in a thread that is inside the node's namespace. Raises UsageError before :meth:`load`,
        CompileFailed when the verifier refuses a program, NetlinkError.
        """
        from pyroute2 import IPRoute

        if self._bpf is None:
            raise UsageError("the dataplane is not loaded", "call load() first")
        plan = [
            (self.node.uplink, _INGRESS, "cali_from_hep"),
            (self.node.uplink, _EGRESS, "cali_to_hep"),
        ]
        for workload in self.node.workloads:
            plan += [(workload, _INGRESS, "cali_from_wep"), (workload, _EGRESS, "cali_to_wep")]
        programs = {name: self._program(name) for _, _, name in plan}
        with IPRoute() as route:
            with_clsact = {q["index"] for q in route.get_qdiscs() if q.get_attr("TCA_KIND") == "clsact"}
            for interface, hook, name in plan:
                if interface.ifindex not in with_clsact:
                    route.tc("add", "clsact", interface.ifindex)
                    with_clsact.add(interface.ifindex)
                route.tc(
                    "replace-filter",
                    "bpf",
                    interface.ifindex,
                    handle=1,
                    fd=programs[name],
                    name=name,
                    parent=_PARENTS[hook],
                    prio=_PRIORITY,
                    classid=1,
                    direct_action=True,
                )

    def detach(self) -> None:
        """Take the clsact hooks off the interfaces; pins stay. Call it inside the node's namespace."""
        from pyroute2 import IPRoute

        indices = {i.ifindex for i in (self.node.uplink, *self.node.workloads)}
        with IPRoute() as route:
            for qdisc in route.get_qdiscs():
                if qdisc["index"] in indices and qdisc.get_attr("TCA_KIND") == "clsact":
                    route.tc("del", "clsact", qdisc["index"])

    def unpin(self) -> None:
        """Remove the pins and their directory; the kernel frees the maps once no filter uses them."""
        if self.pin_dir.is_dir():
            for pin in self.pin_dir.iterdir():
                pin.unlink()
            self.pin_dir.rmdir()

    def set_service(
        self,
        service_id: int,
        port: int,
        proto: Protocol,
        backends: Sequence[tuple[str, int]],
        local: int = 0,
        flags: int = 0,
    ) -> None:
        """A NodePort on this node and, for what comes through the tunnel, on any.

        *backends*: pod address and port; the first *local* of them are on this node. None at all: connections
        are refused with an ICMP error.
        """
        for ordinal, (address, backend_port) in enumerate(backends):
            self._write(
                "cali_v4_nat_be",
                struct.pack("<II", service_id, ordinal),
                struct.pack("<4sHxx", IPv4Address(address).packed, backend_port),
            )
        for node in (IPv4Address(self.node.host_ip), _NODEPORT_OF_ANY_NODE):
            self.set_frontend(str(node), port, proto, service_id, len(backends), local, flags)

    def set_frontend(
        self,
        address: str,
        port: int,
        proto: Protocol,
        service_id: int,
        count: int,
        local: int = 0,
        flags: int = 0,
        source: str = "0.0.0.0/0",
    ) -> None:
        """One row of the frontend map. *source*: the clients it is for; *count*: backends, or UNAUTHORISED_SOURCE."""
        network = IPv4Network(source)
        key = struct.pack(
            "<I4sHB4sx",
            _ANY_SOURCE + network.prefixlen,
            IPv4Address(address).packed,
            port,
            proto,
            network.network_address.packed,
        )
        self._write("cali_v4_nat_fe3", key, struct.pack("<IIIII", service_id, count, local, 0, flags))

    def set_route(self, network: str, flags: int, *, via: str = "0.0.0.0", ifindex: int = 0) -> None:
        """One route: *via* for what another node has, *ifindex* for a pod of this node."""
        parsed = IPv4Network(network)
        next_hop = struct.pack("<I", ifindex) if ifindex else IPv4Address(via).packed
        self._write(
            "cali_v4_routes",
            struct.pack("<I4s", parsed.prefixlen, parsed.network_address.packed),
            struct.pack("<I4s", flags, next_hop),
        )

    def set_host_routes(self, others: Sequence[str]) -> None:
        """The routes of this node, its pods, and the other nodes' addresses."""
        self.set_route(f"{self.node.host_ip}/32", RouteFlags.LOCAL_HOST)
        for other in others:
            self.set_route(f"{other}/32", RouteFlags.REMOTE_HOST)
        for workload in self.node.workloads:
            self.set_route(f"{workload.ip}/32", RouteFlags.LOCAL_WORKLOAD, ifindex=workload.ifindex)

    def set_policy(self, interface: str, *, allow: bool, rule_id: int) -> None:
        """What the policy program of a pod answers to new flows towards the pod, and the id of the rule that hits.

        Raises UsageError for an interface that the node does not have.
        """
        for workload in self.node.workloads:
            if workload.name == interface:
                row = bytearray(self._lookup("lab_iface", struct.pack("<I", workload.ifindex), _IFACE_SIZE) or b"")
                struct.pack_into("<IIQ", row, _VERDICT_AT, _ALLOW if allow else _DENY, 0, rule_id)
                self._write("lab_iface", struct.pack("<I", workload.ifindex), bytes(row))
                return
        known = ", ".join(w.name for w in self.node.workloads)
        raise UsageError(f"no pod interface {interface} on this node", f"it has: {known}")

    def counters(self, ifindex: int, *, egress: bool) -> tuple[int, ...]:
        """The 27 counters of an interface's hook, summed over CPUs; index is Calico's reason."""
        key = struct.pack("<II", ifindex, _EGRESS if egress else _INGRESS)
        raw = self._lookup("cali_counters6", key, _COUNTERS_SIZE * syscall.possible_cpus())
        values = struct.unpack(f"<{len(raw or b'') // 8}Q", raw or b"")
        return tuple(sum(values[index::_COUNTERS]) for index in range(_COUNTERS))

    def rule_hits(self, rule_id: int) -> int:
        """Packets that a policy rule has decided about."""
        raw = self._lookup("cali_rule_ctrs2", struct.pack("<Q", rule_id), 8 * syscall.possible_cpus())
        return sum(value for (value,) in struct.iter_unpack("<Q", raw or b""))

    def _program(self, name: str) -> int:
        with loader.captured_stderr() as log:
            try:
                return int(self._bpf.load_func(name.encode(), self._bpf.SCHED_CLS).fd)
            except Exception as failure:  # BCC raises bare Exception
                cause = f"the kernel refuses BPF program {name}: {failure}"
        raise loader.CompileFailed(cause, log.text)

    def _write_interface(self, interface: Interface, flags: int) -> None:
        index = struct.pack("<I", interface.ifindex)
        no_policy = struct.pack("<8i", *[-1] * 8)
        self._write("cali_iface4", index, struct.pack("<I16s", flags, interface.name.encode()) + no_policy)
        if self._lookup("lab_iface", index, _IFACE_SIZE) is None:
            tag = interface.name.ljust(_TAG_LENGTH, "-").encode()
            self._write("lab_iface", index, struct.pack("<20s20sIIQ", tag + b"-I", tag + b"-E", _ALLOW, 0, 0))
        for hook in (_INGRESS, _EGRESS):
            key = struct.pack("<II", interface.ifindex, hook)
            size = _COUNTERS_SIZE * syscall.possible_cpus()
            if self._lookup("cali_counters6", key, size) is None:
                self._write("cali_counters6", key, bytes(size))

    def _write(self, name: str, key: bytes, value: bytes) -> None:
        descriptor = self._open(name)
        try:
            syscall.map_update(descriptor, key, value)
        finally:
            os.close(descriptor)

    def _lookup(self, name: str, key: bytes, size: int) -> bytes | None:
        descriptor = self._open(name)
        try:
            return syscall.map_lookup(descriptor, key, size)
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int:
        try:
            return syscall.object_get(self.pin_dir / name)
        except OSError as failure:
            raise EnvironmentUnfit(
                f"cannot open {self.pin_dir / name}: {os.strerror(failure.errno or errno.EIO)}",
                "is the lab up?",
            ) from None
