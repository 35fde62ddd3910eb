"""Calico's reason codes: index in the counters map and number in ``Final result=DENY (n)``.

Source: felix/bpf-gpl/reasons.h and counters.h, v3.24 to master. v3.13 to v3.23 have other numbers.
The number of counters in the map tells the release: 14 (v3.24-v3.29), 17 (v3.30), 25 (v3.31), 26 (v3.32),
27 (master).
"""

from __future__ import annotations

REASONS = {
    0: "UNKNOWN",
    1: "ACCEPTED_BY_FAILSAFE",
    2: "ACCEPTED_BY_POLICY",
    3: "BYPASS",
    4: "DROPPED_BY_POLICY",
    5: "SHORT",
    6: "CSUM_FAIL",
    7: "IP_OPTIONS",
    8: "IP_MALFORMED",
    9: "ENCAP_FAIL",
    10: "DECAP_FAIL",
    11: "UNAUTH_SOURCE",
    12: "RT_UNKNOWN",
    13: "BLACK_HOLE",
    14: "SOURCE_COLLISION",
    15: "SOURCE_COLLISION_FAILED",
    16: "CT_CREATE_FAILED",
    17: "REDIRECT",
    18: "REDIRECT_NEIGH",
    19: "REDIRECT_PEER",
    20: "FRAG_WAIT",
    21: "FRAG_REORDER",
    22: "FRAG_UNSUPPORTED",
    23: "DROPPED_BY_QOS",
    24: "RESERVED1",
    25: "MAGLEV_NO_BACKEND",
    26: "NO_HOST_IP",
}
CODES = {name: code for code, name in REASONS.items()}
# Codes behind the counters move with every release: the count of counters says where they begin.
_BEHIND = ("ACCEPTED_BY_XDP", "WEP_NOT_READY", "NATIFACE")
_COUNTERS = (14, 17, 25, 26, 27)
# v3.29 moved them by one without another counter: 15 is NATIFACE before it and WEP_NOT_READY in it, so it has no
# name here. Only drops are named, and ACCEPTED_BY_XDP is none.
_BEHIND_14 = {14: "WEP_NOT_READY", 16: "NATIFACE"}
# Behind those that all releases share, by the base in which a release prints them. Two releases of one base may differ:
# 15 (v3.25-v3.28, v3.29), 26 (v3.31, master), 27 and 28 (v3.31, v3.32, master) have no name.
_DENIED = {
    16: {13: "BLACK_HOLE", 14: "WEP_NOT_READY", 16: "NATIFACE"},
    10: {
        **{code: each for code, each in REASONS.items() if code in (13, 15, 16, 20, 21, 22, 23, 25)},
        18: "WEP_NOT_READY",
        19: "NATIFACE",
        29: "NATIFACE",
    },
}
# v3.13 to v3.23, which print them in hexadecimal; no counters map goes with them. v3.24 keeps their short tags and
# has today's numbers: 6 could be either.
OLD_REASONS = {
    0x01: "SHORT",
    0x06: "V6_WORKLOAD or CSUM_FAIL",
    0x0E: "WEP_NOT_READY",  # v3.24
    0x1C: "ICMP_DF",
    0xBE: "DROPPED_BY_POLICY",
    0xC0: "CT",
    0xC1: "CT_NAT",
    0xCF: "CSUM_FAIL",
    0xD0: "DNT",
    0xD1: "PREDNAT",
    0xDF: "DECAP_FAIL",
    0xEA: "NOT_IP",
    0xEB: "IP_OPTIONS",
    0xEC: "IP_MALFORMED",
    0xED: "UNAUTH_SOURCE",
    0xEF: "ENCAP_FAIL",
    0xFA: "FAILSAFE",
    0xDEAD: "RT_UNKNOWN",
}
TOTAL = "TOTAL_PACKETS"  # of an interface's hook: the first thing that the main program counts
# As `calico-node -bpf counters dump` shows them: category and type. Source: felix/bpf/counters/counters.go.
CAPTIONS = {
    TOTAL: ("Total", "packets"),
    "ACCEPTED_BY_FAILSAFE": ("Accepted", "by failsafe"),
    "ACCEPTED_BY_POLICY": ("Accepted", "by policy"),
    "BYPASS": ("Accepted", "by another program"),
    "DROPPED_BY_POLICY": ("Dropped", "by policy"),
    "SHORT": ("Dropped", "too short packets"),
    "CSUM_FAIL": ("Dropped", "incorrect checksum"),
    "IP_OPTIONS": ("Dropped", "packets with unsupported IP options"),
    "IP_MALFORMED": ("Dropped", "malformed IP packets"),
    "ENCAP_FAIL": ("Dropped", "failed encapsulation"),
    "DECAP_FAIL": ("Dropped", "failed decapsulation"),
    "UNAUTH_SOURCE": ("Dropped", "packets with unknown source"),
    "RT_UNKNOWN": ("Dropped", "packets with unknown route"),
    "BLACK_HOLE": ("Dropped", "packets hitting blackhole route"),
    "SOURCE_COLLISION": ("Other", "packets hitting NAT source collision"),
    "SOURCE_COLLISION_FAILED": ("Dropped", "NAT source collision resolution failed"),
    "CT_CREATE_FAILED": ("Dropped", "failed to create conntrack"),
    "REDIRECT": ("Redirect", "plain"),
    "REDIRECT_NEIGH": ("Redirect", "neigh"),
    "REDIRECT_PEER": ("Redirect", "peer"),
    "FRAG_WAIT": ("Dropped", "fragment of yet incomplete packet"),
    "FRAG_REORDER": ("Dropped", "fragment out of order within host"),
    "FRAG_UNSUPPORTED": ("Dropped", "fragments not supported"),
    "DROPPED_BY_QOS": ("Dropped", "QoS control limit"),
    "MAGLEV_NO_BACKEND": ("Dropped", "Maglev lookup found no backends for service IP"),
    "NO_HOST_IP": ("Dropped", "VXLAN encap when host IP unknown"),
}
DROPS = frozenset(name for name, (category, _) in CAPTIONS.items() if category == "Dropped")
COLLISION, NOT_CREATED = "SOURCE_COLLISION_FAILED", "CT_CREATE_FAILED"  # what fails for a collision is counted as both
# What UNAUTH_SOURCE means, where more than the reason is known.
NOT_IN_SOURCE_RANGES = "the source is not in the service's source ranges"
VXLAN_OF_NO_NODE = "VXLAN from a source that is no known node, or with a checksum"
IPIP_OF_NO_NODE = "IPIP from or to a host that is no known node"
IPIP_OF_A_POD = "a pod sends IPIP"
WIREGUARD_OF_NO_NODE = (
    "UDP to WireGuard's port from a source that is no known node; v3.32 drops it also where WireGuard is not Calico's "
    "(projectcalico/calico#12900)"
)
WIREGUARD_PORTS = (51820, 51821)  # by default, of IPv4 and IPv6
# In words that a user understands.
MEANING = {
    "DROPPED_BY_POLICY": "denied by policy",
    "SHORT": "the packet is too short",
    "CSUM_FAIL": "wrong checksum",
    "IP_OPTIONS": "IP options are not supported",
    "IP_MALFORMED": "malformed IP packet",
    "ENCAP_FAIL": "encapsulation failed",
    "DECAP_FAIL": "decapsulation failed",
    "UNAUTH_SOURCE": "the source is not allowed: source ranges, or a tunnel from an unknown node",
    "RT_UNKNOWN": "the backend is not in Calico's routes map",
    "BLACK_HOLE": "the destination is a service address that no service uses",
    "SOURCE_COLLISION_FAILED": "no free source port to resolve a collision",
    "CT_CREATE_FAILED": "the conntrack entry could not be made",
    "FRAG_WAIT": "a fragment that waits for the rest of its packet",
    "FRAG_REORDER": "a fragment came before the first one of its packet",
    "FRAG_UNSUPPORTED": "the kernel is too old to put fragments together",
    "DROPPED_BY_QOS": "QoS limit of the pod",
    "MAGLEV_NO_BACKEND": "Maglev found no backend",
    "NO_HOST_IP": "the node's own address is unknown to Felix",
    "WEP_NOT_READY": "the interface that it should leave by is not in Calico's ifstate map, or is a pod's that has no "
    "programs yet",
    "NATIFACE": "the path through bpfin.cali is broken",
}


def caption(name: str) -> str:
    """A counter in Calico's words: ``dropped by policy``, ``total packets``; its name when Calico shows none."""
    category, kind = CAPTIONS.get(name, ("", name))
    return f"{category.lower()} {kind}".strip()


def name(code: int, counters: int) -> str:
    """The name of a reason. *counters*: number of counters in the map, 0 when unknown.

    A code that the release of that many counters does not have is given as its number, never guessed.
    """
    if counters == 14 and code > 13:
        return _BEHIND_14.get(code, f"reason {code}")
    if counters in _COUNTERS:
        if counters <= code < counters + len(_BEHIND):
            return _BEHIND[code - counters]
        return REASONS[code] if code < counters else f"reason {code}"
    return REASONS[code] if code <= 12 else f"reason {code}"


def drop_name(code: int, base: int) -> str:
    """The name of the reason in ``Final result=DENY (n)``. *base*: how n is printed, 0 for not known.

    16 up to v3.29, 10 since v3.30. No packet is denied for a reason that is no drop, which leaves one name for most.
    """
    return _DENIED.get(base, {}).get(code) or name(code, 0)


def counter_name(code: int, counters: int) -> str:
    """The name of a counter in a map of that many: a reason's, but the first counts all packets.

    Source: COUNTER_TOTAL_PACKETS in felix/bpf-gpl/counters.h.
    """
    return name(code, counters) if code else TOTAL
