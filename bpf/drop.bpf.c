/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * drop: skb:kfree_skb, the end of every packet that the kernel does not deliver.
 *
 * Hook: raw tracepoint kfree_skb (skb, location[, reason[, rx_sk]]; the reason since Linux 5.17), any context.
 * Every drop is counted by reason, location, interface and protocol; in one cell of the stats once the table is
 * full, so that the totals stay exact. Those of the run (with DROP_ALL: all, as far as SAMPLE and RATE_LIMIT let
 * them) are sent with the packet's first bytes, behind the log lines that led to them, and followed by Calico's
 * per-CPU state; with DROP_ALL both only where a tc program dropped.
 * Cost: a read (without TYPED eight) and one per-CPU hash update a drop; for a sent one six reads more and a copy.
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
BPF_TABLE("percpu_hash", struct drop_key, u64, drop_counts, DROP_CELLS);
BPF_ARRAY(next_event_ns, u64, 1);
BPF_PERCPU_ARRAY(drop_scratches, struct drop_scratch, 1);
BPF_PERCPU_ARRAY(state_scratches, struct state_event, 1);

/*
 * Calico still holds the dropped packet in its per-CPU state: each node has its own map, found by namespace.
 * read_state() is made by calitrace/kernel/collectors.py, with a hash of maps for each size that a release has.
 */
static __always_inline void send_state(const struct drop_event *drop)
{
	u32 zero = 0;
	struct state_event *e = state_scratches.lookup(&zero);

	if (!e)
		return;
	e->state_bytes = read_state(drop->netns, e->state);
	if (!e->state_bytes)
		return;
	e->ktime_ns = drop->ktime_ns;
	e->type = EVENT_STATE;
	e->cpu = drop->cpu;
	e->netns = drop->netns;
	e->skbaddr = drop->skbaddr;
	e->pad = 0;
	if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
		count(STAT_STATE_LOST, 1);
	else
		count(STAT_STATE_SENT, 1);
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
}
#endif

/*
 * Read a member. With TYPED the program knows the types of its arguments (tp_btf, Linux 5.5), and the verifier lets it
 * load; else a helper reads, which costs as much as a map lookup.
 */
#ifdef TYPED
#define PEEK(value, at, owner, member) \
	value = *(volatile __typeof__(value) *)((at) + __builtin_offsetof(struct owner, member))
#else
#define PEEK(value, at, owner, member) \
	bpf_probe_read_kernel(&value, sizeof(value), (void *)((at) + __builtin_offsetof(struct owner, member)))
#endif

/* Interface, namespace and protocol, as far as the packet still has them. Returns its device. */
static __always_inline u64 describe_drop(struct drop_key *key, u64 skb)
{
	u64 dev = 0, net = 0, head = 0;
	u16 protocol = 0, network_header = 0;
	u32 ifindex = 0, netns = 0;
	u8 ip_proto = 0;

	PEEK(dev, skb, sk_buff, dev);
	if (dev) {
		PEEK(ifindex, dev, net_device, ifindex);
		PEEK(net, dev, net_device, nd_net.net);
		if (net)
			PEEK(netns, net, net, ns.inum);
	}
	key->ifindex = ifindex;
	key->netns = netns;
	PEEK(protocol, skb, sk_buff, protocol);
	PEEK(network_header, skb, sk_buff, network_header);
	if (!network_header || network_header == 0xffff)
		return dev;
	if (protocol != bpf_htons(0x0800) && protocol != bpf_htons(0x86dd))
		return dev;
	PEEK(head, skb, sk_buff, head);
	head += network_header + (protocol == bpf_htons(0x0800) ? 9 : 6);
	bpf_probe_read_kernel(&ip_proto, 1, (void *)head);
	key->ip_proto = ip_proto;
	return dev;
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
	u64 name[2] = {};

	if (!dev || bpf_probe_read_kernel(name, sizeof(name), (void *)(dev + __builtin_offsetof(struct net_device, name))))
		return 0;
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
	u64 now = bpf_ktime_get_ns(), *next = next_event_ns.lookup(&zero);

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
	u32 zero = 0, bytes;
	struct drop_scratch *s;
	struct window *window;
	u64 *total, one = 1, dev;
	int by_tc = 1;

#ifdef HAVE_DROP_REASON
	key.skb_drop_reason = ctx->args[2];
#ifdef TC_INGRESS_REASON
	by_tc = key.skb_drop_reason == TC_INGRESS_REASON || key.skb_drop_reason == TC_EGRESS_REASON;
#endif
#else
	key.skb_drop_reason = NO_REASON;
#endif
	count(STAT_DROP_SEEN, 1);
	dev = describe_drop(&key, ctx->args[0]);
	total = drop_counts.lookup(&key);
	if (total)
		*total += 1;
	else if (drop_counts.update(&key, &one))
		count(STAT_DROP_OTHER, 1);
#ifndef DROP_COUNT_ONLY
#ifdef DROP_ALL
	if (!is_wanted_place(&key, dev)) {
		count(STAT_DROP_FILTERED, 1);
		goto forget;
	}
#ifndef PCAP_FILTER
	if (!is_due())
		goto forget;
#endif
#endif
	s = drop_scratches.lookup(&zero);
	if (!s)
		return 0;
	window = (struct window *)s->event.capture;
	bytes = capture((struct packet_event *)&s->event, window, (struct sk_buff *)ctx->args[0], 0);
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
	s->event.ktime_ns = bpf_ktime_get_ns();
	s->event.type = EVENT_DROP;
	s->event.cpu = bpf_get_smp_processor_id();
	s->event.location = key.location;
	s->event.skb_drop_reason = key.skb_drop_reason;
#ifdef WITH_LOG
	if (by_tc)
		recorder_flush();
#endif
	if (events.ringbuf_output(&s->event, sizeof(s->event), wakeup(sizeof(s->event)))) {
		count(STAT_DROP_LOST, 1);
		return 0;
	}
#ifdef WITH_STACK
	send_stack(ctx, &s->event);
#endif
	if (by_tc)
		send_state(&s->event);
	return 0;
forget: __attribute__((unused))
#ifdef WITH_LOG
	if (by_tc)
		recorder_restart(); /* or these lines would be taken for the next one's */
#endif
#endif
	return 0;
}
