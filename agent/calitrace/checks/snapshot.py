"""What was found on a node and in its cluster, before anybody judges it: plain values that go into a journal.

A source that could not be read is `Missing` with the reason; no check may take that for an answer.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from calitrace.errors import Malformed

T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """A source that was not read. *why*: one sentence without a full stop."""

    why: str


@dataclass(frozen=True)
class Host:
    """*node*: its name in Kubernetes. *kernel*: as uname -r says. *distribution*: /etc/os-release.

    *btf*: the kernel describes its types, in /sys/kernel/btf/vmlinux.
    """

    node: str
    kernel: str
    distribution: dict[str, str]
    cpus: int
    btf: bool = True


@dataclass(frozen=True)
class Program:
    """A loaded BPF program. *jited_bytes*: 0 when it is interpreted. *maps*: Calico's maps that it uses, name to id."""

    id: int
    name: str
    jited_bytes: int = 0
    maps: dict[str, int] = field(default_factory=dict)

    @property
    def is_calico(self) -> bool:
        """By its name: ``cali_tc_preambl``, ``calico_from_hos``."""
        return self.name.startswith("cali")


@dataclass(frozen=True)
class Link:
    """An interface of the node's namespace. *kind*: veth, bond, bridge, vlan, vxlan, wireguard, dummy, or "".

    *addresses*: with prefix length. *master*, *parent*: names, or "". *programs*: by hook, in the order they run.
    *features*: the offloads that ethtool knows, empty when it was not asked. *udp_port*: of a vxlan or wireguard
    device, 0 when not known.
    *workload*: it is the host's side of a pod's; follows from its name and interfacePrefix.
    """

    index: int
    name: str
    kind: str = ""
    mtu: int = 1500
    up: bool = True
    addresses: tuple[str, ...] = ()
    master: str = ""
    parent: str = ""
    driver: str = ""
    features: dict[str, bool] = field(default_factory=dict)
    programs: dict[str, tuple[Program, ...]] = field(default_factory=dict)
    udp_port: int = 0
    workload: bool = False

    def calico(self, hook: str) -> bool:
        """Whether a Calico program is at *hook*: ``ingress`` or ``egress``, of tc or tcx."""
        return any(program.is_calico for program in self.programs.get(hook, ()))

    @property
    def any_calico(self) -> bool:
        """Whether a Calico program is at either hook."""
        return self.calico("ingress") or self.calico("egress")

    @property
    def all_calico(self) -> bool:
        """Whether one is at each of both."""
        return self.calico("ingress") and self.calico("egress")


@dataclass(frozen=True)
class Route:
    """A route of the main table. *dst*: "default" or a network. *metric*: of two to one network the lower counts."""

    dst: str
    interface: str
    gateway: str = ""
    metric: int = 0


@dataclass(frozen=True)
class Process:
    """A process in the node's network namespace. *name*: as the kernel has it, at most 15 characters."""

    pid: int
    name: str
    command: str = ""


@dataclass(frozen=True)
class ThreadTime:
    """CPU time of one thread over the interval."""

    pid: int
    process: str
    thread: str
    cpu_s: float


@dataclass(frozen=True)
class ThreadTimes:
    """Over *seconds* of wall time, the threads of Calico and kube-proxy."""

    seconds: float
    threads: tuple[ThreadTime, ...]


@dataclass(frozen=True)
class ProgramTime:
    """What one BPF program used over the interval."""

    id: int
    name: str
    run_ns: int
    run_count: int


@dataclass(frozen=True)
class ProgramTimes:
    """Over *seconds* of wall time."""

    seconds: float
    programs: tuple[ProgramTime, ...]


@dataclass(frozen=True)
class Map:
    """A pinned BPF map. *entries*: None when they were not counted; *raw*: key and value, for the maps we decode."""

    id: int
    name: str
    path: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    entries: int | None = None
    raw: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Counters:
    """Packets by Calico's reason code at one hook (0 tc ingress, 1 tc egress, 2 XDP), twice."""

    interface: str
    hook: int
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class QdiscDrops:
    """What the programs at an interface's hooks dropped, twice.

    *source*: ``clsact``, the counter of that qdisc, which ``tc -s qdisc show`` prints; ``tcx``, our own count of
    kfree_skb, as the kernel has none.
    """

    interface: str
    before: int
    after: int
    source: str = "clsact"


@dataclass(frozen=True)
class Drops:
    """Over *seconds* of wall time. Each half may be missing by itself: before v3.24 Calico has no counters."""

    seconds: float
    counters: tuple[Counters, ...] | Missing = ()
    qdiscs: tuple[QdiscDrops, ...] | Missing = ()


@dataclass(frozen=True)
class VxlanProbe:
    """Probes sent in the NodePort tunnel to *node* (UDP *port*), for *inner*, a NodePort; and the answers.

    *sender*: the node that sent them, "" for this one.
    """

    node: str
    port: int
    inner: str
    sent: int
    answered: int
    sender: str = ""


@dataclass(frozen=True)
class Kubernetes:
    """Objects as the API sends them, each kind a source by itself: an account may read some and not others.

    *calico*: the release that ClusterInformation names, or "". *Secrets are never asked for*.
    """

    version: str = ""
    nodes: tuple[dict[str, Any], ...] | Missing = ()
    services: tuple[dict[str, Any], ...] | Missing = ()
    endpoint_slices: tuple[dict[str, Any], ...] | Missing = ()
    ip_pools: tuple[dict[str, Any], ...] | Missing = ()
    calico_node: dict[str, Any] | Missing = field(default_factory=dict)
    kube_proxy: dict[str, Any] | Missing = field(default_factory=dict)
    services_endpoint: dict[str, Any] | Missing = field(default_factory=dict)
    calico: str | Missing = ""


@dataclass(frozen=True)
class Cloud:
    """*provider*: aws, gcp, azure. *instance*, *zone*, *machine*: as its metadata service names them."""

    provider: str
    instance: str = ""
    zone: str = ""
    machine: str = ""


@dataclass(frozen=True)
class Snapshot:
    """All sources. *taken*: wall clock, ISO 8601."""

    OF_THE_NODE: ClassVar[tuple[str, ...]] = (
        *("sysctls", "links", "routes", "processes", "chains", "chains_later", "metrics", "trace_readers", "lockdown"),
        *("programs", "maps", "thread_times", "program_times", "drops", "felix_env", "cloud"),
    )

    taken: str = ""
    calico_version: str = ""
    host: Host | Missing = Missing("not collected")
    sysctls: dict[str, str] | Missing = Missing("not collected")
    links: tuple[Link, ...] | Missing = Missing("not collected")
    routes: tuple[Route, ...] | Missing = Missing("not collected")
    processes: tuple[Process, ...] | Missing = Missing("not collected")
    chains: tuple[str, ...] | Missing = Missing("not collected")
    chains_later: tuple[str, ...] | Missing = Missing("not collected")
    metrics: dict[str, float] | Missing = Missing("not collected")
    trace_readers: tuple[Process, ...] | Missing = Missing("not collected")
    lockdown: str | Missing = Missing("not collected")
    programs: tuple[Program, ...] | Missing = Missing("not collected")
    maps: tuple[Map, ...] | Missing = Missing("not collected")
    thread_times: ThreadTimes | Missing = Missing("not collected")
    program_times: ProgramTimes | Missing = Missing("not collected")
    drops: Drops | Missing = Missing("not collected")
    felix_env: dict[str, str] | Missing = Missing("not collected")
    felix_objects: tuple[dict[str, Any], ...] | Missing = Missing("no API server was asked and no --felix-config given")
    felix_lines: tuple[str, ...] | Missing = Missing("no API server was asked and no --felix-log given")
    kubernetes: Kubernetes | Missing = Missing("no API server was asked")
    vxlan_probes: tuple[VxlanProbe, ...] | Missing = Missing("no probe was asked for with --probe")
    cloud: Cloud | Missing = Missing("the platform's DMI names no cloud that we know")


def to_plain(value: Any) -> Any:
    """Dataclasses as maps, tuples as lists: what a journal or JSON holds. `Missing` becomes ``{"missing": why}``."""
    if isinstance(value, Missing):
        return {"missing": value.why}
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {key: to_plain(each) for key, each in value.items()}
    return value


def from_plain(plain: Mapping[str, Any]) -> Snapshot:
    """The snapshot of `to_plain`; sources that it does not have are missing. Raises Malformed."""
    return build(Snapshot, plain)


def build(kind: type[T], plain: Mapping[str, Any]) -> T:
    """A dataclass of `to_plain`; members that it does not have keep their default. Raises Malformed."""
    record = kind.__name__.lower()
    try:
        built = _build(kind, plain)
    except (AttributeError, KeyError, TypeError, ValueError) as wrong:
        raise Malformed(0, f"a {record}", f"{type(wrong).__name__}: {wrong}", record) from wrong
    assert isinstance(built, kind)
    return built


def _build(hint: Any, plain: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if Missing in inner and isinstance(plain, dict) and plain.keys() == {"missing"}:
            return Missing(str(plain["missing"]))
        return None if plain is None and type(None) in inner else _build(inner[0], plain)
    if origin is tuple:
        each = inner if inner[-1] is not Ellipsis else (inner[0],) * len(plain)
        return tuple(_build(one, value) for one, value in zip(each, plain, strict=True))
    if origin is dict:
        return {key: _build(inner[1], value) for key, value in plain.items()}
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        known = {name: _build(hints[name], value) for name, value in plain.items() if name in hints}
        return typing.cast(Any, hint)(**known)
    if hint is Any:
        return plain
    if not isinstance(plain, (int, float) if hint is float else hint):
        raise TypeError(f"expected {hint.__name__}, found {type(plain).__name__}")
    return plain
