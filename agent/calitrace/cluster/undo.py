"""Putting a changed Kubernetes object back, whatever happens to the process that changed it.

Before the change a record goes to disk: the object, what stood in each field, what we put there. A second process, the
watchdog, holds the record's lock (flock) and puts everything back when its standard input ends (calitrace ended, or was
killed), at the deadline, or on SIGTERM. A record whose lock is free has lost its watchdog: the next start puts it back.
No process id is compared, so none can be taken for another. The records are in /var/lib and not in /run, because the
change is in the cluster and outlives a reboot of this node.

Putting back is safe to repeat. A field that somebody else set to a third value meanwhile is left alone and named.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import subprocess
import syslog
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calitrace.cluster.kubernetes import TIMEOUT_S, ApiRefused, Cluster
from calitrace.errors import EnvironmentUnfit, Error
from calitrace.kernel import child

DIRECTORY = Path("/var/lib/calitrace/undo")
_MAIN = "from pathlib import Path; from calitrace.cluster import undo; undo.main(Path(sys.argv[1]), float(sys.argv[2]))"
START_S = 30.0
LONGEST_PAUSE_S = 30.0
_CONFLICTS = 10


@dataclass(frozen=True)
class Record:
    """One change of the ``spec`` of one object.

    *path*: of the object in the API. *created*: it did not exist. *previous*: the fields as they were, those that were
    absent left out. *ours*: the fields as we set them. *until*: wall clock, seconds. *owner*: process id, for people.
    """

    server: str
    kubeconfig: str
    context: str
    path: str
    created: bool
    previous: dict[str, Any]
    ours: dict[str, Any]
    until: float
    boot_id: str
    owner: int


@dataclass(frozen=True)
class Outcome:
    """What became of one record. *pending*: not put back yet. *text*: one sentence for the user."""

    path: str
    pending: bool
    text: str


def restore(cluster: Cluster, record: Record) -> tuple[bool, list[str]]:
    """Put the object back. Returns whether anything was to be done, and the fields left as somebody else set them.

    Raises ApiRefused.
    """
    for attempt in range(_CONFLICTS):
        current = cluster.find(record.path)
        if current is None:
            return False, []
        spec = current.get("spec") or {}
        version = current["metadata"]["resourceVersion"]
        back, foreign = difference(spec, record)
        try:
            if record.created and not foreign and set(spec) <= set(record.ours):
                cluster.delete(record.path, version)
            elif back:
                cluster.merge(record.path, {"metadata": {"resourceVersion": version}, "spec": back})
            else:
                return False, foreign
        except ApiRefused as refused:
            if refused.status not in (404, 409) or attempt == _CONFLICTS - 1:
                raise
            continue
        return True, foreign
    raise AssertionError("unreachable")


def difference(spec: dict[str, Any], record: Record) -> tuple[dict[str, Any], list[str]]:
    """The merge patch that puts *spec* back, and the fields that are neither as they were nor as we set them."""
    back: dict[str, Any] = {}
    foreign = []
    for name, ours in record.ours.items():
        now, before = spec.get(name), record.previous.get(name)
        if now == before:
            continue
        if now == ours:
            back[name] = replacing(now, before)
        else:
            foreign.append(name)
    return back, foreign


def replacing(now: Any, wanted: Any) -> Any:
    """The merge patch that makes *wanted* (None: absent) of *now*; members that must go are null."""
    if not isinstance(now, dict) or not isinstance(wanted, dict):
        return wanted
    return dict.fromkeys(now) | wanted


def load(path: Path) -> Record:
    """Read a record. Raises EnvironmentUnfit when it is none."""
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as wrong:
        raise EnvironmentUnfit(
            f"{path} is no undo record ({wrong})", "look at the FelixConfiguration of this node, then remove the file"
        ) from wrong


def replay(directory: Path = DIRECTORY) -> list[Outcome]:
    """Put back every record that lost its watchdog; those that cannot be now are kept and said to be pending."""
    outcomes = []
    for path in sorted(directory.glob("*.json")):
        with _free(path) as free:
            if free:
                outcomes.append(_replay(path))
    return outcomes


def _replay(path: Path) -> Outcome:
    try:
        record = load(path)
        with _connect(record) as cluster:
            return _restored(cluster, record, path)
    except Error as failed:
        return Outcome(str(path), True, f"a change of calitrace could not be put back: {failed.cause}")


def _connect(record: Record) -> Cluster:
    """The cluster of the record. Raises EnvironmentUnfit when the kubeconfig leads to another one by now."""
    cluster = Cluster(record.kubeconfig, record.context)
    if cluster.server != record.server:
        raise EnvironmentUnfit(
            f"{record.path.rpartition('/')[2]} was changed on {record.server}, and the kubeconfig says {cluster.server}"
        )
    return cluster


@contextlib.contextmanager
def _free(path: Path) -> Any:
    """Whether nobody guards this record; if so it is ours while we look at it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path.exists()
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _restored(cluster: Cluster, record: Record, path: Path) -> Outcome:
    """Put back, remove the record, say so."""
    foreign = restore(cluster, record)[1]
    path.unlink(missing_ok=True)
    _sync(path.parent)
    name = record.path.rpartition("/")[2]
    text = f"{' and '.join(record.ours)} of FelixConfiguration {name} are as before"
    if foreign:
        text = f"FelixConfiguration {name}: left {', '.join(foreign)} as somebody else set it meanwhile"
    return Outcome(record.path, False, text)


class Watchdog:
    """A record on disk and the process that guards it, both there before anything is changed.

    Raises EnvironmentUnfit when the record cannot be written, one for the same object stands there, or the watchdog
    does not start; then nothing remains. *seconds*: until it puts everything back by itself.
    """

    def __init__(self, record: Record, seconds: float, directory: Path = DIRECTORY) -> None:
        self.record = record
        self.path = directory / (re.sub(r"[^A-Za-z0-9.]+", "-", record.server + record.path) + ".json")
        descriptor = _write(record, self.path)
        try:
            self._process = subprocess.Popen(
                child.command(_MAIN, str(self.path), str(seconds)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it outlives our terminal: it speaks to us by stdout, and to syslog
                pass_fds=(descriptor,),
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as failed:
            self.path.unlink()
            raise EnvironmentUnfit(f"the watchdog cannot be started: {failed}") from failed
        finally:
            os.close(descriptor)
        answer = self._line(START_S)
        if "ready" not in answer:
            self._process.kill()
            self._process.wait()
            self._close_pipes()
            self.path.unlink(missing_ok=True)
            raise EnvironmentUnfit(f"the watchdog cannot work: {answer.get('error', 'it gave no sign of life')}")

    @property
    def pid(self) -> int:
        """Process id of the watchdog."""
        return self._process.pid

    def applied(self) -> None:
        """Tell it that the change has been made and confirmed: no request of ours is on its way any more."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has put back already; close() says so
            self._process.stdin.write(b"applied\n")

    def alive(self) -> bool:
        """Whether it still guards the change: not after the deadline."""
        return self._process.poll() is None

    def close(self, timeout_s: float = 3 * TIMEOUT_S) -> Outcome:
        """Ask it to put everything back and wait; after *timeout_s* it goes on alone."""
        assert self._process.stdin
        self._process.stdin.close()
        answer = self._line(timeout_s)
        if "ended" in answer:  # it ended without a word: somebody killed it, so its lock is free
            self._process.wait()
            with _free(self.path) as free:
                outcome = _replay(self.path) if free else Outcome(self.record.path, False, "put back already")
        elif "text" in answer:
            self._process.wait()
            outcome = Outcome(**answer)
        else:
            text = f"not put back yet: {answer.get('error', 'no answer from the API')}; the watchdog goes on trying"
            outcome = Outcome(self.record.path, True, text)
        self._close_pipes()
        return outcome

    def _line(self, timeout_s: float) -> dict[str, Any]:
        """Its result, or else the last error that it told until *timeout_s*; "ended" in it without result."""
        assert self._process.stdout
        end = time.monotonic() + timeout_s
        answer: dict[str, Any] = {}
        while select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            line = self._process.stdout.readline()
            if not line:
                return answer | {"ended": True}
            answer = json.loads(line)
            if "error" not in answer:
                break
        return answer

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _write(record: Record, path: Path) -> int:
    """Put the record on disk, whole or not at all, and return the descriptor that holds its lock."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as failed:
        raise EnvironmentUnfit(f"cannot write the undo record: {failed}", "run as root") from failed
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.write(descriptor, json.dumps(asdict(record), indent=1).encode())
        os.fsync(descriptor)
        os.link(draft, path)  # unlike a rename it fails when there is one already
        _sync(path.parent)
    except OSError as failed:
        os.close(descriptor)
        if isinstance(failed, FileExistsError):
            raise EnvironmentUnfit(
                f"another calitrace has changed {record.path.rpartition('/')[2]} and has not put it back yet ({path})",
                "wait until it ends",
            ) from failed
        raise EnvironmentUnfit(f"cannot write the undo record: {failed}") from failed
    finally:
        draft.unlink()
    return descriptor


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _told_to_end() -> int:
    """A descriptor that becomes readable on SIGTERM; nothing else happens then, in no place of the program."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    return reader


def _wait(seconds: float, told_to_end: int) -> bool:
    """Until the owner is gone, the time is over, or SIGTERM. Returns whether the change had been confirmed."""
    end = time.monotonic() + seconds
    applied = False
    while ready := select.select([0, told_to_end], [], [], max(end - time.monotonic(), 0))[0]:
        if told_to_end in ready or not os.read(0, 64):
            break
        applied = True
    return applied


def _say(**answer: Any) -> None:
    """One JSON line to the owner, who may be dead, or not listening while the pipe is full."""
    with contextlib.suppress(BrokenPipeError, BlockingIOError):
        os.write(1, json.dumps(answer).encode() + b"\n")


def main(path: Path, seconds: float) -> None:
    """The watchdog, in a process of its own; its owner is at the other end of stdin."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    told_to_end = _told_to_end()
    os.set_blocking(1, False)
    syslog.openlog("calitrace", syslog.LOG_PID, syslog.LOG_DAEMON)
    try:
        record = load(path)
        cluster = _connect(record)
    except Error as failed:
        _say(error=failed.cause)
        return
    _say(ready=True)
    if not _wait(seconds, told_to_end):
        # A request that its sender did not live to see answered may still be on its way: look, wait it out, look again.
        with contextlib.suppress(Error):
            if not restore(cluster, record)[0]:
                select.select([], [], [], TIMEOUT_S)
    pause = 0.2
    while path.exists():  # who removes the record by hand wants no more of it
        try:
            outcome = _restored(cluster, record, path)
        except Error as failed:
            _say(error=failed.cause)
            syslog.syslog(syslog.LOG_WARNING, f"not put back yet: {failed.cause}")
            select.select([], [], [], pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        syslog.syslog(syslog.LOG_NOTICE, outcome.text)
        _say(**asdict(outcome))
