"""The events that our BPF programs send: the one place where their layout stands.

``bpf/include/events.h`` is generated from these tables (tools/gen_events_h.py) and committed.
Every event begins with HEADER; ``type`` says which record it is. Events of all programs go through one ring
buffer, so that those of one CPU stay in the order in which they happened.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from calitrace.layout import Field, Record

CAPTURE_BYTES = 128
TEXT_BYTES = 216
STATE_BYTES = 512
STACK_FRAMES = 32
NO_REASON = 0xFFFFFFFF  # the kernel's kfree_skb tells no reason (before 5.17)


class EventType(IntEnum):
    """The value of ``type``."""

    DROP = 1
    HOP = 2
    LOG = 3
    STATE = 4
    STACK = 5


class HopKind(IntEnum):
    """Where a packet was seen. RECEIVE fires before tc ingress, QUEUE after tc egress."""

    RECEIVE = 1
    QUEUE = 2
    XMIT = 3
    CONSUME = 4


class Match(IntFlag):
    """Why the kernel-side filter took a packet."""

    IDENTITY = 1  # payload magic and run id
    SEQUENCE = 2  # TCP sequence or acknowledgement number carries the run tag
    ENDPOINT = 4  # source or destination is the probe's own address and port range
    TUNNEL = 8  # found inside VXLAN
    ICMP_ERROR = 16  # found in the packet that an ICMP error quotes


class Stat(IntEnum):
    """Per-CPU counters; seen = matched + others, matched = sent + lost.

    Of drops when all are wanted: seen = matched + filtered + limited (by the rate) + unsampled. DROP_OTHER: those of
    all seen that found no place in the table of totals.
    """

    DROP_SEEN = 0
    DROP_MATCHED = 1
    DROP_LOST = 2
    HOP_SEEN = 3
    HOP_MATCHED = 4
    HOP_LOST = 5
    LOG_SEEN = 6
    LOG_SENT = 7
    LOG_LOST = 8
    LOG_OVERWRITTEN = 9
    STATE_SENT = 10
    STATE_LOST = 11
    DROP_LIMITED = 12
    DROP_UNSAMPLED = 13
    DROP_OTHER = 14
    DROP_FILTERED = 15
    STACK_LOST = 16


_HEADER = (
    Field("ktime_ns", "u64", "CLOCK_MONOTONIC"),
    Field("type", "u16", "enum event_type"),
    Field("cpu", "u16"),
    Field("netns", "u32", "net->ns.inum of the skb's device, 0 when it has none"),
)
_PACKET = (
    Field("skbaddr", "u64", "address of the sk_buff: joins events of one buffer while it lives"),
    Field("ifindex", "u32", "skb->dev->ifindex, 0 when it has none"),
    Field("skb_iif", "u32", "interface the packet came in by, 0 when local"),
    Field("mark", "u32", "skb->mark"),
    Field("len_bytes", "u32", "skb->len"),
    Field("saddr", "u8", "NBO; IPv4 in the first 4 bytes; of the outermost header", 16),
    Field("daddr", "u8", "NBO; IPv4 in the first 4 bytes", 16),
    Field("sport", "u16"),
    Field("dport", "u16"),
    Field("ethertype", "u16", "skb->protocol"),
    Field("ip_version", "u8", "4, 6, or 0 when not IP"),
    Field("ip_proto", "u8"),
    Field("match", "u32", "enum match bits"),
    Field("capture_bytes", "u32", "valid bytes of capture"),
)
_CAPTURE = Field("capture", "u8", "from the network header on", CAPTURE_BYTES)

HEADER = Record("event_header", "Common to all events.", _HEADER)
PACKET = Record("packet_event", "What events about a packet begin with.", (*_HEADER, *_PACKET))
DROP = Record(
    "drop_event",
    "skb:kfree_skb: the kernel frees a packet it does not deliver.",
    (
        *_HEADER,
        *_PACKET,
        Field("location", "u64", "return address in the function that dropped it"),
        Field("skb_drop_reason", "u32", "enum skb_drop_reason of this kernel; ~0 when it has none"),
        Field("pad", "u32"),
        _CAPTURE,
    ),
)
HOP = Record(
    "hop_event",
    "A probe packet passes. XMIT has no packet any more, only address, device and rc: QUEUE has the rest.",
    (
        *_HEADER,
        *_PACKET,
        Field("kind", "u32", "enum hop_kind"),
        Field("rc", "s32", "of ndo_start_xmit, for XMIT"),
        _CAPTURE,
    ),
)
_LOG = (
    *_HEADER[:-1],
    Field("lost", "u32", "lines of this CPU that found no room, just before this one; it has no netns"),
    Field("pid", "u32"),
    Field("text_bytes", "u32", "without the terminating NUL; TEXT_BYTES - 1 may mean cut"),
    Field("comm", "u8", "task in whose context the program ran, NUL-padded", 16),
)
LOG_HEAD = Record("log_head", "A line without its text.", _LOG)
LOG = Record(
    "log_event",
    "bpf_trace:bpf_trace_printk: one line of any BPF program's log. It is sent up to the end of its text.",
    (*_LOG, Field("text", "u8", "NUL-terminated", TEXT_BYTES)),
)
STATE = Record(
    "state_event",
    "Calico's per-CPU state map at the moment of the drop event just before.",
    (
        *_HEADER,
        Field("skbaddr", "u64", "of that drop"),
        Field("state_bytes", "u32", "value size of the map"),
        Field("pad", "u32"),
        Field("state", "u8", "entry 0 of cali_state", STATE_BYTES),
    ),
)
STACK = Record(
    "stack_event",
    "The kernel's stack at the drop event that comes next.",
    (
        *_HEADER,
        Field("skbaddr", "u64", "of that drop"),
        Field("frames", "u32", "valid entries of addresses"),
        Field("pad", "u32"),
        Field("addresses", "u8", "u64 each: return addresses, innermost first", 8 * STACK_FRAMES),
    ),
)
RECORDS = {
    EventType.DROP: DROP,
    EventType.HOP: HOP,
    EventType.LOG: LOG,
    EventType.STATE: STATE,
    EventType.STACK: STACK,
}


def c_header() -> str:
    """The text of bpf/include/events.h."""
    parts = [
        "/* SPDX-License-Identifier: GPL-2.0-only */",
        "/* Generated from agent/calitrace/events.py by tools/gen_events_h.py; do not edit. */",
        "#pragma once",
        f"#define CAPTURE_BYTES {CAPTURE_BYTES}",
        f"#define TEXT_BYTES {TEXT_BYTES}",
        f"#define STATE_BYTES {STATE_BYTES}",
        f"#define STACK_FRAMES {STACK_FRAMES}",
        f"#define NO_REASON {NO_REASON:#x}",
        _c_enum("event_type", "EVENT", EventType),
        _c_enum("hop_kind", "HOP", HopKind),
        _c_enum("match", "MATCH", Match),
        _c_enum("stat", "STAT", Stat),
        f"#define STATS {len(Stat)}",
        *(record.c_struct() for record in (HEADER, PACKET, *RECORDS.values())),
    ]
    return "\n\n".join(parts) + "\n"


def _c_enum(name: str, prefix: str, members: type[IntEnum] | type[IntFlag]) -> str:
    values = "".join(f"\t{prefix}_{member.name} = {int(member)},\n" for member in members)
    return f"enum {name} {{\n{values}}};"
