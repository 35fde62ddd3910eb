"""The pods of this node by interface: from the CNI's files, and where there are none from Kubernetes."""

from __future__ import annotations

import socket
from pathlib import Path

from calitrace.calico import pods
from calitrace.cluster import objects
from calitrace.errors import EnvironmentUnfit

CNI_RESULTS = Path("/var/lib/cni/results")
_TIMEOUT_S = 3.0


def of_this_node(results: Path = CNI_RESULTS) -> dict[str, str]:
    """Interface to ``namespace/pod``, but for those that several pods share. Empty where nobody tells."""
    found: dict[str, str] = {}
    shared: set[str] = set()
    try:
        files = sorted(results.iterdir())
    except OSError:
        files = []
    for path in files:
        try:
            told = pods.from_cni_result(path.read_bytes())
        except OSError:
            continue  # the pod has just gone
        shared |= {name for name, pod in told.items() if found.setdefault(name, pod) != pod}
    return {name: pod for name, pod in found.items() if name not in shared} or _from_kubernetes()


def _from_kubernetes() -> dict[str, str]:
    if not objects.configured():
        return {}
    from calitrace.cluster.kubernetes import Cluster

    try:
        with Cluster(timeout_s=_TIMEOUT_S) as cluster:
            here = f"spec.nodeName={socket.gethostname().lower()}"  # as most clusters name their nodes
            found = list(cluster.iter_list("/api/v1/pods", fieldSelector=here)) or cluster.iter_list("/api/v1/pods")
            every = [pod["metadata"] for pod in found]
    except EnvironmentUnfit:
        return {}  # names are a convenience: without them interfaces are shown
    return {pods.interface_of(each["namespace"], each["name"]): f"{each['namespace']}/{each['name']}" for each in every}
