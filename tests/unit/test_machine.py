"""What the kernel tells of this machine, in forms that this machine may not have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import loader, syscall
from calitrace.lab import state, topology


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0,2-5\n", 5), ("0-255\n", 256), ("1,3\n", 2)])
def test_possible_cpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, count: int) -> None:
    (tmp_path / "possible").write_text(text)
    monkeypatch.setattr(syscall, "_POSSIBLE", tmp_path / "possible")
    assert syscall.possible_cpus() == count


def test_a_lab_is_nobody_elses_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (topology, state):
        monkeypatch.setattr(module, "RUNTIME", tmp_path / "run")
    lab = topology.Lab("open")
    before = os.umask(0)
    try:
        with state.locked(lab):
            state.save(lab, state.State())
            lab.policy_directory("node-a").mkdir(parents=True)
            made = [each.stat().st_mode & 0o022 for each in (tmp_path / "run").rglob("*")]
        assert (len(made), set(made)) == (5, {0})
        assert os.umask(0) == 0
    finally:
        os.umask(before)


def test_no_place_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nonexistent"])
    with pytest.raises(EnvironmentUnfit, match="temporary"), loader.header_tree("struct none;"):
        pass
    with loader.captured_stderr() as log:
        os.write(2, b"said by C")
    assert log.text == "said by C"
