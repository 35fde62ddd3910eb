/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * drop: skb:kfree_skb, the end of every packet that the kernel does not deliver.
 *
 * Hook: raw tracepoint kfree_skb (skb, location[, reason[, rx_sk]]; the reason since Linux 5.17), any context.
 * Every drop is counted by reason and location; those of the run (with DROP_ALL: all) are sent with the packet's
 * first bytes, behind the log lines that led to them, and followed by Calico's per-CPU state.
 * Cost: one per-CPU hash update a drop; for a sent one five reads and a copy.
 */
struct drop_key {
	u64 location;
	u32 skb_drop_reason;
	u32 pad;
};
struct drop_scratch {
	struct drop_event event;
	u8 slack[SLACK_BYTES];
};
struct calico_state {
	u64 words[STATE_VALUE_BYTES / 8];
};
BPF_TABLE("percpu_hash", struct drop_key, u64, drop_counts, 4096);
BPF_PERCPU_ARRAY(drop_scratches, struct drop_scratch, 1);
BPF_PERCPU_ARRAY(state_scratches, struct state_event, 1);
BPF_TABLE("percpu_array", u32, struct calico_state, state_template, 2);
BPF_TABLE("hash_of_maps$state_template", u32, int, states, 256); /* BCC 0.18 cannot name the key in BPF_HASH_OF_MAPS */

/* Calico still holds the dropped packet in its per-CPU state: each node has its own map, found by namespace. */
static __always_inline void send_state(const struct drop_event *drop)
{
	u32 zero = 0, netns = drop->netns;
	struct state_event *e = state_scratches.lookup(&zero);
	struct calico_state *state;
	void *map = states.lookup(&netns);

	if (!map || !e)
		return;
	state = bpf_map_lookup_elem(map, &zero);
	if (!state)
		return;
	e->ktime_ns = drop->ktime_ns;
	e->type = EVENT_STATE;
	e->cpu = drop->cpu;
	e->netns = netns;
	e->skbaddr = drop->skbaddr;
	e->state_bytes = STATE_VALUE_BYTES;
	e->pad = 0;
	bpf_probe_read_kernel(e->state, STATE_VALUE_BYTES, state);
	if (events.ringbuf_output(e, sizeof(*e), BPF_RB_NO_WAKEUP))
		count(STAT_STATE_LOST, 1);
	else
		count(STAT_STATE_SENT, 1);
}

int collect_drop(struct bpf_raw_tracepoint_args *ctx)
{
	struct drop_key key = {.location = ctx->args[1]};
	u32 zero = 0, bytes;
	struct drop_scratch *s;
	struct window *window;
	u64 *total, one = 1;

#ifdef HAVE_DROP_REASON
	key.skb_drop_reason = ctx->args[2];
#else
	key.skb_drop_reason = NO_REASON;
#endif
	count(STAT_DROP_SEEN, 1);
	total = drop_counts.lookup(&key);
	if (total)
		*total += 1;
	else
		drop_counts.update(&key, &one);
#ifndef DROP_COUNT_ONLY
	s = drop_scratches.lookup(&zero);
	if (!s)
		return 0;
	window = (struct window *)s->event.capture;
	bytes = capture((struct packet_event *)&s->event, window, (struct sk_buff *)ctx->args[0], 0);
#ifndef DROP_ALL
	if (!bytes)
		return 0;
#endif
	s->event.match = bytes ? match_packet(window, bytes) : 0;
#ifndef DROP_ALL
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
	recorder_flush();
#endif
	if (events.ringbuf_output(&s->event, sizeof(s->event), wakeup(sizeof(s->event))))
		count(STAT_DROP_LOST, 1);
	else if (s->event.match)
		send_state(&s->event);
#endif
	return 0;
}
