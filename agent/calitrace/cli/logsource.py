"""The inputs of ``calitrace log``: each gives lines in batches, and says what was lost.

An empty chunk or batch says that time has passed and nothing came.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calitrace import __version__, journal, sources
from calitrace.calico import pods
from calitrace.calico.log import Reader
from calitrace.decode import Decoder
from calitrace.errors import EnvironmentUnfit, LayoutMismatch, Malformed, UsageError
from calitrace.events import Stat
from calitrace.model import LogLine, Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from contextlib import ExitStack
    from typing import TypeAlias

    from calitrace.calico.log import Line
    from calitrace.kernel.tracefs import Instance

    Lines: TypeAlias = Generator[Line, None, None]

TICK_MS = 100
_RING_BYTES = 16 * 1024 * 1024


def iter_descriptor(descriptor: int, timeout_ms: int) -> Iterator[bytes]:
    """What can be read, until the end; an empty chunk after *timeout_ms* of silence."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(timeout_ms):
            yield b""
            continue
        try:
            chunk = os.read(descriptor, sources.CHUNK_BYTES)
        except BlockingIOError:
            yield b""
            continue
        if not chunk:
            return
        yield chunk


def iter_followed(path: Path, wait: Callable[[], None]) -> Iterator[bytes]:
    """A file from its beginning, for ever. A rotated or truncated one is begun anew, and a cut last line ended.

    *wait* returns when something may have changed, or after a while. Raises UsageError when it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as failure:
        raise UsageError(f"cannot read {path}: {failure.strerror}") from failure
    last = b"\n"
    try:
        while True:
            chunk = os.read(descriptor, sources.CHUNK_BYTES)
            if chunk:
                last = chunk[-1:]
                yield chunk
                continue
            mine = os.fstat(descriptor)
            if mine.st_size < os.lseek(descriptor, 0, os.SEEK_CUR):
                os.lseek(descriptor, 0, os.SEEK_SET)
            elif _is_another(path, mine):
                os.close(descriptor)
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                yield b""
                wait()
                continue
            if last != b"\n":
                last = b"\n"
                yield last
    finally:
        os.close(descriptor)


def _is_another(path: Path, mine: os.stat_result) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:  # between the move and the new file
        return False
    return (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino)


def _none() -> Lines:
    yield from ()


@dataclass
class Input:
    """An open source. *batches*: lines as they come, an empty batch when nothing came for a while."""

    reader: Reader
    batches: Iterator[Lines]
    lost: Callable[[], int]  # events, as far as is known
    live: str = ""  # what is listened to, where it is the kernel
    last: Callable[[], Lines] = _none  # what the kernel still holds when a live run ends


def open_file(name: str, reader: Reader, *, follow: bool, path: Path | None, stack: ExitStack) -> Input:
    """A text file, a gzip file, a journal, or ``-``. *path*: where to record. Raises UsageError."""
    if follow:
        from calitrace.kernel.inotify import Changes

        changes = stack.enter_context(Changes(Path(name)))
        chunks = iter_followed(Path(name), lambda: changes.wait(TICK_MS))
    elif name == "-":
        chunks = iter_descriptor(sys.stdin.fileno(), TICK_MS)
    else:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
        except OSError as failure:
            raise UsageError(f"cannot read {name}: {failure.strerror}") from failure
        if Path(name).is_dir():
            raise UsageError(f"cannot read {name}: Is a directory")
        chunks = iter_descriptor(descriptor, TICK_MS)
    is_journal, chunks = sources.told_apart(chunks, name)
    if not is_journal:
        return Input(reader, _texts(chunks, reader, _writer(path, stack, {})), lambda: reader.events_lost)
    if path is not None:
        raise UsageError(f"{name} is a journal already", "copy it")
    recorded = Recorded(reader)
    return Input(reader, recorded.batches(chunks, name), lambda: recorded.lost + reader.events_lost)


def pods_prefixes() -> tuple[str, ...]:
    """How the names of pods' interfaces begin here, as far as Calico's ifstate maps can be asked."""
    from calitrace.calico import maptables
    from calitrace.kernel import maps

    rows: list[dict[str, Any]] = []
    try:
        for raw in map(maps.read, maps.named("cali_iface")):
            with suppress(LayoutMismatch):
                rows += maptables.iter_entries(raw, maptables.resolve(raw))
    except (EnvironmentUnfit, OSError):  # a log can be read with less privilege than a map
        return ()
    return pods.prefixes((each["name"], bool(each["flags"] & pods.WORKLOAD)) for each in rows)


def open_live(
    source: str, reader: Reader, *, interfaces: tuple[str, ...], path: Path | None, stack: ExitStack
) -> Input:
    """The kernel's lines as they are printed. Raises EnvironmentUnfit when the named source is not to be had."""
    from calitrace.cli.recording import say

    if source in ("auto", "bpf"):
        try:
            return _open_bpf(reader, path, stack)
        except EnvironmentUnfit as failure:
            if source == "bpf":
                raise
            say(f"warning: {failure.cause}; reading a private trace buffer instead")
    from calitrace.kernel.tracefs import Instance, TracePipe

    if source != "trace_pipe":
        try:
            instance = stack.enter_context(Instance([] if any("*" in each for each in interfaces) else interfaces))
            chunks = iter_descriptor(instance.fd, TICK_MS)
            texts = _texts(chunks, reader, _writer(path, stack, {}))
            # The kernel counts what it also says in the text, where we come to the place.
            return Input(
                reader,
                texts,
                lambda: max(instance.lost, reader.events_lost),
                "a private trace buffer",
                lambda: _rest(texts, instance),
            )
        except EnvironmentUnfit as failure:
            if source == "tracefs":
                raise
            say(f"warning: {failure.cause}; reading the global trace_pipe instead")
    say("warning: reading trace_pipe takes its lines from every other reader")
    pipe = stack.enter_context(TracePipe())
    texts = _texts(iter_descriptor(pipe.fd, TICK_MS), reader, _writer(path, stack, {}))
    return Input(reader, texts, lambda: reader.events_lost, "the global trace_pipe")


def _open_bpf(reader: Reader, path: Path | None, stack: ExitStack) -> Input:
    from calitrace.kernel import discover, headers
    from calitrace.kernel.collectors import Collectors, Plan

    types = headers.kernel_btf()
    plan = Plan(drop=False, hop=False, log="stream", ring_bytes=_RING_BYTES)
    collectors = stack.enter_context(Collectors(plan, types))

    def lost() -> int:
        nested = sum(program.recursion_misses for program in collectors.programs().values())
        return collectors.stats()[Stat.LOG_LOST] + nested

    def records() -> Iterator[list[bytes]]:
        while True:
            yield collectors.poll(TICK_MS)

    writer = _writer(path, stack, {"topology": discover.topology("").to_map()} if path else {})
    if writer is not None:
        stack.callback(lambda: writer.write(journal.TOTALS, {"lost": {"log": lost()}}))
    decoder = Decoder()
    return Input(
        reader,
        _events(decoder, records(), reader, writer),
        lost,
        "tracepoint bpf_trace_printk",
        lambda: next(_events(decoder, [collectors.drain()], reader, writer)),
    )


def _rest(texts: Iterator[Lines], instance: Instance) -> Lines:
    """Everything up to the first silence of a buffer that takes no more."""
    instance.disable()
    for batch in texts:
        lines = list(batch)
        if not lines:
            return
        yield from lines


def _texts(chunks: Iterable[bytes], reader: Reader, writer: journal.Writer | None) -> Iterator[Lines]:
    lines = sources.Lines()
    for chunk in chunks:
        if writer is not None and chunk:
            writer.write(journal.TEXT, {"raw": chunk})
        yield reader.read(lines.feed(chunk))
    yield reader.read(lines.flush())


def _events(
    decoder: Decoder, batches: Iterable[list[bytes]], reader: Reader, writer: journal.Writer | None
) -> Iterator[Lines]:
    for records in batches:
        if writer is not None:
            writer.events(records)
        yield _lines(decoder, records, reader)


def _lines(decoder: Decoder, records: list[bytes], reader: Reader) -> Lines:
    for event in decoder.iter_events(records):
        if isinstance(event, LogLine):
            yield from reader.lines(event)


class Recorded:
    """The lines of a journal: text that was read, or events that came from the kernel. *lost*: by its totals."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.lost = 0

    def batches(self, chunks: Iterable[bytes], name: str) -> Iterator[Lines]:
        """Raises UsageError where the journal is damaged, after what could be read."""
        decoder, lines = Decoder(), sources.Lines()
        try:
            for _, kind, body in journal.iter_frames(chunks):
                if kind == journal.HEADER:
                    known = Topology.from_map(body.get("topology", [])).namespaces.values()
                    links = [link for each in known for link in each.links.values()]
                    self._reader.prefixes += pods.prefixes((each.name, each.workload) for each in links)
                elif kind == journal.EVENTS:
                    yield _lines(decoder, body["raw"], self._reader)
                elif kind == journal.TEXT:
                    yield self._reader.read(lines.feed(body["raw"]))
                elif kind == journal.TOTALS:
                    self.lost = journal.checked_totals(body).get("lost", {}).get("log", 0)
        except Malformed as wrong:
            raise UsageError(f"{name}: {wrong.cause}", "what could be read was used") from wrong
        yield self._reader.read(lines.flush())


def _writer(path: Path | None, stack: ExitStack, more: dict[str, Any]) -> journal.Writer | None:
    """The journal that -w names, ended when the stack is left."""
    if path is None:
        return None
    from calitrace.cli.recording import create

    stream = stack.enter_context(create(path))
    header = {
        "version": __version__,
        "node": socket.gethostname(),
        "kernel": os.uname().release,
        "mono_ns": time.monotonic_ns(),
        "wall_ns": time.time_ns(),
    }
    writer = journal.Writer(stream, {**header, **more})
    stack.callback(lambda: writer.write(journal.END, {"mono_ns": time.monotonic_ns()}))
    return writer
