"""Mounting bpffs, and knowing whether it is mounted."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from calitrace.errors import EnvironmentUnfit

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(rb"\\([0-7]{3})")

_libc = ctypes.CDLL(None, use_errno=True)


def filesystem(mount_point: Path) -> str:
    """The type of the file system mounted exactly there, the topmost if several; empty if none is."""
    found = ""
    for _, path, kind in iter_mounts():
        if path == str(mount_point):
            found = kind
    return found


def iter_mounts() -> Iterator[tuple[str, str, str]]:
    """(what of its file system is mounted, where, type of the file system) of each mount that we see, in their order.

    A path may have bytes that are no text; those that would part words or lines are written in octal.
    """
    for line in MOUNTINFO.read_bytes().split(b"\n")[:-1]:
        before, _, after = line.partition(b" - ")
        root, path = (_OCTAL.sub(lambda found: bytes([int(found[1], 8)]), each) for each in before.split(b" ")[3:5])
        yield os.fsdecode(root), os.fsdecode(path), after.split(b" ")[0].decode()


def mount_bpffs(mount_point: Path) -> None:
    """Mount bpffs. Raises EnvironmentUnfit when the kernel refuses."""
    target = os.fsencode(mount_point)
    if _libc.mount(b"bpf", target, b"bpf", ctypes.c_ulong(0), b"mode=0700"):
        raise EnvironmentUnfit(
            f"cannot mount bpffs at {mount_point}: {os.strerror(ctypes.get_errno())}",
            "run as root on a kernel with CONFIG_BPF_SYSCALL",
        )


def unmount(mount_point: Path) -> bool:
    """Unmount, if nobody uses it; returns whether it is gone."""
    return int(_libc.umount2(os.fsencode(mount_point), 0)) == 0
