"""A recording: collectors, a thread that empties their ring, and the journal that it fills.

Live is record and report joined: the journal is always written, into memory when no file is named, and the
verdicts are made from it.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from calitrace import __version__, journal
from calitrace.calico import policy, state
from calitrace.decode import Decoder, is_drop
from calitrace.errors import LayoutMismatch, Malformed, UsageError
from calitrace.events import Stat
from calitrace.kernel import discover, headers, symbols
from calitrace.kernel.collectors import Collectors, Plan
from calitrace.model import Drop

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from typing_extensions import Buffer

    from calitrace.btf import Btf
    from calitrace.correlate import walk
    from calitrace.model import Probe, Topology

_POLL_MS = 50
_QUIET_POLLS = 3  # this many polls without an event end the settling
_SETTLE_MS = 2000  # but it never takes longer
_UNREAD = "Calico's own reasons are not read on {}: {}"


class Recording:
    """A context manager: on entry the collectors are attached and reading, on exit they are gone.

    *path*: the journal file, or None for memory. *client*: namespace of the probes, "" for ours.
    Raises UsageError when the file exists, EnvironmentUnfit when the kernel refuses.
    """

    def __init__(self, plan: Plan, *, path: Path | None, client: str, policy_dirs: Iterable[Path] = ()) -> None:
        self._path = path
        self._client = client
        self._policy_dirs = tuple(policy_dirs)
        self._types = headers.kernel_btf()
        self.topology = discover.topology(client)
        if plan.client is not None:
            self.topology = discover.with_ways_back(self.topology, plan.client[0])
        self._plan = replace(
            plan,
            state_bytes=discover.state_sizes(self.topology),
            state_like=tuple(discover.state_maps(self.topology).values()),
        )
        self._warnings = unread_states(self.topology)
        self._collectors = Collectors(self._plan, self._types)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="calitrace-ring", daemon=True)
        self._writing = threading.Lock()
        self._failure: BaseException | None = None
        self._locations: set[int] = set()
        self._idle_polls = 0

    def __enter__(self) -> Recording:
        self._stream: BinaryIO = io.BytesIO() if self._path is None else create(self._path)
        try:
            self._collectors.__enter__()
            self._warnings += watch_state(self._collectors, self.topology)
            self._writer = journal.Writer(self._stream, self._header())
        except BaseException:
            self._collectors.__exit__()
            self._stream.close()
            if self._path is not None:
                self._path.unlink()  # nothing was recorded, and the next try may use the name
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._collectors.__exit__()
        if self._path is not None:
            self._stream.close()

    def _header(self) -> dict[str, Any]:
        return header(self.topology, self._types, self._plan, self._policy_dirs, self._warnings, client=self._client)

    def _read(self) -> None:
        decoder = Decoder(self._plan.vxlan_port)
        try:
            while not self._stop.is_set():
                records = self._collectors.poll(_POLL_MS)
                self._idle_polls = 0 if records else self._idle_polls + 1
                with self._writing:
                    self._writer.events(records)
                drops = filter(is_drop, records)  # to decode all would take so long that the ring overflows
                self._locations.update(e.location for e in decoder.iter_events(drops) if isinstance(e, Drop))
        except BaseException as failure:  # handed to the thread that waits for us
            self._failure = failure

    def settle(self) -> None:
        """Wait until the kernel has nothing more to tell of our packets; bounded."""
        self._idle_polls = 0
        deadline = time.monotonic() + _SETTLE_MS / 1000
        while self._idle_polls < _QUIET_POLLS and time.monotonic() < deadline and self._thread.is_alive():
            self._stop.wait(_POLL_MS / 1000)

    def probe(self, probe: Probe) -> None:
        """Write a probe: when it is sent, and again when its outcome is known. After kill -9 both are there."""
        with self._writing:
            self._writer.write(journal.PROBES, {"probes": [_plain(probe)]})

    def walked(self, netns: int, steps: Iterable[walk.Step]) -> None:
        """Write what the maps of the node in that namespace say about a probe."""
        with self._writing:
            self._writer.write(journal.WALK, {"netns": netns, "steps": [asdict(each) for each in steps]})

    def finish(self) -> journal.Journal:
        """Write the totals, end the journal, and read it back."""
        self.settle()
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self._writer.events(self._collectors.drain())
        self._writer.write(journal.SYMBOLS, {"names": symbols.resolve(self._locations)})
        self._writer.write(journal.TOTALS, self._totals())
        self._writer.write(journal.END, {"mono_ns": time.monotonic_ns()})
        if self._path is None:
            self._stream.seek(0)
            return journal.read(self._stream)
        self._stream.close()
        with self._path.open("rb") as stream:
            return journal.read(stream)

    def _totals(self) -> dict[str, Any]:
        stats = self._collectors.stats()
        programs = self._collectors.programs().values()
        return {
            "stats": {stat.name.lower(): value for stat, value in stats.items()},
            "changed": self._changed(),
            "lost": {
                "drop": stats[Stat.DROP_LOST],
                "hop": stats[Stat.HOP_LOST],
                "log": stats[Stat.LOG_LOST],
                "state": stats[Stat.STATE_LOST],
                "nested": sum(program.recursion_misses for program in programs),
            },
        }

    def _changed(self) -> list[int]:
        """Namespaces that have gone since we looked, or lost an interface."""
        then, now = self.topology.namespaces, discover.topology().namespaces
        return [inum for inum in then if inum not in now or then[inum].links.keys() - now[inum].links.keys()]


def header(
    topology: Topology,
    types: Btf | None,
    plan: Plan,
    policy_dirs: Iterable[Path],
    warnings: list[str],
    client: str = "",
) -> dict[str, Any]:
    """What a journal must know to be read elsewhere. *warnings*: to which those about rule names are added."""
    reasons = types.enum("skb_drop_reason") if types else None
    directories = list(policy_dirs)
    rules, unread = rule_names(directories)
    warnings += unread
    return {
        **origin(),
        "mono_ns": time.monotonic_ns(),
        "wall_ns": time.time_ns(),
        "run_id": plan.run_id,
        "vxlan_port": plan.vxlan_port,
        "client": client,
        "drop_reasons": reasons or {},
        "rules": rules,
        "policy_files": [str(file) for each in directories for file in sorted(each.glob("*.json"))],
        "topology": topology.to_map(),
        "warnings": warnings,
    }


def origin() -> dict[str, str]:
    """Which version, machine and boot a journal is of."""
    return {
        "version": __version__,
        "node": socket.gethostname(),
        "boot_id": discover.boot_id(),
        "kernel": os.uname().release,
    }


def rule_names(directories: Iterable[Path]) -> tuple[dict[int, str], list[str]]:
    """Rule id to its name, out of Felix's policy debug files; and which could not be read."""
    names: dict[int, str] = {}
    unread = []
    for directory in directories:
        for file in sorted(directory.glob("*.json")):
            try:
                names.update(policy.rule_names(file.read_bytes()))
            except (OSError, Malformed) as failure:  # Felix replaces these files as pods come and go
                unread.append(f"no rule names from {file.name}: {failure}")
    return names, unread


def unread_states(topology: Topology) -> list[str]:
    """A warning for each node whose release keeps its state as none that we know does."""
    found = []
    for node in topology.namespaces.values():
        if node.state_map:
            try:
                state.layout(node.state_name, node.state_bytes)
            except LayoutMismatch as unknown:
                found.append(_UNREAD.format(node.name, unknown))
    return found


def watch_state(collectors: Collectors, topology: Topology, *, everywhere: bool = False) -> list[str]:
    """Have Calico's state read at each drop, where we observe or *everywhere*; a warning for each node without."""
    unread = collectors.watch_state(discover.state_maps(topology, everywhere=everywhere))
    return [_UNREAD.format(topology.namespaces[inum].name, why) for inum, why in unread.items()]


class _Output(io.BufferedWriter):
    """A file that names itself when it cannot be written, as on a full disk: once, and not again when it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "x"))
        self._path = path
        self._failed = False

    def write(self, data: Buffer, /) -> int:
        """Raises UsageError."""
        with self._named():
            return super().write(data)

    def flush(self) -> None:
        """Raises UsageError."""
        with self._named():
            super().flush()

    def close(self) -> None:
        """Raises UsageError."""
        failed = self._failed
        try:
            super().close()  # which flushes
        except UsageError:
            if not failed:
                raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as failure:
            self._failed = True
            raise UsageError(f"cannot write {self._path}: {failure.strerror}") from failure


def create(path: Path) -> BinaryIO:
    """A new file. Raises UsageError when it exists or cannot be made, and later when it cannot be written."""
    try:
        return _Output(path)
    except FileExistsError:
        raise UsageError(f"{path} exists already", "name another file, or remove it") from None
    except OSError as failure:
        raise UsageError(f"cannot write {path}: {failure.strerror}") from failure


def _plain(probe: Probe) -> dict[str, Any]:
    return {**asdict(probe), "outcome": probe.outcome.value}


def say(text: str) -> None:
    """Talk, as opposed to data: stderr."""
    sys.stderr.write(text + "\n")
