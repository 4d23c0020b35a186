package datapath

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// echoing is a DNS server that knows nothing: it sends back what it was sent, so that who asks sees what arrived.
type echoing struct{ asked atomic.Int64 }

func (h *host) resolver() *echoing {
	h.lab.t.Helper()
	r := &echoing{}
	c := h.udpSocket(netip.AddrPortFrom(netip.IPv6Unspecified(), dnsPort))
	h.lab.agents.Add(1)
	go func() {
		defer h.lab.agents.Done()
		b := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			r.asked.Add(1)
			c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return r
}

// entry is a host of a ServiceEntry in a namespace, behind a waypoint.
func entry(namespace, hostname string, addrs ...string) *mesh.Service {
	s := &mesh.Service{Name: mesh.ServiceName{Namespace: namespace, Hostname: hostname}, Waypoint: &mesh.Gateway{}, Ports: []mesh.ServicePort{{Port: 80, Target: 80}}}
	for _, a := range addrs {
		s.VIPs = append(s.VIPs, mesh.NetAddr{Addr: netip.MustParseAddr(a)})
	}
	return s
}

// knows has the lab's kernel know some services, of the revision after the last.
func (l *lab) knows(services ...*mesh.Service) *mesh.Snapshot {
	l.t.Helper()
	b := mesh.NewBuilder(l.snapshot(mesh.SameNodeKernel))
	for _, s := range services {
		b.PutService(s)
	}
	s := b.Commit(2)
	check(l.t, l.dp.SetDestinations(Desired(s, "")))
	check(l.t, l.dp.SetNames(s, ""))
	return s
}

// asks enrols the host as a pod of a namespace whose questions are answered, or not.
func (h *host) asks(namespace string, on bool) {
	h.lab.t.Helper()
	if h.listeners == (Listeners{}) {
		h.listen()
	}
	p := h.pod()
	p.Identity.Namespace, p.ResolvesNames = namespace, on
	check(h.lab.t, h.lab.dp.Enroll(p))
}

// query is a plain question; edns is the size of the pseudo-record's options, -1 for no such record.
func query(t testing.TB, name string, kind dnsmessage.Type, edns int) []byte {
	t.Helper()
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: uint16(rand.Uint32()), RecursionDesired: true})
	host, err := dnsmessage.NewName(name)
	err = errors.Join(err, b.StartQuestions(), b.Question(dnsmessage.Question{Name: host, Type: kind, Class: dnsmessage.ClassINET}))
	if edns >= 0 {
		var h dnsmessage.ResourceHeader
		err = errors.Join(err, h.SetEDNS0(1232, dnsmessage.RCodeSuccess, true), b.StartAdditionals(),
			b.OPTResource(h, dnsmessage.OPTResource{Options: []dnsmessage.Option{{Code: 10, Data: make([]byte, edns)}}}))
	}
	msg, ferr := b.Finish()
	if err := errors.Join(err, ferr); err != nil {
		t.Fatal(name, err)
	}
	return msg
}

// questions is a socket of a pod that asks one resolver.
type questions struct {
	c         *net.UDPConn
	server    netip.AddrPort
	connected bool
}

func (h *host) questions(server netip.AddrPort, connected bool) *questions {
	h.lab.t.Helper()
	if !connected {
		return &questions{h.udpSocket(netip.AddrPort{}), server, false}
	}
	q := &questions{server: server, connected: true}
	check(h.lab.t, h.as(func() (err error) {
		q.c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(server))
		return err
	}))
	h.lab.t.Cleanup(func() { q.c.Close() })
	return q
}

// ask returns what comes back, which must be from whom was asked.
func (q *questions) ask(t testing.TB, msg []byte) []byte {
	t.Helper()
	b := make([]byte, 65536)
	for range 5 {
		if q.connected {
			q.c.Write(msg)
		} else {
			q.c.WriteToUDPAddrPort(msg, q.server)
		}
		for end := time.Now().Add(2 * time.Second); ; {
			q.c.SetReadDeadline(end)
			n, from, err := q.c.ReadFromUDPAddrPort(b)
			if err != nil {
				break
			}
			if from := netip.AddrPortFrom(from.Addr().Unmap(), from.Port()); from != q.server {
				t.Fatalf("asked %s, and %s answers", q.server, from)
			}
			if n >= 2 && len(msg) >= 2 && b[0] == msg[0] && b[1] == msg[1] || n == len(msg) {
				return bytes.Clone(b[:n])
			}
		}
	}
	t.Fatalf("nobody answers %x", msg)
	return nil
}

// answer reads an answer and holds it to what any is: to the question as it was asked, of no authority, good for 30 s.
func answer(t testing.TB, asked, got []byte) (addrs []netip.Addr) {
	t.Helper()
	var q, m dnsmessage.Message
	if err := errors.Join(q.Unpack(asked), m.Unpack(got)); err != nil {
		t.Fatalf("%v: %x", err, got)
	}
	want := dnsmessage.Header{ID: q.ID, Response: true, RecursionDesired: q.RecursionDesired, RecursionAvailable: true, CheckingDisabled: q.CheckingDisabled}
	if m.Header != want || !cmp.Equal(m.Questions, q.Questions) || len(m.Authorities) > 0 || len(m.Additionals) != len(q.Additionals) {
		t.Fatalf("asked %s\ngot   %s", q.GoString(), m.GoString())
	}
	if len(q.Additionals) > 0 {
		if h := m.Additionals[0].Header; h.Type != dnsmessage.TypeOPT || h.Class != 1232 || h.DNSSECAllowed() != q.Additionals[0].Header.DNSSECAllowed() {
			t.Fatalf("the answer's EDNS is %s", h.GoString())
		}
	}
	if len(got) > 512 {
		t.Fatalf("an answer of %d bytes", len(got))
	}
	for _, a := range m.Answers {
		if h := a.Header; h.Name != q.Questions[0].Name || h.TTL != 30 || h.Class != dnsmessage.ClassINET || h.Type != q.Questions[0].Type {
			t.Fatalf("a record for %s", h.GoString())
		}
		switch r := a.Body.(type) {
		case *dnsmessage.AResource:
			addrs = append(addrs, netip.AddrFrom4(r.A))
		case *dnsmessage.AAAAResource:
			addrs = append(addrs, netip.AddrFrom16(r.AAAA))
		}
	}
	return addrs
}

func addrList(list ...string) (out []netip.Addr) {
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// A pod that asks for a host of a ServiceEntry is told its address, whatever resolver it asks and however; everything else
// comes to the resolver as it was sent.
func TestNamesAreAnswered(t *testing.T) {
	l := newLab(t)
	r := l.outside.resolver()
	l.ui.asks("shop", true)
	long := strings.Repeat(strings.Repeat("a", 61)+".", 4) + "bcdef"
	if len(long) != 253 {
		t.Fatal(len(long))
	}
	many4, many6 := []string{}, []string{}
	for i := range 10 {
		many4, many6 = append(many4, fmt.Sprintf("10.9.0.%d", i+1)), append(many6, fmt.Sprintf("fd09::%d", i+1))
	}
	l.knows(
		entry("shop", "API.example.com", "240.240.0.5", "2001:2::5"),
		entry("shop", "four.example", "240.240.0.6"),
		entry("shop", long, slices.Concat(many4, many6)...),
		entry("shop", "*.wild.example", "240.240.0.7"),
		entry("shop", "known.wild.example", "240.240.0.12"),
		entry("shop", "*.known.wild.example", "240.240.0.13"),
		entry("other", "hidden.example", "240.240.0.8"),
		func() *mesh.Service {
			s := entry("other", "theirs.example", "240.240.0.9")
			s.VisibleIn = []string{"other"}
			return s
		}(),
		func() *mesh.Service {
			s := entry("shop", "catalog.shop.svc.cluster.local", "10.96.0.7")
			s.Canonical = true
			return s
		}(),
		func() *mesh.Service { // nothing of the mesh leads there
			s := entry("shop", "nowhere.example", "240.240.0.11")
			s.Waypoint = nil
			return s
		}(),
	)
	const left = "left"
	for _, c := range []struct {
		name string
		kind dnsmessage.Type
		want string
	}{
		{"api.example.com.", dnsmessage.TypeA, "240.240.0.5"},
		{"aPi.eXample.COM.", dnsmessage.TypeA, "240.240.0.5"},
		{"api.example.com.", dnsmessage.TypeAAAA, "2001:2::5"},
		{"four.example.", dnsmessage.TypeA, "240.240.0.6"},
		{"four.example.", dnsmessage.TypeAAAA, ""},
		{"hidden.example.", dnsmessage.TypeA, "240.240.0.8"}, // it is not
		{"a.wild.example.", dnsmessage.TypeA, "240.240.0.7"},
		{"a.b.WILD.example.", dnsmessage.TypeA, "240.240.0.7"},
		{"a.known.wild.example.", dnsmessage.TypeA, "240.240.0.13"}, // the longest
		{"known.wild.example.", dnsmessage.TypeA, "240.240.0.12"},
		{long + ".", dnsmessage.TypeA, strings.Join(many4[:8], " ")},
		{long + ".", dnsmessage.TypeAAAA, strings.Join(many6[:8], " ")},

		{"api.example.com.", dnsmessage.TypeSRV, left},
		{"api.example.com.", dnsmessage.TypeMX, left},
		{"api.example.com.", 65, left},
		{"api.example.com.", dnsmessage.TypeALL, left},
		{"www.api.example.com.", dnsmessage.TypeA, left},
		{"example.com.", dnsmessage.TypeA, left},
		{"api.example.com.shop.svc.cluster.local.", dnsmessage.TypeA, left},
		{"theirs.example.", dnsmessage.TypeA, left},
		{"nowhere.example.", dnsmessage.TypeA, left},
		{"wild.example.", dnsmessage.TypeA, left},
		{"a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.wild.example.", dnsmessage.TypeA, left}, // more labels than are looked at
		{"catalog.shop.svc.cluster.local.", dnsmessage.TypeA, left},
		{".", dnsmessage.TypeA, left},
		{long[:252] + "x.", dnsmessage.TypeA, left},
	} {
		for _, server := range l.outside.addrs(dnsPort) {
			for _, connected := range []bool{false, true} {
				for _, edns := range []int{-1, 0, 8} {
					what := fmt.Sprintf("%s %s of %s, connected %t, EDNS %d", c.kind, c.name, server, connected, edns)
					q := l.ui.questions(server, connected)
					msg := query(t, c.name, c.kind, edns)
					before := r.asked.Load()
					got := q.ask(t, msg)
					q.c.Close()
					if asked := r.asked.Load() - before; (c.want == left) != (asked > 0) {
						t.Fatalf("%s: the resolver was asked %d times", what, asked)
					}
					if c.want == left {
						if !bytes.Equal(got, msg) {
							t.Fatalf("%s: the resolver was asked\n%x, not\n%x", what, got, msg)
						}
						continue
					}
					if addrs := answer(t, msg, got); !slices.Equal(addrs, addrList(strings.Fields(c.want)...)) {
						t.Fatalf("%s: %v, want %s", what, addrs, c.want)
					}
				}
			}
		}
	}
}

// What a pod is told is what its namespace knows, and its own before others'; a pod that is not to be answered, one that is
// released and those of a mesh without such names ask their resolvers.
func TestWhoIsAnswered(t *testing.T) {
	l := newLab(t)
	l.outside.resolver()
	l.ui.asks("shop", true)
	l.cat.asks("other", true)
	private := entry("other", "private.example", "240.240.0.1")
	private.VisibleIn = []string{"other"}
	public := []*mesh.Service{private, entry("aaa", "both.example", "240.240.0.2"), entry("other", "both.example", "240.240.0.3")}
	l.knows(public...)
	server := netip.AddrPortFrom(l.outside.v4, dnsPort)
	ask := func(h *host, name string) string {
		t.Helper()
		msg := query(t, name, dnsmessage.TypeA, -1)
		got := h.questions(server, false).ask(t, msg)
		if bytes.Equal(got, msg) {
			return "left"
		}
		return fmt.Sprint(answer(t, msg, got))
	}
	expect := func(when string, h *host, name, want string) {
		t.Helper()
		if got := ask(h, name); got != want {
			t.Errorf("%s: %s is told %s for %s, want %s", when, h.name, got, name, want)
		}
	}
	expect("at first", l.ui, "both.example.", "[240.240.0.2]")
	expect("at first", l.cat, "both.example.", "[240.240.0.3]")
	expect("at first", l.ui, "private.example.", "left")
	expect("at first", l.cat, "private.example.", "[240.240.0.1]")

	check(t, l.dp.Close())
	expect("without an agent", l.cat, "both.example.", "[240.240.0.3]")
	l.open()
	expect("after a restart", l.cat, "private.example.", "[240.240.0.1]")
	l.knows(append(public, entry("aaa", "new.example", "240.240.0.4"))...)
	expect("before the pods are known again", l.cat, "private.example.", "[240.240.0.1]")
	expect("before the pods are known again", l.cat, "new.example.", "[240.240.0.4]")

	l.ui.asks("shop", false)
	l.cat.asks("other", true)
	expect("when it is not to be", l.ui, "both.example.", "left")
	expect("when the other is not to be", l.cat, "private.example.", "[240.240.0.1]")
	l.ui.asks("shop", true)
	expect("when it is to be again", l.ui, "both.example.", "[240.240.0.2]")

	// What somebody changes in the kernel is put right.
	check(t, l.dp.kernel.DnsClients.Delete(uint32(l.ui.nodeIndex)))
	k := must(kernelName("both.example"))
	check(t, l.dp.kernel.DnsNames.Put(k, kernelAnswer(addrList("10.0.0.1"))))
	expect("when its row is gone", l.ui, "both.example.", "left")
	must(l.dp.Audit())
	expect("after an audit", l.ui, "both.example.", "[240.240.0.2]")

	check(t, l.dp.Release("uid-catalog"))
	expect("released", l.cat, "both.example.", "left")
	l.knows()
	expect("without names", l.ui, "both.example.", "left")
	if rows := must(l.dp.hosts.clients.read()); len(rows) > 0 {
		t.Errorf("without names the datagrams of %v are looked at", rows)
	}
	if rows := must(l.dp.hosts.names.read()); len(rows) > 0 {
		t.Errorf("%d names are left", len(rows))
	}
	check(t, l.dp.SetDestinations(l.destinations()))
}

// A pod without addresses of a family is told of none of that family.
func TestNamesOfAFamilyThePodHasNot(t *testing.T) {
	l := newLab(t)
	l.outside.resolver()
	l.ui.listen()
	p := l.ui.pod()
	p.Addrs, p.ResolvesNames = []netip.Addr{l.ui.v4}, true
	check(t, l.dp.Enroll(p))
	l.knows(entry("shop", "api.example.com", "240.240.0.5", "2001:2::5"))
	q := l.ui.questions(netip.AddrPortFrom(l.outside.v4, dnsPort), false)
	for kind, want := range map[dnsmessage.Type]string{dnsmessage.TypeA: "[240.240.0.5]", dnsmessage.TypeAAAA: "[]"} {
		msg := query(t, "api.example.com.", kind, -1)
		if got := fmt.Sprint(answer(t, msg, q.ask(t, msg))); got != want {
			t.Errorf("%s: %s, want %s", kind, got, want)
		}
	}
}

// plain is whether a message is a question that the mesh answers, as RFC 1035 and 6891 have it. It is written beside
// the kernel's program, not after it.
func plain(msg []byte, known map[string]bool) bool {
	if len(msg) < 12 {
		return false
	}
	flags := binary.BigEndian.Uint16(msg[2:])
	count := func(i int) int { return int(binary.BigEndian.Uint16(msg[4+2*i:])) }
	const recursionDesired, authentic, unchecked = 1 << 8, 1 << 5, 1 << 4
	if flags&^(recursionDesired|authentic|unchecked) != 0 || count(0) != 1 || count(1)+count(2) != 0 || count(3) > 1 {
		return false
	}
	var labels []string
	rest := msg[12:]
	for {
		if len(rest) == 0 {
			return false
		}
		n := int(rest[0])
		rest = rest[1:]
		if n == 0 {
			break
		}
		if n > 63 || len(rest) < n {
			return false
		}
		labels = append(labels, strings.ToLower(string(rest[:n])))
		rest = rest[n:]
	}
	is := known[strings.Join(labels, ".")]
	for i := 1; i <= min(len(labels), 16); i++ {
		is = is || known[strings.Join(append([]string{"*"}, labels[i:]...), ".")]
	}
	if len(rest) < 4 || !is {
		return false
	}
	kind, class := binary.BigEndian.Uint16(rest), binary.BigEndian.Uint16(rest[2:])
	if kind != 1 && kind != 28 || class != 1 {
		return false
	}
	rest = rest[4:]
	if count(3) == 0 {
		return len(rest) == 0
	}
	return len(rest) >= 11 && rest[0] == 0 && binary.BigEndian.Uint16(rest[1:]) == 41 && rest[6] == 0 &&
		int(binary.BigEndian.Uint16(rest[9:])) == len(rest)-11
}

// Whatever a pod sends to port 53 is answered where it is a question that is known, and arrives as it is where it is not.
func TestAnyDatagramToAResolver(t *testing.T) {
	l := newLab(t)
	l.outside.resolver()
	l.ui.asks("shop", true)
	known := map[string]bool{"api.example.com": true, "a": true, strings.Repeat("x", 63) + ".y": true, "*.wild.example": true}
	var services []*mesh.Service
	for i, host := range slices.Sorted(maps.Keys(known)) {
		services = append(services, entry("shop", host, fmt.Sprintf("240.240.0.%d", i+1), fmt.Sprintf("2001:2::%d", i+1)))
	}
	l.knows(services...)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	var sockets []*questions
	for _, server := range l.outside.addrs(dnsPort) {
		sockets = append(sockets, l.ui.questions(server, false))
	}
	rounds := 4000
	if testing.Short() {
		rounds = 400
	}
	names := slices.Sorted(maps.Keys(known))
	answered := 0
	for i := range rounds {
		name := names[rnd.IntN(len(names))]
		if below, wild := strings.CutPrefix(name, "*"); wild {
			name = strings.Repeat("z.", rnd.IntN(20)) + "x" + below
		}
		kind := []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeTXT}[rnd.IntN(3)]
		msg := query(t, name+".", kind, rnd.IntN(30)-10)
		for range rnd.IntN(3) {
			switch rnd.IntN(5) {
			case 0:
				msg[2+rnd.IntN(10)] ^= 1 << rnd.IntN(8) // flags and counts
			case 1:
				msg[rnd.IntN(len(msg))] = byte(rnd.Uint32())
			case 2:
				msg = msg[:12+rnd.IntN(len(msg)-11)]
			case 3:
				msg = append(msg, make([]byte, rnd.IntN(600))...)
			case 4:
				at := 12 + rnd.IntN(len(msg)-11)
				msg = slices.Insert(msg, at, byte(rnd.Uint32()))
			}
		}
		msg[0], msg[1] = byte(i>>8), byte(i)
		got := sockets[i%2].ask(t, msg)
		if !plain(msg, known) {
			if !bytes.Equal(got, msg) {
				t.Fatalf("seed %d: sent\n%x, and the resolver got\n%x", seed, msg, got)
			}
			continue
		}
		answered++
		if bytes.Equal(got, msg) || got[2]&0x80 == 0 {
			t.Fatalf("seed %d: left to the resolver: %x", seed, msg)
		}
		if new(dnsmessage.Message).Unpack(msg) != nil { // options of EDNS that the library does not take
			continue
		}
		if n := len(answer(t, msg, got)); n != 1 {
			t.Fatalf("seed %d: %d addresses for %x", seed, n, msg)
		}
	}
	t.Logf("%d of %d were answered", answered, rounds)
	if answered < rounds/20 || answered > rounds*19/20 {
		t.Errorf("%d of %d questions were answered: this has tried one side alone", answered, rounds)
	}
}

// sum16 is the checksum of IP.
func sum16(parts ...[]byte) uint16 {
	var sum uint32
	b := slices.Concat(parts...)
	if len(b)%2 == 1 {
		b = append(b, 0)
	}
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// A datagram whose checksum is complete, as a raw socket's is, gets an answer with one that is right: the pod's kernel looks at it.
func TestAnswersHaveAChecksum(t *testing.T) {
	l := newLab(t)
	l.outside.resolver()
	l.ui.asks("shop", true)
	l.knows(entry("shop", "api.example.com", "240.240.0.5", "2001:2::5"), entry("shop", "odd.example.com", "10.1.2.3", "10.4.5.6", "fd00::1", "fd00::2"))
	for _, server := range l.outside.addrs(dnsPort) {
		own, network := l.ui.v4, "ip4:udp"
		if server.Addr().Is6() {
			own, network = l.ui.v6, "ip6:udp"
		}
		q := &questions{l.ui.udpSocket(netip.AddrPortFrom(own, 0)), server, false}
		port := q.c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		var raw net.PacketConn
		check(t, l.ui.as(func() (err error) {
			raw, err = net.ListenPacket(network, own.String())
			return err
		}))
		defer raw.Close()
		for _, name := range []string{"api.example.com.", "odd.example.com."} {
			for _, kind := range []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA} {
				for _, edns := range []int{-1, 0, 1, 2, 3} {
					msg := query(t, name, kind, edns)
					d := binary.BigEndian.AppendUint16(nil, port)
					d = binary.BigEndian.AppendUint16(d, dnsPort)
					d = binary.BigEndian.AppendUint16(d, uint16(8+len(msg)))
					d = append(append(d, 0, 0), msg...)
					length := binary.BigEndian.AppendUint32(nil, uint32(len(d)))
					binary.BigEndian.PutUint16(d[6:], sum16(own.AsSlice(), server.Addr().AsSlice(), length, []byte{0, 0, 0, 17}, d))
					if _, err := raw.WriteTo(d, &net.IPAddr{IP: server.Addr().AsSlice()}); err != nil {
						t.Fatal(err)
					}
					b := make([]byte, 2048)
					q.c.SetReadDeadline(time.Now().Add(soon))
					n, _, err := q.c.ReadFromUDPAddrPort(b)
					if err != nil {
						t.Fatalf("%s %s of %s, EDNS %d: %v", kind, name, server, edns, err)
					}
					if len(answer(t, msg, b[:n])) == 0 {
						t.Errorf("%s %s: no address", kind, name)
					}
				}
			}
		}
	}
}

// Which names the kernel is told, for which pods.
func TestAnswersOf(t *testing.T) {
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local", Network: "here"})
	service := func(namespace, host string, change func(*mesh.Service), addrs ...string) {
		s := entry(namespace, host, addrs...)
		for i := range s.VIPs {
			s.VIPs[i].Network = "here"
		}
		if change != nil {
			change(s)
		}
		b.PutService(s)
	}
	for _, w := range []struct{ uid, addr, host string }{{"direct", "203.0.113.7", "direct.example"}, {"fake", "203.0.113.8", "fake.example"}, {"static", "203.0.113.20", "static.example"}} {
		b.PutWorkload(&mesh.Workload{UID: w.uid, Network: "here", Addrs: addrList(w.addr), Healthy: true,
			Services: map[mesh.ServiceName][]mesh.ServicePort{{Namespace: "shop", Hostname: w.host}: nil}})
	}
	b.PutWorkload(&mesh.Workload{UID: "named", Network: "here", Hostname: "named.example", Healthy: true,
		Services: map[mesh.ServiceName][]mesh.ServicePort{{Namespace: "shop", Hostname: "named.example"}: nil}})
	alone := func(s *mesh.Service) { s.Waypoint = nil }
	service("shop", "static.example", alone, "240.240.0.30")
	service("shop", "named.example", alone, "240.240.0.31")
	service("shop", "Captured.Example.", nil, "240.240.0.1")
	service("shop", "direct.example", alone, "203.0.113.7", "203.0.113.99") // its server's own address, and one that nobody has
	service("shop", "fake.example", alone, "203.0.113.9")
	service("shop", "*.passed.example", func(s *mesh.Service) { alone(s); s.LB.Mode = mesh.LBPassthrough }, "203.0.113.11")
	service("shop", "*.below.example", nil, "240.240.0.40")
	service("shop", "*.none.example", nil, "198.51.100.1") // which has neither endpoints nor a name to go by
	service("shop", "a.*.example", nil, "240.240.0.41")
	service("shop", "passed.example", func(s *mesh.Service) { alone(s); s.LB.Mode = mesh.LBPassthrough }, "203.0.113.10")
	service("shop", "far.example", func(s *mesh.Service) { s.VIPs[0].Network = "there" }, "240.240.0.3")
	service("shop", "none.example", nil)
	service("shop", "udp.example", func(s *mesh.Service) { s.Ports = nil }, "240.240.0.50")
	service("shop", "same.example", func(s *mesh.Service) { s.Canonical = true }, "240.240.0.4")
	service("zoo", "same.example", nil, "240.240.0.5")
	service("shop", "two.example", func(s *mesh.Service) { s.VisibleIn = []string{} }, "240.240.0.6")
	service("zoo", "two.example", func(s *mesh.Service) { s.VisibleIn = []string{"shop", "zoo"} }, "240.240.0.7")
	service("shop", "bad..example", nil, "240.240.0.8")
	for i, host := range []string{"db.shop.svc.cluster.local", "www.example.com.zoo.svc.cluster.local", "www.example.com.svc.cluster.local", "www.example.com.cluster.local"} {
		service("shop", host, nil, fmt.Sprintf("240.240.0.%d", 20+i))
	}
	s := b.Commit(1)

	got := answersOf(s, s.Hosts(), "here", Desired(s, "here"), map[string]bool{"shop": true, "zoo": true, "rest": true})
	said := map[string]string{}
	scopes := map[uint64]string{everyone: "", scopeOf("shop"): "shop:", scopeOf("zoo"): "zoo:", scopeOf("rest"): "rest:"}
	for k, a := range got.rows {
		var labels []string
		for rest := k.Name[:]; rest[0] != 0; rest = rest[1+rest[0]:] {
			labels = append(labels, string(rest[1:1+rest[0]]))
		}
		said[scopes[k.Scope]+strings.Join(labels, ".")] = fmt.Sprint(goAddr(bpf.MeshAddr{W: [4]uint32{2: 0xffff0000, 3: a.V4[0]}}), a.V4Count)
	}
	want := map[string]string{
		"captured.example": "240.240.0.1 1", "direct.example": "203.0.113.7 1", "passed.example": "203.0.113.10 1",
		"shop:two.example": "240.240.0.7 1", "zoo:two.example": "240.240.0.7 1",
		"db.shop.svc.cluster.local": "240.240.0.20 1", "static.example": "240.240.0.30 1", "*.below.example": "240.240.0.40 1",
	}
	if d := cmp.Diff(want, said); d != "" {
		t.Error(d)
	}
	if len(got.problems) != 1 || !strings.Contains(got.problems[0].Error(), "bad..example") {
		t.Errorf("%v", got.problems)
	}
}
