/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * hop: where a probe packet passes, from tracepoints alone.
 *
 * Hooks, all raw tracepoints: netif_receive_skb (before tc ingress), net_dev_queue (after tc egress),
 * net_dev_xmit (handed to the driver, with its return code), consume_skb (a normal end). Any context.
 * Only packets of the run are sent. Cost: for every packet of the node one read (without TYPED four more) and the
 * match; run it only while probing.
 */
struct hop_scratch {
	struct hop_event event;
	u8 slack[SLACK_BYTES];
};
BPF_PERCPU_ARRAY(hop_scratches, struct hop_scratch, 5); /* one per kind: softirq may interrupt a task's hop */
/*
 * At net_dev_xmit the driver may have freed the packet: the address is all that is left of it. QUEUE leaves it
 * here, and the reader joins the two. A slot taken by another packet costs an XMIT, no more.
 */
#define QUEUED_SLOTS 4096
BPF_ARRAY(queued, u64, QUEUED_SLOTS);

/* An address that was kept: the verifier does not let an address with a type be reckoned with. */
static __always_inline u64 number_of(u64 *kept)
{
	return *(volatile u64 *)kept;
}

static __always_inline u64 *queued_slot(u64 skbaddr)
{
	u32 slot = (skbaddr >> 8 ^ skbaddr >> 20) & (QUEUED_SLOTS - 1); /* an sk_buff takes 256 bytes of its slab */

	return queued.lookup(&slot);
}

static __always_inline int send_hop(struct hop_event *e, u32 kind, int rc)
{
	count_shared(STAT_HOP_MATCHED, 1);
	e->ktime_ns = bpf_ktime_get_ns();
	e->type = EVENT_HOP;
	e->cpu = bpf_get_smp_processor_id();
	e->kind = kind;
	e->rc = rc;
	if (events.ringbuf_output(e, sizeof(*e), wakeup(sizeof(*e)))) {
		count_shared(STAT_HOP_LOST, 1);
		sent(WAKE_BYTES);
	}
	return 0;
}

/* At HOP_RECEIVE, HOP_QUEUE and HOP_CONSUME: loaded once for each, and the verifier leaves out what is not for it. */
int collect_hop(struct bpf_raw_tracepoint_args *ctx)
{
	u32 kind = HOP_KIND, at = kind;
	struct hop_scratch *s = hop_scratches.lookup(&at);
	struct window *window;
	struct view v;
	u64 *slot;
	u32 bytes;

	if (!s)
		return 0;
	count_shared(STAT_HOP_SEEN, 1);
	window = (struct window *)s->event.capture;
	if (!look_at(&v, ctx->args[0]))
		return 0;
	bytes = capture((struct packet_event *)&s->event, window, &v, kind == HOP_RECEIVE);
	if (!bytes)
		return 0;
	s->event.match = match_packet(window, bytes);
	if (!s->event.match)
		return 0;
	clear_behind(s->event.capture, bytes);
#ifdef WITH_LOG
	if (kind == HOP_RECEIVE)
		recorder_restart();
	else if (kind == HOP_QUEUE)
		recorder_flush();
#endif
	if (kind == HOP_QUEUE) {
		slot = queued_slot(number_of(&s->event.skbaddr));
		if (slot)
			*slot = s->event.skbaddr;
	}
	return send_hop(&s->event, kind, 0);
}

/* net_dev_xmit(skb, rc, dev, len) */
int collect_xmit(struct bpf_raw_tracepoint_args *ctx)
{
	u32 kind = HOP_XMIT;
	u64 *slot;
	struct hop_scratch *s = hop_scratches.lookup(&kind);

	count_shared(STAT_HOP_SEEN, 1);
	if (!s)
		return 0;
	s->event.skbaddr = ctx->args[0];
	slot = queued_slot(number_of(&s->event.skbaddr));
	if (!slot || *slot != number_of(&s->event.skbaddr))
		return 0;
	*slot = 0;
	describe_device(ctx->args[2], &s->event.ifindex, &s->event.netns);
	return send_hop(&s->event, kind, ctx->args[1]);
}
