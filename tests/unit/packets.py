"""Builders for tests: raw packets and raw events, as the kernel side would send them."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, ip_address
from typing import TYPE_CHECKING

from calitrace import identity
from calitrace.events import CAPTURE_BYTES, DROP, HOP, LOG, STACK, STATE, EventType, HopKind
from calitrace.packet import TCP, UDP

if TYPE_CHECKING:
    from calitrace.calico.state import Layout

RUN_ID = 0x12345678
CLIENT, NODE_A, NODE_B, POD = "10.10.0.100", "10.10.0.1", "10.10.0.2", "10.65.1.2"
SPORT, NODEPORT, TARGET_PORT = 40001, 30080, 8080


def ip(src: str, dst: str, proto: int, payload: bytes) -> bytes:
    """An IPv4 packet without checksum."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0x4000, 64, proto, 0)
    return head + IPv4Address(src).packed + IPv4Address(dst).packed + payload


def tcp(src: str, sport: int, dst: str, dport: int, flags: int, seq: int = 0, ack: int = 0) -> bytes:
    """A TCP segment in IPv4."""
    return ip(src, dst, TCP, struct.pack("!HHIIBBHHH", sport, dport, seq, ack, 0x50, flags, 1000, 0, 0))


def udp(src: str, sport: int, dst: str, dport: int, payload: bytes = b"") -> bytes:
    """A UDP datagram in IPv4."""
    return ip(src, dst, UDP, struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload)


def ip6(src: str, dst: str, proto: int, *headers: tuple[int, bytes], payload: bytes) -> bytes:
    """An IPv6 packet. *headers*: extension headers, each its kind and what follows the kind of the next one."""
    kinds = [kind for kind, _ in headers] + [proto]
    chain = b"".join(bytes([following]) + rest for following, (_, rest) in zip(kinds[1:], headers, strict=True))
    head = struct.pack("!IHBB", 6 << 28, len(chain) + len(payload), kinds[0], 64)
    return head + ip_address(src).packed + ip_address(dst).packed + chain + payload


def vxlan(src: str, dst: str, inner: bytes, vni: int = 0xCA11C0) -> bytes:
    """*inner* in VXLAN."""
    head = struct.pack("!BBHI", 8, 0, 0, vni << 8) + bytes(12) + b"\x08\x00"
    return udp(src, 50000, dst, 4789, head + inner)


def icmp_error(src: str, dst: str, quoted: bytes, kind: int = 3, code: int = 3, mtu: int = 0) -> bytes:
    """An ICMP error that quotes a packet."""
    return ip(src, dst, 1, struct.pack("!BBHI", kind, code, 0, mtu) + quoted)


def syn(number: int = 0, dst: str = NODE_A, dport: int = NODEPORT) -> bytes:
    """Probe *number*."""
    return tcp(CLIENT, SPORT + number, dst, dport, 0x02, identity.tcp_sequence(RUN_ID, number))


def syn_ack(number: int = 0, src: str = NODE_A, sport: int = NODEPORT) -> bytes:
    """The answer to probe *number*."""
    ack = identity.tcp_sequence(RUN_ID, number) + 1
    return tcp(src, sport, CLIENT, SPORT + number, 0x12, 99, ack)


class Recorder:
    """Collects raw events; each is a microsecond after the one before. *cpu* is 0 throughout."""

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.now_ns = 1_000_000

    def _common(self, kind: EventType, netns: int) -> dict[str, int | bytes]:
        self.now_ns += 1000
        return {"ktime_ns": self.now_ns, "type": int(kind), "cpu": 0, "netns": netns}

    def hop(self, kind: HopKind, netns: int, ifindex: int, raw: bytes, skb: int = 0xAA, rc: int = 0) -> None:
        """A packet passes; of XMIT the kernel tells its address only."""
        fields = self._common(EventType.HOP, netns)
        packet = {} if kind is HopKind.XMIT else _packet(raw)
        self.records.append(HOP.encode(**fields, kind=int(kind), rc=rc, ifindex=ifindex, skbaddr=skb, **packet))

    def drop(self, netns: int, ifindex: int, raw: bytes, reason: int, skb: int = 0xAA, location: int = 0) -> None:
        """A packet is dropped."""
        fields = self._common(EventType.DROP, netns)
        self.records.append(
            DROP.encode(
                **fields, ifindex=ifindex, skbaddr=skb, skb_drop_reason=reason, location=location, **_packet(raw)
            )
        )

    def log(self, *lines: str, lost: int = 0) -> None:
        """Calico prints, behind *lost* lines that found no room."""
        for line in lines:
            fields = self._common(EventType.LOG, 0)
            del fields["netns"]  # a line of a log is of no device
            text = line.encode()
            self.records.append(LOG.encode(**fields, lost=lost, text_bytes=len(text), text=text, comm=b"swapper"))
            lost = 0

    def state(self, netns: int, raw: bytes, skb: int = 0xAA) -> None:
        """Calico's state at the drop just before."""
        fields = self._common(EventType.STATE, netns)
        self.records.append(STATE.encode(**fields, skbaddr=skb, state_bytes=len(raw), state=raw))

    def stack(self, netns: int, *addresses: int, skb: int = 0xAA) -> None:
        """The kernel's stack at the drop that comes next."""
        fields = self._common(EventType.STACK, netns)
        packed = struct.pack(f"<{len(addresses)}Q", *addresses)
        self.records.append(STACK.encode(**fields, skbaddr=skb, frames=len(addresses), addresses=packed))


def _packet(raw: bytes) -> dict[str, int | bytes]:
    capture = raw[:CAPTURE_BYTES]
    return {"len_bytes": len(raw), "capture_bytes": len(capture), "capture": capture, "ethertype": 0x0800}


def state_of(
    table: Layout, flow: tuple[str, int, str, int], proto: int, *, nat: tuple[str, int] | None = None, pol_rc: int = 0,
    rules: tuple[int, ...] = (), ct_rc: int = 0, flags: int = 0, reason: int = 0, result: int = 2, ct_flags: int = 0,
    pre_nat: tuple[str, int] | None = None, ct_nat: tuple[str, int, str, int] | None = None, tunnel: str = "",
    masq: str = "",
) -> bytes:  # fmt: skip
    """The state of a packet with this *flow* (source, port, destination, port) in any release that has what is said.

    *nat*, *pre_nat*: where NAT sends it, and where it was sent. *ct_nat*: nat_ip, nat_port, nat_sip and nat_sport.
    """
    src, sport, dst, dport = flow
    after, after_port = nat or (dst, dport)
    before, before_port = pre_nat or (dst, dport)
    six = ":" in src
    raw = bytearray(table.size)
    addresses, ports = [src, dst, before, after, *([tunnel] if tunnel else [])], [sport, dport, before_port, after_port]
    if not table.has_pre_nat:
        del addresses[1], ports[1]
    for number, address in enumerate(addresses):
        packed, at = ip_address(address).packed, table.addresses + number * table.stride
        raw[at : at + len(packed)] = packed
    struct.pack_into(f"<{len(ports)}H", raw, table.ports, *ports)
    struct.pack_into("<i", raw, table.pol_rc, pol_rc)
    raw[table.ip_proto] = proto
    struct.pack_into("<h", raw, table.ct_rc, ct_rc)
    struct.pack_into(table.flags_format, raw, table.flags[six], flags)
    if table.rules_hit is not None and table.rule_ids is not None:
        struct.pack_into(f"<I{len(rules)}Q", raw, table.rules_hit, len(rules), *rules)
    if table.fwd is not None:
        struct.pack_into("<iII", raw, table.fwd[six], result, 0, reason)
        struct.pack_into("<I", raw, table.ct_rc + 4, ct_flags)
    if ct_nat is not None and table.nat is not None:
        nat_ip, nat_port, nat_sip, nat_sport = ct_nat
        packed = ip_address(nat_ip).packed + ip_address(nat_sip).packed + struct.pack("<HH", nat_port, nat_sport)
        raw[table.nat : table.nat + len(packed)] = packed
    if masq and table.masq is not None:
        packed = ip_address(masq).packed
        raw[table.masq[six] : table.masq[six] + len(packed)] = packed
    return bytes(raw)


def calico_state(
    *, dst: str = POD, dport: int = TARGET_PORT, number: int = 0, pol_rc: int = 0, rules: tuple[int, ...] = (),
    reason: int = 0, result: int = 2,
) -> bytes:  # fmt: skip
    """A cali_state6 of probe *number*, Calico v3.32 to master."""
    raw = bytearray(512)
    raw[8:12] = IPv4Address(CLIENT).packed
    raw[24:28] = IPv4Address(dst).packed
    struct.pack_into("<iHHHH", raw, 92, pol_rc, SPORT + number, dport, 0, 0)
    raw[104] = TCP
    struct.pack_into(f"<I{len(rules)}Q", raw, 108, len(rules), *rules)
    struct.pack_into("<iII", raw, 444, result, 0, reason)
    return bytes(raw)
