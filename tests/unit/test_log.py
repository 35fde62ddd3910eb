"""Calico's debug log against traces of real Calico programs of three eras."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace.calico.log import Assembler, Passage, parse_line

_DATA = Path(__file__).resolve().parent.parent / "data"
_FILES = {
    "master": _DATA / "trace-master.log",
    "v3.28": _DATA / "real-calico" / "trace-v3.28.log",
    "v3.17": _DATA / "real-calico" / "trace-v3.17.log",
}
_KERNEL = re.compile(
    r"^\s*(?P<comm>.{1,16}?)-(?P<pid>\d{1,7})\s+(?:\(\s*[\d-]+\)\s+)?\[(?P<cpu>\d{3,})\]\s+(?P<flags>\S{4,6})\s+"
    r"(?P<ts>\d+\.\d{6}):\s+(?P<fn>0x[0-9a-f]+|\w+):\s(?P<rest>.*)$"
)


def scenarios(release: str) -> dict[str, tuple[str, list[tuple[int, str]]]]:
    """Result and (CPU, text) of the lines of each scenario of a trace, by its number."""
    # Up to v3.29 the format strings end in a newline of their own; the files show it as an empty line.
    newline = "" if release == "master" else "\n"
    found: dict[str, tuple[str, list[tuple[int, str]]]] = {}
    number = ""
    for line in _FILES[release].read_text().splitlines():
        if line.startswith("##### SCENARIO: "):
            number = line.split()[2]
        elif line.startswith("##### RESULT: "):
            found[number] = (line.split()[2], [])
        elif line:
            header = _KERNEL.match(line)
            assert header is not None, line
            found[number][1].append((int(header["cpu"]), header["rest"] + newline))
    return found


TRACES = {release: scenarios(release) for release in _FILES}
CASES = [(release, number) for release, each in TRACES.items() for number in each]


def passages(lines: list[tuple[int, str]]) -> tuple[list[Passage], list[Passage]]:
    """(ended by their own last line, cut short)."""
    assembler, done = Assembler(), []
    for at, (cpu, text) in enumerate(lines):
        done += assembler.feed(cpu, at, text)
    return done, list(assembler.flush())


@pytest.mark.parametrize(("release", "number"), CASES)
def test_each_packet_is_one_passage(release: str, number: str) -> None:
    lines = TRACES[release][number][1]
    done, cut = passages(lines)
    texts = [text.rstrip("\n") for _, text in lines]
    ends = sum("Final result=" in text or text.endswith(": DENY due to policy") for text in texts)
    tagged = sum(parse_line(text) is not None for _, text in lines)
    assert (len(done), cut) == (ends, [])
    assert all(passage.verdict for passage in done)
    assert sum(len(passage.lines) for passage in done) == tagged
    if release != "v3.17":  # which prints no such line
        assert len(done) == sum("New packet at ifindex=" in text for text in texts)


_DENIED = {
    ("master", "S07"): ("ens192", "I", 11, "the source is not in the service's source ranges"),
    ("master", "S08"): ("ens192", "I", 12, "the backend is not in Calico's routes map"),
    ("v3.28", "V02"): ("calif00dbeef012", "I", None, "denied by policy"),
}
_NO_BACKEND = {("master", "S05"), ("master", "S06"), ("v3.28", "V03")}


@pytest.mark.parametrize(("release", "number"), CASES)
def test_verdicts_agree_with_what_the_client_saw(release: str, number: str) -> None:
    result, lines = TRACES[release][number]
    done, _ = passages(lines)
    denied = {(p.interface, p.direction, p.code, p.cause()) for p in done if p.verdict == "DENY"}
    expected = _DENIED.get((release, number))
    assert denied == ({expected} if expected else set())
    assert any(p.no_backend() for p in done) == ((release, number) in _NO_BACKEND)
    assert (result == "OK") == (expected is None and (release, number) not in _NO_BACKEND)


def test_ports_and_times_of_a_passage() -> None:
    first = passages(TRACES["master"]["S01"][1])[0][0]
    assert (first.interface, first.direction, first.started_ns) == ("ens192", "I", 1)
    assert first.tuples == [("10.10.0.100", "10.10.0.1", 0, 0), ("10.10.0.100", "10.10.0.1", 40001, 30080)]
    assert first.ports() == {(40001, 30080)}
    assert first.execution_ns is not None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("eth0---I: Final result=DENY (10). Program execution time: 1ns\n", 0x10),
        ("eth0---I: Final result=DENY (ed). Program execution time: 1ns\n", 0xED),
        ("eth0---I: Final result=DENY (10). Program execution time: 1ns", 10),
        ("eth0---I: Final result=DENY (ed). Program execution time: 1ns", 0xED),
        ("eth0---I: Final result=ALLOW (-1). Program execution time: 1ns\n", -1),
        ("eth0---I: Final result=ALLOW (3). Bypass mark set.", 3),
        ("eth0---I: Final result=ALLOW rc 7. Program execution time: 1ns", 7),
    ],
)
def test_number_of_the_last_line(text: str, code: int) -> None:
    (passage,) = Assembler().feed(0, 1, text)
    assert passage.code == code


def test_passages_cut_short() -> None:
    assembler = Assembler()
    assert assembler.feed(0, 1, "eth0---I: New packet at ifindex=2; mark=0") == []
    assert assembler.feed(1, 2, "eth0---I: New packet at ifindex=2; mark=0") == []
    (same,) = assembler.feed(0, 3, "eth0---I: New packet at ifindex=2; mark=0")
    (other,) = assembler.feed(0, 4, "cali1---E: New packet at ifindex=3; mark=0")
    assert [(p.interface, p.verdict, p.lines) for p in (same, other)] == 2 * [
        ("eth0", "", ["New packet at ifindex=2; mark=0"])
    ]
    assert [p.interface for p in assembler.cut(0)] == ["cali1"]
    assert assembler.cut(0) == []
    assert [(p.cpu, p.started_ns) for p in assembler.flush()] == [(1, 2)]


def test_reverse_path_check_is_a_cause_only_when_it_fails() -> None:
    failed, passed = Passage("eth0", "I", 0, 1), Passage("eth0", "I", 0, 1)
    failed.add("Host RPF check rc 4 result 0", 1)
    passed.add("Host RPF check rc 0 result 1", 1)
    assert failed.cause() == "the reverse path check of the source failed (FIB result 4)"
    assert passed.cause() == ""


def test_ports_without_addresses_and_ipv6() -> None:
    passage = Passage("eth0", "I", 0, 1)
    passage.add("UDP; ports: s=1 d=2", 1)
    assert passage.tuples == [("", "", 1, 2)]
    line = parse_line("IPv6 eth0---I: hello")
    assert line is not None
    assert (line.ipv6, line.interface, line.message) == (True, "eth0", "hello")


def test_lines_of_others_are_counted() -> None:
    assembler = Assembler()
    assert assembler.feed(0, 1, "No metadata is shared by XDP") == []
    assert assembler.other_lines == 1


_WORDS = st.sampled_from(
    ["Final result=", "DENY ", "ALLOW ", "(", "ed", "-", "12", ").", "rc ", "New packet at ifindex=2; mark=0",
     "IP s=1 d=2", "TCP; ports: s=1 d=2", "Host RPF check rc 1 result 0", "\n", "DENY due to policy"]
)  # fmt: skip


@given(st.lists(st.one_of(st.text(), st.lists(_WORDS).map(lambda w: "eth0---I: " + "".join(w)))))
def test_any_lines_are_taken(texts: list[str]) -> None:
    done, left = passages([(0, text) for text in texts])
    assert sum(len(p.lines) for p in done + left) == sum(parse_line(text) is not None for text in texts)
