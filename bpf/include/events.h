/* SPDX-License-Identifier: GPL-2.0-only */

/* Generated from agent/calitrace/events.py by tools/gen_events_h.py; do not edit. */

#pragma once

#define CAPTURE_BYTES 128

#define TEXT_BYTES 216

#define STATE_BYTES 512

#define STACK_FRAMES 32

#define NO_REASON 0xffffffff

enum event_type {
	EVENT_DROP = 1,
	EVENT_HOP = 2,
	EVENT_LOG = 3,
	EVENT_STATE = 4,
	EVENT_STACK = 5,
};

enum hop_kind {
	HOP_RECEIVE = 1,
	HOP_QUEUE = 2,
	HOP_XMIT = 3,
	HOP_CONSUME = 4,
};

enum match {
	MATCH_IDENTITY = 1,
	MATCH_SEQUENCE = 2,
	MATCH_ENDPOINT = 4,
	MATCH_TUNNEL = 8,
	MATCH_ICMP_ERROR = 16,
};

enum stat {
	STAT_DROP_SEEN = 0,
	STAT_DROP_MATCHED = 1,
	STAT_DROP_LOST = 2,
	STAT_HOP_SEEN = 3,
	STAT_HOP_MATCHED = 4,
	STAT_HOP_LOST = 5,
	STAT_LOG_SEEN = 6,
	STAT_LOG_SENT = 7,
	STAT_LOG_LOST = 8,
	STAT_LOG_OVERWRITTEN = 9,
	STAT_STATE_SENT = 10,
	STAT_STATE_LOST = 11,
	STAT_DROP_LIMITED = 12,
	STAT_DROP_UNSAMPLED = 13,
	STAT_DROP_OTHER = 14,
	STAT_DROP_FILTERED = 15,
	STAT_STACK_LOST = 16,
};

#define STATS 17

/* Common to all events. */
struct event_header {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 netns; /* net->ns.inum of the skb's device, 0 when it has none */
};
_Static_assert(__builtin_offsetof(struct event_header, ktime_ns) == 0, "event_header.ktime_ns");
_Static_assert(__builtin_offsetof(struct event_header, type) == 8, "event_header.type");
_Static_assert(__builtin_offsetof(struct event_header, cpu) == 10, "event_header.cpu");
_Static_assert(__builtin_offsetof(struct event_header, netns) == 12, "event_header.netns");
_Static_assert(sizeof(struct event_header) == 16, "event_header");

/* What events about a packet begin with. */
struct packet_event {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 netns; /* net->ns.inum of the skb's device, 0 when it has none */
	u64 skbaddr; /* address of the sk_buff: joins events of one buffer while it lives */
	u32 ifindex; /* skb->dev->ifindex, 0 when it has none */
	u32 skb_iif; /* interface the packet came in by, 0 when local */
	u32 mark; /* skb->mark */
	u32 len_bytes; /* skb->len */
	u8 saddr[16]; /* NBO; IPv4 in the first 4 bytes; of the outermost header */
	u8 daddr[16]; /* NBO; IPv4 in the first 4 bytes */
	u16 sport;
	u16 dport;
	u16 ethertype; /* skb->protocol */
	u8 ip_version; /* 4, 6, or 0 when not IP */
	u8 ip_proto;
	u32 match; /* enum match bits */
	u32 capture_bytes; /* valid bytes of capture */
};
_Static_assert(__builtin_offsetof(struct packet_event, ktime_ns) == 0, "packet_event.ktime_ns");
_Static_assert(__builtin_offsetof(struct packet_event, type) == 8, "packet_event.type");
_Static_assert(__builtin_offsetof(struct packet_event, cpu) == 10, "packet_event.cpu");
_Static_assert(__builtin_offsetof(struct packet_event, netns) == 12, "packet_event.netns");
_Static_assert(__builtin_offsetof(struct packet_event, skbaddr) == 16, "packet_event.skbaddr");
_Static_assert(__builtin_offsetof(struct packet_event, ifindex) == 24, "packet_event.ifindex");
_Static_assert(__builtin_offsetof(struct packet_event, skb_iif) == 28, "packet_event.skb_iif");
_Static_assert(__builtin_offsetof(struct packet_event, mark) == 32, "packet_event.mark");
_Static_assert(__builtin_offsetof(struct packet_event, len_bytes) == 36, "packet_event.len_bytes");
_Static_assert(__builtin_offsetof(struct packet_event, saddr) == 40, "packet_event.saddr");
_Static_assert(__builtin_offsetof(struct packet_event, daddr) == 56, "packet_event.daddr");
_Static_assert(__builtin_offsetof(struct packet_event, sport) == 72, "packet_event.sport");
_Static_assert(__builtin_offsetof(struct packet_event, dport) == 74, "packet_event.dport");
_Static_assert(__builtin_offsetof(struct packet_event, ethertype) == 76, "packet_event.ethertype");
_Static_assert(__builtin_offsetof(struct packet_event, ip_version) == 78, "packet_event.ip_version");
_Static_assert(__builtin_offsetof(struct packet_event, ip_proto) == 79, "packet_event.ip_proto");
_Static_assert(__builtin_offsetof(struct packet_event, match) == 80, "packet_event.match");
_Static_assert(__builtin_offsetof(struct packet_event, capture_bytes) == 84, "packet_event.capture_bytes");
_Static_assert(sizeof(struct packet_event) == 88, "packet_event");

/* skb:kfree_skb: the kernel frees a packet it does not deliver. */
struct drop_event {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 netns; /* net->ns.inum of the skb's device, 0 when it has none */
	u64 skbaddr; /* address of the sk_buff: joins events of one buffer while it lives */
	u32 ifindex; /* skb->dev->ifindex, 0 when it has none */
	u32 skb_iif; /* interface the packet came in by, 0 when local */
	u32 mark; /* skb->mark */
	u32 len_bytes; /* skb->len */
	u8 saddr[16]; /* NBO; IPv4 in the first 4 bytes; of the outermost header */
	u8 daddr[16]; /* NBO; IPv4 in the first 4 bytes */
	u16 sport;
	u16 dport;
	u16 ethertype; /* skb->protocol */
	u8 ip_version; /* 4, 6, or 0 when not IP */
	u8 ip_proto;
	u32 match; /* enum match bits */
	u32 capture_bytes; /* valid bytes of capture */
	u64 location; /* return address in the function that dropped it */
	u32 skb_drop_reason; /* enum skb_drop_reason of this kernel; ~0 when it has none */
	u32 pad;
	u8 capture[128]; /* from the network header on */
};
_Static_assert(__builtin_offsetof(struct drop_event, ktime_ns) == 0, "drop_event.ktime_ns");
_Static_assert(__builtin_offsetof(struct drop_event, type) == 8, "drop_event.type");
_Static_assert(__builtin_offsetof(struct drop_event, cpu) == 10, "drop_event.cpu");
_Static_assert(__builtin_offsetof(struct drop_event, netns) == 12, "drop_event.netns");
_Static_assert(__builtin_offsetof(struct drop_event, skbaddr) == 16, "drop_event.skbaddr");
_Static_assert(__builtin_offsetof(struct drop_event, ifindex) == 24, "drop_event.ifindex");
_Static_assert(__builtin_offsetof(struct drop_event, skb_iif) == 28, "drop_event.skb_iif");
_Static_assert(__builtin_offsetof(struct drop_event, mark) == 32, "drop_event.mark");
_Static_assert(__builtin_offsetof(struct drop_event, len_bytes) == 36, "drop_event.len_bytes");
_Static_assert(__builtin_offsetof(struct drop_event, saddr) == 40, "drop_event.saddr");
_Static_assert(__builtin_offsetof(struct drop_event, daddr) == 56, "drop_event.daddr");
_Static_assert(__builtin_offsetof(struct drop_event, sport) == 72, "drop_event.sport");
_Static_assert(__builtin_offsetof(struct drop_event, dport) == 74, "drop_event.dport");
_Static_assert(__builtin_offsetof(struct drop_event, ethertype) == 76, "drop_event.ethertype");
_Static_assert(__builtin_offsetof(struct drop_event, ip_version) == 78, "drop_event.ip_version");
_Static_assert(__builtin_offsetof(struct drop_event, ip_proto) == 79, "drop_event.ip_proto");
_Static_assert(__builtin_offsetof(struct drop_event, match) == 80, "drop_event.match");
_Static_assert(__builtin_offsetof(struct drop_event, capture_bytes) == 84, "drop_event.capture_bytes");
_Static_assert(__builtin_offsetof(struct drop_event, location) == 88, "drop_event.location");
_Static_assert(__builtin_offsetof(struct drop_event, skb_drop_reason) == 96, "drop_event.skb_drop_reason");
_Static_assert(__builtin_offsetof(struct drop_event, pad) == 100, "drop_event.pad");
_Static_assert(__builtin_offsetof(struct drop_event, capture) == 104, "drop_event.capture");
_Static_assert(sizeof(struct drop_event) == 232, "drop_event");

/* A probe packet passes. XMIT has no packet any more, only address, device and rc: QUEUE has the rest. */
struct hop_event {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 netns; /* net->ns.inum of the skb's device, 0 when it has none */
	u64 skbaddr; /* address of the sk_buff: joins events of one buffer while it lives */
	u32 ifindex; /* skb->dev->ifindex, 0 when it has none */
	u32 skb_iif; /* interface the packet came in by, 0 when local */
	u32 mark; /* skb->mark */
	u32 len_bytes; /* skb->len */
	u8 saddr[16]; /* NBO; IPv4 in the first 4 bytes; of the outermost header */
	u8 daddr[16]; /* NBO; IPv4 in the first 4 bytes */
	u16 sport;
	u16 dport;
	u16 ethertype; /* skb->protocol */
	u8 ip_version; /* 4, 6, or 0 when not IP */
	u8 ip_proto;
	u32 match; /* enum match bits */
	u32 capture_bytes; /* valid bytes of capture */
	u32 kind; /* enum hop_kind */
	s32 rc; /* of ndo_start_xmit, for XMIT */
	u8 capture[128]; /* from the network header on */
};
_Static_assert(__builtin_offsetof(struct hop_event, ktime_ns) == 0, "hop_event.ktime_ns");
_Static_assert(__builtin_offsetof(struct hop_event, type) == 8, "hop_event.type");
_Static_assert(__builtin_offsetof(struct hop_event, cpu) == 10, "hop_event.cpu");
_Static_assert(__builtin_offsetof(struct hop_event, netns) == 12, "hop_event.netns");
_Static_assert(__builtin_offsetof(struct hop_event, skbaddr) == 16, "hop_event.skbaddr");
_Static_assert(__builtin_offsetof(struct hop_event, ifindex) == 24, "hop_event.ifindex");
_Static_assert(__builtin_offsetof(struct hop_event, skb_iif) == 28, "hop_event.skb_iif");
_Static_assert(__builtin_offsetof(struct hop_event, mark) == 32, "hop_event.mark");
_Static_assert(__builtin_offsetof(struct hop_event, len_bytes) == 36, "hop_event.len_bytes");
_Static_assert(__builtin_offsetof(struct hop_event, saddr) == 40, "hop_event.saddr");
_Static_assert(__builtin_offsetof(struct hop_event, daddr) == 56, "hop_event.daddr");
_Static_assert(__builtin_offsetof(struct hop_event, sport) == 72, "hop_event.sport");
_Static_assert(__builtin_offsetof(struct hop_event, dport) == 74, "hop_event.dport");
_Static_assert(__builtin_offsetof(struct hop_event, ethertype) == 76, "hop_event.ethertype");
_Static_assert(__builtin_offsetof(struct hop_event, ip_version) == 78, "hop_event.ip_version");
_Static_assert(__builtin_offsetof(struct hop_event, ip_proto) == 79, "hop_event.ip_proto");
_Static_assert(__builtin_offsetof(struct hop_event, match) == 80, "hop_event.match");
_Static_assert(__builtin_offsetof(struct hop_event, capture_bytes) == 84, "hop_event.capture_bytes");
_Static_assert(__builtin_offsetof(struct hop_event, kind) == 88, "hop_event.kind");
_Static_assert(__builtin_offsetof(struct hop_event, rc) == 92, "hop_event.rc");
_Static_assert(__builtin_offsetof(struct hop_event, capture) == 96, "hop_event.capture");
_Static_assert(sizeof(struct hop_event) == 224, "hop_event");

/* bpf_trace:bpf_trace_printk: one line of any BPF program's log. It is sent up to the end of its text. */
struct log_event {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 lost; /* lines of this CPU that found no room, just before this one; it has no netns */
	u32 pid;
	u32 text_bytes; /* without the terminating NUL; TEXT_BYTES - 1 may mean cut */
	u8 comm[16]; /* task in whose context the program ran, NUL-padded */
	u8 text[216]; /* NUL-terminated */
};
_Static_assert(__builtin_offsetof(struct log_event, ktime_ns) == 0, "log_event.ktime_ns");
_Static_assert(__builtin_offsetof(struct log_event, type) == 8, "log_event.type");
_Static_assert(__builtin_offsetof(struct log_event, cpu) == 10, "log_event.cpu");
_Static_assert(__builtin_offsetof(struct log_event, lost) == 12, "log_event.lost");
_Static_assert(__builtin_offsetof(struct log_event, pid) == 16, "log_event.pid");
_Static_assert(__builtin_offsetof(struct log_event, text_bytes) == 20, "log_event.text_bytes");
_Static_assert(__builtin_offsetof(struct log_event, comm) == 24, "log_event.comm");
_Static_assert(__builtin_offsetof(struct log_event, text) == 40, "log_event.text");
_Static_assert(sizeof(struct log_event) == 256, "log_event");

/* Calico's per-CPU state map at the moment of the drop event just before. */
struct state_event {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 netns; /* net->ns.inum of the skb's device, 0 when it has none */
	u64 skbaddr; /* of that drop */
	u32 state_bytes; /* value size of the map */
	u32 pad;
	u8 state[512]; /* entry 0 of cali_state */
};
_Static_assert(__builtin_offsetof(struct state_event, ktime_ns) == 0, "state_event.ktime_ns");
_Static_assert(__builtin_offsetof(struct state_event, type) == 8, "state_event.type");
_Static_assert(__builtin_offsetof(struct state_event, cpu) == 10, "state_event.cpu");
_Static_assert(__builtin_offsetof(struct state_event, netns) == 12, "state_event.netns");
_Static_assert(__builtin_offsetof(struct state_event, skbaddr) == 16, "state_event.skbaddr");
_Static_assert(__builtin_offsetof(struct state_event, state_bytes) == 24, "state_event.state_bytes");
_Static_assert(__builtin_offsetof(struct state_event, pad) == 28, "state_event.pad");
_Static_assert(__builtin_offsetof(struct state_event, state) == 32, "state_event.state");
_Static_assert(sizeof(struct state_event) == 544, "state_event");

/* The kernel's stack at the drop event that comes next. */
struct stack_event {
	u64 ktime_ns; /* CLOCK_MONOTONIC */
	u16 type; /* enum event_type */
	u16 cpu;
	u32 netns; /* net->ns.inum of the skb's device, 0 when it has none */
	u64 skbaddr; /* of that drop */
	u32 frames; /* valid entries of addresses */
	u32 pad;
	u8 addresses[256]; /* u64 each: return addresses, innermost first */
};
_Static_assert(__builtin_offsetof(struct stack_event, ktime_ns) == 0, "stack_event.ktime_ns");
_Static_assert(__builtin_offsetof(struct stack_event, type) == 8, "stack_event.type");
_Static_assert(__builtin_offsetof(struct stack_event, cpu) == 10, "stack_event.cpu");
_Static_assert(__builtin_offsetof(struct stack_event, netns) == 12, "stack_event.netns");
_Static_assert(__builtin_offsetof(struct stack_event, skbaddr) == 16, "stack_event.skbaddr");
_Static_assert(__builtin_offsetof(struct stack_event, frames) == 24, "stack_event.frames");
_Static_assert(__builtin_offsetof(struct stack_event, pad) == 28, "stack_event.pad");
_Static_assert(__builtin_offsetof(struct stack_event, addresses) == 32, "stack_event.addresses");
_Static_assert(sizeof(struct stack_event) == 288, "stack_event");
