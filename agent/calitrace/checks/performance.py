"""Section "Poor performance": encapsulation, MTU, offloads, the kernel's BPF switches."""

from __future__ import annotations

from ipaddress import IPv4Network
from typing import Any

from calitrace.calico.felix_config import Settings, Unset
from calitrace.calico.release import Release
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import (
    OWN_DEVICES,
    RESTART,
    dig,
    ebpf_on,
    iter_numbered,
    kernel_version,
    name_of,
    patch,
    uplinks,
)
from calitrace.checks.snapshot import Cloud, Host, Link, Route

Links = tuple[Link, ...]
Objects = tuple[dict[str, Any], ...]
WARNING, INFO = Severity.WARNING, Severity.INFO
_MTU_SETTINGS = {
    "tunl0": "ipipMTU",
    "vxlan.calico": "vxlanMTU",
    "vxlan-v6.calico": "vxlanMTUV6",
    "wireguard.cali": "wireguardMTU",
    "wg-v6.cali": "wireguardMTUV6",
}
_OVERHEAD = {"tunl0": 20, "vxlan.calico": 50, "vxlan-v6.calico": 70, "wireguard.cali": 60, "wg-v6.cali": 80}


def _modes(ip_pools: Objects, field: str) -> dict[str, str]:
    """IP pools that are in use, and their ipipMode or vxlanMode."""
    return {
        name_of(pool): str(dig(pool, "spec", field) or "Never")
        for pool in ip_pools
        if not dig(pool, "spec", "disabled")
    }


def ipip(links: Links, routes: tuple[Route, ...], ip_pools: Objects | None = None) -> Said:
    """Looks for IPIP in eBPF mode: routes of this node through tunl0, and IP pools that ask for it.

    The eBPF dataplane is made for VXLAN or no overlay; IPIP costs a detour through the host's stack.
    """
    modes = _modes(ip_pools or (), "ipipMode")
    wanting = [name for name, mode in modes.items() if mode != "Never"]
    used = [f"IPPool {name}: ipipMode {modes[name]}" for name in wanting]
    ways = (f"route {each.dst} via {each.gateway} dev tunl0" for each in routes if each.interface == "tunl0")
    used += iter_numbered(ways, 3)
    spec = '{"spec":{"ipipMode":"Never","vxlanMode":"CrossSubnet"}}'
    if used and ebpf_on(links):
        yield Finding(
            WARNING,
            "",
            tuple(used),
            "IPIP is slow in eBPF mode",
            "; ".join(f"kubectl patch ippool {name} --type merge -p '{spec}'" for name in wanting or ["NAME"]),
        )


def overlay_without_pool(felix: Settings, ip_pools: Objects) -> Said:
    """Looks for ipipEnabled (IpInIpEnabled) or vxlanEnabled true where no IP pool uses that overlay.

    Felix then keeps tunnel devices, and lowers the pods' MTU for nothing.
    """
    for field, mode in (("ipipEnabled", "ipipMode"), ("vxlanEnabled", "vxlanMode")):
        setting = felix.get(field)
        if isinstance(setting, Unset):
            yield Unknown(setting.why)
        elif setting.value is True and all(each == "Never" for each in _modes(ip_pools, mode).values()):
            yield Finding(
                WARNING,
                field,
                (str(setting), *(f"IPPool {n}: {mode} {each}" for n, each in _modes(ip_pools, mode).items())),
                "the overlay is on and no pool uses it: pods get a smaller MTU than they could have",
                patch(f'"{field}":false', setting),
            )


def vxlan_not_needed(nodes: Objects, ip_pools: Objects) -> Said:
    """Looks for pools with vxlanMode or ipipMode Always where all nodes are in one subnet.

    Between nodes of one subnet packets need no overlay; CrossSubnet leaves it out there.
    """
    networks = set()
    for node in nodes:
        annotated = dig(node, "metadata", "annotations", "projectcalico.org/IPv4Address")
        try:
            networks.add(IPv4Network(str(annotated), strict=False))
        except ValueError:
            yield Unknown(f"{name_of(node)} has no annotation projectcalico.org/IPv4Address with a subnet")
            return
    always = [
        (name, field)
        for field in ("vxlanMode", "ipipMode")
        for name, mode in _modes(ip_pools, field).items()
        if mode == "Always"
    ]
    if always and len(networks) == 1 and len(nodes) > 1:
        yield Finding(
            INFO,
            "",
            (
                *(f"IPPool {name}: {field} Always" for name, field in always),
                f"all {len(nodes)} nodes are in {networks.pop()}",
            ),
            "every packet between nodes is encapsulated though all nodes are in one subnet; only a network that knows "
            "no pod addresses (most clouds across subnets) needs that",
            "; ".join(
                f'kubectl patch ippool {name} --type merge -p \'{{"spec":{{"{field}":"CrossSubnet"}}}}\''
                for name, field in always
            ),
        )


def mtu_chain(links: Links, routes: tuple[Route, ...], peer_ways: dict[str, str] | None = None) -> Said:
    """Compares the MTU of uplink, overlay device and pods: each must leave room for what is put around it."""
    found = uplinks(links, routes, set(), peer_ways)
    if isinstance(found, Unknown):
        yield found
        return
    pods = [link for link in links if link.workload and link.up]
    for tunnel in (link for link in links if link.name in _OVERHEAD and link.up):
        overhead, setting = _OVERHEAD[tunnel.name], _MTU_SETTINGS[tunnel.name]
        for uplink in found:
            if tunnel.mtu + overhead > uplink.mtu:
                yield Finding(
                    WARNING,
                    tunnel.name,
                    (f"{tunnel.name}: MTU {tunnel.mtu} + {overhead}", f"{uplink.name}: MTU {uplink.mtu}"),
                    "full-size packets of the overlay do not fit on the uplink",
                    "let Felix choose; " + patch(f'"{setting}":0') + "; look at mtuIfacePattern, which ignores bonds",
                )
        large = [pod for pod in pods if pod.mtu > tunnel.mtu]
        if large:
            yield Finding(
                WARNING,
                tunnel.name,
                (
                    f"{tunnel.name}: MTU {tunnel.mtu}",
                    *iter_numbered((f"{pod.name}: MTU {pod.mtu}" for pod in large), 3),
                ),
                "pods send packets that are too large for the overlay",
                "restart those pods: the CNI plugin gives the MTU that Felix wrote to /var/lib/calico/mtu",
            )


def aws_flow_limit(cloud: Cloud, release: Release) -> Said:
    """Looks for AWS with v3.28 or older, where all NodePort tunnel traffic of two nodes is one flow.

    AWS limits one flow to 5 Gbit/s outside a cluster placement group. From v3.29 on source ports vary.
    """
    if cloud.provider == "aws" and release.newest <= (3, 28):
        yield Finding(
            INFO,
            "",
            (f"aws: {cloud.machine or 'instance type not known'}", f"{release} ({release.source})"),
            "all NodePort traffic between two nodes is one flow to AWS (UDP 4789 to 4789), limited to 5 Gbit/s, and on "
            "one CPU of the receiver",
            "update to v3.29 or later, or use DSR; " + patch('"bpfExternalServiceMode":"DSR"'),
        )


def ctlb(felix: Settings, release: Release) -> Said:
    """Looks at connect-time load balancing: off costs NAT on each packet, on for UDP binds a socket to one backend."""
    setting, legacy = felix.get("bpfConnectTimeLoadBalancing"), felix.get("bpfConnectTimeLoadBalancingEnabled")
    if isinstance(setting, Unset) or isinstance(legacy, Unset):
        yield Unknown("bpfConnectTimeLoadBalancing is not known")
        return
    old = legacy.value if release.newest < (3, 27) or legacy.value is not None else None
    shown = str(legacy) if old is not None else str(setting)
    fix = patch('"bpfConnectTimeLoadBalancing":"TCP"', setting) + "; (v3.27 and later)"
    if old is not None:  # as long as the older name is set it wins
        fix = patch('"bpfConnectTimeLoadBalancingEnabled":null', legacy) + "; " + fix
    off, every = (not old, bool(old)) if old is not None else (setting.says("Disabled"), setting.says("Enabled"))
    if off:
        yield Finding(
            INFO,
            "",
            (shown,),
            "each packet from a pod to a service is translated; with TCP it would be once for each connection",
            fix,
        )
    elif every and release.oldest >= (3, 27):
        yield Finding(
            INFO,
            "",
            (shown,),
            "UDP sockets stay with their first backend, even when it is gone: DNS clients keep asking a dead pod "
            "(projectcalico/calico#4509); service meshes do not see service addresses (#8495)",
            fix,
        )


def jit_off(sysctls: dict[str, str]) -> Said:
    """Looks at net.core.bpf_jit_enable: 0 interprets every program, several times slower."""
    value = sysctls.get("net.core.bpf_jit_enable")
    if value is None:
        yield Unknown("net.core.bpf_jit_enable could not be read")
    elif value == "0":
        yield Finding(
            WARNING,
            "",
            (f"net.core.bpf_jit_enable = {value}",),
            "BPF programs are interpreted",
            f"sysctl -w net.core.bpf_jit_enable=1; {RESTART}",
        )


def bpf_stats(sysctls: dict[str, str]) -> Said:
    """Looks at kernel.bpf_stats_enabled: left on, it costs two clock readings for each run of a program."""
    value = sysctls.get("kernel.bpf_stats_enabled")
    if value is None:
        yield Unknown("kernel.bpf_stats_enabled could not be read")
    elif value != "0":
        yield Finding(
            INFO,
            "",
            (f"kernel.bpf_stats_enabled = {value}",),
            "each run of a BPF program is timed: 20 to 30 ns more",
            "sysctl -w kernel.bpf_stats_enabled=0",
        )


def gro_off(links: Links, routes: tuple[Route, ...], peer_ways: dict[str, str] | None = None) -> Said:
    """Looks at generic receive offload on uplinks: without it each frame runs through the programs by itself."""
    found = uplinks(links, routes, set(), peer_ways)
    if isinstance(found, Unknown):
        yield found
        return
    for link in found:
        if not link.features:
            yield Unknown(f"the offloads of {link.name} could not be read")
        off = [name for name in ("rx-gro", "tx-generic-segmentation") if link.features.get(name) is False]
        if off and link.any_calico:
            yield Finding(
                INFO,
                link.name,
                tuple(f"{link.name}: {name} off" for name in off),
                "more runs of the programs, and more CPU, for the same traffic",
                f"ethtool -K {link.name} gro on gso on  # unless it is off for a reason (bpfDisableGROForIfaces)",
            )


def vxlan_checksum(links: Links, host: Host) -> Said:
    """Looks at the checksum offload of vxlan.calico from Linux 6.12 on, where it can cost nearly all throughput."""
    version = kernel_version(host.kernel)
    if version is None:
        yield Unknown(f"{host.kernel!r} is no kernel release that we can read")
        return
    for link in links:
        if link.name not in OWN_DEVICES or link.kind != "vxlan":
            continue
        if not link.features:
            yield Unknown(f"the offloads of {link.name} could not be read")
        if link.features.get("tx-checksum-ip-generic") and version >= (6, 12):
            yield Finding(
                WARNING,
                link.name,
                (f"{link.name}: tx-checksum-ip-generic on", f"kernel {host.kernel}"),
                "the overlay can be as slow as 50 to 300 Mbit/s (projectcalico/calico#11435)",
                f"ethtool -K {link.name} tx-checksum-ip-generic off; or featureDetectOverride "
                "ChecksumOffloadBroken=true in FelixConfiguration",
            )


CHECKS = (
    Check("performance.ipip", Section.PERFORMANCE, ipip),
    Check("performance.overlay-without-pool", Section.PERFORMANCE, overlay_without_pool),
    Check("performance.overlay-not-needed", Section.PERFORMANCE, vxlan_not_needed),
    Check("performance.mtu-chain", Section.PERFORMANCE, mtu_chain),
    Check("performance.aws-flow-limit", Section.PERFORMANCE, aws_flow_limit),
    Check("performance.ctlb", Section.PERFORMANCE, ctlb),
    Check("performance.jit-off", Section.PERFORMANCE, jit_off),
    Check("performance.bpf-stats", Section.PERFORMANCE, bpf_stats),
    Check("performance.gro-off", Section.PERFORMANCE, gro_off),
    Check("performance.vxlan-checksum", Section.PERFORMANCE, vxlan_checksum),
)
