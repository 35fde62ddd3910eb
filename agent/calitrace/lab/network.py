"""Makes the lab's namespaces, links, addresses, routes and neighbours through netlink.

A node is set up as Felix sets it up: forwarding on, reverse path filter off (the BPF programs check it),
proxy ARP on the host side of a pod's veth, a scope-link route to each local pod, permanent neighbours.
The neighbours are more than convenience: a BPF redirect to an unresolved one costs the first packet.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import netns, tc
from calitrace.lab.topology import (
    ATTACHED,
    BRIDGE,
    FABRIC,
    GATEWAY,
    GATEWAY_MAC,
    NODES,
    OUTSIDE,
    PREFIX,
    VXLAN_OVERHEAD,
    Lab,
    Node,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_SIOCETHTOOL = 0x8946
# ETHTOOL_SRXCSUM, STXCSUM, SSG, STSO, SGSO, SGRO of include/uapi/linux/ethtool.h
_OFFLOADS = (0x15, 0x17, 0x19, 0x1F, 0x24, 0x2C)
_SCOPE_LINK = 253
_PERMANENT, _NOARP = 0x80, 0x40
_NTF_MASTER = 0x04


def namespace_exists(name: str) -> bool:
    return (netns.RUN_NETNS / name).exists()


def create_namespace(name: str) -> None:
    """Make a named namespace. Raises EnvironmentUnfit when the kernel or a namesake forbids it."""
    from pyroute2 import netns as made

    if namespace_exists(name):
        raise EnvironmentUnfit(
            f"there is already a network namespace {name}", f"remove it with `ip netns delete {name}`"
        )
    made.create(name)
    if not namespace_exists(name):
        raise EnvironmentUnfit(f"cannot create network namespace {name}", "run as root or with CAP_SYS_ADMIN")


def remove_namespace(name: str) -> None:
    """Remove a namespace with its links, at once: left to itself the kernel clears links up later."""
    from pyroute2 import netns as made
    from pyroute2.netlink.exceptions import NetlinkError

    if not namespace_exists(name):
        return
    # After a kill between creating the file and mounting the namespace on it, the name leads to no
    # namespace of its own: never enter that.
    if (netns.RUN_NETNS / name).stat().st_dev == Path("/proc/self/ns/net").stat().st_dev:
        with inside(name) as links:
            for link in links.get_links():
                kind = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
                if kind in ("veth", "bridge"):
                    try:
                        links.link("del", index=link["index"])
                    except NetlinkError as gone:
                        if gone.code != errno.ENODEV:  # it went with its peer
                            raise
        made.remove(name)
    else:
        (netns.RUN_NETNS / name).unlink()


@contextmanager
def inside(name: str) -> Iterator[Any]:
    """An ``IPRoute`` of the namespace, and this thread in it."""
    from pyroute2 import IPRoute

    with netns.inside(name), IPRoute() as route:
        yield route


def build(lab: Lab, mtu: int, checkpoint: Callable[[], None]) -> None:
    """Wire up the lab, whose namespaces exist. *mtu*: of the underlay. *checkpoint* may raise to stop."""
    for part in lab.namespaces:
        with inside(part) as route:
            _sysctl("ipv6/conf/all/disable_ipv6", "1")
            _sysctl("ipv6/conf/default/disable_ipv6", "1")
            _up(route, "lo")
        checkpoint()
    with inside(lab.namespace(FABRIC)) as route:
        route.link("add", ifname=BRIDGE, kind="bridge", br_stp_state=0, br_forward_delay=0)
        _up(route, BRIDGE, mtu=mtu)
        for leg in ATTACHED:
            peer = {"ifname": leg.interface, "net_ns_fd": lab.namespace(leg.name), "address": leg.mac}
            route.link("add", ifname=leg.name, kind="veth", peer=peer)
            _up(route, leg.name, mtu=mtu, master=index_of(route, BRIDGE))
            # Told where everyone is, it floods nothing: no node sees a frame that is for the other.
            port = index_of(route, leg.name)
            route.brport("set", index=port, unicast_flood=0, learning=0)
            route.fdb("add", ifindex=port, lladdr=leg.mac, flags=_NTF_MASTER, state=_NOARP)
    checkpoint()
    for leg in ATTACHED:
        with inside(lab.namespace(leg.name)) as route:
            if isinstance(leg, Node):
                _forwarding()
            _up(route, leg.interface, mtu=mtu)
            _plain_frames(leg.interface)
            index = index_of(route, leg.interface)
            route.addr("add", index=index, address=leg.address, prefixlen=PREFIX)
            for other in ATTACHED:
                if other is not leg:
                    _neighbour(route, index, other.address, other.mac)
            if isinstance(leg, Node):
                # Replies that return through the tunnel bear the node's own address as their source.
                _sysctl(f"ipv4/conf/{leg.interface}/accept_local", "1")
                for other in NODES:
                    if other is not leg:
                        route.route("add", dst=other.pod_cidr, gateway=other.address, oif=index)
                _add_pod(lab, route, leg, mtu - VXLAN_OVERHEAD)
        checkpoint()


def _add_pod(lab: Lab, route: Any, node: Node, mtu: int) -> None:
    pod = lab.namespace(node.pod)
    peer = {"ifname": "eth0", "net_ns_fd": pod, "address": node.pod_mac}
    route.link("add", ifname=node.workload, kind="veth", address=GATEWAY_MAC, peer=peer)
    _sysctl(f"ipv4/conf/{node.workload}/proxy_arp", "1")
    _sysctl(f"ipv4/neigh/{node.workload}/proxy_delay", "0")
    _up(route, node.workload, mtu=mtu)
    _plain_frames(node.workload)
    index = index_of(route, node.workload)
    route.route("add", dst=f"{node.pod_address}/32", oif=index, scope=_SCOPE_LINK)
    _neighbour(route, index, node.pod_address, node.pod_mac)
    with inside(pod) as within:
        _up(within, "eth0", mtu=mtu)
        _plain_frames("eth0")
        index = index_of(within, "eth0")
        within.addr("add", index=index, address=node.pod_address, prefixlen=32)
        within.route("add", dst=f"{GATEWAY}/32", oif=index, scope=_SCOPE_LINK)
        _neighbour(within, index, GATEWAY, GATEWAY_MAC)
        within.route("add", dst="default", gateway=GATEWAY, oif=index)


def divert_client_route(lab: Lab, node: Node, *, diverted: bool) -> None:
    """Point the node's route to the client at its pod, so that the client's packets come in the wrong way."""
    from pyroute2.netlink.exceptions import NetlinkError

    with inside(lab.namespace(node.name)) as route:
        index = index_of(route, node.workload)
        target = {"dst": f"{OUTSIDE.address}/32", "oif": index, "scope": _SCOPE_LINK}
        if diverted:
            route.route("replace", **target)
            # Without a neighbour the lookup would fail for want of one, not for the interface.
            _neighbour(route, index, OUTSIDE.address, node.pod_mac)
            return
        for thing, what in ((route.route, target), (route.neigh, {"dst": OUTSIDE.address, "ifindex": index})):
            try:
                thing("del", **what)
            except NetlinkError as gone:
                if gone.code not in (errno.ENOENT, errno.ESRCH):
                    raise


@dataclass(frozen=True)
class Attachment:
    """A BPF program on a tc hook, under the name given to its filter. *id*: the kernel's."""

    part: str
    interface: str
    hook: str
    program: str
    id: int


def iter_attached(lab: Lab, part: str) -> Iterator[Attachment]:
    """The tc programs in one of the lab's namespaces. Needs root."""
    with inside(lab.namespace(part)) as route:
        for link in route.get_links():
            interface = link.get_attr("IFLA_IFNAME")
            for each in tc.iter_filters(route, link["index"]):
                if each.program:
                    yield Attachment(part, interface, each.hook, each.name, each.program)


def index_of(route: Any, interface: str) -> int:
    """The ifindex of an interface in the namespace of *route*."""
    return int(route.link_lookup(ifname=interface)[0])


def _up(route: Any, interface: str, **settings: Any) -> None:
    route.link("set", index=index_of(route, interface), state="up", **settings)


def _neighbour(route: Any, index: int, address: str, mac: str) -> None:
    route.neigh("replace", dst=address, lladdr=mac, ifindex=index, state=_PERMANENT)


def _forwarding() -> None:
    _sysctl("ipv4/ip_forward", "1")
    _sysctl("ipv4/conf/all/rp_filter", "0")
    _sysctl("ipv4/conf/default/rp_filter", "0")
    for interface in Path("/proc/sys/net/ipv4/conf").iterdir():
        _sysctl(f"ipv4/conf/{interface.name}/rp_filter", "0")


def _sysctl(name: str, value: str) -> None:
    """Write below /proc/sys/net, which shows the namespace of the thread that opens it."""
    path = Path("/proc/sys/net") / name
    if name.startswith("ipv6/") and not path.exists():
        return  # a kernel without IPv6 has nothing to switch off
    path.write_text(value)


def _plain_frames(interface: str) -> None:
    """Switch segmentation and checksum offload off: what programs see is then what a wire would carry."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in _OFFLOADS:
            setting = array.array("I", (command, 0))
            request = struct.pack("16sP", os.fsencode(interface), setting.buffer_info()[0])
            fcntl.ioctl(control, _SIOCETHTOOL, request.ljust(40, b"\0"))
