/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reading and matching a packet, for all collectors.
 *
 * Options, all -D: WITH_CLIENT, VXLAN_PORT, MAGIC, TAG_SHIFT, RING_PAGES, WAKE_BYTES; TYPED; KFUNC_CALL with
 * RDONLY_CAST and TIMESPEC64, and with NUM_NEW, NUM_NEXT and NUM_DESTROY. The values come from
 * calitrace/kernel/collectors.py.
 */

/*
 * 32 bits that each run has of its own. What is compiled serves all runs: the value takes the place of this constant
 * when the program is loaded, see calitrace/kernel/images.py.
 */
#define PER_RUN(which)                                                             \
	({                                                                         \
		u64 value;                                                         \
		asm("%0 = 0xca117ace0000000" #which " ll" : "=r"(value));         \
		value;                                                             \
	})
#define RUN_ID PER_RUN(0)
#define RUN_TAG PER_RUN(1) /* 12 bits */
#define CLIENT_IP4 PER_RUN(2) /* network order */
#define CLIENT_PORT_MIN PER_RUN(3)
#define CLIENT_PORT_MAX PER_RUN(4)
#define HOP_KIND PER_RUN(5) /* of a program, not of a run */

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
BPF_PERCPU_ARRAY(stats, u64, STATS);
BPF_PERCPU_ARRAY(unannounced, u64, 1);

/*
 * The capture, which is the last member of an event, with room behind it: a header that begins in its last byte
 * can then be read without a check.
 */
#define SLACK_BYTES 64
struct window {
	u8 bytes[CAPTURE_BYTES + SLACK_BYTES];
};

/* A total that only one program keeps: nothing interrupts it there. */
static __always_inline void count(u32 which, u64 by)
{
	u64 *value = stats.lookup(&which);

	if (value)
		*value += by;
}

/* A total that several programs keep, one of which may interrupt another. */
static __always_inline void count_shared(u32 which, u64 by)
{
	u64 *value = stats.lookup(&which);

	if (value)
		__sync_fetch_and_add(value, by);
}

static __always_inline u32 be16_at(const u8 *p)
{
	return p[0] << 8 | p[1];
}

static __always_inline u32 be32_at(const u8 *p)
{
	return (u32)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3];
}

/*
 * A wake-up costs far more than the copy: one for WAKE_BYTES sent by this CPU; the reader's timer does the rest.
 * (BCC before 0.30 does not know bpf_ringbuf_query.) Where there was no room, the next event wakes: sent(WAKE_BYTES).
 */
static __always_inline u64 wakeup(u32 bytes)
{
	u32 zero = 0;
	u64 *total = unannounced.lookup(&zero);

	if (!total)
		return 0;
	*total += bytes;
	if (*total < WAKE_BYTES)
		return BPF_RB_NO_WAKEUP;
	*total = 0;
	return BPF_RB_FORCE_WAKEUP;
}

/* Sent without a wake-up: the next event that may wake the reader counts it. */
static __always_inline void sent(u32 bytes)
{
	u32 zero = 0;
	u64 *total = unannounced.lookup(&zero);

	if (total)
		*total += bytes;
}

/*
 * A member of a kernel struct at address *at*. With TYPED the program knows the types of its arguments (tp_btf, Linux
 * 5.5), and the verifier lets it load; else a helper must read, which costs as much as a map lookup.
 */
#ifdef TYPED
#define MEMBER(into, at, owner, member) \
	into = *(volatile __typeof__(into) *)((at) + __builtin_offsetof(struct owner, member))
#else
#define MEMBER(into, at, owner, member) \
	bpf_probe_read_kernel(&into, sizeof(into), (void *)((at) + __builtin_offsetof(struct owner, member)))
#endif

/*
 * Kernel memory at any address, of which nothing is known; 0 where nothing can be read. bpf_rdonly_cast (Linux 6.2)
 * makes of a number the address of a struct that may be read, by a move between registers: a helper takes as long as a
 * dozen such words. KFUNC_CALL: see calitrace/kernel/images.py.
 */
#ifdef RDONLY_CAST
static __always_inline u64 word_at(u64 address)
{
	u64 (*cast)(u64 address, u32 type) = (void *)(KFUNC_CALL + RDONLY_CAST);

	return *(volatile u64 *)cast(address, TIMESPEC64); /* a struct that begins with 64 bits */
}
#else
static __always_inline u64 word_at(u64 address)
{
	u64 word = 0;

	bpf_probe_read_kernel(&word, sizeof(word), (void *)address);
	return word;
}
#endif

/*
 * Returns 0 when a helper can read nothing. *to* has room for whole words, of which all are read that have one of
 * *bytes*, at most CAPTURE_BYTES.
 */
static __always_inline int read_packet(u8 *to, u32 bytes, u64 from)
{
#ifdef RDONLY_CAST
	u32 end = bytes;

	asm volatile("" : "+r"(end)); /* or the verifier follows the rest for each bound of *bytes* */
#pragma clang loop unroll(disable)
	for (u32 at = 0; at < CAPTURE_BYTES; at += 8) {
		if (at >= end)
			break;
		*(u64 *)(to + at) = word_at(from + at);
	}
	return 1;
#else
	return !bpf_probe_read_kernel(to, bytes, (void *)from);
#endif
}

/* Leave nothing in a capture behind its *bytes*: other packets have been there. For a little-endian machine. */
static __always_inline void clear_behind(u8 *capture, u32 bytes)
{
	u32 end = bytes;

	asm volatile("" : "+r"(end)); /* as in read_packet() */
#pragma clang loop unroll(disable)
	for (u32 at = 0; at < CAPTURE_BYTES; at += 8) {
		u64 *word = (u64 *)(capture + at);

		if (at >= end)
			*word = 0;
		else if (end - at < 8)
			*word &= (1ULL << (end - at) * 8) - 1;
	}
}

static __always_inline void describe_device(u64 dev, u32 *ifindex, u32 *netns)
{
	u64 net = 0;

	*ifindex = 0;
	*netns = 0;
	if (!dev)
		return;
	MEMBER(*ifindex, dev, net_device, ifindex);
	MEMBER(net, dev, net_device, nd_net.net);
	if (net)
		MEMBER(*netns, net, net, ns.inum);
}

/* What the collectors look at in an sk_buff. */
struct view {
	u64 skb, dev, head, data;
	u32 len, data_len, skb_iif, mark, ifindex, netns;
	u16 protocol, network_header;
};

/* Fill *v*. Returns 0 when the sk_buff cannot be read. */
static __always_inline int look_at(struct view *v, u64 skb)
{
#ifdef TYPED
#define TAKE(member) MEMBER(v->member, skb, sk_buff, member)
#else
	struct sk_buff copy;
#define TAKE(member) v->member = (__typeof__(v->member))copy.member

	if (bpf_probe_read_kernel(&copy, sizeof(copy), (void *)skb))
		return 0;
#endif
	v->skb = skb;
	TAKE(dev);
	TAKE(head);
	TAKE(data);
	TAKE(len);
	TAKE(data_len);
	TAKE(skb_iif);
	TAKE(mark);
	TAKE(protocol);
	TAKE(network_header);
#undef TAKE
	describe_device(v->dev, &v->ifindex, &v->netns);
	return 1;
}

static __always_inline int has_network_header(const struct view *v)
{
	return v->network_header != 0 && v->network_header != 0xffff;
}

/*
 * Copy the packet from its network header on into *w* and describe it in *e*. Returns the bytes captured.
 * At netif_receive_skb the network header is not set yet: the packet begins at skb->data.
 */
static __always_inline u32 capture(struct packet_event *e, struct window *w, const struct view *v, int at_data)
{
	u64 l3 = at_data || !has_network_header(v) ? v->data : v->head + v->network_header;
	s64 linear = (s64)v->len - v->data_len + (s64)(v->data - l3);
	u32 l4, bytes;

	if (linear <= 0)
		return 0;
	bytes = linear > CAPTURE_BYTES ? CAPTURE_BYTES : linear;
	if (bytes == 0 || bytes > CAPTURE_BYTES || !read_packet(w->bytes, bytes, l3))
		return 0;

	e->skbaddr = v->skb;
	e->skb_iif = v->skb_iif;
	e->mark = v->mark;
	e->len_bytes = v->len;
	e->ifindex = v->ifindex;
	e->netns = v->netns;
	e->ethertype = bpf_ntohs(v->protocol);
	e->capture_bytes = bytes;
	e->match = 0;
	e->sport = e->dport = 0;
	e->ip_version = e->ip_proto = 0;
	__builtin_memset(e->saddr, 0, 32);

	if (e->ethertype == 0x0800 && w->bytes[0] >> 4 == 4) {
		e->ip_version = 4;
		e->ip_proto = w->bytes[9];
		__builtin_memcpy(e->saddr, w->bytes + 12, 4);
		__builtin_memcpy(e->daddr, w->bytes + 16, 4);
		l4 = (w->bytes[0] & 15) * 4;
		if (be16_at(w->bytes + 6) & 0x1fff)
			l4 = 0; /* a later fragment has no ports */
	} else if (e->ethertype == 0x86dd && w->bytes[0] >> 4 == 6) {
		e->ip_version = 6;
		e->ip_proto = w->bytes[6];
		__builtin_memcpy(e->saddr, w->bytes + 8, 16);
		__builtin_memcpy(e->daddr, w->bytes + 24, 16);
		l4 = 40;
	} else {
		l4 = 0;
	}
	/* clang 19 bounds l4 by a way that the verifier cannot follow: make it forget, and bound l4 again */
	asm volatile("" : "+r"(l4));
	l4 &= CAPTURE_BYTES - 1;
	if (l4 && l4 + 4 <= bytes && (e->ip_proto == 6 || e->ip_proto == 17)) {
		e->sport = be16_at(w->bytes + l4);
		e->dport = be16_at(w->bytes + l4 + 2);
	}
	return bytes;
}

/*
 * Does a packet of our run begin at byte *at*? Returns match bits and sets *next* to where a packet inside it
 * begins (0: none): the payload of VXLAN, or what an ICMP error quotes.
 */
static __always_inline u32 match_at(const struct window *w, u32 at, u32 bytes, u32 *next, u32 *how)
{
	const u8 *ip, *l4;
	u32 found = 0, proto, l4_at, sport = 0, dport = 0;

	*next = 0;
	at &= CAPTURE_BYTES - 1;
	ip = w->bytes + at;
	if (ip[0] >> 4 == 4) {
		proto = ip[9];
		l4_at = at + (ip[0] & 15) * 4;
	} else if (ip[0] >> 4 == 6) {
		proto = ip[6];
		l4_at = at + 40;
	} else {
		return 0;
	}
	if (l4_at + 8 > bytes)
		return 0;
	l4_at &= CAPTURE_BYTES - 1;
	l4 = w->bytes + l4_at;

	if (proto == 17) {
		sport = be16_at(l4);
		dport = be16_at(l4 + 2);
		if (l4_at + 24 <= bytes && be32_at(l4 + 8) == MAGIC && be32_at(l4 + 12) == RUN_ID)
			found |= MATCH_IDENTITY;
		if (dport == VXLAN_PORT) {
			*next = l4_at + 8 + 8 + 14;
			*how = MATCH_TUNNEL;
		}
	} else if (proto == 6) {
		sport = be16_at(l4);
		dport = be16_at(l4 + 2);
		if (be32_at(l4 + 4) >> TAG_SHIFT == RUN_TAG ||
		    (l4_at + 12 <= bytes && (be32_at(l4 + 8) - 1) >> TAG_SHIFT == RUN_TAG))
			found |= MATCH_SEQUENCE;
	} else if ((proto == 1 && (l4[0] == 3 || l4[0] == 11 || l4[0] == 12)) || (proto == 58 && l4[0] < 128)) {
		*next = l4_at + 8;
		*how = MATCH_ICMP_ERROR;
	}
#ifdef WITH_CLIENT
	if ((proto == 6 || proto == 17) && ip[0] >> 4 == 4) {
		u32 src, dst;

		__builtin_memcpy(&src, ip + 12, 4);
		__builtin_memcpy(&dst, ip + 16, 4);
		if ((src == CLIENT_IP4 && sport >= CLIENT_PORT_MIN && sport <= CLIENT_PORT_MAX) ||
		    (dst == CLIENT_IP4 && dport >= CLIENT_PORT_MIN && dport <= CLIENT_PORT_MAX))
			found |= MATCH_ENDPOINT;
	}
#endif
	return found;
}

/* Three layers are enough: VXLAN, then an ICMP error, then what it quotes. */
static __always_inline u32 match_packet(const struct window *w, u32 bytes)
{
	u32 at = 0, through = 0, how = 0, found;

#pragma clang loop unroll(disable)
	for (int layer = 0; layer < 3; layer++) {
		u32 next;

		found = match_at(w, at, bytes, &next, &how);
		if (found)
			return found | through;
		if (!next || next + 20 > bytes)
			return 0;
		through |= how;
		at = next;
	}
	return 0;
}
