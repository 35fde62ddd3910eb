"""Probe packets: built once by scapy, then patched byte by byte.

scapy takes most of a second to import and more than half a millisecond to build a packet; a patch takes
microseconds. What is patched: source port, sequence number or payload identity, and the checksums over them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from calitrace import identity
from calitrace.identity import Identity
from calitrace.packet import TCP, UDP

IP_BYTES, UDP_BYTES, TCP_BYTES, VXLAN_BYTES, ETHERNET_BYTES = 20, 8, 20, 8, 14
MIN_UDP_PAYLOAD = identity.SIZE


@dataclass(frozen=True)
class Flow:
    """Where probes go. *tunnel*: (outer source, outer destination, UDP port, VNI) for VXLAN, or None."""

    proto: int
    src: str
    dst: str
    dport: int
    size: int
    tunnel: tuple[str, str, int, int] | None = None


class Template:
    """Makes the packets of one flow: whole IPv4 packets, as a raw socket sends them."""

    def __init__(self, flow: Flow, run_id: int) -> None:
        self._flow = flow
        self._run_id = run_id
        self._inner = IP_BYTES + UDP_BYTES + VXLAN_BYTES + ETHERNET_BYTES if flow.tunnel else 0
        self._syn = self._build("S")
        self._rst = self._build("R") if flow.proto == TCP else b""

    def _build(self, flags: str) -> bytes:
        from scapy.layers import inet
        from scapy.layers.l2 import Ether
        from scapy.layers.vxlan import VXLAN

        flow = self._flow
        packet = inet.IP(src=flow.src, dst=flow.dst, flags="DF", id=1, ttl=64)
        if flow.proto == TCP:
            size = flow.size if flags == "S" else 0
            packet /= inet.TCP(sport=0, dport=flow.dport, seq=0, flags=flags, window=64240, chksum=0)
            packet /= bytes(size)
        else:
            packet /= inet.UDP(sport=0, dport=flow.dport, chksum=0) / bytes(max(flow.size, MIN_UDP_PAYLOAD))
        if flow.tunnel:
            src, dst, port, vni = flow.tunnel
            zero = "00:00:00:00:00:00"  # as Calico's programs do
            packet = Ether(src=zero, dst=zero, type=0x0800) / packet
            packet = VXLAN(flags=0x08, vni=vni) / packet
            packet = inet.UDP(sport=0, dport=port, chksum=0) / packet
            packet = inet.IP(src=src, dst=dst, flags="DF", id=1, ttl=64) / packet
        return bytes(packet)

    def request(self, number: int, sport: int) -> bytes:
        """The probe *number*: a SYN, or a datagram with the identity at the start of its payload."""
        if self._flow.proto == TCP:
            return self._tcp(self._syn, sport, identity.tcp_sequence(self._run_id, number))
        packet = bytearray(self._syn)
        l4 = self._inner + IP_BYTES
        packet[l4 : l4 + 2] = sport.to_bytes(2, "big")
        payload = identity.encode(Identity(self._run_id, sport, number))
        packet[l4 + UDP_BYTES : l4 + UDP_BYTES + identity.SIZE] = payload
        # A UDP checksum of zero would mean that there is none: RFC 768.
        checksum = self._l4_checksum(packet, UDP) or 0xFFFF
        packet[l4 + 6 : l4 + 8] = checksum.to_bytes(2, "big")
        return self._outer(packet, sport)

    def reset(self, number: int, sport: int) -> bytes:
        """The RST that closes what a SYN of ours may have opened."""
        return self._tcp(self._rst, sport, identity.tcp_sequence(self._run_id, number) + 1 & 0xFFFFFFFF)

    def _tcp(self, template: bytes, sport: int, sequence: int) -> bytes:
        packet = bytearray(template)
        l4 = self._inner + IP_BYTES
        struct.pack_into("!H", packet, l4, sport)
        struct.pack_into("!I", packet, l4 + 4, sequence)
        struct.pack_into("!H", packet, l4 + 16, self._l4_checksum(packet, TCP))
        return self._outer(packet, sport)

    def _l4_checksum(self, packet: bytearray, proto: int) -> int:
        l4 = self._inner + IP_BYTES
        length = len(packet) - l4
        pseudo = bytes(packet[l4 - 8 : l4]) + struct.pack("!HH", proto, length)
        return checksum(pseudo + bytes(packet[l4:]))

    def _outer(self, packet: bytearray, sport: int) -> bytes:
        if self._flow.tunnel:  # Calico's outer source port: inner source XOR inner destination port (v3.29+)
            struct.pack_into("!H", packet, IP_BYTES, (sport ^ self._flow.dport) or 1)
        return bytes(packet)

    def inner_port(self, outer: int) -> int:
        """The source port of the probe whose tunnel packet came from UDP port *outer*."""
        return outer ^ self._flow.dport


def checksum(data: bytes) -> int:
    """The Internet checksum of *data*, RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
