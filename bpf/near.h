/* SPDX-License-Identifier: GPL-2.0 */
/*
 * near: the packets of a direct connection go from the one pod's veth into the other pod, past the node's stack.
 *
 *   TCP_CONNECT_CB  both pods may take the short way (user space says so, see datapath/near.go): written down
 *   its SYN         the guard asks the node's routing for the way. Not that veth: forgotten, and with it the short way
 *   every packet    from the pod that it is said to be from: redirected. The sockets of a connection that lasts know the
 *                   way after some packets, so that nothing is looked up; until user space takes back any way
 *   STATE_CB        one end is closed, then the other: forgotten some thousand connections later
 *
 * All packets of a connection take the same way, so that conntrack sees all of it or nothing: one that saw a SYN and
 * nothing else would hold on to it for minutes, and take the next packet for invalid. What is late, such as the
 * acknowledgement of a FIN that was sent again, comes within the grace.
 *
 * A fragment takes the ordinary way, since nothing tells whose its other parts are; so does what the node's routing
 * would have answered rather than forwarded, because its hop limit is at its end.
 */
#pragma once

#include "packet.h"

enum near_ends {
	NEAR_CLIENT = 1,
	NEAR_SERVER = 2,
	NEAR_BOTH = 3,
};

/* Changed by user space after it has taken entries out of nears: ways of before do not hold. Of each loading its own. */
SEC(".data.near") volatile __u64 near_generation = 0;

/* After how many packets of both sides a socket learns its way: a short connection is not worth it. */
#define NEAR_LASTS 16

/* The short way is taken for both pods, or for neither. */
static __always_inline void near_begin(const struct flow *f, const struct pod *client, __u64 server_cookie)
{
	struct pod *server = bpf_map_lookup_elem(&pods, &server_cookie);
	if (!server || !client->near || client->near != server->near) {
		count(NEAR_DETOUR);
		bpf_map_delete_elem(&nears, f); /* of an earlier connection */
		return;
	}
	struct near n = {.client = client->ifindex, .server = server->ifindex};
	if (bpf_map_update_elem(&nears, f, &n, BPF_ANY))
		count(NEAR_FULL);
}

/* The queue is not exact where two programs are at one place of it at once, thousands of connections apart: then one
 * stays until user space finds it. */
static __always_inline void near_end(const struct flow *f, __u32 ends)
{
	struct near *n = bpf_map_lookup_elem(&nears, f);
	if (!n)
		return;
	__u32 before = __sync_fetch_and_or(&n->ended, ends);
	if (before == NEAR_BOTH || (before | ends) != NEAR_BOTH)
		return;
	__u32 zero = 0;
	__u32 *next = bpf_map_lookup_elem(&nears_next, &zero);
	if (!next)
		return;
	__u32 at = __sync_fetch_and_add(next, 1) % NEARS_ENDED;
	struct flow *place = bpf_map_lookup_elem(&nears_ended, &at);
	if (!place)
		return;
	struct flow old = *place;
	*place = *f;
	n = bpf_map_lookup_elem(&nears, &old);
	if (n && n->ended == NEAR_BOTH) /* or the next connection has the same ports */
		bpf_map_delete_elem(&nears, &old);
}

static __always_inline bool routed_to(struct __sk_buff *skb, const struct flow *f, __u32 ifindex)
{
	if (skb->pkt_type != PACKET_HOST)
		return true; /* a bridge's, and both pods are on it */
	bool v4 = addr_is_v4(&f->server);
	struct bpf_fib_lookup l = {.family = v4 ? AF_INET : AF_INET6, .l4_protocol = IPPROTO_TCP, .ifindex = skb->ifindex,
				   .sport = htons(f->client_port), .dport = htons(f->server_port)};
	if (v4) {
		l.src[0] = f->client.w[3];
		l.dst[0] = f->server.w[3];
	} else {
		__builtin_memcpy(l.src, f->client.w, sizeof(l.src));
		__builtin_memcpy(l.dst, f->server.w, sizeof(l.dst));
	}
	long err = bpf_fib_lookup(skb, &l, sizeof(l), 0);
	return (err == BPF_FIB_LKUP_RET_SUCCESS || err == BPF_FIB_LKUP_RET_NO_NEIGH) && l.ifindex == ifindex;
}

static __always_inline bool may_be_redirected(const struct transport *t)
{
	return !t->fragment && t->hops > 1;
}

static __always_inline int redirect(struct __sk_buff *skb, const struct transport *t, __u32 ifindex)
{
	if (!may_be_redirected(t) || (skb->pkt_type != PACKET_HOST && bpf_skb_change_type(skb, PACKET_HOST)))
		return TC_NEXT;
	return bpf_redirect_peer(ifindex, 0);
}

/* The SYN of a direct connection. */
static __always_inline int near_syn(struct __sk_buff *skb, const struct transport *t, const struct flow *f)
{
	struct near *n = bpf_map_lookup_elem(&nears, f);
	if (!n)
		return TC_NEXT;
	if (n->client != skb->ifindex || !may_be_redirected(t) || !routed_to(skb, f, n->server)) {
		count(NEAR_ELSEWHERE);
		bpf_map_delete_elem(&nears, f);
		return TC_NEXT;
	}
	count(NEAR_REDIRECTED);
	return redirect(skb, t, n->server);
}

/* sk: that sent the packet, 0 if it is none that could know its way. */
static __always_inline int near_known(struct __sk_buff *skb, const struct transport *t, struct bpf_sock *sk, const struct flow *f,
				      struct near *n, __u64 generation, __u32 to)
{
	if (sk && n->packets < NEAR_LASTS) {
		n->packets++; /* two at once: one more or less */
	} else if (sk) {
		struct way w = {.generation = generation, .flow = *f, .from = skb->ifindex, .to = to};
		struct way *old = bpf_sk_storage_get(&ways, sk, &w, BPF_SK_STORAGE_GET_F_CREATE);
		if (old && old->generation != generation)
			*old = w;
	}
	return redirect(skb, t, to);
}

/* Any other packet, f as if its sender were the client. A socket of the kernel's own, which answers for connections that
 * are over, tells neither. */
static __always_inline int near_packet(struct __sk_buff *skb, const struct transport *t, struct bpf_sock *sk, const struct flow *f,
				       bool is_client, bool is_server)
{
	__u64 generation = near_generation; /* before what is looked up: see near_generation */
	struct near *n;
	if (!is_client) {
		struct flow back = {.client = f->server, .server = f->client, .client_port = f->server_port, .server_port = f->client_port};
		n = bpf_map_lookup_elem(&nears, &back);
		if (n && n->server == skb->ifindex)
			return near_known(skb, t, is_server ? sk : 0, f, n, generation, n->client);
		if (is_server)
			return TC_NEXT;
	}
	n = bpf_map_lookup_elem(&nears, f);
	if (!n || n->client != skb->ifindex)
		return TC_NEXT;
	return near_known(skb, t, is_client ? sk : 0, f, n, generation, n->server);
}

/* Whether a packet is one of a flow that is under way, and nothing out of the ordinary. What is not has the long way
 * round of the guard. */
static __always_inline bool is_plainly(struct __sk_buff *skb, const struct flow *f)
{
	volatile struct __sk_buff *s = skb;
	void *data = (void *)(unsigned long)s->data, *end = (void *)(unsigned long)s->data_end;
	if (skb->vlan_present)
		return false;
	if (skb->protocol == htons(ETH_P_IP)) {
		struct ipv4_header *ip = data + ETH_LEN;
		struct tcp_header *tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end)
			return false;
		return ip->version_ihl == 0x45 && ip->protocol == IPPROTO_TCP && ip->ttl > 1 &&
		       !(ip->fragment & htons(MORE_FRAGMENTS | FRAGMENT_OFFSET)) && addr_is_v4(&f->client) &&
		       ip->source == f->client.w[3] && ip->destination == f->server.w[3] && ntohs(tcp->source) == f->client_port &&
		       ntohs(tcp->destination) == f->server_port && !(tcp->flags & TCP_SYN);
	}
	if (skb->protocol == htons(ETH_P_IPV6)) {
		struct ipv6_header *ip = data + ETH_LEN;
		struct tcp_header *tcp = (void *)(ip + 1);
		if ((void *)(tcp + 1) > end)
			return false;
		return ip->next == IPPROTO_TCP && ip->hops > 1 && addr_eq(&ip->source, &f->client) && addr_eq(&ip->destination, &f->server) &&
		       ntohs(tcp->source) == f->client_port && ntohs(tcp->destination) == f->server_port && !(tcp->flags & TCP_SYN);
	}
	return false;
}

/* A packet of a socket that knows its way: to which interface, or 0. */
static __always_inline __u32 near_way(struct __sk_buff *skb, struct bpf_sock *sk)
{
	struct way *w = bpf_sk_storage_get(&ways, sk, 0, 0);
	if (!w || w->generation != near_generation || w->from != skb->ifindex || skb->pkt_type != PACKET_HOST || !is_plainly(skb, &w->flow))
		return 0;
	return w->to;
}
