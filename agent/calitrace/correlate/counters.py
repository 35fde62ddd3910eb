"""Two readings of a node's counters to what was counted between them.

A counter is known by what holds it: the map of Calico's, the interface, the qdisc. Where that was made anew, as when
Felix replaces its maps or a pod comes back under its name, or where a count is below the one before, nothing can be
subtracted: the row says so and has no rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

from calitrace.calico import reasons
from calitrace.checks.drops import HOOKS
from calitrace.checks.snapshot import Missing, build
from calitrace.errors import Malformed

MADE_ANEW, NEW, BACKWARDS, FIRST = "made anew", "new", "went backwards", "first read"
_ROOT = 0xFFFFFFFF
_NOT_READ = Missing("not read")
# Of rtnl_link_stats64 what stands for packets that were lost. Source: include/uapi/linux/if_link.h
STATISTICS = (
    "rx_dropped",
    "rx_missed_errors",
    "rx_errors",
    "rx_over_errors",
    "rx_fifo_errors",
    "tx_dropped",
    "tx_errors",
    "tx_fifo_errors",
)


@dataclass(frozen=True)
class CalicoRow:
    """One row of a counters map, summed over CPUs: packets by reason code. *map_id*: the kernel's.

    *hook*: 0 tc ingress, 1 tc egress, 2 XDP. *interface*: Calico's name for *ifindex*, "" where it has none; in v3.24
    and v3.25, which pin a map for each interface, all that is known (*ifindex* is 0).
    """

    map: str
    map_id: int
    ifindex: int
    hook: int
    packets: tuple[int, ...]
    interface: str = ""


@dataclass(frozen=True)
class Qdisc:
    """*handle*, *parent*: as the kernel has them, major << 16 | minor. *drops*: 32 bits, of clsact both hooks."""

    ifindex: int
    kind: str
    handle: int
    parent: int
    drops: int


@dataclass(frozen=True)
class Interface:
    """*statistics*: those of `STATISTICS`."""

    ifindex: int
    name: str
    statistics: dict[str, int]


@dataclass(frozen=True)
class Tcx:
    """The tcx programs at a *hook*, ``ingress`` or ``egress``, by name and in the order in which they run."""

    ifindex: int
    hook: str
    programs: tuple[str, ...]


@dataclass(frozen=True)
class TcDrops:
    """What tc and tcx programs at a *hook*, ``ingress`` or ``egress``, dropped since we began to count."""

    ifindex: int
    hook: str
    drops: int


@dataclass(frozen=True)
class Softnet:
    """One CPU's line of /proc/net/softnet_stat, which is the machine's. Both counts have 32 bits."""

    cpu: int
    dropped: int
    time_squeeze: int


@dataclass(frozen=True)
class Reading:
    """All counters of a node at one time. *mono_ns*: CLOCK_MONOTONIC, *wall_ns*: since 1970.

    *tc_drops*: None when they are not counted; a hook without any has no row.
    """

    mono_ns: int
    wall_ns: int
    calico: tuple[CalicoRow, ...] | Missing = _NOT_READ
    qdiscs: tuple[Qdisc, ...] | Missing = _NOT_READ
    interfaces: tuple[Interface, ...] | Missing = _NOT_READ
    tcx: tuple[Tcx, ...] | Missing = _NOT_READ
    softnet: tuple[Softnet, ...] | Missing = _NOT_READ
    tc_drops: tuple[TcDrops, ...] | Missing | None = None


class Key(NamedTuple):
    """Which counter. *source*: calico, clsact, tcx, interface, qdisc or softnet. *place*: hook, qdisc or CPU.

    *interface*: "" for a CPU's. *holder*: tells two things of the same name apart.
    """

    source: str
    interface: str
    place: str
    counter: str
    holder: tuple[int, ...]


class Row(NamedTuple):
    """A counter, and what was counted over an interval.

    *total*: None where the kernel has no such counter. *delta*, *per_second*: None in a first table, and where
    *change* says why nothing can be subtracted.
    """

    key: Key
    total: int | None
    delta: int | None = None
    per_second: float | None = None
    change: str = ""


def readings(frames: Iterable[Mapping[str, Any]]) -> Iterator[Reading]:
    """The readings of a journal. Raises Malformed for what is none, and where time goes backwards."""
    before = -1
    for plain in frames:
        found = build(Reading, plain)
        if found.mono_ns <= before:
            raise Malformed(0, f"a time after {before} ns", f"{found.mono_ns} ns", "reading")
        before = found.mono_ns
        yield found


def missing(reading: Reading) -> dict[str, str]:
    """Source to the reason why it could not be read."""
    found = {each.name: getattr(reading, each.name) for each in fields(Reading)}
    return {name: value.why for name, value in found.items() if isinstance(value, Missing)}


def totals(reading: Reading) -> list[Row]:
    """The first table: what each counter has."""
    return [Row(key, value) for key, value in _iter_values(reading)]


def rates(before: Reading, after: Reading) -> list[Row]:
    """What was counted from *before* to *after*, divided by the time between them."""
    old = dict(_iter_values(before))
    unread = missing(before)
    names: set[tuple[str, ...]] = set()
    seconds = (after.mono_ns - before.mono_ns) / 1e9
    found = []
    for key, value in _iter_values(after):
        was = old.get(key)
        if value is None:
            found.append(Row(key, None))
        elif was is None:
            names = names or {key[:4] for key in old}
            change = FIRST if _FIELDS[key.source] in unread else MADE_ANEW if key[:4] in names else NEW
            found.append(Row(key, value, change=change))
        elif value < was:
            found.append(Row(key, value, change=BACKWARDS))
        else:
            found.append(Row(key, value, value - was, (value - was) / seconds))
    return found


def gone(before: Reading, after: Reading) -> list[str]:
    """Names of the interfaces that went meanwhile, and with them what they had counted."""
    if isinstance(before.interfaces, Missing) or isinstance(after.interfaces, Missing):
        return []
    left = {each.ifindex for each in after.interfaces}
    return [each.name for each in before.interfaces if each.ifindex not in left]


_FIELDS = {
    "calico": "calico",
    "clsact": "qdiscs",
    "tcx": "tcx",
    "interface": "interfaces",
    "qdisc": "qdiscs",
    "softnet": "softnet",
}


@lru_cache
def _reasons(count: int) -> tuple[str, ...]:
    return tuple(reasons.counter_name(code, count) for code in range(count))


def _iter_values(reading: Reading) -> Iterator[tuple[Key, int | None]]:
    links = () if isinstance(reading.interfaces, Missing) else reading.interfaces
    names = {each.ifindex: each.name for each in links}

    def name(ifindex: int) -> str:
        return names.get(ifindex, f"ifindex {ifindex}")

    if not isinstance(reading.calico, Missing):
        for row in sorted(reading.calico, key=lambda each: (each.interface or name(each.ifindex), each.hook)):
            place, interface = HOOKS.get(row.hook, f"hook {row.hook}"), row.interface or name(row.ifindex)
            for counter, packets in zip(_reasons(len(row.packets)), row.packets, strict=True):
                yield Key("calico", interface, place, counter, (row.map_id, row.ifindex)), packets
    qdiscs = () if isinstance(reading.qdiscs, Missing) else reading.qdiscs
    for each in sorted(qdiscs, key=lambda each: name(each.ifindex)):
        if each.kind == "clsact":
            yield Key("clsact", name(each.ifindex), "tc ingress+egress", "dropped", (each.ifindex,)), each.drops
    counted = None
    if reading.tc_drops is not None and not isinstance(reading.tc_drops, Missing):
        counted = {(each.ifindex, each.hook): each.drops for each in reading.tc_drops}
    for chain in () if isinstance(reading.tcx, Missing) else reading.tcx:
        counter = "dropped" if counted is None else f"TC_{chain.hook.upper()}"
        drops = None if counted is None else counted.get((chain.ifindex, chain.hook), 0)
        yield Key("tcx", name(chain.ifindex), f"tc {chain.hook}", counter, (chain.ifindex,)), drops
    for link in links:
        for statistic, packets in link.statistics.items():
            yield Key("interface", link.name, "", statistic, (link.ifindex,)), packets
    for each in qdiscs:
        if each.kind != "clsact":
            holder = (each.ifindex, each.handle, each.parent)
            yield Key("qdisc", name(each.ifindex), qdisc_name(each), "dropped", holder), each.drops
    for line in () if isinstance(reading.softnet, Missing) else reading.softnet:
        for counter in ("dropped", "time_squeeze"):
            yield Key("softnet", "", f"cpu {line.cpu}", counter, (line.cpu,)), getattr(line, counter)


def qdisc_name(qdisc: Qdisc) -> str:
    """As tc names it: ``fq_codel 8001:``, and ``fq_codel 0: parent :1`` below another one."""
    name = f"{qdisc.kind} {qdisc.handle >> 16:x}:"
    if qdisc.parent == _ROOT or qdisc.kind == "ingress":
        return name
    major = f"{qdisc.parent >> 16:x}" if qdisc.parent >> 16 else ""
    return f"{name} parent {major}:{qdisc.parent & 0xFFFF:x}"
