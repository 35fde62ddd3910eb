"""What the kernel tells of this machine, in forms that this machine may not have."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calitrace.errors import EnvironmentUnfit
from calitrace.journal import Writer as Journal
from calitrace.journal import read
from calitrace.kernel import loader, mounts, netns, node, syscall, tc
from calitrace.lab import processes, state, topology
from calitrace.lab.state import Server
from calitrace.report.pcapng import Writer


@pytest.mark.parametrize(("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0,2-5\n", 5), ("0-255\n", 256), ("1,3\n", 2)])
def test_possible_cpus_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, count: int) -> None:
    (tmp_path / "possible").write_text(text)
    monkeypatch.setattr(syscall, "_POSSIBLE", tmp_path / "possible")
    assert syscall.possible_cpus() == count


MOUNTS = (
    rb"22 1 0:4 net:[4026532001] /run/netns/with\040blank rw shared:1 - nsfs nsfs rw",
    "23 1 0:4 net:[4026532002] /run/zwölf rw - nsfs nsfs rw".encode(),
    b"24 1 0:4 net:[4026532003] /run/gr\xf6n\xe2\x80\xa8\x0b rw - nsfs nsfs rw",
    b"25 1 0:9 / /mnt/\xff rw - bpf bpf rw",
    b"26 1 0:9 / /mnt/\xff rw - tmpfs x rw",
)


@pytest.fixture
def mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_bytes(b"".join(each + b"\n" for each in MOUNTS))
    monkeypatch.setattr(mounts, "MOUNTINFO", tmp_path / "mountinfo")


@pytest.mark.usefixtures("mountinfo")
def test_a_mount_point_may_be_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "RUN_NETNS", tmp_path / "none")
    named = netns.names()
    assert [os.fsencode(named[4026532001 + each]) for each in range(3)] == [
        b"/run/netns/with blank",
        "/run/zwölf".encode(),
        b"/run/gr\xf6n\xe2\x80\xa8\x0b",
    ]
    assert mounts.filesystem(Path(os.fsdecode(b"/mnt/\xff"))) == "tmpfs"


def test_an_interface_name_may_be_no_text() -> None:
    named: Any = SimpleNamespace(get_attr={"IFLA_IFNAME": b"gr\xf6n"}.get)
    name = tc.interface_name(named)
    assert os.fsencode(name) == b"gr\xf6n"
    Journal(stream := io.BytesIO(), {"interface": name})
    stream.seek(0)
    assert read(stream, keep=True).header["interface"] == name
    assert b"gr\xf6n" in Writer().packet(name, 0, b"", 0, f"at {name}")


@pytest.mark.parametrize(("second", "seen"), [("kthreadd", True), ("sleep", False), ("", False)])
def test_no_reader_of_the_trace_is_known_in_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str, seen: bool
) -> None:
    for pid, name in (("1", "init"), ("2", second), ("self", "python")):
        if name:
            (tmp_path / pid / "fd").mkdir(parents=True)
            (tmp_path / pid / "comm").write_text(name + "\n")
    monkeypatch.setattr(node, "_PROC", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    if seen:
        assert list(node.iter_trace_readers()) == []
    else:
        with pytest.raises(EnvironmentUnfit, match="hostPID"):
            list(node.iter_trace_readers())
    (tmp_path / "1/fd/3").symlink_to("/sys/kernel/tracing/trace_pipe")
    assert [(each.pid, each.name) for each in node.iter_trace_readers()] == [(1, "init")]


def test_the_name_of_a_process_may_be_no_text() -> None:
    before = Path("/proc/self/comm").read_bytes()
    Path("/proc/self/comm").write_bytes("fourteen bytesö".encode()[:15])  # the kernel cuts within a character
    try:
        ticks = processes.start_ticks(os.getpid())
        assert processes.is_running(Server("pod", os.getpid(), ticks))
        assert os.getpid() in dict(processes.iter_inside(f"/proc/{os.getpid()}/ns/net"))
    finally:
        Path("/proc/self/comm").write_bytes(before)


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
