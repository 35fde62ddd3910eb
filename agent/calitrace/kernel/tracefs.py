"""The kernel's trace buffer as text: a private tracefs instance, or the global trace_pipe.

A private instance has a buffer, a clock and a filter of its own and takes nothing from anybody: since Linux v5.9
bpf_trace_printk is a trace event that any instance can enable. Reading the global trace_pipe consumes what is read.
An instance does not hang on a file descriptor: a child of ours removes it when we are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from calitrace.errors import EnvironmentUnfit

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_EVENT = "events/bpf_trace/bpf_trace_printk"
_NR_FSOPEN = {"x86_64": 430, "aarch64": 430}
_FSCONFIG_CMD_CREATE = 6
_BUFFER_KIB = 8192  # of each CPU
_PLACES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
# A new instance has the options of the global buffer, which are as somebody else left them.
_OPTIONS = {
    "bin": 0,
    "context-info": 1,
    "fields": 0,
    "hex": 0,
    "irq-info": 1,
    "latency-format": 0,
    "raw": 0,
    "verbose": 0,
}
_libc = ctypes.CDLL(None, use_errno=True)


class Tracefs:
    """A way into tracefs: where it is mounted, or a mount of our own that nobody sees and that goes with us."""

    def __init__(self) -> None:
        self._descriptor = -1
        self.root = next((place for place in _PLACES if (place / "trace_pipe").exists()), None) or self._detached()

    def _detached(self) -> Path:
        """Mount it without a place in the tree. Linux commit 24dcb3d90a1f ("vfs: syscall: Add fsopen()") (in v5.2)."""
        number = _NR_FSOPEN.get(platform.machine())
        if number is None:
            raise EnvironmentUnfit("tracefs is not mounted", "mount -t tracefs tracefs /sys/kernel/tracing")
        context = _libc.syscall(number, b"tracefs", 0)
        if context >= 0:
            _libc.syscall(number + 1, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            self._descriptor = _libc.syscall(number + 2, context, 0, 0)
            os.close(context)
        if self._descriptor < 0:
            raise EnvironmentUnfit(
                f"tracefs is not mounted, and cannot be: {os.strerror(ctypes.get_errno())}",
                "run as root; or mount -t tracefs tracefs /sys/kernel/tracing",
            )
        return Path(f"/proc/self/fd/{self._descriptor}")

    def close(self) -> None:
        """Let go of a mount of our own."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


class TracePipe:
    """The global trace_pipe: *fd* gives its text. Who reads it takes the lines from all other readers."""

    def __init__(self) -> None:
        self._tracefs = Tracefs()
        self.lost = 0  # the kernel says it in the text itself: CPU:n [LOST m EVENTS]

    def __enter__(self) -> TracePipe:
        self.fd = _open(self._tracefs.root / "trace_pipe")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        self._tracefs.close()


class Instance:
    """A private trace buffer with every line of bpf_trace_printk. *interfaces*: only lines that name one of them.

    Raises EnvironmentUnfit where the kernel has no such event.
    """

    def __init__(self, interfaces: Iterable[str] = ()) -> None:
        self._tracefs = Tracefs()
        # In containers many processes have the same id.
        owner = f"{os.getpid()}-{Path('/proc/self/ns/pid').stat().st_ino}"
        self._path = self._tracefs.root / "instances" / f"calitrace-{owner}"
        # A tag may be cut to 8 characters; what is matched too much the reader sorts out.
        self._filter = " || ".join(f'bpf_string ~ "*{name[:8]}*"' for name in interfaces)
        self._lock = self._guard = -1
        self._guard_pid = 0

    def __enter__(self) -> Instance:
        root = self._tracefs.root
        if not (root / _EVENT).exists():
            self._tracefs.close()
            raise EnvironmentUnfit(
                "this kernel does not trace bpf_trace_printk as an event (Linux v5.9 does)",
                "read the global trace_pipe: --source trace_pipe",
            )
        try:
            with _locked(root / "instances"):  # one run at a time: ours is no orphan before it is locked
                _remove_orphans(root / "instances")
                self._path.mkdir()
                self._lock = _lock(self._path)
        except OSError as failure:
            self._tracefs.close()
            raise EnvironmentUnfit(f"cannot make a tracefs instance: {failure.strerror}", "run as root") from failure
        self._watch()
        try:
            self._write("trace_clock", "mono")
            for name, value in _OPTIONS.items():
                if (self._path / "options" / name).exists():
                    self._write(f"options/{name}", str(value))
            self._write("buffer_size_kb", str(_BUFFER_KIB))
            if self._filter:
                self._write(f"{_EVENT}/filter", self._filter)
            self.fd = _open(self._path / "trace_pipe")
            self._write(f"{_EVENT}/enable", "1")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)
        _remove(self._path)
        os.close(self._guard)
        os.waitpid(self._guard_pid, 0)
        os.close(self._lock)
        self._tracefs.close()

    def disable(self) -> None:
        """Take no more events; what is in the buffer can still be read."""
        self._write(f"{_EVENT}/enable", "0")

    def _write(self, name: str, value: str) -> None:
        try:
            (self._path / name).write_text(value)
        except OSError as failure:
            raise EnvironmentUnfit(f"tracefs refuses {value!r} for {name}: {failure.strerror}") from failure

    def _watch(self) -> None:
        """A child that ends when our end of a pipe closes, and removes the instance if that was because we died."""
        theirs, self._guard = os.pipe()
        parent = os.pidfd_open(os.getpid())
        self._guard_pid = os.fork()
        if self._guard_pid:
            os.close(theirs)
            os.close(parent)
            return
        status = 1
        try:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
            os.close(self._guard)
            os.read(theirs, 1)
            if self._path.exists():
                select.select([parent], [], [])  # with it goes the last reader of the instance
                _remove(self._path)
            status = 0
        finally:
            os._exit(status)

    @property
    def lost(self) -> int:
        """Events that the buffer had no room for, by the kernel's own count."""
        total = 0
        for stats in self._path.glob("per_cpu/cpu*/stats"):
            for line in stats.read_text().splitlines():
                name, _, value = line.partition(": ")
                total += int(value) if name in ("overrun", "dropped events") else 0
        return total


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as failure:
        raise EnvironmentUnfit(f"cannot open {path}: {failure.strerror}", "run as root") from failure


def _lock(directory: Path, how: int = fcntl.LOCK_EX) -> int:
    """A descriptor that holds the lock of a directory, in this process and in those that it forks. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _locked(directory: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    descriptor = _lock(directory, how)
    try:
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Unless somebody else reads it: then a later run does."""
    with contextlib.suppress(OSError):
        (path / _EVENT / "enable").write_text("0")
        path.rmdir()


def _remove_orphans(instances: Path) -> None:
    """Instances of processes that are gone, and of whom the guard was killed too: nobody holds their locks.

    Process ids would not tell: other containers' are not to be seen.
    """
    for path in instances.glob("calitrace-*"):
        with contextlib.suppress(OSError), _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove(path)
