"""Drops as text and as JSON (docs/json.md)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calitrace.correlate.drops import hook_of, stack
from calitrace.packet import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from calitrace.correlate.drops import Cause, Dropped, Names
    from calitrace.model import Cell, Topology

_WIDE = 110  # columns: on a terminal with fewer the cause has a line of its own
_FEW = 12  # columns: so does one of which less would be seen
_BELOW = " " * 13
_HOOKS = {"tc ingress": "in", "tc egress": "out", "XDP": "xdp", "netkit": "nk", "": ""}


@dataclass
class Sums:
    """seen = shown + harmless + filtered + limited + unsampled + malformed + unread + lost, exactly, and counts all
    *runs* of our program.

    *unread*: what we did not look at: there were enough (-c), or we had to stop, since nobody read what we print.
    *missed*: where it interrupted itself and did not run; *other*: seen, but in no cell of the totals; *ns*: its time.
    """

    seen: int = 0
    shown: int = 0
    harmless: int = 0
    filtered: int = 0
    limited: int = 0
    unsampled: int = 0
    lost: int = 0
    stacks_lost: int = 0
    missed: int = 0
    other: int = 0
    malformed: int = 0
    runs: int = 0
    ns: int = 0
    unread: int = 0

    def settle(self) -> None:
        """Of all that was seen, what is in no other part was not looked at."""
        parts = (self.shown, self.harmless, self.filtered, self.limited, self.unsampled, self.malformed, self.lost)
        self.unread = self.seen - sum(parts)

    def line(self) -> str:
        """The closing line."""
        parts = [f"{self.shown} shown", f"{self.harmless} harmless", f"{self.filtered} filtered"]
        parts += [
            f"{number} {name}"
            for name, number in (
                ("rate-limited", self.limited),
                ("not sampled", self.unsampled),
                ("not decoded", self.malformed),
                ("not looked at", self.unread),
            )
            if number
        ]
        text = f"{self.seen} drops seen: {', '.join(parts)}, {self.lost} lost"
        if self.stacks_lost:
            text += f"; {self.stacks_lost} stacks lost"
        if self.missed:
            text += f"; {self.missed} more in an interrupted program"
        if self.runs:
            text += f"; our cost {self.ns / self.runs:.0f} ns a drop"
        return text

    def to_object(self) -> dict[str, Any]:
        """The summary."""
        return {
            "type": "summary",
            "drops_seen": self.seen,
            "shown": self.shown,
            "harmless": self.harmless,
            "filtered": self.filtered,
            "limited": self.limited,
            "unsampled": self.unsampled,
            "malformed": self.malformed,
            "unread": self.unread,
            "events_lost": self.lost,
            "stacks_lost": self.stacks_lost,
            "programs_missed": self.missed,
            "in_no_cell": self.other,
            "runs": self.runs,
            "cost_ns": round(self.ns / self.runs, 1) if self.runs else None,
        }


def tuple_of(dropped: Dropped) -> str:
    """``tcp SYN 10.0.0.1:40001 > 10.0.0.2:80``, of the packet inside a tunnel; or what else it is."""
    layer = dropped.event.packet.inner
    if layer is not None:
        return str(layer)
    return f"{dropped.event.len_bytes} bytes, not IP" if dropped.event.len_bytes else "no packet data"


def short(cause: Cause) -> str:
    """Cause and evidence of a line: ``calico DROPPED_BY_POLICY default.deny rule 0 (deny) [log, state]``."""
    return f"{_words(cause)} {_evidence(cause)}"


def _words(cause: Cause) -> str:
    if not cause.by_calico:
        return cause.detail
    words = ["calico", cause.calico_reason or cause.detail]
    if cause.calico_reason:
        words += [", ".join(cause.rules)] * bool(cause.rules)
    return " ".join(words)


def _evidence(cause: Cause) -> str:
    return f"[{', '.join(cause.sources)}]"


def header(width: int = 0) -> list[str]:
    """The titles of ``table_lines``."""
    return _lines(f"{'TIME':<12} {'INTERFACE HOOK':<19} {'PACKET':<41}", "CAUSE", "[EVIDENCE]", width)


def table_lines(dropped: Dropped, cause: Cause, clock: str, names: Names, width: int = 0) -> list[str]:
    """One drop. *clock*: the time, as text. *width*: columns that there are, 0 for all in one line.

    What does not fit goes in this order: the pod, the end of the cause.
    """
    place = f"{cause.place.interface or '-'} {_HOOKS[cause.place.hook]}".strip()
    pod = names.pods.get(cause.place.interface)
    head, evidence = f"{clock:<12} {place:<19} {tuple_of(dropped):<41}", _evidence(cause)
    lines = _lines(head, _words(cause), evidence, width)
    if pod and (not width or len(lines[-1]) + 1 + len(pod) <= width):
        lines[-1] += f" {pod}"
    return lines


def _lines(head: str, words: str, evidence: str, width: int) -> list[str]:
    room = width and max(width - len(evidence) - 1, 1)
    if 0 < width < _WIDE or 0 < room < len(head) + _FEW:
        return [fit(head.rstrip(), width), f"{fit(_BELOW + words, room)} {evidence}"]
    return [f"{fit(f'{head} {words}', room)} {evidence}"]


def fit(line: str, width: int) -> str:
    """The line, cut off where it is longer than *width* columns; 0: as it is."""
    return line if not width or len(line) <= width else f"{line[: width - 1]}…"


def iter_explanation(cause: Cause, harmless: str, pod: str = "") -> Iterator[str]:
    """The lines below it with -v."""
    yield f"    {cause.place}{f', pod {pod}' if pod else ''}: {cause.text} ({cause.confidence.value})"
    if harmless:
        yield f"    harmless: {harmless}"
    for line in cause.evidence:
        yield f"    {line}"


def drop_object(dropped: Dropped, cause: Cause, harmless: str, time_ns: int, names: Names) -> dict[str, Any]:
    """One drop. *time_ns*: since 1970."""
    event, layer = dropped.event, dropped.event.packet.inner
    return {
        "type": "drop",
        "time_ns": time_ns,
        "namespace": cause.place.namespace,
        "interface": cause.place.interface,
        "hook": cause.place.hook,
        "pod": names.pods.get(cause.place.interface),
        "packet": [str(each) for each in event.packet.layers],
        "proto": PROTOCOLS.get(layer.proto, str(layer.proto)) if layer else None,
        "src": str(layer.src) if layer else None,
        "sport": layer.sport if layer else None,
        "dst": str(layer.dst) if layer else None,
        "dport": layer.dport if layer else None,
        "len_bytes": event.len_bytes,
        "mark": event.mark,
        "by_calico": cause.by_calico,
        "cause": cause.text,
        "confidence": cause.confidence.value,
        "calico_reason": cause.calico_reason or None,
        "skb_drop_reason": cause.skb_drop_reason or None,
        "location": cause.symbol,
        "rules": list(cause.rules),
        "sources": list(cause.sources),
        "evidence": list(cause.evidence),
        "stack": list(stack(dropped, names)),
        "harmless": harmless or None,
    }


def cell_object(cell: Cell, number: int, topology: Topology, names: Names) -> dict[str, Any]:
    """One exact total."""
    link, namespace = topology.link(cell.netns, cell.ifindex), topology.namespace(cell.netns)
    reason, symbol = names.reason(cell.skb_drop_reason), names.symbols.get(cell.location, f"{cell.location:#x}")
    return {
        "type": "total",
        "drops": number,
        "skb_drop_reason": reason,
        "location": symbol,
        "namespace": namespace.name if namespace else None,
        "interface": link.name if link else None,
        "hook": hook_of(reason, symbol, names),
        "ip_proto": cell.ip_proto,
    }


def dump(plain: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(plain, separators=(",", ":"))


def iter_top(
    counts: Mapping[Cell, int], other: int, causes: Counter[str], topology: Topology, names: Names, rows: int
) -> Iterator[str]:
    """The table of causes: the kernel's exact totals, then what the sample says of those that Calico made.

    *other*: drops that found no cell. *causes*: short cause to number of detailed drops.
    """
    # Cells differ by more than is shown: a function drops in many places.
    sums: Counter[tuple[str, str, str, str]] = Counter()
    for cell, number in counts.items():
        link, namespace = topology.link(cell.netns, cell.ifindex), topology.namespace(cell.netns)
        interface = link.name if link else "-"
        where = f"{namespace.name} {interface}" if namespace else interface
        function = names.symbols.get(cell.location, f"{cell.location:#x}").split("+", 1)[0].split(".", 1)[0]
        proto = PROTOCOLS.get(cell.ip_proto, str(cell.ip_proto)) if cell.ip_proto else "-"
        sums[names.reason(cell.skb_drop_reason), function, where, proto] += number
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    table = [("DROPS", "REASON", "FUNCTION", "INTERFACE", "PROTO")]
    table += [(str(number), *shown) for shown, number in ordered[:rows]]
    if rest := sum(number for _, number in ordered[rows:]) + other:
        table.append((str(rest), "all others", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [cell.ljust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.rjust(widths[0]), *cells]).rstrip()
    if causes:
        yield ""
        yield f"{'DETAILED':>{widths[0]}}  CAUSE [EVIDENCE]"
        for text, number in causes.most_common(rows):
            yield f"{number:>{max(widths[0], 8)}}  {text}"
