"""What the first bytes of a packet say: IP, TCP, UDP, ICMP, VXLAN, and the packets inside them.

Total: any bytes give a ``Packet``; what cannot be read is simply not there. Sources: RFC 791, 8200, 9293, 768,
792, 4443, 7348.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address

from calitrace import identity
from calitrace.identity import Identity

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
PROTOCOLS = {ICMP: "icmp", TCP: "tcp", UDP: "udp", ICMP6: "icmp6"}
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_ICMP_UNREACHABLE = {0: "net", 1: "host", 2: "protocol", 3: "port", 13: "prohibited"}
_FLAG_NAMES = ((SYN, "SYN"), (FIN, "FIN"), (RST, "RST"), (PSH, "PSH"), (ACK, "ACK"))
_ICMP_ERRORS = {ICMP: (3, 11, 12), ICMP6: (1, 2, 3, 4)}
_FRAGMENT, _AUTH, _NONE = 44, 51, 59
_EXTENSIONS = (0, 43, _FRAGMENT, _AUTH, 60, 135)  # hop-by-hop, routing, destination options, mobility: RFC 8200, 6275
_WITHOUT_EXTENSIONS = (TCP, UDP, ICMP6)
_CALICO_EXTENSIONS, _CALICO_MOST = (*_EXTENSIONS, 47, 50), 8  # GRE and ESP too
_MAX_LAYERS = 3
CALICO_VNI = 0xCA11C0  # of Calico's NodePort tunnel; felix/bpf-gpl/nat_types.h, all releases since v3.13
_VXLAN_BYTES = 20 + 8 + 8 + 14  # an IPv4 header without options, UDP, VXLAN, Ethernet


def ip_length(packet: bytes) -> int:
    """Bytes of an IP packet, of which *packet* may be the beginning, by its own header; 0 when that tells none."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 4:
        return int.from_bytes(packet[2:4], "big")
    return 40 + int.from_bytes(packet[4:6], "big") if version == 6 and len(packet) >= 6 else 0


def inside_vxlan(packet: bytes, port: int) -> bytes:
    """The packet in a VXLAN packet over IPv4 without options to UDP *port*; empty when it is none."""
    if packet[:1] != b"\x45" or packet[9:10] != bytes([UDP]) or packet[22:24] != port.to_bytes(2, "big"):
        return b""
    return packet[_VXLAN_BYTES:]


@dataclass(frozen=True)
class Layer:
    """One IP packet. Ports are 0 where the protocol has none; *flags*, *seq*, *ack* are TCP's.

    *mtu*: what the sender of an ICMP error has room for, 0 where it does not say. *fragment*: it is not the first of
    its packet, and has neither ports nor flags. *calico*: of IPv6 with extension headers the protocol and ports that
    Calico's programs read, which go through them in a way of their own.
    """

    src: IPv4Address | IPv6Address
    dst: IPv4Address | IPv6Address
    proto: int
    sport: int = 0
    dport: int = 0
    flags: int = 0
    seq: int = 0
    ack: int = 0
    icmp_type: int = -1
    icmp_code: int = -1
    identity: Identity | None = None
    vni: int | None = None  # of the VXLAN header that it carries
    ttl: int = 0
    mtu: int = 0
    fragment: bool = False
    calico: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        name = PROTOCOLS.get(self.proto, str(self.proto))
        if self.fragment:
            return f"{name} later fragment {self.src} > {self.dst}"
        if self.proto in _ICMP_ERRORS:
            return f"{name} {self.src} > {self.dst} type {self.icmp_type} code {self.icmp_code}"
        ports = self.proto in (TCP, UDP)
        src = f"{_bracket(self.src)}:{self.sport}" if ports else str(self.src)
        dst = f"{_bracket(self.dst)}:{self.dport}" if ports else str(self.dst)
        flags = f" {self.flag_names}" if self.proto == TCP else ""
        return f"{name}{flags} {src} > {dst}"

    @property
    def flag_names(self) -> str:
        """TCP flags in words, ``SYN,ACK``."""
        return ",".join(name for bit, name in _FLAG_NAMES if self.flags & bit) or "-"

    @property
    def is_icmp_error(self) -> bool:
        """Whether it reports on another packet, which is then the next layer."""
        return self.icmp_type in _ICMP_ERRORS.get(self.proto, ())

    @property
    def is_too_big(self) -> bool:
        """Whether it says that a packet was too large and might not be cut: RFC 792 and 1191, RFC 4443."""
        return (self.proto, self.icmp_type) == (ICMP6, 2) or (self.proto, self.icmp_type, self.icmp_code) == (
            ICMP,
            3,
            4,
        )

    @property
    def is_port_unreachable(self) -> bool:
        """Whether it says that nobody listens: RFC 792, RFC 4443."""
        return (self.proto, self.icmp_type, self.icmp_code) in ((ICMP, 3, 3), (ICMP6, 1, 4))

    @property
    def refusal(self) -> str:
        """An ICMP error or RST in words: ``ICMP port unreachable from 10.0.0.1``."""
        if self.proto == TCP:
            return f"TCP RST from {self.src}"
        name = f"type {self.icmp_type} code {self.icmp_code}"
        if self.is_too_big:
            name = "fragmentation needed" + (f" (MTU {self.mtu})" if self.mtu else "")
        elif self.proto == ICMP and self.icmp_type == 3:
            name = f"{_ICMP_UNREACHABLE.get(self.icmp_code, f'code {self.icmp_code}')} unreachable"
        return f"ICMP {name} from {self.src}"


@dataclass(frozen=True)
class Packet:
    """*layers*: outermost first; a tunnel's payload and what an ICMP error quotes are layers of their own."""

    layers: tuple[Layer, ...]

    @property
    def outer(self) -> Layer | None:
        """What the wire sees."""
        return self.layers[0] if self.layers else None

    @property
    def tunnel(self) -> Layer | None:
        """The VXLAN packet around the rest, if there is one."""
        return self.layers[0] if self.layers and self.layers[0].vni is not None else None

    @property
    def inner(self) -> Layer | None:
        """The packet itself, out of its tunnel."""
        found = self.layers[1:] if self.tunnel else self.layers
        return found[0] if found else None

    @property
    def quoted(self) -> Layer | None:
        """What an ICMP error is about."""
        found = self.layers[1:] if self.tunnel else self.layers
        return found[1] if len(found) > 1 else None


def dissect(raw: bytes, vxlan_port: int = 4789) -> Packet:
    """Read *raw*, which begins with an IP header. *vxlan_port*: UDP destination port taken for VXLAN."""
    layers: list[Layer] = []
    at = 0
    while at is not None and len(layers) < _MAX_LAYERS:
        layer, following = _layer(raw, at, vxlan_port)
        if layer is None:
            break
        if layer.src.version == 6 and raw[at + 6] not in _WITHOUT_EXTENSIONS:
            layer = replace(layer, calico=_as_calico(raw, at))
        layers.append(layer)
        if following is None:
            break
        at = following
    return Packet(tuple(layers))


def _layer(raw: bytes, at: int, vxlan_port: int) -> tuple[Layer | None, int | None]:
    """The packet at *at* and where a packet inside it begins."""
    version = raw[at] >> 4 if len(raw) > at else 0
    if version == 4 and len(raw) >= at + 20:
        l4, proto, ttl = at + (raw[at] & 15) * 4, raw[at + 9], raw[at + 8]
        src, dst = ip_address(raw[at + 12 : at + 16]), ip_address(raw[at + 16 : at + 20])
        later = bool((raw[at + 6] & 0x1F) << 8 | raw[at + 7])
        if l4 < at + 20 or later:  # malformed, or without ports
            return Layer(src, dst, proto, ttl=ttl, fragment=later), None
    elif version == 6 and len(raw) >= at + 40:
        l4, proto, ttl = at + 40, raw[at + 6], raw[at + 7]
        src, dst = ip_address(raw[at + 8 : at + 24]), ip_address(raw[at + 24 : at + 40])
        while proto in _EXTENSIONS and len(raw) >= l4 + 8:
            header, l4 = l4, l4 + _extension_bytes(proto, raw[l4 + 1])
            later = proto == _FRAGMENT and bool(raw[header + 2] << 8 | raw[header + 3] & 0xF8)
            proto = raw[header]
            if later:
                return Layer(src, dst, proto, ttl=ttl, fragment=True), None
    else:
        return None, None
    if proto == UDP and len(raw) >= l4 + 8:
        sport, dport = struct.unpack_from("!HH", raw, l4)
        if dport == vxlan_port and len(raw) >= l4 + 16 and raw[l4 + 8] & 0x08:
            vni = int.from_bytes(raw[l4 + 12 : l4 + 15], "big")
            return Layer(src, dst, proto, sport, dport, vni=vni, ttl=ttl), l4 + 30
        found = identity.decode(raw[l4 + 8 : l4 + 8 + identity.SIZE])
        return Layer(src, dst, proto, sport, dport, identity=found, ttl=ttl), None
    if proto == TCP and len(raw) >= l4 + 8:  # an ICMP error may quote no more
        sport, dport, seq = struct.unpack_from("!HHI", raw, l4)
        ack, flags = (int.from_bytes(raw[l4 + 8 : l4 + 12], "big"), raw[l4 + 13]) if len(raw) >= l4 + 14 else (0, 0)
        return Layer(src, dst, proto, sport, dport, flags, seq, ack, ttl=ttl), None
    if proto in _ICMP_ERRORS and len(raw) >= l4 + 2:
        layer = Layer(src, dst, proto, icmp_type=raw[l4], icmp_code=raw[l4 + 1], ttl=ttl)
        if layer.is_too_big:  # in the last 16 bits of the header's second word, with ICMPv6 in all 32
            layer = replace(layer, mtu=int.from_bytes(raw[l4 + (6 if proto == ICMP else 4) : l4 + 8], "big"))
        return layer, l4 + 8 if layer.is_icmp_error else None
    return Layer(src, dst, proto, ttl=ttl), None


def _extension_bytes(kind: int, units: int) -> int:
    """Length of an extension header. *units*: what it says itself."""
    if kind == _FRAGMENT:
        return 8
    return (units + 2) * 4 if kind == _AUTH else (units + 1) * 8


def _as_calico(raw: bytes, at: int) -> tuple[int, int, int] | None:
    """Protocol and ports of an IPv6 packet with extension headers, as Calico's programs read them; None: not at all.

    They take all headers for one of the first's kind, and a fragment header for one of 16 bytes: behind it they find
    other ports. Where eight of them lead nowhere the protocol stays 0. Source: tc_state_fill_from_iphdr_v6 in
    felix/bpf-gpl/parsing6.h, tc_state_fill_from_nexthdr in parsing.h, v3.27 to master.
    """
    proto = kind = raw[at + 6]
    l4 = at + 40
    for _ in range(_CALICO_MOST):
        if proto == _NONE or len(raw) < l4 + 2:
            return None
        proto, units = raw[l4], raw[l4 + 1]
        if kind == _FRAGMENT:
            l4 += 16
        elif kind in _CALICO_EXTENSIONS:
            l4 += (units + 1) * 8
        if proto in _WITHOUT_EXTENSIONS:
            ports = struct.unpack_from("!HH", raw, l4) if len(raw) >= l4 + (20 if proto == TCP else 8) else (0, 0)
            return proto, *ports
    return 0, 0, 0


def _bracket(address: IPv4Address | IPv6Address) -> str:
    return f"[{address}]" if address.version == 6 else str(address)
