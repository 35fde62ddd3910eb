"""Backends behind an address and port, through the real client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.kubernetes_api import KubernetesApi

from calitrace.cluster.kubernetes import Cluster
from calitrace.cluster.services import backends

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WEB = [("10.65.1.2", 8080), ("10.65.2.3", 8080)]
METRICS = [("10.65.1.2", 9090), ("10.65.2.3", 9090)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path: Path = tmp_path_factory.mktemp("services") / "config"
    with KubernetesApi() as api:
        api.put(
            "/api/v1/namespaces/shop/services/web",
            {
                "spec": {
                    "clusterIP": "10.96.0.7",
                    "clusterIPs": ["10.96.0.7", "fd00::7"],
                    "externalIPs": ["192.0.2.9"],
                    "ports": [
                        {"name": "http", "port": 80, "nodePort": 30080},
                        {"name": "metrics", "port": 90},
                    ],
                },
                "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.4"}, {"hostname": "lb.example"}]}},
            },
        )
        api.put("/api/v1/namespaces/shop/services/bare", {"spec": {"clusterIP": "None", "ports": None}})
        api.put(
            "/api/v1/namespaces/dns/services/single", {"spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 53}]}}
        )
        for number, address in enumerate(("10.65.1.2", "10.65.2.3")):
            api.put(
                f"/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/web-{number}",
                {
                    "metadata": {"labels": {"kubernetes.io/service-name": "web"}},
                    "ports": [{"name": "http", "port": 8080}, {"name": "metrics", "port": 9090}],
                    "endpoints": [{"addresses": [address]}],
                },
            )
        api.put(
            "/apis/discovery.k8s.io/v1/namespaces/dns/endpointslices/single-1",
            {
                "metadata": {"labels": {"kubernetes.io/service-name": "single"}},
                "ports": [{"name": "", "port": 5353}],
                "endpoints": [{"addresses": ["10.65.3.3"], "conditions": {"ready": False}}, {"addresses": None}],
            },
        )
        with Cluster(api.kubeconfig(path)) as client:
            yield client


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("10.96.0.7", 80, WEB),
        ("fd00::7", 90, METRICS),
        ("192.0.2.9", 80, WEB),
        ("198.51.100.4", 80, WEB),
        ("10.10.0.1", 30080, WEB),
        ("", 30080, WEB),
        ("", 80, WEB),
        ("10.96.0.7", 0, [WEB[0], METRICS[0], WEB[1], METRICS[1]]),
        ("10.96.0.10", 53, [("10.65.3.3", 5353)]),
        ("10.96.0.7", 81, []),
        ("10.65.1.2", 8080, []),
        ("", 0, []),
    ],
)
def test_backends(cluster: Cluster, host: str, port: int, expected: list[tuple[str, int]]) -> None:
    assert backends(cluster, host, port) == expected
