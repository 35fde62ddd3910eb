"""Kernel addresses to function names, from /proc/kallsyms."""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from pathlib import Path

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


@cache
def _table() -> tuple[list[int], list[str]]:
    """Addresses in order, and their names. Read once: a module that is loaded later has no names here."""
    starts: list[int] = []
    names: list[str] = []
    with KALLSYMS.open() as lines:
        for line in lines:
            parts = line.split(None, 3)
            if parts[1] in "tTwW":
                starts.append(int(parts[0], 16))
                names.append(parts[2])
    order = sorted(range(len(starts)), key=starts.__getitem__)
    return [starts[i] for i in order], [names[i] for i in order]
