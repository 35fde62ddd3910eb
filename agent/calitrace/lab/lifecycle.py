"""Brings the lab up and takes it down.

`up` writes each thing into the record before making it, and rolls back on any failure or signal. Signals
are noted and acted on between steps, so that a step is either not begun or complete.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from calitrace.errors import EnvironmentUnfit, Error, UsageError
from calitrace.kernel import mounts, syscall
from calitrace.lab import deployment, network, policy, processes, state
from calitrace.lab.state import COMPLETE, MAKING, REMOVING, State
from calitrace.lab.topology import BPFFS, NODES, UNDERLAY_MTU, VXLAN_OVERHEAD, Lab

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    Progress = Callable[[str], None]

_LEAST_MTU, _MOST_MTU = 576 + VXLAN_OVERHEAD, 9000
_KERNELS_OWN = {"maps.debug", "progs.debug"}  # CONFIG_BPF_PRELOAD puts them into every new bpffs


class Interrupted(Error):
    """SIGINT or SIGTERM came; what was begun has been rolled back. *signal_number*: which."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}; nothing is left behind")
        self.signal_number = number


class _Signals:
    """Notes SIGINT and SIGTERM while something must not stop half-way."""

    received = 0
    obeyed = False

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number

    def check(self) -> None:
        if self.received:
            self.obeyed = True
            raise Interrupted(self.received)


@contextmanager
def _noted_signals() -> Iterator[_Signals]:
    noted = _Signals()
    before = {number: signal.signal(number, noted.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted.received and not noted.obeyed:
            os.kill(os.getpid(), noted.received)


def up(lab: Lab, *, mtu: int = UNDERLAY_MTU, progress: Progress) -> None:
    """Make the lab. *mtu*: of the underlay, bytes; the pods get 50 less.

    Raises EnvironmentUnfit when it is there already or the machine does not allow it, Interrupted on a signal;
    both after a roll-back.
    """
    if not _LEAST_MTU <= mtu <= _MOST_MTU:
        raise UsageError(f"MTU {mtu} is out of range", f"choose {_LEAST_MTU} to {_MOST_MTU} bytes")
    held = syscall.capabilities()
    if not held["CAP_SYS_ADMIN"] or not held["CAP_NET_ADMIN"]:
        raise EnvironmentUnfit("the lab makes network namespaces and loads BPF programs", "run as root")
    with _noted_signals() as signals, state.locked(lab):
        found = state.load(lab)
        if found is not None:
            how = "is up" if found.phase == COMPLETE else "is there, incomplete"
            raise EnvironmentUnfit(
                f"lab {lab.name} {how} already",
                f"use it, or remove it with `{lab.command('down')}`",
            )
        for namespace in lab.namespaces:
            if network.namespace_exists(namespace):
                raise EnvironmentUnfit(
                    f"there is a network namespace {namespace} that no lab made",
                    f"remove it with `ip netns delete {namespace}`, or choose another --name",
                )
        made = State(phase=MAKING, mtu=mtu)
        try:
            _make(lab, made, signals.check, progress)
        except BaseException:
            _remove(lab, made)
            raise


def _make(lab: Lab, made: State, checkpoint: Callable[[], None], progress: Progress) -> None:
    missing = mounts.filesystem(BPFFS) != "bpf"
    if missing or str(BPFFS) in state.mounted_by_labs():
        made.mounted.append(str(BPFFS))
        state.save(lab, made)
    if missing:
        mounts.mount_bpffs(BPFFS)
    checkpoint()
    progress("namespaces, links and routes")
    for namespace in lab.namespaces:
        made.namespaces.append(namespace)
        state.save(lab, made)
        network.create_namespace(namespace)
        checkpoint()
    network.build(lab, made.mtu, checkpoint)
    made.directory = str(lab.directory)
    state.save(lab, made)
    for node in NODES:
        lab.policy_directory(node.name).mkdir(parents=True, exist_ok=True)
    policy.write_debug_files(lab, denied=False)
    progress("the dataplane's programs and maps")
    made.pins = str(lab.pins)
    state.save(lab, made)
    for node in NODES:
        deployment.deploy(lab, node, made)
        checkpoint()
    progress("servers in the pods")
    for node in NODES:
        processes.start(lab, node.pod, lambda server: _record(lab, made, server))
        checkpoint()
    made.phase = COMPLETE
    state.save(lab, made)
    checkpoint()


def _record(lab: Lab, made: State, server: state.Server) -> None:
    made.servers.append(server)
    state.save(lab, made)


def down(lab: Lab, *, progress: Progress) -> bool:
    """Remove whatever the record names; returns False when there is no such lab.

    Raises EnvironmentUnfit when something resists; the record then still names it, and `down` can be repeated.
    """
    with _noted_signals(), state.locked(lab):
        found = state.load(lab)
        if found is None:
            return False
        for namespace in found.namespaces:
            if network.namespace_exists(namespace):
                known = {server.pid for server in found.servers}
                for pid, name in processes.iter_inside(namespace):
                    if pid not in known:
                        progress(f"process {pid} ({name}) still runs in {namespace}: end it yourself")
        _remove(lab, found)
        return True


def _remove(lab: Lab, made: State) -> None:
    made.phase = REMOVING
    state.save(lab, made)
    for server in reversed(made.servers):
        processes.end(server)
    for namespace in reversed(made.namespaces):
        network.remove_namespace(namespace)
    if made.pins:
        _remove_pins(Path(made.pins))
    if made.directory:
        shutil.rmtree(made.directory, ignore_errors=True)
    for mount_point in made.mounted:
        if mounts.filesystem(Path(mount_point)) == "bpf" and _is_unused(Path(mount_point)):
            mounts.unmount(Path(mount_point))
    state.forget(lab)


def _remove_pins(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    parent = directory.parent
    if parent.exists() and not any(parent.iterdir()):
        parent.rmdir()


def _is_unused(bpffs: Path) -> bool:
    return {entry.name for entry in bpffs.iterdir()} <= _KERNELS_OWN
