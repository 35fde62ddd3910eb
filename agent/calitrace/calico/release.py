"""Calico's releases, as far as one can tell: often a range, because only the shape of a map gives it away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Version = tuple[int, int]
OLDEST: Version = (3, 13)  # the first with the eBPF dataplane
MASTER: Version = (3, 33)  # whatever follows the last release that we know
_TEXT = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[.-].*)?")
# Name and value size (bytes, of one CPU) of the maps whose shape changed most often. Source: felix/bpf/counters/map.go
# and felix/bpf/state/map.go of each release.
_BY_MAP: Mapping[tuple[str, int], tuple[Version, Version]] = {
    ("cali_counters2", 112): ((3, 26), (3, 29)),
    ("cali_counters3", 136): ((3, 30), (3, 30)),
    ("cali_counters5", 200): ((3, 31), (3, 31)),
    ("cali_counters6", 208): ((3, 32), (3, 32)),
    ("cali_counters6", 216): (MASTER, MASTER),
    ("cali_state2", 416): ((3, 25), (3, 26)),
    ("cali_state4", 464): ((3, 27), (3, 27)),
    ("cali_state4", 480): ((3, 28), (3, 29)),
    ("cali_state4", 488): ((3, 30), (3, 31)),
    ("cali_state6", 512): ((3, 32), MASTER),
}
# Before v3.24 there are no such maps. Source: felix/bpf/conntrack/map.go, felix/bpf/nat/maps.go.
_OLD_BY_MAP: Mapping[tuple[str, int], tuple[Version, Version]] = {
    ("cali_v4_ct", 56): ((3, 13), (3, 13)),
    ("cali_v4_ct2", 64): ((3, 14), (3, 23)),
    ("cali_v4_nat_fe2", 16): ((3, 15), (3, 21)),
}


@dataclass(frozen=True)
class Release:
    """Calico is between *oldest* and *newest*, both included. *source*: what says so. *patch*: the third number, where
    that is told.
    """

    oldest: Version
    newest: Version
    source: str
    patch: int | None = None

    def __str__(self) -> str:
        first, last = _name(self.oldest), _name(self.newest)
        return first if first == last else f"{first} to {last}"


def _name(version: Version) -> str:
    return "master" if version >= MASTER else f"v{version[0]}.{version[1]}"


def parse(text: str, source: str) -> Release | None:
    """The release that a version or an image tag names: ``v3.28.1``, ``3.31``, ``master``; None for another text."""
    if text == "master":
        return Release(MASTER, MASTER, source)
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    version = (int(match[1]), int(match[2]))
    return Release(version, version, source, int(match[3]) if match[3] else None)


def of_maps(maps: Iterable[tuple[str, int]]) -> Release | None:
    """The releases that have all these maps. *maps*: name and value size of each; those that tell nothing may be there.

    None when none of them tells, or they contradict each other, as in the middle of an upgrade.
    """
    every = list(maps)
    table = _BY_MAP if any(each in _BY_MAP for each in every) else _OLD_BY_MAP
    telling = [each for each in every if each in table]
    if not telling:
        return None
    oldest = max(table[each][0] for each in telling)
    newest = min(table[each][1] for each in telling)
    source = ", ".join(f"map {name} with values of {size} bytes" for name, size in telling)
    return Release(oldest, newest, source) if oldest <= newest else None
