"""Calico's programs by interface and hook, and what a reload looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute

from calitrace.cli.debug_level import enabled, put_back_leftovers
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.kernel import attached, netns
from tests.kernel.conftest import compile_tc
from tests.kubernetes_api import KubernetesApi

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.root
PROGRAMS = """
int cali_from_hep(struct __sk_buff *skb) { return -1; }
int other_prog(struct __sk_buff *skb) { return -1; }
"""


def test_programs_by_interface_and_hook(pair: Pair) -> None:
    assert attached.calico_programs(pair.right)["right0", "ingress"] == ()
    first, second = compile_tc(PROGRAMS), compile_tc(PROGRAMS)
    pair.attach(first, "other_prog", pair.right, "right0", "egress")
    pair.attach(first, "cali_from_hep", pair.right, "right0", "ingress")
    before = attached.calico_programs(pair.right)
    assert before["right0", "egress"] == ()
    assert len(before["right0", "ingress"]) == 1
    pair.attach(second, "cali_from_hep", pair.right, "right0", "ingress")
    after = attached.calico_programs(pair.right)
    assert len(after["right0", "ingress"]) == 2
    assert set(before["right0", "ingress"]) < set(after["right0", "ingress"])
    assert ("right0", "ingress") not in attached.calico_programs(pair.left)
    assert ("lo", "ingress") in attached.calico_programs()


OWN = "/apis/crd.projectcalico.org/v1/felixconfigurations/node.a"
ENDS = [("10.96.0.7", 80)]


@pytest.mark.parametrize("loads", [True, False])
def test_debug_on_a_node(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], loads: bool) -> None:
    """The API's change makes "Felix" replace the program on the interface, or lose it: the verifier said no."""

    def felix() -> None:
        with netns.inside(pair.right), IPRoute() as route:
            index = route.link_lookup(ifname="right0")[0]
            route.tc("del", "clsact", index)
        if loads:
            pair.attach(programs, "cali_from_hep", pair.right, "right0", "ingress")

    programs = compile_tc(PROGRAMS)
    pair.attach(compile_tc(PROGRAMS), "cali_from_hep", pair.right, "right0", "ingress")
    with KubernetesApi(apis=("apps/v1",)) as api:
        api.put("/api/v1/nodes/a", {})
        api.put("/apis/crd.projectcalico.org/v1/clusterinformations/default", {"spec": {"calicoVersion": "v3.28.1"}})
        api.put(
            "/api/v1/namespaces/shop/services/web",
            {"spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "http", "port": 80}]}},
        )
        api.put(
            "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/web-1",
            {
                "metadata": {"labels": {"kubernetes.io/service-name": "web"}},
                "ports": [{"name": "http", "port": 8080}],
                "endpoints": [{"addresses": ["10.65.1.2"]}],
            },
        )
        api.before("POST", felix)

        def turn_on(allowed: bool) -> None:
            with enabled(
                allowed=allowed,
                node="a",
                kubeconfig=api.kubeconfig(tmp_path / "config"),
                ends=ENDS,
                interfaces=(),
                vxlan_port=4789,
                seconds=600,
                force=False,
                namespace=pair.right,
                directory=tmp_path / "undo",
            ):
                found = api.get(OWN)
                assert found
                assert found["spec"] == {
                    "bpfLogLevel": "Debug",
                    "bpfLogFilters": {
                        "all": "(host 10.96.0.7 and port 80) or (host 10.65.1.2 and port 8080) or (udp port 4789)"
                    },
                }

        with pytest.raises(UsageError, match="nothing allows"):
            turn_on(False)
        assert not [line for line in api.requests if not line.startswith("GET")]
        if loads:
            turn_on(True)
        else:
            with pytest.raises(EnvironmentUnfit, match="program is missing at right0 ingress"):
                turn_on(True)
        assert api.get(OWN) is None
        put_back_leftovers(tmp_path / "undo")
    said = capsys.readouterr().err
    assert "bpfLogLevel: (not set) -> Debug" in said
    assert said.endswith("bpfLogLevel and bpfLogFilters of FelixConfiguration node.a are as before\n")
