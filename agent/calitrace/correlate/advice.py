"""The one command that shows more of a verdict. It only reads, and every name in it is known; else there is none.

| verdict                                   | command                                                 |
|-------------------------------------------|---------------------------------------------------------|
| policy denied it at a pod's interface     | the rules there, with their hits                        |
| the node has no service, backend or route | Calico's lookups for the packet as the node received it |
| the reverse path failed                   | the kernel's route back                                 |
| the pod refuses or does not answer        | what listens there on that port                         |

It is for root on the machine that recorded.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from calitrace.calico.policy import DIRECTORY
from calitrace.correlate.journey import Direction
from calitrace.correlate.verdict import Kind
from calitrace.events import HopKind
from calitrace.model import Hop, Role
from calitrace.packet import PROTOCOLS, TCP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calitrace.correlate.drops import Place
    from calitrace.correlate.journey import Journey, Step
    from calitrace.correlate.verdict import Verdict
    from calitrace.model import Namespace

# Of Calico's reasons those that a walk through its maps comes to as well.
_LOOKED_UP = ("RT_UNKNOWN", "UNAUTH_SOURCE", "BLACK_HOLE", "MAGLEV_NO_BACKEND")
_POLICY_DIRECTIONS = {"tc ingress": "egress", "tc egress": "ingress"}  # of a pod, at the node's side
_SENT = (HopKind.QUEUE, HopKind.XMIT)


def command(
    journey: Journey, verdict: Verdict, namespace: Namespace | None, host: str, policy_files: Sequence[str]
) -> str:
    """The command, or nothing. *namespace*: that of the verdict's place, by its full name; *host*: what our own is
    called that has no name. *policy_files*: Felix's policy debug files that were there.
    """
    if verdict.place is None or namespace is None:
        return ""
    ours = namespace.name == host
    at = "" if ours else f" --netns {shlex.quote(namespace.name)}"
    if verdict.calico_reason == "DROPPED_BY_POLICY":
        rules = _rules(verdict.place, namespace, policy_files)
        return rules and f"calitrace maps policy dump {rules}{at}"
    received = _received_last(journey, namespace)
    packet = received.event.packet.inner if received is not None else None
    if received is None or packet is None:
        return ""
    file = namespace.name if "/" in namespace.name else f"/run/netns/{namespace.name}"
    inside = "" if ours else f"nsenter --net={shlex.quote(file)} "
    if verdict.kind is Kind.DROPPED and "reverse path" in verdict.cause:
        return f"{inside}ip route get {packet.src}"
    unwanted = not verdict.by_calico and verdict.kind in (Kind.NO_REPLY, Kind.REFUSED)
    if unwanted and namespace.role is Role.POD:
        return f"{inside}ss -ln{'t' if packet.proto == TCP else 'u'}p 'sport = :{packet.dport}'"
    link = namespace.links.get(received.event.ifindex)
    asked = unwanted or verdict.kind is Kind.NO_BACKEND or verdict.calico_reason in _LOOKED_UP
    if link is not None and namespace.role is Role.NODE and asked:
        target = f"{packet.dst}:{packet.dport}/{PROTOCOLS[packet.proto]}"
        return f"calitrace maps walk {packet.src} {target} --ingress {shlex.quote(link.name)}{at}"
    return ""


def _rules(place: Place, namespace: Namespace, policy_files: Sequence[str]) -> str:
    """Which rules decided: interface and direction, and where Felix's file is, if there is just one."""
    link = next((each for each in namespace.links.values() if each.name == place.interface), None)
    direction = _POLICY_DIRECTIONS.get(place.hook, "")
    if link is None or not link.workload or not direction:
        return ""
    names = (f"{link.name}_{direction}_v4.json", f"{link.name}_{direction}.json")
    found = {file.rpartition("/")[0] for file in policy_files if file.rpartition("/")[2] in names}
    if len(found) != 1:
        return ""
    (directory,) = found
    option = "" if directory == DIRECTORY else f" --policy-dir {shlex.quote(directory)}"
    return f"{shlex.quote(link.name)} {direction}{option}"


def _received_last(journey: Journey, namespace: Namespace) -> Step | None:
    """How the probe came there, out of any tunnel, if it went no further."""
    way = [step for step in journey.way(Direction.REQUEST) if step.event.netns == namespace.inum]
    hops = [(step, step.event.kind) for step in way if isinstance(step.event, Hop)]
    received = [step for step, kind in hops if kind is HopKind.RECEIVE and not step.tunnelled]
    return received[-1] if received and not any(kind in _SENT for _, kind in hops) else None
