"""Files that -w names."""

from __future__ import annotations

import resource
import signal
from typing import TYPE_CHECKING

import pytest

from calitrace.cli.recording import create
from calitrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def room() -> Iterator[int]:
    """The bytes that files may have meanwhile: as on a full disk."""
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield 4096
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, action)


@pytest.mark.parametrize("more", [1, 100_000])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, room: int, more: int) -> None:
    """Whether the file finds out when it is written, flushed or closed; what fitted stays."""
    path = tmp_path / "a"

    def write() -> None:
        with create(path) as stream:
            stream.write(bytes(room))
            stream.flush()
            stream.write(bytes(more))

    with pytest.raises(UsageError, match=f"cannot write {path}: File too large") as raised:
        write()
    assert not isinstance(raised.value.__context__, UsageError)
    assert path.stat().st_size == room


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        create(tmp_path)
