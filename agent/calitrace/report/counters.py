"""Counters as text and as JSON (docs/json.md)."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calitrace.correlate import counters

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calitrace.correlate.counters import Reading, Row

_TITLES = ("SOURCE", "INTERFACE", "PLACE", "COUNTER")
_NONE = "no counter"
# Shorter than in JSON: with the name of a pod's interface a row has to fit 80 columns.
_PLACES = {"tc ingress": "ingress", "tc egress": "egress", "tc ingress+egress": "both"}


@dataclass(frozen=True)
class Choice:
    """Which rows are shown. *interfaces*: patterns, none for all; *everything*: also where nothing was counted."""

    interfaces: tuple[str, ...] = ()
    everything: bool = False

    def matches(self, interface: str) -> bool:
        """Whether an interface is asked for; "", a CPU's counters have none, only where all are."""
        return not self.interfaces or any(fnmatch.fnmatchcase(interface, each) for each in self.interfaces)

    def takes(self, row: Row, *, first: bool) -> bool:
        """Whether a row is shown. *first*: in the table of totals, where a counter that does not exist is named."""
        if not self.matches(row.key.interface):
            return False
        if self.everything or (row.change and row.total):
            return True
        return row.total != 0 if first else bool(row.delta)


@dataclass(frozen=True)
class Table:
    """The rows of one reading that are shown. *seconds*: since the reading before, None for the first.

    *unknown*: patterns that no interface matches.
    """

    reading: Reading
    seconds: float | None
    rows: tuple[Row, ...]
    gone: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


def table(before: Reading | None, after: Reading, choice: Choice) -> Table:
    """The first table when *before* is None, else what was counted between the two."""
    if before is None:
        rows, gone, seconds = counters.totals(after), [], None
    else:
        rows, gone = counters.rates(before, after), counters.gone(before, after)
        seconds = (after.mono_ns - before.mono_ns) / 1e9
    shown = tuple(row for row in rows if choice.takes(row, first=before is None))
    names = {row.key.interface for row in rows}
    unknown = tuple(each for each in choice.interfaces if not fnmatch.filter(names, each))
    return Table(after, seconds, shown, tuple(each for each in gone if choice.matches(each)), unknown)


def iter_text(found: Table, clock: str) -> Iterator[str]:
    """The lines of a table. *clock*: when it was read, as text."""
    if found.seconds is None:
        about, titles = f"{clock} since boot, or since each was made", [*_TITLES, "TOTAL"]
    else:
        about, titles = f"{clock} within {found.seconds:.3f} s", [*_TITLES, "COUNTED", "PER S", "TOTAL"]
    if not found.rows:
        yield f"{about}: nothing was counted"
        return
    yield f"{about}:"
    lines = [titles, *(_cells(row, first=found.seconds is None) for row in found.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for cells, row in zip(lines, (None, *found.rows), strict=True):
        words = [
            cell.ljust(width) if column < len(_TITLES) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        change = f"  {row.change}" if row is not None and row.change else ""
        yield "  ".join(words).rstrip() + change
    yield ""


def _cells(row: Row, *, first: bool) -> list[str]:
    key = row.key
    cells = [key.source, key.interface or "-", _PLACES.get(key.place, key.place) or "-", key.counter]
    total = _NONE if row.total is None else str(row.total)
    if first:
        return [*cells, total]
    if row.delta is None or row.per_second is None:
        return [*cells, "-", "-", total]
    return [*cells, str(row.delta), f"{row.per_second:.1f}", total]


def iter_notes(found: Table) -> Iterator[str]:
    """What the table cannot say, for stderr."""
    for source, why in counters.missing(found.reading).items():
        yield f"no counters of {source}: {why}"
    if found.unknown:
        yield f"no interface is called {', '.join(found.unknown)}"
    if found.gone:
        yield f"gone since the last reading, with what they counted: {', '.join(found.gone)}"
    hooks = [f"{row.key.interface} {row.key.place}" for row in found.rows if row.total is None]
    if hooks and found.seconds is None:
        yield (
            f"the kernel has no counter of what tcx programs drop ({', '.join(hooks)}): Calico's own reasons "
            "are above; --tcx has calitrace count while it runs"
        )


def iter_json(found: Table) -> Iterator[str]:
    """The reading, and an object for each row."""
    about = {"time_ns": found.reading.wall_ns, "seconds": found.seconds}
    yield _dump({"type": "reading", **about, "missing": counters.missing(found.reading), "gone": list(found.gone)})
    for row in found.rows:
        key = row.key
        yield _dump(
            {
                "type": "counter",
                **about,
                "source": key.source,
                "interface": key.interface or None,
                "place": key.place or None,
                "counter": key.counter,
                "total": row.total,
                "delta": row.delta,
                "per_second": None if row.per_second is None else round(row.per_second, 3),
                "change": row.change or None,
            }
        )


def _dump(plain: dict[str, Any]) -> str:
    return json.dumps(plain, separators=(",", ":"))
