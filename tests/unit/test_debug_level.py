"""Debug on one node and back: real processes, a real API server on loopback, kills at every point."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pytest
from tests.kubernetes_api import KubernetesApi

from calitrace.cluster import felix
from calitrace.cluster.felix import Change, DebugLevel
from calitrace.cluster.kubernetes import ApiRefused, Cluster
from calitrace.cluster.undo import Record, Watchdog, difference, replacing, replay
from calitrace.errors import EnvironmentUnfit, NotCalico, UsageError
from calitrace.kernel import child

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

GROUP = "/apis/crd.projectcalico.org/v1"
FELIX = f"{GROUP}/felixconfigurations"
OWN = f"{FELIX}/node.a"
DAEMONSET = "/apis/apps/v1/namespaces/calico-system/daemonsets/calico-node"
FILTERS = {"all": "(host 10.96.0.7 and port 80) or (udp port 4789)"}
DEBUG = {"bpfLogLevel": "Debug", "bpfLogFilters": FILTERS}
UPLINK = ("eth0", "ingress")
OWNER = """
import sys, itertools
from pathlib import Path
from calitrace.cluster.felix import DebugLevel, change
from calitrace.cluster.kubernetes import Cluster
ids = itertools.count(1)
with Cluster(sys.argv[1]) as cluster:
    wanted = change(cluster, "a", {"all": sys.argv[3]}, "6.8.0")
    with DebugLevel(cluster, wanted, lambda: {("eth0", "ingress"): (next(ids),)}, 600, Path(sys.argv[2])) as debug:
        print(debug.watchdog.pid, flush=True)
        sys.stdin.read()
"""


def daemonset(*env: dict[str, str]) -> dict[str, Any]:
    """A DaemonSet calico-node with these environment variables."""
    return {
        "metadata": {"labels": {"k8s-app": "calico-node"}},
        "spec": {"template": {"spec": {"containers": [{"name": "calico-node", "env": list(env)}]}}},
    }


@dataclass
class Place:
    """A cluster and a directory for undo records."""

    api: KubernetesApi
    cluster: Cluster
    kubeconfig: str
    directory: Path

    def change(self, filters: dict[str, str] | None = None, kernel: str = "6.8.0", **more: Any) -> Change:
        return felix.change(self.cluster, "a", FILTERS if filters is None else filters, kernel, **more)

    def debug(self, programs: Any = None, seconds: float = 600, reload_s: float = 30) -> DebugLevel:
        return DebugLevel(self.cluster, self.change(), programs or reloading(), seconds, self.directory, reload_s)

    def spec(self) -> dict[str, Any] | None:
        """The spec of this node's FelixConfiguration, None without one."""
        found = self.api.get(OWN)
        return None if found is None else found["spec"]

    def records(self) -> list[str]:
        return sorted(each.name for each in self.directory.iterdir())

    @contextmanager
    def owner(self) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
        """A process that turned Debug on: itself, its watchdog's id, and a pidfd of the watchdog."""
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", OWNER, self.kubeconfig, str(self.directory), FILTERS["all"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout
            watchdog = int(process.stdout.readline())
            descriptor = os.pidfd_open(watchdog)
            try:
                yield process, watchdog, descriptor
            finally:
                process.kill()
                os.close(descriptor)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with KubernetesApi(apis=("apps/v1",)) as api:
        api.put(f"{GROUP}/clusterinformations/default", {"spec": {"calicoVersion": "v3.28.1"}})
        api.put(f"{FELIX}/default", {"spec": {"bpfEnabled": True}})
        api.put("/api/v1/nodes/a", {})
        api.put(DAEMONSET, daemonset({"name": "FELIX_LOGSEVERITYSCREEN", "value": "info"}))
        kubeconfig = api.kubeconfig(tmp_path / "config")
        directory = tmp_path / "undo"
        directory.mkdir()
        with Cluster(kubeconfig, timeout_s=2) as cluster:
            yield Place(api, cluster, kubeconfig, directory)
        for each in directory.iterdir():  # a test that failed: its watchdog gives up without a record
            each.unlink()


def reloading(*states: Mapping[tuple[str, str], tuple[int, ...]]) -> Any:
    """What is attached, call by call; the last stays."""
    found = list(states or ({UPLINK: (1,)}, {UPLINK: (2,)}))
    return lambda: found.pop(0) if len(found) > 1 else found[0]


def ended(descriptor: int) -> bool:
    """Whether the process of a pidfd ends."""
    return bool(select.select([descriptor], [], [], 30)[0])


def test_on_and_off_without_an_own_resource(place: Place) -> None:
    with place.debug() as debug:
        assert place.spec() == DEBUG
        assert len(place.records()) == 1
        assert debug.watchdog
        assert debug.watchdog.alive()
    assert place.spec() is None
    assert place.records() == []
    assert debug.outcome
    assert not debug.outcome.pending
    assert debug.outcome.text == "bpfLogLevel and bpfLogFilters of FelixConfiguration node.a are as before"
    assert place.api.get(f"{FELIX}/default")["spec"] == {"bpfEnabled": True}  # type: ignore[index]


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"bpfLogLevel": "Info", "mtuIfacePattern": "eth.*"},
        {"bpfLogLevel": "Off", "bpfLogFilters": {"all": "tcp", "weps": "udp"}},
        {"bpfLogFilters": {}},
    ],
)
def test_an_own_resource_is_put_back_exactly(place: Place, before: dict[str, Any]) -> None:
    place.api.put(OWN, {"spec": before})
    with place.debug():
        assert place.spec() == before | DEBUG
    assert place.spec() == before


def test_the_way_through_calicos_own_api(place: Place) -> None:
    own = "/apis/projectcalico.org/v3/felixconfigurations/node.a"
    place.api.put(own, {"spec": {"bpfLogLevel": "Off"}})
    with place.debug():
        assert place.api.get(own)["spec"]["bpfLogLevel"] == "Debug"  # type: ignore[index]
        assert place.spec() is None
    assert place.api.get(own)["spec"] == {"bpfLogLevel": "Off"}  # type: ignore[index]


def test_the_deadline(place: Place) -> None:
    with place.debug(seconds=0.2) as debug:
        assert debug.watchdog
        assert place.api.wait_for(lambda: place.api.get(OWN) is None)
    assert debug.outcome
    assert not debug.outcome.pending
    assert place.records() == []


def test_the_owner_is_killed(place: Place) -> None:
    with place.owner() as (process, _, watchdog):
        assert place.spec() == DEBUG
        process.kill()
        assert ended(watchdog)
        assert place.spec() is None
        assert place.records() == []


def test_the_owner_ends_by_itself(place: Place) -> None:
    with place.owner() as (process, _, watchdog):
        assert process.stdin
        process.stdin.close()
        assert process.wait(30) == 0
        assert ended(watchdog)
    assert place.spec() is None


def test_the_watchdog_is_asked_to_end(place: Place) -> None:
    with place.owner() as (_, pid, watchdog):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert ended(watchdog)
        assert place.spec() is None


def test_both_are_killed_and_the_next_start_puts_back(place: Place) -> None:
    place.api.put(OWN, {"spec": {"bpfLogLevel": "Info"}})
    with place.owner() as (process, pid, watchdog):
        assert replay(place.directory) == []  # it is guarded
        os.kill(pid, signal.SIGKILL)
        process.kill()
        assert ended(watchdog)
    assert place.spec() == DEBUG
    place.api.stop()
    (outcome,) = replay(place.directory)
    assert outcome.pending
    assert "cannot reach" in outcome.text
    place.api.start()
    (outcome,) = replay(place.directory)
    assert not outcome.pending
    assert place.spec() == {"bpfLogLevel": "Info"}
    assert (place.records(), replay(place.directory)) == ([], [])


def test_the_watchdog_is_killed_and_the_owner_puts_back(place: Place) -> None:
    with place.debug() as debug:
        assert debug.watchdog
        descriptor = os.pidfd_open(debug.watchdog.pid)
        os.kill(debug.watchdog.pid, signal.SIGKILL)
        assert ended(descriptor)
        os.close(descriptor)
        assert not debug.watchdog.alive()
    assert place.spec() is None
    assert place.records() == []


def test_what_somebody_else_set_meanwhile_stays(place: Place) -> None:
    place.api.put(OWN, {"spec": {"bpfLogLevel": "Off"}})
    with place.debug() as debug:
        place.api.put(OWN, {"spec": {**DEBUG, "bpfLogLevel": "Info", "mtuIfacePattern": "eth.*"}})
    assert place.spec() == {"bpfLogLevel": "Info", "mtuIfacePattern": "eth.*"}
    assert debug.outcome
    assert debug.outcome.text == "FelixConfiguration node.a: left bpfLogLevel as somebody else set it meanwhile"
    assert place.records() == []


def test_a_resource_of_ours_that_somebody_uses_now_is_kept(place: Place) -> None:
    with place.debug():
        place.api.put(OWN, {"spec": {**DEBUG, "mtuIfacePattern": "eth.*"}})
    assert place.spec() == {"mtuIfacePattern": "eth.*"}


def test_a_resource_that_somebody_deleted(place: Place) -> None:
    with place.debug() as debug:
        place.api.remove(OWN)
    assert place.spec() is None
    assert debug.outcome
    assert not debug.outcome.pending


def test_the_api_is_down_at_the_end(place: Place) -> None:
    with place.owner() as (process, _, watchdog):
        place.api.stop()
        process.kill()
        process.wait()
        assert len(place.records()) == 1
        place.api.start()
        assert ended(watchdog)
    assert place.spec() is None
    assert place.records() == []


def test_the_owner_does_not_wait_for_an_api_that_is_down(place: Place) -> None:
    with place.debug() as debug:
        assert debug.watchdog
        watchdog = debug.watchdog
        place.api.stop()
        outcome = watchdog.close(timeout_s=1)
        assert outcome.pending
        assert "the watchdog goes on trying" in outcome.text
        descriptor = os.pidfd_open(watchdog.pid)
        debug.watchdog = None
        place.api.start()
        assert ended(descriptor)
        os.close(descriptor)
    assert place.spec() is None


def test_a_change_between_our_reading_and_our_writing_counts(place: Place) -> None:
    place.api.put(OWN, {"spec": {"bpfLogLevel": "Off"}})
    place.api.before("PATCH", lambda: place.api.put(OWN, {"spec": {"bpfLogLevel": "Info"}}))
    with place.debug():
        assert place.spec() == DEBUG
    assert place.spec() == {"bpfLogLevel": "Info"}
    with place.debug() as debug:
        place.api.before("PATCH", lambda: place.api.put(OWN, {"spec": {**DEBUG, "bpfLogLevel": "Off"}}))
    assert place.spec() == {"bpfLogLevel": "Off"}
    assert debug.outcome
    assert "left bpfLogLevel as somebody else set it" in debug.outcome.text


def test_created_by_somebody_else_at_the_same_time(place: Place) -> None:
    place.api.before("POST", lambda: place.api.put(OWN, {"spec": {"bpfLogLevel": "Info"}}))
    with place.debug():
        assert place.spec() == DEBUG
    assert place.spec() == {"bpfLogLevel": "Info"}


def test_no_permission_to_change(place: Place) -> None:
    place.api.refuse("POST", 403)
    with pytest.raises(EnvironmentUnfit, match="403") as raised, place.debug():
        pytest.fail("entered")
    assert "permission" in raised.value.hint
    assert (place.spec(), place.records()) == (None, [])


def test_a_change_without_an_answer_is_put_back(place: Place) -> None:
    """The API did the change, but we were not told: the watchdog looks again after a time-out."""
    place.api.put(OWN, {"spec": {"bpfLogLevel": "Off"}})
    place.api.before("PATCH", lambda: place.api.put(OWN, {"spec": DEBUG})).status = 0
    with pytest.raises(EnvironmentUnfit, match="cannot reach"), place.debug():
        pytest.fail("entered")
    assert place.spec() == {"bpfLogLevel": "Off"}
    assert place.records() == []


@pytest.mark.parametrize("after", [{UPLINK: ()}, {UPLINK: (2,), ("cali1", "egress"): ()}])
def test_a_missing_program_takes_debug_back_at_once(
    place: Place, after: dict[tuple[str, str], tuple[int, ...]]
) -> None:
    before = {UPLINK: (1,), ("cali1", "egress"): (3,)}
    with pytest.raises(EnvironmentUnfit, match=r"program is missing at .* are as before") as raised:
        place.debug(reloading(before, before, after)).__enter__()
    assert "verifier" in raised.value.hint
    assert (place.spec(), place.records()) == (None, [])


def test_programs_that_are_not_loaded_anew(place: Place) -> None:
    before = {UPLINK: (1,), ("cali1", "egress"): (3,)}
    with pytest.raises(EnvironmentUnfit, match=r"did not load the programs at cali1 egress anew in 0 s"):
        place.debug(reloading(before, {UPLINK: (2,), ("cali1", "egress"): (3,)}), reload_s=0).__enter__()
    assert place.spec() is None


def test_an_interface_that_went_away_is_no_missing_program(place: Place) -> None:
    before = {UPLINK: (1,), ("cali1", "egress"): (3,), ("tunl0", "ingress"): ()}
    with place.debug(reloading(before, {UPLINK: (2,)})) as debug:
        debug.check()
        assert place.spec() == DEBUG


def test_a_program_that_goes_missing_later(place: Place) -> None:
    with (
        pytest.raises(EnvironmentUnfit, match="missing at eth0 ingress"),
        place.debug(reloading({UPLINK: (1,)}, {UPLINK: (2,)}, {UPLINK: ()})) as debug,
    ):
        debug.check()
    assert place.spec() is None


def test_nothing_attached(place: Place) -> None:
    with pytest.raises(NotCalico, match="no Calico program"):
        place.debug(reloading({UPLINK: ()})).__enter__()
    assert place.spec() is None


def test_a_second_calitrace_on_the_same_node(place: Place) -> None:
    with place.debug():
        place.api.put(f"{FELIX}/default", {"spec": {"bpfLogLevel": "Info"}})
        other = DebugLevel(place.cluster, place.change({"eth0": "port 1"}), reloading(), 600, place.directory)
        with pytest.raises(EnvironmentUnfit, match=r"another calitrace has changed node\.a"):
            other.__enter__()
        assert place.spec() == DEBUG
    assert place.spec() is None


def test_what_would_be_changed(place: Place) -> None:
    assert place.change().lines() == [
        "create FelixConfiguration node.a (this node only); Felix then loads its programs anew:",
        "  bpfLogLevel: (not set) -> Debug",
        "  bpfLogFilters: (not set) -> all: (host 10.96.0.7 and port 80) or (udp port 4789)",
        "Debug costs 12 to 28 microseconds for each packet that is logged, in each program that it passes",
    ]
    assert [line for line in place.api.requests if not line.startswith("GET")] == []
    place.api.put(f"{FELIX}/default", {"spec": {"bpfLogLevel": "Off", "bpfLogFilters": {"weps": "tcp"}}})
    place.api.put(OWN, {"spec": {"bpfLogLevel": "Debug"}})
    assert place.change({}).ours == {"bpfLogFilters": {"all": "ip or ip6 or arp"}}
    assert place.change({}).lines()[0].startswith("change")


def test_nothing_to_change(place: Place) -> None:
    place.api.put(f"{FELIX}/default", {"spec": DEBUG})
    with place.debug() as debug:
        assert place.change().lines() == ["Debug is on already as wanted; nothing to change"]
        assert (debug.watchdog, place.records()) == (None, [])
    assert debug.outcome is None


def test_a_release_without_filters(place: Place) -> None:
    place.api.put(f"{GROUP}/clusterinformations/default", {"spec": {"calicoVersion": "v3.26.1"}})
    found = place.change()
    assert found.ours == {"bpfLogLevel": "Debug"}
    assert "every packet" in found.warnings[0]
    assert "after the cost" in found.warnings[1]


def test_known_to_cut_the_network(place: Place) -> None:
    place.api.put(f"{GROUP}/clusterinformations/default", {"spec": {"calicoVersion": "v3.30.1"}})
    with pytest.raises(EnvironmentUnfit, match=r"Debug stays off: Calico v3\.30\.1 on Linux 5\.15\.0"):
        place.change(kernel="5.15.0")
    assert "10911" in place.change(kernel="5.15.0", force=True).warnings[0]
    with pytest.raises(EnvironmentUnfit, match="lockdown"):
        place.change(locked="confidentiality")


@pytest.mark.parametrize("name", ["FELIX_BPFLOGLEVEL", "felix_bpfLogFilters"])
def test_the_environment_of_felix_wins(place: Place, name: str) -> None:
    place.api.put(DAEMONSET, daemonset({"name": name, "value": "Off"}))
    with pytest.raises(EnvironmentUnfit, match=f"calico-system/calico-node sets {name} to 'Off'"):
        place.change()


def test_what_cannot_be_read_is_said(place: Place) -> None:
    place.api.remove(DAEMONSET)
    assert "not known" in place.change().warnings[0]
    rule = place.api.refuse("daemonsets", 403)
    assert "cannot be read" in place.change().warnings[0]
    rule.status = 500
    with pytest.raises(ApiRefused, match="500"):
        place.change()
    place.api.remove(f"{GROUP}/clusterinformations/default")
    rule.status = 403
    assert "release of Calico is not known" in place.change().warnings[0]


def test_a_node_that_is_not_there(place: Place) -> None:
    place.api.remove("/api/v1/nodes/a")
    with pytest.raises(UsageError, match="has no node 'a'"):
        place.change()
    place.api.refuse("nodes", 403)
    assert place.change().ours == DEBUG


def test_a_late_change_is_seen(place: Place) -> None:
    """The request outlives our waiting for its answer: the watchdog looks, waits it out, and looks again."""
    place.api.put(OWN, {"spec": {"bpfLogLevel": "Off"}})
    go_on = place.api.hold("PATCH")

    def looked() -> None:  # owner, then watchdog: the change arrives after it found nothing to put back
        if any(line == f"PATCH {OWN}" for line in place.api.requests):
            seen.append(place.spec())
            place.api.rules.clear()
            threading.Timer(1, go_on.set).start()  # after a watchdog that looked only once would have ended

    seen: list[Any] = []
    place.api.before(f"GET {OWN}", looked, times=-1)
    with pytest.raises(EnvironmentUnfit, match="did not answer in time"), place.debug():
        pytest.fail("entered")
    assert seen == [{"bpfLogLevel": "Off"}]
    assert place.api.wait_for(lambda: any(value.get("spec") == DEBUG for *_, value in place.api.store.history))
    assert place.spec() == {"bpfLogLevel": "Off"}
    assert place.records() == []


def test_a_cluster_without_calico(tmp_path: Path) -> None:
    with KubernetesApi() as api, Cluster(api.kubeconfig(tmp_path / "config")) as cluster:
        api.put("/api/v1/nodes/a", {})
        with pytest.raises(NotCalico, match="no FelixConfiguration"):
            felix.change(cluster, "a", {}, "6.8.0")


def test_the_watchdog_finds_the_modules_that_we_find(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a relative PYTHONPATH says so: it runs in another directory."""
    (tmp_path / "kubernetes.py").write_text("raise ImportError('the one beside us')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    record = Record("https://x", place.kubeconfig, "", OWN, True, {}, DEBUG, 0.0, "", 1)
    with pytest.raises(EnvironmentUnfit, match="the one beside us"):
        Watchdog(record, 600, place.directory)


def test_our_modules_are_found_by_ours_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process starts in turn, such as a kubeconfig's credential plugin, may be of another Python."""
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.setattr(sys, "path", ["", "relative", *sys.path])
    monkeypatch.delenv("PYTHONPATH", raising=False)
    words = child.command("import json, os; print(json.dumps([os.environ.get('PYTHONPATH'), *sys.argv[1:]]))", "a b")
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, '[null, "a b"]\n'), done.stderr


def test_a_watchdog_that_cannot_work_or_record_leaves_nothing(place: Place, tmp_path: Path) -> None:
    record = Record("https://x", str(tmp_path / "no"), "", OWN, True, {}, DEBUG, 0.0, "", 1)
    with pytest.raises(EnvironmentUnfit, match="watchdog cannot work: no usable Kubernetes configuration"):
        Watchdog(record, 600, place.directory)
    assert place.records() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentUnfit, match="cannot write the undo record"):
        Watchdog(record, 600, tmp_path / "file" / "undo")


def test_a_kubeconfig_that_leads_to_another_cluster_by_now(place: Place) -> None:
    record = Record("https://other", place.kubeconfig, "", OWN, True, {}, DEBUG, 0.0, "", 1)
    (place.directory / "x.json").write_text(json.dumps(asdict(record)))
    place.api.put(OWN, {"spec": DEBUG})
    (outcome,) = replay(place.directory)
    assert outcome.pending
    assert f"changed on https://other, and the kubeconfig says {place.api.url}" in outcome.text
    assert (place.spec(), place.records()) == (DEBUG, ["x.json"])
    with pytest.raises(EnvironmentUnfit, match=r"the watchdog cannot work: .* was changed on https://other"):
        Watchdog(record, 600, place.directory)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"path": 1}', "\x00"])
def test_a_broken_record_is_kept_and_named(place: Place, content: str) -> None:
    path = place.directory / "x.json"
    path.write_text(content)
    (outcome,) = replay(place.directory)
    assert outcome.pending
    assert f"{path} is no undo record" in outcome.text
    assert path.exists()


def test_replay_without_a_directory(tmp_path: Path) -> None:
    assert replay(tmp_path / "none") == []


def test_lockdown(tmp_path: Path) -> None:
    path = tmp_path / "lockdown"
    assert felix.lockdown(path) == ""
    path.write_text("none integrity [confidentiality]\n")
    assert felix.lockdown(path) == "confidentiality"


def test_differences() -> None:
    record = Record(
        "", "", "", OWN, False, {"a": 1, "b": {"x": 1, "y": 2}}, {"a": 2, "b": {"z": 3}, "c": 4}, 0.0, "", 1
    )
    assert difference({"a": 2, "b": {"z": 3}, "c": 4}, record) == (
        {"a": 1, "b": {"x": 1, "y": 2, "z": None}, "c": None},
        [],
    )
    assert difference({"a": 1, "b": {"x": 1, "y": 2}}, record) == ({}, [])
    assert difference({"b": {"z": 3, "w": 1}, "c": 5}, record) == ({}, ["a", "b", "c"])
    assert replacing(None, {"x": 1}) == {"x": 1}
    assert json.loads(json.dumps(replacing({"x": 1}, None))) is None


def test_closing_twice_leaves_no_process(place: Place) -> None:
    with ExitStack() as stack:
        debug = stack.enter_context(place.debug())
        assert debug.watchdog
        descriptor = os.pidfd_open(debug.watchdog.pid)
        stack.callback(os.close, descriptor)
        debug.close()
        debug.close()
        assert ended(descriptor)
