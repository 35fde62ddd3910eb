"""Calico's maps: tables, words, walk and diff, from known bytes and from what real Calico programs left."""

from __future__ import annotations

import json
import random
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tests.known_maps import KNOWN, PERCPU_HASH, Known

from calitrace.calico import bpftool, maptables, reasons
from calitrace.calico.maps import RawMap, identify
from calitrace.cli import maps as maps_command
from calitrace.correlate import mapdiff, walk
from calitrace.errors import LayoutMismatch, Malformed
from calitrace.journal import END, MAPS, Stored, Writer, map_bodies
from calitrace.report import conntrack_json, mapdump

DATA = Path(__file__).resolve().parent.parent / "data" / "maps"
NOW = mapdump.Context(now_ns=10_000_000_000, interfaces={2: "eth0", 3: "cali1"}, rules={7: "default.p rule 0 (deny)"})


def made(name: str, *entries: tuple[bytes, bytes], cpus: int = 1) -> RawMap:
    """A map of these entries."""
    (key, value) = entries[0]
    return RawMap(name, name, 1, len(key), len(value) // cpus, 100, cpus, list(entries))


def objects(raw: RawMap) -> list[dict[str, Any]]:
    """All of a map's entries in words, without the map's name."""
    return [{k: v for k, v in e.items() if k != "map"} for e in mapdump.iter_objects(raw, NOW)]


def only(name: str, key: bytes, value: bytes, cpus: int = 1) -> dict[str, Any]:
    """One entry in words."""
    (found,) = objects(made(name, (key, value), cpus=cpus))
    return found


def real(node: str, name: str) -> RawMap:
    """A map that a run of Calico's own programs left: one connection from a client through node-a to node-b."""
    return bpftool.read((DATA / f"node-{node}.{name}.json").read_text(), name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("cali_v4_ct4", ("cali_v4_ct", 4, False)),
        ("cali_v4_ct", ("cali_v4_ct", 1, False)),
        ("cali_v4_ct4_old", ("cali_v4_ct", 4, True)),
        ("xdp_cali_progs3", ("xdp_cali_progs", 3, False)),
        ("no-map", ("no-map", 1, False)),
    ],
)
def test_names(name: str, wanted: tuple[str, int, bool]) -> None:
    assert identify(name) == wanted


@pytest.mark.parametrize("layout", maptables.layouts(), ids=lambda e: f"{e.base}-{e.version}-{e.value.size}")
@given(data=st.data())
def test_any_bytes_of_the_right_size_decode(layout: maptables.Layout, data: st.DataObject) -> None:
    key = data.draw(st.binary(min_size=layout.key.size, max_size=layout.key.size))
    value = data.draw(st.binary(min_size=layout.value.size, max_size=layout.value.size))
    name = layout.base + (str(layout.version) if layout.version > 1 else "")
    raw = made(name, (key, value))
    assert maptables.resolve(raw) == layout
    kind = layout.base.removeprefix("cali_").removeprefix("v4_").removeprefix("v6_")
    for entry in mapdump.iter_objects(raw, NOW):
        json.dumps(entry)
        if kind not in ("nat_fe", "ip_sets", "counters"):
            mapdump.text(kind, entry)
            mapdump.text(kind, entry, raw=True)
    if kind == "ct":
        assert b"".join(conntrack_json.iter_blocks(raw, NOW)).decode() == "".join(
            json.dumps(each) + "\n" for each in mapdump.iter_objects(raw, NOW)
        )
    assert mapdump.summary(raw)["entries"] == 1


@pytest.mark.parametrize("known", KNOWN, ids=lambda each: f"{each.name}-{len(each.value)}")
def test_known_bytes_out_of_bpftool_s_files(known: Known) -> None:
    """Every version of every map, as JSON and as text; of per-CPU maps two CPUs, the other with zeros."""
    hexadecimal = [[f"{byte:#04x}" for byte in part] for part in (known.key, known.value, bytes(len(known.value)))]
    about: dict[str, Any] = {"key": hexadecimal[0], "value": hexadecimal[1]}
    per_cpu = known.map_type == PERCPU_HASH
    if per_cpu:
        about = {"key": about["key"], "values": [{"cpu": n, "value": each} for n, each in enumerate(hexadecimal[1:])]}
    raw = bpftool.read(json.dumps([about]), known.name)
    assert bpftool.read(plain(raw), known.name) == raw
    (found,) = mapdump.iter_objects(raw, mapdump.Context())
    assert {name: found.get(name) for name in known.meaning} == known.meaning
    if known.subject == "counters":
        assert list(found["counters"].values()) == list(struct.unpack(f"<{len(known.value) // 8}Q", known.value))
    if known.subject == "conntrack":
        assert [json.loads(b"".join(conntrack_json.iter_blocks(raw, mapdump.Context())))] == [found]


@pytest.mark.parametrize("name", ["cali_v4_ct3", "cali_v4_ct4", "cali_v6_ct4"])
def test_many_lines_at_once_are_those_of_one_at_a_time(name: str) -> None:
    """More entries than one block has rows, of all types, with members of all widths."""
    sizes = (40, 128) if "v6" in name else (16, 88)
    chance = random.Random(name)
    entries = []
    for _ in range(5000):
        key, value = (bytearray(chance.randbytes(size)) for size in sizes)
        key[:4] = struct.pack("<I", chance.choice((6, 6, 17, 1, 300)))
        key[-4:-2] = struct.pack("<H", chance.choice((0, 9, 10, 9999, 10000, 65535)))
        value[:8] = struct.pack("<Q", chance.choice((0, 2**64 - 1)))
        value[8:16] = struct.pack("<Q", chance.choice((0, 10**4, 10**8 - 1, 10**12, NOW.now_ns, 2**63)))
        value[16:24] = bytes((chance.choice((0, 1, 2, 9)), *chance.choices((0, 1, 255), k=3), 0, 0, 0, 1))
        for leg in (24, 48):
            value[leg + 16 : leg + 20] = struct.pack("<I", chance.choice((0, 0x13, 0x2B, 0xFFFFFFFF)))
            value[leg + 20 : leg + 24] = struct.pack("<I", chance.choice((0, 3, 4_000_000_000)))
        width = (sizes[0] - 8) // 2
        if value[16] == 1 and chance.random() < 0.5:  # a forward entry whose client is the end b
            value[28 : 28 + width] = key[4 + width : 4 + 2 * width]
        entries.append((bytes(key), bytes(value)))
    raw = made(name, *entries)
    for context in (NOW, mapdump.Context(interfaces={3: 'a"b'})):
        lines = b"".join(conntrack_json.iter_blocks(raw, context)).decode().splitlines()
        assert sorted(lines) == sorted(json.dumps(each) for each in mapdump.iter_objects(raw, context))


def test_entries_at_keys() -> None:
    """Looked up where the source can, else looked for."""

    class Source(list[tuple[bytes, bytes]]):
        def at(self, keys: list[bytes]) -> list[tuple[bytes, bytes]]:
            return [(key, b"up") for key in keys]

    raw = made("cali_v4_ct4", (KEY, conntrack(4)), (bytes(16), conntrack(4)))
    assert maptables.at(raw, [KEY]) == [(KEY, conntrack(4))]
    assert maptables.at(replace(raw, entries=Source()), [KEY]) == [(KEY, b"up")]
    layout = maptables.resolve(raw)
    members = {"proto": KEY[:4], "addr_a": KEY[4:8], "addr_b": KEY[8:12], "port_a": KEY[12:14], "port_b": KEY[14:]}
    assert layout.key.encode({**members, "other": b"x"}) == KEY
    assert layout.key.encode({}) == bytes(16)


def test_every_version_of_every_map_has_known_bytes() -> None:
    shown = {
        (e.base, e.version, e.value.size) for e in maptables.layouts() if e.base != "cali_counters" or e.version > 1
    }
    known = {(*identify(each.name)[:2], len(each.value)) for each in KNOWN}
    assert shown <= known


def test_an_unknown_size_is_refused_with_what_is_known() -> None:
    with pytest.raises(LayoutMismatch, match=r"v4 16\+88.*found v5 16\+92"):
        maptables.resolve(made("cali_v4_ct5", (bytes(16), bytes(92))))
    with pytest.raises(LayoutMismatch, match="a map we know"):
        maptables.resolve(made("cali_other", (bytes(16), bytes(92))))


def conntrack(version: int, **members: int | bytes) -> bytes:
    """A conntrack value of v1 to v4, IPv4, by the offsets of Calico's headers."""
    size = {1: 56, 2: 64, 3: 88, 4: 88}[version]
    legs = {1: (24, 32), 2: (24, 36), 3: (24, 48), 4: (24, 48)}[version]
    bits = {1: 4, 2: 4, 3: 16, 4: 16}[version]
    raw = bytearray(size)
    struct.pack_into(
        "<QQBB", raw, 0, version < 4, 9_000_000_000, int(members.get("type", 0)), int(members.get("flags", 0))
    )
    for leg, name in zip(legs, ("ab", "ba"), strict=True):
        struct.pack_into("<I", raw, leg + bits, int(members.get(name, 0)))
    if version > 2:
        raw[23] = int(members.get("flags1", 0))
    return bytes(raw)


KEY = struct.pack("<I4s4sHH", 6, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), 80, 4000)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("ab", "ba", "flags", "state", "timeout"),
    [
        (0x20, 0, 0, "SYN-SENT", 20),
        (0x23, 0x3, 0, "ESTABLISHED", 3600),
        (0x27, 0x3, 0, "ESTABLISHED", 3600),
        (0x27, 0x7, 0, "CLOSED", 30),
        (0x27, 0x3, 2, "CLOSED", 30),
        (0x2B, 0x3, 0, "RESET", 40),
    ],
)
def test_states(version: int, ab: int, ba: int, flags: int, state: str, timeout: int) -> None:
    entry = only(
        f"cali_v4_ct{version}" if version > 1 else "cali_v4_ct", KEY, conntrack(version, ab=ab, ba=ba, flags=flags)
    )
    assert (entry["state"], entry["timeout_s"], entry["age_ns"]) == (state, timeout, 1_000_000_000)
    assert (entry["from"], entry["ab"]["flags"][-1]) == ("a", "rst" if ab & 8 and not ab & 0x20 else "opener")
    assert mapdump.text("ct", entry).startswith("TCP 10.0.0.1:80 -> 10.0.0.2:4000  Active ago 1s " + state)


@pytest.mark.parametrize(("proto", "limit"), [(17, 60), (1, 5), (58, 5), (132, 600)])
def test_other_protocols(proto: int, limit: int) -> None:
    entry = only("cali_v4_ct4", struct.pack("<I", proto) + KEY[4:], conntrack(4, ba=0x20))
    assert (entry["state"], entry["timeout_s"], entry["from"]) == ("", limit, "b")
    summary = mapdump.summary(made("cali_v4_ct4", (struct.pack("<I", proto) + KEY[4:], conntrack(4))))
    assert (summary["udp"], summary["others"]) == ((1, 0) if proto == 17 else (0, 1))


def test_forward_and_reverse_of_one_block_and_expiry() -> None:
    old = bytearray(conntrack(4, ab=0x20, type=2, flags1=1))
    struct.pack_into("<Q", old, 8, 0)
    struct.pack_into("<4s4sHH4s", old, 72, bytes([10, 9, 9, 9]), bytes([10, 9, 0, 1]), 443, 55, bytes(4))
    late = mapdump.Context(now_ns=10**12)
    raw = made("cali_v4_ct4", (KEY, conntrack(4, type=1)), (KEY, bytes(old)))
    forward, reverse = mapdump.iter_objects(raw, late)
    assert forward["type"] == "nat-fwd"
    line = mapdump.text("ct", forward)
    assert line.startswith("TCP 10.0.0.1:80 -> 10.0.0.2:4000  forward to 0.0.0.0:0 <-> 0.0.0.0:0  Active ago 16m31s")
    assert "REVKey: ConntrackKey{proto=6 0.0.0.0:0 <-> 0.0.0.0:0} NATSPort: 0}" in mapdump.text("ct", forward, raw=True)
    assert "A2B:{Bytes:0 Packets:0 Seqno:0 SynSeen:false" in mapdump.text("ct", reverse, raw=True)
    assert mapdump.text("ct", reverse) == (
        "TCP 10.0.0.2:4000 -> 10.9.0.1:443 -> 10.0.0.1:80 external client, service forwarded to/from 10.9.9.9 "
        "source port changed from 55  Active ago 16m40s SYN-SENT  expired: Felix removes it at its next sweep"
    )
    lines = b"".join(conntrack_json.iter_blocks(raw, mapdump.Context())).splitlines()
    assert [json.loads(line)["age_ns"] for line in lines] == [None, None]
    assert mapdump.summary(raw) == {
        "map": "cali_v4_ct4",
        "entries": 2,
        "max_entries": 100,
        "connections": 1,
        "nat_connections": 1,
        "tcp": 1,
        "udp": 0,
        "others": 0,
        "established": 0,
        "closed": 0,
        "reset": 0,
        "syn_sent": 1,
    }
    empty = RawMap("cali_v4_ct4", "", 1, 16, 88, 1, 1, [])
    assert list(conntrack_json.iter_blocks(empty, late)) == []


def test_durations_are_those_of_go() -> None:
    texts = {0: "0s", 999: "999ns", 1500: "1.5µs", 250_000_000: "250ms", 1_500_000_000: "1.5s", 61 * 10**9: "1m1s",
             3605 * 10**9 + 1: "1h0m5.000000001s"}  # fmt: skip
    assert {each: mapdump.duration(each) for each in texts} == texts


@pytest.mark.parametrize(
    ("version", "bits", "head", "leg", "age"),
    [
        (1, 0x20, "Created:1, ", "{Seqno:0 SynSeen:false", " Age: 9.999999999s"),
        (2, 0x20, "Created:1, ", "{Seqno:0 SynSeen:false", " Age: 9.999999999s"),
        (3, 0x20, "Created:1, ", "{Bytes:0 Packets:0 Seqno:0 SynSeen:false", " Age: 9.999999999s"),
        (3, 0x28, "", "{Bytes:0 Packets:0 Seqno:0 SynSeen:false", ""),
        (4, 0x20, "", "{Bytes:0 Packets:0 Seqno:0 SynSeen:false", ""),
    ],
)
def test_raw_entries_show_what_their_version_has(version: int, bits: int, head: str, leg: str, age: str) -> None:
    name = f"cali_v4_ct{version}" if version > 1 else "cali_v4_ct"
    (found,) = mapdump.iter_objects(made(name, (KEY, conntrack(version, ab=bits, flags=0x14))), NOW)
    line = mapdump.text("ct", found, raw=True)
    start = "ConntrackKey{proto=6 10.0.0.1:80 <-> 10.0.0.2:4000} -> Entry{Type:0, "
    assert line.startswith(f"{start}{head}LastSeen:9000000000, Flags: 0x14 np-fwd res-0x10 Data: {{A2B:{leg}")
    state = "RESET" if bits & 8 else "SYN-SENT"
    assert line.endswith(f"TunIP:0.0.0.0}}}}{age} Active ago 1s {state}")
    assert ("Whitelisted:false Opener:true" in line) is (version < 3)
    assert ("Approved:false Opener:true" in line) is (version >= 3)
    assert ("Opener:true Workload:false Ifindex:0" in line) is (not head)
    assert ("Ifindex:0" in line) is (version > 1)


def test_raw_flags_without_a_name() -> None:
    (found,) = mapdump.iter_objects(made("cali_v6_ct4", (bytes(40), bytes(19) + b"\x80" + bytes(108))), NOW)
    assert "Flags: 0x80000000 0x80000000 Data:" in mapdump.text("ct", found, raw=True)


def test_the_client_of_a_forward_entry_to_a_host_networked_backend() -> None:
    """The node's address is in both keys: the end that keeps its port is the client."""
    node, client = bytes([10, 0, 0, 2]), bytes([10, 0, 0, 1])
    key = struct.pack("<I4s4sHH", 6, client, node, 4000, 30080)
    value = bytearray(conntrack(4, type=1))
    value[24:40] = struct.pack("<I4s4sHH", 6, client, node, 4000, 8080)
    raw = made("cali_v4_ct4", (key, bytes(value)))
    (found,) = mapdump.iter_objects(raw, NOW)
    assert found["from"] == "a"
    assert json.loads(b"".join(conntrack_json.iter_blocks(raw, NOW))) == found


def test_what_a_real_connection_left() -> None:
    forward, reverse = mapdump.iter_objects(real("a", "cali_v4_ct4"), mapdump.Context())
    assert (forward["type"], forward["addr_a"], forward["port_a"]) == ("nat-fwd", "10.10.0.1", 30080)
    assert mapdump.text("ct", reverse) == (
        "TCP 10.10.0.100:40001 -> 10.10.0.1:30080 -> 10.65.1.2:8080 external client, "
        "service forwarded to/from 10.10.0.2 CLOSED"
    )
    remote = [e for e in mapdump.iter_objects(real("b", "cali_v4_ct4"), mapdump.Context()) if e["type"] != "nat-fwd"]
    assert [e["tun_ip"] for e in remote] == ["10.10.0.1"]
    assert [mapdump.text("routes", e) for e in mapdump.iter_objects(real("a", "cali_v4_routes"), NOW)] == [
        "   10.10.0.1/32: local host",
        "   10.10.0.2/32: remote host",
        "   10.65.0.2/32: local workload in-pool nat-out idx 3",
        "   10.65.1.0/26: remote workload in-pool nat-out same-subnet nh 10.10.0.2",
        "   10.96.0.0/12: blackhole-drop",
        "    127.0.0.0/8: local host",
    ]
    (arp,) = mapdump.iter_objects(real("a", "cali_v4_arp2"), NOW)
    assert mapdump.text("arp", arp) == "dev    2:       10.10.0.2 : 6e:0d:47:ed:d9:86 -> ea:1a:e7:df:30:61"
    first, *_ = mapdump.iter_objects(real("a", "cali_iface4"), NOW)
    assert mapdump.text("iface", first).startswith("    2 : {flags: v4Ready,host, XDPPolicyV4: -1, IngressPolicyV4: -1")
    old = {**first, "flags": []}  # a host interface before v3.30, when it is not ready
    assert mapdump.text("iface", old).startswith("    2 : {flags: host, XDPPolicyV4: -1")
    assert mapdump.text("iface", first).endswith("IngressFilter: -1, EgressFilter: -1, name: ens192}")


def in_words(raw: RawMap, context: mapdump.Context = NOW) -> dict[bytes, dict[str, Any]]:
    """Key to entry in words."""
    keys = [key for key, _ in raw.entries]
    return dict(zip(keys, mapdump.iter_objects(raw, context), strict=True))


@pytest.mark.parametrize("node", ["a", "b"])
def test_the_entries_of_a_nat_pair_find_each_other(node: str) -> None:
    raw = real(node, "cali_v4_ct4")
    layout = maptables.resolve(raw)
    partners = {key: mapdump.partner_keys(layout, key, value) for key, value in raw.entries}
    known = in_words(raw)
    nat = {key: [each for each in partners[key] if each in known] for key in known if known[key]["type"] != "normal"}
    assert len(nat) == 2
    for key, (other,) in nat.items():
        assert nat[other] == [key]
        assert known[key]["type"] != known[other]["type"]
    assert [known[key]["from"] for key in nat] == ["b", "b"]


def test_partners_without_nat_with_a_changed_port_and_ipv6() -> None:
    layout = maptables.resolve(made("cali_v4_ct4", (KEY, conntrack(4))))
    assert mapdump.partner_keys(layout, KEY, conntrack(4)) == ()
    value = bytearray(conntrack(4, ab=0x20, type=2))
    struct.pack_into("<4s4sHH4s", value, 72, bytes(4), bytes([10, 9, 0, 1]), 443, 55, bytes(4))
    client, service = (bytes([10, 0, 0, 1]), 55), (bytes([10, 9, 0, 1]), 443)
    forward = [struct.pack("<I4s4sHH", 6, a[0], b[0], a[1], b[1]) for a, b in ((client, service), (service, client))]
    assert mapdump.partner_keys(layout, KEY, bytes(value)) == tuple(forward)
    old = maptables.resolve(made("cali_v4_ct", (KEY, conntrack(1))))
    assert mapdump.partner_keys(old, KEY, conntrack(1, type=2, ba=0x20))[0][8:12] == bytes(4)
    key6 = struct.pack("<I16s16sHH", 6, b"\x0a" * 16, b"\x0b" * 16, 80, 4000)
    six = maptables.resolve(made("cali_v6_ct4", (key6, bytes(128))))
    value6 = bytearray(128)
    struct.pack_into("<B6xB", value6, 16, 2, 1)
    struct.pack_into("<16s16sHH16s", value6, 72, bytes(16), b"\x0c" * 16, 443, 0, bytes(16))
    first, _ = mapdump.partner_keys(six, key6, bytes(value6))
    assert first == struct.pack("<I16s16sHH", 6, b"\x0b" * 16, b"\x0c" * 16, 4000, 443)


def test_a_connection_at_length() -> None:
    raw = real("a", "cali_v4_ct4")
    context = mapdump.Context(interfaces={2: "ens192"})
    forward, reverse = sorted(in_words(raw, context).values(), key=lambda e: e["type"])
    assert list(mapdump.iter_connection(reverse, [forward], context.timeouts)) == [
        "TCP 10.10.0.100:40001 -> 10.10.0.1:30080 -> 10.65.1.2:8080 external client, "
        "service forwarded to/from 10.10.0.2 CLOSED",
        "  time-out   30 s (tcpFinsSeen, Felix's default)",
        "  flags      np-fwd B-A dscp",
        "  request    from 10.10.0.100:40001 by ens192, 6 packets, 406 bytes, syn ack fin approved opener",
        "  reply      from 10.65.1.2:8080 by ens192, 5 packets, 345 bytes, syn ack fin approved",
        "  pair       nat-fwd: 10.10.0.100:40001 -> 10.10.0.1:30080",
    ]
    lone = list(mapdump.iter_connection(forward, [], context.timeouts))
    assert lone[-2:] == [
        "  flags      none",
        "  pair       its reverse entry is missing: Felix removes this one at its next sweep",
    ]
    assert "its forward entry is missing" in list(mapdump.iter_connection(reverse, [], context.timeouts))[-1]
    assert list(mapdump.iter_connection(forward, [reverse], context.timeouts))[-1].endswith(":8080, CLOSED")
    fresh = only("cali_v4_ct", KEY, conntrack(1, ab=0x20))
    assert list(mapdump.iter_connection(fresh, [], mapdump.Context().timeouts))[3:] == [
        "  request    from 10.0.0.1:80, opener",
        "  reply      from 10.0.0.2:4000, nothing seen",
    ]
    assert mapdump.text("ct", only("cali_v4_ct4", KEY, conntrack(4, ab=3, ba=3))).endswith("expires in 60 min")
    direct = only("cali_v4_ct4", KEY, conntrack(4, ab=0x31, ba=0x10, flags=6))
    assert list(mapdump.iter_connection(direct, [], context.timeouts))[4] == (
        "  reply      from 10.0.0.2:4000, 0 packets, 0 bytes, approved: with DSR it goes straight to the client"
    )


def test_pairing_names_what_stays_alone() -> None:
    forward, reverse = sorted(in_words(real("a", "cali_v4_ct4")).values(), key=lambda e: e["type"])
    others = [{**reverse, "type": "normal"}, {**reverse, "type": "type-9"}]

    def notes(*entries: dict[str, Any], now_ns: int = 0) -> list[str]:
        pairing = mapdump.Pairing(mapdump.Context(now_ns))
        for each in (*others, *entries):
            pairing.feed(each)
        return list(pairing.iter_notes())

    assert notes(forward, reverse) == notes(reverse, forward) == []
    assert notes(forward) == [
        "1 nat-fwd entries without their reverse entry: Felix removes them at its next sweep: "
        "10.10.0.100:40001 -> 10.10.0.1:30080"
    ]
    assert notes(forward, now_ns=1) == []
    (several,) = notes(*({**reverse, "port_a": port} for port in range(4)))
    assert several.startswith("4 nat-rev entries without their forward entry")
    assert several.endswith("; ...")


def nat(node: str, *names: str) -> list[dict[str, Any]]:
    """What a real node had in these NAT maps, in words."""
    return [entry for name in names for entry in mapdump.iter_objects(real(node, f"cali_v4_nat_{name}"), NOW)]


def test_nat_and_its_backends() -> None:
    fronts, backs = nat("a", "fe3"), nat("a", "be")
    lines = list(mapdump.iter_nat([*backs, *fronts]))
    assert "10.10.0.200 port 80 proto 6 id 6 count 1 local 0 src 198.51.100.0/24" in lines
    assert "10.10.0.200 port 80 proto 6 id 6 count -1 local 0" in lines
    assert lines[lines.index("10.10.0.1 port 30080 proto 6 id 1 count 1 local 0") + 1] == "\t1:0\t 10.65.1.2:8080"
    assert "\t1:0\t is missing" in list(mapdump.iter_nat(fronts))
    assert next(iter(mapdump.iter_nat(backs, both=False))) == "1:0\t 10.65.1.2:8080"
    assert "\t1:0\t (backends were not read)" in list(mapdump.iter_nat(fronts, both=False))
    sticky = [{**fronts[0], "affinity_s": 10800, "source": "10.0.0.0/8", "count": 0}]
    assert next(iter(mapdump.iter_nat(sticky))).endswith(" src 10.0.0.0/8 affinity 10800s")
    old = only("cali_v4_nat_fe", struct.pack("<4sHBx", bytes([10, 96, 0, 1]), 443, 6), struct.pack("<4I", 1, 0, 0, 0))
    assert (old["source"], old["flags"]) == (None, [])
    six = {**backs[0], "id": 9, "ordinal": 0, "addr": "fd00::9", "port": 80}
    assert list(mapdump.iter_nat([{**fronts[0], "id": 9}, six]))[1] == "\t9:0\t [fd00::9]:80"


def test_a_service_with_all_of_its_frontends() -> None:
    entries = [*nat("a", "fe3"), *nat("a", "be")]
    found = mapdump.siblings(entries, "10.96.0.10", 80, "tcp")
    assert list(mapdump.iter_nat(found, grouped=True)) == [
        "10.10.0.1 port 30080 proto 6 id 1 count 1 local 0",
        "10.96.0.10 port 80 proto 6 id 1 count 1 local 0",
        "255.255.255.255 port 30080 proto 6 id 1 count 1 local 0",
        "\t1:0\t 10.65.1.2:8080",
    ]
    (group,) = mapdump.iter_groups(found)
    assert (group["id"], group["backends"]) == (1, [{"addr": "10.65.1.2", "port": 8080}])
    assert "backends" not in group["frontends"][0]
    assert mapdump.siblings(entries, "10.96.0.10", 80, "udp") == []
    (drop,) = [e for e in mapdump.with_backends(entries) if e.get("drop")]
    assert drop["backends"] == []
    lost = [e for e in mapdump.with_backends(nat("a", "fe3")) if e["port"] == 30080]
    assert lost[0]["backends"] == [None]


def test_pods_interfaces_that_ifstate_lacks(tmp_path: Path) -> None:
    names = {2: "ens5", 3: "eni5a10c2e7f31", 4: "eni07cbd1a42f0", 5: "enp9s0", 6: "cali1a2b3c4d5e6"}
    known = ((2, 8), (3, 1))
    rows = [(struct.pack("<I", i), struct.pack("<I16s32x", flags, names[i].encode())) for i, flags in known]
    raw = made("cali_iface4", *rows)
    snapshot = tmp_path / "snapshot"
    with snapshot.open("wb") as stream:
        writer = Writer(stream, {"interfaces": names})
        for body in map_bodies(raw, maptables.blocks(raw)):
            writer.write(MAPS, body)
        writer.write(END, {})
    done = CliRunner().invoke(maps_command.command, ["ifstate", "dump", "-r", str(snapshot)])
    assert [line for line in done.stderr.splitlines() if "not in ifstate" in line] == [
        "note: interface eni07cbd1a42f0 (ifindex 4) is not in ifstate: its packets are dropped",
        "note: interface cali1a2b3c4d5e6 (ifindex 6) is not in ifstate: its packets are dropped",
    ]


def test_the_other_maps() -> None:
    ip_set = struct.pack("<I", 64 + 24) + struct.pack(">Q", 0xABC) + bytes([10, 1, 2, 0, 0, 0, 0, 0])
    member = struct.pack("<I", 120) + struct.pack(">Q", 0xABC) + struct.pack("<4sHBx", bytes([10, 1, 2, 3]), 53, 17)
    sets = objects(made("cali_v4_ip_sets", (ip_set, bytes(4)), (member, bytes(4))))
    assert list(mapdump.iter_ip_sets(sets)) == ["IP set 0xabc", "   10.1.2.0/24", "   10.1.2.3:53 (proto 17)", ""]
    ids = [f"{each['set_id']}" for each in sets] + ["0x2"]
    lines = list(mapdump.iter_ip_sets({"set_id": each, "cidr": "10.0.0.0/8"} for each in ids))
    assert [line for line in lines if line.startswith("IP")] == ["IP set 0x2", "IP set 0xabc"]
    assert list(mapdump.iter_ip_sets([])) == ["No IP sets found."]
    safe = only("cali_v4_fsafes2", struct.pack("<IHBB4s", 32, 22, 6, 1, bytes(4)), bytes(4))
    assert safe == {"proto": "tcp", "port": 22, "direction": "outbound", "cidr": "0.0.0.0/0"}
    assert only("cali_v4_fsafes", struct.pack("<HBB", 22, 6, 0), bytes(4))["direction"] == "inbound"
    rule = only("cali_rule_ctrs2", struct.pack("<Q", 7), struct.pack("<QQ", 40, 2), cpus=2)
    assert mapdump.text("rule_ctrs", rule) == "0x0000000000000007          42  default.p rule 0 (deny)"
    profile = only("cali_profiling2", struct.pack("<II", 3, 0), struct.pack("<QQ", 100, 4))
    assert (profile["interface"], profile["kind"], profile["mean_ns"]) == ("cali1", "ingress new", 25)
    assert only("cali_profiling2", bytes(8), bytes(16))["mean_ns"] is None
    sticky = only("cali_v4_nat_aff", struct.pack("<4sHBx4s4x", bytes([10, 96, 0, 1]), 80, 6, bytes([10, 0, 0, 9])),
                  struct.pack("<4sH2xQ", bytes([10, 65, 0, 2]), 8080, 5))  # fmt: skip
    line = "client 10.0.0.9 svc proto 6 10.96.0.1:80 -> 10.65.0.2:8080 ts 5ns"
    assert mapdump.text("nat_aff", sticky) == line
    maglev = only("cali_v4_mglv2", struct.pack("<II", 1, 9), struct.pack("<4sHxx", bytes([10, 65, 0, 2]), 80))
    assert mapdump.text("mglv", maglev) == "svc 1 ordinal 9 -> 10.65.0.2:80"
    translated = only("cali_v4_ct_nats", struct.pack("<Q4s", 5, bytes([10, 65, 0, 2])) + b"\x1f\x90\0\0\x06" + bytes(7),
                      bytes([10, 96, 0, 1]) + b"\x00\x50\0\0")  # fmt: skip
    assert (translated["port"], translated["orig_dst"], translated["orig_dport"]) == (8080, "10.96.0.1", 80)
    assert mapdump.text("ct_nats", translated) == (
        "cookie 5  addr 10.65.0.2  port 8080  proto tcp  orig_dst 10.96.0.1  orig_dport 80"
    )
    assert mapdump.text("qos", {"map": "m", "flags": ["a", "b"], "none": None}) == "flags a,b"
    spoof = only("cali_v4_sprefix", struct.pack("<II4s", 56, 3, bytes([10, 1, 2, 0])), bytes(4))
    assert spoof == {"ifindex": 3, "interface": "cali1", "cidr": "10.1.2.0/24"}
    v6 = only(
        "cali_v6_routes", struct.pack("<I", 64) + bytes.fromhex("fd" + "00" * 15), struct.pack("<I", 0x400) + bytes(16)
    )
    assert (v6["cidr"], v6["flags"]) == ("fd00::/64", ["vxlan"])
    assert mapdump.names(0x80000001, {1: "one"}) == ["one", "0x80000000"]


def test_counters() -> None:
    value = struct.pack("<27Q", *range(27))
    key = struct.pack("<II", 2, 0)
    entries = objects(made("cali_counters6", (key, value), (struct.pack("<II", 9, 1), value)))
    lines = list(mapdump.iter_counters(entries, "eth0"))
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:6:2]] == [
        ["CATEGORY", "TYPE", "INGRESS", "EGRESS", "XDP"],
        ["Accepted", "by another program", "3", "N/A", "N/A"],
        ["", "by policy", "2", "N/A", "N/A"],
    ]
    assert [line.split("|")[3].strip() for line in lines if "packets with unknown route" in line] == ["12"]
    assert {len(line) for line in lines[:-2]} == {len(lines[0])}
    assert len(lines[0]) <= 80
    (at,) = [index for index, line in enumerate(lines) if "Maglev lookup found no backends for" in line]
    assert [cell.strip() for cell in lines[at + 1].split("|")[1:-1]] == ["", "service IP", "", "", ""]
    assert lines[-2:] == ["dumped eth0 counters.", ""]
    assert "| Other    | RESERVED1 " in "\n".join(lines)
    assert list(mapdump.iter_counters(entries))[-2] == "dumped ifindex 9 counters."
    quiet = only("cali_counters6", key, bytes(27 * 8))
    assert "RESERVED1" not in "\n".join(mapdump.iter_counters([quiet]))
    old = made("cali_counters", (bytes(4), bytes(112)))
    (pinned,) = objects(RawMap(**{**vars(old), "pin": "tc/eth0_egr/cali_counters"}))
    assert (pinned["interface"], pinned["hook"]) == ("eth0", "tc egress")
    (lost,) = objects(old)
    shown = list(mapdump.iter_counters([lost]))
    assert shown[1].split("|")[-2].strip() == "TC"
    assert shown[-2] == "dumped (no pin) counters."


def test_routes_in_calico_s_words_and_order() -> None:
    flags = {"10.0.0.0/8": 0x1 | 0x2, "10.0.0.0/16": 0x5 | 0x80 | 0x40 | 0x20, "9.0.0.0/8": 0x10 | 0x40 | 0x800,
             "10.0.0.1/32": 0xC | 0x200 | 0x400}  # fmt: skip
    hops = {"9.0.0.0/8": bytes([10, 1, 1, 1])}
    keys = {each: struct.pack("<I4s", int(each.split("/")[1]), socket.inet_aton(each.split("/")[0])) for each in flags}
    raw = made(
        "cali_v4_routes", *((keys[each], struct.pack("<I", flags[each]) + hops.get(each, bytes(4))) for each in flags)
    )
    assert [mapdump.text("routes", e) for e in sorted(objects(raw), key=mapdump.route_order)] == [
        "      9.0.0.0/8: remote host tunneled skip-ingress-redir nh 10.1.1.1",
        "     10.0.0.0/8: remote in-pool nat-out",
        "    10.0.0.0/16: remote workload in-pool same-subnet no-dsr tunneled nh 0.0.0.0",
        "    10.0.0.1/32: local workload vxlan idx 0 blackhole-reject",
    ]


def test_stats_and_latency_as_calico_prints_them() -> None:
    found = mapdump.summary(real("a", "cali_v4_ct4"))
    assert list(mapdump.iter_stats({**found, "max_entries": 512000})) == [
        *("Conntrack map size: 512000", "Total connections: 1", "Total entries: 2", "NAT connections: 1", ""),
        *("TCP : 1", "UDP : 0", "Others : 0", "", "TCP Established: 0", "TCP Closed: 1", "TCP Reset: 0"),
        "TCP Syn-sent: 0",
    ]
    key, other = struct.pack("<II", 3, 0), struct.pack("<II", 3, 2)
    raw = made("cali_profiling2", (key, struct.pack("<QQ", 100, 3)), (other, bytes(16)))
    lines = list(mapdump.iter_latency(objects(raw)))
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[1], lines[3])] == [
        ["IFACE", "INGRESS new", "#", "INGRESS est", "#", "EGRESS new", "#", "EGRESS est", "#"],
        ["cali1", "33.333 ns", "3", "---", "---", "---", "0", "---", "---"],
    ]


def test_a_pod_s_packet_enters_by_its_own_interface() -> None:
    packet = walk.Packet("10.65.0.2", 0, "10.65.1.2", 80, "tcp")
    assert [step.key for step in walk.walk(packet, tables()) if step.lookup in ("ifstate", "RPF")] == [
        *("cali1", "10.65.0.2 at cali1"),
    ]
    assert kinds(walk.walk(packet, changed("interfaces", 1, ifindex=9, name="other"))) == [walk.NO_INTERFACE]


def test_captions() -> None:
    names = ("TOTAL_PACKETS", "SHORT", "RESERVED1")
    assert [reasons.caption(name) for name in names] == ["total packets", "dropped too short packets", "RESERVED1"]


def test_counters_a_second() -> None:
    key = struct.pack("<II", 2, 0)
    before, after = (objects(made("cali_counters6", (key, struct.pack("<27Q", *cells)))) for cells in (
        (10, 5, *([0] * 25)), (14, 2, *([0] * 25))))  # fmt: skip
    named = [[{"map": "cali_counters6", **each} for each in found] for found in (before, after)]
    (rates,) = mapdump.per_second(named[0], named[1], 2)
    assert (rates["per_second"]["TOTAL_PACKETS"], rates["per_second"]["ACCEPTED_BY_FAILSAFE"]) == (2, 1)
    (fresh,) = mapdump.per_second([], named[1], 2)
    assert fresh["per_second"]["TOTAL_PACKETS"] == 7
    lines = list(mapdump.iter_counters([rates]))
    assert [line.split("|")[3].strip() for line in lines if "| Total" in line] == ["2.0"]
    assert lines[-2] == "dumped eth0 counters in packets per second."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "the end of the dump"),
        ("[{", "JSON"),
        ("{}", "a list of entries"),
        ("[1]", "a key and a value"),
        ('[{"key": ["0x1"]}]', "a key and a value"),
        ('[{"key": ["x"], "value": ["0x1"]}]', "hexadecimal bytes"),
        ('[{"key": ["0x1"], "values": [{"cpu": 0}]}]', "a value for each CPU, found KeyError"),
        ('[{"key": ["0x1"], "values": [1]}]', "a value for each CPU, found TypeError"),
        ('[{"key": ["0x1"], "value": []}, {"key": [], "value": []}]', "several sizes"),
        ('[{"key": ["0x1"], "values": [{"value": ["0x1"]}, {"value": []}]}]', "several sizes"),
        ('[{"key": 2, "value": {"flags": 10}}]', "members of a map with BTF"),
        ('[{\n        "key": {\n            "id": 1}, "value": {"syn_seen": 0x0}}]', "members of a map with BTF"),
        ('[{"id": 1, "elements": []}, {"id": 2, "elements": []}]', "one map, found 2 of that name"),
        ("1054: lru_hash  name cali_v4_ct4  flags 0x0\n", "found '1054: lru_hash"),
        ("key: 01 00 00 00  value: 02 00", "the end of the dump"),
        ("value: 02 00\nFound 1 element\n", "a value without one"),
        ("key: 01 00  value: 02 00\nkey: 01  value: 02 00\nFound 2 elements\n", "several sizes"),
    ],
)
def test_what_bpftool_did_not_write(text: str, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        bpftool.read(text, "cali_v4_ct4")


def plain(raw: RawMap) -> str:
    """The map as bpftool writes one without BTF as text."""

    def shown(part: bytes) -> str:
        rows = (part[at : at + 16] for at in range(0, len(part), 16))
        return "\n".join(row.hex(" ") for row in rows)

    lines = []
    for key, value in raw.entries:
        size = len(value) // raw.cpus
        if raw.cpus > 1:
            lines.append(f"key:\n{shown(key)}")
            gap = "\n" if size > 16 else " "
            lines += [f"value (CPU {n:02}):{gap}{shown(value[n * size :][:size])}" for n in range(raw.cpus)]
        elif len(key) > 16 or size > 16:
            lines.append(f"key:\n{shown(key)}\nvalue:\n{shown(value)}")
        else:
            lines.append(f"key: {shown(key)}{'  ' if len(key) + size <= 24 else chr(10)}value: {shown(value)}")
    return "\n".join([*lines, f"Found {len(lines)} elements", ""])


@pytest.mark.parametrize("name", ["cali_v4_ct4", "cali_v4_routes", "cali_v4_arp2", "cali_v4_nat_fe3", "cali_iface4"])
def test_text_of_a_map_without_btf_has_the_same_bytes(name: str) -> None:
    raw = real("a", name)
    assert bpftool.read(plain(raw), name) == raw


def test_text_of_a_per_cpu_map_and_of_empty_ones() -> None:
    value = struct.pack("<54Q", *range(54))
    raw = bpftool.read(plain(made("cali_counters6", (bytes(8), value), cpus=2)), "cali_counters6")
    assert (raw.cpus, raw.value_size, raw.max_entries, list(raw.entries)) == (2, 216, 0, [(bytes(8), value)])
    assert bpftool.read("Found 0 elements\n", "cali_v4_ct4").value_size == 88
    gone = "key:\n00 00 00 00\nvalue:\n<no entry>\nFound 0 elements\n"
    assert list(bpftool.read(gone, "cali_v4_arp2").entries) == []
    gone = '[{"key": ["0x00"], "value": {"error": "No such file or directory"}}]'
    assert list(bpftool.read(gone, "cali_v4_arp2").entries) == []
    assert mapdump.summary(bpftool.read("[]", "cali_v4_routes"))["max_entries"] is None
    assert next(mapdump.iter_stats(mapdump.summary(real("a", "cali_v4_ct4")))) == "Conntrack map size: unknown"


def test_decoded_entries_and_sources_of_blocks() -> None:
    raw = made("cali_iface4", (struct.pack("<I", 3), struct.pack("<I16s32x", 5, b"cali1")))
    assert [e["name"] for e in maptables.iter_entries(raw, maptables.resolve(raw))] == ["cali1"]
    stored = Stored(4, 52, [(1, bytes(4), bytes(52))])
    assert list(maptables.blocks(RawMap("cali_iface4", "", 1, 4, 52, 1, 1, stored))) == stored.blocks


def test_empty_and_per_cpu_dumps() -> None:
    empty = bpftool.read("[]", "cali_v4_ct4")
    assert (empty.key_size, empty.value_size, maptables.blocks(empty)) == (16, 88, [])
    with pytest.raises(Malformed, match="do not know the sizes of cali_new"):
        bpftool.read("[]", "cali_new")
    cells = [{"cpu": n, "value": ["0x02"] + ["0x00"] * 7} for n in range(2)]
    raw = bpftool.read(json.dumps([{"key": ["0x00"] * 8, "values": cells}]), "cali_rule_ctrs2")
    assert (raw.cpus, raw.value_size, objects(raw)[0]["packets"]) == (2, 8, 4)


# --- Walk and diff -----------------------------------------------------------------------------------------------


def tables(**changes: Any) -> walk.Tables:
    """A node where NodePort 30080 leads to a local and a remote backend."""
    front = {"port": 30080, "proto": "tcp", "id": 1, "count": 2, "local": 1, "affinity_s": 0, "flags": [],
             "drop": False, "source": None}  # fmt: skip
    found: dict[str, Any] = {
        "frontends": [{**front, "addr": "10.10.0.1"}],
        "backends": [
            {"id": 1, "ordinal": 0, "addr": "10.65.0.2", "port": 8080},
            {"id": 1, "ordinal": 1, "addr": "10.65.1.2", "port": 8080},
            {"id": 2, "ordinal": 0, "addr": "10.65.1.9", "port": 8080},
        ],
        "routes": [
            {"cidr": "10.10.0.1/32", "flags": ["local", "host"], "next_hop": "0.0.0.0"},
            {"cidr": "10.65.0.2/32", "flags": ["local", "workload"], "ifindex": 3, "interface": "cali1"},
            {"cidr": "10.65.1.0/26", "flags": ["workload"], "next_hop": "10.10.0.2"},
            {"cidr": "10.96.0.0/12", "flags": ["blackhole-drop"], "next_hop": "0.0.0.0"},
        ],
        "interfaces": [
            {"ifindex": 2, "name": "eth0", "flags": ["host", "v4Ready"], "ingress_v4": 5},
            {"ifindex": 3, "name": "cali1", "flags": ["workload", "v4Ready"], "ingress_v4": -1},
        ],
    }
    return walk.Tables(**{**found, **changes})


PACKET = walk.Packet("10.10.0.100", 4000, "10.10.0.1", 30080, "tcp", "eth0")


def verdict(packet: walk.Packet, found: walk.Tables) -> str:
    """What becomes of the packet."""
    last = walk.walk(packet, found)[-1]
    assert last.lookup == "verdict"
    return last.found


def found_by(lookup: str, found: walk.Tables) -> list[tuple[str, str]]:
    """What this lookup found for PACKET."""
    return [(step.lookup, step.found) for step in walk.walk(PACKET, found) if step.lookup == lookup]


def kinds(steps: list[walk.Step]) -> list[str]:
    """The breakages."""
    return [step.broken for step in steps if step.broken]


def changed(base: str, index: int, **members: Any) -> walk.Tables:
    """The tables with one row changed."""
    rows = [dict(row) for row in getattr(tables(), base)]
    rows[index].update(members)
    return tables(**{base: rows})


def test_a_whole_chain() -> None:
    steps = walk.walk(PACKET, tables())
    assert kinds(steps) == []
    assert [step.lookup for step in steps] == [
        *("ifstate", "conntrack", "NAT frontend", "NAT backend", "NAT backend", "RPF"),
        *("route", "ifstate", "route", "verdict"),
    ]
    assert (steps[-1].key, steps[-1].found) == (
        "tcp 10.10.0.100:4000 -> 10.10.0.1:30080",
        "1 of 2 new connections: delivered to 10.65.0.2:8080 by cali1; "
        "1 of 2 new connections: forwarded in Calico's VXLAN to node 10.10.0.2, for 10.65.1.2:8080",
    )
    assert [step.lookup for step in walk.walk(PACKET, tables(interfaces=None))].count("ifstate") == 0


def test_a_walk_is_read_at_80_columns() -> None:
    lines = list(mapdump.iter_walk(walk.walk(PACKET, changed("backends", 0, addr="10.77.0.9"))))
    assert [line for line in lines if len(line) > 80] == []
    assert lines[1:4] == [
        "ok      conntrack     tcp 10.10.0.100:4000 <-> 10.10.0.1:30080: none: a new",
        "                        connection, which another TCP packet than a SYN cannot",
        "                        begin",
    ]
    assert lines[-6:] == [
        "BROKEN  route         10.77.0.9: none",
        "                      no route: dropped, RT_UNKNOWN",
        "ok      route         10.65.1.2: 10.65.1.0/26 workload, next hop 10.10.0.2",
        "tcp 10.10.0.100:4000 -> 10.10.0.1:30080: 1 of 2 new connections: dropped,",
        "        RT_UNKNOWN (no route); 1 of 2 new connections: forwarded in Calico's",
        "        VXLAN to node 10.10.0.2, for 10.65.1.2:8080",
    ]


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        (tables(frontends=[]), [walk.NO_FRONTEND]),
        (changed("frontends", 0, count=0), [walk.NO_BACKEND]),
        (changed("frontends", 0, local=0, flags=["external-local"]), [walk.NO_BACKEND]),
        (changed("frontends", 0, drop=True), [walk.BAD_SOURCE]),
        (tables(backends=[]), [walk.NO_BACKEND]),
        (changed("frontends", 0, count=3), [walk.NO_BACKEND]),
        (changed("backends", 0, addr="10.77.0.9"), [walk.NO_ROUTE]),
        (changed("backends", 0, addr="10.96.0.9"), [walk.BLACKHOLE]),
        (changed("interfaces", 1, ifindex=4), [walk.NO_INTERFACE]),
        (changed("interfaces", 1, flags=["workload"]), [walk.NO_INTERFACE]),
        (changed("interfaces", 0, name="eth9"), [walk.NO_INTERFACE]),
    ],
)
def test_each_breakage(changes: walk.Tables, broken: list[str]) -> None:
    assert kinds(walk.walk(PACKET, changes)) == broken


def test_missing_backends_count_among_new_connections() -> None:
    steps = walk.walk(PACKET, changed("frontends", 0, count=5))
    (lost,) = [step for step in steps if step.broken]
    assert (lost.key, lost.found) == ("1:2 and 2 others", "missing")
    assert "3 of 5 new connections: refused with an ICMP error (frontend without backend)" in steps[-1].found
    nonsense = changed("frontends", 0, count=0xFFFFFFF0)
    assert len(walk.walk(PACKET, nonsense)) < 20
    assert len(mapdiff.services(nonsense)["10.10.0.1:30080/tcp"]["backends"]) == 10_000
    (front,) = [{**front, "count": 10_002, "local": 0} for front in tables().frontends]
    assert list(mapdump.iter_nat([front]))[-1] == "\t... and 2 more: is that count right?"


def test_networks_that_are_none() -> None:
    routes = [{"cidr": "10.0.0.0/99", "flags": ["local", "host"], "next_hop": "0.0.0.0"}]
    assert mapdiff.own_addresses(tables(routes=routes)) == frozenset()
    assert kinds(walk.walk(PACKET, tables(routes=routes, frontends=[]))) == [walk.NO_FRONTEND]


def entry(kind: str, backend: str, **members: Any) -> dict[str, Any]:
    """A forward or reverse conntrack entry of PACKET."""
    found = {"proto": "tcp", "type": kind, "addr_b": "10.10.0.100", "port_b": 4000, "state": "ESTABLISHED"}
    if kind == "nat-fwd":
        found |= {"addr_a": "10.10.0.1", "port_a": 30080, "rev_addr_a": backend, "rev_port_a": 8080}
        return found | {"rev_addr_b": "10.10.0.100", "rev_port_b": 4000}
    found |= {"from": "b", "orig_dst": "10.10.0.1", "orig_dport": 30080, "tun_ip": "0.0.0.0", "flags": [],
              "age_ns": None, "timeout_s": 20}  # fmt: skip
    return found | {"addr_a": backend, "port_a": 8080, **members}


@pytest.mark.parametrize(
    ("conntrack", "broken"),
    [
        (["nat-fwd 10.65.0.2", "nat-rev 10.65.0.2"], []),
        (["nat-fwd 10.65.0.2"], [walk.STALE]),
        (["nat-fwd 10.65.0.7", "nat-rev 10.65.0.7"], [walk.STALE]),
        (["nat-fwd 10.65.1.9", "nat-rev 10.65.1.9"], [walk.DISAGREE]),
    ],
)
def test_tracked_connections(conntrack: list[str], broken: list[str]) -> None:
    others = [entry("normal", "10.65.0.3", port_b=1), {**entry("nat-fwd", "10.65.0.9"), "proto": "udp"}]
    found = tables(conntrack=[*others, *(entry(*each.split()) for each in conntrack)])
    assert kinds(walk.walk(PACKET, found)) == broken
    new = walk.Packet(PACKET.src, 0, PACKET.dst, PACKET.dport, PACKET.proto)
    assert kinds(walk.walk(new, found)) == []


def test_straight_to_a_pod_and_elsewhere() -> None:
    pod = walk.Packet("10.10.0.100", 4000, "10.65.0.2", 8080, "tcp")
    assert kinds(walk.walk(pod, tables())) == []
    tracked = walk.walk(pod, tables(conntrack=[entry("normal", "10.65.0.2")]))
    assert [step.found for step in tracked if step.lookup == "conntrack"] == ["normal ESTABLISHED"]
    for address, where in (
        ("10.10.0.1", "host itself"),
        ("8.8.8.8", "routed by the host"),
        ("10.96.0.1", "BLACK_HOLE"),
    ):
        assert where in verdict(walk.Packet("10.10.0.100", 0, address, 1, "udp"), tables())


def test_source_ranges_affinity_and_failsafes() -> None:
    (front,) = tables().frontends
    near = {**front, "addr": "10.10.0.1", "source": "10.10.0.0/24", "id": 2, "count": 1}
    far = {**front, "addr": "10.10.0.1", "source": "192.0.2.0/24"}
    sticky = {"addr": "10.10.0.1", "port": 30080, "proto": "tcp", "client": "10.10.0.100",
              "backend": "10.65.0.2", "backend_port": 8080, "ts_ns": 1}  # fmt: skip
    wide = {**near, "source": None, "id": 1}
    steps = walk.walk(PACKET, tables(frontends=[wide, near, far]))
    assert "service 2, for 10.10.0.0/24: count 1, local 1" in [step.found for step in steps]
    timed = tables(frontends=[{**near, "affinity_s": 60}], affinity=[{**sticky, "client": "10.9.9.9"}, sticky])
    assert found_by("affinity", timed) == [("affinity", "10.65.0.2:8080")]
    late = walk.Tables(**{**vars(timed), "now_ns": 61 * 10**9})
    assert found_by("affinity", late) == [("affinity", "10.65.0.2:8080, but older than 60 s: chosen anew")]
    fresh = tables(frontends=[{**near, "affinity_s": 60}])
    assert found_by("affinity", fresh) == [("affinity", "none: chosen anew")]


def test_failsafe_ports_are_the_host_s_own() -> None:
    """After translation: a NodePort that leads to a pod is none, whatever its number."""
    safe = {"proto": "tcp", "port": 30080, "direction": "inbound"}
    ports = [{**safe, "cidr": "192.0.2.0/24"}, {**safe, "cidr": "0.0.0.0/0"}]
    assert found_by("failsafe", tables(failsafes=ports)) == []
    own = {"frontends": [], "programs": {"cali_jump_ing": {5: 77}}}
    found = walk.walk(PACKET, tables(failsafes=ports, **own))
    assert [(step.lookup, step.key, step.found) for step in found if step.lookup in ("failsafe", "policy")] == [
        ("failsafe", "tcp 30080 from 10.10.0.100", "it is one: no host policy applies")
    ]
    assert [step.lookup for step in walk.walk(PACKET, tables(failsafes=ports[:1], **own))][-4:] == [
        *("failsafe", "policy", "route", "verdict")
    ]
    assert found_by("failsafe", tables(failsafes=None, **own)) == [("failsafe", "their map is not here")]
    out = walk.Packet("10.10.0.1", 0, "10.10.0.2", 2379, "tcp")
    etcd = [{**safe, "port": 2379, "direction": "outbound", "cidr": cidr} for cidr in ("10.9.0.0/16", "10.10.0.0/16")]
    away = [(step.key, step.found) for step in walk.walk(out, tables(failsafes=etcd)) if step.lookup == "failsafe"]
    assert away == [("tcp 2379 to 10.10.0.2", "it is one: no host policy applies")]
    pod = walk.Packet("10.10.0.1", 0, "10.65.0.2", 2379, "tcp")
    assert "failsafe" not in [step.lookup for step in walk.walk(pod, tables(failsafes=etcd))]


def test_node_ports_of_any_node() -> None:
    """Their frontend is for what this node sends, and for what another node has put into a tunnel."""
    routes = [*tables().routes, {"cidr": "10.10.0.2/32", "flags": ["host"], "next_hop": "0.0.0.0"}]
    found = walk.Tables(**{**vars(changed("frontends", 0, addr="255.255.255.255", affinity_s=60)), "routes": routes})
    assert kinds(walk.walk(PACKET, found)) == [walk.NO_FRONTEND]
    for sender in ("10.10.0.1", "10.65.0.2"):
        steps = walk.walk(walk.Packet(sender, 0, "10.10.0.2", 30080, "tcp"), found)
        assert [step.key for step in steps if step.lookup == "NAT frontend"] == [
            f"{place}:30080/tcp from {sender}" for place in ("10.10.0.2", "255.255.255.255")
        ]
        assert "forwarded by the host's routes, for 10.65.1.2:8080" in steps[-1].found
    tunnelled = walk.Packet("10.10.0.100", 0, "10.10.0.2", 30080, "tcp", "eth0")
    sticky = {"addr": "10.10.0.2", "port": 30080, "proto": "tcp", "client": "10.10.0.100",
              "backend": "10.65.0.2", "backend_port": 8080, "ts_ns": 1}  # fmt: skip
    assert verdict(tunnelled, walk.Tables(**{**vars(found), "affinity": [sticky]})) == (
        "delivered to 10.65.0.2:8080 by cali1"
    )
    assert [(step.lookup, step.found) for step in walk.walk(tunnelled, found)][2:5] == [
        ("NAT frontend", "none"),
        ("NAT frontend", "service 1: count 2, local 1, in a NodePort tunnel"),
        ("affinity", "none: chosen anew"),
    ]
    assert verdict(tunnelled, found) == "delivered to 10.65.0.2:8080 by cali1"
    away = [{**found.frontends[0], "local": 0}]
    assert "none on this node (in a NodePort tunnel)" in [
        step.found for step in walk.walk(tunnelled, walk.Tables(**{**vars(found), "frontends": away}))
    ]


def test_backends_beyond_calico_s_routes() -> None:
    """Only what came in by a host interface has to have a route of Calico's: the API server may have none."""
    found = changed("backends", 0, addr="203.0.113.7")
    assert kinds(walk.walk(PACKET, found)) == [walk.NO_ROUTE]
    for sender in ("10.65.0.2", "10.10.0.1"):
        told = verdict(walk.Packet(sender, 0, "10.10.0.1", 30080, "tcp"), found)
        assert "1 of 2 new connections: routed to 203.0.113.7:8080 by the host" in told
    host = walk.Tables(**{**vars(changed("backends", 1, addr="10.10.0.2")), "routes": [
        *tables().routes, {"cidr": "10.10.0.2/32", "flags": ["host"], "next_hop": "0.0.0.0"}]})  # fmt: skip
    assert "forwarded in Calico's VXLAN to node 10.10.0.2, for 10.10.0.2:8080" in verdict(PACKET, host)
    overlay = changed("interfaces", 0, name="vxlan.calico", flags=["vxlan", "v4Ready"])
    inner = walk.Packet("10.10.0.100", 0, "10.10.0.1", 30080, "tcp", "vxlan.calico")
    assert "forwarded by the host's routes, for 10.65.1.2:8080" in verdict(inner, overlay)


def test_blackholes_come_before_policy() -> None:
    rejecting = [*tables().routes[:3], {"cidr": "10.96.0.0/12", "flags": ["blackhole-reject"], "next_hop": "0.0.0.0"}]
    packet = walk.Packet("10.65.0.2", 0, "10.96.0.1", 80, "tcp")
    unset = walk.Tables(**{**vars(changed("interfaces", 1, ingress_v4=4)), "programs": {"cali_jump_ing": {}},
                           "routes": rejecting})  # fmt: skip
    assert verdict(packet, unset) == (
        "refused with an ICMP error, BLACK_HOLE: a service address without a service (no frontend)"
    )


@pytest.mark.parametrize(
    ("flag", "src", "broken"),
    [
        ("internal-local", "10.65.0.2", [walk.NO_BACKEND]),
        ("internal-local", "10.10.0.100", []),
        ("external-local", "10.65.0.2", []),
    ],
)
def test_local_only_depends_on_where_the_packet_is_from(flag: str, src: str, broken: list[str]) -> None:
    packet = walk.Packet(src, 4000, "10.10.0.1", 30080, "tcp")
    assert kinds(walk.walk(packet, changed("frontends", 0, local=0, flags=[flag]))) == broken


def test_a_pod_may_send_from_its_own_addresses_only() -> None:
    own = walk.Packet("10.65.0.2", 4000, "10.10.0.1", 30080, "tcp", "cali1")
    assert kinds(walk.walk(own, tables())) == []
    assert "forwarded by the host's routes, for 10.65.1.2:8080" in verdict(own, tables())
    for source in ("10.65.1.2", "192.0.2.9"):
        other = walk.Packet(source, 4000, "10.10.0.1", 30080, "tcp", "cali1")
        assert verdict(other, tables()) == "dropped, and no counter tells it (not an address of this pod)"
        allowed = tables(spoofing=[{"interface": "cali1", "cidr": "0.0.0.0/0"}])
        assert kinds(walk.walk(other, allowed)) == []
        elsewhere = tables(spoofing=[{"interface": "cali2", "cidr": "0.0.0.0/0"}])
        assert kinds(walk.walk(other, elsewhere)) == [walk.SPOOFED]


def test_policy_programs() -> None:
    at = {"cali_jump_ing": {5: 77}, "cali_jump_egr": {6: 78}}
    wanted = {"ingress_v4": -1, "egress_v4": 6}
    whole = walk.Tables(**{**vars(changed("interfaces", 1, **wanted)), "programs": at})
    assert found_by("policy", whole) == [
        ("policy", "program 77 at 5 of cali_jump_ing decides"),
        ("policy", "program 78 at 6 of cali_jump_egr decides"),
    ]
    for index, told, broken in (
        (7, "cali_jump is empty at 7", [walk.NO_POLICY]),
        (-1, "not known: ifstate names none", []),
    ):
        rows = changed("interfaces", 1, egress_v4=index)
        lost = walk.Tables(**{**vars(rows), "programs": {"cali_jump": {}}})
        assert found_by("policy", lost) == [("policy", "none: everything is allowed"), ("policy", told)]
        assert kinds(walk.walk(PACKET, lost)) == broken
    netkit = {"cali_jump_ing": {5: 77}, "cali_jump_egr": {}, "cali_j_nk_egr": {6: 79}}
    other = walk.Tables(**{**vars(changed("interfaces", 1, **wanted)), "programs": netkit})
    assert found_by("policy", other)[1] == ("policy", "program 79 at 6 of cali_j_nk_egr decides")
    empty = {**vars(changed("interfaces", 1, egress_v4=7)), "programs": {"cali_jump": {}}}
    steps = walk.walk(walk.Packet("10.10.0.1", 0, "10.65.0.2", 8080, "tcp"), walk.Tables(**empty))
    assert [step.found for step in steps if step.lookup == "policy"] == [
        "not asked: pods are always open to their own host"
    ]
    assert kinds(steps) == []
    out = walk.Packet("10.65.0.2", 4000, "10.10.0.1", 30080, "tcp", "cali1")
    unset = walk.Tables(**{**vars(changed("interfaces", 1, ingress_v4=4)), "programs": at})
    assert kinds(walk.walk(out, unset)) == [walk.NO_POLICY]


def test_a_connection_that_is_older_than_the_service() -> None:
    old = entry("normal", "10.10.0.1", port_a=30080)
    assert kinds(walk.walk(PACKET, tables(conntrack=[old]))) == [walk.DISAGREE]
    assert verdict(PACKET, tables(conntrack=[old])).startswith("not translated, and sent to 10.10.0.1:30080 as before")
    assert kinds(walk.walk(PACKET, tables(conntrack=[old], frontends=[]))) == []
    for members in ({"flags": ["nat-exclude"]}, {"drop": True}, {"count": 0}):
        found = walk.Tables(**{**vars(changed("frontends", 0, **members)), "conntrack": [old]})
        assert kinds(walk.walk(PACKET, found)) == []
    reply = walk.Packet("10.10.0.1", 30080, "10.10.0.100", 4000, "tcp")
    assert kinds(walk.walk(reply, tables(conntrack=[old]))) == []


def test_a_pod_s_packet_to_its_own_host() -> None:
    packet = walk.Packet("10.65.0.2", 0, "10.10.0.1", 22, "tcp")
    assert "dropped when defaultEndpointToHostAction is Drop" in verdict(packet, tables())


def test_maglev_and_excluded_services() -> None:
    rows = [{"id": 1, "ordinal": n, "addr": "10.65.0.2", "port": 8080} for n in range(3)]
    whole = walk.Tables(**{**vars(changed("frontends", 0, flags=["maglev"])), "maglev": rows})
    assert verdict(PACKET, whole) == "delivered to 10.65.0.2:8080 by cali1"
    empty = changed("frontends", 0, flags=["maglev"])
    assert verdict(PACKET, empty) == "dropped, MAGLEV_NO_BACKEND (frontend without backend)"
    excluded = changed("frontends", 0, flags=["nat-exclude"])
    assert verdict(PACKET, excluded) == "not translated, and left to the host, for 10.10.0.1:30080"
    service = walk.Packet("10.65.0.2", 4000, "10.96.0.10", 30080, "tcp")
    local = changed("frontends", 0, flags=["nat-exclude"], addr="10.96.0.10")
    assert verdict(service, local) == "not translated, and left to the host, for 10.96.0.10:30080"
    # Maglev is for clients outside, and knows no traffic policy.
    flags = ["maglev", "external-local"]
    nowhere = walk.Tables(**{**vars(changed("frontends", 0, flags=flags, local=0)), "maglev": rows})
    assert verdict(PACKET, nowhere) == "delivered to 10.65.0.2:8080 by cali1"
    inside = walk.Packet("10.65.0.2", 4000, "10.10.0.1", 30080, "tcp")
    assert "maglev" not in [step.lookup for step in walk.walk(inside, whole)]
    assert "another node" in verdict(
        walk.Packet("10.10.0.100", 0, "10.10.0.2", 22, "tcp"),
        tables(routes=[{"cidr": "10.10.0.2/32", "flags": ["host"], "next_hop": "0.0.0.0"}]),
    )


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({}, "source becomes 10.10.0.1:30080, sent to 10.10.0.100:4000"),
        (
            {"tun_ip": "10.10.0.2"},
            "source becomes 10.10.0.1:30080, tunnelled back to node 10.10.0.2, "
            "with DSR sent straight to 10.10.0.100:4000",
        ),
        (
            {"tun_ip": "10.10.0.2", "flags": ["np-fwd"]},
            "source becomes 10.10.0.1:30080, sent to 10.10.0.100:4000",
        ),
    ],
)
def test_the_reply_of_a_connection_with_nat(members: dict[str, Any], wanted: str) -> None:
    reply = walk.Packet("10.65.0.2", 8080, "10.10.0.100", 4000, "tcp")
    assert verdict(reply, tables(conntrack=[entry("nat-rev", "10.65.0.2", **members)])) == wanted


def test_tracked_requests_and_expiry() -> None:
    late = {"age_ns": 21 * 10**9}
    both = [entry("nat-fwd", "10.65.0.2"), entry("nat-rev", "10.65.0.2", **late)]
    assert found_by("conntrack", tables(conntrack=both)) == [
        ("conntrack", "nat-fwd to 10.65.0.2:8080, ESTABLISHED, expired")
    ]
    lost = walk.walk(PACKET, tables(conntrack=both, frontends=[]))
    assert kinds(lost) == [walk.DISAGREE]
    assert "no frontend" in lost[-2].found
    inside = walk.Packet("10.10.0.100", 4000, "10.65.0.2", 8080, "tcp")
    opened_by_a = entry("normal", "10.65.0.2", **{"from": "a"})
    assert verdict(inside, tables(conntrack=[opened_by_a])) == "delivered to 10.65.0.2:8080 by cali1"
    ends = {"port_a": 30000, "addr_b": "10.65.0.2", "port_b": 8080}
    masked = [{**entry("nat-fwd", "10.10.0.1"), **{f"rev_{name}": value for name, value in ends.items()}},
              entry("nat-rev", "10.10.0.1", **{"from": "a", **ends})]  # fmt: skip
    assert verdict(PACKET, tables(conntrack=masked)) == "delivered to 10.65.0.2:8080 by cali1"
    resets = [entry("nat-fwd", "10.65.0.7"), entry("nat-rev", "10.65.0.7", flags=["send-rst"])]
    assert verdict(PACKET, tables(conntrack=resets)) == "answered with a TCP RST (stale conntrack)"
    gone = entry("normal", "10.96.0.9", **{"from": "b", "port_a": 8080})
    dead = walk.Packet("10.10.0.100", 4000, "10.96.0.9", 8080, "tcp")
    assert verdict(dead, tables(conntrack=[gone])) == "dropped, BLACK_HOLE (blackhole)"
    tunnelled = [entry("nat-fwd", "10.65.1.2"), entry("nat-rev", "10.65.1.2", tun_ip="10.10.0.7")]
    assert verdict(PACKET, tables(conntrack=tunnelled)).startswith("forwarded in Calico's VXLAN to node 10.10.0.7")


def test_ipv6() -> None:
    front = {"addr": "fd00::1", "port": 80, "proto": "udp", "id": 1, "count": 1, "local": 1, "affinity_s": 0,
             "flags": [], "drop": False, "source": None}  # fmt: skip
    found = walk.Tables(
        frontends=[front],
        backends=[{"id": 1, "ordinal": 0, "addr": "fd00:65::2", "port": 8080}],
        routes=[
            {"cidr": "fd00::1/128", "flags": ["local", "host"], "next_hop": "::"},
            {"cidr": "fd00:65::2/128", "flags": ["local", "workload"], "ifindex": 3, "interface": "cali1"},
        ],
        interfaces=[{"ifindex": 3, "name": "cali1", "flags": ["workload", "v6Ready"]}],
    )
    packet = walk.Packet("fd00::100", 0, "fd00::1", 80, "udp")
    assert verdict(packet, found) == "delivered to [fd00:65::2]:8080 by cali1"
    v4 = [{"ifindex": 3, "name": "cali1", "flags": ["workload", "v4Ready"]}]
    assert verdict(packet, walk.Tables(**{**vars(found), "interfaces": v4})) == (
        "dropped until Felix has attached its programs to cali1 (no ifstate)"
    )


def test_services_differ_by_backends_not_by_ids() -> None:
    here, there = tables(), changed("frontends", 0, id=2, count=1)
    same = tables(
        frontends=[{**here.frontends[0], "id": 9}], backends=[{**each, "id": 9} for each in here.backends[:2]]
    )
    assert list(mapdiff.differences("service", mapdiff.services(here), mapdiff.services(same))) == []
    (found,) = mapdiff.differences("service", mapdiff.services(here), mapdiff.services(there))
    assert (found["key"], found["a"]["backends"], found["b"]["backends"]) == (
        *("10.10.0.1:30080/tcp", ["10.65.0.2:8080", "10.65.1.2:8080"], ["10.65.1.9:8080"]),
    )
    ranged = mapdiff.services(changed("frontends", 0, drop=True, source="10.0.0.0/8"))
    assert ranged == {
        "10.10.0.1:30080/tcp from 10.0.0.0/8": {"backends": [], "flags": [], "affinity_s": 0, "drop": True},
    }


def test_a_nodeport_of_each_node_is_one_service() -> None:
    sides = []
    for address, backends in (("10.10.0.1", 2), ("10.10.0.2", 1)):
        local = [
            {"cidr": cidr, "flags": ["local", "host"]} for cidr in ("127.0.0.0/8", "127.0.0.1/32", f"{address}/32")
        ]
        (front,) = tables().frontends
        fronts = [{**front, "addr": address, "count": backends}, {**front, "addr": "10.96.0.10"}]
        found = tables(frontends=fronts, routes=[*local, {"cidr": "10.65.0.0/26", "flags": ["workload"]}])
        own = mapdiff.own_addresses(found)
        assert own == {address}
        sides.append(mapdiff.services(found, own))
    (differs,) = mapdiff.differences("service", *sides)
    assert (differs["key"], len(differs["a"]["backends"]), len(differs["b"]["backends"])) == (
        *("this node:30080/tcp", 2, 1),
    )


def test_entries_and_rates() -> None:
    rows = mapdiff.entries("routes", tables().routes)
    bases = ("routes", "counters", "fsafes")
    assert [mapdiff.compared(base, nodes=False) for base in bases] == [True, False, True]
    assert [mapdiff.compared(base, nodes=True) for base in bases] == [False, False, True]
    del rows["10.10.0.1/32"]
    (gone,) = mapdiff.differences("routes", mapdiff.entries("routes", tables().routes), rows)
    assert (gone["key"], gone["b"]) == ("10.10.0.1/32", None)
    place = {"interface": "eth0", "hook": "tc ingress"}
    before, after = ({**place, "counters": {"SHORT": a, "BYPASS": b, "X": 1}} for a, b in ((1, 9), (5, 2)))
    assert [(e["key"], e["packets"], e["per_second"]) for e in mapdiff.rates([before], [after], 2)] == [
        ("eth0 tc ingress SHORT", 4, 2.0),
        ("eth0 tc ingress BYPASS", 2, 1.0),
    ]
    assert [e["per_second"] for e in mapdiff.rates([before], [after], 0)] == [None, None]
