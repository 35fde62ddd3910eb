"""Where Calico's maps come from: this node, a snapshot, or what bpftool wrote; and what their numbers mean there."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from calitrace.errors import Error, LayoutMismatch, Malformed, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from calitrace.btf import Btf
    from calitrace.calico.maps import RawMap
    from calitrace.calico.timeouts import Timeouts
    from calitrace.correlate.walk import Packet, Tables
    from calitrace.journal import Journal
    from calitrace.kernel.maps import Found
    from calitrace.report.mapdump import Context

NEVER_GUESS = "a newer Calico? calitrace never guesses a layout"


@dataclass
class Source:
    """Maps to read, wherever from. *broken*: what ended a snapshot too early, told after what was read.

    *differing*: what a map's own BTF says against our table, by pin.
    """

    maps: list[RawMap]
    in_use: set[str]
    interfaces: dict[int, str] = field(default_factory=dict)
    rules: dict[int, str] = field(default_factory=dict)
    now_ns: int = 0
    node: str = ""
    sysctls: dict[str, int] = field(default_factory=dict)
    programs: dict[str, dict[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    felix_config: Path | None = None
    policy_dir: Path | None = None
    broken: Malformed | None = None
    differing: dict[str, str] = field(default_factory=dict)

    def context(self) -> Context:
        """What gives numbers their names; Felix's own, in ifstate, come first."""
        from calitrace.calico import maptables
        from calitrace.report.mapdump import Context

        known = {}
        for raw in self.pick(("iface",)):
            with suppress(LayoutMismatch):
                known.update({e["ifindex"]: e["name"] for e in maptables.iter_entries(raw, maptables.resolve(raw))})
        return Context(self.now_ns, {**self.interfaces, **known}, timeouts=self._timeouts())

    def rule_names(self) -> dict[int, str]:
        """Rule id to its name: out of Felix's debug files, which are many and large, when they are asked for."""
        if self.policy_dir is not None:
            from calitrace.cli.recording import rule_names

            self.rules, unread = rule_names([self.policy_dir])
            self.policy_dir = None
            for each in unread:
                self.note(each)
        return self.rules

    def _timeouts(self) -> Timeouts:
        """Felix's conntrack time-outs: of --felix-config, or its defaults."""
        from calitrace.calico import felix_config, timeouts

        if self.felix_config is None:
            return timeouts.defaults(self.sysctls)
        from calitrace.cli.check import felix_configurations

        settings = felix_config.resolve(felix_configurations(self.felix_config), {}, self.node, None)
        setting = settings.get("bpfConntrackTimeouts")
        if isinstance(setting, felix_config.Unset) or not isinstance(setting.value, dict):
            return timeouts.defaults(self.sysctls)
        found, wrong = timeouts.configured(setting.value, self.sysctls, setting.origin)
        for each in wrong:
            self.note(each)
        return found

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
        for raw in chosen:
            if raw.pin in self.differing:
                raise Error(f"map {raw.name} is not as we know it: {self.differing[raw.pin]}", NEVER_GUESS)
        return chosen

    def note(self, text: str) -> None:
        """Remember something to tell at the end, once."""
        if text not in self.notes:
            self.notes.append(text)


def live(bpffs: Path | None, netns: str, pid: int | None, policy_dir: Path) -> Source:
    """The maps of this node. Raises NotCalico, UsageError and EnvironmentUnfit as ``kernel.maps.find`` does."""
    from calitrace.calico.timeouts import SYSCTLS
    from calitrace.kernel import maps

    # Maps from elsewhere with ifindices of elsewhere: ours would give them wrong names.
    namespace = netns or str(pid or "")
    interfaces = {} if bpffs is not None and not namespace else maps.interfaces(namespace)
    source = of_maps(maps.find(maps.root(bpffs, netns, pid), namespace), interfaces)
    source.sysctls = maps.sysctls(SYSCTLS.values(), namespace)
    source.policy_dir = policy_dir
    return source


def of_maps(found: list[Found], interfaces: dict[int, str]) -> Source:
    """The maps that were found. *interfaces*: ifindex to name, where the node is."""
    in_use = {each.pin for each in found if each.in_use}
    source = Source([], in_use, interfaces, now_ns=time.monotonic_ns(), node=socket.gethostname())
    _describe(source, found)
    source.programs = _programs(source, found)
    return source


def _programs(source: Source, found: Iterable[Found]) -> dict[str, dict[int, int]]:
    """Of the jump maps, by base name: the policy programs at the indices that ifstate has."""
    from calitrace.calico import maptables
    from calitrace.calico.maps import identify
    from calitrace.correlate.walk import JUMPS
    from calitrace.kernel import maps

    wanted: set[int] = set()
    for raw in (each for each in source.maps if identify(each.name)[0] == "cali_iface"):
        with suppress(LayoutMismatch):
            for entry in maptables.iter_entries(raw, maptables.resolve(raw)):
                wanted |= {v for name, v in entry.items() if name.startswith(("ingress_v", "egress_v")) and v >= 0}
    names = {name for each in JUMPS.values() for name in each}
    # Where several versions are here, that which programs use, else the newest, comes last and stays.
    several = sorted(found, key=lambda each: (each.in_use, identify(each.name)[1]))
    newest = {identify(each.name)[0]: each for each in several if identify(each.name)[0] in names}
    return {base: maps.programs_at(each, wanted) for base, each in newest.items()}


def _describe(source: Source, found: Iterable[Found]) -> None:
    """Hold the maps' BTF, or that of the programs that use them, against our tables, and take it where none fits."""
    from calitrace.btf import Btf
    from calitrace.calico import mapbtf, maptables
    from calitrace.calico.maps import identify
    from calitrace.kernel import maps

    known: dict[int, Btf | None] = {}

    def types(identifier: int) -> Btf | None:
        if identifier not in known:
            blob = maps.types(identifier)
            known[identifier] = None if blob is None else Btf(blob)
        return known[identifier]

    bases = {each.base for each in maptables.layouts()}
    described: list[RawMap] = []
    for each in found:
        if not maps.readable(each):
            continue
        raw, info = maps.read(each), each.info
        described.append(raw)
        if identify(raw.name)[0] not in bases:
            continue
        ids: tuple[int, int] | None = (info.btf_key_type_id, info.btf_value_type_id)
        btf, whose = types(info.btf_id) if all(ids or ()) else None, "its BTF"
        if btf is None:
            btf, whose = types(each.program_btf), "the BTF of the programs that use it"
            ids = None if btf is None else mapbtf.declared(btf, raw.name)
        if btf is None or ids is None:
            continue
        layout = mapbtf.describe(raw, btf, *ids)
        try:
            table = maptables.resolve(raw)
        except LayoutMismatch as unknown:
            if layout is not None:
                described[-1] = replace(raw, described=layout)
                source.note(f"map {raw.name} is of no version that we know ({unknown.actual}): decoded by {whose}")
            continue
        said = [maptables.disagreement(t, btf, i) for t, i in zip((table.key, table.value), ids, strict=True)]
        if any(said) and layout is not None and layout.origin == "btf":
            described[-1] = replace(raw, described=layout)
            source.note(f"map {raw.name} differs from our table ({'; '.join(filter(None, said))}): decoded by {whose}")
        elif any(said):
            source.differing[raw.pin] = f"{whose} differs from our table: {'; '.join(filter(None, said))}"
    source.maps = described


def of_journal(path: Path) -> Source:
    """The maps of a snapshot. Raises UsageError."""
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
    try:
        source = _stored(found)
    except (AttributeError, TypeError, ValueError, Malformed) as wrong:
        raise UsageError(f"{path}: its header is broken: {wrong}", "write it again with `maps snapshot -w`") from wrong
    for raw in found.maps:
        for each in raw.notes:
            source.note(f"{raw.name}: {each}")
    if found.cut_at is not None and found.broken is None:
        source.broken = Malformed(found.cut_at, "an end frame", "the end of the file", "snapshot")
    return source


def save(source: Source, path: Path) -> None:
    """Write a snapshot. Raises UsageError when the file exists or cannot be written."""
    from calitrace import __version__, journal
    from calitrace.calico import mapbtf, maptables
    from calitrace.cli.recording import create, origin

    with create(path) as stream:
        writer = journal.Writer(stream, {
            **(origin() if source.now_ns else {"version": __version__}), "node": source.node, "sysctls": source.sysctls,
            "mono_ns": source.now_ns, "wall_ns": time.time_ns(),
            "interfaces": source.interfaces, "rules": source.rule_names(), "in_use": sorted(source.in_use),
            "programs": source.programs,
            "layouts": {raw.pin: mapbtf.to_plain(raw.described) for raw in source.maps if raw.described is not None},
        })  # fmt: skip
        for raw in source.maps:
            for body in journal.map_bodies(raw, maptables.blocks(raw)):
                writer.write(journal.MAPS, body)
        writer.write(journal.END, {"mono_ns": time.monotonic_ns()})


def _stored(found: Journal) -> Source:
    """The maps of a journal, and what its header says about them."""
    from calitrace.calico import mapbtf

    header = found.header
    layouts = header.get("layouts", {})
    return Source(
        [
            replace(raw, described=mapbtf.from_plain(raw, layouts[raw.pin])) if raw.pin in layouts else raw
            for raw in found.maps
        ],
        set(header.get("in_use", ())),
        {int(index): str(name) for index, name in header.get("interfaces", {}).items()},
        dict(header.get("rules", {})),
        int(header.get("mono_ns", 0)),
        str(header.get("node", "")),
        {name: int(number) for name, number in header.get("sysctls", {}).items()},
        {base: {int(i): int(p) for i, p in slots.items()} for base, slots in header.get("programs", {}).items()},
        broken=found.broken,
    )


def of_bpftool(files: Iterable[tuple[Path, str]]) -> Source:
    """The maps of such files, each with its map's name. Raises UsageError."""
    from calitrace.calico import bpftool

    found = []
    for path, name in files:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as failure:
            raise UsageError(f"cannot read {path}: {failure}") from failure
        try:
            found.append(bpftool.read(text, name))
        except Malformed as wrong:
            raise UsageError(f"{path}: {wrong.cause}", "`bpftool -j map dump` writes what is read here") from wrong
    return Source(found, set())


def refused(wrong: LayoutMismatch) -> Error:
    """The error for a map of no known version."""
    return Error(f"cannot read {wrong.record}: it has {wrong.actual}, known are {wrong.expected}",
                 NEVER_GUESS)  # fmt: skip


def only_members(raw: RawMap) -> bool:
    """Whether we know of a map no more than the names that its BTF has."""
    return raw.described is not None and raw.described.origin == "members"


def objects(source: Source, maps: Iterable[RawMap], *, understood: bool = False) -> Iterator[dict[str, Any]]:
    """The maps' entries in words. *understood*: refuse those that we know by their BTF's names only."""
    from calitrace.calico.maps import identify
    from calitrace.report import mapdump

    context = source.context()
    for raw in maps:
        if understood and only_members(raw):
            raise Error(f"map {raw.name} is of no version that we know, and its BTF lacks members that we need",
                        NEVER_GUESS)  # fmt: skip
        try:
            if identify(raw.name)[0] == "cali_rule_ctrs":
                context = replace(context, rules=source.rule_names())
            yield from mapdump.iter_objects(raw, context)
        except LayoutMismatch as wrong:
            raise refused(wrong) from wrong


def tables(source: Source, *, ipv6: bool, packet: Packet | None = None) -> Tables:
    """The maps that walk and diff look into; of conntrack the entry of this *packet*, and that which it leads to."""
    from calitrace.correlate.walk import Tables

    def of(base: str) -> list[dict[str, Any]]:
        return list(objects(source, source.pick((base,), ipv6=ipv6), understood=True))

    def there(base: str) -> list[dict[str, Any]] | None:
        return of(base) if source.pick((base,), ipv6=ipv6) else None

    return Tables(
        list(_flow(source, packet)) if packet else [], of("nat_fe"), of("nat_be"), of("nat_aff"), of("routes"),
        there("iface"), there("fsafes"), of("mglv"), of("sprefix"), source.programs, source.now_ns,
    )  # fmt: skip


def _flow(source: Source, packet: Packet) -> Iterator[dict[str, Any]]:
    from calitrace.calico import maptables
    from calitrace.report import mapdump

    proto = int(mapdump.number(packet.proto)).to_bytes(4, "little")
    ends = [(ip_address(address).packed, port.to_bytes(2, "little"))
            for address, port in ((packet.src, packet.sport), (packet.dst, packet.dport))]  # fmt: skip
    for raw in source.pick(("ct",), ipv6=packet.version == 6):
        near = []
        if not only_members(raw):
            with suppress(LayoutMismatch):  # which is refused below
                layout = maptables.resolve(raw)
                keys = [
                    layout.key.encode({"proto": proto, "addr_a": a[0], "port_a": a[1], "addr_b": b[0], "port_b": b[1]})
                    for a, b in (ends, ends[::-1])
                ]
                near = maptables.at(raw, keys)
                partners = [mapdump.partner_keys(layout, key, value) for key, value in near]
                # A forward entry has one partner, whose source may have been translated.
                near += maptables.at(raw, [each[0] for each in partners if len(each) == 1])
        yield from objects(source, [replace(raw, entries=near)], understood=True)
