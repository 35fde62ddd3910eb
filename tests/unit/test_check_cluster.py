"""Sources from the cluster and the cloud, over real HTTP to servers on loopback, and the command around them."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.kubernetes_api import KubernetesApi
from tests.unit.node_snapshot import API_ENDPOINT, CALICO_NODE, HEALTHY, NODES, POOL, SERVICES, felix, line, slices

from calitrace.checks import registry
from calitrace.checks.finding import Status
from calitrace.checks.snapshot import Cloud, Host, Kubernetes, Link, Missing, Snapshot, to_plain
from calitrace.cli.check import command
from calitrace.cluster import cloud, objects
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import node

POD = "/api/v1/namespaces/calico-system/pods/calico-node-x7z2p"
HOST = Host("worker-1", "", {}, 0)


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        for each in NODES:
            server.put(f"/api/v1/nodes/{each['metadata']['name']}", each)
        for each in SERVICES:
            name = each["metadata"]
            server.put(f"/api/v1/namespaces/{name['namespace']}/services/{name['name']}", each)
        for number, each in enumerate(slices("10.65.0.2", "10.65.1.2")):
            space = each["metadata"]["namespace"]
            server.put(f"/apis/discovery.k8s.io/v1/namespaces/{space}/endpointslices/s{number}", each)
        server.put("/apis/crd.projectcalico.org/v1/ippools/default", POOL)
        server.put("/apis/crd.projectcalico.org/v1/felixconfigurations/default", felix(bpfLogLevel="Debug")[0])
        server.put("/apis/apps/v1/namespaces/calico-system/daemonsets/calico-node", CALICO_NODE)
        endpoint = "/api/v1/namespaces/tigera-operator/configmaps/kubernetes-services-endpoint"
        server.put(endpoint, API_ENDPOINT)
        server.put(POD, {"metadata": {"labels": {"k8s-app": "calico-node"}}, "spec": {"nodeName": "worker-1"}})
        server.put_text(f"{POD}/log", "\n".join(HEALTHY.felix_lines) + "\n")  # type: ignore[arg-type]
        yield server


def collected(api: KubernetesApi, tmp_path: Path, **more: float) -> Snapshot:
    config = api.kubeconfig(tmp_path / "config")
    return objects.collect(Snapshot(host=HOST), config, "", more.get("timeout_s", 5.0))


def test_everything_is_read(api: KubernetesApi, tmp_path: Path) -> None:
    found = collected(api, tmp_path)
    assert found.felix_lines == HEALTHY.felix_lines
    assert not isinstance(found.felix_objects, Missing)
    assert found.felix_objects[0]["spec"] == {"bpfEnabled": True, "bpfLogLevel": "Debug"}
    assert not isinstance(found.kubernetes, Missing)
    assert found.kubernetes.version == "v1.31.2"
    cluster = found.kubernetes
    assert [each for each in to_plain(cluster).values() if isinstance(each, dict) and "missing" in each] == []
    for each in (cluster.nodes, cluster.services, cluster.endpoint_slices):
        assert isinstance(each, tuple)
        assert len(each) == 2
    # On this node everything else is as healthy: what the cluster says is all there is to find.
    whole = replace(HEALTHY, **{n: getattr(found, n) for n in ("kubernetes", "felix_objects", "felix_lines")})
    results = registry.run(whole)
    assert [each.check.id for each in results if each.status is not Status.PASSED] == ["debug.level"]
    assert not any("secrets" in each for each in api.requests)
    assert all(each.startswith("GET ") for each in api.requests)


def test_lists_are_read_page_by_page(api: KubernetesApi, tmp_path: Path) -> None:
    for number in range(1200):
        api.put(f"/api/v1/namespaces/many/services/s{number}", {"spec": {"clusterIP": "None"}})
    found = collected(api, tmp_path).kubernetes
    assert not isinstance(found, Missing)
    assert isinstance(found.services, tuple)
    assert len(found.services) == 1202
    assert api.requests.count("GET /api/v1/services") == 3


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_is_refused_is_missing_and_the_rest_goes_on(api: KubernetesApi, tmp_path: Path, status: int) -> None:
    api.refuse("GET /apis/crd.projectcalico.org/v1/felixconfigurations", status)
    found = collected(api, tmp_path)
    assert isinstance(found.felix_objects, Missing)
    assert str(status) in found.felix_objects.why
    assert not isinstance(found.kubernetes, Missing)
    assert not isinstance(found.felix_lines, Missing)


@pytest.mark.parametrize(
    ("refused", "name", "check"),
    [
        ("/api/v1/nodes", "nodes", "performance.overlay-not-needed"),
        ("/api/v1/services", "services", "services.nat-services"),
        ("/apis/discovery.k8s.io/v1/endpointslices", "endpoint_slices", "services.nat-endpoints"),
        ("/apis/.*/ippools", "ip_pools", "performance.overlay-without-pool"),
        ("/apis/apps/v1/.*/calico-node", "calico_node", ""),
        ("/apis/apps/v1/.*/kube-proxy", "kube_proxy", ""),
        ("/api/v1/.*/kubernetes-services-endpoint", "services_endpoint", "services.api-endpoint"),
    ],
)
def test_an_account_that_may_read_some_kinds_only(
    api: KubernetesApi, tmp_path: Path, refused: str, name: str, check: str
) -> None:
    api.refuse(f"GET {refused}", 403)
    found = collected(api, tmp_path).kubernetes
    assert not isinstance(found, Missing)
    gone = getattr(found, name)
    assert isinstance(gone, Missing)
    assert "403" in gone.why
    others = {each.name for each in fields(Kubernetes)} - {name}
    assert not any(isinstance(getattr(found, each), Missing) for each in others)
    results = {each.check.id: each for each in registry.run(replace(HEALTHY, kubernetes=found))}
    assert {each for each, said in results.items() if said.status is Status.FINDINGS} == set()
    if check:
        assert results[check].status is Status.NOT_RUN
    assert results["services.nat-services"].status is (
        Status.NOT_RUN if check == "services.nat-services" else Status.PASSED
    )


def test_a_refusal_in_one_namespace_does_not_hide_what_is_in_another(api: KubernetesApi, tmp_path: Path) -> None:
    pod = {"metadata": {"labels": {"k8s-app": "calico-node"}}, "spec": {"nodeName": "worker-1"}}
    api.put("/api/v1/namespaces/kube-system/pods/calico-node-abcde", pod)
    api.put_text("/api/v1/namespaces/kube-system/pods/calico-node-abcde/log", line("Felix starting up"))
    api.refuse("GET /api/v1/namespaces/calico-system/pods.*", 403)
    api.refuse("GET /api/v1/namespaces/tigera-operator/.*", 403)
    found = collected(api, tmp_path)
    assert found.felix_lines == (line("Felix starting up"),)


def test_the_release_where_the_image_has_none(api: KubernetesApi, tmp_path: Path) -> None:
    container = {"name": "calico-node", "image": "registry.example:5000/node@sha256:0123abcd"}
    daemonset = {"spec": {"template": {"spec": {"containers": [container]}}}}
    api.put("/apis/apps/v1/namespaces/calico-system/daemonsets/calico-node", daemonset)
    information = {"spec": {"calicoVersion": "v3.29.1"}}
    api.put("/apis/crd.projectcalico.org/v1/clusterinformations/default", information)
    found = registry.sources(collected(api, tmp_path))["release"]
    assert (str(found), found.source) == ("v3.29", "ClusterInformation default")
    container["image"] += ":v1"
    api.put("/apis/crd.projectcalico.org/v1/clusterinformations/default", {"spec": {"calicoVersion": "odd"}})
    assert isinstance(registry.sources(collected(api, tmp_path))["release"], Missing)


def test_no_log_for_want_of_permission(api: KubernetesApi, tmp_path: Path) -> None:
    api.refuse("GET .*/log", 403)
    found = collected(api, tmp_path).felix_lines
    assert isinstance(found, Missing)
    assert "403" in found.why


def test_a_cluster_without_calicos_api(tmp_path: Path) -> None:
    with KubernetesApi() as empty:
        found = collected(empty, tmp_path)
    assert isinstance(found.felix_objects, Missing)
    assert "no felixconfigurations in this cluster" in found.felix_objects.why
    assert isinstance(found.felix_lines, Missing)
    assert "no calico-node pod on node 'worker-1'" in found.felix_lines.why


def test_which_nodes_log_is_wanted_must_be_known(api: KubernetesApi, tmp_path: Path) -> None:
    found = objects.collect(Snapshot(), api.kubeconfig(tmp_path / "config"), "", 5.0).felix_lines
    assert isinstance(found, Missing)
    assert "--node-name" in found.why


def test_a_server_that_does_not_answer(api: KubernetesApi, tmp_path: Path) -> None:
    gate = api.hold("GET /version")
    try:
        found = collected(api, tmp_path, timeout_s=0.2)
    finally:
        gate.set()
    assert isinstance(found.kubernetes, Missing)
    assert "did not answer in time" in found.kubernetes.why
    assert found.kubernetes == found.felix_objects == found.felix_lines


@pytest.mark.parametrize("held", ["GET /api/v1/services", "GET .*/calico-node", "GET .*/felixconfigurations"])
def test_a_server_that_stops_answering_is_waited_for_once(api: KubernetesApi, tmp_path: Path, held: str) -> None:
    gate = api.hold(held)
    try:
        found = collected(api, tmp_path, timeout_s=0.2)
        asked = list(api.requests)
    finally:
        gate.set()
    assert not isinstance(found.kubernetes, Missing)
    assert isinstance(found.kubernetes.nodes, tuple)
    assert isinstance(found.felix_lines, Missing)
    assert "did not answer in time" in found.felix_lines.why
    assert re.fullmatch(held, asked[-1])


def test_tls_that_is_not_trusted(tmp_path: Path) -> None:
    with KubernetesApi(tls=True) as server:
        config = server.kubeconfig(tmp_path / "config", trusted=False)
        found = objects.collect(Snapshot(host=HOST), config, "", 5.0).kubernetes
    assert isinstance(found, Missing)
    assert found.why.startswith("TLS with https://127.0.0.1")


def test_no_configuration(tmp_path: Path) -> None:
    found = objects.collect(Snapshot(), str(tmp_path / "none"), "", 1.0).kubernetes
    assert isinstance(found, Missing)
    assert "no usable Kubernetes configuration" in found.why


@pytest.fixture
def metadata() -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """A metadata service: its address, its answers by "METHOD path", and what was asked."""
    answers: dict[str, str] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = f"{self.command} {self.path}"
            asked.append(
                f"{name} {self.headers.get('X-aws-ec2-metadata-token') or self.headers.get('Metadata-Flavor')}"
            )
            raw = answers.get(name, "").encode()
            self.send_response(200 if name in answers else 404)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_PUT = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", answers, asked
        server.shutdown()
        thread.join()


def dmi(tmp_path: Path, vendor: str) -> Path:
    (tmp_path / "sys_vendor").write_text(f"{vendor}\n")
    return tmp_path


def test_aws(metadata: tuple[str, dict[str, str], list[str]], tmp_path: Path) -> None:
    base, answers, asked = metadata
    answers |= {
        "PUT /latest/api/token": "t0ken",
        "GET /latest/meta-data/instance-id": "i-0123",
        "GET /latest/meta-data/placement/availability-zone": "eu-central-1a",
        "GET /latest/meta-data/instance-type": "m6i.large",
    }
    assert cloud.collect(dmi(tmp_path, "Amazon EC2"), base) == Cloud("aws", "i-0123", "eu-central-1a", "m6i.large")
    assert all(each.endswith(" t0ken") for each in asked[1:])


def test_gcp(metadata: tuple[str, dict[str, str], list[str]], tmp_path: Path) -> None:
    base, answers, asked = metadata
    answers |= {
        "GET /computeMetadata/v1/instance/name": "node-1",
        "GET /computeMetadata/v1/instance/zone": "projects/1/zones/europe-west3-a",
        "GET /computeMetadata/v1/instance/machine-type": "projects/1/machineTypes/n2-standard-4",
    }
    assert cloud.collect(dmi(tmp_path, "Google"), base) == Cloud("gcp", "node-1", "europe-west3-a", "n2-standard-4")
    assert all(each.endswith(" Google") for each in asked)


def test_a_metadata_service_that_refuses(metadata: tuple[str, dict[str, str], list[str]], tmp_path: Path) -> None:
    found = cloud.collect(dmi(tmp_path, "Amazon EC2"), metadata[0])
    assert isinstance(found, Missing)
    assert "404" in found.why


def test_elsewhere_nobody_is_asked(metadata: tuple[str, dict[str, str], list[str]], tmp_path: Path) -> None:
    assert isinstance(cloud.collect(dmi(tmp_path, "QEMU"), metadata[0]), Missing)
    assert isinstance(cloud.collect(tmp_path / "none", metadata[0]), Missing)
    assert metadata[2] == []


def test_felixs_metrics(metadata: tuple[str, dict[str, str], list[str]]) -> None:
    base, answers, _ = metadata
    env = {"FELIX_PROMETHEUSMETRICSPORT": base.rpartition(":")[2]}
    answers["GET /metrics"] = (
        "# HELP felix_bpf_conntrack_sweep_duration Conntrack sweep execution time (ns)\n"
        "# TYPE felix_bpf_conntrack_sweep_duration gauge\n"
        "felix_bpf_conntrack_sweep_duration 6.21e+09\n"
        'felix_bpf_conntrack_expired{reason="x"} 3\n'
        "felix_bpf_conntrack_used 412\ngo_goroutines 12\n"
    )
    found = node._metrics(env)
    assert found == {"felix_bpf_conntrack_sweep_duration": 6.21e9, "felix_bpf_conntrack_used": 412.0}
    result = registry.run(replace(HEALTHY, metrics=found), [registry.BY_ID["cpu.conntrack-sweep"]])[0]
    assert result.status is Status.FINDINGS
    del answers["GET /metrics"]
    with pytest.raises(EnvironmentUnfit, match=r"404.*prometheusMetricsEnabled"):
        node._metrics(env)
    with pytest.raises(EnvironmentUnfit, match="no process"):
        node._metrics(Missing("no process"))


def run(*words: str, given: str | None = None) -> Result:
    return CliRunner().invoke(command, list(words), input=given, standalone_mode=False, catch_exceptions=True)


def test_the_cluster_only(api: KubernetesApi, tmp_path: Path) -> None:
    done = run(
        "--cluster", "--kubeconfig", api.kubeconfig(tmp_path / "config"), "--node-name", "worker-1", "-o", "json"
    )
    found = [json.loads(each) for each in done.stdout.splitlines()]
    assert [each["id"] for each in found if each["type"] == "finding"] == ["debug.level"]
    assert done.return_value == 1
    statuses = {each["id"]: each["status"] for each in found if each["type"] == "check"}
    assert statuses["services.log-unsupported"] == "passed"
    assert statuses["services.mtu"] == "not run"


def test_nothing_could_be_looked_at(tmp_path: Path) -> None:
    done = run("--cluster", "--kubeconfig", str(tmp_path / "none"))
    assert done.return_value == 3
    assert "no usable Kubernetes configuration" in done.stdout


def test_files_and_standard_input(api: KubernetesApi, tmp_path: Path) -> None:
    config = tmp_path / "felix.yaml"
    config.write_text("kind: FelixConfiguration\nmetadata: {name: default}\nspec: {bpfLogLevel: Debug}\n")
    kept = tmp_path / "kept.calitrace"
    words = ("--cluster", "--kubeconfig", str(tmp_path / "none"), "--felix-config", str(config), "--felix-log", "-")
    log = line("Failed to mount bpffs", "ERROR") + "\n"
    live = run(*words, "-w", str(kept), "-o", "json", given=log)
    found = [json.loads(each) for each in live.stdout.splitlines()]
    assert {each["id"] for each in found if each["type"] == "finding"} == {"debug.level", "services.log-bpffs"}
    assert run("-r", str(kept), "-o", "json").stdout == live.stdout
    assert run("-r", str(kept), "debug", "-o", "md").stdout.startswith("# Calico eBPF checks on a node\n")


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("nonsense",), "no area 'nonsense'"),
        (("--explain", "nonsense"), "no check 'nonsense'"),
        (("-r", "/nonexistent"), "cannot read /nonexistent"),
        (("-r", "/nonexistent", "--probe", "a=b:1"), "--probe sends packets"),
        (("--cluster", "--calico-version", "latest"), "'latest' is no release"),
        (("--cluster", "--felix-config", "/nonexistent"), "cannot read /nonexistent"),
        (("--cluster", "--felix-log", "/nonexistent"), "cannot read /nonexistent"),
        (("--cluster", "-w", "/nonexistent/x"), "cannot write /nonexistent/x"),
        (("--netns", "nonexistent"), "no network namespace 'nonexistent'"),
    ],
)
def test_usage(words: tuple[str, ...], cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    done = run(*words)
    assert isinstance(done.exception, UsageError)
    assert cause in done.exception.cause


def log_bytes(form: str) -> bytes:
    """A log of Felix's, as it is rotated and shipped."""
    lines = [line("Felix starting up"), line("Failed to mount bpffs", "ERROR")]
    if form == "json":
        lines = [json.dumps({"log": f"{each}\n", "stream": "stdout"}) for each in lines]
    raw = "".join(f"{each}\n" for each in lines).encode() + b"\xff\xfe\n"
    return gzip.compress(raw) if form == "gz" else raw


@pytest.mark.parametrize("form", ["plain", "json", "gz"])
def test_a_log_is_read_as_it_comes(form: str, tmp_path: Path) -> None:
    path = tmp_path / "calico.log"
    path.write_bytes(log_bytes(form))
    kept = str(kept_healthy(tmp_path))
    for given, raw in ((str(path), None), ("-", log_bytes(form))):
        done = CliRunner().invoke(
            command, ["-r", kept, "--felix-log", given, "-o", "json"], input=raw, standalone_mode=False
        )
        found = [json.loads(each) for each in done.stdout.splitlines()]
        assert [each["id"] for each in found if each["type"] == "finding"] == ["services.log-bpffs"]


def test_a_log_of_something_else_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("hello\nworld\n")
    done = run("-r", str(kept_healthy(tmp_path)), "services", "--felix-log", str(path))
    assert "none of the 2 lines of" in done.stdout
    path.write_bytes(gzip.compress(b"hello")[:-4])
    done = run("-r", str(kept_healthy(tmp_path)), "--felix-log", str(path))
    assert isinstance(done.exception, UsageError)
    assert "cannot read" in done.exception.cause


def test_where_no_check_of_the_area_could_run_nothing_is_called_clean(tmp_path: Path) -> None:
    from calitrace.cli.check import _write

    path = tmp_path / "x.calitrace"
    _write(path, replace(HEALTHY, drops=Missing("--interval 0")))
    assert run("-r", str(path), "drops").return_value == 3
    assert run("-r", str(path), "drops", "maps").return_value == 0


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("a: [", "is not YAML"),
        ("a: 2026-99-99", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("a: \x00", "is not YAML"),
        ("kind: Node", "has no FelixConfiguration"),
        ("just text", "has no FelixConfiguration"),
        ("", "has no FelixConfiguration"),
    ],
)
def test_yaml_that_is_none(text: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "felix.yaml"
    path.write_text(text)
    done = run("-r", str(kept_healthy(tmp_path)), "--felix-config", str(path))
    assert isinstance(done.exception, UsageError)
    assert cause in done.exception.cause


def kept_healthy(tmp_path: Path) -> Path:
    from calitrace.cli.check import _write

    path = tmp_path / "healthy.calitrace"
    _write(path, HEALTHY)
    return path


def test_the_node_can_be_named_afterwards(tmp_path: Path) -> None:
    config = tmp_path / "felix.yaml"
    each = "kind: FelixConfiguration\nmetadata: {name: %s}\nspec: {bpfEnabled: true, bpfLogLevel: %s}\n"
    config.write_text(each % ("default", "Off") + "---\n" + each % ("node.other", "Debug"))
    words = ("-r", str(kept_healthy(tmp_path)), "debug", "--felix-config", str(config))
    assert run(*words).return_value == 0
    assert "FelixConfiguration node.other" in run(*words, "--node-name", "other").stdout


def test_a_healthy_snapshot_ends_with_zero(tmp_path: Path) -> None:
    done = run("-r", str(kept_healthy(tmp_path)), "-v")
    assert done.return_value == 0
    assert "no findings; " in done.stdout


def test_lists_and_explanations() -> None:
    assert len(run("--list").stdout.splitlines()) == len(registry.CHECKS)
    assert "NodePort tunnel" in run("--explain", "services.mtu").stdout


def test_many_pods_of_another_cni_do_not_keep_us_from_asking_the_uplink(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tool:
        def __enter__(self) -> Tool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def get_features(self, name: str) -> object:
            raise OSError(name)

    monkeypatch.setattr("pyroute2.Ethtool", Tool)
    monkeypatch.setattr("calitrace.kernel.iptables.driver", lambda name: f"of {name}")
    names = [*(f"eni{number}" for number in range(70)), "cali0", "eth0"]
    links = [Link(index, name, "" if name == "eth0" else "veth") for index, name in enumerate(names)]
    found = list(node._with_hardware(links))
    asked = [link.name for link in found if link.driver == f"of {link.name}"]
    assert [link.name for link in found] == names
    assert asked == [*names[:63], "eth0"]
