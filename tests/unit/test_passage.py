"""Calico's debug log put together into packets, against traces of real Calico programs of three eras."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace.calico import passage as passage_module
from calitrace.calico.log import Form, Reader
from calitrace.calico.messages import CHAIN, NO_ROOM
from calitrace.calico.passage import Assembler, Flow, Mark, Passage
from calitrace.model import LogLine
from calitrace.packet import dissect

_DATA = Path(__file__).resolve().parent.parent / "data"
_FILES = {
    "master": _DATA / "trace-master.log",
    "v3.28": _DATA / "real-calico" / "trace-v3.28.log",
    "v3.17": _DATA / "real-calico" / "trace-v3.17.log",
}


def scenarios(release: str) -> dict[str, tuple[str, list[str]]]:
    """Result and lines of each scenario of a trace, by its number."""
    found: dict[str, tuple[str, list[str]]] = {}
    number = ""
    for line in _FILES[release].read_text().splitlines():
        if line.startswith("##### SCENARIO: "):
            number = line.split()[2]
        elif line.startswith("##### RESULT: "):
            found[number] = (line.split()[2], [])
        else:
            found[number][1].append(line)
    return found


TRACES = {release: scenarios(release) for release in _FILES}
CASES = [(release, number) for release, each in TRACES.items() for number in each]


def assembled(raw: list[str]) -> tuple[list[Passage], list[Passage], Reader]:
    """(ended by their own last line, cut short by the end of input, the reader)."""
    reader, assembler, done = Reader(), Assembler(), []
    for line in reader.read(raw):
        done += assembler.feed(line)
    return done, assembler.flush(), reader


def printed(*texts: str, comm: str = "curl", pid: int = 7, cpu: int = 0) -> list[str]:
    """Lines as trace_pipe shows them."""
    return [f"{comm:>16}-{pid:<7} [{cpu:03d}] ..s2.     5.000001: bpf_trace_printk: {text}" for text in texts]


START = "New packet at ifindex=2; mark=0"
END = "Final result=ALLOW rc -1. Program execution time: 5ns"


def eth(*messages: str) -> list[str]:
    """The lines of eth0's ingress program."""
    return [f"eth0------------I: {message}" for message in messages]


def cali(*messages: str) -> list[str]:
    """The lines of a program on a pod's interface."""
    return [f"cali1-----------E: {message}" for message in messages]


@pytest.mark.parametrize(("release", "number"), CASES)
def test_each_packet_is_one_passage(release: str, number: str) -> None:
    lines = TRACES[release][number][1]
    done, cut, reader = assembled(lines)
    ends = sum("Final result=" in line or line.endswith(": DENY due to policy") for line in lines)
    assert (len(done), cut) == (ends, [])
    assert all(passage.verdict and not passage.marks for passage in done)
    assert (reader.counts[Form.CALICO], reader.counts[Form.BLANK]) == (
        len([each for each in lines if each]),
        lines.count(""),
    )
    assert reader.total == len(lines)
    assert sorted(line.raw for passage in done for line in passage.lines) == sorted(each for each in lines if each)
    for passage in done:
        assert len({(line.context.pid, line.context.cpu) for line in passage.lines}) == 1
    if release != "v3.17":  # which prints no such line
        assert len(done) == sum(START[:22] in line for line in lines)


_DENIED = {
    ("master", "S07"): ("ens192", "I", 11, "UNAUTH_SOURCE", "the source is not in the service's source ranges"),
    ("master", "S08"): ("ens192", "I", 12, "RT_UNKNOWN", "the backend is not in Calico's routes map"),
    ("v3.28", "V02"): ("calif00dbeef012", "I", None, "", "denied by policy"),
}
_NO_BACKEND = {("master", "S05"), ("master", "S06"), ("v3.28", "V03")}


@pytest.mark.parametrize(("release", "number"), CASES)
def test_verdicts_agree_with_what_the_client_saw(release: str, number: str) -> None:
    result, lines = TRACES[release][number]
    done, _, _ = assembled(lines)
    denied = {(p.interface, p.direction, p.code, p.calico_reason, p.cause()) for p in done if p.verdict == "DENY"}
    expected = _DENIED.get((release, number))
    assert denied == ({expected} if expected else set())
    assert any(p.no_backend() for p in done) == ((release, number) in _NO_BACKEND)
    assert (result == "OK") == (expected is None and (release, number) not in _NO_BACKEND)


# The way of the first SYN through a NodePort with a remote backend: the same in all eras but for what is printed.
CLIENT, NODE_A, NODE_B, POD = "10.10.0.100", "10.10.0.1", "10.10.0.2", "10.65.1.2"


@pytest.mark.parametrize(
    ("release", "number", "sport", "outer"), [("master", "S01", 40001, 59841), ("v3.28", "V01", 43001, 4789)]
)
def test_the_way_of_a_syn(release: str, number: str, sport: int, outer: int) -> None:
    done, _, _ = assembled(TRACES[release][number][1])
    entry, leaving, arriving, to_pod, from_pod = done[:5]
    syn, at_pod = Flow(6, CLIENT, sport, NODE_A, 30080), Flow(6, CLIENT, sport, POD, 8080)
    assert (entry.interface, entry.tag.hook, entry.facts.flows) == ("ens192", "ingress", [syn])
    assert (entry.facts.after_nat, entry.facts.tunnel_to) == (at_pod, NODE_B)
    assert (entry.facts.conntrack, entry.facts.policy) == ("new", "no policy, allow")
    assert entry.facts.forwarding == "to ifindex 2"
    assert (leaving.interface, leaving.tag.hook) == ("ens192", "egress")
    assert arriving.facts.flows == [Flow(17, NODE_A, outer, NODE_B, 4789), syn]
    assert arriving.ports() == {(outer, 4789), (sport, 30080)}
    assert (arriving.facts.tunnel_from, arriving.facts.after_nat) == (NODE_A, at_pod)
    assert (to_pod.tag.workload, to_pod.tag.hook, to_pod.facts.flows) == (True, "egress", [at_pod])
    assert (from_pod.tag.hook, from_pod.facts.conntrack) == ("ingress", "established, SNAT")
    assert from_pod.facts.after_nat == Flow(6, NODE_A, 30080, CLIENT, sport)
    assert (entry.execution_ns or 0) > 0
    assert entry.decisions() == [f"DNAT to {POD}:8080", f"VXLAN encap to {NODE_B}"]
    assert arriving.decisions() == [f"VXLAN decap from {NODE_A}", f"DNAT to {POD}:8080"]


def test_a_kernel_that_prints_no_addresses() -> None:  # before Linux 5.13 a line with %pI4 is not printed at all
    lines = [line for line in TRACES["master"]["S01"][1] if CLIENT not in line and NODE_A not in line]
    arriving = assembled(lines)[0][2]
    assert arriving.decisions()[0] == "VXLAN decap"


def test_the_oldest_era() -> None:
    done, _, _ = assembled(TRACES["v3.17"]["O01"][1])
    to_pod, from_pod = done[4:6]
    assert (to_pod.interface, to_pod.tag.cut, to_pod.tag.is_of("calif00dbeef012")) == ("calif00d", True, True)
    assert to_pod.facts.flows == [Flow(6, CLIENT, 44001, POD, 8080)]
    assert (to_pod.facts.conntrack, to_pod.rc, to_pod.code) == ("new", -1, None)
    assert (from_pod.facts.conntrack, from_pod.facts.tunnel_to) == ("established, SNAT", NODE_A)
    assert from_pod.facts.forwarding == "FIB NO_NEIGH"


@pytest.mark.parametrize(
    ("lines", "code", "reason"),
    [
        (["eth0-----I: Final result=DENY (10). Program execution time: 1ns"], 0x10, "reason 16"),
        (["eth0-----I: Final result=DENY (e). Program execution time: 1ns"], 14, "WEP_NOT_READY"),
        (["eth0-----I: Final result=DENY (ed). Program execution time: 1ns"], 0xED, "UNAUTH_SOURCE"),
        (eth("Final result=DENY (b). Program execution time: 1ns"), 11, "UNAUTH_SOURCE"),
        (eth("Final result=DENY (4). Program execution time: 1ns"), 4, "DROPPED_BY_POLICY"),
        (eth("Final result=DENY (0). Program execution time: 1ns"), 0, ""),
        (eth("Final result=DENY (10). Program execution time: 1ns"), None, "reason 10, hexadecimal or decimal"),
        (eth(START, "IP s=1.2.3.4 d=1.2.3.5", "Final result=DENY (11)."), 11, "UNAUTH_SOURCE"),
        (eth(START, "IP s=CLIENT d=NODE", "Final result=DENY (11)."), 11, "UNAUTH_SOURCE"),
        (eth(START, "IP s=a0a0001 d=a0a0002", "Final result=DENY (11)."), 0x11, "reason 17"),
        (eth("Final result=ALLOW (3). Bypass mark set."), 3, ""),
        (eth("Final result=ALLOW (-1). Program execution time: 1ns"), None, ""),
    ],
)
def test_the_reason_of_the_last_line(lines: list[str], code: int | None, reason: str) -> None:
    (passage,), _, _ = assembled(printed(*lines))
    assert (passage.code, passage.calico_reason) == (code, reason)


def test_a_newline_of_their_own_shows_the_old_releases() -> None:
    first, second = assembled(
        [each for line in printed(*eth("Final result=DENY (10).", "Final result=DENY (10).")) for each in (line, "")]
    )[0]
    assert (first.code, second.code) == (None, 0x10)
    live, new = (
        Assembler().feed(Reader().line(LogLine(1, 0, 0, 7, "curl", eth("Final result=DENY (10).")[0] + end, False)))[0]
        for end in ("\n", "")
    )
    assert (live.code, new.code) == (0x10, 10)


def test_what_the_program_returned() -> None:
    (passage,), _, _ = assembled(printed(*eth("Final result=ALLOW rc 7. Program execution time: 1ns")))
    assert (passage.rc, passage.code, passage.execution_ns) == (7, None, 1)


# -- whose lines ------------------------------------------------------------------------------------------


def test_cpus_are_kept_apart() -> None:
    one, two = printed(*eth(START, END), cpu=0), printed(*eth(START, END), cpu=1)
    done, cut, _ = assembled([one[0], two[0], two[1], one[1]])
    assert [(p.cpu, len(p.lines), p.marks) for p in done] == [(1, 2, []), (0, 2, [])]
    assert cut == []


def test_an_interrupted_packet_goes_on() -> None:
    done, cut, _ = assembled(printed(*eth(START), *cali(START, END), *eth("CT: result: NEW.", END)))
    assert [(p.interface, len(p.lines), p.marks) for p in done] == [
        ("cali1", 2, []),
        ("eth0", 3, [Mark.INTERRUPTED]),
    ]
    assert cut == []


def test_a_packet_whose_end_was_lost() -> None:
    done, cut, _ = assembled(printed(*eth(START), *eth(START, END)))
    assert [(len(p.lines), p.verdict, p.marks) for p in done] == [(1, "", [Mark.END_LOST]), (2, "ALLOW", [])]
    done, cut, _ = assembled(printed(*eth(START), *cali(START, END), *eth(START, END)))
    assert [(p.interface, p.marks) for p in done] == [("cali1", []), ("eth0", [Mark.END_LOST]), ("eth0", [])]
    assert cut == []


@pytest.mark.parametrize(
    ("lines", "marks"),
    [
        (["eth0-----I: CT-6 result: NEW.", "eth0-----I: Final result=ALLOW (0)."], [[]]),
        (
            [f"eth0-----I: {each}" for each in (START, "Final result=ALLOW (0).", "CT-6 result: NEW.")],
            [[], [Mark.BEGINNING_LOST, Mark.END_LOST]],
        ),
        (eth("Workload RPF fail: missing route.", "Final result=DENY (0)."), [[]]),
        (eth("CT: result: NEW.", END), [[Mark.BEGINNING_LOST]]),
        (eth("policy allow prog at 2", "policy deny prog at 4", END), [[Mark.BEGINNING_LOST]]),
        (eth(END), [[Mark.BEGINNING_LOST]]),
        (eth("Final result=ALLOW (-1). Program execution time: 5ns"), [[]]),
    ],
)
def test_a_beginning_is_lost_only_where_the_release_prints_one(lines: list[str], marks: list[list[Mark]]) -> None:
    done, cut, _ = assembled(printed(*lines))
    assert [p.marks for p in done + cut] == marks


def test_the_lines_of_two_tasks_are_two_packets() -> None:
    done, cut, _ = assembled(printed(*eth(START), pid=7) + printed(*eth("CT: result: NEW.", END), pid=8))
    assert [(p.pid, p.marks) for p in done] == [(8, [Mark.BEGINNING_LOST])]
    assert [(p.pid, p.marks) for p in cut] == [(7, [Mark.END_LOST])]


def test_tasks_that_take_turns_on_a_cpu() -> None:
    one, two = (
        printed(*lines, pid=pid)
        for pid, lines in ((1, eth(START, "CT: Miss.", "CT Hit", END)), (2, cali(START, "CT Hit", END)))
    )
    done, cut, _ = assembled([one[0], two[0], one[1], two[1], one[2], one[3], two[2]])
    assert [(p.pid, len(p.lines), p.verdict, p.marks) for p in done] == [
        (1, 4, "ALLOW", [Mark.INTERRUPTED]),
        (2, 3, "ALLOW", [Mark.INTERRUPTED]),
    ]
    assert cut == []


def test_the_outer_program_goes_on_when_the_end_of_the_inner_was_lost() -> None:
    done, _, _ = assembled(printed(*eth(START), *cali(START), *eth("CT: result: NEW.", END)))
    assert [(p.interface, p.marks) for p in done] == [("cali1", [Mark.END_LOST]), ("eth0", [Mark.INTERRUPTED])]


def test_more_programs_than_can_interrupt_each_other() -> None:
    lines = [f"cali{n}-----------E: {START}" for n in range(5)]
    done, cut, _ = assembled(printed(*lines))
    assert [p.interface for p in done] == ["cali0"]
    assert [p.interface for p in cut] == [f"cali{n}" for n in range(1, 5)]


def test_nothing_goes_on_over_events_that_found_no_room() -> None:
    reader, assembler = Reader(), Assembler()
    first, second = (
        LogLine(n, 0, lost, 7, "curl", text, False) for n, lost, text in ((1, 0, eth(START)[0]), (2, 9, eth(END)[0]))
    )
    done = [
        *assembler.feed(reader.line(first)),
        *assembler.feed(reader.lost(second)),
        *assembler.feed(reader.line(second)),
    ]
    assert [p.marks for p in done] == [[Mark.END_LOST], [Mark.BEGINNING_LOST]]
    assert (reader.lost(second).raw, reader.total, reader.events_lost) == ("CPU:0 [LOST 9 EVENTS]", 2, 0)


def test_nothing_goes_on_over_lost_lines() -> None:
    done, cut, reader = assembled(
        [*printed(*eth(START)), "CPU:0 [LOST 9 EVENTS]", *printed(*eth("CT: result: NEW.", END))]
    )
    assert [p.marks for p in done] == [[Mark.END_LOST], [Mark.BEGINNING_LOST]]
    assert (cut, reader.events_lost, reader.counts[Form.LOST]) == ([], 9, 1)
    assert Assembler().feed(next(Reader().read(["CPU:0 [LOST EVENTS]"]))) == []


# -- lines without a tag ----------------------------------------------------------------------------------

METADATA = "No metadata is shared by XDP"


def test_the_line_before_the_first() -> None:
    done, _, _ = assembled(printed(METADATA, *eth(START, END)))
    assert done[0].texts == [METADATA, START, END]
    done, _, _ = assembled(printed(METADATA, pid=1) + printed(*eth(START, END), pid=2))
    assert done[0].texts == [START, END]


def test_lines_in_front_of_a_program_that_does_not_come() -> None:
    unclaimed: list[str] = []
    assembler = Assembler(lambda line: unclaimed.append(line.text))
    lines = [*printed(METADATA, METADATA, pid=1), *printed(METADATA, pid=2), *printed(*eth(START, END), pid=3),
             *printed(METADATA), "CPU:0 [LOST 1 EVENTS]", *printed(METADATA)]  # fmt: skip
    done = [passage for line in Reader().read(lines) for passage in assembler.feed(line)]
    assert [p.texts for p in done + assembler.flush()] == [[START, END]]
    assert unclaimed == [METADATA] * 5


def test_a_preamble_that_cannot_enter_the_chain() -> None:
    assembler = Assembler()
    (line,) = Reader().read(printed("Main program not loaded for IP packet version 2048, DROP"))
    assert [(p.interface, p.verdict) for p in assembler.feed(line)] == [("", "DENY")]
    assert assembler.attached


def preamble(*texts: str) -> list[str]:
    """Lines of ens192's preamble."""
    return [f"tc_preamble iface ens192--------- {text}" for text in texts]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (preamble("failed to call main 0"), [("ens192", "DENY", 1)]),
        (preamble("failed to call main 0", "failed to call main 0"), [("ens192", "DENY", 1), ("ens192", "DENY", 1)]),
        (
            preamble("failed to call main 0", "jump to 9", "failed to call debug main 9", "failed to call main 0"),
            [("ens192", "DENY", 4)],
        ),
        ([*preamble("failed to call main 0"), *eth(START, END)], [("ens192", "DENY", 1), ("eth0", "ALLOW", 2)]),
        ([*preamble("failed to call main 0", "jump to 9"), *eth(START, END)], [("eth0", "ALLOW", 4)]),
        ([*preamble("failed to call log filter 3"), *eth(START, END)], [("eth0", "ALLOW", 3)]),
        ([*preamble("failed to call log filter 3")], []),
        (  # each is another packet's, with the log off
            [*preamble("failed to call log filter 3", "failed to call log filter 3"), *eth(START, END)],
            [("eth0", "ALLOW", 3)],
        ),
        (
            [
                "tc_preamble iface ens192---------",
                *preamble("failed to call log filter 3", "jump to 0"),
                *eth(START, END),
            ],
            [("eth0", "ALLOW", 5)],
        ),
        (  # what another interface printed is not this packet's
            ["tc_preamble iface cali1---------- failed to call log filter 3", *preamble("failed to call main 0")],
            [("ens192", "DENY", 1)],
        ),
        (
            [*preamble("failed to call main 0"), METADATA, *eth(START, END)],
            [("ens192", "DENY", 1), ("eth0", "ALLOW", 3)],
        ),
        (
            [*preamble("failed to call main 0", "jump to 9"), METADATA, *eth(START, END)],
            [("eth0", "ALLOW", 5)],
        ),
        (
            ["tc_preamble iface ens192---------", *preamble("jump to 0"), METADATA, *eth(START, END)],
            [("eth0", "ALLOW", 5)],
        ),
        (
            ["tc_preamble iface eth0-----------", "tc_preamble iface eth0-----------", *eth(START, END)],
            [("eth0", "ALLOW", 3)],
        ),
        (["tc_preamble iface ens192---------", *preamble("failed to call main 0")], [("ens192", "DENY", 2)]),
        (["xdp_preamble iface ens192--------- failed to call main 0"], [("ens192", "DENY", 1)]),
    ],
)
def test_what_a_preamble_could_not_call(lines: list[str], found: list[tuple[str, str, int]]) -> None:
    done, cut, _ = assembled(printed(*lines))
    assert [(p.interface, p.verdict, len(p.lines)) for p in done + cut] == found
    assert all("preamble" in p.cause() for p in done + cut if p.interface == "ens192")


def test_with_dsr_the_pods_program_translates_nothing() -> None:
    parsed = (f"IP s={POD} d={CLIENT}", "TCP; ports: s=8080 d=40001", f"CT: SNAT from {NODE_A}:30080")
    ((passage,), _, _) = assembled(eth(START, *parsed, "DSR enabled, skipping SNAT + encap", END))
    assert passage.decisions() == ["DSR: SNAT is left to the uplink"]
    assert passage.facts.after_nat is None
    ((passage,), _, _) = assembled(eth(START, *parsed, END))
    assert passage.decisions() == [f"SNAT from {NODE_A}:30080"]


def test_untagged_lines_inside_a_packet() -> None:
    done, _, _ = assembled(printed(*eth(START), "no globals: DROP"))
    assert [(p.texts, p.verdict) for p in done] == [([START, "no globals: DROP"], "DENY")]
    assembler = Assembler()
    lines = Reader().read(
        printed("connlimit: decremented count to 1/2", *eth(START), "connlimit: decremented count to 1/2")
    )
    attached = []
    for line in lines:
        assembler.feed(line)
        attached.append(assembler.attached)
    assert attached == [False, False, True]


def test_lines_of_others_are_no_packets() -> None:
    done, cut, reader = assembled(printed("hello: world", "CTLB------------: NAT miss."))
    assert (done, cut) == ([], [])
    assert (reader.counts[Form.OTHER], reader.total) == (1, 2)


@pytest.mark.parametrize(
    "before", ["", "  12\t", "> ", "2026-01-02T03:04:05Z stdout F ", "calico-node-x7k2p calico-node | "]
)
def test_pasted_lines_without_a_header(before: str) -> None:
    done, _, reader = assembled([before + line for line in eth(START, END)])
    assert [(p.interface, p.cpu, p.verdict, p.execution_ns) for p in done] == [("eth0", -1, "ALLOW", 5)]
    assert reader.counts[Form.CALICO] == 2


def test_a_cache_that_is_full_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calitrace.calico.log._CACHED", 3)
    for release, number in CASES[:3]:
        raw = TRACES[release][number][1]
        assert [line[:3] for line in Reader().read(raw)] == [line[:3] for each in raw for line in Reader().read([each])]


def test_connect_time_and_comments_are_kept_apart() -> None:
    lines = list(Reader().read([*printed("CALI-C: NAT miss."), "# tracer: nop"]))
    assert [(line.form, line.tag and (line.tag.program, line.tag.hook)) for line in lines] == [
        (Form.CALICO, ("CTLB", "")),
        (Form.OTHER, None),
    ]


# -- single lines -----------------------------------------------------------------------------------------


def test_the_log_action_of_a_policy() -> None:
    action = "policy {}  proto 6 src 10.0.0.1:1 dest 10.0.0.2:80"
    allowed, denied = assembled(printed(*cali(action.format("ALLOWED"), action.format("DENIED"))))[0]
    assert (allowed.verdict, allowed.facts.policy) == ("", "allow")
    assert (denied.verdict, denied.facts.policy) == ("DENY", "deny")
    assert denied.facts.flows == [Flow(6, "10.0.0.1", 1, "10.0.0.2", 80)]


@pytest.mark.parametrize(("release", "number"), [("master", "S08"), ("v3.28", "V02")])
def test_a_trace_cut_anywhere_has_the_packets_of_its_lines(release: str, number: str) -> None:
    lines = [line for line in TRACES[release][number][1] if line]
    done, _, _ = assembled(lines)
    owner = {id(line.raw): at for at, passage in enumerate(done) for line in passage.lines if line.tag}
    for cut in range(len(lines)):
        for part in (lines[:cut], lines[cut:]):
            found, rest, _ = assembled(part)
            assert len(found + rest) == len({owner[id(line)] for line in part if id(line) in owner})


def test_the_silence_by_which_the_oldest_releases_deny() -> None:
    asked = "About to jump to policy program; lack of further logs means policy dropped the packet..."
    denied = [f"eth0-----I: {each}" for each in ("CT-6 result: NEW.", asked)]
    done, cut, _ = assembled(printed(*denied, *denied))
    assert [(p.verdict, p.cause(), p.marks) for p in done] == [("DENY", "denied by policy", [])]
    assert [(p.verdict, p.cause(), p.marks) for p in cut] == [("", "", [Mark.END_LOST])]
    done, cut, _ = assembled(printed(*denied, pid=1) + printed(*denied, pid=2))
    assert [(p.verdict, p.cause(), p.marks) for p in done] == [("DENY", "denied by policy", [])]
    assert [(p.verdict, p.cause(), p.marks) for p in cut] == [("", "", [Mark.END_LOST])]
    done, cut, _ = assembled([*printed(*denied), "CPU:0 [LOST 1 EVENTS]"])
    assert [p.verdict for p in done] == [""]


PARSED = ("IP id=7 len=60", "IP s=10.0.0.1 d=10.0.0.2", "IP ihl=20 bytes", "TCP; ports: s=5 d=80")
OLD_PARSED = ("TCP; ports: s=5 d=80",)  # v3.20 to v3.24 print no more
IPV6_PARSED = (
    "IP s=[fd00::1] d=[fd00::2]",
    "ip->nexthdr 0 IPv6 options!",
    "ext nexthdr 6 hdrlen 0",
    "TCP; ports: s=5 d=80",
)

IPV6_BARE = (
    "ip->nexthdr 0 IPv6 options!",
    "loading extension at offset 54",
    "ext nexthdr 6 hdrlen 0",
    "IP ihl=48 bytes ip nexthdr 6",
    "TCP; ports: s=5 d=80",
)


def xdp(*messages: str) -> list[str]:
    """The lines of eth0's XDP program."""
    return [f"eth0------------X: {message}" for message in messages]


@pytest.mark.parametrize("parsed", [PARSED, OLD_PARSED, IPV6_PARSED, IPV6_BARE])
@pytest.mark.parametrize(
    ("messages", "verdict", "cause", "marks"),
    [
        (("About to jump to policy program.",), "", "", [Mark.NO_RESULT]),
        (("Inbound failsafe port: 22. Skip policy",), "ALLOW", "", []),
        (("About to jump to policy program at 3", "Entering calico_xdp_accepted_entrypoint",
          "Set metadata for TC: 128"), "ALLOW", "", []),
        (("Entering calico_xdp_drop", "proto=6", "pol_rc=2", "ct_rc=0"), "DENY", "denied by policy", []),
        (("Entering calico_xdp_drop", "pol_rc=2", "DENY due to policy"), "DENY", "denied by policy", []),
    ],
)  # fmt: skip
def test_xdp_prints_no_result(
    parsed: tuple[str, ...], messages: tuple[str, ...], verdict: str, cause: str, marks: list[Mark]
) -> None:
    lines = xdp(*parsed, *messages)
    done, cut, _ = assembled(printed(*lines, *lines, *eth(START, END)))
    assert cut == []
    assert [(p.tag.hook, len(p.lines), p.verdict, p.cause(), p.marks) for p in done[:2]] == [
        ("xdp", len(lines), verdict, cause, marks)
    ] * 2
    assert [(p.tag.hook, len(p.lines)) for p in done[2:]] == [("ingress", 2)]


@pytest.mark.parametrize("parsed", [PARSED[:3], IPV6_PARSED[:3], IPV6_BARE[:3], ()])
def test_xdp_drops_what_it_cannot_parse(parsed: tuple[str, ...]) -> None:
    lines = xdp(*parsed, "Too short")
    done, _, _ = assembled(printed(*lines, *lines, *eth(START, END)))
    assert [(len(p.lines), p.verdict, p.cause()) for p in done[:2]] == [
        (len(lines), "DENY", "the packet is too short")
    ] * 2


def test_xdp_before_tc_is_a_passage_of_its_own() -> None:
    accepted = xdp(*PARSED, "Entering calico_xdp_accepted_entrypoint")
    shared = ["Received metadata from XDP: 128", "Final result=ALLOW (27). Accepted by XDP."]
    done, cut, _ = assembled(printed(*accepted, *shared, *xdp("ARP: allowing packet"), METADATA, *eth(START, END)))
    assert cut == []
    assert [(p.interface, p.tag.hook, p.texts[0], len(p.lines), p.verdict) for p in done] == [
        ("eth0", "xdp", PARSED[0], 5, "ALLOW"),
        ("", "", shared[0], 2, "ALLOW"),
        ("eth0", "xdp", "ARP: allowing packet", 1, ""),
        ("eth0", "ingress", METADATA, 3, "ALLOW"),
    ]
    assert done[0].facts.policy == "allow"


def test_an_xdp_program_whose_beginning_was_lost() -> None:
    _, cut, _ = assembled(printed(*xdp("About to jump to policy program.")))
    assert [p.marks for p in cut] == [[Mark.BEGINNING_LOST, Mark.NO_RESULT]]


@pytest.mark.parametrize(
    ("last", "cause"),
    [
        ("Maglev: no backend found for svc 1, idx 2", "Maglev found no backend"),
        ("ICMP: unexpected unrelated", "an ICMP error about no known flow"),
        ("Unexpected CT result 6 after host source port collision DENY.", "unexpected conntrack result"),
    ],
)
@pytest.mark.parametrize("after", [[], eth(START, END), cali(START, END), ["CPU:0 [LOST 3 EVENTS]"]])
def test_a_drop_in_the_middle_of_the_chain_prints_no_result(last: str, cause: str, after: list[str]) -> None:
    done, cut, _ = assembled([*printed(*eth(START, last)), *(after if "LOST" in str(after) else printed(*after))])
    assert [(p.verdict, p.cause(), p.marks) for p in (done + cut)[:1]] == [("DENY", cause, [])]


def test_a_drop_that_is_the_last_only_when_another_program_follows() -> None:
    short = eth(START, "Too short")
    done, cut, _ = assembled(printed(*short, *cali(START, END), *short, *eth(START, END), *short))
    assert [(p.interface, p.verdict, p.marks) for p in done] == [
        ("eth0", "DENY", []), ("cali1", "ALLOW", []), ("eth0", "DENY", []), ("eth0", "ALLOW", []),
    ]  # fmt: skip
    assert [(p.verdict, p.cause(), p.marks) for p in cut] == [("", "the packet is too short", [Mark.END_LOST])]


def test_reverse_path_check_is_a_cause_only_when_it_fails() -> None:
    failed, passed = assembled(
        printed(
            *eth(START, "Host RPF check rc 4 result 0", "Final result=DENY (0)."),
            *eth(START, "Host RPF check rc 0 result 1", "Final result=DENY (0)."),
        )
    )[0]
    assert failed.cause() == "the reverse path check of the source failed (FIB result NOT_FWDED)"
    assert passed.cause() == ""


@pytest.mark.parametrize(
    ("said", "why"),
    [(["fib rc 0"], "the way back is by another interface"), (["fib rc 2"], "FIB result UNREACHABLE"),
     ([], "FIB result not printed")],
)  # fmt: skip
def test_reverse_path_check_of_the_first_releases_that_have_it(said: list[str], why: str) -> None:
    checks = [f"Host RPF check src=a0a0064 skb iface=2 {each}" for each in (*said, "result 0")]
    (passage,), _, _ = assembled(
        printed(*(f"eth0-----I: {each}" for each in (START, *checks, "Final result=DENY (0).")))
    )
    assert passage.cause() == f"the reverse path check of the source failed ({why})"


@pytest.mark.parametrize(
    ("parsed", "code", "name"),
    [
        ("10.0.0.1", "13", "BLACK_HOLE"), ("10.0.0.1", "16", "CT_CREATE_FAILED"), ("10.0.0.1", "20", "FRAG_WAIT"),
        ("10.0.0.1", "28", "reason 28"), ("[fd00::1]", "16", "CT_CREATE_FAILED"),
        ("a000001", "d", "BLACK_HOLE"), ("a000001", "e", "WEP_NOT_READY"),
        ("a000001", "10", "NATIFACE"), ("a000001", "f", "reason 15"), ("10.0.0.1", "11", "UNAUTH_SOURCE"),
    ],
)  # fmt: skip
def test_reasons_by_the_base_in_which_they_are_printed(parsed: str, code: str, name: str) -> None:
    for said in (f"IP s={parsed} d={parsed}", f"CT: lookup from {parsed}:0"):  # IPv6 has the second alone
        (passage,), _, _ = assembled(printed(*eth(START, said, f"Final result=DENY ({code}).")))
        assert passage.calico_reason == name


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        (["ICMP; type=8 code=0", "IP s=10.0.0.1 d=10.0.0.2"], {"flows": [Flow(1, "10.0.0.1", 0, "10.0.0.2", 0)]}),
        (["CT: lookup from [fd00::1]:1", "CT: lookup to   [fd00::2]:2"],
         {"flows": [Flow(0, "fd00::1", 1, "fd00::2", 2)]}),
        (["CT: lookup from CLIENT:1", "CT: lookup to   NODE:2"], {"flows": [Flow(0, "CLIENT", 1, "NODE", 2)]}),
        (["CT: lookup from [fd00::zz]:1"], {"flows": [Flow(0, "[fd00::zz]", 1, "", 0)]}),
        (["CT: result: 0x2301"], {"conntrack": "mid-flow miss, related, RPF failed"}),
        (["CT: result: 0x9"], {"conntrack": "result 9"}),
        (["CT: result: INVALID."], {"conntrack": "invalid"}),
        (["CT-6 result: 3"], {"conntrack": "result 3"}),
        (["CT-6 Hit! NORMAL entry.", "CT-6 result: 1"], {"conntrack": "established"}),
        (["pol_rc=2"], {"policy": "deny"}),
        (["pol_rc=0"], {"policy": ""}),
        (["pol_rc=9"], {"policy": "9"}),
        (["WEP with no policy, deny."], {"policy": "no policy, deny"}),
        (["NAT: no backend"], {"no_backend": True}),
        (["FIB lookup failed (bad input): -22."], {"forwarding": "FIB -22"}),
        (["Redirect directly to interface (7) failed."], {"forwarding": ""}),
        (["BPF CT Miss for mid-flow TCP", "BPF CT Miss but have Linux CT entry: established"],
         {"conntrack": "established, by Linux"}),
        (["CT mid-flow miss and not a Maglev failover. Fall through to iptables"], {"conntrack": "mid-flow miss"}),
        (["Maglev: HEP with no policy, allow.", "pol_rc=1"], {"policy": "no policy, allow"}),
        (["pol_rc=2", "Allowing WG 10.0.0.1 <-> 10.0.0.2 despite blocked by policy - known hosts.", "pol_rc=1"],
         {"policy": "deny, overridden for WireGuard"}),
        (["IP s=10.0.0.1 d=10.0.0.2", "vxlan decap", "ICMP; type=0 code=0"],
         {"flows": [Flow(0, "10.0.0.1", 0, "10.0.0.2", 0), Flow(1)], "tunnel_from": "10.0.0.1"}),
        (["hello"], {"flows": []}),
        (["NAT: 1st level lookup addr=10.0.0.2 port=80 tcp", "src=10.0.0.1 dst=10.0.0.2", "sport=5", "dport=80"],
         {"flows": [Flow(6, "10.0.0.1", 5, "10.0.0.2", 80)]}),
        (["proto=17", "src=10.0.0.1 dst=10.0.0.2", "pre_nat=10.0.0.2:53", "sport=5"],
         {"flows": [Flow(17, "10.0.0.1", 5, "10.0.0.2", 53)]}),
        (["CT: lookup from 10.0.0.1:5", "CT: lookup to   10.0.0.2:53",
          "NAT: 1st level lookup addr=10.0.0.2 port=53 udp"],
         {"flows": [Flow(17, "10.0.0.1", 5, "10.0.0.2", 53)]}),
        (["IP s=10.0.0.9 d=10.0.0.2", "UDP; ports: s=4 d=4789", "vxlan decap", "TCP; ports: s=5 d=80",
          "CT: lookup from 10.0.0.1:5", "CT: lookup to   10.0.0.2:80",
          "policy ALLOWED  proto 6 src 10.0.0.1:5 dest 10.0.0.2:80"],
         {"flows": [Flow(17, "10.0.0.9", 4, "10.0.0.2", 4789), Flow(6, "10.0.0.1", 5, "10.0.0.2", 80)]}),
    ],
)  # fmt: skip
def test_facts(messages: list[str], facts: dict[str, object]) -> None:
    (passage,), _, _ = assembled(printed(*eth(START, *messages, END)))
    assert {name: getattr(passage.facts, name) for name in facts} == facts


@pytest.mark.parametrize(
    ("messages", "forwarding"),
    [
        (["Redirect directly to interface (7) succeeded.", "Final result=ALLOW rc 7."], "to ifindex 7"),
        (["Redirect to workload dev 7 without fib lookup", "Final result=ALLOW (7)."], "to ifindex 7"),
        (["Redirect directly to interface (7) failed.", "Got Linux FIB hit, redirecting to iface 8.",
          "Final result=ALLOW rc 7."], "to ifindex 8"),
        (["Got Linux FIB hit, redirecting to iface 8.", "To host marked with FLAG_EXT_LOCAL", END], ""),
        (["FIB lookup failed (FIB problem): 7.", "No FIB or failed, redirect to NATIF.",
          "Redirect directly to interface bpfnatin succeeded.", "Final result=ALLOW rc 7."], "to bpfin.cali"),
        (["No FIB or failed, redirect to NATIF.", "Redirect directly to bpfnatin failed.",
          "Final result=DENY (29)."], ""),
        (["FIB lookup failed (FIB problem): 4.", END], "FIB NOT_FWDED"),
    ],
)  # fmt: skip
def test_the_way_out(messages: list[str], forwarding: str) -> None:
    (passage,), _, _ = assembled(printed(*eth(START, *messages)))
    assert passage.facts.forwarding == forwarding


LOOKED_UP = ("CT: lookup from 10.0.0.1:5", "CT: lookup to   10.0.0.9:80")
IN_ERROR = ("ICMP; type=3 code=1", "CT: lookup from 10.0.0.7:0", "CT: lookup to   10.0.0.9:0", "CT: result: related")


@pytest.mark.parametrize(
    ("messages", "after_nat", "decisions"),
    [
        # A connection of the host clashes with one through bpfout.cali: the second look has no source port.
        ((*LOOKED_UP, "Host source SNAT conflict", "CT: lookup from 10.0.0.1:0", "CT: lookup to   10.0.0.9:80",
          "CT: DNAT to 10.0.0.9:80", "Fixing TCP source port from 5 to 60001"),
         Flow(0, "10.0.0.1", 60001, "10.0.0.9", 80), ["DNAT to 10.0.0.9:80"]),
        ((*LOOKED_UP, "CT: SNAT from 10.0.0.8:30080", "Fixing UDP dest port from 80 to 6"),
         Flow(0, "10.0.0.8", 30080, "10.0.0.9", 6), ["SNAT from 10.0.0.8:30080"]),
        ((*LOOKED_UP, "remote wl 10.0.1.1 tunneled via 10.0.1.0", "CT: DNAT to 10.0.1.1:8080"),
         Flow(0, "10.0.1.0", 5, "10.0.1.1", 8080), ["DNAT to 10.0.1.1:8080"]),
        # An ICMP error: its own address changes, and those of the packet that it quotes.
        ((*IN_ERROR, "ICMP related: outer IP SNAT to 10.0.0.8", "Entering calico_tc_skb_icmp_inner_nat",
          "CT: DNAT to 10.0.0.8:80", "Fixing TCP source port from 5 to 6"),
         Flow(1, "10.0.0.8", 0, "10.0.0.9", 0), ["SNAT to 10.0.0.8", "in the ICMP error: DNAT to 10.0.0.8:80"]),
        ((*IN_ERROR[:3], "ct_related=1", "ICMP related: outer IP DNAT to 10.0.0.5", "CT: SNAT from 10.0.0.5:80"),
         Flow(1, "10.0.0.7", 0, "10.0.0.5", 0), ["DNAT to 10.0.0.5", "in the ICMP error: SNAT from 10.0.0.5:80"]),
        ((*LOOKED_UP, "NAT: backend miss", "Entering calico_tc_skb_send_icmp_replies", "ICMP type 3 and code 3"),
         None, ["no backend", "ICMP type 3 code 3 to the sender"]),
        ((*LOOKED_UP, "Fixing something else"), None, []),
        ((*LOOKED_UP, "Sending TCP RST due to CT state", "Entering calico_tc_skb_send_tcp_rst"),
         None, ["TCP RST to the sender"]),
    ],
)  # fmt: skip
def test_what_was_done_to_the_packet(messages: tuple[str, ...], after_nat: Flow | None, decisions: list[str]) -> None:
    (passage,), _, _ = assembled(printed(*eth(START, *messages, END)))
    assert (passage.facts.after_nat, passage.decisions()) == (after_nat, decisions)
    assert passage.facts.flows[-1].sport == (5 if messages[0].startswith("CT") else 0)


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        (("Source collision unresolved 10.0.0.1:5", "calico_ct_v4_create_tracking err -17",
          "Creating NAT conntrack failed with -17"), "no free source port to resolve a collision"),
        (("CT-ALL nat tunnel IP not a host 10.0.0.1", "calico_ct_v4_create_tracking err -1",
          "Creating NAT conntrack failed with -1"), "the tunnel's other end is no known node"),
        (("CT: Packet not allowed by ingress/egress approval flags (TH).", "NEW src_to_dst->ifindex 0",
          "calico_ct_v4_create_tracking err -7", "Creating normal conntrack failed"), NO_ROOM),
        (("hello", "Creating normal conntrack failed"), NO_ROOM),
        (("CT: Miss.", "CT: result: INVALID.", "ip->ttl 64"), "an ICMP error about no known flow"),
        (("NAT: no backend",), CHAIN),
        (("Sending TCP RST due to CT state",), CHAIN),
        (("ip->ttl 1",), "the time to live is over"),
        (("ip->hop_limit 0",), "the time to live is over"),
        (("ip->ttl 128",), ""),
        (("Unknown protocol (132), unable to extract ports",),
         "a protocol that Calico does not know, from or to a pod"),
        (("Not a tunnel route for 10.0.0.1 at tunnel device",), "no route for the destination at the tunnel device"),
        ((), ""),
    ],
)  # fmt: skip
def test_causes_that_more_than_the_last_line_tells(messages: tuple[str, ...], cause: str) -> None:
    (denied,), _, _ = assembled(printed(*eth(START, *messages, "Final result=DENY (0).")))
    assert denied.cause() == cause
    (alone,), _, _ = assembled(printed(*eth("Final result=DENY (0).")))
    assert alone.cause() == ""


def test_a_denial_of_the_pods_bucket() -> None:
    (passage,), _, _ = assembled(printed(*cali(START, "Final result=DENY (23). Dropped due to packet rate QoS.")))
    assert (passage.verdict, passage.code, passage.cause()) == ("DENY", None, "QoS limit of the pod")


def test_the_log_action_has_no_version_in_its_tag() -> None:
    lines = [f"IPv6 {each}" for each in eth(START, "Entering calico_tc_skb_accepted_entrypoint", END)]
    (passage,), _, _ = assembled(
        printed(*lines[:2], *eth("policy ALLOWED proto 6 src [fd00::1]:5 dest [fd00::2]:80"), lines[2])
    )
    assert (len(passage.lines), passage.verdict, passage.marks) == (4, "ALLOW", [])
    assert passage.facts.policy == "allow"


def test_a_denial_that_ends_with_the_state_of_the_packet() -> None:
    said = ("Entering calico_tc_skb_drop - DENY", "proto=6", "src=a000001 dst=a000002", "pol_rc=2", "ct_rc=0")
    denied = [f"eth0-----I: {each}" for each in (START, *said)]
    other = [f"cali1----E: {each}" for each in (START, END)]
    done, cut, _ = assembled(printed(*denied, *other, *denied, *denied))
    assert [(p.interface, p.verdict, p.cause(), p.marks) for p in done + cut] == [
        ("eth0", "DENY", "denied by policy", []), ("cali1", "ALLOW", "", []),
        ("eth0", "DENY", "denied by policy", []), ("eth0", "DENY", "denied by policy", []),
    ]  # fmt: skip
    assert done[0].facts.policy == "deny"


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("IPv6 on host interface: allow", "ALLOW"),
        ("Unknown ethertype on host interface (88cc), allow", "ALLOW"),
        ("IPv6 from workload: drop", "DENY"),
    ],
)
def test_a_line_that_is_all_that_the_first_releases_print(said: str, verdict: str) -> None:
    parsed = [f"eth0-----I: {each}" for each in ("TCP; ports: s=1 d=2", "CT-6 lookup from a000001:1", END)]
    line = f"eth0-----I: {said}"
    done, _, _ = assembled(printed(line, line, *parsed))
    assert [(p.verdict, len(p.lines), p.marks) for p in done] == [(verdict, 1, [])] * 2 + [("ALLOW", 3, [])]
    later = [f"eth0-----I: {each}" for each in (START, said, "Traffic is towards the host namespace", END)]
    done, _, _ = assembled(printed(line, *later[2:], *later))
    assert [(len(p.lines), p.marks) for p in done] == [(3, []), (4, [])]


def test_the_first_line_without_an_interface() -> None:
    lines = [f"eth0-----I: {each}" for each in ("New packet; mark=0", "Packet approved for forward.")]
    done, cut, _ = assembled(printed(*lines, *lines))
    assert [(p.texts, p.marks) for p in done + cut] == [
        (["New packet; mark=0", "Packet approved for forward."], [Mark.END_LOST])
    ] * 2


def test_a_short_ipv6_address_stays_as_printed() -> None:
    (passage,), _, _ = assembled(printed(*(f"IPv6 {each}" for each in eth(START, "IP s=a0a0001 d=2", END))))
    assert passage.tag.ipv6
    assert passage.facts.flows == [Flow(0, "a0a0001", 0, "2", 0)]


def test_flows_as_text_and_as_packets() -> None:
    assert str(Flow(6, "fd00::1", 1, "10.0.0.1", 2)) == "tcp [fd00::1]:1 > 10.0.0.1:2"
    assert str(Flow(132, "", 1, "b", 2)) == "proto 132 ?:1 > b:2"
    assert str(Flow(0, "", 0, "b", 0)) == "? > b"
    assert Flow(6, "CLIENT", 1, "10.0.0.1", 2).packet() == b""
    for src, dst in (("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")):
        layer = dissect(Flow(17, src, 5, dst, 53).packet(), 4789).inner
        assert layer is not None
        assert (layer.proto, str(layer.src), layer.sport, str(layer.dst), layer.dport) == (17, src, 5, dst, 53)


_WORDS = st.sampled_from(
    ["Final result=", "DENY ", "ALLOW ", "(", "ed", "-", "12", ").", "rc ", START, METADATA, "CPU:0 [LOST 1 EVENTS]",
     "IP s=1 d=2", "TCP; ports: s=1 d=2", "Host RPF check rc 1 result 0", "DENY due to policy", "vxlan decap",
     "CT: DNAT to 1:2", "CT: lookup from 1:2", "CT: result: 0x1"]
)  # fmt: skip
_TEXTS = st.one_of(
    st.text(),
    _WORDS,
    st.tuples(st.sampled_from(["eth0------------I", "calif00d-E", "eth0------------X"]), st.lists(_WORDS)).map(
        lambda found: f"{found[0]}: {''.join(found[1])}"
    ),
)


@given(st.lists(st.tuples(_TEXTS, st.integers(1, 2), st.integers(0, 1))))
def test_any_lines_are_taken_and_kept(texts: list[tuple[str, int, int]]) -> None:
    raw = [printed(text, pid=pid, cpu=cpu)[0] for text, pid, cpu in texts if "\n" not in text]
    done, cut, reader = assembled(raw)
    assert reader.total == len(raw)
    held = [line for passage in done + cut for line in passage.lines]
    tagged = [line for line in Reader().read(raw) if line.tag and line.tag.direction]
    assert sorted(line.raw for line in held if line.tag) == sorted(line.raw for line in tagged)
    for passage in done + cut:
        assert passage.verdict or passage.marks or passage.facts.policy
        assert len({line.context.pid for line in passage.lines}) == 1
        assert isinstance(passage.calico_reason, str)


_MESSAGES = sorted(
    {line.partition("\t")[0] for path in (_DATA / "log").glob("v*.tsv") for line in path.read_text().splitlines()}
)


def test_a_log_action_of_an_ipv6_packet_takes_no_line_of_the_next_one() -> None:
    """Its tag is that of IPv4's programs, whose first line may be lost."""
    ipv6, ipv4 = "IPv6 calif00d0000000-I", "calif00d0000000-I"
    lines = [f"{ipv6}: {START}", f"{ipv6}: IP id=0", f"{ipv4}: policy ALLOWED proto 6"]
    lines += [f"{ipv4}: IP id=7", f"{ipv4}: TCP; ports: s=1 d=2", f"{ipv4}: {END}"]
    done, cut, _ = assembled(printed(*lines))
    found = {each.tag.ipv6: each for each in (*done, *cut)}
    assert [len(found[each].lines) for each in (True, False)] == [3, 3]
    assert found[False].marks == [Mark.BEGINNING_LOST]


def test_the_quick_look_at_a_line_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Everything:
        def __contains__(self, _: object) -> bool:
            return True

    def texts() -> list[list[list[str]]]:
        found = []
        for message in _MESSAGES:
            for beside in (START, "CT: result: NEW", message):
                done, cut, _ = assembled(printed(*(f"calif00d-E: {each}" for each in (message, beside, message))))
                found.append([each.texts for each in (*done, *cut)])
        return found

    quick = texts()
    monkeypatch.setattr(passage_module, "_EDGES", Everything())
    assert quick == texts()
