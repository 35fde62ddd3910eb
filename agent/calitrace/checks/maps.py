"""Maps and programs: pinned, of known shape, with room left, and the ones that the programs really use."""

from __future__ import annotations

import re
from collections import Counter

from calitrace.calico import maptables
from calitrace.calico.felix_config import Settings, Unset
from calitrace.calico.maps import identify
from calitrace.calico.pods import WORKLOAD
from calitrace.calico.release import Release
from calitrace.checks import decoded
from calitrace.checks.decoded import Interface
from calitrace.checks.felix_log import log_checks
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import OWN_DEVICES, RESTART, detach, ebpf_on, grep_log, patch
from calitrace.checks.snapshot import Host, Link, Map, Program

Links = tuple[Link, ...]
Maps = tuple[Map, ...]
NEARLY_FULL, FULL = 0.8, 0.95
_LRU, _PROGRAMS = (9, 10), 3
_MOST_PROGRAMS, _MOST_OF_INTERFACE = 500, 40
_NEEDED = ("ct", "nat_fe", "nat_be", "routes")
_SETTINGS = {
    "ct": "bpfMapSizeConntrack",
    "nat_fe": "bpfMapSizeNATFrontend",
    "nat_be": "bpfMapSizeNATBackend",
    "nat_aff": "bpfMapSizeNATAffinity",
    "routes": "bpfMapSizeRoute",
    "ip_sets": "bpfMapSizeIPSets",
    "iface": "bpfMapSizeIfState",
}


def pinned(links: Links, maps: Maps) -> Said:
    """Looks for the maps without which nothing is forwarded: conntrack, NAT frontends and backends, routes."""
    if not ebpf_on(links):
        yield Unknown("no interface carries a Calico program: see services.ebpf-off")
        return
    there = {identify(each.name)[0] for each in maps if each.path}
    missing = [f"cali_v4_{part}" for part in _NEEDED if f"cali_v4_{part}" not in there]
    if missing:
        yield Finding(
            Severity.ERROR,
            "",
            (
                f"not pinned: {', '.join(missing)}",
                f"pinned: {', '.join(each.name for each in maps if each.path) or 'nothing'}",
            ),
            "programs are attached whose maps Felix can no longer write",
            f"mount | grep bpf; {RESTART}",
        )


def unknown_layout(maps: Maps) -> Said:
    """Compares version and sizes of keys and values with the layouts that we know (v3.13 to master)."""
    for each in maps:
        base, version, _ = identify(each.name)
        known = [layout for layout in maptables.layouts() if layout.base == base]
        sizes = [(layout.version, layout.key.size, layout.value.size) for layout in known]
        if known and (version, each.key_size, each.value_size) not in sizes:
            yield Finding(
                Severity.WARNING,
                each.name,
                (
                    f"{each.path}: version {version}, key {each.key_size}, value {each.value_size} bytes",
                    "known: " + ", ".join(f"v{number} {key}+{value}" for number, key, value in sizes),
                ),
                "of another release than its name says, or newer than calitrace: what it holds is not read",
                "compare the calico-node image with what attached the programs; kubectl get ds -n calico-system "
                "calico-node -o wide",
            )


def nearly_full(maps: Maps) -> Said:
    """Counts the entries of each map against its size: more than 80 % is a warning, 95 % an error.

    A full hash or trie refuses new entries: no conntrack entry, no route, no service. A full LRU map forgets the
    oldest instead; those that nobody ever empties, such as cali_v4_srmsg, are full in the end and are left out.
    """
    for each in maps:
        if each.entries is None or each.max_entries == 0 or each.type == _PROGRAMS:
            continue
        share = each.entries / each.max_entries
        if share < NEARLY_FULL:
            continue
        setting = _SETTINGS.get(identify(each.name)[0].removeprefix("cali_").removeprefix("v4_").removeprefix("v6_"))
        lru = each.type in _LRU
        if lru and setting is None:
            continue
        yield Finding(
            Severity.ERROR if share >= FULL and not lru else Severity.WARNING,
            each.name,
            (f"{each.path}: {each.entries} of {each.max_entries} entries ({share:.0%})",),
            "when it is full the oldest entries are forgotten, with the connections they stand for"
            if lru
            else "when it is full, new connections, routes, services or interfaces are not known to the dataplane",
            patch(f'"{setting}":{each.max_entries * 2}')
            if setting
            else f"calitrace maps versions  # {each.name}: whose is it, and what fills it?",
        )


def leftovers(maps: Maps) -> Said:
    """Looks for maps of an upgrade or resize that did not end: names with ``_old``, two versions of one map."""
    versions: dict[str, set[int]] = {}
    for each in maps:
        base, number, old = identify(each.name)
        if old:
            yield Finding(
                Severity.WARNING,
                each.name,
                (f"{each.path}: {each.entries} entries",),
                "a resize or upgrade began and did not end: connections of the old map may be lost",
                f"{RESTART}; if it stays; " + grep_log("error copying data from old map"),
            )
        else:
            versions.setdefault(base, set()).add(number)
    for base, numbers in versions.items():
        if len(numbers) > 1:
            yield Finding(
                Severity.INFO,
                base,
                (f"versions pinned: {', '.join(str(each) for each in sorted(numbers))}",),
                "left by an upgrade; only the newest is used, the others take memory",
                "rm the older pin in /sys/fs/bpf/tc/globals once every node's calico-node runs the new release",
            )


def replaced(links: Links, maps: Maps) -> Said:
    """Compares the maps that attached programs use with those pinned under the same names.

    When they differ, Felix writes into maps that the programs never read: old rules live on, or every packet is
    dropped for want of a program to call. Before v3.27 some maps are pinned for each interface under the same name.
    """
    pins: dict[str, set[int]] = {}
    for each in maps:
        pins.setdefault(each.name, set()).add(each.id)
    for link in links:
        for hook, programs in link.programs.items():
            for program in programs:
                wrong = [
                    f"{name}: the program uses id {used}, pinned is id {', '.join(map(str, sorted(pins[name])))}"
                    for name, used in program.maps.items()
                    if program.is_calico and name in pins and used not in pins[name]
                ]
                if wrong:
                    yield Finding(
                        Severity.ERROR,
                        f"{link.name} {hook}",
                        (f"program {program.name} (id {program.id})", *wrong),
                        "this program reads maps that Felix no longer writes (projectcalico/calico#6739, #9651)",
                        f"{RESTART}; if it stays; {detach(link.name)}; {RESTART}",
                    )


def empty_programs(links: Links, maps: Maps) -> Said:
    """Looks into the program arrays that attached programs call (cali_progs*, from v3.27 on) for any program.

    The small program at the hook drops every packet when there is nothing to call.
    """
    empty = {each.id: each for each in maps if identify(each.name)[0].startswith("cali_progs") and each.entries == 0}
    for link in links:
        for hook, programs in link.programs.items():
            for program in programs:
                for used in (empty[number] for number in program.maps.values() if number in empty):
                    yield Finding(
                        Severity.ERROR,
                        f"{link.name} {hook}",
                        (
                            f"program {program.name} (id {program.id}) calls {used.name}",
                            f"{used.path}: no program in it",
                        ),
                        "every packet on this hook is dropped (projectcalico/calico#6739, #8646, #12642)",
                        RESTART,
                    )


def interface_state(links: Links, interfaces: tuple[Interface, ...]) -> Said:
    """Compares the interfaces that carry Calico's programs with the interface-state map (v3.24 and later).

    A flow that is forwarded out of an interface without a row is not confirmed: half of the connections fail. A pod
    whose row is not ready gets nothing.
    """
    rows = {each.index: each for each in interfaces}
    for link in links:
        if not link.any_calico or link.name in OWN_DEVICES:
            continue
        row = rows.get(link.index)
        if row is None:
            yield Finding(
                Severity.ERROR,
                link.name,
                (f"{link.name}: ifindex {link.index}, no row among {len(rows)}", *_row_of(link.name, interfaces)),
                "flows through this interface are not confirmed and fail by chance (projectcalico/calico#6392)",
                f"calitrace maps ifstate dump; {RESTART}; more than 1000 interfaces: bpfMapSizeIfState",
            )
        elif link.workload and row.flags & WORKLOAD and not row.flags & decoded.V4_READY:
            yield Finding(
                Severity.WARNING,
                link.name,
                (f"ifindex {row.index} {row.name}: flags {row.flags:#x}, v4Ready (0x2) is not set",),
                "new connections to this pod are refused until its programs are ready",
                grep_log("leaving it dirty"),
            )


def _row_of(name: str, interfaces: tuple[Interface, ...]) -> list[str]:
    return [f"a row for {each.name} has ifindex {each.index}" for each in interfaces if each.name == name]


def conntrack_smaller(maps: Maps, felix: Settings, host: Host | None = None, release: Release | None = None) -> Said:
    """Compares the conntrack map's size with bpfMapSizeConntrack: a smaller map has not been resized.

    A larger one is right from v3.30 on: it doubles by itself when it fills up. bpfMapSizePerCpuConntrack, times the
    number of CPUs, stands in its place where it is set (v3.30).
    """
    setting, share = felix.get("bpfMapSizeConntrack"), felix.get("bpfMapSizePerCpuConntrack")
    if isinstance(share, Unset) or not isinstance(share.value, int):
        yield Unknown(share.why if isinstance(share, Unset) else f"{share} is no number")
        return
    if isinstance(setting, Unset) or not isinstance(setting.value, int):
        yield Unknown(setting.why if isinstance(setting, Unset) else f"{setting} is no number")
        return
    wanted = setting.value
    if share.value and host is None:
        yield Unknown(f"{share}, and the number of CPUs is not known")
        return
    if share.value and host is not None:
        setting, wanted = share, share.value * host.cpus
    for each in maps:
        base, _version, old = identify(each.name)
        larger = each.max_entries > wanted and release is not None and release.newest < (3, 30)
        if base == "cali_v4_ct" and not old and (each.max_entries < wanted or larger):
            yield Finding(
                Severity.WARNING,
                each.name,
                (f"{each.path}: {each.max_entries} entries at most", str(setting)),
                "the map has not the size that is configured; with the old one in use programs fail to load "
                "(projectcalico/calico#9651)",
                RESTART,
            )


def jit_limit(programs: tuple[Program, ...], sysctls: dict[str, str]) -> Said:
    """Adds up the machine code of all loaded programs and compares it with net.core.bpf_jit_limit.

    The sum is the least that the kernel counts: it rounds each program up. At the limit no program can be loaded by
    processes without CAP_BPF, and pods fail to start.
    """
    limit = sysctls.get("net.core.bpf_jit_limit", "")
    if not limit.isdigit() or int(limit) == 0:
        yield Unknown("net.core.bpf_jit_limit could not be read")
        return
    used = sum(each.jited_bytes for each in programs)
    if used > NEARLY_FULL * int(limit):
        calico = sum(map(_is_calicos, programs))
        yield Finding(
            Severity.ERROR,
            "",
            (
                f"net.core.bpf_jit_limit = {limit}",
                f"{used} bytes of machine code in {len(programs)} programs, {calico} of them Calico's",
            ),
            "programs can soon not be loaded: pods fail to start (projectcalico/calico#6784: programs not unloaded)",
            "sysctl -w net.core.bpf_jit_limit="
            + str(int(limit) * 2)
            + "; restart calico-node if its programs grow in number",
        )


def programs_left(programs: tuple[Program, ...], links: Links, maps: Maps) -> Said:
    """Counts Calico's loaded programs against the interfaces that have any: far more are left of earlier ones.

    Before v3.27 each hook has a chain of about ten programs of its own, since then one or two and a share in common
    ones. Each takes kernel memory, and counts against net.core.bpf_jit_limit. Of several nodes on one machine those
    programs count that use this node's maps: those that are pinned, and those of before an upgrade that a program at
    an interface still uses.
    """
    here = sum(link.any_calico for link in links)
    calicos, own = [each for each in programs if _is_calicos(each)], {each.id for each in maps}
    attached = (program for link in links for hook in link.programs.values() for program in hook)
    own |= {used for program in attached if program.is_calico for used in program.maps.values()}
    mine = [each for each in calicos if own & set(each.maps.values())]
    others = Counter(name for each in calicos if not own & set(each.maps.values()) for name in each.maps)
    bases, names = {identify(each.name)[0] for each in maps}, {each.name for each in maps}
    if here and len(calicos) > _MOST_PROGRAMS and not mine:
        yield Unknown(f"which of {len(calicos)} programs of Calico's use this node's maps is not known")
    for name, count in others.items():
        if here and count > _MOST_PROGRAMS and identify(name)[0] in bases and name not in names:
            yield Unknown(
                f"{count} programs use a {name}, which is not this node's: they are left of before an upgrade, unless "
                "a node of another release is on this machine"
            )
    used = sum(each.jited_bytes for each in mine)
    if here and len(mine) > _MOST_PROGRAMS + _MOST_OF_INTERFACE * here:
        yield Finding(
            Severity.WARNING,
            "",
            (
                f"{len(mine)} programs of Calico's for {here} interfaces, {used} bytes",
                f"{len(programs)} programs in all",
            ),
            "programs are not unloaded: calico-node's CPU and memory grow until none can be loaded and pods fail to "
            "start (projectcalico/calico#6784)",
            f"{RESTART}; bpftool prog show | grep -c cali  # and again an hour later",
        )


def _is_calicos(program: Program) -> bool:
    return program.is_calico or re.match(r"p[46][ie]_", program.name) is not None


CHECKS = (
    Check("maps.pinned", Section.TOOL, pinned),
    Check("maps.unknown-layout", Section.TOOL, unknown_layout),
    Check("maps.nearly-full", Section.TOOL, nearly_full),
    Check("maps.leftovers", Section.TOOL, leftovers),
    Check("maps.replaced", Section.TOOL, replaced),
    Check("maps.empty-programs", Section.TOOL, empty_programs),
    Check("maps.interface-state", Section.TOOL, interface_state),
    Check("maps.conntrack-smaller", Section.TOOL, conntrack_smaller),
    Check("maps.jit-limit", Section.TOOL, jit_limit),
    Check("maps.programs-left", Section.TOOL, programs_left),
    *log_checks("maps"),
)
