"""``calitrace probe``: send identified probes, and with --trace say where they died."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calitrace.calico import policy
from calitrace.cli.commands import Commands
from calitrace.cli.terminal import columns
from calitrace.errors import Exit, UsageError
from calitrace.packet import CALICO_VNI

if TYPE_CHECKING:
    from collections.abc import Callable

    from calitrace.cli.recording import Recording
    from calitrace.model import Probe
    from calitrace.probes.run import ProbeRun, Settings

POLICY_DIRS = (Path(policy.DIRECTORY),)
LAB_POLICY_DIRS = (Path("/run/calitrace"), "*/*/policy")


def shared_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of all probes."""
    for option in reversed(
        (
            click.option("--proto", type=click.Choice(["tcp", "udp"]), default="tcp", show_default=True),
            click.option("-c", "--count", default=5, show_default=True, help="Probes to send."),
            click.option("--rate", default=10.0, show_default=True, help="Probes a second, at most 1000."),
            click.option(
                "--size", default=0, help="Payload bytes: data in the SYN for tcp, datagram (at least 16) for udp."
            ),
            click.option("--timeout", default=1.0, show_default=True, help="Seconds to wait for each answer."),
            click.option("--from", "namespace", default="", help="Network namespace to send from.  [default: ours]"),
            click.option("--trace", is_flag=True, help="Load the collectors and say where each probe went."),
            click.option(
                "-w",
                "--write",
                "path",
                type=click.Path(path_type=Path, dir_okay=False),
                help="Record a journal (with --trace).",
            ),
            click.option(
                "--vxlan-port",
                default=4789,
                type=click.IntRange(1, 65535),
                show_default=True,
                help="Felix's vxlanPort.",
            ),
            click.option(
                "--stories",
                default=1,
                type=click.IntRange(min=0),
                show_default=True,
                help="Journeys shown for each different verdict.",
            ),
            click.option("-v", "--verbose", is_flag=True, help="All hops and Calico's log lines (with --trace)."),
            click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True),
        )
    ):
        function = option(function)
    return function


@click.group("probe", cls=Commands)
def command() -> None:
    """Send identified probes; with --trace, follow each through the kernel and Calico.

    One packet is one probe: a TCP SYN, closed by a RST, or a UDP datagram. Each has a source port of its own, so
    that every backend of a service has its turn.
    """


@command.command(
    epilog="""\b
Examples:
  calitrace probe nodeport 10.10.0.1:30080 --from calitrace-client
  calitrace probe nodeport 10.10.0.1:30053 --proto udp -c 100 --rate 50 -o json
  calitrace probe nodeport 10.10.0.1:30080 --trace -w incident.calitrace
"""
)
@click.argument("target", metavar="HOST:PORT")
@shared_options
def nodeport(target: str, **options: Any) -> int:
    """Probe a NodePort, or any other TCP or UDP service."""
    host, port = endpoint(target)
    return _probe(host, port, None, **options)


@command.command(
    epilog="""\b
Examples:
  calitrace probe vxlan 10.10.0.2 --inner 10.10.0.1:30080 --from calitrace-node-a --trace
  calitrace probe vxlan 10.10.0.2 --proto udp --inner 10.10.0.1:30053 --from calitrace-node-a
"""
)
@click.argument("node")
@click.option("--inner", required=True, metavar="HOST:PORT", help="Where the packet inside goes: a NodePort.")
@click.option("--vni", default=CALICO_VNI, show_default="Calico's NodePort tunnel", help="VXLAN network identifier.")
@shared_options
def vxlan(node: str, inner: str, vni: int, vxlan_port: int, **options: Any) -> int:
    """Probe another node's VXLAN port, as Calico forwards a NodePort to it.

    To be run on a node: the other one takes VXLAN only from addresses that it knows as nodes. An answer comes back
    in the tunnel and proves UDP in both directions. No answer proves nothing by itself; --trace tells more.
    """
    host, port = endpoint(inner)
    return _probe(host, port, (node, vxlan_port, vni), vxlan_port=vxlan_port, **options)


def endpoint(text: str) -> tuple[str, int]:
    """("10.0.0.1", 80) of "10.0.0.1:80". Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is not HOST:PORT", "for example 10.10.0.1:30080")
    return host, int(port)


def _probe(
    host: str,
    port: int,
    tunnel: tuple[str, int, int] | None,
    *,
    proto: str,
    count: int,
    rate: float,
    size: int,
    timeout: float,
    namespace: str,
    trace: bool,
    path: Path | None,
    vxlan_port: int,
    stories: int,
    verbose: bool,
    output: str,
) -> int:
    from calitrace.packet import TCP, UDP
    from calitrace.probes.run import ProbeRun, Settings

    if path is not None and not trace:
        raise UsageError("-w records what --trace collects", "add --trace")
    if size < 0 or size > 60000:
        raise UsageError("the size must be 0 to 60000 bytes")
    settings: Settings = Settings(
        host, port, TCP if proto == "tcp" else UDP, count, rate, size, namespace, timeout, tunnel
    )
    with ProbeRun(settings) as run, ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: run.stop()))
        if trace:
            return _traced(run, path, vxlan_port, output, verbose, stories)
        return _untraced(run, output)


def _untraced(run: ProbeRun, output: str) -> int:
    from calitrace.model import Outcome
    from calitrace.probes import results
    from calitrace.report.folding import folded

    def show(probe: Probe) -> None:
        if output == "json":
            click.echo(results.probe_object(probe))
        else:
            click.echo("\n".join(folded(results.probe_line(probe), columns(), 7)))

    probes = run.run(show)
    summary = results.summarise(probes, run.late, run.duplicates, run.own_losses())
    for line in [results.summary_object(summary)] if output == "json" else results.summary_lines(summary):
        click.echo(line)
    healthy = all(probe.outcome is Outcome.ANSWERED for probe in probes)
    return int(Exit.DONE if healthy else Exit.FINDINGS)


def _traced(run: ProbeRun, path: Path | None, vxlan_port: int, output: str, verbose: bool, stories: int) -> int:
    from calitrace.cli.recording import Recording, say
    from calitrace.cli.report import render
    from calitrace.kernel.collectors import Plan
    from calitrace.probes import results

    plan = Plan(run_id=run.run_id, client=(run.src, *run.ports), vxlan_port=vxlan_port)
    directories = [*POLICY_DIRS, *LAB_POLICY_DIRS[0].glob(LAB_POLICY_DIRS[1])]
    with Recording(plan, path=path, client=run.settings.namespace, policy_dirs=directories) as recording:

        def done(probe: Probe) -> None:
            recording.probe(probe)
            if verbose:
                say(results.probe_line(probe))

        for probe in to_ask_for(run.run(done, recording.probe)):
            _ask_maps(probe, recording)
        journal = recording.finish()
    if path is not None:
        say(f"recorded {len(journal.events)} events in {path}")
    if run.own_losses():
        say(f"warning: {run.own_losses()} replies lost in our own receive buffers")
    return render(journal, output=output, verbose=verbose, stories=stories, check=True)


def to_ask_for(probes: list[Probe]) -> list[Probe]:
    """The probe that the maps are to be asked for, if any: one that was refused with ICMP, which may have been lost."""
    from calitrace.model import Outcome

    refused = [probe for probe in probes if probe.outcome is Outcome.REFUSED and "ICMP" in probe.detail]
    return (refused or [probe for probe in probes if probe.outcome is Outcome.UNANSWERED])[:1]


def _ask_maps(probe: Probe, recording: Recording) -> None:
    """Record what each node's maps say about a probe: without Calico's log they alone tell why it was refused."""
    from calitrace.cli import map_source
    from calitrace.cli.recording import say
    from calitrace.correlate import walk
    from calitrace.errors import Error, LayoutMismatch
    from calitrace.kernel import discover, maps
    from calitrace.packet import PROTOCOLS

    packet = walk.Packet(probe.src, probe.sport, probe.dst, probe.dport, PROTOCOLS[probe.proto])
    for inum, state_map in discover.state_maps(recording.topology).items():
        node = recording.topology.namespaces[inum]
        try:
            source = map_source.of_maps(maps.of_node(state_map), {i: link.name for i, link in node.links.items()})
            recording.walked(inum, walk.walk(packet, map_source.tables(source, ipv6=False, packet=packet)))
        except (Error, LayoutMismatch, OSError) as failure:  # Felix replaces its maps
            say(f"warning: the maps of {node.name} are not asked: {failure}")
