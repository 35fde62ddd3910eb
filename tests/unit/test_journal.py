"""The journal: whole, cut at every byte, and not a journal at all."""

from __future__ import annotations

import io
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import journal
from calitrace.calico.maps import RawMap
from calitrace.errors import Malformed

_HEADER = {"node": "n"}
_PROBE = {"number": 1, "outcome": "answered"}
_FRAMES: tuple[tuple[str, dict[str, Any]], ...] = (
    (journal.EVENTS, {"raw": [b"one", b"two"]}),
    ("from the future", {"x": 1}),
    (journal.PROBES, {"probes": [_PROBE]}),
    (journal.SYMBOLS, {"names": {1: "f+0x1"}}),
    (journal.STATEMENT, {"ktime_ns": 5, "skbaddr": 7, "said": {"back": "eth1"}}),
    (journal.WALK, {"netns": 9, "steps": [{"lookup": "route"}]}),
    (journal.TOTALS, {"lost": {"hop": 2}}),
    (journal.END, {}),
)


def written() -> tuple[bytes, list[int]]:
    """A journal of one frame of each kind, and where each frame ends."""
    stream = io.BytesIO()
    writer = journal.Writer(stream, _HEADER)
    ends = [stream.tell()]
    for kind, body in _FRAMES:
        writer.write(kind, body)
        ends.append(stream.tell())
    return stream.getvalue(), ends


def test_all_comes_back() -> None:
    found = journal.read(io.BytesIO(written()[0]))
    assert found.header == {"schema": journal.SCHEMA, **_HEADER}
    assert (found.events, found.probes, found.symbols) == ([b"one", b"two"], {1: _PROBE}, {1: "f+0x1"})
    assert (found.totals, dict(found.unknown)) == ({"lost": {"hop": 2}}, {"from the future": 1})
    assert found.statements == {(5, 7): {"back": "eth1"}}
    assert found.walks == {9: [{"lookup": "route"}]}
    assert (found.complete, found.cut_at) == (True, None)


def test_no_frame_for_no_events() -> None:
    stream = io.BytesIO()
    writer = journal.Writer(stream, _HEADER)
    before = stream.tell()
    writer.events([])
    assert stream.tell() == before
    writer.events(iter([b"one"]))
    assert journal.read(io.BytesIO(stream.getvalue())).events == [b"one"]


@pytest.mark.parametrize("cut", range(len(written()[0])))
def test_cut_short(cut: int) -> None:
    raw, ends = written()
    if cut < ends[0]:
        with pytest.raises(Malformed, match="no complete frame"):
            journal.read(io.BytesIO(raw[:cut]))
        return
    found = journal.read(io.BytesIO(raw[:cut]))
    assert (found.complete, found.cut_at) == (False, max(end for end in ends if end <= cut))
    assert found.events == ([b"one", b"two"] if cut >= ends[1] else [])
    assert found.totals == ({"lost": {"hop": 2}} if cut >= ends[7] else {})


_START = journal.frame(journal.HEADER, {"schema": journal.SCHEMA})


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "no complete frame"),
        (b"\xc1", "a frame"),
        (b"\x01", r"a frame \[kind, map\], found int"),
        (journal.frame(journal.EVENTS, {"raw": []}), "a frame of kind 'calitrace'"),
        (journal.frame(journal.HEADER, {"schema": 99}), "schema 1, found schema 99"),
        (_START + b"\xc1", f"at byte {len(_START)}"),
        (_START + journal.frame(journal.EVENTS, {"raw": [1]}), "a list of event records"),
        (_START + journal.frame(journal.EVENTS, {}), "a list of event records"),
        (_START + journal.frame(journal.SYMBOLS, {"names": 3}), "a frame"),
        (_START + journal.frame(journal.SYMBOLS, {"names": ["f"]}), "a frame"),
        (_START + journal.frame(journal.PROBES, {"probes": 3}), "a frame"),
        (_START + journal.frame(journal.PROBES, {"probes": [{}]}), "a frame"),
        (_START + journal.frame(journal.TEXT, {"raw": "x"}), "bytes of text"),
        (_START + b"\x81\x90\x01", "a frame"),  # a map whose key is an array
    ],
)
def test_what_is_no_journal(raw: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        journal.read(io.BytesIO(raw))


def test_text_is_left_to_its_reader() -> None:
    raw = _START + journal.frame(journal.TEXT, {"raw": b"line\n"})
    found = journal.read(io.BytesIO(raw))
    assert (found.events, found.unknown.total(), found.cut_at) == ([], 0, len(raw))


_VALUES = st.recursive(
    st.none() | st.integers(0, 99) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["raw", "probes", "names", "schema"]), inner),
)


@given(st.one_of(st.binary(), st.tuples(st.sampled_from(journal.KINDS), _VALUES).map(msgpack.packb)))
def test_any_frames_give_a_journal_or_malformed(raw: bytes) -> None:
    try:
        found = journal.read(io.BytesIO(_START + raw))
    except Malformed:
        return
    assert found.header["schema"] == journal.SCHEMA


_BLOCKS = [(2, b"k1k2", b"v1..v2.."), (1, b"k3", b"v3..")]
_EMPTY = RawMap("cali_b", "globals/cali_b", 5, 2, 12, 10, 2, (), notes=("a note",))


def with_maps() -> bytes:
    """A journal of two maps: three entries in two blocks, and none."""
    stream = io.BytesIO()
    writer = journal.Writer(stream, _HEADER)
    for raw, blocks in ((RawMap("cali_a", "globals/cali_a", 1, 2, 4, 10, 1, ()), _BLOCKS), (_EMPTY, [])):
        for body in journal.map_bodies(raw, blocks):
            writer.write(journal.MAPS, body)
    writer.write(journal.END, {})
    return stream.getvalue()


def test_maps_come_back() -> None:
    first, empty = journal.read(io.BytesIO(with_maps())).maps
    assert (first.name, first.pin, first.map_type, first.max_entries, first.cpus) == (
        *("cali_a", "globals/cali_a", 1, 10, 1),
    )
    wanted = [(b"k1", b"v1.."), (b"k2", b"v2.."), (b"k3", b"v3..")]
    assert list(first.entries) == wanted
    assert list(first.entries) == wanted  # again: it is no iterator
    assert isinstance(first.entries, journal.Stored)
    assert list(first.entries.iter_blocks()) == _BLOCKS
    assert isinstance(empty.entries, journal.Stored)
    assert (list(empty.entries), empty.notes, empty.entries.value_size) == ([], ("a note",), 32)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"first": False}, "the first block of a map"),
        ({"keys": "text"}, "a block of a map"),
        ({"key_size": 0}, "a block of a map"),
        ({"notes": [1]}, "a block of a map"),
        ({"keys": b"odd"}, "1 values"),
        ({"values": b"odd"}, "2 values"),
    ],
)
def test_a_map_that_does_not_fit(change: dict[str, Any], why: str) -> None:
    (body, *_) = journal.map_bodies(RawMap("cali_a", "p", 1, 2, 4, 10, 1, ()), _BLOCKS)
    raw = journal.frame(journal.HEADER, {"schema": journal.SCHEMA}) + journal.frame(journal.MAPS, {**body, **change})
    with pytest.raises(Malformed, match=why):
        journal.read(io.BytesIO(raw))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (journal.SYMBOLS, {"names": 3}),
        (journal.SYMBOLS, {"names": {1: b"f"}}),
        (journal.TOTALS, {"lost": ["hop"]}),
        (journal.TOTALS, {"stats": {"drop_seen": None}}),
    ],
)
def test_values_of_other_types(kind: str, body: dict[str, Any]) -> None:
    raw = journal.frame(journal.HEADER, {"schema": journal.SCHEMA}) + journal.frame(kind, body)
    with pytest.raises(Malformed):
        journal.read(io.BytesIO(raw))


def test_what_came_before_the_garbage_is_kept() -> None:
    found = journal.read(io.BytesIO(with_maps() + journal.frame(journal.EVENTS, {"raw": 1})), keep=True)
    assert len(found.maps) == 2
    assert found.broken is not None
    assert "a list of event records" in found.broken.cause
    with pytest.raises(Malformed, match="schema"):
        journal.read(io.BytesIO(journal.frame(journal.HEADER, {"schema": 0})), keep=True)
