"""Two readings to totals and rates, and what they look like as text, as JSON and after a journal."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import journal
from calitrace.checks.snapshot import Missing, to_plain
from calitrace.correlate import counters
from calitrace.correlate.counters import CalicoRow, Interface, Qdisc, Reading, Row, Softnet, TcDrops, Tcx
from calitrace.errors import Malformed
from calitrace.report import counters as report
from calitrace.report.counters import Choice

CLSACT, FFFF, ROOT = "clsact", 0xFFFF0000, 0xFFFFFFFF
POD = "calif00dbeef012"


def packets(count: int = 27, **by_code: int) -> tuple[int, ...]:
    """A row of a counters map. *by_code*: ``_4=17``."""
    return tuple(by_code.get(f"_{code}", 0) for code in range(count))


FIRST = Reading(
    1_000_000_000,
    1_700_000_000_000_000_000,
    (
        CalicoRow("cali_counters6", 40, 7, 1, packets(_0=100, _2=60, _4=17)),
        CalicoRow("cali_counters6", 40, 2, 0, packets(_0=900)),
    ),
    (
        Qdisc(7, CLSACT, FFFF, 0xFFFFFFF1, 17),
        Qdisc(7, "noqueue", 0, ROOT, 0),
        Qdisc(2, "mq", 0x80010000, ROOT, 5),
        Qdisc(2, "fq_codel", 0, 1, 5),
    ),
    (Interface(2, "eth0", {"rx_dropped": 3, "tx_errors": 0}), Interface(7, POD, {"rx_dropped": 0})),
    (Tcx(2, "ingress", ("cali_tc_preambl",)), Tcx(2, "egress", ("cali_tc_preambl", "other"))),
    (Softnet(0, 0, 4), Softnet(2, 1, 0)),
)
LATER = replace(FIRST, mono_ns=3_000_000_000, wall_ns=FIRST.wall_ns + 2_000_000_000)
ALL = Choice(everything=True)


def short(rows: list[Row] | tuple[Row, ...]) -> list[tuple[Any, ...]]:
    return [(*each.key[:4], each.total) for each in rows]


def changed(rows: list[Row]) -> dict[tuple[str, ...], tuple[Any, ...]]:
    """Those with something to tell."""
    return {each.key[:4]: (each.delta, each.per_second, each.change) for each in rows if each.delta or each.change}


def test_totals_by_name() -> None:
    assert short(report.table(None, FIRST, Choice()).rows) == [
        ("calico", POD, "tc egress", "TOTAL_PACKETS", 100),
        ("calico", POD, "tc egress", "ACCEPTED_BY_POLICY", 60),
        ("calico", POD, "tc egress", "DROPPED_BY_POLICY", 17),
        ("calico", "eth0", "tc ingress", "TOTAL_PACKETS", 900),
        ("clsact", POD, "tc ingress+egress", "dropped", 17),
        ("tcx", "eth0", "tc ingress", "dropped", None),
        ("tcx", "eth0", "tc egress", "dropped", None),
        ("interface", "eth0", "", "rx_dropped", 3),
        ("qdisc", "eth0", "mq 8001:", "dropped", 5),
        ("qdisc", "eth0", "fq_codel 0: parent :1", "dropped", 5),
        ("softnet", "", "cpu 0", "time_squeeze", 4),
        ("softnet", "", "cpu 2", "dropped", 1),
    ]
    every = report.table(None, FIRST, ALL).rows
    assert len(every) == 2 * 27 + 1 + 2 + 3 + 3 + 4
    assert len({each.key for each in every}) == len(every)


@pytest.mark.parametrize(
    ("qdisc", "name"),
    [
        (Qdisc(1, "fq", 0x80020000, ROOT, 0), "fq 8002:"),
        (Qdisc(1, "pfifo", 0, 0x0001000A, 0), "pfifo 0: parent 1:a"),
        (Qdisc(1, "ingress", FFFF, 0xFFFFFFF1, 0), "ingress ffff:"),
    ],
)
def test_qdiscs_are_named_as_tc_does(qdisc: Qdisc, name: str) -> None:
    assert counters.qdisc_name(qdisc) == name


def test_the_old_maps_of_an_interface_and_releases_we_do_not_know() -> None:
    old = replace(FIRST, calico=(CalicoRow("cali_counters", 9, 0, 2, packets(14, _13=5), "eth0.5"),))
    assert ("calico", "eth0.5", "XDP", "BLACK_HOLE", 5) in short(counters.totals(old))
    new = replace(FIRST, calico=(CalicoRow("cali_counters9", 9, 77, 5, packets(40, _4=1, _33=2)),))
    found = [each for each in short(counters.totals(new)) if each[0] == "calico" and each[-1]]
    assert found == [
        ("calico", "ifindex 77", "hook 5", "DROPPED_BY_POLICY", 1),
        ("calico", "ifindex 77", "hook 5", "reason 33", 2),
    ]


def test_rates_are_of_the_time_measured() -> None:
    after = replace(
        LATER,
        mono_ns=FIRST.mono_ns + 1_250_000_000,
        calico=(CalicoRow("cali_counters6", 40, 7, 1, packets(_0=150, _2=60, _4=27)),),
        softnet=(Softnet(0, 0, 9),),
    )
    assert changed(counters.rates(FIRST, after)) == {
        ("calico", POD, "tc egress", "TOTAL_PACKETS"): (50, 40.0, ""),
        ("calico", POD, "tc egress", "DROPPED_BY_POLICY"): (10, 8.0, ""),
        ("softnet", "", "cpu 0", "time_squeeze"): (5, 4.0, ""),
    }
    assert changed(counters.rates(FIRST, LATER)) == {}


def test_what_cannot_be_subtracted_has_no_rate() -> None:
    after = replace(
        LATER,
        calico=(
            CalicoRow("cali_counters6", 41, 7, 1, packets(_4=2)),  # Felix has made a new map
            CalicoRow("cali_counters6", 40, 2, 0, packets(_0=10)),  # somebody has cleared this one
            CalicoRow("cali_counters6", 40, 8, 0, packets(_4=1)),  # a new pod
        ),
        interfaces=(Interface(9, "eth0", {"rx_dropped": 1}), Interface(8, "calinew", {"rx_dropped": 2})),
        qdiscs=(),
    )
    said = changed(counters.rates(FIRST, after))
    assert said["calico", "calinew", "tc ingress", "DROPPED_BY_POLICY"] == (None, None, counters.NEW)
    assert said["interface", "calinew", "", "rx_dropped"] == (None, None, counters.NEW)
    assert said["interface", "eth0", "", "rx_dropped"] == (None, None, counters.MADE_ANEW)
    assert counters.gone(FIRST, after) == ["eth0", POD]
    same = replace(after, interfaces=FIRST.interfaces)
    said = changed(counters.rates(FIRST, same))
    assert said["calico", POD, "tc egress", "DROPPED_BY_POLICY"] == (None, None, counters.MADE_ANEW)
    assert said["calico", "eth0", "tc ingress", "TOTAL_PACKETS"] == (None, None, counters.BACKWARDS)
    assert all(row.delta is None or row.delta >= 0 for row in counters.rates(FIRST, after))


def test_what_was_not_read_before_is_not_new() -> None:
    before = replace(FIRST, calico=Missing("no Calico maps"), softnet=Missing("no file"))
    said = changed(counters.rates(before, LATER))
    assert said["calico", POD, "tc egress", "DROPPED_BY_POLICY"] == (None, None, counters.FIRST)
    assert {change for *_, change in said.values()} == {counters.FIRST}
    assert counters.missing(before) == {"calico": "no Calico maps", "softnet": "no file"}


def test_without_any_source_there_is_nothing() -> None:
    nothing = Reading(1, 1)
    assert counters.totals(nothing) == counters.rates(nothing, replace(nothing, mono_ns=2)) == []
    assert counters.gone(nothing, FIRST) == counters.gone(FIRST, nothing) == []
    assert set(counters.missing(nothing).values()) == {"not read"}


def test_what_we_count_ourselves_where_the_kernel_does_not() -> None:
    before, after = replace(FIRST, tc_drops=()), replace(LATER, tc_drops=(TcDrops(2, "egress", 8), TcDrops(7, "x", 1)))
    assert changed(counters.rates(before, after)) == {("tcx", "eth0", "tc egress", "TC_EGRESS"): (8, 4.0, "")}
    assert [row.total for row in counters.totals(after) if row.key.source == "tcx"] == [0, 8]
    assert list(report.iter_notes(report.table(None, after, ALL))) == []
    unread = replace(LATER, tc_drops=Missing("no room"))
    assert [row.total for row in counters.totals(unread) if row.key.source == "tcx"] == [None, None]
    assert counters.missing(unread) == {"tc_drops": "no room"}


def test_a_choice_of_interfaces() -> None:
    rows = report.table(None, FIRST, Choice(("cali*",))).rows
    assert {row.key.interface for row in rows} == {POD}
    said = list(report.iter_notes(report.table(None, FIRST, Choice(("cali*", "eht0")))))
    assert said == ["no interface is called eht0"]
    after = replace(LATER, interfaces=())
    assert report.table(FIRST, after, Choice(("cali*",))).gone == (POD,)
    assert report.table(FIRST, after, Choice()).gone == ("eth0", POD)


def test_an_interval_shows_what_was_counted_and_what_is_odd() -> None:
    after = replace(
        LATER,
        interfaces=(Interface(12, "eth0", {"rx_dropped": 1, "tx_errors": 0}), Interface(7, POD, {"rx_dropped": 6})),
    )
    shown = [each for each in report.table(FIRST, after, Choice()).rows if each.key.source == "interface"]
    assert short(shown) == [("interface", "eth0", "", "rx_dropped", 1), ("interface", POD, "", "rx_dropped", 6)]
    assert len(report.table(FIRST, after, ALL).rows) == len(counters.totals(after))


TEXT = """\
12:00:00 since boot, or since each was made:
SOURCE     INTERFACE        PLACE                  COUNTER                  TOTAL
calico     calif00dbeef012  egress                 TOTAL_PACKETS              100
calico     calif00dbeef012  egress                 ACCEPTED_BY_POLICY          60
calico     calif00dbeef012  egress                 DROPPED_BY_POLICY           17
calico     eth0             ingress                TOTAL_PACKETS              900
clsact     calif00dbeef012  both                   dropped                     17
tcx        eth0             ingress                dropped             no counter
tcx        eth0             egress                 dropped             no counter
interface  eth0             -                      rx_dropped                   3
qdisc      eth0             mq 8001:               dropped                      5
qdisc      eth0             fq_codel 0: parent :1  dropped                      5
softnet    -                cpu 0                  time_squeeze                 4
softnet    -                cpu 2                  dropped                      1

12:00:02 within 2.000 s:
SOURCE     INTERFACE        PLACE  COUNTER     COUNTED  PER S  TOTAL
interface  eth0             -      rx_dropped        -      -      1  made anew
interface  calif00dbeef012  -      rx_dropped        7    3.5      7

12:00:04 within 2.000 s: nothing was counted"""


def test_text() -> None:
    second = replace(
        LATER,
        calico=Missing("no maps"),
        qdiscs=(),
        interfaces=(Interface(9, "eth0", {"rx_dropped": 1}), Interface(7, POD, {"rx_dropped": 7})),
        tcx=(),
    )
    third = replace(second, mono_ns=second.mono_ns + 2_000_000_000)
    lines = [
        *report.iter_text(report.table(None, FIRST, Choice()), "12:00:00"),
        *report.iter_text(report.table(FIRST, second, Choice()), "12:00:02"),
        *report.iter_text(report.table(second, third, Choice()), "12:00:04"),
    ]
    assert "\n".join(lines) == TEXT
    assert list(report.iter_notes(report.table(None, FIRST, Choice()))) == [
        "the kernel has no counter of what tcx programs drop (eth0 tc ingress, eth0 tc egress): Calico's own reasons "
        "are above; --tcx has calitrace count while it runs"
    ]
    assert list(report.iter_notes(report.table(FIRST, second, Choice()))) == [
        "no counters of calico: no maps",
        "gone since the last reading, with what they counted: eth0",
    ]
    assert list(report.iter_notes(report.table(FIRST, LATER, ALL))) == []


def test_json() -> None:
    second = replace(LATER, qdiscs=Missing("refused"), interfaces=(Interface(2, "eth0", {"rx_dropped": 4}),))
    about, *rows = map(json.loads, report.iter_json(report.table(FIRST, second, Choice())))
    assert about == {
        "type": "reading",
        "time_ns": LATER.wall_ns,
        "seconds": 2.0,
        "missing": {"qdiscs": "refused"},
        "gone": [POD],
    }
    assert rows[-1] == {
        "type": "counter",
        "time_ns": LATER.wall_ns,
        "seconds": 2.0,
        "source": "interface",
        "interface": "eth0",
        "place": None,
        "counter": "rx_dropped",
        "total": 4,
        "delta": 1,
        "per_second": 0.5,
        "change": None,
    }
    every = [json.loads(line) for line in report.iter_json(report.table(None, FIRST, ALL))]
    none = [each for each in every if each["type"] == "counter" and each["total"] is None]
    assert {(each["source"], each["seconds"], each["delta"], each["per_second"]) for each in none} == {
        ("tcx", None, None, None)
    }
    assert {each["interface"] for each in every[1:]} == {"eth0", POD, None}


def test_through_a_journal() -> None:
    stream = io.BytesIO()
    writer = journal.Writer(stream, {})
    taken = [FIRST, replace(LATER, calico=Missing("gone"), tc_drops=(TcDrops(2, "egress", 8),))]
    for reading in taken:
        writer.write(journal.COUNTERS, to_plain(reading))
    writer.write(journal.END, {})
    stream.seek(0)
    found = journal.read(stream)
    assert found.complete
    assert found.unknown == {}
    assert list(counters.readings(found.counters)) == taken


@pytest.mark.parametrize(
    "frames",
    [
        [{}],
        [{"mono_ns": "1", "wall_ns": 1}],
        [to_plain(LATER), to_plain(FIRST)],
        [to_plain(FIRST), to_plain(FIRST)],
        [to_plain(FIRST) | {"softnet": [{"cpu": 1}]}],
    ],
)
def test_what_is_no_reading_is_refused(frames: list[dict[str, Any]]) -> None:
    with pytest.raises(Malformed, match="malformed reading"):
        list(counters.readings(frames))


counts = st.integers(0, 3)
any_reading = st.builds(
    Reading,
    st.just(0),
    st.just(0),
    st.lists(
        st.builds(CalicoRow, st.just("c"), counts, counts, counts, st.lists(counts, max_size=3).map(tuple)), max_size=2
    ).map(tuple)
    | st.just(Missing("x")),
    st.lists(st.builds(Qdisc, counts, st.sampled_from([CLSACT, "fq"]), counts, counts, st.integers(0)), max_size=2).map(
        tuple
    ),
    st.lists(
        st.builds(Interface, counts, st.sampled_from("ab"), st.fixed_dictionaries({"rx_dropped": counts})), max_size=2
    ).map(tuple),
)


@given(any_reading, any_reading)
def test_no_two_readings_give_a_negative_rate(before: Reading, after: Reading) -> None:
    rows = counters.rates(before, replace(after, mono_ns=1))
    assert all((row.delta is None) == bool(row.change) for row in rows)
    assert all(row.delta is None or (row.delta >= 0 and (row.per_second or 0) >= 0) for row in rows)
