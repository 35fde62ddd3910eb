"""When Felix removes a conntrack entry: its time-outs, what FelixConfiguration makes of them, and its judgement.

Every 10 s Felix sweeps over the map and removes what has expired; a NAT forward entry goes with its reverse entry, or
when that is missing. Source: calico felix/bpf/conntrack/cleanup.go and timeouts.go (timeouts/timeouts.go from v3.31),
v3.13 to master; bpfConntrackTimeouts is there since v3.30. The BPF program of v3.30 (conntrack_cleanup.c) judges a
little otherwise; with the LRU map of v3.31 Felix went back to its own judgement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_RESIDUAL_S = 120
_DEFAULT_FINS_S = 30
_FIN, _RST, _SYN_ACK, _DSR = 4, 8, 3, 0x2
_TCP, _UDP, _ICMP = 6, 17, (1, 58)
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_DEFAULTS = {
    "creationGracePeriod": 10, "tcpSynSent": 20, "tcpEstablished": 3600, "tcpResetSeen": 40,
    "udpTimeout": 60, "icmpTimeout": 5, "genericTimeout": 600,
}  # fmt: skip
# "Auto" takes these below /proc/sys/net/netfilter; where one cannot be read Felix keeps its default.
SYSCTLS = {
    "tcpSynSent": "nf_conntrack_tcp_timeout_syn_sent",
    "tcpEstablished": "nf_conntrack_tcp_timeout_established",
    "tcpFinsSeen": "nf_conntrack_tcp_timeout_time_wait",
    "genericTimeout": "nf_conntrack_generic_timeout",
    "icmpTimeout": "nf_conntrack_icmp_timeout",
}


@dataclass(frozen=True)
class Timeouts:
    """Felix's time-outs in seconds, by their names in bpfConntrackTimeouts. *set_by*: where those come from.

    *auto_fins_s*: what "Auto" gives for tcpFinsSeen, which is its default since v3.30; None when that is not known.
    """

    seconds: Mapping[str, float] = field(default_factory=lambda: dict(_DEFAULTS))
    auto_fins_s: float | None = None
    set_by: str = "Felix's default"

    def limit(
        self, version: int, proto: int, flags: int, ab_bits: int, ba_bits: int, rst_seen: int
    ) -> tuple[float, str]:
        """After which Felix removes an entry that is no forward entry: (seconds without a packet, the time-out's name).

        Within creationGracePeriod it removes none; maps from v4 on do not say when an entry was made. *version*: of
        the map. *rst_seen*: the value's first member, which is the time of the first RST in v4 and later maps.
        """
        if proto != _TCP:
            name = "udpTimeout" if proto == _UDP else "icmpTimeout" if proto in _ICMP else "genericTimeout"
            return self.seconds[name], name
        dsr = bool(flags & _DSR)
        fins = (ab_bits & _FIN, ba_bits & _FIN)
        found = []
        if (ab_bits | ba_bits) & _RST:
            found.append((self.seconds["tcpResetSeen"], "tcpResetSeen"))
        if all(fins) or (dsr and any(fins)):
            found.append((self._fins_seen(version), "tcpFinsSeen"))
        if dsr or ab_bits & ba_bits & _SYN_ACK == _SYN_ACK:
            if version >= 4 and rst_seen:
                found.append((_RESIDUAL_S, "residual traffic after RST"))
            found.append((self.seconds["tcpEstablished"], "tcpEstablished"))
        else:
            found.append((self.seconds["tcpSynSent"], "tcpSynSent"))
        return min(found)

    def _fins_seen(self, version: int) -> float:
        if "tcpFinsSeen" in self.seconds:
            return self.seconds["tcpFinsSeen"]
        return self.auto_fins_s if version >= 4 and self.auto_fins_s is not None else _DEFAULT_FINS_S


def duration_s(text: str) -> float | None:
    """Seconds of a Go duration such as ``1h30m`` or ``500ms``, None when it is none."""
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def configured(spec: Mapping[str, Any], sysctls: Mapping[str, int], set_by: str) -> tuple[Timeouts, list[str]]:
    """(time-outs, what is wrong) of a bpfConntrackTimeouts. *sysctls*: seconds by name of what "Auto" may need.

    As in Felix, a value that is neither a duration nor "Auto" leaves the default.
    """
    seconds: dict[str, float] = dict(_DEFAULTS)
    wrong = []
    for name, value in spec.items():
        found = sysctls.get(SYSCTLS.get(name, "")) if value == "Auto" else duration_s(str(value))
        if name not in (*_DEFAULTS, "tcpFinsSeen"):
            wrong.append(f"bpfConntrackTimeouts has no {name}")
        elif found is not None:
            seconds[name] = found
        else:
            why = f"{SYSCTLS.get(name, 'its sysctl')} is not known" if value == "Auto" else "is no duration"
            wrong.append(f"bpfConntrackTimeouts {name}: {value} ({why}): judged by Felix's default")
    return replace(defaults(sysctls), seconds=seconds, set_by=set_by), wrong


def defaults(sysctls: Mapping[str, int]) -> Timeouts:
    """Felix's own time-outs on a node with these sysctls."""
    fins = sysctls.get(SYSCTLS["tcpFinsSeen"])
    return (
        Timeouts(auto_fins_s=fins) if sysctls else Timeouts(set_by="Felix's default; the node's sysctls are not known")
    )
