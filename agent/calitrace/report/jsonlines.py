"""Verdicts and journeys as JSON, one object per line with stable keys (docs/json.md)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from calitrace.model import Drop, Hop
from calitrace.packet import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.correlate.analysis import Analysis
    from calitrace.correlate.drops import Place
    from calitrace.correlate.journey import Step


def iter_objects(analysis: Analysis) -> Iterator[str]:
    """A ``probe`` object for each probe, and a ``summary`` at the end."""
    for journey, verdict in zip(analysis.journeys, analysis.verdicts, strict=True):
        probe = journey.probe
        yield json.dumps(
            {
                "type": "probe",
                "number": probe.number,
                "proto": PROTOCOLS.get(probe.proto, str(probe.proto)),
                "src": probe.src,
                "sport": probe.sport,
                "dst": probe.dst,
                "dport": probe.dport,
                "outcome": probe.outcome.value,
                "rtt_ms": None if probe.rtt_ns is None else probe.rtt_ns / 1e6,
                "verdict": verdict.kind.value,
                "confidence": verdict.confidence.value,
                "cause": verdict.cause,
                "place": _place(verdict.place),
                "to": _place(verdict.to),
                "by_calico": verdict.by_calico,
                "calico_reason": verdict.calico_reason or None,
                "skb_drop_reason": verdict.skb_drop_reason or None,
                "rules": list(verdict.rules),
                "evidence": list(verdict.evidence),
                "next": verdict.next or None,
                "hops": [_hop(analysis, step, probe.sent_ns) for step in journey.steps],
            }
        )
    yield json.dumps(
        {
            "type": "summary",
            "probes": len(analysis.verdicts),
            "verdicts": {
                kind: sum(v.kind.value == kind for v in analysis.verdicts)
                for kind in sorted({v.kind.value for v in analysis.verdicts})
            },
            "events_lost": analysis.lost,
            "events_outside": analysis.outside,
            "notes": list(analysis.notes),
        }
    )


def _hop(analysis: Analysis, step: Step, sent_ns: int) -> dict[str, Any]:
    event = step.event
    namespace = analysis.topology.namespace(event.netns)
    link = analysis.topology.link(event.netns, event.ifindex)
    shown: dict[str, Any] = {
        "ms": (event.ktime_ns - sent_ns) / 1e6,
        "direction": step.direction.value,
        "namespace": namespace.name if namespace else None,
        "interface": link.name if link else None,
        "event": "drop" if isinstance(event, Drop) else event.kind.name.lower(),
        "packet": [str(layer) for layer in event.packet.layers],
        "tunnelled": step.tunnelled,
        "mark": event.mark,
        "calico_log": [
            {
                "interface": p.interface,
                "policy_direction": p.direction,
                "verdict": p.verdict or None,
                "execution_ns": p.execution_ns,
                "lines": p.texts,
            }
            for p in step.passages
        ],
    }
    if isinstance(event, Drop):
        shown["skb_drop_reason"] = analysis.names.drop_reason(event) or None
        shown["location"] = analysis.names.symbol(event)
    elif isinstance(event, Hop) and event.rc:
        shown["rc"] = event.rc
    return shown


def _place(place: Place | None) -> dict[str, str] | None:
    if place is None:
        return None
    return {"namespace": place.namespace, "interface": place.interface, "hook": place.hook}
