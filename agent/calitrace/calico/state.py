"""Calico's per-CPU state: the packet its programs have in hand, still there when that packet is dropped.

Integers little-endian, ports host order, addresses network order (IPv4 in the first 4 of 16 bytes from v3.25).
Source: struct cali_tc_state in felix/bpf-gpl/types.h (up to v3.17: jump.h); offsets from record layouts of the real
headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from calitrace.calico import reasons
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
# v3.13 to v3.17. Host endpoints brought MID_FLOW_MISS: projectcalico/felix b0a1cd05ca3f, bpf-gpl/conntrack_types.h,
# which is older than v3.19, as it has no CALI_CT_FLAG_EXT_LOCAL; v3.18 prints the lines that go with it.
_OLD_CT_RESULTS = tuple(each for each in CT_RESULTS[:7] if each != "MID_FLOW_MISS")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Byte offsets in one release's struct; None for what it does not have.

    *flags*, *fwd*: in the programs for IPv4, then in those for IPv6, whose longer addresses move them. *ct_results*:
    the names of its conntrack results, by number. *nat*: the addresses and ports of ct_result. *masq*: ip_src_masq.
    """

    releases: str
    map_name: str
    size: int
    addresses: int  # ip_src, then dst, pre-NAT dst (with *has_pre_nat*), post-NAT dst, tun_ip, each *stride* on
    stride: int
    pol_rc: int
    ports: int  # sport, dport, pre-NAT dport (with *has_pre_nat*), post-NAT dport
    ip_proto: int
    rules_hit: int | None = None
    rule_ids: int | None = None
    flags: tuple[int, int]
    flags_format: str = "<Q"
    ct_rc: int
    nat: int | None = None  # nat_ip, nat_sip, nat_port, nat_sport
    masq: tuple[int, int] | None = None
    fwd: tuple[int, int] | None = None  # res s32, mark u32, reason u32
    has_pre_nat: bool = True
    ct_results: tuple[str, ...] = CT_RESULTS


LAYOUTS = (
    Layout(
        releases="v3.32..master", map_name="cali_state6", size=512, addresses=8, stride=16, pol_rc=92, ports=96,
        ip_proto=104, rules_hit=108, rule_ids=112, flags=(368, 368), ct_rc=376, nat=384, masq=(424, 472),
        fwd=(444, 492),
    ),
    Layout(
        releases="v3.30..v3.31", map_name="cali_state4", size=488, addresses=8, stride=16, pol_rc=92, ports=96,
        ip_proto=104, rules_hit=108, rule_ids=112, flags=(368, 368), ct_rc=376, nat=380, masq=(424, 472),
    ),
    Layout(
        releases="v3.28..v3.29", map_name="cali_state4", size=480, addresses=0, stride=16, pol_rc=84, ports=88,
        ip_proto=96, rules_hit=100, rule_ids=104, flags=(360, 360), ct_rc=368, nat=372, masq=(416, 464),
    ),
    Layout(
        releases="v3.27", map_name="cali_state4", size=464, addresses=0, stride=16, pol_rc=84, ports=88,
        ip_proto=96, rules_hit=100, rule_ids=104, flags=(408, 456), ct_rc=360, nat=364,
    ),
    Layout(
        releases="v3.25..v3.26", map_name="cali_state2", size=416, addresses=0, stride=16, pol_rc=84, ports=88,
        ip_proto=96, rules_hit=100, rule_ids=104, flags=(408, 408), ct_rc=360, nat=364,
    ),
    Layout(
        releases="v3.18..v3.24", map_name="cali_v4_state3", size=80, addresses=0, stride=4, pol_rc=20, ports=24,
        ip_proto=32, flags=(33, 33), flags_format="<B", ct_rc=36,
    ),
    Layout(
        releases="v3.13..v3.17", map_name="cali_v4_state", size=64, addresses=0, stride=4, pol_rc=16, ports=20,
        ip_proto=26, flags=(27, 27), flags_format="<B", ct_rc=28, has_pre_nat=False, ct_results=_OLD_CT_RESULTS,
    ),
)  # fmt: skip
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
# The last: it allowed, and the program that comes then is not there (felix/bpf/state/map.go).
POLICY_RESULTS = {0: "no match", 1: "allow", 2: "deny", 10: "allow, tail call failed"}
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
_TO_HOST, _SUPPRESS_CT, _SKIP_POLICY, _HOST_PSNAT = 0x04, 0x10, 0x20, 0x40
# Set only after the reverse path check of a pod's packet: NAT outgoing, to this host, and two without a name here.
_AFTER_RPF = 0x1 | _TO_HOST | 0x800 | 0x2000
_RPF_FAILED, _TUNNEL_CHANGED, _SYN = 0x200, 0x400, 0x1000  # of CT_FLAGS
_MAGLEV = 0x10000  # of the flags in ct_result, v3.32 and later
_NO_MATCH, _ALLOW, _DENY, _TAIL_CALL_FAILED = 0, 1, 2, 10
_RES_DENY = 2  # TC_ACT_SHOT; of XDP the same number passes
# Not a drop where serviceLoopPrevention is Reject: then the packet becomes an ICMP error.
_BLACK_HOLE = reasons.CODES["BLACK_HOLE"]
_FRAGMENTS = [reasons.CODES[each] for each in ("FRAG_WAIT", "FRAG_REORDER", "FRAG_UNSUPPORTED")]
_WITH_PORTS = (6, 17)
_ICMP = (1, 58)
_NO_POLICY = "no policy program is loaded for the workload"
_CHAIN = "a program of Calico's tail-call chain is missing"
_MID_FLOW = "mid-flow packet without conntrack entry"


class Side(str, Enum):
    """Where the program stands that wrote a state, in Calico's words: at a pod's (wep) or a host's (hep) interface."""

    FROM_WEP = "from-wep"
    TO_WEP = "to-wep"
    FROM_HEP = "from-hep"
    TO_HEP = "to-hep"
    XDP = "xdp"


@dataclass(frozen=True)
class CalicoState:
    """*calico_reason*: code of 3.1, None before v3.32. *rule_ids*: those hit, the last one decided.

    *conntrack_result*: what the lookup found, in Calico's word; the bits beside it are in *ct_rc*. *ct_flags*: of the
    entry, 0 before v3.32. *tunnel*: the node that it came from in VXLAN. *nat_ip*, *nat_sip*: where conntrack puts
    source and destination. *masq*: the source, while policy takes the pod's own address for it.
    """

    src: IPv4Address | IPv6Address
    dst: IPv4Address | IPv6Address
    pre_nat_dst: IPv4Address | IPv6Address
    post_nat_dst: IPv4Address | IPv6Address
    tunnel: IPv4Address | IPv6Address
    sport: int
    dport: int
    pre_nat_dport: int
    post_nat_dport: int
    proto: int
    pol_rc: int
    rule_ids: tuple[int, ...]
    flags: int
    ct_rc: int
    ct_flags: int
    conntrack_result: str
    nat_ip: IPv4Address | IPv6Address
    nat_sip: IPv4Address | IPv6Address
    nat_port: int
    nat_sport: int
    masq: IPv4Address | IPv6Address
    result: int | None
    calico_reason: int | None

    def holds(self, proto: int, src: str, sport: int, dst: str, dport: int, fragment: bool = False) -> bool:
        """Whether it is about this packet, before or after NAT: otherwise it is stale and must not be believed.

        Of ICMP the addresses are compared: Calico keeps type and code where ports are, in some of the places. So they
        are of what ended before its ports were read, and of fragments, in which it takes for ports what is there.
        *fragment*: the packet is a later one.
        """
        if self.proto != proto:
            return False
        sources, targets = self._ends()
        reason = self.calico_reason
        if fragment or proto in _ICMP or reason in _FRAGMENTS or (reason and not self.sport and not self.dport):
            return any(src == each for each, _ in sources) and any(dst == each for each, _ in targets)
        return (src, sport) in sources and (dst, dport) in targets

    def _ends(self) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        """Sources and destinations that the packet may have by now.

        The program rewrites the packet first and its state afterwards, if nothing fails in between; before it
        encapsulates, the state has the tunnel's ends already. Source: do_nat in felix/bpf-gpl/tc.c.
        """
        sources = {(str(self.src), self.sport)}
        targets = {
            (str(self.dst), self.dport),
            (str(self.pre_nat_dst), self.pre_nat_dport),
            (str(self.post_nat_dst), self.post_nat_dport),
        }
        if self.conntrack_result == "ESTABLISHED_SNAT":
            sources.add((str(self.nat_ip), self.nat_port))
            targets.add((str(self.nat_sip), self.nat_sport or self.dport))
        elif int(self.nat_sip):
            sources |= {(str(self.nat_sip), port) for port in (self.sport, self.nat_sport)}
        if self.src == self.dst:
            sources.add((str(self.masq), self.sport))
        return sources, targets

    @property
    def unread(self) -> bool:
        """Whether a packet was denied before its addresses were read: all that is known of it is the reason, if any."""
        return self.denied() and not int(self.src) and not int(self.dst)

    def denied(self, side: Side | None = None) -> bool:
        """Whether Calico dropped it: policy, the program's result, or what no packet that passes has, says so.

        The result does not always: several programs drop without putting it there. *side*: None for any.
        """
        reason = self.calico_reason
        return (
            self.pol_rc in (_DENY, _TAIL_CALL_FAILED)
            or (self.result == _RES_DENY and side is not Side.XDP)
            or (bool(reason) and reason != _BLACK_HOLE)
            or self._without_result(side) != ""
        )

    def passed(self, side: Side | None) -> bool:
        """Whether the program that wrote it let the packet pass: then it tells nothing about who dropped it.

        Not known where *side* is not, as a drop leaves there what a packet that passes leaves elsewhere.
        """
        return self.result is not None and side not in (None, Side.XDP) and not self.denied(side)

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

    def _without_result(self, side: Side | None) -> str:
        """What of Calico's drops with neither reason nor result leaves such a state; empty for none."""
        if self.pol_rc == _TAIL_CALL_FAILED:
            return _CHAIN
        if side is Side.TO_HEP and self.pol_rc == _ALLOW and self.flags & (_SUPPRESS_CT | _SKIP_POLICY) == _SUPPRESS_CT:
            return f"{_MID_FLOW}, to an interface that has policy"
        if side is Side.TO_HEP and self.flags & _HOST_PSNAT and self.conntrack_result in ("INVALID", "MID_FLOW_MISS"):
            return "unexpected conntrack result"
        maglev = side is Side.FROM_HEP and self.ct_flags & _MAGLEV and self.pol_rc == _NO_MATCH
        if maglev and self.result not in (None, _RES_DENY):
            return "Maglev's backend is not in Calico's routes map"
        return ""

    def problem(self, side: Side | None) -> str:
        """What a drop without a reason was for, by what only such a drop leaves; empty for nothing.

        Where the program let the packet pass there is none: ask that first. Source: calico_tc_process_ct_lookup and
        calico_tc_skb_accepted in felix/bpf-gpl/tc.c, calico_ct_lookup in conntrack.h, v3.20 to master.
        """
        if self.ct_rc & _RPF_FAILED:
            return "reverse path filter: it came in by an interface that conntrack does not expect"
        if self.ct_rc & _TUNNEL_CHANGED and side is Side.FROM_HEP and not self.ct_flags & _MAGLEV:
            return "the source of the tunnel changed"
        if self.conntrack_result == "MID_FLOW_MISS":
            if side is Side.TO_WEP:
                return _MID_FLOW
            if side is Side.FROM_HEP and self.result == _RES_DENY:  # all others fall through to Linux
                return _CHAIN
        if without := self._without_result(side):
            return without
        return "invalid in conntrack" if self.conntrack_result == "INVALID" and side is not Side.FROM_HEP else ""

    def silent(self, side: Side | None) -> str:
        """What of Calico's drops without a reason leaves such a state, most likely; empty for none in particular.

        Source: calico_tc_process_ct_lookup and calico_tc_skb_new_flow in felix/bpf-gpl/tc.c, v3.22 to master.
        """
        fresh = self.conntrack_result == "NEW"
        if fresh and self.pol_rc == _ALLOW and side is Side.FROM_WEP and self.flags & _TO_HOST:
            return "from a pod to its own host, which defaultEndpointToHostAction forbids"
        # The policy program would say deny. It is asked about a new flow, and about any SYN.
        if self.result != _RES_DENY or self.pol_rc != _NO_MATCH or not (fresh or self.ct_rc & _SYN):
            return ""
        if side is Side.TO_WEP or (side is Side.FROM_WEP and fresh and self.flags & _AFTER_RPF):
            return _NO_POLICY
        if side is Side.FROM_WEP:
            return f"the source is not this pod's (reverse path), or {_NO_POLICY}"
        if side is Side.FROM_HEP and not int(self.tunnel):
            return "reverse path: its source may not come in by this interface (bpfEnforceRPF)"
        return ""


def layout(map_name: str, size: int) -> Layout:
    """The table for a map by name and value size. Raises LayoutMismatch naming those known."""
    for each in LAYOUTS:
        if each.map_name == map_name and each.size == size:
            return each
    known = ", ".join(f"{each.map_name} {each.size} B ({each.releases})" for each in LAYOUTS)
    raise LayoutMismatch(0, f"one of {known}", f"{map_name} {size} B", "Calico state")


def decode(raw: bytes, table: Layout, version: int = 4) -> CalicoState:
    """One state, of a packet of IP *version*: up to v3.24 all are of IPv4, and an IPv6 packet's has no addresses.

    *raw*: the map value. Raises LayoutMismatch for another length.
    """
    if len(raw) != table.size:
        raise LayoutMismatch(0, f"{table.size} bytes", f"{len(raw)} bytes", table.map_name)
    family, width = (IPv4Address, 4) if version == 4 or table.stride == 4 else (IPv6Address, table.stride)

    def address(at: int) -> IPv4Address | IPv6Address:
        return family(raw[at : at + width])

    begin, step = table.addresses, table.stride
    addresses = [address(at) for at in range(begin, begin + (4 + table.has_pre_nat) * step, step)]
    ports = list(struct.unpack_from("<HHHH", raw, table.ports))
    if not table.has_pre_nat:
        addresses.insert(2, addresses[1])
        ports.insert(2, ports[1])
    src, dst, pre_nat, post_nat, tunnel = addresses
    sport, dport, pre_dport, post_dport = ports[:4]
    is_six = version != 4
    rule_ids: tuple[int, ...] = ()
    if table.rules_hit is not None and table.rule_ids is not None:
        (hit,) = struct.unpack_from("<I", raw, table.rules_hit)
        rule_ids = struct.unpack_from(f"<{min(hit, MAX_RULES)}Q", raw, table.rule_ids)
    result = reason = None
    ct_flags = 0
    if table.fwd is not None:
        result, _mark, reason = struct.unpack_from("<iII", raw, table.fwd[is_six])
        (ct_flags,) = struct.unpack_from("<I", raw, table.ct_rc + 4)
    (ct_rc,) = struct.unpack_from("<h", raw, table.ct_rc)
    nat_ip = nat_sip = masq = family(0)
    nat_port = nat_sport = 0
    if table.nat is not None:
        nat_ip, nat_sip = address(table.nat), address(table.nat + width)
        nat_port, nat_sport = struct.unpack_from("<HH", raw, table.nat + 2 * width)
    if table.masq is not None:
        masq = address(table.masq[is_six])
    number = ct_rc & 0xFF
    return CalicoState(
        src,
        dst,
        pre_nat,
        post_nat,
        tunnel,
        sport,
        dport,
        pre_dport,
        post_dport,
        raw[table.ip_proto],
        struct.unpack_from("<i", raw, table.pol_rc)[0],
        rule_ids,
        struct.unpack_from(table.flags_format, raw, table.flags[is_six])[0],
        ct_rc,
        ct_flags,
        table.ct_results[number] if number < len(table.ct_results) else f"result {number}",
        nat_ip,
        nat_sip,
        nat_port,
        nat_sport,
        masq,
        result,
        reason,
    )
