"""A whole report against golden files, and journals whose header is wrong."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODE_B, NODEPORT, POD, RUN_ID, SPORT, TARGET_PORT, Recorder
from tests.unit.test_verdict import B_NS, CALI, REASONS, denied_at_the_pod, to_node_b, topology

from calitrace import journal
from calitrace.cli.report import command
from calitrace.correlate.analysis import Analysis, analyse
from calitrace.errors import Malformed
from calitrace.events import HopKind
from calitrace.model import Namespace, Outcome, Role, Topology
from calitrace.report import folding, jsonlines, text

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def probe(**changed: Any) -> dict[str, Any]:
    """Probe 0, unanswered."""
    return {
        "number": 0, "proto": 6, "src": CLIENT, "sport": SPORT, "dst": NODE_A, "dport": NODEPORT, "sent_ns": 1_000_000,
        "size_bytes": 40, "outcome": Outcome.UNANSWERED.value, "rtt_ns": None, "detail": "", **changed,
    }  # fmt: skip


def recorded(**changed: Any) -> journal.Journal:
    """A journal of a probe that policy denied at the pod."""
    recorder = Recorder()
    denied_at_the_pod(recorder, log=True, state=None)
    header = {
        "run_id": RUN_ID, "vxlan_port": 4789, "drop_reasons": REASONS, "topology": topology().to_map(),
        "policy_files": ["/var/run/calico/bpf/policy/cali1_ingress_v4.json"], **changed,
    }  # fmt: skip
    return journal.Journal(header, [*recorder.records, b"short"], {0: probe()}, totals={"lost": {"hop": 1}}, cut_at=9)


def analysis() -> Analysis:
    """Its analysis."""
    found = recorded(warnings=["no BTF"])
    found.unknown["x"] += 1
    return analyse(found, short_names=True)


def test_text() -> None:
    lines = [*text.iter_report(analysis()), text.summary(analysis())]
    assert "".join(f"{line}\n" for line in lines) == (GOLDEN / "denied.txt").read_text()
    assert max(map(len, lines)) <= folding.WIDTH


def test_a_program_of_a_hop_that_was_not_seen_is_given_to_no_other_node() -> None:
    """As where the nodes' VXLAN has another port than we were told."""
    recorder = Recorder()
    to_node_b(recorder)
    del recorder.records[-2:]  # node-a sent it
    recorder.hop(HopKind.QUEUE, B_NS, CALI, packets.syn(dst=POD, dport=TARGET_PORT))
    found = recorded()
    found.events = recorder.records
    lines = list(text.iter_report(analyse(found, short_names=True)))
    (line,) = [line.split() for line in lines if "ens192-I" in line]
    assert line[1:3] == ["?", "ens192-I"]


def test_json() -> None:
    assert "".join(f"{line}\n" for line in jsonlines.iter_objects(analysis())) == (GOLDEN / "denied.json").read_text()


@pytest.mark.parametrize(
    "changed",
    [{"run_id": "x"}, {"topology": 3}, {"topology": [{}]}, {"topology": [{"inum": []}]}, {"drop_reasons": 3},
     {"rules": None}, {"warnings": 3}, {"policy_files": 3}, {"rules": {1: b"x"}}, {"drop_reasons": {2: ["x"]}},
     {"topology": [{**topology().to_map()[0], "name": None}]},
     {"topology": [{**topology().to_map()[0], "links": {2: {"ifindex": 2, "name": "eth0", "addresses": [1]}}}]},
     {"topology": [{**topology().to_map()[0], "links": {2: {"ifindex": [], "name": "eth0", "addresses": []}}}]}],
)  # fmt: skip
def test_a_wrong_header_is_malformed(changed: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        analyse(recorded(**changed))


def test_wrong_probes_and_totals_are_malformed() -> None:
    for bad in (
        {"number": 0},
        3,
        probe(outcome="?"),
        probe(more=1),
        probe(sport={}),
        probe(dst=b""),
        probe(sent_ns=[]),
    ):
        found = recorded()
        found.probes[0] = bad  # type: ignore[assignment]
        with pytest.raises(Malformed):
            analyse(found)
    for totals in ({"lost": 3}, {"lost": {"hop": "x"}}, {"changed": ["x"]}, {"changed": 3}):
        found = recorded()
        found.totals = totals
        with pytest.raises(Malformed):
            analyse(found)
    found = recorded()
    found.walks = {1: [{"lookup": "route", "key": "", "found": "", "suffers": 3}]}
    with pytest.raises(Malformed):
        analyse(found)


def written(found: journal.Journal) -> bytes:
    """That journal as a file without its end."""
    stream = io.BytesIO()
    writer = journal.Writer(stream, found.header)
    writer.write(journal.PROBES, {"probes": list(found.probes.values())})
    writer.events(found.events)
    return stream.getvalue()


@pytest.mark.parametrize("behind", [b"\xff" * 9, bytes(4096), written(recorded(run_id=1))])
def test_what_stands_before_garbage_is_reported(tmp_path: Path, behind: bytes) -> None:
    """Zeros are what a file system leaves of a file when the machine lost its power; the last: two files in one."""
    file = tmp_path / "a"
    good = written(recorded())
    file.write_bytes(good + behind)
    result = CliRunner().invoke(command, ["-r", str(file)], standalone_mode=False)
    assert "denied by policy" in result.output
    assert f"note: the journal is damaged at byte {len(good)}: what follows was not read\n" in result.output
    assert result.return_value == 0


def test_topology_round_trip() -> None:
    assert Topology.from_map(topology().to_map()) == topology()
    assert topology().owner("203.0.113.1") is None
    assert topology().link(99, 1) is None
    assert Topology({}).shortened() == Topology({})
    for names, short in (
        (("lab-node", "lab-pod"), ["node", "pod"]),
        (("cal-a", "cal-b"), ["cal-a", "cal-b"]),  # not a and b
        (("cal-pod", "cal-b"), ["cal-pod", "cal-b"]),
    ):
        found = Topology({n: Namespace(n, name, Role.NODE, {}) for n, name in enumerate(names)})
        assert [each.name for each in found.shortened().namespaces.values()] == short


def test_an_unseen_probe_is_not_judged() -> None:
    found = recorded()
    found.events = []
    assert analyse(found).verdicts[0].kind.value == "unknown"


def test_the_tunnel_is_shown() -> None:
    recorder = Recorder()
    to_node_b(recorder)
    found = recorded()
    found.events = recorder.records
    story = list(text.iter_story(analyse(found, short_names=True), 0))
    assert any(f"VXLAN {NODE_A} > {NODE_B}" in line for line in story)
