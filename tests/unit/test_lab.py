"""The lab's plain data: names, record, policy rules, what status prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calitrace.calico.policy import rule_names
from calitrace.errors import EnvironmentUnfit, UsageError
from calitrace.lab import policy, report, servers, state, topology
from calitrace.lab.topology import Lab


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(topology, "RUNTIME", tmp_path)
    monkeypatch.setattr(topology, "BPFFS", tmp_path)
    return Lab("one")


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a b", "x" * 25])
def test_names_that_would_make_bad_paths_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Lab(name)


def test_parts_that_do_not_exist_are_refused(lab: Lab) -> None:
    assert lab.namespace("node-a") == "one-node-a"
    with pytest.raises(UsageError, match="node-c"):
        lab.namespace("node-c")


def test_the_record_survives_the_disk(lab: Lab) -> None:
    assert state.load(lab) is None
    kept = state.State(namespaces=["one-client"], servers=[state.Server("pod-a", 17, 23)], fault="rpf")
    state.save(lab, kept)
    assert state.load(lab) == kept
    state.forget(lab)
    assert state.load(lab) is None


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"{}", b'{"version":1}', b'{"version":2,"servers":[]}'])
def test_a_record_that_is_none_is_named(lab: Lab, raw: bytes) -> None:
    lab.state_file.write_bytes(raw)
    with pytest.raises(EnvironmentUnfit, match="is not a record"):
        state.load(lab)


def test_rule_ids_are_64_bit_fnv_1a_of_the_nflog_prefix() -> None:
    # The empty name shows the hash itself: FNV-1a of b"DPI0|".
    expected = 0xCBF29CE484222325
    for byte in b"DPI0|":
        expected = (expected ^ byte) * 0x100000001B3 % 2**64
    assert policy.Rule("", "deny", "ingress").id == expected


@pytest.mark.parametrize(("denied", "rule"), [(False, policy.ALLOW_INGRESS), (True, policy.DENY_INGRESS)])
def test_debug_files_lead_from_id_to_rule(lab: Lab, denied: bool, rule: policy.Rule) -> None:
    for node in topology.NODES:
        lab.policy_directory(node.name).mkdir(parents=True)
    policy.write_debug_files(lab, denied=denied)
    files = lab.policy_directory("node-b")
    names = rule_names((files / "calif00dbeef012_ingress_v4.json").read_bytes())
    assert names == {rule.id: f"{rule.policy} rule 0 ({rule.action})"}
    node_a = json.loads((lab.policy_directory("node-a") / "cali1a2b3c4d5e6_ingress_v4.json").read_text())
    assert (node_a["ifacename"], node_a["hook"], node_a["error"]) == ("cali1a2b3c4d5e6", "tc egress", "")
    assert f"Rule MatchID: {policy.ALLOW_INGRESS.id}" in node_a["policyInfo"][0]["comments"]


def test_status_of_an_absent_lab_has_the_same_keys(lab: Lab) -> None:
    absent = report.inspect(lab)
    state.save(lab, state.State(servers=[state.Server("pod-a", 2**22 + 1, 1)]))
    broken = report.inspect(lab)
    assert list(absent) == list(broken)
    assert (absent["state"], broken["state"]) == ("absent", "incomplete")
    assert "namespace one-client" in broken["missing"]
    assert "server in pod-a" in broken["missing"]


def test_status_fits_80_columns() -> None:
    seen = report.inspect(Lab("x" * 9))
    longest = report.lines(
        {**seen, "state": "incomplete", "missing": [], "fault": "vxlan-blocked", "log_level": "debug"}
    )
    assert max(map(len, longest)) <= 80


def test_the_large_body_never_changes() -> None:
    body = servers.body()
    assert len(body) == 10_000_000
    assert body[:8].hex() == BODY_START
    assert body[-8:].hex() == BODY_END


BODY_START = "afec676131109700"
BODY_END = "7e0a2e37164737b9"
