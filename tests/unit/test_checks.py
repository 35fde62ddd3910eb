"""Every check: a node on which it fires, nodes on which it must not, and each of its sources missing."""

from __future__ import annotations

import json
import re
import shlex
import struct
import subprocess
from dataclasses import fields, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from tests.unit.node_snapshot import (
    BACKENDS,
    BOTH,
    BPFIN,
    BPFOUT,
    CONNTRACK,
    ETH0,
    FRONTENDS,
    HEALTHY,
    KUBERNETES,
    LINKS,
    LO,
    MAPS,
    NO_DROPS,
    NODE_ROUTES,
    NODES,
    POD,
    PREAMBLE,
    ROUTES,
    SERVICES,
    STATES,
    TUNNEL,
    bare,
    connection,
    felix,
    frontend,
    line,
    node,
    pinned,
    pool,
    route,
    slices,
    state,
    with_link,
    with_map,
)

from calitrace.calico import felix_log
from calitrace.checks import registry
from calitrace.checks.finding import Check, Finding, Result, Severity, Status
from calitrace.checks.snapshot import (
    Cloud,
    Counters,
    Drops,
    Host,
    Kubernetes,
    Link,
    Map,
    Missing,
    Process,
    Program,
    ProgramTime,
    ProgramTimes,
    QdiscDrops,
    Route,
    Snapshot,
    ThreadTime,
    ThreadTimes,
    VxlanProbe,
)
from calitrace.cli.main import COMMANDS
from calitrace.report import check as shown
from calitrace.report import folding

PROXY = (*HEALTHY.processes, Process(99, "kube-proxy", "kube-proxy --config=/x"))  # type: ignore[misc]
FOREIGN = Program(8, "cil_from_netdev", 300)
BOND = Link(20, "bond0", "bond", addresses=("192.0.2.11/24",))
VLAN = Link(22, "eth0.10", "vlan", addresses=("192.0.2.11/24",), parent="eth0", programs=BOTH)
MACVTAP = (*LINKS, Link(62, "macvtap0", "macvtap", parent="eth0"))
MANAGEMENT = Link(64, "mgmt0", addresses=("172.16.0.2/24",))
UNDER_VLAN = (*with_link(ETH0, programs={}), VLAN)
WG = Link(21, "wg0", "wireguard", 1420, addresses=("10.9.0.1/24",), udp_port=51820)
OWN_CT = {"cali_v4_ct4": 11}
OWN_PROGRAM = Program(1, "cali_tc_main", 100, OWN_CT)
INTERNAL_LOCAL = [*FRONTENDS, frontend("10.96.0.53", 53, 2, 2, 0, 2, proto=17)]
PRINTING = ProgramTimes(
    1.0, (ProgramTime(7, "cali_tc_preambl", 7_800_000, 200), ProgramTime(10, "cali_to_hep", 180_000, 200))
)
NO_GRO = {"rx-gro": False}
MESH = with_map("cali_v4_routes", raw=[*NODE_ROUTES, route("10.9.0.2/32", 0x10)])
VIA_WG = (*ROUTES, Route("10.65.1.0/26", "wg0", "10.9.0.2"))
VIA_BOND = (Route("default", "bond0", "192.0.2.1"),)
OLD_BROKEN = {"felix_objects": Missing("no API"), "felix_env": Missing("no process")}
DNS_FLOW: dict[str, Any] = {"proto": 17, "server": "10.96.0.99", "server_port": 53}
DNS = Link(30, "nodelocaldns", "dummy", addresses=("169.254.20.10/32",))


def kubernetes(**changes: Any) -> Kubernetes:
    return replace(KUBERNETES, **changes)


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "shop", "name": name}, "spec": {"clusterIP": "10.96.0.77"} | spec}


def image(tag: str) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"containers": [{"name": "calico-node", "image": f"calico/node:{tag}"}]}}}}


COLLIDED = (*NO_DROPS[:14], 4, 4, 4, *NO_DROPS[17:25])  # SOURCE_COLLISION, SOURCE_COLLISION_FAILED, CT_CREATE_FAILED


def counted(code: int, before: int, after: int, count: int = 25) -> Counters:
    first, last = list(NO_DROPS[:count]), list(NO_DROPS[:count])
    first[code], last[code] = before, after
    return Counters("eth0", 0, tuple(first), tuple(last))


def older_flow(address: str, port: int) -> Map:
    """The conntrack map of v3.14 to v3.23, with a client's UDP flow to that backend, which is the lower end (A)."""
    ends = struct.pack("<I4s4sHH", 17, IPv4Address(address).packed, IPv4Address("10.65.0.100").packed, port, 40000)
    value = bytearray(64)
    value[16] = 2  # a NAT reverse entry
    value[48:54] = IPv4Address("10.96.0.10").packed + struct.pack("<H", 53)
    return pinned("cali_v4_ct2", (16, 64), [(ends, bytes(value))], 512000, id=11)


# (check, what differs from the healthy node, a piece of the evidence)
FIRES: list[tuple[str, dict[str, Any], str]] = [
    ("services.ebpf-off", {"links": bare(), "processes": PROXY}, "bpfEnabled: true"),
    ("services.ebpf-off", {"links": bare(), "processes": PROXY} | OLD_BROKEN, "no Calico program"),
    ("services.ebpf-off", {"links": bare(), "processes": PROXY, "felix_objects": felix(bpfEnabled=False)}, "false"),
    ("services.ebpf-off", {"felix_objects": felix(bpfEnabled=False)}, "eth0: ingress: cali_tc_preambl (id 7)"),
    ("services.kernel-too-old", {"host": Host("n", "5.2.0-1-generic", {"ID": "ubuntu"}, 2)}, "kernel 5.2.0"),
    ("services.kernel-too-old", {"host": Host("n", "4.18.0-147.el8", {"ID": "rhel"}, 2)}, "4.18.0-147"),
    ("services.kernel-too-old", {"host": Host("n", "4.18.0-193.el8", {"ID_LIKE": "rhel fedora"}, 2)}, "v3.31"),
    ("services.kernel-too-old", {"host": Host("n", "4.19.0-10-amd64", {"ID": "debian"}, 2)}, "4.19.0"),
    ("services.kernel-too-old", {"host": Host("n", "5.4.0", {}, 2)}, "v3.31"),
    (
        "services.kernel-too-old",
        {"host": Host("n", "6.1.0", {}, 2, btf=False), "calico_version": "master"},
        "/sys/kernel/btf/vmlinux: not there",
    ),
    (
        "services.felix-started",
        {"links": bare(), "processes": PROXY, "felix_lines": (line("Felix starting up"),)},
        "BPF enabled, starting",
    ),
    ("services.kube-proxy-absent", {"links": bare()}, "no kube-proxy among 2"),
    ("services.kube-proxy-beside", {"processes": PROXY} | OLD_BROKEN, "process 99: kube-proxy --config=/x"),
    (
        "services.healthz-port",
        {"processes": PROXY, "felix_objects": felix(bpfKubeProxyIptablesCleanupEnabled=False)},
        "10256",
    ),
    ("services.workload-programs", {"links": with_link(POD, programs={})}, "ingress: nothing; egress: nothing"),
    (
        "services.workload-programs",
        {"links": with_link(POD, programs={"ingress": (PREAMBLE,), "egress": (FOREIGN,)})},
        "egress: cil_from_netdev (id 8)",
    ),
    ("services.uplink-programs", {"links": with_link(ETH0, programs={"ingress": (PREAMBLE,)})}, "egress: nothing"),
    ("services.uplink-programs", {"links": with_link(ETH0, programs={})} | OLD_BROKEN, "is not known"),
    (
        "services.uplink-programs",
        {"links": (*LINKS, WG), "routes": VIA_WG, "felix_objects": felix(bpfL3IfacePattern="^wg0$")},
        "wg0: ingress: nothing",
    ),
    ("services.data-iface-pattern", {"felix_objects": felix(bpfDataIfacePattern="^ens")}, "default via 192.0.2.1"),
    (
        "services.data-iface-pattern",
        {"links": (*LINKS, BOND), "routes": VIA_BOND, "kubernetes": kubernetes(calico_node=image("v3.28.1"))},
        "bond0: bond",
    ),
    ("services.data-iface-pattern", {"links": (*LINKS, WG), "routes": VIA_WG}, "wg0: wireguard"),
    (
        "services.data-iface-pattern",  # no gateway and no API server, but the way to another node
        {"links": (*LINKS, WG), "routes": (*ROUTES, Route("10.9.0.0/24", "wg0")), "kubernetes": Missing("no")}
        | {"maps": MESH, "calico_version": "v3.31"},
        "other nodes are behind it, such as 10.9.0.2",
    ),
    (
        "services.l3-as-ethernet",  # it need not be on the way to anything
        {"links": (*LINKS, WG), "felix_objects": felix(bpfDataIfacePattern="^(eth|wg)"), "calico_version": "v3.25"},
        "wg0: wireguard; ingress: nothing",
    ),
    (
        "services.l3-as-ethernet",
        {"links": (*LINKS, WG), "felix_objects": felix(bpfDataIfacePattern="^(eth|wg)"), "maps": ()}
        | {"kubernetes": Missing("no")},
        "Calico's release is not known",
    ),
    (
        "services.tunnel-over-l3",
        {"links": (*LINKS, WG), "routes": (*ROUTES, Route("10.9.0.0/24", "wg0")), "maps": MESH},
        "wg0: wireguard; other nodes are behind it, such as 10.9.0.2",
    ),
    ("services.uplink-programs", {"links": UNDER_VLAN}, "eth0.10: vlan on eth0; ingress: cali_tc_preambl (id 7)"),
    (
        "services.data-iface-pattern",
        {
            "links": (*LINKS, Link(40, "br0", "bridge", addresses=("192.0.2.11/24",))),
        },
        "br0: bridge, 192.0.2.11/24",
    ),
    (
        "services.enslaved-programs",
        {"links": (*with_link(ETH0, master="bond0"), BOND)},
        "eth0: port of bond bond0",
    ),
    ("services.vlan-parent", {"links": (*LINKS, Link(22, "eth0.10", "vlan", parent="eth0"))}, "vlan on eth0"),
    (
        "services.foreign-program",
        {"links": with_link(ETH0, programs=BOTH | {"ingress": (FOREIGN, PREAMBLE)})},
        "eth0 ingress: cil_from_netdev (id 8), cali_tc_preambl",
    ),
    (
        "services.api-endpoint",
        {"kubernetes": kubernetes(services_endpoint={}, calico_node=image("v3.28.1"))},
        "no ConfigMap",
    ),
    (
        "services.api-endpoint",
        {"kubernetes": kubernetes(services_endpoint={"data": {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}})},
        "clusterIP 10.96.0.1",
    ),
    (
        "services.api-endpoint",
        {"felix_env": {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "kubernetes": Missing("no"), "calico_version": "v3.28"},
        "NAT map: 10.96.0.1:443 proto 6, 1 backends",
    ),
    (
        "services.uplink-programs",
        {"links": (*LINKS, Link(70, "eth1", addresses=("198.51.100.1/24",)))},
        "eth1: ingress: nothing",
    ),
    (
        "services.uplink-programs",
        {"links": (replace(ETH0, programs={}), POD), "routes": (), "kubernetes": Missing("no")}
        | {"calico_version": "v3.31"},
        "eth0: ingress: nothing",
    ),
    (
        "services.uplink-programs",
        {"links": with_link(ETH0, programs={"ingress": (PREAMBLE,)}), "routes": (), "kubernetes": Missing("no")},
        "egress: nothing",
    ),
    (
        "services.mtu",
        {"links": with_link(ETH0, mtu=1450), "routes": (), "kubernetes": Missing("no")},
        "MTU 1450 leaves 1400",
    ),
    ("services.mtu", {"links": with_link(ETH0, mtu=1400)}, "MTU 1400 leaves 1350"),
    (
        "services.vxlan-port-clash",
        {"links": (*LINKS, Link(23, "flannel.1", "vxlan", udp_port=4789))},
        "flannel.1: VXLAN device on UDP 4789",
    ),
    (
        "services.checksum-offload",
        {"links": with_link(ETH0, driver="vmxnet3", features={"tx-checksum-ip-generic": True})},
        "driver vmxnet3; tx-checksum-ip-generic: on",
    ),
    (
        "services.checksum-offload",
        {"links": with_link(ETH0, driver="vmxnet3", features={"tx-udp_tnl-segmentation": True})} | OLD_BROKEN,
        "tx-udp_tnl-segmentation: on",
    ),
    (
        "services.rp-filter",
        {"sysctls": HEALTHY.sysctls | {"net.ipv4.conf.eth0.rp_filter": "1"}},  # type: ignore[operator]
        "net.ipv4.conf.eth0.rp_filter = 1",
    ),
    ("services.ip-forward", {"sysctls": {"net.ipv4.ip_forward": "0"}, "routes": ()}, "net.ipv4.ip_forward = 0"),
    (
        "services.ip-forward",
        {"sysctls": {"net.ipv4.ip_forward": "1", "net.ipv4.conf.eth0.forwarding": "0"}},
        "net.ipv4.conf.eth0.forwarding = 0",
    ),
    ("services.nat-interfaces", {"links": with_link(BPFIN, up=False)}, "bpfin.cali: down"),
    (
        "services.nat-interfaces",
        {"links": tuple(each for each in LINKS if each is not BPFOUT)},
        "bpfout.cali: not there",
    ),
    (
        "services.host-without-nat",
        {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled"), "chains": Missing("no netlink")},
        "no kube-proxy among 2 processes",
    ),
    (
        "services.host-without-nat",
        {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled", bpfConnectTimeLoadBalancingEnabled=False)},
        "bpfConnectTimeLoadBalancingEnabled: false",
    ),
    ("services.dsr-cloud", {"felix_objects": felix(bpfExternalServiceMode="DSR")}, "i-0123456789abcdef0"),
    (
        "services.dsr-cloud",
        {"felix_objects": felix(bpfExternalServiceMode="DSR"), "cloud": Cloud("gcp", "node-1", "europe-west3-a")},
        "gcp: instance node-1 europe-west3-a",
    ),
    (
        "services.dsr-load-balancer",
        {
            "felix_objects": felix(bpfExternalServiceMode="DSR"),
            "kubernetes": kubernetes(
                services=(
                    *SERVICES,
                    service("lb", type="LoadBalancer")
                    | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}}},
                )
            ),
        },
        "Service shop/lb: LoadBalancer",
    ),
    (
        "services.host-conntrack-bypass",
        {"felix_objects": felix(bpfHostConntrackBypass=True), "chains": ("CNI-HOSTPORT-DNAT", "INPUT")},
        "chain CNI-HOSTPORT-DNAT",
    ),
    (
        "services.host-conntrack-bypass",
        {"felix_objects": felix(bpfHostConntrackBypass=True), "chains": ("cni_hostport/hostports", "hostports")},
        "chain cni_hostport/hostports",
    ),
    *(
        ("services.macvtap", {"links": MACVTAP, "calico_version": release}, release)
        for release in ("v3.26", "v3.27.3", "v3.28.0")
    ),
    (
        "maps.programs-left",
        {"programs": tuple(Program(n, ("cali_tc_preambl", "p4i_cali123")[n % 2], 100, OWN_CT) for n in range(800))},
        "800 programs of Calico's for 4 interfaces, 80000 bytes",
    ),
    (
        "maps.programs-left",  # of before an upgrade, as an interface still has them
        {
            "programs": tuple(Program(n, "calico_tc_main", 100, {"cali_v4_ct3": 5}) for n in range(800)),
            "links": with_link(ETH0, programs=dict.fromkeys(BOTH, (Program(1, "cali_tc_preambl", 1, {"x": 5}),))),
        },
        "800 programs of Calico's for 4 interfaces, 80000 bytes",
    ),
    (
        "services.log-attach",  # its programs are there, and Felix tries again and again
        {"felix_lines": (line('Failed to apply policy to endpoint, leaving it dirty error=x name="eth0"'),) * 5},
        "5 times, last:",
    ),
    ("debug.slow-programs", {"program_times": PRINTING}, "cali_tc_preambl (id 7): 200 runs, 39.0 µs each"),
    ("debug.slow-programs", {"program_times": PRINTING} | OLD_BROKEN, "bpfLogLevel is not known"),
    (
        "debug.slow-programs",
        {"program_times": PRINTING, "felix_objects": Missing("no API"), "felix_env": {"FELIX_BPFENABLED": "true"}},
        "bpfLogLevel is not known",
    ),
    ("services.node-local-dns", {"links": (*LINKS, DNS)}, "169.254.20.10/32"),
    (
        "services.wireguard-port",
        {"links": (*LINKS, WG), "kubernetes": kubernetes(calico_node=image("v3.32.0"))},
        "WireGuard on UDP 51820",
    ),
    ("services.nat-backends-complete", {"maps": with_map("cali_v4_nat_be", raw=BACKENDS[:2])}, "missing: [1]"),
    (
        "services.nat-backends-routed",
        {"maps": with_map("cali_v4_routes", raw=NODE_ROUTES[:3])},
        "10.65.1.2:8080 has no",
    ),
    (
        "services.nat-shared-id",
        {"maps": with_map("cali_v4_nat_fe3", raw=[*FRONTENDS, frontend("10.96.0.11", 81, 2, 3, 1)])},
        "10.96.0.11:81 proto 6: 3 backends, 1 local",
    ),
    (
        "services.local-without-backend",
        {"maps": with_map("cali_v4_nat_fe3", raw=[*FRONTENDS, frontend("192.0.2.11", 30081, 2, 2, 0, 1)])},
        "192.0.2.11:30081",
    ),
    (
        "services.internal-local-without-backend",
        {"maps": with_map("cali_v4_nat_fe3", raw=INTERNAL_LOCAL)},
        "10.96.0.53:53 proto 17: backends 2, on this node 0",
    ),
    (
        "services.conntrack-stale",
        {"maps": with_map("cali_v4_ct4", raw=[connection(5000, 1, 0, 1, proto=17, server="10.65.1.9")])},
        "UDP 198.51.100.9:5000 -> 10.65.1.9:8080",
    ),
    (
        "services.conntrack-stale",
        {"maps": (older_flow("10.65.1.9", 8080), *MAPS[1:]), "calico_version": "v3.22"},
        "UDP 10.65.1.9:8080 -> 10.65.0.100:40000",
    ),
    (
        "services.source-ranges",
        {"maps": with_map("cali_v4_nat_fe3", raw=[*FRONTENDS, frontend("203.0.113.1", 80, 2, 0xFFFFFFFF)])},
        "203.0.113.1:80 proto 6: other sources are dropped",
    ),
    (
        "services.host-address",
        {"maps": with_map("cali_v4_routes", raw=NODE_ROUTES[1:])},
        "3 routes, none is local host",
    ),
    (
        "services.nat-services",
        {"kubernetes": kubernetes(services=(*SERVICES, service("new", ports=[{"port": 81}])))},
        "Service shop/new: 10.96.0.77:81 proto 6",
    ),
    (
        "services.nat-services",
        {
            "kubernetes": kubernetes(
                services=(
                    SERVICES[0],
                    {**SERVICES[1], "spec": {**SERVICES[1]["spec"], "externalIPs": ["198.51.100.7"]}},
                )
            )
        },
        "Service shop/web: 198.51.100.7:80 proto 6",
    ),
    ("services.nat-endpoints", {"kubernetes": kubernetes(endpoint_slices=slices("10.65.0.2"))}, "10.65.1.2:8080 is no"),
    (
        "services.nat-shared-id",
        {"maps": with_map("cali_v4_nat_fe3", raw=[frontend(f"10.1.0.{n}", 80, 2, n) for n in range(1, 9)])},
        "10.1.0.8:80",
    ),
    (
        "services.nat-services",
        {
            "kubernetes": kubernetes(
                services=(
                    SERVICES[0],
                    SERVICES[1]
                    | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.5"}, {"hostname": "lb.example"}]}}},
                )
            )
        },
        "Service shop/web: 203.0.113.5:80 proto 6",
    ),
    (
        "services.rp-filter",
        {"sysctls": {"net.ipv4.conf.all.rp_filter": "1"}},
        "net.ipv4.conf.all.rp_filter = 1",
    ),
    (
        "services.nat-services",
        {"kubernetes": kubernetes(services=[service(f"s{n}", ports=[{"port": n}]) for n in range(1, 9)])},
        "and 3 more",
    ),
    (
        "services.nat-endpoints",
        {"kubernetes": kubernetes(endpoint_slices=slices("10.65.0.2", "10.65.1.2", "10.65.1.3"))},
        "endpoint 10.65.1.3:8080 is missing",
    ),
    (
        "services.nodeport-unanswered",
        {"maps": with_map("cali_v4_ct4", raw=[connection(port, 4, 0, 100 + port) for port in range(40001, 40005)])},
        "198.51.100.9:40001 -> 10.65.1.2:8080: 4 sent, 0 back, tun_ip 192.0.2.12",
    ),
    (
        "services.nodeport-unanswered",
        {"maps": with_map("cali_v4_ct4", raw=[connection(port, 4, 0, 1, 0x4) for port in (1, 2, 3)])} | OLD_BROKEN,
        "10.65.1.2:8080 -> 198.51.100.9:3: 4 sent",
    ),
    (
        "services.nodeport-unanswered",
        {"maps": with_map("cali_v4_ct4", raw=[connection(40001, 4, 0, 100)])},
        "198.51.100.9:40001 -> 10.65.1.2:8080: 4 sent, 0 back",
    ),
    (
        "services.conntrack-untranslated",
        {
            "maps": (
                *with_map("cali_v4_ct4", raw=[connection(5000, 1, 0, 1, 0x100, type=0, **DNS_FLOW)])[:1],
                *with_map("cali_v4_nat_fe3", raw=[*FRONTENDS, frontend("10.96.0.99", 53, 2, 2, 1, proto=17)])[1:],
            )
        },
        "UDP 198.51.100.9:5000 -> 10.96.0.99:53 proto 17",
    ),
    (
        "services.vxlan-probe",
        {"vxlan_probes": (VxlanProbe("192.0.2.12", 4790, "a:1", 5, 3),)},
        "UDP 4790 with a:1 inside",
    ),
    ("services.vxlan-probe", {"vxlan_probes": (VxlanProbe("192.0.2.12", 4789, "a:1", 5, 0),)}, "5 sent, 0 answered"),
    (
        "services.vxlan-probe",
        {"vxlan_probes": (VxlanProbe("192.0.2.12", 4789, "a:1", 5, 5), VxlanProbe("a", 4789, "b:1", 5, 0, "node-b"))},
        "VXLAN from node-b to a UDP 4789",
    ),
    ("services.bandwidth-plugin", {"links": (*LINKS, Link(60, "bwp1234", "ifb"))}, "bwp1234: ifb"),
    ("drops.calico-reasons", {"drops": Drops(2.0, (counted(12, 3, 9),))}, "RT_UNKNOWN: 3 -> 9 within 2 s"),
    ("drops.calico-reasons", {"drops": Drops(2.0, (counted(5, 0, 1),))}, "SHORT: 0 -> 1"),
    (
        "drops.silent",
        {"drops": Drops(1.0, (counted(4, 0, 2),), (QdiscDrops("eth0", 10, 15),))},
        "clsact dropped: 10 -> 15 within 1 s",
    ),
    (
        "drops.silent",
        {"drops": Drops(1.0, (counted(4, 0, 2),), (QdiscDrops("eth0", 0, 5, "tcx"),))},
        "tcx programs (kfree_skb, TC_INGRESS and TC_EGRESS) dropped: 0 -> 5",
    ),
    (
        "drops.silent",
        {"drops": Drops(1.0, Missing("no counters map"), (QdiscDrops("eth0", 10, 15),))},
        "Calico's counters: no counters map",
    ),
    (
        "drops.silent",  # what XDP drops never comes to the tc programs
        {"drops": Drops(1.0, (replace(counted(4, 0, 9), hook=2),), (QdiscDrops("eth0", 10, 15),))},
        "counted by Calico's reasons in that time: 0",
    ),
    (
        "drops.silent",  # a collision is counted as two
        {"drops": Drops(1.0, (replace(counted(15, 0, 4), after=COLLIDED),), (QdiscDrops("eth0", 10, 15),))},
        "counted by Calico's reasons in that time: 4",
    ),
    ("drops.since-boot", {"drops": Drops(1.0, (counted(16, 4, 4),))}, "CT_CREATE_FAILED at eth0 tc ingress: 4"),
    ("drops.since-boot", {"drops": Drops(1.0, (counted(12, 4, 4),))}, "RT_UNKNOWN at eth0 tc ingress: 4"),
    (
        "cpu.calico-node",
        {"thread_times": ThreadTimes(2.0, (ThreadTime(57, "calico-node", "felix", 1.9), ThreadTime(57, "x", "y", 0)))},
        "0.95 CPUs over 2 s",
    ),
    ("cpu.kube-proxy-fight", {"processes": PROXY}, "process 99: kube-proxy"),
    ("cpu.kube-proxy-rules", {"chains": ("KUBE-SERVICES", "KUBE-SVC-ABC")}, "2 chains of kube-proxy"),
    ("cpu.kube-proxy-rules", {"chains": ("kube-proxy/services", "services")}, "1 chains of kube-proxy"),
    (
        "cpu.kube-proxy-rules",
        {"links": (*LINKS, Link(61, "kube-ipvs0", "dummy", addresses=("10.96.0.1/32", "10.96.0.10/32")))},
        "kube-ipvs0: 2 addresses",
    ),
    ("cpu.kube-proxy-rules-return", {"chains_later": ("KUBE-SERVICES", "INPUT")}, "KUBE-SERVICES"),
    (
        "cpu.conntrack-sweep",
        {"metrics": {"felix_bpf_conntrack_sweep_duration": 9.1e9, "felix_bpf_conntrack_used": 4e6}},
        "felix_bpf_conntrack_sweep_duration 9100000000 (9.1 s)",
    ),
    ("cpu.conntrack-sweep", {"metrics": {"felix_bpf_conntrack_sweep_duration": 6e9}}, "not there"),
    (
        "cpu.min-sync-period",
        {
            "thread_times": ThreadTimes(1.0, (ThreadTime(57, "calico-node", "felix", 0.7),)),
            "maps": with_map("cali_v4_nat_be", entries=5000, max_entries=262144),
        },
        "5000 backends",
    ),
    (
        "cpu.endpoint-slices",
        {"felix_objects": felix(bpfKubeProxyEndpointSlicesEnabled=False)},
        "2 EndpointSlices",
    ),
    ("cpu.conntrack-size", {"maps": with_map("cali_v4_ct4", entries=4_000_000, max_entries=8_000_000)}, "4000000 of"),
    (
        "cpu.bpf-programs",
        {"program_times": ProgramTimes(1.0, (ProgramTime(7, "cali_tc_preambl", 300_000_000, 10_000),))},
        "10000 runs, 30000 ns each",
    ),
    ("debug.level", {"felix_objects": felix(bpfLogLevel="Debug")}, "bpfLogLevel: Debug (FelixConfiguration default)"),
    (
        "debug.level",
        {"felix_objects": felix(bpfLogLevel="Debug", bpfLogFilters={"all": "tcp"})},
        'bpfLogFilters: {"all": "tcp"}',
    ),
    ("debug.conntrack-level", {"felix_objects": felix(bpfConntrackLogLevel="Debug")}, "bpfConntrackLogLevel: Debug"),
    ("debug.info-is-silent", {"felix_objects": felix(bpfLogLevel="Info")}, "bpfLogLevel: Info"),
    ("debug.filters", {"felix_objects": felix(bpfLogFilters={"all": "tcp"})}, "bpfLogLevel: Off"),
    (
        "debug.filters",
        {"felix_objects": felix(bpfLogLevel="Debug", bpfLogFilters={"cali999": "tcp"})},
        "no interface cali999 on this node",
    ),
    (
        "debug.refused-by-verifier",
        {
            "felix_objects": felix(bpfLogLevel="Debug"),
            "host": Host("n", "5.15.0-91-generic", {}, 2),
            "kubernetes": kubernetes(calico_node=image("v3.30.2")),
        },
        "kernel 5.15.0-91-generic",
    ),
    ("debug.lockdown", {"lockdown": "confidentiality"}, "confidentiality"),
    ("debug.trace-pipe-readers", {"trace_readers": (Process(123, "cat"),)}, "process 123 (cat)"),
    ("debug.felix-level", {"felix_objects": felix(logSeverityScreen="Debug")}, "logSeverityScreen: Debug"),
    ("maps.pinned", {"maps": MAPS[1:]}, "not pinned: cali_v4_ct"),
    ("maps.unknown-layout", {"maps": with_map("cali_v4_ct4", value_size=96)}, "key 16, value 96 bytes"),
    ("maps.nearly-full", {"maps": with_map("cali_v4_nat_be", max_entries=3)}, "3 of 3 entries (100%)"),
    ("maps.nearly-full", {"maps": with_map("cali_v4_ct4", entries=500_000)}, "500000 of 512000"),
    (
        "maps.nearly-full",
        {"maps": (*MAPS, pinned("cali_rule_ctrs2", (8, 8), [(b"k" * 8, b"v" * 8)], 1))},
        "1 of 1 entries",
    ),
    ("maps.leftovers", {"maps": (*MAPS, replace(CONNTRACK, name="cali_v4_ct4_old", id=9))}, "cali_v4_ct4"),
    ("maps.leftovers", {"maps": (*MAPS, pinned("cali_v4_ct3", (16, 88), [], 512000))}, "versions pinned: 3, 4"),
    ("maps.replaced", {"maps": with_map("cali_v4_ct4", id=99)}, "the program uses id 11, pinned is id 99"),
    (
        "maps.empty-programs",
        {
            "links": with_link(ETH0, programs={"ingress": (replace(PREAMBLE, maps={"cali_progs_ing2": 30}),)}),
            "maps": (*MAPS, pinned("cali_progs_ing2", (4, 4), [], 400, id=30, type=3)),
        },
        "no program in it",
    ),
    ("maps.interface-state", {"maps": with_map("cali_iface4", raw=STATES[1:])}, "eth0: ifindex 2, no row among 2"),
    (
        "maps.interface-state",
        {"maps": with_map("cali_iface4", raw=[state(9, "eth0", 0xA), *STATES[1:]])},
        "a row for eth0 has ifindex 9",
    ),
    (
        "maps.interface-state",
        {"maps": with_map("cali_iface4", raw=[*STATES[:2], state(12, "calif00dbeef012", 1)])},
        "v4Ready (0x2) is not set",
    ),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizeConntrack=1_000_000)}, "512000 entries at most"),
    (
        "maps.conntrack-smaller",  # nothing makes it grow before v3.30
        {"felix_objects": felix(bpfMapSizeConntrack=256_000), "calico_version": "v3.27"},
        "512000 entries at most",
    ),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizePerCpuConntrack=100_000)}, "PerCpuConntrack: 100000"),
    ("maps.jit-limit", {"programs": (replace(PREAMBLE, jited_bytes=500_000_000),)}, "500000000 bytes of machine code"),
    ("performance.ipip", {"kubernetes": kubernetes(ip_pools=(pool(ipipMode="Always"),))}, "IPPool default: ipipMode"),
    (
        "performance.ipip",
        {"routes": (*ROUTES, Route("10.65.2.0/26", "tunl0", "192.0.2.12")), "kubernetes": Missing("no")},
        "route 10.65.2.0/26 via 192.0.2.12 dev tunl0",
    ),
    (
        "performance.overlay-without-pool",
        {"felix_objects": felix(ipipEnabled=True)},
        "ipipEnabled: true (FelixConfiguration default)",
    ),
    ("performance.overlay-without-pool", {"felix_objects": felix(ipInIpEnabled="true")}, "ipipEnabled: true"),
    (
        "performance.overlay-not-needed",
        {"kubernetes": kubernetes(ip_pools=(pool(vxlanMode="Always"),))},
        "all 2 nodes are in 192.0.2.0/24",
    ),
    ("performance.mtu-chain", {"links": with_link(TUNNEL, mtu=1480)}, "vxlan.calico: MTU 1480 + 50"),
    ("performance.mtu-chain", {"links": with_link(TUNNEL, mtu=1400)}, "cali1a2b3c4d5e6: MTU 1450"),
    ("performance.aws-flow-limit", {"kubernetes": kubernetes(calico_node=image("v3.28.0"))}, "aws: m6i.large"),
    ("performance.ctlb", {"felix_objects": felix(bpfConnectTimeLoadBalancing="Disabled")}, "Disabled"),
    ("performance.ctlb", {"felix_objects": felix(bpfConnectTimeLoadBalancing="Enabled")}, "Enabled"),
    ("performance.ctlb", {"felix_objects": felix(bpfConnectTimeLoadBalancingEnabled=True)}, "true"),
    (
        "performance.ctlb",
        {
            "felix_objects": felix(bpfConnectTimeLoadBalancingEnabled=False),
            "kubernetes": kubernetes(calico_node=image("v3.26.0")),
        },
        "false",
    ),
    (
        "performance.jit-off",
        {"sysctls": HEALTHY.sysctls | {"net.core.bpf_jit_enable": "0"}},  # type: ignore[operator]
        "net.core.bpf_jit_enable = 0",
    ),
    (
        "performance.bpf-stats",
        {"sysctls": HEALTHY.sysctls | {"kernel.bpf_stats_enabled": "1"}},  # type: ignore[operator]
        "kernel.bpf_stats_enabled = 1",
    ),
    ("performance.gro-off", {"links": with_link(ETH0, features={"rx-gro": False})}, "eth0: rx-gro off"),
    (
        "performance.vxlan-checksum",
        {
            "links": with_link(TUNNEL, features={"tx-checksum-ip-generic": True}),
            "host": Host("n", "6.12.3", {}, 2),
        },
        "tx-checksum-ip-generic on",
    ),
]
LOG_LINES = {
    "services.log-unsupported": "BPF dataplane mode enabled but not supported by the kernel.  Disabling BPF mode.",
    "services.log-no-api-client": "BPF enabled but no Kubernetes client available, unable to run kube-proxy module.",
    "services.log-ctlb": "BPFConnTimeLBEnabled but failed to attach connect-time load balancer, bailing out.",
    "services.log-mark-mask": "IptablesMarkMask doesn't cover bits that are used (unconditionally) by eBPF mode.",
    "services.log-bpffs": "Failed to mount bpffs",
    "services.log-maps": "error creating bpf maps",
    "services.log-attach": "Failed to apply policy to endpoint, leaving it dirty error=x",
    "services.log-master-ignored": "Master interface 'bond0' ignored. Add it to the bpfDataIfacePattern config",
    "services.log-nat-devices": "Failed to configure BPF devices",
    "services.log-proxy": "Failed invoking dataplane syncer error=x",
    "services.log-healthz-port": "BPF Proxy Healthz server failed, restarting error=listen tcp 0.0.0.0:10256: bind: "
    "address already in use",
    "services.log-rp-filter": "Failed to set rp_filter for cali123.",
    "maps.log-load": "Failed to load program error=x",
    "maps.log-conntrack-full": "The eBPF conntrack table is becoming full. To prevent connections from failing, …",
    "maps.log-replaced": "Map with same name but different parameters exists. Deleting it",
    "maps.log-update": "Failed to update BPF map",
    "maps.log-memlock": "Failed to increase RLIMIT_MEMLOCK, loading BPF programs may fail",
    "maps.log-conntrack-scan": "Failed to iterate over conntrack map",
    "debug.log-lockdown": "Kernel lockdown=confidentiality detected: …",
}
FIRES += [
    (check, {"felix_lines": (*HEALTHY.felix_lines, line(text, "WARNING"))}, text.split("…")[0])  # type: ignore[misc]
    for check, text in LOG_LINES.items()
]

V328 = {"kubernetes": kubernetes(calico_node=image("v3.28.1"))}
DSR = felix(bpfExternalServiceMode="DSR")
# Nodes that come near a finding and are none. The healthy node itself is one for every check.
QUIET: list[tuple[str, dict[str, Any]]] = [
    ("services.ebpf-off", OLD_BROKEN),
    ("services.kernel-too-old", {"host": Host("n", "4.18.0-305.el8", {"ID": "centos"}, 2)}),
    ("services.kernel-too-old", {"host": Host("n", "5.3.0", {}, 2)} | V328),
    ("services.felix-started", {"felix_lines": (line("Felix starting up"),)}),
    ("services.kube-proxy-absent", {"links": bare(), "processes": PROXY}),
    ("services.kube-proxy-beside", {"processes": PROXY}),
    ("services.kube-proxy-beside", OLD_BROKEN),
    ("services.healthz-port", {"processes": PROXY}),
    ("services.workload-programs", {"links": with_link(POD, programs={}, up=False)}),
    (
        "services.uplink-programs",
        {"links": with_link(ETH0, programs={}), "felix_objects": felix(bpfDataIfacePattern="x")},
    ),
    ("services.data-iface-pattern", {"felix_objects": felix(bpfDataIfacePattern="x", bpfL3IfacePattern="eth0")}),
    (
        "services.data-iface-pattern",
        {"links": (*LINKS, Link(50, "docker0", "bridge", addresses=("172.17.0.1/16",))), "kubernetes": Missing("no")}
        | {"calico_version": "v3.31"},
    ),
    (
        "services.l3-as-ethernet",  # Felix sees what it is
        {"links": (*LINKS, WG), "felix_objects": felix(bpfDataIfacePattern="^(eth|wg)"), "calico_version": "v3.30"},
    ),
    (
        "services.l3-as-ethernet",
        {"links": (*LINKS, WG), "calico_version": "v3.25"}
        | {"felix_objects": felix(bpfDataIfacePattern="^(eth|wg)", bpfL3IfacePattern="^wg")},
    ),
    ("services.tunnel-over-l3", {"routes": (*ROUTES, Route("10.9.0.0/24", "gone"), Route("::/0", "x")), "maps": MESH}),
    (
        "services.uplink-programs",  # its VLAN is what carries
        {"links": UNDER_VLAN, "routes": (Route("default", "eth0.10", "192.0.2.1"),), "kubernetes": Missing("no")}
        | {"calico_version": "v3.31"},
    ),
    ("services.enslaved-programs", {"links": (*LINKS, BOND)}),
    ("services.vlan-parent", {"links": (*LINKS, Link(22, "x.10", "vlan", parent="x"))}),
    ("services.foreign-program", {"links": with_link(ETH0, programs=BOTH | {"ingress": (PREAMBLE, FOREIGN)})}),
    ("services.foreign-program", {"links": with_link(ETH0, programs={"ingress": (FOREIGN,)})}),
    ("services.api-endpoint", {"kubernetes": kubernetes(services=())}),
    (
        "services.api-endpoint",
        {
            "kubernetes": kubernetes(
                services_endpoint={}, calico_node=image("v3.28.1"), kube_proxy={"status": {"desiredNumberScheduled": 3}}
            )
        },
    ),
    ("services.api-endpoint", {"felix_env": {"KUBERNETES_SERVICE_HOST": "192.0.2.10"}, "calico_version": "v3.28"}),
    (
        "services.api-endpoint",
        {"felix_env": {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "processes": PROXY, "calico_version": "v3.28"},
    ),
    ("services.mtu", {"links": with_link(ETH0, mtu=1500)}),
    ("services.mtu", {"kubernetes": kubernetes(nodes=(*NODES, {"metadata": {"name": "worker-1"}}))}),
    ("services.data-iface-pattern", {"felix_objects": felix(bpfL3IfacePattern="(")}),
    ("services.vxlan-port-clash", {"links": (*LINKS, Link(23, "flannel.1", "vxlan", udp_port=8472))}),
    (
        "services.checksum-offload",
        {
            "links": with_link(ETH0, driver="vmxnet3", features={"tx-checksum-ip-generic": True}),
            "felix_objects": felix(vxlanPort=4790),
        },
    ),
    ("services.rp-filter", {"sysctls": {"net.ipv4.conf.all.rp_filter": "2", "net.ipv4.conf.eth0.rp_filter": "1"}}),
    (
        "services.nat-interfaces",
        {"links": with_link(BPFIN, up=False), "felix_objects": felix(bpfConnectTimeLoadBalancing="Enabled")},
    ),
    (
        "services.nat-interfaces",
        {"links": with_link(BPFIN, up=False), "felix_objects": felix(bpfConnectTimeLoadBalancingEnabled=True)},
    ),
    (
        "services.uplink-programs",
        {
            "links": (
                *LINKS,
                Link(70, "eth1", up=False),
                Link(71, "eth2", master="br0"),
                Link(72, "docker0", "bridge", addresses=("172.17.0.1/16",)),
            )
        },
    ),
    (
        "services.host-without-nat",
        {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled"), "processes": PROXY},
    ),
    (
        "services.host-without-nat",
        {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled", bpfConnectTimeLoadBalancing="Enabled")},
    ),
    (
        "services.host-without-nat",
        {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled", bpfConnectTimeLoadBalancingEnabled=True)},
    ),
    (
        "services.internal-local-without-backend",
        {"maps": with_map("cali_v4_nat_fe3", raw=[*FRONTENDS, frontend("10.96.0.53", 53, 2, 2, 1, 2, proto=17)])},
    ),
    (
        "services.conntrack-stale",  # TCP may end what it began with a pod that is being stopped
        {
            "maps": with_map(
                "cali_v4_ct4",
                raw=[
                    connection(5000, 1, 0, 1, server="10.65.1.9"),
                    connection(5001, 1, 0, 1, proto=17),
                    connection(5002, 1, 0, 1, 0x100, type=0, proto=17, server="10.65.1.9"),
                ],
            )
        },
    ),
    ("services.conntrack-stale", {"maps": (older_flow("10.65.1.2", 8080), *MAPS[1:]), "calico_version": "v3.22"}),
    ("services.ip-forward", {"sysctls": {"net.ipv4.ip_forward": "0"}, "links": bare()}),
    ("services.macvtap", {"links": (*MACVTAP, Link(63, "macvlan0", "macvlan"))}),
    ("services.macvtap", {"links": MACVTAP, "calico_version": "v3.27.4"}),
    ("services.macvtap", {"links": MACVTAP, "calico_version": "v3.28.1-rc1"}),
    ("cpu.kube-proxy-rules", {"links": (*LINKS, Link(61, "kube-ipvs0", "dummy"))}),  # Calico does not remove it
    (
        "services.ip-forward",  # a network for management, with a static route
        {"links": (*LINKS, MANAGEMENT), "routes": (*ROUTES, Route("172.16.0.0/16", "mgmt0", "172.16.0.1"))}
        | {"sysctls": {"net.ipv4.ip_forward": "1", "net.ipv4.conf.mgmt0.forwarding": "0"}},
    ),
    ("maps.programs-left", {"programs": (PREAMBLE,) * 600}),
    (
        "maps.programs-left",  # five nodes on one machine
        {"programs": tuple(Program(n, "cali_tc_main", 100, {"cali_v4_ct4": 11 + n % 5}) for n in range(800))},
    ),
    (
        "services.internal-local-without-backend",
        {"maps": with_map("cali_v4_nat_fe3", raw=INTERNAL_LOCAL), "calico_version": "v3.26"},
    ),
    ("debug.slow-programs", {"program_times": PRINTING, "felix_objects": felix(bpfLogLevel="Debug")}),
    (
        "debug.slow-programs",  # another's, one at no interface (connect time), and too few to tell
        {
            "links": with_link(ETH0, programs=BOTH | {"ingress": (FOREIGN, PREAMBLE)}),
            "program_times": ProgramTimes(
                1.0,
                (
                    ProgramTime(8, "cil_from_netdev", 7_800_000, 200),
                    ProgramTime(9, "calico_connect_", 7_800_000, 200),
                    ProgramTime(7, "cali_tc_preambl", 300_000, 20),
                ),
            ),
        },
    ),
    ("services.dsr-cloud", {"felix_objects": DSR, "cloud": Cloud("azure")}),
    ("services.dsr-load-balancer", {"felix_objects": DSR}),
    ("services.host-conntrack-bypass", {"felix_objects": felix(bpfHostConntrackBypass=True)}),
    (
        "services.node-local-dns",
        {"links": (*LINKS, DNS), "felix_objects": felix(bpfExcludeCIDRsFromNAT=["169.254.20.10/32"])},
    ),
    ("services.wireguard-port", {"links": (*LINKS, WG)}),
    (
        "services.wireguard-port",
        {
            "links": (*LINKS, replace(WG, udp_port=4500)),
            "kubernetes": kubernetes(calico_node=image("v3.32.0")),
        },
    ),
    (
        "services.nat-backends-complete",
        {"maps": with_map("cali_v4_nat_fe3", raw=[frontend("1.1.1.1", 1, 9, 0xFFFFFFFF)])},
    ),
    ("services.nat-shared-id", {"maps": with_map("cali_v4_nat_fe3", raw=[frontend("1.1.1.1", 1, 2, 0xFFFFFFFF)])}),
    (
        "services.nat-backends-routed",
        {
            "maps": with_map(
                "cali_v4_nat_fe3", raw=[frontend("1.1.1.1", 1, 2, 5), frontend("1.1.1.1", 2, 2, 0xFFFFFFFF)]
            )
        },
    ),
    (
        "services.nat-services",
        {
            "kubernetes": kubernetes(
                services=(
                    SERVICES[1] | {"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.5", "ipMode": "Proxy"}]}}},
                    service("external", type="ExternalName"),
                    service("headless", clusterIP="None", ports=[{"port": 1}]),
                    service("six", clusterIP="fd00::1", ports=[{"port": 1}]),
                    service("none", clusterIP=None),
                    service("sctp", ports=[{"port": 1, "protocol": "SCTP"}, {"port": "odd"}]),
                    service("mesh", ports=[{"port": 1}])
                    | {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}},
                    {"spec": None},
                )
            )
        },
    ),
    (
        "services.nat-endpoints",
        {
            "kubernetes": kubernetes(
                endpoint_slices=(
                    *slices("10.65.0.2", "10.65.1.2", ready=False, serving=True)[:1],
                    {"addressType": "IPv4", "metadata": {}},
                    {"addressType": "IPv6", "metadata": {"labels": {"kubernetes.io/service-name": "web"}}},
                    {
                        "addressType": "IPv4",
                        "ports": [{"port": None}],
                        "metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
                    },
                )
            )
        },
    ),
    (
        "services.nat-endpoints",
        {
            "kubernetes": kubernetes(endpoint_slices=slices("10.65.1.2", ready=False, serving=True)),
            "maps": with_map("cali_v4_nat_fe3", raw=[frontend("10.96.0.10", 80, 3, 1)]),
        },
    ),
    (
        "services.nat-endpoints",
        {
            "kubernetes": kubernetes(endpoint_slices=slices("10.65.1.2", ready=False, serving=False)),
            "maps": with_map("cali_v4_nat_fe3", raw=[frontend("10.96.0.10", 80, 3, 1)]),
        },
    ),
    (
        "services.nodeport-unanswered",
        {
            "maps": with_map(
                "cali_v4_ct4",
                raw=[
                    *(connection(port, 4, 0, port) for port in (1, 2, 3)),
                    connection(4, 4, 3, 50),
                    connection(5, 1, 0, 60),
                    *(connection(port, 4, 0, 70, 0x106) for port in (6, 7, 8)),
                    *(connection(port, 4, 0, 70, type=0) for port in (16, 17, 18)),
                    *(connection(port, 4, 0, 70, tun_ip="0.0.0.0") for port in (26, 27, 28)),
                ],
            )
        },
    ),
    (
        "services.conntrack-untranslated",
        {
            "maps": (
                *with_map(
                    "cali_v4_ct4",
                    raw=[
                        connection(5000, 1, 0, 1, 0x100, type=1, **DNS_FLOW),
                        connection(5001, 1, 0, 1, 0x100, type=0, **DNS_FLOW | {"server_port": 54}),
                        connection(5002, 1, 0, 1, 0, type=0),
                    ],
                )[:1],
                *with_map("cali_v4_nat_fe3", raw=[*FRONTENDS, frontend("10.96.0.99", 53, 2, 2, 1, proto=17)])[1:],
            )
        },
    ),
    ("services.bandwidth-plugin", {"links": (*LINKS, Link(60, "ifb0", "ifb"))}),
    (
        "services.nodeport-unanswered",  # a stream of UDP, such as a log, that nobody answers
        {"maps": with_map("cali_v4_ct4", raw=[connection(port, 40, 0, 70, proto=17) for port in (1, 2, 3)])},
    ),
    (
        "services.nat-backends-routed",  # the API server outside the cluster: only its cluster IP leads there
        {"maps": with_map("cali_v4_routes", raw=[each for each in NODE_ROUTES if each is not NODE_ROUTES[1]])},
    ),
    (
        "services.nat-endpoints",
        {
            "kubernetes": kubernetes(
                services=(
                    SERVICES[1]
                    | {
                        "metadata": SERVICES[1]["metadata"]
                        | {"annotations": {"service.kubernetes.io/topology-mode": "Auto"}}
                    },
                ),
                endpoint_slices=slices("10.65.0.2", "10.65.1.2", "10.65.1.3"),
            )
        },
    ),
    (
        "services.nat-endpoints",
        {
            "kubernetes": kubernetes(
                services=(SERVICES[1] | {"spec": SERVICES[1]["spec"] | {"trafficDistribution": "PreferClose"}},),
                endpoint_slices=slices("10.65.0.2", "10.65.1.2", "10.65.1.3"),
            )
        },
    ),
    *(
        ("services.log-attach", {"felix_lines": (*HEALTHY.felix_lines, line(text, "WARNING"))})  # type: ignore[misc]
        for text in (
            'Failed to apply policy to interface, will retry error=x iface="eth0"',
            'Failed to apply policy to endpoint, leaving it dirty error=x name="cali0goneforgood"',
        )
    ),
    ("drops.calico-reasons", {"drops": Drops(1.0, (counted(20, 1, 9),))}),
    ("drops.since-boot", {"drops": Drops(1.0, (counted(20, 9, 9),))}),
    ("cpu.kube-proxy-rules-return", {"links": bare(), "chains_later": ("KUBE-SERVICES",)}),
    ("cpu.kube-proxy-rules-return", {"chains": ("KUBE-SERVICES",), "chains_later": ("KUBE-SERVICES",)}),
    ("maps.nearly-full", {"maps": (*MAPS, pinned("cali_v4_srmsg", (16, 8), [], 100, type=9, entries=100))}),
    (
        "maps.leftovers",  # before v3.27 each interface has its own
        {"maps": (pinned("cali_jump3", (4, 4), [], id=30), pinned("cali_jump3", (4, 4), [], id=31))},
    ),
    (
        "maps.replaced",
        {
            "links": with_link(ETH0, programs={"ingress": (replace(PREAMBLE, maps={"cali_jump3": 30}),)}),
            "maps": (pinned("cali_jump3", (4, 4), [], id=30), pinned("cali_jump3", (4, 4), [], id=31)),
        },
    ),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizePerCpuConntrack=20_000)}),
    ("drops.calico-reasons", {"drops": Drops(1.0, (counted(2, 1, 9), counted(4, 7, 7)), (QdiscDrops("eth1", 0, 0),))}),
    (
        "drops.silent",
        {
            "drops": Drops(
                1.0, (counted(4, 0, 5), replace(counted(4, 0, 9), interface="eth1")), (QdiscDrops("eth0", 10, 15),)
            )
        },
    ),
    ("drops.since-boot", {"drops": Drops(1.0, (counted(4, 9, 9),))}),
    ("cpu.kube-proxy-fight", {"processes": PROXY, "felix_objects": felix(bpfKubeProxyIptablesCleanupEnabled=False)}),
    ("cpu.kube-proxy-rules", {"chains": ("KUBE-SERVICES",), "processes": PROXY}),
    ("cpu.bpf-programs", {"program_times": ProgramTimes(0.0, (ProgramTime(1, "x", 1, 1),))}),
    ("cpu.calico-node", {"thread_times": ThreadTimes(0.0, (ThreadTime(57, "calico-node", "x", 1.0),))}),
    ("debug.info-is-silent", {"felix_objects": felix(bpfLogLevel="Info")} | V328),
    ("debug.filters", {"felix_objects": felix(bpfLogLevel="Debug", bpfLogFilters={"weps": "tcp"})}),
    ("debug.refused-by-verifier", {"felix_objects": felix(bpfLogLevel="Debug")}),
    ("maps.unknown-layout", {"maps": (*MAPS, pinned("cali_v9_new7", (1, 1), []))}),
    ("maps.leftovers", {"maps": (pinned("odd", (1, 1), []),)}),
    ("maps.nearly-full", {"maps": with_map("cali_v4_nat_be", max_entries=0)}),
    ("maps.nearly-full", {"maps": (*MAPS, pinned("cali_progs_ing2", (4, 4), [], 4, id=30, type=3, entries=4))}),
    ("maps.empty-programs", {"maps": (*MAPS, pinned("cali_progs_ing2", (4, 4), [], 400, id=30, type=3))}),
    ("services.kernel-too-old", {"host": Host("n", "6.1.0", {}, 2, btf=False)}),
    ("maps.replaced", {"links": with_link(ETH0, programs={"ingress": (replace(FOREIGN, maps={"cali_v4_ct4": 1}),)})}),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizeConntrack=100_000)}),
    ("performance.ipip", {"kubernetes": kubernetes(ip_pools=(pool(ipipMode="Always", disabled=True),))}),
    (
        "performance.overlay-not-needed",
        {
            "kubernetes": kubernetes(
                ip_pools=(pool(vxlanMode="Always"),), nodes=(node("a", "192.0.2.1"), node("b", "198.51.100.1"))
            )
        },
    ),
    ("performance.overlay-without-pool", {"felix_objects": felix(vxlanEnabled=True)}),
    ("performance.mtu-chain", {"links": with_link(TUNNEL, mtu=1480, up=False)}),
    ("performance.aws-flow-limit", {"cloud": Cloud("gcp")} | V328),
    (
        "performance.vxlan-checksum",
        {"links": with_link(TUNNEL, features={"tx-checksum-ip-generic": True})},
    ),
]
GONE_ALL = {"kubernetes": Missing("no API server"), "maps": MAPS[:5]}
UNKNOWN: list[tuple[str, dict[str, Any], str]] = [
    *(
        (check, {"links": bare(), "processes": (), "felix_objects": felix()}, "no process kubelet in sight")
        for check in (
            *("services.kube-proxy-absent", "services.kube-proxy-beside", "services.healthz-port"),
            *("cpu.kube-proxy-fight", "cpu.kube-proxy-rules"),
        )
    ),
    ("services.ebpf-off", {"links": (LO, replace(ETH0, programs={})), "processes": ()}, "neither a kubelet"),
    ("services.ebpf-off", {"links": (LO,), "processes": Missing("not root")}, "neither a kubelet"),
    ("services.workload-programs", {"links": bare()}, "no interface carries a Calico program"),
    ("services.workload-programs", {"links": with_link(POD, programs={}, kind="netkit")}, "netkit"),
    ("services.uplink-programs", {"links": bare()}, "no interface carries a Calico program"),
    *(
        (
            check,
            {"links": (LO, BPFIN, POD), "routes": (), "kubernetes": Missing("no"), "calico_version": "v3.31"},
            "no interface has a gateway",
        )
        for check in ("services.uplink-programs", "services.data-iface-pattern", "services.mtu", "services.rp-filter")
    ),
    ("services.rp-filter", {"links": bare()}, "no interface carries a Calico program"),
    ("services.rp-filter", {"sysctls": {}}, "could not be read"),
    ("services.api-endpoint", {"links": bare()}, "no interface carries a Calico program"),
    ("services.api-endpoint", {"kubernetes": kubernetes(services_endpoint={})}, "from v3.30 on"),
    ("services.api-endpoint", {"felix_env": {"KUBERNETES_SERVICE_HOST": "10.96.0.1"}}, "from v3.30 on"),
    ("services.api-endpoint", {"kubernetes": Missing("no"), "calico_version": "v3.28"}, "could be read"),
    (
        "services.api-endpoint",
        {"kubernetes": kubernetes(services_endpoint={}, kube_proxy=Missing("403")), "calico_version": "v3.28"},
        "whether kube-proxy serves",
    ),
    (
        "services.checksum-offload",
        {"links": with_link(ETH0, driver="vmxnet3", features={})},
        "the offloads of eth0 could not be read",
    ),
    ("performance.gro-off", {"links": with_link(ETH0, features={})}, "the offloads of eth0 could not be read"),
    (
        "performance.vxlan-checksum",
        {"links": with_link(TUNNEL, features={})},
        "the offloads of vxlan.calico could not be read",
    ),
    *(
        (check, {"links": bare(), "routes": ()}, "no interface has a gateway")
        for check in ("performance.mtu-chain", "performance.gro-off")
    ),
    *(
        (check, {"drops": Drops(1.0, Missing("no counters map"))}, "no counters map")
        for check in ("drops.calico-reasons", "drops.since-boot")
    ),
    ("drops.silent", {"drops": Drops(1.0, (), Missing("qdiscs: no permission"))}, "no permission"),
    ("cpu.conntrack-sweep", {"metrics": {}}, "do not have"),
    (
        "maps.conntrack-smaller",
        {"felix_objects": felix(bpfMapSizePerCpuConntrack=1), "host": Missing("no")},
        "the number of CPUs",
    ),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizePerCpuConntrack="1x")}, "is no int"),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizePerCpuConntrack=[1])}, "is no number"),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizeConntrack=[1])}, "is no number"),
    ("services.healthz-port", V328, "is of v3.31"),
    ("services.healthz-port", {"felix_env": {"FELIX_BPFKUBEPROXYHEALTHZPORT": "odd"}}, "is not known"),
    ("services.kernel-too-old", {"host": Host("n", "odd", {}, 1)}, "no kernel release"),
    ("services.data-iface-pattern", GONE_ALL, "depends on Calico's release"),
    ("services.data-iface-pattern", {"felix_objects": felix(bpfDataIfacePattern="(")}, "not a pattern"),
    ("services.nat-interfaces", {"kubernetes": kubernetes(calico_node=image("v3.26.4"))}, "are of v3.27"),
    ("services.host-without-nat", {"kubernetes": kubernetes(calico_node=image("v3.26.4"))}, "are of v3.27"),
    ("services.ip-forward", {"sysctls": {}}, "could not be read"),
    ("services.macvtap", {"links": MACVTAP, "kubernetes": Missing("no"), "maps": ()}, "release is not known"),
    ("services.macvtap", {"links": MACVTAP, "calico_version": "v3.27"}, "this is v3.27"),
    *(
        (
            "services.internal-local-without-backend",
            {"kubernetes": Missing("no"), "maps": (*with_map("cali_v4_nat_fe3", raw=INTERNAL_LOCAL)[:5], *telling)},
            why,
        )
        for telling, why in (
            ((), "before v3.27 internalTrafficPolicy is not honoured: the release is not known"),
            ((pinned("cali_counters2", (8, 112), []),), "v3.26 to v3.29"),
        )
    ),
    (
        "maps.programs-left",
        {"programs": tuple(Program(n, "cali_tc_main", 100) for n in range(800))},
        "which of 800 programs of Calico's",
    ),
    (
        "maps.programs-left",
        {"programs": (*(Program(n, "cali_tc_main", 100, {"cali_v4_ct3": 99}) for n in range(800)), OWN_PROGRAM)},
        "800 programs use a cali_v4_ct3, which is not this node's: they are left of before an upgrade, unless a node",
    ),
    (
        "services.macvtap",
        {"links": MACVTAP, "kubernetes": Missing("no"), "maps": (pinned("cali_counters2", (8, 112), []),)},
        "this is v3.26 to v3.29",
    ),
    (
        "services.host-without-nat",
        {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled"), "processes": Missing("not root")},
        "whether kube-proxy runs",
    ),
    *(
        ("services.host-without-nat", {"felix_objects": felix(bpfHostNetworkedNATWithoutCTLB="Disabled")} | proxy, why)
        for proxy, why in (  # the last: kube-proxy is part of k3s, or this is a container of its own
            ({"chains": ("KUBE-SERVICES", "cali-FORWARD")}, "which may serve the node itself: 1 chains of kube-proxy"),
            ({"chains": ("kube-proxy/services",)}, "which may serve the node itself: 1 chains of kube-proxy"),
            ({"links": (*LINKS, Link(50, "kube-ipvs0", addresses=("10.96.0.1/32",)))}, "kube-ipvs0: 1 addresses"),
            ({"processes": (Process(57, "calico-node"), Process(8, "k3s-server"))}, "no process kubelet in sight"),
        )
    ),
    ("services.felix-started", {"felix_lines": (line("something"),)}, "does not go back"),
    ("services.host-conntrack-bypass", GONE_ALL, "depends on Calico's release"),
    ("drops.silent", {"drops": Drops(1.0), "links": bare()}, "no clsact qdisc on any interface"),
    ("drops.silent", {"drops": Drops(1.0)}, "no clsact qdisc on cali1a2b3c4d5e6, calif00dbeef012, eth0"),
    ("cpu.calico-node", {"thread_times": ThreadTimes(1.0, ())}, "no process calico-node"),
    ("cpu.min-sync-period", {"thread_times": ThreadTimes(1.0, ())}, "no process calico-node"),
    ("cpu.min-sync-period", {"maps": MAPS[:2]}, "number of backends is not known"),
    ("cpu.conntrack-size", {"maps": MAPS[1:]}, "no conntrack map"),
    ("cpu.endpoint-slices", GONE_ALL | {"kubernetes": kubernetes(calico_node={})} | {"calico_version": "v3"}, ""),
    ("maps.jit-limit", {"sysctls": {}}, "could not be read"),
    ("maps.pinned", {"links": bare()}, "no interface carries a Calico program"),
    ("maps.conntrack-smaller", {"felix_objects": felix(bpfMapSizeConntrack="many")}, "is no int"),
    ("performance.overlay-not-needed", {"kubernetes": kubernetes(nodes=({},))}, "no annotation"),
    ("performance.jit-off", {"sysctls": {}}, "could not be read"),
    ("performance.bpf-stats", {"sysctls": {}}, "could not be read"),
    ("performance.vxlan-checksum", {"host": Host("n", "odd", {}, 1)}, "no kernel release"),
    ("debug.refused-by-verifier", {"host": Host("n", "odd", {}, 1)}, "is not known"),
]
ENV_ONLY = {"felix_objects": Missing("no API server"), "felix_env": {"FELIX_BPFENABLED": "true"}}
UNKNOWN += [
    (check, ENV_ONLY, "")
    for check in (
        *(
            "services.l3-as-ethernet",
            "services.healthz-port",
            "services.data-iface-pattern",
            "services.vxlan-port-clash",
            "services.nat-interfaces",
            "services.host-without-nat",
        ),
        *("services.dsr-cloud", "services.dsr-load-balancer", "services.host-conntrack-bypass"),
        *("services.node-local-dns", "services.wireguard-port", "cpu.kube-proxy-fight", "cpu.min-sync-period"),
        *(
            "cpu.endpoint-slices",
            "debug.level",
            "debug.info-is-silent",
            "debug.filters",
            "debug.felix-level",
            "debug.conntrack-level",
        ),
        *("maps.conntrack-smaller", "performance.overlay-without-pool", "performance.ctlb"),
    )
]


def result(check: str, **changes: Any) -> Result:
    """What one check says of the healthy node with changes."""
    return registry.run(replace(HEALTHY, **changes), [registry.BY_ID[check]])[0]


def said(found: Result) -> str:
    return "\n".join(text for finding in found.findings for text in finding.evidence)


def test_nothing_is_found_on_a_healthy_node() -> None:
    results = registry.run(HEALTHY)
    assert [each for each in results if each.status is not Status.PASSED] == []
    assert len(results) == len(registry.CHECKS) == len(registry.BY_ID)


@pytest.mark.parametrize(("check", "changes", "evidence"), FIRES, ids=[f"{n}-{c[0]}" for n, c in enumerate(FIRES)])
def test_fires(check: str, changes: dict[str, Any], evidence: str) -> None:
    found = result(check, **changes)
    assert found.status is Status.FINDINGS
    assert evidence in said(found)
    for finding in found.findings:
        assert finding.evidence
        assert finding.meaning
        assert finding.fix


@pytest.mark.parametrize(("check", "changes"), QUIET, ids=[f"{n}-{c[0]}" for n, c in enumerate(QUIET)])
def test_does_not_fire(check: str, changes: dict[str, Any]) -> None:
    assert result(check, **changes).findings == ()


@pytest.mark.parametrize(("check", "changes", "why"), UNKNOWN, ids=[f"{n}-{c[0]}" for n, c in enumerate(UNKNOWN)])
def test_cannot_tell(check: str, changes: dict[str, Any], why: str) -> None:
    found = result(check, **changes)
    assert found.status is Status.NOT_RUN
    assert found.findings == ()
    assert why in found.why[0]


def test_every_check_has_a_node_on_which_it_fires() -> None:
    assert {check for check, *_ in FIRES} == registry.BY_ID.keys()


@pytest.mark.parametrize("check", registry.CHECKS, ids=lambda check: check.id)
def test_a_missing_source_is_never_passed(check: Check) -> None:
    for source in check.needs:
        found = registry.sources(HEALTHY)
        found[source] = Missing("a test took it away")
        outcome = registry.run_one(check, found)
        assert outcome.status is Status.NOT_RUN
        assert outcome.why == ("a test took it away",)
        assert outcome.findings == ()


@pytest.mark.parametrize(
    "name", [each.name for each in fields(Snapshot) if each.name not in ("taken", "calico_version")]
)
def test_one_missing_source_stops_no_other_check(name: str) -> None:
    gone: dict[str, Any] = {name: Missing("gone")}
    results = registry.run(replace(HEALTHY, **gone))
    assert len(results) == len(registry.CHECKS)
    assert any(each.status is Status.PASSED for each in results)
    # Without what names the release or the settings some defaults are unknown; nothing else may be found.
    assert all(each.status is not Status.FINDINGS for each in results)


def test_every_check_explains_itself() -> None:
    for check in registry.CHECKS:
        text = "\n".join(shown.iter_explanation(check))
        assert check.id in text
        assert check.explanation[0].isupper()
        assert f"needs: {', '.join(check.needs)}" in text
        assert all(len(each) <= folding.WIDTH for each in text.splitlines())


def test_the_daemonset_says_felixs_environment_where_the_process_is_not_seen() -> None:
    containers = [
        {"name": "other", "env": [{"name": "FELIX_BPFLOGLEVEL", "value": "Off"}]},
        {
            "name": "calico-node",
            "env": [
                {"name": "FELIX_BPFLOGLEVEL", "value": "debug"},
                {"name": "FELIX_TYPHACN", "valueFrom": {}},
                {"name": "PASSWORD", "value": "x"},
            ],
        },
    ]
    daemonset = {"spec": {"template": {"spec": {"containers": containers}}}}
    changes: dict[str, Any] = {"kubernetes": kubernetes(calico_node=daemonset)}
    assert "FELIX_BPFLOGLEVEL" in said(result("debug.level", felix_env=Missing("no process"), **changes))
    assert result("debug.level", **changes).status is Status.PASSED


def test_another_cni_names_the_pods_interfaces() -> None:
    eni = replace(POD, name="eni0123456789a", programs={})
    changes: dict[str, Any] = {"links": (*LINKS, eni)}
    assert result("services.workload-programs", **changes).findings == ()
    found = result("services.workload-programs", felix_objects=felix(interfacePrefix="cali, eni"), **changes)
    assert [each.subject for each in found.findings] == ["eni0123456789a"]


@pytest.mark.parametrize(
    ("routes", "severity"),
    [
        (ROUTES, Severity.ERROR),
        ((Route("10.0.0.0/8", "wg0", "10.9.0.2"), *ROUTES), Severity.WARNING),
        ((Route("default", "wg0"), *ROUTES), Severity.ERROR),
    ],
)
def test_how_grave_an_unmatched_interface_is(routes: tuple[Route, ...], severity: Severity) -> None:
    address = "192.0.2.11/24" if routes is ROUTES else "10.9.0.1/24"
    links = (*LINKS, replace(WG, addresses=(address,)))
    found = result("services.data-iface-pattern", links=links, routes=routes)
    assert [(each.subject, each.severity) for each in found.findings] == [("wg0", severity)]


def test_the_longest_prefix_is_the_way_to_another_node() -> None:
    routes = (Route("default", "eth0", "192.0.2.1"), Route("10.9.0.0/16", "eth0"), Route("10.9.0.0/24", "wg0"))
    changes: dict[str, Any] = {"links": (*LINKS, WG), "routes": routes, "maps": MESH}
    assert [each.subject for each in result("services.tunnel-over-l3", **changes).findings] == ["wg0"]
    changes["maps"] = with_map("cali_v4_routes", raw=NODE_ROUTES)
    assert result("services.tunnel-over-l3", **changes).findings == ()


def test_of_two_routes_to_one_network_the_lower_metric_is_the_way() -> None:
    routes = (Route("192.0.2.0/24", "eth0", metric=100), Route("192.0.2.0/24", "wg0", metric=600), *ROUTES[::2])
    assert result("services.tunnel-over-l3", links=(*LINKS, WG), routes=routes).findings == ()
    routes = (replace(routes[0], metric=700), *routes[1:])
    assert [each.subject for each in result("services.tunnel-over-l3", links=(*LINKS, WG), routes=routes).findings] == [
        "wg0"
    ]


@pytest.mark.parametrize(
    ("check", "changes"), [("performance.mtu-chain", {"mtu": 1400}), ("performance.gro-off", {"features": NO_GRO})]
)
def test_performance_looks_at_the_way_to_other_nodes(check: str, changes: dict[str, Any]) -> None:
    eth1 = replace(ETH0, index=70, name="eth1", addresses=("10.9.0.1/24",), **changes)
    links, routes = (*LINKS, eth1), (*ROUTES, Route("10.9.0.0/24", "eth1"))
    assert "eth1" in said(result(check, links=links, routes=routes, maps=MESH))


def test_the_other_nodes_are_known_of_the_api_as_well() -> None:
    changes: dict[str, Any] = {"maps": (), "routes": (Route("192.0.2.12/32", "wg0"),), "links": (*LINKS, WG)}
    six = {"status": {"addresses": [{"type": "InternalIP", "address": "2001:db8::3"}]}, "metadata": {"name": "six"}}
    changes["kubernetes"] = kubernetes(nodes=(*NODES, six))
    assert [each.subject for each in result("services.tunnel-over-l3", **changes).findings] == ["wg0"]
    found = result("services.tunnel-over-l3", **changes | {"kubernetes": Missing("no")})
    assert found.why == ("the other nodes' addresses are not known: there is no map cali_v4_routes",)
    assert result("services.tunnel-over-l3", routes=Missing("no routes")).why == ("no routes",)


def test_what_to_run_names_what_was_seen() -> None:
    """Commands to paste: the NodePort that was asked for, the interface by which that node is reached, the port."""
    changes: dict[str, Any] = {"maps": with_map("cali_v4_ct4", raw=[connection(40001, 4, 0, 100)])}
    (found,) = result("services.nodeport-unanswered", **changes).findings
    assert found.fix == (
        "calitrace probe vxlan 192.0.2.12 --inner 192.0.2.11:30080 --trace; "
        "tcpdump -ni eth0 udp port 4789  # on both nodes"
    )
    changes |= {"routes": (Route("192.0.2.12/32", "wg0"),), "links": (*LINKS, WG)}
    (found,) = result("services.nodeport-unanswered", felix_objects=felix(vxlanPort=4790), **changes).findings
    assert "--inner 192.0.2.11:30080 --vxlan-port 4790 --trace; tcpdump -ni wg0 udp port 4790" in found.fix
    assert "get no answer: wg0 is a layer-3 device" in found.meaning
    (found,) = result("services.nodeport-unanswered", **changes | {"routes": ()}).findings
    assert "tcpdump -ni any udp port 4789" in found.fix
    raw = [
        connection(5000, 1, 0, 1, 0x100, type=0, **DNS_FLOW),
        connection(6000, 1, 0, 1, proto=17, server="10.65.1.9"),
    ]
    frontends = [*FRONTENDS, frontend("10.96.0.99", 53, 2, 2, 1, proto=17)]
    maps = (*with_map("cali_v4_ct4", raw=raw)[:1], *with_map("cali_v4_nat_fe3", raw=frontends)[1:])
    for check, server in (("services.conntrack-untranslated", "10.96.0.99"), ("services.conntrack-stale", "10.65.1.9")):
        (found,) = result(check, maps=maps).findings
        assert f"calitrace maps conntrack remove udp 198.51.100.9 {server} --allow-system-changes" in found.fix.split(
            "; "
        )
    (found,) = result("performance.ipip", kubernetes=kubernetes(ip_pools=(pool(ipipMode="Always"),))).findings
    assert found.fix.startswith("kubectl patch ippool default --type merge")


def test_a_device_and_a_vlan_on_it_get_one_advice() -> None:
    """From v3.30 on what serves one takes the programs from the other: no fix may undo the other's."""
    (found,) = result("services.uplink-programs", links=UNDER_VLAN).findings
    bare_vlan = replace(VLAN, programs={})
    (parent,) = result("services.vlan-parent", links=(*LINKS, bare_vlan)).findings
    assert found.fix == parent.fix
    assert found.fix.startswith("give the addresses of eth0 to a device on top, such as eth0.10; or make a Felix")
    (older,) = result("services.vlan-parent", links=(*LINKS, bare_vlan), calico_version="v3.29.1").findings
    assert older.fix == "let bpfDataIfacePattern match eth0.10 and not eth0"
    none: dict[str, Any] = {"links": (*with_link(ETH0, programs={}), bare_vlan)}
    found, _ = result("services.uplink-programs", **none).findings  # the VLAN has taken nothing away
    assert (found.subject, found.meaning.endswith("Calico's programs are not on it")) == ("eth0", True)
    none["links"] = (*with_link(ETH0, programs={}, addresses=()), bare_vlan)
    found_there = result("services.uplink-programs", routes=(), **none).findings  # only the VLAN is to have them
    assert [each.subject for each in found_there] == ["eth0.10"]


def test_forwarding_is_set_where_it_is_off() -> None:
    vlan = replace(ETH0, name="eth0.10", addresses=("192.0.2.11/24",))
    sysctls = {"net.ipv4.ip_forward": "1", "net.ipv4.conf.eth0.10.forwarding": "0"}
    (found,) = result("services.ip-forward", links=(*LINKS, vlan), sysctls=sysctls).findings
    assert found.fix.startswith("sysctl -w net/ipv4/conf/eth0.10/forwarding=1; ")


@pytest.mark.parametrize(
    ("failed", "last", "name", "fires"),
    [
        ("2026-11-23 09:51:00.000", "2026-11-23 10:00:00.000", "eth0", True),
        ("2026-11-23T09:51:00.000Z", "2026-11-23T10:00:00.000Z", "eth0", True),
        ("2026-11-23 09:49:00.000", "2026-11-23 10:00:00.000", "eth0", False),  # it came about since
        ("2026-11-23 09:51:00.000", "2026-11-23 10:00:00.000", "cali0goneforgood", False),
        ("2026-11-23 09:51:00.000", "2026-11-31 10:00:00.000", "eth0", False),
        ("2026-11-31 09:51:00.000", "2026-11-23 10:00:00.000", "eth0", False),
    ],
)
def test_what_felix_failed_to_change_long_ago_is_over(failed: str, last: str, name: str, fires: bool) -> None:
    text = f'Failed to apply policy to endpoint, leaving it dirty error=x name="{name}"'
    lines = (*(line(text, "WARNING", failed),) * 5, line("Summarising 3 loops", time=last), "bird: x")
    found = result("services.log-attach", felix_lines=lines).findings
    assert [each.meaning.partition(",")[0] for each in found] == ["the interface has its programs"] * fires


@pytest.mark.parametrize(
    ("links", "name"), [(bare(), ' name="eth0"'), (LINKS, ""), (Missing("no netlink"), ' name="eth0"')]
)
def test_what_felix_failed_to_attach_long_ago_is_over(links: Any, name: str) -> None:
    """It tries again at least every 90 s. That an interface has no programs now may be meant: it is a bond's port."""
    for failed, severities in (("2026-11-23 09:51:00.000", [Severity.ERROR]), ("2026-11-23 06:51:00.000", [])):
        failing = line(f"Failed to apply policy to endpoint, leaving it dirty error=x{name}", "WARNING", failed)
        lines = (failing, line("Summarising 3 loops", time="2026-11-23 10:00:00.000"))
        found = result("services.log-attach", links=links, felix_lines=lines).findings
        assert [each.severity for each in found] == severities


def test_what_felix_fails_to_change_is_less_grave_than_what_it_fails_to_attach() -> None:
    failing = line('Failed to apply policy to endpoint, leaving it dirty error=x name="eth0"')
    for links, severity in ((LINKS, Severity.WARNING), (bare(), Severity.ERROR)):
        (found,) = result("services.log-attach", links=links, felix_lines=(failing,) * 5).findings
        assert found.severity is severity


def test_what_a_finding_means_is_no_command() -> None:
    """It may begin with the name of one; a backslash would be read as part of it."""
    text = line(LOG_LINES["services.log-healthz-port"], "ERROR")
    lines = list(shown.iter_table([result("services.log-healthz-port", felix_lines=(text,))]))
    assert any("kube-proxy owns the health port" in each for each in lines)
    assert not any(each.endswith("eBPF \\") for each in lines)


def test_the_interface_of_a_log_line_is_in_the_command() -> None:
    failing = line('Failed to apply policy to interface, will retry error=x iface="eth7"')
    (found,) = result("services.log-attach", felix_lines=(failing,), links=(*LINKS, Link(77, "eth7"))).findings
    assert found.fix.endswith("bpftool net show dev eth7")


@pytest.mark.parametrize(("name", "setting"), [("tunl0", "ipipMTU"), ("wireguard.cali", "wireguardMTU")])
def test_each_tunnel_has_its_own_mtu(name: str, setting: str) -> None:
    (found,) = result("performance.mtu-chain", links=(*LINKS, Link(78, name))).findings
    assert f'{{"spec":{{"{setting}":0}}}}' in found.fix


def test_a_tunnel_is_not_to_be_widened() -> None:
    """A WireGuard mesh that carries the nodes' traffic has less room than the network below it."""
    changes: dict[str, Any] = {"links": (*LINKS, WG), "routes": (*ROUTES, Route("10.9.0.0/24", "wg0")), "maps": MESH}
    (found,) = result("services.mtu", **changes).findings
    assert (found.subject, found.fix.partition(" --type")[0]) == ("wg0", "kubectl patch installation default")
    assert '"mtu":1370' in found.fix


def test_programs_of_tcx_are_unpinned_as_well() -> None:
    (found,) = result("services.enslaved-programs", links=(*with_link(ETH0, master="bond0"), BOND)).findings
    assert "tc qdisc del dev eth0 clsact; rm -f /sys/fs/bpf/tcx/eth0_ingress /sys/fs/bpf/tcx/eth0_egress" in found.fix


def test_a_later_start_cures_the_fallback() -> None:
    lines = (line(LOG_LINES["services.log-unsupported"], "ERROR"), line(felix_log.STARTED))
    assert result("services.log-unsupported", felix_lines=lines).status is Status.PASSED
    again = result("services.log-unsupported", felix_lines=(*lines, lines[0], lines[0]))
    assert "2 times, last:" in said(again)
    assert again.findings[0].severity is Severity.ERROR


def test_a_log_that_is_not_felixs_is_missing() -> None:
    found = result("services.felix-started", felix_lines=("hello", "world"))
    assert found.why == ("none of its 2 lines is Felix's",)


@pytest.mark.parametrize(
    ("changes", "release"),
    [
        ({"calico_version": "v3.27.1"}, "v3.27"),
        ({"calico_version": "master"}, "master"),
        ({}, "v3.31"),
        ({"kubernetes": kubernetes(calico_node=image("latest"))}, "v3.31"),
        ({"kubernetes": Missing("no")}, "v3.31"),
        ({"kubernetes": Missing("no"), "maps": (pinned("cali_counters2", (8, 112), []),)}, "v3.26 to v3.29"),
        ({"kubernetes": Missing("no"), "maps": (pinned("cali_counters6", (8, 216), []),)}, "master"),
        (
            {
                "kubernetes": Missing("no"),
                "maps": (pinned("cali_v4_ct2", (16, 64), []), pinned("cali_v4_nat_fe2", (16, 16), [])),
            },
            "v3.15 to v3.21",
        ),
        (
            {
                "kubernetes": Missing("no"),
                "maps": (pinned("cali_v4_ct2", (16, 64), []), pinned("cali_counters6", (8, 216), [])),
            },
            "master",
        ),
        (
            {
                "kubernetes": Missing("no"),
                "maps": (pinned("cali_counters2", (8, 112), []), pinned("cali_state4", (4, 464), [])),
            },
            "v3.27",
        ),
    ],
)
def test_the_release(changes: dict[str, Any], release: str) -> None:
    assert str(registry.sources(replace(HEALTHY, **changes))["release"]) == release


@pytest.mark.parametrize(
    "maps",
    [
        Missing("no"),
        MAPS[:4],
        (pinned("cali_counters2", (8, 112), []), pinned("cali_counters3", (8, 136), [])),
    ],
)
def test_no_release(maps: Any) -> None:
    found = registry.sources(replace(HEALTHY, kubernetes=Missing("no"), maps=maps))["release"]
    assert isinstance(found, Missing)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        (
            "nat",
            {"maps": with_map("cali_v4_nat_fe3", value_size=24)},
            "is not known: v3 16+24; known: key+value bytes of v1",
        ),
        ("nat", {"maps": with_map("cali_v4_nat_be", entries=None)}, "was not read"),
        ("nat", {"maps": with_map("cali_v4_nat_be", raw=[(b"1", b"2")])}, "rows of another size"),
        ("nat", {"maps": MAPS[:1]}, "no map"),
        ("interfaces", {"maps": MAPS[:1]}, "no map"),
        ("node_routes", {"maps": MAPS[:1]}, "no map"),
        ("forwarded", {"maps": MAPS[1:]}, "no map"),
        ("connections", {"maps": MAPS[1:]}, "no map"),
        ("forwarded", {"maps": (pinned("cali_v4_ct2", (16, 64), [(bytes(16), bytes(64))]),)}, "before v3.24"),
        ("node_routes", {"maps": Missing("not root")}, "not root"),
    ],
)
def test_maps_that_cannot_be_decoded(name: str, changes: dict[str, Any], why: str) -> None:
    found = registry.sources(replace(HEALTHY, **changes))[name]
    assert isinstance(found, Missing)
    assert why in found.why


def test_a_route_in_no_known_network_and_the_older_frontends() -> None:
    key, value = frontend("10.96.0.1", 443, 1, 1)
    old = pinned("cali_v4_nat_fe2", (16, 16), [(key, value[:16])])
    found = registry.sources(replace(HEALTHY, maps=(old, *MAPS[2:])))["nat"]
    assert [(str(each), each.flags, each.source) for each in found.frontends] == [
        ("10.96.0.1:443 proto 6", 0, "0.0.0.0/0")
    ]
    assert route("0.0.0.0/0", 0)[0][:4] == bytes(4)


def results_with(*findings: Finding) -> list[Result]:
    passed, skipped = registry.CHECKS[1], registry.CHECKS[2]
    first = Result(registry.BY_ID["services.mtu"], Status.FINDINGS, findings)
    return [
        Result(passed, Status.PASSED),
        Result(skipped, Status.NOT_RUN, why=("no API server was asked",)),
        Result(registry.CHECKS[3], Status.NOT_RUN, why=("no API server was asked",)),
        first,
    ]


WARNING = Finding(Severity.WARNING, "a|b", ("one", "two"), "it is slow", "mend it " + "word " * 40)
ERROR = Finding(Severity.ERROR, "", ("three",), "it is broken", "replace it")


def test_table() -> None:
    lines = list(shown.iter_table(results_with(WARNING, ERROR)))
    assert lines[:5] == [
        "ERROR    services.mtu",
        "         saw    three",
        "         means  it is broken",
        "         fix    replace it",
        "         page   Troubleshoot access to services",
    ]
    assert lines[6:9] == ["WARNING  services.mtu  a|b", "         saw    one", "                two"]
    assert all(len(each) <= folding.WIDTH for each in lines)
    assert "         no API server was asked (2 checks)" in lines
    assert lines[-1] == "1 error, 1 warning; 1 check passed, 2 not run"
    verbose = "\n".join(shown.iter_table(results_with(WARNING), verbose=True))
    assert registry.CHECKS[1].id in verbose
    assert registry.CHECKS[2].id in verbose
    assert list(shown.iter_table([]))[-1] == "no findings; 0 checks passed, 0 not run"
    assert list(shown.iter_table([], verbose=True))[:2] == ["PASSED", "         none"]


def test_a_command_is_folded_so_that_a_shell_takes_it() -> None:
    command = 'kubectl patch ds -n kube-system kube-proxy --type merge -p \'{"spec": {"a": "two words and more"}}\''
    fixes = f"{command}; ip link show  # is it's there?; calico-node -bpf nat dump  # {'long ' * 12}comment; just prose"
    finding = Finding(Severity.INFO, "", ("seen",), "it is slow", fixes)
    lines = list(shown.iter_table(results_with(finding)))
    at = next(number for number, each in enumerate(lines) if each.startswith("         fix"))
    fix = lines[at : next(n for n, each in enumerate(lines) if each.startswith("         page"))]
    assert all(len(each) <= folding.WIDTH for each in fix)
    assert fix[0].endswith(" \\")
    assert "                ip link show  # is it's there?" in fix
    assert "                calico-node -bpf nat dump" in fix
    assert any(each.startswith("                # long long") for each in fix)
    script = "\n".join(each[16:] for each in fix[:2])
    words = subprocess.run(["sh", "-c", f"printf '%s|' {script}"], capture_output=True, text=True, check=True).stdout
    assert words == "|".join(shlex.split(command)) + "|"


def test_json() -> None:
    objects = [json.loads(each) for each in shown.iter_json(results_with(WARNING))]
    assert [each["type"] for each in objects] == ["check", "check", "check", "check", "finding", "summary"]
    assert objects[4] == {
        "type": "finding",
        "id": "services.mtu",
        "severity": "warning",
        "subject": "a|b",
        "evidence": ["one", "two"],
        "meaning": "it is slow",
        "fix": WARNING.fix,
        "section": "Troubleshoot access to services",
    }
    assert objects[5]["findings"] == {"error": 0, "warning": 1, "info": 0}
    assert objects[5]["checks"] == {"passed": 1, "findings": 1, "not run": 2}


def test_markdown() -> None:
    text = "\n".join(shown.iter_markdown(HEALTHY, results_with(WARNING, ERROR)))
    assert text.startswith("# Calico eBPF checks on worker-1\n")
    assert "| error | `services.mtu` |  |\n| warning | `services.mtu` | a\\|b |" in text
    assert "## Warning: services.mtu (a|b)\n\nIt is slow.\n\nEvidence:\n\n```\none\ntwo\n```" in text
    assert "- no API server was asked: `" in text
    bare_report = "\n".join(shown.iter_markdown(replace(HEALTHY, host=Missing("no")), []))
    assert "on a node" in bare_report
    assert "##" not in bare_report


def test_the_documents_name_checks_that_exist() -> None:
    root = Path(__file__).resolve().parent.parent.parent / "docs"
    named = set()
    for path in (root / "compatibility.md", root / "limitations.md", root / "examples" / "check.txt"):
        named |= set(re.findall(r"`((?:services|drops|cpu|debug|maps|performance)\.[a-z0-9-]+)`", path.read_text()))
    assert len(named) > 40
    assert named <= registry.BY_ID.keys()


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"felix_objects": felix(bpfLogLevel="Debug")}, "kubectl patch felixconfiguration default --type merge"),
        (
            {
                "felix_objects": (
                    *felix(),
                    {"metadata": {"name": "node.worker-1"}, "spec": {"bpfLogLevel": "Debug"}},
                )
            },
            "kubectl patch felixconfiguration node.worker-1 --type merge",
        ),
        (
            {"felix_env": {"felix_bpfloglevel": "Debug"}},
            "kubectl set env -n calico-system daemonset/calico-node FELIX_BPFLOGLEVEL-; kubectl patch",
        ),
    ],
)
def test_the_fix_changes_what_the_value_comes_from(changes: dict[str, Any], fix: str) -> None:
    (found,) = result("debug.level", **changes).findings
    assert found.fix.startswith(fix)


@pytest.mark.parametrize(
    ("spec", "link", "pattern"),
    [
        (
            {"bpfDataIfacePattern": "^eth"},
            Link(40, "br0.7", "bridge", addresses=("192.0.2.11/24",)),
            "^eth|^br0\\\\.7$",
        ),
        ({"bpfDataIfacePattern": "^eth"}, replace(WG, addresses=("192.0.2.11/24",)), "^wg0$"),
        (
            {"bpfDataIfacePattern": "^eth", "bpfL3IfacePattern": "^tun1$"},
            replace(WG, addresses=("192.0.2.11/24",)),
            "^tun1$|^wg0$",
        ),
    ],
)
def test_a_pattern_is_made_wider_and_not_replaced(spec: dict[str, Any], link: Link, pattern: str) -> None:
    (found,) = result("services.data-iface-pattern", felix_objects=felix(**spec), links=(*LINKS, link)).findings
    assert f'IfacePattern":"{pattern}"' in found.fix


def test_the_node_to_restart_calico_on_is_this_one() -> None:
    changes: dict[str, Any] = {"links": with_link(POD, programs={})}
    (found,) = result("services.workload-programs", **changes).findings
    assert "--field-selector spec.nodeName=worker-1  # restarts calico-node" in found.fix
    (found,) = result("services.workload-programs", host=Missing("no"), **changes).findings
    assert "spec.nodeName=NODE" in found.fix


def test_fixes_hold_no_placeholder_that_a_shell_would_take() -> None:
    for check, changes, _ in FIRES:
        for finding in result(check, **changes).findings:
            for each in finding.fix.split("; "):
                assert "..." not in each
                if "kubectl" in each:
                    assert each.startswith(("kubectl", "or kubectl")), each


def test_fixes_name_commands_that_exist() -> None:
    for check, changes, _ in FIRES:
        for finding in result(check, **changes).findings:
            for word in re.findall(r"calitrace ([a-z]+)", finding.fix):
                assert word in COMMANDS
