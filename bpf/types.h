/* SPDX-License-Identifier: GPL-2.0 */
/* What the programs and the agent share. bpf2go makes the Go types of it; there is no second definition. */
#pragma once

#include "kernel.h"

/* An IPv6 address, or an IPv4 address as ::ffff:a.b.c.d, in network order. */
struct addr {
	__u32 w[4];
};

#define UID_LEN 64
#define MAX_PODS 1024

/*
 * A connection that is being made to a pod may be let through to the application at most this many times at
 * once (tickets). MAX_PODS * TICKETS_PER_POD is the size of the ticket map: no pod can take another's room.
 */
#define TICKETS_PER_POD 256

/* A ticket is deleted when its connection is made or fails; this bounds one that outlived both: a SYN with
 * all its retransmissions takes 127 s. */
#define TICKET_LIFETIME_NS (130ULL * 1000 * 1000 * 1000)

/* An enrolled pod, by the cookie of its network namespace. An address it does not have is all zero. */
struct pod {
	struct addr v4;
	struct addr v6;
	__u64 identity; /* who it is, as policies see it; 0 while that is not known */
	__u32 slot;     /* its place in the listeners, handshakes and gates maps */
	__u32 ifindex;  /* node side of its veth */
	__u32 near;     /* its direct connections may take the short way to pods with the same number here; 0: to none */
	__u32 pad;
	__u8 uid[UID_LEN]; /* Kubernetes' UID, zero-terminated */
};

/* Whose an address is. */
struct owner {
	__u64 cookie;
	__u32 slot;
	__u32 pad;
};

/* What the guard knows of the pod behind a veth. */
struct guarded {
	struct addr v4;
	struct addr v6;
};

/* A connection as its server sees it. Ports in host order. */
struct flow {
	struct addr client;
	struct addr server;
	__u16 client_port;
	__u16 server_port;
};

/* An address of a Service or of a pod, and a port in host order. */
struct target {
	struct addr addr;
	__u32 port;
};

/* A draw of an endpoint of a Service, from 0 on: see service.h. */
struct service_draw {
	struct target service;
	__u32 draw;
};

/* Whom a draw falls to. */
struct endpoint {
	struct target service; /* again: as in a gate. The first field, and read last */
	struct target at;
};

struct ticket {
	__u64 born;     /* bpf_ktime_get_ns */
	__u64 identity; /* of the client of a direct connection; 0: kubelet's or the agent's, which need no policy */
	__u64 rules;    /* the ruleset that allowed a direct connection */
	__u32 account;  /* in handshakes */
	__u32 pad;
};

struct prefix {
	__u32 bits; /* IPv4 prefixes count from 96 */
	struct addr addr;
};

/* What connect() decided about a socket. */
enum fate {
	FATE_NONE,
	FATE_CAPTURED, /* marked; must never be seen outside the pod */
	FATE_VOUCHED,  /* its destination is not mesh */
	FATE_HOST_POD, /* a socket of the node's namespace that belongs to a pod: gets no ticket */
	FATE_DIRECT,   /* policy lets it go to another pod of this node without the agent, and nowhere else */
};

struct verdict {
	enum fate fate;
	__u32 saved_mark; /* what the application's SO_MARK was before capture */
	__u32 slot;       /* direct: the server's */
	__u32 pad;
	__u64 rules; /* direct: the ruleset that allowed it */
	struct target service; /* what the application asked for; direct: port 0 if that is the server itself */
	__u32 pad2;
};

/*
 * Policies, compiled by internal/mesh (compile.go). A ruleset is what the policies of a workload come to: up to
 * 512 terms, a bit each. Three tables give the terms whose conditions hold for an identity, a source address and a
 * destination port; a term whose bit is in all three matches. Rulesets are named by what they say (a hash), so one
 * never changes: another policy is another ruleset, and a gate goes over to it in one write.
 */
#define TERM_WORDS 8

struct words {
	__u64 w[TERM_WORDS];
};

enum rules_flags {
	RULES_REFUSE = 1,      /* a policy is missing: nobody may */
	RULES_CLOSED = 2,      /* who matches no allow term may not */
	RULES_BY_IDENTITY = 4, /* the table has rows; else the condition holds for everyone */
	RULES_BY_SOURCE = 8,
	RULES_BY_PORT = 16,
};

struct ruleset {
	struct words deny;
	struct words allow;
	struct words any; /* all ones: stands in for a table without rows */
	enum rules_flags flags;
	__u32 words; /* in use */
};

struct rules_identity {
	__u64 rules;
	__u64 identity;
};

struct rules_port {
	__u64 rules;
	__u32 port; /* 0: every port that has no row */
	__u32 pad;
};

struct rules_source {
	__u32 bits; /* 64 of the ruleset, then those of the prefix; IPv4 prefixes count from 96 */
	__u32 rules[2];
	struct addr addr;
};

enum gate_flags {
	GATE_PODS = 1,   /* connections of other pods of this node are decided at connect: no waypoint comes before */
	GATE_DIRECT = 2, /* and those that may be go to the application without the agent */
	GATE_UNLESS_STRICT = 4, /* but not where plaintext would be denied */
};

/* What stands at a pod's door. Without one the agent decides everything. */
struct gate {
	__u64 v4; /* ruleset for connections to the pod's IPv4 address; 0: the agent decides */
	__u64 v6;
	enum gate_flags flags;
	__u32 slot; /* again: a value that is being replaced must not pass for another pod's */
};

/* A direct connection, from its ticket to its server's close. */
struct direct {
	__u64 client; /* cookies of the namespaces */
	__u64 server;
	__u64 identity;    /* of the client */
	__u64 established; /* bpf_ktime_get_ns; 0: under way */
	__u64 rules;       /* the ruleset that allowed it */
	__u64 closed;      /* its end could not be told, and waits here: when, and what it carried */
	__u64 sent;
	__u64 received;
	__u32 client_slot;
	__u32 server_slot;
	struct target service; /* as in a verdict */
	__u32 pad;
};

/* A direct connection whose packets take the short way. */
struct near {
	__u32 client; /* node sides of the veths */
	__u32 server;
	__u32 ended; /* which ends are closed: enum near_ends */
	__u32 packets;
};

/* The same, at a socket that has sent some packets already. */
struct way {
	__u64 generation; /* of near_generation */
	struct flow flow; /* its packets, as if it were the client */
	__u32 from;       /* node sides of the veths */
	__u32 to;
};

/* How many connections the short way is remembered for after they have ended. */
#define NEARS_ENDED 8192

/* UDP of a pod whose namespace asks for it, by the node side of its veth. */
struct udp_gate {
	__u64 v4; /* ruleset for datagrams by IPv4; 0: only answers are let in */
	__u64 v6;
	__u32 ifindex; /* again: as in a gate */
	__u32 slot;
};

/* Who has an address, for datagrams: nothing else tells who sent one. Pods that are captured, here and elsewhere. */
struct udp_source {
	__u64 identity;
	__u32 ifindex; /* of a pod of this node: its veth; 0: of another */
	__u32 bridge;  /* that the veth is a port of */
};

/* Datagrams that the pod began to exchange: its own side is the client. */
struct udp_flow {
	__u64 last; /* bpf_ktime_get_ns */
	__u64 answered;
};

/* Whose datagrams policy let in, and on which port of the pod. */
struct udp_peer {
	struct addr peer;
	__u32 port;
};

#define UDP_FLOWS_PER_POD 4096

/*
 * Names that are answered for, as on the wire and in lower case, zeros behind; and to whom: a number of a namespace, 0 for all
 * pods. A namespace's own row comes before that.
 */
#define DNS_NAME 256
#define DNS_ADDRS 8 /* of each family: with the longest name they are an answer of 512 bytes at most */

struct dns_key {
	__u64 scope;
	__u8 name[DNS_NAME];
};

struct dns_answer {
	__u32 v4_count;
	__u32 v6_count;
	__u32 v4[DNS_ADDRS];
	struct addr v6[DNS_ADDRS];
};

/* A pod whose questions are answered, by the node side of its veth. */
struct dns_client {
	__u64 scope;
	__u32 ifindex; /* again: as in a gate */
	__u32 below;   /* there are names that stand for all below them: "*" and then a domain */
};

enum event_kind {
	EVENT_DENIED,
	EVENT_OPENED, /* a direct connection */
	EVENT_CLOSED,
	EVENT_DENIED_UDP,
};

#define NO_SLOT 0xffffffff
#define NO_WORD 0xffffffff

struct event {
	__u64 at;       /* bpf_ktime_get_ns */
	__u64 born;     /* closed: when it was opened */
	__u64 rules;    /* the ruleset that decided */
	__u64 identity; /* the client's; 0: none */
	__u64 sent;     /* closed: bytes by the client, by the server */
	__u64 received;
	__u64 hit;      /* denied: the terms that matched in the word; NO_WORD: no allow term did */
	__u32 word;
	enum event_kind kind;
	__u32 client_slot; /* NO_SLOT: not a captured pod of this node */
	__u32 server_slot;
	struct flow flow; /* denied at connect: no client port */
	struct target service; /* of a connection between pods of this node, as in a verdict */
};

/* Events of denied connections that a pod may cause in a second, so that none drowns the others. */
#define EVENTS_PER_SECOND 100

struct event_budget {
	__u64 second;
	__u64 used;
};

enum listener {
	LISTENER_OUTBOUND,
	LISTENER_INBOUND,
	LISTENER_HBONE,
	LISTENERS = 4, /* per slot */
};

#define PORT_OUTBOUND 15001
#define PORT_INBOUND 15006
#define PORT_HBONE 15008

/* Every way a program can end for a pod's connection. README.md says what each means; a test holds it to that. */
enum outcome {
	CONNECT_CAPTURED,
	CONNECT_VOUCHED,
	CONNECT_AGENT,
	CONNECT_SELF,
	CONNECT_DIRECT,
	CONNECT_DENIED,
	CONNECT_REFUSED_STORAGE,
	CONNECT_REFUSED_MARK,
	CONNECT_REFUSED_HANDSHAKES,

	TICKET_NODE,
	TICKET_AGENT,
	TICKET_DIRECT,
	TICKET_USED,
	TICKET_UNUSED,
	TICKET_DENIED_HOST_POD,
	TICKET_DENIED_QUOTA,
	TICKET_DENIED_FULL,

	LOOKUP_SELF,
	LOOKUP_TICKET,
	LOOKUP_DIRECT,
	LOOKUP_OUTBOUND,
	LOOKUP_INBOUND,
	LOOKUP_HBONE,
	LOOKUP_DROP_AGENT_PORT,
	LOOKUP_DROP_NO_LISTENER,
	LOOKUP_DROP_REDIRECTED,
	LOOKUP_DENIED,
	LOOKUP_DENIED_LATE,

	GUARD_AGENT,
	GUARD_VOUCHED,
	GUARD_DIRECT,
	GUARD_DROP_NO_SOCKET,
	GUARD_DROP_UNVOUCHED,
	GUARD_DROP_MESH,
	GUARD_DROP_CAPTURED,
	GUARD_DROP_DIRECT,
	GUARD_DROP_SOURCE,
	GUARD_DROP_NEIGHBOUR,
	GUARD_DROP_MALFORMED,
	GUARD_DROP_VLAN,

	DECIDE_UNKNOWN,

	EVENT_LIMITED,
	EVENT_LATE,
	EVENT_LOST,

	UDP_ALLOWED,
	UDP_ANSWER,
	UDP_BEGUN,
	UDP_DENIED,
	UDP_DENIED_SOURCE,
	UDP_DENIED_UNKNOWN,
	UDP_DROP_MALFORMED,

	NEAR_REDIRECTED,
	NEAR_DETOUR,
	NEAR_ELSEWHERE,
	NEAR_FULL,

	SERVICE_NEAR,
	SERVICE_AGENT,

	DNS_ANSWERED,
	DNS_EMPTY,
	DNS_LEFT,
	DNS_DROP,

	OUTCOMES,
};
