"""The edge to the Kubernetes API, through the unmodified official client, against a real server on loopback."""

from __future__ import annotations

import json
import pwd
import sys
from typing import TYPE_CHECKING

import pytest
from tests.kubernetes_api import KubernetesApi

from calitrace.cluster import objects, pods
from calitrace.cluster.kubernetes import ApiRefused, Cluster
from calitrace.errors import EnvironmentUnfit, Exit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NODES = "/api/v1/nodes"
FELIX = "/apis/crd.projectcalico.org/v1/felixconfigurations"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        yield server


@pytest.fixture
def cluster(api: KubernetesApi, tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(api.kubeconfig(tmp_path / "config"), timeout_s=2) as client:
        yield client


def test_a_user_without_a_home_has_no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # of a container that runs as any number
    assert not objects.configured()
    with pytest.raises(EnvironmentUnfit, match="no usable Kubernetes configuration"):
        Cluster("~/config")


def refusal(cluster: Cluster, path: str = f"{NODES}/a") -> ApiRefused:
    """The error of reading *path*."""
    with pytest.raises(ApiRefused) as raised:
        cluster.get(path)
    assert raised.value.exit == Exit.ENVIRONMENT
    assert "\n" not in raised.value.cause
    return raised.value


def test_read_and_discover(api: KubernetesApi, cluster: Cluster) -> None:
    api.put(f"{NODES}/a", {"status": {"nodeInfo": {"kernelVersion": "6.18.0"}}})
    api.put(f"{FELIX}/default", {"spec": {"bpfEnabled": True, "aFieldOfTomorrow": [1]}})
    assert cluster.version() == "v1.31.2"
    assert cluster.api_versions() == {"crd.projectcalico.org/v1"}
    assert cluster.get(f"{NODES}/a")["status"] == {"nodeInfo": {"kernelVersion": "6.18.0"}}
    assert cluster.get(f"{FELIX}/default")["spec"]["aFieldOfTomorrow"] == [1]
    assert cluster.find(f"{FELIX}/node.a") is None
    assert cluster.find("/apis/projectcalico.org/v3/felixconfigurations/default") is None


def test_a_list_is_read_page_by_page(api: KubernetesApi, cluster: Cluster) -> None:
    for number in range(25):
        api.put(f"{SLICES}/s{number}", {"metadata": {"labels": {"kubernetes.io/service-name": f"web{number % 5}"}}})
    collection = "/apis/discovery.k8s.io/v1/endpointslices"
    assert {each["metadata"]["name"] for each in cluster.iter_list(collection, limit="10")} == {
        f"s{number}" for number in range(25)
    }
    assert len([line for line in api.requests if line == f"GET {collection}"]) == 3
    found = cluster.iter_list(SLICES, labelSelector="kubernetes.io/service-name=web3")
    assert {each["metadata"]["name"] for each in found} == {"s3", "s8", "s13", "s18", "s23"}
    found = cluster.iter_list(collection, fieldSelector="metadata.name=s7")
    assert [each["metadata"]["namespace"] for each in found] == ["shop"]
    assert list(cluster.iter_list(f"{SLICES[: -len('endpointslices')]}others")) == []


def test_merge_patch_and_conflicts(api: KubernetesApi, cluster: Cluster) -> None:
    created = cluster.create(FELIX, {"metadata": {"name": "node.a"}, "spec": {"bpfLogLevel": "Off", "b": {"x": "1"}}})
    version = created["metadata"]["resourceVersion"]
    with pytest.raises(ApiRefused, match="409") as raised:
        cluster.create(FELIX, {"metadata": {"name": "node.a"}})
    assert raised.value.status == 409
    changed = cluster.merge(
        f"{FELIX}/node.a",
        {"metadata": {"resourceVersion": version}, "spec": {"bpfLogLevel": None, "b": {"y": "2"}}},
    )
    assert changed["spec"] == {"b": {"x": "1", "y": "2"}}
    attempts: list[Callable[[], object]] = [
        lambda: cluster.merge(f"{FELIX}/node.a", {"metadata": {"resourceVersion": version}, "spec": {"b": None}}),
        lambda: cluster.delete(f"{FELIX}/node.a", version),
    ]
    for attempt in attempts:
        with pytest.raises(ApiRefused, match="modified") as raised:
            attempt()
        assert raised.value.status == 409
    cluster.delete(f"{FELIX}/node.a", changed["metadata"]["resourceVersion"])
    assert api.get(f"{FELIX}/node.a") is None


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "credentials"), (403, "permission"), (404, "api-resources"), (500, "log"), (429, "later")],
)
def test_a_refusal_says_why_and_what_to_do(api: KubernetesApi, cluster: Cluster, status: int, hint: str) -> None:
    api.refuse("nodes", status)
    refused = refusal(cluster)
    assert (refused.status, "by a rule" in refused.cause, hint in refused.hint) == (status, True, True)


def test_a_wrong_token(api: KubernetesApi, tmp_path: Path) -> None:
    with Cluster(api.kubeconfig(tmp_path / "config", token="wrong")) as cluster:
        assert refusal(cluster).status == 401


def test_no_answer_in_time(api: KubernetesApi, tmp_path: Path) -> None:
    go_on = api.hold("nodes")
    with Cluster(api.kubeconfig(tmp_path / "config"), timeout_s=0.1) as cluster:
        refused = refusal(cluster)
    go_on.set()
    assert (refused.status, refused.cause) == (0, f"{api.url} did not answer in time")


def test_a_cut_connection_and_no_server(api: KubernetesApi, cluster: Cluster) -> None:
    api.refuse("nodes", 0)
    assert refusal(cluster).cause.startswith(f"cannot reach {api.url}")
    api.stop()
    assert refusal(cluster).cause.startswith(f"cannot reach {api.url}")
    api.rules.clear()
    api.start()
    assert refusal(cluster).status == 404


def test_an_answer_that_is_none(api: KubernetesApi, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kubernetes_api.json.dumps", lambda _: "<html>")
    assert "does not answer" in refusal(cluster, "/version").cause


def test_tls(tmp_path: Path) -> None:
    with KubernetesApi(tls=True) as api:
        with Cluster(api.kubeconfig(tmp_path / "config")) as cluster:
            assert cluster.version() == "v1.31.2"
        with Cluster(api.kubeconfig(tmp_path / "config", trusted=False)) as cluster:
            refused = refusal(cluster)
    assert refused.cause.startswith(f"TLS with {api.url} failed")
    assert "certificate-authority" in refused.hint


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "a: b", '{"clusters": 1}', '{"current-context": "x"}', "\x00\xff", ": : :\n\t-"]
)
def test_no_usable_configuration(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "config"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EnvironmentUnfit, match="no usable Kubernetes configuration") as raised:
        Cluster(str(path))
    assert "--kubeconfig" in raised.value.hint


def test_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(EnvironmentUnfit, match="package kubernetes is missing") as raised:
        Cluster(str(tmp_path / "config"))
    assert raised.value.hint == "pip install 'calitrace[kubernetes]'"


def test_a_watch_by_the_official_client(api: KubernetesApi, tmp_path: Path) -> None:
    from kubernetes import client, config, watch  # type: ignore[attr-defined, unused-ignore]

    api.put(f"{NODES}/a", {"metadata": {"labels": {"x": "1"}}})
    configuration = client.Configuration()
    config.load_kube_config(api.kubeconfig(tmp_path / "config"), client_configuration=configuration)
    with client.ApiClient(configuration) as plain:
        core = client.CoreV1Api(plain)
        listed = core.list_node()
        assert [each.metadata.name for each in listed.items] == ["a"]
        api.put(f"{NODES}/b", {})
        api.remove(f"{NODES}/a")
        events = watch.Watch().stream(core.list_node, resource_version=listed.metadata.resource_version)
        seen = [(event["type"], event["object"].metadata.name) for _, event in zip(range(2), events, strict=False)]
    assert seen == [("ADDED", "b"), ("DELETED", "a")]


def test_pods_are_named_by_what_the_cni_left(tmp_path: Path) -> None:
    for number, end in enumerate(("cali1", "veth2")):
        arguments = [["K8S_POD_NAMESPACE", "shop"], ["K8S_POD_NAME", f"web-{number}"]]
        interfaces = [{"name": "cni0"}, {"name": end}, {"name": "eth0", "sandbox": "/ns"}]
        for again in ("", "-again"):  # a pod with two networks has two files
            file = tmp_path / f"a-{number}{again}"
            file.write_text(json.dumps({"cniArgs": arguments, "result": {"interfaces": interfaces}}))
    (tmp_path / "b").mkdir()
    (tmp_path / "c").write_text("{")
    assert pods.of_this_node(tmp_path) == {"cali1": "shop/web-0", "veth2": "shop/web-1"}


def test_pods_are_named_by_kubernetes(api: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.put("/api/v1/namespaces/default/pods/podA", {"spec": {"nodeName": "elsewhere"}})
    monkeypatch.setenv("KUBECONFIG", api.kubeconfig(tmp_path / "config"))
    assert pods.of_this_node(tmp_path / "none") == {"cali7f94ce7c295": "default/podA"}
    monkeypatch.setenv("KUBECONFIG", api.kubeconfig(tmp_path / "config", token="wrong"))
    assert pods.of_this_node(tmp_path / "none") == {}
