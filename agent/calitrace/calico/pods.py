"""Which pod an interface belongs to.

Sources: what libcni keeps of each result (``/var/lib/cni/results``, containernetworking/cni libcni/api.go), and the
name that Calico gives a pod's interface (projectcalico/calico, libcalico-go names.WorkloadEndpointIdentifiers and
k8s/conversion VethNameForWorkload).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from calitrace.calico import WORKLOAD_PREFIX

WORKLOAD = 0x1  # flag in the ifstate map, of every version. Source: felix/bpf/ifstate/map.go
_LETTERS = re.compile("[a-z]{3,}?(?![a-f]*[g-z])")  # before a hash, which may begin with some of its own: a to f


def prefixes(interfaces: Iterable[tuple[str, bool]]) -> tuple[str, ...]:
    """How the names of pods' interfaces begin, as another CNI may have named them: ``azv``, ``eni``.

    *interfaces*: names that Calico's ifstate map has, and whether they are workloads'. What an interface of the host
    begins with too is not taken: the name is, whole.
    """
    found = dict(interfaces)
    hosts = tuple(name for name, is_workload in found.items() if not is_workload)

    def prefix(name: str) -> str:
        letters = _LETTERS.match(name)
        return name if letters is None or any(host.startswith(letters[0]) for host in hosts) else letters[0]

    return tuple(sorted({prefix(name) for name, is_workload in found.items() if is_workload}))


def interface_of(namespace: str, pod: str) -> str:
    """The node's end of a pod's veth, with Felix's default interfacePrefix."""
    import hashlib  # which takes longer than all the rest here

    return WORKLOAD_PREFIX + hashlib.sha1(f"{namespace}.{pod}".encode()).hexdigest()[:11]


def from_cni_result(raw: bytes) -> dict[str, str]:
    """Interface to ``namespace/pod`` of one file that libcni wrote; empty where it is of no pod, or not such a file.

    What is in no sandbox is the node's: the pod's end there, or a bridge that pods share. The pod's own interface is
    left out by its name, should a plugin not say its sandbox.
    """
    try:
        cached: Any = json.loads(raw)
        arguments = dict(cached["cniArgs"])
        pod = f"{arguments['K8S_POD_NAMESPACE']}/{arguments['K8S_POD_NAME']}"
        return {
            each["name"]: pod
            for each in cached["result"]["interfaces"]
            if each["name"].startswith(WORKLOAD_PREFIX)
            or not (each.get("sandbox") or each["name"] == cached.get("ifName"))
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
