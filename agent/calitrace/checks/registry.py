"""All checks, the sources that are made of other sources, and the run: one check never stops another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from calitrace.calico import WORKLOAD_PREFIX, felix_config, felix_log, release
from calitrace.calico.pods import WORKLOAD
from calitrace.checks import cpu, debug_logs, decoded, drops, maps, nat, performance, services
from calitrace.checks.finding import Check, Finding, Result, Status, Unknown
from calitrace.checks.objects import calico_environment, image_tags, peers, ways_to
from calitrace.checks.snapshot import Kubernetes, Link, Map, Missing, Snapshot

CHECKS: tuple[Check, ...] = (
    *services.CHECKS,
    *nat.CHECKS,
    *drops.CHECKS,
    *cpu.CHECKS,
    *debug_logs.CHECKS,
    *maps.CHECKS,
    *performance.CHECKS,
)
AREAS = tuple(dict.fromkeys(check.area for check in CHECKS))
BY_ID = {check.id: check for check in CHECKS}


_DECODED: dict[str, Callable[[tuple[Map, ...]], Any]] = {
    "nat": decoded.nat,
    "interfaces": decoded.interfaces,
    "node_routes": decoded.routes,
    "forwarded": decoded.forwarded,
    "connections": decoded.connections,
}


def run(snapshot: Snapshot, checks: Iterable[Check] = CHECKS) -> list[Result]:
    """What each check says of the snapshot, in the order of *checks*."""
    found = sources(snapshot)
    return [run_one(check, found) for check in checks]


def run_one(check: Check, found: dict[str, Any]) -> Result:
    """What one check says. *found*: all sources by name, as `sources` returns them."""
    missing = [found[name].why for name in check.needs if isinstance(found[name], Missing)]
    if missing:
        return Result(check, Status.NOT_RUN, why=tuple(missing))
    given = {name: found[name] for name in check.needs}
    given |= {name: None if isinstance(found[name], Missing) else found[name] for name in check.uses}
    said = list(check.function(**given))
    host = found["host"]
    node = "NODE" if isinstance(host, Missing) else host.node
    findings = tuple(
        replace(each, fix=each.fix.replace("nodeName=NODE", f"nodeName={node}"))
        for each in said
        if isinstance(each, Finding)
    )
    why = tuple(each.why for each in said if isinstance(each, Unknown))
    return Result(check, Status.FINDINGS if findings else Status.NOT_RUN if why else Status.PASSED, findings, why)


def sources(snapshot: Snapshot) -> dict[str, Any]:
    """Every source by name: the snapshot's own, and those that follow from several of them."""
    found: dict[str, Any] = {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__}
    cluster = snapshot.kubernetes
    for name in Kubernetes.__dataclass_fields__:
        found[name] = cluster if isinstance(cluster, Missing) else getattr(cluster, name)
    known = _release(snapshot, found)
    found["release"] = known or Missing("nothing says which release of Calico this is: give --calico-version")
    found["felix"] = _felix(snapshot, found["calico_node"], known)
    found["felix_log"] = _felix_log(snapshot)
    for name, decode in _DECODED.items():
        found[name] = snapshot.maps if isinstance(snapshot.maps, Missing) else decode(snapshot.maps)
    found["peer_ways"] = _peer_ways(snapshot, found)
    found["links"] = _with_workloads(snapshot.links, found["felix"], found["interfaces"])
    return found


def _peer_ways(snapshot: Snapshot, found: dict[str, Any]) -> dict[str, str] | Missing:
    """By which interfaces the other nodes are reached: those of Calico's routes map, and of the API."""
    node_routes, nodes, host = found["node_routes"], found["nodes"], snapshot.host
    if isinstance(snapshot.routes, Missing):
        return snapshot.routes
    if isinstance(node_routes, Missing) and (isinstance(nodes, Missing) or isinstance(host, Missing)):
        return Missing(f"the other nodes' addresses are not known: {node_routes.why}")
    addresses: set[str] = set()
    if not isinstance(node_routes, Missing):
        remote = (each for each in node_routes if each.flags & decoded.LOCAL_HOST == decoded.HOST)
        addresses |= {str(each.network.network_address) for each in remote}
    if not isinstance(nodes, Missing) and not isinstance(host, Missing):
        addresses |= peers(nodes, host.node)
    return ways_to(snapshot.routes, addresses)


def _release(snapshot: Snapshot, cluster: dict[str, Any]) -> release.Release | None:
    if snapshot.calico_version:
        return release.parse(snapshot.calico_version, "--calico-version")
    for tag in () if isinstance(cluster["calico_node"], Missing) else image_tags(cluster["calico_node"]):
        found = release.parse(tag, f"image of DaemonSet calico-node: {tag}")
        if found:
            return found
    if not isinstance(cluster["calico"], Missing):
        found = release.parse(cluster["calico"], "ClusterInformation default")
        if found:
            return found
    if not isinstance(snapshot.maps, Missing):
        return release.of_maps((each.name, each.value_size) for each in snapshot.maps)
    return None


def _felix(
    snapshot: Snapshot, calico_node: dict[str, Any] | Missing, known: release.Release | None
) -> felix_config.Settings | Missing:
    if not isinstance(snapshot.felix_env, Missing):
        env = snapshot.felix_env
    else:
        env = {} if isinstance(calico_node, Missing) else calico_environment(calico_node)
    env = {name.upper(): value for name, value in env.items() if name.upper().startswith("FELIX_")}
    if isinstance(snapshot.felix_objects, Missing):
        if not env:
            return snapshot.felix_objects
        return felix_config.resolve(None, env, "", known)
    node = "" if isinstance(snapshot.host, Missing) else snapshot.host.node
    return felix_config.resolve(snapshot.felix_objects, env, node, known)


def _with_workloads(
    links: tuple[Link, ...] | Missing,
    felix: felix_config.Settings | Missing,
    interfaces: tuple[decoded.Interface, ...] | Missing,
) -> tuple[Link, ...] | Missing:
    """The interfaces, those of pods marked: interfacePrefix is a list, ``cali`` unless another CNI names them.

    Where Felix's settings are not known, its ifstate map tells it as well.
    """
    if isinstance(links, Missing):
        return links
    setting = felix_config.Unset("") if isinstance(felix, Missing) else felix.get("interfacePrefix")
    names = WORKLOAD_PREFIX if isinstance(setting, felix_config.Unset) else str(setting.value)
    prefixes = tuple(each.strip() for each in names.split(",") if each.strip())
    rows = () if isinstance(interfaces, Missing) else interfaces
    flagged = {(row.index, row.name) for row in rows if row.flags & WORKLOAD}
    return tuple(replace(e, workload=e.name.startswith(prefixes) or (e.index, e.name) in flagged) for e in links)


def _felix_log(snapshot: Snapshot) -> tuple[felix_log.Line, ...] | Missing:
    if isinstance(snapshot.felix_lines, Missing):
        return snapshot.felix_lines
    lines = felix_log.telling(snapshot.felix_lines)
    return lines or Missing(f"none of its {len(snapshot.felix_lines)} lines is Felix's")
