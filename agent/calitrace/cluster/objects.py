"""Kubernetes and Calico objects, and calico-node's log, into the snapshot; read-only, and no Secrets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from calitrace.checks.snapshot import Host, Kubernetes, Missing, Snapshot
from calitrace.cluster.kubernetes import SERVICE_ACCOUNT, ApiRefused, Cluster, home_config
from calitrace.errors import EnvironmentUnfit

T = TypeVar("T")
_CALICO = ("calico-system", "kube-system")
_OPERATOR = ("tigera-operator", "calico-system", "kube-system")
_APIS = ("/apis/projectcalico.org/v3", "/apis/crd.projectcalico.org/v1")
_LOG_LINES = 20000


def collect(snapshot: Snapshot, kubeconfig: str, context: str, timeout_s: float) -> Snapshot:
    """The snapshot with the cluster's sources; what the API refuses is missing, with its answer."""
    try:
        cluster = Cluster(kubeconfig, context, timeout_s)
    except EnvironmentUnfit as unfit:
        none = Missing(unfit.cause)
        return replace(snapshot, kubernetes=none, felix_objects=none, felix_lines=none)
    node = "" if isinstance(snapshot.host, Missing) else snapshot.host.node
    with cluster:
        sources = _Sources()
        version = sources.read(cluster.version)
        if isinstance(version, Missing):
            return replace(snapshot, kubernetes=version, felix_objects=version, felix_lines=version)
        return replace(
            snapshot,
            kubernetes=_kubernetes(cluster, version, sources),
            felix_objects=sources.read(lambda: _calicos(cluster, "felixconfigurations")),
            felix_lines=sources.read(lambda: _log(cluster, node)),
        )


class _Sources:
    """Reads one source after the other. When the server stops answering it is not asked for the others."""

    def __init__(self) -> None:
        self._gone: Missing | None = None

    def read(self, ask: Callable[[], T]) -> T | Missing:
        if self._gone is not None:
            return self._gone
        try:
            return ask()
        except EnvironmentUnfit as unfit:
            found = Missing(unfit.cause)
            if isinstance(unfit, ApiRefused) and unfit.status == 0:
                self._gone = found
            return found


def _kubernetes(cluster: Cluster, version: str, sources: _Sources) -> Kubernetes:
    def every(path: str) -> tuple[dict[str, Any], ...] | Missing:
        return sources.read(lambda: tuple(cluster.iter_list(path)))

    def first(namespaces: tuple[str, ...], path: str) -> dict[str, Any] | Missing:
        return sources.read(lambda: _first(cluster, [path.format(each) for each in namespaces]))

    return Kubernetes(
        version,
        every("/api/v1/nodes"),
        every("/api/v1/services"),
        every("/apis/discovery.k8s.io/v1/endpointslices"),
        sources.read(lambda: _calicos(cluster, "ippools")),
        first(_CALICO, "/apis/apps/v1/namespaces/{}/daemonsets/calico-node"),
        first(("kube-system",), "/apis/apps/v1/namespaces/{}/daemonsets/kube-proxy"),
        first(_OPERATOR, "/api/v1/namespaces/{}/configmaps/kubernetes-services-endpoint"),
        sources.read(lambda: _release(cluster)),
    )


def _first(cluster: Cluster, paths: list[str]) -> dict[str, Any]:
    """The first of these that is there, or an empty object; a refusal counts only where none is found."""
    refusal: ApiRefused | None = None
    for path in paths:
        try:
            found = cluster.find(path)
        except ApiRefused as refused:
            if refused.status == 0:
                raise
            refusal = refused
            continue
        if found is not None:
            return found
    if refusal is not None:
        raise refusal
    return {}


def _release(cluster: Cluster) -> str:
    found = _calicos(cluster, "clusterinformations")
    said = [(each.get("spec") or {}).get("calicoVersion") for each in found]
    return next((str(each) for each in said if each), "")


def _calicos(cluster: Cluster, kind: str) -> tuple[dict[str, Any], ...]:
    """Calico's resources of one kind, from its own API, else from where it stores them."""
    refusals = []
    for api in _APIS:
        try:
            return tuple(cluster.iter_list(f"{api}/{kind}"))
        except ApiRefused as refused:
            if refused.status == 0:
                raise
            refusals.append(refused)
    other = [each for each in refusals if each.status != 404]
    raise other[0] if other else EnvironmentUnfit(f"no {kind} in this cluster: {refusals[-1].cause}")


def _log(cluster: Cluster, node: str) -> tuple[str, ...]:
    """The end of the log of the calico-node pod on *node*."""
    if not node:
        raise EnvironmentUnfit("which node's log is wanted is not known: give --node-name")
    refusal: ApiRefused | None = None
    for namespace in _CALICO:
        path = f"/api/v1/namespaces/{namespace}/pods"
        query = {"labelSelector": "k8s-app=calico-node", "fieldSelector": f"spec.nodeName={node}"}
        try:
            pods = list(cluster.iter_list(path, **query))
        except ApiRefused as refused:
            if refused.status == 0:
                raise
            refusal = refused
            continue
        for pod in pods:
            name = pod["metadata"]["name"]
            text = cluster.text(f"{path}/{name}/log", container="calico-node", tailLines=str(_LOG_LINES))
            return tuple(text.splitlines())
    if refusal is not None:
        raise refusal
    raise EnvironmentUnfit(f"no calico-node pod on node {node!r}; is that its name in Kubernetes? (--node-name)")


def host_of(node: str) -> Host | Missing:
    """The host source when only the cluster is looked at."""
    return Host(node, "", {}, 0) if node else Missing("only the cluster was looked at (--cluster)")


def configured() -> bool:
    """Whether something says which API server to ask: $KUBECONFIG, ~/.kube/config, or a pod's service account."""
    files = (home_config(), SERVICE_ACCOUNT)
    return bool(os.environ.get("KUBECONFIG")) or any(os.access(each, os.R_OK) for each in files)
