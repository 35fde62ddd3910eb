"""The kernel's header in front of a line, in all the forms in which it reaches us."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace.calico import messages, trace
from calitrace.calico.log import Form, Reader
from calitrace.calico.trace import UNKNOWN, Context, Lost

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT = "eth0------------I: New packet at ifindex=2; mark=0"
KERNEL = "bpf_trace_printk"


@pytest.mark.parametrize(
    ("line", "context", "stamp"),
    [
        (
            f"          <idle>-0       [014] ..s. 17619198.981287: 0: {TEXT}",
            Context("<idle>", 0, 14, None, "..s.", "0"),
            "17619198.981287",
        ),
        (
            f"          <idle>-0 [005] dNs3.   220.318140: {KERNEL}: {TEXT}",
            Context("<idle>", 0, 5, None, "dNs3.", KERNEL),
            "220.318140",
        ),
        (
            f"           nginx-4157663 [002] ..s.. 174216.693754: {KERNEL}: {TEXT}",
            Context("nginx", 4157663, 2, None, "..s..", KERNEL),
            "174216.693754",
        ),
        (
            f"ksoftirqd/0-11 [000] d.s. 88027.543867: {KERNEL}: {TEXT}",
            Context("ksoftirqd/0", 11, 0, None, "d.s.", KERNEL),
            "88027.543867",
        ),
        (
            f"            curl-7 [001] .... 1.000001: 0x00000001: {TEXT}",
            Context("curl", 7, 1, None, "....", "0x00000001"),
            "1.000001",
        ),
        (
            f" tokio runtime w-99      [1023] .N..2.. 12.345678: {KERNEL}: {TEXT}",
            Context("tokio runtime w", 99, 1023, None, ".N..2..", KERNEL),
            "12.345678",
        ),
        (
            f"   my-app: a-1 b-31337   [000] b.s2.  5.000001: {KERNEL}: {TEXT}",
            Context("my-app: a-1 b", 31337, 0, None, "b.s2.", KERNEL),
            "5.000001",
        ),
        (
            f"           <...>-123     (    120) [003] ..s2.  5.000001: {KERNEL}: {TEXT}",
            Context("<...>", 123, 3, 120, "..s2.", KERNEL),
            "5.000001",
        ),
        (
            f"           <...>-123     (-------) [003] ..s2.  5.000001: {KERNEL}: {TEXT}",
            Context("<...>", 123, 3, None, "..s2.", KERNEL),
            "5.000001",
        ),
        (
            f"            curl-7     [001]     5.000001: {KERNEL}: {TEXT}",
            Context("curl", 7, 1, None, "", KERNEL),
            "5.000001",
        ),
        # pasted
        (
            f"2026-01-02T03:04:05.6Z stdout F             curl-7     [001] ..s2.     5.000001: {KERNEL}: {TEXT}",
            Context("curl", 7, 1, None, "..s2.", KERNEL, "2026-01-02T03:04:05.6Z stdout F"),
            "5.000001",
        ),
        (
            f"2026-01-02T03:04:05.6Z stdout F curl-7 [001] ..s2. 5.000001: {KERNEL}: {TEXT}",
            Context("curl", 7, 1, None, "..s2.", KERNEL, "2026-01-02T03:04:05.6Z stdout F"),
            "5.000001",
        ),
        (
            f"  12:curl-7 [001] ..s2. 5.000001: {KERNEL}: {TEXT}",
            Context("curl", 7, 1, None, "..s2.", KERNEL, "12:"),
            "5.000001",
        ),
        (
            f" 12             curl-7     [001] ..s2.     5.000001: {KERNEL}: {TEXT}",
            Context("curl", 7, 1, None, "..s2.", KERNEL, "12"),
            "5.000001",
        ),
        (f"[001] ..s2. 5.000001: {KERNEL}: {TEXT}", UNKNOWN, "5.000001"),
        (f"{KERNEL}: {TEXT}", UNKNOWN, ""),
        (TEXT, UNKNOWN, ""),
    ],
)
def test_headers(line: str, context: Context, stamp: str) -> None:
    assert trace.split(line) == (context, stamp, TEXT)
    assert trace.split(json.dumps({"log": line + "\n", "stream": "stdout"})) == (context, stamp, TEXT)


def test_an_empty_text_and_what_is_no_docker_line() -> None:
    header = "            curl-7     [001] ..s2.     5.000001: bpf_trace_printk:"
    assert trace.split(header)[2] == ""
    for odd in ('{"log":', '{"log":3}', '{"log": "x"', '{"log":"x"}]'):
        assert trace.split(odd)[:2] == (UNKNOWN, "")


def test_times() -> None:
    assert trace.time_ns(f"curl-7 [001] ..s2. 5304.517741: {KERNEL}: x") == 5304_517741_000
    assert trace.time_ns(f"curl-7 [001] ..s2. 17: {KERNEL}: x") == 17_000_000_000
    assert trace.time_ns("x") == 0


def test_lost_events() -> None:
    assert trace.lost("CPU:3 [LOST 2345 EVENTS]") == Lost(3, 2345)
    assert trace.lost("CPU:12 [LOST EVENTS]") == Lost(12, None)
    assert trace.lost("CPU:3 [LOST 2345 EVENTS] x") is None


@given(st.text())
def test_any_text_is_split(line: str) -> None:
    context, stamp, text = trace.split(line)
    assert text in line or line.startswith('{"log":')
    assert stamp in line
    assert context.cpu >= -1


_COMMS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=15).map(str.strip)


@given(
    st.lists(
        st.tuples(
            _COMMS.filter(bool),
            st.integers(0, 4194304),
            st.integers(0, 1023),
            st.sampled_from(["..s.", "dNs3.", "b..2..1"]),
            st.integers(0, 10**7),
            st.integers(0, 999999),
            st.sampled_from(
                [TEXT, "CTLB------------: NAT miss.", "hello", "", "eth0------------I: ?", "calif00d-E: x: y"]
            ),
            st.sampled_from([str, "{}\r".format, lambda line: json.dumps({"log": line + "\n", "stream": "stdout"})]),
        ),
        min_size=1,
    )
)
def test_headers_seen_before_give_the_same_lines(
    parts: list[tuple[str, int, int, str, int, int, str, Callable[[str], str]]],
) -> None:
    raw = [
        kept(f"{comm:>16}-{pid:<7} [{cpu:03d}] {flags} {seconds:5d}.{micros:06d}: {KERNEL}: {text}")
        for comm, pid, cpu, flags, seconds, micros, text, kept in parts
    ]
    reader = Reader()
    lines = list(reader.read(raw + raw))
    assert lines == [line for each in raw + raw for line in Reader().read([each])]
    assert [line.raw for line in lines] == raw + raw
    assert reader.total == len(lines) == sum(reader.counts[form] for form in Form)
    for line, (comm, pid, cpu, flags, *_) in zip(lines, parts, strict=False):
        assert line.context == Context(comm, pid, cpu, None, flags, KERNEL)


def test_any_surrogate_in_a_message_is_only_unknown() -> None:
    header = f"curl-7 [001] ..s2. 5304.517741: {KERNEL}: "
    (line,) = Reader().read([json.dumps({"log": f"{header}eth0-I: \ud800\n"})])
    assert line.form is Form.UNKNOWN
    assert line.text == "\ud800"


def test_a_message_is_classified_alike_whatever_came_before() -> None:
    kinds = {"d": "7", "x": "a7", "ip": "10.0.0.7", "w": "w7", "t": "t7"}
    templates = [each.template for each in messages.MESSAGES if each.tagged]
    texts = [re.sub(r"\{\w+:(\w+)\}", lambda found: kinds[found[1]], each) for each in templates]
    texts += [text.replace("v4", "v6") for text in texts] + [text.replace("v6", "v4") for text in texts]
    header = f"curl-7 [001] ..s2. 5304.517741: {KERNEL}: eth0-I: "
    reader = Reader()
    for text in texts + texts[::-1]:
        (line,) = reader.read([header + text])
        assert (text, line.message) == (text, messages.classify(text))


def test_blank_lines() -> None:
    lines = list(Reader().read(["", "\r", " "]))
    assert [(line.raw, line.text, line.form) for line in lines] == [(raw, raw, Form.BLANK) for raw in ("", "\r", " ")]
