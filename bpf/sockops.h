/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sockops: writes the tickets with which a connection reaches the application in a pod past sk_lookup.
 *
 *   TCP_CONNECT_CB          the source port is known, the SYN is not sent yet: write the ticket
 *   PASSIVE_ESTABLISHED_CB  the application's side exists: the ticket is used up
 *   STATE_CB, to CLOSE      the connecting side is gone: should the ticket still be there, remove it
 *                           the application's side of a direct connection is gone: tell what it carried
 *                           either side of one is gone: see near.h
 *
 * Three kinds of sockets get tickets: those of the node's own processes, such as kubelet's probes, which are in
 * the node's namespace and outside the pods' cgroup; the agent's, dialling the application inside the
 * pod's namespace under the real client's address; and those that the connect hook lets go to another pod directly,
 * whose tickets say who connects and by which rules. A direct connection is in a map of its own from here to the
 * server's close, so that the agent can end it when policy changes.
 *
 * A ticket that stays behind is a way around the agent for whoever gets the same 4-tuple, hence all three
 * events, the lifetime, and no LRU map, in which one pod's flood would push out its neighbours' tickets.
 */
#pragma once

#include "near.h"
#include "decide.h"
#include "service.h"

#define MAX_UNSENT (128 << 10) /* half of it has to be sent before poll says that there is room again */

/* The connection as seen from the connecting socket. For IPv4 the kernel keeps the mapped form in the IPv6
 * fields only of some sockets, so those are not relied on. */
static __always_inline void flow_of_client(struct bpf_sock_ops *ctx, struct flow *f)
{
	volatile struct bpf_sock_ops *c = ctx;
	READ_ADDR(&f->client, c, local);
	READ_ADDR(&f->server, c, remote);
	f->client_port = c->local_port;
	f->server_port = ntohl(c->remote_port);
}

static __always_inline void flow_of_server(struct bpf_sock_ops *ctx, struct flow *f)
{
	struct flow c = {};
	flow_of_client(ctx, &c);
	f->client = c.server;
	f->server = c.client;
	f->client_port = c.server_port;
	f->server_port = c.client_port;
}

static __always_inline void handshake_ended(__u32 account)
{
	__s32 *out = bpf_map_lookup_elem(&handshakes, &account);
	if (out)
		__sync_fetch_and_sub(out, 1);
}

enum whose {
	NOBODYS,
	AGENTS_OR_NODES,
	CLIENTS, /* of a direct connection */
};

/* Returns whose ticket it was. Only one of two racing deletions succeeds, so each is taken off its pod's account once. */
static __always_inline enum whose drop_ticket(struct flow *f, enum outcome o)
{
	struct ticket *t = bpf_map_lookup_elem(&tickets, f);
	if (!t)
		return NOBODYS;
	__u32 account = t->account;
	enum whose w = t->identity ? CLIENTS : AGENTS_OR_NODES;
	if (bpf_map_delete_elem(&tickets, f) != 0)
		return NOBODYS;
	handshake_ended(account);
	count(o);
	return w;
}

static __always_inline bool write_ticket(struct bpf_sock_ops *ctx, struct flow *f, struct ticket *t, enum outcome o)
{
	__u32 account = t->account;
	__s32 *out = bpf_map_lookup_elem(&handshakes, &account);
	if (!out)
		return false;
	if (__sync_fetch_and_add(out, 1) >= TICKETS_PER_POD) {
		__sync_fetch_and_sub(out, 1);
		count(TICKET_DENIED_QUOTA);
		return false;
	}
	t->born = bpf_ktime_get_ns();
	/* An int: before Linux 6.4 the upper half of what a map's operation returns is not its sign. */
	int err = bpf_map_update_elem(&tickets, f, t, BPF_NOEXIST);
	if (err == -EEXIST) { /* left behind under the same 4-tuple, and on somebody's account already */
		struct ticket *old = bpf_map_lookup_elem(&tickets, f);
		handshake_ended(old ? old->account : account);
		err = bpf_map_update_elem(&tickets, f, t, BPF_ANY);
	} else if (err) {
		__sync_fetch_and_sub(out, 1);
	}
	if (err) {
		count(TICKET_DENIED_FULL);
		return false;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	count(o);
	return true;
}

/* The connection is in the map before its SYN leaves: whoever changes a policy and then looks, finds it. */
static __always_inline void connecting_direct(struct bpf_sock_ops *ctx, struct flow *f, __u64 cookie, struct owner *o,
					      struct verdict *v)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || v->slot != o->slot || !pod->identity ||
	    !(addr_eq(&f->client, &pod->v4) || addr_eq(&f->client, &pod->v6)))
		return;
	struct direct d = {.client = cookie, .server = o->cookie, .identity = pod->identity, .rules = v->rules,
			   .client_slot = pod->slot, .server_slot = o->slot, .service = v->service};
	struct ticket t = {.identity = pod->identity, .rules = v->rules, .account = MAX_PODS + pod->slot};
	if (bpf_map_update_elem(&directs, f, &d, BPF_ANY)) {
		count(TICKET_DENIED_FULL);
		return;
	}
	if (!write_ticket(ctx, f, &t, TICKET_DIRECT)) {
		bpf_map_delete_elem(&directs, f);
		return;
	}
	near_begin(f, pod, o->cookie);
}

static __always_inline void established_direct(struct bpf_sock_ops *ctx, struct flow *f, struct direct *d)
{
	d->established = bpf_ktime_get_ns();
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	tell_direct(EVENT_OPENED, f, d, 0, 0);
}

/* The client is gone before there was a server. */
static __always_inline void forget_direct(struct flow *f, __u64 cookie)
{
	struct direct *d = bpf_map_lookup_elem(&directs, f);
	if (d && d->client != cookie)
		return;
	bool alone = d && !d->established;
	if (alone)
		bpf_map_delete_elem(&directs, f);
	near_end(f, alone ? NEAR_BOTH : NEAR_CLIENT);
}

static __always_inline void closed_direct(struct bpf_sock_ops *ctx, struct flow *f, __u64 cookie)
{
	struct direct *d = bpf_map_lookup_elem(&directs, f);
	if (!d || !d->established || d->closed || d->server != cookie)
		return;
	volatile struct bpf_sock_ops *c = ctx;
	__u64 sent = c->bytes_received, received = c->bytes_acked;
	struct bpf_sock *sk = c->sk;
	struct tcp_sock *tcp = sk ? bpf_skc_to_tcp_sock(sk) : 0;
	if (tcp) { /* the kernel counts a FIN as a byte */
		__u32 state = c->args[0];
		bool fin_made = state == BPF_TCP_FIN_WAIT1 || state == BPF_TCP_FIN_WAIT2 || state == BPF_TCP_CLOSING ||
				state == BPF_TCP_LAST_ACK;
		if (fin_made && tcp->snd_una == tcp->write_seq)
			received--;
		if (((struct sock *)tcp)->__sk_common.skc_flags & (1UL << SOCK_DONE))
			sent--;
	}
	near_end(f, NEAR_SERVER);
	if (tell_direct(EVENT_CLOSED, f, d, sent, received)) {
		bpf_map_delete_elem(&directs, f);
		return;
	}
	count(EVENT_LATE); /* user space looks for it */
	d->sent = sent;
	d->received = received;
	d->closed = bpf_ktime_get_ns();
}

static __always_inline void connecting(struct bpf_sock_ops *ctx, __u64 cookie)
{
	struct flow f = {};
	flow_of_client(ctx, &f);
	struct owner *o = bpf_map_lookup_elem(&owners, &f.server);
	struct bpf_sock *sk = ((volatile struct bpf_sock_ops *)ctx)->sk;
	if (!o || !sk)
		return;
	struct ticket t = {.account = o->slot};
	if (cookie == o->cookie) {
		if (bpf_sk_storage_get(&agent_sockets, sk, 0, 0))
			write_ticket(ctx, &f, &t, TICKET_AGENT);
		return;
	}
	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
	if (cookie == node_cookie) {
		if (v && v->fate == FATE_HOST_POD)
			count(TICKET_DENIED_HOST_POD);
		else
			write_ticket(ctx, &f, &t, TICKET_NODE);
	} else if (v && v->fate == FATE_DIRECT) {
		connecting_direct(ctx, &f, cookie, o, v);
	}
}

static __always_inline void closed(struct bpf_sock_ops *ctx, __u64 cookie)
{
	struct bpf_sock *sk = ((volatile struct bpf_sock_ops *)ctx)->sk;
	if (!sk)
		return;
	struct flow f = {};
	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
	if (!v && cookie != node_cookie && !bpf_sk_storage_get(&agent_sockets, sk, 0, 0)) {
		flow_of_server(ctx, &f);
		closed_direct(ctx, &f, cookie);
		return;
	}
	flow_of_client(ctx, &f);
	drop_ticket(&f, TICKET_UNUSED);
	if (v && v->fate == FATE_DIRECT)
		forget_direct(&f, cookie);
}

/*
 * An application's socket, whose peer is the agent in the same namespace.
 *
 * What the application has written and a stalled peer does not take is the node's memory. Over loopback, with an MSS of
 * 64 KiB, the kernel would have each such socket hold 2.5 MB of it from the start: 20 times what the same socket
 * holds towards a network. A lower bound that the application has set stays.
 *
 * Nor is there a network that congestion control could spare: see datapath.unpaced.
 */
static __always_inline void towards_agent(struct bpf_sock_ops *ctx)
{
	char reno[] = "reno";
	bpf_setsockopt(ctx, IPPROTO_TCP, TCP_CONGESTION, reno, sizeof(reno));
	__u32 unsent = 0; /* 0 and, of a listener that also takes MPTCP, the largest number: unbounded */
	bpf_getsockopt(ctx, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof(unsent));
	if (unsent && unsent < MAX_UNSENT)
		return;
	unsent = MAX_UNSENT;
	bpf_setsockopt(ctx, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof(unsent));
}

static __always_inline bool is_captured(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ((volatile struct bpf_sock_ops *)ctx)->sk;
	return sk && (sk->mark & ((1U << DRAW_SHIFT) - 1)) == capture_mark;
}

SEC("sockops")
int mesh_sockops(struct bpf_sock_ops *ctx)
{
	__u64 cookie;
	struct flow f = {};

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		if (is_captured(ctx))
			towards_agent(ctx);
		connecting(ctx, bpf_get_netns_cookie(ctx));
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		cookie = bpf_get_netns_cookie(ctx);
		if (!bpf_map_lookup_elem(&pods, &cookie))
			break;
		flow_of_server(ctx, &f);
		/* A forged mark takes a direct connection to the agent in its own pod. That is not its server. */
		struct direct *d = bpf_map_lookup_elem(&directs, &f);
		if (d && d->server != cookie)
			break;
		switch (drop_ticket(&f, TICKET_USED)) {
		case NOBODYS:
			break;
		case AGENTS_OR_NODES: /* none of a node's processes is behind a network either */
			towards_agent(ctx);
			break;
		case CLIENTS:
			if (d)
				established_direct(ctx, &f, d);
		}
		break;
	case BPF_SOCK_OPS_STATE_CB: /* requested for who has a ticket, and for who is served directly */
		if (ctx->args[1] != BPF_TCP_CLOSE)
			break;
		closed(ctx, bpf_get_netns_cookie(ctx));
		break;
	}
	return 1;
}
