/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sockops: writes the tickets with which a connection reaches the application in a pod past sk_lookup.
 *
 *   TCP_CONNECT_CB          the source port is known, the SYN is not sent yet: write the ticket
 *   PASSIVE_ESTABLISHED_CB  the application's side exists: the ticket is used up
 *   STATE_CB, to CLOSE      the connecting side is gone: should the ticket still be there, remove it
 *
 * Two kinds of sockets get tickets: those of the node's own processes, such as kubelet's probes, which are in
 * the node's namespace and outside the pods' cgroup; and the agent's, dialling the application inside the
 * pod's namespace under the real client's address.
 *
 * A ticket that stays behind is a way around the agent for whoever gets the same 4-tuple, hence all three
 * events, the lifetime, and no LRU map, in which one pod's flood would push out its neighbours' tickets.
 */
#pragma once

#include "maps.h"

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

static __always_inline void handshake_ended(__u32 slot)
{
	__s32 *out = bpf_map_lookup_elem(&handshakes, &slot);
	if (out)
		__sync_fetch_and_sub(out, 1);
}

/* Only one of two racing deletions succeeds, so each ticket is taken off its pod's account once. */
static __always_inline void drop_ticket(struct flow *f, enum outcome o)
{
	struct ticket *t = bpf_map_lookup_elem(&tickets, f);
	if (!t)
		return;
	__u32 slot = t->slot;
	if (bpf_map_delete_elem(&tickets, f) == 0) {
		handshake_ended(slot);
		count(o);
	}
}

static __always_inline void write_ticket(struct bpf_sock_ops *ctx, struct flow *f, __u32 slot, enum outcome o)
{
	__s32 *out = bpf_map_lookup_elem(&handshakes, &slot);
	if (!out)
		return;
	if (__sync_fetch_and_add(out, 1) >= TICKETS_PER_POD) {
		__sync_fetch_and_sub(out, 1);
		count(TICKET_DENIED_QUOTA);
		return;
	}
	struct ticket t = {.born = bpf_ktime_get_ns(), .slot = slot};
	long err = bpf_map_update_elem(&tickets, f, &t, BPF_NOEXIST);
	if (err == -EEXIST) { /* left behind under the same 4-tuple, and on its pod's account already */
		__sync_fetch_and_sub(out, 1);
		err = bpf_map_update_elem(&tickets, f, &t, BPF_ANY);
	} else if (err) {
		__sync_fetch_and_sub(out, 1);
	}
	if (err) {
		count(TICKET_DENIED_FULL);
		return;
	}
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	count(o);
}

static __always_inline void connecting(struct bpf_sock_ops *ctx, __u64 cookie)
{
	struct flow f = {};
	flow_of_client(ctx, &f);
	struct owner *o = bpf_map_lookup_elem(&owners, &f.server);
	struct bpf_sock *sk = ((volatile struct bpf_sock_ops *)ctx)->sk;
	if (!o || !sk)
		return;
	if (cookie == node_cookie) {
		struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
		if (v && v->fate == FATE_HOST_POD)
			count(TICKET_DENIED_HOST_POD);
		else
			write_ticket(ctx, &f, o->slot, TICKET_NODE);
	} else if (cookie == o->cookie && bpf_sk_storage_get(&agent_sockets, sk, 0, 0)) {
		write_ticket(ctx, &f, o->slot, TICKET_AGENT);
	}
}

SEC("sockops")
int mesh_sockops(struct bpf_sock_ops *ctx)
{
	__u64 cookie;
	struct flow f = {};

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		connecting(ctx, bpf_get_netns_cookie(ctx));
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		cookie = bpf_get_netns_cookie(ctx);
		if (!bpf_map_lookup_elem(&pods, &cookie))
			break;
		flow_of_server(ctx, &f);
		drop_ticket(&f, TICKET_USED);
		break;
	case BPF_SOCK_OPS_STATE_CB: /* requested by write_ticket only */
		if (ctx->args[1] != BPF_TCP_CLOSE)
			break;
		flow_of_client(ctx, &f);
		drop_ticket(&f, TICKET_UNUSED);
		break;
	}
	return 1;
}
