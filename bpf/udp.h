/* SPDX-License-Identifier: GPL-2.0 */
/*
 * udp, at the node side of a pod's veth: what policy says about each datagram to a pod whose namespace asks for it.
 *
 * From the pod (udp_leaves, called by the guard). For every captured pod: the source address is the pod's own, as other
 * nodes go by it. For a pod that asks for it, who began is noted:
 *
 *   to a peer that was let in on that port before -> an answer; the pod began nothing
 *   any other                                     -> the pod began it: what comes back is an answer, for as long as a
 *                                                    connection tracker would have it so
 *
 * To the pod (mesh_udp, at the egress of the veth, attached only where it is asked for):
 *
 *   an answer to what the pod began            -> pass
 *   of an address of this node, by another veth -> drop: the address is used by who does not have it
 *   any other                                  -> decided by policy, each datagram anew
 *
 * Both places see the addresses that the pod uses: DNAT of services is between them. A datagram's ports are in its first
 * fragment, the whole header, or it is dropped; the others are of no use without the first and pass.
 *
 * The tables of who began what are each pod's own, of a fixed size: a flood costs only its pod anything.
 */
#pragma once

#include "decide.h"
#include "packet.h"

#define UDP_ANSWER_NS (30ULL * 1000 * 1000 * 1000)  /* after the pod's datagram, for the first answer */
#define UDP_STREAM_NS (120ULL * 1000 * 1000 * 1000) /* after the last one of either side */

struct udp_header {
	__u16 source;
	__u16 destination;
	__u16 length;
	__u16 checksum;
};

static __always_inline struct udp_gate *udp_gate_of(__u32 ifindex)
{
	struct udp_gate *g = bpf_map_lookup_elem(&udp_gates, &ifindex);
	/* A value that is being replaced must not pass for another pod's. */
	return g && ((volatile struct udp_gate *)g)->ifindex == ifindex ? g : 0;
}

static __always_inline int udp_leaves(struct __sk_buff *skb, struct transport *t)
{
	struct udp_gate *g = udp_gate_of(skb->ifindex);
	if (!g)
		return TC_NEXT;
	struct udp_header udp;
	if (bpf_skb_load_bytes(skb, t->at, &udp, sizeof(udp)))
		return shoot(UDP_DROP_MALFORMED);
	__u32 slot = g->slot;
	__u64 now = bpf_ktime_get_ns();

	void *let_in = bpf_map_lookup_elem(&udp_let_in, &slot);
	if (let_in) {
		struct udp_peer peer = {.peer = t->dst, .port = ntohs(udp.source)};
		__u64 *last = bpf_map_lookup_elem(let_in, &peer);
		if (last && now - *last < UDP_STREAM_NS) {
			*last = now;
			return TC_NEXT;
		}
	}
	void *begun = bpf_map_lookup_elem(&udp_begun, &slot);
	if (!begun)
		return TC_NEXT;
	struct flow f = {.client = t->src, .server = t->dst, .client_port = ntohs(udp.source), .server_port = ntohs(udp.destination)};
	struct udp_flow *old = bpf_map_lookup_elem(begun, &f);
	if (old && now - old->last < UDP_STREAM_NS) {
		old->last = now;
		return TC_NEXT;
	}
	struct udp_flow new = {.last = now};
	bpf_map_update_elem(begun, &f, &new, BPF_ANY);
	count(UDP_BEGUN);
	return TC_NEXT;
}

static __always_inline bool udp_is_answer(__u32 slot, const struct flow *in, __u64 now)
{
	void *begun = bpf_map_lookup_elem(&udp_begun, &slot);
	if (!begun)
		return false;
	struct flow f = {.client = in->server, .server = in->client, .client_port = in->server_port, .server_port = in->client_port};
	struct udp_flow *began = bpf_map_lookup_elem(begun, &f);
	if (!began || now - began->last >= (began->answered ? UDP_STREAM_NS : UDP_ANSWER_NS))
		return false;
	began->answered = 1;
	began->last = now;
	return true;
}

static __always_inline int udp_arrives(struct __sk_buff *skb, struct udp_gate *g, struct transport *t)
{
	struct udp_header udp;
	if (bpf_skb_load_bytes(skb, t->at, &udp, sizeof(udp)))
		return shoot(UDP_DROP_MALFORMED);
	__u32 slot = g->slot;
	__u64 now = bpf_ktime_get_ns();
	struct flow f = {.client = t->src, .server = t->dst, .client_port = ntohs(udp.source), .server_port = ntohs(udp.destination)};
	if (udp_is_answer(slot, &f, now)) {
		count(UDP_ANSWER);
		return TC_NEXT;
	}

	__u64 identity = 0;
	struct udp_source *s = bpf_map_lookup_elem(&udp_sources, &t->src);
	if (s) {
		/* A bridge shows itself where it hands a packet to the node and takes it back. */
		__u32 from = skb->ingress_ifindex;
		if (s->ifindex && from != s->ifindex && (!s->bridge || from != s->bridge))
			return shoot(UDP_DENIED_SOURCE);
		identity = s->identity;
	}

	__u64 rules = addr_is_v4(&t->dst) ? g->v4 : g->v6;
	struct reason why;
	int d = rules ? decide(rules, identity, &t->src, f.server_port, &why) : LEFT_TO_AGENT;
	if (d == LEFT_TO_AGENT) /* no agent sees a datagram */
		return shoot(UDP_DENIED_UNKNOWN);
	if (d == DENIED) {
		struct owner *o = bpf_map_lookup_elem(&owners, &t->src);
		struct target none = {};
		tell_denied_as(EVENT_DENIED_UDP, slot, o ? o->slot : NO_SLOT, slot, &f, &none, identity, rules, &why);
		return shoot(UDP_DENIED);
	}
	void *let_in = bpf_map_lookup_elem(&udp_let_in, &slot);
	if (let_in) {
		struct udp_peer peer = {.peer = t->src, .port = f.server_port};
		bpf_map_update_elem(let_in, &peer, &now, BPF_ANY);
	}
	count(UDP_ALLOWED);
	return TC_NEXT;
}

SEC("tc")
int mesh_udp(struct __sk_buff *skb)
{
	struct udp_gate *g = udp_gate_of(skb->ifindex);
	if (!g)
		return TC_NEXT; /* not asked for any more */
	if (skb->vlan_present)
		return shoot(UDP_DROP_MALFORMED);

	struct transport t = {};
	enum packet p = NOT_IP;
	switch (skb->protocol) {
	case htons(ETH_P_IP):
		p = ipv4_transport(skb, &t);
		break;
	case htons(ETH_P_IPV6):
		p = ipv6_transport(skb, &t);
		break;
	}
	if (p == MALFORMED)
		return shoot(UDP_DROP_MALFORMED);
	if (p != WHOLE || t.protocol != IPPROTO_UDP)
		return TC_NEXT;
	return udp_arrives(skb, g, &t);
}
