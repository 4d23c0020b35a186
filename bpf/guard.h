/* SPDX-License-Identifier: GPL-2.0 */
/*
 * guard, at the node side of a pod's veth: nothing leaves a captured pod that the connect hook has not seen.
 *
 * skb->sk survives the veth hop, so what the hook decided about the sending socket can be read here:
 *
 *   any TCP packet of a captured socket -> drop: the pod's rule or route is gone, the mark was changed, the
 *                                          socket is bound to a device (also data of an open connection)
 *   SYN of an agent's socket            -> pass
 *   SYN of a vouched socket             -> pass, unless the packet's destination is mesh (DNAT in the pod)
 *   SYN of a direct socket              -> pass, if the packet's destination is the pod that it was let go to
 *   SYN without a socket, or unvouched  -> drop: raw and packet sockets, forwarding, sockets from before the
 *                                          hook was in place
 *   TCP from a foreign address, ARP and neighbour advertisements for one -> drop: the neighbour's identity
 *
 * All other packets pass: answers to connections that came in, UDP, ICMP. Forwarded and native-XDP traffic has
 * no skb->sk; the agent does not enrol pods behind such an interface.
 */
#pragma once

#include "maps.h"

#define TCP_SYN 0x02
#define TCP_ACK 0x10

/* Read from the packet by bpf_skb_load_bytes: also right for packets whose headers are not linear. */
struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__u32 source;
	__u32 destination;
};

struct ipv6_header {
	__u32 flow;
	__u16 length;
	__u8 next;
	__u8 hops;
	struct addr source;
	struct addr destination;
};

struct tcp_header {
	__u16 source;
	__u16 destination;
	__u32 sequence;
	__u32 acknowledged;
	__u8 offset;
	__u8 flags;
};

struct arp_packet {
	__u16 hardware, protocol;
	__u8 hardware_len, protocol_len;
	__u16 operation;
	__u8 sender_mac[6];
	__u8 sender_ip[4];
	__u8 target_mac[6];
	__u8 target_ip[4];
};

#define ETH_LEN 14
#define FRAGMENT_OFFSET 0x1fff
#define MAX_EXTENSIONS 6

static __always_inline int shoot(enum outcome o)
{
	count(o);
	return TC_SHOT;
}

/* at: where the TCP header begins. */
static __always_inline int guard_tcp(struct __sk_buff *skb, __u32 at, const struct addr *dst)
{
	struct tcp_header tcp;
	if (bpf_skb_load_bytes(skb, at, &tcp, 14))
		return shoot(GUARD_DROP_MALFORMED); /* a header split over fragments hides its flags */
	bool syn = (tcp.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;

	struct bpf_sock *sk = skb->sk;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (!sk)
		return syn ? shoot(GUARD_DROP_NO_SOCKET) : TC_NEXT;

	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
	if (v && v->fate == FATE_CAPTURED)
		return shoot(GUARD_DROP_CAPTURED);
	if (!syn)
		return TC_NEXT;
	if (bpf_sk_storage_get(&agent_sockets, sk, 0, 0)) {
		count(GUARD_AGENT);
		return TC_NEXT;
	}
	if (v && v->fate == FATE_DIRECT) {
		struct owner *o = bpf_map_lookup_elem(&owners, dst);
		if (!o || o->slot != v->slot)
			return shoot(GUARD_DROP_DIRECT);
		count(GUARD_DIRECT);
		return TC_NEXT;
	}
	if (!v || v->fate != FATE_VOUCHED)
		return shoot(GUARD_DROP_UNVOUCHED);
	if (is_mesh(dst))
		return shoot(GUARD_DROP_MESH);
	count(GUARD_VOUCHED);
	return TC_NEXT;
}

static __always_inline int guard_ipv4(struct __sk_buff *skb, struct guarded *g)
{
	struct ipv4_header ip;
	struct addr src, dst;
	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)))
		return shoot(GUARD_DROP_MALFORMED);
	if (ip.protocol != IPPROTO_TCP)
		return TC_NEXT;
	__u16 fragment = ntohs(ip.fragment) & FRAGMENT_OFFSET;
	if (fragment > 1) /* of no use without the first one */
		return TC_NEXT;
	__u32 ihl = (ip.version_ihl & 0x0f) * 4;
	if (fragment == 1 || ihl < sizeof(ip)) /* 1: begins before the flags (RFC 3128) */
		return shoot(GUARD_DROP_MALFORMED);
	addr_from_v4(&src, ip.source);
	addr_from_v4(&dst, ip.destination);
	if (!addr_eq(&src, &g->v4))
		return shoot(GUARD_DROP_SOURCE);
	return guard_tcp(skb, ETH_LEN + ihl, &dst);
}

static __always_inline bool link_local(const struct addr *a)
{
	return (a->w[0] & htonl(0xffc00000)) == htonl(0xfe800000);
}

static __always_inline int guard_ipv6(struct __sk_buff *skb, struct guarded *g)
{
	struct ipv6_header ip;
	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)))
		return shoot(GUARD_DROP_MALFORMED);

	__u32 at = ETH_LEN + sizeof(ip);
	__u8 next = ip.next;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 ext[4];
		if (next != 0 && next != 43 && next != 44 && next != 51 && next != 60)
			break;
		if (bpf_skb_load_bytes(skb, at, ext, sizeof(ext)))
			return shoot(GUARD_DROP_MALFORMED);
		if (next == 44) { /* fragment */
			if (((ext[2] << 8) | ext[3]) & 0xfff8)
				return TC_NEXT; /* of no use without the first one */
			at += 8;
		} else if (next == 51) { /* authentication */
			at += (ext[1] + 2) * 4;
		} else { /* hop-by-hop, routing, destination options */
			at += (ext[1] + 1) * 8;
		}
		next = ext[0];
	}

	if (next == 0 || next == 43 || next == 44 || next == 51 || next == 60)
		return shoot(GUARD_DROP_MALFORMED); /* more extension headers than anyone needs */
	if (next == IPPROTO_TCP) {
		if (!addr_eq(&ip.source, &g->v6) && !link_local(&ip.source))
			return shoot(GUARD_DROP_SOURCE);
		return guard_tcp(skb, at, &ip.destination);
	}
	if (next == IPPROTO_ICMPV6) {
		__u8 type;
		struct addr target;
		if (bpf_skb_load_bytes(skb, at, &type, 1))
			return shoot(GUARD_DROP_MALFORMED);
		if (type != 136) /* neighbour advertisement */
			return TC_NEXT;
		if (bpf_skb_load_bytes(skb, at + 8, &target, sizeof(target)))
			return shoot(GUARD_DROP_MALFORMED);
		if (!addr_eq(&target, &g->v6) && !link_local(&target))
			return shoot(GUARD_DROP_NEIGHBOUR);
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
	__u32 ifindex = skb->ifindex;
	struct guarded *g = bpf_map_lookup_elem(&guards, &ifindex);
	if (!g)
		return TC_NEXT; /* released */
	if (skb->vlan_present)
		return shoot(GUARD_DROP_VLAN);
	switch (skb->protocol) {
	case htons(ETH_P_IP):
		return guard_ipv4(skb, g);
	case htons(ETH_P_IPV6):
		return guard_ipv6(skb, g);
	case htons(ETH_P_ARP):
		return guard_arp(skb, g);
	case htons(ETH_P_8021Q):
	case htons(ETH_P_8021AD):
		return shoot(GUARD_DROP_VLAN);
	}
	return TC_NEXT;
}
