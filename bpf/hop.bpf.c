/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * hop: where a probe packet passes, from tracepoints alone.
 *
 * Hooks, all raw tracepoints: netif_receive_skb (before tc ingress), net_dev_queue (after tc egress),
 * net_dev_xmit (handed to the driver, with its return code), consume_skb (a normal end). Any context.
 * Only packets of the run are sent. Cost: for every packet of the node two reads and the match; run it only
 * while probing.
 */
struct hop_scratch {
	struct hop_event event;
	u8 slack[SLACK_BYTES];
};
BPF_PERCPU_ARRAY(hop_scratches, struct hop_scratch, 5); /* one per kind: softirq may interrupt a task's hop */
/* At net_dev_xmit the driver may have freed the packet: what QUEUE saw is kept by address until then. */
BPF_TABLE("lru_hash", u64, struct hop_event, queued, 1024);

static __always_inline int hop(struct sk_buff *skb, u32 kind)
{
	struct hop_scratch *s = hop_scratches.lookup(&kind);
	struct window *window;
	u32 bytes;

	if (!s)
		return 0;
	count(STAT_HOP_SEEN, 1);
	window = (struct window *)s->event.capture;
	bytes = capture((struct packet_event *)&s->event, window, skb, kind == HOP_RECEIVE);
	if (!bytes)
		return 0;
	s->event.match = match_packet(window, bytes);
	if (!s->event.match)
		return 0;
	count(STAT_HOP_MATCHED, 1);
	s->event.ktime_ns = bpf_ktime_get_ns();
	s->event.type = EVENT_HOP;
	s->event.cpu = bpf_get_smp_processor_id();
	s->event.kind = kind;
	s->event.rc = 0;
#ifdef WITH_LOG
	if (kind == HOP_RECEIVE)
		recorder_restart();
	else if (kind == HOP_QUEUE)
		recorder_flush();
#endif
	if (kind == HOP_QUEUE)
		queued.update(&s->event.skbaddr, &s->event);
	if (events.ringbuf_output(&s->event, sizeof(s->event), wakeup(sizeof(s->event))))
		count(STAT_HOP_LOST, 1);
	return 0;
}

int collect_receive(struct bpf_raw_tracepoint_args *ctx)
{
	return hop((struct sk_buff *)ctx->args[0], HOP_RECEIVE);
}

int collect_queue(struct bpf_raw_tracepoint_args *ctx)
{
	return hop((struct sk_buff *)ctx->args[0], HOP_QUEUE);
}

int collect_consume(struct bpf_raw_tracepoint_args *ctx)
{
	return hop((struct sk_buff *)ctx->args[0], HOP_CONSUME);
}

/* net_dev_xmit(skb, rc, dev, len) */
int collect_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	u64 skbaddr = ctx->args[0];
	struct hop_event *e = queued.lookup(&skbaddr);

	count(STAT_HOP_SEEN, 1);
	if (!e)
		return 0;
	count(STAT_HOP_MATCHED, 1);
	e->ktime_ns = bpf_ktime_get_ns();
	e->cpu = bpf_get_smp_processor_id();
	e->kind = HOP_XMIT;
	e->rc = ctx->args[1];
	describe_device((struct net_device *)ctx->args[2], &e->ifindex, &e->netns);
	if (events.ringbuf_output(e, sizeof(*e), wakeup(sizeof(*e))))
		count(STAT_HOP_LOST, 1);
	queued.delete(&skbaddr);
	return 0;
}
