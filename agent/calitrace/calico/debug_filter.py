"""Whether Debug can be turned on here, and the filter that keeps it to one conversation.

Calico runs a filter of bpfLogFilters on the packet as it arrives: before NAT and before VXLAN is taken off
(felix/bpf/filter, felix/bpf-gpl/tc_preamble.c; from v3.27). One that names only the service misses the backend's
side and everything between nodes, so both sides and the tunnel's port belong into it.

Felix translates libpcap's classic BPF itself (felix/bpf/filter/filter.go), with two limits that we keep to. A long jump
(libpcap's ``ja``, in programs of more than 255 instructions) goes to a wrong place. And a comparison with a 32-bit
constant takes it as signed, so that an address part from 0x80000000 on (128.0.0.0, fd00::) is never equal: such an
IPv4 address is compared in halves, and such an IPv6 address is left out, which logs more.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calitrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

Release = tuple[int, int]

FILTERS_SINCE: Release = (3, 27)
MOST_TERMS = 8
_SIGN = 0x80000000
EVERYTHING = "ip or ip6 or arp"
_END = re.compile(r"\b(?:(?:src|dst|tcp|udp|ip|ip6)\s+)*(?:host\s+(?P<host>[^\s()]+)|port\s+(?P<port>\d+)\b)")
_NEGATION = re.compile(r"\bnot\b|!")
_ALTERNATIVE = re.compile(r"\bor\b|\|\|")
_JOINED = re.compile(r"\b(?:and|or)\b|&&|\|\||[()\s]")
COST = "Debug costs 12 to 28 microseconds for each packet that is logged, in each program that it passes"


@dataclass(frozen=True)
class KnownBad:
    """Calico releases whose Debug programs the verifier of some kernels refuses: the interface loses its program."""

    calico: tuple[Release, Release]
    kernel: tuple[Release, Release]
    reason: str


KNOWN_BAD = (
    KnownBad(
        ((3, 30), (3, 30)), ((5, 15), (5, 15)), "its Debug programs are refused there (projectcalico/calico#10911)"
    ),
    KnownBad(
        ((3, 13), (3, 17)),
        ((6, 18), (6, 999)),
        "the Debug program of host interfaces (v3.17.0, seen on Linux 6.18) needs more than the verifier's 1,000,000 "
        "instructions",
    ),
)


@dataclass(frozen=True)
class Precondition:
    """One thing to know before Debug is turned on. *refuse*: it would cut the network, or show nothing."""

    refuse: bool
    text: str


def release(text: str) -> Release | None:
    """(3, 28) of ``v3.28.1``, (6, 18) of ``6.18.0-rc1``; None when it does not begin with two numbers."""
    match = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def preconditions(calico: str, kernel: str, lockdown: str) -> list[Precondition]:
    """What speaks against Debug, refusals first. *calico*, *kernel*: releases as printed, "" for not known.

    *lockdown*: the active word of /sys/kernel/security/lockdown, "" where there is none.
    """
    found = []
    if lockdown == "confidentiality":
        found.append(
            Precondition(
                True, "kernel lockdown is 'confidentiality': BPF programs cannot print, Debug would show nothing"
            )
        )
    ours, running = release(calico), release(kernel)
    for bad in KNOWN_BAD:
        if ours and running and _within(ours, bad.calico) and _within(running, bad.kernel):
            found.append(Precondition(True, f"Calico {calico} on Linux {kernel}: {bad.reason}"))
    if not ours:
        found.append(
            Precondition(False, "the release of Calico is not known: whether its Debug programs load is not either")
        )
    elif ours < FILTERS_SINCE:
        found.append(Precondition(False, f"Calico {calico} has no bpfLogFilters (v3.27): every packet is logged"))
    if not running:
        found.append(
            Precondition(False, "the kernel's release is not known: whether Debug programs load is not either")
        )
    return found


def has_filters(calico: str) -> bool:
    """Whether this release has bpfLogFilters. One that is not known may: where they are unknown the API drops them."""
    return (release(calico) or FILTERS_SINCE) >= FILTERS_SINCE


def ends(text: str) -> list[tuple[str, int]]:
    """(address or "", port or 0) of each end that the pcap expression *text* names: all that it lets through, or more.

    Empty, which is everything, where it lets through what names no end.
    """
    found = list(_END.finditer(text))
    hosts = [each["host"] for each in found if each["host"]]
    ports = [int(each["port"]) for each in found if each["port"]]
    if _NEGATION.search(text):
        return []
    if not _ALTERNATIVE.search(text):
        return [(host, port) for host in hosts or [""] for port in ports or [0]] if found else []
    if _JOINED.sub("", _END.sub("", text)):
        return []
    return [*((host, 0) for host in hosts), *(("", port) for port in ports)]


def expression(ends: Iterable[tuple[str, int]], vxlan_port: int = 4789) -> str:
    """The pcap expression for all of *ends*, (address or "", port or 0), and the tunnel: service, backends, client.

    "" when *ends* is empty or one of them is anything at all: then there is nothing to filter. More than MOST_TERMS
    become their ports alone. Raises UsageError on what is no address or port, and when that does not help.
    """
    terms: dict[int, dict[str, str]] = {}
    for host, port in ends:
        if not (host or port):
            return ""
        terms.setdefault(port, {})[host] = _end(host, port)
    joined = list(dict.fromkeys(term for hosts in terms.values() for term in hosts.values()))
    if len(joined) > MOST_TERMS:
        joined = [f"port {port}" for port in terms if port]
        if len(joined) > MOST_TERMS or 0 in terms:
            raise UsageError(
                "too many addresses and ports for Calico's log filter", f"name at most {MOST_TERMS}, or one port"
            )
    return " or ".join(f"({term})" for term in [*joined, f"udp port {vxlan_port}"]) if joined else ""


def log_filters(text: str, interfaces: Iterable[str] = ()) -> dict[str, str]:
    """The value of bpfLogFilters: the expression *text* for these interfaces, or for all. Empty without expression.

    An interface without a key logs nothing, so a filter by interface alone needs an expression that is always true.
    """
    names = list(interfaces)
    if not text and not names:
        return {}
    return dict.fromkeys(names or ["all"], text or EVERYTHING)


def _end(host: str, port: int) -> str:
    if not 0 <= port <= 65535:
        raise UsageError(f"{port} is no port", "a port is 1 to 65535")
    try:
        terms = [_host(ipaddress.ip_address(host))] if host else []
    except ValueError as wrong:
        raise UsageError(
            f"{host!r} is no address", "give an IP address: the filter is run inside the kernel"
        ) from wrong
    return " and ".join([*terms, f"port {port}"] if port else terms)


def _host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if isinstance(address, ipaddress.IPv6Address):
        parts = [int(address) >> shift & 0xFFFFFFFF for shift in (96, 64, 32, 0)]
        return "ip6" if any(part & _SIGN for part in parts) else f"host {address}"
    if not int(address) & _SIGN:
        return f"host {address}"
    high, low = divmod(int(address), 65536)
    source = f"(ip[12:2] = {high:#x} and ip[14:2] = {low:#x})"
    destination = f"(ip[16:2] = {high:#x} and ip[18:2] = {low:#x})"
    return f"({source} or {destination})"


def _within(value: Release, span: tuple[Release, Release]) -> bool:
    return span[0] <= value <= span[1]
