"""The log of the lab's dataplane: all live sources agree with each other and with the probes; Debug on and back."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.kubernetes_api import KubernetesApi
from tests.netns.conftest import calitrace, listening, on

if TYPE_CHECKING:
    from pathlib import Path

    from calitrace.lab.topology import Lab

pytestmark = pytest.mark.root

TIMEOUT_S = 120
FELIX = "/apis/crd.projectcalico.org/v1/felixconfigurations"


def finished(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """Interrupt it; its objects."""
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in output.splitlines()]


def probed(lab: Lab, *words: str) -> list[dict[str, Any]]:
    """Probes of a NodePort, and what became of them."""
    done = calitrace(
        *("probe", "nodeport", "10.10.0.1:30080", "--from", lab.namespace("client"), "--rate", "100", "-o", "json"),
        *words,
    )
    return [json.loads(line) for line in done.stdout.splitlines()][:-1]


def key(passage: dict[str, Any]) -> str:
    """All of a passage but its time, of another clock, and the task's name, which tracefs may have forgotten."""
    same = {name: value for name, value in passage.items() if name not in ("time_ns", "comm")}
    return json.dumps(same, sort_keys=True)


def test_sources_agree_with_each_other_and_with_the_probes(lab: Lab) -> None:
    assert on(lab, "log-level", "debug").returncode == 0
    with (
        listening("log", "--source", "bpf", "-o", "json", "-v", "host 10.10.0.100") as first,
        listening("log", "--source", "tracefs", "-o", "json", "-v", "host 10.10.0.100") as second,
    ):
        probes = probed(lab, "-c", "20")
        by_bpf, by_tracefs = finished(first), finished(second)
    assert Counter(map(key, by_bpf)) == Counter(map(key, by_tracefs))
    assert all(not passage["marks"] for passage in by_bpf)
    for probe in probes:
        assert probe["outcome"] == "answered"
        sport = probe["sport"]
        # The SYN: into node-a, into node-b inside VXLAN, to the pod; the answer: from the pod, into node-a, on to us.
        seen = [
            (passage["interface"], passage["hook"], passage["verdict"])
            for passage in by_bpf
            if any(sport in (flow["sport"], flow["dport"]) for flow in passage["packets"])
        ]
        assert seen[:5] == [
            ("ens192", "ingress", "ALLOW"),
            ("eth0", "ingress", "ALLOW"),
            ("calif00dbeef012", "egress", "ALLOW"),
            ("calif00dbeef012", "ingress", "ALLOW"),
            ("ens192", "ingress", "ALLOW"),
        ]


def test_a_denial_names_its_cause(lab: Lab) -> None:
    assert on(lab, "log-level", "debug").returncode == 0
    assert on(lab, "fault", "policy-deny").returncode == 0
    with listening("log", "--verdict", "deny", "-o", "json") as process:
        probed(lab, "-c", "3", "--timeout", "0.3")
        denied = finished(process)
    assert on(lab, "heal").returncode == 0
    # Each SYN, and the RST by which the probe ends it.
    assert Counter((each["interface"], each["hook"], each["cause"]) for each in denied) == {
        ("calif00dbeef012", "egress", "denied by policy"): 3,
        ("calif00dbeef012", "egress", "only one side's policy has approved the flow"): 3,
    }


class Felix(threading.Thread):
    """A stand-in for calico-node: it does what the FelixConfiguration of its node says about bpfLogLevel.

    The real one needs a cluster; what it does here is what felix/dataplane/linux/bpf_ep_mgr.go does: load all
    programs anew at another level and replace those attached.
    """

    def __init__(self, api: KubernetesApi, lab: Lab) -> None:
        super().__init__()
        self._api = api
        self._lab = lab
        self.levels: list[str] = []
        self._level = "Off"
        self._stopped = False

    def run(self) -> None:
        changed = self._api.store.changed
        while not self._stopped:
            with changed:
                changed.wait_for(lambda: self._stopped or self._wanted() != self._level, TIMEOUT_S)
                self._level = self._wanted()
            if not self._stopped:
                self.levels.append(self._level)
                on(self._lab, "log-level", self._level.lower())

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        with self._api.store.changed:
            self._api.store.changed.notify_all()
        self.join()

    def _wanted(self) -> str:
        own = self._api.get(f"{FELIX}/node.a") or {}
        return str((own.get("spec") or {}).get("bpfLogLevel", "Off"))


def test_debug_for_the_time_of_a_run(lab: Lab, tmp_path: Path) -> None:
    assert on(lab, "log-level", "off").returncode == 0
    with KubernetesApi(apis=("apps/v1",)) as api:
        api.put("/apis/crd.projectcalico.org/v1/clusterinformations/default", {"spec": {"calicoVersion": "v3.29.1"}})
        api.put(f"{FELIX}/default", {"spec": {"bpfEnabled": True}})
        api.put("/api/v1/nodes/a", {})
        felix = Felix(api, lab)
        felix.start()
        words = ["--kubeconfig", str(api.kubeconfig(tmp_path / "config")), "--node", "a", "--enable-debug"]
        words += ["--netns", lab.namespace("node-a"), "-o", "json", "host", "10.10.0.100", "and", "port", "30080"]
        try:
            refused = calitrace("log", *words)
            assert (refused.returncode, api.get(f"{FELIX}/node.a")) == (2, None)
            assert "bpfLogLevel: (not set) -> Debug" in refused.stderr
            with listening("log", "--allow-system-changes", *words) as process:
                assert (api.get(f"{FELIX}/node.a") or {})["spec"] == {
                    "bpfLogLevel": "Debug",
                    "bpfLogFilters": {"all": "(host 10.10.0.100 and port 30080) or (udp port 4789)"},
                }
                probes = probed(lab, "-c", "3")
                passages = finished(process)
            assert api.get(f"{FELIX}/node.a") is None
        finally:
            felix.stop()
    assert felix.levels in (["Debug"], ["Debug", "Off"])
    assert {flow["sport"] for each in passages for flow in each["packets"]} >= {each["sport"] for each in probes}
