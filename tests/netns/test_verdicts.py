"""The main job: each fault of the lab is found and named, by TCP and UDP, with Calico's log on and off."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calitrace.kernel import netns
from calitrace.lab import network
from calitrace.lab.topology import Lab
from tests.netns.conftest import COMMAND, calitrace, changed, on

pytestmark = pytest.mark.root
TARGETS = {"tcp": "10.10.0.1:30080", "udp": "10.10.0.1:30053"}
COUNT = 3


@pytest.fixture(params=["debug", "off"])
def level(request: pytest.FixtureRequest, lab: Lab) -> str:
    """The lab at this log level."""
    assert on(lab, "log-level", request.param).returncode == 0
    return str(request.param)


@pytest.fixture
def healed(lab: Lab) -> Iterator[Lab]:
    """The lab, healed afterwards."""
    yield lab
    assert on(lab, "heal").returncode == 0


def verdicts(lab: Lab, proto: str, target: str, size: int = 0) -> list[dict[str, Any]]:
    """Trace some probes; the report of the journal alone must say the same as the live run."""
    with tempfile.TemporaryDirectory() as directory:
        journal = str(Path(directory) / "a.calitrace")
        live = calitrace(
            *("probe", "nodeport", target, "--proto", proto, "-c", str(COUNT), "--rate", "100", "--timeout", "0.3"),
            *("--size", str(size), "--from", lab.namespace("client"), "--trace", "-w", journal, "-o", "json"),
        )
        offline = calitrace("report", "-r", journal, "-o", "json")
    assert live.returncode in (0, 1), live.stderr
    assert offline.stdout == live.stdout
    *probes, summary = [json.loads(line) for line in live.stdout.splitlines()]
    assert [probe["number"] for probe in probes] == list(range(COUNT))
    assert summary["events_lost"] == 0
    return probes


@contextlib.contextmanager
def fabric(lab: Lab, rule: str) -> Iterator[None]:
    """The fabric forwards by one rule of nftables."""
    chain = f"table bridge lab {{\nchain way {{\ntype filter hook forward priority 0\n{rule}\n}}\n}}\n"
    with netns.inside(lab.namespace("fabric")):
        subprocess.run(["nft", "-f", "-"], input=chain, text=True, check=True)
    try:
        yield
    finally:
        with netns.inside(lab.namespace("fabric")):
            subprocess.run(["nft", "delete", "table", "bridge", "lab"], check=True)


def shown(probe: dict[str, Any]) -> str:
    """What the command behind a verdict prints."""
    words = shlex.split(probe["next"])
    if words[0] == "calitrace":
        done = calitrace(*words[1:])
        assert done.returncode in (0, 1), done.stderr
    else:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout


def only(values: list[Any]) -> Any:
    """The one value that all have."""
    assert all(value == values[0] for value in values), values
    return values[0]


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_healthy_through_both_nodes(lab: Lab, level: str, proto: str) -> None:
    for probe in verdicts(lab, proto, TARGETS[proto]):
        assert probe["verdict"] == "answered"
        way = [(hop["namespace"].removeprefix(f"{lab.name}-"), hop["direction"]) for hop in probe["hops"]]
        first_seen = list(dict.fromkeys(way))
        request = [place for place, direction in first_seen if direction == "request"]
        reply = [place for place, direction in first_seen if direction == "reply"]
        assert request == ["client", "node-a", "node-b", "pod-b"]
        assert reply == ["pod-b", "node-b", "node-a", "client"]
        tags = {(log["interface"], log["policy_direction"]) for hop in probe["hops"] for log in hop["calico_log"]}
        wanted = {("ens192", "I"), ("eth0", "I"), ("calif00dbeef012", "I"), ("calif00dbeef012", "E"), ("eth0", "E")}
        assert (wanted <= tags) if level == "debug" else not tags


@pytest.mark.parametrize(("proto", "target"), [("tcp", "10.10.0.1:30081"), ("udp", "10.10.0.1:30054")])
def test_healthy_to_a_local_pod(lab: Lab, proto: str, target: str) -> None:
    for probe in verdicts(lab, proto, target):
        assert probe["verdict"] == "answered"
        assert not any(hop["tunnelled"] for hop in probe["hops"])


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_vxlan_blocked(healed: Lab, level: str, proto: str) -> None:
    assert on(healed, "fault", "vxlan-blocked").returncode == 0
    probes = verdicts(healed, proto, TARGETS[proto])
    assert only([p["verdict"] for p in probes]) == "underlay"
    assert only([p["confidence"] for p in probes]) == "proven"
    assert only([p["place"]["namespace"] for p in probes]) == healed.namespace("node-a")
    assert only([p["to"]["namespace"] for p in probes]) == healed.namespace("node-b")


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_policy_deny(healed: Lab, level: str, proto: str) -> None:
    assert on(healed, "fault", "policy-deny").returncode == 0
    probes = verdicts(healed, proto, TARGETS[proto])
    assert only([p["verdict"] for p in probes]) == "dropped"
    assert only([p["confidence"] for p in probes]) == "proven"
    assert only([p["calico_reason"] for p in probes]) == "DROPPED_BY_POLICY"
    assert only([p["rules"] for p in probes]) == ["default.deny-lab-clients rule 0 (deny)"]
    assert only([p["place"] for p in probes]) == {
        "namespace": healed.namespace("node-b"),
        "interface": "calif00dbeef012",
        "hook": "tc egress",
    }
    assert "// Start of policy default.deny-lab-clients\n" in shown(probes[0])


def test_no_backend(healed: Lab, level: str) -> None:
    assert on(healed, "fault", "no-backend").returncode == 0
    probes = verdicts(healed, "tcp", TARGETS["tcp"])
    assert only([p["verdict"] for p in probes]) == "no-backend"
    assert only([p["confidence"] for p in probes]) == ("proven" if level == "debug" else "likely")
    assert only([p["place"]["namespace"] for p in probes]) == healed.namespace("node-a")
    said = "Calico's maps after it: NAT backend service 1: none: refused with an ICMP error"
    assert all(said in probe["evidence"] for probe in probes)
    assert "frontend without backend: refused with an ICMP error" in shown(probes[0])


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_rpf(healed: Lab, level: str, proto: str) -> None:
    assert on(healed, "fault", "rpf").returncode == 0
    probes = verdicts(healed, proto, TARGETS[proto])
    assert only([p["verdict"] for p in probes]) == "dropped"
    assert only([p["by_calico"] for p in probes]) is True
    assert only([p["place"] for p in probes]) == {
        "namespace": healed.namespace("node-a"),
        "interface": "ens192",
        "hook": "tc ingress",
    }
    said = "reverse path check" if level == "debug" else "it seems: reverse path"
    assert all(said in probe["cause"] for probe in probes)
    back = f"{healed.namespace('node-a')} reaches 10.10.0.100 by cali1a2b3c4d5e6"
    assert all(probe["cause"].endswith(back) for probe in probes)
    assert "dev cali1a2b3c4d5e6" in shown(probes[0])


def test_no_route_to_the_backend(lab: Lab, level: str) -> None:
    probes = verdicts(lab, "tcp", "10.10.0.1:30087")
    assert only([p["calico_reason"] for p in probes]) == "RT_UNKNOWN"
    assert only([p["confidence"] for p in probes]) == "proven"
    assert "no route: dropped, RT_UNKNOWN" in shown(probes[0])


@pytest.mark.parametrize(("proto", "size"), [("udp", 1470), ("tcp", 1430)])
def test_too_big_for_the_tunnel(lab: Lab, level: str, proto: str, size: int) -> None:
    probes = verdicts(lab, proto, TARGETS[proto], size)  # each, also after the first was told the path's MTU
    assert only([p["verdict"] for p in probes]) == "too-big"
    assert only([p["confidence"] for p in probes]) == ("proven" if level == "debug" else "likely")
    assert only([p["cause"].rpartition("; ")[2] for p in probes]) == "MTU 1450"
    assert only([p["place"]["namespace"] for p in probes]) == lab.namespace("node-a")


@pytest.mark.parametrize(("proto", "size", "kind"), [("udp", 1450, "too-big"), ("tcp", 0, "no-backend")])
def test_a_refusal_that_never_comes_back(lab: Lab, proto: str, size: int, kind: str) -> None:
    """The client sees a timeout, as behind a firewall that drops ICMP."""
    target = TARGETS["udp"] if proto == "udp" else "10.10.0.1:30082"
    with fabric(lab, "icmp type destination-unreachable drop"):
        probes = verdicts(lab, proto, target, size)
    assert only([p["outcome"] for p in probes]) == "unanswered"
    assert only([p["verdict"] for p in probes]) == kind
    place, client = f"{lab.namespace('node-a')} ens192", lab.namespace("client")
    lost = f"that ICMP error left {place} as 10.10.0.1 and never reached {client}"
    assert all(lost in p["cause"] for p in probes)


def test_a_reply_that_the_fabric_takes(lab: Lab) -> None:
    """As a stateful firewall does that saw no request; it came back through the tunnel, so DSR is not blamed."""
    with fabric(lab, "ip daddr 10.10.0.100 tcp sport 30080 drop"):
        probes = verdicts(lab, "tcp", TARGETS["tcp"])
    assert only([p["verdict"] for p in probes]) == "return-path"
    assert only([p["place"]["namespace"] for p in probes]) == lab.namespace("node-a")
    assert all("the reply left" in p["cause"] and "DSR" not in p["cause"] for p in probes)


def test_another_vni_is_not_calicos_tunnel(lab: Lab) -> None:
    with fabric(lab, "udp dport 4789 @th,96,24 set 4096"):
        probes = verdicts(lab, "tcp", TARGETS["tcp"])
    assert only([p["verdict"] for p in probes]) == "dropped"
    assert only([p["by_calico"] for p in probes]) is False
    assert all("VXLAN on UDP 4789 with VNI 4096" in p["cause"] for p in probes)


def test_a_path_with_a_smaller_mtu_that_says_nothing(lab: Lab) -> None:
    with fabric(lab, "ip length > 1450 udp dport 4789 drop"):
        assert only([p["verdict"] for p in verdicts(lab, "udp", TARGETS["udp"])]) == "answered"
        probes = verdicts(lab, "udp", TARGETS["udp"], 1400)
    assert only([p["verdict"] for p in probes]) == "underlay"
    assert all(p["cause"].endswith("does a small probe come through (MTU)?") for p in probes)


def test_where_no_service_is_the_node_itself_refuses(lab: Lab) -> None:
    probes = verdicts(lab, "tcp", "10.10.0.1:30999")
    assert only([p["verdict"] for p in probes]) == "refused"
    assert only([p["by_calico"] for p in probes]) is False
    assert all("the node itself" in p["cause"] for p in probes)
    assert "the host itself answers, and refuses when" in shown(probes[0])


@pytest.mark.parametrize(
    ("proto", "target", "service", "listens", "verdict"),
    [("tcp", "10.10.0.1:30081", 2, False, "refused"), ("udp", "10.10.0.1:30054", 5, True, "no-reply")],
)
def test_what_listens_in_the_pod(lab: Lab, proto: str, target: str, service: int, listens: bool, verdict: str) -> None:
    """A backend with another port: nothing is there, or what never answers."""
    with contextlib.ExitStack() as stack:
        with netns.inside(lab.namespace("pod-a")):
            silent = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        silent.bind(("", 0))
        port = silent.getsockname()[1]
        backend = struct.pack("<4sHxx", socket.inet_aton("10.65.0.2"), port)
        stack.enter_context(changed(lab.pins / "node-a" / "cali_v4_nat_be", struct.pack("<II", service, 0), backend))
        probes = verdicts(lab, proto, target)
        assert only([p["verdict"] for p in probes]) == verdict
        _, *sockets = shown(probes[0]).splitlines()
        assert [f":{port} " in each for each in sockets] == [True] * listens


def test_an_interface_that_goes_meanwhile_is_not_the_underlays_loss(spare: Lab) -> None:
    assert on(spare, "up").returncode == 0
    words = ["probe", "nodeport", TARGETS["tcp"], "--from", spare.namespace("client"), "--trace", "-v", "-o", "json"]
    more = ["-c", "3", "--rate", "2", "--timeout", "0.3"]
    with subprocess.Popen([*COMMAND, *words, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        assert "answered" in run.stderr.readline()
        with network.inside(spare.namespace("node-b")) as route:
            route.link("del", index=network.index_of(route, "eth0"))
        *probes, _ = [json.loads(line) for line in run.communicate()[0].splitlines()]
    assert [(p["verdict"], p["confidence"]) for p in probes] == [("answered", "proven")] + [("underlay", "likely")] * 2
    assert probes[-1]["cause"].endswith(f"; {spare.namespace('node-b')} went, or lost an interface, meanwhile")
