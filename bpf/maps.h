/* SPDX-License-Identifier: GPL-2.0 */
/* All state. Maps are pinned by name; a change of any key, value, size or type here is a new Schema in bpf.go. */
#pragma once

#include "types.h"

#define PINNED __uint(pinning, 1)

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64); /* netns cookie */
	__type(value, struct pod);
	PINNED;
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * MAX_PODS);
	__type(key, struct addr);
	__type(value, struct owner);
	PINNED;
} owners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32); /* ifindex in the node's namespace */
	__type(value, struct guarded);
	PINNED;
} guards SEC(".maps");

/* slot * LISTENERS + enum listener. A socket leaves the map when it is closed. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, MAX_PODS *LISTENERS);
	__type(key, enum listener);
	__type(value, __u64);
	PINNED;
} listeners SEC(".maps");

/* Addresses whose connections are captured. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, __u32);
	PINNED;
} destinations SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct prefix);
	__type(value, __u32);
	PINNED;
} prefixes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * MAX_PODS *TICKETS_PER_POD);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow);
	__type(value, struct ticket);
	PINNED;
} tickets SEC(".maps");

/* Tickets out, by account: a slot for those to the pod, MAX_PODS + slot for the direct connections that the pod
 * itself makes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2 * MAX_PODS);
	__type(key, __u32);
	__type(value, __s32);
	PINNED;
} handshakes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct verdict);
	PINNED;
} verdicts SEC(".maps");

/* The agent's own sockets. Written by descriptor from user space, which takes CAP_SYS_ADMIN: unlike a mark,
 * nothing in an unprivileged pod can forge it. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
	PINNED;
} agent_sockets SEC(".maps");

/* By slot. A hash: its values are replaced whole. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	__type(value, struct gate);
	PINNED;
} gates SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8 * MAX_PODS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct ruleset);
	PINNED;
} rulesets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct rules_identity);
	__type(value, struct words);
	PINNED;
} rules_identities SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct rules_port);
	__type(value, struct words);
	PINNED;
} rules_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct rules_source);
	__type(value, struct words);
	PINNED;
} rules_sources SEC(".maps");

/* Ports of Services that have an endpoint on this node, and how many draws there are. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct target);
	__type(value, __u32);
	PINNED;
} services SEC(".maps");

/* The draws that fall to endpoints on this node. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct service_draw);
	__type(value, struct endpoint);
	PINNED;
} service_draws SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow);
	__type(value, struct direct);
	PINNED;
} directs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct flow);
	__type(value, struct near);
	PINNED;
} nears SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct way);
	PINNED;
} ways SEC(".maps");

/* Those of them that have ended, the oldest to be forgotten next. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, NEARS_ENDED);
	__type(key, __u32);
	__type(value, struct flow);
	PINNED;
} nears_ended SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
	PINNED;
} nears_next SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32); /* ifindex in the node's namespace */
	__type(value, struct udp_gate);
	PINNED;
} udp_gates SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct addr);
	__type(value, struct udp_source);
	PINNED;
} udp_sources SEC(".maps");

/* By slot, a table for each pod. LRU: what is used least goes first, and it is the pod's own. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	PINNED;
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_LRU_HASH);
		__uint(max_entries, UDP_FLOWS_PER_POD);
		__type(key, struct flow);
		__type(value, struct udp_flow);
	});
} udp_begun SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	PINNED;
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_LRU_HASH);
		__uint(max_entries, UDP_FLOWS_PER_POD);
		__type(key, struct udp_peer);
		__type(value, __u64); /* bpf_ktime_get_ns of the last datagram, of either side */
	});
} udp_let_in SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32); /* ifindex in the node's namespace */
	__type(value, struct dns_client);
	PINNED;
} dns_clients SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct dns_key);
	__type(value, struct dns_answer);
	PINNED;
} dns_names SEC(".maps");

/* What is read of a question. */
struct dns_question {
	__u32 name; /* bytes of it */
	__u32 left; /* of the label that is being read */
	bool v4;    /* of A, not AAAA */
	bool edns;
	__u16 edns_flags; /* host order, as the next */
	__u16 flags;      /* of the header */

	/* While it is looked for what stands for all names below a domain. */
	__u64 scope;
	__u32 at; /* the label that it is at */
	bool found;
};

/* Room for one question, which is no part of the state. */
struct dns_scratch {
	struct dns_key key;
	__u8 zeros[DNS_NAME]; /* behind the name: never written */
	struct dns_key above;
	struct dns_answer answer;
	struct dns_question question;
	__u32 room[16]; /* for one header or record */
	__u8 message[1088]; /* as Linux 6.1 counts: of a length below 512 it knows no more than its bits */
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct dns_scratch);
	PINNED;
} dns_scratches SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 21);
	PINNED;
} events SEC(".maps");

/* So that their types are in the object's. */
const struct event *_event __attribute__((unused));
const struct udp_flow *_udp_flow __attribute__((unused));
const struct udp_peer *_udp_peer __attribute__((unused));

/* By slot. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	__type(value, struct event_budget);
	PINNED;
} event_budgets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 64); /* room for more outcomes without another schema: they are appended */
	__type(key, enum outcome);
	__type(value, __u64);
	PINNED;
} outcomes SEC(".maps");

/* Set before loading. */
volatile const __u64 node_cookie = 0;   /* of the node's network namespace */
volatile const __u32 capture_mark = 0;  /* datapath.Mark */
volatile const bool hook_sees_all = 0;  /* connect hooks sit at the cgroup root: node processes pass them too */

static __always_inline void count(enum outcome o)
{
	__u32 k = o;
	__u64 *n = bpf_map_lookup_elem(&outcomes, &k);
	if (n)
		(*n)++; /* per CPU; programs of one CPU do not interrupt each other's increment in a way that matters */
}

static __always_inline bool addr_is_v4(const struct addr *a)
{
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == htonl(0xffff);
}

static __always_inline void addr_from_v4(struct addr *a, __u32 v4)
{
	a->w[0] = 0;
	a->w[1] = 0;
	a->w[2] = htonl(0xffff);
	a->w[3] = v4;
}

static __always_inline bool addr_eq(const struct addr *a, const struct addr *b)
{
	return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

/*
 * Fields of a context are read one by one, without a condition and through volatile: the compiler would else
 * merge loads, or the loads of two branches into one through a computed pointer, and the verifier takes
 * neither.
 */
static __always_inline void addr_pick(struct addr *a, bool v4, __u32 ip4, __u32 w0, __u32 w1, __u32 w2, __u32 w3)
{
	a->w[0] = v4 ? 0 : w0;
	a->w[1] = v4 ? 0 : w1;
	a->w[2] = v4 ? htonl(0xffff) : w2;
	a->w[3] = v4 ? ip4 : w3;
}

#define READ_ADDR(a, c, which)                                                                                  \
	addr_pick(a, (c)->family == AF_INET, (c)->which##_ip4, (c)->which##_ip6[0], (c)->which##_ip6[1],        \
		  (c)->which##_ip6[2], (c)->which##_ip6[3])

/* 127.0.0.0/8 and ::1, and the unspecified address, which connect() takes for them. */
static __always_inline bool addr_is_loopback(const struct addr *a)
{
	if (addr_is_v4(a))
		return (a->w[3] & htonl(0xff000000)) == htonl(0x7f000000) || a->w[3] == 0;
	return a->w[0] == 0 && a->w[1] == 0 && a->w[2] == 0 && (a->w[3] == 0 || a->w[3] == htonl(1));
}

/* The address itself counts, then the longest prefix. A row of 0 is known and left alone: it is an exception from a prefix
 * around it, such as the one around everything that is there where pods may reach only what the mesh knows. */
static __always_inline bool is_mesh(const struct addr *a)
{
	__u32 *captured = bpf_map_lookup_elem(&destinations, a);
	if (captured)
		return *captured != 0;
	struct prefix p = {.bits = 128, .addr = *a};
	captured = bpf_map_lookup_elem(&prefixes, &p);
	return captured && *captured != 0;
}
