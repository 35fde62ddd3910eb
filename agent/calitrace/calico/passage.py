"""One packet through one Calico program, put together from the lines that the program printed.

A program runs on one CPU, so its lines follow each other on that CPU, all with one tag. What breaks that, and what
we do then:

- Another program's lines come in between, of the same task or (with PREEMPT_RT) of another: the first is kept open,
  and goes on when its tag and task come again before anything begins anew.
- The line that begins a passage was lost, or the one that ends it: the passage stands with a mark. A passage never
  goes on over a place where lines are known to be lost.
- Some programs print no last line: those that drop in the middle of the chain, whose last line says why, and XDP.
  They are over when another program begins on that CPU. XDP has no first line either: its packets begin with parsing.
- A preamble prints when it cannot enter its chain. It tries the debug chain then; if that fails too, the packet is
  dropped. What it printed stands before the lines of the program that it could enter.

Programs of v3.13 to v3.17 print no first line either: there the lines of a passage begin after the end of another.
Source of the order of lines: felix/bpf-gpl/tc.c, v3.13 to master.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from calitrace.calico import messages, reasons, trace
from calitrace.calico.log import Form, Line, Tag
from calitrace.packet import ICMP, ICMP6, PROTOCOLS, TCP, UDP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from calitrace.calico.trace import Context
    from calitrace.packet import Layer

POLICY_DENY = "DENY due to policy"
_START = "New packet"
_FIRST = (_START, "IP id=", "CT-6 lookup from", "CT-17 lookup from", "CT-1 lookup from")
_RESULT_LINE = "Final result="
# Last lines of programs that drop without a Final result, and are the last wherever they stand.
_DROPS = (
    POLICY_DENY,
    "Egress HEP should drop packet with no CT state",
    "no globals: DROP",
    "no counters for ",
    "State map lookup failed: DROP",
    "Main program not loaded for IP packet version",
)
_LAST = (_RESULT_LINE, *_DROPS)
_AFTER_POLICY = ("Entering ", "Tail call to ", _RESULT_LINE)
_OLD_POLICY = "About to jump to policy program; lack of further"  # ... logs means policy dropped the packet
_PASSES = ("IPv6 on host interface", "Unknown ethertype on host interface")
_ALONE = (*_PASSES, "IPv6 from workload")  # up to v3.16: all that the program prints
_AFTER_ALONE = ("Drop malformed", "Traffic is towards", _RESULT_LINE)
_INFO = (_RESULT_LINE, "Workload RPF fail", "Source collision unresolved")  # at level Info there is nothing before
_DEBUG_ONLY = "Final result=ALLOW rc "  # since v3.30, whose Info prints nothing
_EDGES = frozenset(text[:4] for text in (_START, *_LAST, _OLD_POLICY, *_ALONE))  # a quick look: others only go on
_BEFORE = ("No metadata is shared by XDP", "Received metadata from XDP")  # without a tag, before the first line
_WHOLE = (_RESULT_LINE, "Main program not loaded")  # without a tag: all that its program prints, but for _BEFORE
# What drops without a Final result, even if it is the last line of all: others could be followed by more.
_SILENT = (
    "Maglev: ",
    "Packet proto: ",
    "Failed to jump to maglev",
    "ICMP: ",
    "Non ipv4 packet on icmp",
    "Unexpected CT",
)
_XDP_ACCEPTS = ("Entering calico_xdp_accepted", "Inbound failsafe port", "Outbound failsafe port")
_XDP_DROPS = "Entering calico_xdp_drop"
# The lines of parsing, in the order in which a program prints them.
_PARSING = (
    ("IP id=", "ARP: ", "IPv6 ", "IPv4 ", "Unknown ethertype", "State map", "No counters", "Counters map", _START),
    ("IP s=",),
    ("ip->nexthdr",),
    ("IP ihl=",),
    ("TCP; ", "UDP; ", "ICMP", "Unknown protocol", "Too short", "Drop malformed"),
)
_PREAMBLE = re.compile(
    r"(?P<kind>tc|xdp)_preamble iface (?P<padded>\S+)"
    r"(?P<more> (?:failed to call (?:(?P<called>main|debug main)|(?P<filter>log filter)))?)?"
)
_LOG_ACTION = ("policy ALLOWED", "policy DENIED")  # whose tag has no "IPv6 "
_DROP_PROGRAM = "Entering calico_tc_skb_drop - DENY"  # v3.23 and v3.24: the state of the packet is its last word
_STATE_ENDS = "ct_rc="
# What denies without a word: known by the line before the result.
_UNSAID = (
    (
        ("NAT: no backend", "NAT: backend miss", "Request packet with DNF", "Return ICMP mtu", "Sending TCP RST"),
        messages.CHAIN,  # the programs that answer
    ),
    (("Unknown protocol (",), "a protocol that Calico does not know, from or to a pod"),
    (("Not a tunnel route for",), "no route for the destination at the tunnel device"),
)
_TTL_ENDS = re.compile(r"ip->(?:ttl|hop_limit) [01]")
_ENTRY_PARSE = re.compile(r"IP (?:id=\d+ )?s=(?P<src>\S+) d=(?P<dst>\S+)")
_PORTS = re.compile(r"(?P<proto>TCP|UDP); ports: s=(?P<sport>\d+) d=(?P<dport>\d+)")
_LOOKUP = re.compile(r"CT(?:-(?P<proto>\d+)|:) lookup (?P<side>from|to) +(?P<address>\S+):(?P<port>\d+)")
_ICMP = re.compile(r"ICMP(?P<v6>V6)?; type=(?P<type>\d+) code=(?P<code>\d+)")
_ACTION = re.compile(
    r"policy (?P<verdict>ALLOWED|DENIED) +proto (?P<proto>\d+) src (?P<src>\S+):(?P<sport>\d+) "
    r"dest (?P<dst>\S+):(?P<dport>\d+)"
)
_RESULT = re.compile(
    r"Final result=(?P<verdict>ALLOW|DENY) (?:\((?P<code>-?[0-9a-f]+)\)|rc (?P<rc>-?\d+))\."
    r"(?: Program execution time: (?P<ns>\d+)ns)?"
)
_RPF = re.compile(r"Host RPF check (?:rc (?P<rc>-?\d+)|src=\S+ skb iface=\d+) result (?P<result>\d)")
_RPF_RC = re.compile(r"Host RPF check src=\S+ skb iface=\d+ fib rc (?P<rc>-?\d+)")
_STATE = re.compile(r"src=(?P<src>\S+) dst=(?P<dst>\S+)")
_STATE_PROTO = re.compile(r"proto=(?P<proto>\d+)|NAT: 1st level lookup .* (?P<name>tcp|udp)")
_STATE_PORT = re.compile(r"(?:(?P<source>sport=)|dport=|pre_nat=\S+:)(?P<port>\d+)")
_CT_RESULT = re.compile(r"CT(?:-\d+|:) result: (?:(?P<word>NEW|INVALID)|(?P<hex>0x[0-9a-f]+)|(?P<number>\d+))")
_POLICY_RC = re.compile(r"pol_rc=(?P<rc>-?\d+)")
_NAT_TO = re.compile(r"CT: (?P<kind>DNAT to|SNAT from) (?P<address>\S+):(?P<port>\d+)")
_PORT_TO = re.compile(r"Fixing \w+ (?P<end>source|dest) port from \d+ to (?P<port>\d+)")
_SOURCE_TO = re.compile(r"remote wl \S+ tunneled via (?P<address>\S+)")
_ERROR_TO = re.compile(r"ICMP related: outer IP (?P<kind>[SD]NAT to) (?P<address>\S+)")
# How the lines begin that tell what was done.
_TELLING = ("CT", "ct_related", "ICMP ", "vxlan ", "NAT: ", "DSR ", "Entering calico_tc_skb_send", "Final ")
_CHANGES = ("Fixing ", "remote wl ", "ICMP related: outer")
_ANSWER = re.compile(r"ICMP type (?P<type>\d+) and code (?P<code>\d+)")
_RESET = "Entering calico_tc_skb_send_tcp_rst"
_RELATED = ("result: related", "ct_related=1")  # from here on NAT is of the packet that an ICMP error quotes
_ENCAP = re.compile(r"vxlan encap (?P<src>\S+) : (?P<dst>\S+)")
_DECAP = re.compile(r"vxlan decap origin (?P<src>\S+)")
_REDIRECT = re.compile(
    r"(?:Got Linux FIB hit, redirecting to iface|Redirect\w* .*?)[ (](?:(?P<ifindex>\d+)\)?|(?P<bpfin>bpfnatin))"
)
_TO_STACK = "Final result=ALLOW rc -1"
_WIREGUARD = "Allowing WG "
_FIB_FAILED = re.compile(r"FIB lookup failed \((?:FIB problem|bad input)\): (?P<rc>-?\d+)")
_DSR = "DSR enabled, skipping SNAT"  # after the line that says SNAT
_NO_COUNTERS = re.compile(r"no counters for (?P<ifindex>\d+): DROP")
_NO_IP = ("ARP: ", "Unknown ethertype")
_HEX = re.compile(r"[0-9a-f]{1,8}")

NO_BACKEND = ("NAT: no backend", "NAT: backend miss")
_POLICY_RESULTS = {0: "", 1: "allow", 2: "deny"}  # felix/bpf-gpl/policy.h; 0 also where policy was not asked
# felix/bpf-gpl/conntrack_types.h, v3.18 and later; before, there is no MID_FLOW_MISS.
CT_RESULTS = {
    0: "new",
    1: "mid-flow miss",
    2: "established",
    3: "established, bypass",
    4: "established, SNAT",
    5: "established, DNAT",
    6: "invalid",
    7: "Maglev mid-flow miss",
}
_CT_FLAGS = {0x100: "related", 0x200: "RPF failed", 0x400: "tunnel source changed"}
FIB_RESULTS = {  # include/uapi/linux/bpf.h, BPF_FIB_LKUP_RET_*
    1: "BLACKHOLE",
    2: "UNREACHABLE",
    3: "PROHIBIT",
    4: "NOT_FWDED",
    5: "FWD_DISABLED",
    6: "UNSUPP_LWT",
    7: "NO_NEIGH",
    8: "FRAG_NEEDED",
    9: "NO_SRC_ADDR",
}


class Mark(str, Enum):
    """What is not whole about a passage."""

    BEGINNING_LOST = "beginning lost"
    END_LOST = "end lost"
    INTERRUPTED = "interrupted"
    NO_RESULT = "this program prints no result"


@dataclass(frozen=True)
class Flow:
    """A five-tuple in Calico's words: *src* and *dst* are addresses, or what stands in their place in a paste."""

    proto: int = 0
    src: str = ""
    sport: int = 0
    dst: str = ""
    dport: int = 0

    def __str__(self) -> str:
        name = PROTOCOLS.get(self.proto, f"proto {self.proto}") + " " if self.proto else ""
        if not self.sport and not self.dport:
            return f"{name}{self.src or '?'} > {self.dst or '?'}"
        return f"{name}{_endpoint(self.src, self.sport)} > {_endpoint(self.dst, self.dport)}"

    def packet(self) -> bytes:
        """An IP header and ports such as this packet had, for a filter to look at; empty without addresses."""
        try:
            src, dst = ipaddress.ip_address(self.src), ipaddress.ip_address(self.dst)
        except ValueError:
            return b""
        ports = struct.pack("!HHII", self.sport, self.dport, 0, 0) + bytes(8)
        if src.version == 6:
            header = struct.pack("!IHBB", 6 << 28, len(ports), self.proto, 64)
        else:
            header = struct.pack("!BBHIBBH", 0x45, 0, 20 + len(ports), 0, 64, self.proto, 0)
        return header + src.packed + dst.packed + ports


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address or '?'}:{port}"


@dataclass
class Facts:
    """What the lines of a passage say. Empty where they say nothing.

    *flows*: as the packet came, and what was in it after decapsulation. *after_nat*: of the innermost, translated.
    """

    flows: list[Flow] = field(default_factory=list)
    after_nat: Flow | None = None
    ports: set[tuple[int, int]] = field(default_factory=set)
    conntrack: str = ""
    policy: str = ""
    tunnel_from: str = ""
    tunnel_to: str = ""
    no_backend: bool = False
    forwarding: str = ""


class Passage:
    """One packet through one program. *lines*: all of it, in order."""

    def __init__(self, tag: Tag, first: Line) -> None:
        self.tag = tag
        self.lines = [first]
        self.marks: list[Mark] = []
        self.suspended = False
        self._own_newline = False
        self.verdict = ""  # ALLOW, DENY, or empty when none was seen
        self.printed_code = ""  # the number in the last line, as it stands there
        self.rc: int | None = None  # what the program returned to the kernel, where the last line says it
        self.execution_ns: int | None = None  # with the time that printing took

    @property
    def interface(self) -> str:
        """As the tag names it: up to v3.24 cut to 8 characters."""
        return self.tag.interface

    @property
    def direction(self) -> str:
        """Calico's policy direction: I, E or X."""
        return self.tag.direction

    @property
    def name(self) -> str:
        """Interface and direction, ``eth0-I``; ``untagged`` where its lines name none."""
        return f"{self.interface}-{self.direction}" if self.direction else self.interface or "untagged"

    @property
    def cpu(self) -> int:
        """-1 where the header was cut off."""
        return self.lines[-1].context.cpu

    @property
    def pid(self) -> int:
        """Of the task in whose context the program ran."""
        return self.lines[-1].context.pid

    @property
    def started_ns(self) -> int:
        """Time of the first line."""
        return self.lines[0].time_ns

    @property
    def ended_ns(self) -> int:
        """Time of the last line."""
        return self.lines[-1].time_ns

    @property
    def texts(self) -> list[str]:
        """The messages without prefix."""
        return [line.text for line in self.lines]

    def finish(self, text: str, own_newline: bool) -> None:
        """Take what the last line says. *own_newline*: whether messages bring one, as they do up to v3.29."""
        self._own_newline = own_newline
        found = _RESULT.match(text)
        if found is None:
            self.verdict = "DENY"
            return
        self.verdict = found["verdict"]
        self.execution_ns = int(found["ns"]) if found["ns"] else None
        self.printed_code = found["rc"] or found["code"]
        if found["rc"] or (self.verdict == "ALLOW" and self.printed_code in ("-1", "7")):  # no reason to allow is these
            self.rc = int(self.printed_code)

    @cached_property
    def code(self) -> int | None:
        """Calico's reason. None where none was printed, or where its base is not known.

        DENY is hexadecimal up to v3.29, whose addresses are so too, and decimal since.
        """
        if not self.printed_code or self.rc is not None:
            return None
        if self.verdict == "ALLOW" or (self.printed_code.isdecimal() and int(self.printed_code) < 10):
            return int(self.printed_code)
        base = self._base()
        return int(self.printed_code, base) if base else None

    def _base(self) -> int:
        """16 or 10 by what else shows the release; 0 when nothing does."""
        if not self.printed_code.isdecimal() or self.tag.old:
            return 16
        for text in self.texts:
            if found := _ENTRY_PARSE.match(text) or _LOOKUP.match(text):
                return 16 if _HEX.fullmatch(found["dst"] if found.re is _ENTRY_PARSE else found["address"]) else 10
        if self._own_newline:
            return 16
        return 10 if self.lines[-1].ktime_ns else 0

    @property
    def calico_reason(self) -> str:
        """Name of the reason of a DENY; empty where there is none, its number where the release is not known."""
        if self.verdict != "DENY":
            return ""
        if self.code is None and self.printed_code:
            return f"reason {self.printed_code}, hexadecimal or decimal"
        if self.code in reasons.OLD_REASONS and self.tag.old:
            return reasons.OLD_REASONS[self.code]
        return reasons.drop_name(self.code, 0 if self.tag.old else self._base()) if self.code else ""

    def ports(self) -> set[tuple[int, int]]:
        """All (source, destination) port pairs that its lines name: outer and inner."""
        return self.facts.ports

    def may_be_of(self, layers: Iterable[Layer]) -> bool:
        """Whether it can be about a packet with these *layers*, as far as lines that name no ports tell.

        One address is enough: the program may have translated the other after it printed them.
        """
        if any(text.startswith(_NO_IP) for text in self.texts):
            return False
        flows = [flow for flow in self.facts.flows if flow.packet()]  # others are not whole addresses
        return not flows or any(
            flow.proto in (0, layer.proto) and (flow.src == str(layer.src) or flow.dst == str(layer.dst))
            for layer in layers
            for flow in flows
        )

    def is_at(self, interface: str, ifindex: int) -> bool:
        """Whether it may have run there. Lines without a tag name the interface by number, or not at all."""
        if self.interface:
            return self.tag.is_of(interface)
        found = _NO_COUNTERS.match(self.texts[-1])
        return found is None or int(found["ifindex"]) == ifindex

    def cause(self) -> str:
        """Why it was dropped, from the line that says so; empty when none does.

        Without a verdict only the last line can say so: those before it may speak of what was mended later.
        """
        if self.verdict and self.lines[-1].text.startswith(_OLD_POLICY):
            return "denied by policy"
        general = ""  # that there is no entry: a line before it may say why
        for line in reversed(self.lines if self.verdict else self.lines[-1:]):
            if general and not (line.message and line.message.stage == "entry"):
                break
            if (found := _RPF.match(line.text)) and found["result"] == "0":
                return f"the reverse path check of the source failed ({self._way_back(found['rc'])})"
            said = line.message.cause if line.message else ""
            if said and said != messages.NO_ROOM:
                return said
            general = general or said
        return general or (self._unsaid() if self.verdict == "DENY" else "")

    def _unsaid(self) -> str:
        """Why it was dropped, from the line before the result, where no line says so."""
        text = self.texts[-2] if len(self.lines) > 1 else ""
        if _TTL_ENDS.fullmatch(text):
            return "the time to live is over"
        return next((cause for texts, cause in _UNSAID if text.startswith(texts)), "")

    def _way_back(self, rc: str | None) -> str:
        """What the kernel's routing said of it. *rc*: where the line has it; up to v3.24 another line does."""
        if rc is None:
            rc = next((found["rc"] for text in self.texts if (found := _RPF_RC.match(text))), "")
        if rc == "0":
            return "the way back is by another interface"
        return f"FIB result {FIB_RESULTS.get(int(rc), rc)}" if rc else "FIB result not printed"

    def why(self) -> str:
        """Why it was dropped: from the line that says so, else from the reason's number; empty when neither does."""
        return self.cause() or reasons.MEANING.get(self.calico_reason, self.calico_reason)

    def decisions(self) -> list[str]:
        """What it did to the packet: NAT, tunnel, bypass, an answer to the sender; in the order of the lines."""
        found = []
        where = ""
        for text in self.texts:
            if not text.startswith(_TELLING):
                continue
            if nat := _NAT_TO.match(text):
                found.append(f"{where}{nat['kind']} {address(nat['address'], self.tag)}:{nat['port']}")
            elif text.endswith(_RELATED):
                where = "in the ICMP error: "
            elif nat := _ERROR_TO.match(text):
                found.append(f"{nat['kind']} {address(nat['address'], self.tag)}")
            elif answer := _ANSWER.match(text):
                found.append(f"ICMP type {answer['type']} code {answer['code']} to the sender")
            elif text.startswith(_RESET):
                found.append("TCP RST to the sender")
            elif encap := _ENCAP.match(text):
                found.append(f"VXLAN encap to {address(encap['dst'], self.tag)}")
            elif text == "vxlan decap":
                found.append(f"VXLAN decap from {self.facts.tunnel_from}".removesuffix(" from "))
            elif text.startswith(_DSR):
                found = [each for each in found if not each.startswith("SNAT")] + ["DSR: SNAT is left to the uplink"]
            elif text.startswith(NO_BACKEND):
                found.append("no backend")
            elif text.startswith(_RESULT_LINE) and " Bypass" in text:
                found.append("bypass")
        return found

    def no_backend(self) -> bool:
        """Whether the service was found without an endpoint."""
        return any(text.startswith(NO_BACKEND) for text in self.texts)

    @cached_property
    def facts(self) -> Facts:
        """What all the lines say, read once."""
        return _read(self.texts, self.tag)


def address(token: str, of: Tag) -> str:
    """An address as people write it. *token*: dotted, bracketed IPv6, or up to v3.29 hexadecimal in host order.

    Up to v3.29 an IPv6 address shows its last 32 bits only: it stays as printed, as does a word in a pasted log.
    """
    if token.startswith("["):
        try:
            return str(ipaddress.IPv6Address(token.strip("[]")))
        except ValueError:
            return token
    if not of.ipv6 and _HEX.fullmatch(token):
        return str(ipaddress.IPv4Address(int(token, 16)))
    return token


def _read(texts: list[str], tag: Tag) -> Facts:
    facts = Facts()
    outer, inner, state = Flow(), Flow(), Flow()
    decapsulated = False
    related = False
    changes: dict[str, Any] = {}  # of the innermost flow
    for text in texts:
        if (found := _ENTRY_PARSE.match(text)) and not outer.src:
            outer = replace(outer, src=address(found["src"], tag), dst=address(found["dst"], tag))
        elif found := _PORTS.match(text):
            pair = int(found["sport"]), int(found["dport"])
            facts.ports.add(pair)
            flow = replace(
                inner if decapsulated else outer,
                proto=TCP if found["proto"] == "TCP" else UDP,
                sport=pair[0],
                dport=pair[1],
            )
            outer, inner = (outer, flow) if decapsulated else (flow, inner)
        elif found := _ICMP.match(text):
            flow = replace(inner if decapsulated else outer, proto=ICMP6 if found["v6"] else ICMP)
            outer, inner = (outer, flow) if decapsulated else (flow, inner)
        elif found := _ACTION.match(text):
            flow = Flow(
                int(found["proto"]),
                address(found["src"], tag),
                int(found["sport"]),
                address(found["dst"], tag),
                int(found["dport"]),
            )
            outer, inner = (outer, flow) if outer.src else (flow, inner)
            facts.ports.add((flow.sport, flow.dport))
            facts.policy = "allow" if found["verdict"] == "ALLOWED" else "deny"
        elif text.startswith(("CT", "BPF CT")):
            if found := _LOOKUP.match(text):
                end, port = address(found["address"], tag), int(found["port"])
                inner = replace(inner, proto=inner.proto or int(found["proto"] or outer.proto))
                if found["side"] == "from":  # a look for a clash of source ports is without one
                    inner = replace(inner, src=end, sport=port or inner.sport)
                else:
                    inner = replace(inner, dst=end, dport=port)
            elif found := _CT_RESULT.match(text):
                facts.conntrack = _conntrack(found, facts.conntrack)
            elif (found := _NAT_TO.match(text)) and not related:
                which = ("dst", "dport") if found["kind"] == "DNAT to" else ("src", "sport")
                changes.update(zip(which, (address(found["address"], tag), int(found["port"])), strict=True))
            else:
                related = related or text.endswith(_RELATED)
                facts.conntrack = _hit(text) or facts.conntrack
        elif text.endswith(_RELATED):
            related = True
        elif text.startswith(_CHANGES):
            changes.update(_change(text, tag, related))
        elif text.startswith(_DSR):
            changes = {}
        elif text.startswith(_WIREGUARD):
            facts.policy = "deny, overridden for WireGuard"
        elif found := _POLICY_RC.match(text):
            facts.policy = facts.policy or _POLICY_RESULTS.get(int(found["rc"]), found["rc"])
        elif text.startswith((POLICY_DENY, _XDP_DROPS)):
            facts.policy = "deny"
        elif text.startswith(_XDP_ACCEPTS[0]):
            facts.policy = "allow"
        elif text.endswith("HEP with no policy, allow."):
            facts.policy = "no policy, allow"
        elif text == "WEP with no policy, deny.":
            facts.policy = "no policy, deny"
        elif text == "vxlan decap":
            decapsulated = True
            facts.tunnel_from = outer.src
        elif found := _DECAP.match(text):
            facts.tunnel_from = address(found["src"], tag)
        elif found := _ENCAP.match(text):
            facts.tunnel_to = address(found["dst"], tag)
        elif text.startswith(NO_BACKEND):
            facts.no_backend = True
        elif found := _STATE.match(text):
            state = replace(state, src=address(found["src"], tag), dst=address(found["dst"], tag))
        elif found := _STATE_PORT.match(text):
            port = int(found["port"])
            state = replace(state, sport=port) if found["source"] else replace(state, dport=port)
        elif found := _STATE_PROTO.match(text):
            state = replace(state, proto=int(found["proto"] or (TCP if found["name"] == "tcp" else UDP)))
        elif found := _FIB_FAILED.match(text):
            facts.forwarding = f"FIB {FIB_RESULTS.get(int(found['rc']), found['rc'])}"
        elif found := _REDIRECT.match(text):
            facts.forwarding = "to bpfin.cali" if found["bpfin"] else f"to ifindex {found['ifindex']}"
            facts.forwarding *= "failed" not in text
        elif text.startswith(_TO_STACK) and facts.forwarding.startswith("to "):
            facts.forwarding = ""
    if not (outer.src or inner.src):  # the lines of parsing were lost: what the program knows later is all there is
        outer = state if state.src else outer
    elif not outer.proto:
        inner = replace(inner, proto=inner.proto or state.proto)
    facts.flows = [outer] if outer != Flow() else []
    if inner != Flow() and inner != outer:
        facts.flows.append(inner)
    if facts.flows:
        after = replace(facts.flows[-1], **changes)
        facts.after_nat = after if after != facts.flows[-1] else None
    return facts


def _change(text: str, tag: Tag, related: bool) -> dict[str, str | int]:
    """What else than the lines of DNAT and SNAT say of NAT. *related*: ports are those of the quoted packet."""
    if found := _PORT_TO.match(text):
        return {} if related else {"sport" if found["end"] == "source" else "dport": int(found["port"])}
    if found := _SOURCE_TO.match(text):
        return {"src": address(found["address"], tag)}
    if found := _ERROR_TO.match(text):
        return {"src" if found["kind"] == "SNAT to" else "dst": address(found["address"], tag)}
    return {}


def _conntrack(found: re.Match[str], before: str) -> str:
    if found["word"]:
        return found["word"].lower()
    if found["number"]:  # its numbering changed within the releases that print it so: the line before said it
        return before or f"result {found['number']}"
    value = int(found["hex"], 16)
    words = [CT_RESULTS.get(value & 0xFF, f"result {value & 0xFF}")]
    words += [name for bit, name in _CT_FLAGS.items() if value & bit]
    return ", ".join(words)


_HITS = (
    ("have Linux CT entry", "established, by Linux"),
    ("NEW flow", "new"),
    ("short-circuiting lookup", "new"),
    ("mid-flow", "mid-flow miss"),
    (": SNAT.", "established, SNAT"),
    ("doing secondary lookup", "established, DNAT"),
    (": ESTABLISHED.", "established"),
    ("Hit! NORMAL entry", "established"),
)


def _hit(text: str) -> str:
    return next((words for part, words in _HITS if part in text), "")


class Assembler:
    """Lines, in the order of the buffer, to passages. A line of no packet gives none.

    *unclaimed*: is given the lines in front of a program's first that no program came for.
    """

    _DEPTH = 4  # programs that can interrupt one another; with more, the ends of some were lost

    def __init__(self, unclaimed: Callable[[Line], None] = lambda line: None) -> None:
        self._unclaimed = unclaimed
        self._open: dict[int, list[Passage]] = {}  # the last one is running, or was the last to
        # The tag and task of the line before, and how to add a line: where nothing ended, most lines only go on.
        self._running: tuple[Tag, Context, Callable[[Line], None]] | None = None
        self._before: dict[int, list[Line]] = {}  # lines that belong to the program which begins next on that CPU
        self._own_newline = False
        self._old_starts = False
        self.attached = False  # whether the last line without a tag became part of a passage

    def feed(self, line: Line) -> list[Passage]:
        """Take a line; returns the passages that are now over, in the order in which they ended."""
        _, context, (tag, text, _, _), _ = line
        running = self._running
        if running is not None and running[0] is tag and running[1] is context and text[:4] not in _EDGES:
            running[2](line)
            return []
        if tag is None or not tag.direction:
            return self._untagged(line)
        self._running = None
        stack = self._open.setdefault(context.cpu, [])
        if stack:
            passage = stack[-1]
            _, last, (_, before, _, _), _ = passage.lines[-1]
            own = passage.tag is tag or passage.tag == tag
            same = own or (text.startswith(_LOG_ACTION) and passage.tag == replace(tag, ipv6=True))
            if same and not passage.suspended and (last is context or last.pid == context.pid):
                if text[:4] not in _EDGES and before[:4] not in _EDGES and tag.direction != "X":
                    self._running = (tag, context, passage.lines.append) if own else None
                    passage.lines.append(line)
                    return []
                if not text.startswith(_START) and not _is_over(passage, text):
                    passage.lines.append(line)
                    return self._ended(stack, line) if text.startswith(_LAST) else []
                return [_cut(stack.pop()), *self._begin(line, tag, stack)]
        done = self._left(stack)
        for passage in stack:
            passage.suspended = True
        passages = [each for each in stack if each.pid == context.pid]
        depth = next((at for at, each in enumerate(passages) if each.tag == tag), None)
        if depth is None:
            if len(stack) >= self._DEPTH:
                done.append(_cut(stack.pop(0)))
            return done + self._begin(line, tag, stack)
        for passage in passages[depth + 1 :]:  # programs of one task end in the opposite order
            stack.remove(passage)
            done.append(_cut(passage))
        passage = passages[depth]
        stack.remove(passage)
        if text.startswith(_FIRST) or _is_over(passage, text):
            return [*done, _cut(passage), *self._begin(line, tag, stack)]
        stack.append(passage)
        passage.suspended = False
        if Mark.INTERRUPTED not in passage.marks:
            passage.marks.append(Mark.INTERRUPTED)
        passage.lines.append(line)
        return done + self._ended(stack, line)

    @staticmethod
    def _left(stack: list[Passage]) -> list[Passage]:
        """What is over, without a last line, now that another program prints on the CPU."""
        over = [passage for passage in stack if _prints_no_more(passage)]
        for passage in over:
            stack.remove(passage)
        return [_cut(passage) for passage in over]

    def _ended(self, stack: list[Passage], line: Line) -> list[Passage]:
        if not line.text.startswith(_LAST):
            return []
        passage = stack.pop()
        passage.finish(line.text, self._own_newline or line.raw.endswith("\n"))
        return [passage]

    def _begin(self, line: Line, tag: Tag, stack: list[Passage]) -> list[Passage]:
        text = line.text
        before = self._before.pop(line.context.cpu, [])
        if _failed(before) or (before and before[0].context.pid != line.context.pid):
            done, before = self._given_up(before), []
        else:
            done = []
        passage = Passage(tag, line)
        passage.lines[:0] = before
        stack.append(passage)
        if text.startswith(_LOG_ACTION):
            passage.verdict = "DENY" if text.startswith("policy DENIED") else ""
            return [*done, stack.pop()]
        # v3.13 to v3.17 have the short tags of v3.18 to v3.24, but no first line that one could miss.
        self._old_starts = self._old_starts or (tag.old and text.startswith(_START))
        if tag.direction == "X":
            missed = _parsing(text) is None
        else:
            missed = text.startswith(_DEBUG_ONLY) or (
                not text.startswith((_START, *_INFO)) and (self._old_starts or not tag.old)
            )
        if missed and tag.direction:
            passage.marks.append(Mark.BEGINNING_LOST)
        return done + self._ended(stack, line)

    def _given_up(self, before: list[Line]) -> list[Passage]:
        """Lines that no program came for: a preamble dropped the packet with them, or the program's lines are lost."""
        if _failed(before):
            return [_dropped(before)]
        for line in before:
            self._unclaimed(line)
        return []

    def _precede(self, line: Line) -> list[Passage]:
        """A line in front of a program's first; returns the packet that is dropped with it, or was before."""
        cpu = line.context.cpu
        before = self._before.setdefault(cpu, [])
        preamble = _PREAMBLE.match(line.text)
        if preamble and preamble["called"] == "main" and any(_failed([each]) == "debug main" for each in before):
            return [_dropped([*self._before.pop(cpu), line])]
        again = preamble and (not preamble["more"] or (preamble["called"] == "main" and _failed(before)))
        if preamble and before:  # it is another packet's than what another interface, or a whole preamble, printed
            known = [each for each in map(_PREAMBLE.match, (each.text for each in before)) if each]
            again = again or any(each["padded"] != preamble["padded"] for each in known)
            again = again or bool(preamble["filter"] and any(each["more"] for each in known))
        if not preamble:  # what a program prints first: its preamble could enter it, or this is another packet
            again = bool(_failed(before)) or any(each.text.startswith(_BEFORE) for each in before)
        if again or (before and before[0].context.pid != line.context.pid):
            self._before[cpu] = [line]
            return self._given_up(before)
        before.append(line)
        return []

    def _untagged(self, line: Line) -> list[Passage]:
        cpu, text = line.context.cpu, line.text
        if line.form is Form.BLANK:  # Calico's messages bring a newline of their own, up to v3.29
            self._own_newline = True
            return []
        self._running = None
        if lost := trace.lost(line.text) if line.form is Form.LOST else None:
            return self.cut(lost.cpu, whole=False)
        self.attached = False
        if line.message is None or line.tag is not None:
            return []
        stack = self._open.get(cpu, [])
        own = text.startswith(_WHOLE)
        if text.startswith(_BEFORE) or _PREAMBLE.match(text):
            self.attached = True
            return self._left(stack) + self._precede(line)
        same = bool(stack) and stack[-1].pid == line.context.pid and not own
        self.attached = same or text.startswith(_LAST)
        if same:
            stack[-1].lines.append(line)
            return self._ended(stack, line)
        if not text.startswith(_LAST):
            return []
        return self._left(stack) + self._begin(line, Tag("", ""), [])

    def cut(self, cpu: int, whole: bool = True) -> list[Passage]:
        """What is still open on a CPU, where its programs are known to be over. *whole*: no line of them was lost."""
        self._running = None
        done = self._given_up(self._before.pop(cpu, []))
        over = self._open.pop(cpu, [])
        return done + [_cut(passage, whole) for passage in over]

    def flush(self) -> list[Passage]:
        """All passages still open, cut short by the end."""
        return [passage for cpu in sorted({*self._open, *self._before}) for passage in self.cut(cpu, whole=False)]


def missing_filter(line: Line) -> str:
    """The interface whose preamble found no log filter where its program says that there is one; "" for other lines."""
    preamble = _PREAMBLE.match(line.text)
    return preamble["padded"].rstrip("-") if preamble and preamble["filter"] else ""


def _is_over(passage: Passage, text: str) -> bool:
    """Whether *text* is the next packet's, although no last line was seen."""
    if passage.tag.direction == "X":
        step = _parsing(text)
        return step is not None and step <= max(_reached(line) for line in passage.lines)
    last = passage.lines[-1].text
    if last.startswith(_ALONE):
        return len(passage.lines) == 1 and not text.startswith(_AFTER_ALONE)
    # Policy has denied in silence, as up to v3.17.
    return last.startswith(_OLD_POLICY) and not text.startswith(_AFTER_POLICY)


def _parsing(text: str) -> int | None:
    """Which step of parsing prints this; None for what is none."""
    return next((step for step, texts in enumerate(_PARSING) if text.startswith(texts)), None)


def _reached(line: Line) -> int:
    """The step of parsing that is done with this line; XDP parses once, in order."""
    step = _parsing(line.text)
    if step is None:
        return 0 if line.message is None or line.message.stage == "parse" else len(_PARSING)
    return step


def _prints_no_more(passage: Passage) -> bool:
    """Whether its last line can be the last of its program, though it is no result."""
    return passage.direction == "X" or _denies(passage)


def _denies(passage: Passage) -> bool:
    """Whether its last line can be that of a denial without a result."""
    last = passage.lines[-1]
    return bool(last.message and last.message.cause) or last.text.startswith(_OLD_POLICY) or _is_stated(passage)


def _is_stated(passage: Passage) -> bool:
    """Whether it is the state of a packet that policy denied, up to its last line."""
    return passage.lines[-1].text.startswith(_STATE_ENDS) and _DROP_PROGRAM in passage.texts


def _failed(lines: list[Line]) -> str:
    """What the last line's preamble could not call: main, debug main, or nothing."""
    found = _PREAMBLE.match(lines[-1].text) if lines else None
    return (found["called"] or "") if found else ""


def _dropped(lines: list[Line]) -> Passage:
    """The packet of a preamble that could not enter its chain."""
    found = _PREAMBLE.match(lines[-1].text)
    assert found is not None
    passage = Passage(Tag(found["padded"].rstrip("-"), "X" if found["kind"] == "xdp" else ""), lines[-1])
    passage.lines = lines
    passage.verdict = "DENY"
    return passage


def _cut(passage: Passage, whole: bool = True) -> Passage:
    """End what has no last line. *whole*: nothing that it printed was lost."""
    if passage.lines[-1].text.startswith(_SILENT) or _is_stated(passage) or (whole and _prints_no_more(passage)):
        passage.verdict = "DENY" if _denies(passage) else ""
    if whole and len(passage.lines) == 1 and passage.lines[-1].text.startswith(_PASSES):
        passage.verdict = "ALLOW"
    if passage.direction == "X" and not passage.verdict:
        passage.verdict = _xdp_verdict(passage.texts)
    if not passage.verdict:
        passage.marks.append(Mark.NO_RESULT if passage.direction == "X" else Mark.END_LOST)
    return passage


def _xdp_verdict(texts: list[str]) -> str:
    """By what the program was about to do: XDP prints no result."""
    if any(text.startswith(_XDP_DROPS) for text in texts):
        return "DENY"
    return "ALLOW" if any(text.startswith(_XDP_ACCEPTS) for text in texts) else ""
