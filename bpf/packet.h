/* SPDX-License-Identifier: GPL-2.0 */
/* packet: what an IP packet at the node side of a veth carries, behind options, extension headers and in fragments. */
#pragma once

#include "maps.h"

/* Read from the packet by bpf_skb_load_bytes: also right for packets whose headers are not linear. */
struct ipv4_header {
	__u8 version_ihl;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 checksum;
	__u32 source;
	__u32 destination;
};

struct ipv6_header {
	__u32 flow;
	__u16 length;
	__u8 next;
	__u8 hops;
	struct addr source;
	struct addr destination;
};

struct tcp_header {
	__u16 source;
	__u16 destination;
	__u32 sequence;
	__u32 acknowledged;
	__u8 offset;
	__u8 flags;
};

#define ETH_LEN 14
#define TCP_SYN 0x02
#define TCP_ACK 0x10
#define FRAGMENT_OFFSET 0x1fff
#define MORE_FRAGMENTS 0x2000
#define MAX_EXTENSIONS 6

static __always_inline int shoot(enum outcome o)
{
	count(o);
	return TC_SHOT;
}

/* What an IP packet carries. */
struct transport {
	struct addr src;
	struct addr dst;
	__u32 at;     /* where the header begins, of a first fragment */
	__u32 offset; /* of a later fragment, in units of 8 bytes */
	__u8 protocol;
	__u8 hops;     /* that it may still take */
	bool fragment; /* the first */
};

enum packet {
	NOT_IP,
	WHOLE, /* or the first fragment */
	LATER, /* a fragment, of no use without the first one */
	MALFORMED,
};

static __always_inline enum packet ipv4_transport(struct __sk_buff *skb, struct transport *t)
{
	struct ipv4_header ip;
	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)))
		return MALFORMED;
	__u32 ihl = (ip.version_ihl & 0x0f) * 4;
	if (ihl < sizeof(ip))
		return MALFORMED;
	addr_from_v4(&t->src, ip.source);
	addr_from_v4(&t->dst, ip.destination);
	t->at = ETH_LEN + ihl;
	t->offset = ntohs(ip.fragment) & FRAGMENT_OFFSET;
	t->protocol = ip.protocol;
	t->hops = ip.ttl;
	t->fragment = ntohs(ip.fragment) & MORE_FRAGMENTS;
	return t->offset ? LATER : WHOLE;
}

static __always_inline enum packet ipv6_transport(struct __sk_buff *skb, struct transport *t)
{
	struct ipv6_header ip;
	if (bpf_skb_load_bytes(skb, ETH_LEN, &ip, sizeof(ip)) || addr_is_v4(&ip.source))
		return MALFORMED;
	t->src = ip.source;
	t->dst = ip.destination;
	t->hops = ip.hops;

	__u32 at = ETH_LEN + sizeof(ip);
	__u8 next = ip.next;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 ext[4];
		if (next != 0 && next != 43 && next != 44 && next != 51 && next != 60)
			break;
		if (bpf_skb_load_bytes(skb, at, ext, sizeof(ext)))
			return MALFORMED;
		if (next == 44) { /* fragment */
			if (((ext[2] << 8) | ext[3]) & 0xfff8)
				return LATER;
			t->fragment = true;
			at += 8;
		} else if (next == 51) { /* authentication */
			at += (ext[1] + 2) * 4;
		} else { /* hop-by-hop, routing, destination options */
			at += (ext[1] + 1) * 8;
		}
		next = ext[0];
	}

	if (next == 0 || next == 43 || next == 44 || next == 51 || next == 60)
		return MALFORMED; /* more extension headers than anyone needs */
	t->at = at;
	t->protocol = next;
	return WHOLE;
}
