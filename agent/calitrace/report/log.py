"""Calico's debug log for people and for programs: a line or an object for each passage, and the statistics.

The execution time that Calico prints runs from the program's first instruction to its last line and holds the time
that printing took: with the log on, 10 to 100 times what the program takes without. It compares programs with each
other; it is not what a packet costs in production.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from calitrace.calico.log import Form
from calitrace.calico.passage import missing_filter
from calitrace.report.folding import folded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.calico.log import Line, Reader
    from calitrace.calico.passage import Flow, Passage

_WIDE = 112  # columns: on a terminal with fewer the packet has lines of its own
_BELOW = 14
_BAR = 40
_PERCENTILES = (50, 90, 99)
_DIRECTIONS = {
    ("I", True): "to the pod (policy ingress); the program sits at the tc egress hook of the host's end",
    ("E", True): "from the pod (policy egress); the program sits at the tc ingress hook of the host's end",
    ("I", False): "into the host; tc ingress hook",
    ("E", False): "out of the host; tc egress hook",
    ("X", True): "XDP, before tc ingress",
    ("X", False): "XDP, before tc ingress",
}
_RETURNED = {-1: "on to the host's stack", 0: "accepted", 2: "dropped", 7: "redirected to another interface"}


def time_of(passage: Passage) -> str:
    """Seconds of the trace clock, with microseconds; ``-`` where the header was cut off."""
    return seconds(passage.lines[0].time_ns)


def seconds(time_ns: int) -> str:
    """``5304.517741``."""
    return f"{time_ns // 10**9}.{time_ns % 10**9 // 1000:06d}" if time_ns else "-"


def process_of(passage: Passage) -> str:
    """``python3-18179``: the task in whose context the program ran, which is seldom the packet's owner."""
    context = passage.lines[-1].context
    return f"{context.comm}-{context.pid}" if context.comm else "-"


def verdict_of(passage: Passage) -> str:
    """ALLOW, DENY, or ``?`` when no last line was seen."""
    return passage.verdict or "?"


def execution_of(passage: Passage) -> str:
    """``173.0us``, or ``-``."""
    return f"{passage.execution_ns / 1000:.1f}us" if passage.execution_ns is not None else "-"


def details(passage: Passage) -> list[str]:
    """What else is known, the most telling first."""
    facts = passage.facts
    found = []
    if passage.verdict != "ALLOW":
        found += [each for each in dict.fromkeys((passage.calico_reason, passage.why())) if each]
    if facts.no_backend:
        found.append("no backend")
    found += [each for each in passage.decisions() if each not in found]
    if facts.conntrack:
        found.append(f"conntrack {facts.conntrack}")
    if facts.policy:
        found.append(facts.policy if facts.policy.startswith("no policy") else f"policy {facts.policy}")
    return found + [mark.value for mark in passage.marks]


def header(width: int = 0) -> list[str]:
    """The titles of ``table_lines``."""
    return _lines(f"{'TIME':>13} {'PROCESS':18} {'INTERFACE':17} {'VERDICT':7} {'EXEC':>8}", "PACKET", width)


def _lines(head: str, text: str, width: int) -> list[str]:
    if 0 < width < _WIDE:
        return [head, *folded(" " * _BELOW + text, width, _BELOW)]
    return folded(f"{head}  {text}", width, _BELOW)


def table_lines(passage: Passage, width: int = 0) -> list[str]:
    """One passage. *width*: columns that there are, 0 for all in one line."""
    flows = passage.facts.flows
    packet = " in ".join(str(flow) for flow in reversed(flows)) or "-"
    more = "; ".join(details(passage))
    head = (
        f"{time_of(passage):>13} {process_of(passage):18} {passage.name:17} "
        f"{verdict_of(passage):7} {execution_of(passage):>8}"
    )
    return _lines(head, f"{packet} [{more}]" if more else packet, width)


def compact_line(passage: Passage) -> str:
    """Interface, verdict and the innermost packet: fits 80 columns."""
    flows = passage.facts.flows
    why = details(passage)[:1] if passage.verdict != "ALLOW" else []
    return " ".join([f"{passage.name:17} {verdict_of(passage):5}", str(flows[-1]) if flows else "-", *why])


def iter_explanation(passage: Passage) -> Iterator[str]:
    """Direction, verdict and time in words, then Calico's own lines."""
    tag = passage.tag
    words = _DIRECTIONS.get((tag.direction, tag.workload), "a program that names no interface")
    yield f"  {passage.name}: {words}" + ("; the name is cut to 8 characters" if tag.cut else "")
    yield f"  {_verdict_words(passage)}"
    if passage.execution_ns is not None:
        yield f"  {passage.execution_ns} ns in the program, with the time that writing this log took"
    for line in passage.lines:
        yield f"    {line.text}"


def _verdict_words(passage: Passage) -> str:
    if not passage.verdict:
        return "no verdict: " + (", ".join(mark.value for mark in passage.marks) or "only the policy's Log action")
    if passage.verdict == "DENY":
        why = passage.why() or "the reason was not printed"
        return f"DENY: the packet was dropped: {why}"
    if passage.rc is None:
        return "ALLOW: Calico let the packet pass"
    return f"ALLOW, return code {passage.rc}: {_RETURNED.get(passage.rc, 'unknown to us')}"


def line_text(line: Line) -> str:
    """A line of no packet, as the kernel would print it."""
    if not line.ktime_ns:
        return line.raw
    context = line.context
    return (
        f"{context.comm:>16}-{context.pid:<7} [{context.cpu:03d}] {seconds(line.ktime_ns)}: "
        f"bpf_trace_printk: {line.raw.rstrip()}"
    )


def passage_object(passage: Passage, lines: bool = False) -> dict[str, Any]:
    """The stable JSON of docs/json.md."""
    facts = passage.facts
    context = passage.lines[-1].context
    shown: dict[str, Any] = {
        "type": "passage",
        "time_ns": passage.started_ns,
        "comm": context.comm or None,
        "pid": context.pid if context.comm else None,
        "cpu": context.cpu if context.cpu >= 0 else None,
        "interface": passage.interface or None,
        "interface_cut": passage.tag.cut,
        "policy_direction": passage.direction or None,
        "hook": passage.tag.hook or None,
        "ipv6": passage.tag.ipv6,
        "verdict": passage.verdict or None,
        "code": passage.printed_code or None,
        "calico_reason": passage.calico_reason or None,
        "cause": passage.why() or None,
        "return_code": passage.rc,
        "execution_ns": passage.execution_ns,
        "packets": [_flow(flow) for flow in facts.flows],
        "after_nat": _flow(facts.after_nat) if facts.after_nat else None,
        "tunnel_from": facts.tunnel_from or None,
        "tunnel_to": facts.tunnel_to or None,
        "conntrack": facts.conntrack or None,
        "policy": facts.policy or None,
        "no_backend": facts.no_backend,
        "forwarding": facts.forwarding or None,
        "marks": [mark.value for mark in passage.marks],
    }
    if lines:
        shown["lines"] = passage.texts
    return shown


def line_object(line: Line) -> dict[str, Any]:
    """A line that belongs to no packet, or that we do not know."""
    return {
        "type": "line",
        "form": line.form.value,
        "time_ns": line.time_ns or None,
        "text": line_text(line),
    }


def _flow(flow: Flow) -> dict[str, Any]:
    return {
        "proto": flow.proto or None,
        "src": flow.src or None,
        "sport": flow.sport or None,
        "dst": flow.dst or None,
        "dport": flow.dport or None,
    }


class Stats:
    """Counts over passages. Its size depends on the number of interfaces, not on that of packets."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.marks: Counter[str] = Counter()
        self.packets: Counter[tuple[str, str]] = Counter()
        self.filters: Counter[str] = Counter()
        # With three significant digits: at most 900 different times for each power of ten.
        self._times: dict[tuple[str, str], Counter[int]] = {}

    def add(self, passage: Passage) -> None:
        """Count one."""
        place = passage.interface, passage.tag.hook
        self.packets[place] += 1
        times = self._times.setdefault(place, Counter())
        self.verdicts[passage.verdict or "none"] += 1
        if passage.verdict == "DENY":
            self.causes[passage.why() or "not printed"] += 1
        for mark in passage.marks:
            self.marks[mark.value] += 1
        if passage.execution_ns is not None:
            times[_rounded(passage.execution_ns)] += 1

    def stray(self, line: Line) -> None:
        """Take note of a line that no program came for."""
        interface = missing_filter(line)
        if interface:
            self.filters[interface] += 1

    def iter_strays(self) -> Iterator[str]:
        """What such lines say, for people; nothing where there are none."""
        if self.filters:
            yield "log filters that programs ask for in vain, with the log off: left of an earlier"
            yield "bpfLogFilters, it seems; the packets pass unlogged (projectcalico/calico#9760):"
            for interface, count in self.filters.most_common():
                yield f"  {count:8} {interface}"

    def to_object(self, reader: Reader, lost: int) -> dict[str, Any]:
        """The one object of ``--stats -o json``. *lost*: events that the kernel could not give us."""
        counts = reader.counts
        return {
            "type": "stats",
            "lines_total": reader.total,
            "lines_calico": counts[Form.CALICO],
            "lines_unknown": counts[Form.UNKNOWN],
            "lines_other": counts[Form.OTHER] + counts[Form.LOST] + counts[Form.BLANK],
            "lines_blank": counts[Form.BLANK],
            "events_lost": lost,
            "packets": self.packets.total(),
            "verdicts": dict(self.verdicts),
            "drops": dict(self.causes.most_common()),
            "marks": dict(self.marks),
            "filters_missing": dict(self.filters),
            "interfaces": [
                {
                    "interface": interface,
                    "hook": hook or None,
                    "packets": self.packets[interface, hook],
                    "execution_ns": {f"p{p}": v for p, v in percentiles(self._times[interface, hook]).items()},
                    "histogram": [
                        {"from_ns": low, "to_ns": 2 * low - 1, "count": count}
                        for low, count in histogram(self._times[interface, hook])
                    ],
                }
                for interface, hook in sorted(self.packets)
            ],
        }

    def iter_lines(self, reader: Reader, lost: int) -> Iterator[str]:
        """The same for people."""
        counts = reader.counts
        words = {
            Form.CALICO: "Calico's",
            Form.UNKNOWN: "Calico's but unknown to us",
            Form.OTHER: "of others",
            Form.LOST: "about lost events",
            Form.BLANK: "blank",
        }
        found = ", ".join(f"{counts[form]} {name}" for form, name in words.items() if counts[form])
        yield f"{reader.total} lines" + (f": {found}" if found else "") + f"; {lost} events lost"
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.most_common())
        yield f"{self.packets.total()} packets through a program" + (f": {verdicts}" if verdicts else "")
        for mark, count in self.marks.most_common():
            yield f"  {count:8} {mark}"
        if self.causes:
            yield "dropped:"
            for cause, count in self.causes.most_common():
                yield f"  {count:8} {cause}"
        yield from self.iter_strays()
        for place, times in sorted(self._times.items()):
            if not times:
                continue
            found = ", ".join(f"p{p} {value / 1000:.1f}" for p, value in percentiles(times).items())
            yield f"{place[0]} {place[1]}: {times.total()} times, microseconds with printing: {found}"
            rows = histogram(times)
            most = max(count for _, count in rows)
            for low, count in rows:
                yield f"  {low:>9} - {2 * low - 1:<9} ns {count:8} |{'*' * round(_BAR * count / most):{_BAR}}|"


def _rounded(value: int) -> int:
    scale: int = 10 ** max(0, len(str(value)) - 3)
    return value // scale * scale


def percentiles(times: Counter[int]) -> dict[int, int]:
    """Percentile to nanoseconds, by nearest rank."""
    found: dict[int, int] = {}
    total, seen = times.total(), 0
    for value in sorted(times):
        seen += times[value]
        for percentile in _PERCENTILES:
            if percentile not in found and seen * 100 >= percentile * total:
                found[percentile] = value
    return found


def histogram(times: Counter[int]) -> list[tuple[int, int]]:
    """(lower bound, a power of two; count), empty rows between the first and the last included."""
    buckets: Counter[int] = Counter()
    for value, count in times.items():
        buckets[max(value, 1).bit_length() - 1] += count
    if not buckets:
        return []
    return [(1 << power, buckets[power]) for power in range(min(buckets), max(buckets) + 1)]
