"""The lab's dataplane on two nodes of our own: real packets, real sockets, and the log beside Calico's own.

tests/data/trace-master.log was written by Calico's programs (master) in the same topology.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import os
import re
import socket
import struct
import subprocess
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute
from pyroute2 import netns as pyroute_netns

from calitrace.calico import state as calico_state
from calitrace.kernel import mounts, netns, syscall
from calitrace.lab.dataplane import (
    UNAUTHORISED_SOURCE,
    Dataplane,
    Interface,
    NodeConfig,
    Protocol,
    RouteFlags,
    Rpf,
    Workload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeAlias

    Recorder: TypeAlias = Callable[[Callable[[], object]], list[tuple[str, ...]]]

pytestmark = pytest.mark.root

CLIENT, NODE_A, NODE_B = "10.10.0.100", "10.10.0.1", "10.10.0.2"
POD_A, POD_B = "10.65.0.2", "10.65.1.2"
GATEWAY = "169.254.1.1"
TIMEOUT = 10.0
LOST_AFTER = 1.3  # time for the first SYN and one more
RULE = 0x1122334455667788
BIG = os.urandom(1 << 20) * 10
_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)  # ETHTOOL_STXCSUM, STSO, SGSO, SGRO of include/uapi/linux/ethtool.h
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _IP_MTU = 10, 2, 14  # include/uapi/linux/in.h
TRACE = Path(__file__).parent.parent / "data" / "trace-master.log"


def _mac(number: int) -> str:
    return f"02:ca:11:c0:00:{number:02x}"


@dataclass
class Node:
    """One node: its namespace's and interfaces' names, and its dataplane."""

    letter: str
    ip: str
    pod_ip: str
    number: int
    prefix: str
    bpffs: Path
    namespace: str = ""
    pod: str = ""
    uplink: str = ""
    veth: str = ""
    dataplane: Dataplane = field(init=False)

    def __post_init__(self) -> None:
        self.namespace = f"{self.prefix}-node-{self.letter}"
        self.pod = f"{self.prefix}-pod-{self.letter}"
        self.uplink = f"dp{self.letter}0"
        self.veth = f"calidp{self.letter}0"

    def reload(self, **changes: object) -> None:
        """Load again with another log level or RPF mode, and replace the programs in place."""
        for name, value in changes.items():
            setattr(self.dataplane, name, value)
        self.dataplane.load()
        with netns.inside(self.namespace):
            self.dataplane.attach()

    def index(self, interface: str) -> int:
        """The interface index in the node's namespace."""
        with netns.inside(self.namespace), IPRoute() as route:
            return int(route.link_lookup(ifname=interface)[0])


@dataclass
class Lab:
    """Client, bridge, two nodes with a pod each."""

    prefix: str
    a: Node
    b: Node
    made: list[str] = field(default_factory=list)

    @property
    def client(self) -> str:
        """The client's namespace."""
        return f"{self.prefix}-client"

    def connect(self, port: int, timeout: float = TIMEOUT) -> socket.socket:
        """A TCP connection from the client to node-a. Raises OSError."""
        with netns.inside(self.client):
            made = socket.socket()
        made.settimeout(timeout)
        try:
            made.connect((NODE_A, port))
        except OSError:
            made.close()
            raise
        return made

    def ask(self, port: int, payload: bytes = b"ping hi") -> bytes:
        """Send over TCP and read until the server closes."""
        with self.connect(port) as made:
            made.sendall(payload)
            made.shutdown(socket.SHUT_WR)
            return _read_all(made)

    def ask_udp(self, port: int, payload: bytes) -> bytes:
        """One datagram and its answer. Raises TimeoutError."""
        with netns.inside(self.client):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with made:
            made.settimeout(TIMEOUT)
            made.connect((NODE_A, port))
            made.send(payload)
            return made.recv(4096)


def _read_all(made: socket.socket) -> bytes:
    parts = []
    while part := made.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def _sysctl(name: str, value: str) -> None:
    (Path("/proc/sys/net/ipv4") / name).write_text(value)


def _no_offload(interface: str) -> None:
    """As the lab does: what the programs see is what a wire would carry."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for command in _OFFLOADS:
            value = array.array("I", (command, 0))
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            fcntl.ioctl(control, _SIOCETHTOOL, request.ljust(40, b"\0"))


def _namespace(lab: Lab, name: str) -> None:
    pyroute_netns.create(name)
    lab.made.append(name)
    with netns.inside(name), IPRoute() as route:
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        route.link("set", index=1, state="up")


def _build(lab: Lab) -> None:
    fabric = f"{lab.prefix}-fabric"
    for name in (fabric, lab.client):
        _namespace(lab, name)
    for node in (lab.a, lab.b):
        _namespace(lab, node.namespace)
        _namespace(lab, node.pod)
    legs = (
        (lab.client, "dpc0", CLIENT, 100),
        (lab.a.namespace, lab.a.uplink, NODE_A, 1),
        (lab.b.namespace, lab.b.uplink, NODE_B, 2),
    )
    with netns.inside(fabric), IPRoute() as route:
        route.link("add", ifname="br0", kind="bridge")
        bridge = route.link_lookup(ifname="br0")[0]
        route.link("set", index=bridge, state="up")
        for namespace, interface, _, number in legs:
            peer = {"ifname": interface, "net_ns_fd": str(netns.path(namespace)), "address": _mac(number)}
            route.link("add", ifname=f"port{number}", kind="veth", peer=peer)
            route.link("set", index=route.link_lookup(ifname=f"port{number}")[0], state="up", master=bridge)
    for namespace, interface, address, _ in legs:
        with netns.inside(namespace), IPRoute() as route:
            index = route.link_lookup(ifname=interface)[0]
            route.link("set", index=index, state="up")
            _no_offload(interface)
            route.addr("add", index=index, address=address, prefixlen=24)
            for _, _, other, number in legs:
                if other != address:
                    route.neigh("add", dst=other, lladdr=_mac(number), ifindex=index, state="permanent")
    for node in (lab.a, lab.b):
        _add_pod(node)


def _add_pod(node: Node) -> None:
    with netns.inside(node.namespace), IPRoute() as route:
        _sysctl("ip_forward", "1")
        for name in ("all", "default", node.uplink):
            _sysctl(f"conf/{name}/rp_filter", "0")
        _sysctl(f"conf/{node.uplink}/accept_local", "1")
        peer = {"ifname": "eth0", "net_ns_fd": str(netns.path(node.pod)), "address": _mac(20 + node.number)}
        route.link("add", ifname=node.veth, kind="veth", address="ee:ee:ee:ee:ee:ee", peer=peer)
        index = route.link_lookup(ifname=node.veth)[0]
        route.link("set", index=index, state="up", mtu=1450)
        _no_offload(node.veth)
        _sysctl(f"conf/{node.veth}/rp_filter", "0")
        route.route("add", dst=f"{node.pod_ip}/32", oif=index, scope=253)
        route.neigh("add", dst=node.pod_ip, lladdr=_mac(20 + node.number), ifindex=index, state="permanent")
    with netns.inside(node.pod), IPRoute() as route:
        pod = route.link_lookup(ifname="eth0")[0]
        route.link("set", index=pod, state="up", mtu=1450)
        _no_offload("eth0")
        route.addr("add", index=pod, address=node.pod_ip, prefixlen=32)
        route.route("add", dst=f"{GATEWAY}/32", oif=pod, scope=253)
        route.neigh("add", dst=GATEWAY, lladdr="ee:ee:ee:ee:ee:ee", ifindex=pod, state="permanent")
        route.route("add", dst="default", gateway=GATEWAY, oif=pod)
    node.dataplane = Dataplane(
        node.bpffs / node.letter,
        NodeConfig(
            node.ip,
            Interface(node.uplink, node.index(node.uplink)),
            (Workload(node.veth, node.index(node.veth), node.pod_ip),),
        ),
    )
    node.reload()


def _program(lab: Lab) -> None:
    for node, other in ((lab.a, lab.b), (lab.b, lab.a)):
        plane = node.dataplane
        plane.set_host_routes([other.ip])
        plane.set_route(f"{other.pod_ip}/32", RouteFlags.REMOTE_WORKLOAD, via=other.ip)
        at_a, at_b = int(node is lab.a), int(node is lab.b)
        plane.set_service(1, 30080, Protocol.TCP, [(POD_B, 8080)], local=at_b)
        plane.set_service(2, 30081, Protocol.TCP, [(POD_A, 8080)], local=at_a)
        plane.set_service(3, 30082, Protocol.TCP, [])
        plane.set_service(4, 30053, Protocol.UDP, [(POD_B, 5353)], local=at_b)
        plane.set_service(5, 30054, Protocol.UDP, [(POD_A, 5353)], local=at_a)
        plane.set_service(7, 30087, Protocol.TCP, [("10.77.0.9", 8080)])
        plane.set_frontend(node.ip, 30080 + 5, Protocol.TCP, 6, UNAUTHORISED_SOURCE)


def _serve(pod: str, stop: threading.Event) -> list[threading.Thread]:
    """TCP echo until the client has finished, UDP echo; ready when this returns."""
    with netns.inside(pod):
        listener = socket.create_server(("", 8080))
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("", 5353))
    for each in (listener, datagrams):
        each.settimeout(0.2)

    def stream() -> None:
        with listener:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    made, _ = listener.accept()
                    made.settimeout(TIMEOUT)
                    with made, contextlib.suppress(OSError):
                        made.sendall(_read_all(made))

    def packets() -> None:
        with datagrams:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    payload, source = datagrams.recvfrom(4096)
                    datagrams.sendto(payload, source)

    threads = [threading.Thread(target=each) for each in (stream, packets)]
    for thread in threads:
        thread.start()
    return threads


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes with the dataplane loaded and quiet, on a bpffs of their own; all of it gone afterwards."""
    prefix = f"dataplane{os.getpid()}"
    bpffs = tmp_path_factory.mktemp("bpffs")
    mounts.mount_bpffs(bpffs)
    made = Lab(prefix, Node("a", NODE_A, POD_A, 1, prefix, bpffs), Node("b", NODE_B, POD_B, 2, prefix, bpffs))
    stop = threading.Event()
    threads: list[threading.Thread] = []
    try:
        _build(made)
        _program(made)
        for node in (made.a, made.b):
            threads += _serve(node.pod, stop)
        yield made
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for node in (made.a, made.b):
            if hasattr(node, "dataplane"):
                with netns.inside(node.namespace):
                    node.dataplane.detach()
                node.dataplane.unpin()
        for name in made.made:
            pyroute_netns.remove(name)
        assert mounts.unmount(bpffs)


@pytest.mark.parametrize("port", [30080, 30081], ids=["remote", "local"])
def test_tcp_reaches_the_pod_and_comes_back_whole(lab: Lab, port: int) -> None:
    assert lab.ask(port) == b"ping hi"
    answer = lab.ask(port, BIG)
    assert (len(answer), hashlib.sha256(answer).digest()) == (len(BIG), hashlib.sha256(BIG).digest())


@pytest.mark.parametrize("port", [30053, 30054], ids=["remote", "local"])
@pytest.mark.parametrize("size", [1, 2, 1400])
def test_udp_reaches_the_pod_and_comes_back(lab: Lab, port: int, size: int) -> None:
    payload = os.urandom(size)
    assert lab.ask_udp(port, payload) == payload


def test_no_endpoints_is_refused(lab: Lab) -> None:
    with pytest.raises(ConnectionRefusedError):
        lab.connect(30082)


def _state(node: Node, dport: int) -> calico_state.CalicoState:
    """The state of the CPU that denied a packet to *dport*; the others' hold older packets."""
    cpus = syscall.possible_cpus()
    descriptor = syscall.object_get(node.dataplane.pin_dir / "cali_state6")
    try:
        raw = syscall.map_lookup(descriptor, bytes(4), 512 * cpus)
    finally:
        os.close(descriptor)
    assert raw is not None
    table = calico_state.layout("cali_state6", 512)
    found = [calico_state.decode(raw[at : at + 512], table) for at in range(0, len(raw), 512)]
    return next(each for each in found if each.denied() and each.dport == dport)


def test_what_does_not_fit_the_tunnel_is_told_to_its_sender(lab: Lab) -> None:
    with netns.inside(lab.client):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with made:
        made.settimeout(TIMEOUT)
        made.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
        made.connect((NODE_A, 30053))
        made.send(bytes(1460))
        with pytest.raises(OSError, match="Message too long"):
            made.recv(4096)
        assert made.getsockopt(socket.IPPROTO_IP, _IP_MTU) == 1450
        made.send(bytes(1450 - 28))
        assert made.recv(4096) == bytes(1450 - 28)


def test_policy_denies_at_the_pod_with_the_rule(lab: Lab) -> None:
    uplink, veth = lab.b.index(lab.b.uplink), lab.b.index(lab.b.veth)
    before = lab.b.dataplane.counters(veth, egress=True)
    lab.b.dataplane.set_policy(lab.b.veth, allow=False, rule_id=RULE)
    try:
        with pytest.raises(TimeoutError):
            lab.connect(30080, LOST_AFTER)
        found = _state(lab.b, 8080)
    finally:
        lab.b.dataplane.set_policy(lab.b.veth, allow=True, rule_id=0)
    after = lab.b.dataplane.counters(veth, egress=True)
    assert after[4] > before[4]
    assert after[4] - before[4] == lab.b.dataplane.rule_hits(RULE)
    assert lab.b.dataplane.counters(uplink, egress=False)[4] == 0
    assert found.rule_ids == (RULE,)
    assert (str(found.src), str(found.dst), found.dport, found.pol_rc) == (CLIENT, POD_B, 8080, 2)
    assert lab.ask(30080) == b"ping hi"


@pytest.mark.parametrize(("port", "reason"), [(30087, 12), (30085, 11)], ids=["no-route", "source-range"])
def test_denials_count_their_reason(lab: Lab, port: int, reason: int) -> None:
    uplink = lab.a.index(lab.a.uplink)
    before = lab.a.dataplane.counters(uplink, egress=False)
    with pytest.raises(TimeoutError):
        lab.connect(port, LOST_AFTER)
    assert lab.a.dataplane.counters(uplink, egress=False)[reason] > before[reason]
    found = _state(lab.a, port)
    assert (found.calico_reason, str(found.src), found.dport) == (reason, CLIENT, port)


@contextlib.contextmanager
def _client_elsewhere(node: Node) -> Iterator[None]:
    """The node's route to the client leads to its pod."""
    with netns.inside(node.namespace), IPRoute() as route:
        target = {"dst": f"{CLIENT}/32", "oif": route.link_lookup(ifname=node.veth)[0], "scope": 253}
        route.route("add", **target)
        try:
            yield
        finally:
            route.route("del", **target)


def test_strict_rpf_drops_a_source_from_the_wrong_side(lab: Lab) -> None:
    lab.a.reload(rpf=Rpf.STRICT)
    try:
        assert lab.ask(30080) == b"ping hi"
        with _client_elsewhere(lab.a), pytest.raises(TimeoutError):
            lab.connect(30080, LOST_AFTER)
        uplink = lab.a.dataplane.counters(lab.a.index(lab.a.uplink), egress=False)
        found = _state(lab.a, 30080)
    finally:
        lab.a.reload(rpf=Rpf.DISABLED)
    assert (str(found.src), found.result, found.calico_reason) == (CLIENT, 2, 0)
    assert uplink[4] == 0


def test_reload_keeps_maps_and_connections(lab: Lab) -> None:
    with lab.connect(30080) as made:
        lab.b.reload(log_debug=True)
        lab.b.reload(log_debug=False)
        made.sendall(b"after")
        made.shutdown(socket.SHUT_WR)
        assert _read_all(made) == b"after"


def test_conntrack_entries_are_calicos(lab: Lab) -> None:
    with lab.connect(30080) as made:
        sport = made.getsockname()[1]
        made.sendall(b"x")
        for node, tun_ip, flags in ((lab.a, NODE_B, 0x8104), (lab.b, NODE_A, 0x8140)):
            key = struct.pack("<I4s4sHH", 6, socket.inet_aton(POD_B), socket.inet_aton(CLIENT), 8080, sport)
            descriptor = syscall.object_get(node.dataplane.pin_dir / "cali_v4_ct4")
            raw = syscall.map_lookup(descriptor, key, 88)
            os.close(descriptor)
            assert raw is not None
            assert (raw[16], raw[17] | raw[23] << 8) == (2, flags)
            assert raw[72:80] == socket.inet_aton(tun_ip) + socket.inet_aton(NODE_A)
            assert struct.unpack_from("<H", raw, 80) == (30080,)
            pod_bits, client_bits = (struct.unpack_from("<I", raw, at)[0] for at in (40, 64))
            assert client_bits & 0x33 == 0x33  # SYN, ACK, approved, opener
            assert pod_bits & 0x13 == 0x13  # SYN, ACK, approved


# The log.

_HEADER = re.compile(r"^.{16}-\d+\s+\[(\d+)\]\s+\S+\s+[\d.]+: bpf_trace_printk: (.*)$")
_TAGGED = re.compile(r"^([^ :]{1,15}?)-*-([IE]): (.*)$")
_START = "No metadata is shared by XDP"
# Lines whose numbers mean something: compared to the last digit.
_EXACT = (
    "CT: result", "CT: packet", "CT-ALL tracking", "CT-ALL approved", "conntrack entry", "flags=", "ct_rc=", "pol_rc=",
    "forward_or_drop", "policy ", "jump to", "Entering", "Traffic is towards host", "ip->ttl", "ICMP type", "ICMP v4",
    "Trimming", "Inserting", "Len after", "ct_related=", "mark=", "vxlan return 1", "SNAT L3", "DNAT L3",
)  # fmt: skip


def _kind(message: str) -> str:
    if message.startswith("Final result"):
        return message.partition(". Program")[0]
    if message.startswith(_EXACT):
        return message
    message = re.sub(r"0x[0-9a-f]+", "#", message)
    message = re.sub(r"(?<=mark=)[0-9a-f]+|(?<=vxlan encap )[0-9a-f]+ : [0-9a-f]+", "#", message)
    return re.sub(r"\d+(\.\d+){3}|\d+", "#", message)


def _runs(text: str, roles: dict[str, str]) -> list[tuple[str, ...]]:
    """The runs of programs in a trace, each: interface's role and direction, then the kinds of its lines."""
    runs: list[list[str]] = []
    current: dict[str, list[str]] = {}
    started: set[str] = set()
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is None:
            continue
        cpu, message = header.groups()
        if message == _START:
            started.add(cpu)
            continue
        tagged = _TAGGED.match(message)
        if tagged is None or tagged[1] not in roles:
            started.discard(cpu)
            continue
        if tagged[3].startswith("New packet"):
            current[cpu] = [f"{roles[tagged[1]]}-{tagged[2]}"] + [_START] * (cpu in started)
            runs.append(current[cpu])
            started.discard(cpu)
        if cpu in current:
            current[cpu].append(_kind(tagged[3]))
    if runs and not _ended(runs[-1]):
        runs.pop()  # the recording stopped in its middle
    return [tuple(run) for run in runs if "ARP: allowing packet" not in run]


def _ended(run: list[str]) -> bool:
    return run[-1].startswith("Final result=") or run[-1] == "DENY due to policy"


def _calicos(scenario: str) -> list[tuple[str, ...]]:
    for part in TRACE.read_text().split("##### SCENARIO: ")[1:]:
        if part.startswith(scenario):
            roles = {"ens192": "hep-a", "eth0": "hep-b", "cali1a2b3c4d5e6": "wep-a", "calif00dbeef012": "wep-b"}
            return _runs(part, roles)
    raise AssertionError(scenario)


@pytest.fixture(scope="module")
def record(lab: Lab) -> Iterator[Recorder]:
    """Run something and return what the programs printed, read through a tracefs instance of our own."""
    for node in (lab.a, lab.b):
        node.reload(log_debug=True)
    root = Path(tempfile.mkdtemp())
    subprocess.run(["mount", "-t", "tracefs", "tracefs", root], check=True)
    instance = root / "instances" / lab.prefix
    instance.mkdir()
    (instance / "buffer_size_kb").write_text("8192")
    roles = {lab.a.uplink: "hep-a", lab.b.uplink: "hep-b", lab.a.veth: "wep-a", lab.b.veth: "wep-b"}

    def run(action: Callable[[], object]) -> list[tuple[str, ...]]:
        (instance / "trace").write_text("")
        (instance / "events/bpf_trace/bpf_trace_printk/enable").write_text("1")
        action()
        (instance / "events/bpf_trace/bpf_trace_printk/enable").write_text("0")
        return _runs((instance / "trace").read_text(), roles)

    try:
        yield run
    finally:
        instance.rmdir()
        subprocess.run(["umount", root], check=True)
        root.rmdir()
        for node in (lab.a, lab.b):
            node.reload(log_debug=False)


def _refused(lab: Lab, port: int, expected: type[OSError]) -> Callable[[], object]:
    def attempt() -> None:
        with pytest.raises(expected):
            lab.connect(port, LOST_AFTER)

    return attempt


@pytest.mark.parametrize(("scenario", "port"), [("S01", 30080), ("S03", 30081)], ids=["remote", "local"])
def test_tcp_log_is_calicos(lab: Lab, record: Recorder, scenario: str, port: int) -> None:
    expected, actual = _calicos(scenario), record(lambda: lab.ask(port))
    handshake = 11 if scenario == "S01" else 5  # SYN and SYN-ACK; from there on packets may overtake each other
    assert actual[:handshake] == expected[:handshake]
    assert set(actual) == set(expected)


def test_udp_log_is_calicos(lab: Lab, record: Recorder) -> None:
    expected, actual = _calicos("S04"), record(lambda: lab.ask_udp(30053, b"hi"))
    for one, other in zip(actual, expected, strict=True):
        assert one == other


@pytest.mark.parametrize(
    ("scenario", "port", "error"),
    [("S05", 30082, ConnectionRefusedError), ("S07", 30085, TimeoutError), ("S08", 30087, TimeoutError)],
    ids=["no-endpoints", "source-range", "no-route"],
)
def test_refusals_log_is_calicos(lab: Lab, record: Recorder, scenario: str, port: int, error: type[OSError]) -> None:
    expected, actual = _calicos(scenario), record(_refused(lab, port, error))
    assert actual[: len(set(expected))] == expected[: len(set(expected))]
    assert set(actual) == set(expected)


def test_policy_deny_has_no_final_result(lab: Lab, record: Recorder) -> None:
    lab.b.dataplane.set_policy(lab.b.veth, allow=False, rule_id=RULE)
    try:
        runs = record(_refused(lab, 30080, TimeoutError))
    finally:
        lab.b.dataplane.set_policy(lab.b.veth, allow=True, rule_id=0)
    denied = next(run for run in runs if run[0] == "wep-b-I")
    assert denied[-9:] == (
        "Entering calico_tc_skb_drop",
        "proto=#",
        "src=# dst=#",
        "pre_nat=#:#",
        "post_nat=#:#",
        "pol_rc=2",
        "flags=0x2000",
        "ct_rc=0",
        "DENY due to policy",
    )


def test_rpf_failure_log(lab: Lab, record: Recorder) -> None:
    lab.a.reload(rpf=Rpf.STRICT)
    try:
        with _client_elsewhere(lab.a):
            runs = record(_refused(lab, 30080, TimeoutError))
    finally:
        lab.a.reload(rpf=Rpf.DISABLED)
    assert runs[0][-4:] == (
        "Host RPF check src=# skb strict if #",
        "Host RPF check src=# skb iface=#",
        "Host RPF check rc # result #",
        "Final result=DENY (0)",
    )


def test_off_prints_nothing(lab: Lab, record: Recorder) -> None:
    for node in (lab.a, lab.b):
        node.reload(log_debug=False)
    assert record(lambda: lab.ask(30080)) == []
