"""Mounting bpffs, and knowing whether it is mounted."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from calitrace.errors import EnvironmentUnfit

_libc = ctypes.CDLL(None, use_errno=True)


def filesystem(mount_point: Path) -> str:
    """The type of the file system mounted exactly there, the topmost if several; empty if none is."""
    found = ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == str(mount_point):
            found = after.split()[0]
    return found


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
