"""What stands on this machine: namespaces, interfaces, tc programs, and whose state map each node uses.

A namespace is a node when one of its interfaces carries a Calico program; a pod when it is the other end of a
node's workload interface. The state map is found through the programs themselves (their map ids, and those of
the programs in their tail-call maps), so it does not matter where, or whether, it is pinned.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calitrace.calico import WORKLOAD_PREFIX, state
from calitrace.calico.pods import WORKLOAD
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.events import STATE_BYTES
from calitrace.kernel import maps, netns, syscall, tc
from calitrace.model import Link, Namespace, Role, Topology

_ATTEMPTS = 10
_IFF_UP = 1  # include/uapi/linux/if.h
_NO_ROUTE = {
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.EACCES,
    errno.EINVAL,
}  # none, unreachable, prohibit, blackhole


def topology(client: str = "") -> Topology:
    """Look at every namespace. *client*: namespace from which probes will come, "" for ours."""
    names, here = netns.names(), netns.own_inum()
    found: dict[int, Namespace] = {}
    with open("/proc/thread-self/ns/net", "rb") as ours:  # noqa: PTH123  # nothing is read from it
        files = {here: f"/proc/self/fd/{ours.fileno()}"}  # first, since most veths end there
        files |= {inum: name for inum, name in names.items() if inum != here}
        for inum, name in names.items():
            try:
                found[inum] = _look(inum, name, files)
            except (UsageError, EnvironmentUnfit, OSError):
                if name == netns.OURS:
                    raise
                continue  # it was deleted while we looked
    start = netns.inum(client)
    if start not in found:
        raise EnvironmentUnfit(f"namespace {client} changed while we looked at it", "try again")
    return _with_roles(found, start)


def _look(inum: int, name: str, files: Mapping[int, str]) -> Namespace:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    ours = name == netns.OURS
    with netns.inside("" if ours else name), IPRoute() as route:
        for _ in range(_ATTEMPTS):
            try:
                return _namespace(route, inum, socket.gethostname() if ours else name, files)
            except (FileNotFoundError, NetlinkError):
                continue  # a program or an interface went while we looked
    raise EnvironmentUnfit(f"the interfaces and programs of {name} change faster than they can be read", "try again")


def _namespace(route: Any, inum: int, name: str, files: Mapping[int, str]) -> Namespace:
    addresses: dict[int, list[str]] = {}
    for message in route.get_addr():
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        addresses.setdefault(message["index"], []).append(address)
    hooks = tc.hooks(route)
    links: dict[int, Link] = {}
    its = _CalicoMaps()
    messages = list(route.get_links())
    peers = {message.get_attr("IFLA_LINK_NETNSID") for message in messages} - {None}
    nsids = _peer_namespaces(route, peers, files)
    for message in messages:
        index = message["index"]
        calico: dict[str, tuple[str, ...]] = {}
        foreign: dict[str, tuple[str, ...]] = {}
        chain: dict[str, tuple[str, ...]] = {}
        for hook, attached in _attached(route, message, hooks.get(index, ())).items():
            chain[hook] = tuple(str(each) for each in attached)
            calico[hook] = tuple(each.name for each in attached if each.is_calico)
            foreign[hook] = tuple(each.name for each in attached if not each.is_calico)
            for each in attached:
                if each.is_calico and each.info is not None and not its.complete:
                    its.add(each.info)
        links[index] = Link(
            index,
            tc.interface_name(message),
            tuple(addresses.get(index, ())),
            {hook: names for hook, names in calico.items() if names},
            {hook: names for hook, names in foreign.items() if names},
            nsids.get(message.get_attr("IFLA_LINK_NETNSID"), 0),
            message.get_attr("IFLA_LINK") or 0,
            {hook: programs for hook, programs in chain.items() if programs},
            up=bool(message["flags"] & _IFF_UP),
        )
    flagged = _flagged(its.ifstate, links)
    links = {
        i: replace(each, workload=i in flagged or each.name.startswith(WORKLOAD_PREFIX)) for i, each in links.items()
    }
    return Namespace(
        inum,
        name,
        Role.NODE if any(link.calico for link in links.values()) else Role.OTHER,
        links,
        its.state.id if its.state else 0,
        its.state.name if its.state else "",
        its.state.value_size if its.state else 0,
        its.reasons,
    )


def _flagged(ifstate: int, links: Iterable[int]) -> set[int]:
    """Those of *links* that Calico's ifstate map says to be workloads': another CNI names them as it likes."""
    if not ifstate:
        return set()
    descriptor = syscall.map_fd(ifstate)
    try:
        size = syscall.map_info(descriptor).value_size
        rows = {index: syscall.map_lookup(descriptor, index.to_bytes(4, "little"), size) for index in links}
    finally:
        os.close(descriptor)
    return {index for index, row in rows.items() if row and row[0] & WORKLOAD}


def is_calico(program: str) -> bool:
    """Whether a tc program is Calico's, by name: ``cali_tc_preambl``, ``calico_from_hos``, ``calico_tc_main``."""
    return program.startswith("cali")


@dataclass(frozen=True)
class _Attached:
    """What may drop at a hook. *how* it is attached, its *label* there; *info*: none of a filter without a program."""

    how: str
    label: str
    info: syscall.ProgramInfo | None = None

    @property
    def name(self) -> str:
        return (self.info.name if self.info else "") or self.label

    @property
    def is_calico(self) -> bool:
        """Loaders before libbpf gave programs no name of their own, but the filter: ``…:[calico_from_host_ep]``."""
        names = [self.info.name] if self.info and self.info.name else [self.label, self.label.rpartition("[")[2]]
        return self.info is not None and any(map(is_calico, names))

    def __str__(self) -> str:
        if self.info is None:
            return f"{self.how} {self.label}"
        since = f"loaded at boot + {self.info.load_time_ns / 1e9:.1f} s"
        return f"{self.how} {self.name} id {self.info.id} tag {self.info.tag} {since}"


def _attached(route: Any, link: Any, hooks: Iterable[str]) -> dict[str, list[_Attached]]:
    """What an interface has at each hook, in the order in which it runs: tcx comes before classic tc.

    *hooks*: those at which it may have filters.
    """
    index, program = link["index"], syscall.program_by_id
    found = {hook: [_Attached("tcx", "", program(each)) for each in _tcx(index, hook)] for hook in tc.HOOKS}
    for each in tc.iter_filters(route, index, hooks):
        info = program(each.program) if each.program else None
        attached = _Attached(f"tc pref {each.priority}", each.name if info else f"{each.kind} filter", info)
        if attached not in found[each.hook]:  # the kernel tells the parts of one u32 filter one by one
            found[each.hook].append(attached)
    found["xdp"] = [_Attached("xdp", "XDP program", program(each)) for each in _xdp(link)]
    return found


def _xdp(link: Any) -> list[int]:
    """The id of the XDP program that an interface has."""
    xdp = link.get_attr("IFLA_XDP")
    identifier = xdp.get_attr("IFLA_XDP_PROG_ID") if xdp is not None else None
    return [int(identifier)] if identifier else []


def _tcx(index: int, hook: str) -> list[int]:
    try:
        return tc.tcx_programs(index, hook)
    except PermissionError:  # other things still can be seen
        return []


@dataclass
class _CalicoMaps:
    """What a node's programs use: *state* map, *ifstate* map's id, and how many *reasons* are counted; 0: none.

    *looked_at*: ids of maps. All programs of a node share them, and an array of programs is read slot by slot.
    """

    state: syscall.MapInfo | None = None
    ifstate: int = 0
    reasons: int = 0
    looked_at: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return bool(self.state and self.ifstate and self.reasons)

    def add(self, program: syscall.ProgramInfo) -> None:
        """Look at the maps of a program, and of those that it may tail-call: a preamble uses few."""
        waiting, seen = [program], {program.id}
        while waiting and not self.complete:
            fresh_maps = [each for each in waiting.pop().map_ids if each not in self.looked_at]
            self.looked_at |= set(fresh_maps)
            for identifier in fresh_maps:
                self._note(syscall.map_by_id(identifier))
                fresh = maps.chained(identifier) - seen
                seen |= fresh
                waiting += map(syscall.program_by_id, sorted(fresh))

    def _note(self, info: syscall.MapInfo) -> None:
        if "_state" in info.name and info.name.startswith("cali"):
            self.state = self.state or info
        elif info.name.startswith("cali_counters"):
            self.reasons = self.reasons or info.value_size // 8
        elif info.name.startswith("cali_iface"):
            self.ifstate = self.ifstate or info.id


def _peer_namespaces(route: Any, wanted: set[int], files: Mapping[int, str]) -> dict[int | None, int]:
    """nsid of this namespace to inode number, of those *wanted*.

    *files*: what holds each namespace, in the order in which they are asked about: all would take long with many pods.
    """
    from pyroute2.netlink.exceptions import NetlinkError

    found: dict[int | None, int] = {}
    for inum, file in files.items():
        if wanted <= found.keys():
            break
        try:
            descriptor = os.open(netns.path(file), os.O_RDONLY | os.O_CLOEXEC)
        except (UsageError, OSError):
            continue  # it was deleted while we looked
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
    """Pods are the other ends of workload interfaces; the client is where the probes come from, a pod or not.

    What no chain of veths joins to the client is another network on the same machine (a second lab): OTHER.
    """
    near = _joined(found, client)
    pods = {
        link.peer_netns
        for namespace in found.values()
        if namespace.role is Role.NODE
        for link in namespace.links.values()
        if link.workload
    }

    def role(namespace: Namespace) -> Role:
        if namespace.inum not in near:
            return Role.OTHER
        if namespace.role is Role.NODE:
            return Role.NODE
        if namespace.inum == client:
            return Role.CLIENT
        return Role.POD if namespace.inum in pods else Role.OTHER

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


def with_ways_back(found: Topology, client: str) -> Topology:
    """The same, each node with its way to an address. A namespace that is gone, or refuses, has none."""
    here = netns.own_inum()
    namespaces = dict(found.namespaces)
    for inum, each in found.namespaces.items():
        if each.role is Role.NODE:
            with suppress(UsageError, EnvironmentUnfit, OSError), netns.inside("" if inum == here else each.name):
                link = each.links.get(interface_towards(client))
                namespaces[inum] = replace(each, way_back=link.name if link else "")
    return Topology(namespaces)


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


def state_maps(found: Topology, *, everywhere: bool = False) -> dict[int, int]:
    """Namespace inode number to id of the state map of each node that is observed, or of all; of a size we know."""
    return {
        each.inum: each.state_map
        for each in found.namespaces.values()
        if each.state_map and each.state_bytes in state.SIZES and (everywhere or each.role is Role.NODE)
    }


def state_sizes(found: Topology) -> tuple[int, ...]:
    """The sizes of the state maps of all nodes, as far as we know them; that of the newest release without a node."""
    sizes = {each.state_bytes for each in found.namespaces.values() if each.state_map} & set(state.SIZES)
    return tuple(sorted(sizes)) or (STATE_BYTES,)


def boot_id() -> str:
    """The kernel's id of this boot: clocks of two journals compare only when it is the same."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
