"""What compiling leaves behind."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from calitrace.kernel import loader

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left(where: Path, name: str, minutes: int) -> Path:
    """A directory of headers, as old as that."""
    found = where / name
    (found / "include").mkdir(parents=True)
    (found / "include" / "types.h").touch()
    then = found.stat().st_mtime - 60 * minutes
    os.utime(found, (then, then))
    return found


def test_directories_of_killed_runs_are_removed(temporary: Path) -> None:
    old = left(temporary, "calitrace-headers-old", 11)
    kept = [
        left(temporary, "calitrace-headers-young", 9),
        left(temporary, "calitrace-report", 11),
        left(temporary, "elsewhere", 11),
    ]
    link = temporary / "calitrace-headers-link"
    link.symlink_to(kept[2])
    os.utime(link, (0, 0), follow_symlinks=False)
    loader._remove_abandoned()
    assert not old.exists()
    assert {each.name for each in temporary.iterdir()} == {link.name, *(each.name for each in kept)}
    assert (kept[2] / "include").is_dir()


def test_another_owner_s_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = left(temporary, "calitrace-headers-old", 11)
    owner = old.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    loader._remove_abandoned()
    assert old.exists()
