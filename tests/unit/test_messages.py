"""The table of messages: every wording is recognised as itself in every era, and real traces leave nothing over."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_passage import TRACES

from calitrace.calico.log import Form, Reader
from calitrace.calico.messages import (
    DOTTED_SINCE,
    MESSAGES,
    STAGES,
    Message,
    classify,
    classify_untagged,
    pattern,
    render,
)
from calitrace.calico.passage import Assembler, Flow

DATA = Path(__file__).resolve().parent.parent / "data"
FIELD = re.compile(r"\{(\w+):(\w+)\}")
ERAS = {"v3.13": (3, 13), "v3.24": (3, 24), "v3.29": (3, 29), "v3.30": (3, 30), "v3.32": (3, 32)}


def release(text: str) -> tuple[int, int]:
    """(3, 24) of ``v3.24``."""
    major, minor = text.removeprefix("v").split(".")
    return int(major), int(minor)


def lives(message: Message, era: tuple[int, int]) -> bool:
    """Whether a release prints it."""
    return release(message.since) <= era and (not message.until or era <= release(message.until))


@st.composite
def texts(draw: st.DrawFn) -> tuple[Message, str, tuple[int, int], dict[str, str | int]]:
    """A message of some release, as that release prints it, and the values in it."""
    message = draw(st.sampled_from(MESSAGES))
    era = draw(st.sampled_from([era for era in ERAS.values() if lives(message, era)] or [release(message.since)]))
    kinds: dict[str, st.SearchStrategy[str | int]] = {
        "d": st.integers(-(2**31), 2**64 - 1),
        "x": st.integers(0, 2**32 - 1),
        "ip": st.ip_addresses().map(str),
        "w": st.from_regex(r"[a-z0-9]{1,15}", fullmatch=True),
        "t": st.sampled_from(["", " (x)", ": 1 2"]),
    }
    values = {name: draw(kinds[kind]) for name, kind in FIELD.findall(message.template)}
    return message, render(message, values, era), era, values


@given(texts())
def test_every_wording_is_recognised(found: tuple[Message, str, tuple[int, int], dict[str, str | int]]) -> None:
    message, text, era, values = found
    named = (classify if message.tagged else classify_untagged)(text)
    assert named is not None
    # Two wordings may share a text where one is the other with a special ending; they are then of one stage.
    assert named == message or named.stage == message.stage
    read = pattern(message).fullmatch(text)
    assert read is not None
    for name, kind in FIELD.findall(message.template):
        if kind == "d" or (kind == "ip" and era >= DOTTED_SINCE and "." in str(values[name])):
            assert read[name] == str(values[name])
        elif kind == "x":
            assert int(read[name], 16) == values[name]


@given(texts(), st.sampled_from(["eth0-----I: ", "eth0------------I: ", "IPv6 cali1-----------E: "]))
def test_a_line_of_every_wording_is_calicos(
    found: tuple[Message, str, tuple[int, int], dict[str, str | int]], tag: str
) -> None:
    message, text, _, _ = found
    header = "            curl-7       [000] ..s2.     5.000001: bpf_trace_printk: "
    (line,) = Reader().read([header + (tag if message.tagged else "") + text])
    assert (line.form, line.text) == (Form.CALICO, text)
    assert line.message is not None
    assert line.fields().keys() == {name for name, _ in FIELD.findall(line.message.template)}


def test_texts_that_differ_in_digits_alone_are_one_wording() -> None:
    shapes: dict[tuple[bool, str], Message] = {}
    for message in MESSAGES:
        values = {name: "0" if kind in "dx" else "" for name, kind in FIELD.findall(message.template)}
        shape = re.sub(r"\d", "", FIELD.sub(lambda found, values=values: str(values[found[1]]), message.template))  # type: ignore[misc]
        other = shapes.setdefault((message.tagged, shape), message)
        assert other.stage == message.stage, (other, message)
        assert other.cause == message.cause, (other, message)


def test_the_table_is_well_formed() -> None:
    for message in MESSAGES:
        assert message.stage in STAGES
        assert release(message.since) <= (release(message.until) if message.until else (9, 9))
        names = [name for name, _ in FIELD.findall(message.template)]
        assert len(names) == len(set(names))
        assert message.meaning
        assert not message.meaning.endswith(".")
    assert len({(m.template, m.tagged, m.since) for m in MESSAGES}) == len(MESSAGES)


@pytest.mark.parametrize("name", TRACES)
def test_real_traces_hold_nothing_unknown(name: str) -> None:
    reader = Reader()
    lines = [line for _, each in TRACES[name].values() for line in reader.read(each)]
    assert {line.form for line in lines} <= {Form.CALICO, Form.BLANK}
    assert all(line.fields() is not None for line in lines)


@given(st.text(), st.sampled_from(MESSAGES))
def test_any_text_has_a_wording_or_none(text: str, message: Message) -> None:
    assert classify(text) in (None, *MESSAGES)
    assert classify_untagged(message.template + text) in (None, *MESSAGES)


@pytest.mark.parametrize(
    ("era", "address", "shown"),
    [
        ("v3.29", "10.10.0.1", "a0a0001"),
        ("v3.30", "10.10.0.1", "10.10.0.1"),
        ("v3.29", "fd00::a0a:1", "a0a0001"),
        ("v3.30", "fd00::1", "[fd00:0000:0000:0000:0000:0000:0000:0001]"),
    ],
)
def test_addresses_of_an_era(era: str, address: str, shown: str) -> None:
    message = classify("CT: lookup from x:1")
    assert message is not None
    assert render(message, {"src": address, "sport": 80}, release(era)) == f"CT: lookup from {shown}:80"


CORPUS = DATA / "log"


@pytest.mark.parametrize("path", sorted(CORPUS.glob("v*.tsv")), ids=lambda path: path.stem)
def test_the_corpus_of_an_era_is_classified(path: Path) -> None:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    reader = Reader()
    lines = list(reader.read(raw for _, raw in rows))
    assert [line.raw for line in lines] == [raw for _, raw in rows]
    assert reader.counts == {Form.CALICO: len(rows)}
    assert len(rows) > 150
    by_template = {message.template: message for message in MESSAGES}
    for line, (template, _) in zip(lines, rows, strict=True):
        assert line.message is not None
        assert (line.message.template == template) or line.message.stage == by_template[template].stage


def test_samples_that_people_posted() -> None:
    rows = [line.split("\t") for line in (CORPUS / "samples.tsv").read_text().splitlines()]
    lines = list(Reader().read(raw for _, raw in rows))
    assert [line.message and line.message.stage for line in lines] == [stage for stage, _ in rows]
    assert {line.context.comm for line in lines} == {"<idle>", "nginx", "ksoftirqd/0", "ksoftirqd/1", "python3", "curl"}


FLOWS = st.builds(
    Flow,
    st.sampled_from([6, 17]),
    st.ip_addresses(v=4).map(str),
    st.integers(1, 65535),
    st.ip_addresses(v=4).map(str),
    st.integers(1, 65535),
)


@given(FLOWS, FLOWS, FLOWS, st.booleans(), st.integers(0, 10**9), st.sampled_from([(3, 25), (3, 29), (3, 30), (3, 32)]))
def test_a_packet_to_text_and_back(
    outer: Flow, inner: Flow, backend: Flow, denied: bool, took_ns: int, era: tuple[int, int]
) -> None:
    """What a program would print of a packet that comes in VXLAN, is given a backend and leaves, or is denied."""

    def said(template: str, **values: str | int) -> str:
        (message,) = (each for each in MESSAGES if each.template == template and each.tagged)
        return "ens192----------I: " + render(message, values, era)

    def ports(flow: Flow) -> str:
        name = {6: "TCP", 17: "UDP"}[flow.proto]
        return said(name + "; ports: s={sport:d} d={dport:d}", sport=flow.sport, dport=flow.dport)

    end = "Final result=DENY ({code:x})" if denied else "Final result=ALLOW rc {rc:d}"
    texts = [
        said("New packet at ifindex={ifindex:d}; mark={mark:x}", ifindex=2, mark=0),
        said("IP s={src:ip} d={dst:ip}", src=outer.src, dst=outer.dst),
        ports(outer),
        said("vxlan decap"),
        said("vxlan decap origin {ip:ip}", ip=outer.src),
        ports(inner),
        said("CT: lookup from {src:ip}:{sport:d}", src=inner.src, sport=inner.sport),
        said("CT: lookup to   {dst:ip}:{dport:d}", dst=inner.dst, dport=inner.dport),
        said("CT: result: NEW."),
        said("CT: DNAT to {ip:ip}:{port:d}", ip=backend.dst, port=backend.dport),
        said(end + ". Program execution time: {ns:d}ns", code=7, rc=7, ns=took_ns),
    ]
    assembler, done = Assembler(), []
    for line in Reader().read(texts):
        done += assembler.feed(line)
    (passage,) = done
    facts = passage.facts
    assert facts.flows == ([outer, inner] if outer != inner else [outer])
    assert facts.after_nat in (None, replace(inner, dst=backend.dst, dport=backend.dport))
    assert (facts.tunnel_from, facts.conntrack, passage.execution_ns) == (outer.src, "new", took_ns)
    assert (passage.verdict, passage.code, passage.rc) == (("DENY", 7, None) if denied else ("ALLOW", None, 7))


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("Entering calico_tc_skb_ipv4_frag", "fragment"),
        ("iphdr_offset 14 ihl 20", "fragment"),
        ("Entering a program that no table knows", "accepted"),
        ("About to jump to policy program at 3", "policy"),
        ("Set metadata for TC: 128", "start"),
        ("No metadata is shared by XDP", "start"),
        ("Flow log event generated for DENY/DROP", "policy"),
        ("Allowing WG 10.0.0.1 <-> 10.0.0.2 despite blocked by policy - known hosts.", "policy"),
        ("Host RPF check src=a0a0064 skb iface=2 fib rc 0", "rpf"),
        ("Host RPF check src=a0a0064 skb iface=2 result 0", "rpf"),
        ("CT-ICMP: type 8 not an error", "conntrack"),
        ("CT: Miss on ICMP related", "conntrack"),
        ("CT-1 unrelated icmp", "conntrack"),
        ("VXLAN with our VNI from unexpected source.", "tunnel"),
        ("L4 checksum update (csum is at 50) src IP from a0a0001 to a0a0002", "rewrite"),
        ("TCP reset v4 reply: set tcp csum failed -1", "icmp"),
        ("Entering calico_tc_maglev", "maglev"),
        ("NAT Lookup determined packet to be Maglev-related", "maglev"),
        ("CT-TCP delete to   a0a0001:80", "conntrack"),
        ("CT-6 RPF expected 3 to equal 4", "conntrack"),
        ("FIB not approved - connection to unready 0x1 ep cali1234 (5) not confirmed.", "fib"),
        ("Final result=DENY (23). Dropped due to packet rate QoS.", "end"),
        ("revnat miss for [fd00:0000:0000:0000:0000:0000:0000:0001]:80", "connect-time"),
    ],
)
def test_wordings_of_programs_that_no_trace_of_ours_shows(text: str, stage: str) -> None:
    found = classify(text)
    assert found
    assert found.stage == stage
    assert classify_untagged("xdp_preamble iface eth0-----------")
