"""``calitrace report``: the verdicts of a journal, offline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from calitrace.errors import Exit, Malformed, UsageError

if TYPE_CHECKING:
    from calitrace.journal import Journal


@click.command(
    "report",
    epilog="""\b
Examples:
  calitrace report -r incident.calitrace
  calitrace report -r incident.calitrace -v --stories 3
  calitrace report -r incident.calitrace -o json | jq .verdict
""",
)
@click.option("-r", "--read", "path", required=True, type=click.Path(path_type=Path), help="The journal.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-v", "--verbose", is_flag=True, help="All hops and Calico's log lines.")
@click.option(
    "--stories",
    default=1,
    type=click.IntRange(min=0),
    show_default=True,
    help="Journeys shown for each different verdict.",
)
@click.option("--check", is_flag=True, help="Exit with status 1 when a probe was not answered.")
def command(path: Path, output: str, verbose: bool, stories: int, check: bool) -> int:
    """Print the verdicts of a journal written with -w, from the journal alone."""
    return render(load(path, keep=True), output=output, verbose=verbose, stories=stories, check=check)


def load(path: Path, *, keep: bool = False) -> Journal:
    """Read a journal file. *keep*: what stands before garbage is of use. Raises UsageError when nothing is."""
    from calitrace import journal

    try:
        with path.open("rb") as stream:
            return journal.read(stream, keep=keep)
    except OSError as failure:
        raise UsageError(f"cannot read {path}: {failure.strerror}") from failure
    except Malformed as wrong:
        raise UsageError(f"{path}: {wrong.cause}", "is it a file that -w wrote?") from wrong


def render(journal: Journal, *, output: str, verbose: bool, stories: int, check: bool) -> int:
    """Print a report on stdout; returns the exit status."""
    from calitrace.correlate.analysis import analyse
    from calitrace.correlate.verdict import Kind
    from calitrace.report import jsonlines, text

    analysis = analyse(journal, short_names=output == "table")
    lines = (
        jsonlines.iter_objects(analysis)
        if output == "json"
        else text.iter_report(analysis, stories=stories, verbose=verbose)
    )
    for line in lines:
        click.echo(line)
    if output == "table":
        click.echo(text.summary(analysis))
    healthy = all(verdict.kind is Kind.ANSWERED for verdict in analysis.verdicts)
    return int(Exit.FINDINGS if check and not healthy else Exit.DONE)
