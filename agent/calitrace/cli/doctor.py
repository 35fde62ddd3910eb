"""``calitrace doctor``: the preconditions, each by name."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from calitrace.cli.terminal import columns
from calitrace.errors import Exit


@click.command(
    "doctor",
    epilog="""\b
Examples:
  calitrace doctor
  calitrace doctor -o json | jq 'select(.lost != "")'
""",
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(output: str) -> int:
    """Say what this machine offers, and what is lost without each thing that it lacks.

    Exit status 3 when something essential is missing, 1 when something else is.
    """
    from calitrace.kernel import preflight
    from calitrace.report.folding import folded

    status = Exit.DONE
    for finding in preflight.iter_findings():
        if not finding.ok:
            status = Exit.ENVIRONMENT if finding.essential else max(status, Exit.FINDINGS)
        if output == "json":
            click.echo(json.dumps({**asdict(finding), "ok": finding.ok}))
            continue
        mark = "ok" if finding.ok else ("MISSING" if finding.essential else "lacking")
        click.echo(f"{mark:8} {finding.name:28} {finding.found}")
        for label, text in (("without it: ", finding.lost), ("hint: ", finding.hint)):
            if text:
                lines = folded(f"{'':38}{label}{text}", columns(), 38 + len(label))
                click.echo("\n".join(lines))
    return int(status)
