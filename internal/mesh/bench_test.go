package mesh

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
)

// big is a mesh of n pods behind n/10 services.
func big(n int) (*Snapshot, *Builder) {
	b := NewBuilder(nil)
	for i := range n / 10 {
		b.PutService(svc(fmt.Sprint("s", i), fmt.Sprintf("10.96.%d.%d", i>>8, i&255)))
	}
	for i := range n {
		b.PutWorkload(bigPod(i))
	}
	return b.Commit(1), b
}

func bigPod(i int) *Workload {
	w := pod(fmt.Sprint("p", i), "", fmt.Sprint("s", i/10))
	var a [4]byte
	binary.BigEndian.PutUint32(a[:], 10<<24+uint32(i))
	w.Addrs = []netip.Addr{netip.AddrFrom4(a)}
	w.Node = fmt.Sprint("n", i%500)
	return w
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	_, b := big(1000)
	src := pod("client", "10.255.0.1")
	b.PutWorkload(src)
	server := bigPod(3)
	server.Policies = []PolicyName{{"shop", "a"}}
	b.PutWorkload(server)
	b.PutPolicy(policy("a", ScopeWorkload, Allow, when(from("x"), from("ui"))))
	b.PutPolicy(policy("d", ScopeNamespace, Deny, when(Match{NotPrincipals: []StringMatch{{Kind: MatchPresence}}})))
	s := b.Commit(2)
	service, address := dst("10.96.0.7:80"), dst("10.0.0.3:8080")
	conn := Conn{Source: Identity{"cluster.local", "shop", "ui"}, SourceIP: ip("10.255.0.1"), Dst: address, DstWorkload: server}
	for name, f := range map[string]func(){
		"Resolve of a service":  func() { s.Resolve(src, service, nil) },
		"Resolve of a pod":      func() { s.Resolve(src, address, nil) },
		"Resolve of a stranger": func() { s.Resolve(src, dst("8.8.8.8:53"), nil) },
		"Authorize": func() {
			if !s.Authorize(conn).Allow {
				t.Fatal("denied")
			}
		},
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 && name != "Resolve of a stranger" || n > 1 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

// One pod changes in a mesh of 50,000.
func BenchmarkChangeOneOf50000(b *testing.B) {
	_, builder := big(50_000)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		w := bigPod(i % 50_000)
		w.Healthy = i/50_000%2 == 1
		builder.PutWorkload(w)
		builder.Commit(uint64(i + 2))
	}
}

func BenchmarkBuild50000(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		big(50_000)
	}
}

func BenchmarkResolveService(b *testing.B) {
	s, _ := big(50_000)
	src, to := bigPod(7), dst("10.96.0.9:80")
	b.ReportAllocs()
	for b.Loop() {
		s.Resolve(src, to, nil)
	}
}

func BenchmarkAuthorize(b *testing.B) {
	_, builder := big(50_000)
	builder.PutPolicy(policy("a", ScopeNamespace, Allow, when(from("x"), from("ui"))))
	s := builder.Commit(2)
	conn := Conn{Source: Identity{"cluster.local", "shop", "ui"}, SourceIP: ip("10.255.0.1"), Dst: dst("10.0.0.3:8080"), DstWorkload: bigPod(3)}
	b.ReportAllocs()
	for b.Loop() {
		s.Authorize(conn)
	}
}
