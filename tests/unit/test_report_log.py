"""What ``calitrace log`` prints: text as a person reads it, JSON as docs/json.md has it, statistics that add up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_passage import END, START, TRACES, assembled, cali, eth, printed

from calitrace.calico.log import Reader
from calitrace.calico.passage import Assembler
from calitrace.model import LogLine
from calitrace.report import log as report

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
SCENARIOS = [("master", "S01"), ("master", "S07"), ("v3.28", "V02"), ("v3.17", "O02")]


def shown() -> str:
    """Some of each real trace in all forms for people, and the statistics of all."""
    parts = []
    for release, number in SCENARIOS:
        done, _, reader = assembled(TRACES[release][number][1])
        stats = report.Stats()
        for passage in done:
            stats.add(passage)
        parts += [f"## {release} {number}", *report.header()]
        parts += [line for passage in done[:7] for line in report.table_lines(passage)]
        parts += [report.compact_line(passage) for passage in done[:7]]
        parts += list(report.iter_explanation(done[0]))[:4]
        parts += list(stats.iter_lines(reader, 0))
    return "\n".join(parts) + "\n"


def test_text_of_real_traces() -> None:
    assert shown() == (GOLDEN / "log.txt").read_text()


def test_json_of_a_real_trace() -> None:
    done, _, _ = assembled(TRACES["master"]["S07"][1])
    found = "".join(f"{json.dumps(report.passage_object(passage, lines=True))}\n" for passage in done)
    assert found == (GOLDEN / "log.json").read_text()
    assert json.loads(json.dumps(report.passage_object(done[0]))).keys() == json.loads(found.splitlines()[0]).keys() - {
        "lines"
    }


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (eth(START, END), ["eth0-I: into the host; tc ingress hook", "ALLOW, return code -1: on to the host's stack"]),
        (eth("Final result=ALLOW (3). Bypass mark set."), ["ALLOW: Calico let the packet pass"]),
        (eth("Final result=ALLOW rc 5."), ["ALLOW, return code 5: unknown to us"]),
        (eth("Final result=DENY (0)."), ["DENY: the packet was dropped: the reason was not printed"]),
        (eth(START), ["no verdict: end lost"]),
        (["policy ALLOWED  proto 6 src 1.1.1.1:1 dest 2.2.2.2:2"], []),
        (cali("policy ALLOWED  proto 6 src 1.1.1.1:1 dest 2.2.2.2:2"), ["no verdict: only the policy's Log action"]),
        (["calif00d-E: Final result=DENY (ed)."], ["the name is cut to 8 characters", "allowed: source ranges"]),
        (["tc_preamble iface ens192--------- failed to call main 0"], ["a program that names no interface"]),
    ],
)
def test_words(lines: list[str], words: list[str]) -> None:
    done, cut, _ = assembled(printed(*lines))
    text = "\n".join(line for passage in done + cut for line in report.iter_explanation(passage))
    assert [each for each in words if each not in text] == []


def test_columns_without_a_header() -> None:
    (passage,), _, _ = assembled(eth("NAT: no backend", "Final result=ALLOW (0)."))
    assert " ".join(report.table_lines(passage)[0].split()) == "- - eth0-I ALLOW - - [no backend; beginning lost]"
    assert report.passage_object(passage)["cpu"] is None


def test_lines_of_no_packet() -> None:
    reader = Reader()
    (line,) = reader.read(["hello"])
    assert report.line_object(line) == {"type": "line", "form": "other", "time_ns": None, "text": "hello"}
    live = reader.line(LogLine(5_000_001_000, 3, 0, 7, "curl", "hello\n", False))
    assert report.line_text(live) == "            curl-7       [003] 5.000001: bpf_trace_printk: hello"
    assert report.line_object(live)["time_ns"] == 5_000_001_000


def test_statistics_of_nothing() -> None:
    stats = report.Stats()
    assert list(stats.iter_lines(Reader(), 7)) == ["0 lines; 7 events lost", "0 packets through a program"]
    assert report.histogram(Counter()) == []


def test_statistics_count_what_is_not_whole() -> None:
    stats, assembler, reader = report.Stats(), Assembler(), Reader()
    for line in reader.read(printed(*eth(START, START, "Final result=DENY (4)."), "x", "CPU:1 [LOST 3 EVENTS]")):
        for passage in assembler.feed(line):
            stats.add(passage)
    found = stats.to_object(reader, 3)
    assert (found["verdicts"], found["marks"]) == ({"none": 1, "DENY": 1}, {"end lost": 1})
    assert found["drops"] == {"denied by policy": 1}
    assert "         1 end lost" in list(stats.iter_lines(reader, 3))


def test_log_filters_that_are_gone() -> None:
    """With the log off that is all there is: no packet, but something to say."""
    stats, reader = report.Stats(), Reader()
    assembler = Assembler(stats.stray)
    lines = ["tc_preamble iface eth0----------- failed to call log filter 3"] * 3 + ["tc_preamble iface eth0"]
    for line in reader.read(printed(*lines)):
        assert assembler.feed(line) == []
    assert assembler.flush() == []
    assert stats.to_object(reader, 0)["filters_missing"] == {"eth0": 3}
    assert "         3 eth0" in list(stats.iter_lines(reader, 0))
    assert list(report.Stats().iter_strays()) == []


@given(st.lists(st.integers(0, 10**9), min_size=1))
def test_percentiles_are_near_and_in_order(values: list[int]) -> None:
    times: Counter[int] = Counter()
    stats = report.Stats()
    for value in values:
        lines = printed(*eth(f"Final result=ALLOW (0). Program execution time: {value}ns"))
        stats.add(assembled(lines)[0][0])
        times[value] += 1
    (place,) = stats.to_object(Reader(), 0)["interfaces"]
    exact = report.percentiles(times)
    assert list(place["execution_ns"]) == ["p50", "p90", "p99"]
    for percentile, value in exact.items():
        assert value * 0.99 - 1 <= place["execution_ns"][f"p{percentile}"] <= value
    assert sum(row["count"] for row in place["histogram"]) == len(values)
    for row, following in zip(place["histogram"], place["histogram"][1:], strict=False):
        assert row["to_ns"] + 1 == following["from_ns"]


@pytest.mark.parametrize("width", [80, 111, 112, 130])
def test_lines_that_fit_a_terminal(width: int) -> None:
    done, _, _ = assembled(TRACES["master"]["S01"][1])
    (whole,), lines = report.table_lines(done[0]), report.table_lines(done[0], width)
    assert len(lines) > 1
    assert max(map(len, lines)) <= width
    assert " ".join(" ".join(lines).split()) == " ".join(whole.split())
    packet = str(done[0].facts.flows[0])
    assert [packet in line for line in lines[:2]] == [width >= 112, width < 112]
    assert ["PACKET" in line for line in report.header(width)] == ([True] if width >= 112 else [False, True])
