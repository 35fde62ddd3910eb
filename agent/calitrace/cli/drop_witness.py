"""Asks the node's maps about Calico's drops, soon after each: its counters at most once a second, and the walk of a
packet whose cause was not recorded. Both take at most a twentieth of the reader's time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from calitrace.cli import map_source
from calitrace.cli.recording import say
from calitrace.correlate import walk
from calitrace.correlate.witness import Statement
from calitrace.errors import Error, LayoutMismatch
from calitrace.kernel import discover, maps, netns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calitrace.correlate.drops import Cause, Dropped
    from calitrace.model import Drop, Namespace, Topology

_COUNTERS_EVERY_NS = 1_000_000_000
_ASK_AGAIN_NS = 10_000_000_000
_SHARE = 20
_SLOTS = 400  # of cali_progs_ing2
_PROTOCOLS = {6: "tcp", 17: "udp"}
# How the counters' rows call a hook. Calico counts a netkit device's packets at its other end.
_ROWS = {"tc ingress": "tc ingress", "tc egress": "tc egress", "XDP": "xdp"}
_Counters = dict[tuple[int, str], dict[str, int]]  # by interface and hook: by name


class Witness:
    """What the maps of the nodes of a topology say. What hinders it is said once, as a warning."""

    def __init__(self) -> None:
        self._nodes: dict[int, _Node] = {}
        self._said: set[str] = set()

    def settle(self, topology: Topology) -> None:
        """Take the nodes that are there now; counters are read, to be compared with later ones."""
        known = self._nodes
        self._nodes = {}
        for each in topology.namespaces.values():
            if not each.state_map:
                continue
            old = known.get(each.inum)
            try:
                self._nodes[each.inum] = old if old is not None and old.is_of(each) else _Node(each)
            except (Error, LayoutMismatch, OSError) as failure:
                self._warn(each.name, failure)

    def about(self, dropped: Dropped, cause: Cause) -> Statement | None:
        """What they say about this drop, None for nothing."""
        node = self._nodes.get(dropped.event.netns)
        if node is None or not cause.by_calico:
            return None
        try:
            return node.about(dropped.event, cause)
        except (Error, LayoutMismatch, OSError) as failure:  # Felix replaces its maps
            self._warn(node.name, failure)
            return None

    def _warn(self, node: str, failure: Exception) -> None:
        text = f"the maps of {node} are not asked: {failure}"
        if text not in self._said:
            self._said.add(text)
            say(f"warning: {text}")


class _Node:
    def __init__(self, namespace: Namespace) -> None:
        self.name = namespace.name
        self._namespace = namespace
        self._found = maps.of_node(namespace.state_map)
        interfaces = {index: link.name for index, link in namespace.links.items()}
        self._source = map_source.of_maps(self._found, interfaces)
        self._before_ns = self._last_ns = time.monotonic_ns()
        self._before: _Counters = {}
        self._last = self._counters()
        self._arrays: dict[str, int] = {}
        self._next_ns = self._next_question_ns = 0
        self._answers: dict[tuple[Any, ...], tuple[int, tuple[tuple[walk.Step, ...], str]]] = {}

    def is_of(self, namespace: Namespace) -> bool:
        """Whether it knows all that is to be known of this node."""
        return namespace == self._namespace

    def about(self, drop: Drop, cause: Cause) -> Statement | None:
        counters, over_s, has_row = self._rises(drop, cause.place.hook)
        steps, back = ((), "") if cause.recorded else self._asked(drop, cause)
        if counters is None and has_row and not steps and not back:
            return None
        return Statement(counters, over_s, has_row, steps, back, self._arrays if counters is not None else {})

    def _rises(self, drop: Drop, hook: str) -> tuple[Mapping[str, int] | None, float, bool]:
        """What the drop's counters rose by between the readings before and after it, over how long, and their row."""
        now = time.monotonic_ns()
        if drop.ktime_ns > self._last_ns and now >= self._next_ns:
            self._before, self._before_ns, self._last = self._last, self._last_ns, self._counters()
            self._last_ns, self._arrays = now, self._programs()
            self._next_ns = now + max(_COUNTERS_EVERY_NS, _SHARE * (time.monotonic_ns() - now))
        place = (drop.ifindex, _ROWS.get(hook, ""))
        if not place[1] or not self._last or not self._before_ns < drop.ktime_ns <= self._last_ns:
            return None, 0, True
        if place not in self._last:
            return None, 0, place in self._before
        old = self._before.get(place, {})
        rises = {name: count - old.get(name, 0) for name, count in self._last[place].items()}
        return rises, (self._last_ns - self._before_ns) / 1e9, True

    def _counters(self) -> _Counters:
        """Empty before v3.26, whose counters have no interface."""
        rows = map_source.objects(self._source, self._source.pick(("counters",)))
        return {(row["ifindex"], row["hook"]): row["counters"] for row in rows if "ifindex" in row}

    def _programs(self) -> dict[str, int]:
        """How many programs each array of Calico's programs has; before v3.27 there is none."""
        return {
            each.name: len(maps.programs_at(each, range(min(each.info.max_entries, _SLOTS))))
            for each in self._found
            if each.name.startswith("cali_progs")
        }

    def _asked(self, drop: Drop, cause: Cause) -> tuple[tuple[walk.Step, ...], str]:
        """The walk of a packet, and by which other interface its source is routed; of each flow now and then."""
        layer = drop.packet.inner
        if layer is None or layer.proto not in _PROTOCOLS:
            return (), ""
        place, source, proto = cause.place, str(layer.src), _PROTOCOLS[layer.proto]
        comes_in = place.hook == "tc ingress"
        packet = walk.Packet(
            source, layer.sport, str(layer.dst), layer.dport, proto, place.interface if comes_in else ""
        )
        flow = (source, packet.dst, packet.dport, proto, drop.ifindex, place.hook)
        now = time.monotonic_ns()
        at, answer = self._answers.get(flow, (0, ((), "")))
        if (not at or now - at > _ASK_AGAIN_NS) and now >= self._next_question_ns:
            maps_now = map_source.of_maps(self._found, self._source.interfaces)
            steps = walk.walk(packet, map_source.tables(maps_now, ipv6=packet.version == 6, packet=packet))
            answer = (tuple(steps), self._back(drop, source) if comes_in else "")
            self._answers = {key: each for key, each in self._answers.items() if now - each[0] <= _ASK_AGAIN_NS}
            self._answers[flow] = (now, answer)
            self._next_question_ns = now + _SHARE * (time.monotonic_ns() - now)
        return answer

    def _back(self, drop: Drop, source: str) -> str:
        """Only of host interfaces and packets in no tunnel: pods' sources are judged by Calico's own routes."""
        link = self._namespace.links.get(drop.ifindex)
        if len(drop.packet.layers) > 1 or link is None or link.workload:
            return ""
        ours = self._namespace.inum == netns.own_inum()
        with netns.inside("" if ours else self.name):
            index = discover.interface_towards(source)
        if index == drop.ifindex:
            return ""
        return self._source.interfaces.get(index, f"ifindex {index}") if index else "no interface"
