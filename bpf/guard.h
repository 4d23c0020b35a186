/* SPDX-License-Identifier: GPL-2.0 */
/*
 * guard, at the node side of a pod's veth: nothing leaves a captured pod that the connect hook has not seen.
 *
 * skb->sk survives the veth hop, so what the hook decided about the sending socket can be read here:
 *
 *   any TCP packet of a captured socket -> drop: the pod's rule or route is gone, the mark was changed, the
 *                                          socket is bound to a device (also data of an open connection)
 *   data of a direct socket that knows  -> redirected before all else: the packet is of its own connection, by
 *   its way (near.h)                       its addresses and ports
 *   SYN of an agent's socket            -> pass
 *   SYN of a vouched socket             -> pass, unless the packet's destination is mesh (DNAT in the pod)
 *   SYN of a direct socket              -> pass, if the packet's destination is the pod that it was let go to;
 *                                          near.h says by which way, also for all packets after it
 *   SYN without a socket, or unvouched  -> drop: raw and packet sockets, forwarding, sockets from before the
 *                                          hook was in place
 *   TCP and UDP from a foreign address, ARP and neighbour advertisements for one -> drop: the neighbour's identity
 *
 * All other packets pass: answers to connections that came in, UDP, ICMP; of UDP see udp.h and dns.h. Forwarded and native-XDP
 * traffic has no skb->sk; the agent does not enrol pods behind such an interface.
 */
#pragma once

#include "near.h"
#include "udp.h"
#include "dns.h"

struct arp_packet {
	__u16 hardware, protocol;
	__u8 hardware_len, protocol_len;
	__u16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

static __always_inline int guard_tcp(struct __sk_buff *skb, struct bpf_sock *sk, const struct transport *t)
{
	struct tcp_header tcp;
	if (bpf_skb_load_bytes(skb, t->at, &tcp, 14))
		return shoot(GUARD_DROP_MALFORMED); /* a header split over fragments hides its flags */
	bool syn = (tcp.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	struct flow f = {.client = t->src, .server = t->dst, .client_port = ntohs(tcp.source), .server_port = ntohs(tcp.destination)};

	if (!sk)
		return syn ? shoot(GUARD_DROP_NO_SOCKET) : near_packet(skb, t, 0, &f, false, false);

	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
	if (v && v->fate == FATE_CAPTURED)
		return shoot(GUARD_DROP_CAPTURED);
	if (!syn) {
		if (v && v->fate != FATE_DIRECT)
			return TC_NEXT;
		return near_packet(skb, t, sk, &f, v != 0, sk->type == SOCK_STREAM);
	}
	if (bpf_sk_storage_get(&agent_sockets, sk, 0, 0)) {
		count(GUARD_AGENT);
		return TC_NEXT;
	}
	if (v && v->fate == FATE_DIRECT) {
		struct owner *o = bpf_map_lookup_elem(&owners, &t->dst);
		if (!o || o->slot != v->slot)
			return shoot(GUARD_DROP_DIRECT);
		count(GUARD_DIRECT);
		return near_syn(skb, t, &f);
	}
	if (!v || v->fate != FATE_VOUCHED)
		return shoot(GUARD_DROP_UNVOUCHED);
	if (is_mesh(&t->dst))
		return shoot(GUARD_DROP_MESH);
	bpf_map_delete_elem(&nears, &f); /* of a connection that had the same ports when this was mesh */
	count(GUARD_VOUCHED);
	return TC_NEXT;
}

static __always_inline int guard_udp(struct __sk_buff *skb, struct guarded *g, struct transport *t)
{
	int verdict = udp_leaves(skb, t);
	return verdict == TC_NEXT ? dns_leaves(skb, g, t) : verdict;
}

static __always_inline int guard_ipv4(struct __sk_buff *skb, struct bpf_sock *sk, struct guarded *g)
{
	struct transport t = {};
	enum packet p = ipv4_transport(skb, &t);
	if (p == MALFORMED)
		return shoot(GUARD_DROP_MALFORMED);
	if (p == LATER) /* 1: begins before the flags (RFC 3128) */
		return t.protocol == IPPROTO_TCP && t.offset == 1 ? shoot(GUARD_DROP_MALFORMED) : TC_NEXT;
	bool own = addr_eq(&t.src, &g->v4);
	switch (t.protocol) {
	case IPPROTO_TCP:
		return own ? guard_tcp(skb, sk, &t) : shoot(GUARD_DROP_SOURCE);
	case IPPROTO_UDP:
		if (own)
			return guard_udp(skb, g, &t);
		/* 0: who has no address yet asks for one */
		return t.src.w[3] == 0 ? udp_leaves(skb, &t) : shoot(GUARD_DROP_SOURCE);
	}
	return TC_NEXT;
}

static __always_inline bool link_local(const struct addr *a)
{
	return (a->w[0] & htonl(0xffc00000)) == htonl(0xfe800000);
}

static __always_inline int guard_ipv6(struct __sk_buff *skb, struct bpf_sock *sk, struct guarded *g)
{
	struct transport t = {};
	enum packet p = ipv6_transport(skb, &t);
	if (p == MALFORMED)
		return shoot(GUARD_DROP_MALFORMED);
	if (p == LATER)
		return TC_NEXT;
	bool own = addr_eq(&t.src, &g->v6) || link_local(&t.src);
	switch (t.protocol) {
	case IPPROTO_TCP:
		return own ? guard_tcp(skb, sk, &t) : shoot(GUARD_DROP_SOURCE);
	case IPPROTO_UDP:
		return own ? guard_udp(skb, g, &t) : shoot(GUARD_DROP_SOURCE);
	case IPPROTO_ICMPV6: {
		__u8 type;
		struct addr target;
		if (bpf_skb_load_bytes(skb, t.at, &type, 1))
			return shoot(GUARD_DROP_MALFORMED);
		if (type != 136) /* neighbour advertisement */
			return TC_NEXT;
		if (bpf_skb_load_bytes(skb, t.at + 8, &target, sizeof(target)))
			return shoot(GUARD_DROP_MALFORMED);
		if (!addr_eq(&target, &g->v6) && !link_local(&target))
			return shoot(GUARD_DROP_NEIGHBOUR);
	}
	}
	return TC_NEXT;
}

static __always_inline int guard_arp(struct __sk_buff *skb, struct guarded *g)
{
	struct arp_packet arp;
	if (bpf_skb_load_bytes(skb, ETH_LEN, &arp, sizeof(arp)))
		return shoot(GUARD_DROP_MALFORMED);
	__u32 sender;
	__builtin_memcpy(&sender, arp.sender_ip, sizeof(sender));
	if (sender != 0 && sender != g->v4.w[3]) /* 0: a probe whether an address is in use */
		return shoot(GUARD_DROP_NEIGHBOUR);
	return TC_NEXT;
}

SEC("tc")
int mesh_guard(struct __sk_buff *skb)
{
	struct bpf_sock *sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk) {
		__u32 to = near_way(skb, sk);
		if (to)
			return bpf_redirect_peer(to, 0);
	}
	__u32 ifindex = skb->ifindex;
	struct guarded *g = bpf_map_lookup_elem(&guards, &ifindex);
	if (!g)
		return TC_NEXT; /* released */
	if (skb->vlan_present)
		return shoot(GUARD_DROP_VLAN);
	switch (skb->protocol) {
	case htons(ETH_P_IP):
		return guard_ipv4(skb, sk, g);
	case htons(ETH_P_IPV6):
		return guard_ipv6(skb, sk, g);
	case htons(ETH_P_ARP):
		return guard_arp(skb, g);
	case htons(ETH_P_8021Q):
	case htons(ETH_P_8021AD):
		return shoot(GUARD_DROP_VLAN);
	}
	return TC_NEXT;
}
