"""Felix's judgement of conntrack entries, against its sources."""

from __future__ import annotations

import pytest

from calitrace.calico import timeouts
from calitrace.calico.timeouts import Timeouts

SYN_ACK, FIN, RST, DSR = 3, 4, 8, 2
TIME_WAIT = {"nf_conntrack_tcp_timeout_time_wait": 90}


@pytest.mark.parametrize(
    ("version", "bits", "flags", "rst_seen", "wanted"),
    [
        (4, (1, 0), 0, 0, (20, "tcpSynSent")),
        (4, (1, 0), DSR, 0, (3600, "tcpEstablished")),
        (4, (SYN_ACK, SYN_ACK), 0, 0, (3600, "tcpEstablished")),
        (4, (SYN_ACK, SYN_ACK), 0, 1, (120, "residual traffic after RST")),
        (3, (SYN_ACK, SYN_ACK), 0, 1, (3600, "tcpEstablished")),
        (4, (SYN_ACK | RST, SYN_ACK), 0, 1, (40, "tcpResetSeen")),
        (4, (1 | RST, 0), 0, 1, (20, "tcpSynSent")),
        (4, (SYN_ACK | FIN, SYN_ACK), 0, 0, (3600, "tcpEstablished")),
        (4, (SYN_ACK | FIN, SYN_ACK | FIN), 0, 0, (90, "tcpFinsSeen")),
        (3, (SYN_ACK | FIN, SYN_ACK | FIN), 0, 0, (30, "tcpFinsSeen")),
        (4, (SYN_ACK | FIN, 0), DSR, 0, (90, "tcpFinsSeen")),
        (4, (SYN_ACK | FIN | RST, SYN_ACK | FIN), 0, 1, (40, "tcpResetSeen")),
    ],
)
def test_tcp(version: int, bits: tuple[int, int], flags: int, rst_seen: int, wanted: tuple[int, str]) -> None:
    assert timeouts.defaults(TIME_WAIT).limit(version, 6, flags, *bits, rst_seen) == wanted


@pytest.mark.parametrize(
    ("proto", "wanted"),
    [(17, (60, "udpTimeout")), (1, (5, "icmpTimeout")), (58, (5, "icmpTimeout")), (132, (600, "genericTimeout"))],
)
def test_others(proto: int, wanted: tuple[int, str]) -> None:
    assert Timeouts().limit(4, proto, 0, 0, 0, 0) == wanted


def test_fins_seen_without_the_sysctl_is_felix_s_older_default() -> None:
    other = {"nf_conntrack_icmp_timeout": 30}
    assert timeouts.defaults(other).limit(4, 6, 0, 7, 7, 0) == (30, "tcpFinsSeen")
    assert timeouts.defaults(other).set_by == "Felix's default"
    assert timeouts.defaults({}).set_by == "Felix's default; the node's sysctls are not known"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20s", 20), ("1h30m", 5400), ("500ms", 0.5), ("1.5m", 90), ("0s", 0), ("", None), ("20", None), ("s", None)],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert timeouts.duration_s(text) == seconds


def test_what_the_configuration_makes_of_them() -> None:
    spec = {"udpTimeout": "2m", "tcpFinsSeen": "Auto", "tcpSynSent": "Auto", "icmpTimeout": "soon", "other": "1s"}
    found, wrong = timeouts.configured(spec, TIME_WAIT, "FelixConfiguration default")
    assert (found.seconds["udpTimeout"], found.seconds["tcpFinsSeen"], found.seconds["tcpSynSent"]) == (120, 90, 20)
    assert found.set_by == "FelixConfiguration default"
    assert found.limit(3, 6, 0, 7, 7, 0) == (90, "tcpFinsSeen")
    assert wrong == [
        "bpfConntrackTimeouts tcpSynSent: Auto (nf_conntrack_tcp_timeout_syn_sent is not known): "
        "judged by Felix's default",
        "bpfConntrackTimeouts icmpTimeout: soon (is no duration): judged by Felix's default",
        "bpfConntrackTimeouts has no other",
    ]
