/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * drop: skb:kfree_skb, the end of every packet that the kernel does not deliver.
 *
 * Hook: raw tracepoint kfree_skb (skb, location[, reason[, rx_sk]]; the reason since Linux 5.17), any context.
 * Every drop is counted by reason, location, interface and protocol; in one cell of the stats once the table is
 * full, so that the totals stay exact. Those of the run (with DROP_ALL: all, as far as SAMPLE and RATE_LIMIT let
 * them) are sent with the packet's first bytes, behind the log lines that led to them, and followed by Calico's
 * per-CPU state; with DROP_ALL both only where a tc program dropped.
 * Cost: one read of the packet (without TYPED four more, of the kernel's structs) and a look into a table of this CPU;
 * for a drop that is sent a larger read, two clocks and two copies.
 */
struct drop_key {
	u64 location;
	u32 skb_drop_reason;
	u32 ifindex;
	u32 netns;
	u32 ip_proto; /* 0 when it is not IP */
};
struct drop_scratch {
	struct drop_event event;
	u8 slack[SLACK_BYTES];
};
/* The counter comes first: a reader that sees it above zero then sees the whole key behind it. */
struct drop_cell {
	u64 drops;
	struct drop_key key;
};
/* Of bytes: of other arrays in a map BCC makes code to print each element, which takes longer than all else. */
struct drop_table {
	u8 cells[DROP_TABLE_BYTES];
};
_Static_assert(sizeof(struct drop_table) == DROP_SLOTS * sizeof(struct drop_cell), "drop_table");
BPF_PERCPU_ARRAY(drop_tables, struct drop_table, 1);
BPF_TABLE("percpu_hash", struct drop_key, u64, drop_counts, DROP_CELLS);
BPF_ARRAY(next_event_ns, u64, 1);
BPF_PERCPU_ARRAY(drop_scratches, struct drop_scratch, 1);

/*
 * Each kind of drop has a slot of the table, which costs a tenth of a hash lookup; where two kinds want the same one,
 * the later one is counted in the hash. From Linux 6.1 programs do not interrupt themselves (commit 05b24ff9b2cf):
 * a slot of this CPU is ours. Before, a drop within the handling of another may be counted or described wrongly.
 */
static __always_inline void count_drop(struct drop_key *key)
{
	u32 mixed = (u32)key->location * 0x9e3779b1 + key->skb_drop_reason * 0x85ebca6b + key->ifindex * 0xc2b2ae35 +
		    key->netns * 0x27d4eb2f + key->ip_proto * 0x165667b1;
	u32 zero = 0, slot = (mixed ^ mixed >> 15) % DROP_SLOTS;
	struct drop_table *table = drop_tables.lookup(&zero);
	u64 *total, one = 1;

	if (table) {
		struct drop_cell *cell = (struct drop_cell *)table->cells + slot;
		struct drop_key *held = &cell->key;

		if (!cell->drops)
			*held = *key;
		if (held->location == key->location && held->skb_drop_reason == key->skb_drop_reason &&
		    held->ifindex == key->ifindex && held->netns == key->netns && held->ip_proto == key->ip_proto) {
			cell->drops += 1;
			return;
		}
	}
	total = drop_counts.lookup(key);
	if (total)
		*total += 1;
	else if (drop_counts.update(key, &one))
		count(STAT_DROP_OTHER, 1);
}

/* One reservation in the ring costs more than the copies: the reader takes the two apart. */
struct drop_with_state {
	struct drop_event drop;
	struct state_event state;
};

/*
 * Calico still holds the dropped packet in its per-CPU state: each node has its own map, found by namespace.
 * state_of() and copy_state() are made by calitrace/kernel/collectors.py, for each size that a release has.
 * Returns 0 when there is no room in the ring.
 */
static __always_inline int send_drop(const struct drop_event *drop, int with_state)
{
	u32 bytes = 0;
	void *state = with_state ? state_of(drop->netns, &bytes) : NULL;
	struct drop_with_state *e = state ? events.ringbuf_reserve(sizeof(*e)) : NULL;

	if (!e) {
		if (state)
			count(STAT_STATE_LOST, 1);
		return !events.ringbuf_output((void *)drop, sizeof(*drop), wakeup(sizeof(*drop)));
	}
	e->drop = *drop;
	e->state.ktime_ns = drop->ktime_ns;
	e->state.type = EVENT_STATE;
	e->state.cpu = drop->cpu;
	e->state.netns = drop->netns;
	e->state.skbaddr = drop->skbaddr;
	e->state.state_bytes = bytes;
	e->state.pad = 0;
	copy_state(e->state.state, state, bytes);
	events.ringbuf_submit(e, wakeup(sizeof(*e)));
	count(STAT_STATE_SENT, 1);
	return 1;
}

#ifdef WITH_STACK
BPF_PERCPU_ARRAY(stack_scratches, struct stack_event, 1);

static __always_inline void send_stack(void *ctx, const struct drop_event *drop)
{
	u32 zero = 0;
	struct stack_event *e = stack_scratches.lookup(&zero);
	int bytes;

	if (!e)
		return;
	__builtin_memset(e->addresses, 0, sizeof(e->addresses)); /* of an earlier one */
	bytes = bpf_get_stack(ctx, e->addresses, sizeof(e->addresses), 0);
	e->ktime_ns = drop->ktime_ns;
	e->type = EVENT_STACK;
	e->cpu = drop->cpu;
	e->netns = drop->netns;
	e->skbaddr = drop->skbaddr;
	e->frames = bytes > 0 ? (u32)bytes >> 3 : 0; /* BPF has no signed division */
	e->pad = 0;
	if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
		count(STAT_STACK_LOST, 1);
	else
		sent(sizeof(*e));
}
#endif

/* The IP protocol of a packet of which *bytes* are in *w*; 0 when it is not IP. */
static __always_inline u32 ip_proto_of(const struct view *v, const struct window *w, u32 bytes)
{
	u32 at = v->protocol == bpf_htons(0x0800) ? 9 : 6;

	if (!has_network_header(v) || (at == 6 && v->protocol != bpf_htons(0x86dd)))
		return 0;
	if (bytes > 9)
		return at == 9 ? w->bytes[9] : w->bytes[6];
	return (u8)word_at(v->head + v->network_header + at);
}

#ifdef DROP_ALL
/* Whether it happened where the user looks: in NETNS, at an interface that NAMED_BY describes. */
static __always_inline int is_wanted_place(const struct drop_key *key, u64 dev)
{
#ifdef NETNS
	if (key->netns != NETNS)
		return 0;
#endif
#ifdef NAMED_BY
	u64 at = dev + __builtin_offsetof(struct net_device, name), name[2] = {};

	if (!dev)
		return 0;
	name[0] = word_at(at);
	name[1] = word_at(at + 8);
	return NAMED_BY;
#else
	return 1;
#endif
}

/* Of an IP packet, by its own header; 0 when it tells none (IPv6 jumbograms) or the packet is not IP. */
static __always_inline u32 ip_length(const struct window *w)
{
	if (w->bytes[0] >> 4 == 4)
		return be16_at(w->bytes + 2);
	return w->bytes[0] >> 4 == 6 ? 40 + be16_at(w->bytes + 4) : 0;
}

#ifdef PCAP_FILTER
#define VXLAN_BYTES (20 + 8 + 8 + 14)

/* Whether the packet, or the one that it carries in VXLAN over IPv4, is what the user asked for. */
static __always_inline int is_wanted_packet(const struct window *w, u32 bytes)
{
	const struct window *inner = (const struct window *)(w->bytes + VXLAN_BYTES);

	if (pcap_filter(w, bytes, ip_length(w)))
		return 1;
	return bytes > VXLAN_BYTES && w->bytes[0] == 0x45 && w->bytes[9] == 17 && be16_at(w->bytes + 22) == VXLAN_PORT &&
	       pcap_filter(inner, bytes - VXLAN_BYTES, ip_length(inner));
}
#endif

#if RATE_LIMIT
struct tick {
	u64 jiffies;
	u64 ktime_ns;
};
BPF_PERCPU_ARRAY(ticks, struct tick, 1);

/* The time of the last tick: that is enough for a limit a second, and reading the clock costs as much as a count. */
static __always_inline u64 tick_ns(void)
{
	u32 zero = 0;
	u64 now = bpf_jiffies64();
	struct tick *t = ticks.lookup(&zero);

	if (!t)
		return bpf_ktime_get_ns();
	if (t->jiffies != now) {
		t->jiffies = now;
		t->ktime_ns = bpf_ktime_get_ns();
	}
	return t->ktime_ns;
}
#endif

/*
 * Whether one more event is within SAMPLE and RATE_LIMIT. A bucket that holds a second's worth, kept as the time at
 * which the next event is due. CPUs that meet here may let one too many pass; what was held back is counted exactly.
 */
static __always_inline int is_due(void)
{
#if SAMPLE > 1
	if (bpf_get_prandom_u32() % SAMPLE) {
		count(STAT_DROP_UNSAMPLED, 1);
		return 0;
	}
#endif
#if RATE_LIMIT
	u32 zero = 0;
	u64 now = tick_ns(), *next = next_event_ns.lookup(&zero);

	if (!next)
		return 0;
	if (*next + 1000000000ULL < now)
		*next = now - 1000000000ULL;
	if (*next > now) {
		count(STAT_DROP_LIMITED, 1);
		return 0;
	}
	__sync_fetch_and_add(next, 1000000000ULL / RATE_LIMIT);
#endif
	return 1;
}
#endif

int collect_drop(struct bpf_raw_tracepoint_args *ctx)
{
	struct drop_key key = {.location = ctx->args[1]};
	struct view v;
	u32 zero = 0, bytes = 0;
	struct drop_scratch *s = drop_scratches.lookup(&zero);
	struct window *window;
	int by_tc = 1, is_ours = 1;

	if (!s)
		return 0;
	window = (struct window *)s->event.capture;
#ifdef HAVE_DROP_REASON
	key.skb_drop_reason = ctx->args[2];
#ifdef TC_INGRESS_REASON
	by_tc = key.skb_drop_reason == TC_INGRESS_REASON || key.skb_drop_reason == TC_EGRESS_REASON;
#endif
#else
	key.skb_drop_reason = NO_REASON;
#endif
	count(STAT_DROP_SEEN, 1);
	if (!look_at(&v, ctx->args[0]))
		__builtin_memset(&v, 0, sizeof(v));
	key.ifindex = v.ifindex;
	key.netns = v.netns;
#ifdef DROP_ALL
	is_ours = is_wanted_place(&key, v.dev);
	if (!is_ours)
		count(STAT_DROP_FILTERED, 1);
#ifndef PCAP_FILTER
	is_ours = is_ours && is_due();
#endif
#endif
#ifndef DROP_COUNT_ONLY
	if (is_ours)
		bytes = capture((struct packet_event *)&s->event, window, &v, 0);
#endif
	key.ip_proto = ip_proto_of(&v, window, bytes);
	count_drop(&key);
#ifndef DROP_COUNT_ONLY
	if (!is_ours)
		goto forget;
#ifdef DROP_ALL
	if (!bytes)
		__builtin_memset(&s->event, 0, sizeof(struct packet_event));
#ifdef PCAP_FILTER
	if (!bytes || !is_wanted_packet(window, bytes)) {
		count(STAT_DROP_FILTERED, 1);
		goto forget;
	}
	if (!is_due())
		goto forget;
#endif
	s->event.skbaddr = ctx->args[0];
	s->event.ifindex = key.ifindex;
	s->event.netns = key.netns;
#else
	by_tc = 1;
	if (!bytes)
		return 0;
	s->event.match = match_packet(window, bytes);
	if (!s->event.match)
		return 0;
#endif
	count(STAT_DROP_MATCHED, 1);
	clear_behind(s->event.capture, bytes);
	s->event.ktime_ns = bpf_ktime_get_ns();
	s->event.type = EVENT_DROP;
	s->event.cpu = bpf_get_smp_processor_id();
	s->event.location = key.location;
	s->event.skb_drop_reason = key.skb_drop_reason;
#ifdef WITH_LOG
	if (by_tc)
		recorder_flush();
#endif
#ifdef WITH_STACK
	send_stack(ctx, &s->event);
#endif
	if (!send_drop(&s->event, by_tc)) {
		count(STAT_DROP_LOST, 1);
		sent(WAKE_BYTES);
	}
	return 0;
forget: __attribute__((unused))
#ifdef WITH_LOG
	if (by_tc)
		recorder_restart(); /* or these lines would be taken for the next one's */
#endif
#endif
	return 0;
}
