// SPDX-License-Identifier: GPL-2.0-only
/*
 * A small stand-in for Calico's tc programs, for the lab: IPv4, NodePorts, tunnel mode.
 *
 * One module per node. The maps have the names, versions and layouts of Calico master and are pinned, so that a
 * reload (another log level) finds them again. PIN_DIR, HOST_IP (network order), LOG_DEBUG and RPF_MODE (0 disabled,
 * 1 strict, 2 loose) come as macros. Needs bpf_redirect_neigh (Linux 5.10); %pI4 in the log needs 5.13.
 *
 * With LOG_DEBUG every step prints the line that Calico v3.30 and later print there. Costs like theirs: tens of
 * microseconds a packet.
 */

#define CALI_TUNNEL_PORT 4789
#define CALI_VNI 0xca11c0
#define ENCAP_LEN 50
#define TUNNEL_MTU 1450
#define ETH_LEN 14
#define IP_AT ETH_LEN
#define L4_AT (ETH_LEN + 20)

#define MARK_SEEN 0x01000000
#define MARK_BYPASS 0x03000000
#define MARK_BYPASS_FWD 0x03300000
#define MARK_FALLTHROUGH 0x05000000

#define ACT_UNSPEC (-1)
#define ACT_SHOT 2
#define ACT_REDIRECT 7

#define PACKET_OTHERHOST 3

#define TCP 6
#define UDP 17
#define ICMP 1

enum { HOOK_INGRESS, HOOK_EGRESS };

/* Reasons of calico master: index in the counters, and the number after DENY. */
enum {
	REASON_TOTAL = 0, REASON_ACCEPTED_BY_POLICY = 2, REASON_BYPASS = 3, REASON_DROPPED_BY_POLICY = 4,
	REASON_SHORT = 5, REASON_ENCAP_FAIL = 9, REASON_DECAP_FAIL = 10, REASON_UNAUTH_SOURCE = 11,
	REASON_RT_UNKNOWN = 12, REASON_CT_CREATE_FAILED = 16, REASON_REDIRECT = 17, REASON_REDIRECT_NEIGH = 18,
	NR_COUNTERS = 27,
};

enum { CT_NEW = 0, CT_MID_FLOW_MISS = 1, CT_ESTABLISHED = 2, CT_ESTABLISHED_SNAT = 4, CT_ESTABLISHED_DNAT = 5,
       CT_INVALID = 6 };
#define CT_RES_SYN 0x1000
#define CT_RES_CONFIRMED 0x2000
#define CT_RES_TO_WORKLOAD 0x4000

enum { ENTRY_NORMAL = 0, ENTRY_NAT_FWD = 1, ENTRY_NAT_REV = 2 };
#define CT_FLAG_NP_FWD 0x4
#define CT_FLAG_EXT_LOCAL 0x40
#define CT_FLAG_BA 0x100
#define CT_FLAG_SET_DSCP 0x8000

#define LEG_SYN 1
#define LEG_ACK 2
#define LEG_FIN 4
#define LEG_RST 8
#define LEG_APPROVED 16
#define LEG_OPENER 32
#define LEG_WORKLOAD 64

#define RT_WORKLOAD 4
#define RT_LOCAL 8
#define RT_HOST 0x10

#define ST_SKIP_FIB 0x2
#define ST_SKIP_POLICY 0x20
#define ST_SET_DSCP 0x2000

#define FE_DROP 0xffffffff
#define FE_EXTERNAL_LOCAL 1

struct calico_ct_key {
	u32 protocol;
	u32 addr_a, addr_b; /* network order; A is the smaller when compared as loaded, then the smaller port */
	u16 port_a, port_b;
};

struct calico_ct_leg {
	u64 bytes;
	u32 packets;
	u32 seqno; /* network order */
	u32 bits;
	u32 ifindex;
};

struct calico_ct_value {
	u64 rst_seen;
	u64 last_seen;
	u8 type;
	u8 flags;
	u8 flags3, flags4;
	u8 pad0[3];
	u8 flags2;
	union {
		struct {
			struct calico_ct_leg a_to_b, b_to_a;
			u32 tun_ip;
			u32 orig_ip;
			u16 orig_port;
			u16 orig_sport;
			u32 orig_sip;
		};
		struct {
			struct calico_ct_key nat_rev_key;
			u16 nat_sport;
			u8 pad2[46];
		};
	};
};

struct calico_nat_key {
	u32 prefixlen;
	u32 addr;
	u16 port;
	u8 protocol;
	u8 saddr[4];
	u8 pad;
} __attribute__((packed));

struct calico_nat_value { u32 id, count, local, affinity_timeo, flags; };
struct calico_nat_backend_key { u32 id, ordinal; };
struct calico_nat_dest { u32 addr; u16 port; u8 pad[2]; };
struct cali_rt_key { u32 prefixlen, addr; };
struct cali_rt { u32 flags; u32 next_hop; /* or ifindex of a local workload */ };
struct arp_key { u32 ip, ifindex; };
struct arp_value { u8 mac_src[6], mac_dst[6]; };
struct ifstate_val {
	u32 flags;
	char name[16];
	s32 xdp_policy_v4, ingress_policy_v4, egress_policy_v4;
	s32 xdp_policy_v6, ingress_policy_v6, egress_policy_v6;
	s32 tc_filter_ingress, tc_filter_egress;
};
struct counters_key { u32 ifindex, hook; };
struct counters { u64 counts[NR_COUNTERS]; };

struct cali_tc_state {
	u64 eth;
	u32 ip_src, pad_src[3];
	u32 ip_dst, pad_dst[3];
	u32 pre_nat_ip_dst, pad_pre[3];
	u32 post_nat_ip_dst, pad_post[3];
	u32 tun_ip, pad_tun[3];
	u32 ihl;
	s32 pol_rc;
	u16 sport, dport, pre_nat_dport, post_nat_dport;
	u8 ip_proto, pad0;
	u16 ip_size; /* network order */
	u32 rules_hit;
	u64 rule_ids[32];
	u64 flags;
	struct {
		s16 rc;
		u16 pad;
		u32 flags;
		u32 nat_ip, nat_sip;
		u16 nat_port, nat_sport;
		u32 tun_ip;
		u32 ifindex_fwd, ifindex_created;
	} ct_result;
	struct calico_nat_dest nat_dest;
	u64 prog_start_time;
	u32 ip_src_masq, pad_masq[3];
	u32 nat_svc_id;
	struct { s32 res; u32 mark, reason, fib_flags; } fwd;
	u8 pad1[52];
};

_Static_assert(sizeof(struct calico_ct_key) == 16, "conntrack key");
_Static_assert(sizeof(struct calico_ct_value) == 88, "conntrack value");
_Static_assert(__builtin_offsetof(struct calico_ct_value, tun_ip) == 72, "tun_ip");
_Static_assert(__builtin_offsetof(struct calico_ct_value, nat_sport) == 40, "nat_sport");
_Static_assert(sizeof(struct calico_nat_key) == 16, "frontend key");
_Static_assert(sizeof(struct ifstate_val) == 52, "interface state");
_Static_assert(sizeof(struct cali_tc_state) == 512, "state");
_Static_assert(__builtin_offsetof(struct cali_tc_state, ip_src) == 8, "ip_src");
_Static_assert(__builtin_offsetof(struct cali_tc_state, pol_rc) == 92, "pol_rc");
_Static_assert(__builtin_offsetof(struct cali_tc_state, rules_hit) == 108, "rules_hit");
_Static_assert(__builtin_offsetof(struct cali_tc_state, flags) == 368, "flags");
_Static_assert(__builtin_offsetof(struct cali_tc_state, ct_result) == 376, "ct_result");
_Static_assert(__builtin_offsetof(struct cali_tc_state, nat_dest) == 408, "nat_dest");
_Static_assert(__builtin_offsetof(struct cali_tc_state, prog_start_time) == 416, "prog_start_time");
_Static_assert(__builtin_offsetof(struct cali_tc_state, nat_svc_id) == 440, "nat_svc_id");
_Static_assert(__builtin_offsetof(struct cali_tc_state, fwd) == 444, "fwd");

/* What Calico patches into its programs or generates as policy: by interface index. */
struct lab_iface {
	char tag_in[20];  /* "ens192----------I": towards the endpoint on a pod's interface, into the host elsewhere */
	char tag_out[20];
	u32 verdict;      /* of the policy program for packets to this pod: 1 allow, 2 deny */
	u32 pad;
	u64 rule_id;
};

#define NO_PREALLOC 1
/*
 * BCC before 0.25 takes only pins that are there: the maps are made and pinned by a first pass, without PIN_DIR, and
 * found by the second.
 */
#ifdef PIN_DIR
#define PINNED(type, name) type ":" PIN_DIR "/" name
#else
#define PINNED(type, name) type
#endif
BPF_F_TABLE(PINNED("lpm_trie", "cali_v4_nat_fe3"), struct calico_nat_key, struct calico_nat_value,
	    cali_v4_nat_fe3, 4096, NO_PREALLOC);
BPF_F_TABLE(PINNED("hash", "cali_v4_nat_be"), struct calico_nat_backend_key, struct calico_nat_dest,
	    cali_v4_nat_be, 4096, NO_PREALLOC);
BPF_F_TABLE(PINNED("lru_hash", "cali_v4_ct4"), struct calico_ct_key, struct calico_ct_value, cali_v4_ct4, 16384, 0);
BPF_F_TABLE(PINNED("lpm_trie", "cali_v4_routes"), struct cali_rt_key, struct cali_rt, cali_v4_routes, 4096,
	    NO_PREALLOC);
BPF_F_TABLE(PINNED("lru_hash", "cali_v4_arp2"), struct arp_key, struct arp_value, cali_v4_arp2, 1024, 0);
BPF_F_TABLE(PINNED("hash", "cali_iface4"), u32, struct ifstate_val, cali_iface4, 1000, NO_PREALLOC);
BPF_F_TABLE(PINNED("percpu_hash", "cali_counters6"), struct counters_key, struct counters, cali_counters6, 64,
	    NO_PREALLOC);
BPF_F_TABLE(PINNED("percpu_array", "cali_state6"), u32, struct cali_tc_state, cali_state6, 2, 0);
BPF_F_TABLE(PINNED("percpu_hash", "cali_rule_ctrs2"), u64, u64, cali_rule_ctrs2, 1024, NO_PREALLOC);
BPF_F_TABLE(PINNED("hash", "lab_iface"), u32, struct lab_iface, lab_iface, 64, NO_PREALLOC);

#ifdef PIN_DIR
struct ip4 {
	u8 version_ihl, tos;
	u16 tot_len, id, frag_off;
	u8 ttl, protocol;
	u16 check;
	u32 saddr, daddr;
};
struct udp { u16 source, dest, len, check; };
struct tcp { u16 source, dest; u32 seq, ack; u8 offset, flags; u16 window; };
struct tunnel { /* what encapsulation puts between the outer Ethernet header and the inner IP header */
	struct ip4 ip;
	struct udp udp;
	u32 vxlan_flags, vni;
	u8 dst[6], src[6];
	u16 proto;
} __attribute__((packed));
_Static_assert(sizeof(struct tunnel) == ENCAP_LEN, "encapsulation");

struct packet {
	struct __sk_buff *skb;
	struct cali_tc_state *st;
	struct lab_iface *iface;
	struct counters *counters;
	const char *tag;
	u32 base; /* of this program's chain in Calico's jump map, as its log shows it */
	u32 ifindex;
	struct ip4 ip;
	struct tcp l4;
	u32 mark;
	u32 fib; /* whether this program forwards by itself */
	u32 to_workload; /* ifindex of the pod's interface, once a reply has shown it */
	u32 from_hep;
	u32 wep;
	u32 ct_flags;
	u32 redirect_back;
};

#if LOG_DEBUG
/* Not bpf_trace_printk: BCC rewrites its arguments and cannot inside a macro. */
#define LOG(p, format, ...) ({ \
	char line[] = "%s: " format; \
	bpf_trace_printk_(line, sizeof(line), (p)->tag, ##__VA_ARGS__); \
})
#define LOG_UNTAGGED(format) ({ char line[] = format; bpf_trace_printk_(line, sizeof(line)); })
#else
#define LOG(p, format, ...) ({ })
#define LOG_UNTAGGED(format) ({ })
#endif

#define INLINE static __always_inline

/* BCC 0.26 declares it with three arguments. */
static int (*redirect_neigh)(u32 ifindex, void *params, int plen, u64 flags) = (void *)BPF_FUNC_redirect_neigh;

INLINE void count(struct packet *p, u32 which)
{
	p->counters->counts[which]++;
}


INLINE struct cali_rt *route(u32 addr)
{
	struct cali_rt_key key = { .prefixlen = 32, .addr = addr };
	return cali_v4_routes.lookup(&key);
}

INLINE int finish(struct packet *p, int rc)
{
	p->st->fwd.res = rc;
	LOG(p, "Final result=ALLOW rc %d. Program execution time: %lluns", rc,
	    bpf_ktime_get_ns() - p->st->prog_start_time);
	return rc;
}

INLINE int deny(struct packet *p, u32 reason)
{
	p->st->fwd.res = ACT_SHOT;
	p->st->fwd.reason = reason;
	if (reason)
		count(p, reason);
	LOG(p, "Final result=DENY (%d). Program execution time: %lluns", reason,
	    bpf_ktime_get_ns() - p->st->prog_start_time);
	return ACT_SHOT;
}

/* Finds what the packet needs; 0 to go on, else the program's result. */
INLINE int start(struct packet *p, struct __sk_buff *skb, u32 hook, int inwards)
{
	struct counters_key key = { .ifindex = skb->ifindex, .hook = hook };
	u32 zero = 0;

	p->skb = skb;
	p->ifindex = skb->ifindex;
	p->iface = lab_iface.lookup(&p->ifindex);
	p->st = cali_state6.lookup(&zero);
	p->counters = cali_counters6.lookup(&key);
	if (!p->st || !p->iface)
		return ACT_SHOT;
	if (!p->counters) {
#if LOG_DEBUG
		char line[] = "no counters for %d: DROP";
		bpf_trace_printk_(line, sizeof(line), p->ifindex);
#endif
		return ACT_SHOT;
	}
	p->tag = inwards ? p->iface->tag_in : p->iface->tag_out;
	__builtin_memset(p->st, 0, sizeof(*p->st));
#if LOG_DEBUG
	p->st->prog_start_time = bpf_ktime_get_ns();
#endif
	count(p, REASON_TOTAL);
	LOG(p, "New packet at ifindex=%d; mark=%x", p->ifindex, skb->mark);
	return 0;
}

INLINE int towards_host(struct packet *p, int rc)
{
	u32 mark = p->mark | MARK_SEEN;

	if (p->ct_flags & CT_FLAG_EXT_LOCAL)
		LOG(p, "To host marked with FLAG_EXT_LOCAL");
	LOG(p, "Traffic is towards host namespace, marking with 0x%x.", mark);
	p->skb->mark = mark;
	p->st->fwd.mark = mark;
	return finish(p, rc);
}

INLINE void log_forward(struct packet *p)
{
	LOG(p, "forward_or_drop fib %d", p->fib);
	LOG(p, "forward_or_drop mark 0x%x", p->mark);
	LOG(p, "forward_or_drop state flags 0x%x", p->st->flags);
}

/* Leave a packet that is not for us to the stack. */
INLINE int pass(struct packet *p, int inwards)
{
	p->fib = 0;
	p->mark = 0;
	p->ct_flags = 0;
	log_forward(p);
	return inwards ? towards_host(p, ACT_UNSPEC) : finish(p, ACT_UNSPEC);
}

INLINE void lower_ttl(struct packet *p)
{
	u8 ttl = p->ip.ttl - 1;

	bpf_l3_csum_replace(p->skb, IP_AT + 10, bpf_htons(p->ip.ttl << 8), bpf_htons(ttl << 8), 2);
	bpf_skb_store_bytes(p->skb, IP_AT + 8, &ttl, 1, 0);
	p->ip.ttl = ttl;
}

INLINE int forward(struct packet *p, int encapsulated)
{
	struct cali_tc_state *st = p->st;
	struct bpf_fib_lookup fib = {};
	int rc = ACT_UNSPEC, found;
	u32 src, dst;

	log_forward(p);
	if (p->redirect_back) {
		rc = bpf_redirect(p->redirect_back, 0);
		count(p, REASON_REDIRECT);
		LOG(p, "Redirect directly to interface (%d) succeeded.", p->redirect_back);
		return towards_host(p, rc);
	}
	if (!p->fib)
		return p->from_hep || p->wep == 2 ? towards_host(p, ACT_UNSPEC) : finish(p, ACT_UNSPEC);
	if (p->to_workload && p->from_hep && !encapsulated) {
		LOG(p, "Redirect to workload dev %d without fib lookup", p->to_workload);
		lower_ttl(p);
		count(p, REASON_REDIRECT_NEIGH);
		return towards_host(p, redirect_neigh(p->to_workload, 0, 0, 0));
	}
	src = p->ip.saddr;
	dst = p->ip.daddr;
	if (p->wep && !route(dst))
		LOG(p, "No route for %pI4 to forward from WEP", &dst);
	fib.family = 2;
	fib.ifindex = p->ifindex;
	fib.l4_protocol = p->ip.protocol;
	fib.sport = p->l4.source;
	fib.dport = p->l4.dest;
	fib.ipv4_src = src;
	fib.ipv4_dst = dst;
	LOG(p, "FIB family=%d", fib.family);
	LOG(p, "FIB ifindex=%d", fib.ifindex);
	LOG(p, "FIB l4_protocol=%d", fib.l4_protocol);
	LOG(p, "FIB sport=%d", bpf_ntohs(fib.sport));
	LOG(p, "FIB dport=%d", bpf_ntohs(fib.dport));
	LOG(p, "FIB ipv4_src=%pI4", &src);
	LOG(p, "FIB ipv4_dst=%pI4", &dst);
	LOG(p, "Traffic is towards the host namespace, doing Linux FIB lookup");
	found = bpf_fib_lookup(p->skb, &fib, sizeof(fib), 0);
	if (found == BPF_FIB_LKUP_RET_SUCCESS || found == BPF_FIB_LKUP_RET_NO_NEIGH) {
		u32 gateway = fib.ipv4_dst;

		LOG(p, "FIB lookup succeeded - gw %pI4", &gateway);
		LOG(p, "Got Linux FIB hit, redirecting to iface %d.", fib.ifindex);
		if (!encapsulated)
			lower_ttl(p);
		count(p, REASON_REDIRECT_NEIGH);
		rc = redirect_neigh(fib.ifindex, 0, 0, 0);
	} else if (found < 0) {
		LOG(p, "FIB lookup failed (bad input): %d.", found);
	} else {
		LOG(p, "FIB lookup failed (FIB problem): %d.", found);
	}
	return towards_host(p, rc);
}

INLINE int load_l4(struct packet *p)
{
	struct cali_tc_state *st = p->st;

	LOG(p, "IP ihl=%d bytes", (p->ip.version_ihl & 15) * 4);
	__builtin_memset(&p->l4, 0, sizeof(p->l4));
	if (p->ip.protocol == TCP) {
		if (bpf_skb_load_bytes(p->skb, L4_AT, &p->l4, sizeof(p->l4)))
			return -1;
		LOG(p, "TCP; ports: s=%d d=%d", bpf_ntohs(p->l4.source), bpf_ntohs(p->l4.dest));
	} else if (p->ip.protocol == UDP) {
		if (p->from_hep && p->skb->len < ENCAP_LEN) {
			LOG(p, "Pulling %d bytes.", ENCAP_LEN);
			LOG(p, "Pull failed (min len)");
		}
		if (bpf_skb_load_bytes(p->skb, L4_AT, &p->l4, 4))
			return -1;
		LOG(p, "UDP; ports: s=%d d=%d", bpf_ntohs(p->l4.source), bpf_ntohs(p->l4.dest));
	} else if (p->ip.protocol == ICMP) {
		u8 type[2];

		if (bpf_skb_load_bytes(p->skb, L4_AT, type, 2))
			return -1;
		LOG(p, "ICMP; type=%d code=%d", type[0], type[1]);
	} else {
		LOG(p, "Unknown protocol (%d), unable to extract ports", p->ip.protocol);
	}
	st->ip_src = p->ip.saddr;
	st->ip_dst = st->pre_nat_ip_dst = p->ip.daddr;
	st->ip_proto = p->ip.protocol;
	st->ip_size = p->ip.tot_len;
	st->ihl = 20;
	st->sport = bpf_ntohs(p->l4.source);
	st->dport = st->pre_nat_dport = bpf_ntohs(p->l4.dest);
	return 0;
}

enum { PARSED, NOT_OURS, TOO_SHORT };

INLINE int load_ip(struct packet *p)
{
	if (p->skb->protocol != bpf_htons(0x0800)) {
		if (p->skb->protocol == bpf_htons(0x0806))
			LOG(p, "ARP: allowing packet");
		else
			LOG(p, "Unknown ethertype (%x), allow", bpf_ntohs(p->skb->protocol));
		return NOT_OURS;
	}
	if (bpf_skb_load_bytes(p->skb, IP_AT, &p->ip, sizeof(p->ip)))
		return TOO_SHORT;
	LOG(p, "IP id=%d len=%d", bpf_ntohs(p->ip.id), bpf_ntohs(p->ip.tot_len));
	LOG(p, "IP s=%pI4 d=%pI4", &p->ip.saddr, &p->ip.daddr);
	return PARSED;
}

INLINE int is_syn(struct packet *p)
{
	return p->ip.protocol == TCP && (p->l4.flags & 0x12) == 0x02;
}

INLINE int wep_rpf(struct packet *p)
{
	struct cali_rt *rt = route(p->ip.saddr);

	if (!rt) {
		LOG(p, "Workload RPF fail: missing route.");
		return 0;
	}
	LOG(p, "Workload RPF check src=%pI4 rpf iface=%d.", &p->ip.saddr, rt->next_hop);
	if ((rt->flags & (RT_LOCAL | RT_WORKLOAD)) != (RT_LOCAL | RT_WORKLOAD)) {
		LOG(p, "Workload RPF fail: not a local workload.");
		return 0;
	}
	if (rt->next_hop != p->ifindex) {
		LOG(p, "Workload RPF fail skb iface (%d) != route iface (%d)", p->ifindex, rt->next_hop);
		return 0;
	}
	return 1;
}

enum { RPF_FAIL, RPF_STRICT, RPF_LOOSE };

INLINE int hep_rpf(struct packet *p)
{
#if RPF_MODE == 0
	LOG(p, "Host RPF check disabled");
	return RPF_STRICT;
#else
	struct bpf_fib_lookup fib = {};
	int rc, result = RPF_FAIL;

	fib.family = 2;
	fib.ifindex = p->ifindex;
	fib.l4_protocol = p->ip.protocol;
	fib.sport = p->l4.dest;
	fib.dport = p->l4.source;
	fib.ipv4_src = p->ip.daddr;
	fib.ipv4_dst = p->ip.saddr;
	rc = bpf_fib_lookup(p->skb, &fib, sizeof(fib), 0);
	if (rc == BPF_FIB_LKUP_RET_SUCCESS || rc == BPF_FIB_LKUP_RET_NO_NEIGH) {
#if RPF_MODE == 1
		result = fib.ifindex == p->ifindex ? RPF_STRICT : RPF_FAIL;
		LOG(p, "Host RPF check src=%pI4 skb strict if %d", &p->ip.saddr, fib.ifindex);
#else
		result = fib.ifindex == p->ifindex ? RPF_STRICT : RPF_LOOSE;
		LOG(p, "Host RPF check src=%pI4 skb loose if %d", &p->ip.saddr, fib.ifindex);
#endif
	}
	LOG(p, "Host RPF check src=%pI4 skb iface=%d", &p->ip.saddr, p->ifindex);
	LOG(p, "Host RPF check rc %d result %d", rc, result);
	return result;
#endif
}

INLINE void make_key(struct calico_ct_key *key, u8 proto, u32 saddr, u16 sport, u32 daddr, u16 dport)
{
	int source_is_a = saddr < daddr || (saddr == daddr && sport < dport);

	key->protocol = proto;
	key->addr_a = source_is_a ? saddr : daddr;
	key->addr_b = source_is_a ? daddr : saddr;
	key->port_a = source_is_a ? sport : dport;
	key->port_b = source_is_a ? dport : sport;
}

INLINE void ct_result(struct packet *p, s16 rc)
{
	if (rc == CT_NEW && !p->st->ct_result.flags && !p->ct_flags)
		LOG(p, "CT: result: NEW.");
	else
		LOG(p, "CT: result: 0x%x", rc | p->st->ct_result.flags);
	LOG(p, "conntrack entry flags 0x%x", p->ct_flags);
	p->st->ct_result.rc = rc;
}

INLINE s16 ct_miss(struct packet *p)
{
	if (p->ip.protocol != TCP) {
		LOG(p, "CT: Miss.");
		return CT_NEW;
	}
	if (is_syn(p)) {
		LOG(p, "CT: Miss for TCP SYN, NEW flow.");
		return CT_NEW;
	}
	LOG(p, "BPF CT Miss for mid-flow TCP");
	return CT_MID_FLOW_MISS;
}

INLINE s16 ct_find(struct packet *p, int to_wep)
{
	struct cali_tc_state *st = p->st;
	struct calico_ct_key key, rev_key;
	struct calico_ct_value *v;
	struct calico_ct_leg *src, *dst;
	int from_opener, forward_entry = 0, allowed;
	u32 opener_addr, tun_ip;
	u16 opener_port;
	s16 rc;

	LOG(p, "CT: lookup from %pI4:%d", &p->ip.saddr, st->sport);
	LOG(p, "CT: lookup to   %pI4:%d", &p->ip.daddr, st->dport);
	make_key(&key, p->ip.protocol, p->ip.saddr, st->sport, p->ip.daddr, st->dport);
	v = cali_v4_ct4.lookup(&key);
	if (!v)
		return ct_miss(p);
	v->last_seen = bpf_ktime_get_ns();
	if (v->type == ENTRY_NAT_FWD) {
		forward_entry = 1;
		LOG(p, "CT: Hit! NAT FWD entry, doing secondary lookup.");
		rev_key = v->nat_rev_key;
		v = cali_v4_ct4.lookup(&rev_key);
		if (!v) {
			LOG(p, "CT: Miss when looking for secondary entry.");
			return is_syn(p) || p->ip.protocol != TCP ? CT_NEW : CT_MID_FLOW_MISS;
		}
		v->last_seen = bpf_ktime_get_ns();
	} else {
		rev_key = key;
	}
	p->ct_flags = v->flags | (v->flags2 << 8);
	tun_ip = v->tun_ip;
	opener_addr = p->ct_flags & CT_FLAG_BA ? rev_key.addr_b : rev_key.addr_a;
	opener_port = p->ct_flags & CT_FLAG_BA ? rev_key.port_b : rev_key.port_a;
	from_opener = p->ip.saddr == opener_addr && st->sport == opener_port;
	if (!!(p->ct_flags & CT_FLAG_BA) == from_opener) {
		src = &v->b_to_a;
		dst = &v->a_to_b;
	} else {
		src = &v->a_to_b;
		dst = &v->b_to_a;
	}
	st->ct_result.tun_ip = tun_ip;
	if (forward_entry) {
		LOG(p, "CT: fwd tun_ip:%pI4", &tun_ip);
		LOG(p, "CT: result.flags 0x%x", p->ct_flags);
		st->ct_result.nat_ip = p->ct_flags & CT_FLAG_BA ? rev_key.addr_a : rev_key.addr_b;
		st->ct_result.nat_port = p->ct_flags & CT_FLAG_BA ? rev_key.port_a : rev_key.port_b;
		rc = CT_ESTABLISHED_DNAT;
		if (st->tun_ip && (p->ct_flags & CT_FLAG_NP_FWD) && !from_opener)
			LOG(p, "Packet returned from tunnel %pI4", &tun_ip);
	} else {
		LOG(p, "CT: tun_ip:%pI4", &tun_ip);
		/* The source is put back where the reply leaves towards the client: at the tunnel's end or the uplink. */
		if (!from_opener && (tun_ip || dst->ifindex == p->ifindex)) {
			LOG(p, "CT: Hit! NAT REV entry at ingress to connection opener: SNAT.");
			st->ct_result.nat_ip = v->orig_ip;
			st->ct_result.nat_port = v->orig_port;
			rc = CT_ESTABLISHED_SNAT;
		} else {
			LOG(p, "CT: Hit! NAT REV entry but not connection opener: ESTABLISHED.");
			rc = CT_ESTABLISHED;
		}
	}
	allowed = (dst->bits & LEG_APPROVED) || !to_wep;
	if (is_syn(p))
		st->ct_result.flags |= CT_RES_SYN;
	if (!allowed) {
		LOG(p, "CT: Packet not allowed by ingress/egress approval flags (FH).");
		if (is_syn(p)) {
			LOG(p, "CT: packet is SYN");
			rc = CT_NEW;
		} else {
			rc = p->ip.protocol == TCP ? CT_INVALID : CT_NEW;
		}
	}
	if ((src->bits & dst->bits & LEG_APPROVED))
		st->ct_result.flags |= CT_RES_CONFIRMED;
	/* Calico leaves the interface of a tunnelled UDP reply open. */
	if (!from_opener && !src->ifindex && (p->wep || p->ip.protocol == TCP)) {
		LOG(p, "CT: First response packet? ifindex=%d", p->ifindex);
		if (p->wep && !wep_rpf(p)) {
			LOG(p, "CT: CT RPF failed invalidating ifindex");
			rc = CT_INVALID;
		} else {
			LOG(p, "CT: Updating ifindex from %d to %d", src->ifindex, p->ifindex);
			src->ifindex = p->ifindex;
			if (p->wep)
				src->bits |= LEG_WORKLOAD;
		}
	}
	if (rc == CT_ESTABLISHED_DNAT && from_opener && (dst->bits & LEG_WORKLOAD)) {
		st->ct_result.flags |= CT_RES_TO_WORKLOAD;
		p->to_workload = dst->ifindex;
	}
	st->ct_result.ifindex_fwd = dst->ifindex;
	if (!(p->skb->mark & MARK_SEEN)) {
		src->packets++;
		src->bytes += p->skb->len;
	}
	if (p->ip.protocol == TCP) {
		if (p->l4.flags & 0x02) {
			src->bits |= LEG_SYN;
			src->seqno = p->l4.seq;
		}
		if (p->l4.flags & 0x10)
			src->bits |= LEG_ACK;
		if (p->l4.flags & 0x01)
			src->bits |= LEG_FIN;
		if (p->l4.flags & 0x04) {
			src->bits |= LEG_RST;
			if (!v->rst_seen)
				v->rst_seen = bpf_ktime_get_ns();
		}
	}
	return rc;
}

INLINE s16 ct_lookup(struct packet *p, int to_wep)
{
	s16 rc = ct_find(p, to_wep);

	ct_result(p, rc);
	if (rc != CT_NEW && rc != CT_MID_FLOW_MISS && rc != CT_INVALID)
		LOG(p, "CT Hit");
	return rc;
}

enum { NAT_NONE, NAT_FOUND, NAT_FE_DROP, NAT_NO_BACKEND };

INLINE int nat_lookup(struct packet *p)
{
	struct cali_tc_state *st = p->st;
	struct calico_nat_key key = { .prefixlen = 88, .addr = p->ip.daddr, .port = st->dport,
				      .protocol = p->ip.protocol };
	struct calico_nat_backend_key be_key;
	struct calico_nat_value *fe;
	struct calico_nat_dest *be;
	u32 number;

	__builtin_memcpy(key.saddr, &p->ip.saddr, 4);
	if (p->ip.protocol == TCP)
		LOG(p, "NAT: 1st level lookup addr=%pI4 port=%d tcp", &p->ip.daddr, st->dport);
	else if (p->ip.protocol == UDP)
		LOG(p, "NAT: 1st level lookup addr=%pI4 port=%d udp", &p->ip.daddr, st->dport);
	else
		LOG(p, "NAT: 1st level lookup addr=%pI4 port=%d other", &p->ip.daddr, st->dport);
	fe = cali_v4_nat_fe3.lookup(&key);
	if (!fe) {
		LOG(p, "NAT: Miss.");
		if (!st->tun_ip) {
			struct cali_rt *rt = route(p->ip.daddr);

			if (!rt) {
				LOG(p, "NAT: route miss");
				return NAT_NONE;
			}
			if (!(rt->flags & RT_HOST)) {
				LOG(p, "NAT: route dest not a host");
				return NAT_NONE;
			}
		}
		key.addr = 0xffffffff;
		fe = cali_v4_nat_fe3.lookup(&key);
		if (!fe) {
			LOG(p, "NAT: nodeport miss");
			return NAT_NONE;
		}
		LOG(p, "NAT: nodeport hit");
	}
	if (fe->count == FE_DROP)
		return NAT_FE_DROP;
	number = fe->count;
	st->nat_svc_id = fe->id;
	if (fe->flags & FE_EXTERNAL_LOCAL) {
		number = fe->local;
		LOG(p, "local_traffic %d", 0);
		LOG(p, "count %d flags 0x%x", number, fe->flags);
	} else if (st->tun_ip) {
		number = fe->local;
	}
	LOG(p, "NAT: 1st level hit; id=%d", fe->id);
	if (!number) {
		LOG(p, "NAT: no backend");
		return NAT_NO_BACKEND;
	}
	be_key.id = fe->id;
	be_key.ordinal = bpf_get_prandom_u32() % number;
	LOG(p, "NAT: 1st level hit; id=%d ordinal=%d", be_key.id, be_key.ordinal);
	be = cali_v4_nat_be.lookup(&be_key);
	if (!be) {
		LOG(p, "NAT: backend miss");
		return NAT_NO_BACKEND;
	}
	st->nat_dest = *be;
	LOG(p, "NAT: backend selected %pI4:%d", &st->nat_dest.addr, st->nat_dest.port);
	return NAT_FOUND;
}

/* Point one end of the packet elsewhere and mend both checksums. */
INLINE void rewrite(struct packet *p, int source, u32 new_ip, u16 new_port)
{
	int udp = p->ip.protocol == UDP;
	u32 csum_at = L4_AT + (udp ? 6 : 16), old_ip = source ? p->ip.saddr : p->ip.daddr;
	u64 mangled = udp ? BPF_F_MARK_MANGLED_0 : 0;
	u16 old_port = source ? p->l4.source : p->l4.dest, wire_port = bpf_htons(new_port);
	s64 diff = bpf_csum_diff(&old_ip, 4, &new_ip, 4, 0);
	int rc;

	if (source) {
		if (udp)
			LOG(p, "Fixing UDP dest port from %d to %d", p->st->dport, p->st->dport);
		else
			LOG(p, "Fixing TCP dest port from %d to %d", p->st->dport, p->st->dport);
		LOG(p, "SNAT L3 csum at %d L4 csum at %d", IP_AT + 10, csum_at);
		LOG(p, "L4 checksum update src IP from %pI4 to %pI4", &old_ip, &new_ip);
	} else {
		if (udp)
			LOG(p, "Fixing UDP source port from %d to %d", p->st->sport, p->st->sport);
		else
			LOG(p, "Fixing TCP source port from %d to %d", p->st->sport, p->st->sport);
		LOG(p, "DNAT L3 csum at %d L4 csum at %d", IP_AT + 10, csum_at);
		LOG(p, "L4 checksum update dst IP from %pI4 to %pI4", &old_ip, &new_ip);
	}
	LOG(p, "bpf_l4_csum_diff(IP): 0x%x", diff);
	bpf_l4_csum_replace(p->skb, csum_at, 0, diff, BPF_F_PSEUDO_HDR | mangled);
	if (source)
		LOG(p, "L4 checksum update sport from %d to %d", bpf_ntohs(old_port), new_port);
	else
		LOG(p, "L4 checksum update dport from %d to %d", bpf_ntohs(old_port), new_port);
	rc = bpf_l4_csum_replace(p->skb, csum_at, old_port, wire_port, 2 | mangled);
	if (source)
		LOG(p, "bpf_l4_csum_replace(sport): %d", rc);
	else
		LOG(p, "bpf_l4_csum_replace(dport): %d", rc);
	bpf_l3_csum_replace(p->skb, IP_AT + 10, old_ip, new_ip, 4);
	bpf_skb_store_bytes(p->skb, source ? IP_AT + 12 : IP_AT + 16, &new_ip, 4, 0);
	bpf_skb_store_bytes(p->skb, source ? L4_AT : L4_AT + 2, &wire_port, 2, 0);
	if (source) {
		p->ip.saddr = new_ip;
		p->l4.source = wire_port;
	} else {
		p->ip.daddr = new_ip;
		p->l4.dest = wire_port;
	}
}

INLINE u16 ip_checksum(struct ip4 *ip)
{
	u32 sum; /* not u64: BCC declares that bpf_csum_diff returns an int, and older kernels return all 32 bits */

	ip->check = 0;
	sum = bpf_csum_diff(0, 0, (__be32 *)ip, sizeof(*ip), 0);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Turn the packet into an ICMP error about itself, from the address it was sent to. */
INLINE int icmp_reply(struct packet *p, u32 code, u16 mtu)
{
	struct {
		u8 type, code;
		u16 check;
		u16 unused, mtu;
	} icmp = { .type = 3, .code = code, .mtu = bpf_htons(mtu) };
	struct ip4 ip = { .version_ihl = 0x45, .tot_len = bpf_htons(108), .ttl = 64, .protocol = ICMP,
			  .saddr = p->ip.daddr, .daddr = p->ip.saddr };
	void *data, *end;
	u32 sum;

	LOG(p, "jump to idx 3 prog at %d", p->base + 3);
	LOG(p, "Entering calico_tc_skb_send_icmp_replies");
	LOG(p, "ICMP type %d and code %d", 3, code);
	LOG(p, "Trimming to %d", 94);
	if (bpf_skb_change_tail(p->skb, 94, 0))
		return deny(p, 0);
	LOG(p, "Inserting %d", 28);
	if (bpf_skb_adjust_room(p->skb, 28, BPF_ADJ_ROOM_MAC, 0))
		return deny(p, 0);
	LOG(p, "Len after insert %d", p->skb->len);
	LOG(p, "ICMP v4 reply: from orig pre DNAT IP");
	ip.check = ip_checksum(&ip);
	bpf_skb_store_bytes(p->skb, IP_AT, &ip, sizeof(ip), 0);
	bpf_skb_store_bytes(p->skb, L4_AT, &icmp, sizeof(icmp), 0);
	if (bpf_skb_pull_data(p->skb, 122))
		return deny(p, 0);
	data = (void *)(long)p->skb->data;
	end = (void *)(long)p->skb->data_end;
	if (data + 122 > end)
		return deny(p, 0);
	sum = bpf_csum_diff(0, 0, data + L4_AT, 88, 0);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	icmp.check = ~sum;
	LOG(p, "ICMP: checksum 0x%x len %d", icmp.check, 88);
	bpf_skb_store_bytes(p->skb, L4_AT, &icmp, sizeof(icmp), 0);
	LOG(p, "ICMP v4 reply creation succeeded");
	LOG(p, "IP ihl=%d bytes", 20);
	p->mark = MARK_BYPASS_FWD;
	p->fib = 0;
	p->st->flags = 0;
	log_forward(p);
	return towards_host(p, ACT_UNSPEC);
}

/* 0 done; 1 does not fit the tunnel; negative: the kernel refused. */
INLINE int encap(struct packet *p, u32 to, int is_return)
{
	struct tunnel t = {};
	u32 from = HOST_IP;
	u16 inner = bpf_ntohs(p->ip.tot_len);

	if ((p->ip.frag_off & bpf_htons(0x4000)) && !p->skb->gso_segs && p->skb->len > ETH_LEN + TUNNEL_MTU) {
		LOG(p, "SKB too long (len=%d) vs limit=%d", p->skb->len, ETH_LEN + TUNNEL_MTU);
		LOG(p, "Return ICMP mtu is too big");
		return 1;
	}
	LOG(p, "vxlan encap %x : %x", bpf_ntohl(from), bpf_ntohl(to));
	lower_ttl(p);
	if (bpf_skb_adjust_room(p->skb, ENCAP_LEN, BPF_ADJ_ROOM_MAC,
				BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
				BPF_F_ADJ_ROOM_ENCAP_L2(ETH_LEN)))
		return -1;
	t.ip.version_ihl = 0x45;
	t.ip.tos = p->ip.tos;
	t.ip.tot_len = bpf_htons(inner + ENCAP_LEN);
	t.ip.id = p->ip.id;
	t.ip.frag_off = p->ip.frag_off & bpf_htons(0x4000);
	t.ip.ttl = p->ip.ttl;
	t.ip.protocol = UDP;
	t.ip.saddr = from;
	t.ip.daddr = to;
	t.ip.check = ip_checksum(&t.ip);
	t.udp.source = p->l4.source ^ p->l4.dest;
	t.udp.dest = bpf_htons(CALI_TUNNEL_PORT);
	t.udp.len = bpf_htons(inner + ENCAP_LEN - 20);
	t.vxlan_flags = bpf_htonl(0x08000000);
	t.vni = bpf_htonl(CALI_VNI << 8);
	t.proto = bpf_htons(0x0800);
	if (bpf_skb_store_bytes(p->skb, IP_AT, &t, sizeof(t), BPF_F_INVALIDATE_HASH))
		return -1;
	p->ip = t.ip;
	p->l4.source = t.udp.source;
	p->l4.dest = t.udp.dest;
	p->st->ip_src = from;
	p->st->ip_dst = to;
	p->st->ip_proto = UDP;
	p->st->sport = bpf_ntohs(t.udp.source);
	p->st->dport = CALI_TUNNEL_PORT;
	LOG(p, "vxlan return %d ifindex_fwd %d", is_return, p->st->ct_result.ifindex_fwd);
	return 0;
}

INLINE void log_policy(struct packet *p)
{
	LOG(p, "About to jump to policy program.");
	LOG(p, "policy allow prog at %d", p->base + 2);
	LOG(p, "policy deny prog at %d", p->base + 4);
	LOG(p, "jump to policy prog at %d", p->base);
}

INLINE void accepted(struct packet *p)
{
	struct cali_tc_state *st = p->st;

	LOG(p, "Entering calico_tc_skb_accepted_entrypoint fib %d", p->fib);
	LOG(p, "Entering calico_tc_skb_accepted");
	LOG(p, "src=%pI4 dst=%pI4", &st->ip_src, &st->ip_dst);
	LOG(p, "post_nat=%pI4:%d", &st->post_nat_ip_dst, st->post_nat_dport);
	LOG(p, "tun_ip=%pI4", &st->tun_ip);
	LOG(p, "pol_rc=%d", st->pol_rc);
	LOG(p, "sport=%d", st->sport);
	LOG(p, "dport=%d", st->dport);
	LOG(p, "flags=%x", st->flags);
	LOG(p, "ct_rc=%d", st->ct_result.rc);
	LOG(p, "ct_related=%d", 0);
	LOG(p, "mark=0x%x", 0);
	if (st->flags & ST_SKIP_FIB) {
		LOG(p, "Disabling FIB lookup due to SKIP_FIB flag");
		p->fib = 0;
	}
	LOG(p, "ip->ttl %d", p->ip.ttl);
}

INLINE void hit(struct packet *p)
{
	p->st->pol_rc = 1;
	p->st->flags = ST_SET_DSCP | ST_SKIP_POLICY;
	LOG(p, "jump to idx 2 prog at %d", p->base + 2);
	accepted(p);
}

INLINE void hep_policy(struct packet *p)
{
	p->st->flags |= ST_SET_DSCP | ST_SKIP_POLICY;
	log_policy(p);
	p->st->pol_rc = 1;
	LOG(p, "HEP with no policy, allow.");
	LOG(p, "jump to idx 2 prog at %d", p->base + 2);
	accepted(p);
	count(p, REASON_ACCEPTED_BY_POLICY);
	LOG(p, "jump to idx 7 prog at %d", p->base + 7);
	LOG(p, "Entering calico_tc_skb_new_flow");
	LOG(p, "Allowed by policy: ACCEPT");
	if (p->st->flags & ST_SKIP_FIB)
		LOG(p, "Disabling FIB lookup due to SKIP_FIB flag");
}

INLINE int mid_flow(struct packet *p, int inwards)
{
	LOG(p, "CT mid-flow miss; fall through to iptables");
	p->fib = 0;
	p->mark = MARK_FALLTHROUGH;
	log_forward(p);
	return inwards ? towards_host(p, ACT_UNSPEC) : finish(p, ACT_UNSPEC);
}

/* Both entries of a new NodePort flow. */
INLINE int ct_create(struct packet *p, u32 flags, u32 tun_ip)
{
	struct cali_tc_state *st = p->st;
	struct calico_ct_key fwd_key, rev_key;
	struct calico_ct_value v = {};
	struct calico_ct_leg *src, *dst;
	int encapsulate = flags & CT_FLAG_NP_FWD;
	u64 now = bpf_ktime_get_ns();

	make_key(&rev_key, p->ip.protocol, p->ip.saddr, st->sport, st->post_nat_ip_dst, st->post_nat_dport);
	make_key(&fwd_key, p->ip.protocol, p->ip.saddr, st->sport, p->ip.daddr, st->dport);
	flags |= CT_FLAG_SET_DSCP;
	LOG(p, "CT-ALL packet mark is: 0x%x", p->skb->mark);
	LOG(p, "CT-ALL Creating tracking entry type %d at %llu.", ENTRY_NAT_REV, now);
	LOG(p, "CT-ALL tracking entry flags 0x%x", flags);
	LOG(p, "CT-ALL SNAT orig %pI4:%d", &p->ip.saddr, st->sport);
	if (tun_ip) {
		if (encapsulate)
			LOG(p, "CT-ALL nat tunneled to %pI4", &tun_ip);
		else
			LOG(p, "CT-ALL nat tunneled from %pI4", &tun_ip);
	}
	v.last_seen = now;
	v.type = ENTRY_NAT_REV;
	v.tun_ip = tun_ip;
	v.orig_ip = p->ip.daddr;
	v.orig_port = st->dport;
	v.orig_sport = st->sport;
	v.orig_sip = p->ip.saddr;
	if (rev_key.addr_a == p->ip.saddr && rev_key.port_a == st->sport) {
		src = &v.a_to_b;
		dst = &v.b_to_a;
	} else {
		src = &v.b_to_a;
		dst = &v.a_to_b;
		flags |= CT_FLAG_BA;
	}
	v.flags = flags;
	v.flags2 = flags >> 8;
	src->packets = 1;
	src->bytes = p->skb->len;
	src->seqno = p->l4.seq;
	src->bits = LEG_APPROVED | LEG_OPENER | (is_syn(p) ? LEG_SYN : 0);
	src->ifindex = p->ifindex;
	if (encapsulate)
		dst->bits = LEG_APPROVED;
	LOG(p, "NEW src_to_dst->ifindex %d", p->ifindex);
	LOG(p, "CT-ALL approved source side - from HEP tun allow_return=%d", !!encapsulate);
	if (cali_v4_ct4.update(&rev_key, &v))
		return -1;
	__builtin_memset(&v, 0, sizeof(v));
	v.last_seen = now;
	v.type = ENTRY_NAT_FWD;
	v.nat_rev_key = rev_key;
	LOG(p, "CT-%d Creating FWD entry at %llu.", p->ip.protocol, now);
	LOG(p, "FWD %pI4 -> %pI4", &p->ip.saddr, &p->ip.daddr);
	return cali_v4_ct4.update(&fwd_key, &v) ? -1 : 0;
}

INLINE int hep_encap(struct packet *p, u32 to)
{
	int rc;

	LOG(p, "marking CALI_SKB_MARK_BYPASS_FWD");
	p->mark = MARK_BYPASS_FWD;
	p->ct_flags = 0;
	rc = encap(p, to, 0);
	if (rc > 0)
		return icmp_reply(p, 4, TUNNEL_MTU);
	if (rc < 0)
		return deny(p, REASON_ENCAP_FAIL);
	return forward(p, 1);
}

/* 0 decapsulated, 1 leave it alone, 2 drop: source not known, 3 drop: cannot. */
INLINE int decap(struct packet *p)
{
	struct { u8 dst[6], src[6]; } eth;
	struct arp_value arp;
	struct arp_key key = { .ip = p->ip.saddr, .ifindex = p->ifindex };
	struct { u16 check; u32 flags, vni; } __attribute__((packed)) head;
	u32 outer = p->ip.saddr, host = HOST_IP;
	struct cali_rt *rt;

	if (bpf_skb_load_bytes(p->skb, L4_AT + 6, &head, sizeof(head)))
		return 1;
	if (bpf_ntohl(head.vni) >> 8 != CALI_VNI) {
		LOG(p, "VXLAN: Not our VNI 0x%x", bpf_ntohl(head.vni) >> 8);
		return 1;
	}
	LOG(p, "VXLAN tunnel packet to %pI4 (host IP=%pI4)", &p->ip.daddr, &host);
	rt = route(outer);
	if (!rt || (rt->flags & (RT_HOST | RT_LOCAL)) != RT_HOST) {
		LOG(p, "VXLAN with our VNI (0x%x) from unexpected source.", CALI_VNI);
		return 2;
	}
	if (head.check) {
		LOG(p, "VXLAN with our VNI but incorrect checksum.");
		return 2;
	}
	if (bpf_skb_load_bytes(p->skb, 0, &eth, sizeof(eth)))
		return 3;
	__builtin_memcpy(arp.mac_src, eth.dst, 6);
	__builtin_memcpy(arp.mac_dst, eth.src, 6);
	LOG(p, "ARP update for ifindex %d ip %pI4", p->ifindex, &outer);
	cali_v4_arp2.update(&key, &arp);
	LOG(p, "vxlan decap");
	if (bpf_skb_adjust_room(p->skb, -ENCAP_LEN, BPF_ADJ_ROOM_MAC, 0))
		return 3;
	if (bpf_skb_load_bytes(p->skb, IP_AT, &p->ip, sizeof(p->ip)))
		return 3;
	LOG(p, "vxlan decap origin %pI4", &outer);
	if (load_l4(p))
		return 3;
	p->st->tun_ip = outer;
	return 0;
}

/* Uplink, ingress: into the host. */
int cali_from_hep(struct __sk_buff *skb)
{
	struct packet p = { .base = 0, .fib = 1, .from_hep = 1 };
	struct cali_tc_state *st;
	struct cali_rt *rt, *source;
	u32 flags, tun_ip;
	int rc;

	if (skb->pkt_type == PACKET_OTHERHOST) /* the fabric floods what it has not learnt */
		return ACT_UNSPEC;
	LOG_UNTAGGED("No metadata is shared by XDP");
	rc = start(&p, skb, HOOK_INGRESS, 1);
	if (rc)
		return rc;
	st = p.st;
	rc = load_ip(&p);
	if (rc == NOT_OURS || (rc == PARSED && p.ip.version_ihl != 0x45))
		return pass(&p, 1);
	if (rc == TOO_SHORT || load_l4(&p))
		return deny(&p, REASON_SHORT);
	if (p.ip.protocol == UDP && p.l4.dest == bpf_htons(CALI_TUNNEL_PORT) && p.ip.daddr == HOST_IP) {
		rc = decap(&p);
		if (rc == 1)
			return pass(&p, 1);
		if (rc)
			return deny(&p, rc == 2 ? REASON_UNAUTH_SOURCE : REASON_DECAP_FAIL);
	}
	rc = ct_lookup(&p, 0);
	if (rc == CT_MID_FLOW_MISS)
		return mid_flow(&p, 1);
	if (rc == CT_INVALID)
		return deny(&p, 0);
	if (rc != CT_NEW) {
		hit(&p);
		if (rc == CT_ESTABLISHED_DNAT && st->tun_ip && (p.ct_flags & CT_FLAG_NP_FWD)) {
			LOG(&p, "returned from NAT tunnel");
			p.mark = MARK_BYPASS_FWD;
			return forward(&p, 0);
		}
		if (rc == CT_ESTABLISHED_DNAT) {
			LOG(&p, "CT: DNAT to %pI4:%d", &st->ct_result.nat_ip, st->ct_result.nat_port);
			if (p.ct_flags & CT_FLAG_NP_FWD) {
				LOG(&p, "CT says encap to node %pI4", &st->ct_result.tun_ip);
				return hep_encap(&p, st->ct_result.tun_ip);
			}
			rewrite(&p, 0, st->ct_result.nat_ip, st->ct_result.nat_port);
		}
		return forward(&p, 0);
	}
	rc = nat_lookup(&p);
	if (rc == NAT_FE_DROP) {
		LOG(&p, "Packet is from an unauthorised source: DROP");
		return deny(&p, REASON_UNAUTH_SOURCE);
	}
	if (rc == NAT_NO_BACKEND)
		return icmp_reply(&p, 3, 0);
	st->post_nat_ip_dst = rc == NAT_FOUND ? st->nat_dest.addr : p.ip.daddr;
	st->post_nat_dport = rc == NAT_FOUND ? st->nat_dest.port : st->dport;
	if (!st->tun_ip && hep_rpf(&p) == RPF_FAIL)
		return deny(&p, 0);
	source = route(p.ip.saddr);
	if (!source || (source->flags & (RT_HOST | RT_LOCAL)) == RT_HOST)
		LOG(&p, "Remote host or outside cluster source %pI4", &p.ip.saddr);
	rt = route(st->post_nat_ip_dst);
	if (!rt) {
		LOG(&p, "No route for post DNAT dest %pI4", &st->post_nat_ip_dst);
		st->flags |= ST_SKIP_FIB;
	}
	hep_policy(&p);
	if (rc != NAT_FOUND) {
		p.fib = 0;
		return forward(&p, 0);
	}
	LOG(&p, "CT: DNAT to %pI4:%d", &st->post_nat_ip_dst, st->post_nat_dport);
	if (!rt) {
		LOG(&p, "missing rt found for %pI4", &st->post_nat_ip_dst);
		return deny(&p, REASON_RT_UNKNOWN);
	}
	LOG(&p, "rt found for %pI4 local %d", &st->post_nat_ip_dst, !!(rt->flags & RT_LOCAL));
	if (rt->flags & RT_LOCAL) {
		LOG(&p, "CT_NEW marked with FLAG_EXT_LOCAL");
		flags = CT_FLAG_EXT_LOCAL;
		tun_ip = st->tun_ip;
	} else {
		flags = CT_FLAG_NP_FWD;
		tun_ip = rt->next_hop;
	}
	if (ct_create(&p, flags, tun_ip))
		return deny(&p, REASON_CT_CREATE_FAILED);
	if (flags & CT_FLAG_NP_FWD)
		return hep_encap(&p, tun_ip);
	p.ct_flags = flags;
	rewrite(&p, 0, st->post_nat_ip_dst, st->post_nat_dport);
	return forward(&p, 0);
}

/* Uplink, egress: out of the host. */
int cali_to_hep(struct __sk_buff *skb)
{
	struct packet p = { .base = 20 };
	struct cali_rt *rt;
	int rc;

	rc = start(&p, skb, HOOK_EGRESS, 0);
	if (rc)
		return rc;
	rc = load_ip(&p);
	if (rc == PARSED && (skb->mark & MARK_BYPASS) == MARK_BYPASS) {
		count(&p, REASON_BYPASS);
		LOG(&p, "Final result=ALLOW (%d). Bypass mark set.", REASON_BYPASS);
		return ACT_UNSPEC;
	}
	if (rc == NOT_OURS || (rc == PARSED && p.ip.version_ihl != 0x45))
		return pass(&p, 0);
	if (rc == TOO_SHORT || load_l4(&p))
		return deny(&p, REASON_SHORT);
	if (p.ip.protocol == UDP && p.l4.dest == bpf_htons(CALI_TUNNEL_PORT)) {
		rt = route(p.ip.daddr);
		if (rt && (rt->flags & RT_HOST)) {
			LOG(&p, "VXLAN packet to known Calico host, allow.");
			return pass(&p, 0);
		}
	}
	rc = ct_lookup(&p, 0);
	if (rc == CT_MID_FLOW_MISS)
		return mid_flow(&p, 0);
	if (rc == CT_INVALID)
		return deny(&p, 0);
	if (rc == CT_NEW) {
		p.st->post_nat_ip_dst = p.ip.daddr;
		p.st->post_nat_dport = p.st->dport;
		hep_policy(&p);
		return forward(&p, 0);
	}
	hit(&p);
	if (rc == CT_ESTABLISHED_SNAT) {
		LOG(&p, "CT: SNAT from %pI4:%d", &p.st->ct_result.nat_ip, p.st->ct_result.nat_port);
		rewrite(&p, 1, p.st->ct_result.nat_ip, p.st->ct_result.nat_port);
	}
	return forward(&p, 0);
}

INLINE int policy_deny(struct packet *p)
{
	struct cali_tc_state *st = p->st;

	LOG(p, "Entering calico_tc_skb_drop");
	LOG(p, "proto=%d", st->ip_proto);
	LOG(p, "src=%pI4 dst=%pI4", &st->ip_src, &st->ip_dst);
	LOG(p, "pre_nat=%pI4:%d", &st->pre_nat_ip_dst, st->pre_nat_dport);
	LOG(p, "post_nat=%pI4:%d", &st->post_nat_ip_dst, st->post_nat_dport);
	LOG(p, "pol_rc=%d", st->pol_rc);
	LOG(p, "flags=0x%x", st->flags);
	LOG(p, "ct_rc=%d", st->ct_result.rc);
	LOG(p, "DENY due to policy");
	count(p, REASON_DROPPED_BY_POLICY);
	st->fwd.res = ACT_SHOT;
	return ACT_SHOT;
}

/* The pod's interface, egress: to the pod. */
int cali_to_wep(struct __sk_buff *skb)
{
	struct packet p = { .base = 60, .wep = 1 };
	struct calico_ct_value *v;
	struct calico_ct_key key;
	struct cali_tc_state *st;
	struct cali_rt *rt;
	u64 rule, *hits;
	int rc;

	rc = start(&p, skb, HOOK_EGRESS, 1);
	if (rc)
		return rc;
	st = p.st;
	rc = load_ip(&p);
	if (rc == NOT_OURS || (rc == PARSED && p.ip.version_ihl != 0x45))
		return pass(&p, 0);
	if (rc == TOO_SHORT || load_l4(&p))
		return deny(&p, REASON_SHORT);
	rc = ct_lookup(&p, 1);
	p.to_workload = 0;
	if (rc == CT_MID_FLOW_MISS)
		return mid_flow(&p, 0);
	if (rc == CT_INVALID)
		return deny(&p, 0);
	if (rc != CT_NEW) {
		hit(&p);
		return forward(&p, 0);
	}
	st->post_nat_ip_dst = p.ip.daddr;
	st->post_nat_dport = st->dport;
	st->flags = ST_SET_DSCP;
	rt = route(p.ip.saddr);
	if (!(skb->mark & MARK_SEEN) && rt && (rt->flags & (RT_HOST | RT_LOCAL)) == (RT_HOST | RT_LOCAL)) {
		LOG(&p, "Packet is from the host: ACCEPT");
		st->pol_rc = 1;
	} else {
		log_policy(&p);
		rule = p.iface->rule_id;
		st->rules_hit = 1;
		st->rule_ids[0] = rule;
		hits = cali_rule_ctrs2.lookup(&rule);
		if (hits) {
			(*hits)++;
		} else {
			u64 one = 1;

			cali_rule_ctrs2.update(&rule, &one);
		}
		st->pol_rc = p.iface->verdict;
		if (st->pol_rc != 1)
			return policy_deny(&p);
		count(&p, REASON_ACCEPTED_BY_POLICY);
	}
	accepted(&p);
	LOG(&p, "jump to idx 7 prog at %d", p.base + 7);
	LOG(&p, "Entering calico_tc_skb_new_flow");
	LOG(&p, "Allowed by policy: ACCEPT");
	make_key(&key, p.ip.protocol, p.ip.saddr, st->sport, p.ip.daddr, st->dport);
	v = cali_v4_ct4.lookup(&key);
	if (v && v->type == ENTRY_NAT_REV) {
		LOG(&p, "CT-ALL packet mark is: 0x%x", skb->mark);
		if (v->flags2 & (CT_FLAG_BA >> 8)) {
			LOG(&p, "CT-ALL update src_to_dst B->A");
			v->a_to_b.bits |= LEG_APPROVED;
		} else {
			LOG(&p, "CT-ALL update src_to_dst A->B");
			v->b_to_a.bits |= LEG_APPROVED;
		}
	}
	return forward(&p, 0);
}

/* The pod's interface, ingress: from the pod. */
int cali_from_wep(struct __sk_buff *skb)
{
	struct packet p = { .base = 40, .fib = 1, .wep = 2 };
	struct cali_tc_state *st;
	struct arp_value *arp;
	struct arp_key key;
	int rc;

	rc = start(&p, skb, HOOK_INGRESS, 0);
	if (rc)
		return rc;
	st = p.st;
	rc = load_ip(&p);
	if (rc == NOT_OURS || (rc == PARSED && p.ip.version_ihl != 0x45))
		return pass(&p, 1);
	if (rc == TOO_SHORT || load_l4(&p))
		return deny(&p, REASON_SHORT);
	rc = ct_lookup(&p, 0);
	if (rc == CT_INVALID)
		return deny(&p, 0);
	if (rc == CT_NEW || rc == CT_MID_FLOW_MISS) {
		if (!wep_rpf(&p))
			return deny(&p, 0);
		if (rc == CT_MID_FLOW_MISS)
			return mid_flow(&p, 1);
		log_policy(&p);
		st->pol_rc = 1;
		st->post_nat_ip_dst = p.ip.daddr;
		st->post_nat_dport = st->dport;
		p.fib = 0;
		accepted(&p);
		count(&p, REASON_ACCEPTED_BY_POLICY);
		return forward(&p, 0);
	}
	hit(&p);
	if (rc != CT_ESTABLISHED_SNAT)
		return forward(&p, 0);
	LOG(&p, "CT: SNAT from %pI4:%d", &st->ct_result.nat_ip, st->ct_result.nat_port);
	if (st->ct_result.tun_ip) {
		rewrite(&p, 1, st->ct_result.nat_ip, st->ct_result.nat_port);
		rc = encap(&p, st->ct_result.tun_ip, 1);
		if (rc > 0)
			return icmp_reply(&p, 4, TUNNEL_MTU);
		if (rc < 0)
			return deny(&p, REASON_ENCAP_FAIL);
		key.ip = st->ct_result.tun_ip;
		key.ifindex = st->ct_result.ifindex_fwd;
		arp = cali_v4_arp2.lookup(&key);
		if (arp) {
			bpf_skb_store_bytes(skb, 0, arp->mac_dst, 6, 0);
			bpf_skb_store_bytes(skb, 6, arp->mac_src, 6, 0);
			p.redirect_back = key.ifindex;
		} else {
			LOG(&p, "ARP lookup failed for %pI4 dev %d", &key.ip, key.ifindex);
		}
		return forward(&p, 1);
	}
	rewrite(&p, 1, st->ct_result.nat_ip, st->ct_result.nat_port);
	return forward(&p, 0);
}
#endif /* PIN_DIR */
