"""Files that -w names."""

from __future__ import annotations

import resource
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from calitrace.cli.recording import create
from calitrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def room(size_bytes: int) -> Iterator[None]:
    """What files may have meanwhile, as on a full disk: also what pytest writes to, so within the test only."""
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)


@pytest.mark.parametrize("more", [1, 100_000])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, more: int) -> None:
    """Whether the file finds out when it is written, flushed or closed; what fitted stays."""
    path = tmp_path / "a"

    def write() -> None:
        with room(4096), create(path) as stream:
            stream.write(bytes(4096))
            stream.flush()
            stream.write(bytes(more))

    with pytest.raises(UsageError, match=f"cannot write {path}: File too large") as raised:
        write()
    assert not isinstance(raised.value.__context__, UsageError)
    assert path.stat().st_size == 4096


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        create(tmp_path)
