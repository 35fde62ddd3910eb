"""The journal: whole, cut at every byte, and not a journal at all."""

from __future__ import annotations

import io
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import journal
from calitrace.errors import Malformed

_HEADER = {"node": "n"}
_PROBE = {"number": 1, "outcome": "answered"}
_FRAMES: tuple[tuple[str, dict[str, Any]], ...] = (
    (journal.EVENTS, {"raw": [b"one", b"two"]}),
    ("from the future", {"x": 1}),
    (journal.PROBES, {"probes": [_PROBE]}),
    (journal.SYMBOLS, {"names": {1: "f+0x1"}}),
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
    assert found.totals == ({"lost": {"hop": 2}} if cut >= ends[5] else {})


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
