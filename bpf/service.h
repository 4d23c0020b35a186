/* SPDX-License-Identifier: GPL-2.0 */
/*
 * service: which endpoint of a Service a connection of a pod goes to, and what the application is told of it.
 *
 * The endpoint is drawn at connect: a number below the total of the endpoints' weights, which stand in the order that
 * the agent has them in. A draw that falls to a pod of this node, to which the connection may go directly, is that pod's:
 * connect goes there instead, and getpeername4/6 answer with the Service's address. Any other draw is the agent's, in
 * the bits of the mark above those that capture, and it takes the same endpoint by it. So all draws are of one kind, and
 * endpoints on this node and elsewhere get the same share of connections as if the agent alone had drawn.
 *
 * What the kernel has is no more than a short cut: a Service or a draw that is not there is the agent's.
 */
#pragma once

#include "maps.h"

#define DRAW_SHIFT 12 /* datapath.drawShift */

/* draw: what the mark says, 0 if nothing was drawn. */
static __always_inline bool draw_endpoint(const struct target *service, __u32 *draw, struct target *at)
{
	__u32 *total = bpf_map_lookup_elem(&services, service);
	if (!total)
		return false;
	__u32 n = *total;
	if (!n)
		return false;
	struct service_draw k = {.service = *service, .draw = bpf_get_prandom_u32() % n};
	*draw = k.draw + 1;
	struct endpoint *e = bpf_map_lookup_elem(&service_draws, &k);
	if (!e)
		return false;
	volatile struct endpoint *v = e;
	for (int i = 0; i < 4; i++)
		at->addr.w[i] = v->at.addr.w[i];
	at->port = v->at.port;
	bool same = v->service.port == service->port;
	for (int i = 0; i < 4; i++)
		same = same && v->service.addr.w[i] == service->addr.w[i];
	return same;
}

/* An application asks an MPTCP socket, and not its subflows, who its peer is. */
static __always_inline bool is_plain_tcp(struct bpf_sock *sk)
{
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return false;
	return !HAS_FIELD(tcp->is_mptcp) || !tcp->is_mptcp;
}

static __always_inline void rewrite4(struct bpf_sock_addr *ctx, const struct target *to)
{
	ctx->user_ip4 = to->addr.w[3];
	ctx->user_port = htons(to->port);
}

static __always_inline void rewrite6(struct bpf_sock_addr *ctx, const struct target *to)
{
	volatile struct bpf_sock_addr *c = ctx;
	c->user_ip6[0] = to->addr.w[0];
	c->user_ip6[1] = to->addr.w[1];
	c->user_ip6[2] = to->addr.w[2];
	c->user_ip6[3] = to->addr.w[3];
	c->user_port = htons(to->port);
}

static __always_inline struct target *service_of(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ((volatile struct bpf_sock_addr *)ctx)->sk;
	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
	return v && v->fate == FATE_DIRECT && v->service.port ? &v->service : 0;
}

SEC("cgroup/getpeername4")
int mesh_getpeername4(struct bpf_sock_addr *ctx)
{
	struct target *s = service_of(ctx);
	if (s)
		rewrite4(ctx, s);
	return 1;
}

SEC("cgroup/getpeername6")
int mesh_getpeername6(struct bpf_sock_addr *ctx)
{
	struct target *s = service_of(ctx);
	if (s)
		rewrite6(ctx, s);
	return 1;
}
