/* SPDX-License-Identifier: GPL-2.0 */
/*
 * sk_lookup, one link per pod's namespace: which socket a TCP SYN that is delivered in the pod goes to.
 *
 *  1. from the pod to itself or to its loopback           -> pass
 *     (15001 and 15006 excepted: nobody dials them)
 *     from elsewhere to its loopback                      -> drop: DNAT in the pod, around the agent
 *  2. to an address that is not the pod's                 -> it came by the mark: the agent's outbound listener
 *  3. to 15008                                            -> the agent's tunnel listener
 *  4. with a ticket                                       -> pass: kubelet, or the agent itself, or another pod of
 *                                                            this node, by the rules in force; by any others it is
 *                                                            decided again
 *  5. any other                                           -> plaintext of an unknown sender: refused where policy
 *                                                            says so, else the agent's inbound listener
 *
 * A program of this type has neither a netns cookie nor a use for ingress_ifindex, which says eth0 also for
 * what a pod sends itself; and addresses do not tell the two ends of a connection between two pods of a node
 * apart. So each pod has an instance of its own, with its slot and addresses in it.
 *
 * Where a pod has no listener the SYN is dropped and the client gets a RST: without its agent it fails closed.
 */
#pragma once

#include "decide.h"

/* Per pod, set before the program is attached. Not constants: the kernel checks the program, which takes long, before
 * there is a pod to wait for it. */
SEC(".data.pod") volatile __u32 pod_slot = 0;
SEC(".data.pod") volatile struct addr pod_v4 = {};
SEC(".data.pod") volatile struct addr pod_v6 = {};

static __always_inline bool is_own(const struct addr *a)
{
	struct addr v4 = {{pod_v4.w[0], pod_v4.w[1], pod_v4.w[2], pod_v4.w[3]}};
	struct addr v6 = {{pod_v6.w[0], pod_v6.w[1], pod_v6.w[2], pod_v6.w[3]}};
	return addr_eq(a, &v4) || addr_eq(a, &v6);
}

static __always_inline int refuse(enum outcome o)
{
	count(o);
	return SK_DROP;
}

static __always_inline int pass(enum outcome o)
{
	count(o);
	return SK_PASS;
}

static __always_inline int steer(struct bpf_sk_lookup *ctx, enum listener kind, enum outcome o)
{
	__u32 k = pod_slot * LISTENERS + kind;
	void *sk = bpf_map_lookup_elem(&listeners, &k);
	if (!sk)
		return refuse(LOOKUP_DROP_NO_LISTENER);
	long err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	if (err) /* e.g. an IPv4-only listener and an IPv6 SYN */
		return refuse(LOOKUP_DROP_NO_LISTENER);
	return pass(o);
}

SEC("sk_lookup")
int mesh_lookup(struct bpf_sk_lookup *ctx)
{
	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;

	volatile struct bpf_sk_lookup *c = ctx;
	struct flow f = {};
	READ_ADDR(&f.client, c, remote);
	READ_ADDR(&f.server, c, local);
	f.client_port = ntohs(c->remote_port);
	f.server_port = c->local_port;
	bool agent_port = f.server_port == PORT_OUTBOUND || f.server_port == PORT_INBOUND;

	bool to_pod = is_own(&f.server);

	bool from_pod = is_own(&f.client) || addr_is_loopback(&f.client) || addr_eq(&f.client, &f.server);
	bool to_loopback = addr_is_loopback(&f.server);

	if (from_pod && (to_pod || to_loopback || addr_eq(&f.client, &f.server)))
		return agent_port ? refuse(LOOKUP_DROP_AGENT_PORT) : pass(LOOKUP_SELF);
	if (to_loopback)
		return refuse(LOOKUP_DROP_REDIRECTED);
	if (!to_pod)
		return steer(ctx, LISTENER_OUTBOUND, LOOKUP_OUTBOUND);
	if (agent_port)
		return refuse(LOOKUP_DROP_AGENT_PORT);
	if (f.server_port == PORT_HBONE)
		return steer(ctx, LISTENER_HBONE, LOOKUP_HBONE);

	__u64 identity = 0, rules = 0;
	__u32 flags = 0;
	struct reason why;
	struct ticket *t = bpf_map_lookup_elem(&tickets, &f);
	if (t && bpf_ktime_get_ns() - t->born < TICKET_LIFETIME_NS) {
		/* It is used up when the connection is made: a SYN may come twice. */
		identity = t->identity;
		rules = t->rules;
		if (!identity)
			return pass(LOOKUP_TICKET);
	}

	__u64 now = rules_at(pod_slot, &f.server, &flags);
	if (identity) {
		if (now && now == rules)
			return pass(LOOKUP_DIRECT);
		int d = now ? decide(now, identity, &f.client, f.server_port, &why) : LEFT_TO_AGENT;
		if (d == ALLOWED)
			return pass(LOOKUP_DIRECT);
		struct owner *o = bpf_map_lookup_elem(&owners, &f.client);
		if (d == DENIED && o)
			tell_denied(o->slot, o->slot, pod_slot, &f, identity, now, &why);
		return refuse(LOOKUP_DENIED_LATE);
	}
	if (now && decide(now, 0, &f.client, f.server_port, &why) == DENIED) {
		tell_denied(pod_slot, NO_SLOT, pod_slot, &f, 0, now, &why);
		return refuse(LOOKUP_DENIED);
	}
	return steer(ctx, LISTENER_INBOUND, LOOKUP_INBOUND);
}
