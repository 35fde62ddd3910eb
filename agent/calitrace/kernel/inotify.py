"""Changes of a file, and of what its name stands for, from the kernel: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import select
from typing import TYPE_CHECKING

from calitrace.errors import EnvironmentUnfit

if TYPE_CHECKING:
    from pathlib import Path

_MODIFY, _ATTRIB, _MOVED, _CREATE, _DELETE = 0x2, 0x4, 0xC0, 0x100, 0x200  # include/uapi/linux/inotify.h
_libc = ctypes.CDLL(None, use_errno=True)


class Changes:
    """A context manager that watches the directory of *path*: modified, moved, made, deleted."""

    def __init__(self, path: Path) -> None:
        self._directory = path.parent

    def __enter__(self) -> Changes:
        self._descriptor = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        mask = _MODIFY | _ATTRIB | _MOVED | _CREATE | _DELETE
        if self._descriptor < 0 or _libc.inotify_add_watch(self._descriptor, os.fsencode(self._directory), mask) < 0:
            raise EnvironmentUnfit(f"cannot watch {self._directory}: {os.strerror(ctypes.get_errno())}")
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def wait(self, timeout_ms: int) -> None:
        """Return when something changed, at the latest after *timeout_ms*."""
        if self._poll.poll(timeout_ms):
            os.read(self._descriptor, 65536)
