"""What stands on this machine: namespaces, interfaces, tc programs, and whose state map each node uses.

A namespace is a node when one of its interfaces carries a Calico program; a pod when it is the other end of a
node's workload interface. The state map is found through the programs themselves (their map ids, and those of
the programs in their tail-call maps), so it does not matter where, or whether, it is pinned.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import netns, syscall, tc
from calitrace.model import Link, Namespace, Role, Topology

_WORKLOAD_PREFIX = "cali"
_CLSACT = "clsact"
_NO_ROUTE = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EACCES,
    errno.EINVAL,
}  # none, unreachable, prohibit, blackhole


def topology(client: str = "") -> Topology:
    """Look at every namespace that has a name. *client*: namespace from which probes will come, "" for ours."""
    names = netns.names()
    found: dict[int, Namespace] = {}
    for inum, name in names.items():
        try:
            found[inum] = _look(inum, name)
        except (UsageError, EnvironmentUnfit, OSError):
            if name == "(host)":
                raise
            continue  # it was deleted while we looked
    start = netns.inum(client) if client else netns.own_inum()
    if start not in found:
        raise EnvironmentUnfit(f"namespace {client} changed while we looked at it", "try again")
    return _with_roles(found, start)


def _look(inum: int, name: str) -> Namespace:
    from pyroute2 import IPRoute

    if name == "(host)":
        with IPRoute() as route:
            return _namespace(route, inum, socket.gethostname())
    with netns.inside(name), IPRoute() as route:
        return _namespace(route, inum, name)


def _namespace(route: Any, inum: int, name: str) -> Namespace:
    addresses: dict[int, list[str]] = {}
    for message in route.get_addr():
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        addresses.setdefault(message["index"], []).append(address)
    with_clsact = {q["index"] for q in route.get_qdiscs() if q.get_attr("TCA_KIND") == _CLSACT}
    links: dict[int, Link] = {}
    state: syscall.MapInfo | None = None
    counters = 0
    nsids = _peer_namespaces(route)
    for message in route.get_links():
        index = message["index"]
        calico: dict[str, tuple[str, ...]] = {}
        foreign: dict[str, tuple[str, ...]] = {}
        chain: dict[str, tuple[str, ...]] = {}
        for hook, attached in _attached(route, index, index in with_clsact).items():
            infos = [_program(identifier) for _, identifier in attached]
            chain[hook] = tuple(
                f"{how} {info.name} id {info.id} tag {info.tag} loaded at boot + {info.load_time_ns / 1e9:.1f} s"
                for (how, _), info in zip(attached, infos, strict=True)
            )
            calico[hook] = tuple(i.name for i in infos if is_calico(i.name))
            foreign[hook] = tuple(i.name for i in infos if not is_calico(i.name))
            for info in infos:
                if is_calico(info.name) and state is None:
                    state, counters = _calico_maps(info)
        xdp = message.get_attr("IFLA_XDP")
        if xdp is not None and xdp.get_attr("IFLA_XDP_ATTACHED"):
            foreign["xdp"] = ("XDP program",)
        links[index] = Link(
            index,
            message.get_attr("IFLA_IFNAME"),
            tuple(addresses.get(index, ())),
            {hook: names for hook, names in calico.items() if names},
            {hook: names for hook, names in foreign.items() if names},
            nsids.get(message.get_attr("IFLA_LINK_NETNSID"), 0),
            message.get_attr("IFLA_LINK") or 0,
            {hook: programs for hook, programs in chain.items() if programs},
        )
    return Namespace(
        inum,
        name,
        Role.NODE if any(link.calico for link in links.values()) else Role.OTHER,
        links,
        state.id if state else 0,
        state.name if state else "",
        state.value_size if state else 0,
        counters,
    )


def is_calico(program: str) -> bool:
    """Whether a tc program is Calico's, by name: ``cali_tc_preambl``, ``calico_from_hos``, ``calico_tc_main``."""
    return program.startswith("cali")


def _attached(route: Any, index: int, with_clsact: bool) -> dict[str, list[tuple[str, int]]]:
    """By hook (how it is attached, program id), in the order in which they run: tcx comes before classic tc."""
    found = {hook: [("tcx", identifier) for identifier in _tcx(index, hook)] for hook in tc.HOOKS}
    for hook, _, identifier, priority in tc.iter_programs(route, index) if with_clsact else ():
        found[hook].append((f"tc pref {priority}", identifier))
    return found


def _tcx(index: int, hook: str) -> list[int]:
    """Program ids of the tcx links of an interface of this thread's namespace; none before Linux 6.6."""
    try:
        return syscall.attached_programs(index, hook)
    except OSError:
        return []


def _program(identifier: int) -> syscall.ProgramInfo:
    """A program by id. Raises OSError when it has gone."""
    descriptor = syscall.program_fd(identifier)
    try:
        return syscall.program_info(descriptor)
    finally:
        os.close(descriptor)


def _calico_maps(program: syscall.ProgramInfo) -> tuple[syscall.MapInfo | None, int]:
    """The state map that a program uses, and the number of counters in its counters map (0: not found).

    Calico's preamble names the state map itself; the counters map belongs to the programs it tail-calls.
    """
    state = None
    counters = 0
    waiting, seen = [program], {program.id}
    while waiting:
        for identifier in waiting.pop().map_ids:
            descriptor = syscall.map_fd(identifier)
            try:
                info = syscall.map_info(descriptor)
                if "_state" in info.name and info.name.startswith("cali"):
                    state = state or info
                elif info.name.startswith("cali_counters"):
                    counters = info.value_size // 8
                elif info.type == syscall.MAP_TYPE_PROG_ARRAY and info.name.startswith("cali_progs"):
                    for index in range(min(info.max_entries, 128)):
                        value = syscall.map_lookup(descriptor, index.to_bytes(4, "little"), 4)
                        identifier = int.from_bytes(value or b"", "little")
                        if identifier and identifier not in seen:
                            seen.add(identifier)
                            waiting.append(_program(identifier))
            finally:
                os.close(descriptor)
            if state and counters:
                return state, counters
    return state, counters


def _peer_namespaces(route: Any) -> dict[int | None, int]:
    """nsid of this namespace to inode number, for all namespaces that have a name."""
    from pyroute2.netlink.exceptions import NetlinkError

    found: dict[int | None, int] = {}
    for inum, name in netns.names().items():
        try:
            descriptor = os.open(netns.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except (UsageError, OSError):
            continue  # ours, which has no name, or one that was deleted while we looked
        try:
            nsid = route.get_netnsid(fd=descriptor).get("nsid")
        except NetlinkError as failure:
            if failure.code != errno.EINVAL:
                raise
            continue  # a name whose namespace is not mounted yet, or no more
        finally:
            os.close(descriptor)
        if nsid is not None and nsid not in (-1, 0xFFFFFFFF):
            found[nsid] = inum
    return found


def _with_roles(found: dict[int, Namespace], client: int) -> Topology:
    """Pods are the other ends of workload interfaces; the client is where the probes come from.

    What no chain of veths joins to the client is another network on the same machine (a second lab): OTHER.
    """
    near = _joined(found, client)
    pods = {
        link.peer_netns
        for namespace in found.values()
        if namespace.role is Role.NODE
        for link in namespace.links.values()
        if link.name.startswith(_WORKLOAD_PREFIX)
    }

    def role(namespace: Namespace) -> Role:
        if namespace.inum not in near:
            return Role.OTHER
        if namespace.role is Role.NODE:
            return Role.NODE
        if namespace.inum in pods:
            return Role.POD
        return Role.CLIENT if namespace.inum == client else Role.OTHER

    return Topology({inum: replace(each, role=role(each)) for inum, each in found.items()})


def _joined(found: dict[int, Namespace], start: int) -> set[int]:
    """The namespaces that veths join to *start*, directly or through others."""
    neighbours: dict[int, set[int]] = {}
    for namespace in found.values():
        for link in namespace.links.values():
            if link.peer_netns:
                neighbours.setdefault(namespace.inum, set()).add(link.peer_netns)
                neighbours.setdefault(link.peer_netns, set()).add(namespace.inum)
    joined, waiting = {start}, [start]
    while waiting:
        fresh = neighbours.get(waiting.pop(), set()) - joined
        joined |= fresh
        waiting += fresh
    return joined


def interface_towards(address: str) -> int:
    """ifindex by which this thread's namespace routes packets to an address, 0 for none. Raises EnvironmentUnfit."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as route:
        try:
            (message,) = route.route("get", dst=address)
        except NetlinkError as failure:
            if failure.code in _NO_ROUTE:
                return 0
            raise EnvironmentUnfit(f"cannot ask for the route to {address}: {failure}") from failure
    return int(message.get_attr("RTA_OIF") or 0)


def state_maps(found: Topology) -> dict[int, int]:
    """Namespace inode number to id of the state map of each node that is observed."""
    return {n.inum: n.state_map for n in found.namespaces.values() if n.state_map and n.role is Role.NODE}


def boot_id() -> str:
    """The kernel's id of this boot: clocks of two journals compare only when it is the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
