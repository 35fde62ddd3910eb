"""A node with 200 pods' interfaces and 10,000 services in its maps, and how long `calitrace check` takes there.

Needs root. The node is a network namespace and a bpffs of its own; both are gone afterwards.
"""

from __future__ import annotations

import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2 import netns as pyroute_netns

from calitrace.kernel import loader, mounts, netns, syscall, tc

INTERFACES, SERVICES, BACKENDS = 200, 10_000, 3
ROUNDS = 3
NODE = f"calitrace-bench-{os.getpid()}"
_HASH, _LPM, _NO_PREALLOC = 1, 11, 1
PROGRAM = "int cali_bench(struct __sk_buff *skb) { return -1; }\n"


@contextmanager
def bpffs() -> Iterator[Path]:
    """A bpffs of our own, mounted elsewhere than the machine's."""
    with tempfile.TemporaryDirectory(prefix="calitrace-bench-") as directory:
        mounts.mount_bpffs(Path(directory))
        try:
            yield Path(directory)
        finally:
            mounts.unmount(Path(directory))


@contextmanager
def pinned(path: Path, kind: int, key_size: int, value_size: int, most: int) -> Iterator[int]:
    """A new map, pinned."""
    descriptor = syscall.map_create(kind, key_size, value_size, most, name=path.name, flags=_NO_PREALLOC)
    try:
        syscall.object_pin(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


def fill(directory: Path, stack: ExitStack) -> None:
    """Services with a cluster IP and a NodePort each, and their backends, as Calico's maps hold them."""
    frontends = stack.enter_context(pinned(directory / "cali_v4_nat_fe3", _LPM, 16, 20, 65536))
    backends = stack.enter_context(pinned(directory / "cali_v4_nat_be", _HASH, 8, 8, 262144))
    routes = stack.enter_context(pinned(directory / "cali_v4_routes", _LPM, 8, 8, 262144))
    stack.enter_context(pinned(directory / "cali_v4_ct4", _HASH, 16, 88, 512000))
    syscall.map_update(routes, struct.pack("<I4s", 16, IPv4Address("10.65.0.0").packed), struct.pack("<I4x", 4))
    syscall.map_update(routes, struct.pack("<I4s", 32, IPv4Address("192.0.2.1").packed), struct.pack("<I4x", 0x18))
    for number in range(SERVICES):
        value = struct.pack("<5I", number, BACKENDS, 0, 0, 0)
        for address, port in (
            (IPv4Address("10.96.0.0") + number, 80),
            (IPv4Address("255.255.255.255"), 20000 + number),
        ):
            syscall.map_update(frontends, struct.pack("<I4sHB5x", 56, address.packed, port, 6), value)
        for ordinal in range(BACKENDS):
            pod = IPv4Address("10.65.0.0") + (number * BACKENDS + ordinal) % 65536
            syscall.map_update(backends, struct.pack("<II", number, ordinal), struct.pack("<4sHxx", pod.packed, 8080))


def attach(route: Any, descriptor: int) -> None:
    """200 interfaces named like pods', in pairs, each with a program at both hooks."""
    names = [f"cali{number:011d}" for number in range(INTERFACES)]
    for left, right in zip(names[::2], names[1::2], strict=True):
        route.link("add", ifname=left, kind="veth", peer=right)
    for name in names:
        index = route.link_lookup(ifname=name)[0]
        route.link("set", index=index, state="up")
        route.tc("add", "clsact", index)
        for parent in tc.HOOKS.values():
            route.tc("add-filter", "bpf", index, fd=descriptor, name="cali_bench", parent=parent, direct_action=True)


def check_s() -> float:
    """Seconds that a run takes, of which it measures for one. Raises SystemExit when a run fails."""
    with ExitStack() as stack:
        directory = stack.enter_context(bpffs())
        pyroute_netns.create(NODE)
        stack.callback(pyroute_netns.remove, NODE)
        fill(directory, stack)
        program = loader.compile_bpf(PROGRAM)
        function = program.load_func(b"cali_bench", program.SCHED_CLS)
        with netns.inside(NODE), IPRoute() as route:
            attach(route, function.fd)
        command = [str(Path(sys.executable).parent / "calitrace"), "check", "--node"]
        times = []
        for _ in range(ROUNDS):
            began = time.monotonic()
            done = subprocess.run(
                [*command, "--netns", NODE, "--bpffs", str(directory)], capture_output=True, text=True, check=False
            )
            times.append(time.monotonic() - began)
            if done.returncode not in (0, 1):
                raise SystemExit(done.stderr)
    return statistics.median(times)
