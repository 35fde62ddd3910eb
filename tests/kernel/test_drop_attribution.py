"""Real drops by programs that keep Calico's state as each release does, and by others at the same hooks."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute

from calitrace.calico.state import LAYOUTS, Layout
from calitrace.correlate.drops import Cause, Confidence, Dropped, Joiner, Names, explain
from calitrace.decode import decode
from calitrace.kernel import discover, headers, mounts, netns, symbols, syscall
from calitrace.kernel.collectors import Collectors, Plan
from calitrace.packet import UDP
from tests.kernel.conftest import compile_tc
from tests.netns.conftest import listening
from tests.netns.test_drops import COUNT, finished
from tests.unit.packets import state_of

if TYPE_CHECKING:
    from pathlib import Path

    from calitrace.model import Topology
    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root

PORT, RULE = 40001, 0x1234
SIX = {"left": "fd00::1", "right": "fd00::2"}
_SKB_MODE = 2  # XDP_FLAGS_SKB_MODE
# Drops UDP, and IPv6 with extension headers, as Calico's first program, and leaves a state that the test has written.
CALICO = """
BPF_PERCPU_ARRAY(%(map)s, struct { u8 bytes[%(size)d]; }, %(entries)d);
int cali_tc_preamble(struct __sk_buff *skb) {
    u32 zero = 0, proto = 0;
    if (!%(map)s.lookup(&zero))
        return -1;
    if (skb->protocol == bpf_htons(0x0800))
        proto = load_byte(skb, 14 + 9);
    else if (skb->protocol == bpf_htons(0x86dd))
        proto = load_byte(skb, 14 + 6) ?: 60;
    return proto == 17 || proto == 44 || proto == 60 ? %(verdict)s : -1;
}
"""


def calico(table: Layout, verdict: str = "2") -> Any:
    """Such a program with the state map of a release."""
    entries = 2 if table.stride == 16 else 1
    values = {"map": table.map_name, "size": table.size, "entries": entries, "verdict": verdict}
    return compile_tc(CALICO % values)


def write_state(bpf: Any, table: Layout, raw: bytes) -> None:
    """On all CPUs."""
    syscall.map_update(bpf[table.map_name.encode()].map_fd, bytes(4), raw * syscall.possible_cpus())


def with_ipv6(pair: Pair) -> None:
    """Addresses of both ends, which are known to each other."""
    ends = {"left": (pair.left, "left0"), "right": (pair.right, "right0")}
    macs = {}
    for name, (namespace, interface) in ends.items():
        with netns.inside(namespace), IPRoute() as route:
            (message,) = route.get_links(ifname=interface)
            macs[name] = message.get_attr("IFLA_ADDRESS")
            route.addr("add", index=message["index"], address=SIX[name], prefixlen=64, flags=2)  # IFA_F_NODAD
    for name, other in (("left", "right"), ("right", "left")):
        namespace, interface = ends[name]
        with netns.inside(namespace), IPRoute() as route:
            index = route.link_lookup(ifname=interface)[0]
            route.neigh("add", dst=SIX[other], lladdr=macs[other], ifindex=index, state="permanent")


def send(
    namespace: str, source: str, target: str, count: int = 1, payload: bytes = b"x", option: int | None = None
) -> None:
    """Datagrams from PORT to port 9. *option*: IPV6_HOPOPTS or the like, for an extension header of 8 bytes."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with netns.inside(namespace), socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.bind((source, PORT))
        if option is not None:
            sender.setsockopt(socket.IPPROTO_IPV6, option, b"\0\0\1\4" + bytes(4))
        for _ in range(count):
            with contextlib.suppress(ConnectionRefusedError):  # the ICMP error for an earlier one
                sender.sendto(payload, (target, 9))


def causes_of(pair: Pair, source: str, target: str, where: str = "", **how: Any) -> tuple[list[Cause], Topology]:
    """Send one datagram from the left; the causes of its drops in the namespace *where*, the left by default."""
    topology = discover.topology()
    maps = discover.state_maps(topology, everywhere=True)
    plan = Plan(
        hop=False,
        log="",
        drop_all=True,
        state_bytes=discover.state_sizes(topology),
        state_like=tuple(maps.values()),
    )
    with Collectors(plan) as collectors:
        assert collectors.watch_state(maps) == {}
        send(pair.left, source, target, **how)
        joiner = Joiner()
        found: list[Dropped] = []
        for raw in collectors.poll(50):
            found += joiner.feed(decode(raw), raw)
        found += joiner.flush(everything=True)
    types = headers.kernel_btf()
    assert types is not None
    inum = netns.inum(where or pair.left)
    mine = [
        each for each in found
        if each.event.netns == inum and (layer := each.event.packet.inner) and layer.sport == PORT
    ]  # fmt: skip
    names = Names(
        types.enum("skb_drop_reason") or {},
        symbols.resolve({each.event.location for each in mine}),
        {RULE: "deny-all rule 0 (deny)"},
    )
    return [explain(each.event, each.passages, each.state, topology, names) for each in mine], topology


RELEASES = [
    pytest.param(table, version, tcx, id=f"{table.releases}-ipv{version}-{'tcx' if tcx else 'tc'}")
    for number, table in enumerate(LAYOUTS)
    for version in (4, 6) if table.stride == 16 or version == 4
    for tcx in [bool((number + version // 2) % 2)]
]  # fmt: skip


@pytest.mark.parametrize(("table", "version", "tcx"), RELEASES)
def test_the_state_of_each_release_names_the_cause(pair: Pair, table: Layout, version: int, tcx: bool) -> None:
    with_ipv6(pair)
    source, target = (SIX["left"], SIX["right"]) if version == 6 else (pair.left_ip, pair.right_ip)
    backend = "fd00:1::9" if version == 6 else "10.65.0.9"
    bpf = calico(table)
    kept = state_of(
        table, (source, PORT, target, 9), UDP, nat=(backend, 53), pol_rc=2, rules=(RULE,), ct_rc=0x2000, flags=4,
        reason=4,
    )  # fmt: skip
    write_state(bpf, table, kept)
    with contextlib.ExitStack() as stack:
        if tcx:
            stack.enter_context(pair.attached_by_tcx(bpf, "cali_tc_preamble", pair.left, "left0", "egress"))
        else:
            pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "egress")
        (cause,), topology = causes_of(pair, source, target)
    node = topology.namespaces[netns.inum(pair.left)]
    assert (node.state_name, node.state_bytes) == (table.map_name, table.size)
    assert (cause.by_calico, cause.calico_reason, cause.confidence) == (True, "DROPPED_BY_POLICY", Confidence.PROVEN)
    assert (cause.place.interface, cause.place.hook, cause.sources) == ("left0", "tc egress", ("state",))
    assert cause.rules == (("deny-all rule 0 (deny)",) if table.rule_ids is not None else ())
    (line,) = [each for each in cause.evidence if each.startswith("Calico's state of this packet: ")]
    nat = f"[{backend}]:53" if version == 6 else f"{backend}:53"
    assert f"conntrack NEW, confirmed, NAT to {nat}, flags to this host" in line
    (chain,) = [each for each in cause.evidence if each.startswith("at this hook: ")]
    assert chain.startswith(f"at this hook: {'tcx' if tcx else 'tc pref'} ")
    assert " cali_tc_preambl id " in chain


@pytest.mark.parametrize(
    ("how", "ports"),
    [
        ({"option": socket.IPV6_HOPOPTS}, (PORT, 9)),
        ({"option": socket.IPV6_DSTOPTS}, (PORT, 9)),
        ({"payload": b"\1\2\3\4" * 500}, (0x102, 0x304)),  # fragments, whose ports Calico reads from what follows
    ],
)
def test_a_packet_with_ipv6_extension_headers(pair: Pair, how: dict[str, Any], ports: tuple[int, int]) -> None:
    with_ipv6(pair)
    table, (source, target) = LAYOUTS[0], SIX.values()
    bpf = calico(table)
    flow = (source, ports[0], target, ports[1])
    write_state(bpf, table, state_of(table, flow, UDP, pol_rc=2, rules=(RULE,), reason=4))
    pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "egress")
    (cause,), _ = causes_of(pair, source, target, **how)
    assert (cause.calico_reason, cause.sources) == ("DROPPED_BY_POLICY", ("state",))


@pytest.mark.parametrize("pinned", [False, True])
def test_two_nodes_of_different_releases(pair: Pair, tmp_path: Path, pinned: bool) -> None:
    new, old = LAYOUTS[0], next(each for each in LAYOUTS if each.size == 80)
    programs = []
    for table, namespace, interface, source, target in (
        (new, pair.left, "left0", pair.left_ip, pair.right_ip),
        (old, pair.right, "right0", pair.right_ip, pair.left_ip),
    ):
        bpf = calico(table)
        flow = (source, PORT, target, 9)
        write_state(bpf, table, state_of(table, flow, UDP, pol_rc=2, rules=(RULE,), reason=4))
        pair.attach(bpf, "cali_tc_preamble", namespace, interface, "egress")
        programs.append((bpf, table))
    with contextlib.ExitStack() as stack:
        if pinned:
            mounts.mount_bpffs(tmp_path)
            stack.callback(mounts.unmount, tmp_path)
            for number, (bpf, table) in enumerate(programs):
                place = tmp_path / f"cal-{number}"
                place.mkdir()
                syscall.object_pin(bpf[table.map_name.encode()].map_fd, place / table.map_name)
        process = stack.enter_context(listening("drops", "-o", "json", "--calico-only"))
        send(pair.left, pair.left_ip, pair.right_ip, COUNT)
        send(pair.right, pair.right_ip, pair.left_ip, COUNT)
        drops, _ = finished(process, PORT)
    for namespace in (pair.left, pair.right):
        mine = [each for each in drops if each["namespace"] == namespace and each["sport"] == PORT]
        assert len(mine) == COUNT
        assert {(each["calico_reason"], each["confidence"]) for each in mine} == {("DROPPED_BY_POLICY", "proven")}


# Classic BPF, which has no program of the kernel's: it drops all IPv4.
CLASSIC = ("protocol", "ip", "bpf", "da", "bytecode", "1,6 0 0 2,")


@pytest.mark.parametrize("qdisc", ["clsact", "ingress"])
def test_a_filter_without_a_program_may_have_dropped_it(pair: Pair, qdisc: str) -> None:
    """Before Calico's program, which lets all pass: never Calico's."""
    table = LAYOUTS[0]
    bpf = calico(table, "-1")
    with contextlib.ExitStack() as stack, netns.inside(pair.right):
        subprocess.run(["tc", "qdisc", "add", "dev", "right0", qdisc], check=True)
        if qdisc == "clsact":
            pair.attach(bpf, "cali_tc_preamble", pair.right, "right0", "ingress")
        else:
            stack.enter_context(pair.attached_by_tcx(bpf, "cali_tc_preamble", pair.right, "right0", "ingress"))
        subprocess.run(["tc", "filter", "add", "dev", "right0", "ingress", "pref", "1", *CLASSIC], check=True)
        (cause,), _ = causes_of(pair, pair.left_ip, pair.right_ip, pair.right)
    assert not cause.by_calico
    assert "bpf filter" in cause.detail
    assert sum(each.startswith("at this hook: ") for each in cause.evidence) == 2


def test_calicos_state_says_that_it_was_the_other_program(pair: Pair) -> None:
    table = LAYOUTS[0]
    bpf = calico(table, "-1")
    write_state(bpf, table, state_of(table, (pair.left_ip, PORT, pair.right_ip, 9), UDP, pol_rc=1, result=-1))
    pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "egress")
    with netns.inside(pair.left):
        subprocess.run(["tc", "filter", "add", "dev", "left0", "egress", "pref", "50000", *CLASSIC], check=True)
    (cause,), _ = causes_of(pair, pair.left_ip, pair.right_ip)
    assert (cause.by_calico, cause.confidence) == (False, Confidence.LIKELY)
    assert cause.detail == "tc program: bpf filter, which Calico's program let it pass to"


def test_generic_xdp_is_calicos_when_its_program_is_there(pair: Pair) -> None:
    bpf = compile_tc("int cali_xdp_preamble(struct xdp_md *ctx) { return 1; }")
    program = bpf.load_func(b"cali_xdp_preamble", bpf.XDP)
    with netns.inside(pair.right):
        bpf.attach_xdp(b"right0", program, _SKB_MODE)
        try:
            (cause,), _ = causes_of(pair, pair.left_ip, pair.right_ip, pair.right)
        finally:
            bpf.remove_xdp(b"right0", _SKB_MODE)
    assert (cause.by_calico, cause.place.hook, cause.confidence) == (True, "XDP", Confidence.LIKELY)
    assert any(each.startswith("at this hook: xdp cali_xdp_preamb id ") for each in cause.evidence)


def test_a_redirect_to_an_interface_that_is_gone(pair: Pair) -> None:
    """Calico let it pass, and its program stands at the hook alone: the kernel could not do what it said."""
    table = LAYOUTS[0]
    bpf = calico(table, "bpf_redirect(0x7ffffff, 0)")
    write_state(bpf, table, state_of(table, (pair.left_ip, PORT, pair.right_ip, 9), UDP, pol_rc=1, result=-1))
    pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "egress")
    (cause,), _ = causes_of(pair, pair.left_ip, pair.right_ip)
    assert cause.text.startswith("dropped by the kernel, which could not redirect it as a BPF program told it to: ")
    assert (cause.by_calico, cause.place.hook) == (False, "")


@pytest.mark.parametrize(("reason", "result"), [(25, -1), (28, -1), (16, 2)])
def test_a_drop_that_the_result_does_not_tell(pair: Pair, reason: int, result: int) -> None:
    """Beside another program, which would be blamed for what Calico let pass."""
    table = LAYOUTS[0]
    bpf = calico(table)
    flow = (pair.left_ip, PORT, pair.right_ip, 9)
    write_state(bpf, table, state_of(table, flow, UDP, pol_rc=1, reason=reason, result=result))
    pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "egress")
    with netns.inside(pair.left):
        subprocess.run(["tc", "filter", "add", "dev", "left0", "egress", "pref", "50000", *CLASSIC], check=True)
    (cause,), _ = causes_of(pair, pair.left_ip, pair.right_ip)
    assert (cause.by_calico, cause.confidence, cause.sources) == (True, Confidence.PROVEN, ("state",))


def test_a_node_in_a_namespace_without_a_name(pair: Pair) -> None:
    """The right end moves into the namespace of a process."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(done[1])
            netns._libc.unshare(netns._CLONE_NEWNET)
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    try:
        os.read(ready[0], 1)
        with netns.inside(pair.right), IPRoute() as route:
            index = route.link_lookup(ifname="right0")[0]
            route.link("set", index=index, net_ns_pid=child)
        place = f"/proc/{child}/ns/net"
        table = LAYOUTS[0]
        bpf = calico(table)
        write_state(bpf, table, state_of(table, (pair.left_ip, PORT, pair.right_ip, 9), UDP, reason=11))
        with netns.inside(place), IPRoute() as route:
            route.link("set", index=index, state="up")
        pair.attach(bpf, "cali_tc_preamble", place, "right0", "ingress")
        (cause,), topology = causes_of(pair, pair.left_ip, pair.right_ip, place)
        assert topology.namespaces[netns.inum(place)].name == place
        assert (cause.place.interface, cause.calico_reason) == ("right0", "UNAUTH_SOURCE")
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for each in (*ready, *done):
            os.close(each)


CHAIN = """
BPF_PERCPU_ARRAY(cali_state6, struct { u8 bytes[512]; }, 2);
struct hook_key { u32 ifindex, hook; };
struct hook_counters { u64 of[27]; };
BPF_TABLE("percpu_hash", struct hook_key, struct hook_counters, cali_counters6, 64);
BPF_PROG_ARRAY(cali_progs_egr2, 400);
int cali_tc_preamble(struct __sk_buff *skb) {
    u32 zero = 0;
    if (skb->protocol != bpf_htons(0x0800) || !cali_state6.lookup(&zero))
        return -1;
    cali_progs_egr2.call(skb, 3);
    return 2;
}
int calico_tc_main(struct __sk_buff *skb) {
    struct hook_key key = {.ifindex = skb->ifindex, .hook = 1};
    struct hook_counters *counters = cali_counters6.lookup(&key);
    u32 zero = 0;
    if (counters && cali_state6.lookup(&zero))
        counters->of[0]++;
    return load_byte(skb, 14 + 9) == 17 ? 2 : -1;
}
"""


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_slot_in_the_chain_of_programs(pair: Pair, empty: bool) -> None:
    bpf = compile_tc(CHAIN)
    main = bpf.load_func(b"calico_tc_main", bpf.SCHED_CLS)
    pair.attach(bpf, "cali_tc_preamble", pair.left, "left0", "egress")
    array = bpf[b"cali_progs_egr2"].map_fd
    with netns.inside(pair.left):
        index = socket.if_nametoindex("left0")
    row = bytes(216) * syscall.possible_cpus()
    syscall.map_update(bpf[b"cali_counters6"].map_fd, struct.pack("<II", index, 1), row)
    syscall.map_update(array, struct.pack("<I", 3), struct.pack("<I", main.fd))
    with listening("drops", "-o", "json", "--netns", pair.left, "--calico-only") as process:
        if empty:
            syscall.map_delete(array, struct.pack("<I", 3))
        send(pair.left, pair.left_ip, pair.right_ip, COUNT)
        drops, _ = finished(process, PORT)
    mine = [each for each in drops if each["sport"] == PORT]
    assert len(mine) == COUNT
    assert all(each["by_calico"] for each in mine)
    first = mine[0]  # its counters are read at once
    if empty:
        assert first["cause"].endswith("it seems: its main program did not run: no program is in cali_progs_egr2")
        assert (first["confidence"], first["sources"]) == ("likely", ["counters"])
    else:
        assert first["cause"] == "dropped by Calico: cause not recorded"


WITH_XDP = """
BPF_PERCPU_ARRAY(cali_state6, struct { u8 bytes[512]; }, 2);
struct hook_key { u32 ifindex, hook; };
struct hook_counters { u64 of[27]; };
BPF_TABLE("percpu_hash", struct hook_key, struct hook_counters, cali_counters6, 64);
static void count(u32 ifindex, u32 hook, u32 reason) {
    struct hook_key key = {.ifindex = ifindex, .hook = hook};
    struct hook_counters *counters = cali_counters6.lookup(&key);
    if (counters) {
        counters->of[0]++;
        if (reason == 4)
            counters->of[4]++;
    }
}
int cali_tc_preamble(struct __sk_buff *skb) {
    u32 zero = 0;
    if (cali_state6.lookup(&zero))
        count(skb->ifindex, 0, 0);
    return -1;
}
int cali_xdp_preamble(struct xdp_md *ctx) {
    count(ctx->ingress_ifindex, 2, 4);
    return 1;
}
"""


def test_xdp_has_rows_of_its_own_in_the_counters(pair: Pair) -> None:
    bpf = compile_tc(WITH_XDP)
    program = bpf.load_func(b"cali_xdp_preamble", bpf.XDP)
    pair.attach(bpf, "cali_tc_preamble", pair.right, "right0", "ingress")
    with netns.inside(pair.right):
        index = socket.if_nametoindex("right0")
        row = bytes(216) * syscall.possible_cpus()
        for hook in (0, 2):
            syscall.map_update(bpf[b"cali_counters6"].map_fd, struct.pack("<II", index, hook), row)
        bpf.attach_xdp(b"right0", program, _SKB_MODE)
    try:
        with listening("drops", "-o", "json", "--netns", pair.right, "--calico-only") as process:
            send(pair.left, pair.left_ip, pair.right_ip, COUNT)
            drops, _ = finished(process, PORT)
    finally:
        with netns.inside(pair.right):
            bpf.remove_xdp(b"right0", _SKB_MODE)
    first = next(each for each in drops if each["sport"] == PORT)
    assert (first["hook"], first["calico_reason"], first["sources"]) == ("XDP", "DROPPED_BY_POLICY", ["counters"])
