"""``calitrace maps``: Calico's maps, live, from a snapshot, or from what bpftool wrote."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calitrace.calico import WORKLOAD_PREFIX, pods, policy
from calitrace.cli import map_changes, map_source, map_words
from calitrace.cli.commands import Commands
from calitrace.errors import Error, Exit, LayoutMismatch, Malformed, NotCalico, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from calitrace.calico.maps import RawMap

# Command: what it shows, and the maps' base names without cali_ and family.
SUBJECTS = {
    "arp": ("Neighbours that NodePort tunnels were received from.", ("arp",)),
    "connect-time": ("Connections that connect-time load balancing has translated.", ("ct_nats", "srmsg")),
    "conntrack": ("Connections.", ("ct",)),
    "counters": ("Packets by Calico's reason, for each interface and hook.", ("counters",)),
    "failsafes": ("Ports that no policy can close.", ("fsafes",)),
    "ifstate": ("Interfaces that Calico knows, and whether they are ready.", ("iface",)),
    "ipsets": ("The members of IP sets.", ("ip_sets",)),
    "nat": ("Services: frontends and their backends.", ("nat_fe", "nat_be")),
    "affinity": ("Which client sticks to which backend.", ("nat_aff",)),
    "maglev": ("Maglev's lookup table.", ("mglv",)),
    "policy": ("Hits of policy rules.", ("rule_ctrs",)),
    "profiling": ("Time that Calico's programs take.", ("profiling",)),
    "qos": ("Limits of packet rate and connections.", ("qos", "qos_conn")),
    "routes": ("Calico's routes.", ("routes",)),
    "cleanup-queue": ("Conntrack entries that Felix has queued for removal.", ("ccq",)),
    "spoofing": ("Sources that workloads may send from besides their own addresses.", ("sprefix",)),
    "fragments": ("Fragments that wait, and those that were forwarded.", ("frags", "frgfwd")),
}


def _source(options: dict[str, Any]) -> map_source.Source:
    """The maps that the options ask for."""
    source = _maps_of(options)
    source.felix_config = options.get("felix_config")
    return source


def _whole(source: map_source.Source) -> map_source.Source:
    """The same, for questions that half a map would answer wrongly. Raises UsageError for a snapshot cut short."""
    if source.broken is not None:
        raise UsageError(f"the snapshot is incomplete: {source.broken.cause}", "dump and get show what was read")
    return source


def _maps_of(options: dict[str, Any]) -> map_source.Source:
    if options["path"] is not None:
        return map_source.of_journal(options["path"])
    if options["bpftool"]:
        if len(options["bpftool"]) != len(options["map_name"]):
            raise UsageError("each --bpftool needs the name of its map", "add --map, such as --map cali_v4_ct4")
        return map_source.of_bpftool(zip(options["bpftool"], options["map_name"], strict=True))
    return map_source.live(options["bpffs"], options["netns"], options["pid"], options["policy_dir"])


_WHERE = (
    click.option("--bpffs", type=click.Path(path_type=Path), help="Where the node's maps are pinned.  [/sys/fs/bpf]"),
    click.option("--netns", default="", help="Look through the mounts of a process in this network namespace."),
    click.option("--pid", type=int, help="Look through the mounts of this process."),
    click.option(
        "--policy-dir", type=click.Path(path_type=Path), default=policy.DIRECTORY, show_default=True,
        help="Felix's policy debug files.",
    ),
)  # fmt: skip
_BPFTOOL = (
    click.option(
        "--bpftool", type=click.Path(path_type=Path), multiple=True,
        help="What `bpftool -j map dump` wrote. Several for several maps.",
    ),
    click.option("--map", "map_name", multiple=True, help="The name of the map in --bpftool's file."),
)  # fmt: skip
_READ = (
    click.option("-r", "--read", "path", type=click.Path(path_type=Path), help="A snapshot in place of this node."),
    *_BPFTOOL,
    *_WHERE,
    click.option("-6", "--ipv6", is_flag=True, help="The IPv6 maps."),
    click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True),
    click.option("-j", "--json", "as_json", is_flag=True, help="The same as -o json."),
)
_CHANGE = (
    *_WHERE,
    click.option("--allow-system-changes", "allowed", is_flag=True, help="Really do it."),
    click.option("--dry-run", is_flag=True, help="Only say what would go."),
)


_FELIX_CONFIG = click.option(
    "--felix-config", type=click.Path(path_type=Path),
    help="What calicoctl or kubectl printed, as YAML: for bpfConntrackTimeouts.",
)  # fmt: skip


def _as_json(options: dict[str, Any]) -> bool:
    return bool(options["as_json"] or options["output"] == "json")


def _with(options: tuple[Callable[[Any], Any], ...], function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


@click.group(
    "maps",
    cls=Commands,
    epilog="""\b
Examples:
  calitrace maps conntrack dump | head
  calitrace maps nat dump 10.96.0.10 53 udp
  calitrace maps snapshot -w before.calitrace
  calitrace maps walk 192.0.2.7:40000 10.10.0.1:30080/tcp --ingress ens192
  calitrace maps diff before.calitrace after.calitrace
""",
)
def command() -> None:
    """Read Calico's BPF maps: dump, get, summary, walk and diff, of any release, live and offline."""


def _finish(source: map_source.Source) -> int:
    """Tell on stderr what befell the reading."""
    from calitrace.kernel.maps import Entries

    for raw in source.maps:
        if isinstance(raw.entries, Entries):
            for each in raw.entries.notes:
                source.note(f"{raw.name}: {each}")
    for each in source.notes:
        click.echo(f"note: {each}", err=True)
    if source.broken is not None:
        raise UsageError(f"the snapshot is incomplete: {source.broken.cause}", "what was read is shown above")
    return int(Exit.DONE)


def _chosen(source: map_source.Source, name: str, options: dict[str, Any]) -> list[RawMap]:
    bases = SUBJECTS[name][1]
    version = options.get("version")
    if options["bpftool"]:
        found = [raw for raw in source.maps if _base(raw.name) in bases]
        if not found:
            given = ", ".join(options["map_name"])
            raise UsageError(f"{given} is no {name} map", f"that is cali_v4_{bases[0]} or alike, with its version")
        return found
    found = source.pick(bases, ipv6=options["ipv6"], version=version)
    if not found and source.broken is None:
        from calitrace.calico import maptables

        family = f"cali_v{6 if options['ipv6'] else 4}_"
        bare = {each.base.removeprefix("cali_") for each in maptables.layouts()}
        wanted = " or ".join(f"{'cali_' if base in bare else family}{base}" for base in bases)
        wanted += f" of version {version}" if version else ""
        raise NotCalico(f"no {name} map ({wanted})", "`calitrace maps versions dump` lists the maps that are here")
    return found


def _base(name: str) -> str:
    from calitrace.calico.maps import identify

    return identify(name)[0].removeprefix("cali_").removeprefix("v4_").removeprefix("v6_")


def _text(name: str, objects: Iterable[dict[str, Any]], options: dict[str, Any]) -> Iterator[str]:
    from calitrace.report import mapdump

    if name == "nat":
        entries = list(objects)
        both = len(options["bpftool"]) != 1 and any("count" in entry for entry in entries)
        yield from mapdump.iter_nat(entries, both=both, grouped=bool(options.get("group_by_service")))
    elif name == "ipsets":
        yield from mapdump.iter_ip_sets(objects)
    elif name == "counters":
        yield from mapdump.iter_counters(objects)
    else:
        if name == "routes":
            objects = sorted(objects, key=mapdump.route_order)
        for entry in objects:
            if not (name == "conntrack" and entry["type"] == "nat-fwd" and not options.get("raw")):
                yield mapdump.text(_base(entry["map"]), entry, raw=bool(options.get("raw")))


def _watched(source: map_source.Source, objects: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Conntrack entries as they come; those without the other one of their pair are told at the end."""
    from calitrace.report import mapdump

    pairing = mapdump.Pairing(source.context())
    for entry in objects:
        pairing.feed(entry)
        yield entry
    for each in pairing.iter_notes():
        source.note(each)


def _dump(name: str, **options: Any) -> int:
    options["ipv6"] = options["ipv6"] or map_words.any_ipv6(options.get("words") or ())
    source = _source(options)
    maps = _chosen(source, name, options)
    objects: Iterable[dict[str, Any]] = map_source.objects(source, maps)
    if options.get("interval") is not None:
        objects = _rates(source, maps, options)
    if options.get("words"):
        objects = _frontends(objects, options["words"])
    if options.get("iface") is not None:
        objects = _of_interface(objects, options["iface"])
    if _as_json(options):
        if name == "conntrack":
            from calitrace.report import conntrack_json

            context = source.context()
            try:
                for raw in maps:
                    for block in conntrack_json.iter_blocks(raw, context):
                        sys.stdout.buffer.write(block)
                        sys.stdout.flush()
            except LayoutMismatch as wrong:
                raise map_source.refused(wrong) from wrong
        else:
            for entry in _with_backends(objects, options) if name == "nat" else objects:
                click.echo(json.dumps(entry))
    else:
        if any(map(map_source.only_members, maps)):
            name = ""
        for line in _text(name, _watched(source, objects) if name == "conntrack" else objects, options):
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
    if name == "ifstate":
        _missing_interfaces(source, maps)
    return _finish(source)


def _frontends(objects: Iterable[dict[str, Any]], words: tuple[str, ...]) -> list[dict[str, Any]]:
    """The NAT entries of the service that has the frontend IP PORT PROTO. Raises UsageError when none has."""
    from calitrace.report import mapdump

    if len(words) != 3:
        raise UsageError("nat dump takes none or all of IP PORT PROTO", "`calitrace maps nat get` takes any of them")
    address, (_, port) = map_words.address(words[0]), map_words.endpoint(f"[{words[0]}]:{words[1]}", port=True)
    proto = map_words.proto(words[2])
    found = mapdump.siblings(objects, address, port, proto)
    if not found:
        raise UsageError(f"no frontend {address} port {port} proto {proto}", "`calitrace maps nat dump` lists them")
    return found


def _of_interface(objects: Iterable[dict[str, Any]], interface: str) -> list[dict[str, Any]]:
    """The counters of an interface. Raises UsageError when it has none."""
    rows = list(objects)
    found = [entry for entry in rows if entry.get("interface") == interface]
    if not found:
        here = ", ".join(sorted({str(entry["interface"]) for entry in rows if "interface" in entry}))
        raise UsageError(f"no counters of {interface}", f"there are those of {here or 'no interface'}")
    return found


def _with_backends(objects: Iterable[dict[str, Any]], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from calitrace.report import mapdump

    if options.get("group_by_service"):
        return mapdump.iter_groups(objects)
    # Of one file frontends or backends are here, not both.
    return mapdump.with_backends(objects) if len(options["bpftool"]) != 1 else iter(objects)


def _rates(source: map_source.Source, maps: list[RawMap], options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Counters with what they gained within the interval."""
    from calitrace.report import mapdump

    if options["path"] is not None or options["bpftool"]:
        raise UsageError("--interval needs a live node", "compare two snapshots with `calitrace maps diff A B`")
    before, start = list(map_source.objects(source, maps)), time.monotonic()
    _wait(options["interval"])
    after, end = list(map_source.objects(source, maps)), time.monotonic()
    return mapdump.per_second(before, after, end - start)


def _wait(seconds: float) -> None:
    click.echo(f"read once; again in {seconds:g} s ...", err=True)
    time.sleep(seconds)


def _policy(words: tuple[str, ...], asm: bool, **options: Any) -> int:
    """Print the hits of policy rules, or the policy of an interface and direction (ingress, egress, xdp, all).

    Rules are named by Felix's policy debug files (bpfPolicyDebugEnabled).
    """
    if not words:
        return _dump("policy", **options)
    interface, *hooks = words
    if len(hooks) != 1 or hooks[0] not in ("ingress", "egress", "xdp", "all"):
        raise UsageError("name an interface and a hook", "calitrace maps policy dump cali1234 ingress|egress|xdp|all")
    wanted = ("ingress", "egress", "xdp") if hooks[0] == "all" else (hooks[0],)
    source = _source(options)
    hits = {entry["rule_id"]: entry["packets"] for entry in map_source.objects(source, source.pick(("rule_ctrs",)))}
    files = {
        direction: file
        for direction in wanted
        for file in _debug_files(options["policy_dir"], interface, direction, ipv6=options["ipv6"])
    }
    if not files:
        raise UsageError(f"no policy debug file of {interface} in {options['policy_dir']}",
                         "set bpfPolicyDebugEnabled, or name the directory with --policy-dir")  # fmt: skip
    for direction, file in files.items():
        try:
            found = policy.read(file.read_bytes())
        except (OSError, Malformed) as failure:
            raise UsageError(f"cannot read {file}: {failure}") from failure
        if _as_json(options):
            for rule, name in found.rule_names().items():
                about = {"interface": interface, "policy_direction": direction, "rule_id": rule, "rule": name}
                click.echo(json.dumps({**about, "packets": hits.get(rule, 0)}))
            continue
        for line in found.iter_lines(hits, instructions=asm):
            click.echo(line)
    return _finish(source)


def _debug_files(directory: Path, interface: str, direction: str, *, ipv6: bool) -> Iterator[Path]:
    """Felix's file, which had no family in its name before v3.27."""
    names = [f"{interface}_{direction}_{'v6' if ipv6 else 'v4'}.json"]
    names += [] if ipv6 else [f"{interface}_{direction}.json"]
    return (each for each in (directory / name for name in names[::-1]) if each.exists())


def _missing_interfaces(source: map_source.Source, maps: list[RawMap]) -> None:
    """Workload interfaces of the node that Calico's map does not have: their packets are dropped.

    They are known by how the names of those begin that it has.
    """
    if any(map(map_source.only_members, maps)):
        return
    known = {each["ifindex"]: (each["name"], "workload" in each["flags"]) for each in map_source.objects(source, maps)}
    names = (WORKLOAD_PREFIX, *pods.prefixes(known.values()))
    for index, name in sorted(source.interfaces.items()):
        if name.startswith(names) and index not in known:
            source.note(f"interface {name} (ifindex {index}) is not in ifstate: its packets are dropped")


def _get(name: str, words: tuple[str, ...], **options: Any) -> int:
    if not words:
        raise UsageError("get needs a key", f"such as `calitrace maps {name} get 10.0.0.1`")
    words = tuple(part for word in words for part in map_words.iter_key_parts(word))
    options["ipv6"] = options["ipv6"] or map_words.any_ipv6(words)
    source = _source(options)
    if name == "conntrack" and not any(map(map_source.only_members, source.pick(("ct",), ipv6=options["ipv6"]))):
        return _connections(source, words, options)
    entries = map_source.objects(source, _chosen(source, name, options))
    maps = source.maps if options["bpftool"] else source.pick(SUBJECTS[name][1], ipv6=options["ipv6"])
    services = name == "nat" and not any(map(map_source.only_members, maps))
    found = (
        map_words.services(list(entries), words) if services else [e for e in entries if map_words.matches(e, words)]
    )
    if _as_json(options):
        for entry in _with_backends(found, options) if services else found:
            click.echo(json.dumps(entry))
    else:
        shown = "" if any(entry.get("layout") == "members" for entry in found) else name
        for line in _text(shown, iter(found), {**options, "raw": True}) if found else ():
            click.echo(line)
    status = _finish(source)
    if not found:
        click.echo(f"nothing in {name} has {' and '.join(words)}", err=True)
        return int(Exit.FINDINGS)
    return status


def _connections(source: map_source.Source, words: tuple[str, ...], options: dict[str, Any]) -> int:
    """Print the connections that have these addresses and ports, each with the other entry of its NAT pair."""
    from calitrace.calico import maptables
    from calitrace.report import mapdump

    context, shown = source.context(), 0
    for raw in _chosen(source, "conntrack", options):
        try:
            layout = maptables.resolve(raw)
        except LayoutMismatch as wrong:
            raise map_source.refused(wrong) from wrong

        def words_of(entries: Iterable[tuple[bytes, bytes]], raw: RawMap = raw) -> Iterator[dict[str, Any]]:
            return mapdump.iter_objects(replace(raw, entries=entries), context)

        near = [ip_address(word).packed for word in words if ("." in word or ":" in word) and "/" not in word]
        pairs = [(key, value) for key, value in raw.entries if all(each in key or each in value for each in near)]
        matched = {key: e for (key, _), e in zip(pairs, words_of(pairs), strict=True) if map_words.matches(e, words)}
        values = {key: value for key, value in pairs if key in matched}
        partners = {key: set(mapdump.partner_keys(layout, key, value)) for key, value in values.items()}
        wanted = set().union(*partners.values())
        others = [(key, value) for key, value in raw.entries if key in wanted] if wanted else []
        known = dict(zip((key for key, _ in others), words_of(others), strict=True))
        told: set[bytes] = set()
        for key, entry in sorted(matched.items(), key=lambda each: each[1]["type"] == "nat-fwd"):
            mates = {each: known[each] for each in partners[key] if each in known}
            told.add(key)
            if _as_json(options):
                click.echo(json.dumps({**entry, "pair": list(mates.values())}))
            elif not (mates and entry["type"] == "nat-fwd" and told >= set(mates)):
                for line in mapdump.iter_connection(entry, list(mates.values()), context.timeouts):
                    click.echo(line)
            shown += 1
    status = _finish(source)
    if not shown:
        click.echo(f"nothing in conntrack has {' and '.join(words)}", err=True)
        return int(Exit.FINDINGS)
    return status


def _summary(name: str, **options: Any) -> int:
    from calitrace.report import mapdump

    source = _source(options)
    for raw in _chosen(source, name, options):
        try:
            found = mapdump.summary(raw)
        except LayoutMismatch as wrong:
            raise map_source.refused(wrong) from wrong
        if _as_json(options):
            click.echo(json.dumps(found))
            continue
        click.echo(f"{found.pop('map')}:")
        for key, value in found.items():
            click.echo(f"  {key.replace('_', ' ') + ':':18} {'unknown' if value is None else value:>9}")
    return _finish(source)


def _stats(name: str, **options: Any) -> int:
    from calitrace.report import mapdump

    if _as_json(options):
        return _summary(name, **options)
    source = _source(options)
    for raw in _chosen(source, name, options):
        if map_source.only_members(raw):
            raise Error(f"map {raw.name} is of no version that we know", "see what is in it with dump")
        try:
            lines = mapdump.iter_stats(mapdump.summary(raw))
        except LayoutMismatch as wrong:
            raise map_source.refused(wrong) from wrong
        for line in lines:
            click.echo(line)
    return _finish(source)


def _latency(name: str, **options: Any) -> int:
    from calitrace.report import mapdump

    if _as_json(options):
        return _dump(name, **options)
    source = _source(options)
    for line in mapdump.iter_latency(map_source.objects(source, _chosen(source, name, options), understood=True)):
        click.echo(line)
    return _finish(source)


def _subject(name: str) -> click.Group:
    about = SUBJECTS[name][0]
    group = Commands(name, help=about)
    extra: tuple[Callable[[Any], Any], ...] = ()
    if name == "conntrack":
        extra = (
            _FELIX_CONFIG,
            click.option("-v", "--ver", "version", type=int, help="The map of this version."),
            click.option("--raw", is_flag=True, help="All members, NAT forward entries too."),
        )
    if name == "counters":
        extra = (
            click.option("--iface", help="Only this interface."),
            click.option(
                "--interval", type=click.FloatRange(min=0.1, max=3600), help="Packets per second over so many seconds."
            ),
        )
    if name == "nat":
        extra = (
            click.argument("words", nargs=-1, metavar="[IP PORT PROTO]"),
            click.option("--group-by-service", is_flag=True, help="A service's backends once, after its frontends."),
        )
    words = click.argument("words", nargs=-1, metavar="[KEY]...")

    def add(
        verb: str, function: Callable[..., int], text: str, options: tuple[Callable[[Any], Any], ...], of: str = name
    ) -> None:
        def run(**given: Any) -> int:
            return function(of, **given)

        run.__doc__ = text
        group.add_command(click.command(verb)(_with((*options, *_READ), run)))

    add("dump", _dump, "Print all entries.", extra)
    add("get", _get, "Print the entries that have these addresses, ports or names.",
        (words, *((_FELIX_CONFIG,) if name == "conntrack" else ())))  # fmt: skip
    if name == "conntrack":
        add("stats", _stats, "The summary in the words of calico-node -bpf.", extra[1:2])
    elif name == "profiling":
        add("e2e", _latency, "Print the mean time of each interface's programs; nothing is reset.", ())
    elif name == "nat":
        add("aff", _dump, "The same as `maps affinity dump`.", (), "affinity")
        add("maglev", _dump, "The same as `maps maglev dump`.", (), "maglev")
    add("summary", _summary, "Say how full the map is" + (", and what is in it." if name == "conntrack" else "."), ())
    return group


for _name in SUBJECTS:
    command.add_command(_subject(_name))


def _iter_versions(source: map_source.Source) -> Iterator[dict[str, Any]]:
    from calitrace.calico import maptables
    from calitrace.calico.maps import identify

    for raw in source.maps:
        base, version, old = identify(raw.name)
        try:
            known = maptables.resolve(raw)
            layout = f"v{known.version}{' BTF' if known.origin else ''}"
        except LayoutMismatch:
            layout = "unknown" if any(each.base == base for each in maptables.layouts()) else "not shown"
        yield {
            "map": raw.name, "version": version, "old": old, "layout": layout, "key_bytes": raw.key_size,
            "value_bytes": raw.value_size, "max_entries": raw.max_entries or None,
            "in_use": raw.pin in source.in_use if source.now_ns else None, "pin": raw.pin,
        }  # fmt: skip


def _versions(words: tuple[str, ...] = (), **options: Any) -> int:
    """Print which maps are here: version, sizes, whether we know their layout and programs use them."""
    from calitrace.calico.maps import identify

    source = _source(options)
    found = [e for e in _iter_versions(source) if not words or {e["map"], identify(e["map"])[0]} & set(words)]
    for about in found:
        if _as_json(options):
            click.echo(json.dumps(about))
            continue
        used = {True: "in use", False: "not used", None: "use unknown"}[about["in_use"]]
        pin = "" if about["pin"] == about["map"] else about["pin"]  # it says more only where it lies elsewhere
        line = (
            f"{about['map']:18} v{about['version']:<2} {about['key_bytes']:>3}+{about['value_bytes']:<5} "
            f"layout {about['layout']:9} max {about['max_entries'] or 'unknown':<8} {used:9} {pin}"
        )
        click.echo(line.rstrip())
    _finish(source)
    return int(Exit.DONE if found else Exit.FINDINGS)


def _versions_summary(**options: Any) -> int:
    """Say how many maps are here, and of which several versions are side by side."""
    from calitrace.calico.maps import identify

    source = _source(options)
    found = list(_iter_versions(source))
    names: dict[str, set[str]] = {}
    for each in found:
        names.setdefault(identify(each["map"])[0], set()).add(each["map"])
    about = {
        "maps": len(found),
        "in_use": sum(bool(each["in_use"]) for each in found) if source.now_ns else None,
        "unknown": sorted(each["map"] for each in found if each["layout"] == "unknown"),
        "side_by_side": sorted(name for group in names.values() if len(group) > 1 for name in group),
    }
    if _as_json(options):
        click.echo(json.dumps(about))
    else:
        for key, value in about.items():
            shown = "unknown" if value is None else ", ".join(value) or "none" if isinstance(value, list) else value
            click.echo(f"{key.replace('_', ' ') + ':':14} {shown}")
    return _finish(source)


_versions_group = Commands("versions", help="Which maps are here, and of which version.")
_versions_group.add_command(click.command("dump")(_with(_READ, _versions)))
_names = click.argument("words", nargs=-1, required=True, metavar="MAP...")
_versions_group.add_command(
    click.command("get", help="The same of these maps, by name with or without version.")(
        _with((_names, *_READ), lambda **given: _versions(**given))
    )
)
_versions_group.add_command(click.command("summary")(_with(_READ, _versions_summary)))
command.add_command(_versions_group)


@command.command("snapshot")
@click.option("-w", "--write", "path", required=True, type=click.Path(path_type=Path), help="The journal to write.")
def _snapshot(path: Path, **options: Any) -> int:
    """Write all maps, or those of --bpftool, into a journal, for -r and diff."""
    source = _maps_of({"path": None, **options})
    map_source.save(source, path)
    return _finish(source)


_snapshot.params += click.command()(_with((*_BPFTOOL, *_WHERE), lambda: None)).params


# --- Questions across maps ---------------------------------------------------------------------------------------


@command.command("walk")
@click.argument("source_end", metavar="SRC[:PORT]")
@click.argument("target", metavar="DST:PORT/PROTO")
@click.option("--ingress", default="", help="The interface at which the packet arrives.")
@_FELIX_CONFIG
def _walk(source_end: str, target: str, ingress: str, **options: Any) -> int:
    """Do Calico's lookups for a packet, in Calico's order, and say where the chain breaks.

    Exit status 1 when it breaks.
    """
    from dataclasses import asdict

    from calitrace.correlate import walk
    from calitrace.report import mapdump

    place, _, proto = target.partition("/")
    if proto not in ("tcp", "udp"):
        raise UsageError(f"{target!r} names no protocol", "end it with /tcp or /udp")
    (src, sport), (dst, dport) = map_words.endpoint(source_end, port=False), map_words.endpoint(place, port=True)
    if (":" in src) is not (":" in dst):
        raise UsageError("source and destination are of different families")
    source = _whole(_source(options))
    family = 6 if ":" in dst else 4
    needed = ("nat_fe", "nat_be", "routes", *(("ct",) if sport else ()))
    lost = [base for base in needed if not source.pick((base,), ipv6=family == 6)]
    if lost:
        names = ", ".join(f"cali_v{family}_{base}" for base in lost)
        if options["bpftool"]:
            raise UsageError(f"walk needs {names} too", "add its dump with --bpftool and --map")
        why = f": Calico does not handle IPv{family} here" if lost == [*needed] else ", without which walk would guess"
        raise NotCalico(f"no {names} map{why}", "`calitrace maps versions dump` lists the maps that are here")
    known = set(source.context().interfaces.values())
    if ingress and known and ingress not in known:
        source.note(f"no interface {ingress} is here")
    packet = walk.Packet(src, sport, dst, dport, proto, ingress)
    steps = walk.walk(packet, map_source.tables(source, ipv6=":" in dst, packet=packet if sport else None))
    lines = (json.dumps(asdict(step)) for step in steps) if _as_json(options) else mapdump.iter_walk(steps)
    for line in lines:
        click.echo(line)
    _finish(source)
    return int(Exit.FINDINGS if any(step.broken for step in steps) else Exit.DONE)


@command.command("diff")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[A B]")
@click.option("--wait", type=click.FloatRange(min=0.1, max=3600), help="Compare now and so many seconds later.")
@click.option("--check", is_flag=True, help="Exit with status 1 when services differ.")
def _diff(files: tuple[Path, ...], wait: float | None, check: bool, **options: Any) -> int:
    """Compare two snapshots, of two nodes or of one node at two times, or now and --wait seconds later.

    Services are compared by address and backends, not by the ids that each node gives them. Of two nodes services and
    failsafe ports are compared; a NodePort on a node's own address is one of "this node".
    """
    from calitrace.correlate import mapdiff

    if (len(files), wait is None) not in ((2, True), (0, False)) or options["bpftool"]:
        raise UsageError("diff needs two snapshots, or --wait SECONDS", "calitrace maps snapshot -w A")
    if wait is None:
        sides = [_whole(map_source.of_journal(path)) for path in files]
        views = [_view(side, options["ipv6"]) for side in sides]
    else:
        sides = [_whole(_source(options))]
        views = [_view(sides[0], options["ipv6"])]
        _wait(wait)
        sides.append(_source(options))
        views.append(_view(sides[1], options["ipv6"]))
    as_json = _as_json(options)
    own = [mapdiff.own_addresses(view["tables"]) for view in views]
    nodes = bool(own[0] and own[1] and not own[0] & own[1])
    count = 0
    for each in _differences(views, (sides[1].now_ns - sides[0].now_ns) / 1e9, own if nodes else None):
        count += each["what"] == "service"
        click.echo(json.dumps(each) if as_json else _difference(each))
    for side in sides:
        _finish(side)
    if not as_json:
        click.echo(f"{count} services differ")
        if nodes:
            names = [", ".join(sorted(each)) for each in own]
            click.echo(f"two nodes, a is {names[0]}, b is {names[1]}: services and failsafe ports were compared")
    return int(Exit.FINDINGS if check and count else Exit.DONE)


def _view(source: map_source.Source, ipv6: bool) -> dict[str, Any]:
    """All that diff compares, read now."""
    bases = ("routes", "iface", "arp", "fsafes", "ip_sets", "nat_aff", "ct", "qos", "counters")
    found = {base: list(map_source.objects(source, source.pick((base,), ipv6=ipv6), understood=True)) for base in bases}
    return {**found, "tables": map_source.tables(source, ipv6=ipv6)}


def _differences(
    views: list[dict[str, Any]], seconds: float, own: list[frozenset[str]] | None
) -> Iterator[dict[str, Any]]:
    """All that differs, services first. *own*: the addresses of each of two nodes, None for one at two times."""
    from calitrace.correlate import mapdiff

    a, b = views
    found = [mapdiff.services(view["tables"], here) for view, here in zip(views, own or [frozenset()] * 2, strict=True)]
    yield from mapdiff.differences("service", found[0], found[1])
    for base in a:
        if mapdiff.compared(base, nodes=own is not None):
            yield from mapdiff.differences(base, mapdiff.entries(base, a[base]), mapdiff.entries(base, b[base]))
    if own is None:
        yield from mapdiff.rates(a["counters"], b["counters"], seconds)


_TITLES = {"ct": "conntrack", "iface": "ifstate", "fsafes": "failsafe", "ip_sets": "ipset", "nat_aff": "affinity"}


def _difference(each: dict[str, Any]) -> str:
    head = f"{_TITLES.get(each['what'], each['what']):10} {each['key']}"
    if each["what"] == "counter":
        rate = "" if each["per_second"] is None else f" ({each['per_second']:.1f}/s)"
        return f"{head}: {each['packets']} packets{rate}"
    if each["a"] is None or each["b"] is None:
        return f"{head}: only in {'b' if each['a'] is None else 'a'}"
    changed = (name for name in each["a"] if each["a"][name] != each["b"].get(name))
    return f"{head}: " + ", ".join(f"{n} {_shown(each['a'][n])} -> {_shown(each['b'].get(n))}" for n in changed)


def _shown(value: object) -> str:
    return "[" + " ".join(str(each) for each in value) + "]" if isinstance(value, list) else str(value)


def _add(path: str, function: Callable[..., int], *options: Callable[[Any], Any]) -> None:
    group, _, verb = path.partition(" ")
    parent = command.commands[group]
    assert isinstance(parent, click.Group)
    parent.add_command(click.command(verb)(_with((*options, *_CHANGE), function)))


_policy_group = command.commands["policy"]
assert isinstance(_policy_group, click.Group)
_policy_words = click.argument("words", nargs=-1, metavar="[IFACE HOOK]")
_asm = click.option("-a", "--asm", is_flag=True, help="The program's instructions too.")
_policy_group.add_command(click.command("dump")(_with((_policy_words, _asm, *_READ), _policy)))
_kept = click.option(
    "-w", "--write", "kept", type=click.Path(path_type=Path), help="Keep what goes in this journal, for -r."
)
_family = click.option("-6", "--ipv6", is_flag=True, help="The IPv6 map.")
_version = click.option("-v", "--ver", "version", type=int, help="Only the map of this version.")
_add("arp clean", map_changes.clean_arp, _family, _kept)
_add("conntrack clean", map_changes.clean_conntrack, _family, _version, _kept)
_add(
    "conntrack remove",
    map_changes.remove_conntrack,
    *(click.argument(each) for each in ("proto", "ip1", "ip2")),
    _family,
    _version,
    _kept,
)
_add("counters flush", map_changes.flush_counters, click.option("--iface", help="Only this interface."), _kept)
_add("connect-time clean", map_changes.clean_connect_time)
for _with_reading in (_walk, _diff):
    _with_reading.params += click.command()(_with(_READ, lambda: None)).params
