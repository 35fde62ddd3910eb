"""Without privileges: one clear error, exit code 3, never a traceback."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.root  # else there is nothing to give up
PR_CAPBSET_DROP, CAPABILITIES = 24, 41
COMMAND = (sys.executable, "-W", "ignore", "-c", "from calitrace.cli.main import run; run()")


def give_up() -> None:
    """Root's uid, so that our files stay readable, and no capability from exec on."""
    for capability in range(CAPABILITIES):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@pytest.mark.parametrize(
    "words",
    [
        "log --duration 1",
        "log --source tracefs",
        "log --source trace_pipe",
        "drops --duration 1",
        "drops --top --duration 1",
        "maps conntrack dump",
        "check",
        "probe nodeport 127.0.0.1:80 -c 1 --trace",
        "lab up --name nobody",
    ],
)
def test_who_lacks_a_capability_is_told(words: str) -> None:
    environment = {**os.environ, "HOME": "/nonexistent"}
    command = (*COMMAND, *words.split())
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=give_up, env=environment, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == 3, done.stderr
    if words != "check":  # which lists what it could not look at
        assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
        assert "hint: " in done.stderr


@pytest.mark.parametrize(
    "words", ["drops --duration 1", "log --source tracefs", "check", "lab up --name nobody", "lab status"]
)
def test_root_of_a_user_namespace_is_told(words: str) -> None:
    """It has all capabilities there, which are of no use for BPF."""
    done = subprocess.run(["unshare", "-Ur", *COMMAND, *words.split()], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if words == "lab status" else 3), done.stderr


def test_the_lab_wants_to_configure_networks() -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-net_admin", *COMMAND, "lab", "up", "--name", "nobody"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[1:]) == (3, ["hint: run as root"])
