"""Calico's maps: their names and versions, and the bytes of one that was read.

Felix appends the version to a map's name when it is above 1 (``cali_v4_ct4``), and ``_old`` while it moves the
entries to a new one. Source: calico felix/bpf/maps/maps.go (VersionedName).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calitrace.calico.maptables import Layout

_NAME = re.compile(r"(?P<base>(?:xdp_)?cali_?\w*?)(?P<version>\d*)(?P<old>_old)?")


# Of a frontend whose count is nonsense not more backends than these are looked for.
MOST_BACKENDS = 10_000


@dataclass(frozen=True)
class RawMap:
    """A map as the kernel has it. *entries*: (key, value) pairs, which may be iterated more than once.

    *value_size*: of one CPU's value; a per-CPU map's entries hold *cpus* of them, each padded to 8 bytes.
    *pin*: path below the bpffs, "" when it is not pinned. *described*: the layout that BTF gave, where it counts.
    """

    name: str
    pin: str
    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    cpus: int
    entries: Iterable[tuple[bytes, bytes]]
    complete: bool = True
    notes: tuple[str, ...] = ()
    described: Layout | None = None


def identify(name: str) -> tuple[str, int, bool]:
    """(base name, version, whether it is an ``_old`` one) of a pin or kernel name: ``("cali_v4_ct", 4, False)``."""
    found = _NAME.fullmatch(name)
    if found is None:
        return name, 1, False
    return found["base"], int(found["version"] or 1), bool(found["old"])
