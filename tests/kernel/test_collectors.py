"""The collectors on a real kernel: real packets across a veth, exact counts."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from calitrace import btf, identity
from calitrace.cli import recording
from calitrace.correlate.drops import Dropped, Joiner, Names, explain
from calitrace.decode import Decoder, decode
from calitrace.events import HopKind, Match, Stat
from calitrace.identity import Identity
from calitrace.kernel import discover, headers, loader, netns, syscall
from calitrace.kernel.collectors import RECORDER_LINES, Collectors, Plan, name_condition
from calitrace.model import Drop, Event, Hop, Link, LogLine, Namespace, Role, StateCopy, Topology
from calitrace.packet import UDP
from tests.kernel.conftest import compile_tc
from tests.kernel.test_maps import PERCPU_ARRAY
from tests.unit.packets import SPORT, calico_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root

KFUNC_CALL = b"\x85\x20"  # BPF_JMP | BPF_CALL, and BPF_PSEUDO_KFUNC_CALL as source
RUN_ID = 0x5EED1234
SHOT_WITH_LOG = """
BPF_PERCPU_ARRAY(cali_state, struct { u8 bytes[512]; }, 2);
int cali_deny(struct __sk_buff *skb) {
    bpf_trace_printk("left0----------E: New packet at ifindex=%d; mark=%x\\n", skb->ifindex, skb->mark);
    bpf_trace_printk("left0----------E: Final result=DENY (11). Program execution time: 7ns\\n");
    return 2;
}
"""


VERBOSE = """
int cali_verbose(struct __sk_buff *skb) {
#pragma clang loop unroll(disable)
    for (int i = 0; i < 300; i++)
        bpf_trace_printk("line %d\\n", i);
    return 2;
}
"""
PRINTING = """
struct text { char bytes[256]; };
BPF_ARRAY(texts, struct text, 1);
int cali_print(struct __sk_buff *skb) {
    u32 zero = 0;
    struct text *text = texts.lookup(&zero);
    if (text)
        bpf_trace_printk("%s", text->bytes);
    return 2;
}
"""


def send_udp(pair: Pair, count: int, *, run_id: int = RUN_ID, port: int = 9) -> None:
    """Send *count* identified datagrams from left to right."""
    with netns.inside(pair.left), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(count):
            payload = identity.encode(Identity(run_id, 0, number))
            try:
                sender.sendto(payload, (pair.right_ip, port))
            except ConnectionRefusedError:  # the ICMP error for an earlier one
                sender.sendto(payload, (pair.right_ip, port))


def collect(collectors: Collectors, quiet: int = 3) -> list[Event | LogLine]:
    """All events until *quiet* polls bring none."""
    decoder = Decoder()
    found: list[Event | LogLine] = []
    empty = 0
    while empty < quiet:
        records = collectors.poll(50)
        empty = 0 if records else empty + 1
        found += decoder.iter_events(records)
    assert not decoder.malformed
    return found


def number_of(event: Hop | Drop) -> int:
    """The probe number that a packet carries."""
    layer = event.packet.quoted or event.packet.inner
    assert layer is not None
    assert layer.identity is not None
    return layer.identity.sequence


@pytest.fixture(params=["typed", "with helpers", "untyped"])
def arguments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs by all means that this kernel knows, and those for kernels that refuse kernel functions or types."""
    load = syscall.load_tracepoint
    fast = request.param == "typed"
    loaded, refused = [], []

    def load_or_refuse(code: bytes, name: str, *, btf_id: int = 0) -> int:
        calls_kernel = KFUNC_CALL in (code[at : at + 2] for at in range(0, len(code), 8))
        if not fast and (calls_kernel or (btf_id and request.param == "untyped")):
            raise OSError(errno.EPERM, "refused by the test")
        try:
            descriptor = load(code, name, btf_id=btf_id)
        except OSError:
            refused.append(name)
            raise
        loaded.append(calls_kernel)
        return descriptor

    monkeypatch.setattr(syscall, "load_tracepoint", load_or_refuse)
    yield
    types = headers.kernel_btf()
    assert types is not None
    assert not refused  # or another way was taken, which works as well, and more slowly
    assert any(loaded) == (fast and types.find("bpf_rdonly_cast", btf.KIND_FUNC) is not None)


@pytest.mark.usefixtures("arguments")
def test_every_hop_of_a_datagram_in_order(pair: Pair) -> None:
    with netns.inside(pair.right), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((pair.right_ip, 9))
        with Collectors(Plan(run_id=RUN_ID, log="")) as collectors:
            send_udp(pair, 1)
            assert server.recv(64) == identity.encode(Identity(RUN_ID, 0, 0))
            events = collect(collectors)
            stats = collectors.stats()
    hops = [(e.kind, e.netns) for e in events if isinstance(e, Hop)]
    left, right = netns.inum(pair.left), netns.inum(pair.right)
    assert hops[0] == (HopKind.QUEUE, left)
    # The receiving CPU may be faster than the sender's return from the driver.
    assert sorted(hops[1:3]) == sorted([(HopKind.XMIT, left), (HopKind.RECEIVE, right)])
    assert not [e for e in events if isinstance(e, Drop)]
    assert stats[Stat.HOP_MATCHED] == len(hops)
    assert stats[Stat.HOP_LOST] == 0


def test_packets_of_another_run_are_not_taken(pair: Pair) -> None:
    with Collectors(Plan(run_id=RUN_ID, log="")) as collectors:
        send_udp(pair, 23, run_id=RUN_ID ^ 1)
        assert collect(collectors) == []
        assert collectors.stats()[Stat.HOP_SEEN] >= 23


def test_endpoint_matches_replies_without_identity(pair: Pair) -> None:
    with (
        netns.inside(pair.right),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
    ):
        server.bind((pair.right_ip, 9))
        with netns.inside(pair.left), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.bind((pair.left_ip, 0))
            port = client.getsockname()[1]
            with Collectors(Plan(run_id=RUN_ID, log="", client=(pair.left_ip, port, port))) as collectors:
                client.sendto(b"plain", (pair.right_ip, 9))
                _, address = server.recvfrom(64)
                server.sendto(b"answer", address)
                assert client.recv(64) == b"answer"
                hops = [e for e in collect(collectors) if isinstance(e, Hop)]
    assert {h.match for h in hops if h.kind is not HopKind.XMIT} == {Match.ENDPOINT}
    assert [h.netns for h in hops if h.kind is HopKind.RECEIVE] == [netns.inum(pair.right), netns.inum(pair.left)]


@pytest.mark.usefixtures("arguments")
def test_a_tc_drop_comes_with_its_log_and_state(pair: Pair) -> None:
    bpf = compile_tc(SHOT_WITH_LOG)
    pair.attach(bpf, "cali_deny", pair.left, "left0", "egress")
    marker = bytes(range(256)) * 2
    descriptor = bpf[b"cali_state"].map_fd
    syscall.map_update(descriptor, bytes(4), marker * syscall.possible_cpus())
    identifier = syscall.map_info(descriptor).id

    with Collectors(Plan(run_id=RUN_ID, state_like=(identifier,))) as collectors:
        assert collectors.watch_state({netns.inum(pair.left): identifier}) == {}
        send_udp(pair, 23)
        events = collect(collectors)
        stats = collectors.stats()

    reasons = headers.kernel_btf()
    assert reasons is not None
    names = reasons.enum("skb_drop_reason") or {}
    drops = [e for e in events if isinstance(e, Drop)]
    assert [number_of(drop) for drop in drops] == list(range(23))
    assert {names[drop.skb_drop_reason or 0] for drop in drops} == {"SKB_DROP_REASON_TC_EGRESS"}
    for drop in drops:
        at = events.index(drop)
        before = [e.text.rstrip("\n") for e in events[at - 2 : at] if isinstance(e, LogLine)]
        assert before[1] == "left0----------E: Final result=DENY (11). Program execution time: 7ns"
        assert before[0].startswith("left0----------E: New packet at ifindex=")
        after = events[at + 1]
        assert isinstance(after, StateCopy)
        assert (after.skbaddr, after.raw) == (drop.skbaddr, marker)
    assert stats[Stat.DROP_MATCHED] == stats[Stat.STATE_SENT] == 23
    assert (stats[Stat.DROP_LOST], stats[Stat.STATE_LOST], stats[Stat.LOG_LOST]) == (0, 0, 0)


@pytest.mark.usefixtures("arguments")
def test_the_recorder_keeps_the_last_lines(pair: Pair) -> None:
    bpf = compile_tc(VERBOSE)
    pair.attach(bpf, "cali_verbose", pair.left, "left0", "egress")
    with Collectors(Plan(run_id=RUN_ID, hop=False)) as collectors:
        send_udp(pair, 1)
        events = collect(collectors)
        stats = collectors.stats()
    *lines, drop = events
    assert isinstance(drop, Drop)
    assert [e.text for e in lines if isinstance(e, LogLine)] == [
        f"line {n}\n" for n in range(300 - RECORDER_LINES, 300)
    ]
    assert (stats[Stat.LOG_OVERWRITTEN] + RECORDER_LINES) % 300 == 0  # the kernel may send packets of its own
    assert stats[Stat.LOG_SENT] == RECORDER_LINES


@pytest.mark.usefixtures("arguments")
def test_lines_of_any_length_are_whole_or_known_to_be_cut(pair: Pair) -> None:
    bpf = compile_tc(PRINTING)
    pair.attach(bpf, "cali_print", pair.left, "left0", "egress")
    lengths = (1, 2, 6, 7, 8, 9, 15, 16, 17, 63, 64, 65, 207, 208, 209, 214, 215, 216, 217, 254)
    texts = [bytes(33 + at % 90 for at in range(length)) for length in lengths]
    with Collectors(Plan(drop=False, hop=False, log="stream")) as collectors:
        for text in texts:
            syscall.map_update(bpf[b"texts"].map_fd, bytes(4), text.ljust(256, b"\0"))
            send_udp(pair, 1)
        lines = [e for e in collect(collectors) if isinstance(e, LogLine)]
    found = dict.fromkeys((line.text, line.cut) for line in lines)  # the kernel may send packets of its own
    assert list(found) == list(dict.fromkeys((t[:215].decode(), len(t) >= 215) for t in texts))
    assert (os.getpid(), Path("/proc/self/comm").read_text().rstrip()) in {(line.pid, line.comm) for line in lines}


@pytest.mark.parametrize("own", [True, False], ids=["own", "stale"])
def test_a_state_is_believed_of_its_own_packet_only(pair: Pair, own: bool) -> None:
    bpf = compile_tc(SHOT_WITH_LOG)
    pair.attach(bpf, "cali_deny", pair.left, "left0", "egress")
    port = 40001
    kept = bytearray(calico_state(dst=pair.right_ip, dport=9, number=port - SPORT, reason=11))
    kept[8:12] = socket.inet_aton(pair.left_ip if own else "192.0.2.77")
    kept[104] = UDP
    descriptor = bpf[b"cali_state"].map_fd
    syscall.map_update(descriptor, bytes(4), bytes(kept) * syscall.possible_cpus())
    identifier, inum = syscall.map_info(descriptor).id, netns.inum(pair.left)

    with Collectors(Plan(hop=False, log="", drop_all=True, state_like=(identifier,))) as collectors:
        assert collectors.watch_state({inum: identifier}) == {}
        with netns.inside(pair.left), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((pair.left_ip, port))
            sender.sendto(b"x", (pair.right_ip, 9))
        joiner = Joiner()
        found: list[Dropped] = []
        for raw in collectors.poll(50):
            found += joiner.feed(decode(raw), raw)
        found += joiner.flush(everything=True)

    types = headers.kernel_btf()
    assert types is not None
    # The program drops the new interface's own IPv6 packets too.
    flows = [(each, each.event.packet.inner) for each in found if each.event.netns == inum]
    (dropped,) = [each for each, layer in flows if layer and layer.sport == port]
    link = Link(dropped.event.ifindex, "left0", (), {"egress": ("cali_deny",)})
    namespace = Namespace(inum, "left", Role.NODE, {link.ifindex: link}, identifier, "cali_state6", 512, 27)
    names = Names(types.enum("skb_drop_reason") or {})
    cause = explain(dropped.event, dropped.passages, dropped.state, Topology({inum: namespace}), names)
    assert cause.by_calico
    assert cause.calico_reason == ("UNAUTH_SOURCE" if own else "")
    assert ("Calico's state held another packet by then: not used" in cause.evidence) != own


def test_a_state_of_another_size_is_told(pair: Pair) -> None:
    bpf = compile_tc(SHOT_WITH_LOG)
    inum, identifier = netns.inum(pair.left), syscall.map_info(bpf[b"cali_state"].map_fd).id
    with Collectors(Plan(hop=False, log="", drop_all=True, state_bytes=(416, 480))) as collectors:
        assert collectors.watch_state({inum: identifier}) == {inum: "it has another release now: start again"}


@pytest.fixture
def state_map() -> Iterator[int]:
    """A descriptor of an empty state map."""
    descriptor = syscall.map_create(PERCPU_ARRAY, 4, 512, 2, name="cali_state6")
    yield descriptor
    os.close(descriptor)


def descriptors() -> list[str]:
    """Those that this process has open, and what they are."""
    return sorted(str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.exists())


def test_a_state_map_that_has_gone_ends_nothing(pair: Pair, state_map: int) -> None:
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.left, "left0", "egress")
    gone = syscall.map_create(PERCPU_ARRAY, 4, 512, 2, name="cali_state6")
    maps = {netns.inum(pair.right): syscall.map_info(gone).id, netns.inum(pair.left): syscall.map_info(state_map).id}
    os.close(gone)
    with Collectors(Plan(run_id=RUN_ID, hop=False, log="")) as collectors:
        before = descriptors()
        unread = collectors.watch_state(maps)
        assert descriptors() == before
        send_udp(pair, 23)
        events = collect(collectors)
    assert unread == {netns.inum(pair.right): "its state map has gone, as when Felix replaces its programs"}
    assert sum(isinstance(each, StateCopy) for each in events) == 23


def test_an_example_of_a_state_map_that_has_gone_is_none(pair: Pair, state_map: int) -> None:
    gone = syscall.map_create(PERCPU_ARRAY, 4, 512, 2, name="cali_state6")
    ids = syscall.map_info(gone).id, syscall.map_info(state_map).id
    os.close(gone)
    for like in ids[:1], ids:
        before = descriptors()
        with Collectors(Plan(hop=False, log="", state_like=like)) as collectors:
            assert collectors.watch_state({netns.inum(pair.left): ids[1]}) == {}
        assert descriptors() == before


def test_a_state_map_that_is_not_described_leaks_nothing(
    pair: Pair, state_map: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    inum, identifier = netns.inum(pair.left), syscall.map_info(state_map).id
    with Collectors(Plan(hop=False, log="")) as collectors:
        before = descriptors()
        monkeypatch.setattr(syscall, "map_info", refused)
        assert collectors.watch_state({inum: identifier}) == {
            inum: "its state map cannot be read: Operation not permitted"
        }
        assert descriptors() == before


def test_states_of_namespaces_whose_slots_meet(pair: Pair) -> None:
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.left, "left0", "egress")
    inum = netns.inum(pair.left)
    meeting = [inum + 256 * each for each in (1, 2, 3, 0, 4)]
    with ExitStack() as stack, Collectors(Plan(run_id=RUN_ID, hop=False, log="")) as collectors:
        maps = {}
        for number, each in enumerate(meeting):
            descriptor = syscall.map_create(PERCPU_ARRAY, 4, 512, 2, name="cali_state6")
            stack.callback(os.close, descriptor)
            syscall.map_update(descriptor, bytes(4), bytes([number]) * 512 * syscall.possible_cpus())
            maps[each] = syscall.map_info(descriptor).id
        assert collectors.watch_state(maps) == {meeting[-1]: "too many other namespaces have one"}
        send_udp(pair, 3)
        del maps[meeting[0]]
        assert collectors.watch_state(maps) == {}  # the first has gone and left its slot
        send_udp(pair, 3)
        events = collect(collectors)
    assert [(e.netns, e.raw) for e in events if isinstance(e, StateCopy)] == [(inum, b"\3" * 512)] * 6


@pytest.mark.usefixtures("arguments")
def test_records_hold_nothing_of_other_packets(pair: Pair) -> None:
    """Each CPU has one place where packets are looked at."""
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.right, "right0", "ingress")
    secret = b"\xa5\x5a" * 64
    with Collectors(Plan(run_id=RUN_ID, log="")) as collectors:
        for cpu in os.sched_getaffinity(0):
            with on_cpu(cpu), netns.inside(pair.left), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(secret, (pair.right_ip, 9))
                sender.sendto(identity.encode(Identity(RUN_ID, 0, 0)), (pair.right_ip, 9))
        records = collectors.poll(50) + collectors.drain()
    assert {Drop, Hop} <= {type(decode(each)) for each in records}
    assert not [each for each in records if secret[:4] in each]


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Run this thread there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_a_recording_goes_on_without_a_state_map_and_says_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover, "state_maps", lambda *_, **__: {netns.inum(pair.left): 0xFFFFFFFF})
    with recording.Recording(Plan(run_id=RUN_ID, log=""), path=None, client=pair.left) as running:
        send_udp(pair, 23)
        found = running.finish()
    why = "its state map has gone, as when Felix replaces its programs"
    assert f"Calico's own reasons are not read on {pair.left}: {why}" in found.header["warnings"]
    assert found.totals["stats"]["hop_seen"] >= 23


def test_lost_events_are_counted_exactly(pair: Pair) -> None:
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.right, "right0", "ingress")
    page = 4096
    with Collectors(Plan(run_id=RUN_ID, hop=False, log="", ring_bytes=page)) as collectors:
        send_udp(pair, 997)
        stats = collectors.stats()
        kept = len(collectors.drain())
    assert stats[Stat.DROP_MATCHED] == 997
    assert 0 < kept < 997
    assert kept + stats[Stat.DROP_LOST] == 997


def test_a_ring_that_is_read_while_it_is_written_has_room(pair: Pair) -> None:
    """Never more than a quarter full, it must not lose an event: the reader moves its position in one piece."""
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.right, "right0", "ingress")
    bursts, burst, ring = 150, 250, 256 * 1024
    with Collectors(Plan(run_id=RUN_ID, hop=False, log="", ring_bytes=ring)) as collectors:
        got = 0
        for number in range(1, bursts + 1):
            sender = threading.Thread(target=send_udp, args=(pair, burst))
            sender.start()
            while sender.is_alive():
                got += len(collectors.drain())
            sender.join()
            got += len(collectors.drain())
            stats = collectors.stats()
            assert (got, stats[Stat.DROP_LOST]) == (number * burst, 0)


@pytest.mark.usefixtures("arguments")
def test_drops_are_counted_by_reason_and_place(pair: Pair) -> None:
    with Collectors(Plan(run_id=RUN_ID, hop=False, log="", drop_count_only=True)) as collectors:
        send_udp(pair, 97)
        collectors.stop()  # the machine drops other packets too, also while we read
        counts = collectors.drop_counts()
        stats = collectors.stats()
        run_count = collectors.programs()["kfree_skb"]
    types = headers.kernel_btf()
    assert types is not None
    names = types.enum("skb_drop_reason") or {}
    no_socket = sum(
        n
        for key, n in counts.items()
        if names.get(key.skb_drop_reason, "").endswith("NO_SOCKET")
        and (key.netns, key.ip_proto) == (netns.inum(pair.right), 17)
    )
    assert no_socket == 97
    assert sum(counts.values()) == stats[Stat.DROP_SEEN]
    assert stats[Stat.DROP_OTHER] == 0
    assert run_count.recursion_misses == 0


def test_a_full_table_loses_nothing_of_the_totals(pair: Pair) -> None:
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.left, "left0", "egress")
    protocols, each = range(200, 230), 7
    with Collectors(Plan(hop=False, log="", drop_count_only=True, drop_cells=1)) as collectors:
        with netns.inside(pair.left):
            for protocol in protocols:
                with socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) as sender:
                    for _ in range(each):
                        sender.sendto(b"x", (pair.right_ip, 0))
        collectors.stop()
        counts, stats = collectors.drop_counts(), collectors.stats()
    kept = [key for key in counts if key.ip_proto in protocols]
    assert 1 <= len(kept) <= syscall.possible_cpus() + 1  # a slot of each CPU, and the one of the table
    assert stats[Stat.DROP_OTHER] >= (len(protocols) - len(kept)) * each
    assert sum(counts.values()) + stats[Stat.DROP_OTHER] == stats[Stat.DROP_SEEN]


@pytest.mark.parametrize(("limit", "sample"), [(50, 1), (0, 10), (100, 3)])
def test_what_is_held_back_is_counted(pair: Pair, limit: int, sample: int) -> None:
    bpf = compile_tc("int cali_shot(struct __sk_buff *skb) { return 2; }")
    pair.attach(bpf, "cali_shot", pair.right, "right0", "ingress")
    plan = Plan(hop=False, drop_all=True, rate_limit=limit, sample=sample)
    with Collectors(plan) as collectors:
        send_udp(pair, 2000)
        drops = [e for e in collect(collectors) if isinstance(e, Drop)]
        stats = collectors.stats()
        run_count = collectors.programs()["kfree_skb"]
    assert stats[Stat.DROP_SEEN] >= 2000
    assert (
        len(drops) + stats[Stat.DROP_LIMITED] + stats[Stat.DROP_UNSAMPLED] + stats[Stat.DROP_LOST]
        == stats[Stat.DROP_SEEN]
    )
    assert bool(stats[Stat.DROP_LIMITED]) == bool(limit)
    assert bool(stats[Stat.DROP_UNSAMPLED]) == (sample > 1)
    assert drops
    assert run_count.recursion_misses == 0


def test_nothing_is_left_after_kill(pair: Pair) -> None:
    code = (
        "import sys; from calitrace.kernel.collectors import *\n"
        "with Collectors(Plan(run_id=1)) as c:\n"
        "    print(*(p.id for p in c.programs().values()), flush=True); sys.stdin.read()\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    mine = {int(word) for word in agent.stdout.readline().split()}
    assert mine <= set(syscall.program_ids())
    agent.kill()
    agent.wait()
    left: Any = mine
    for _ in range(1000):  # the kernel frees programs after a grace period
        left = mine & set(syscall.program_ids())
        if not left:
            break
        subprocess.run(["true"], check=True)
    assert not left


def test_headers_of_a_run_killed_while_compiling_go_with_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal; from calitrace.kernel import headers, loader\n"
        "headers.write_tree = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loader.compile_bpf('')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for age_s, there in ((0, [left]), (3600, [])):
        os.utime(left, (0, left.stat().st_mtime - age_s))
        loader.compile_bpf("int nothing(void *context) { return 0; }").cleanup()
        assert list(tmp_path.iterdir()) == there


@pytest.mark.parametrize("patterns", [["eth?"], ["eth0", "*a"], ["x" * 16], []])
def test_what_only_the_reader_can_match(patterns: list[str]) -> None:
    assert name_condition(patterns) == ""


@pytest.mark.parametrize(
    ("patterns", "seen"), [(["right0"], 5), (["left"], 0), (["no", "r*"], 5), (["right0", "left*"], 5), (["*"], 5)]
)
def test_names_are_matched_in_the_kernel(pair: Pair, patterns: list[str], seen: int) -> None:
    plan = Plan(hop=False, log="", drop_all=True, named_by=name_condition(patterns), netns=netns.inum(pair.right))
    with Collectors(plan) as collectors:
        with netns.inside(pair.left), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((pair.left_ip, 0))
            port = sender.getsockname()[1]
            for _ in range(5):
                with contextlib.suppress(ConnectionRefusedError):
                    sender.sendto(b"x", (pair.right_ip, 9))
        events = [decode(raw) for raw in collectors.drain()]
        drops = (each.packet.inner for each in events if isinstance(each, Drop))
        mine = [layer for layer in drops if layer and layer.sport == port]
        assert len(mine) == seen
        stats = collectors.stats()
        assert stats[Stat.DROP_SEEN] == stats[Stat.DROP_MATCHED] + stats[Stat.DROP_FILTERED]
