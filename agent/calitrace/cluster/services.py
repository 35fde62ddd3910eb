"""Which backends stand behind an address and port that somebody names: services and their EndpointSlices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calitrace.cluster.kubernetes import Cluster

_SERVICE_NAME = "kubernetes.io/service-name"


def backends(cluster: Cluster, host: str, port: int) -> list[tuple[str, int]]:
    """(address, port) of each backend of the services at *host*:*port*, or with the NodePort *port*; ready or not.

    *host* "" or *port* 0: any. Empty when that is no service. Raises ApiRefused.
    """
    found: list[tuple[str, int]] = []
    for service in cluster.iter_list("/api/v1/services"):
        names = _port_names(service, host, port)
        if names:
            found += _endpoints(cluster, service, names)
    return list(dict.fromkeys(found))


def _port_names(service: dict[str, Any], host: str, port: int) -> set[str]:
    """Names of the service's ports that are meant."""
    spec = service.get("spec") or {}
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    addresses = {spec.get("clusterIP"), *(spec.get("clusterIPs") or ()), *(spec.get("externalIPs") or ())}
    addresses |= {each.get("ip") for each in ingress}
    return {
        each.get("name") or ""
        for each in spec.get("ports") or ()
        if (port and each.get("nodePort") == port)
        or ((not host or host in addresses) and (host or port) and port in (0, each.get("port")))
    }


def _endpoints(cluster: Cluster, service: dict[str, Any], names: set[str]) -> list[tuple[str, int]]:
    metadata = service["metadata"]
    slices = cluster.iter_list(
        f"/apis/discovery.k8s.io/v1/namespaces/{metadata['namespace']}/endpointslices",
        labelSelector=f"{_SERVICE_NAME}={metadata['name']}",
    )
    return [
        (address, each["port"])
        for part in slices
        for each in part.get("ports") or ()
        if (each.get("name") or "") in names and each.get("port")
        for endpoint in part.get("endpoints") or ()
        for address in endpoint.get("addresses") or ()
    ]
