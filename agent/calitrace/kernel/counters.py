"""The counters of a node: Calico's maps, qdiscs, interfaces, and the CPUs' softnet queues. Nothing is changed.

The kernel has no counter of what tcx programs drop. What stands in for it is our own count of kfree_skb by reason,
TC_INGRESS and TC_EGRESS, for as long as it runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from calitrace.calico import maptables
from calitrace.calico.maps import identify
from calitrace.checks.snapshot import Missing
from calitrace.correlate.counters import STATISTICS, CalicoRow, Interface, Qdisc, Reading, Softnet, TcDrops, Tcx
from calitrace.errors import EnvironmentUnfit, LayoutMismatch
from calitrace.events import Stat
from calitrace.kernel import maps, netns, syscall, tc
from calitrace.kernel.missing import or_missing

_SOFTNET = Path("/proc/net/softnet_stat")
_PINNED_AT = {"_igr": 0, "_egr": 1, "_xdp": 2}


class Reader:
    """Reads all counters of one node, again and again; a context manager.

    *namespace*: name, path or process id, "" for ours. *bpffs*: None for the node's usual place. *tcx*: count
    ourselves what tc and tcx programs drop from entry on.
    Raises UsageError for a namespace that is not there, EnvironmentUnfit where it may not be entered or counted.
    """

    def __init__(self, namespace: str, bpffs: Path | None, *, tcx: bool = False) -> None:
        self._namespace = namespace
        self._bpffs = maps.root(bpffs, namespace)
        self._own = OwnCount(netns.inum(namespace)) if tcx else None
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        from pyroute2 import IPRoute

        with ExitStack() as stack:
            with netns.inside(self._namespace):
                self._route = stack.enter_context(IPRoute())
            if self._own is not None:
                stack.enter_context(self._own.collectors)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self) -> Reading:
        """All counters now; a source that cannot be read is `Missing` with the reason."""
        with netns.inside(self._namespace):
            mono_ns, wall_ns = time.monotonic_ns(), time.time_ns()
            links = or_missing(lambda: interfaces(self._route), "interfaces")
            known = () if isinstance(links, Missing) else links
            return Reading(
                mono_ns,
                wall_ns,
                or_missing(lambda: calico(self._bpffs, [each.name for each in known], self._namespace), "counters map"),
                or_missing(lambda: tuple(iter_qdiscs(self._route)), "qdiscs"),
                links,
                or_missing(lambda: tuple(_iter_tcx(known)), "tcx programs"),
                or_missing(softnet, str(_SOFTNET)),
                or_missing(self._own.read, "our own count") if self._own is not None else None,
            )


class OwnCount:
    """The kernel's drops in one network namespace by the reasons that tc and tcx programs cause."""

    def __init__(self, inum: int) -> None:
        from calitrace.kernel.collectors import Collectors, Plan, has_drop_reason
        from calitrace.kernel.headers import kernel_btf

        types = kernel_btf()
        reasons = (types.enum("skb_drop_reason") if types else None) or {}
        names = {f"SKB_DROP_REASON_TC_{hook.upper()}": hook for hook in tc.HOOKS}
        self._inum = inum
        self._hooks = {number: names[name] for number, name in reasons.items() if name in names}
        if not self._hooks or not has_drop_reason(types):
            raise EnvironmentUnfit("this kernel does not tell the drops of tc programs from others")
        self.collectors = Collectors(Plan(hop=False, log="", drop_count_only=True), types)

    def read(self) -> tuple[TcDrops, ...]:
        """Raises EnvironmentUnfit when there are more kinds of drops than we have room for."""
        found: Counter[tuple[int, str]] = Counter()
        for cell, drops in self.collectors.drop_counts().items():
            if cell.netns == self._inum and cell.skb_drop_reason in self._hooks:
                found[cell.ifindex, self._hooks[cell.skb_drop_reason]] += drops
        if other := self.collectors.stats()[Stat.DROP_OTHER]:
            raise EnvironmentUnfit(f"{other} drops found no room in our table: some may be those of tc programs")
        return tuple(TcDrops(*place, drops) for place, drops in found.items())


def calico(where: Path, names: Iterable[str], namespace: str = "") -> tuple[CalicoRow, ...]:
    """The rows of all counters maps that loaded programs use, or of all when none says it is used.

    *names*: of the node's interfaces; *namespace*: the node's, "" for ours. Raises as `maps.find` does, and
    EnvironmentUnfit for no rows.
    """
    everything = maps.find(where, namespace)
    found = _of("cali_counters", everything)
    rows = tuple(_iter_rows(found, names, _ifstate(_of("cali_iface", everything))))
    if not rows:
        raise EnvironmentUnfit(f"no counters map with rows below {where}")
    return rows


def _of(base: str, found: Iterable[maps.Found]) -> list[maps.Found]:
    """The maps of a kind that loaded programs use, or all when none says it is used."""
    those = [each for each in found if identify(each.name)[::2] == (base, False)]
    return [each for each in those if each.in_use] or those


def _ifstate(found: Iterable[maps.Found]) -> dict[int, str]:
    """ifindex to name, as Felix knows them: the maps may be those of another network namespace than we look at."""
    known: dict[int, str] = {}
    for raw in map(maps.read, found):
        with suppress(LayoutMismatch):
            known.update({e["ifindex"]: e["name"] for e in maptables.iter_entries(raw, maptables.resolve(raw))})
    return known


def _iter_rows(found: list[maps.Found], names: Iterable[str], known: Mapping[int, str]) -> Iterator[CalicoRow]:
    # v3.24 and v3.25 name the directory for the interface, without its dots: a bpffs takes none.
    # Source: felix/bpf/tc/attach.go, felix/bpf/xdp/attach.go
    undotted = {name.replace(".", ""): name for name in names}
    for each in found:
        raw = maps.read(each)
        for key, value in raw.entries:
            counts = tuple(memoryview(maptables.summed(raw, value)).cast("Q"))
            if len(key) == 8:
                ifindex, hook = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
                yield CalicoRow(each.name, each.info.id, ifindex, hook, counts, known.get(ifindex, ""))
                continue
            interface, _, suffix = each.directory.rpartition("/")[2].rpartition("_")
            if f"_{suffix}" not in _PINNED_AT:
                raise EnvironmentUnfit(f"map {each.name} is pinned at {each.pin}: whose counters are these?")
            interface = undotted.get(interface, interface)
            yield CalicoRow(each.name, each.info.id, 0, _PINNED_AT[f"_{suffix}"], counts, interface)


def iter_qdiscs(route: Any) -> Iterator[Qdisc]:
    """Every qdisc of the namespace in which *route*, an ``IPRoute``, was opened."""
    for message in route.get_qdiscs():
        statistics = message.get_attr("TCA_STATS2")
        queue = statistics.get_attr("TCA_STATS_QUEUE") if statistics is not None else None
        if queue is not None:
            kind = message.get_attr("TCA_KIND")
            yield Qdisc(message["index"], kind, message["handle"], message["parent"], int(queue["drops"]))


def interfaces(route: Any) -> tuple[Interface, ...]:
    """Every interface of that namespace."""
    found = []
    for message in route.get_links():
        counts = message.get_attr("IFLA_STATS64") or {}
        statistics = {name: int(counts[name]) for name in STATISTICS if name in counts}
        found.append(Interface(message["index"], tc.interface_name(message), statistics))
    return tuple(found)


def _iter_tcx(links: Iterable[Interface]) -> Iterator[Tcx]:
    for link in links:
        for hook in tc.HOOKS:
            attached = tc.tcx_programs(link.ifindex, hook)
            if attached:
                yield Tcx(link.ifindex, hook, tuple(_program_name(each) for each in attached))


def _program_name(identifier: int) -> str:
    try:
        return syscall.program_by_id(identifier).name
    except FileNotFoundError:  # it was replaced while we looked
        return f"program {identifier}"


def softnet() -> tuple[Softnet, ...]:
    """One line for each CPU that is online. Source: net/core/net-procfs.c, softnet_seq_show."""
    found = []
    for number, line in enumerate(_SOFTNET.read_text().splitlines()):
        columns = [int(each, 16) for each in line.split()]
        cpu = columns[12] if len(columns) > 12 else number  # Linux before 5.10 does not number them
        found.append(Softnet(cpu, columns[1], columns[2]))
    return tuple(found)
