"""Starts the pods' servers, and ends exactly those processes."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import netns
from calitrace.lab.servers import LISTENING, RECORDED
from calitrace.lab.state import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from calitrace.lab.topology import Lab

_START_S = 20.0
_STOP_MS = 3000


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 if there is none. Source: proc(5), stat field 22."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_running(server: Server) -> bool:
    """Whether that very process lives; a zombie does not."""
    try:
        fields = Path(f"/proc/{server.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[19]) == server.start_ticks and fields[0] != "Z"


def start(lab: Lab, pod: str, record: Callable[[Server], None]) -> None:
    """Start a pod's server; *record* is called with it before it may do anything. Returns when it listens.

    Raises EnvironmentUnfit with the server's last words when it does not get that far.
    """
    source_root = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join(filter(None, (str(source_root), os.environ.get("PYTHONPATH"))))
    log = lab.directory / f"{pod}.log"
    ours, theirs = socket.socketpair()
    with ours, theirs, log.open("wb") as complaints:
        with netns.inside(lab.namespace(pod)):
            process = subprocess.Popen(
                [sys.executable, "-m", "calitrace.lab.servers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=complaints,
                stderr=complaints,
                cwd="/",
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        theirs.close()
        record(Server(pod, process.pid, start_ticks(process.pid)))
        ours.settimeout(_START_S)
        try:
            ours.send(RECORDED)
            answer = ours.recv(1)
        except OSError:
            answer = b""
    if answer != LISTENING:
        words = log.read_text(errors="replace").strip().splitlines()
        raise EnvironmentUnfit(
            f"the server in {pod} does not start: {words[-1] if words else 'no answer'}",
            "run again with --debug, and tell us",
        )
    process.returncode = 0  # it outlives us: no warning when the object goes


def end(server: Server) -> None:
    """End the recorded process, if it still runs, and wait until it is gone."""
    try:
        handle = os.pidfd_open(server.pid)
    except ProcessLookupError:
        return
    try:
        # Checked behind the handle: from here on the pid cannot become another process's.
        if not is_running(server):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            signal.pidfd_send_signal(handle, number)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            if poll.poll(_STOP_MS):
                return
    except ProcessLookupError:
        return
    finally:
        os.close(handle)


def iter_inside(namespace: str) -> Iterator[tuple[int, str]]:
    """Processes in a network namespace, as (pid, name): they keep it alive after its name is gone."""
    inode = netns.inum(namespace)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "ns/net").stat().st_ino == inode:
                    yield int(entry.name), (entry / "comm").read_text(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
