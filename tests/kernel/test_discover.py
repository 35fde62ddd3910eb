"""What stands on a real interface: Calico's programs, foreign ones, XDP."""

from __future__ import annotations

import os
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute

from calitrace.checks.snapshot import Missing
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import attached, discover, headers, loader, maps, netns, node, preflight, syscall
from calitrace.model import Link, Namespace, Role
from tests.kernel.conftest import compile_tc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root
PROGRAMS = """
BPF_PERCPU_ARRAY(cali_state6, struct { u8 bytes[512]; }, 2);
int cali_from_hep(struct __sk_buff *skb) { u32 zero = 0; return cali_state6.lookup(&zero) ? -1 : 0; }
int other_prog(struct __sk_buff *skb) { return -1; }
int some_xdp(struct xdp_md *ctx) { return 2; }
"""


def test_programs_roles_and_state_map(pair: Pair) -> None:
    bpf = compile_tc(PROGRAMS)
    pair.attach(bpf, "cali_from_hep", pair.right, "right0", "ingress")
    pair.attach(bpf, "other_prog", pair.right, "right0", "ingress")
    xdp = bpf.load_func(b"some_xdp", bpf.XDP)
    with netns.inside(pair.right), IPRoute() as route:
        index = route.link_lookup(ifname="right0")[0]
        route.link("set", index=index, xdp_fd=xdp.fd)
        lo = route.link_lookup(ifname="lo")[0]
        route.link("set", index=lo, state="down")
    found = discover.topology(pair.left)
    node, client = found.namespaces[netns.inum(pair.right)], found.namespaces[netns.inum(pair.left)]
    link = node.links[index]
    assert (node.role, client.role) == (Role.NODE, Role.CLIENT)
    assert link.calico == {"ingress": ("cali_from_hep",)}
    assert link.foreign == {"ingress": ("other_prog",), "xdp": ("some_xdp",)}
    assert pair.right_ip in link.addresses
    assert (link.up, node.links[lo].up) == (True, False)
    assert link.peer_netns == client.inum
    assert (node.state_name, node.state_bytes) == ("cali_state6", 512)
    assert discover.state_maps(found) == {node.inum: node.state_map}


def test_doctor_sees_a_node_that_is_no_neighbour_of_ours(pair: Pair) -> None:
    pair.attach(compile_tc(PROGRAMS), "cali_from_hep", pair.right, "right0", "ingress")
    (finding,) = [each for each in preflight.iter_findings() if each.name == f"Calico on {pair.right}"]
    assert (finding.ok, finding.found) == (True, "1 hooks; cali_state6 of v3.32..master")


@pytest.mark.parametrize(("client", "roles"), [(2, ("client", "pod")), (1, ("pod", "pod"))])
def test_a_pod_from_which_probes_come_is_their_client(client: int, roles: tuple[str, str]) -> None:
    links = {index: Link(index, f"cali{index}", peer_netns=index, workload=True) for index in (2, 3)}
    found = {1: Namespace(1, "node", Role.NODE, links)}
    found |= {inum: Namespace(inum, f"pod-{inum}", Role.OTHER, {}) for inum in (2, 3)}
    topology = discover._with_roles(found, client)
    assert (topology.namespaces[2].role.value, topology.namespaces[3].role.value) == roles
    assert topology.namespaces[1].role is Role.NODE


def test_a_name_without_a_namespace_harms_nothing(pair: Pair) -> None:
    """So it stands while someone makes or removes one: a plain file."""
    name = netns.path(pair.left).with_name(f"{pair.left}-plain")
    name.touch()
    try:
        found = discover.topology(pair.left)
    finally:
        name.unlink()
    assert {netns.inum(pair.left), netns.inum(pair.right)} <= found.namespaces.keys()
    assert name.name not in {each.name for each in found.namespaces.values()}


@pytest.mark.parametrize(
    ("label", "ours"),
    [("calico-tc123.o:[calico_from_host_ep]", True), ("cali_tc_preambl:[7]", True), ("x.o:[y]", False)],
)
def test_a_program_without_a_name_is_known_by_its_filter(label: str, ours: bool) -> None:
    info = syscall.ProgramInfo(7, 3, "", "tag", 0, (), 0, 0, 0, 0)
    found = discover._Attached("tc pref 1", label, info)
    assert (found.is_calico, found.name) == (ours, label)
    assert not discover._Attached("tc pref 1", "calico_x").is_calico


def test_a_namespace_that_only_a_mount_holds(pair: Pair, tmp_path: Path) -> None:
    held, inum = tmp_path / os.fsdecode("höld here ".encode() + b"\xff"), netns.inum(pair.right)
    held.touch()
    subprocess.run(["mount", "--bind", str(netns.path(pair.right)), str(held)], check=True)
    try:
        assert netns.names()[inum] == pair.right
        subprocess.run(["umount", str(netns.path(pair.right))], check=True)
        assert netns.names()[inum] == str(held)
        assert discover.topology(pair.left).namespaces[inum].links
    finally:
        subprocess.run(["mount", "--bind", str(held), str(netns.RUN_NETNS / pair.right)], check=True)
        subprocess.run(["umount", str(held)], check=True)


def test_an_interface_name_may_be_no_text(pair: Pair) -> None:
    name = b"gr\xf6n"
    subprocess.run(["ip", "-n", pair.right, "link", "add", name, "type", "veth"], check=True)
    (found,) = (each for each in discover.topology(pair.left).namespaces.values() if each.name == pair.right)
    assert name in [os.fsencode(link.name) for link in found.links.values()]
    links = node.collect(node.Where(pair.right), 0, lambda _: None).links
    assert not isinstance(links, Missing)
    assert name in [os.fsencode(link.name) for link in links]
    assert attached.calico_programs(pair.right)[os.fsdecode(name), "egress"] == ()


def test_only_the_other_ends_that_are_wanted_are_looked_for(pair: Pair) -> None:
    asked = []

    class Route:
        def get_netnsid(self, fd: int) -> dict[str, int]:
            asked.append(os.fstat(fd).st_ino)
            return {"nsid": 5 if asked[-1] == netns.inum(pair.right) else -1}

    files = {netns.inum(each): each for each in (pair.left, pair.right)}
    more = {**files, netns.own_inum(): "/proc/self/ns/net"}
    assert discover._peer_namespaces(Route(), {5}, more) == {5: netns.inum(pair.right)}
    assert asked == list(files)
    assert discover._peer_namespaces(Route(), set(), more) == {}
    assert len(asked) == len(files)


def test_neither_btf_nor_headers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "kernel_btf", lambda: None)
    monkeypatch.setattr("os.uname", lambda: type("Uname", (), {"release": "0.0.0-none", "machine": "x86_64"}))
    with pytest.raises(EnvironmentUnfit, match="neither BTF"):
        loader.compile_bpf("int f(void *x) { return 0; }")


CHAIN = """
BPF_PERCPU_ARRAY(cali_state6, struct { u8 bytes[512]; }, 2);
BPF_HASH(cali_v4_ct4, u64, u64);
BPF_HASH(cali_v4_routes, u64, u64);
BPF_PROG_ARRAY(cali_progs_ing2, 400);
int cali_tc_preamble(struct __sk_buff *skb) { cali_progs_ing2.call(skb, 399); return 2; }
int calico_tc_main(struct __sk_buff *skb) {
    u32 zero = 0;
    u64 key = 0;
    cali_progs_ing2.call(skb, 7);
    return cali_state6.lookup(&zero) && cali_v4_ct4.lookup(&key) ? -1 : 0;
}
int calico_tc_skb_drop(struct __sk_buff *skb) { u64 key = 0; return cali_v4_routes.lookup(&key) ? -1 : 0; }
"""


def test_maps_that_are_not_pinned_are_a_nodes_by_its_programs(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is in `ip netns exec`, whose /sys has no bpffs, where several nodes are on one machine."""
    nodes = {namespace: compile_tc(CHAIN) for namespace in (pair.left, pair.right)}
    for namespace, bpf in nodes.items():
        for slot, name in ((399, b"calico_tc_main"), (7, b"calico_tc_skb_drop")):
            program = bpf.load_func(name, bpf.SCHED_CLS)
            syscall.map_update(bpf[b"cali_progs_ing2"].map_fd, struct.pack("<I", slot), struct.pack("<I", program.fd))
        pair.attach(bpf, "cali_tc_preamble", namespace, "left0" if namespace == pair.left else "right0", "ingress")
    monkeypatch.setattr(maps, "BPFFS", tmp_path)
    for namespace, bpf in nodes.items():
        names = ("cali_progs_ing2", "cali_state6", "cali_v4_ct4", "cali_v4_routes")
        wanted = {name: syscall.map_info(bpf[name.encode()].map_fd).id for name in names}
        assert {each.name: each.info.id for each in maps.find(tmp_path, namespace)} == wanted
    with pytest.raises(UsageError, match="several nodes are loaded"):
        maps.find(tmp_path)


IFSTATE = """
struct row { u32 flags; char name[16]; s32 policies[8]; };
BPF_TABLE("hash", u32, struct row, cali_iface4, 1000);
BPF_PROG_ARRAY(cali_progs_ing2, 400);
int cali_tc_preamble(struct __sk_buff *skb) { cali_progs_ing2.call(skb, 399); return 0; }
int calico_tc_main(struct __sk_buff *skb) { u32 key = 0; return cali_iface4.lookup(&key) ? -1 : 0; }
"""


@pytest.fixture
def with_ifstate() -> Iterator[Any]:
    """Gone with the test: whatever interfaces its map has, others would believe."""
    bpf = compile_tc(IFSTATE)
    yield bpf
    bpf.cleanup()


def test_pods_interfaces_are_those_that_calico_says_whatever_another_cni_named_them(
    pair: Pair, with_ifstate: Any
) -> None:
    bpf = with_ifstate
    program = bpf.load_func(b"calico_tc_main", bpf.SCHED_CLS)
    syscall.map_update(bpf[b"cali_progs_ing2"].map_fd, struct.pack("<I", 399), struct.pack("<I", program.fd))
    pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "ingress")

    def look() -> tuple[Link, Role]:
        found = discover.topology(pair.left).namespaces
        (link,) = (each for each in found[netns.inum(pair.left)].links.values() if each.name == "left0")
        return link, found[netns.inum(pair.right)].role

    link, role = look()
    assert (link.workload, role) == (False, Role.OTHER)
    for flags, workload in ((2 | 8, False), (1 | 2, True)):  # a host's interface, ready; a workload's
        row = struct.pack("<I16s8i", flags, b"left0", *[-1] * 8)
        syscall.map_update(bpf[b"cali_iface4"].map_fd, struct.pack("<I", link.ifindex), row)
        found, role = look()
        assert (found.workload, role) == (workload, Role.POD if workload else Role.OTHER)


def test_an_array_that_many_programs_share_is_read_once(
    pair: Pair, with_ifstate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its slots are read one by one, and without counters a node's maps are never complete."""
    bpf = with_ifstate
    program = bpf.load_func(b"calico_tc_main", bpf.SCHED_CLS)
    array = bpf[b"cali_progs_ing2"].map_fd
    for slot in (7, 399):
        syscall.map_update(array, struct.pack("<I", slot), struct.pack("<I", program.fd))
    for hook in ("ingress", "egress"):
        pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", hook)
    chained, read = maps.chained, list[int]()

    def counted(identifier: int) -> set[int]:
        read.append(identifier)
        return chained(identifier)

    monkeypatch.setattr(maps, "chained", counted)
    discover.topology(pair.left)
    assert read.count(syscall.map_info(array).id) == 1
