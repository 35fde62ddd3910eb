"""What differs between two readings of the maps: two nodes, or one node at two times.

Services are compared by address and backends, never by Calico's ids, which every node gives by itself. Of two nodes
only services and failsafe ports should be the same: each has NodePorts on its own addresses, and routes, interfaces
and connections of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calitrace.calico.maps import MOST_BACKENDS
from calitrace.correlate.walk import network

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from calitrace.correlate.walk import Tables

_KEYS = {
    "routes": ("cidr",), "iface": ("ifindex",), "arp": ("addr", "ifindex"),
    "fsafes": ("proto", "port", "direction", "cidr"),
    "ip_sets": ("set_id", "cidr", "addr", "port", "proto"), "nat_aff": ("addr", "port", "proto", "client"),
    "ct": ("proto", "addr_a", "port_a", "addr_b", "port_b"), "qos": ("ifindex", "ingress", "family"),
}  # fmt: skip
_VOLATILE = {"map", "age_ns", "last_seen_ns", "ts_ns", "ab", "ba", "tokens", "last_update_ns"}


_SHARED = {"fsafes"}
OWN = "this node"


def own_addresses(tables: Tables) -> frozenset[str]:
    """The node's own addresses, which its routes say; loopback is everybody's."""
    hosts = (network(r["cidr"]) for r in tables.routes if {"local", "host"} <= set(r["flags"]))
    return frozenset(
        str(each.network_address)
        for each in hosts
        if each is not None and each.num_addresses == 1 and not each.is_loopback
    )


def services(tables: Tables, own: frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """Frontend as text to its backends, flags and whether it drops. *own*: addresses to call ``this node``."""
    known = {(b["id"], b["ordinal"]): f"{b['addr']}:{b['port']}" for b in tables.backends}
    found = {}
    for front in tables.frontends:
        source = f" from {front['source']}" if front["source"] else ""
        count = 0 if front["drop"] else min(front["count"], MOST_BACKENDS)
        place = OWN if front["addr"] in own else front["addr"]
        found[f"{place}:{front['port']}/{front['proto']}{source}"] = {
            "backends": sorted(known.get((front["id"], ordinal), "missing") for ordinal in range(count)),
            "flags": front["flags"],
            "affinity_s": front["affinity_s"],
            "drop": front["drop"],
        }
    return found


def entries(base: str, objects: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A map's entries by the text of their key, without what changes all the time. *base*: such as ``routes``."""
    names = _KEYS[base]
    return {
        " ".join(str(each[name]) for name in names if each.get(name) is not None): {
            name: value for name, value in each.items() if name not in names and name not in _VOLATILE
        }
        for each in objects
    }


def compared(base: str, *, nodes: bool) -> bool:
    """Whether that map is compared: its key is known to :func:`entries`, and *nodes* have it in common."""
    return base in (_SHARED if nodes else _KEYS)


def differences(
    what: str, before: Mapping[str, dict[str, Any]], after: Mapping[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One object for each entry that is on one side only, or differs: ``what key a b``, None for what is not there."""
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield {"what": what, "key": key, "a": before.get(key), "b": after.get(key)}


def rates(
    before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]], seconds: float
) -> Iterator[dict[str, Any]]:
    """Counters that moved, for each second. What went down was reset: its new value counts."""
    old = {(e.get("interface"), e.get("hook")): e["counters"] for e in before}
    for entry in after:
        place = (entry.get("interface"), entry.get("hook"))
        for reason, value in entry["counters"].items():
            past = old.get(place, {}).get(reason, 0)
            moved = value - past if value >= past else value
            if moved:
                yield {"what": "counter", "key": f"{place[0]} {place[1]} {reason}", "packets": moved,
                       "per_second": moved / seconds if seconds > 0 else None}  # fmt: skip
