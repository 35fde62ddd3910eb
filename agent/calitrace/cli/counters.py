"""``calitrace counters``: what Calico and the kernel count of lost packets, and how fast it grows."""

from __future__ import annotations

import select
import signal
import socket
import sys
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from calitrace.cli.terminal import columns
from calitrace.errors import Exit, Malformed, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from calitrace.correlate.counters import Reading
    from calitrace.kernel.counters import Reader
    from calitrace.report.counters import Choice

_UNATTENDED_S = 60.0  # a live run ends by itself where no terminal is attached


@click.command(
    "counters",
    epilog="""\b
Examples:
  calitrace counters                  totals since boot
  calitrace counters 1                and then what is counted each second
  calitrace counters 10 7 -i 'cali*'  a minute of the pods' interfaces
  calitrace counters 1 -w incident.calitrace
  calitrace counters -r incident.calitrace -o json
""",
)
@click.argument("interval", type=click.FloatRange(min=0.05), required=False)
@click.argument("count", type=click.IntRange(min=1), required=False)
@click.option("-i", "--interface", "interfaces", multiple=True, help="Only this interface; may be a pattern: 'cali*'.")
@click.option("--netns", default="", help="Network namespace of the node.  [default: ours]")
@click.option(
    "--bpffs", type=click.Path(path_type=Path), help="The bpffs, or directory in it, with its maps.  [default: its own]"
)
@click.option("--tcx", is_flag=True, help="Also count what tcx programs drop, which the kernel does not.")
@click.option("--all", "everything", is_flag=True, help="Also where nothing was counted.")
@click.option("-r", "--read", "source", type=click.Path(path_type=Path, dir_okay=False), help="Read a journal.")
@click.option("-w", "--write", "target", type=click.Path(path_type=Path, dir_okay=False), help="Record a journal.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(
    interval: float | None,
    count: int | None,
    interfaces: tuple[str, ...],
    netns: str,
    bpffs: Path | None,
    tcx: bool,
    everything: bool,
    source: Path | None,
    target: Path | None,
    output: str,
) -> int:
    """Show what Calico and the kernel count of lost packets: first since boot, then every INTERVAL seconds.

    Calico's reasons by interface and hook, what programs dropped at clsact hooks, drops and errors of interfaces,
    qdiscs and the CPUs' softnet queues. COUNT is the number of tables, the first included; without it they go on
    until Ctrl-C, or for 60 seconds where stdout is no terminal. Rows without anything counted are left out.
    """
    from calitrace.report.counters import Choice

    if tcx and interval is None:
        raise UsageError("--tcx counts only while calitrace runs", "give an INTERVAL")
    choice = Choice(interfaces, everything)
    if source is not None:
        if interval is not None or target is not None:
            raise UsageError("-r shows readings as they were taken", "leave out INTERVAL, COUNT and -w")
        _show(_replay(source), choice, output)
        return int(Exit.DONE)
    from calitrace.kernel.counters import Reader

    with ExitStack() as stack:
        reader = stack.enter_context(Reader(netns, bpffs, tcx=tcx))
        writer = None
        if target is not None:
            from calitrace.cli.recording import create

            writer = _Writer(stack.enter_context(create(target)))
        _show(_live(reader, interval, count, writer), choice, output)
    return int(Exit.DONE)


def _show(readings: Iterable[Reading], choice: Choice, output: str) -> None:
    from calitrace.report import counters as report
    from calitrace.report.folding import folded

    before = None
    said: set[str] = set()
    for reading in readings:
        found = report.table(before, reading, choice)
        clock = datetime.fromtimestamp(reading.wall_ns / 1e9).astimezone().strftime("%H:%M:%S")
        for line in report.iter_json(found) if output == "json" else report.iter_text(found, clock):
            click.echo(line)
        for note in report.iter_notes(found):
            if note not in said:
                click.echo("\n".join(folded(f"note: {note}", columns(sys.stderr), 6)), err=True)
                said.add(note)
        before = reading


def _live(reader: Reader, interval: float | None, count: int | None, writer: _Writer | None) -> Iterator[Reading]:
    """Readings, *interval* apart; they end after *count*, on a signal, or where nobody looks."""
    signals = []

    def asked(number: int, _: object) -> None:
        signals.append(number)
        if len(signals) > 1:  # we wait for somebody who does not read what we print
            raise KeyboardInterrupt

    with ExitStack() as stack:
        # A handler must not set an Event: it may have interrupted that Event's wait, which holds the lock.
        stopped, stop = (stack.enter_context(each) for each in socket.socketpair())
        stop.setblocking(False)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(stop.fileno()))
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, asked))
        due, used, taken = time.monotonic(), time.process_time(), 0
        end = due + _UNATTENDED_S if count is None and not sys.stdout.isatty() else None
        while True:
            reading = reader.read()
            if writer is not None:
                writer.write(reading)
            taken += 1
            yield reading
            if interval is None or taken == count or (end is not None and due + interval > end):
                break
            due = max(due + interval, time.monotonic())  # what was missed, as when we were stopped, is not made up for
            if select.select([stopped], [], [], max(due - time.monotonic(), 0))[0]:
                break
        if writer is not None:
            writer.end()
    if interval is not None:
        used = time.process_time() - used
        click.echo(f"{taken} readings; our cost {used / taken * 1000:.1f} ms of a CPU each", err=True)


class _Writer:
    """A journal of readings."""

    def __init__(self, stream: BinaryIO) -> None:
        from calitrace import journal
        from calitrace.cli.recording import origin

        self._journal = journal.Writer(stream, {"purpose": "counters", **origin()})

    def write(self, reading: Reading) -> None:
        """Append one."""
        from calitrace.checks.snapshot import to_plain
        from calitrace.journal import COUNTERS

        self._journal.write(COUNTERS, to_plain(reading))

    def end(self) -> None:
        """Say that it is complete."""
        from calitrace.journal import END

        self._journal.write(END, {})


def _replay(path: Path) -> Iterator[Reading]:
    from calitrace.cli.report import load
    from calitrace.correlate.counters import readings

    found = load(path, keep=True)
    if not found.counters:
        raise UsageError(f"{path} has no readings of counters", "is it a file that `calitrace counters -w` wrote?")
    try:
        yield from readings(found.counters)
    except Malformed as wrong:
        raise UsageError(f"{path}: {wrong.cause}") from wrong
    if found.gap:
        click.echo(f"note: {path} {found.gap}", err=True)
