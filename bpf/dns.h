/* SPDX-License-Identifier: GPL-2.0 */
/*
 * dns, at the node side of a pod's veth, called by the guard: a question for a name that the mesh gave an address.
 *
 *  1. a pod that is not asked for, or a datagram to another port -> none of ours
 *  2. anything but one plain question for A or AAAA by UDP       -> to the resolver that it is sent to, as it is
 *  3. a name that no ServiceEntry of the pod's has               -> likewise
 *  4. any other                                                  -> answered here, by the datagram itself: addresses and
 *                                                                   ports change places, the answer is put behind the
 *                                                                   question, and it is handed back to the pod
 *
 * So an answer comes from whom was asked, before any DNAT of the node, whatever socket asked; nobody can answer another pod;
 * there is one answer, of at most 512 bytes, to one question; and no agent is needed for it. What the resolver is asked
 * stays as it is to the byte.
 *
 * The question is not touched before it is known that it can be answered.
 */
#pragma once

#include "packet.h"
#include "udp.h"

#define DNS_PORT 53
#define DNS_TTL 30 /* seconds, as Istio has it */
#define DNS_A 1
#define DNS_AAAA 28
#define DNS_OPT 41
#define DNS_IN 1
#define DNS_UDP_SIZE 1232 /* what we take: nobody sends us more than a question */
#define DNS_FIXED (sizeof(struct udp_header) + sizeof(struct dns_header))
#define DNS_MESSAGE 512
#define DNS_LABELS 16 /* of a name that one with "*" is looked for; one with more is left to its resolver unless it is known itself */

#define DNS_RESPONSE 0x8000
#define DNS_RECURSION 0x0100
#define DNS_RECURSIVE 0x0080
#define DNS_UNCHECKED 0x0010
/* Set in no question that is plain: a response, another opcode, an authority's, truncated, reserved, a response's code. */
#define DNS_NOT_PLAIN 0xfecf
#define DNSSEC_OK 0x8000

struct dns_header {
	__u16 id;
	__u16 flags;
	__u16 questions;
	__u16 answers;
	__u16 authorities;
	__u16 additional;
};

struct dns_record {
	__u16 name;
	__u16 type;
	__u16 class;
	__u16 ttl[2];
	__u16 length;
	struct addr data; /* of A: the first four bytes */
};

#define DNS_RECORD_HEAD 12

/* The pseudo-record of EDNS, without the name before it and its options behind. */
struct dns_opt {
	__u16 type;
	__u16 size;
	__u8 code;
	__u8 version;
	__u16 flags;
	__u16 length;
};

#define DNS_OPT_LEN 11

/* What an UDP checksum is made of besides the message. Mapped addresses and a length of 32 bits come to the same as IPv4's
 * own: a sum of ones' complement takes 0xffff for nothing. */
struct dns_sum {
	struct addr addrs[2];
	__u32 length;
	__u32 protocol;
	struct udp_header udp;
};

static __always_inline int dns_left(void)
{
	count(DNS_LEFT);
	return TC_NEXT;
}

static __always_inline __u16 dns_fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* One byte of a name. */
static int dns_letter(__u32 i, struct dns_scratch **of)
{
	struct dns_scratch *s = *of;
	struct dns_question *q = &s->question;
	if (i >= DNS_NAME - 1)
		return 1;
	__u8 c = s->key.name[i];
	if (q->name) {
		s->key.name[i] = 0;
	} else if (q->left) {
		q->left--;
		if (c >= 'A' && c <= 'Z')
			s->key.name[i] = c | 0x20;
	} else if (c > 63) {
		return 1; /* a pointer, which no question has */
	} else if (c) {
		q->left = c;
	} else {
		q->name = i + 1;
	}
	return 0;
}

/* The name as the tables have it: as on the wire, in lower case, zeros behind. False for what is none. */
static __always_inline bool dns_name(struct dns_scratch *s)
{
	s->question.left = s->question.name = 0;
	bpf_loop(DNS_NAME - 1, dns_letter, &s, 0);
	return s->question.name;
}

/* size: of the datagram from its UDP header on, which is at at. */
static __always_inline bool dns_read(struct __sk_buff *skb, __u32 at, __u32 size, struct dns_scratch *s)
{
	struct dns_question *q = &s->question;
	struct dns_header *h = (void *)s->room;
	if (bpf_skb_load_bytes(skb, at + sizeof(struct udp_header), h, sizeof(*h)))
		return false;
	q->flags = ntohs(h->flags);
	q->edns = h->additional != 0;
	if ((q->flags & DNS_NOT_PLAIN) || h->questions != htons(1) || h->answers || h->authorities || ntohs(h->additional) > 1)
		return false;

	__u32 n = size - DNS_FIXED;
	if (n > DNS_NAME - 1)
		n = DNS_NAME - 1;
	if (n < 5 || bpf_skb_load_bytes(skb, at + DNS_FIXED, s->key.name, n) || !dns_name(s))
		return false;
	__u32 tail = DNS_FIXED + q->name; /* where its type is */
	__u16 *is = (void *)s->room;
	if (tail + 4 > size || bpf_skb_load_bytes(skb, at + tail, is, 4))
		return false;
	q->v4 = is[0] == htons(DNS_A);
	if (is[1] != htons(DNS_IN) || (is[0] != htons(DNS_A) && is[0] != htons(DNS_AAAA)))
		return false;

	tail += 4;
	if (!q->edns)
		return tail == size;
	__u8 *root = (void *)s->room;
	struct dns_opt *opt = (void *)(root + 2);
	if (tail + DNS_OPT_LEN > size || bpf_skb_load_bytes(skb, at + tail, root + 1, DNS_OPT_LEN))
		return false;
	q->edns_flags = ntohs(opt->flags);
	return root[1] == 0 && opt->type == htons(DNS_OPT) && opt->version == 0 && tail + DNS_OPT_LEN + ntohs(opt->length) == size;
}

/* A copy: an element that is taken out of a map may be another's at once. One that is found again after it was read was this
 * name's all the time. */
static __always_inline bool dns_find(const struct dns_key *k, struct dns_answer *to)
{
	struct dns_answer *a = bpf_map_lookup_elem(&dns_names, k);
	if (!a)
		return false;
	*to = *a;
	return bpf_map_lookup_elem(&dns_names, k) == a;
}

static __always_inline bool dns_find_for(struct dns_key *k, __u64 scope, struct dns_answer *to)
{
	k->scope = scope;
	if (dns_find(k, to))
		return true;
	k->scope = 0;
	return dns_find(k, to);
}

/* One step of dns_find_below: the next label is "*" instead. */
static int dns_label(__u32 i __attribute__((unused)), struct dns_scratch **of)
{
	struct dns_scratch *s = *of;
	__u32 at = s->question.at;
	if (at > DNS_NAME - 2)
		return 1;
	__u8 len = s->key.name[at];
	at += 1 + len;
	if (!len || at > DNS_NAME - 2)
		return 1;
	s->question.at = at;
	s->above.name[0] = 1;
	s->above.name[1] = '*';
	/* Behind the name there are zeros enough. */
	if (bpf_probe_read_kernel(&s->above.name[2], DNS_NAME - 2, &s->key.name[at]))
		return 1;
	s->question.found = dns_find_for(&s->above, s->question.scope, &s->answer);
	return s->question.found;
}

/* Names that stand for all below them: "*" in place of one label, then of the two before, and so on; the longest domain holds. */
static __always_inline bool dns_find_below(struct dns_scratch *s, __u64 scope)
{
	s->question.scope = scope;
	s->question.at = 0;
	s->question.found = false;
	bpf_loop(DNS_LABELS, dns_label, &s, 0);
	return s->question.found;
}

/* Makes the question its answer. Everything but the records' contents has been looked at: what fails here is memory. */
static __always_inline bool dns_write(struct __sk_buff *skb, const struct transport *t, struct udp_header *udp,
				      struct dns_scratch *s, __u32 n)
{
	struct dns_question *q = &s->question;
	bool v4 = q->v4, edns = q->edns;
	__u32 at = t->at, message = at + sizeof(*udp);
	__u32 record = DNS_RECORD_HEAD + (v4 ? 4 : 16);
	__u32 tail = message + sizeof(struct dns_header) + q->name + 4;
	__u32 end = tail + n * record + (edns ? DNS_OPT_LEN : 0);
	if (bpf_skb_change_tail(skb, end, 0))
		return false;

	struct dns_record *r = (void *)s->room;
	*r = (struct dns_record){.name = htons(0xc000 | sizeof(struct dns_header)), .type = v4 ? htons(DNS_A) : htons(DNS_AAAA),
				 .class = htons(DNS_IN), .ttl = {0, htons(DNS_TTL)}, .length = v4 ? htons(4) : htons(16)};
	for (__u32 i = 0; i < DNS_ADDRS; i++) {
		if (i >= n)
			break;
		if (v4)
			r->data.w[0] = s->answer.v4[i];
		else
			r->data = s->answer.v6[i];
		if (bpf_skb_store_bytes(skb, tail + i * record, r, record, 0))
			return false;
	}
	tail += n * record; /* not counted up above: the verifier would follow each number of records to the end */
	if (edns) {
		__u8 *root = (void *)s->room;
		struct dns_opt *opt = (void *)(root + 2);
		root[1] = 0;
		*opt = (struct dns_opt){.type = htons(DNS_OPT), .size = htons(DNS_UDP_SIZE), .flags = htons(q->edns_flags & DNSSEC_OK)};
		if (bpf_skb_store_bytes(skb, tail, root + 1, DNS_OPT_LEN, 0))
			return false;
	}
	struct dns_header *h = (void *)s->room;
	if (bpf_skb_load_bytes(skb, message, h, sizeof(*h)))
		return false;
	h->flags = htons(DNS_RESPONSE | DNS_RECURSIVE | (q->flags & (DNS_RECURSION | DNS_UNCHECKED)));
	h->answers = htons(n);
	if (bpf_skb_store_bytes(skb, message, h, sizeof(*h), 0))
		return false;

	__u32 len = end - message;
	if (len > DNS_MESSAGE)
		return false;
	__asm__ volatile("" : "+r"(len)); /* two comparisons: of one with a difference Linux 6.1 learns nothing, nor of one with 0 */
	if (len < sizeof(*h) || bpf_skb_load_bytes(skb, message, s->message, len))
		return false;
	for (__u32 i = 0; i < 3; i++)
		s->message[len + i] = 0;
	__u16 port = udp->source;
	udp->source = udp->destination;
	udp->destination = port;
	udp->length = htons(sizeof(*udp) + len);
	udp->checksum = 0;
	struct dns_sum *sum = (void *)s->room;
	*sum = (struct dns_sum){.addrs = {t->src, t->dst}, .length = htonl(sizeof(*udp) + len), .protocol = htonl(IPPROTO_UDP), .udp = *udp};
	__u32 of = bpf_csum_diff(0, 0, s->room, sizeof(*sum), 0);
	udp->checksum = dns_fold(bpf_csum_diff(0, 0, (__u32 *)s->message, (len + 3) & ~3U, of));
	if (!udp->checksum)
		udp->checksum = 0xffff;
	if (bpf_skb_store_bytes(skb, at, udp, sizeof(*udp), 0))
		return false;

	if (addr_is_v4(&t->src)) {
		struct ipv4_header *ip = (void *)s->room;
		if (bpf_skb_load_bytes(skb, ETH_LEN, ip, sizeof(*ip)))
			return false;
		ip->source = t->dst.w[3];
		ip->destination = t->src.w[3];
		ip->length = htons(end - ETH_LEN);
		ip->checksum = 0;
		ip->checksum = dns_fold(bpf_csum_diff(0, 0, s->room, sizeof(*ip), 0));
		if (bpf_skb_store_bytes(skb, ETH_LEN, ip, sizeof(*ip), 0))
			return false;
	} else {
		struct ipv6_header *ip = (void *)s->room;
		if (bpf_skb_load_bytes(skb, ETH_LEN, ip, sizeof(*ip)))
			return false;
		ip->source = t->dst;
		ip->destination = t->src;
		ip->length = htons(end - at);
		if (bpf_skb_store_bytes(skb, ETH_LEN, ip, sizeof(*ip), 0))
			return false;
	}
	return !bpf_skb_load_bytes(skb, 0, s->room, 12) && !bpf_skb_store_bytes(skb, 6, s->room, 6, 0) &&
	       !bpf_skb_store_bytes(skb, 0, (__u8 *)s->room + 6, 6, 0) &&
	       (skb->pkt_type == PACKET_HOST || !bpf_skb_change_type(skb, PACKET_HOST));
}

/* A datagram that leaves a pod from an address of its own. */
static __noinline int dns_leaves(struct __sk_buff *skb, const struct guarded *g, const struct transport *t)
{
	__u32 ifindex = skb->ifindex, zero = 0;
	struct dns_client *c = bpf_map_lookup_elem(&dns_clients, &ifindex);
	if (!c || t->fragment)
		return TC_NEXT;
	struct udp_header udp;
	if (bpf_skb_load_bytes(skb, t->at, &udp, sizeof(udp)) || udp.destination != htons(DNS_PORT))
		return TC_NEXT;
	__u64 scope = c->scope;
	bool below = c->below;
	if (((volatile struct dns_client *)c)->ifindex != ifindex) /* of another pod by now */
		return TC_NEXT;

	/* Without options and extension headers, and nothing behind. */
	__u32 size = ntohs(udp.length);
	if (size < DNS_FIXED + 5 || size > DNS_FIXED + DNS_MESSAGE || t->at + size != skb->len ||
	    t->at != ETH_LEN + (addr_is_v4(&t->src) ? sizeof(struct ipv4_header) : sizeof(struct ipv6_header)))
		return dns_left();
	struct dns_scratch *s = bpf_map_lookup_elem(&dns_scratches, &zero);
	if (!s || !dns_read(skb, t->at, size, s))
		return dns_left();
	if (!dns_find_for(&s->key, scope, &s->answer) && !(below && dns_find_below(s, scope)))
		return dns_left();

	/* An address of a family that the pod does not have is of no use to it. */
	__u32 n = 0;
	bool v4 = s->question.v4;
	if (v4 && g->v4.w[3])
		n = s->answer.v4_count;
	else if (!v4 && g->v6.w[0])
		n = s->answer.v6_count;
	if (n > DNS_ADDRS)
		return dns_left();
	if (!dns_write(skb, t, &udp, s, n))
		return shoot(DNS_DROP);
	skb->mark = 0;
	count(n ? DNS_ANSWERED : DNS_EMPTY);
	return bpf_redirect_peer(ifindex, 0);
}
