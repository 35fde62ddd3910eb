"""What happened, in the units of people: events, and the namespaces and interfaces they happened on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from calitrace.calico import WORKLOAD_PREFIX
from calitrace.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calitrace.events import HopKind, Match
    from calitrace.packet import Packet


@dataclass(frozen=True)
class Event:
    """*ktime_ns*: CLOCK_MONOTONIC. *netns*: inode number of the network namespace, 0 when unknown."""

    ktime_ns: int
    cpu: int
    netns: int


@dataclass(frozen=True)
class PacketEvent(Event):
    """Something happened to an sk_buff. *ifindex* is of its device, *skb_iif* of the one it came in by."""

    skbaddr: int
    ifindex: int
    skb_iif: int
    mark: int
    len_bytes: int
    match: Match
    packet: Packet


@dataclass(frozen=True)
class Drop(PacketEvent):
    """The kernel freed it undelivered. *skb_drop_reason* is None where the kernel tells none."""

    location: int
    skb_drop_reason: int | None


@dataclass(frozen=True)
class Hop(PacketEvent):
    """It passed a tracepoint. *rc*: what the driver returned, for XMIT."""

    kind: HopKind
    rc: int


class LogLine(NamedTuple):
    """One line that a BPF program printed; *cut* when it filled our buffer. A tuple: there are many of them.

    *lost*: lines of this CPU that found no room, just before this one.
    """

    ktime_ns: int
    cpu: int
    lost: int
    pid: int
    comm: str
    text: str
    cut: bool


class Cell(NamedTuple):
    """What the kernel counts drops by; *location* is an address in the function that dropped.

    *netns* and *ifindex*: 0 when the packet had no device, *ip_proto* when it is not IP.
    """

    location: int
    skb_drop_reason: int
    ifindex: int
    netns: int
    ip_proto: int


@dataclass(frozen=True)
class StateCopy(Event):
    """Calico's per-CPU state at the drop of *skbaddr*, as bytes of the map's value size."""

    skbaddr: int
    raw: bytes


@dataclass(frozen=True)
class StackCopy(Event):
    """The kernel's stack at the drop of *skbaddr*: return addresses, innermost first."""

    skbaddr: int
    addresses: tuple[int, ...]


_PLAIN: dict[Any, tuple[type, ...]] = {
    "int": (int,),
    "int | None": (int, type(None)),
    "str": (str,),
    "bool": (bool,),
    "float": (int, float),
}


def require_types(record: type, plain: Mapping[str, Any]) -> None:
    """Raises TypeError where *plain* has a number or a text of the dataclass *record* as something else."""
    for each in fields(record):
        value = plain.get(each.name, ...)
        if value is not ... and not isinstance(value, _PLAIN.get(each.type, object)):
            raise TypeError(f"{each.name} as {type(value).__name__}")


class Role(str, Enum):
    """What a network namespace is to us. Only NODE, POD and CLIENT are observed: the rest is the underlay."""

    NODE = "node"
    POD = "pod"
    CLIENT = "client"
    OTHER = "other"


@dataclass(frozen=True)
class Link:
    """An interface. *calico*, *foreign*: names of the programs on it, by hook (``ingress``, ``egress``, ``xdp``).

    *chain*: all that runs at a tc hook, in order: how it is attached, name, id, tag, when it was loaded.
    *workload*: it is a pod's interface on the node, as Calico sees it.
    """

    ifindex: int
    name: str
    addresses: tuple[str, ...] = ()
    calico: dict[str, tuple[str, ...]] = field(default_factory=dict)
    foreign: dict[str, tuple[str, ...]] = field(default_factory=dict)
    peer_netns: int = 0
    peer_ifindex: int = 0
    chain: dict[str, tuple[str, ...]] = field(default_factory=dict)
    workload: bool = False
    up: bool = True


@dataclass(frozen=True)
class Namespace:
    """A network namespace and its interfaces by ifindex. *state_map*: id of its cali_state map, 0 for none.

    *way_back*: the interface by which it reaches the client of the probes; empty where that was not asked, or none.
    """

    inum: int
    name: str
    role: Role
    links: dict[int, Link]
    state_map: int = 0
    state_name: str = ""
    state_bytes: int = 0
    reasons: int = 0  # number of counters in its counters map: tells the release's numbering
    way_back: str = ""

    def has(self, address: str) -> bool:
        """Whether one of its interfaces has it."""
        return any(address in link.addresses for link in self.links.values())


@dataclass(frozen=True)
class Topology:
    """All namespaces that were looked at, by inode number."""

    namespaces: dict[int, Namespace]

    def to_map(self) -> list[dict[str, Any]]:
        """Plain values, for a journal."""
        return [asdict(namespace) for namespace in self.namespaces.values()]

    @classmethod
    def from_map(cls, plain: list[dict[str, Any]]) -> Topology:
        """The reverse of to_map(). Raises Malformed on anything else."""
        try:
            for each in plain:
                require_types(Namespace, each)
            found = [
                Namespace(
                    **{
                        **each,
                        "role": Role(each["role"]),
                        "links": {index: Link(**_tuples(link)) for index, link in each["links"].items()},
                    }
                )
                for each in plain
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as wrong:
            raise Malformed(0, "a topology", f"{type(wrong).__name__} {wrong}", "journal header") from wrong
        return cls({namespace.inum: namespace for namespace in found})

    def shortened(self) -> Topology:
        """The same with the prefix that all namespaces but the host's share (``calitrace-``) taken off.

        What would be left of a name must still read as one: ``a`` does not.
        """
        names = [n.name for n in self.namespaces.values() if n.role is not Role.OTHER]
        prefix = _common_prefix(names)
        prefix = prefix[: prefix.rfind("-") + 1] if len(names) > 1 else ""
        if any(len(name) < len(prefix) + _SHORTEST for name in names):
            prefix = ""
        return Topology(
            {inum: replace(n, name=n.name.removeprefix(prefix) or n.name) for inum, n in self.namespaces.items()}
        )

    def namespace(self, inum: int) -> Namespace | None:
        """The namespace, or None when it was not there when we looked."""
        return self.namespaces.get(inum)

    def link(self, inum: int, ifindex: int) -> Link | None:
        """The interface, or None."""
        found = self.namespaces.get(inum)
        return found.links.get(ifindex) if found else None

    def observed(self, inum: int) -> bool:
        """Whether events there belong to what we trace (a node, a pod or the client)."""
        found = self.namespaces.get(inum)
        return found is not None and found.role is not Role.OTHER

    def owner(self, address: str) -> Namespace | None:
        """The observed namespace that has *address* on an interface."""
        for namespace in self.namespaces.values():
            if namespace.role is not Role.OTHER and namespace.has(address):
                return namespace
        return None


def _tuples(link: dict[str, Any]) -> dict[str, Any]:
    """msgpack knows no tuples: put them back. Journals of before did not say which interfaces are pods'."""
    fields = ("calico", "foreign", "chain")
    hooks = {each: {k: tuple(v) for k, v in link.get(each, {}).items()} for each in fields}
    workload = link.get("workload", link["name"].startswith(WORKLOAD_PREFIX))
    addresses = tuple(link["addresses"])
    for text in (*addresses, *(each for hook in hooks.values() for chain in hook.values() for each in chain)):
        if not isinstance(text, str):
            raise TypeError(f"an address or a program as {type(text).__name__}")
    found = {**link, **hooks, "addresses": addresses, "workload": workload}
    require_types(Link, found)
    return found


_SHORTEST = 3  # characters of a shortened name


def _common_prefix(names: list[str]) -> str:
    """The longest prefix that all *names* share."""
    first, last = (min(names), max(names)) if names else ("", "")
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


class Outcome(str, Enum):
    """What became of a probe, seen from the one who sent it.

    OPEN: nothing yet, and its time is not up: the run was stopped, or the journal ends here.
    """

    ANSWERED = "answered"
    REFUSED = "refused"
    UNANSWERED = "unanswered"
    OPEN = "open"
    SEND_ERROR = "send_error"


@dataclass(frozen=True)
class Probe:
    """A probe that was sent. *proto*: IP protocol number; *rtt_ns*: None when nothing came back.

    *detail*: what refused it, or why it could not be sent.
    """

    number: int
    proto: int
    src: str
    sport: int
    dst: str
    dport: int
    sent_ns: int
    size_bytes: int
    outcome: Outcome
    rtt_ns: int | None = None
    detail: str = ""
