"""Kernel addresses to function names, from /proc/kallsyms."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

KALLSYMS = Path("/proc/kallsyms")


def resolve(addresses: set[int]) -> dict[int, str]:
    """``function+0xoffset`` for each address; left out where the kernel hides its symbols (kptr_restrict)."""
    if not addresses:
        return {}
    ordered, names = _table()
    found = {}
    for address in addresses:
        at = bisect_right(ordered, address) - 1
        if at >= 0 and ordered[-1]:
            found[address] = f"{names[at]}+{address - ordered[at]:#x}"
    return found


def are_readable() -> bool:
    """Whether the kernel shows where its functions are. Per-CPU symbols may come first, and begin at 0."""
    try:
        return next(_iter_functions(), (0, ""))[0] != 0
    except OSError:
        return False


def _iter_functions() -> Iterator[tuple[int, str]]:
    with KALLSYMS.open() as lines:
        for line in lines:
            parts = line.split(None, 3)
            if parts[1] in "tTwW":
                yield int(parts[0], 16), parts[2]


@cache
def _table() -> tuple[list[int], list[str]]:
    """Addresses in order, and their names. Read once: a module that is loaded later has no names here."""
    starts: list[int] = []
    names: list[str] = []
    for start, name in _iter_functions():
        starts.append(start)
        names.append(name)
    order = sorted(range(len(starts)), key=starts.__getitem__)
    return [starts[i] for i in order], [names[i] for i in order]
