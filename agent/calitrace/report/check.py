"""Results of checks as a table, JSON lines, or Markdown for an incident ticket."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator

from calitrace.checks.finding import Check, Finding, Result, Severity, Status
from calitrace.checks.snapshot import Missing, Snapshot
from calitrace.report.folding import WIDTH, folded_command

_COMMANDS = frozenset(
    {
        *("kubectl", "calicoctl", "calico-node", "calitrace", "bpftool", "ip", "tc", "ethtool", "sysctl", "tcpdump"),
        *("aws", "gcloud", "mount", "kill", "rm", "kube-proxy"),
    }
)
_ORDER = (Severity.ERROR, Severity.WARNING, Severity.INFO)


def _by_severity(results: Iterable[Result]) -> list[tuple[Result, Finding]]:
    found = [(result, each) for result in results for each in result.findings]
    return sorted(found, key=lambda pair: _ORDER.index(pair[1].severity))


def counts(results: Iterable[Result]) -> str:
    """``2 errors, 1 warning; 40 checks passed, 7 not run``."""
    every = list(results)
    findings = [each.severity for result in every for each in result.findings]
    said = [_plural(findings.count(severity), severity.value) for severity in _ORDER if severity in findings]
    passed = sum(result.status is Status.PASSED for result in every)
    skipped = sum(result.status is Status.NOT_RUN for result in every)
    return f"{', '.join(said) or 'no findings'}; {_plural(passed, 'check')} passed, {skipped} not run"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 or word == "info" else f"{count} {word}s"


def _reasons(results: Iterable[Result]) -> dict[str, list[str]]:
    """Checks by the reason for which they were not run, or not wholly."""
    found: dict[str, list[str]] = {}
    for result in results:
        for why in dict.fromkeys(result.why):
            found.setdefault(why, []).append(result.check.id)
    return found


def iter_table(results: list[Result], *, verbose: bool = False) -> Iterator[str]:
    """Lines of at most 80 columns, but for commands and words that are longer: findings, gravest first, then why
    others were not run; *verbose*: each of these by name, and those that passed.
    """
    for result, finding in _by_severity(results):
        yield f"{finding.severity.value.upper():8} {result.check.id}{f'  {finding.subject}' if finding.subject else ''}"
        for label, lines in (
            ("saw", finding.evidence),
            ("means", (finding.meaning,)),
            ("fix", finding.fix.split("; ")),
        ):
            for number, line in enumerate(lines):
                is_command = label == "fix" and line.partition(" ")[0] in _COMMANDS
                fold = folded_command if is_command else _folded
                yield from fold(line, f"         {'' if number else label:6} ")
        yield f"         {'page':6} {result.check.section}"
        yield ""
    skipped = _reasons(results)
    if skipped:
        yield "NOT RUN"
        for why, names in skipped.items():
            yield from _folded(f"{why} ({names[0] if len(names) == 1 else _plural(len(names), 'check')})", "         ")
            if verbose and len(names) > 1:
                yield from _folded(", ".join(names), "           ")
        yield ""
    if verbose:
        yield "PASSED"
        yield from _folded(", ".join(r.check.id for r in results if r.status is Status.PASSED) or "none", "         ")
        yield ""
    yield counts(results)


def _folded(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]  # fmt: skip


def iter_json(results: Iterable[Result]) -> Iterator[str]:
    """A ``check`` object for each check, a ``finding`` for each finding behind it, and a ``summary``."""
    every = list(results)
    for result in every:
        yield json.dumps(
            {"type": "check", "id": result.check.id, "status": result.status.value, "why": list(result.why)}
        )
        for each in result.findings:
            yield json.dumps(
                {
                    "type": "finding",
                    "id": result.check.id,
                    "severity": each.severity.value,
                    "subject": each.subject or None,
                    "evidence": list(each.evidence),
                    "meaning": each.meaning,
                    "fix": each.fix,
                    "section": result.check.section,
                }
            )
    yield json.dumps(
        {
            "type": "summary",
            "findings": {s.value: sum(f.severity is s for r in every for f in r.findings) for s in _ORDER},
            "checks": {s.value: sum(r.status is s for r in every) for s in Status},
        }
    )


def iter_markdown(snapshot: Snapshot, results: list[Result]) -> Iterator[str]:
    """A report to paste into a ticket."""
    host = snapshot.host
    node = "a node" if isinstance(host, Missing) else host.node
    yield f"# Calico eBPF checks on {node}"
    yield ""
    if not isinstance(host, Missing):
        distribution = host.distribution.get("PRETTY_NAME", "distribution not known")
        yield f"- **Node:** {host.node}, Linux {host.kernel}, {distribution}"
    yield f"- **Taken:** {snapshot.taken}"
    yield f"- **Result:** {counts(results)}"
    found = _by_severity(results)
    if found:
        yield ""
        yield "| severity | check | about |"
        yield "|---|---|---|"
        for result, finding in found:
            yield f"| {finding.severity.value} | `{result.check.id}` | {_cell(finding.subject)} |"
    for result, finding in found:
        yield ""
        about = f" ({finding.subject})" if finding.subject else ""
        yield f"## {finding.severity.value.capitalize()}: {result.check.id}{about}"
        yield ""
        yield f"{finding.meaning[:1].upper()}{finding.meaning[1:]}."
        yield ""
        yield "Evidence:"
        yield ""
        yield "```"
        yield from finding.evidence
        yield "```"
        yield ""
        yield "What to do:"
        yield ""
        yield "```"
        yield from finding.fix.split("; ")
        yield "```"
        yield ""
        yield f'Calico\'s page "Troubleshoot eBPF mode": {result.check.section}.'
    skipped = _reasons(results)
    if skipped:
        yield ""
        yield "## Not run"
        yield ""
        for why, names in skipped.items():
            yield f"- {why}: {', '.join(f'`{name}`' for name in names)}"
    passed = [f"`{result.check.id}`" for result in results if result.status is Status.PASSED]
    if passed:
        yield ""
        yield "## Passed"
        yield ""
        yield ", ".join(passed)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def iter_explanation(check: Check) -> Iterator[str]:
    """What ``--explain`` prints."""
    yield f"{check.id}  ({check.section})"
    yield ""
    for paragraph in check.explanation.split("\n\n"):
        yield from textwrap.wrap(paragraph, WIDTH)
        yield ""
    yield from textwrap.wrap(f"needs: {', '.join(check.needs)}", WIDTH)
    if check.uses:
        yield from textwrap.wrap(f"uses, where there: {', '.join(check.uses)}", WIDTH)
