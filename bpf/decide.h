/* SPDX-License-Identifier: GPL-2.0 */
/*
 * decide: what policy says about a connection; and the events that tell the agent of it.
 *
 * The agent writes the rows of a ruleset before any gate names it and removes them some seconds after the last gate has
 * let go of it. What is not there nonetheless is left to the agent: it never counts as allowed.
 */
#pragma once

#include "maps.h"

enum decision {
	LEFT_TO_AGENT,
	ALLOWED,
	DENIED,
};

/* Why it was denied. */
struct reason {
	__u64 hit;
	__u32 word;
};

/* Four lookups, or five for a port that no policy names, whatever number of policies there is. */
static __noinline int decide(__u64 rules, __u64 identity, const struct addr *source, __u32 port, struct reason *why)
{
	if (!source || !why)
		return LEFT_TO_AGENT;
	why->hit = 0;
	why->word = NO_WORD;
	struct ruleset *r = bpf_map_lookup_elem(&rulesets, &rules);
	if (!r)
		goto unknown;
	__u32 flags = r->flags;
	if (flags & RULES_REFUSE)
		return DENIED;

	struct words *by_identity = &r->any, *by_source = &r->any, *by_port = &r->any;
	if (flags & RULES_BY_IDENTITY) {
		struct rules_identity k = {rules, identity};
		by_identity = bpf_map_lookup_elem(&rules_identities, &k);
		if (!by_identity) /* a pod that is new here */
			goto unknown;
	}
	if (flags & RULES_BY_SOURCE) {
		struct rules_source k = {192, {(__u32)rules, rules >> 32}, *source};
		by_source = bpf_map_lookup_elem(&rules_sources, &k);
		if (!by_source)
			goto unknown;
	}
	if (flags & RULES_BY_PORT) {
		struct rules_port k = {rules, port, 0};
		by_port = bpf_map_lookup_elem(&rules_ports, &k);
		if (!by_port) {
			k.port = 0;
			by_port = bpf_map_lookup_elem(&rules_ports, &k);
		}
		if (!by_port)
			goto unknown;
	}

	__u64 allowed = 0;
	for (__u32 i = 0; i < TERM_WORDS; i++) {
		if (i >= r->words)
			break;
		__u64 hit = by_identity->w[i] & by_source->w[i] & by_port->w[i];
		if (hit & r->deny.w[i]) {
			why->hit = hit & r->deny.w[i];
			why->word = i;
			return DENIED;
		}
		allowed |= hit & r->allow.w[i];
	}
	return (flags & RULES_CLOSED) && !allowed ? DENIED : ALLOWED;

unknown:
	count(DECIDE_UNKNOWN);
	return LEFT_TO_AGENT;
}

/* The ruleset for connections to an address of the pod; 0 where the agent decides. */
static __always_inline __u64 rules_at(__u32 slot, const struct addr *server, __u32 *flags)
{
	struct gate *g = bpf_map_lookup_elem(&gates, &slot);
	if (!g)
		return 0;
	volatile struct gate *v = g;
	__u64 rules = addr_is_v4(server) ? v->v4 : v->v6;
	*flags = v->flags;
	return v->slot == slot ? rules : 0;
}

static __always_inline bool may_tell(__u32 slot)
{
	struct event_budget *b = bpf_map_lookup_elem(&event_budgets, &slot);
	if (!b)
		return false;
	__u64 second = bpf_ktime_get_ns() >> 30;
	if (b->second != second) { /* two at once: a few more than the budget */
		b->second = second;
		b->used = 0;
	}
	return __sync_fetch_and_add(&b->used, 1) < EVENTS_PER_SECOND;
}

/* payer: the slot on whose budget it is. */
static __always_inline void tell_denied_as(enum event_kind kind, __u32 payer, __u32 client, __u32 server, const struct flow *f,
					   const struct target *service, __u64 identity, __u64 rules, const struct reason *why)
{
	if (!may_tell(payer)) {
		count(EVENT_LIMITED);
		return;
	}
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(EVENT_LOST);
		return;
	}
	e->at = bpf_ktime_get_ns();
	e->born = 0;
	e->rules = rules;
	e->identity = identity;
	e->sent = 0;
	e->received = 0;
	e->hit = why->hit;
	e->word = why->word;
	e->kind = kind;
	e->client_slot = client;
	e->server_slot = server;
	e->flow = *f;
	e->service = *service;
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void tell_denied(__u32 payer, __u32 client, __u32 server, const struct flow *f, __u64 identity, __u64 rules,
					const struct reason *why)
{
	struct target none = {};
	tell_denied_as(EVENT_DENIED, payer, client, server, f, &none, identity, rules, why);
}

/* How much may wait before whoever reads events is woken. What a connection carried can wait for its next look. */
#define EVENTS_WAITING (1 << 19)

static __always_inline bool tell_direct(enum event_kind kind, const struct flow *f, const struct direct *d, __u64 sent,
					__u64 received)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		if (kind != EVENT_CLOSED)
			count(EVENT_LOST);
		return false;
	}
	e->at = bpf_ktime_get_ns();
	e->born = d->established;
	e->rules = d->rules;
	e->identity = d->identity;
	e->sent = sent;
	e->received = received;
	e->hit = 0;
	e->word = NO_WORD;
	e->kind = kind;
	e->client_slot = d->client_slot;
	e->server_slot = d->server_slot;
	e->flow = *f;
	e->service = d->service;
	bpf_ringbuf_submit(e, bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) < EVENTS_WAITING ? BPF_RB_NO_WAKEUP : BPF_RB_FORCE_WAKEUP);
	return true;
}
