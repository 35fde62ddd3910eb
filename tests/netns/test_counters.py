"""``calitrace counters`` on the lab: what is dropped there is what the table and the JSON say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from calitrace.kernel import netns
from calitrace.lab.topology import Lab
from tests.netns.conftest import COMMAND, calitrace, on
from tests.netns.test_drops import full_queue, send

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root
POD = "calif00dbeef012"
COUNT = 37
TIMEOUT_S = 60
NODEPORT = ("10.10.0.1", 30053)


def where(lab: Lab, node: str) -> tuple[str, ...]:
    """The options for a node."""
    return "--netns", lab.namespace(node), "--bpffs", str(lab.pins / node)


def test_the_namespaces_programs_tell_which_nodes_maps_are_its_own(lab: Lab) -> None:
    """The maps of both nodes lie below one bpffs, and nobody says which."""
    rows = {}
    for words in (("--netns", lab.namespace("node-b")), where(lab, "node-b")):
        done = calitrace("counters", *words, "--all", "-o", "json")
        assert done.returncode == 0, done.stderr
        found = [row for row in map(json.loads, done.stdout.splitlines()) if row.get("source") == "calico"]
        rows[words] = {(row["interface"], row["place"], row["counter"]) for row in found}
    first, second = rows.values()
    assert first == second != set()


def run(lab: Lab, node: str, *words: str) -> str:
    done = calitrace("counters", *where(lab, node), *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def totals(lab: Lab, node: str) -> dict[tuple[str, str, str, str], int]:
    """The first table's rows by name."""
    about, *rows = map(json.loads, run(lab, node, "-o", "json", "--all").splitlines())
    assert about["missing"] == {}
    keys = ("source", "interface", "place", "counter")
    return {tuple(each[key] for key in keys): each["total"] for each in rows}


def qdisc_drops(lab: Lab, node: str, interface: str, kind: str) -> int:
    """As tc says."""
    with netns.inside(lab.namespace(node)):
        done = subprocess.run(
            ["tc", "-s", "-j", "qdisc", "show", "dev", interface], capture_output=True, text=True, check=True
        )
    return sum(int(each["drops"]) for each in json.loads(done.stdout) if each["kind"] == kind)


def deny(lab: Lab) -> None:
    """Have COUNT datagrams denied at the pod, and wait until the kernel has dropped them all."""
    was = qdisc_drops(lab, "node-b", POD, "clsact")
    send(lab, "client", *NODEPORT, COUNT)
    for _ in range(1000):
        if qdisc_drops(lab, "node-b", POD, "clsact") >= was + COUNT:
            return
    raise AssertionError("the datagrams did not come to the pod")


@pytest.fixture
def denying(lab: Lab) -> Iterator[Lab]:
    """The lab, with a policy that denies at the pod."""
    assert on(lab, "log-level", "off").returncode == 0
    assert on(lab, "fault", "policy-deny").returncode == 0
    yield lab
    assert on(lab, "heal").returncode == 0


def test_policy_drops_are_counted_one_by_one(denying: Lab) -> None:
    before = totals(denying, "node-b")
    deny(denying)
    after = totals(denying, "node-b")
    risen = {key: after[key] - before[key] for key in after if after[key] is not None and after[key] != before[key]}
    calico = {key[3]: number for key, number in risen.items() if key[:3] == ("calico", POD, "tc egress")}
    assert calico == {"TOTAL_PACKETS": COUNT, "DROPPED_BY_POLICY": COUNT}
    assert risen["clsact", POD, "tc ingress+egress", "dropped"] == COUNT
    assert after["clsact", POD, "tc ingress+egress", "dropped"] == qdisc_drops(denying, "node-b", POD, "clsact")
    shown = [line.split() for line in run(denying, "node-b", "-i", POD).splitlines() if "DROPPED_BY_POLICY" in line]
    assert shown == [
        ["calico", POD, "egress", "DROPPED_BY_POLICY",
         str(after["calico", POD, "tc egress", "DROPPED_BY_POLICY"])]
    ]  # fmt: skip


def test_a_full_queue_is_counted(lab: Lab) -> None:
    with full_queue(lab, "pod-a", "eth0"):
        send(lab, "pod-a", "10.10.0.1", 9, COUNT)
        about, *rows = map(json.loads, run_without_calico(lab, "pod-a", "-i", "eth0", "-o", "json").splitlines())
        (row,) = [each for each in rows if each["source"] == "qdisc"]
        assert row["place"].startswith("bfifo ")
        assert row["total"] >= COUNT
        assert row["total"] == qdisc_drops(lab, "pod-a", "eth0", "bfifo")
    assert set(about["missing"]) == {"calico"}


def run_without_calico(lab: Lab, part: str, *words: str) -> str:
    done = calitrace("counters", "--netns", lab.namespace(part), "--bpffs", "/proc/self/fdinfo", *words)
    assert done.returncode == 0, done.stderr
    assert "note: no counters of calico: no Calico maps below " in done.stderr
    return done.stdout


class Live:
    """``calitrace counters`` as it runs; interrupted at the end."""

    def __init__(self, lab: Lab, node: str, *words: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "counters", *where(lab, node), "-o", "json", *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[dict[str, Any]] = []

    def until(self, readings: int) -> None:
        """Read on until that many tables are there."""
        assert self.process.stdout is not None
        while sum(each["type"] == "reading" for each in self.lines) < readings:
            self.lines.append(json.loads(self.process.stdout.readline()))

    def two_more(self) -> None:
        """Read on until two tables are there that were read from now on; older ones may still be in the pipe."""
        assert self.process.stdout is not None
        begin = time.time_ns()
        while sum(each["type"] == "reading" and each["time_ns"] > begin for each in self.lines) < 2:
            self.lines.append(json.loads(self.process.stdout.readline()))

    def interrupt(self) -> str:
        """Ctrl-C, and what it says then."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        rest, said = self.process.stdout.read(), self.process.stderr.read()  # communicate() loses what is buffered
        self.process.wait(timeout=TIMEOUT_S)
        self.lines += [json.loads(line) for line in rest.splitlines()]
        assert self.process.returncode == 0, said
        assert "Traceback" not in said
        return said


def test_rates_and_the_journal_of_a_run(denying: Lab, tmp_path: Path) -> None:
    """Each table is there as soon as it is read; what is counted in all intervals together is what was dropped."""
    kept = tmp_path / "a.calitrace"
    live = Live(denying, "node-b", "0.2", "-w", str(kept))
    live.until(1)
    deny(denying)
    live.two_more()
    assert "readings; our cost " in live.interrupt()
    dropped = [
        each
        for each in live.lines
        if each.get("counter") == "DROPPED_BY_POLICY" and each["interface"] == POD and each["seconds"] is not None
    ]
    assert sum(each["delta"] for each in dropped) == COUNT
    for each in dropped:
        assert each["per_second"] == pytest.approx(each["delta"] / each["seconds"], abs=0.001)
    again = calitrace("counters", "-r", str(kept), "-o", "json")
    assert [json.loads(line) for line in again.stdout.splitlines()] == live.lines
    assert (again.returncode, again.stderr) == (0, "")


def test_a_journal_gives_the_same_table(denying: Lab, tmp_path: Path) -> None:
    kept = tmp_path / "a.calitrace"
    shown = run(denying, "node-b", "0.1", "3", "-w", str(kept))
    assert shown.count("within") == 2
    again = calitrace("counters", "-r", str(kept))
    assert (again.stdout, again.returncode) == (shown, 0)
    cut = tmp_path / "cut.calitrace"
    cut.write_bytes(kept.read_bytes()[:-3])
    short = calitrace("counters", "-r", str(cut))
    assert short.stdout == shown
    assert "was cut short" in short.stderr


def test_counters_that_are_cleared_meanwhile(denying: Lab) -> None:
    deny(denying)
    live = Live(denying, "node-b", "0.2")
    live.until(1)
    pins = str(denying.pins / "node-b")
    assert calitrace("maps", "counters", "flush", "--bpffs", pins, "--allow-system-changes").returncode == 0
    live.two_more()
    deny(denying)
    live.two_more()
    live.interrupt()
    numbers = [each for each in live.lines if each["type"] == "counter" and each["delta"] is not None]
    assert all(each["delta"] >= 0 for each in numbers)
    policy = [each for each in numbers if each["counter"] == "DROPPED_BY_POLICY" and each["interface"] == POD]
    assert sum(each["delta"] for each in policy) == COUNT
    odd = [each for each in live.lines if each.get("change")]
    assert {each["change"] for each in odd} <= {"went backwards"}


def test_a_reader_that_has_gone(lab: Lab) -> None:
    words = " ".join([sys.executable, "-W", "ignore", "-c", "'from calitrace.cli.main import run; run()'"])
    command = f"{words} counters 0.05 {' '.join(where(lab, 'node-b'))} --all"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True,
        check=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    first, status = done.stdout.splitlines()
    assert first.endswith("since boot, or since each was made:")
    assert (status, done.stderr) == ("141", "")


def test_a_journal_that_finds_no_room(tmp_path: Path) -> None:
    words = " ".join([sys.executable, "-W", "ignore", "-c", "'from calitrace.cli.main import run; run()'"])
    done = subprocess.run(
        ["bash", "-c", f"ulimit -f 0; {words} counters -w {tmp_path / 'a'}"],
        capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, f"error: cannot write {tmp_path / 'a'}: File too large\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-r", "{kept}", "1"), "-r shows readings as they were taken"),
        (("-r", "/dev/null"), "malformed journal"),
        (("-w", "/dev/null"), "exists already"),
        (("--netns", "nowhere"), "no network namespace 'nowhere'"),
        (("--tcx",), "--tcx counts only while calitrace runs"),
        (("-1",), "no such option"),
    ],
)
def test_what_is_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = calitrace("counters", *(each.format(kept=tmp_path / "a") for each in words))
    assert done.returncode == 2
    assert said in done.stderr.lower() or said in done.stderr
    assert not done.stdout
    assert list(tmp_path.iterdir()) == []
