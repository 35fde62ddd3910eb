"""Preconditions of Debug, and the filter expression."""

from __future__ import annotations

import pytest

from calitrace.calico.debug_filter import ends, expression, has_filters, log_filters, preconditions, release
from calitrace.errors import UsageError


@pytest.mark.parametrize(
    ("calico", "kernel", "lockdown", "refused", "said"),
    [
        ("v3.28.1", "6.8.0-31-generic", "", False, []),
        ("v3.28.1", "6.8.0", "integrity", False, []),
        ("v3.28.1", "6.8.0", "confidentiality", True, ["lockdown"]),
        ("v3.30.0", "5.15.0-102-generic", "", True, ["10911"]),
        ("v3.30.4", "5.15.167", "none", True, ["10911"]),
        ("v3.30.0", "6.1.0", "", False, []),
        ("v3.29.3", "5.15.0", "", False, []),
        ("v3.31.0", "5.15.0", "", False, []),
        ("v3.17.0", "6.18.0", "", True, ["1,000,000", "every packet"]),
        ("v3.17.0", "6.19.2", "", True, ["1,000,000", "every packet"]),
        ("v3.17.0", "5.10.0", "", False, ["every packet"]),
        ("v3.26.4", "6.18.0", "", False, ["every packet"]),
        ("", "6.18.0", "", False, ["release of Calico is not known"]),
        ("master", "5.15.0", "", False, ["release of Calico is not known"]),
        ("v3.30.0", "", "", False, ["kernel's release is not known"]),
        ("", "", "confidentiality", True, ["lockdown", "Calico is not", "kernel's"]),
    ],
)
def test_preconditions(calico: str, kernel: str, lockdown: str, refused: bool, said: list[str]) -> None:
    found = preconditions(calico, kernel, lockdown)
    assert any(each.refuse for each in found) == refused
    assert len(found) == len(said)
    for each, words in zip(found, said, strict=True):
        assert words in each.text


def test_releases() -> None:
    assert [release(text) for text in ("v3.28.1", "6.18.0-rc1", "3.9", "", "master", "v3")] == [
        (3, 28),
        (6, 18),
        (3, 9),
        None,
        None,
        None,
    ]
    assert [has_filters(text) for text in ("v3.26.9", "v3.27.0", "v4.0.0", "")] == [False, True, True, True]


def test_the_expression_has_service_backends_and_tunnel() -> None:
    assert expression([("10.96.0.7", 80), ("10.65.1.2", 8080), ("10.65.1.2", 8080), ("2001:db8::2", 8080)]) == (
        "(host 10.96.0.7 and port 80) or (host 10.65.1.2 and port 8080) or (host 2001:db8::2 and port 8080)"
        " or (udp port 4789)"
    )
    assert expression([("10.0.0.1", 0)], vxlan_port=8472) == "(host 10.0.0.1) or (udp port 8472)"
    assert expression([("", 80)]) == "(port 80) or (udp port 4789)"
    assert expression([]) == ""
    assert expression([("10.0.0.1", 80), ("", 0)]) == ""


def test_addresses_that_felix_would_take_for_negative_numbers() -> None:
    assert expression([("127.255.255.255", 0)]).startswith("(host 127.255.255.255)")
    assert expression([("192.168.1.2", 80)]) == (
        "(((ip[12:2] = 0xc0a8 and ip[14:2] = 0x102) or (ip[16:2] = 0xc0a8 and ip[18:2] = 0x102)) and port 80)"
        " or (udp port 4789)"
    )
    assert expression([("fd00::2", 80), ("fd00::3", 80)]) == "(ip6 and port 80) or (udp port 4789)"
    assert expression([("2001:db8::8000:2", 0)]) == "(ip6) or (udp port 4789)"


def test_the_program_of_the_filter_stays_small() -> None:
    many = [(f"10.65.0.{number}", 8080) for number in range(8)]
    assert expression(many).count("host") == 8
    assert expression([("10.96.0.7", 80), *many]) == "(port 80) or (port 8080) or (udp port 4789)"
    for named in ([(host, 0) for host, _ in [*many, ("10.0.0.1", 0)]], [("", number) for number in range(1, 10)]):
        with pytest.raises(UsageError, match="too many"):
            expression(named)


@pytest.mark.parametrize(("host", "port"), [("a.example", 80), ("10.0.0.1 or host 10.0.0.2", 80), ("10.0.0.1", 65536)])
def test_only_addresses_and_ports_reach_the_expression(host: str, port: int) -> None:
    with pytest.raises(UsageError):
        expression([(host, port)])


def test_filters_of_interfaces() -> None:
    assert log_filters("port 80") == {"all": "port 80"}
    assert log_filters("port 80", ["eth0", "cali1"]) == {"eth0": "port 80", "cali1": "port 80"}
    assert log_filters("", ["cali1"]) == {"cali1": "ip or ip6 or arp"}
    assert log_filters("") == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("host 10.0.0.1 and port 80", [("10.0.0.1", 80)]),
        ("tcp and (src host 10.0.0.1) and dst port 80", [("10.0.0.1", 80)]),
        ("net 10.0.0.0/8 and udp port 53", [("", 53)]),
        ("host 10.0.0.1 or host 10.0.0.2", [("10.0.0.1", 0), ("10.0.0.2", 0)]),
        ("host 10.0.0.1 or port 80", [("10.0.0.1", 0), ("", 80)]),
        ("(host 10.0.0.1 || host 10.0.0.2) && port 80", [("10.0.0.1", 0), ("10.0.0.2", 0), ("", 80)]),
        ("host 10.0.0.1 or icmp", []),
        ("host 10.0.0.1 or net 10.1.0.0/16", []),
        ("not port 22", []),
        ("host 10.0.0.1 and port !22", []),
        ("icmp", []),
        ("portrange 80-90", []),
        ("", []),
    ],
)
def test_what_calicos_own_filter_is_made_of(text: str, named: list[tuple[str, int]]) -> None:
    assert ends(text) == named
