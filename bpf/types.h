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
	__u32 slot;    /* its place in the listeners and handshakes maps */
	__u32 ifindex; /* node side of its veth */
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

struct ticket {
	__u64 born; /* bpf_ktime_get_ns */
	__u32 slot;
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
};

struct verdict {
	enum fate fate;
	__u32 saved_mark; /* what the application's SO_MARK was before capture */
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
	CONNECT_REFUSED_STORAGE,
	CONNECT_REFUSED_MARK,
	CONNECT_REFUSED_HANDSHAKES,

	TICKET_NODE,
	TICKET_AGENT,
	TICKET_USED,
	TICKET_UNUSED,
	TICKET_DENIED_HOST_POD,
	TICKET_DENIED_QUOTA,
	TICKET_DENIED_FULL,

	LOOKUP_SELF,
	LOOKUP_TICKET,
	LOOKUP_OUTBOUND,
	LOOKUP_INBOUND,
	LOOKUP_HBONE,
	LOOKUP_DROP_AGENT_PORT,
	LOOKUP_DROP_NO_LISTENER,
	LOOKUP_DROP_REDIRECTED,

	GUARD_AGENT,
	GUARD_VOUCHED,
	GUARD_DROP_NO_SOCKET,
	GUARD_DROP_UNVOUCHED,
	GUARD_DROP_MESH,
	GUARD_DROP_CAPTURED,
	GUARD_DROP_SOURCE,
	GUARD_DROP_NEIGHBOUR,
	GUARD_DROP_MALFORMED,
	GUARD_DROP_VLAN,

	OUTCOMES,
};
