"""What changes the node: removing entries, setting counters to zero, detaching connect-time load balancing.

Each is asked for with --allow-system-changes, shown before with --dry-run, and can be kept in a journal.
"""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from calitrace.cli import map_source, map_words
from calitrace.errors import Exit, LayoutMismatch, NotCalico, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from calitrace.calico.maps import RawMap
    from calitrace.kernel.maps import Found

_CTLB = "ctlb"


def _may_change(options: dict[str, Any]) -> bool:
    """Whether to do it. Raises UsageError when neither that nor a dry run was asked for."""
    if options["dry_run"]:
        if options.get("kept") is not None:
            raise UsageError("a dry run removes nothing to keep", "--write goes with --allow-system-changes")
        return False
    if not options["allowed"]:
        raise UsageError("this changes the node", "see what would go with --dry-run, do it with --allow-system-changes")
    return True


def _live_maps(options: dict[str, Any], base: str) -> list[tuple[Any, RawMap]]:
    """(what discovery found, the map) of every version that programs may use, or of that which --ver asks for."""
    from calitrace.calico.maps import identify
    from calitrace.kernel import maps

    where = maps.root(options["bpffs"], options["netns"], options["pid"])
    found = maps.find(where, options["netns"] or str(options["pid"] or ""))
    wanted = {f"cali_{base}", f"cali_v{6 if options.get('ipv6') else 4}_{base}"}
    version = options.get("version")
    chosen = [
        (each, maps.read(each))
        for each in found
        if identify(each.name)[0] in wanted and version in (None, identify(each.name)[1])
    ]
    if not chosen:
        raise NotCalico(f"no map cali_*{base}*", "`calitrace maps versions dump` lists the maps that are here")
    return chosen


def _keep(options: dict[str, Any], maps: list[RawMap]) -> None:
    """Write what is about to go into the journal of --write. Raises UsageError."""
    if options["kept"] is not None:
        source = map_source.Source(
            maps, {raw.pin for raw in maps}, now_ns=time.monotonic_ns(), node=socket.gethostname()
        )
        map_source.save(source, options["kept"])


def _remove(options: dict[str, Any], base: str, wanted: Callable[[dict[str, Any]], bool]) -> int:
    from calitrace.kernel import maps
    from calitrace.report import mapdump

    change = _may_change(options)
    going: list[tuple[Found, RawMap]] = []
    for found, raw in _live_maps(options, base):
        try:
            entries = list(raw.entries)  # read once: what is shown is what goes
            objects = mapdump.iter_objects(replace(raw, entries=entries), mapdump.Context(time.monotonic_ns()))
            chosen = [(pair, entry) for pair, entry in zip(entries, objects, strict=True) if wanted(entry)]
        except LayoutMismatch as wrong:
            raise map_source.refused(wrong) from wrong
        for _, entry in chosen:
            if not change:
                click.echo(mapdump.text(base, entry, raw=True))
        going.append((found, replace(raw, entries=[pair for pair, _ in chosen])))
    if change:
        _keep(options, [raw for _, raw in going])
    for found, raw in going:
        keys = [key for key, _ in raw.entries]
        gone = maps.delete(found, keys) if change else len(keys)
        click.echo(f"{found.name}: {gone} entries {'removed' if change else 'would be removed'}", err=True)
    return int(Exit.DONE)


def clean_conntrack(**options: Any) -> int:
    """Remove all conntrack entries: every connection through Calico starts anew, those with NAT break."""
    return _remove(options, "ct", lambda _: True)


def clean_arp(**options: Any) -> int:
    """Remove all neighbours: the way back of NodePort tunnels is looked up in the kernel until they are learnt anew."""
    return _remove(options, "arp", lambda _: True)


def remove_conntrack(proto: str, ip1: str, ip2: str, **options: Any) -> int:
    """Remove the entries between two addresses. PROTO: tcp, udp or a number."""
    name = map_words.proto(proto)
    ends = {map_words.address(ip1), map_words.address(ip2)}
    options["ipv6"] = options["ipv6"] or ":" in ip1
    return _remove(options, "ct", lambda e: e["proto"] == name and {e["addr_a"], e["addr_b"]} == ends)


def flush_counters(iface: str | None, **options: Any) -> int:
    """Set counters back to zero."""
    from calitrace.calico import reasons
    from calitrace.kernel import maps

    change = _may_change(options)
    source = map_source.live(options["bpffs"], options["netns"], options["pid"], options["policy_dir"])
    known = source.context().interfaces
    if iface is not None and iface not in known.values():
        raise UsageError(f"no interface {iface}", "list them with `calitrace maps counters dump`")
    going: list[tuple[Found, RawMap]] = []
    for found, raw in _live_maps(options, "counters"):
        pairs = list(raw.entries)  # read once: what is shown is what goes
        chosen = []
        for pair, entry in zip(
            pairs, map_source.objects(source, [replace(raw, entries=pairs)], understood=True), strict=True
        ):
            if iface in (None, entry.get("interface")):
                chosen.append(pair)
                if not change:
                    counts = (f"{reasons.caption(name)} {count}" for name, count in entry["counters"].items() if count)
                    place = f"{entry.get('interface', found.directory)} {entry.get('hook', '')}"
                    click.echo(f"{place}: {', '.join(counts) or 'all zero'}")
        going.append((found, replace(raw, entries=chosen)))
    if change:
        _keep(options, [raw for _, raw in going])
    for found, raw in going:
        keys = [key for key, _ in raw.entries]
        if change:
            maps.clear(found, keys)
        click.echo(f"{found.name}: {len(keys)} rows {'set to zero' if change else 'would be set to zero'}", err=True)
    return int(Exit.DONE)


def clean_connect_time(**options: Any) -> int:
    """Detach connect-time load balancing: remove the pinned links of its programs (v3.27 and newer)."""
    from calitrace.kernel import maps

    change = _may_change(options)
    where = maps.root(options["bpffs"], options["netns"], options["pid"]) / _CTLB
    try:
        links = sorted(each for each in where.iterdir() if each.name.startswith("calico_"))
    except FileNotFoundError:
        links = []
    except PermissionError:
        raise UsageError(f"no permission to look into {where}", "run as root") from None
    if not links:
        raise NotCalico(f"no connect-time load balancer pinned below {where}", "older releases do not pin theirs")
    for link in links:
        click.echo(f"{link.name} {'detached' if change else 'would be detached'}")
        if change:
            link.unlink(missing_ok=True)
    return int(Exit.DONE)
