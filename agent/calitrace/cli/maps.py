"""``calitrace maps``: Calico's maps, live, from a snapshot, or from what bpftool wrote."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calitrace.errors import Error, Exit, LayoutMismatch, Malformed, NotCalico, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from calitrace.calico.maps import RawMap
    from calitrace.report.mapdump import Context

POLICY_DIRECTORY = Path("/var/run/calico/bpf/policy")
CTLB = "ctlb"
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
    "fragments": ("Fragments that wait, and those that were forwarded.", ("frags", "frgfwd")),
}


@dataclass
class Source:
    """Maps to read, wherever from. *broken*: what ended a snapshot too early, told after what was read."""

    maps: list[RawMap]
    in_use: set[str]
    interfaces: dict[int, str] = field(default_factory=dict)
    rules: dict[int, str] = field(default_factory=dict)
    now_ns: int = 0
    notes: list[str] = field(default_factory=list)
    broken: Malformed | None = None

    def context(self) -> Context:
        """What gives numbers their names; ifstate's names where the interfaces themselves are unknown."""
        from calitrace.calico import maptables
        from calitrace.report.mapdump import Context

        known = {}
        for raw in self.pick(("iface",)):
            with suppress(LayoutMismatch):
                known.update({e["ifindex"]: e["name"] for e in maptables.iter_entries(raw, maptables.resolve(raw))})
        return Context(self.now_ns, {**known, **self.interfaces}, self.rules)

    def pick(self, bases: Iterable[str], *, ipv6: bool = False, version: int | None = None) -> list[RawMap]:
        """The live maps of these base names: of several versions the newest that loaded programs use."""
        from calitrace.calico.maps import identify

        chosen: list[RawMap] = []
        for base in bases:
            full = {f"cali_{base}", f"cali_v{6 if ipv6 else 4}_{base}"}
            found = [raw for raw in self.maps if identify(raw.name)[0] in full]
            if version is not None:
                chosen += [raw for raw in found if identify(raw.name)[1] == version]
                continue
            current = [raw for raw in found if not identify(raw.name)[2]]
            live = [raw for raw in current if raw.pin in self.in_use] or current or found
            newest = max((identify(raw.name)[1] for raw in live), default=0)
            chosen += [raw for raw in live if identify(raw.name)[1] == newest]
            if len({raw.name for raw in found}) > 1:
                names = ", ".join(sorted({raw.name for raw in found}))
                self.note(f"several versions are here ({names}): the node is in mid-upgrade; shown: v{newest}")
        return chosen

    def note(self, text: str) -> None:
        """Remember something to tell at the end, once."""
        if text not in self.notes:
            self.notes.append(text)


def _live(bpffs: Path | None, netns: str | None, pid: int | None, policy_dir: Path) -> Source:
    from calitrace.kernel import maps

    found = maps.find(maps.root(bpffs, netns, pid))
    source = Source(
        [maps.read(each) for each in found if maps.readable(each)],
        {each.pin for each in found if each.in_use},
        maps.interfaces(netns, pid),
        now_ns=time.monotonic_ns(),
    )
    source.rules = _rules(policy_dir, source)
    return source


def _rules(directory: Path, source: Source) -> dict[int, str]:
    from calitrace.calico import policy

    names: dict[int, str] = {}
    for file in sorted(directory.glob("*.json")):
        try:
            names.update(policy.rule_names(file.read_bytes()))
        except (OSError, Malformed) as failure:  # Felix replaces these files as pods come and go
            source.note(f"no rule names from {file.name}: {failure}")
    return names


def _journal(path: Path) -> Source:
    from calitrace import journal

    try:
        with path.open("rb") as stream:
            found = journal.read(stream, keep=True)
    except OSError as failure:
        raise UsageError(f"cannot read {path}: {failure.strerror}") from failure
    except Malformed as wrong:
        raise UsageError(f"{path}: {wrong.cause}", "is it a file that `maps snapshot -w` wrote?") from wrong
    if not found.maps and found.broken is None:
        raise UsageError(f"{path} holds no maps", "write some with `calitrace maps snapshot -w FILE`")
    header = found.header
    source = Source(
        found.maps,
        set(header.get("in_use", ())),
        {int(index): name for index, name in header.get("interfaces", {}).items()},
        header.get("rules", {}),
        header.get("mono_ns", 0),
        broken=found.broken,
    )
    for raw in found.maps:
        for each in raw.notes:
            source.note(f"{raw.name}: {each}")
    if found.cut_at is not None and found.broken is None:
        source.broken = Malformed(found.cut_at, "an end frame", "the end of the file", "snapshot")
    return source


def _bpftool(path: Path, name: str) -> Source:
    from calitrace.calico import bpftool

    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as failure:
        raise UsageError(f"cannot read {path}: {failure}") from failure
    try:
        return Source([bpftool.read(text, name)], set())
    except Malformed as wrong:
        raise UsageError(f"{path}: {wrong.cause}", "is it what `bpftool -j map dump` wrote?") from wrong


def _source(options: dict[str, Any]) -> Source:
    """The maps that the options ask for."""
    if options["path"] is not None:
        return _journal(options["path"])
    if options["bpftool"] is not None:
        if not options["map_name"]:
            raise UsageError("--bpftool needs the name of the map", "add --map, such as --map cali_v4_ct4")
        return _bpftool(options["bpftool"], options["map_name"])
    return _live(options["bpffs"], options["netns"], options["pid"], options["policy_dir"])


_WHERE = (
    click.option("--bpffs", type=click.Path(path_type=Path), help="Where the node's maps are pinned.  [/sys/fs/bpf]"),
    click.option("--netns", help="Look through the mounts of a process in this network namespace."),
    click.option("--pid", type=int, help="Look through the mounts of this process."),
    click.option(
        "--policy-dir", type=click.Path(path_type=Path), default=POLICY_DIRECTORY, show_default=True,
        help="Felix's policy debug files.",
    ),
)  # fmt: skip
_READ = (
    click.option("-r", "--read", "path", type=click.Path(path_type=Path), help="A snapshot in place of this node."),
    click.option("--bpftool", type=click.Path(path_type=Path), help="What `bpftool -j map dump` wrote."),
    click.option("--map", "map_name", help="The name of the map in --bpftool's file."),
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


def _with(options: tuple[Callable[[Any], Any], ...], function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        function = option(function)
    return function


@click.group(
    "maps",
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


def _finish(source: Source) -> int:
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


def _chosen(source: Source, name: str, options: dict[str, Any]) -> list[RawMap]:
    bases = SUBJECTS[name][1]
    version = options.get("version")
    if options["bpftool"] is not None:
        return source.maps
    found = source.pick(bases, ipv6=options["ipv6"], version=version)
    if not found and source.broken is None:
        family = 6 if options["ipv6"] else 4
        wanted = " or ".join(f"cali_v{family}_{base}" for base in bases) + (f" of version {version}" if version else "")
        raise NotCalico(f"no {name} map ({wanted})", "`calitrace maps versions dump` lists the maps that are here")
    return found


def _refused(wrong: LayoutMismatch) -> Error:
    return Error(f"cannot read {wrong.record}: it has {wrong.actual}, known are {wrong.expected}",
                 "a newer Calico? calitrace never guesses a layout")  # fmt: skip


def _objects(source: Source, maps: Iterable[RawMap]) -> Iterator[dict[str, Any]]:
    from calitrace.report import mapdump

    context = source.context()
    for raw in maps:
        try:
            yield from mapdump.iter_objects(raw, context)
        except LayoutMismatch as wrong:
            raise _refused(wrong) from wrong


def _base(name: str) -> str:
    from calitrace.calico.maps import identify

    return identify(name)[0].removeprefix("cali_").removeprefix("v4_").removeprefix("v6_")


def _text(name: str, objects: Iterable[dict[str, Any]], options: dict[str, Any]) -> Iterator[str]:
    from calitrace.report import mapdump

    if name == "nat":
        entries = list(objects)
        yield from mapdump.iter_nat(
            (e for e in entries if _base(e["map"]) == "nat_fe"), (e for e in entries if _base(e["map"]) == "nat_be")
        )
    elif name == "ipsets":
        yield from mapdump.iter_ip_sets(objects)
    elif name == "counters":
        yield from mapdump.iter_counters(objects, options.get("iface"))
    else:
        for entry in objects:
            if not (name == "conntrack" and entry["type"] == "nat-fwd" and not options.get("raw")):
                yield mapdump.text(_base(entry["map"]), entry, raw=bool(options.get("raw")))


def _dump(name: str, **options: Any) -> int:
    source = _source(options)
    maps = _chosen(source, name, options)
    objects = _objects(source, maps)
    wanted = options.get("words") or ()
    if wanted:
        objects = (entry for entry in objects if _matches(entry, wanted))
    if options["as_json"] or options["output"] == "json":
        if name == "conntrack" and not wanted:
            from calitrace.report import mapdump

            context = source.context()
            try:
                for raw in maps:
                    for block in mapdump.iter_json_blocks(raw, context):
                        sys.stdout.write(block)
                        sys.stdout.flush()
            except LayoutMismatch as wrong:
                raise _refused(wrong) from wrong
        else:
            for entry in objects:
                if name != "counters" or options.get("iface") in (None, entry.get("interface")):
                    click.echo(json.dumps(entry))
    else:
        for line in _text(name, objects, options):
            sys.stdout.write(line + "\n")
        sys.stdout.flush()
    if name == "ifstate":
        _missing_interfaces(source, maps)
    return _finish(source)


def _missing_interfaces(source: Source, maps: list[RawMap]) -> None:
    """Workload interfaces of the node that Calico's map does not have: their packets are dropped."""
    known = {entry["ifindex"] for entry in _objects(source, maps)}
    for index, name in sorted(source.interfaces.items()):
        if name.startswith("cali") and index not in known:
            source.note(f"interface {name} (ifindex {index}) is not in ifstate: its packets are dropped")


def _matches(entry: dict[str, Any], words: tuple[str, ...]) -> bool:
    """Whether each word is a value of the entry, or an address inside one of its networks."""
    return all(any(_is(value, word) for key, value in entry.items() if key != "map") for word in words)


def _is(value: object, word: str) -> bool:
    if isinstance(value, dict):
        return any(_is(each, word) for each in value.values())
    if str(value) == word:
        return True
    try:
        return isinstance(value, str) and "/" in value and ip_address(word) in ip_network(value, strict=False)
    except ValueError:
        return False


def _address(text: str) -> str:
    """An address as the maps spell it. Raises UsageError when it does not parse."""
    try:
        return str(ip_address(text))
    except ValueError:
        raise UsageError(f"{text!r} is no IP address", "such as 10.96.0.10 or fd00::1") from None


def _get(name: str, words: tuple[str, ...], **options: Any) -> int:
    if not words:
        raise UsageError("get needs a key", f"such as `calitrace maps {name} get 10.0.0.1`")
    words = tuple(_address(word) if any(c in word for c in ".:") and "/" not in word else word for word in words)
    source = _source(options)
    found = [e for e in _objects(source, _chosen(source, name, options)) if _matches(e, words)]
    if options["as_json"] or options["output"] == "json":
        for entry in found:
            click.echo(json.dumps(entry))
    else:
        for line in _text(name, iter(found), {**options, "raw": True}) if found else ():
            click.echo(line)
    status = _finish(source)
    if not found:
        click.echo(f"nothing in {name} has {' and '.join(words)}", err=True)
        return int(Exit.FINDINGS)
    return status


def _summary(name: str, **options: Any) -> int:
    from calitrace.report import mapdump

    source = _source(options)
    for raw in _chosen(source, name, options):
        try:
            found = mapdump.summary(raw)
        except LayoutMismatch as wrong:
            raise _refused(wrong) from wrong
        if options["as_json"] or options["output"] == "json":
            click.echo(json.dumps(found))
            continue
        click.echo(f"{found.pop('map')}:")
        for key, value in found.items():
            click.echo(f"  {key.replace('_', ' ') + ':':18} {value:>9}")
    return _finish(source)


def _subject(name: str) -> click.Group:
    about, bases = SUBJECTS[name]
    group = click.Group(name, help=about)
    extra: tuple[Callable[[Any], Any], ...] = ()
    if name == "conntrack":
        extra = (
            click.option("--ver", "version", type=int, help="The map of this version."),
            click.option("--raw", is_flag=True, help="All members, NAT forward entries too."),
        )
    if name == "counters":
        extra = (click.option("--iface", help="Only this interface."),)
    words = click.argument("words", nargs=-1, metavar="[KEY]...")

    def add(verb: str, function: Callable[..., int], text: str, options: tuple[Callable[[Any], Any], ...]) -> None:
        def run(**given: Any) -> int:
            return function(name, **given)

        run.__doc__ = text
        group.add_command(click.command(verb)(_with((*options, *_READ), run)))

    dump_words = (click.argument("words", nargs=-1, metavar="[IP PORT PROTO]"),) if name == "nat" else ()
    add("dump", _dump, "Print all entries.", (*dump_words, *extra))
    add("get", _get, "Print the entries that have these addresses, ports or names.", (words,))
    add("summary", _summary, "Say how full the map is" + (", and what is in it." if name == "conntrack" else "."), ())
    return group


for _name in SUBJECTS:
    command.add_command(_subject(_name))


def _versions(**options: Any) -> int:
    """Print which maps are here: version, sizes, whether we know their layout and programs use them."""
    from calitrace.calico import maptables
    from calitrace.calico.maps import identify

    source = _source(options)
    for raw in source.maps:
        _, version, old = identify(raw.name)
        try:
            layout = f"v{maptables.resolve(raw).version}"
        except LayoutMismatch:
            layout = "unknown"
        about = {
            "map": raw.name, "version": version, "old": old, "layout": layout, "key_bytes": raw.key_size,
            "value_bytes": raw.value_size, "max_entries": raw.max_entries, "in_use": raw.pin in source.in_use,
            "pin": raw.pin,
        }  # fmt: skip
        if options["as_json"] or options["output"] == "json":
            click.echo(json.dumps(about))
        else:
            used = "in use" if about["in_use"] else "not used"
            click.echo(
                f"{raw.name:18} v{version:<2} {raw.key_size:>3}+{raw.value_size:<5} layout {layout:8} "
                f"max {raw.max_entries:<8} {used:9} {raw.pin}"
            )
    return _finish(source)


_versions_group = click.Group("versions", help="Which maps are here, and of which version.")
_versions_group.add_command(click.command("dump")(_with(_READ, _versions)))
command.add_command(_versions_group)


@command.command("snapshot")
@click.option("-w", "--write", "path", required=True, type=click.Path(path_type=Path), help="The journal to write.")
def _snapshot(path: Path, **options: Any) -> int:
    """Write all maps into a journal, for -r and diff."""
    source = _live(options["bpffs"], options["netns"], options["pid"], options["policy_dir"])
    save(source, path)
    return _finish(source)


_snapshot.params += [parameter for parameter in click.command()(_with(_WHERE, lambda: None)).params]


def save(source: Source, path: Path) -> None:
    """Write a snapshot. Raises UsageError when the file exists or cannot be written."""
    import socket

    from calitrace import __version__, journal
    from calitrace.kernel import discover

    try:
        stream = path.open("xb")
    except FileExistsError:
        raise UsageError(f"{path} exists already", "name another file, or remove it") from None
    except OSError as failure:
        raise UsageError(f"cannot write {path}: {failure.strerror}") from failure
    with stream:
        writer = journal.Writer(stream, {
            "version": __version__, "node": socket.gethostname(), "boot_id": discover.boot_id(),
            "kernel": os.uname().release, "mono_ns": source.now_ns, "wall_ns": time.time_ns(),
            "interfaces": source.interfaces, "rules": source.rules, "in_use": sorted(source.in_use),
        })  # fmt: skip
        for raw in source.maps:
            for body in journal.map_bodies(raw, _blocks(raw)):
                writer.write(journal.MAPS, body)
        writer.write(journal.END, {"mono_ns": time.monotonic_ns()})


def _blocks(raw: RawMap) -> Iterable[tuple[int, bytes, bytes]]:
    from calitrace.calico import maptables

    return maptables.blocks(raw)
