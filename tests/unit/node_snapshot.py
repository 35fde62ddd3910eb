"""A healthy node and its cluster as a snapshot, and the pieces to spoil it with."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from calitrace.calico import felix_log
from calitrace.checks.snapshot import (
    Cloud,
    Counters,
    Drops,
    Host,
    Kubernetes,
    Link,
    Map,
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

PREAMBLE = Program(7, "cali_tc_preambl", 400, {"cali_v4_ct4": 11})
BOTH: dict[str, tuple[Program, ...]] = {"ingress": (PREAMBLE,), "egress": (PREAMBLE,)}
OFFLOADS = {"rx-gro": True, "tx-generic-segmentation": True, "tx-checksum-ip-generic": False}
TIME = "2026-11-23 10:00:00.000"
ETH0 = Link(2, "eth0", addresses=("192.0.2.11/24",), driver="virtio_net", features=OFFLOADS, programs=BOTH)
POD = Link(11, "cali1a2b3c4d5e6", "veth", 1450, programs=BOTH)
POD_2 = Link(12, "calif00dbeef012", "veth", 1450, programs=BOTH)
LO = Link(1, "lo", mtu=65536, addresses=("127.0.0.1/8",))
TUNNEL = Link(
    3, "vxlan.calico", "vxlan", 1450, addresses=("10.65.0.0/32",), features=OFFLOADS, programs=BOTH, udp_port=4789
)
BPFIN, BPFOUT = Link(4, "bpfin.cali", "veth"), Link(5, "bpfout.cali", "veth")
LINKS = (LO, ETH0, TUNNEL, BPFIN, BPFOUT, POD, POD_2)
ROUTES = (Route("default", "eth0", "192.0.2.1"), Route("192.0.2.0/24", "eth0"), Route("10.65.1.0/26", "vxlan.calico"))


def line(text: str, level: str = "INFO", time: str = TIME) -> str:
    """A line of Felix's log."""
    return f"{time} [{level}][57] felix/int_dataplane.go 700: {text}"


def felix(**spec: Any) -> tuple[dict[str, Any], ...]:
    """FelixConfiguration ``default`` with eBPF on and these fields."""
    return ({"kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": {"bpfEnabled": True} | spec},)


def frontend(
    address: str,
    port: int,
    identifier: int,
    count: int,
    local: int = 0,
    flags: int = 0,
    source: str = "0.0.0.0/0",
    proto: int = 6,
) -> tuple[bytes, bytes]:
    """A row of cali_v4_nat_fe3."""
    network = IPv4Network(source)
    key = struct.pack(
        "<I4sHB4sx",
        56 + network.prefixlen,
        IPv4Address(address).packed,
        port,
        proto,
        network.network_address.packed,
    )
    return key, struct.pack("<IIIII", identifier, count, local, 0, flags)


def backend(identifier: int, ordinal: int, address: str, port: int) -> tuple[bytes, bytes]:
    """A row of cali_v4_nat_be."""
    return struct.pack("<II", identifier, ordinal), struct.pack("<4sHxx", IPv4Address(address).packed, port)


def route(network: str, flags: int) -> tuple[bytes, bytes]:
    """A row of cali_v4_routes."""
    parsed = IPv4Network(network)
    return struct.pack("<I4s", parsed.prefixlen, parsed.network_address.packed), struct.pack("<I4x", flags)


def connection(port: int, sent: int, answered: int, seen: int, flags: int = 0x104, **more: Any) -> tuple[bytes, bytes]:
    """A row of cali_v4_ct4: a client's connection to NodePort 30080 of this node, handed to 192.0.2.12; source is B."""
    key = struct.pack(
        "<I4s4sHH",
        more.get("proto", 6),
        IPv4Address(more.get("server", "10.65.1.2")).packed,
        IPv4Address("198.51.100.9").packed,
        more.get("server_port", 8080),
        port,
    )
    value = bytearray(88)
    struct.pack_into("<QQBB", value, 0, 0, seen, more.get("type", 2), flags & 0xFF)
    value[23] = flags >> 8
    forward, back = (48, 24) if flags & 0x100 else (24, 48)
    struct.pack_into("<I", value, forward + 8, sent)
    struct.pack_into("<I", value, back + 8, answered)
    value[72:76] = IPv4Address(more.get("tun_ip", "192.0.2.12")).packed
    value[76:80] = IPv4Address("192.0.2.11").packed
    struct.pack_into("<H", value, 80, 30080)
    return key, bytes(value)


def state(index: int, name: str, flags: int) -> tuple[bytes, bytes]:
    """A row of cali_iface4."""
    return struct.pack("<I", index), struct.pack("<I16s32x", flags, name.encode())


def pinned(name: str, sizes: tuple[int, int], rows: list[tuple[bytes, bytes]], most: int = 1000, **more: Any) -> Map:
    """A pinned map with these rows."""
    path = f"/sys/fs/bpf/tc/globals/{name}"
    values = {"id": 20, "type": 1, "entries": len(rows)} | more
    return Map(
        name=name, path=path, key_size=sizes[0], value_size=sizes[1], max_entries=most, raw=tuple(rows), **values
    )


FRONTENDS = [
    frontend("10.96.0.1", 443, 1, 1),
    frontend("10.96.0.10", 80, 2, 2, local=1),
    frontend("255.255.255.255", 30080, 2, 2, local=1),
]
BACKENDS = [backend(1, 0, "192.0.2.10", 6443), backend(2, 0, "10.65.0.2", 8080), backend(2, 1, "10.65.1.2", 8080)]
NODE_ROUTES = [
    route("192.0.2.11/32", 0x18),
    route("192.0.2.10/32", 0x10),
    route("10.65.0.2/32", 0xC),
    route("10.65.1.0/26", 0x4),
]
STATES = [state(2, "eth0", 0xA), state(11, POD.name, 3), state(12, POD_2.name, 3)]
CONNTRACK = pinned("cali_v4_ct4", (16, 88), [], 512000, id=11, type=9, entries=100)
MAPS = (
    CONNTRACK,
    pinned("cali_v4_nat_fe3", (16, 20), FRONTENDS),
    pinned("cali_v4_nat_be", (8, 8), BACKENDS),
    pinned("cali_v4_routes", (8, 8), NODE_ROUTES),
    pinned("cali_iface4", (4, 52), STATES),
    pinned("cali_counters5", (8, 200), [], type=5),
    pinned("cali_state4", (4, 488), [], 2, type=6, entries=None),
)
SERVICES: tuple[dict[str, Any], ...] = (
    {
        "metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.96.0.1",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP"}],
        },
    },
    {
        "metadata": {"namespace": "shop", "name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "nodePort": 30080}]},
    },
)


def slices(*addresses: str, **conditions: bool) -> tuple[dict[str, Any], ...]:
    """The EndpointSlices of kubernetes, and of shop/web with these addresses."""
    return (
        {
            "metadata": {"namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
            "addressType": "IPv4",
            "ports": [{"name": "https", "port": 6443}],
            "endpoints": [{"addresses": ["192.0.2.10"], "conditions": {"ready": True}}],
        },
        {
            "metadata": {"namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "ports": [{"port": 8080}],
            "endpoints": [{"addresses": [each], "conditions": {"ready": True} | conditions} for each in addresses],
        },
    )


def node(name: str, address: str) -> dict[str, Any]:
    """A Node as the API has it."""
    return {
        "metadata": {"name": name, "annotations": {"projectcalico.org/IPv4Address": f"{address}/24"}},
        "status": {"addresses": [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": name}]},
    }


def pool(**spec: Any) -> dict[str, Any]:
    """The IPPool default."""
    return {"metadata": {"name": "default"}, "spec": {"cidr": "10.65.0.0/16"} | spec}


NODES = (node("worker-1", "192.0.2.11"), node("worker-2", "192.0.2.12"))
POOL = pool(ipipMode="Never", vxlanMode="CrossSubnet")
CONTAINER = {"name": "calico-node", "image": "quay.io/calico/node:v3.31.2"}
CALICO_NODE = {"spec": {"template": {"spec": {"containers": [CONTAINER]}}}}
API_ENDPOINT = {"data": {"KUBERNETES_SERVICE_HOST": "192.0.2.10"}}
ENDPOINTS = slices("10.65.0.2", "10.65.1.2")
KUBERNETES = Kubernetes("v1.31.2", NODES, SERVICES, ENDPOINTS, (POOL,), CALICO_NODE, {}, API_ENDPOINT)
NO_DROPS = tuple([0] * 25)
HEALTHY = Snapshot(
    taken="2026-11-23T10:00:00+0000",
    host=Host("worker-1", "6.8.0-45-generic", {"ID": "ubuntu", "PRETTY_NAME": "Ubuntu 24.04.1 LTS"}, 8),
    sysctls={
        "net.core.bpf_jit_enable": "1",
        "net.core.bpf_jit_limit": "528482304",
        "kernel.bpf_stats_enabled": "0",
        "net.ipv4.ip_forward": "1",
        "net.ipv4.conf.eth0.forwarding": "1",
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.eth0.rp_filter": "0",
    },
    links=LINKS,
    routes=ROUTES,
    processes=(Process(57, "calico-node", "calico-node -felix"), Process(40, "kubelet", "/usr/bin/kubelet")),
    chains=("KUBE-KUBELET-CANARY", "cali-FORWARD"),
    chains_later=("KUBE-KUBELET-CANARY", "cali-FORWARD"),
    metrics={"felix_bpf_conntrack_sweep_duration": 2.5e6, "felix_bpf_conntrack_used": 100.0},
    trace_readers=(),
    lockdown="none",
    programs=(PREAMBLE,),
    maps=MAPS,
    thread_times=ThreadTimes(1.0, (ThreadTime(57, "calico-node", "calico-node", 0.02),)),
    program_times=ProgramTimes(1.0, (ProgramTime(7, "cali_tc_preambl", 1_000_000, 1000),)),
    drops=Drops(
        1.0,
        (Counters("eth0", 0, NO_DROPS, NO_DROPS),),
        tuple(QdiscDrops(each.name, 5, 5) for each in LINKS if each.any_calico),
    ),
    felix_env={},
    felix_objects=felix(),
    felix_lines=(line("Felix starting up"), line(felix_log.STARTED), "libbpf: something else"),
    kubernetes=KUBERNETES,
    vxlan_probes=(VxlanProbe("192.0.2.12", 4789, "192.0.2.11:30080", 5, 5),),
    cloud=Cloud("aws", "i-0123456789abcdef0", "eu-central-1a", "m6i.large"),
)


def with_link(link: Link, **changes: Any) -> tuple[Link, ...]:
    """The healthy node's interfaces with one changed."""
    return tuple(replace(each, **changes) if each is link else each for each in LINKS)


def with_map(name: str, **changes: Any) -> tuple[Map, ...]:
    """The healthy node's maps with one changed; *raw* sets the number of entries as well."""
    if "raw" in changes:
        changes = {"entries": len(changes["raw"])} | changes | {"raw": tuple(changes["raw"])}
    return tuple(replace(each, **changes) if each.name == name else each for each in MAPS)


def bare() -> tuple[Link, ...]:
    """The interfaces without any Calico program."""
    return tuple(replace(each, programs={}) for each in LINKS)
