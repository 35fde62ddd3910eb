"""`calitrace check` on the lab: break a real thing and exactly that finding appears; mend it and it vanishes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from calitrace.checks import registry
from calitrace.checks.snapshot import Missing
from calitrace.cli import check
from calitrace.kernel import iptables, netns, node, syscall, tc
from calitrace.lab import deployment, network
from calitrace.lab import state as record
from calitrace.lab.topology import NODE_A, Lab
from tests.netns.conftest import calitrace, changed, on, tcp, udp_echo

pytestmark = pytest.mark.root
# What the lab is not: it has no bpfin.cali, and its conntrack map is small.
LAB_SPEC = {
    "bpfEnabled": True,
    "bpfHostNetworkedNATWithoutCTLB": "Disabled",
    "bpfMapSizeConntrack": 16384,
    "bpfKubeProxyIptablesCleanupEnabled": True,
}
# The lab has a service whose backend has no route, for the drop that this causes.
BASELINE = {("services.nat-backends-routed", None)}
Found = set[tuple[str, str | None]]


def felix_file(directory: Path, **spec: Any) -> str:
    """A file as `kubectl get felixconfigurations -o yaml` writes it; JSON is YAML."""
    path = directory / "felix.yaml"
    each = {"kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": LAB_SPEC | spec}
    path.write_text(json.dumps({"kind": "List", "items": [each]}))
    return str(path)


def run(lab: Lab, *words: str, interval: str = "0") -> list[dict[str, Any]]:
    done = calitrace(
        *("check", "--node", "--netns", lab.namespace("node-a"), "--bpffs", str(lab.pins / "node-a")),
        *("--interval", interval, "-o", "json", *words),
    )
    assert done.returncode in (0, 1), done.stderr
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode == 1) == any(each["type"] == "finding" for each in objects)
    return objects


def findings(objects: list[dict[str, Any]]) -> Found:
    return {(each["id"], each["subject"]) for each in objects if each["type"] == "finding"}


@pytest.fixture
def felix(tmp_path: Path) -> tuple[str, str]:
    return "--felix-config", felix_file(tmp_path)


@contextmanager
def detached(lab: Lab, interface: str, *hooks: str) -> Iterator[None]:
    """The interface without the filters of these hooks."""
    with network.inside(lab.namespace("node-a")) as route:
        index = network.index_of(route, interface)
        for hook in hooks:
            route.tc("del-filter", index=index, parent=tc.HOOKS[hook])
    try:
        yield
    finally:
        found = record.load(lab)
        assert found is not None
        deployment.load(lab, NODE_A, found)


@contextmanager
def small_mtu(lab: Lab) -> Iterator[None]:
    with network.inside(lab.namespace("node-a")) as route:
        route.link("set", index=network.index_of(route, NODE_A.interface), mtu=1400)
    try:
        yield
    finally:
        with network.inside(lab.namespace("node-a")) as route:
            route.link("set", index=network.index_of(route, NODE_A.interface), mtu=1500)


@contextmanager
def strict_rp_filter(lab: Lab) -> Iterator[None]:
    path = Path("/proc/sys/net/ipv4/conf/all/rp_filter")
    with netns.inside(lab.namespace("node-a")):
        path.write_text("1")
    try:
        yield
    finally:
        with netns.inside(lab.namespace("node-a")):
            path.write_text("0")


@contextmanager
def no_forwarding(lab: Lab) -> Iterator[None]:
    path = Path("/proc/sys/net/ipv4/ip_forward")
    with netns.inside(lab.namespace("node-a")):
        path.write_text("0")
    try:
        yield
    finally:
        with netns.inside(lab.namespace("node-a")):
            path.write_text("1")


@contextmanager
def replaced_pod(lab: Lab) -> Iterator[None]:
    """A client of UDP service 30054 has been heard; then its only backend is another pod."""
    assert udp_echo(lab, "client", "10.10.0.1", 30054, b"hello") == b"hello"
    key = struct.pack("<II", 5, 0)
    other = socket.inet_aton("10.65.0.3") + struct.pack("<Hxx", 5353)
    with changed(lab.pins / "node-a" / "cali_v4_nat_be", key, other):
        yield


@contextmanager
def filled_backends(lab: Lab) -> Iterator[None]:
    """The NAT backend map (4096 entries) with 3500 more, of a service id that no frontend has."""
    descriptor = syscall.object_get(lab.pins / "node-a" / "cali_v4_nat_be")
    keys = [struct.pack("<II", 0xFFFF0000, number) for number in range(3500)]
    try:
        for key in keys:
            syscall.map_update(descriptor, key, struct.pack("<4sHxx", b"\x0a\x41\x00\x02", 80))
        yield
    finally:
        for key in keys:
            syscall.map_delete(descriptor, key)
        os.close(descriptor)


@contextmanager
def without_interface_row(lab: Lab) -> Iterator[None]:
    with network.inside(lab.namespace("node-a")) as route:
        key = network.index_of(route, NODE_A.interface).to_bytes(4, "little")
    descriptor = syscall.object_get(lab.pins / "node-a" / "cali_iface4")
    row = syscall.map_lookup(descriptor, key, 52)
    assert row is not None
    assert syscall.map_delete(descriptor, key)
    try:
        yield
    finally:
        syscall.map_update(descriptor, key, row)
        os.close(descriptor)


@contextmanager
def foreign_vxlan(lab: Lab) -> Iterator[None]:
    with network.inside(lab.namespace("node-a")) as route:
        route.link("add", ifname="flannel.1", kind="vxlan", vxlan_id=1, vxlan_port=4789)
    try:
        yield
    finally:
        with network.inside(lab.namespace("node-a")) as route:
            route.link("del", index=network.index_of(route, "flannel.1"))


BREAKS: dict[str, tuple[Callable[[Lab], AbstractContextManager[None]], tuple[str, str | None]]] = {
    "workload-egress": (
        lambda lab: detached(lab, NODE_A.workload, "egress"),
        ("services.workload-programs", NODE_A.workload),
    ),
    "workload-ingress": (
        lambda lab: detached(lab, NODE_A.workload, "ingress"),
        ("services.workload-programs", NODE_A.workload),
    ),
    "uplink": (
        lambda lab: detached(lab, NODE_A.interface, "ingress"),
        ("services.uplink-programs", NODE_A.interface),
    ),
    "mtu": (small_mtu, ("services.mtu", NODE_A.interface)),
    "rp-filter": (strict_rp_filter, ("services.rp-filter", NODE_A.interface)),
    "ip-forward": (no_forwarding, ("services.ip-forward", None)),
    "replaced-pod": (replaced_pod, ("services.conntrack-stale", None)),
    "map-full": (filled_backends, ("maps.nearly-full", "cali_v4_nat_be")),
    "interface-state": (without_interface_row, ("maps.interface-state", NODE_A.interface)),
    "vxlan-port": (foreign_vxlan, ("services.vxlan-port-clash", "flannel.1")),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_found_and_its_mending(lab: Lab, felix: tuple[str, str], name: str) -> None:
    breaking, expected = BREAKS[name]
    assert findings(run(lab, *felix)) == BASELINE
    with breaking(lab):
        assert findings(run(lab, *felix)) == BASELINE | {expected}
    assert findings(run(lab, *felix)) == BASELINE


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"bpfDataIfacePattern": "^eth"}, ("services.data-iface-pattern", "ens192")),
        ({"bpfLogLevel": "Debug"}, ("debug.level", None)),
        ({"bpfEnabled": False}, ("services.ebpf-off", None)),
        ({"bpfMapSizeConntrack": 512000}, ("maps.conntrack-smaller", "cali_v4_ct4")),
        ({"bpfConnectTimeLoadBalancing": "Disabled"}, ("performance.ctlb", None)),
        ({"bpfHostNetworkedNATWithoutCTLB": "Enabled"}, ("services.nat-interfaces", "bpfin.cali")),
    ],
)
def test_settings(lab: Lab, tmp_path: Path, spec: dict[str, Any], expected: tuple[str, str | None]) -> None:
    found = findings(run(lab, "--felix-config", felix_file(tmp_path, **spec)))
    assert expected in found
    assert {check for check, _ in found - BASELINE} == {expected[0]}


@contextmanager
def process_named(lab: Lab, directory: Path, name: str) -> Iterator[int]:
    """A real process of that name in the node's namespace; it sleeps."""
    program = directory / name
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    with netns.inside(lab.namespace("node-a")):
        process = subprocess.Popen([program, "300"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def test_kube_proxy(lab: Lab, tmp_path: Path, felix: tuple[str, str]) -> None:
    with process_named(lab, tmp_path, "kube-proxy") as pid:
        objects = run(lab, *felix)
        assert findings(objects) == BASELINE | {("cpu.kube-proxy-fight", "kube-proxy")}
        (fight,) = [each for each in objects if each.get("id") == "cpu.kube-proxy-fight" and each["type"] == "finding"]
        assert any(f"process {pid}: " in each for each in fight["evidence"])
        kept = felix_file(tmp_path, bpfKubeProxyIptablesCleanupEnabled=False, bpfKubeProxyHealthzPort=0)
        assert findings(run(lab, "--felix-config", kept)) == BASELINE
        assert findings(run(lab)) == BASELINE | {("services.kube-proxy-beside", None)}
    assert findings(run(lab, *felix)) == BASELINE


@pytest.mark.parametrize(("name", "found"), [("kubelet", {("services.host-without-nat", None)}), ("k3s-server", set())])
def test_that_no_kube_proxy_runs_is_known_beside_a_kubelet(
    lab: Lab, tmp_path: Path, felix: tuple[str, str], name: str, found: Found
) -> None:
    with process_named(lab, tmp_path, name):
        assert findings(run(lab, *felix)) == BASELINE | found


def test_vxlan_blocked(lab: Lab, felix: tuple[str, str], tmp_path: Path) -> None:
    assert on(lab, "fault", "vxlan-blocked").returncode == 0
    try:
        for _ in range(4):
            with pytest.raises(TimeoutError):
                tcp(lab, "client", "10.10.0.1", 30080, wait_s=0.3)
        objects = run(lab, *felix)
        assert findings(objects) == BASELINE | {("services.nodeport-unanswered", "10.10.0.2")}
        asked = run(lab, *felix, "--probe", "10.10.0.2=10.10.0.1:30080")
        assert findings(asked) - findings(objects) == {("services.vxlan-probe", "10.10.0.2")}
        there = str(tmp_path / "node-b.calitrace")
        away = ("check", "services", "--node", "--netns", lab.namespace("node-b"), "--bpffs", str(lab.pins / "node-b"))
        probe = ("--probe", "10.10.0.1=10.10.0.2:30081", "--node-name", "node-b", "-w", there)
        assert calitrace(*away, *probe, "--interval", "0").returncode == 1
        both = run(lab, *felix, "--other", there)
        assert findings(both) - findings(objects) == {("services.vxlan-probe", "from node-b to 10.10.0.1")}
    finally:
        assert on(lab, "heal").returncode == 0
    with contextlib.closing(tcp(lab, "client", "10.10.0.1", 30080)):
        assert findings(run(lab, *felix)) == BASELINE
        assert findings(run(lab, *felix, "--probe", "10.10.0.2=10.10.0.1:30080")) == BASELINE
        calitrace(*away, *probe, "--interval", "0")
        assert findings(run(lab, *felix, "--other", there)) == BASELINE


def test_drops_over_the_interval(lab: Lab, felix: tuple[str, str]) -> None:
    """30087's backend has no route: each datagram or SYN to it is one RT_UNKNOWN."""
    over = threading.Event()

    def knock() -> None:
        while not over.is_set():
            with suppress(OSError):
                tcp(lab, "client", "10.10.0.1", 30087, wait_s=0.05).close()

    client = threading.Thread(target=knock)
    client.start()
    try:
        found = [each for each in run(lab, "drops", *felix, interval="0.5") if each["type"] == "finding"]
    finally:
        over.set()
        client.join()
    since = ("drops.since-boot", "RT_UNKNOWN")
    assert findings(found) == {("drops.calico-reasons", "ens192 tc ingress"), since}
    assert found[0]["evidence"][0].startswith("RT_UNKNOWN: ")
    assert findings(run(lab, "drops", *felix, interval="0.2")) == {since}


def test_the_snapshot_gives_the_same_elsewhere(lab: Lab, felix: tuple[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "node.calitrace"
    live = run(lab, *felix, "-w", str(kept))
    offline = calitrace("check", "-r", str(kept), "-o", "json")
    assert [json.loads(line) for line in offline.stdout.splitlines()] == live


def test_of_several_nodes_in_one_kernel_the_maps_are_its_own(lab: Lab, felix: tuple[str, str], tmp_path: Path) -> None:
    """Both nodes' maps lie below one bpffs: those that the programs of this namespace use are taken."""
    kept = tmp_path / "node.calitrace"
    for each in ("node-a", "node-b"):
        calitrace("check", "--node", "--netns", lab.namespace(each), "--interval", "0", *felix, "-w", str(kept))
        found = check._read(kept)
        assert not isinstance(found.maps, Missing)
        assert {Path(one.path).parent for one in found.maps} == {lab.pins / each}


def test_a_process_with_a_sys_of_its_own_hides_no_maps(lab: Lab, felix: tuple[str, str]) -> None:
    """`ip netns exec` mounts /sys anew for what it starts: no bpffs is there."""
    name = lab.namespace("node-a")
    command = ["ip", "netns", "exec", name, "sh", "-c", "echo ready; exec sleep 300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            assert findings(run(lab, "services", "maps", *felix)) == BASELINE
            done = calitrace("check", "maps", "--node", "--netns", name, "--interval", "0", *felix, "-o", "json")
            statuses = {each["id"]: each.get("status") for each in map(json.loads, done.stdout.splitlines()[:3])}
            assert statuses["maps.pinned"] == "passed"
        finally:
            process.kill()


def test_without_root_nothing_is_taken_for_absent(lab: Lab) -> None:
    """What may not be read is missing: above all it is no proof that there is no program and no kube-proxy."""
    receive, send = os.pipe()
    before = node.collect(node.Where(lab.namespace("node-a"), lab.pins / "node-a"), 0, lambda _: None)
    assert not isinstance(before.links, Missing)
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        results = registry.run(node.collect(node.Where(), 0, lambda _: None))
        os.write(send, json.dumps([each.check.id for each in results if each.findings]).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        found = json.load(answer)
    os.waitpid(child, 0)
    assert not {"services.ebpf-off", "services.kube-proxy-absent"} & set(found)


def test_a_healthy_node_has_traffic_and_no_unanswered_connections(lab: Lab, felix: tuple[str, str]) -> None:
    assert udp_echo(lab, "client", "10.10.0.1", 30053, b"hello") == b"hello"
    assert findings(run(lab, *felix)) == BASELINE


def test_chains_of_netfilter_are_read(lab: Lab) -> None:
    """kube-proxy's chains are known by name, as nftables and the nft variant of iptables keep them."""
    rules = "add table ip nat\nadd chain ip nat KUBE-SERVICES\nadd chain ip nat KUBE-SVC-TCOU7JCQXEZGVUNU\n"
    with netns.inside(lab.namespace("node-a")):
        assert iptables.chains() == ()
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
        try:
            assert iptables.chains() == ("KUBE-SERVICES", "KUBE-SVC-TCOU7JCQXEZGVUNU")
        finally:
            subprocess.run(["nft", "delete", "table", "ip", "nat"], check=True)


def test_the_table_of_kube_proxys_nftables_mode(lab: Lab) -> None:
    """Its chains have words for names: the table makes them kube-proxy's."""
    rules = "add table ip kube-proxy\nadd chain ip kube-proxy services\nadd table ip x\nadd chain ip x services\n"
    with netns.inside(lab.namespace("node-a")):
        subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
        try:
            assert iptables.chains() == ("kube-proxy/services", "services")
        finally:
            subprocess.run(
                ["nft", "-f", "-"], input="delete table ip kube-proxy\ndelete table ip x\n", text=True, check=True
            )


def test_chains_that_come_back_while_we_measure(lab: Lab) -> None:
    nft = shutil.which("nft")
    if nft is None:
        pytest.fail("make test installs nft")

    def write_rules(said: str) -> None:
        if said.startswith("measuring"):
            rules = "add table ip nat\nadd chain ip nat KUBE-SERVICES\n"
            subprocess.run([nft, "-f", "-"], input=rules, text=True, check=True)

    check_of = [registry.BY_ID["cpu.kube-proxy-rules-return"]]
    where = node.Where(lab.namespace("node-a"), lab.pins / "node-a")
    try:
        (said,) = registry.run(node.collect(where, 0.1, write_rules), check_of)
        assert [each.evidence for each in said.findings] == [("1 chains that were not there before", "KUBE-SERVICES")]
        (said,) = registry.run(node.collect(where, 0.1, lambda _: None), check_of)
        assert said.findings == ()
    finally:
        with netns.inside(lab.namespace("node-a")):
            subprocess.run([nft, "delete", "table", "ip", "nat"], check=True)


def test_a_reader_of_trace_pipe_is_named(lab: Lab, felix: tuple[str, str], tmp_path: Path) -> None:
    """Any file of that name does: what matters is the process that holds it open."""
    pipe = tmp_path / "trace_pipe"
    pipe.touch()
    with pipe.open():
        (found,) = [each for each in run(lab, "debug", *felix) if each["type"] == "finding"]
    assert found["id"] == "debug.trace-pipe-readers"
    assert f"process {os.getpid()} " in found["evidence"][0]
    assert findings(run(lab, "debug", *felix)) == set()


@pytest.mark.parametrize("level", ["debug", "off"])
def test_programs_that_print_are_told_by_their_time(lab: Lab, felix: tuple[str, str], level: str) -> None:
    """Felix's settings say Off; what is attached may say otherwise."""
    assert on(lab, "log-level", level).returncode == 0
    over = threading.Event()

    def talk() -> None:
        while not over.is_set():
            udp_echo(lab, "client", "10.10.0.1", 30054, b"hello")

    client = threading.Thread(target=talk)
    client.start()
    try:
        found = findings(run(lab, "debug", *felix, interval="1"))
    finally:
        over.set()
        client.join()
        assert on(lab, "log-level", "off").returncode == 0
    assert found == ({("debug.slow-programs", None)} if level == "debug" else set())


def test_run_time_is_measured_only_meanwhile(lab: Lab) -> None:
    """The kernel's statistics are off again afterwards, and drops of the interval are counted."""
    where = node.Where(lab.namespace("node-a"), lab.pins / "node-a")
    over = threading.Event()

    def talk() -> None:
        while not over.is_set():
            udp_echo(lab, "client", "10.10.0.1", 30053, b"hello")

    client = threading.Thread(target=talk)
    client.start()
    try:
        found = node.collect(where, 0.3, lambda _: None)
    finally:
        over.set()
        client.join()
    assert not isinstance(found.program_times, Missing)
    names = {each.name for each in found.program_times.programs if each.run_count}
    assert any(each.startswith("cali_") for each in names)
    assert Path("/proc/sys/kernel/bpf_stats_enabled").read_text().strip() == "0"
    assert not isinstance(found.drops, Missing)
    counters, qdiscs = found.drops.counters, found.drops.qdiscs
    assert not isinstance(counters, Missing)
    assert not isinstance(qdiscs, Missing)
    assert {"ens192"} <= {each.interface for each in counters}
    assert {"ens192", NODE_A.workload} == {each.interface for each in qdiscs}
