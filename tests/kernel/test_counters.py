"""Counters of the real kernel: what the reader says against what was done, and against tc."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute

from calitrace.checks import registry
from calitrace.checks.snapshot import Missing
from calitrace.correlate.counters import BACKWARDS, MADE_ANEW, Reading, Row, rates, totals
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import counters, netns, node, syscall
from calitrace.kernel.counters import Reader
from calitrace.report.counters import Choice, iter_notes, table
from tests.kernel.conftest import compile_tc
from tests.kernel.test_maps import HASH, PERCPU_ARRAY, PERCPU_HASH, bpffs, pin, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.kernel.conftest import Pair

__all__ = ["bpffs"]  # a fixture
pytestmark = pytest.mark.root
COUNT = 23
DROP = "int drop_mine(struct __sk_buff *skb) { return skb->protocol == 0xb588 ? 2 : -1; }"


def total(rows: Iterable[Row], source: str, interface: str, counter: str, place: str | None = None) -> int | None:
    """Of the one row that has this name."""
    (found,) = [
        each.total
        for each in rows
        if (each.key.source, each.key.interface, each.key.counter) == (source, interface, counter)
        and place in (None, each.key.place)
    ]
    return found


def send_frames(pair: Pair, count: int) -> None:
    """Frames that nobody takes (ETH_P_802_EX1), from left0 to right0."""
    with netns.inside(pair.left), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind(("left0", 0))
        for _ in range(count):
            sender.send(b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + bytes(46))


def read_until(reader: Reader, source: str, interface: str, counter: str, wanted: int) -> Reading:
    """A reading in which that counter has reached *wanted*: frames are taken in by another CPU."""
    for _ in range(100_000):
        reading = reader.read()
        if (total(totals(reading), source, interface, counter) or 0) >= wanted:
            return reading
    raise AssertionError(f"{interface} {counter} never came to {wanted}")


def tc_drops(namespace: str, interface: str, kind: str) -> int:
    """What ``tc -s qdisc show`` says."""
    with netns.inside(namespace):
        done = subprocess.run(
            ["tc", "-s", "-j", "qdisc", "show", "dev", interface], capture_output=True, text=True, check=True
        )
    (found,) = [each["drops"] for each in json.loads(done.stdout) if each["kind"] == kind]
    return int(found)


def test_frames_that_nobody_takes(pair: Pair) -> None:
    with Reader(pair.right, None) as reader:
        before = reader.read()
        send_frames(pair, COUNT)
        was = total(totals(before), "interface", "right0", "rx_dropped")
        assert was is not None
        after = read_until(reader, "interface", "right0", "rx_dropped", was + COUNT)
    (row,) = [row for row in rates(before, after) if row.key.interface == "right0" and row.delta]
    assert (row.key.counter, row.delta) == ("rx_dropped", COUNT)
    assert row.per_second == pytest.approx(COUNT * 1e9 / (after.mono_ns - before.mono_ns))


def test_clsact_as_tc_says(pair: Pair) -> None:
    programs = compile_tc(DROP)
    pair.attach(programs, "drop_mine", pair.right, "right0", "ingress")
    with Reader(pair.right, None) as reader:
        send_frames(pair, COUNT)
        reading = read_until(reader, "clsact", "right0", "dropped", COUNT)
    assert total(totals(reading), "clsact", "right0", "dropped") == COUNT == tc_drops(pair.right, "right0", "clsact")
    assert reading.tcx == ()


@contextmanager
def tcx_program(pair: Pair, name: str = "drop_mine") -> Iterator[None]:
    """`DROP` at right0's ingress, by a tcx link."""
    with pair.attached_by_tcx(compile_tc(DROP.replace("drop_mine", name)), name, pair.right, "right0"):
        yield


def test_tcx_has_no_counter_and_says_so(pair: Pair) -> None:
    with tcx_program(pair):
        with Reader(pair.right, None) as reader:
            before = reader.read()
            send_frames(pair, COUNT)
            after = reader.read()
        first = table(None, after, Choice(("right0",)))
        assert [row.key.place for row in first.rows if row.key.source == "tcx"] == ["tc ingress"]
        assert total(first.rows, "tcx", "right0", "dropped") is None
        assert "right0 tc ingress" in "".join(iter_notes(first))
        assert not isinstance(after.tcx, Missing)
        assert [each.programs for each in after.tcx] == [("drop_mine",)]
        # It is true: the frames are dropped, and no counter of the interface or of a qdisc has seen it.
        assert [row for row in rates(before, after) if row.key.interface == "right0" and row.delta] == []


def test_our_own_count_of_what_tcx_drops(pair: Pair) -> None:
    with tcx_program(pair), Reader(pair.right, None, tcx=True) as reader:
        before = reader.read()
        send_frames(pair, COUNT)
        after = read_until(reader, "tcx", "right0", "TC_INGRESS", COUNT)
        (row,) = [row for row in rates(before, after) if row.key.interface == "right0" and row.delta]
        assert (row.key.source, row.key.place, row.key.counter, row.delta) == (
            *("tcx", "tc ingress", "TC_INGRESS", COUNT),
        )


def test_check_sees_what_calicos_tcx_programs_drop(pair: Pair, bpffs: Path) -> None:
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            send_frames(pair, 1)

    sender = threading.Thread(target=send)
    with tcx_program(pair, "cali_tc_preamble"):
        sender.start()
        try:
            found = node.collect(node.Where(pair.right, bpffs), 0.2, lambda _: None)
        finally:
            over.set()
            sender.join()
    (said,) = registry.run(found, [registry.BY_ID["drops.silent"]])
    (finding,) = said.findings
    assert finding.subject == "right0"
    assert finding.evidence[0].startswith("tcx programs (kfree_skb, TC_INGRESS and TC_EGRESS) dropped: ")
    assert finding.evidence[1].startswith("Calico's counters: ")


def test_a_full_queue(pair: Pair) -> None:
    with netns.inside(pair.left):
        Path("/proc/sys/net/ipv6/conf/left0/disable_ipv6").write_text("1")  # or it has packets of its own to lose
        subprocess.run(["tc", "qdisc", "add", "dev", "left0", "root", "bfifo", "limit", "1"], check=True)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_IP, 11, 1)  # IP_RECVERR: or the loss is not told
            for _ in range(COUNT):
                with pytest.raises(OSError, match="No buffer space"):
                    sender.sendto(b"x", (pair.right_ip, 9))
    with Reader(pair.left, None) as reader:
        rows = totals(reader.read())
    (row,) = [row for row in rows if row.key.source == "qdisc" and row.total]
    assert row.key.place.startswith("bfifo ")
    assert row.total == COUNT == tc_drops(pair.left, "left0", "bfifo")


def test_an_interface_that_comes_back_under_its_name(pair: Pair) -> None:
    def veth(route: Any) -> None:
        route.link("add", ifname="again", kind="veth", peer="other")

    with netns.inside(pair.left), IPRoute() as route, Reader(pair.left, None) as reader:
        veth(route)
        before = reader.read()
        route.link("del", ifname="again")
        veth(route)
        after = reader.read()
    shown = table(before, after, Choice(("again",), everything=True))
    assert {row.change for row in shown.rows if row.key.source == "interface"} == {MADE_ANEW}
    assert all(row.delta is None for row in shown.rows)
    assert shown.gone == ("again",)


def row_of(*counts: int) -> bytes:
    """One value of a map of 14 counters, with these on two CPUs and none on the others."""
    each = struct.pack("<14Q", *counts, *[0] * (14 - len(counts)))
    return each * 2 + bytes(len(each)) * (syscall.possible_cpus() - 2) if syscall.possible_cpus() > 1 else each


def test_maps_of_each_interface(bpffs: Path) -> None:
    """v3.24 and v3.25."""
    cpus = min(syscall.possible_cpus(), 2)
    for number, place in enumerate(("tc/eth05_igr", "tc/eth05_egr", "tc/cali_1_xdp")):
        write(pin(bpffs, "cali_counters", PERCPU_ARRAY, (4, 112), 1, place), {bytes(4): row_of(number + 5, 0, 0, 0, 2)})
    rows = {
        (each.interface, each.hook): each.packets[:5] for each in counters.calico(bpffs, ["lo", "eth0.5", "cali_1"])
    }
    assert rows == {
        ("eth0.5", 0): (5 * cpus, 0, 0, 0, 2 * cpus),
        ("eth0.5", 1): (6 * cpus, 0, 0, 0, 2 * cpus),
        ("cali_1", 2): (7 * cpus, 0, 0, 0, 2 * cpus),
    }


def test_an_interface_has_the_name_that_felix_knows(bpffs: Path) -> None:
    """Its number may be another interface's in the namespace that we look at, and no interface's there either."""
    rows = {struct.pack("<II", ifindex, 0): row_of(7) for ifindex in (1, 2_000_000)}
    write(pin(bpffs, "cali_counters2", PERCPU_HASH, (8, 112), 10), rows)
    write(pin(bpffs, "cali_iface4", HASH, (4, 52), 10), {struct.pack("<I", 1): struct.pack("<I16s32x", 10, b"ens192")})
    with counters.Reader("", bpffs) as reader:
        shown = table(None, reader.read(), Choice())
    assert {row.key.interface for row in shown.rows if row.key.source == "calico"} == {"ens192", "ifindex 2000000"}


def test_an_old_map_elsewhere_is_refused(bpffs: Path) -> None:
    pin(bpffs, "cali_counters", PERCPU_ARRAY, (4, 112), 1)
    with pytest.raises(EnvironmentUnfit, match="pinned at tc/globals/cali_counters: whose counters"):
        counters.calico(bpffs, [])


def test_a_map_that_is_cleared(bpffs: Path) -> None:
    found = pin(bpffs, "cali_counters2", PERCPU_HASH, (8, 112), 10)
    key = struct.pack("<II", 1, 1)
    with Reader("", bpffs) as reader:
        assert isinstance(reader.read().calico, Missing)  # no rows yet
        write(found, {key: row_of(9, 0, 0, 0, 3)})
        before = reader.read()
        write(found, {key: row_of(1)})
        after = reader.read()
    said = {row.key.counter: row.change for row in rates(before, after) if row.key.source == "calico" and row.change}
    assert said == {"TOTAL_PACKETS": BACKWARDS, "DROPPED_BY_POLICY": BACKWARDS}
    assert {row.key.interface for row in totals(after) if row.key.source == "calico"} == {"lo"}


def test_softnet_has_every_cpu() -> None:
    found = counters.softnet()
    assert [each.cpu for each in found] == sorted(os.sched_getaffinity(0))
    assert all(each.dropped >= 0 and each.time_squeeze >= 0 for each in found)


def test_without_root_the_kernels_own_counters_are_left(pair: Pair) -> None:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        with Reader("", None) as reader:
            reading = reader.read()
        missing = [name for name in ("calico", "tcx", "qdiscs", "interfaces", "softnet")
                   if isinstance(getattr(reading, name), Missing)]  # fmt: skip
        os.write(send, json.dumps(missing).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        assert json.load(answer) == ["calico", "tcx"]
    os.waitpid(child, 0)


def test_a_namespace_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no network namespace 'nowhere'"):
        Reader("nowhere", None)
