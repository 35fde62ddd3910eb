"""From bytes to records, events and packets: right values, and one declared error for all other bytes."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import packets

from calitrace import decode as decoding
from calitrace import events, identity
from calitrace.errors import LayoutMismatch, Malformed
from calitrace.events import DROP, HEADER, HOP, LOG, STATE, EventType, HopKind, Match
from calitrace.identity import Identity
from calitrace.layout import Field, Record
from calitrace.model import Drop, Hop, LogLine, StateCopy
from calitrace.packet import Packet, dissect, inside_vxlan, ip_length

TOP = Path(__file__).resolve().parent.parent.parent


def test_the_c_header_is_up_to_date() -> None:
    assert (TOP / "bpf" / "include" / "events.h").read_text() == events.c_header()


def test_a_record_is_its_table() -> None:
    record = Record("r", "Doc.", (Field("a", "u16", "HBO"), Field("b", "u8", "", 2), Field("c", "s32")))
    assert (record.size, record.offset("c")) == (8, 4)
    raw = record.encode(a=0x0102, c=-1)
    assert raw == b"\x02\x01\0\0\xff\xff\xff\xff"
    assert record.decode(raw) == {"a": 0x0102, "b": b"\0\0", "c": -1}
    assert "\tu8 b[2];\n" in record.c_struct()
    assert '_Static_assert(sizeof(struct r) == 8, "r");' in record.c_struct()
    with pytest.raises(KeyError):
        record.offset("d")
    with pytest.raises(KeyError, match="no field d"):
        record.encode(d=1)
    with pytest.raises(LayoutMismatch, match="expected 8 bytes, found 7 bytes"):
        record.unpack(raw[1:])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((Field("a", "u16", "", 2),), "only u8 arrays"),
        ((Field("a", "u8"), Field("b", "u32")), "unaligned at 1"),
        ((Field("a", "u32"), Field("b", "u8")), "padding at the end"),
    ],
)
def test_a_table_that_c_would_pad_is_refused(fields: tuple[Field, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Record("r", "", fields)


_COMMON = {"ktime_ns": 5, "cpu": 1, "netns": 7}
_SEEN = {"skbaddr": 9, "ifindex": 2, "skb_iif": 3, "mark": 4, "len_bytes": 60, "match": Match.IDENTITY}


def test_packet_events() -> None:
    raw = packets.syn()
    values: dict[str, int] = {**_COMMON, **_SEEN}
    captured: dict[str, Any] = {"capture": raw, "capture_bytes": len(raw)}
    expected: dict[str, Any] = {**values, "packet": dissect(raw)}
    hop = decoding.decode(HOP.encode(type=EventType.HOP, kind=HopKind.XMIT, rc=-2, **values, **captured))
    assert hop == Hop(**expected, kind=HopKind.XMIT, rc=-2)
    for code, shown in ((50, 50), (events.NO_REASON, None)):
        drop = decoding.decode(DROP.encode(type=EventType.DROP, location=8, skb_drop_reason=code, **values, **captured))
        assert drop == Drop(**expected, location=8, skb_drop_reason=shown)


def test_log_and_state() -> None:
    raw = LOG.encode(type=EventType.LOG, ktime_ns=5, cpu=1, lost=7, pid=3, text_bytes=2, comm=b"py\0x", text=b"hi!")
    line = decoding.decode(raw)
    assert line == LogLine(5, 1, 7, 3, "py", "hi", False)
    full = decoding.decode(LOG.encode(type=EventType.LOG, text_bytes=events.TEXT_BYTES - 1, text=b"x" * 215))
    assert isinstance(full, LogLine)
    assert full.cut
    copy = decoding.decode(STATE.encode(type=EventType.STATE, skbaddr=9, state_bytes=2, state=b"abc", **_COMMON))
    assert copy == StateCopy(5, 1, 7, 9, b"ab")


@pytest.mark.parametrize(
    "raw",
    [b"", HEADER.encode(type=99), HEADER.encode(type=EventType.LOG), HOP.encode(type=EventType.HOP, kind=99)],
)
def test_what_is_no_event_is_counted(raw: bytes) -> None:
    decoder = decoding.Decoder()
    assert list(decoder.iter_events([raw])) == []
    assert decoder.malformed.total() == 1


@given(
    st.sampled_from([HEADER, *events.RECORDS.values()]).flatmap(lambda r: st.binary(min_size=r.size, max_size=r.size)),
    st.sampled_from([*EventType, 0]),
)
def test_any_bytes_give_an_event_or_malformed(raw: bytes, kind: int) -> None:
    raw = raw[:8] + kind.to_bytes(2, "little") + raw[10:]
    try:
        assert decoding.decode(raw).ktime_ns == int.from_bytes(raw[:8], "little")
    except Malformed:
        return


@given(st.binary(max_size=160), st.sampled_from([b"", b"\x45", b"\x60", packets.vxlan("1.1.1.1", "2.2.2.2", b"")]))
def test_any_bytes_give_a_packet(raw: bytes, start: bytes) -> None:
    packet = dissect(start + raw)
    assert len(packet.layers) <= 3
    assert all(str(layer) for layer in packet.layers)


@given(raw=st.binary(max_size=DROP.size), kind=st.sampled_from(EventType))
def test_drops_are_told_by_their_header(raw: bytes, kind: EventType) -> None:
    assert not decoding.is_drop(raw[: HEADER.size - 1])
    raw = HEADER.encode(type=kind) + raw
    assert decoding.is_drop(raw) == (kind is EventType.DROP)


def test_identity() -> None:
    mine = Identity(packets.RUN_ID, 1, 2)
    assert identity.decode(identity.encode(mine)) == mine
    assert identity.decode(b"\0" * 16) is None
    assert identity.decode(b"") is None
    assert identity.run_tag(0) == 1
    assert identity.tcp_number(identity.tcp_sequence(5, 7), 5) == 7
    assert identity.tcp_number(0, 5) is None
    with pytest.raises(ValueError, match="does not fit"):
        identity.tcp_sequence(1, 1 << 20)


def test_a_probe_inside_vxlan() -> None:
    payload = identity.encode(Identity(1, 2, 3))
    packet = dissect(packets.vxlan("1.0.0.1", "1.0.0.2", packets.udp("2.0.0.1", 10, "2.0.0.2", 20, payload), 77))
    assert packet.tunnel is packet.outer
    assert (packet.tunnel.vni if packet.tunnel else None) == 77
    assert packet.inner is not None
    assert (packet.inner.identity, packet.inner.ttl) == (Identity(1, 2, 3), 64)
    assert str(packet.inner) == "udp 2.0.0.1:10 > 2.0.0.2:20"
    assert dissect(b"") == Packet(())
    assert (Packet(()).outer, Packet(()).tunnel, Packet(()).inner, Packet(()).quoted) == (None, None, None, None)


def test_what_an_icmp_error_quotes() -> None:
    packet = dissect(packets.icmp_error("1.0.0.1", "1.0.0.2", packets.syn()[:28]))
    assert str(packet.inner) == "icmp 1.0.0.1 > 1.0.0.2 type 3 code 3"
    assert packet.quoted is not None
    assert (packet.quoted.sport, packet.quoted.seq) == (packets.SPORT, identity.tcp_sequence(packets.RUN_ID, 0))
    assert str(packet.quoted) == f"tcp - {packets.CLIENT}:{packets.SPORT} > {packets.NODE_A}:{packets.NODEPORT}"
    echo = dissect(packets.ip("1.0.0.1", "1.0.0.2", 1, b"\x08\0" + bytes(6)))
    assert (len(echo.layers), echo.quoted) == (1, None)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (packets.icmp_error("1.0.0.1", "1.0.0.2", packets.syn()), "ICMP port unreachable from 1.0.0.1"),
        (packets.icmp_error("1.0.0.1", "1.0.0.2", packets.syn(), code=9), "ICMP code 9 unreachable from 1.0.0.1"),
        (packets.icmp_error("1.0.0.1", "1.0.0.2", packets.syn(), code=4), "ICMP fragmentation needed from 1.0.0.1"),
        (packets.icmp_error("1.0.0.1", "1.0.0.2", packets.syn(), kind=11, code=0), "ICMP type 11 code 0 from 1.0.0.1"),
        (packets.tcp("1.0.0.1", 1, "1.0.0.2", 2, 0x14), "TCP RST from 1.0.0.1"),
    ],
)
def test_a_refusal_in_words(raw: bytes, said: str) -> None:
    packet = dissect(raw).inner
    assert packet is not None
    assert packet.refusal == said


def test_an_icmp_error_inside_vxlan() -> None:
    error = packets.icmp_error("2.0.0.1", "2.0.0.2", packets.vxlan("3.0.0.1", "3.0.0.2", packets.syn()))
    packet = dissect(packets.vxlan("1.0.0.1", "1.0.0.2", error))
    assert [str(layer.src) for layer in packet.layers] == ["1.0.0.1", "2.0.0.1", "3.0.0.1"]
    assert packet.quoted is packet.layers[2]


def test_ipv6_fragments_and_short_packets() -> None:
    six = b"\x60" + bytes(5) + bytes([17, 9]) + ip_address("::1").packed + ip_address("::2").packed
    assert str(dissect(six + b"\0\1\0\2\0\0\0\0").inner) == "udp [::1]:1 > [::2]:2"
    fragment = bytearray(packets.udp("1.0.0.1", 1, "1.0.0.2", 2))
    fragment[7] = 1
    assert str(dissect(bytes(fragment)).inner) == "udp later fragment 1.0.0.1 > 1.0.0.2"
    assert str(dissect(packets.ip("1.0.0.1", "1.0.0.2", 47, b"")).inner) == "47 1.0.0.1 > 1.0.0.2"
    assert dissect(b"\x45" + bytes(10)).layers == ()


BY_HOP, DESTINATION, ROUTING = (0, bytes(7)), (60, b"\1" + bytes(14)), (43, b"\2" + bytes(22))
FIRST, LATER = (44, b"\0\0\1" + bytes(4)), (44, b"\0\0\x09" + bytes(4))
UDP_HEAD = struct.pack("!HHHH", 1, 2, 16, 0) + struct.pack("!HHHH", 3, 4, 0, 0)
TCP_HEAD = struct.pack("!HHIIBBHHH", 1, 2, 0, 0x30004, 0x50, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("proto", "headers", "payload", "shown", "calico"),
    [
        (17, (), UDP_HEAD, "udp [::1]:1 > [::2]:2", None),
        (17, (BY_HOP,), UDP_HEAD, "udp [::1]:1 > [::2]:2", (17, 1, 2)),
        (6, (BY_HOP, DESTINATION, ROUTING), TCP_HEAD, "tcp SYN [::1]:1 > [::2]:2", (6, 1, 2)),
        (58, (BY_HOP,), b"\1\4" + bytes(6), "icmp6 ::1 > ::2 type 1 code 4", (58, 0x104, 0)),
        (17, (FIRST,), UDP_HEAD, "udp [::1]:1 > [::2]:2", (17, 3, 4)),  # 8 bytes too far
        (17, (FIRST,), UDP_HEAD[:8], "udp [::1]:1 > [::2]:2", (17, 0, 0)),  # nothing is there
        (6, (FIRST,), TCP_HEAD, "tcp SYN [::1]:1 > [::2]:2", (6, 0, 0)),
        (6, (FIRST,), TCP_HEAD + bytes(8), "tcp SYN [::1]:1 > [::2]:2", (6, 3, 4)),
        (17, (LATER,), UDP_HEAD, "udp later fragment ::1 > ::2", (17, 3, 4)),
        (17, (BY_HOP, LATER), UDP_HEAD, "udp later fragment ::1 > ::2", (17, 1, 2)),
        (17, ((51, b"\4" + bytes(22)),), UDP_HEAD + bytes(30), "udp [::1]:1 > [::2]:2", (17, 0, 0)),
        (50, (BY_HOP,), bytes(200), "50 ::1 > ::2", (0, 0, 0)),
        (132, (), bytes(16), "132 ::1 > ::2", (0, 0, 0)),
        (59, (), b"", "59 ::1 > ::2", None),
        (59, (BY_HOP,), b"", "59 ::1 > ::2", None),
        (17, (BY_HOP,), b"", "udp [::1]:0 > [::2]:0", (17, 0, 0)),
    ],
)
def test_ipv6_extension_headers(
    proto: int,
    headers: tuple[tuple[int, bytes], ...],
    payload: bytes,
    shown: str,
    calico: tuple[int, int, int] | None,
) -> None:
    layer = dissect(packets.ip6("::1", "::2", proto, *headers, payload=payload)).inner
    assert layer is not None
    assert (str(layer), layer.calico) == (shown, calico)


def test_ipv6_extension_headers_that_are_cut_off() -> None:
    whole = packets.ip6("::1", "::2", 17, BY_HOP, DESTINATION, payload=UDP_HEAD)
    for size in range(40, len(whole)):
        layer = dissect(whole[:size]).inner
        assert layer is not None
        assert layer.proto == (0 if size < 48 else 60 if size < 56 else 17)


@pytest.mark.parametrize("words", [0, 4])
def test_a_header_length_below_twenty_bytes_has_no_ports(words: int) -> None:
    raw = bytearray(packets.udp("1.0.0.1", 1, "1.0.0.2", 2))
    raw[0] = 0x40 | words
    assert str(dissect(bytes(raw)).inner) == "udp 1.0.0.1:0 > 1.0.0.2:0"


def test_length_and_payload_of_vxlan() -> None:
    inner = packets.udp("1.0.0.1", 1, "1.0.0.2", 2)
    outer = packets.vxlan("2.0.0.1", "2.0.0.2", inner)
    assert ip_length(outer) == len(outer) == ip_length(outer[:40])
    assert ip_length(b"\x60\0\0\0\0\x09") == 49
    assert ip_length(b"") == ip_length(b"\x45\0") == ip_length(b"\x60") == 0
    assert inside_vxlan(outer, 4789) == inner
    assert inside_vxlan(outer, 4790) == inside_vxlan(inner, 4789) == inside_vxlan(b"", 4789) == b""
