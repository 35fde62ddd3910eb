"""Network namespaces: names, inode numbers, and entering one.

``ip netns exec`` also remounts /sys, which hides bpffs; entering with setns(2) leaves the mounts alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import mounts

RUN_NETNS = Path("/run/netns")
OURS = "(host)"  # our own, where it has no name
_PROC = Path("/proc")
_OWN = Path("/proc/thread-self/ns/net")
_CLONE_NEWNET = 0x40000000
_WHICH = "list them with `ip netns`, or give a path such as /proc/PID/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str | Path) -> Path:
    """The file that holds a namespace: a name below /run/netns, a path, or a process id; this thread's own for "".

    Raises UsageError when there is no such namespace.
    """
    text = str(name)
    if not text:
        return _OWN
    found = Path(text) if "/" in text else RUN_NETNS / text
    if not found.exists() and text.isdigit():
        found = Path(f"/proc/{text}/ns/net")
    if not found.exists():
        raise UsageError(f"no network namespace {text!r}", _WHICH)
    return found


def inum(name: str | Path) -> int:
    """The inode number that identifies a namespace (what the kernel calls ``net->ns.inum``)."""
    return path(name).stat().st_ino


def own_inum() -> int:
    """The inode number of this thread's namespace."""
    return inum("")


@contextmanager
def inside(name: str | Path) -> Iterator[None]:
    """Enter a network namespace for this thread; sockets opened inside stay there. "": stay in ours.

    Raises UsageError for an unknown namespace, EnvironmentUnfit when the kernel refuses.
    """
    if not str(name):
        yield  # without setns(2), which takes root
        return
    target = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(target, str(name))
            try:
                yield
            finally:
                _setns(home, "the namespace we came from")
        finally:
            os.close(home)
    finally:
        os.close(target)


def _setns(descriptor: int, name: str) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        failure = ctypes.get_errno()
        if failure == errno.EINVAL:
            raise UsageError(f"{name} is no network namespace", _WHICH)
        raise EnvironmentUnfit(
            f"cannot enter network namespace {name}: {os.strerror(failure)}",
            "run as root or with CAP_SYS_ADMIN",
        )


def names() -> dict[int, str]:
    """Inode number to name of every namespace that can be entered.

    The name is that below /run/netns; of our own, if unnamed, `OURS`; of others the path of a file that holds it: where
    it is mounted, or of a process in it.
    """
    found: dict[int, str] = {}
    nsfs = _OWN.stat().st_dev
    if RUN_NETNS.is_dir():
        for entry in sorted(RUN_NETNS.iterdir()):
            try:
                about = entry.stat()
            except OSError:  # someone deletes it while we look
                continue
            if about.st_dev == nsfs:  # else a mount point that was left when its namespace went
                found[about.st_ino] = entry.name
    found.setdefault(own_inum(), OURS)
    for root, path, kind in mounts.iter_mounts():
        if root.startswith("net:[") and kind == "nsfs":
            found.setdefault(int(root[5:-1]), path)
    for process in sorted(int(each.name) for each in _PROC.iterdir() if each.name.isdigit()):
        file = _PROC / str(process) / "ns/net"
        try:
            found.setdefault(file.stat().st_ino, str(file))
        except OSError:  # it ended, or is not ours to look at
            continue
    return found
