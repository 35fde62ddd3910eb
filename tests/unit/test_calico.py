"""Calico's own formats, against what its real programs wrote."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import packets

from calitrace.calico import log, policy, reasons, state
from calitrace.errors import LayoutMismatch, Malformed

TRACE = Path(__file__).resolve().parent.parent / "data" / "trace-master.log"
# calico-node's lines as trace_pipe shows them: comm-pid [cpu] flags seconds: function: text
KERNEL_HEADER = re.compile(r"^.*-\d+\s+\[(?P<cpu>\d+)\]\s+\S+\s+(?P<ts>\d+\.\d+): bpf_trace_printk: (?P<text>.*)$")


def scenarios() -> dict[str, list[log.Passage]]:
    """Passages of the real trace by scenario, with the number of lines that were not tagged under ``other``."""
    found: dict[str, list[log.Passage]] = {}
    assembler, name = log.Assembler(), ""
    for line in TRACE.read_text().splitlines():
        if header := re.match(r"##### SCENARIO: (\S+)", line):
            name = header[1]
            found[name] = []
        elif match := KERNEL_HEADER.match(line):
            ktime_ns = int(float(match["ts"]) * 1e9)
            found[name] += assembler.feed(int(match["cpu"]), ktime_ns, match["text"])
    assert not list(assembler.flush())
    return found


def test_every_packet_of_the_real_trace_is_one_passage() -> None:
    text = TRACE.read_text()
    passages = [passage for each in scenarios().values() for passage in each]
    assert len(passages) == len(re.findall(r"New packet at", text))
    verdicts = Counter(passage.verdict for passage in passages)
    assert verdicts == {
        "ALLOW": len(re.findall(r"Final result=ALLOW", text)),
        "DENY": len(re.findall(r"Final result=DENY", text)),
    }


def test_the_real_drops_are_understood() -> None:
    found = scenarios()
    denied = {name: [p for p in each if p.verdict == "DENY"] for name, each in found.items()}
    assert [(p.code, p.interface, p.direction) for p in denied["S07"]] == [(11, "ens192", "I")] * 2
    assert denied["S07"][0].cause() == "the source is not in the service's source ranges"
    assert [p.code for p in denied["S08"]] == [12, 12]
    assert denied["S08"][0].cause() == "the backend is not in Calico's routes map"
    assert not any(denied[name] for name in ("S01", "S02", "S03", "S04", "S05", "S06"))
    assert any(p.no_backend() for p in found["S05"])
    first = found["S01"][0]
    assert first.decisions() == ["DNAT to 10.65.1.2:8080", "VXLAN encap"]
    assert (first.execution_ns, first.ports()) == (172987, {(40001, 30080)})


def test_older_releases_print_reasons_in_hexadecimal() -> None:
    assembler = log.Assembler()
    assembler.feed(0, 1, "ens192----------I: New packet at ifindex=2; mark=0\n")
    (passage,) = assembler.feed(0, 2, "ens192----------I: Final result=DENY (11). Program execution time: 5ns\n")
    assert passage.code == 0x11
    (passage,) = assembler.feed(0, 3, "eth0-----I: Final result=ALLOW (7). Program execution time: 5ns\n")
    assert (passage.verdict, passage.code, passage.interface) == ("ALLOW", 7, "eth0")


def test_interrupted_and_interleaved_passages() -> None:
    assembler = log.Assembler()
    start, end = "New packet at ifindex=2; mark=0", "Final result=ALLOW rc -1. Program execution time: 1ns"
    assert assembler.feed(0, 1, f"a--------------I: {start}") == []
    assert assembler.feed(1, 2, f"b--------------E: {start}") == []
    assert assembler.feed(0, 3, "No metadata is shared by XDP") == []
    assert assembler.other_lines == 1
    cut, whole = assembler.feed(0, 4, f"c--------------I: {end}")
    assert (cut.interface, cut.verdict, whole.interface, whole.verdict) == ("a", "", "c", "ALLOW")
    (whole,) = assembler.feed(1, 5, f"b--------------E: {end}")
    assert whole.interface == "b"
    assembler.feed(0, 6, "a--------------I: TCP; ports: s=1 d=2")
    (cut,) = assembler.cut(0)
    assert (cut.ports(), cut.cause(), cut.no_backend()) == ({(1, 2)}, "", False)
    assert assembler.cut(0) == []
    line = log.parse_line("IPv6 cali1----------E: x")
    assert line == log.CalicoLine("cali1", "E", "x", ipv6=True)


@given(st.text(max_size=80))
def test_any_text_is_a_line_or_not(text: str) -> None:
    line = log.parse_line(text)
    assert line is None or line.message in text


@pytest.mark.parametrize(
    ("code", "counters", "expected"),
    [
        (11, 27, "UNAUTH_SOURCE"),
        (27, 27, "ACCEPTED_BY_XDP"),
        (28, 27, "WEP_NOT_READY"),
        (27, 26, "WEP_NOT_READY"),
        (25, 26, "MAGLEV_NO_BACKEND"),
        (26, 25, "WEP_NOT_READY"),
        (18, 17, "WEP_NOT_READY"),
        (40, 27, "reason 40"),
        (14, 14, "reason 14"),
        (13, 0, "reason 13"),
        (12, 0, "RT_UNKNOWN"),
    ],
)
def test_reason_codes_move_with_the_release(code: int, counters: int, expected: str) -> None:
    assert reasons.name(code, counters) == expected


def test_state() -> None:
    raw = packets.calico_state(pol_rc=2, rules=(5, 6), reason=4)
    table = state.layout("cali_state6", 512)
    held = state.decode(raw, table)
    assert (held.pol_rc, held.rule_ids, held.calico_reason, held.result) == (2, (5, 6), 4, 2)
    assert held.denied
    assert held.holds(6, packets.CLIENT, packets.SPORT, packets.POD, packets.TARGET_PORT)
    assert not held.holds(17, packets.CLIENT, packets.SPORT, packets.POD, packets.TARGET_PORT)
    assert not held.holds(6, packets.CLIENT, packets.SPORT, packets.NODE_A, packets.NODEPORT)
    with pytest.raises(LayoutMismatch, match="cali_state9 512 B"):
        state.layout("cali_state9", 512)
    with pytest.raises(LayoutMismatch):
        state.decode(raw[:-1], table)
    for each in state.LAYOUTS:
        decoded = state.decode(bytes(each.size), each)
        assert (decoded.calico_reason is None) == (each.fwd is None)


def comments(*texts: str) -> bytes:
    """A policy debug file with one comment for each instruction."""
    return json.dumps({"ifacename": "cali1", "policyInfo": [{"inst": "", "comments": [t]} for t in texts]}).encode()


def test_rule_names() -> None:
    raw = comments(
        "Start of tier default",
        "Start of policy default.deny-web",
        'Start of rule action:"allow"',
        "Rule MatchID: 17",
        'Start of rule action:"deny" proto:tcp',
        "Rule MatchID: 0x12",
        "End of policy default.deny-web",
        "Start of NetworkPolicy ns/other 3",
        "Start of rule x",
        "Rule MatchID: 19",
    )
    assert policy.rule_names(raw) == {
        17: "default.deny-web rule 0 (allow)",
        18: "default.deny-web rule 1 (deny)",
        19: "NetworkPolicy ns/other 3 rule 0",
    }
    assert policy.rule_names(b'{"policyInfo": [5, {"comments": 6, "inst": "x"}]}') == {}
    assert policy.rule_names(b'{"policyInfo": null}') == {}


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff"])
def test_a_file_that_is_no_policy(raw: bytes) -> None:
    with pytest.raises(Malformed):
        policy.rule_names(raw)
