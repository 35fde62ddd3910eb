"""Collects what one node holds into a snapshot: interfaces, programs, maps, processes, settings of the kernel.

Nothing is changed but for BPF run-time statistics, which are on for the interval through a file descriptor of ours.
Each source is read by itself: what fails becomes `Missing` with the reason and the rest goes on.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from calitrace.calico import WORKLOAD_PREFIX, maptables
from calitrace.calico.maps import identify
from calitrace.checks.snapshot import (
    Counters,
    Drops,
    Host,
    Link,
    Map,
    Missing,
    Process,
    Program,
    ProgramTime,
    ProgramTimes,
    QdiscDrops,
    Route,
    Snapshot,
    ThreadTime,
    ThreadTimes,
)
from calitrace.errors import EnvironmentUnfit
from calitrace.kernel import counters, iptables, maps, netns, syscall, tc
from calitrace.kernel.missing import or_missing as _source

Progress = Callable[[str], None]
_PROC = Path("/proc")
_LOOKED_FOR = ("kubelet", "kube-proxy", "calico-node", "calico-felix")
_SYSCTLS = ("net.core.bpf_jit_enable", "net.core.bpf_jit_limit", "kernel.bpf_stats_enabled")
_ALL = 1 << 62
# What is decoded, and how many rows of it are kept; of conntrack enough to see what goes unanswered.
_DECODED = {
    "cali_v4_nat_fe": _ALL,
    "cali_v4_nat_be": _ALL,
    "cali_v4_routes": _ALL,
    "cali_iface": _ALL,
    "cali_v4_ct": 50_000,
}
_THROUGH_PROC = re.compile(r"^/proc/\d+/root(?=/)")  # how we came to it, not where it is
_COUNTED_TYPES = (1, 5, 9, 10, 11)  # hash, per-CPU hash, LRU, per-CPU LRU, LPM trie: arrays are always full
_MOST_ETHTOOL = 64
_METRICS_PORT, _MOST_METRICS = 9091, 4 << 20
_FELIX_ENV = re.compile(r"(?i:FELIX_[A-Z0-9_]+)|KUBERNETES_SERVICE_HOST|NODENAME")


@dataclass(frozen=True)
class Where:
    """Which node: network *namespace* ("": ours), *bpffs* (None: the usual place), *node*: its name ("": its own)."""

    namespace: str = ""
    bpffs: Path | None = None
    node: str = ""


def collect(where: Where, interval_s: float, progress: Progress) -> Snapshot:
    """Look at everything, twice where something is measured, *interval_s* apart.

    Raises UsageError for a namespace that is not there.
    """
    bpffs = maps.root(where.bpffs, where.namespace)
    inum = netns.inum(where.namespace)
    progress("looking at processes and kernel settings")
    processes = _source(lambda: tuple(iter_processes(inum)), "processes")
    env = _source(lambda: _felix_env(processes), "calico-node's environment")
    found = Snapshot(
        host=_source(lambda: _host(where.node, env), "host"),
        processes=processes,
        felix_env=env,
        trace_readers=_source(lambda: tuple(iter_trace_readers()), "open files"),
        lockdown=_source(_lockdown, "lockdown"),
    )
    sysctls = _sysctls()
    with netns.inside(where.namespace):
        progress("looking at interfaces, routes and programs")
        network = _network()
        found = replace(found, **{**network, "sysctls": sysctls | network["sysctls"]})
        progress("looking at maps")
        found = replace(
            found,
            programs=_source(lambda: tuple(iter_programs()), "programs"),
            maps=_source(lambda: tuple(_map(each) for each in maps.find(bpffs)), f"maps below {bpffs}"),
            metrics=_source(lambda: _metrics(env), "Felix's metrics"),
        )
        if interval_s > 0:
            progress(f"measuring for {interval_s:g} s")
            found = replace(found, **_measured(found, bpffs, interval_s, inum))
        else:
            none = Missing("nothing was measured: --interval 0")
            found = replace(found, thread_times=none, program_times=none, drops=none, chains_later=none)
    return found


def _metrics(env: dict[str, str] | Missing) -> dict[str, float]:
    """Felix's metrics, where it serves them on this node. Raises OSError, EnvironmentUnfit."""
    if isinstance(env, Missing):
        raise EnvironmentUnfit(f"Felix's metrics: {env.why}")
    host = env.get("FELIX_PROMETHEUSMETRICSHOST") or "127.0.0.1"
    address = f"http://{host}:{env.get('FELIX_PROMETHEUSMETRICSPORT') or _METRICS_PORT}/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=1) as answer:
            text = answer.read(_MOST_METRICS).decode(errors="replace")
    except (OSError, ValueError, http.client.HTTPException) as failure:
        raise EnvironmentUnfit(f"{address} does not answer ({failure}): is prometheusMetricsEnabled true?") from failure
    rows = re.findall(r"^(felix_bpf_\w+) ([0-9.eE+-]+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def _host(node: str, env: dict[str, str] | Missing) -> Host:
    named = node or ("" if isinstance(env, Missing) else env.get("FELIX_FELIXHOSTNAME") or env.get("NODENAME", ""))
    distribution = {}
    with suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            key, equals, value = line.partition("=")
            if equals:
                distribution[key] = value.strip("\"'")
    name = named or socket.gethostname().lower()
    btf = Path("/sys/kernel/btf/vmlinux").exists()
    return Host(name, os.uname().release, distribution, os.cpu_count() or 1, btf)


def _lockdown() -> str:
    path = Path("/sys/kernel/security/lockdown")
    if not path.exists():
        return "not present"
    match = re.search(r"\[(\w+)\]", path.read_text())
    return match[1] if match else "not known"


# Processes


def iter_processes(inum: int) -> Iterator[Process]:
    """The processes in the network namespace with this inode number; kernel threads are left out.

    Raises EnvironmentUnfit where it is hidden from us in which namespace one of those is that checks look for.
    """
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended while we looked
                name = _comm(entry)
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                try:
                    where = (entry / "ns/net").stat().st_ino
                except PermissionError:
                    if name in _LOOKED_FOR and (entry / "stat").exists():
                        raise EnvironmentUnfit(f"the network namespace of {name} is hidden: run as root") from None
                    continue
                if command and where == inum:
                    yield Process(int(entry.name), name, command[:200])


def iter_trace_readers() -> Iterator[Process]:
    """Processes that have a trace_pipe open. Raises EnvironmentUnfit where some could not be seen, and none was."""
    if os.geteuid() != 0:
        raise EnvironmentUnfit("the open files of other processes are hidden: run as root")
    found, hidden = False, not _sees_node()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                if any(_target(each).endswith("/trace_pipe") for each in (entry / "fd").iterdir()):
                    yield Process(int(entry.name), _comm(entry))
                    found = True
            except PermissionError:
                hidden = True
            except OSError:  # it ended while we looked
                continue
    if hidden and not found:
        raise EnvironmentUnfit("other processes, or their open files, are hidden: hostPID and CAP_SYS_PTRACE show them")


def _sees_node() -> bool:
    """Whether the node's processes are in sight, not a container's alone: they begin with the kernel's own."""
    with suppress(OSError):
        return _comm(_PROC / "2") == "kthreadd"
    return False


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # closed while we looked
        return ""


def _comm(entry: Path) -> str:
    return (entry / "comm").read_text(errors="replace").strip()


def _felix_env(processes: tuple[Process, ...] | Missing) -> dict[str, str]:
    """Felix's variables only: the others may be secrets."""
    if isinstance(processes, Missing):
        raise EnvironmentUnfit(processes.why)
    felix = [
        each.pid for each in processes if each.name in ("calico-node", "calico-felix") and "-felix" in each.command
    ]
    if not felix:
        raise EnvironmentUnfit("no process calico-node -felix in this node's network namespace")
    found = {}
    for each in (_PROC / str(felix[0]) / "environ").read_bytes().split(b"\0"):
        key, _, value = each.decode(errors="replace").partition("=")
        if _FELIX_ENV.fullmatch(key) and "KEY" not in key and "PASSWORD" not in key:
            found[key] = value
    return found


def _cpu_times(processes: tuple[Process, ...]) -> dict[tuple[int, int], tuple[str, str, float]]:
    tick = os.sysconf("SC_CLK_TCK")
    found = {}
    for each in processes:
        if each.name in ("calico-node", "kube-proxy"):
            with suppress(OSError):
                for thread in (_PROC / str(each.pid) / "task").iterdir():
                    name, _, rest = (thread / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
                    numbers = rest.split()
                    used = (int(numbers[11]) + int(numbers[12])) / tick
                    found[each.pid, int(thread.name)] = (each.name, name, used)
    return found


# Network


def _network() -> dict[str, Any]:
    from pyroute2 import IPRoute

    found: dict[str, Any] = {}
    with IPRoute() as route:
        found["links"] = _source(lambda: _links(route), "interfaces")
        found["routes"] = _source(lambda: tuple(_iter_routes(route)), "routes")
    links = found["links"]
    names = [] if isinstance(links, Missing) else [link.name for link in links]
    found["sysctls"] = _namespace_sysctls(["all", *names])
    found["chains"] = _source(iptables.chains, "netfilter chains")
    return found


def _sysctls() -> dict[str, str]:
    """The machine's; those of net.core are not to be seen from another namespace than the first."""
    return _settings({name: name.replace(".", "/") for name in _SYSCTLS})


def _namespace_sysctls(interfaces: list[str]) -> dict[str, str]:
    """Those of this thread's network namespace."""
    wanted = {"net.ipv4.ip_forward": "net/ipv4/ip_forward"}
    for name in interfaces:
        for each in ("rp_filter", "forwarding"):
            wanted[f"net.ipv4.conf.{name}.{each}"] = f"net/ipv4/conf/{name}/{each}"
    return _settings(wanted)


def _settings(wanted: dict[str, str]) -> dict[str, str]:
    found = {}
    for name, path in wanted.items():
        with suppress(OSError):
            found[name] = (_PROC / "sys" / path).read_text().strip()
    return found


def _iter_routes(route: Any) -> Iterator[Route]:
    names = {message["index"]: tc.interface_name(message) for message in route.get_links()}
    for message in route.get_routes(family=socket.AF_INET, table=254):
        destination = message.get_attr("RTA_DST")
        dst = f"{destination}/{message['dst_len']}" if destination else "default"
        hops = [(message.get_attr("RTA_OIF"), message.get_attr("RTA_GATEWAY"))]
        hops += [(hop["oif"], hop.get_attr("RTA_GATEWAY")) for hop in message.get_attr("RTA_MULTIPATH") or ()]
        for index, gateway in hops:
            if index:
                yield Route(dst, names.get(index, str(index)), gateway or "", message.get_attr("RTA_PRIORITY") or 0)


def _links(route: Any) -> tuple[Link, ...]:
    addresses: dict[int, list[str]] = {}
    for message in route.get_addr():
        address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
        addresses.setdefault(message["index"], []).append(f"{address}/{message['prefixlen']}")
    hooks = tc.hooks(route)
    messages = list(route.get_links())
    names = {message["index"]: tc.interface_name(message) for message in messages}
    known: dict[int, Program] = {}
    found = []
    for message in messages:
        index, name = message["index"], names[message["index"]]
        kind = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") or ""
        data = message.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        port = data.get_attr("IFLA_VXLAN_PORT") if kind == "vxlan" and data is not None else 0
        in_namespace = message.get_attr("IFLA_LINK_NETNSID") is None
        found.append(
            Link(
                index,
                name,
                kind,
                message.get_attr("IFLA_MTU") or 0,
                bool(message["flags"] & 1),  # IFF_UP
                tuple(addresses.get(index, ())),
                names.get(message.get_attr("IFLA_MASTER"), ""),
                names.get(message.get_attr("IFLA_LINK"), "") if in_namespace else "",
                programs={
                    hook: tuple(_program(each, known) for each in ids)
                    for hook, ids in tc.program_ids(route, index, hooks.get(index, ())).items()
                    if ids
                },
                udp_port=port or 0,
            )
        )
    return tuple(_with_hardware(found))


def _program(identifier: int, known: dict[int, Program]) -> Program:
    if identifier not in known:
        info = syscall.program_by_id(identifier)
        used = {}
        for map_id in info.map_ids:
            with suppress(OSError):
                found = syscall.map_by_id(map_id)
                if found.name.startswith("cali_"):
                    used[found.name] = map_id
        known[identifier] = Program(identifier, info.name, info.jited_bytes, used)
    return known[identifier]


def _with_hardware(links: list[Link]) -> Iterator[Link]:
    """Driver and offloads of interfaces that are not pods'; the port of WireGuard devices."""
    from pyroute2 import Ethtool, WireGuard
    from pyroute2.netlink.exceptions import NetlinkError

    asked = {link.index for link in _likely_first(links)[:_MOST_ETHTOOL]}
    with Ethtool() as tool:
        for link in links:
            if link.index not in asked:
                yield link
                continue
            with suppress(OSError, NetlinkError, UnicodeError):  # pyroute2 takes no name that is no text
                link = replace(
                    link, features={k: bool(v) for k, v in tool.get_features(link.name).features.items() if k}
                )
            with suppress(OSError):
                link = replace(link, driver=iptables.driver(link.name))
            if link.kind == "wireguard":
                with suppress(OSError, NetlinkError, UnicodeError), WireGuard() as guard:
                    port = guard.info(link.name)[0].get_attr("WGDEVICE_A_LISTEN_PORT")
                    link = replace(link, udp_port=int(port or 0))
            yield link


def _likely_first(links: list[Link]) -> list[Link]:
    """Those that may not be pods': behind the others veths, as another CNI names its pods' as it likes."""
    return sorted(
        (link for link in links if not link.name.startswith(WORKLOAD_PREFIX)), key=lambda link: link.kind == "veth"
    )


# BPF

_OF_ONE_NODE = ("cali_state", "cali_v4_state", "cali_v4_ct")


def iter_programs() -> Iterator[Program]:
    """All loaded programs of this machine, with those of Calico's maps that tell one node's from another's.

    Raises OSError.
    """
    names: dict[int, str] = {}
    for identifier in syscall.program_ids():
        with suppress(OSError):
            info = syscall.program_by_id(identifier)
            for map_id in info.map_ids:
                if map_id not in names:
                    names[map_id] = _map_name(map_id)
            used = {names[each]: each for each in info.map_ids if names[each].startswith(_OF_ONE_NODE)}
            yield Program(identifier, info.name, info.jited_bytes, used)


def _map_name(identifier: int) -> str:
    with suppress(OSError):
        return syscall.map_by_id(identifier).name
    return ""


def _map(found: maps.Found) -> Map:
    info = found.info
    raw: tuple[tuple[bytes, bytes], ...] = ()
    count = None
    if info.type in _COUNTED_TYPES:
        entries = maps.read(found).entries
        base, _version, old = identify(found.name)
        if base in _DECODED and not old:
            rows = iter(entries)
            raw = tuple(islice(rows, _DECODED[base]))
            count = len(raw) + sum(1 for _ in rows)
        else:
            count = sum(number for number, _, _ in maptables.blocks(maps.read(found)))
    elif identify(found.name)[0].startswith("cali_progs"):
        count = len(maps.programs_at(found, range(info.max_entries)))
    path = _THROUGH_PROC.sub("", str(found.path)) if found.path else ""
    return Map(info.id, found.name, path, info.type, info.key_size, info.value_size, info.max_entries, count, raw)


# Measurements


def _measured(found: Snapshot, bpffs: Path, interval_s: float, inum: int) -> dict[str, Any]:
    processes = () if isinstance(found.processes, Missing) else found.processes
    links = () if isinstance(found.links, Missing) else found.links
    with ExitStack() as stack:
        own = _source(lambda: _own_count(stack, links, inum), "our own count")
        statistics = _source(lambda: stack.callback(os.close, syscall.enable_stats()), "BPF statistics")
        began = time.monotonic()
        threads, programs = _cpu_times(processes), _source(_run_times, "run times")
        names = {link.index: link.name for link in links}
        rows = _source(lambda: _counters(bpffs, names), "counters map")
        dropped = _source(lambda: _program_drops(own, links), "qdiscs")
        time.sleep(interval_s)
        after_threads, after_programs = _cpu_times(processes), _source(_run_times, "run times")
        # Outside the first time and inside the second: no drop that Calico counted is missed for one of the qdisc's.
        after_dropped = _source(lambda: _program_drops(own, links), "qdiscs")
        after_rows = _source(lambda: _counters(bpffs, names), "counters map")
        seconds = round(time.monotonic() - began, 3)
    measured: dict[str, Any] = {"chains_later": _source(iptables.chains, "netfilter chains")}
    measured["thread_times"] = (
        found.processes
        if isinstance(found.processes, Missing)
        else ThreadTimes(
            seconds,
            tuple(
                ThreadTime(pid, process, name, round(used - threads[pid, tid][2], 3))
                for (pid, tid), (process, name, used) in after_threads.items()
                if (pid, tid) in threads
            ),
        )
    )
    broken = [each for each in (statistics, programs, after_programs) if isinstance(each, Missing)]
    if broken or isinstance(programs, Missing) or isinstance(after_programs, Missing):
        measured["program_times"] = broken[0]
    else:
        measured["program_times"] = ProgramTimes(
            seconds,
            tuple(
                ProgramTime(identifier, name, run_ns - programs[identifier][1], count - programs[identifier][2])
                for identifier, (name, run_ns, count) in after_programs.items()
                if identifier in programs and count > programs[identifier][2]
            ),
        )
    measured["drops"] = _drops(seconds, names, (rows, after_rows), (dropped, after_dropped))
    return measured


def _run_times() -> dict[int, tuple[str, int, int]]:
    """Name, run time and run count by id, of all programs of this machine."""
    found = {}
    for identifier in syscall.program_ids():
        with suppress(OSError):
            info = syscall.program_by_id(identifier)
            found[identifier] = (info.name, info.run_time_ns, info.run_count)
    return found


Rows = dict[tuple[str, int], tuple[int, ...]]


def _counters(where: Path, names: dict[int, str]) -> Rows:
    """Sums over CPUs by (interface, hook)."""
    found = counters.calico(where, names.values())
    return {(row.interface or names.get(row.ifindex, f"ifindex {row.ifindex}"), row.hook): row.packets for row in found}


def _clsact_drops() -> dict[int, int]:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        return {each.ifindex: each.drops for each in counters.iter_qdiscs(route) if each.kind == "clsact"}


def _own_count(stack: ExitStack, links: tuple[Link, ...], inum: int) -> counters.OwnCount | None:
    """Our own count of what programs drop, where some are on interfaces without a clsact qdisc: the kernel has none."""
    with_clsact = _clsact_drops()
    if not any(link.any_calico and link.index not in with_clsact for link in links):
        return None
    own = counters.OwnCount(inum)
    stack.enter_context(own.collectors)
    return own


Dropped = dict[tuple[str, int], int]  # by source ("clsact", "tcx") and ifindex


def _program_drops(own: counters.OwnCount | Missing | None, links: tuple[Link, ...]) -> Dropped:
    clsact = _clsact_drops()
    found = {("clsact", index): drops for index, drops in clsact.items()}
    if own is not None and not isinstance(own, Missing):
        found |= {("tcx", link.index): 0 for link in links if link.any_calico and link.index not in clsact}
        for each in own.read():
            if ("tcx", each.ifindex) in found:
                found["tcx", each.ifindex] += each.drops
    return found


def _drops(
    seconds: float,
    names: dict[int, str],
    counted: tuple[Rows | Missing, Rows | Missing],
    by_programs: tuple[Dropped | Missing, Dropped | Missing],
) -> Drops:
    before, after = counted
    dropped, dropped_after = by_programs
    rows: tuple[Counters, ...] | Missing
    clsact: tuple[QdiscDrops, ...] | Missing
    if isinstance(before, Missing):
        rows = before
    elif isinstance(after, Missing):
        rows = Missing("the counters map went while we measured")
    else:
        rows = tuple(Counters(*where, before.get(where, (0,) * len(values)), values) for where, values in after.items())
    if isinstance(dropped, Missing):
        clsact = dropped
    elif isinstance(dropped_after, Missing):
        clsact = dropped_after
    else:
        clsact = tuple(
            QdiscDrops(names.get(index, f"ifindex {index}"), dropped[source, index], value, source)
            for (source, index), value in dropped_after.items()
            if (source, index) in dropped
        )
    return Drops(seconds, rows, clsact)
