"""Services and the NAT maps: what the dataplane knows against what the cluster wants (section on services)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from calitrace.calico.felix_config import Setting, Settings
from calitrace.calico.release import Release
from calitrace.checks.decoded import (
    ANY_NODE,
    DROP,
    EXCLUDE,
    EXTERNAL_LOCAL,
    HOST,
    INTERNAL_LOCAL,
    LOCAL_HOST,
    Connection,
    Forwarded,
    Frontend,
    Nat,
    NodeRoute,
)
from calitrace.checks.finding import Check, Finding, Said, Section, Severity, Unknown
from calitrace.checks.objects import L3_KINDS, RESTART, dig, grep_log, items, iter_numbered, name_of, ways_to
from calitrace.checks.snapshot import Link, Route

Objects = tuple[dict[str, Any], ...]

PROTOCOLS = {"TCP": 6, "UDP": 17}
_MOST = 5
_UDP = 17
_INTERNAL_LOCAL = (3, 27)
_LEAST_LOST = 3  # fewer are clients that gave up
_DUMP = "calitrace maps nat dump"


def backends_complete(nat: Nat) -> Said:
    """Compares each frontend's number of backends with those that the backend map has.

    A packet that hashes to a missing one is answered with "port unreachable", by chance of the hash.
    """
    lines = []
    for each in nat.frontends:
        if each.count != DROP:
            missing = [n for n in range(each.count) if (each.id, n) not in nat.backends]
            if missing:
                lines.append(f"{each}: service id {each.id} says {each.count} backends, missing: {missing[:_MOST]}")
    if lines:
        yield Finding(
            Severity.ERROR,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "part of the connections to these services is refused (projectcalico/calico#5957)",
            f"{_DUMP} | grep 'is missing'; {RESTART}",
        )


def backends_routed(nat: Nat, node_routes: tuple[NodeRoute, ...]) -> Said:
    """Looks up the backends of NodePorts in the routes map.

    Without a route, packets that come from outside for it are dropped (RT_UNKNOWN). Only services with a frontend at a
    node's address are looked at: pods reach backends without a route, such as an API server outside the cluster.
    """
    nodes = {str(each.network.network_address) for each in node_routes if each.flags & HOST} | {ANY_NODE}
    outside = {each.id for each in nat.frontends if each.address in nodes}
    by_length: dict[int, set[int]] = {}
    for route in node_routes:
        by_length.setdefault(route.network.prefixlen, set()).add(int(route.network.network_address))
    used = {
        nat.backends[each.id, n]: each
        for each in nat.frontends
        if each.count != DROP and each.id in outside
        for n in range(each.count)
        if (each.id, n) in nat.backends
    }
    lines = [
        f"{each}: backend {address}:{port} has no route"
        for (address, port), each in used.items()
        if not any(_number(address) >> (32 - n) << (32 - n) in held for n, held in by_length.items())
    ]
    if lines:
        yield Finding(
            Severity.WARNING,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "packets from outside for these backends are dropped with RT_UNKNOWN: Felix does not know the address",
            "calitrace maps routes dump; is the backend outside the cluster, or its pod's IP of another IPAM?",
        )


def _number(address: str) -> int:
    first, second, third, fourth = (int(part) for part in address.split("."))
    return first << 24 | second << 16 | third << 8 | fourth


def shared_id(nat: Nat) -> Said:
    """Looks for a service id with different numbers of backends: services that share an id answer for each other.

    Frontends that use local backends only may have fewer.
    """
    counts: dict[int, dict[tuple[int, int], Frontend]] = {}
    for each in nat.frontends:
        if each.count not in (DROP, each.local):
            counts.setdefault(each.id, {}).setdefault((each.count, each.local), each)
    for identifier, found in counts.items():
        if len(found) > 1:
            yield Finding(
                Severity.WARNING,
                f"service id {identifier}",
                tuple(f"{each}: {each.count} backends, {each.local} local" for each in found.values()),
                "answers may come from another service's pods (projectcalico/calico#5957, #13279)",
                f"{_DUMP}; {RESTART}",
            )


def local_without_backend(nat: Nat, links: tuple[Link, ...]) -> Said:
    """Looks for addresses of this node whose service is externalTrafficPolicy: Local and has no backend here.

    Clients outside are refused at this node, which is right behind a load balancer that asks the health check, and
    wrong where the address was moved here (a virtual IP), or clients use this node's address.
    """
    own = {address.partition("/")[0] for link in links for address in link.addresses}
    lines = [
        f"{each}: backends {each.count}, on this node 0, flags external-local"
        for each in nat.frontends
        if each.flags & EXTERNAL_LOCAL and each.local == 0 and 0 < each.count < DROP and each.address in own
    ]
    if lines:
        yield Finding(
            Severity.INFO,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "connections from outside to this node are refused: externalTrafficPolicy: Local and no pod here "
            "(projectcalico/calico#9330)",
            "use nodes with a pod; or kubectl patch svc NAME -n NAMESPACE -p "
            """'{"spec":{"externalTrafficPolicy":"Cluster"}}'""",
        )


def internal_local_without_backend(nat: Nat, release: Release | None = None) -> Said:
    """Looks for services with internalTrafficPolicy: Local that have backends, and none on this node.

    Pods and processes of this node are then refused, which is right for a service that runs on each node. Before v3.27
    the policy is not honoured.
    """
    lines = [
        f"{each}: backends {each.count}, on this node 0, flags internal-local"
        for each in nat.frontends
        if each.flags & INTERNAL_LOCAL and each.local == 0 and 0 < each.count < DROP and each.address != ANY_NODE
    ]
    if lines and (release is None or release.oldest < _INTERNAL_LOCAL <= release.newest):
        yield Unknown(f"before v3.27 internalTrafficPolicy is not honoured: {release or 'the release is not known'}")
    elif lines and release is not None and release.newest >= _INTERNAL_LOCAL:
        yield Finding(
            Severity.INFO,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "pods and processes of this node are refused: internalTrafficPolicy: Local and no pod here "
            "(projectcalico/calico#8255)",
            "run a pod here; or kubectl patch svc NAME -n NAMESPACE -p "
            """'{"spec":{"internalTrafficPolicy":"Cluster"}}'""",
        )


def source_ranges(nat: Nat) -> Said:
    """Looks for frontends that drop all sources but some: loadBalancerSourceRanges.

    They hold for pods and nodes as well, which is often forgotten.
    """
    lines = [f"{each}: other sources are dropped" for each in nat.frontends if each.count == DROP]
    if lines:
        yield Finding(
            Severity.INFO,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "clients outside loadBalancerSourceRanges are dropped (UNAUTH_SOURCE), pods and nodes too "
            "(projectcalico/calico#11020)",
            "kubectl get svc -A -o json | jq '.items[]|select(.spec.loadBalancerSourceRanges)|.metadata.name'",
        )


def host_address(node_routes: tuple[NodeRoute, ...]) -> Said:
    """Looks for the node's own address in the routes map, without which NodePort packets are not forwarded."""
    if not any(route.flags & LOCAL_HOST == LOCAL_HOST for route in node_routes):
        yield Finding(
            Severity.ERROR,
            "",
            (f"{len(node_routes)} routes, none is local host (flags 0x18)",),
            "the dataplane does not know its node's address: no NodePort, no tunnel",
            "kubectl get node NAME -o yaml | grep projectcalico.org/IPv4Address; look at IP_AUTODETECTION_METHOD",
        )


def services_programmed(nat: Nat, services: Objects) -> Said:
    """Compares the NAT frontends with the cluster's Services: cluster IP, NodePort, load balancer and external IPs.

    Services without an IPv4 cluster IP, of type ExternalName, with the label service.kubernetes.io/service-proxy-name
    and ports of SCTP are left out.
    """
    there = {(each.address, each.port, each.proto) for each in nat.frontends}
    missing = [
        f"Service {name}: {address}:{port} proto {proto}"
        for name, address, port, proto in _wanted(services)
        if (address, port, proto) not in there
    ]
    if missing:
        yield Finding(
            Severity.ERROR,
            "",
            tuple(iter_numbered(missing, _MOST)),
            "the NAT map has no frontend for these: packets to them are not translated",
            f"{_DUMP}; " + grep_log("Failed invoking dataplane syncer"),
        )


def _wanted(services: Objects) -> Iterator[tuple[str, str, int, int]]:
    for service in services:
        address = dig(service, "spec", "clusterIP")
        other = dig(service, "metadata", "labels", "service.kubernetes.io/service-proxy-name")
        if other or dig(service, "spec", "type") == "ExternalName" or not _is_ipv4(address):
            continue
        for port in items(service, "spec", "ports"):
            number, proto = dig(port, "port"), PROTOCOLS.get(str(dig(port, "protocol") or "TCP"))
            if proto is None or not isinstance(number, int):
                continue
            yield name_of(service), address, number, proto
            node_port = dig(port, "nodePort")
            if isinstance(node_port, int) and node_port:
                yield name_of(service), ANY_NODE, node_port, proto
            balanced = items(service, "status", "loadBalancer", "ingress")
            addresses = [dig(each, "ip") for each in balanced if dig(each, "ipMode") != "Proxy"]
            for each in (*addresses, *items(service, "spec", "externalIPs")):
                if _is_ipv4(each):
                    yield name_of(service), each, number, proto


def _is_ipv4(address: object) -> bool:
    return isinstance(address, str) and address.count(".") == 3


def endpoints_programmed(nat: Nat, services: Objects, endpoint_slices: Objects) -> Said:
    """Compares the backends of each service's cluster IP with its ready endpoints in EndpointSlices.

    A backend that no endpoint stands for answers for a pod that is gone; a missing one gets no traffic. Terminating
    endpoints may stay while they serve. With topology-aware routing a node has those of its zone only.
    """
    ready, serving = _endpoints(endpoint_slices)
    frontends = {(each.address, each.port, each.proto): each for each in nat.frontends}
    lines = []
    for service in services:
        address = dig(service, "spec", "clusterIP")
        for port in items(service, "spec", "ports"):
            proto = PROTOCOLS.get(str(dig(port, "protocol") or "TCP"), 0)
            found = frontends.get((str(address), dig(port, "port") or 0, proto))
            key = (name_of(service), str(dig(port, "name") or ""))
            if found is None or found.count == DROP or key not in ready:
                continue
            held = {nat.backends[found.id, n] for n in range(found.count) if (found.id, n) in nat.backends}
            lines += [f"Service {key[0]} {found}: {a}:{p} is no endpoint" for a, p in sorted(held - serving[key])]
            if not _by_zone(service):
                lines += [
                    f"Service {key[0]} {found}: endpoint {a}:{p} is missing" for a, p in sorted(ready[key] - held)
                ]
    if lines:
        yield Finding(
            Severity.ERROR,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "the NAT map and the cluster's EndpointSlices differ: connections go to pods that are gone, or not to new "
            "ones (projectcalico/calico#8650, #13060)",
            f"calitrace check services  # again: a change may have been under way; {RESTART}",
        )


Endpoints = dict[tuple[str, str], set[tuple[str, int]]]


def _by_zone(service: dict[str, Any]) -> bool:
    """Whether its endpoints are chosen by where the node is: the annotation of Kubernetes 1.23, 1.27, and 1.31's field.

    Source: felix/bpf/proxy/topology.go.
    """
    annotations = dig(service, "metadata", "annotations") or {}
    said = (dig(annotations, f"service.kubernetes.io/topology-{name}") for name in ("mode", "aware-hints"))
    return any(str(each).lower() == "auto" for each in said) or dig(service, "spec", "trafficDistribution") is not None


def _endpoints(endpoint_slices: Objects) -> tuple[Endpoints, Endpoints]:
    """(ready, serving or ready) addresses and ports by service and port name."""
    ready: Endpoints = {}
    serving: Endpoints = {}
    for piece in endpoint_slices:
        service = dig(piece, "metadata", "labels", "kubernetes.io/service-name")
        if not service or dig(piece, "addressType") != "IPv4":
            continue
        owner = f"{dig(piece, 'metadata', 'namespace')}/{service}"
        for port in items(piece, "ports"):
            number = dig(port, "port")
            if not isinstance(number, int):
                continue
            key = (owner, str(dig(port, "name") or ""))
            good, some = ready.setdefault(key, set()), serving.setdefault(key, set())
            for endpoint in items(piece, "endpoints"):
                where = {(str(address), number) for address in items(endpoint, "addresses")}
                if dig(endpoint, "conditions", "ready") is not False:
                    good |= where
                if dig(endpoint, "conditions", "ready") is not False or dig(endpoint, "conditions", "serving"):
                    some |= where
    return ready, serving


def nodeport_unanswered(
    forwarded: tuple[Forwarded, ...],
    felix: Settings | None = None,
    routes: tuple[Route, ...] | None = None,
    links: tuple[Link, ...] | None = None,
) -> Said:
    """Looks in conntrack for NodePort connections (TCP) handed to another node that nothing came back for.

    Three or more since the last that was answered are a finding, or one of which three packets were sent, a SYN and
    its repetitions: the VXLAN packets, or the replies, are lost between the nodes, or the pods do not answer. Nothing
    is sent for it; `calitrace probe vxlan` asks actively.
    """
    port = felix.get("vxlanPort") if felix else None
    number = port.value if isinstance(port, Setting) else 4789
    option = "" if number == 4789 else f" --vxlan-port {number}"
    layer3 = {link.name: link.kind for link in links or () if link.kind in L3_KINDS}
    by_node: dict[str, list[Forwarded]] = {}
    for each in forwarded:
        by_node.setdefault(each.tun_ip, []).append(each)
    for node, entries in by_node.items():
        answered = max((each.last_seen_ns for each in entries if each.answered), default=0)
        lost = [each for each in entries if each.sent and not each.answered and each.last_seen_ns > answered]
        if len(lost) >= _LEAST_LOST or any(each.sent >= _LEAST_LOST for each in lost):
            lines = (f"{each.client} -> {each.backend}: {each.sent} sent, 0 back, tun_ip {node}" for each in lost)
            way = next(iter(ways_to(routes or (), [node])), "")
            over = f"{way} is a layer-3 device, on which the tunnel is not supported (projectcalico/calico#11590), "
            yield Finding(
                Severity.ERROR if len(lost) >= _LEAST_LOST else Severity.WARNING,
                node,
                tuple(iter_numbered(lines, 3)),
                f"NodePort connections to pods on that node get no answer: {over if way in layer3 else ''}the network "
                f"between the nodes loses UDP {number} in one direction or both, or the pods do not answer",
                f"calitrace probe vxlan {node} --inner {lost[-1].frontend}{option} --trace; tcpdump -ni {way or 'any'} "
                f"udp port {number}  # on both nodes",
            )


def untranslated(nat: Nat, connections: tuple[Connection, ...]) -> Said:
    """Looks in conntrack for UDP flows to a service address that are not translated.

    Such an entry was made while the service was not there. As long as the client keeps sending from that port it
    lives on, and its packets never reach a pod.
    """
    frontends = {
        (each.address, each.port): each
        for each in nat.frontends
        if each.proto == _UDP and 0 < each.count < DROP and not each.flags & EXCLUDE and each.address != ANY_NODE
    }
    lines = [
        f"UDP {each.client} -> {frontends[each.server]}: entry without translation"
        for each in connections
        if each.proto == _UDP and not each.translated and each.server in frontends
    ]
    if lines:
        yield Finding(
            Severity.WARNING,
            "",
            tuple(iter_numbered(lines, _MOST)),
            "these clients' packets go to the service's address and to no pod (projectcalico/calico#9967)",
            _forget(
                each for each in connections if each.proto == _UDP and not each.translated and each.server in frontends
            )
            + "; or let the client use another source port",
        )


def stale(nat: Nat, connections: tuple[Connection, ...]) -> Said:
    """Looks in conntrack for UDP flows to a pod that is no backend of any service any more.

    Felix removes their entries within 10 seconds. Where it does not, a client that keeps its source port goes on
    sending to the pod that is gone. Before v3.24 an entry does not tell which end is the client: either may be the pod.
    """
    held = set(nat.backends.values())
    ends = {f"{address}:{port}" for address, port in held}
    old = [
        each
        for each in connections
        if each.proto == _UDP and each.to_backend and each.server not in held and each.client not in ends
    ]
    if old and held:
        yield Finding(
            Severity.WARNING,
            "",
            tuple(
                iter_numbered(
                    (f"UDP {e.client} -> {e.server[0]}:{e.server[1]}: neither is a backend" for e in old), _MOST
                )
            ),
            "these clients keep sending to pods that are no backends any more; Felix removes such entries within 10 s, "
            "unless it does not run or does not keep up",
            f"calitrace check services  # again: a change may have been under way; {_forget(old)}; {RESTART}",
        )


def _forget(connections: Iterable[Connection]) -> str:
    """The commands that remove their entries."""
    pairs = dict.fromkeys((each.client.partition(":")[0], each.server[0]) for each in connections)
    commands = (
        f"calitrace maps conntrack remove udp {client} {server} --allow-system-changes" for client, server in pairs
    )
    return "; ".join(islice(commands, _MOST))


CHECKS = (
    Check("services.conntrack-untranslated", Section.SERVICES, untranslated),
    Check("services.conntrack-stale", Section.SERVICES, stale),
    Check("services.nodeport-unanswered", Section.SERVICES, nodeport_unanswered),
    Check("services.nat-backends-complete", Section.SERVICES, backends_complete),
    Check("services.nat-backends-routed", Section.SERVICES, backends_routed),
    Check("services.nat-shared-id", Section.SERVICES, shared_id),
    Check("services.local-without-backend", Section.SERVICES, local_without_backend),
    Check("services.internal-local-without-backend", Section.SERVICES, internal_local_without_backend),
    Check("services.source-ranges", Section.SERVICES, source_ranges),
    Check("services.host-address", Section.SERVICES, host_address),
    Check("services.nat-services", Section.SERVICES, services_programmed),
    Check("services.nat-endpoints", Section.SERVICES, endpoints_programmed),
)
