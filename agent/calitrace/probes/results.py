"""A run in numbers, and its lines as text or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calitrace.model import Outcome
from calitrace.packet import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calitrace.model import Probe


@dataclass(frozen=True)
class Summary:
    """*rtt_ms*: min, average, median, 99th percentile and max of answered probes, or None.

    *open*: those on their way when the run was stopped. *late*: unanswered ones whose reply came after all.
    *own_losses*: replies that our own sockets dropped.
    """

    sent: int
    answered: int
    refused: int
    unanswered: int
    send_errors: int
    open: int
    late: int
    duplicates: int
    own_losses: int
    rtt_ms: tuple[float, float, float, float, float] | None


def summarise(probes: Sequence[Probe], late: int = 0, duplicates: int = 0, own_losses: int = 0) -> Summary:
    """Count the outcomes."""
    outcomes = [probe.outcome for probe in probes]
    times = sorted(p.rtt_ns / 1e6 for p in probes if p.outcome is Outcome.ANSWERED and p.rtt_ns is not None)
    rtt = None
    if times:
        rtt = (times[0], sum(times) / len(times), _quantile(times, 0.5), _quantile(times, 0.99), times[-1])
    return Summary(
        len(probes),
        outcomes.count(Outcome.ANSWERED),
        outcomes.count(Outcome.REFUSED),
        outcomes.count(Outcome.UNANSWERED),
        outcomes.count(Outcome.SEND_ERROR),
        outcomes.count(Outcome.OPEN),
        late,
        duplicates,
        own_losses,
        rtt,
    )


def _quantile(ordered: Sequence[float], q: float) -> float:
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def probe_line(probe: Probe) -> str:
    """One probe in a line."""
    took = f"{probe.rtt_ns / 1e6:8.3f} ms" if probe.rtt_ns is not None else f"{'-':>11}"
    name = PROTOCOLS[probe.proto]
    text = (
        f"{probe.number:6} {name} {probe.src}:{probe.sport} > {probe.dst}:{probe.dport} {took}  {probe.outcome.value}"
    )
    return f"{text}: {probe.detail}" if probe.detail else text


def summary_lines(summary: Summary) -> list[str]:
    """The closing lines of a table."""
    lines = [
        f"{summary.sent} sent, {summary.answered} answered, {summary.refused} refused, "
        f"{summary.unanswered} unanswered"
        + (f", {summary.send_errors} not sent" if summary.send_errors else "")
        + (f", {summary.open} open when the run was stopped" if summary.open else "")
        + (f", {summary.late} late replies" if summary.late else "")
        + (f", {summary.duplicates} duplicate replies" if summary.duplicates else "")
    ]
    if summary.rtt_ms:
        low, mean, median, high, most = summary.rtt_ms
        lines.append(f"round trip ms: min {low:.3f} avg {mean:.3f} p50 {median:.3f} p99 {high:.3f} max {most:.3f}")
    if summary.own_losses:
        lines.append(f"warning: {summary.own_losses} replies lost in our own receive buffers")
    return lines


def probe_object(probe: Probe) -> str:
    """One probe as JSON."""
    return json.dumps(
        {
            "type": "probe",
            "number": probe.number,
            "proto": PROTOCOLS[probe.proto],
            "src": probe.src,
            "sport": probe.sport,
            "dst": probe.dst,
            "dport": probe.dport,
            "len_bytes": probe.size_bytes,
            "outcome": probe.outcome.value,
            "rtt_ms": None if probe.rtt_ns is None else probe.rtt_ns / 1e6,
            "detail": probe.detail or None,
        }
    )


def summary_object(summary: Summary) -> str:
    """The summary as JSON."""
    rtt: dict[str, Any] | None = None
    if summary.rtt_ms:
        rtt = dict(zip(("min", "avg", "p50", "p99", "max"), summary.rtt_ms, strict=True))
    return json.dumps(
        {
            "type": "summary",
            "sent": summary.sent,
            "answered": summary.answered,
            "refused": summary.refused,
            "unanswered": summary.unanswered,
            "send_errors": summary.send_errors,
            "open": summary.open,
            "late": summary.late,
            "duplicates": summary.duplicates,
            "own_losses": summary.own_losses,
            "rtt_ms": rtt,
        }
    )
