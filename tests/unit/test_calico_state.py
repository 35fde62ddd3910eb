"""Calico's state, reason codes and policy debug files."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.packets import state_of

from calitrace.calico import policy, reasons, state
from calitrace.calico.state import LAYOUTS, Layout, Side
from calitrace.errors import LayoutMismatch, Malformed


def written(table: Layout, version: int = 4) -> bytes:
    """10.0.0.1:1000 > 10.0.0.2:80, before NAT 10.0.0.3:30080, after NAT 10.0.0.4:8080, tcp, denied by rule 7."""
    raw = bytearray(table.size)
    kept = (0, 1, 2, 3) if table.has_pre_nat else (0, 1, 3)
    for at, which in enumerate(kept):
        start = table.addresses + at * table.stride
        raw[start : start + 4] = bytes([10, 0, 0, which + 1])
        if version == 6:
            raw[start + 15] = 1
        struct.pack_into("<H", raw, table.ports + 2 * at, (1000, 80, 30080, 8080)[which])
    struct.pack_into("<i", raw, table.pol_rc, 2)
    raw[table.ip_proto] = 6
    struct.pack_into("<h", raw, table.ct_rc, 1)
    struct.pack_into(table.flags_format, raw, table.flags[version == 6], 4)
    if table.rules_hit is not None and table.rule_ids is not None:
        struct.pack_into("<IQQ", raw, table.rules_hit, 2, 6, 7)
    if table.fwd is not None:
        struct.pack_into("<iII", raw, table.fwd[version == 6], 2, 0, 11)
    return bytes(raw)


@pytest.mark.parametrize("table", LAYOUTS, ids=lambda t: t.releases)
def test_each_layout(table: Layout) -> None:
    assert state.layout(table.map_name, table.size) is table
    held = state.decode(written(table), table)
    before, before_port = ("10.0.0.3", 30080) if table.has_pre_nat else ("10.0.0.2", 80)
    assert [str(a) for a in (held.src, held.dst, held.pre_nat_dst, held.post_nat_dst)] == [
        "10.0.0.1", "10.0.0.2", before, "10.0.0.4"
    ]  # fmt: skip
    assert (held.sport, held.dport, held.pre_nat_dport, held.post_nat_dport) == (1000, 80, before_port, 8080)
    assert held.nat == "10.0.0.4:8080"
    assert held.conntrack == ("MID_FLOW_MISS" if table.has_pre_nat else "ESTABLISHED")  # v3.18 renumbered them
    assert (held.proto, held.pol_rc, held.flags, held.ct_rc) == (6, 2, 4, 1)
    assert held.rule_ids == ((6, 7) if table.rules_hit is not None else ())
    assert (held.result, held.calico_reason) == ((2, 11) if table.fwd is not None else (None, None))
    assert held.denied()
    assert not held.passed(None)
    assert not held.unread


@pytest.mark.parametrize("table", [each for each in LAYOUTS if each.stride == 16], ids=lambda t: t.releases)
def test_each_layout_in_a_program_for_ipv6(table: Layout) -> None:
    held = state.decode(written(table, 6), table, 6)
    assert held.holds(6, "a00:1::1", 1000, "a00:2::1", 80)
    assert (held.proto, held.flags, held.ct_rc) == (6, 4, 1)
    assert (held.result, held.calico_reason) == ((2, 11) if table.fwd is not None else (None, None))


@pytest.mark.parametrize("table", LAYOUTS, ids=lambda t: t.releases)
def test_an_ipv6_packet_in_any_release(table: Layout) -> None:
    """Up to v3.24 there is no room for its addresses: then a state is of no IPv6 packet, whatever its ports are."""
    room = table.stride == 16
    src, dst = ("fd00::1", "fd00::2") if room else ("0.0.0.0", "0.0.0.0")
    held = state.decode(state_of(table, (src, 1, dst, 2), 17), table, 6)
    assert (held.proto, held.sport, held.dport) == (17, 1, 2)
    assert held.holds(17, "fd00::1", 1, "fd00::2", 2) == room
    assert not held.holds(17, "fd00::3", 1, "fd00::2", 2)
    assert not held.holds(6, "fd00::1", 1, "fd00::2", 2)


def test_every_release_has_a_layout() -> None:
    spans = [each.releases.split("..") for each in LAYOUTS]
    minors = [int(end[-1].removeprefix("v3.")) + 1 for end in spans[1:]]
    assert minors == [int(begin[0].removeprefix("v3.")) for begin in spans[:-1]]
    assert spans[-1][0] == "v3.13"


def test_a_packet_without_addresses_or_ports() -> None:
    (table,) = (each for each in LAYOUTS if each.fwd)
    assert table.fwd is not None
    raw = bytearray(table.size)
    struct.pack_into("<iII", raw, table.fwd[0], 2, 0, 5)
    assert state.decode(bytes(raw), table).unread
    raw[table.addresses : table.addresses + 4] = bytes([10, 0, 0, 1])
    held = state.decode(bytes(raw), table)
    assert not held.unread
    assert held.holds(0, "10.0.0.1", 40000, "0.0.0.0", 80)  # too short for ports


def test_holds_before_and_after_nat_only() -> None:
    held = state.decode(written(LAYOUTS[0]), LAYOUTS[0])
    for dst, dport in (("10.0.0.2", 80), ("10.0.0.3", 30080), ("10.0.0.4", 8080)):
        assert held.holds(6, "10.0.0.1", 1000, dst, dport)
    assert not held.holds(6, "10.0.0.1", 1000, "10.0.0.2", 8080)
    assert not held.holds(17, "10.0.0.1", 1000, "10.0.0.2", 80)
    assert not held.holds(6, "10.0.0.9", 1000, "10.0.0.2", 80)
    assert not held.holds(6, "10.0.0.1", 1001, "10.0.0.2", 80)


V4, V6 = ("10.0.0.1", 1000, "10.0.0.2", 80), ("fd00::1", 1000, "fd00::2", 80)


@pytest.mark.parametrize(
    ("flow", "proto", "nat", "shown"),
    [
        (V4, 6, ("10.0.0.4", 8080), "10.0.0.4:8080"),
        (V4, 6, ("10.0.0.2", 8080), "10.0.0.2:8080"),
        (V4, 6, None, ""),
        (V4, 6, ("0.0.0.0", 0), ""),
        (V4, 1, ("10.0.0.2", 8), ""),  # of ICMP Calico keeps type and code there
        (V4, 1, ("10.0.0.4", 8), "10.0.0.4"),
        (V6, 17, ("fd00::4", 8080), "[fd00::4]:8080"),
    ],
)
def test_where_nat_sends_it(
    flow: tuple[str, int, str, int], proto: int, nat: tuple[str, int] | None, shown: str
) -> None:
    raw = state_of(LAYOUTS[0], flow, proto, nat=nat)
    assert state.decode(raw, LAYOUTS[0], 6 if ":" in flow[0] else 4).nat == shown


@pytest.mark.parametrize("table", LAYOUTS, ids=lambda t: t.releases)
@pytest.mark.parametrize("dport", [8, 0])
def test_icmp_has_type_and_code_where_ports_are(table: Layout, dport: int) -> None:
    held = state.decode(state_of(table, ("10.0.0.1", 0, "10.0.0.2", dport), 1), table)
    assert held.holds(1, "10.0.0.1", 0, "10.0.0.2", 0)
    assert not held.holds(1, "10.0.0.2", 0, "10.0.0.1", 0)
    assert not held.holds(17, "10.0.0.1", 0, "10.0.0.2", 0)


def test_flags_in_words() -> None:
    table = LAYOUTS[0]
    assert state.decode(state_of(table, V4, 6, flags=0x805), table).flag_names == (
        "NAT outgoing", "to this host", "0x800"
    )  # fmt: skip
    assert state.decode(state_of(table, V4, 6), table).flag_names == ()


TO_HOST = "from a pod to its own host, which defaultEndpointToHostAction forbids"
NO_POLICY = "no policy program is loaded for the workload"
SPOOFED = f"the source is not this pod's (reverse path), or {NO_POLICY}"
BACK = "reverse path: its source may not come in by this interface (bpfEnforceRPF)"


@pytest.mark.parametrize(
    ("table", "pol_rc", "ct_rc", "flags", "side", "found"),
    [
        (LAYOUTS[0], 1, 0, 4, "from-wep", TO_HOST),
        (LAYOUTS[1], 1, 0, 4, "from-wep", TO_HOST),
        (LAYOUTS[0], 1, 0, 4, "to-wep", ""),
        (LAYOUTS[0], 1, 0, 0, "from-wep", ""),
        (LAYOUTS[0], 1, 2, 4, "from-wep", ""),
        (LAYOUTS[0], 0, 0, 4, "from-wep", NO_POLICY),  # its source was looked at before
        (LAYOUTS[0], 0, 0, 0x10, "from-wep", SPOOFED),
        (LAYOUTS[0], 0, 0x1003, 1, "from-wep", SPOOFED),  # the flag is the entry's
        (LAYOUTS[0], 0, 0, 0, "to-wep", NO_POLICY),
        (LAYOUTS[0], 0, 0x1003, 0, "to-wep", NO_POLICY),  # any SYN is asked about
        (LAYOUTS[0], 0, 2, 0, "to-wep", ""),
        (LAYOUTS[0], 0, 0, 0, "from-hep", BACK),
        (LAYOUTS[0], 0, 0, 0, "to-hep", ""),
        (LAYOUTS[0], 0, 0, 0, "xdp", ""),
        (
            LAYOUTS[1],
            0,
            0,
            0,
            "to-wep",
            "",
        ),  # it does not keep its result: the state may be of a program that ended well
    ],
)
def test_what_a_silent_drop_leaves(table: Layout, pol_rc: int, ct_rc: int, flags: int, side: str, found: str) -> None:
    held = state.decode(state_of(table, V4, 6, pol_rc=pol_rc, ct_rc=ct_rc, flags=flags), table)
    assert held.silent(Side(side)) == found
    assert held.silent(None) == ""


def test_the_reverse_path_of_what_came_in_a_tunnel_is_not_asked() -> None:
    held = state.decode(state_of(LAYOUTS[0], V4, 6, tunnel="10.0.0.9"), LAYOUTS[0])
    assert held.silent(Side.FROM_HEP) == ""


def test_a_size_of_no_release_is_refused() -> None:
    with pytest.raises(LayoutMismatch, match=r"cali_state6 512 B \(v3.32..master\).*found cali_state6 500 B"):
        state.layout("cali_state6", 500)
    with pytest.raises(LayoutMismatch, match="expected 512 bytes, found 1 bytes"):
        state.decode(b"x", LAYOUTS[0])


@given(st.sampled_from(LAYOUTS).flatmap(lambda t: st.tuples(st.just(t), st.binary(min_size=t.size, max_size=t.size))))
def test_any_bytes_of_the_size_give_a_state(given_: tuple[Layout, bytes]) -> None:
    table, raw = given_
    assert len(state.decode(raw, table).rule_ids) <= state.MAX_RULES


@pytest.mark.parametrize(
    ("code", "counters", "name"),
    [
        (4, 0, "DROPPED_BY_POLICY"),
        (13, 0, "reason 13"),
        (12, 14, "RT_UNKNOWN"),
        (13, 14, "BLACK_HOLE"),  # v3.29; before, an acceptance
        (14, 14, "WEP_NOT_READY"),  # before v3.29; then, an acceptance
        (15, 14, "reason 15"),  # NATIFACE up to v3.28, WEP_NOT_READY in v3.29
        (16, 14, "NATIFACE"),  # v3.29
        (17, 17, "ACCEPTED_BY_XDP"),
        (19, 17, "NATIFACE"),
        (20, 17, "reason 20"),
        (23, 25, "DROPPED_BY_QOS"),
        (27, 26, "WEP_NOT_READY"),
        (26, 27, "NO_HOST_IP"),
        (29, 27, "NATIFACE"),
        (30, 27, "reason 30"),
        (13, 99, "reason 13"),
    ],
)
def test_reason_names(code: int, counters: int, name: str) -> None:
    assert reasons.name(code, counters) == name


def debug_file(*comments: str) -> bytes:
    """A policy debug file."""
    return json.dumps({"policyInfo": [{"Comments": list(comments)}, {"Comments": None}, 3]}).encode()


def test_rule_names() -> None:
    raw = debug_file(
        "Start of tier default",
        "Start of policy default.deny",
        'Start of rule action:"Allow"',
        "Rule MatchID: 5",
        'Start of rule action:"Deny" src',
        "Rule MatchID: 0x6",
        "Start of GlobalNetworkPolicy other 0",
        "Rule MatchID: 7",
        "nothing",
    )
    assert policy.rule_names(raw) == {
        5: "default.deny rule 0 (allow)",
        6: "default.deny rule 1 (deny)",
        7: "GlobalNetworkPolicy other 0 rule 0",
    }
    assert policy.rule_names(b"{}") == {}


def test_rules_behind_the_policies_are_a_profile_s() -> None:
    """As Calico v3.31 writes them: the profile's rule stands alone behind the tier."""
    raw = debug_file(
        *("Start of tier default", "Start of policy default/knp.default.allow", 'Start of rule action:"allow"'),
        *("Rule MatchID: 1", "End of rule 29vMYc", "End of policy default/knp.default.allow"),
        *("End of tier default: deny", 'Start of rule action:"allow"  rule_id:"aBMQ"', "Rule MatchID: 2"),
    )
    assert policy.rule_names(raw) == {1: "default/knp.default.allow rule 0 (allow)", 2: "profile rule 0 (allow)"}


def test_a_policy_in_calico_s_lines() -> None:
    code = [0xBF, 0x16, 0, 0, 0, 0, 0, 0]
    raw = json.dumps({
        "ifacename": "cali1", "hook": "tc egress", "error": "",
        "policyInfo": [
            {"inst": code, "labels": ["start"]},
            {"inst": code, "comments": ["Load packet metadata"], "annotation": "goto exit"},
            {"inst": [999], "labels": 1, "comments": [" Start of rule x", "Rule MatchID: 7", "Rule MatchID: 8"]},
        ],
    }).encode()  # fmt: skip
    found = policy.read(raw)
    head = ["IfaceName: cali1", "Hook: tc egress", "Error:", "Policy Info:"]
    shown = "bf16000000000000 Mov64 dst=R6 src=R1 off=0 imm=0x00000000/0"
    rules = ["// Start of rule x", "// count = 42", "// count = 0"]
    assert list(found.iter_lines({7: 42}, instructions=False)) == head + rules
    assert list(found.iter_lines({7: 42}, instructions=True)) == [
        *(*head, "start:", f"      {shown}", "// Load packet metadata", f"      {shown:<97}goto exit"),
        *(*rules, ""),
    ]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("18010000ffffffff", "LoadImm64 dst=R1 src=R0 off=0 imm=0xffffffff/-1"),
        ("0000000001000000", "LoadImm64Pt2 dst=R0 src=R0 off=0 imm=0x00000001/1"),
        ("71a2f8ff00000000", "LoadReg8 dst=R2 src=R10 off=-8 imm=0x00000000/0"),
        ("7b1ac0ff00000000", "StoreReg64 dst=R10 src=R1 off=-64 imm=0x00000000/0"),
        ("0501000000000000", "JumpA dst=R1 src=R0 off=0 imm=0x00000000/0"),
        ("1503020006000000", "JumpEqImm64 dst=R3 src=R0 off=2 imm=0x00000006/6"),
        ("de21000000000000", "JumpSLE32 dst=R1 src=R2 off=0 imm=0x00000000/0"),
        ("5401000000ffffff", "AndImm32 dst=R1 src=R0 off=0 imm=0xffffff00/-256"),
        ("dc01000010000000", "Endian32 dst=R1 src=R0 off=0 imm=0x00000010/16"),
        ("8500000001000000", "Call dst=R0 src=R0 off=0 imm=0x00000001/1"),
        ("95fc000000000000", "Exit dst=Reg(12) src=Reg(15) off=0 imm=0x00000000/0"),
        ("0201f8ff05000000", "StoreImm32 dst=R1 src=R0 off=-8 imm=0x00000005/5"),
        ("1201f8ff05000000", "StoreImm8 dst=R1 src=R0 off=-8 imm=0x00000005/5"),
        ("6201f8ff05000000", "OpCode(98) dst=R1 src=R0 off=-8 imm=0x00000005/5"),
        ("8701000000000000", "OpCode(135) dst=R1 src=R0 off=0 imm=0x00000000/0"),
        ("8f01000000000000", "Negate64 dst=R1 src=R0 off=0 imm=0x00000000/0"),
        ("0600000000000000", "OpCode(6) dst=R0 src=R0 off=0 imm=0x00000000/0"),
        ("8600000000000000", "OpCode(134) dst=R0 src=R0 off=0 imm=0x00000000/0"),
        ("0100000000000000", "OpCode(1) dst=R0 src=R0 off=0 imm=0x00000000/0"),
        ("f700000000000000", "OpCode(247) dst=R0 src=R0 off=0 imm=0x00000000/0"),
    ],
)
def test_instructions_in_calico_s_words(code: str, words: str) -> None:
    assert policy.Instruction(bytes.fromhex(code), (), (), "").line() == f"      {code} {words}"


@pytest.mark.parametrize("raw", [b"", b"[]", b"3", b"\xff", b"{", b"[" * 100_000], ids=len)
def test_any_other_file_is_malformed(raw: bytes) -> None:
    with pytest.raises(Malformed):
        policy.rule_names(raw)


@given(st.recursive(st.none() | st.text(), lambda i: st.lists(i) | st.dictionaries(st.just("Comments"), i)))
def test_any_policy_info_is_taken(info: object) -> None:
    assert policy.rule_names(json.dumps({"policyInfo": info}).encode()) == {}
