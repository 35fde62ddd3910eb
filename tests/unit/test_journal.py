"""The journal: what was written comes back, and a cut or broken file says so."""

from __future__ import annotations

import io

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import journal
from calitrace.errors import Malformed

RECORDS = [b"first", b"second"]
FIRST_FRAME = len(journal.frame(journal.HEADER, {"schema": journal.SCHEMA, "node": "n1"}))


def sample() -> bytes:
    """A whole journal."""
    stream = io.BytesIO()
    writer = journal.Writer(stream, {"node": "n1"})
    writer.events(RECORDS[:1])
    writer.events([])
    writer.write(journal.PROBES, {"probes": [{"number": 3, "outcome": "unanswered"}]})
    writer.events(RECORDS[1:])
    writer.write(journal.PROBES, {"probes": [{"number": 3, "outcome": "answered"}]})
    writer.write(journal.SYMBOLS, {"names": {0xFFFF: "tcp_v4_rcv+0x1"}})
    writer.write(journal.TOTALS, {"lost": {"drop": 0}})
    writer.write("from-the-future", {})
    writer.write(journal.END, {})
    return stream.getvalue()


def test_round_trip() -> None:
    found = journal.read(io.BytesIO(sample()))
    assert found.header == {"schema": journal.SCHEMA, "node": "n1"}
    assert found.events == RECORDS
    assert found.probes == {3: {"number": 3, "outcome": "answered"}}
    assert found.symbols == {0xFFFF: "tcp_v4_rcv+0x1"}
    assert found.totals == {"lost": {"drop": 0}}
    assert found.unknown == {"from-the-future": 1}
    assert (found.complete, found.cut_at) == (True, None)


def test_cut_at_every_byte() -> None:
    whole = sample()
    for at in range(len(whole)):
        if at < FIRST_FRAME:
            with pytest.raises(Malformed, match="no complete frame"):
                journal.read(io.BytesIO(whole[:at]))
            continue
        found = journal.read(io.BytesIO(whole[:at]))
        assert not found.complete
        assert found.cut_at is not None
        assert found.cut_at <= at
        assert found.events == RECORDS[: len(found.events)]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([["other", {}]], "a frame of kind 'calitrace'"),
        ([["calitrace", {"schema": 99}]], "schema 1"),
        ([7], "a frame"),
        ([["calitrace", {"schema": 1}], ["events", {"raw": 5}]], "a list of event records"),
    ],
)
def test_garbage_is_named(frames: list[object], expected: str) -> None:
    with pytest.raises(Malformed) as caught:
        journal.read(io.BytesIO(b"".join(msgpack.packb(frame) for frame in frames)))
    assert caught.value.expected.startswith(expected)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_journal_or_malformed(noise: bytes) -> None:
    with pytest.raises(Malformed):
        journal.read(io.BytesIO(noise))
    try:
        found = journal.read(io.BytesIO(sample() + noise))
    except Malformed:
        return
    assert found.events[:2] == RECORDS
