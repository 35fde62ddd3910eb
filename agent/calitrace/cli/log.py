"""``calitrace log``: Calico's debug log, put together into packets."""

from __future__ import annotations

import fnmatch
import json
import signal
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calitrace.calico import WORKLOAD_PREFIX
from calitrace.cli.terminal import columns
from calitrace.errors import Exit, UsageError

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    from calitrace.calico.log import Line
    from calitrace.calico.passage import Passage
    from calitrace.cli.logsource import Input
    from calitrace.cluster.felix import DebugLevel
    from calitrace.kernel.pcap import Filter

_UNATTENDED_S = 60.0  # a live run ends by itself where no terminal is attached
_LOOK_EVERY_S = 2.0
_GRACE_S = 120.0
_COLOURS = {"DENY": "red", "": "yellow"}


@click.command(
    "log",
    epilog="""\b
Examples:
  calitrace log       every packet, live
  calitrace log -i cali1a2b3c4d5e6 --verdict deny -v
  calitrace log --hook ingress host 10.0.0.1 and port 80
  calitrace log -r trace_pipe.txt.gz --stats
  ssh node-b bpftool prog tracelog | calitrace log -r - -o json
""",
)
@click.argument("expression", nargs=-1, metavar="[PCAP FILTER]")
@click.option("-i", "--interface", "interfaces", multiple=True, help="Only this interface; may be a pattern: 'cali*'.")
@click.option(
    "--interface-prefix",
    default=WORKLOAD_PREFIX,
    show_default=True,
    help="How the names of pods' interfaces begin, as Felix's interfacePrefix; may be several: eni,azv. Live, "
    "Calico's maps tell it too.",
)
@click.option("--verdict", type=click.Choice(["allow", "deny", "none"]), help="Only passages that ended so.")
@click.option("--hook", type=click.Choice(["ingress", "egress", "xdp"]), help="Only this hook, in the kernel's words.")
@click.option(
    "-r", "--read", "inputs", metavar="FILE", help="Read a text file (gzip too), a journal, or - for standard input."
)
@click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="With -r FILE: go on as it grows, and when it is rotated, as live runs do.",
)
@click.option(
    "--source",
    type=click.Choice(["auto", "bpf", "tracefs", "trace_pipe"]),
    default="auto",
    show_default=True,
    help="Live: a BPF tracepoint, a private trace buffer, or the global trace_pipe, whose lines we then consume.",
)
@click.option("-c", "--count", type=click.IntRange(min=1), help="End after this many packets.")
@click.option(
    "--duration", type=click.FloatRange(min=0), help="End after this many seconds.  [default: 60 without a terminal]"
)
@click.option("-w", "--write", "path", type=click.Path(path_type=Path, dir_okay=False), help="Record a journal.")
@click.option("-o", "--output", type=click.Choice(["table", "compact", "json"]), default="table", show_default=True)
@click.option("--stats", is_flag=True, help="Only the statistics, at the end.")
@click.option("--all", "everything", is_flag=True, help="Also lines that belong to no packet.")
@click.option("-v", "--verbose", is_flag=True, help="Explain each packet, and show its lines.")
@click.option(
    "--enable-debug", is_flag=True, help="Set bpfLogLevel=Debug on this node for the time of the run, and put it back."
)
@click.option("--allow-system-changes", "allowed", is_flag=True, help="Allow --enable-debug to do so.")
@click.option("--node", default="", help="This node's name in Kubernetes.  [default: the host's]")
@click.option(
    "--netns", default="", help="Network namespace of Calico's programs, for --enable-debug.  [default: ours]"
)
@click.option("--kubeconfig", default="", help="For --enable-debug.  [default: as kubectl]")
@click.option(
    "--vxlan-port",
    default=4789,
    type=click.IntRange(1, 65535),
    show_default=True,
    help="Felix's vxlanPort, for --enable-debug.",
)
@click.option("--force", is_flag=True, help="Also where Debug is known to cut the network or to print nothing.")
def command(**options: Any) -> int:
    """Read Calico's debug log and put its lines together into packets.

    A line of output is one packet in one of Calico's programs. Calico writes the log when bpfLogLevel is Debug.
    A PCAP FILTER sees the addresses and ports that were logged, before and after NAT, and nothing else of a packet.
    """
    settings = Settings(**options)
    settings.validate()
    return _Session(settings).run()


@dataclass(frozen=True)
class Settings:
    """The options, as given."""

    expression: tuple[str, ...]
    interfaces: tuple[str, ...]
    verdict: str | None
    hook: str | None
    inputs: str | None
    follow: bool
    source: str
    count: int | None
    duration: float | None
    path: Path | None
    output: str
    stats: bool
    everything: bool
    verbose: bool
    enable_debug: bool
    allowed: bool
    node: str
    netns: str
    kubeconfig: str
    vxlan_port: int
    force: bool
    interface_prefix: str

    def validate(self) -> None:
        """Raises UsageError for options that contradict each other."""
        if self.inputs is not None and self.source != "auto":
            raise UsageError("--source is for live runs", "leave out -r or --source")
        if not all(self.interface_prefix.split(",")):
            raise UsageError("--interface-prefix is empty", "it is Felix's interfacePrefix: cali, eni or the like")
        if self.enable_debug and self.inputs is not None:
            raise UsageError("--enable-debug is for live runs", "leave out -r or --enable-debug")

    @property
    def seconds(self) -> float | None:
        """How long a run lasts, None for as long as the user likes."""
        if self.duration is not None or self.inputs is not None:
            return self.duration
        # What changes the node ends by itself, whoever may be watching.
        return None if sys.stdout.isatty() and not self.enable_debug else _UNATTENDED_S

    def wants(self, passage: Passage) -> bool:
        """Whether a passage passes the filters, but for the pcap expression."""
        if self.verdict and passage.verdict.lower() != ("" if self.verdict == "none" else self.verdict):
            return False
        if self.hook and passage.tag.hook != self.hook:
            return False
        return not self.interfaces or any(_is_named(passage, name) for name in self.interfaces)


def _is_pattern(name: str) -> bool:
    return any(special in name for special in "*?[")


def _is_named(passage: Passage, name: str) -> bool:
    if _is_pattern(name):
        return fnmatch.fnmatchcase(passage.interface, name)
    return passage.tag.is_of(name)


class _Session:
    """One run: from a source through the assembler and the filters to the output."""

    def __init__(self, settings: Settings) -> None:
        from calitrace.calico.passage import Assembler
        from calitrace.report import log as report

        self._settings = settings
        self._report = report
        self._assembler = Assembler(self._stray)
        self._stats = report.Stats()
        self._shown = 0
        self._stopped = False
        self._level: DebugLevel | None = None
        self._look_at = 0.0
        self._filter: Filter | None = None
        if settings.expression:
            from calitrace.kernel.pcap import Filter

            self._filter = Filter(" ".join(settings.expression))

    def run(self) -> int:
        """Until the input, the time or the wanted number of packets is at its end."""
        from calitrace.calico.log import Reader
        from calitrace.cli.logsource import open_file, open_live, pods_prefixes

        settings = self._settings
        reader = Reader(tuple(settings.interface_prefix.split(",")))
        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            if settings.inputs is not None:
                follow = settings.follow and settings.inputs != "-"  # which ends when it ends
                source = open_file(settings.inputs, reader, follow=follow, path=settings.path, stack=stack)
            else:
                source = open_live(
                    settings.source, reader, interfaces=settings.interfaces, path=settings.path, stack=stack
                )
            if settings.enable_debug:
                self._level = stack.enter_context(_debug(settings))
            if source.live:
                click.echo(f"listening to {source.live}", err=True)
                reader.prefixes += pods_prefixes()  # the kernel keeps what is printed meanwhile
            if settings.output == "table" and not settings.stats:
                click.echo("\n".join(self._report.header(columns())))
            try:
                self._consume(source)
            finally:
                for passage in self._assembler.flush():
                    self._show(passage)
                self._close(source)
        return int(Exit.DONE)

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def _consume(self, source: Input) -> None:
        settings = self._settings
        deadline = time.monotonic() + settings.seconds if settings.seconds is not None else None
        for batch in source.batches:
            self._take(batch)
            if self._is_full():
                return
            self._watch()
            if self._stopped or (deadline is not None and time.monotonic() >= deadline):
                self._take(source.last())
                return
            sys.stdout.flush()

    def _watch(self) -> None:
        """See to it, every few seconds, that Debug has cost no interface its program."""
        if self._level is not None and time.monotonic() >= self._look_at:
            self._level.check()
            self._look_at = time.monotonic() + _LOOK_EVERY_S

    def _take(self, lines: Generator[Line, None, None]) -> None:
        feed, keep = self._assembler.feed, self._settings.everything and not self._settings.stats
        with closing(lines):
            for line in lines:
                for passage in feed(line):
                    self._show(passage)
                    if self._is_full():
                        return
                if keep and not (line.message and ((line.tag and line.tag.direction) or self._assembler.attached)):
                    self._show_line(line)

    def _is_full(self) -> bool:
        return self._settings.count is not None and self._shown >= self._settings.count

    def _matches(self, passage: Passage) -> bool:
        if self._filter is None:
            return True
        facts = passage.facts
        flows = [*facts.flows, facts.after_nat] if facts.after_nat else facts.flows
        return any(self._filter.matches(flow.packet()) for flow in flows)

    def _show(self, passage: Passage) -> None:
        settings = self._settings
        if self._is_full() or not settings.wants(passage) or not self._matches(passage):
            return
        self._shown += 1
        self._stats.add(passage)
        if settings.stats:
            return
        if settings.output == "json":
            click.echo(json.dumps(self._report.passage_object(passage, lines=settings.verbose)))
            return
        if settings.output == "table":
            lines = self._report.table_lines(passage, columns())
        else:
            lines = [self._report.compact_line(passage)]
        click.secho("\n".join(map(_printable, lines)), fg=_COLOURS.get(passage.verdict))
        if settings.verbose:
            for explanation in self._report.iter_explanation(passage):
                click.echo(_printable(explanation))

    def _stray(self, line: Line) -> None:
        self._stats.stray(line)
        if self._settings.everything and not self._settings.stats:
            self._show_line(line)

    def _show_line(self, line: Line) -> None:
        """A line that is in no packet, or that is unknown to us."""
        if line.raw and not line.raw.isspace():
            if self._settings.output == "json":
                click.echo(json.dumps(self._report.line_object(line)))
            else:
                click.echo(_printable(f"{line.form.value:>7}: {self._report.line_text(line)}"))

    def _close(self, source: Input) -> None:
        lost, settings = source.lost(), self._settings
        if settings.stats and settings.output == "json":
            click.echo(json.dumps(self._stats.to_object(source.reader, lost)))
            return
        lines = [_printable(line) for line in self._stats.iter_lines(source.reader, lost)]
        if settings.stats:
            click.echo("\n".join(lines))
        else:
            click.echo("\n".join([lines[0], *map(_printable, self._stats.iter_strays())]), err=True)
        if not source.reader.total and settings.inputs is None:
            click.echo("nothing was logged: is bpfLogLevel Debug, and is there traffic?", err=True)


def _debug(settings: Settings) -> AbstractContextManager[DebugLevel]:
    """Debug while it is entered. Its filter is made of the addresses and ports of ours; all else is ours alone.

    Calico's filter sees packets before NAT and in the tunnel: a service there needs its backends, which the API knows.
    """
    from calitrace.calico.debug_filter import ends
    from calitrace.cli.debug_level import enabled

    # The deadline is for a run that hangs: it leaves time for Felix to load its programs first.
    return enabled(
        allowed=settings.allowed,
        node=settings.node,
        kubeconfig=settings.kubeconfig,
        ends=ends(" ".join(settings.expression)),
        interfaces=[each for each in settings.interfaces if not _is_pattern(each)],
        vxlan_port=settings.vxlan_port,
        seconds=(settings.seconds or _UNATTENDED_S) + _GRACE_S,
        force=settings.force,
        namespace=settings.netns,
    )


def _printable(text: str) -> str:
    """What a terminal can take: control characters, and bytes that were no text, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
