"""Calico's per-CPU state: the packet its programs have in hand, still there when that packet is dropped.

Integers little-endian, ports host order, addresses network order (IPv4 in the first 4 of 16 bytes from v3.25).
Source: struct cali_tc_state in felix/bpf-gpl/types.h (up to v3.17: jump.h); offsets from record layouts of the real
headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from calitrace.errors import LayoutMismatch

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
_OLD_CT_RESULTS = tuple(each for each in CT_RESULTS[:7] if each != "MID_FLOW_MISS")  # v3.13 to v3.19


@dataclass(frozen=True)
class Layout:
    """Byte offsets in one release's struct; None for what it does not have.

    *flags*, *fwd*: in the programs for IPv4, then in those for IPv6, whose longer addresses move them. *ct_results*:
    the names of its conntrack results, by number.
    """

    releases: str
    map_name: str
    size: int
    addresses: int  # ip_src, then dst, pre-NAT dst (with *has_pre_nat*), post-NAT dst, tun_ip, each *stride* on
    stride: int
    pol_rc: int
    ports: int  # sport, dport, pre-NAT dport (with *has_pre_nat*), post-NAT dport
    ip_proto: int
    rules_hit: int | None
    rule_ids: int | None
    flags: tuple[int, int]
    flags_format: str
    ct_rc: int
    fwd: tuple[int, int] | None  # res s32, mark u32, reason u32
    has_pre_nat: bool = True
    ct_results: tuple[str, ...] = CT_RESULTS


LAYOUTS = (
    Layout("v3.32..master", "cali_state6", 512, 8, 16, 92, 96, 104, 108, 112, (368, 368), "<Q", 376, (444, 492)),
    Layout("v3.30..v3.31", "cali_state4", 488, 8, 16, 92, 96, 104, 108, 112, (368, 368), "<Q", 376, None),
    Layout("v3.28..v3.29", "cali_state4", 480, 0, 16, 84, 88, 96, 100, 104, (360, 360), "<Q", 368, None),
    Layout("v3.27", "cali_state4", 464, 0, 16, 84, 88, 96, 100, 104, (408, 456), "<Q", 360, None),
    Layout("v3.25..v3.26", "cali_state2", 416, 0, 16, 84, 88, 96, 100, 104, (408, 408), "<Q", 360, None),
    Layout("v3.22..v3.24", "cali_v4_state3", 80, 0, 4, 20, 24, 32, None, None, (33, 33), "<B", 36, None),
    Layout(
        *("v3.13..v3.17", "cali_v4_state", 64, 0, 4, 16, 20, 26, None, None, (27, 27), "<B", 28, None),
        has_pre_nat=False,
        ct_results=_OLD_CT_RESULTS,
    ),
)
SIZES = tuple(sorted({each.size for each in LAYOUTS}, reverse=True))
MAX_RULES = 32
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
    "MID_FLOW_MISS": "mid-flow packet without conntrack entry",
    "INVALID": "invalid in conntrack",
    "MAGLEV_MID_FLOW_MISS": "mid-flow packet without conntrack entry (Maglev)",
}
POLICY_RESULTS = {0: "no match", 1: "allow", 2: "deny"}
# Of enum cali_state_flags: those that mean the same in every release that has them.
FLAGS = {
    0x01: "NAT outgoing",
    0x02: "no FIB lookup",
    0x04: "to this host",
    0x08: "from this host",
    0x10: "no conntrack entry is made",
    0x20: "policy skipped",
    0x40: "source port changed",
    0x80: "NodePort of this node",
    0x100: "NodePort of another node",
    0x200: "excluded from NAT",
}
_TO_HOST, _SUPPRESS_CT = 0x04, 0x10
_NO_MATCH, _ALLOW, _DENY = 0, 1, 2
_RES_DENY = 2  # TC_ACT_SHOT
_WITH_PORTS = (6, 17)
_ICMP = (1, 58)
_SHORT = 5


@dataclass(frozen=True)
class CalicoState:
    """*calico_reason*: code of 3.1, None before v3.32. *rule_ids*: those hit, the last one decided.

    *conntrack_result*: what the lookup found, in Calico's word; the bits beside it are in *ct_rc*.
    """

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
    conntrack_result: str
    result: int | None
    calico_reason: int | None

    def holds(self, proto: int, src: str, sport: int, dst: str, dport: int) -> bool:
        """Whether it is about this packet, before or after NAT: otherwise it is stale and must not be believed.

        Of ICMP the addresses are compared: Calico keeps type and code where ports are, in some of the places.
        """
        targets = (
            (str(self.dst), self.dport),
            (str(self.pre_nat_dst), self.pre_nat_dport),
            (str(self.post_nat_dst), self.post_nat_dport),
        )
        if self.calico_reason == _SHORT and not self.sport and not self.dport:  # it ended where ports should be
            sport, dport = 0, 0
        if self.proto != proto or str(self.src) != src:
            return False
        if proto in _ICMP:
            return any(dst == target for target, _ in targets)
        return self.sport == sport and (dst, dport) in targets

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
        return ", ".join([self.conntrack_result, *(name for bit, name in CT_FLAGS.items() if self.ct_rc & bit)])

    @property
    def nat(self) -> str:
        """Where NAT sends it, ``10.65.1.2:8080``; empty for nowhere else, and when it ended before."""
        after = self.post_nat_dst
        ports = self.proto in _WITH_PORTS
        if not int(after) or (after == self.pre_nat_dst and not (ports and self.post_nat_dport != self.pre_nat_dport)):
            return ""
        host = f"[{after}]" if after.version == 6 else str(after)
        return f"{host}:{self.post_nat_dport}" if ports else str(after)

    @property
    def flag_names(self) -> tuple[str, ...]:
        """What the flags say, the last of them, in hexadecimal, those that have no name here."""
        rest = self.flags & ~sum(FLAGS)
        return (*(name for bit, name in FLAGS.items() if self.flags & bit), *([f"{rest:#x}"] if rest else []))

    def silent(self, *, from_pod: bool, to_pod: bool) -> str:
        """What of Calico's drops without a reason leaves such a state, most likely; empty for none in particular.

        *from_pod*, *to_pod*: whether it was dropped at a pod's interface, on its way from or to the pod. Source:
        calico_tc_main, calico_tc_skb_new_flow and calico_tc_skb_accepted_entrypoint in felix/bpf-gpl/tc.c, v3.22 to
        master.
        """
        if self.conntrack_result != "NEW":
            return ""
        if to_pod and self.pol_rc == _NO_MATCH and self.result == _RES_DENY:  # the policy program would say deny
            return "no policy program is loaded for the workload"
        if self.pol_rc != _ALLOW:
            return ""
        if from_pod and self.flags & _TO_HOST:
            return "from a pod to its own host, which defaultEndpointToHostAction forbids"
        if self.flags & _SUPPRESS_CT:
            return "mid-flow packet without conntrack entry, to an interface that has policy"
        return ""

    @property
    def conntrack_problem(self) -> str:
        """What conntrack had against the packet, for drops without a reason; empty for nothing."""
        if self.ct_rc & 0x200:
            return "reverse path filter: it came in by an interface that conntrack does not expect"
        if self.ct_rc & 0x400:
            return "the source of the tunnel changed"
        return _CT_PROBLEMS.get(self.conntrack_result, "")

    @property
    def denied(self) -> bool:
        """Whether policy or the program's result says drop."""
        return self.pol_rc == _DENY or self.result == _RES_DENY


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
    addresses = [family(raw[at : at + width]) for at in range(begin, begin + 4 * step, step)]
    ports = list(struct.unpack_from("<HHHH", raw, table.ports))
    if not table.has_pre_nat:
        addresses.insert(2, addresses[1])
        ports.insert(2, ports[1])
    src, dst, pre_nat, post_nat = addresses[:4]
    sport, dport, pre_dport, post_dport = ports[:4]
    is_six = version != 4
    rule_ids: tuple[int, ...] = ()
    if table.rules_hit is not None and table.rule_ids is not None:
        (hit,) = struct.unpack_from("<I", raw, table.rules_hit)
        rule_ids = struct.unpack_from(f"<{min(hit, MAX_RULES)}Q", raw, table.rule_ids)
    result = reason = None
    if table.fwd is not None:
        result, _mark, reason = struct.unpack_from("<iII", raw, table.fwd[is_six])
    (ct_rc,) = struct.unpack_from("<h", raw, table.ct_rc)
    number = ct_rc & 0xFF
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
        ct_rc,
        table.ct_results[number] if number < len(table.ct_results) else f"result {number}",
        result,
        reason,
    )
