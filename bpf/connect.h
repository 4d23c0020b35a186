/* SPDX-License-Identifier: GPL-2.0 */
/*
 * connect4, connect6: decides for a pod's socket whether its connection is captured.
 * restore4, restore6:   what a CNI made of the address since then; see below.
 *
 *  1. not TCP, not a pod's       -> left alone
 *  2. the agent's own            -> allowed
 *  3. loopback or the pod itself -> allowed; it never leaves the pod
 *  4. another pod of this node   -> policy decides here, where it can: refused, or let go to that pod and nowhere
 *                                   else, with a ticket; see same_node for when it cannot
 *     a Service                  -> the same, where the endpoint that is drawn is such a pod; see service.h
 *  5. a mesh destination         -> marked, so that the pod's rule and route keep it in the pod
 *  6. anything else              -> vouched for, so that the guard lets it out
 *
 * The hook also runs for sendto(MSG_FASTOPEN), for TCP_FASTOPEN_CONNECT (at connect, while the SYN leaves with
 * the first write: mark and verdict are there by then), for io_uring, and for each subflow of an MPTCP socket.
 * A raw socket may say IPPROTO_TCP as well: only SOCK_STREAM is ever vouched for.
 */
#pragma once

#include "decide.h"
#include "service.h"

/* The application's own SO_MARK gives way to capture and comes back when the socket is used again for a
 * destination outside the mesh. Should the application change the mark on a captured connection, its packets
 * take the ordinary route and the guard drops them. */
static __always_inline bool set_mark(struct bpf_sock_addr *ctx, __u32 mark)
{
	return bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark)) == 0;
}

static __always_inline int uncapture(struct bpf_sock_addr *ctx, struct verdict *v, enum fate fate)
{
	if (v->fate == FATE_CAPTURED && !set_mark(ctx, v->saved_mark)) {
		count(CONNECT_REFUSED_MARK);
		return CONNECT_REFUSE;
	}
	v->fate = fate;
	return CONNECT_ALLOW;
}

static __always_inline int capture(struct bpf_sock_addr *ctx, struct bpf_sock *sk, struct verdict *v, const struct target *to, __u32 draw)
{
	if (v->fate != FATE_CAPTURED)
		v->saved_mark = sk->mark;
	v->service = *to;
	v->fate = FATE_CAPTURED; /* before the mark: should that fail, the guard still holds the socket back */
	if (!set_mark(ctx, capture_mark | draw << DRAW_SHIFT)) {
		count(CONNECT_REFUSED_MARK);
		return CONNECT_REFUSE;
	}
	count(CONNECT_CAPTURED);
	return CONNECT_ALLOW;
}

/* A socket in the node's own namespace. Only where the hooks sit below the pods' cgroup does running here
 * mean that it belongs to a pod. */
static __always_inline int connect_from_node(struct bpf_sock *sk, const struct addr *dst)
{
	if (hook_sees_all || !bpf_map_lookup_elem(&owners, dst))
		return CONNECT_ALLOW;
	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!v) {
		count(CONNECT_REFUSED_STORAGE);
		return CONNECT_REFUSE;
	}
	v->fate = FATE_HOST_POD;
	return CONNECT_ALLOW;
}

/*
 * A connection to another captured pod of this node, by its own address or by a Service's. The agent has it where
 *
 *   - it knows what to do and the kernel does not: no gate, no ruleset, an identity that is new
 *   - a waypoint comes before the pod
 *   - the mesh wants it encrypted: sameNode
 *   - too many direct connections of this client are under way
 */
static __always_inline int same_node(const struct pod *pod, const struct owner *o, const struct flow *f,
					   const struct target *service, __u64 *rules)
{
	__u32 flags = 0, slot = o->slot;
	struct reason why;
	if (f->server_port == PORT_OUTBOUND || f->server_port == PORT_INBOUND || f->server_port == PORT_HBONE)
		return LEFT_TO_AGENT;
	*rules = rules_at(slot, &f->server, &flags);
	if (!*rules || !(flags & GATE_PODS) || !pod->identity)
		return LEFT_TO_AGENT;
	int d = decide(*rules, pod->identity, &f->client, f->server_port, &why);
	if (d == DENIED)
		tell_denied_as(EVENT_DENIED, pod->slot, pod->slot, slot, f, service, pod->identity, *rules, &why);
	if (d != ALLOWED)
		return d;

	if (!(flags & GATE_DIRECT))
		return LEFT_TO_AGENT;
	if (flags & GATE_UNLESS_STRICT) {
		/* STRICT is a DENY of who has no identity. That no ALLOW lets it in is another matter. */
		int plain = decide(*rules, 0, &f->client, f->server_port, &why);
		if (plain == LEFT_TO_AGENT || (plain == DENIED && why.word != NO_WORD))
			return LEFT_TO_AGENT;
	}
	__u32 account = MAX_PODS + pod->slot;
	__s32 *out = bpf_map_lookup_elem(&handshakes, &account);
	return out && *out < TICKETS_PER_POD ? ALLOWED : LEFT_TO_AGENT;
}

/* to: where the connection goes, and where to send it instead. */
static __always_inline int connect_to(struct bpf_sock_addr *ctx, struct target *to)
{
	const struct addr *dst = &to->addr;
	if (ctx->type != SOCK_STREAM || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_MPTCP))
		return CONNECT_ALLOW;

	/* Read once: the compiler must not keep a pointer into the context, which the verifier takes for a
	 * modified one. */
	struct bpf_sock *sk = ((volatile struct bpf_sock_addr *)ctx)->sk;
	__u64 cookie = bpf_get_netns_cookie(ctx);
	if (cookie == node_cookie)
		return connect_from_node(sk, dst);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return CONNECT_ALLOW;

	bool self = addr_eq(dst, &pod->v4) || addr_eq(dst, &pod->v6);

	if (bpf_sk_storage_get(&agent_sockets, sk, 0, 0)) {
		/* Without a ticket the agent's dial of the application would come back to the agent, for ever. */
		__u32 slot = pod->slot;
		__s32 *out = bpf_map_lookup_elem(&handshakes, &slot);
		if (self && out && *out >= TICKETS_PER_POD) {
			count(CONNECT_REFUSED_HANDSHAKES);
			return CONNECT_REFUSE;
		}
		count(CONNECT_AGENT);
		return CONNECT_ALLOW;
	}

	if (self || addr_is_loopback(dst)) {
		count(CONNECT_SELF);
		struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
		return v ? uncapture(ctx, v, FATE_NONE) : CONNECT_ALLOW;
	}

	__u64 rules = 0;
	__u32 server = NO_SLOT, draw = 0;
	struct target service = {}, at = *to;
	struct owner *o = bpf_map_lookup_elem(&owners, dst);
	if (!o && draw_endpoint(to, &draw, &at) && is_plain_tcp(sk)) {
		service = *to;
		o = bpf_map_lookup_elem(&owners, &at.addr);
	}
	if (o && o->cookie != cookie) {
		struct flow f = {.client = addr_is_v4(dst) ? pod->v4 : pod->v6, .server = at.addr, .server_port = at.port};
		switch (same_node(pod, o, &f, &service, &rules)) {
		case DENIED:
			count(CONNECT_DENIED);
			bpf_set_retval(-ECONNREFUSED);
			return CONNECT_REFUSE;
		case ALLOWED:
			server = o->slot;
		}
	}

	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!v) {
		count(CONNECT_REFUSED_STORAGE);
		return CONNECT_REFUSE;
	}

	if (server != NO_SLOT) {
		count(CONNECT_DIRECT);
		if (service.port)
			count(SERVICE_NEAR);
		v->slot = server;
		v->rules = rules;
		v->service = service;
		*to = at;
		return uncapture(ctx, v, FATE_DIRECT);
	}

	if (!is_mesh(dst)) {
		count(CONNECT_VOUCHED);
		return uncapture(ctx, v, FATE_VOUCHED);
	}

	if (draw)
		count(SERVICE_AGENT);
	return capture(ctx, sk, v, to, draw);
}

/*
 * A CNI that balances Services in connect (Cilium in kube-proxy's place) does that at the cgroup root, after the hooks above, and
 * sends the connection to an endpoint of its own choice. So this runs behind such programs, where there are any:
 *
 *  1. captured                                      -> goes where the application asked for again. The agent has to know: a Service
 *                                                      may have a waypoint, and which endpoint it is the mesh says
 *  2. vouched for, and its endpoint is a mesh's     -> captured, as a connection to that endpoint: a node's port leads to pods. The
 *                                                      guard would not let it out
 *  3. anything else                                 -> stays as the CNI has it
 */
static __always_inline int after_others(struct bpf_sock_addr *ctx, struct target *to)
{
	struct bpf_sock *sk = ((volatile struct bpf_sock_addr *)ctx)->sk;
	struct verdict *v = bpf_sk_storage_get(&verdicts, sk, 0, 0);
	if (!v)
		return CONNECT_ALLOW;
	if (v->fate == FATE_CAPTURED) {
		if (v->service.port)
			*to = v->service;
		return CONNECT_ALLOW;
	}
	if (v->fate != FATE_VOUCHED || !is_mesh(&to->addr))
		return CONNECT_ALLOW;
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct pod *pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || addr_eq(&to->addr, &pod->v4) || addr_eq(&to->addr, &pod->v6))
		return CONNECT_ALLOW;
	return capture(ctx, sk, v, to, 0);
}

static __always_inline struct target target4(struct bpf_sock_addr *ctx)
{
	volatile struct bpf_sock_addr *c = ctx;
	struct target to = {.port = ntohs(c->user_port)};
	addr_from_v4(&to.addr, c->user_ip4);
	return to;
}

static __always_inline struct target target6(struct bpf_sock_addr *ctx)
{
	volatile struct bpf_sock_addr *c = ctx; /* four loads: the verifier wants no wider ones merged */
	struct target to = {
		.addr = {{c->user_ip6[0], c->user_ip6[1], c->user_ip6[2], c->user_ip6[3]}},
		.port = ntohs(c->user_port),
	};
	return to;
}

static __always_inline bool same_target(const struct target *a, const struct target *b)
{
	return addr_eq(&a->addr, &b->addr) && a->port == b->port;
}

SEC("cgroup/connect4")
int mesh_connect4(struct bpf_sock_addr *ctx)
{
	struct target asked = target4(ctx), to = asked;
	int ret = connect_to(ctx, &to);
	if (ret == CONNECT_ALLOW && !same_target(&to, &asked))
		rewrite4(ctx, &to);
	return ret;
}

SEC("cgroup/connect6")
int mesh_connect6(struct bpf_sock_addr *ctx)
{
	struct target asked = target6(ctx), to = asked;
	int ret = connect_to(ctx, &to);
	if (ret == CONNECT_ALLOW && !same_target(&to, &asked))
		rewrite6(ctx, &to);
	return ret;
}

SEC("cgroup/connect4")
int mesh_restore4(struct bpf_sock_addr *ctx)
{
	struct target now = target4(ctx), to = now;
	int ret = after_others(ctx, &to);
	if (ret == CONNECT_ALLOW && !same_target(&to, &now))
		rewrite4(ctx, &to);
	return ret;
}

SEC("cgroup/connect6")
int mesh_restore6(struct bpf_sock_addr *ctx)
{
	struct target now = target6(ctx), to = now;
	int ret = after_others(ctx, &to);
	if (ret == CONNECT_ALLOW && !same_target(&to, &now))
		rewrite6(ctx, &to);
	return ret;
}
