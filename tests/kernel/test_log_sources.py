"""The live sources of the log on a real kernel: the same lines from each, exact counts, nothing left behind."""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from calitrace.calico import trace
from calitrace.decode import Decoder
from calitrace.events import Stat
from calitrace.kernel import syscall
from calitrace.kernel.collectors import Collectors, Plan
from calitrace.kernel.tracefs import Instance, Tracefs
from calitrace.model import LogLine
from tests.kernel.conftest import compile_tc
from tests.kernel.test_collectors import send_udp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root

COMMAND = (sys.executable, "-W", "ignore", "-c", "from calitrace.cli.main import run; run()", "log")
TIMEOUT_S = 60
HASH = 1  # enum bpf_map_type
NONCE = secrets.randbelow(1 << 30)  # the global buffer may still hold lines of an earlier run
TALKATIVE = """
BPF_ARRAY(printed, u64, 1);
int cali_talk(struct __sk_buff *skb) {
    u32 zero = 0;
    u64 *count = printed.lookup(&zero);

    if (!count || skb->protocol != bpf_htons(0x0800))
        return -1;
    bpf_trace_printk("left0----------E: New packet at ifindex=%d; mark=%x\\n", skb->ifindex, skb->mark);
    bpf_trace_printk("left0----------E: Final result=ALLOW (0). Program execution time: %dns\\n", NONCE);
    bpf_trace_printk("somebody else: %d\\n", 1);
    __sync_fetch_and_add(count, 3);
    return -1;
}
"""


@pytest.fixture
def talkative(pair: Pair) -> Any:
    """Every IPv4 packet from left prints two lines of Calico's and one of another's; its table counts them."""
    bpf = compile_tc(f"#define NONCE {NONCE}\n{TALKATIVE}")
    pair.attach(bpf, "cali_talk", pair.left, "left0", "egress")
    return bpf


def printed(bpf: Any) -> int:
    """Lines that the program says it printed."""
    (value,) = bpf[b"printed"].values()
    return int(value.value)


@contextmanager
def listening(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """``calitrace log`` that has said that it listens."""
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"listening to"):
                break
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def children(pid: int) -> list[int]:
    """Processes that it has made and that are still there."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@functools.cache
def tracefs() -> Tracefs:
    """One for all tests: it may be a mount, which is in nobody's way."""
    return Tracefs()


def instances(owner: int | str) -> list[Path]:
    """Our instances in tracefs, or those of one process."""
    return list((tracefs().root / "instances").glob(f"calitrace-{owner}*"))


@pytest.mark.parametrize("source", ["bpf", "tracefs"])
def test_a_private_source_takes_nothing_from_trace_pipe(source: str, pair: Pair, talkative: Any) -> None:
    size = tracefs().root / "buffer_size_kb"
    before = size.read_text()
    size.write_text("4096")
    pipe = os.open(tracefs().root / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
    stop = threading.Event()
    chunks = []

    def read() -> None:
        while True:
            try:
                chunks.append(os.read(pipe, 1 << 20))
            except BlockingIOError:
                if stop.wait(0.01):
                    break

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with listening("--source", source, "-i", "left0", "-o", "json", "-c", "500") as process:
            send_udp(pair, 500)
            output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        stop.set()
        thread.join()
        os.close(pipe)
        size.write_text(before.split()[0])
        assert (process.returncode, output.count(b'"verdict": "ALLOW"')) == (0, 500), errors
    seen = b"".join(chunks)
    assert (seen.count(b"Program execution time: %dns" % NONCE), printed(talkative)) == (500, 1500)


def test_the_instance_is_gone_after_kill(pair: Pair, talkative: Any) -> None:
    with listening("--source", "tracefs") as process:
        (instance,) = instances(process.pid)
        (guard,) = children(process.pid)
        watched = os.pidfd_open(guard)
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
        assert select.select([watched], [], [], TIMEOUT_S)[0], "the guard still runs"
        os.close(watched)
        assert not instance.exists()


def test_an_orphan_is_removed_by_the_next() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    orphan = tracefs().root / "instances" / f"calitrace-{gone.pid}"
    orphan.mkdir()
    with Instance() as instance:
        assert not orphan.exists()
        assert instance.lost == 0
        assert len(instances(os.getpid())) == 1
    assert instances("") == []


def test_a_run_in_another_container_leaves_ours_alone(pair: Pair, talkative: Any) -> None:
    """Where our process is not to be seen, and has the same number."""
    once = "import os; from calitrace.kernel.tracefs import Instance\nwith Instance() as i: print(os.getpid(), i.lost)"
    with Instance() as instance:
        container = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", once]
        other = subprocess.run(container, capture_output=True, check=False)
        assert (other.stdout, other.stderr) == (b"1 0\n", b"")
        send_udp(pair, 10)
        assert os.read(instance.fd, 1 << 20).count(b": bpf_trace_printk: ") == printed(talkative) == 30
    assert instances("") == []


def test_who_reads_an_orphan_keeps_it_and_stops_nobody() -> None:
    orphan = tracefs().root / "instances" / "calitrace-1-2"
    orphan.mkdir()
    try:
        with (orphan / "trace_pipe").open("rb"), Instance() as instance:
            assert (orphan.is_dir(), instance.lost) == (True, 0)
    finally:
        orphan.rmdir()


def test_the_options_of_the_global_buffer_are_not_ours(pair: Pair, talkative: Any) -> None:
    wanted = {"latency-format": "1", "irq-info": "0", "context-info": "0"}
    before = {name: (tracefs().root / "options" / name).read_text() for name in wanted}
    try:
        for name, value in wanted.items():
            (tracefs().root / "options" / name).write_text(value)
        with Instance() as instance:
            send_udp(pair, 1)
            lines = os.read(instance.fd, 1 << 20).decode().splitlines()
    finally:
        for name, value in before.items():
            (tracefs().root / "options" / name).write_text(value)
    contexts = [trace.split(line)[0] for line in lines if line]
    assert [(each.pid, len(each.flags) >= 4) for each in contexts] == [(os.getpid(), True)] * printed(talkative)


def test_the_filter_of_an_instance_is_the_kernels(pair: Pair, talkative: Any) -> None:
    with Instance(["left0"]) as instance:
        send_udp(pair, 10)
        text = os.read(instance.fd, 1 << 20).decode()
    counts = [text.count(each) for each in ("New packet", "Final result", "somebody else")]
    assert (counts, printed(talkative)) == ([10, 10, 0], 30)


def test_what_the_ring_had_no_room_for_is_counted(pair: Pair, talkative: Any) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    with Collectors(Plan(drop=False, hop=False, log="stream", ring_bytes=page)) as collectors:
        send_udp(pair, 200)
        lines = [e for e in Decoder().iter_events(collectors.drain()) if isinstance(e, LogLine)]
        stats = collectors.stats()
    assert stats[Stat.LOG_SEEN] == printed(talkative) == 600
    assert len(lines) + stats[Stat.LOG_LOST] == 600
    assert stats[Stat.LOG_LOST] > 0


def test_the_place_of_a_loss_is_in_the_stream(pair: Pair, talkative: Any) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    with Collectors(Plan(drop=False, hop=False, log="stream", ring_bytes=page)) as collectors:
        send_udp(pair, 200)
        before = collectors.drain()
        send_udp(pair, 1)
        after = [e for e in Decoder().iter_events(collectors.drain()) if isinstance(e, LogLine)]
        stats = collectors.stats()
    assert not any(e.lost for e in Decoder().iter_events(before) if isinstance(e, LogLine))
    assert [e.lost for e in after] == [stats[Stat.LOG_LOST], 0, 0]


def test_what_a_private_buffer_had_no_room_for_is_counted_once(pair: Pair, talkative: Any) -> None:
    with listening("--source", "tracefs", "--all", "-v", "-o", "json") as process:
        (instance,) = instances(process.pid)
        (instance / "buffer_size_kb").write_text("8")
        process.send_signal(signal.SIGSTOP)
        send_udp(pair, 2000)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    shown = [json.loads(each) for each in output.splitlines()]
    lines = sum(len(each.get("lines", ["one"])) for each in shown if each.get("form") != "lost")
    said = re.search(rb"; (\d+) events lost", errors)
    assert said, errors
    assert int(said[1]) > 0
    assert lines + int(said[1]) == printed(talkative)


def test_a_recording_is_the_run_again(pair: Pair, talkative: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.calitrace"
    with listening("-i", "left0", "-o", "json", "-w", str(path), "--all") as process:
        send_udp(pair, 50)
        assert process.stdout is not None
        shown = b"".join(process.stdout.readline() for _ in range(100))
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=TIMEOUT_S)
    again = subprocess.run(
        [*COMMAND, "-r", str(path), "-i", "left0", "-o", "json", "--all"], capture_output=True, check=True
    )
    assert again.stdout == shown + rest
    assert shown.count(b'"form": "other"') == shown.count(b'"type": "passage"') == 50


@pytest.mark.parametrize("source", ["bpf", "tracefs"])
@pytest.mark.parametrize(("flags", "hook"), [(1, "ingress"), (8, "egress")])
def test_which_interfaces_are_pods_is_asked_of_calico(
    pair: Pair, talkative: Any, source: str, flags: int, hook: str
) -> None:
    state = syscall.map_create(HASH, 4, 52, 10, name="cali_iface4")
    try:
        syscall.map_update(state, struct.pack("<I", 7), struct.pack("<I16s32x", flags, b"left7"))
        with listening("--source", source, "-i", "left0", "-o", "json", "-c", "1") as process:
            send_udp(pair, 1)
            output, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        os.close(state)
    assert json.loads(output)["hook"] == hook, errors


def test_programs_are_gone_after_kill() -> None:
    before = set(syscall.program_ids())
    with listening("--source", "bpf") as process:
        ours = {each for each in set(syscall.program_ids()) - before if _name(each) == "collect_log"}
        assert ours
        process.kill()
        process.wait(TIMEOUT_S)
    deadline = time.monotonic() + 1  # as docs/limitations.md promises; the kernel gives no signal for it
    while ours & set(syscall.program_ids()):
        assert time.monotonic() < deadline


def _name(identifier: int) -> str:
    try:
        return syscall.program_by_id(identifier).name
    except OSError:  # another's, gone by now
        return ""
