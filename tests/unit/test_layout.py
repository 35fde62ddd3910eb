"""Tables to bytes, C and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calitrace import events
from calitrace.decode import Decoder, decode
from calitrace.errors import LayoutMismatch, Malformed
from calitrace.events import DROP, HOP, LOG, RECORDS, EventType, HopKind
from calitrace.layout import Field, Record
from calitrace.model import Drop, Hop, LogLine

SMALL = Record("small", "A test.", (Field("a", "u32", "one"), Field("b", "u16"), Field("c", "u8", "", 2)))
HEADER_FILE = Path(__file__).resolve().parent.parent.parent / "bpf" / "include" / "events.h"


def test_encode_and_decode() -> None:
    raw = SMALL.encode(a=1, b=2, c=b"xy")
    assert raw == b"\x01\0\0\0\x02\0xy"
    assert SMALL.decode(raw) == {"a": 1, "b": 2, "c": b"xy"}
    assert SMALL.encode() == bytes(8)
    assert [SMALL.offset(name) for name in "abc"] == [0, 4, 6]
    with pytest.raises(KeyError):
        SMALL.offset("d")
    with pytest.raises(KeyError, match="no field d"):
        SMALL.encode(d=1)
    with pytest.raises(LayoutMismatch):
        SMALL.unpack(raw[:-1])


@pytest.mark.parametrize(
    "fields",
    [
        (Field("a", "u8"), Field("b", "u32")),
        (Field("a", "u32"), Field("b", "u8")),
        (Field("a", "u16", "", 4),),
    ],
)
def test_tables_without_explicit_padding_are_refused(fields: tuple[Field, ...]) -> None:
    with pytest.raises(ValueError, match="wrong"):
        Record("wrong", "", fields)


def test_c_declaration() -> None:
    text = SMALL.c_struct()
    assert "\tu32 a; /* one */" in text
    assert "\tu8 c[2];" in text
    assert '_Static_assert(sizeof(struct small) == 8, "small");' in text


def test_committed_header_is_the_generated_one() -> None:
    assert HEADER_FILE.read_text() == events.c_header()


@given(st.sampled_from(list(RECORDS.values())), st.data())
def test_any_bytes_of_the_right_size_decode(record: Record, data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.binary(min_size=record.size, max_size=record.size)))
    raw[8:10] = next(int(k) for k, r in RECORDS.items() if r is record).to_bytes(2, "little")
    if record is HOP:
        raw[HOP.offset("kind") : HOP.offset("kind") + 4] = (1).to_bytes(4, "little")
    assert decode(bytes(raw)).ktime_ns == int.from_bytes(raw[:8], "little")


def test_an_unknown_hop_kind_is_malformed() -> None:
    with pytest.raises(Malformed, match="a hop kind"):
        decode(HOP.encode(type=int(EventType.HOP), kind=99))


@given(st.binary(max_size=600))
def test_any_bytes_give_an_event_or_malformed(raw: bytes) -> None:
    decoder = Decoder()
    found = list(decoder.iter_events([raw]))
    assert len(found) + sum(decoder.malformed.values()) == 1


def test_events() -> None:
    line = decode(LOG.encode(ktime_ns=5, type=3, cpu=1, pid=7, text_bytes=2, text=b"hi", comm=b"me"))
    assert isinstance(line, LogLine)
    assert (line.text, line.comm, line.cut, line.cpu) == ("hi", "me", False, 1)
    drop = decode(DROP.encode(type=int(EventType.DROP), skb_drop_reason=events.NO_REASON))
    assert isinstance(drop, Drop)
    assert drop.skb_drop_reason is None
    hop = decode(HOP.encode(type=int(EventType.HOP), kind=int(HopKind.XMIT), rc=-1))
    assert isinstance(hop, Hop)
    assert (hop.kind, hop.rc) == (HopKind.XMIT, -1)
    with pytest.raises(Malformed, match="a known event type"):
        decode(bytes(16))
    with pytest.raises(Malformed, match="at least 16 bytes"):
        decode(b"")
