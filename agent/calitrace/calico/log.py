"""Calico's debug log: a line of bpf_trace_printk to prefix and message, lines to one program's passage.

Sources: calico-v3.30..master felix/bpf-gpl/log.h and the messages in felix/bpf-gpl; older prefixes from felix
v3.13..v3.29. The tag is the interface name padded with ``-``; ``-I`` and ``-E`` are Calico's *policy* direction,
which on a workload interface is the opposite of the tc hook.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_TAGGED = re.compile(r"(?P<v6>IPv6 )?(?P<tag>[^ :]{1,16})-(?P<direction>[IEXC]): (?P<message>.*)", re.DOTALL)
_ADDRESSES = re.compile(r"IP s=(?P<src>\S+) d=(?P<dst>\S+)")
_PORTS = re.compile(r"(?P<proto>TCP|UDP); ports: s=(?P<sport>\d+) d=(?P<dport>\d+)")
_RESULT = re.compile(
    r"Final result=(?P<verdict>ALLOW|DENY) (?:\((?P<code>-?[0-9a-f]+)\)|rc (?P<rc>-?\d+))\."
    r"(?: Program execution time: (?P<ns>\d+)ns)?"
)
_START = re.compile(r"New packet at ifindex=(?P<ifindex>\d+); mark=(?P<mark>[0-9a-f]+)")

POLICY_DENY = "DENY due to policy"

# Lines that say why a packet was dropped, where the reason code does not: (start of the message, cause).
DROP_LINES = (
    (POLICY_DENY, "denied by policy"),
    ("Workload RPF fail", "the source is not this workload's (reverse path)"),
    ("CT: CT RPF failed", "an established flow came by another interface (reverse path)"),
    (
        "Workload to host traffic blocked by DefaultEndpointToHostAction",
        "defaultEndpointToHostAction is Drop",
    ),
    ("WEP with no policy, deny", "no policy program is loaded for the workload"),
    ("Packet is from an unauthorised source", "the source is not in the service's source ranges"),
    ("missing rt found for", "the backend is not in Calico's routes map"),
    ("Packet hit a black hole route", "the destination is a service address that no service uses"),
    ("VXLAN with our VNI", "VXLAN from a source that is no known node, or with a checksum"),
    ("CT mid-flow miss away from host", "no conntrack entry for a packet in mid-flow"),
    ("dropping tunnel pkt with changed source node", "the flow now comes through another node"),
    ("dropping non-maglev tunnel pkt with changed source node", "the flow now comes through another node"),
    ("VXLAN encap needed but host IP unknown", "the node's own address is unknown to Felix"),
    ("FIB not approved", "the interface the packet should leave by is not in Calico's ifstate map"),
    ("Drop malformed", "malformed or unsupported packet"),
    ("jump to new flow failed", "a program of Calico's tail-call chain is missing"),
    ("jump failed", "a program of Calico's tail-call chain is missing"),
)
_DECISIONS = (
    (re.compile(r"CT: DNAT to (\S+)"), "DNAT to {}"),
    (re.compile(r"CT: SNAT from (\S+)"), "SNAT from {}"),
    (re.compile(r"vxlan encap "), "VXLAN encap"),
    (re.compile(r"vxlan decap$"), "VXLAN decap"),
    (re.compile(r"NAT: no backend"), "no backend"),
    (re.compile(r"Final result=ALLOW \(\d+\)\. Bypass"), "bypass"),
)
_RPF_RESULT = re.compile(r"Host RPF check rc (?P<rc>-?\d+) result (?P<result>\d)")
NO_BACKEND_LINES = ("NAT: no backend", "NAT: backend miss")


@dataclass(frozen=True)
class CalicoLine:
    """*interface*: the tag without its padding; *direction*: I, E, X or C; *message*: the rest."""

    interface: str
    direction: str
    message: str
    ipv6: bool = False
    hex_reason: bool = False  # releases up to v3.29 print the reason of DENY in hexadecimal


def parse_line(text: str) -> CalicoLine | None:
    """The parts of a tagged Calico line, or None for any other line. *text*: without the kernel's header."""
    found = _TAGGED.fullmatch(text)
    if not found:
        return None
    # Up to v3.29 the newline stands in Calico's format strings; later releases leave it to the kernel.
    message = found["message"]
    return CalicoLine(
        found["tag"].rstrip("-"),
        found["direction"],
        message.rstrip("\n"),
        bool(found["v6"]),
        message.endswith("\n"),
    )


@dataclass
class Passage:
    """One packet through one Calico program, as far as its lines tell."""

    interface: str
    direction: str
    cpu: int
    started_ns: int
    hex_reason: bool = False
    ended_ns: int = 0
    lines: list[str] = field(default_factory=list)
    tuples: list[tuple[str, str, int, int]] = field(default_factory=list)  # src, dst, sport, dport
    verdict: str = ""  # ALLOW, DENY or empty when the end was not seen
    code: int | None = None  # number in the Final result line
    execution_ns: int | None = None
    _addresses: tuple[str, str] | None = None

    def add(self, message: str, ktime_ns: int) -> bool:
        """Take the next line; returns whether it was the passage's last."""
        self.lines.append(message)
        self.ended_ns = ktime_ns
        if found := _ADDRESSES.match(message):
            self._addresses = (found["src"], found["dst"])
            self.tuples.append((*self._addresses, 0, 0))
        elif found := _PORTS.match(message):
            src, dst = self._addresses or ("", "")
            self.tuples.append((src, dst, int(found["sport"]), int(found["dport"])))
        elif message.startswith(POLICY_DENY):
            self.verdict = "DENY"
            return True
        elif found := _RESULT.match(message):
            self.verdict = found["verdict"]
            code = found["rc"] or found["code"]
            hexadecimal = (self.hex_reason and self.verdict == "DENY") or not code.lstrip("-").isdecimal()
            self.code = int(code, 16 if hexadecimal else 10)
            self.execution_ns = int(found["ns"]) if found["ns"] else None
            return True
        return False

    def ports(self) -> set[tuple[int, int]]:
        """All (source, destination) port pairs that its lines name: outer and inner."""
        return {(sport, dport) for _, _, sport, dport in self.tuples if sport or dport}

    def cause(self) -> str:
        """Why it was dropped, from the line that says so; empty when none does."""
        for line in reversed(self.lines):
            if (found := _RPF_RESULT.match(line)) and found["result"] == "0":
                return f"the reverse path check of the source failed (FIB result {found['rc']})"
            for start, cause in DROP_LINES:
                if line.startswith(start):
                    return cause
        return ""

    def decisions(self) -> list[str]:
        """What it did to the packet, in the order of the lines: NAT, tunnel, flow."""
        return [
            pattern_words.format(*found.groups())
            for line in self.lines
            for pattern, pattern_words in _DECISIONS
            if (found := pattern.match(line))
        ]

    def no_backend(self) -> bool:
        """Whether the service was found without an endpoint."""
        return any(line.startswith(NO_BACKEND_LINES) for line in self.lines)


class Assembler:
    """Lines of one CPU in order to passages; interleaved CPUs are kept apart. Unknown lines are counted."""

    def __init__(self) -> None:
        self._open: dict[int, Passage] = {}
        self.other_lines = 0

    def feed(self, cpu: int, ktime_ns: int, text: str) -> list[Passage]:
        """Take a line; returns the passages that it completed or cut short, in that order of time."""
        line = parse_line(text)
        if line is None:
            self.other_lines += 1
            return []
        done = []
        current = self._open.get(cpu)
        starts = _START.match(line.message) is not None
        if current and (starts or (current.interface, current.direction) != (line.interface, line.direction)):
            done.append(self._open.pop(cpu))
            current = None
        if current is None:
            current = self._open[cpu] = Passage(line.interface, line.direction, cpu, ktime_ns, line.hex_reason)
        if current.add(line.message, ktime_ns):
            done.append(self._open.pop(cpu))
        return done

    def cut(self, cpu: int) -> list[Passage]:
        """The passage still open on a CPU, where its program is known to have ended without a last line."""
        found = self._open.pop(cpu, None)
        return [found] if found else []

    def flush(self) -> Iterable[Passage]:
        """All passages still open, cut short by the end."""
        left = list(self._open.values())
        self._open.clear()
        return left
