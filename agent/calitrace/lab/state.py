"""The lab's record on disk: an undo list that is always ahead of what was made, and a lock.

`/run/calitrace/lab-NAME.json` is replaced as a whole before each thing is made. Whatever kills `up`, the file
names everything that may exist; `down` takes each item away if it is there and strikes it off.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from calitrace.errors import EnvironmentUnfit
from calitrace.lab.topology import RUNTIME, UNDERLAY_MTU

if TYPE_CHECKING:
    from pathlib import Path

    from calitrace.lab.topology import Lab

VERSION = 1
MAKING, COMPLETE, REMOVING = "making", "complete", "removing"


@dataclass
class Server:
    """A pod's server process. *start_ticks*: field 22 of /proc/PID/stat; with the pid it names one process."""

    pod: str
    pid: int
    start_ticks: int


@dataclass
class State:
    """What `up` made. *mounted*: mount points that were not there before it, or before other labs."""

    phase: str = MAKING
    mtu: int = UNDERLAY_MTU
    mounted: list[str] = field(default_factory=list)
    namespaces: list[str] = field(default_factory=list)
    pins: str = ""
    directory: str = ""
    servers: list[Server] = field(default_factory=list)
    log_level: str = "off"
    fault: str = ""


def load(lab: Lab) -> State | None:
    """The lab's record, or None where there is none. Raises EnvironmentUnfit for a file that is not one."""
    try:
        raw = lab.state_file.read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError:
        raise EnvironmentUnfit(f"cannot read {lab.state_file}", "run as root") from None
    try:
        content: dict[str, Any] = json.loads(raw)
        if content.pop("version") != VERSION:
            raise ValueError("another version")
        servers = [Server(**each) for each in content.pop("servers")]
        return State(**content, servers=servers)
    except (ValueError, TypeError, KeyError, AttributeError) as wrong:
        raise EnvironmentUnfit(
            f"{lab.state_file} is not a record of this version of calitrace: {wrong}",
            f"remove it, and by hand the namespaces {lab.name}-* and {lab.pins}",
        ) from wrong


def save(lab: Lab, state: State) -> None:
    """Replace the record in one step: a reader or a crash sees the old one or the new one."""
    lab.state_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    draft = lab.state_file.with_suffix(".new")
    draft.write_text(json.dumps({"version": VERSION, **asdict(state)}, indent=1) + "\n")
    draft.replace(lab.state_file)


def mounted_by_labs() -> set[str]:
    """What the labs that are there mounted: the last one to go unmounts it."""
    found: set[str] = set()
    for record in RUNTIME.glob("lab-*.json"):
        with suppress(OSError, ValueError, TypeError, AttributeError):  # it goes meanwhile, or is none of ours
            found.update(json.loads(record.read_bytes()).get("mounted", ()))
    return found


def forget(lab: Lab) -> None:
    """Remove the record. The directory goes with the last lab."""
    lab.state_file.with_suffix(".new").unlink(missing_ok=True)
    lab.state_file.unlink(missing_ok=True)


@contextmanager
def locked(lab: Lab) -> Iterator[None]:
    """Be the only one who changes this lab. Raises EnvironmentUnfit at once when someone else is at it.

    Nobody else may write what is made meanwhile, whatever the umask: root does what the record says.
    """
    before = os.umask(0o022)
    try:
        descriptor = _open_lock(lab.lock_file)
    except BaseException:
        os.umask(before)
        raise
    try:
        yield
    finally:
        os.umask(before)
        lab.lock_file.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # another lab's files are still there
            RUNTIME.rmdir()


def _open_lock(path: Path) -> int:
    while True:
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the directory went with the last lab's lock
        except PermissionError:
            raise EnvironmentUnfit(f"cannot write below {path.parent}", "run as root") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise EnvironmentUnfit(
                f"another calitrace is changing this lab (it holds {path})",
                "wait until it ends, then look with `calitrace lab status`",
            ) from None
        # The holder before us removed the file when it left: a lock on a removed file locks nobody out.
        try:
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            os.close(descriptor)
            continue
        os.close(descriptor)
