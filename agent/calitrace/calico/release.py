"""Calico's releases, as far as one can tell: often a range, because only the shape of a map gives it away."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

Version = tuple[int, int]
OLDEST: Version = (3, 13)  # the first with the eBPF dataplane
MASTER: Version = (3, 33)  # whatever follows the last release that we know
_TEXT = re.compile(r"v?(\d+)\.(\d+)(?:[.-].*)?")
# Counters map and the size of its values, in bytes for each CPU. Source: felix/bpf/counters/map.go of each release.
_BY_COUNTERS: Mapping[tuple[str, int], tuple[Version, Version]] = {
    ("cali_counters2", 112): ((3, 26), (3, 29)),
    ("cali_counters3", 136): ((3, 30), (3, 30)),
    ("cali_counters5", 200): ((3, 31), (3, 31)),
    ("cali_counters6", 208): ((3, 32), (3, 32)),
    ("cali_counters6", 216): (MASTER, MASTER),
}


@dataclass(frozen=True)
class Release:
    """Calico is between *oldest* and *newest*, both included. *source*: what says so."""

    oldest: Version
    newest: Version
    source: str

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
    return Release(version, version, source)


def of_counters(name: str, value_size: int) -> Release | None:
    """The releases that have this counters map; None when none is known to."""
    found = _BY_COUNTERS.get((name, value_size))
    return None if found is None else Release(*found, f"map {name} with values of {value_size} bytes")
