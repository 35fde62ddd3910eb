"""What Calico's maps say about a drop, weighed against what was recorded with it."""

from __future__ import annotations

import json

import pytest
from tests.unit.packets import CLIENT, POD, SPORT, TARGET_PORT, Recorder, calico_state, state_of
from tests.unit.test_drops import SYN, causes, with_state
from tests.unit.test_verdict import B_NS, CALI, TC_EGRESS

from calitrace.calico import reasons
from calitrace.calico.state import LAYOUTS, Layout
from calitrace.correlate import walk
from calitrace.correlate.drops import Cause, Confidence, Place
from calitrace.correlate.witness import Statement, weigh
from calitrace.errors import Malformed
from calitrace.packet import TCP

SPOOFED = walk.Step("RPF", "10.9.9.9 at cali1", "no route", walk.SPOOFED, "dropped, and no counter tells it")
VERDICT = walk.Step("verdict", "udp 10.0.0.1:9 -> 10.0.0.2:53", "delivered")
SILENT = "Calico's counters of this hook rose within 2.0 s: none of its drops"


def hook_only() -> Cause:
    """A drop of Calico's of which no more is known."""
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    (found,) = causes(recorder)
    assert not found.recorded
    return found


def in_state(reason: int = 0) -> Cause:
    """A drop that Calico's state is about."""
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, calico_state(pol_rc=1, reason=reason))
    (found,) = causes(recorder)
    return found


def test_every_counted_drop_has_a_meaning() -> None:
    assert reasons.MEANING.keys() >= reasons.DROPS
    assert "REDIRECT" not in reasons.DROPS


def test_one_counter_that_rose_is_a_likely_cause() -> None:
    said = Statement({"TOTAL_PACKETS": 5, "IP_OPTIONS": 2, "SHORT": 0}, 2.0)
    found = weigh(hook_only(), said)
    assert (found.calico_reason, found.sources, found.confidence) == ("IP_OPTIONS", ("counters",), Confidence.LIKELY)
    assert found.text == "dropped by Calico, it seems: IP options are not supported"
    assert found.evidence[-1] == "Calico's counters of this hook rose within 2.0 s: IP_OPTIONS +2"


def test_a_collision_is_counted_as_two() -> None:
    said = Statement({"SOURCE_COLLISION": 1, "SOURCE_COLLISION_FAILED": 1, "CT_CREATE_FAILED": 1}, 2.0)
    assert weigh(hook_only(), said).calico_reason == "SOURCE_COLLISION_FAILED"


@pytest.mark.parametrize("counters", [{"SHORT": 1, "IP_OPTIONS": 1}, {"TOTAL_PACKETS": 5}, {"SHORT": -3}])
def test_several_counters_or_none_name_nothing(counters: dict[str, int]) -> None:
    found = weigh(hook_only(), Statement(counters, 2.0))
    assert (found.detail, found.sources) == ("cause not recorded", ("hook",))
    assert found.evidence[-1].startswith("Calico's counters of this hook rose within 2.0 s: ")


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({}, "its place in the array of programs is empty"),
        ({"cali_progs_ing2": 0, "cali_progs_egr2": 9}, "no program is in cali_progs_ing2"),
    ],
)
def test_a_main_program_that_does_not_run_counts_nothing(arrays: dict[str, int], why: str) -> None:
    said = Statement({"TOTAL_PACKETS": 0, "SHORT": 0}, 2.0, arrays=arrays)
    found = weigh(hook_only(), said)
    assert (found.detail, found.confidence) == (f"its main program did not run: {why}", Confidence.LIKELY)
    assert found.sources == ("counters",)
    assert weigh(in_state(), said).detail.startswith("cause not recorded")  # it did write its state


def test_counters_do_not_speak_for_a_packet_whose_state_has_no_reason() -> None:
    found = weigh(in_state(), Statement({"SHORT": 1}, 2.0))
    assert found.detail == "cause not recorded (policy allow, conntrack NEW)"
    assert found.sources == ("state",)


@pytest.mark.parametrize("table", [each for each in LAYOUTS if each.releases in ("v3.28..v3.29", "v3.30..v3.31")])
def test_counters_speak_where_the_release_keeps_no_reason(table: Layout) -> None:
    recorder = Recorder()
    recorder.drop(B_NS, CALI, SYN, TC_EGRESS)
    recorder.state(B_NS, state_of(table, (CLIENT, SPORT, POD, TARGET_PORT), TCP, pol_rc=1))
    (cause,) = causes(recorder, with_state(table))
    assert (cause.detail, cause.sources) == ("cause not recorded (policy allow, conntrack NEW)", ("state",))
    found = weigh(cause, Statement({"RT_UNKNOWN": 1, "SHORT": 0}, 2.0))
    assert (found.calico_reason, found.sources) == ("RT_UNKNOWN", ("state", "counters"))
    assert (found.text, found.confidence) == (
        "dropped by Calico, it seems: the backend is not in Calico's routes map",
        Confidence.LIKELY,
    )


def test_what_was_recorded_stays_and_disagreement_is_shown() -> None:
    recorded = in_state(reason=12)
    found = weigh(recorded, Statement({"RT_UNKNOWN": 0, "SHORT": 1}, 2.0, steps=(SPOOFED, VERDICT), back="eth1"))
    assert (found.detail, found.sources) == (recorded.detail, ("state",))
    assert found.evidence[len(recorded.evidence) :] == (
        "Calico's counters of this hook rose within 2.0 s: SHORT +1",
        "the counters disagree: RT_UNKNOWN did not rise",
        "Calico's maps now: RPF 10.9.9.9 at cali1: no route: dropped, and no counter tells it",
        "packets to its source leave by eth1, as the kernel's routes are now",
    )
    agreeing = weigh(recorded, Statement({"RT_UNKNOWN": 1}, 2.0))
    assert not any("disagree" in each for each in agreeing.evidence)


def test_no_row_for_an_interface() -> None:
    found = weigh(hook_only(), Statement(has_row=False, steps=(SPOOFED,)))
    assert found.detail == "no row for this interface and hook in Calico's counters"
    assert found.sources == ("counters",)


@pytest.mark.parametrize("cause", [hook_only(), in_state()], ids=["hook", "state"])
def test_silent_drops_that_the_maps_explain(cause: Cause) -> None:
    found = weigh(cause, Statement({"SHORT": 0}, 2.0, steps=(VERDICT, SPOOFED, VERDICT), back="eth1"))
    assert found.detail == "not an address of this pod: 10.9.9.9 at cali1: no route"
    assert found.sources == (*(["state"] if "state" in cause.sources else []), "maps")
    assert SILENT in found.evidence


def test_a_breakage_that_calico_would_have_told_is_no_cause() -> None:
    step = walk.Step("route", "10.0.0.2", "none", walk.NO_ROUTE, "dropped, RT_UNKNOWN")
    found = weigh(hook_only(), Statement(steps=(step, VERDICT)))
    assert (found.sources, found.recorded) == (("hook",), False)
    assert found.evidence[-1] == "Calico's maps now: route 10.0.0.2: none: dropped, RT_UNKNOWN"


def test_an_unbroken_walk_and_a_source_that_is_routed_elsewhere() -> None:
    found = weigh(hook_only(), Statement(steps=(VERDICT,), back="eth1"))
    assert found.detail == "reverse path: its source is routed by eth1"
    assert found.sources == ("routes",)
    assert "Calico's maps now: verdict udp 10.0.0.1:9 -> 10.0.0.2:53: delivered" in found.evidence


def test_a_journal_keeps_it() -> None:
    said = Statement({"SHORT": 1}, 2.5, True, (SPOOFED, VERDICT), "eth1")
    assert Statement.from_map(json.loads(json.dumps(said.to_map()))) == said
    for wrong in (
        {},
        {"steps": [{"a": 1}]},
        {"steps": [], "other": 1},
        {**said.to_map(), "over_s": "2"},
        {**said.to_map(), "counters": 3},
        {**said.to_map(), "counters": {"SHORT": "1"}},
    ):
        with pytest.raises(Malformed, match="what maps said about a drop"):
            Statement.from_map(wrong)


def test_the_kernels_drops_are_not_touched() -> None:
    kernel = Cause("text", "detail", Place("ns"), Confidence.PROVEN)
    assert weigh(kernel, Statement()) == kernel
