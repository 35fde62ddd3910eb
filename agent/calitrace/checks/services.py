"""Section "Troubleshoot access to services": is the dataplane on, on every interface, and does traffic reach it?"""

from __future__ import annotations

import re
from typing import Any

from calitrace.calico.felix_config import Settings, Unset
from calitrace.calico.release import MASTER, Release
from calitrace.checks.decoded import Nat
from calitrace.checks.felix_log import felix_started, log_checks
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import (
    KUBE_PROXY_OFF,
    L3_KINDS,
    OWN_DEVICES,
    RESTART,
    calico_environment,
    carriers,
    data_pattern,
    detach,
    dig,
    ebpf_on,
    grave,
    grep_log,
    hooks,
    items,
    iter_numbered,
    kernel_version,
    kube_proxies,
    l3_pattern,
    name_of,
    node_addresses,
    patch,
    proxy_rules,
    uplinks,
    widened,
)
from calitrace.checks.snapshot import Cloud, Host, Link, Process, Route, VxlanProbe

Links = tuple[Link, ...]
Routes = tuple[Route, ...]
Objects = tuple[dict[str, Any], ...]
ERROR, WARNING, INFO = Severity.ERROR, Severity.WARNING, Severity.INFO
NODEPORT_OVERHEAD = 50  # IPv4, UDP, VXLAN and Ethernet headers of the NodePort tunnel


def ebpf_off(links: Links, felix: Settings | None = None, processes: tuple[Process, ...] | None = None) -> Said:
    """Looks for a Calico program on any interface (tc and tcx), and at bpfEnabled.

    Requested and not on means that Felix fell back, does not run, or could not attach; then only kube-proxy could
    serve services. Not requested and still on means that programs of an earlier time handle traffic with maps that
    nobody writes any more.

    That nothing is on is believed only where a kubelet runs or Calico has an interface: a pod's own namespace has no
    program either.
    """
    on = ebpf_on(links)
    calico = any(link.workload or (link.name in OWN_DEVICES and link.name != "lo") for link in links)
    if not on and not calico and not any(each.name == "kubelet" for each in processes or ()):
        yield Unknown("neither a kubelet nor an interface of Calico's in sight: is this the node's network namespace?")
        return
    wanted = felix.get("bpfEnabled") if felix else Unset("Felix's settings are not known")
    if isinstance(wanted, Unset):
        if not on:
            evidence = f"no Calico program on any of {len(links)} interfaces"
            yield Finding(
                WARNING,
                "",
                (evidence, wanted.why),
                "eBPF mode is off, or has failed",
                "calitrace check --felix-config FILE",
            )
    elif wanted.value and not on:
        yield Finding(
            ERROR,
            "",
            (str(wanted), f"no Calico program on any of {len(links)} interfaces"),
            "eBPF mode is requested and not on: no service works on this node unless kube-proxy runs",
            grep_log("bpf"),
        )
    elif on and not wanted.value:
        yield Finding(
            ERROR,
            "",
            (str(wanted), *(f"{link.name}: {hooks(link)}" for link in links if link.any_calico)),
            "eBPF mode was switched off and its programs are still attached; nobody keeps their maps up to date",
            f"{RESTART}; if they stay, in its container from v3.30 on; calico-node -bpf cleanup; or reboot",
        )
    elif not on:
        yield Finding(
            INFO,
            "",
            (str(wanted),),
            "eBPF mode is not requested: services are kube-proxy's, and most of these checks have nothing to look at",
            patch('"bpfEnabled":true', wanted),
        )


def workload_programs(links: Links) -> Said:
    """Looks at both hooks of every pod's interface.

    Without the program at ingress, what the pod sends skips policy and services, and is dropped by iptables for want
    of Calico's mark; without the one at egress, policy towards the pod is not enforced and new flows are refused.
    """
    if not ebpf_on(links):
        yield Unknown("no interface carries a Calico program: see services.ebpf-off")
        return
    for link in links:
        if link.workload and link.up and not link.all_calico:
            if link.kind == "netkit":
                yield Unknown(f"{link.name} is a netkit device: its programs are not to be seen through tc or tcx")
                continue
            yield Finding(
                ERROR,
                link.name,
                (f"{link.name}: {hooks(link)}",),
                "a Calico program is missing on this pod's interface: its traffic is dropped or escapes policy "
                "(projectcalico/calico#8897)",
                f"{RESTART}; bpftool net show dev {link.name}",
            )


def uplink_programs(
    links: Links,
    routes: Routes,
    felix: Settings | None = None,
    nodes: Objects | None = None,
    host: Host | None = None,
    peer_ways: dict[str, str] | None = None,
    release: Release | None = None,
) -> Said:
    """Looks at both hooks of every interface through which traffic enters and leaves the node.

    Those are the interfaces with a gateway or other nodes behind them, or a node address on them, and all others that
    bpfDataIfacePattern matches. NodePort traffic is seen only where the programs are. Of a NIC and the VLANs or bond on
    it, from v3.30 on Felix attaches to the topmost alone that the pattern matches.
    """
    if not ebpf_on(links):
        yield Unknown("no interface carries a Calico program: see services.ebpf-off")
        return
    pattern, addresses = data_pattern(felix) if felix else None, _addresses(nodes, host)
    found = uplinks(links, routes, addresses, peer_ways)
    matched = [each for each in links if isinstance(pattern, tuple) and _is_data(each, pattern[0])]
    if isinstance(found, Unknown) and not matched:
        yield found
        return
    carrying = () if isinstance(found, Unknown) else found
    for link in {each.name: each for each in (*carrying, *matched)}.values():
        if link.all_calico:
            continue
        on_top = _above(link, links, pattern) if release is None or release.newest >= _TREES else ()
        if on_top and link not in carrying:
            continue
        above = [f"{each.name}: vlan on {link.name}; {hooks(each)}" for each in on_top if each.any_calico]
        if above and isinstance(pattern, tuple) and pattern[0].search(link.name):
            yield Finding(
                grave(link, routes, addresses, peer_ways),
                link.name,
                (f"{link.name}: {hooks(link)}; {_ways(link, routes)}", *above, pattern[1]),
                f"from v3.30 on Felix attaches to what lies on {link.name} and takes its programs from {link.name} "
                "itself: services are not reachable through its own address",
                _topmost(link, on_top[0]),
            )
            continue
        if isinstance(pattern, tuple) and not pattern[0].search(link.name) and not _is_l3(felix, link):
            continue  # services.data-iface-pattern says so
        said = pattern[1] if isinstance(pattern, tuple) else "bpfDataIfacePattern is not known"
        yield Finding(
            grave(link, routes, addresses, peer_ways),
            link.name,
            (f"{link.name}: {hooks(link)}", said),
            "services are not reachable through this interface: Calico's programs are not on it",
            f"bpftool net show dev {link.name}; {RESTART}; " + grep_log("attach"),
        )


_TREES = (3, 30)  # projectcalico/calico#9498


def _above(link: Link, links: Links, pattern: tuple[re.Pattern[str], str] | Unknown | None) -> Links:
    """VLANs on a device that bpfDataIfacePattern matches as well."""
    on_top = (each for each in links if each.parent == link.name and each.kind == "vlan")
    return tuple(each for each in on_top if isinstance(pattern, tuple) and pattern[0].search(each.name))


def _topmost(link: Link, on_top: Link) -> str:
    """What to do where a device and a VLAN on it both carry traffic: no pattern serves both (v3.30 and later)."""
    return (
        f"give the addresses of {link.name} to a device on top, such as {on_top.name}; or make a FelixConfiguration "
        f"node.NAME for this node alone, whose bpfDataIfacePattern matches the one of {link.name} and {on_top.name} "
        "that carries the cluster's traffic, and not the other"
    )


def _is_data(link: Link, pattern: re.Pattern[str]) -> bool:
    """Whether Felix has to attach its programs there: ports of a bond or bridge it leaves to their master."""
    own = link.name in OWN_DEVICES or link.workload
    return link.up and not link.master and not own and pattern.search(link.name) is not None


def _addresses(nodes: Objects | None, host: Host | None) -> set[str]:
    return node_addresses(nodes, host.node) if nodes and host else set()


def _is_l3(felix: Settings | None, link: Link) -> bool:
    pattern = l3_pattern(felix) if felix else None
    return pattern is not None and pattern.search(link.name) is not None


def data_iface_pattern(
    links: Links,
    routes: Routes,
    felix: Settings,
    nodes: Objects | None = None,
    host: Host | None = None,
    peer_ways: dict[str, str] | None = None,
) -> Said:
    """Compares bpfDataIfacePattern and bpfL3IfacePattern with the interfaces that carry traffic.

    Those are the interfaces with a gateway or other nodes behind them, or a node address on them: NICs, bonds, bridges,
    VLANs, WireGuard. What neither pattern matches gets no program, and NodePorts that enter there time out, or work
    only when the pod is local.
    """
    pattern = data_pattern(felix)
    if isinstance(pattern, Unknown):
        yield pattern
        return
    addresses = _addresses(nodes, host)
    found = uplinks(links, routes, addresses, peer_ways)
    if isinstance(found, Unknown):
        yield found
        return
    for link in found:
        l3 = link.kind in L3_KINDS
        if _is_l3(felix, link) or pattern[0].search(link.name):
            continue
        evidence = [f"{link.name}: {link.kind or 'device'}, {_ways(link, routes)}", pattern[1]]
        if link.name in (peer_ways or {}):
            evidence.insert(1, f"other nodes are behind it, such as {(peer_ways or {})[link.name]}")
        field = "bpfL3IfacePattern" if l3 else "bpfDataIfacePattern"
        yield Finding(
            grave(link, routes, addresses, peer_ways),
            link.name,
            tuple(evidence),
            _UNMATCHED.get(
                link.kind,
                "Calico attaches no program to this interface: services are not reachable there "
                "(projectcalico/calico#6392)",
            ),
            widened(felix, field, link.name),
        )


_UNMATCHED = {
    "bond": "Calico attaches no program to this bond: services are not reachable through it; before v3.29 the default "
    "pattern has no bond (projectcalico/calico#8917)",
    "bridge": "the node's address is on a bridge that Calico does not look at (projectcalico/calico#13134)",
    "wireguard": "node-to-node traffic uses a WireGuard device that Calico does not look at: NodePorts work only on "
    "nodes that hold a backend (projectcalico/calico#4817)",
}


def l3_as_ethernet(links: Links, felix: Settings, release: Release | None = None) -> Said:
    """Looks for layer-3 devices (WireGuard and other tunnels) that bpfDataIfacePattern matches, before v3.30.

    Those programs take their packets for Ethernet frames. Newer releases look at what kind of device it is.
    """
    pattern = data_pattern(felix)
    if isinstance(pattern, Unknown):
        yield pattern
        return
    if release and release.oldest >= _TREES:
        return
    sure = release is not None and release.newest < _TREES
    for link in links:
        own = link.name in OWN_DEVICES or link.workload
        if link.kind not in L3_KINDS or own or not link.up or _is_l3(felix, link) or not pattern[0].search(link.name):
            continue
        yield Finding(
            ERROR if sure else WARNING,
            link.name,
            (f"{link.name}: {link.kind}; {hooks(link)}", pattern[1], str(release or "Calico's release is not known")),
            "this device has no Ethernet header, and bpfDataIfacePattern is for those that do: before v3.30 all its "
            "traffic is dropped (projectcalico/calico#4326, #4817)",
            widened(felix, "bpfL3IfacePattern", link.name) + "; (v3.25 and later); take it out of bpfDataIfacePattern",
        )


def tunnel_over_l3(links: Links, peer_ways: dict[str, str]) -> Said:
    """Looks for other nodes behind a layer-3 device that is not Calico's, such as a WireGuard mesh of one's own.

    What enters at one node for a pod on another goes there in VXLAN, which Calico's programs on such a device do not
    take out of its tunnel.
    """
    by_name = {link.name: link for link in links}
    for name, address in peer_ways.items():
        link = by_name.get(name)
        if link is not None and link.kind in L3_KINDS and name not in OWN_DEVICES and ebpf_on(links):
            yield Finding(
                WARNING,
                name,
                (f"{name}: {link.kind}; other nodes are behind it, such as {address}",),
                "NodePorts and load balancers reach only pods of the node where they come in: the tunnel to other "
                "nodes is not supported on layer-3 devices (projectcalico/calico#11590)",
                f"put a VXLAN device with other port and VNI over {name} and the nodes' addresses on it "
                "(projectcalico/calico#12900 does so); or externalTrafficPolicy: Local",
            )


def _ways(link: Link, routes: Routes) -> str:
    gateways = [f"{route.dst} via {route.gateway or 'the link'}" for route in routes if route.interface == link.name]
    return "; ".join((*link.addresses, *iter_numbered(gateways, 2))) or "no address"


def enslaved_programs(links: Links) -> Said:
    """Looks for Calico programs on a port of a bond or bridge.

    Packets seen there fail the reverse path check, because the route back is through the bond or bridge.
    """
    masters = {link.name: link for link in links if link.kind in ("bond", "bridge")}
    for link in links:
        if link.any_calico and link.master in masters and not link.workload:
            master = masters[link.master]
            yield Finding(
                ERROR,
                link.name,
                (f"{link.name}: port of {master.kind} {master.name}; {hooks(link)}", f"{master.name}: {hooks(master)}"),
                "the program is on a port, the route is through its master: strict reverse path checks drop traffic "
                "(projectcalico/calico#6450, #13134)",
                f"let bpfDataIfacePattern match {master.name} and not {link.name}; programs that stay on "
                f"{link.name}; {detach(link.name)}",
            )


def vlan_parent(links: Links, release: Release | None = None) -> Said:
    """Looks for VLAN devices whose parent carries Calico's programs.

    The parent sees tagged frames, which the programs take for malformed. From v3.30 on a parent has none when
    bpfDataIfacePattern matches the VLAN.
    """
    by_name = {link.name: link for link in links}
    for link in links:
        parent = by_name.get(link.parent)
        if link.kind == "vlan" and parent is not None and parent.any_calico:
            yield Finding(
                WARNING,
                parent.name,
                (f"{link.name}: vlan on {parent.name}", f"{parent.name}: {hooks(parent)}"),
                "tagged frames on the parent can be dropped as malformed (projectcalico/calico#9401)",
                _topmost(parent, link)
                if release is None or release.newest >= _TREES
                else f"let bpfDataIfacePattern match {link.name} and not {parent.name}",
            )


def macvtap(links: Links, release: Release | None = None) -> Said:
    """Looks for macvtap and macvlan devices, such as virtual machines have, on interfaces with Calico's programs.

    Before v3.27.4 and v3.28.1 the programs forwarded packets that are for such a machine, and did not leave them alone.
    """
    by_name = {link.name: link for link in links}
    for link in links:
        parent = by_name.get(link.parent)
        if link.kind not in ("macvtap", "macvlan") or parent is None or not parent.any_calico:
            continue
        if release is None:
            yield Unknown(f"{link.name} is on {parent.name}, and Calico's release is not known")
            continue
        mended = _leaves_macvtap_alone(release)
        if mended is None:
            yield Unknown(f"{link.name} is on {parent.name}; mended in v3.27.4 and v3.28.1, and this is {release}")
        elif not mended:
            known = f"{release}" if release.patch is None else f"{release}.{release.patch}"
            yield Finding(
                WARNING,
                link.name,
                (f"{link.name}: {link.kind} on {parent.name}", f"{parent.name}: {hooks(parent)}", known),
                "packets for the machine behind it can be forwarded by Calico and lost; v3.27.4, v3.28.1 and later "
                "leave them alone (projectcalico/calico#6450, #8918)",
                "update Calico; or put that machine on an interface that bpfDataIfacePattern does not match",
            )


def _leaves_macvtap_alone(release: Release) -> bool | None:
    """None where the release is not known well enough."""
    first = {(3, 27): 4, (3, 28): 1}.get(release.oldest) if release.oldest == release.newest else None
    if first is not None:
        return None if release.patch is None else release.patch >= first
    if release.newest < (3, 27):
        return False
    return True if release.oldest > (3, 28) else None


def foreign_program(links: Links) -> Said:
    """Looks for tc or tcx programs of others that run before Calico's on the same hook.

    Whatever such a program answers but "go on" (TC_ACT_UNSPEC), Calico never sees the packet.
    """
    for link in links:
        for hook, programs in link.programs.items():
            names = [program.is_calico for program in programs]
            if True in names and names.index(True) > 0:
                first = programs[0]
                yield Finding(
                    WARNING,
                    link.name,
                    (f"{link.name} {hook}: {', '.join(f'{p.name} (id {p.id})' for p in programs)}",),
                    f"{first.name} runs before Calico's program and can keep packets from it",
                    f"bpftool prog show id {first.id}; find who attached it (Cilium, Istio, Datadog, a CNI plugin)",
                )


def bandwidth_plugin(links: Links) -> Said:
    """Looks for the devices of the CNI bandwidth plugin (bwp*), which does not go together with eBPF mode.

    Its device takes what the pod sends and gives it back behind Calico's program.
    """
    found = [link.name for link in links if link.kind == "ifb" and link.name.startswith("bwp")]
    if found and ebpf_on(links):
        yield Finding(
            WARNING,
            "",
            tuple(iter_numbered((f"{name}: ifb, made by the bandwidth plugin" for name in found), 3)),
            "pods with the annotations kubernetes.io/ingress-bandwidth or egress-bandwidth can lose their network "
            "(projectcalico/calico#7698)",
            "take the plugin out of the CNI configuration; from v3.30 on use qos.projectcalico.org annotations",
        )


def kube_proxy_absent(links: Links, processes: tuple[Process, ...]) -> Said:
    """Looks for kube-proxy where no Calico program is attached: one of the two must serve services.

    That it is absent is believed only where a kubelet is in sight: a container sees its own processes alone, and in
    k3s kube-proxy is part of another process.
    """
    found = kube_proxies(processes)
    if isinstance(found, Unknown):
        yield found
    elif not ebpf_on(links) and not found:
        yield Finding(
            ERROR,
            "",
            (f"no Calico program on any of {len(links)} interfaces", f"no kube-proxy among {len(processes)} processes"),
            "nobody serves services on this node (xunholy/k8s-gitops#97)",
            grep_log("not supported by the kernel"),
        )


def kube_proxy_beside(links: Links, processes: tuple[Process, ...], felix: Settings | None = None) -> Said:
    """Looks for kube-proxy beside the eBPF dataplane, where bpfKubeProxyIptablesCleanupEnabled is not known.

    Where it is known to be true, cpu.kube-proxy-fight speaks; where it is false, the two may live together.
    """
    found = kube_proxies(processes)
    cleanup = felix.get("bpfKubeProxyIptablesCleanupEnabled") if felix else Unset("Felix's settings are not known")
    if isinstance(found, Unknown):
        yield found
    elif found and ebpf_on(links) and isinstance(cleanup, Unset):
        yield Finding(
            WARNING,
            "",
            (*(f"process {each.pid}: {each.command or each.name}" for each in found), cleanup.why),
            "kube-proxy runs beside the eBPF dataplane; unless bpfKubeProxyIptablesCleanupEnabled is false, Felix "
            "removes its rules as fast as it writes them (projectcalico/calico#10538)",
            KUBE_PROXY_OFF,
        )


def healthz_port(links: Links, processes: tuple[Process, ...], felix: Settings, release: Release) -> Said:
    """Looks for kube-proxy where Felix is to listen on bpfKubeProxyHealthzPort: both want port 10256."""
    port = felix.get("bpfKubeProxyHealthzPort")
    cleanup = felix.get("bpfKubeProxyIptablesCleanupEnabled")
    found = kube_proxies(processes)
    if isinstance(found, Unknown):
        yield found
    elif isinstance(port, Unset) or isinstance(cleanup, Unset):
        yield Unknown("bpfKubeProxyHealthzPort or bpfKubeProxyIptablesCleanupEnabled is not known")
    elif release.oldest < (3, 31):
        yield Unknown(f"bpfKubeProxyHealthzPort is of v3.31, and this is {release}")
    elif found and ebpf_on(links) and not cleanup.value and port.value == 10256:
        yield Finding(
            INFO,
            "",
            (str(port), *(f"process {each.pid}: {each.name}" for each in found)),
            "kube-proxy owns port 10256: Felix logs an error each time it cannot bind it (projectcalico/calico#10748)",
            patch('"bpfKubeProxyHealthzPort":0', port),
        )


def kernel_too_old(host: Host, release: Release | None = None) -> Said:
    """Compares the kernel with what Felix demands: 5.3, or 4.18.0-193 of the RHEL family (RHEL 8.2).

    With an older one Felix falls back to the standard dataplane. v3.31 and later are documented for 5.10 (RHEL 8.4:
    4.18.0-305); what follows v3.32 has no programs for a kernel without BTF.
    """
    version = kernel_version(host.kernel)
    if version is None:
        yield Unknown(f"{host.kernel!r} is no kernel release that we can read")
        return
    words = f"{host.distribution.get('ID', '')} {host.distribution.get('ID_LIKE', '')}".split()
    rhel = bool({"rhel", "centos", "fedora"} & set(words)) and version[:2] == (4, 18)
    evidence = (f"kernel {host.kernel}", f"{host.distribution.get('PRETTY_NAME', 'distribution not known')}")
    if version < ((4, 18, 0, 193) if rhel else (5, 3)):
        yield Finding(
            ERROR,
            "",
            evidence,
            "Felix finds this kernel unsupported and falls back to the standard dataplane; without kube-proxy no "
            "service works",
            "update the kernel: 5.3 or later, in the RHEL family 4.18.0-193 (RHEL 8.2) or later",
        )
    elif release and release.oldest >= MASTER and not host.btf:
        yield Finding(
            ERROR,
            "",
            (*evidence, "/sys/kernel/btf/vmlinux: not there", str(release)),
            "this release's programs are fitted to the kernel by its BTF; without it none can be loaded",
            "use a kernel with CONFIG_DEBUG_INFO_BTF, or Calico v3.32",
        )
    elif release and release.oldest >= (3, 31) and version < ((4, 18, 0, 305) if rhel else (5, 10)):
        yield Finding(
            WARNING,
            "",
            (*evidence, str(release)),
            "from v3.31 on Calico is documented for Linux 5.10 (RHEL 8.4); programs may be refused here",
            "update the kernel: 5.10 or later, in the RHEL family 4.18.0-305 (RHEL 8.4) or later",
        )


def mtu(
    links: Links,
    routes: Routes,
    nodes: Objects | None = None,
    host: Host | None = None,
    peer_ways: dict[str, str] | None = None,
) -> Said:
    """Compares the pods' MTU with that of the uplinks, which must leave 50 bytes for the NodePort tunnel (VXLAN).

    A packet that is too large is answered with an ICMP "fragmentation needed"; where that is lost, or the packet has
    no DF, small requests work and large ones hang.
    """
    pods = [link for link in links if link.workload and link.up]
    found = uplinks(links, routes, _addresses(nodes, host), peer_ways)
    if isinstance(found, Unknown):
        yield found
        return
    for uplink in found:
        large = [pod for pod in pods if pod.mtu + NODEPORT_OVERHEAD > uplink.mtu]
        left = uplink.mtu - NODEPORT_OVERHEAD
        smaller = (
            f'kubectl patch installation default --type merge -p \'{{"spec":{{"calicoNetwork":{{"mtu":{left}}}}}}}\''
        )
        fix = smaller
        if large and uplink.kind not in (*L3_KINDS, "vxlan"):  # what a tunnel has room for, the network below it says
            wider = f"ip link set {uplink.name} mtu {max(pod.mtu for pod in large) + NODEPORT_OVERHEAD}"
            fix = f"{wider}; the same on every node and on what is between; or lower the pods' MTU; {smaller}"
        if large:
            yield Finding(
                WARNING,
                uplink.name,
                (
                    f"{uplink.name}: MTU {uplink.mtu} leaves {left} inside the NodePort tunnel",
                    *iter_numbered((f"{pod.name}: MTU {pod.mtu}" for pod in large), 3),
                ),
                "full-size packets between a client and a pod on another node do not fit into the tunnel: large "
                "answers stall (projectcalico/calico#4439, #12432)",
                fix,
            )


def vxlan_port_clash(links: Links, felix: Settings) -> Said:
    """Looks for VXLAN devices of others on Calico's VXLAN port (flannel, docker swarm).

    The NodePort tunnel uses vxlanPort as well, even where pods need no overlay.
    """
    port = felix.get("vxlanPort")
    if isinstance(port, Unset):
        yield Unknown(port.why)
        return
    for link in links:
        if link.kind == "vxlan" and link.udp_port == port.value and link.name not in OWN_DEVICES:
            yield Finding(
                WARNING,
                link.name,
                (f"{link.name}: VXLAN device on UDP {link.udp_port}", str(port)),
                "another network uses the port of Calico's tunnels; a flow-based vxlan.calico (v3.31) cannot share it",
                patch('"vxlanPort":4790', port) + "; open that port between the nodes",
            )


def vxlan_probe(vxlan_probes: tuple[VxlanProbe, ...]) -> Said:
    """Sends packets in the NodePort tunnel to another node and waits for the answers (only with --probe).

    An answer proves the tunnel in both directions. Without one the network, the other node's dataplane or the
    service's pod may be at fault. What another node's probes met is taken from its snapshot (--other).
    """
    for each in vxlan_probes:
        if each.answered < each.sent:
            sender = f"from {each.sender} " if each.sender else ""
            yield Finding(
                ERROR if each.answered == 0 else WARNING,
                f"{sender}to {each.node}" if each.sender else each.node,
                (
                    f"VXLAN {sender}to {each.node} UDP {each.port} with {each.inner} inside: {each.sent} sent, "
                    f"{each.answered} answered",
                ),
                "the network between the nodes loses Calico's tunnel (firewall, security group), or the service behind "
                "it does not answer",
                f"calitrace probe vxlan {each.node} --inner {each.inner} --vxlan-port {each.port} --trace"
                + (f"  # on {each.sender}" if each.sender else ""),
            )


def checksum_offload(links: Links, felix: Settings | None = None) -> Said:
    """Looks for VMware NICs (vmxnet3) that are to compute checksums of tunnelled packets.

    Where NSX or ESXi treats UDP 4789 as its own, the inner checksum is never filled in and the packet is lost.
    """
    port = felix.get("vxlanPort") if felix else Unset("")
    number = 4789 if isinstance(port, Unset) else port.value
    for link in links:
        if link.driver == "vmxnet3" and not link.features:
            yield Unknown(f"the offloads of {link.name} could not be read")
        on = [n for n in ("tx-checksum-ip-generic", "tx-udp_tnl-segmentation") if link.features.get(n)]
        if link.driver == "vmxnet3" and link.any_calico and on and number == 4789:
            yield Finding(
                WARNING,
                link.name,
                (f"{link.name}: driver vmxnet3; {', '.join(f'{name}: on' for name in on)}", f"vxlanPort: {number}"),
                "ESXi can lose VXLAN packets on port 4789 whose checksum is left to it: TCP and UDP vanish, ping works "
                "(projectcalico/calico#7040, #4727, #9433)",
                f"ethtool -K {link.name} {' '.join(f'{name} off' for name in on)}; or another vxlanPort",
            )


def rp_filter(
    links: Links,
    routes: Routes,
    sysctls: dict[str, str],
    nodes: Objects | None = None,
    host: Host | None = None,
    peer_ways: dict[str, str] | None = None,
) -> Said:
    """Looks at the kernel's own reverse path filter on uplinks: the larger of ``all`` and the interface's counts.

    Calico's programs check the reverse path themselves; strict filtering in the kernel drops what they let pass, such
    as replies that come back through the tunnel, and everything of DSR.
    """
    if not ebpf_on(links):
        yield Unknown("no interface carries a Calico program: see services.ebpf-off")
        return
    shared = sysctls.get("net.ipv4.conf.all.rp_filter")
    if shared is None:
        yield Unknown("net.ipv4.conf.all.rp_filter could not be read")
        return
    found = uplinks(links, routes, _addresses(nodes, host), peer_ways)
    if isinstance(found, Unknown):
        yield found
        return
    for link in found:
        own = sysctls.get(f"net.ipv4.conf.{link.name}.rp_filter", "0")
        if max(own, shared) == "1":
            yield Finding(
                WARNING if shared == "1" else INFO,
                link.name,
                (f"net.ipv4.conf.all.rp_filter = {shared}", f"net.ipv4.conf.{link.name}.rp_filter = {own}"),
                "the kernel drops packets whose source it would reach through another interface, after Calico let them "
                "pass" + ("; Felix sets all to 0, so something set it again" if shared == "1" else ""),
                "sysctl -w net.ipv4.conf.all.rp_filter=0 "
                f"net.ipv4.conf.{link.name.replace('.', '/')}.rp_filter=0; find who sets it: "
                "systemd-networkd, tuned, /etc/sysctl.d",
            )


def ip_forward(
    links: Links,
    routes: Routes,
    sysctls: dict[str, str],
    nodes: Objects | None = None,
    host: Host | None = None,
    peer_ways: dict[str, str] | None = None,
) -> Said:
    """Looks whether the node forwards: net.ipv4.ip_forward, and forwarding of its uplinks and pods' interfaces.

    Calico asks the kernel for the way, which forwards from no interface that may not. Uplinks are those with the
    default route, a node address or other nodes behind them: others, such as for management, may be closed on purpose.
    """
    if "net.ipv4.ip_forward" not in sysctls:
        yield Unknown("net.ipv4.ip_forward could not be read")
        return
    addresses = _addresses(nodes, host)
    found = carriers(links, routes, addresses, peer_ways or {})
    names = [link.name for link in links if link.workload and link.up]
    names += [link.name for link in found if grave(link, routes, addresses, peer_ways) is ERROR]
    off = [f"net.ipv4.conf.{name}.forwarding" for name in names]
    off = [name for name in ("net.ipv4.ip_forward", *off) if sysctls.get(name) == "0"]
    if off and ebpf_on(links):
        yield Finding(
            ERROR,
            "",
            tuple(iter_numbered((f"{name} = 0" for name in off), 4)),
            "packets between pods and others are dropped by the kernel: it forwards none that came in there",
            f"sysctl -w {'net.ipv4.ip_forward=1' if off[0] == 'net.ipv4.ip_forward' else _set(off)}; find who sets it: "
            "hardening scripts, systemd-networkd, /etc/sysctl.d",
        )


def _set(names: list[str]) -> str:
    # sysctl separates by points, unless a slash stands first: names of interfaces may have points.
    prefix = "net.ipv4.conf."
    return " ".join(
        f"net/ipv4/conf/{each.removeprefix(prefix).removesuffix('.forwarding')}/forwarding=1" for each in names
    )


def nat_interfaces(links: Links, felix: Settings, release: Release) -> Said:
    """Looks for bpfin.cali and bpfout.cali, through which the node itself reaches services when connect-time load
    balancing does not do it (v3.27 and later; all of it unless bpfConnectTimeLoadBalancing is Enabled, or its older
    name bpfConnectTimeLoadBalancingEnabled is true).
    """
    if release.oldest < (3, 27):
        yield Unknown(f"the switches for it are of v3.27, and this is {release}")
        return
    ctlb, without = felix.get("bpfConnectTimeLoadBalancing"), felix.get("bpfHostNetworkedNATWithoutCTLB")
    legacy = felix.get("bpfConnectTimeLoadBalancingEnabled")
    if isinstance(ctlb, Unset) or isinstance(without, Unset) or isinstance(legacy, Unset):
        yield Unknown("bpfConnectTimeLoadBalancing or bpfHostNetworkedNATWithoutCTLB is not known")
        return
    balanced = ctlb.says("Enabled") if legacy.value is None else legacy.value
    if balanced or not without.says("Enabled") or not ebpf_on(links):
        return
    by_name = {link.name: link for link in links}
    for name in ("bpfin.cali", "bpfout.cali"):
        link = by_name.get(name)
        if link is None or not link.up:
            yield Finding(
                ERROR,
                name,
                (f"{name}: {'down' if link else 'not there'}", str(ctlb), str(without)),
                "the node itself, and pods on its network, cannot reach services (projectcalico/calico#8867)",
                f"ip link set {name} up" if link else RESTART,
            )


def host_without_nat(
    links: Links,
    felix: Settings,
    release: Release,
    processes: tuple[Process, ...] | None = None,
    chains: tuple[str, ...] | None = None,
) -> Said:
    """Looks for a node whose own processes reach services in no way: bpfHostNetworkedNATWithoutCTLB Disabled, and
    connect-time load balancing that leaves out UDP (TCP) or everything (Disabled), without kube-proxy (v3.27).

    That there is no kube-proxy is believed only where a kubelet is in sight, as for services.kube-proxy-absent, and
    where the kernel has none of its rules.
    """
    if release.oldest < (3, 27):
        yield Unknown(f"the switches for it are of v3.27, and this is {release}")
        return
    ctlb, without = felix.get("bpfConnectTimeLoadBalancing"), felix.get("bpfHostNetworkedNATWithoutCTLB")
    legacy = felix.get("bpfConnectTimeLoadBalancingEnabled")
    if isinstance(ctlb, Unset) or isinstance(without, Unset) or isinstance(legacy, Unset):
        yield Unknown("bpfConnectTimeLoadBalancing or bpfHostNetworkedNATWithoutCTLB is not known")
        return
    everything = not ctlb.says("TCP") if legacy.value is None else not legacy.value
    balanced = ctlb.says("Enabled") if legacy.value is None else legacy.value
    what = "" if everything else " over UDP, such as DNS"
    if not without.says("Disabled") or balanced or not ebpf_on(links):
        return
    if processes is None:
        yield Unknown("whether kube-proxy runs, which would serve the node itself, is not known")
        return
    found, rules = kube_proxies(processes), proxy_rules(links, chains or ())
    if isinstance(found, Unknown):
        yield found
    elif rules and not found:
        yield Unknown(f"no kube-proxy in sight, but its rules, which may serve the node itself: {', '.join(rules)}")
    elif not found:
        yield Finding(
            WARNING,
            "",
            (
                str(without),
                str(ctlb if legacy.value is None else legacy),
                f"no kube-proxy among {len(processes)} processes",
            ),
            f"the node itself, and pods on its network, reach no service{what} "
            "(metal-stack/gardener-extension-provider-metal#506)",
            patch('"bpfHostNetworkedNATWithoutCTLB":"Enabled"', without),
        )


def dsr_cloud(felix: Settings, cloud: Cloud) -> Said:
    """Looks for bpfExternalServiceMode DSR on AWS or GCP, where a node may answer for another only if allowed to.

    A node cannot see that permission itself: the metadata services do not tell it.
    """
    mode = felix.get("bpfExternalServiceMode")
    if isinstance(mode, Unset):
        yield Unknown(mode.why)
    elif mode.says("DSR") and cloud.provider in _DSR_CLOUDS:
        meaning, fix = _DSR_CLOUDS[cloud.provider]
        place = f"{cloud.provider}: instance {cloud.instance or 'not known'} {cloud.zone}".rstrip()
        yield Finding(WARNING, "", (str(mode), place), meaning, fix.format(cloud.instance, cloud.zone))


_DSR_CLOUDS = {
    "aws": (
        "unless source/destination check is off on each node's network interface, AWS drops replies of nodes that the "
        "client did not address",
        "aws ec2 describe-instance-attribute --instance-id {0} --attribute sourceDestCheck; "
        "aws ec2 modify-instance-attribute --instance-id {0} --no-source-dest-check",
    ),
    "gcp": (
        "unless IP forwarding is allowed for each node, GCP drops replies of nodes that the client did not address",
        "gcloud compute instances describe {0} --zone {1} --format 'value(canIpForward)'",
    ),
}


def dsr_load_balancer(felix: Settings, services: Objects) -> Said:
    """Looks for Services of type LoadBalancer in DSR mode.

    A load balancer that keeps connections (all those of clouds do) expects the reply from the node it chose.
    """
    mode = felix.get("bpfExternalServiceMode")
    if isinstance(mode, Unset):
        yield Unknown(mode.why)
        return
    behind = [
        name_of(each)
        for each in services
        if dig(each, "spec", "type") == "LoadBalancer" and items(each, "status", "loadBalancer", "ingress")
    ]
    if mode.says("DSR") and behind:
        yield Finding(
            WARNING,
            "",
            (str(mode), *iter_numbered((f"Service {name}: LoadBalancer" for name in behind), 5)),
            "replies go past the load balancer, straight from the pod's node to the client; one that keeps "
            "connections drops the flow (layer 2 announcement such as MetalLB's does not mind)",
            patch('"bpfExternalServiceMode":"Tunnel"', mode) + "; or name the balancer in bpfDSROptoutCIDRs (v3.26)",
        )


def api_endpoint(
    links: Links,
    felix_env: dict[str, str] | None = None,
    nat: Nat | None = None,
    services: Objects | None = None,
    services_endpoint: dict[str, Any] | None = None,
    calico_node: dict[str, Any] | None = None,
    kube_proxy: dict[str, Any] | None = None,
    processes: tuple[Process, ...] | None = None,
    release: Release | None = None,
) -> Said:
    """Looks whether calico-node reaches the API server without a service: in eBPF mode it serves services itself.

    KUBERNETES_SERVICE_HOST says where: in calico-node's own environment, else in its DaemonSet or in the ConfigMap
    kubernetes-services-endpoint. An address that the NAT map, or the Service default/kubernetes, has for a service is
    none to start with. From v3.30 on the operator may find the API server by itself.
    """
    if not ebpf_on(links):
        yield Unknown("no interface carries a Calico program: see services.ebpf-off")
        return
    found = {
        "calico-node's environment": dig(felix_env, "KUBERNETES_SERVICE_HOST"),
        "DaemonSet calico-node": calico_environment(calico_node).get("KUBERNETES_SERVICE_HOST"),
        "ConfigMap kubernetes-services-endpoint": dig(services_endpoint, "data", "KUBERNETES_SERVICE_HOST"),
    }
    where, host = next(((where, host) for where, host in found.items() if host), ("", None))
    api = [dig(each, "spec", "clusterIP") for each in services or () if name_of(each) == "default/kubernetes"]
    owners = [f"Service default/kubernetes: clusterIP {each}" for each in api if each == host]
    owners += (
        [f"NAT map: {each}, {each.count} backends" for each in nat.frontends if each.address == host] if nat else []
    )
    proxy = None if kube_proxy is None else bool(dig(kube_proxy, "status", "desiredNumberScheduled"))
    proxy = any(each.name == "kube-proxy" for each in processes or ()) or proxy
    create = (
        "kubectl create configmap -n tigera-operator kubernetes-services-endpoint "
        "--from-literal=KUBERNETES_SERVICE_HOST=HOST --from-literal=KUBERNETES_SERVICE_PORT=PORT"
    )
    injected = where == "calico-node's environment" and owners  # the kubelet does, unless something else was said
    if release and release.newest >= (3, 30) and (host is None or injected):
        yield Unknown(f"from v3.30 on the operator may find the API server by itself, and this is {release}")
    elif host is None and services_endpoint is None:
        yield Unknown("neither calico-node's environment nor the ConfigMap kubernetes-services-endpoint could be read")
    elif host is None and proxy is None:
        yield Unknown("whether kube-proxy serves the API server's service address is not known")
    elif host is None and not proxy:
        yield Finding(
            ERROR,
            "kubernetes-services-endpoint",
            ("no ConfigMap kubernetes-services-endpoint", "no node is to run kube-proxy (DaemonSet kube-proxy)"),
            "calico-node asks for the API server at its service address, which only calico-node itself could serve: "
            "after a restart it does not come up",
            create,
        )
    elif owners and not proxy:
        yield Finding(
            ERROR,
            "KUBERNETES_SERVICE_HOST",
            (f"{where}: KUBERNETES_SERVICE_HOST={host}", *owners[:2]),
            "that is a service address, which only calico-node itself could serve: after a reboot it does not come up",
            f"name a node's address, or a load balancer outside the cluster; {create}",
        )


def host_conntrack_bypass(felix: Settings, chains: tuple[str, ...]) -> Said:
    """Looks for bpfHostConntrackBypass with iptables rules for host ports (the CNI's portmap plugin).

    The bypass keeps Linux conntrack from seeing the flow, so the reply is not translated back and netfilter drops it.
    """
    bypass = felix.get("bpfHostConntrackBypass")
    if isinstance(bypass, Unset):
        yield Unknown(bypass.why)
        return
    hostports = [chain for chain in chains if chain.startswith(("CNI-HOSTPORT-DNAT", "CNI-DN-", "cni_hostport/"))]
    if bypass.value and hostports:
        yield Finding(
            WARNING,
            "",
            (str(bypass), *iter_numbered((f"chain {chain}" for chain in hostports), 3)),
            "host ports of pods are not reachable from other machines (projectcalico/calico#6522)",
            patch('"bpfHostConntrackBypass":false', bypass),
        )


def node_local_dns(links: Links, felix: Settings, release: Release) -> Said:
    """Looks for NodeLocal DNSCache, whose iptables tricks Calico's service translation passes by."""
    caches = [link for link in links if link.name == "nodelocaldns"]
    excluded = felix.get("bpfExcludeCIDRsFromNAT")
    if isinstance(excluded, Unset):
        yield Unknown(excluded.why)
    elif caches and ebpf_on(links) and not excluded.value:
        since = "" if release.oldest >= (3, 28) else "; (v3.28 and later)"
        addresses = ", ".join(f'"{each.partition("/")[0]}/32"' for each in caches[0].addresses) or '"ADDRESS/32"'
        yield Finding(
            WARNING,
            "nodelocaldns",
            (f"nodelocaldns: {', '.join(caches[0].addresses)}", str(excluded)),
            "DNS queries go to the cluster's DNS pods and not to the node's cache, or loop "
            "(projectcalico/calico#4689, #8546)",
            patch(f'"bpfExcludeCIDRsFromNAT":[{addresses}]', excluded) + since,
        )


def wireguard_port(links: Links, felix: Settings, release: Release) -> Said:
    """Looks for a WireGuard device of others on Calico's WireGuard port, with Calico's own WireGuard off, on v3.32.

    v3.32 drops UDP to that port unless the sender is a known node, even so.
    """
    enabled, port = felix.get("wireguardEnabled"), felix.get("wireguardListeningPort")
    if isinstance(enabled, Unset) or isinstance(port, Unset):
        yield Unknown("wireguardEnabled or wireguardListeningPort is not known")
        return
    if enabled.value or not release.oldest <= (3, 32) <= release.newest or release.oldest < (3, 32):
        return
    for link in links:
        if link.kind == "wireguard" and link.name not in OWN_DEVICES and link.udp_port == port.value:
            yield Finding(
                WARNING,
                link.name,
                (f"{link.name}: WireGuard on UDP {link.udp_port}", str(port), str(enabled), str(release)),
                "v3.32 drops WireGuard from addresses that are no nodes, as from an unauthorised source "
                "(projectcalico/calico#12900)",
                patch('"wireguardListeningPort":51822', port) + "; or update Calico",
            )


CHECKS = (
    Check("services.ebpf-off", Section.SERVICES, ebpf_off),
    Check("services.kernel-too-old", Section.SERVICES, kernel_too_old),
    Check("services.felix-started", Section.SERVICES, felix_started),
    Check("services.kube-proxy-absent", Section.SERVICES, kube_proxy_absent),
    Check("services.kube-proxy-beside", Section.SERVICES, kube_proxy_beside),
    Check("services.healthz-port", Section.SERVICES, healthz_port),
    Check("services.workload-programs", Section.SERVICES, workload_programs),
    Check("services.uplink-programs", Section.SERVICES, uplink_programs),
    Check("services.data-iface-pattern", Section.SERVICES, data_iface_pattern),
    Check("services.l3-as-ethernet", Section.SERVICES, l3_as_ethernet),
    Check("services.tunnel-over-l3", Section.SERVICES, tunnel_over_l3),
    Check("services.enslaved-programs", Section.SERVICES, enslaved_programs),
    Check("services.vlan-parent", Section.SERVICES, vlan_parent),
    Check("services.macvtap", Section.SERVICES, macvtap),
    Check("services.foreign-program", Section.SERVICES, foreign_program),
    Check("services.bandwidth-plugin", Section.SERVICES, bandwidth_plugin),
    Check("services.api-endpoint", Section.SERVICES, api_endpoint),
    Check("services.mtu", Section.SERVICES, mtu),
    Check("services.vxlan-port-clash", Section.SERVICES, vxlan_port_clash),
    Check("services.vxlan-probe", Section.SERVICES, vxlan_probe),
    Check("services.checksum-offload", Section.SERVICES, checksum_offload),
    Check("services.rp-filter", Section.SERVICES, rp_filter),
    Check("services.ip-forward", Section.SERVICES, ip_forward),
    Check("services.nat-interfaces", Section.SERVICES, nat_interfaces),
    Check("services.host-without-nat", Section.SERVICES, host_without_nat),
    Check("services.dsr-cloud", Section.SERVICES, dsr_cloud),
    Check("services.dsr-load-balancer", Section.SERVICES, dsr_load_balancer),
    Check("services.host-conntrack-bypass", Section.SERVICES, host_conntrack_bypass),
    Check("services.node-local-dns", Section.SERVICES, node_local_dns),
    Check("services.wireguard-port", Section.SERVICES, wireguard_port),
    *log_checks("services"),
)
