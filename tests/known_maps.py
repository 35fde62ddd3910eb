"""One entry of every version of Calico's maps, its bytes put where Calico's headers have them, and what it means.

The offsets are written out here by hand, after calico felix/bpf and felix/bpf-gpl, v3.13 to master: nothing is taken
from the tables that they test. Numbers have a different value in each of their bytes, so that a wrong order shows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

HASH, PERCPU_HASH, LRU_HASH, LPM_TRIE = 1, 5, 9, 11


@dataclass(frozen=True)
class Known:
    """An entry. *subject*: the command that shows it. *meaning*: a part of what ``dump -j`` says of it."""

    subject: str
    name: str
    map_type: int
    key: bytes
    value: bytes
    meaning: dict[str, Any]

    @property
    def ipv6(self) -> bool:
        """Whether it needs ``-6``."""
        return "_v6_" in self.name


def at(size: int, *parts: tuple[int, bytes]) -> bytes:
    """Bytes at their offsets, all else zero."""
    raw = bytearray(size)
    for offset, each in parts:
        assert offset + len(each) <= size
        raw[offset : offset + len(each)] = each
    return bytes(raw)


def u16(number: int) -> bytes:
    """Little-endian."""
    return struct.pack("<H", number)


def u32(number: int) -> bytes:
    """Little-endian."""
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    """Little-endian."""
    return struct.pack("<Q", number)


def s32(number: int) -> bytes:
    """Little-endian."""
    return struct.pack("<i", number)


def ip(text: str) -> bytes:
    """In network order."""
    return ip_address(text).packed


FIRST, LAST, SEQNO = 0x0102030405060708, 0x1112131415161718, 0x21222324
POD, CLIENT, NODE, PEER = {4: "10.65.1.2", 6: "fd65::2"}, {4: "10.10.0.100", 6: "fd99::9"}, {
    4: "10.10.0.1", 6: "fd00::1"}, {4: "10.10.0.2", 6: "fd00::2"}  # fmt: skip


def _conntrack_key(family: int, port_a: int, end_a: dict[int, str]) -> bytes:
    wide = {4: 4, 6: 16}[family]
    return at(8 + 2 * wide, (0, u32(6)), (4, ip(end_a[family])), (4 + wide, ip(CLIENT[family])),
              (4 + 2 * wide, u16(port_a)), (6 + 2 * wide, u16(40001)))  # fmt: skip


def _conntrack(version: int, family: int, offsets: dict[str, int], size: int) -> list[Known]:
    """A reverse and a forward entry. *offsets*: of the members that the versions have at different places."""
    leg = {1: 8, 2: 12}.get(version, 24)
    name = f"cali_v{family}_ct{version if version > 1 else ''}"
    head = ((0, u64(FIRST)), (8, u64(LAST)))
    legs: list[tuple[int, bytes]] = []
    wanted: dict[str, dict[str, Any]] = {}
    for index, (end, bits, words) in enumerate((
        ("ab", 0x11, ["syn", "approved"]), ("ba", 0x33, ["syn", "ack", "approved", "opener"]),
    )):  # fmt: skip
        where = 24 + index * leg
        wanted[end] = {"seqno": SEQNO + index, "flags": words}
        if leg == 24:
            wanted[end] |= {"bytes": FIRST + index, "packets": 0x31323334 + index}
            legs += [(where, u64(FIRST + index)), (where + 8, u32(0x31323334 + index))]
            where += 12
        legs += [(where, struct.pack(">I", SEQNO + index)), (where + 4, u32(bits))]
        if leg > 8:
            wanted[end] |= {"ifindex": 0x0A0B + index, "interface": f"ifindex {0x0A0B + index}"}
            legs.append((where + 8, u32(0x0A0B + index)))
    meaning: dict[str, Any] = {
        "proto": "tcp", "addr_a": POD[family], "port_a": 8080, "addr_b": CLIENT[family], "port_b": 40001,
        "type": "nat-rev", "created_or_rst_ns": FIRST, "last_seen_ns": LAST, "from": "b", "state": "SYN-SENT",
        "timeout": "tcpSynSent", **wanted,
    }  # fmt: skip
    flags: list[tuple[int, bytes]] = [(17, b"\x44")]
    meaning["flags"] = ["np-fwd", "ext-local"]
    if leg == 24:
        flags += [(23, b"\x81"), (18, b"\x02"), (19, b"\x80")]
        meaning["flags"] = ["np-fwd", "ext-local", "B-A", "dscp", "send-rst", "0x80000000"]
    texts = {"orig_dst": NODE[family], "orig_src": CLIENT[family], "tun_ip": PEER[family]}
    numbers = {"orig_dport": 30080, "orig_sport": 40002}
    rest = [(offsets[key], ip(text)) for key, text in texts.items() if key in offsets]
    rest += [(offsets[key], u16(number)) for key, number in numbers.items() if key in offsets]
    meaning |= {key: each for key, each in {**texts, **numbers}.items() if key in offsets}
    kind = LRU_HASH if version == 4 else HASH
    reverse = _conntrack_key(family, 8080, POD)
    back = at(size, *head, (16, b"\2"), *flags, *legs, *rest)
    there = at(size, *head, (16, b"\1"), (24, reverse), (24 + len(reverse), u16(40002)))
    forward = {
        "type": "nat-fwd", "flags": [], "from": "b", "addr_a": NODE[family], "port_a": 30080, "rev_addr_a": POD[family],
        "rev_port_a": 8080, "rev_addr_b": CLIENT[family], "rev_port_b": 40001, "nat_sport": 40002,
    }  # fmt: skip
    return [
        Known("conntrack", name, kind, reverse, back, meaning),
        Known("conntrack", name, kind, _conntrack_key(family, 30080, NODE), there, forward),
    ]


def _tables() -> list[Known]:
    found = [
        *_conntrack(1, 4, {"orig_dst": 40, "orig_dport": 44, "tun_ip": 48}, 56),
        *_conntrack(2, 4, {"orig_dst": 48, "orig_dport": 52, "orig_sport": 54, "tun_ip": 56, "orig_src": 60}, 64),
    ]
    for version in (3, 4):
        places4 = {"tun_ip": 72, "orig_dst": 76, "orig_dport": 80, "orig_sport": 82, "orig_src": 84}
        places6 = {"tun_ip": 72, "orig_dst": 88, "orig_dport": 104, "orig_sport": 106, "orig_src": 108}
        found += [*_conntrack(version, 4, places4, 88), *_conntrack(version, 6, places6, 128)]
    counts = ((0, u32(0x01020304)), (4, u32(2)), (8, u32(1)), (12, u32(10800)))
    front = {"port": 30080, "proto": "tcp", "id": 0x01020304, "count": 2, "local": 1, "affinity_s": 10800}
    key4 = at(16, (0, u32(80)), (4, ip(NODE[4])), (8, u16(30080)), (10, b"\6"), (11, ip("198.51.100.0")))
    key6 = at(40, (0, u32(200)), (4, ip(NODE[6])), (20, u16(30080)), (22, b"\6"), (23, ip("2001:db8::")))
    plain = at(8, (0, ip(NODE[4])), (4, u16(30080)), (6, b"\6"))
    flagged = ["external-local", "maglev"]
    found += [
        Known("nat", "cali_v4_nat_fe", HASH, plain, at(16, *counts), {**front, "addr": NODE[4], "source": None}),
        Known("nat", "cali_v4_nat_fe2", LPM_TRIE, key4, at(16, *counts),
              {**front, "addr": NODE[4], "source": "198.51.100.0/24", "flags": []}),
        Known("nat", "cali_v4_nat_fe3", LPM_TRIE, key4, at(20, *counts, (16, u32(9))),
              {**front, "addr": NODE[4], "source": "198.51.100.0/24", "flags": flagged}),
        Known("nat", "cali_v6_nat_fe3", LPM_TRIE, key6, at(20, *counts, (16, u32(9))),
              {**front, "addr": NODE[6], "source": "2001:db8::/48", "flags": flagged}),
    ]  # fmt: skip
    for family, size in ((4, 8), (6, 20)):
        wide = size - 4
        backend = at(size, (0, ip(POD[family])), (wide, u16(8080)))
        ordinal = at(8, (0, u32(0x01020304)), (4, u32(3)))
        shown = {"id": 0x01020304, "ordinal": 3, "addr": POD[family], "port": 8080}
        found += [
            Known("nat", f"cali_v{family}_nat_be", HASH, ordinal, backend, shown),
            Known("maglev", f"cali_v{family}_mglv2", HASH, ordinal, backend, shown),
            Known("arp", f"cali_v{family}_arp2", LRU_HASH, at(wide + 4, (0, ip(PEER[family])), (wide, u32(0x0203))),
                  bytes(range(1, 13)), {"addr": PEER[family], "ifindex": 0x0203, "mac_src": "01:02:03:04:05:06",
                                        "mac_dst": "07:08:09:0a:0b:0c"}),
            Known("routes", f"cali_v{family}_routes", LPM_TRIE, at(wide + 4, (0, u32(8 * wide)), (4, ip(POD[family]))),
                  at(wide + 4, (0, u32(0x80C)), (4, u32(0x01020304))),
                  {"cidr": f"{POD[family]}/{8 * wide}", "flags": ["workload", "local", "skip-ingress-redir"],
                   "ifindex": 0x01020304}),
            Known("routes", f"cali_v{family}_routes", LPM_TRIE, at(wide + 4, (0, u32(8)), (4, ip(POD[family])[:1])),
                  at(wide + 4, (0, u32(0x27)), (4, ip(PEER[family]))),
                  {"flags": ["in-pool", "nat-out", "workload", "same-subnet"], "next_hop": PEER[family]}),
            Known("failsafes", f"cali_v{family}_fsafes2", LPM_TRIE,
                  at(8 + wide, (0, u32(40)), (4, u16(2379)), (6, b"\x11\1"), (8, ip(POD[family])[:1])), u32(1),
                  {"proto": "udp", "port": 2379, "direction": "outbound",
                   "cidr": f"{ip_address(ip(POD[family])[:1] + bytes(wide - 1))}/8"}),
            Known("ipsets", f"cali_v{family}_ip_sets", LPM_TRIE,
                  at(16 + wide, (0, u32(88 + 8 * wide)), (4, struct.pack(">Q", FIRST)), (12, ip(POD[family])),
                     (12 + wide, u16(8080)), (14 + wide, b"\6")), u32(1),
                  {"set_id": hex(FIRST), "addr": POD[family], "port": 8080, "proto": "tcp"}),
            Known("ipsets", f"cali_v{family}_ip_sets", LPM_TRIE,
                  at(16 + wide, (0, u32(72)), (4, struct.pack(">Q", FIRST)), (12, ip(POD[family])[:1])), u32(1),
                  {"set_id": hex(FIRST), "cidr": f"{ip_address(ip(POD[family])[:1] + bytes(wide - 1))}/8"}),
            Known("spoofing", f"cali_v{family}_sprefix", LPM_TRIE,
                  at(8 + wide, (0, u32(40)), (4, u32(0x0203)), (8, ip(POD[family])[:1])), u32(1),
                  {"ifindex": 0x0203, "cidr": f"{ip_address(ip(POD[family])[:1] + bytes(wide - 1))}/8"}),
            Known("connect-time", f"cali_v{family}_srmsg", LRU_HASH,
                  at({4: 16, 6: 32}[family], (0, u64(FIRST)), (8, ip(POD[family])), (8 + wide, b"\x1f\x90")),
                  at(wide + 4, (0, ip(NODE[family])), (wide, b"\x75\x80")),
                  {"cookie": FIRST, "addr": POD[family], "port": 8080, "orig_dst": NODE[family], "orig_dport": 30080}),
            Known("connect-time", f"cali_v{family}_ct_nats", LRU_HASH,
                  at({4: 24, 6: 32}[family], (0, u64(FIRST)), (8, ip(POD[family])), (8 + wide, b"\x1f\x90"),
                     (12 + wide, b"\6")), at(wide + 4, (0, ip(NODE[family])), (wide, b"\x75\x80")),
                  {"cookie": FIRST, "proto": "tcp", "port": 8080, "orig_dst": NODE[family], "orig_dport": 30080}),
        ]  # fmt: skip
        affinity = {4: (16, 6, 8, 16, 8), 6: (40, 18, 20, 32, 24)}[family]
        found.append(Known(
            "affinity", f"cali_v{family}_nat_aff", LRU_HASH,
            at(affinity[0], (0, ip(NODE[family])), (wide, u16(30080)), (affinity[1], b"\6"),
               (affinity[2], ip(CLIENT[family]))),
            at(affinity[3], (0, ip(POD[family])), (wide, u16(8080)), (affinity[4], u64(LAST))),
            {"addr": NODE[family], "port": 30080, "proto": "tcp", "client": CLIENT[family], "backend": POD[family],
             "backend_port": 8080, "ts_ns": LAST},
        ))  # fmt: skip
        key = _conntrack_key(family, 8080, POD)
        for suffix in ("", "2"):
            found.append(Known(
                "cleanup-queue", f"cali_v{family}_ccq{suffix}", HASH, _conntrack_key(family, 30080, NODE),
                key + u64(FIRST) + u64(LAST),
                {"port_a": 30080, "rev_addr_a": POD[family], "rev_port_a": 8080, "rev_addr_b": CLIENT[family],
                 "rev_port_b": 40001, "last_seen_ns": FIRST, "rev_last_seen_ns": LAST},
            ))  # fmt: skip
    found.append(Known("failsafes", "cali_v4_fsafes", HASH, at(4, (0, u16(2379)), (2, b"\x11\1")), u32(1),
                       {"proto": "udp", "port": 2379, "direction": "outbound"}))  # fmt: skip
    state = (4, b"cali1a2b3c4d5e6")
    indices = {name: number for number, name in enumerate(
        ("xdp_v4", "ingress_v4", "egress_v4", "xdp_v6", "ingress_v6", "egress_v6", "filter_in", "filter_eg"), -1
    )}  # fmt: skip
    for suffix, size, flags, words in (
        ("2", 20, 3, ["workload", "ready"]), ("3", 44, 7, ["workload", "v4Ready", "v6Ready"]),
        ("4", 52, 0x408, ["host", "notmanaged"]),
    ):  # fmt: skip
        here = dict(list(indices.items())[: (size - 20) // 4])
        parts = [(20 + 4 * place, s32(number)) for place, number in enumerate(here.values())]
        found.append(Known("ifstate", f"cali_iface{suffix}", HASH, u32(0x01020304),
                           at(size, (0, u32(flags)), state, *parts),
                           {"ifindex": 0x01020304, "name": "cali1a2b3c4d5e6", "flags": words, **here}))  # fmt: skip
    where = {"ifindex": 0x0203, "hook": "tc egress"}
    for version, count in ((2, 14), (3, 17), (5, 25), (6, 26), (6, 27)):
        cells = b"".join(u64(FIRST + index) for index in range(count))
        found.append(Known("counters", f"cali_counters{version}", PERCPU_HASH, u32(0x0203) + u32(1), cells, where))
    found += [
        Known("policy", "cali_rule_ctrs2", PERCPU_HASH, u64(FIRST), u64(LAST), {"rule_id": FIRST, "packets": LAST}),
        Known("profiling", "cali_profiling2", PERCPU_HASH, u32(0x0203) + u32(3), u64(FIRST) + u64(4),
              {"ifindex": 0x0203, "kind": "egress est", "total_ns": FIRST, "samples": 4}),
        Known("qos", "cali_qos", HASH, u32(0x0203) + u32(1), at(24, (4, u16(0x0102)), (16, u64(LAST))),
              {"ifindex": 0x0203, "ingress": 1, "rate": 0x0102, "last_update_ns": LAST}),
        Known("qos", "cali_qos2", HASH, u32(0x0203) + u16(0) + u16(4), at(32, (24, u32(0x0102)), (28, u32(5))),
              {"ingress": 0, "family": 4, "most": 0x0102, "current": 5}),
        Known("qos", "cali_qos2", HASH, u32(0x0203) + u16(1) + u16(6),
              at(24, (4, u16(0x0102)), (6, u16(0x0304)), (8, u16(0x0506)), (16, u64(LAST))),
              {"ifindex": 0x0203, "ingress": 1, "family": 6, "rate": 0x0102, "burst": 0x0304, "tokens": 0x0506,
               "last_update_ns": LAST}),
        Known("qos", "cali_qos_conn", HASH, u32(0x0203) + u16(1) + u16(4),
              at(12, (4, u32(FIRST & 0xFFFFFFFF)), (8, u32(5))),
              {"family": 4, "most": FIRST & 0xFFFFFFFF, "current": 5}),
    ]  # fmt: skip
    for suffix in ("2", "3"):
        found.append(Known("fragments", f"cali_v4_frags{suffix}", LRU_HASH,
                           ip(CLIENT[4]) + ip(NODE[4]) + b"\x12\x34" + u16(0x0203),
                           at(1512, (0, b"\1"), (2, u16(1480))),
                           {"src": CLIENT[4], "dst": NODE[4], "id": 0x1234, "offset": 0x0203, "len": 1480},
                           ))  # fmt: skip
    for suffix in ("2", "3", "4"):
        found.append(Known("fragments", f"cali_v4_frgfwd{suffix}", LRU_HASH,
                           at(16, (0, ip(CLIENT[4])), (4, ip(NODE[4])), (8, u32(0x0203)), (12, b"\x12\x34")),
                           at(32, (16, u16(40001)), (18, u16(30080)), (20, u32(0x03300000)), (24, u32(7))),
                           {"src": CLIENT[4], "ifindex": 0x0203, "id": 0x1234, "sport": 40001, "dport": 30080,
                            "marks": 0x03300000}))  # fmt: skip
    return found


KNOWN = _tables()
