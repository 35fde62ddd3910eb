// SPDX-License-Identifier: GPL-2.0
// The lab's broken underlay: a firewall between the nodes that loses VXLAN.
// Hook: tc ingress of the fabric's bridge ports towards the nodes. Cost: one header load per frame.

#define ETHERTYPE_IPV4 0x0800
#define PROTOCOL_UDP 17
#define MORE_OFFSET 0x1fff
#define PASS 0
#define SHOT 2

int fabric_vxlan(struct __sk_buff *skb)
{
	__u16 ethertype = 0, offset = 0, dport = 0;
	__u8 version = 0, protocol = 0;

	if (bpf_skb_load_bytes(skb, 12, &ethertype, sizeof(ethertype)) || ethertype != bpf_htons(ETHERTYPE_IPV4))
		return PASS;
	if (bpf_skb_load_bytes(skb, 14, &version, sizeof(version)) ||
	    bpf_skb_load_bytes(skb, 23, &protocol, sizeof(protocol)) || protocol != PROTOCOL_UDP)
		return PASS;
	if (bpf_skb_load_bytes(skb, 20, &offset, sizeof(offset)) || offset & bpf_htons(MORE_OFFSET))
		return PASS;
	if (bpf_skb_load_bytes(skb, 14 + (version & 0xf) * 4 + 2, &dport, sizeof(dport)))
		return PASS;
	return dport == bpf_htons(VXLAN_PORT) ? SHOT : PASS;
}
