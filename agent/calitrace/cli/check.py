"""``calitrace check``: the troubleshooting page, looked through by itself, each finding with its evidence."""

from __future__ import annotations

import gzip
import io
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calitrace.errors import EnvironmentUnfit, Exit, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from calitrace.checks.snapshot import Missing, Snapshot


@click.command(
    "check",
    epilog="""\b
Examples:
  calitrace check
  calitrace check services maps --felix-config felix.yaml --felix-log calico-node.log
  calitrace check --kubeconfig ~/.kube/config -o md > ticket.md
  calitrace check -w node.calitrace; calitrace check -r node.calitrace -o json
  calitrace check services --probe 192.0.2.12=192.0.2.11:30080 --other its-probes.calitrace
  calitrace check --explain services.mtu
""",
)
@click.argument("areas", nargs=-1, metavar="[AREA]...")
@click.option("--node", "only", flag_value="node", help="Look at this node only, ask no API server.")
@click.option("--cluster", "only", flag_value="cluster", help="Ask the API server only.")
@click.option("--kubeconfig", default="", help="The API server's.  [default: $KUBECONFIG, ~/.kube/config, in-cluster]")
@click.option("--context", default="", help="The kubeconfig's context.")
@click.option("--timeout", default=5.0, show_default=True, help="Seconds to wait for each answer of the API server.")
@click.option("--felix-config", type=click.Path(path_type=Path), help="What calicoctl or kubectl printed.")
@click.option(
    "--felix-log", type=click.Path(path_type=Path), help="calico-node's log, plain or gz; - is standard input."
)
@click.option("--calico-version", default="", help="Calico's release, such as v3.31, where nothing else says it.")
@click.option("--node-name", default="", help="The node's name in Kubernetes.  [default: calico-node's own]")
@click.option("--netns", default="", help="Network namespace of the node.  [default: ours]")
@click.option(
    "--bpffs", type=click.Path(path_type=Path), help="The bpffs, or directory in it, with its maps.  [default: its own]"
)
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two measurements; 0: none.")
@click.option(
    "--probe",
    "targets",
    multiple=True,
    metavar="NODE=HOST:PORT",
    help="Send 5 packets to NODE in the NodePort tunnel, for the NodePort HOST:PORT.",
)
@click.option(
    "--other",
    "others",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another node's snapshot (-w), for its probes to this one.",
)
@click.option("-w", "--write", "target", type=click.Path(path_type=Path, dir_okay=False), help="Keep the snapshot.")
@click.option("-r", "--read", "source", type=click.Path(path_type=Path), help="Check a snapshot that -w kept.")
@click.option("--explain", "explained", default="", metavar="ID", help="Say what a check looks at, and why.")
@click.option("--list", "listed", is_flag=True, help="List all checks.")
@click.option("-v", "--verbose", is_flag=True, help="Name the checks that passed.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "md"]), default="table", show_default=True)
def command(
    areas: tuple[str, ...],
    target: Path | None,
    source: Path | None,
    explained: str,
    listed: bool,
    verbose: bool,
    output: str,
    **where: Any,
) -> int:
    """Look through Calico's page "Troubleshoot eBPF mode" and show what was seen, what it means, what to do.

    AREA is services, drops, cpu, debug, maps or performance; all by default. A check whose source cannot be read is
    not run, and said to be. Exit status 0: nothing found, 1: findings, 3: no check of these areas could be run, or
    neither interfaces nor maps nor cluster nor Felix be looked at.
    """
    from calitrace.checks import registry
    from calitrace.checks.finding import Status
    from calitrace.report import check as shown

    if listed or explained:
        return _explain(explained)
    unknown = sorted(set(areas) - set(registry.AREAS))
    if unknown:
        raise UsageError(f"no area {unknown[0]!r}", f"choose from {', '.join(registry.AREAS)}")
    if source and where["targets"]:
        raise UsageError("--probe sends packets, and -r only reads", "give --probe where the snapshot is made")
    snapshot = _given(_read(source) if source else _collect(**where), **where)
    snapshot = _from_others(_probed(snapshot, **where), **where)
    if target:
        _write(target, snapshot)
    results = registry.run(snapshot, [each for each in registry.CHECKS if not areas or each.area in areas])
    lines = (
        shown.iter_json(results)
        if output == "json"
        else shown.iter_markdown(snapshot, results)
        if output == "md"
        else shown.iter_table(results, verbose=verbose)
    )
    for line in lines:
        click.echo(line)
    if any(result.findings for result in results):
        return int(Exit.FINDINGS)
    ran = any(result.status is not Status.NOT_RUN for result in results)
    return int(Exit.DONE if ran and _looked(snapshot) else Exit.ENVIRONMENT)


def _looked(snapshot: Snapshot) -> bool:
    """Whether anything of a dataplane was seen: interfaces with their programs, maps, the cluster, or Felix."""
    from calitrace.checks.snapshot import Missing

    seen = (snapshot.links, snapshot.maps, snapshot.kubernetes, snapshot.felix_objects, snapshot.felix_lines)
    return not all(isinstance(each, Missing) for each in seen)


def _explain(identifier: str) -> int:
    from calitrace.checks import registry
    from calitrace.report.check import iter_explanation

    if not identifier:
        for each in registry.CHECKS:
            click.echo(f"{each.id:32} {each.explanation.splitlines()[0]}")
        return int(Exit.DONE)
    if identifier not in registry.BY_ID:
        raise UsageError(f"no check {identifier!r}", "calitrace check --list names them all")
    for line in iter_explanation(registry.BY_ID[identifier]):
        click.echo(line)
    return int(Exit.DONE)


def _collect(
    *,
    only: str | None,
    kubeconfig: str,
    context: str,
    timeout: float,
    node_name: str,
    netns: str,
    bpffs: Path | None,
    interval: float,
    **_: Any,
) -> Snapshot:
    from calitrace.checks.snapshot import Missing, Snapshot
    from calitrace.cluster import cloud, objects

    found = Snapshot(time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    if only == "cluster":
        gone: dict[str, Any] = {
            each: Missing("only the cluster was looked at (--cluster)") for each in Snapshot.OF_THE_NODE
        }
        found = replace(found, **gone, host=objects.host_of(node_name))
    with _Progress() as progress:
        if only != "cluster":
            from calitrace.kernel import node

            where = node.Where(netns, bpffs, node_name)
            found = replace(node.collect(where, interval, progress.say), taken=found.taken)
            progress.say("asking which cloud this is")
            found = replace(found, cloud=cloud.collect())
        if only != "node" and (only == "cluster" or kubeconfig or objects.configured()):
            progress.say("asking the API server")
            found = objects.collect(found, kubeconfig, context, timeout)
    return found


class _Progress:
    """One line on the terminal that says what is being done, gone at the end; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def say(self, what: str) -> None:
        if self._shown:
            click.echo(f"\r\x1b[K{what} ...", err=True, nl=False)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def _given(
    snapshot: Snapshot,
    *,
    felix_config: Path | None,
    felix_log: Path | None,
    calico_version: str,
    node_name: str,
    **_: Any,
) -> Snapshot:
    """The snapshot with what the command line adds."""
    from calitrace.checks.snapshot import Missing

    if node_name and not isinstance(snapshot.host, Missing):
        snapshot = replace(snapshot, host=replace(snapshot.host, node=node_name))
    if calico_version:
        from calitrace.calico.release import parse

        if parse(calico_version, "") is None:
            raise UsageError(f"{calico_version!r} is no release", "for example v3.31, or master")
        snapshot = replace(snapshot, calico_version=calico_version)
    if felix_config:
        snapshot = replace(snapshot, felix_objects=felix_configurations(felix_config))
    if felix_log:
        snapshot = replace(snapshot, felix_lines=_telling_lines(felix_log))
    return snapshot


def _telling_lines(path: Path) -> tuple[str, ...] | Missing:
    """What checks look at of a log of any length, plain or compressed with gzip. Raises UsageError."""
    from calitrace.calico import felix_log
    from calitrace.checks.snapshot import Missing

    count = 0

    def counted(lines: Iterable[str]) -> Iterator[str]:
        nonlocal count
        for line in lines:
            count += 1
            yield line

    try:
        with sys.stdin.buffer if str(path) == "-" else path.open("rb") as raw:
            stream = io.BufferedReader(raw)  # type: ignore[type-var]
            packed = stream.peek(2)[:2] == b"\x1f\x8b"
            plain = gzip.GzipFile(fileobj=stream) if packed else stream
            with io.TextIOWrapper(plain, encoding="utf-8", errors="replace") as text:
                found = felix_log.telling(counted(text))
    except (OSError, EOFError, zlib.error) as failure:
        raise UsageError(f"cannot read {path}: {getattr(failure, 'strerror', None) or failure}") from failure
    return tuple(line.raw for line in found) or Missing(f"none of the {count} lines of {path} is Felix's")


def _probed(snapshot: Snapshot, *, targets: tuple[str, ...], netns: str, **_: Any) -> Snapshot:
    """The snapshot with the answers of the other nodes' tunnels. Raises UsageError, EnvironmentUnfit."""
    if not targets:
        return snapshot
    from calitrace.calico.felix_config import Setting, Settings
    from calitrace.checks.registry import sources
    from calitrace.checks.snapshot import VxlanProbe
    from calitrace.cli.probe import endpoint
    from calitrace.model import Outcome
    from calitrace.packet import CALICO_VNI, TCP
    from calitrace.probes import run

    felix = sources(snapshot)["felix"]
    setting = felix.get("vxlanPort") if isinstance(felix, Settings) else None
    port = int(setting.value) if isinstance(setting, Setting) and isinstance(setting.value, int) else 4789
    found = []
    for target in targets:
        node, _equals, inner = target.partition("=")
        host, number = endpoint(inner)
        settings = run.Settings(host, number, TCP, 5, 20.0, 0, netns, 1.0, (node, port, CALICO_VNI))
        with run.ProbeRun(settings) as probes:
            answers = [each.outcome in (Outcome.ANSWERED, Outcome.REFUSED) for each in probes.run(lambda _: None)]
        found.append(VxlanProbe(node, port, inner, len(answers), sum(answers)))
    return replace(snapshot, vxlan_probes=tuple(found))


def _from_others(snapshot: Snapshot, *, others: tuple[Path, ...], **_: Any) -> Snapshot:
    """The snapshot with what other nodes' probes met. Raises UsageError."""
    from calitrace.checks.snapshot import Missing

    found = () if isinstance(snapshot.vxlan_probes, Missing) else snapshot.vxlan_probes
    for path in others:
        other = _read(path)
        if isinstance(other.vxlan_probes, Missing):
            raise UsageError(f"{path} has no probes", "make it there: calitrace check --probe NODE=HOST:PORT -w FILE")
        node = path.stem if isinstance(other.host, Missing) else other.host.node
        found += tuple(replace(each, sender=each.sender or node) for each in other.vxlan_probes)
    return replace(snapshot, vxlan_probes=found) if others else snapshot


def _text(path: Path) -> str:
    try:
        if str(path) == "-":
            return sys.stdin.buffer.read().decode(errors="replace")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as failure:
        raise UsageError(f"cannot read {path}: {failure.strerror}") from failure


def felix_configurations(path: Path) -> tuple[dict[str, Any], ...]:
    """The FelixConfigurations in a file of YAML. Raises UsageError, EnvironmentUnfit."""
    try:
        import yaml
    except ImportError as missing:
        raise EnvironmentUnfit("PyYAML is missing", "pip install pyyaml") from missing
    from calitrace.calico.felix_config import configurations

    try:
        found = configurations(yaml.safe_load_all(_text(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:  # ValueError: of a date that is none
        raise UsageError(f"{path} is not YAML: {' '.join(str(wrong).split())}") from wrong
    if not found:
        raise UsageError(
            f"{path} has no FelixConfiguration", "it wants what `calicoctl get felixconfiguration -o yaml` prints"
        )
    return tuple(found)


def _write(path: Path, snapshot: Snapshot) -> None:
    from calitrace import journal
    from calitrace.checks.snapshot import to_plain

    try:
        with path.open("wb") as stream:
            writer = journal.Writer(stream, {"purpose": "check"})
            writer.write(journal.SNAPSHOT, to_plain(snapshot))
            writer.write(journal.END, {})
    except OSError as failure:
        raise UsageError(f"cannot write {path}: {failure.strerror}") from failure


def _read(path: Path) -> Snapshot:
    from calitrace.checks.snapshot import from_plain
    from calitrace.cli.report import load
    from calitrace.errors import Malformed

    found = load(path)
    if found.snapshot is None:
        raise UsageError(f"{path} has no snapshot", "is it a file that `calitrace check -w` wrote?")
    try:
        return from_plain(found.snapshot)
    except Malformed as wrong:
        raise UsageError(f"{path}: {wrong.cause}") from wrong
