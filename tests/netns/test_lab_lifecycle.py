"""The lab comes, goes, and leaves nothing, whatever happens to it on the way."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyroute2 import netns as pyroute_netns

from calitrace.kernel import netns, syscall
from calitrace.lab import network, processes, state
from calitrace.lab.topology import Lab
from tests.kernel.conftest import remove_namespaces_of_dead_runs
from tests.netns.conftest import COMMAND, calitrace, left_behind, on, take_down_labs_of_dead_runs

pytestmark = pytest.mark.root

STRIKE = """
import os, sys
from calitrace.cli.main import run
from calitrace.lab import state
when, number, fatal = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
save, calls = state.save, 0
def struck(lab, record):
    global calls
    calls += 1
    if calls == number and when == "before":
        os.kill(os.getpid(), fatal)
    save(lab, record)
    if calls == number and when == "after":
        os.kill(os.getpid(), fatal)
state.save = struck
run()
"""


def struck_up(lab: Lab, when: str, number: int, fatal: int) -> subprocess.CompletedProcess[str]:
    """Run `up` and hit it with a signal before or after the record is written for the *number*-th time."""
    words = [sys.executable, "-c", STRIKE, when, str(number), str(int(fatal)), "lab", "up", "--name", lab.name]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def test_what_a_dead_run_of_the_tests_left_goes() -> None:
    """A lab, and the two namespaces of tests/kernel; those of this run stay."""
    with subprocess.Popen(["true"]) as dead:
        pass
    gone, mine = Lab(f"test-{dead.pid}-0"), Lab(f"test-{os.getpid()}-lives")
    names = [f"ct-{side}-{pid}-0" for pid in (dead.pid, os.getpid()) for side in ("left", "right")]
    assert on(gone, "up").returncode == 0
    try:
        for name in names:
            pyroute_netns.create(name)
        state.save(mine, state.State(phase="up"))
        take_down_labs_of_dead_runs()
        remove_namespaces_of_dead_runs()
        assert (left_behind(gone), mine.state_file.exists()) == ([], True)
        assert [name for name in names if (netns.RUN_NETNS / name).exists()] == names[2:]
    finally:
        state.forget(mine)
        on(gone, "down")
        for name in names:
            with contextlib.suppress(OSError):
                pyroute_netns.remove(name)


def test_up_status_exec_down(spare: Lab) -> None:
    started = on(spare, "up")
    assert (started.returncode, started.stdout) == (0, "")

    shown = on(spare, "status", "-o", "json")
    seen = json.loads(shown.stdout)
    assert (shown.returncode, seen["state"], seen["missing"], seen["fault"]) == (0, "up", [], "")
    assert "10.10.0.1:30080" in [service["address"] for service in seen["services"]]

    text = on(spare, "status").stdout
    assert max(map(len, text.splitlines())) <= 80

    inside = calitrace(
        "lab", "exec", "--name", spare.name, "pod-b", "--", "sh", "-c", "readlink /proc/self/ns/net; exit 7"
    )
    assert inside.returncode == 7
    assert inside.stdout.strip() == f"net:[{netns.inum(spare.namespace('pod-b'))}]"

    ended = on(spare, "down")
    assert (ended.returncode, left_behind(spare)) == (0, [])


def test_down_takes_the_programs_with_it(spare: Lab) -> None:
    on(spare, "up")
    on(spare, "fault", "vxlan-blocked")
    attached = json.loads(on(spare, "status", "-o", "json").stdout)["attached"]
    ours = {each["id"] for each in attached}
    assert ours <= set(syscall.program_ids())
    assert {each["interface"] for each in attached if each["part"] == "fabric"} == {"node-a", "node-b"}
    on(spare, "down")
    deadline = time.monotonic() + 1
    while ours & set(syscall.program_ids()):
        assert time.monotonic() < deadline


def test_down_on_nothing_says_so(spare: Lab) -> None:
    ended = on(spare, "down")
    assert ended.returncode == 0
    assert "there is no lab" in ended.stderr


def test_a_second_up_is_refused_and_harms_nothing(spare: Lab) -> None:
    on(spare, "up")
    second = on(spare, "up")
    assert second.returncode == 3
    assert second.stderr.splitlines() == [
        f"error: lab {spare.name} is up already",
        f"hint: use it, or remove it with `calitrace lab down --name {spare.name}`",
    ]
    assert json.loads(on(spare, "status", "-o", "json").stdout)["state"] == "up"


def test_two_ups_at_once_make_one_lab(spare: Lab) -> None:
    words = [*COMMAND, "lab", "up", "--name", spare.name]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 3]
    loser = said[[process.returncode for process in both].index(3)]
    assert [line.split(":")[0] for line in loser.splitlines()] == ["error", "hint"]


def test_the_lock_keeps_others_out(spare: Lab) -> None:
    with state.locked(spare):
        assert on(spare, "down").returncode == 3
    spare.lock_file.parent.mkdir(exist_ok=True)
    with spare.lock_file.open("w") as abandoned:
        fcntl.flock(abandoned, fcntl.LOCK_EX)
    assert on(spare, "down").returncode == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 12))
def test_killed_up_leaves_only_what_down_removes(spare: Lab, when: str, number: int) -> None:
    assert struck_up(spare, when, number, signal.SIGKILL).returncode == -signal.SIGKILL
    assert on(spare, "status").returncode in (0, 1)
    assert on(spare, "down").returncode == 0
    assert left_behind(spare) == []


@pytest.mark.parametrize("delay_ms", [0, 15, 40, 80, 120, 250, 500, 1000, 1500, 1700])
def test_up_killed_at_any_moment_leaves_only_what_down_removes(spare: Lab, delay_ms: int) -> None:
    with subprocess.Popen([*COMMAND, "lab", "up", "--name", spare.name], stderr=subprocess.DEVNULL) as process:
        while not spare.state_file.exists():
            assert process.poll() is None
        time.sleep(delay_ms / 1000)
        process.kill()
    assert on(spare, "down").returncode == 0
    assert left_behind(spare) == []


@pytest.mark.parametrize("fatal", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("number", [1, 5, 8, 10, 11])
def test_interrupted_up_rolls_back_by_itself(spare: Lab, fatal: signal.Signals, number: int) -> None:
    ended = struck_up(spare, "after", number, fatal)
    assert ended.returncode == -fatal
    assert f"error: interrupted by {fatal.name}" in ended.stderr
    assert left_behind(spare) == []


def test_a_killed_up_is_seen_as_incomplete(spare: Lab) -> None:
    struck_up(spare, "after", 10, signal.SIGKILL)
    shown = on(spare, "status")
    assert shown.returncode == 1
    assert "incomplete" in shown.stdout
    refused = on(spare, "fault", "rpf")
    assert (refused.returncode, "is incomplete" in refused.stderr) == (3, True)


def test_failed_up_rolls_back(spare: Lab) -> None:
    namesake = spare.namespace("pod-b")
    network.create_namespace(namesake)
    try:
        refused = on(spare, "up")
        assert refused.returncode == 3
        assert refused.stderr.startswith(f"error: there is a network namespace {namesake} that no lab made")
        assert left_behind(spare)[0] == namesake
    finally:
        network.remove_namespace(namesake)


def test_down_spares_a_process_that_took_over_the_pid(spare: Lab) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        try:
            processes.end(state.Server("pod-a", bystander.pid, processes.start_ticks(bystander.pid) + 1))
            assert bystander.poll() is None
        finally:
            bystander.terminate()


def test_down_names_a_process_that_keeps_a_namespace(spare: Lab) -> None:
    on(spare, "up")
    words = [*COMMAND, "lab", "exec", "--name", spare.name, "client", "--", "cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write("hello\n")
        guest.stdin.flush()
        assert guest.stdout.readline() == "hello\n"  # it runs: exec has taken place
        ended = on(spare, "down")
        assert f"process {guest.pid} (cat) still runs in {spare.name}-client" in ended.stderr
        assert guest.poll() is None
        guest.stdin.close()


def test_the_last_of_several_labs_unmounts_bpffs(spare: Lab) -> None:
    # In a mount namespace of its own, with its own /run: other labs neither see this nor are seen.
    script = f"""
        lab() {{ step=$1; name=$2; shift 2; "$@" lab $step --name {spare.name}$name 2>/dev/null || exit 9; }}
        while grep -q ' /sys/fs/bpf bpf ' /proc/mounts; do umount /sys/fs/bpf || exit 8; done
        mount -t tmpfs tmpfs /run || exit 7
        lab up "" "$@"
        lab up -b "$@"
        lab down "" "$@"
        grep -c ' /sys/fs/bpf bpf ' /proc/mounts
        lab down -b "$@"
        grep -c ' /sys/fs/bpf bpf ' /proc/mounts
    """
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *COMMAND]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert ended.stdout.split() == ["1", "0"]


@pytest.mark.parametrize("foreign_pin", [False, True])
def test_bpffs_is_mounted_when_missing_and_unmounted_when_unused(spare: Lab, foreign_pin: bool) -> None:
    # In a mount namespace of its own, with its own /run: other labs neither see this nor are seen.
    script = f"""
        lab() {{ "$@" lab $step --name {spare.name} 2>/dev/null || exit 9; }}
        while grep -q ' /sys/fs/bpf bpf ' /proc/mounts; do umount /sys/fs/bpf || exit 8; done
        mount -t tmpfs tmpfs /run || exit 7
        step=up lab "$@"
        grep -c ' /sys/fs/bpf bpf ' /proc/mounts
        {"mkdir /sys/fs/bpf/foreign" if foreign_pin else ":"}
        step=down lab "$@"
        grep -c ' /sys/fs/bpf bpf ' /proc/mounts
        ls -A /run /run/netns
    """
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *COMMAND]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stdout.split()) == (
        0,
        ["1", "1" if foreign_pin else "0", "/run:", "netns", "/run/netns:"],
    )


def test_exec_leaves_sigpipe_as_the_shell_had_it(spare: Lab) -> None:
    on(spare, "up")
    inside = on(spare, "exec", "client", "--", "grep", "SigIgn", "/proc/self/status")
    assert int(inside.stdout.split()[1], 16) >> (signal.SIGPIPE - 1) & 1 == 0


def test_several_labs_side_by_side(spare: Lab) -> None:
    other = Lab(f"{spare.name}-b")
    try:
        assert on(spare, "up").returncode == 0
        assert on(other, "up", "--mtu", "1400").returncode == 0
        assert on(other, "down").returncode == 0
        assert json.loads(on(spare, "status", "-o", "json").stdout)["state"] == "up"
    finally:
        on(other, "down")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("status",), 0),
        (("heal",), 3),
        (("fault", "rpf"), 3),
        (("exec", "client", "--", "true"), 3),
        (("fault", "nonsense"), 2),
        (("exec", "nowhere", "--", "true"), 2),
        (("up", "--mtu", "100"), 2),
    ],
)
def test_commands_without_a_lab(spare: Lab, words: tuple[str, ...], status: int) -> None:
    ended = on(spare, *words)
    assert ended.returncode == status
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["lab up", "lab log-level", "probe"])
def test_a_demo_that_is_stopped_takes_its_lab_down(number: signal.Signals, step: str) -> None:
    demo = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
    words = [sys.executable, "-W", "ignore", str(demo)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith(f"$ calitrace {step}"):
                break
        run.send_signal(number)
        complaints = run.communicate(timeout=60)[1]
    assert "Traceback" not in complaints
    assert (run.returncode, left_behind(Lab("demo"))) == (128 + number, [])
