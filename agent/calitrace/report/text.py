"""Verdicts and journeys as text of 80 columns, one line per hop."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from calitrace.correlate.drops import Confidence
from calitrace.correlate.journey import Direction, Step
from calitrace.correlate.verdict import Kind, Verdict, tuple_of
from calitrace.events import HopKind
from calitrace.model import Drop, Outcome
from calitrace.report.folding import WIDTH, folded_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.calico.passage import Passage
    from calitrace.correlate.analysis import Analysis
    from calitrace.correlate.journey import Journey

_BELOW = " " * 13
_HOPS = {HopKind.RECEIVE: "in", HopKind.QUEUE: "out", HopKind.XMIT: "sent", HopKind.CONSUME: "end"}


def iter_report(analysis: Analysis, *, stories: int = 1, verbose: bool = False) -> Iterator[str]:
    """Lines of the whole report: *stories* journeys for each different verdict, then the verdicts, then notes."""
    groups: dict[tuple[str, str], list[int]] = {}
    for number, verdict in enumerate(analysis.verdicts):
        groups.setdefault(_group(verdict), []).append(number)
    for members in groups.values():
        for number in members[:stories]:
            yield from iter_story(analysis, number, verbose=verbose)
            yield ""
    for members in groups.values():
        yield from _verdict(analysis.verdicts[members[0]], len(members), len(analysis.verdicts))
        yield ""
    for note in analysis.notes:
        yield from textwrap.wrap(f"note: {note}", WIDTH, subsequent_indent="      ")


def _group(verdict: Verdict) -> tuple[str, str]:
    cause = "" if verdict.kind is Kind.ANSWERED else verdict.cause
    return f"{verdict.kind.value} {verdict.place}", cause


def iter_story(analysis: Analysis, number: int, *, verbose: bool = False) -> Iterator[str]:
    """One probe's journey, a line for each hop; *verbose* adds driver hand-overs, ends and Calico's log lines."""
    journey, verdict = analysis.journeys[number], analysis.verdicts[number]
    yield f"probe {journey.probe.number}  {tuple_of(journey)}  {verdict.kind.value}"
    names = [n.name for n in analysis.topology.namespaces.values() if analysis.topology.observed(n.inum)]
    width = min(max((len(name) for name in names), default=4), 20)
    yield f"{'ms':>9}  {'where':{width}}  {'interface':17}  what"
    before = ""
    for step in journey.steps:
        if step.direction is Direction.CLOSE and not verbose:
            continue
        for passage in step.passages:
            yield from _passage(analysis, journey, step, passage, width, verbose)
        if not verbose and _minor(analysis, journey, step):
            continue
        what = _what(analysis, step)
        shown = _packet(step)
        if shown != before:
            before = shown
            yield from _fitting(_line(analysis, journey, step, width, what), shown)
        else:
            yield _line(analysis, journey, step, width, what)


def _fitting(line: str, text: str) -> Iterator[str]:
    """*line* and *text* beside each other, or below where they do not fit."""
    beside = f"{line} {text}" if line.endswith(":") else f"{line}  {text}"
    if len(beside) <= WIDTH:
        yield beside
    else:
        yield line
        yield from textwrap.wrap(text, WIDTH, initial_indent=_BELOW, subsequent_indent=_BELOW)


def _minor(analysis: Analysis, journey: Journey, step: Step) -> bool:
    """What only -v shows: hand-overs to the driver, normal ends, and the end of a reply that the probe has heard.

    The probe listens on a raw socket: to the kernel its reply has no socket.
    """
    event = step.event
    if isinstance(event, Drop):
        heard = journey.probe.outcome is Outcome.ANSWERED and step.direction is Direction.REPLY
        return heard and analysis.names.drop_reason(event) == "NO_SOCKET"
    return event.kind is HopKind.CONSUME or (event.kind is HopKind.XMIT and event.rc == 0)


def _line(analysis: Analysis, journey: Journey, step: Step, width: int, what: str) -> str:
    namespace = analysis.topology.namespace(step.event.netns)
    link = analysis.topology.link(step.event.netns, step.event.ifindex)
    when = (step.event.ktime_ns - journey.probe.sent_ns) / 1e6
    interface = link.name if link else "-"
    return f"{when:9.3f}  {namespace.name if namespace else '?':{width}}  {interface:17}  {what}"


def _what(analysis: Analysis, step: Step) -> str:
    if isinstance(step.event, Drop):
        reason = analysis.names.drop_reason(step.event)
        return f"DROP {reason}".rstrip()
    return _HOPS[step.event.kind]


def _packet(step: Step) -> str:
    packet = step.event.packet
    inner, tunnel = packet.inner, packet.tunnel
    text = str(inner) if inner else "?"
    if inner is not None and inner.is_icmp_error:
        text = f"icmp error type {inner.icmp_type} code {inner.icmp_code} {inner.src} > {inner.dst}"
    if tunnel:
        text = f"VXLAN {tunnel.src} > {tunnel.dst}"
    return "" if step.direction is Direction.CLOSE and tunnel else text


def _passage(
    analysis: Analysis, journey: Journey, step: Step, passage: Passage, width: int, verbose: bool
) -> Iterator[str]:
    namespace = analysis.topology.namespace(step.event.netns)
    # It may have run at an earlier hop that was not seen: elsewhere then.
    here = namespace and any(passage.is_at(link.name, link.ifindex) for link in namespace.links.values())
    when = (passage.ended_ns - journey.probe.sent_ns) / 1e6
    tag = passage.name
    verdict = passage.verdict or "no final line"
    why = passage.cause() if passage.verdict != "ALLOW" else ", ".join(passage.decisions())
    head = f"{when:9.3f}  {namespace.name if namespace and here else '?':{width}}  {tag:17}  Calico {verdict}"
    if why:
        yield from _fitting(f"{head}:", why)
    else:
        yield head
    if verbose:
        for line in passage.texts:
            yield f"{_BELOW}{line}"


def _verdict(verdict: Verdict, members: int, total: int) -> Iterator[str]:
    yield from textwrap.wrap(
        f"VERDICT {verdict.cause if verdict.kind is not Kind.ANSWERED else 'healthy: answered'}",
        WIDTH,
        subsequent_indent="        ",
    )
    rows = [("probes", f"{members} of {total}")]
    if verdict.place:
        where = str(verdict.place) + (f" (towards {verdict.to})" if verdict.to else "")
        rows.append(("where", where))
    if verdict.calico_reason:
        rows.append(("Calico", verdict.calico_reason))
    if verdict.skb_drop_reason:
        rows.append(("kernel", verdict.skb_drop_reason))
    if verdict.confidence is not Confidence.NONE:
        rows.append(("confidence", verdict.confidence.value))
    rows += [("evidence" if first == 0 else "", each) for first, each in enumerate(verdict.evidence)]
    for name, text in rows:
        yield from textwrap.wrap(f"  {name:10}  {text}", WIDTH, subsequent_indent=" " * 14, break_long_words=False)
    if verdict.next:
        yield from folded_command(verdict.next, f"  {'next':10}  ")


def summary(analysis: Analysis) -> str:
    """One line: how many probes, and what became of them."""
    kinds = Counter(verdict.kind.value for verdict in analysis.verdicts)
    what = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) or "stopped before the first"
    return f"{len(analysis.verdicts)} probes: {what}"
