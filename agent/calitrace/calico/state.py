"""Calico's per-CPU state: the packet its programs have in hand, still there when that packet is dropped.

Integers little-endian, ports host order, addresses network order (IPv4 in the first 4 of 16 bytes from v3.25).
Source: struct cali_tc_state in felix/bpf-gpl/types.h; offsets from record layouts of the real headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from calitrace.errors import LayoutMismatch

NAMES = ("cali_v4_state", "cali_v4_state3", "cali_state2", "cali_state4", "cali_state6", "cali_state")


@dataclass(frozen=True)
class Layout:
    """Byte offsets in one release's struct; None for what it does not have.

    *flags*, *fwd*: in the programs for IPv4, then in those for IPv6, whose longer addresses move them.
    """

    releases: str
    map_name: str
    size: int
    addresses: int  # ip_src, then dst, pre-NAT dst, post-NAT dst, tun_ip, each *stride* on
    stride: int
    pol_rc: int
    ports: int  # sport, dport, pre-NAT dport, post-NAT dport
    ip_proto: int
    rules_hit: int | None
    rule_ids: int | None
    flags: tuple[int, int]
    flags_format: str
    ct_rc: int
    fwd: tuple[int, int] | None  # res s32, mark u32, reason u32


LAYOUTS = (
    Layout("v3.32..master", "cali_state6", 512, 8, 16, 92, 96, 104, 108, 112, (368, 368), "<Q", 376, (444, 492)),
    Layout("v3.30..v3.31", "cali_state4", 488, 8, 16, 92, 96, 104, 108, 112, (368, 368), "<Q", 376, None),
    Layout("v3.28..v3.29", "cali_state4", 480, 0, 16, 84, 88, 96, 100, 104, (360, 360), "<Q", 368, None),
    Layout("v3.27", "cali_state4", 464, 0, 16, 84, 88, 96, 100, 104, (408, 456), "<Q", 360, None),
    Layout("v3.25..v3.26", "cali_state2", 416, 0, 16, 84, 88, 96, 100, 104, (408, 408), "<Q", 360, None),
    Layout("v3.22..v3.24", "cali_v4_state3", 80, 0, 4, 20, 24, 32, None, None, (33, 33), "<B", 36, None),
)
MAX_RULES = 32
CT_RESULTS = (
    "NEW",
    "MID_FLOW_MISS",
    "ESTABLISHED",
    "ESTABLISHED_BYPASS",
    "ESTABLISHED_SNAT",
    "ESTABLISHED_DNAT",
    "INVALID",
    "MAGLEV_MID_FLOW_MISS",
)
# Of ct_result.rc, whose low byte is one of CT_RESULTS.
CT_FLAGS = {
    0x100: "related",
    0x200: "RPF failed",
    0x400: "tunnel source changed",
    0x1000: "SYN",
    0x2000: "confirmed",
    0x4000: "to workload",
}
_CT_PROBLEMS = {
    1: "mid-flow packet without conntrack entry",
    6: "invalid in conntrack",
    7: "mid-flow packet without conntrack entry (Maglev)",
}
POLICY_RESULTS = {0: "no match", 1: "allow", 2: "deny"}
_RES_DENY = 2  # TC_ACT_SHOT
_SHORT = 5


@dataclass(frozen=True)
class CalicoState:
    """*calico_reason*: code of 3.1, None before v3.32. *rule_ids*: those hit, last one first decisive."""

    src: IPv4Address | IPv6Address
    dst: IPv4Address | IPv6Address
    pre_nat_dst: IPv4Address | IPv6Address
    post_nat_dst: IPv4Address | IPv6Address
    sport: int
    dport: int
    pre_nat_dport: int
    post_nat_dport: int
    proto: int
    pol_rc: int
    rule_ids: tuple[int, ...]
    flags: int
    ct_rc: int
    result: int | None
    calico_reason: int | None

    def holds(self, proto: int, src: str, sport: int, dst: str, dport: int) -> bool:
        """Whether it is about this packet, before or after NAT: otherwise it is stale and must not be believed."""
        targets = (
            (str(self.dst), self.dport),
            (str(self.pre_nat_dst), self.pre_nat_dport),
            (str(self.post_nat_dst), self.post_nat_dport),
        )
        if self.calico_reason == _SHORT and not self.sport and not self.dport:  # it ended where ports should be
            sport, dport = 0, 0
        return self.proto == proto and str(self.src) == src and self.sport == sport and (dst, dport) in targets

    @property
    def unread(self) -> bool:
        """Whether a packet was denied before its addresses were read: all that is known of it is the reason."""
        return self.denied and bool(self.calico_reason) and not int(self.src) and not int(self.dst)

    @property
    def passed(self) -> bool:
        """Whether the program that wrote it let the packet pass: then it tells nothing about who dropped it."""
        return self.result is not None and not self.denied

    @property
    def conntrack(self) -> str:
        """The conntrack result in Calico's words: ``ESTABLISHED, RPF failed``."""
        number = self.ct_rc & 0xFF
        found = CT_RESULTS[number] if number < len(CT_RESULTS) else f"result {number}"
        return ", ".join([found, *(name for bit, name in CT_FLAGS.items() if self.ct_rc & bit)])

    @property
    def conntrack_problem(self) -> str:
        """What conntrack had against the packet, for drops without a reason; empty for nothing."""
        if self.ct_rc & 0x200:
            return "reverse path filter: it came in by an interface that conntrack does not expect"
        if self.ct_rc & 0x400:
            return "the source of the tunnel changed"
        return _CT_PROBLEMS.get(self.ct_rc & 0xFF, "")

    @property
    def denied(self) -> bool:
        """Whether policy or the program's result says drop."""
        return self.pol_rc == 2 or self.result == _RES_DENY


def layout(map_name: str, size: int) -> Layout:
    """The table for a map by name and value size. Raises LayoutMismatch naming those known."""
    for each in LAYOUTS:
        if each.map_name == map_name and each.size == size:
            return each
    known = ", ".join(f"{each.map_name} {each.size} B ({each.releases})" for each in LAYOUTS)
    raise LayoutMismatch(0, f"one of {known}", f"{map_name} {size} B", "Calico state")


def decode(raw: bytes, table: Layout, version: int = 4) -> CalicoState:
    """One state, of a packet of IP *version*. *raw*: the map value. Raises LayoutMismatch for another length."""
    if len(raw) != table.size:
        raise LayoutMismatch(0, f"{table.size} bytes", f"{len(raw)} bytes", table.map_name)
    family, width = (IPv4Address, 4) if version == 4 else (IPv6Address, table.stride)
    begin, step = table.addresses, table.stride
    src, dst, pre_nat, post_nat = (family(raw[at : at + width]) for at in range(begin, begin + 4 * step, step))
    is_six = version != 4
    sport, dport, pre_dport, post_dport = struct.unpack_from("<HHHH", raw, table.ports)
    rule_ids: tuple[int, ...] = ()
    if table.rules_hit is not None and table.rule_ids is not None:
        (hit,) = struct.unpack_from("<I", raw, table.rules_hit)
        rule_ids = struct.unpack_from(f"<{min(hit, MAX_RULES)}Q", raw, table.rule_ids)
    result = reason = None
    if table.fwd is not None:
        result, _mark, reason = struct.unpack_from("<iII", raw, table.fwd[is_six])
    return CalicoState(
        src,
        dst,
        pre_nat,
        post_nat,
        sport,
        dport,
        pre_dport,
        post_dport,
        raw[table.ip_proto],
        struct.unpack_from("<i", raw, table.pol_rc)[0],
        rule_ids,
        struct.unpack_from(table.flags_format, raw, table.flags[is_six])[0],
        struct.unpack_from("<h", raw, table.ct_rc)[0],
        result,
        reason,
    )
