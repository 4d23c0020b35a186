package mesh

import (
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// Compile knows every condition there is. Whoever adds one to Match has to give it a dimension in compile.go.
func TestCompileKnowsEveryCondition(t *testing.T) {
	if n := reflect.TypeFor[Match]().NumField(); n != 12 {
		t.Errorf("Match has %d fields, compile.go knows of 12: possible, MatchesIdentity, MatchesSource and MatchesPort have to take the new ones", n)
	}
}

// What the kernel decides by says what Authorize says.
func TestCompiledAgainstAuthorize(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := NewBuilder(nil)
		w := pod("server", "10.0.0.3")
		for i := range rapid.IntRange(0, 2).Draw(t, "bound") {
			w.Policies = append(w.Policies, PolicyName{"shop", fmt.Sprint("w", i)})
		}
		b.PutWorkload(w)
		for range rapid.IntRange(0, 8).Draw(t, "policies") {
			b.PutPolicy(genPolicy(t))
		}
		s := b.Commit(1)
		compiled, err := s.Compile(w.UID, w.Addrs[0])
		if err != nil {
			t.Fatal(err)
		}
		for range 8 {
			c := Conn{
				SourceIP: ip(fmt.Sprintf("10.0.0.%d", rapid.IntRange(0, 3).Draw(t, "src"))),
				Dst:      netip.AddrPortFrom(w.Addrs[0], []uint16{80, 81}[rapid.IntRange(0, 1).Draw(t, "port")]), DstWorkload: w,
			}
			if rapid.Bool().Draw(t, "mtls") {
				c.Source = Identity{"cluster.local", []string{"shop", "other"}[rapid.IntRange(0, 1).Draw(t, "ns")], fmt.Sprint("p", rapid.IntRange(0, 1).Draw(t, "sa"))}
			}
			want, got := s.Authorize(c), compiled.Decide(c.Source, c.SourceIP, c.Dst.Port())
			if got.Allow != want.Allow || got.Why != want.Why {
				t.Fatalf("%+v: compiled says %s, Authorize says %s", c, got.text(), want.text())
			}
		}
	})
}

func TestCompile(t *testing.T) {
	w := pod("server", "10.0.0.1")
	w.Policies = []PolicyName{{"shop", "d"}}
	two := Rule{Clauses: []Clause{{Matches: []Match{from("a"), from("b")}}, {Matches: []Match{{DestinationPorts: []uint16{80}}, {NotDestinationPorts: []uint16{81}}, {}}}}}
	elsewhere := when(Match{DestinationIPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.9/32")}})
	s := build(w, policy("a", ScopeMesh, Allow, two, elsewhere), policy("d", ScopeWorkload, Deny, when(from("x"))), policy("u", ScopeMesh, Audit, Rule{}))
	c, err := s.Compile(w.UID, ip("10.0.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, term := range c.Terms {
		names = append(names, fmt.Sprint(term.Policy.Name, len(term.Matches)))
	}
	if want := []string{"d1", "a2", "a2", "a2", "a2"}; !slices.Equal(names, want) || !c.Closed || !c.ByDst {
		t.Errorf("%v closed=%v, want %v, closed", names, c.Closed, want)
	}
	if c2, _ := s.Compile(w.UID, ip("10.0.0.1")); c2.Digest() != c.Digest() {
		t.Error("the digest changes by itself")
	}
	if other, _ := s.Compile(w.UID, ip("10.0.0.9")); other.Digest() == c.Digest() || len(other.Terms) != 6 {
		t.Errorf("at another address there are %d terms, want 6", len(other.Terms))
	}
	var many []Match
	for i := range MaxTerms/2 + 1 {
		many = append(many, Match{DestinationPorts: []uint16{uint16(i + 1)}})
	}
	big := Rule{Clauses: []Clause{{Matches: many}, {Matches: []Match{from("a"), from("b")}}}}
	if _, err := build(w, policy("d", ScopeWorkload, Deny, big)).Compile(w.UID, ip("10.0.0.1")); err == nil {
		t.Error("more terms than there is room for are compiled")
	}
	strict := policy("istio_converted_static_strict", ScopeMesh, Deny, Rule{Clauses: []Clause{{Matches: []Match{{NotPrincipals: []StringMatch{{Kind: MatchPresence}}}}}}})
	plain := *w
	plain.Policies = nil
	s = build(&plain, strict)
	tcp, err := s.Compile(w.UID, ip("10.0.0.1"))
	udp, err2 := s.CompileUDP(w.UID, ip("10.0.0.1"))
	if err != nil || err2 != nil || tcp.Decide(Identity{}, ip("10.0.0.9"), 80).Allow || !udp.Decide(Identity{}, ip("10.0.0.9"), 80).Allow {
		t.Errorf("STRICT is for connections, not for datagrams: %v, %v", err, err2)
	}
	if gone, _ := build(w).Compile(w.UID, ip("10.0.0.1")); gone == nil || gone.Decide(Identity{}, ip("10.0.0.9"), 80).Allow {
		t.Error("a policy that is not there does not deny")
	}
}
