"""Packets, identities, and what any bytes give."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit import packets
from tests.unit.packets import CLIENT, NODE_A, NODE_B

from calitrace import identity, packet
from calitrace.identity import Identity

u32 = st.integers(0, 2**32 - 1)


@given(u32, u32, u32, st.binary(max_size=8))
def test_identity_round_trip(run_id: int, flow: int, sequence: int, rest: bytes) -> None:
    mine = Identity(run_id, flow, sequence)
    assert identity.decode(identity.encode(mine) + rest) == mine


@given(u32, st.integers(0, identity.MAX_NUMBER))
def test_sequence_numbers(run_id: int, number: int) -> None:
    sequence = identity.tcp_sequence(run_id, number)
    assert identity.tcp_number(sequence, run_id) == number
    assert identity.tcp_number(sequence ^ 1 << 31, run_id) is None
    assert identity.run_tag(run_id) != 0


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        identity.tcp_sequence(1, identity.MAX_NUMBER + 1)
    assert identity.decode(b"") is None
    assert identity.decode(bytes(16)) is None


def test_an_icmp_error_in_a_tunnel_quotes_the_probe() -> None:
    found = packet.dissect(packets.vxlan(NODE_A, NODE_B, packets.icmp_error(NODE_A, CLIENT, packets.syn(3))))
    assert found.outer is found.tunnel is not None
    assert found.inner is not None
    assert found.inner.is_icmp_error
    assert found.quoted is not None
    assert (found.quoted.sport, found.quoted.flags) == (packets.SPORT + 3, packet.SYN)
    assert str(found.inner) == f"icmp {NODE_A} > {CLIENT} type 3 code 3"
    assert str(found.quoted) == f"tcp SYN {CLIENT}:{packets.SPORT + 3} > {NODE_A}:30080"


def test_an_icmp_error_may_quote_eight_bytes_of_tcp() -> None:
    found = packet.dissect(packets.icmp_error(NODE_A, CLIENT, packets.syn()[:28]))
    assert found.quoted is not None
    assert found.quoted.seq == identity.tcp_sequence(packets.RUN_ID, 0)
    assert found.quoted.flag_names == "-"


def test_ipv6() -> None:
    source, target = bytes(15) + b"\x01", bytes(15) + b"\x02"
    head = struct.pack("!IHBB", 6 << 28, 8, packet.UDP, 64) + source + target
    found = packet.dissect(head + struct.pack("!HHHH", 1, 2, 8, 0))
    assert str(found.inner) == "udp [::1]:1 > [::2]:2"


def test_what_has_no_ports() -> None:
    fragment = bytearray(packets.udp(CLIENT, 5, NODE_A, 6))
    fragment[7] = 1
    assert str(packet.dissect(bytes(fragment)).inner) == f"udp {CLIENT}:0 > {NODE_A}:0"
    assert str(packet.dissect(packets.ip(CLIENT, NODE_A, 47, b"")).inner) == f"47 {CLIENT} > {NODE_A}"
    echo = packet.dissect(packets.ip(CLIENT, NODE_A, packet.ICMP, b"\x08\0\0\0"))
    assert (echo.quoted, echo.tunnel) == (None, None)
    assert len(echo.layers) == 1


def test_nothing() -> None:
    found = packet.dissect(b"")
    assert (found.outer, found.inner, found.tunnel, found.quoted) == (None, None, None, None)


@given(st.binary(max_size=160))
def test_any_bytes_give_a_packet(raw: bytes) -> None:
    found = packet.dissect(raw)
    assert len(found.layers) <= 3
    assert all(str(layer) for layer in found.layers)


@given(st.binary(max_size=60), st.integers(0, 130))
def test_any_damage_to_a_tunnelled_error(noise: bytes, at: int) -> None:
    raw = packets.vxlan(NODE_A, NODE_B, packets.icmp_error(NODE_A, CLIENT, packets.syn()))
    assert len(packet.dissect(raw[:at] + noise + raw[at + len(noise) :]).layers) <= 3
