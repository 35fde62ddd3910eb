"""``calitrace drops``: every dropped packet with its cause."""

from __future__ import annotations

import fnmatch
import os
import signal
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from calitrace.cli.terminal import columns
from calitrace.errors import EnvironmentUnfit, Exit, Malformed, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from calitrace.cli.drop_witness import Witness
    from calitrace.correlate.drops import Cause, Dropped
    from calitrace.journal import Writer as Journal
    from calitrace.kernel.collectors import Collectors
    from calitrace.model import Cell, Topology

_UNATTENDED_S = 60.0  # a live run ends by itself where no terminal is attached
_POLL_MS = 100
_TOP_EVERY_S = 1.0
_TOP_ROWS = 20
_LOOK_EVERY_S = 2.0
_SHARE = 5  # looking takes at most this part of the time
_CLEAR = "\x1b[H\x1b[J"


@click.command(
    "drops",
    epilog="""\b
Examples:
  calitrace drops                     what is dropped here, live
  calitrace drops --calico-only -v    Calico's drops, with all evidence
  calitrace drops -i 'cali*' host 10.65.1.2 and tcp port 8080
  calitrace drops --reason DROPPED_BY_POLICY -c 10 -o json
  calitrace drops --top
  calitrace drops -w incident.calitrace --pcap incident.pcapng
  calitrace drops -r incident.calitrace --all
""",
)
@click.argument("expression", nargs=-1, metavar="[PCAP FILTER]")
@click.option("-i", "--interface", "interfaces", multiple=True, help="Only this interface; may be a pattern: 'cali*'.")
@click.option("--netns", default="", help="Only this network namespace, by name.")
@click.option("--calico-only", is_flag=True, help="Only what Calico dropped.")
@click.option("--reason", default="", help="Only this reason, Calico's or the kernel's; may be a pattern.")
@click.option("--top", is_flag=True, help="A table of causes with exact totals: live on a terminal, else at the end.")
@click.option("-c", "--count", type=click.IntRange(min=1), help="End after this many drops.")
@click.option(
    "--duration", type=click.FloatRange(min=0), help="End after this many seconds.  [default: 60 without a terminal]"
)
@click.option(
    "--rate-limit",
    type=click.IntRange(min=0, max=1_000_000),
    default=1000,
    show_default=True,
    help="Drops a second that are shown, after a burst of as many; 0: all. All are counted.",
)
@click.option(
    "--sample", type=click.IntRange(min=1), default=1, show_default=True, help="Show one in this many. All are counted."
)
@click.option("--stack", is_flag=True, help="Also the kernel's stack of each drop that is shown.")
@click.option("--all", "everything", is_flag=True, help="Also what is known to be harmless.")
@click.option("-r", "--read", "inputs", type=click.Path(path_type=Path, dir_okay=False), help="Read a journal.")
@click.option("-w", "--write", "path", type=click.Path(path_type=Path, dir_okay=False), help="Record a journal.")
@click.option(
    "--pcap",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write the packets that are shown, up to 128 bytes of each, as pcapng with the cause as comment.",
)
@click.option("--vxlan-port", default=4789, type=click.IntRange(1, 65535), show_default=True, help="Felix's vxlanPort.")
@click.option("-v", "--verbose", is_flag=True, help="The whole cause, and all evidence.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(**options: Any) -> int:
    """Show every dropped packet with its cause.

    Calico's drops are named by its reason and rule, from its state at that moment, and from its debug log where that
    is on; all others by the kernel's reason and function. Where Calico left no reason its counters and maps are asked:
    what they name is likely, not proven. A PCAP FILTER sees a packet's first 128 bytes, from the IP
    header on, and those of the packet that it carries in VXLAN.
    """
    settings = Settings(**options)
    if settings.inputs is not None and settings.path is not None:
        raise UsageError("-r reads and -w records", "leave out one of them")
    return _Session(settings).run()


@dataclass(frozen=True)
class Settings:
    """The options, as given."""

    expression: tuple[str, ...]
    interfaces: tuple[str, ...]
    netns: str
    calico_only: bool
    reason: str
    top: bool
    count: int | None
    duration: float | None
    rate_limit: int
    sample: int
    stack: bool
    everything: bool
    inputs: Path | None
    path: Path | None
    pcap: Path | None
    vxlan_port: int
    verbose: bool
    output: str

    @property
    def seconds(self) -> float | None:
        """How long a live run lasts, None for as long as the user likes."""
        if self.duration is not None:
            return self.duration
        return None if sys.stdout.isatty() else _UNATTENDED_S

    def wants(self, cause: Cause) -> bool:
        """Whether a drop passes the filters, but for the pcap expression."""
        reasons = (cause.calico_reason, cause.skb_drop_reason)
        return (
            (not self.interfaces or any(fnmatch.fnmatchcase(cause.place.interface, each) for each in self.interfaces))
            and (cause.by_calico or not self.calico_only)
            and (not self.reason or any(fnmatch.fnmatchcase(each, self.reason.upper()) for each in reasons))
        )


class _Session:
    """One run: from the ring or a journal through the joiner and the filters to the output."""

    def __init__(self, settings: Settings) -> None:
        from calitrace.correlate import drops
        from calitrace.decode import Decoder
        from calitrace.kernel.pcap import Filter
        from calitrace.report import drops as report
        from calitrace.report.pcapng import Writer

        self._settings = settings
        self._drops = drops
        self._report = report
        self._decoder = Decoder(settings.vxlan_port)
        self._joiner = drops.Joiner()
        self._filter = Filter(" ".join(settings.expression)) if settings.expression else None
        self._pcapng = Writer()
        self._pcap: BinaryIO | None = None
        self._sums = report.Sums()
        self._causes: Counter[str] = Counter()
        self._symbols: dict[int, str] = {}
        self._netns = 0
        self._said: set[str] = set()
        self._collectors: Collectors | None = None
        self._witness: Witness | None = None
        self._writer: Journal | None = None
        self._statements: dict[tuple[int, int], dict[str, Any]] = {}
        self._stopped = False
        self._is_tty = sys.stdout.isatty()

    def run(self) -> int:
        """Until the journal, the time or the wanted number of drops is at its end."""
        from calitrace.cli.recording import create

        with ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            if self._settings.pcap is not None:
                self._pcap = stack.enter_context(create(self._settings.pcap))
                self._pcap.write(self._pcapng.header("calitrace"))
            if self._settings.inputs is not None:
                self._replay(self._settings.inputs)
            else:
                self._live(stack)
        return int(Exit.DONE)

    def _stop(self, *_: object) -> None:
        if self._stopped:  # asked again: we wait for somebody who does not read what we print
            raise KeyboardInterrupt
        self._stopped = True

    # -- sources ----------------------------------------------------------------------------------------

    def _live(self, stack: ExitStack) -> None:
        from calitrace import journal
        from calitrace.cli.drop_witness import Witness
        from calitrace.cli.probe import LAB_POLICY_DIRS, POLICY_DIRS
        from calitrace.cli.recording import create, header, say, unread_states
        from calitrace.cluster import pods
        from calitrace.kernel import discover, headers, symbols, syscall
        from calitrace.kernel.collectors import Collectors, Plan, name_condition

        settings = self._settings
        types = headers.kernel_btf()
        topology = discover.topology()
        plan = Plan(
            hop=False,
            drop_all=True,
            rate_limit=settings.rate_limit,
            sample=settings.sample,
            vxlan_port=settings.vxlan_port,
            netns=self._inum(topology),
            named_by=name_condition(settings.interfaces),
            pcap_filter=self._kernel_filter(),
            stack=settings.stack,
            state_bytes=discover.state_sizes(topology),
            state_like=tuple(discover.state_maps(topology, everywhere=True).values()),
        )
        warnings = unread_states(topology)
        directories = [*POLICY_DIRS, *LAB_POLICY_DIRS[0].glob(LAB_POLICY_DIRS[1])]
        facts = {**header(topology, types, plan, directories, warnings), "pods": pods.of_this_node()}
        self._know(facts)
        for warning in warnings:
            say(f"warning: {warning}")
        collectors = stack.enter_context(Collectors(plan, types))
        stream = stack.enter_context(create(settings.path)) if settings.path else None
        try:
            stack.callback(os.close, syscall.enable_stats())
        except OSError as failure:  # before Linux 5.8
            say(f"warning: what we cost is not measured: {failure.strerror}")
        self._witness = Witness()
        self._watch(topology, collectors)
        self._look_at = time.monotonic() + _LOOK_EVERY_S
        self._collectors = collectors
        writer = self._writer = journal.Writer(stream, facts) if stream else None
        for note in self._unmatched(topology, facts["drop_reasons"]):
            say(f"warning: {note}")
        say("listening to tracepoint kfree_skb")
        if settings.output == "table" and not settings.top:
            click.echo("\n".join(self._report.header(columns())))

        def take(records: list[bytes]) -> None:
            if writer is not None:
                writer.events(records)
            self._take(records, symbols.resolve)

        end = time.monotonic() + settings.seconds if settings.seconds is not None else None
        look = time.monotonic()
        try:
            while not self._stopped and not self._is_full() and (end is None or time.monotonic() < end):
                take(collectors.poll(_POLL_MS))
                if settings.top and self._is_tty and settings.output == "table" and time.monotonic() >= look:
                    look = time.monotonic() + _TOP_EVERY_S
                    click.echo(_CLEAR, nl=False)
                    self._show_top(collectors)
                sys.stdout.flush()
            collectors.stop()
            take(collectors.drain())
            self._rest()
        finally:
            collectors.stop()
            stats = {stat.name.lower(): value for stat, value in collectors.stats().items()}
            program = collectors.programs()["kfree_skb"]
            self._sum(stats, program.recursion_misses)
            self._sums.filtered += stats["drop_filtered"]
            self._sums.runs, self._sums.ns = program.run_count, program.run_time_ns
            self._sums.settle()
            if not settings.top:
                self._close()
            if writer is not None:  # last: it fails on a full disk
                writer.write(journal.SYMBOLS, {"names": self._symbols})
                lost = {name: stats[f"{name}_lost"] for name in ("drop", "log", "state")}
                totals = {"stats": stats, "lost": {**lost, "nested": program.recursion_misses}}
                writer.write(journal.TOTALS, {**totals, "topology": self._whole.to_map(), "pods": self._pods})
                writer.write(journal.END, {"mono_ns": time.monotonic_ns()})
        if settings.top:
            if self._is_tty and settings.output == "table":
                click.echo(_CLEAR, nl=False)
            self._show_top(collectors)
            self._close()

    def _unmatched(self, topology: Topology, drop_reasons: Mapping[int, str]) -> Iterator[str]:
        """What was asked for and is not there: most likely misspelled."""
        from calitrace.calico import reasons

        names = [link.name for each in topology.namespaces.values() for link in each.links.values()]
        for pattern in self._settings.interfaces:
            if not fnmatch.filter(names, pattern):
                yield f"no interface is called {pattern}: what comes up under that name is shown"
        known = [*reasons.MEANING, *(each.removeprefix("SKB_DROP_REASON_") for each in drop_reasons.values())]
        if self._settings.reason and not fnmatch.filter(known, self._settings.reason.upper()):
            yield f"neither Calico nor this kernel has a reason called {self._settings.reason}"

    def _kernel_filter(self) -> str:
        """The pcap filter as C, or nothing where it can only be applied to what was sent."""
        from calitrace.cbpf import Untranslatable, c_function
        from calitrace.cli.recording import say

        if self._filter is None:
            return ""
        try:
            return c_function("pcap_filter", self._filter.instructions)
        except Untranslatable as why:
            say(f"warning: the filter looks at what --rate-limit lets through: {why}")
            return ""

    def _watch(self, topology: Topology, collectors: Collectors) -> None:
        """Read Calico's state in each node's namespace, whatever its release was at the start."""
        from calitrace.cli.recording import say, watch_state

        for warning in watch_state(collectors, topology, everywhere=True):
            if warning not in self._said:
                self._said.add(warning)
                say(f"warning: {warning}")
        if self._witness is not None:
            self._witness.settle(topology)

    def _look_again(self) -> bool:
        """Whether interfaces and programs were read anew, since pods come and go and Felix replaces its programs."""
        from calitrace.cli.recording import say
        from calitrace.cluster import pods
        from calitrace.kernel import discover
        from calitrace.model import Topology

        begin = time.monotonic()
        if self._collectors is None or begin < self._look_at:
            return False
        try:
            topology = discover.topology()
            self._watch(topology, self._collectors)
            self._pods.update(pods.of_this_node())
        except EnvironmentUnfit as failure:  # Felix replaces its programs: the next look finds the new ones
            say(f"warning: interfaces and programs could not be read again: {failure}")
            return False
        finally:
            now = time.monotonic()
            self._look_at = now + max(_LOOK_EVERY_S, _SHARE * (now - begin))
        self._settle(Topology({**self._whole.namespaces, **topology.namespaces}))  # who has gone keeps its name
        return True

    def _settle(self, topology: Topology) -> None:
        self._whole, self._topology = topology, topology.shortened()

    def _replay(self, path: Path) -> None:
        from calitrace import journal
        from calitrace.cli.recording import say

        try:
            with path.open("rb") as stream:
                found = journal.read(stream, keep=True)
            self._know({**found.header, **{k: v for k, v in found.totals.items() if k in ("topology", "pods")}})
        except OSError as failure:
            raise UsageError(f"cannot read {path}: {failure.strerror}") from failure
        except Malformed as wrong:
            raise UsageError(f"{path}: {wrong.cause}", "name a journal that -w made") from wrong
        if found.gap:
            say(f"warning: {path} {found.gap}")
        self._symbols.update(found.symbols)
        self._statements = found.statements
        if self._settings.output == "table" and not self._settings.top:
            click.echo("\n".join(self._report.header(columns())))
        self._take(found.events, lambda _: {})
        self._rest()
        stats = found.totals.get("stats", {})
        sums = self._sums
        sums.seen = sums.shown + sums.harmless + sums.filtered + sums.unread
        if stats:
            self._sum(stats, found.totals.get("lost", {}).get("nested", 0))
            # `probe --trace` records its own packets only: the others were filtered in the kernel.
            sums.filtered += sums.seen - stats.get("drop_matched", 0) - sums.limited - sums.unsampled
        if self._settings.top:
            for line in self._report.iter_top({}, 0, self._causes, self._topology, self._names, _TOP_ROWS):
                click.echo(line)
        self._close()

    def _know(self, header: dict[str, Any]) -> None:
        """Take what the header says of the machine. Raises Malformed, or UsageError for an unknown namespace."""
        from calitrace.model import Topology

        try:
            self._settle(Topology.from_map(header["topology"]))
            self._pods = dict(header.get("pods", {}))
            self._names = self._drops.Names(header["drop_reasons"], self._symbols, header.get("rules", {}), self._pods)
            self._wall_ns = header["wall_ns"] - header["mono_ns"]
        except (KeyError, TypeError, ValueError) as wrong:
            raise Malformed(0, "a header with all that drops need", f"no {wrong}", "journal") from wrong
        self._netns = self._inum(self._whole)

    def _inum(self, topology: Topology) -> int:
        """The inode number of the namespace asked for, 0 for any. Raises UsageError for an unknown one."""
        name = self._settings.netns
        if not name:
            return 0
        every = (*topology.shortened().namespaces.values(), *topology.namespaces.values())
        names = {each.name: each.inum for each in every}
        if name not in names:
            raise UsageError(f"no network namespace {name!r}", f"there are {', '.join(sorted(names))}")
        return names[name]

    # -- through ----------------------------------------------------------------------------------------

    def _take(self, records: list[bytes], resolve: Any) -> None:
        from calitrace.model import Drop, StackCopy

        events = []
        for raw in records:
            events += [(event, raw) for event in self._decoder.iter_events([raw])]
        fresh = {event.location for event, _ in events if isinstance(event, Drop)}
        fresh.update(each for event, _ in events if isinstance(event, StackCopy) for each in event.addresses)
        self._symbols.update(resolve(fresh - self._symbols.keys()))
        for event, raw in events:
            self._show_all(self._joiner.feed(event, raw))
        self._show_all(self._joiner.flush())

    def _rest(self) -> None:
        self._show_all(self._joiner.flush(everything=True))

    def _is_full(self) -> bool:
        return self._settings.count is not None and self._sums.shown >= self._settings.count

    def _show_all(self, found: Iterable[Dropped]) -> None:
        for dropped in found:
            self._show(dropped)

    def _show(self, dropped: Dropped) -> None:
        from calitrace.correlate.noise import why_harmless

        settings, event = self._settings, dropped.event
        if self._is_full():
            self._sums.unread += 1
            return
        if self._netns not in (0, event.netns) or not self._matches(dropped.capture):
            self._sums.filtered += 1
            return
        cause = self._explain(dropped)
        unknown = event.ifindex and not cause.place.interface
        if (unknown or cause.sources == ("hook",)) and self._look_again():
            cause = self._explain(dropped)
        cause = self._weigh(dropped, cause)
        if not settings.wants(cause):
            self._sums.filtered += 1
            return
        harmless = why_harmless(event, self._names)
        if harmless and not settings.everything:
            self._sums.harmless += 1
            return
        self._sums.shown += 1
        self._causes[self._report.short(cause)] += 1
        time_ns = event.ktime_ns + self._wall_ns
        if self._pcap is not None and event.packet.layers:
            comment = f"{cause.place}: {cause.text}\n" + "\n".join(cause.evidence)
            interface = f"{cause.place.namespace}/{cause.place.interface}"
            self._pcap.write(self._pcapng.packet(interface, time_ns, dropped.capture, event.len_bytes, comment))
        if settings.top:
            return
        if settings.output == "json":
            click.echo(self._report.dump(self._report.drop_object(dropped, cause, harmless, time_ns, self._names)))
            return
        clock = datetime.fromtimestamp(time_ns / 1e9).astimezone().strftime("%H:%M:%S.%f")[:-3]
        lines = self._report.table_lines(dropped, cause, clock, self._names, columns())
        click.secho("\n".join(lines), fg="red" if cause.by_calico else None)
        if settings.stack:
            for line in self._drops.stack(dropped, self._names):
                click.echo(f"        {line}")
        if settings.verbose:
            from calitrace.report.folding import folded

            for line in self._report.iter_explanation(cause, harmless, self._pods.get(cause.place.interface, "")):
                click.echo("\n".join(folded(line, columns(), 8)))

    def _matches(self, capture: bytes) -> bool:
        from calitrace.packet import inside_vxlan

        if self._filter is None:
            return True
        inner = inside_vxlan(capture, self._settings.vxlan_port)
        return self._filter.matches(capture) or (inner != b"" and self._filter.matches(inner))

    def _explain(self, dropped: Dropped) -> Cause:
        return self._drops.explain(dropped.event, dropped.passages, dropped.state, self._topology, self._names)

    def _weigh(self, dropped: Dropped, cause: Cause) -> Cause:
        """The cause with what Calico's maps said about the drop: live, or as the journal has it."""
        from calitrace import journal
        from calitrace.correlate import witness

        key = (dropped.event.ktime_ns, dropped.event.skbaddr)
        if key in self._statements:
            return witness.weigh(cause, witness.Statement.from_map(self._statements[key]))
        said = self._witness.about(dropped, cause) if self._witness is not None else None
        if said is None:
            return cause
        if self._writer is not None:
            self._writer.write(journal.STATEMENT, {"ktime_ns": key[0], "skbaddr": key[1], "said": said.to_map()})
        return witness.weigh(cause, said)

    # -- totals -----------------------------------------------------------------------------------------

    def _sum(self, stats: dict[str, int], missed: int) -> None:
        sums = self._sums
        sums.seen, sums.lost = stats.get("drop_seen", 0), stats.get("drop_lost", 0)
        sums.limited, sums.unsampled = stats.get("drop_limited", 0), stats.get("drop_unsampled", 0)
        sums.stacks_lost = stats.get("stack_lost", 0)
        sums.missed, sums.other = missed, stats.get("drop_other", 0)
        sums.malformed = sum(self._decoder.malformed.values())

    def _show_top(self, collectors: Collectors) -> None:
        from calitrace.events import Stat
        from calitrace.kernel import symbols

        counts: dict[Cell, int] = collectors.drop_counts()
        self._symbols.update(symbols.resolve({cell.location for cell in counts} - self._symbols.keys()))
        if self._settings.output == "json":
            for cell, number in counts.items():
                click.echo(self._report.dump(self._report.cell_object(cell, number, self._topology, self._names)))
            return
        other = collectors.stats()[Stat.DROP_OTHER]
        for line in self._report.iter_top(counts, other, self._causes, self._topology, self._names, _TOP_ROWS):
            click.echo(self._report.fit(line, columns()))

    def _close(self) -> None:
        if self._settings.output == "json":
            click.echo(self._report.dump(self._sums.to_object()))
        click.echo(self._sums.line(), err=True)
