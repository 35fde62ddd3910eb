"""Patched packets are what scapy would have built."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP

from calitrace import identity, packet
from calitrace.identity import Identity
from calitrace.packet import CALICO_VNI
from calitrace.probes.template import Flow, Template, checksum

RUN_ID = 0x0BADCAFE
ports = st.integers(1, 65535)
numbers = st.integers(0, identity.MAX_NUMBER)


def rebuilt(raw: bytes) -> bytes:
    """The same packet with all checksums made by scapy."""
    parsed = IP(raw)
    del parsed.chksum
    del parsed[TCP if TCP in parsed else UDP].chksum
    return bytes(parsed)


@given(sport=ports, dport=ports, number=numbers, size=st.integers(0, 1460))
def test_syn_is_as_scapy_builds_it(sport: int, dport: int, number: int, size: int) -> None:
    raw = Template(Flow(packet.TCP, "10.0.0.1", "10.0.0.2", dport, size), RUN_ID).request(number, sport)
    assert raw == rebuilt(raw)
    layer = packet.dissect(raw).inner
    assert layer is not None
    assert (layer.sport, layer.dport, layer.flags) == (sport, dport, packet.SYN)
    assert identity.tcp_number(layer.seq, RUN_ID) == number
    assert len(raw) == 40 + size


@given(sport=ports, number=numbers)
def test_reset_follows_the_syn(sport: int, number: int) -> None:
    template = Template(Flow(packet.TCP, "10.0.0.1", "10.0.0.2", 80, 100), RUN_ID)
    raw = template.reset(number, sport)
    assert raw == rebuilt(raw)
    layer = packet.dissect(raw).inner
    assert layer is not None
    assert layer.flags == packet.RST
    assert layer.seq == identity.tcp_sequence(RUN_ID, number) + 1
    assert len(raw) == 40


@given(sport=ports, number=numbers, size=st.integers(0, 1400))
def test_datagram_is_as_scapy_builds_it(sport: int, number: int, size: int) -> None:
    raw = Template(Flow(packet.UDP, "10.0.0.1", "10.0.0.2", 53, size), RUN_ID).request(number, sport)
    assert raw == rebuilt(raw)
    layer = packet.dissect(raw).inner
    assert layer is not None
    assert layer.identity == Identity(RUN_ID, sport, number)
    assert len(raw) == 28 + max(size, identity.SIZE)


@pytest.mark.parametrize("proto", [packet.TCP, packet.UDP])
def test_tunnelled_as_calico_does_it(proto: int) -> None:
    flow = Flow(proto, "10.10.0.1", "10.10.0.9", 30080, 0, ("10.10.0.1", "10.10.0.2", 4789, CALICO_VNI))
    raw = Template(flow, RUN_ID).request(7, 40001)
    found = packet.dissect(raw)
    assert found.tunnel is not None
    assert (found.tunnel.vni, found.tunnel.sport) == (CALICO_VNI, 40001 ^ 30080)
    assert str(found.tunnel.dst) == "10.10.0.2"
    inner = raw[50:]
    assert inner == rebuilt(inner)
    assert raw[26:28] == b"\0\0"  # Calico drops its tunnel's packets when the outer checksum is not 0


@given(st.binary(max_size=64))
def test_checksum_verifies_itself(data: bytes) -> None:
    padded = data + b"\0" * (len(data) % 2)
    assert checksum(padded + checksum(padded).to_bytes(2, "big")) == 0
