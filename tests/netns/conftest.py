"""A lab for the tests that need one, and ways to talk through it."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import netns, syscall
from calitrace.lab import lifecycle
from calitrace.lab.topology import RUNTIME, Lab
from tests.conftest import of_a_dead_run

COMMAND = (sys.executable, "-c", "from calitrace.cli.main import run; run()")
REACHES_S = 5.0
LOST_S = 1.5
_PER_CPU = (5, 6, 10)  # hash, array, LRU hash of enum bpf_map_type
_numbers = itertools.count()


def calitrace(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=False, timeout=120)


@contextlib.contextmanager
def listening(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A live command that has said that it listens; interrupted at the end."""
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("listening to"):
                break
        else:
            raise AssertionError("".join(said))
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)


def on(lab: Lab, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a ``calitrace lab`` command on this lab."""
    return calitrace("lab", command, "--name", lab.name, *words)


def left_behind(lab: Lab) -> list[str]:
    """Whatever of this lab is still on the machine."""
    found = [str(path) for path in (lab.directory, lab.state_file, lab.lock_file, lab.pins) if path.exists()]
    found += [each for each in lab.namespaces if (netns.RUN_NETNS / each).exists()]
    found += [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"{lab.name}-" in line]
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            environment = (process / "environ").read_bytes() if b"calitrace.lab.servers" in words else b""
            if f"CALITRACE_TEST_LAB={lab.name}\0".encode() in environment + b"\0":
                found.append(f"process {process.name}")
    return found


def take_down_labs_of_dead_runs() -> None:
    """Of a run that was killed the lab stays, with its servers."""
    for record in sorted(RUNTIME.glob("lab-test-*.json")):
        name = record.stem.removeprefix("lab-")
        if of_a_dead_run(name):
            with contextlib.suppress(EnvironmentUnfit):  # another run is at it, or it is of another version
                lifecycle.down(Lab(name), progress=lambda _: None)


@pytest.fixture(scope="session", autouse=True)
def _clean() -> None:
    if os.geteuid() == 0:
        take_down_labs_of_dead_runs()


@pytest.fixture
def spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A name for a lab that the test itself brings up; nothing of it is left when the test ends."""
    lab = Lab(f"test-{os.getpid()}-{next(_numbers)}")
    monkeypatch.setenv("CALITRACE_TEST_LAB", lab.name)
    yield lab
    lifecycle.down(lab, progress=lambda _: None)
    assert left_behind(lab) == []


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab that is up, shared by the tests of a module."""
    made = Lab(f"test-{os.getpid()}-{next(_numbers)}")
    lifecycle.up(made, progress=lambda _: None)
    try:
        yield made
    finally:
        lifecycle.down(made, progress=lambda _: None)
    assert left_behind(made) == []


def tcp(lab: Lab, part: str, address: str, port: int, wait_s: float = REACHES_S) -> socket.socket:
    """A TCP connection from one of the lab's namespaces. Raises OSError."""
    with netns.inside(lab.namespace(part)):
        return socket.create_connection((address, port), timeout=wait_s)


def tcp_echo(lab: Lab, part: str, address: str, port: int, payload: bytes) -> bytes:
    """What comes back before the other side has seen and mirrored the end."""
    with tcp(lab, part, address, port) as connection:
        connection.sendall(payload)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def udp_echo(lab: Lab, part: str, address: str, port: int, payload: bytes, wait_s: float = REACHES_S) -> bytes:
    """One datagram and its echo. Raises TimeoutError."""
    with netns.inside(lab.namespace(part)):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(wait_s)
        client.connect((address, port))
        client.send(payload)
        return client.recv(65536)


def http_get(lab: Lab, part: str, address: str, port: int, path: str) -> bytes:
    """The body, after checking that the server said 200 and sent as much as it promised."""
    with tcp(lab, part, address, port) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert f"Content-Length: {len(body)}".encode() in head
    return body


@contextlib.contextmanager
def changed(pin: Path, key: bytes, value: bytes | None) -> Iterator[None]:
    """One entry of a pinned map has another value, or is not there; what was there comes back."""
    descriptor = syscall.object_get(pin)
    try:
        before = syscall.map_lookup(descriptor, key, value_bytes(descriptor))
        put(descriptor, key, value)
        try:
            yield
        finally:
            put(descriptor, key, before)
    finally:
        os.close(descriptor)


def put(descriptor: int, key: bytes, value: bytes | None) -> None:
    """Set an entry, or remove it."""
    if value is None:
        syscall.map_delete(descriptor, key)
    else:
        syscall.map_update(descriptor, key, value)


def value_bytes(descriptor: int) -> int:
    """Size of a map's value as the kernel hands it out: for per-CPU maps of all CPUs together."""
    info = syscall.map_info(descriptor)
    return info.value_size * (syscall.possible_cpus() if info.type in _PER_CPU else 1)


def entry(pin: Path, key: bytes) -> bytes:
    """The value of an entry that is there."""
    descriptor = syscall.object_get(pin)
    try:
        found = syscall.map_lookup(descriptor, key, value_bytes(descriptor))
    finally:
        os.close(descriptor)
    assert found is not None
    return found
