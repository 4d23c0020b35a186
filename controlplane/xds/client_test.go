package xds

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
)

// state is a cache with a mesh to change, and one client.
type state struct {
	*testing.T
	cache *Cache
	snap  *mesh.Snapshot
	c     *client
}

func newState(t *testing.T) *state {
	s := &state{T: t, cache: NewCache(), c: newClient("n1")}
	s.cache.add(s.c)
	return s
}

func (s *state) change(f func(*mesh.Builder), u index.Update) {
	s.Helper()
	b := mesh.NewBuilder(s.snap)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local"})
	if f != nil {
		f(b)
	}
	var rev uint64
	if s.snap != nil {
		rev = s.snap.Revision()
	}
	s.snap = b.Commit(rev + 1)
	u.Snapshot = s.snap
	if err := s.cache.Update(&u); err != nil {
		s.Fatal(err)
	}
}

func (s *state) subscribe(kinds ...string) {
	for _, k := range kinds {
		s.c.subscribe(&discovery.DeltaDiscoveryRequest{TypeUrl: k})
	}
}

func (s *state) plan() []*discovery.DeltaDiscoveryResponse { return s.c.plan(s.cache) }

// say describes responses as "type +put -removed".
func say(responses []*discovery.DeltaDiscoveryResponse) []string {
	out := []string{}
	for _, r := range responses {
		line := shortNames[r.TypeUrl]
		for _, p := range r.Resources {
			line += " +" + p.Name
		}
		for _, n := range r.RemovedResources {
			line += " -" + n
		}
		out = append(out, line)
	}
	return out
}

func (s *state) expect(what string, want ...string) {
	s.Helper()
	if got := say(s.plan()); !slices.Equal(got, want) {
		s.Fatalf("%s: sent %q, want %q", what, got, want)
	}
}

func (s *state) answer(kind string, nack string) {
	s.Helper()
	w := s.c.watches[kind]
	if w.inflight == nil {
		s.Fatalf("nothing of %s is waiting for an answer", shortNames[kind])
	}
	req := &discovery.DeltaDiscoveryRequest{TypeUrl: kind, ResponseNonce: w.inflight.nonce}
	if nack != "" {
		req.ErrorDetail = &rpcstatus.Status{Message: nack}
	}
	if w.answered(req) == nil {
		s.Fatal("the answer was not taken")
	}
}

func pod(name string, policies ...mesh.PolicyName) *mesh.Workload {
	return &mesh.Workload{UID: name, Name: name, Namespace: "a", Node: "n1", Policies: policies,
		Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "s"},
		Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, name[len(name)-1]})}}
}

func policy(name string) *mesh.Policy {
	return &mesh.Policy{Name: mesh.PolicyName{Namespace: "a", Name: name}, Scope: mesh.ScopeWorkload}
}

// TestPolicyOrder: a node never sees an address before the policy it refers to, nor loses the policy first.
func TestPolicyOrder(t *testing.T) {
	s := newState(t)
	p1, p2 := policy("p1").Name, policy("p2").Name
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("p1")); b.PutWorkload(pod("w1", p1)) }, index.Update{})
	s.subscribe(TypeAddress, TypeAuthorization)
	s.expect("first", "wads +a/p1", "wds +w1")

	// A second policy while the first response is not answered: the address that needs it waits.
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("p2")); b.PutWorkload(pod("w1", p1, p2)) }, index.Update{})
	s.answer(TypeAddress, "")
	s.expect("policy response in flight")
	s.answer(TypeAuthorization, "")
	s.expect("both", "wads +a/p2", "wds +w1")
	s.answer(TypeAuthorization, "")
	s.answer(TypeAddress, "")

	// Taken back: first from the address.
	s.change(func(b *mesh.Builder) { b.DeletePolicy(p2); b.PutWorkload(pod("w1", p1)) }, index.Update{})
	s.expect("address lets go", "wds +w1")
	s.expect("not answered yet")
	s.answer(TypeAddress, "")
	s.expect("policy taken back", "wads -a/p2")
	s.answer(TypeAuthorization, "")
	s.expect("quiet")
}

// Whoever asks for Istio's type alone never hears of an AUDIT policy: it would take it for a decision.
func TestAuditHasATypeOfItsOwn(t *testing.T) {
	s := newState(t)
	audit := func() *mesh.Policy { p := policy("p1"); p.Action = mesh.Audit; return p }
	s.change(func(b *mesh.Builder) { b.PutPolicy(audit()); b.PutPolicy(policy("p2")) }, index.Update{})
	s.subscribe(TypeAuthorization, TypeAudit)
	s.expect("first", "wads +a/p2", "audit +a/p1")
	s.answer(TypeAuthorization, "")
	s.answer(TypeAudit, "")
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("p1")) }, index.Update{})
	s.expect("it is in force", "wads +a/p1", "audit -a/p1")
	s.answer(TypeAuthorization, "")
	s.answer(TypeAudit, "")
	s.change(func(b *mesh.Builder) { b.PutPolicy(audit()) }, index.Update{})
	s.expect("it is not", "wads -a/p1", "audit +a/p1")
}

func TestAddressesWaitForPolicies(t *testing.T) {
	s := newState(t)
	s.change(func(b *mesh.Builder) { b.PutWorkload(pod("w1")) }, index.Update{})
	s.subscribe(TypeAddress)
	s.expect("the client has not asked for policies yet")
	s.subscribe(TypeAuthorization)
	s.expect("now it has", "wads", "wds +w1")

	alone := newState(t)
	alone.change(func(b *mesh.Builder) { b.PutWorkload(pod("w1")) }, index.Update{})
	alone.subscribe(TypeAddress)
	alone.c.hold = time.Now()
	alone.expect("a client that never asks", "wds +w1")
}

func TestCoalescing(t *testing.T) {
	s := newState(t)
	s.change(nil, index.Update{})
	s.subscribe(TypeAuthorization, TypeAddress)
	s.expect("an empty mesh is an answer too", "wads", "wds")
	for i := range 100 {
		s.change(func(b *mesh.Builder) {
			w := pod("w1")
			w.Healthy = i%2 == 0
			b.PutWorkload(w)
			b.PutWorkload(pod(fmt.Sprintf("w%d", 2+i%3)))
		}, index.Update{})
	}
	s.expect("nothing is sent before the answer")
	s.answer(TypeAddress, "")
	s.expect("one response for all", "wds +w1 +w2 +w3 +w4")
	s.answer(TypeAddress, "")
	s.change(func(b *mesh.Builder) { b.PutWorkload(pod("w5")); b.DeleteWorkload("w1") }, index.Update{})
	s.change(func(b *mesh.Builder) { b.DeleteWorkload("w5") }, index.Update{})
	s.expect("what came and went is gone", "wds -w1 -w5")
}

func TestRejectedIsSentAgain(t *testing.T) {
	s := newState(t)
	s.change(func(b *mesh.Builder) { b.PutWorkload(pod("w1")) }, index.Update{})
	s.subscribe(TypeAuthorization, TypeAddress)
	s.expect("first", "wads", "wds +w1")
	s.answer(TypeAddress, "bad")
	s.expect("not at once")
	s.change(func(b *mesh.Builder) { b.PutWorkload(pod("w2")) }, index.Update{})
	s.expect("with the next change", "wds +w1 +w2")
	s.answer(TypeAddress, "bad again")
	if !s.c.watches[TypeAddress].retry() {
		t.Fatal("nothing to retry")
	}
	s.expect("or after a while", "wds +w1 +w2")
	old := &discovery.DeltaDiscoveryRequest{TypeUrl: TypeAddress, ResponseNonce: "1"}
	if s.c.watches[TypeAddress].answered(old) != nil {
		t.Error("an answer to an older response was taken for the last one's")
	}
}

func TestPodsOfOtherNodes(t *testing.T) {
	s := newState(t)
	here, there := &index.LocalPod{UID: "u1", Namespace: "a", Name: "p1", Node: "n1"}, &index.LocalPod{UID: "u2", Namespace: "a", Name: "p2", Node: "n2"}
	s.change(nil, index.Update{LocalPods: map[string]*index.LocalPod{"u1": here, "u2": there}})
	s.subscribe(TypeLocalPod)
	s.expect("own pods alone", "localpod +u1")
	s.answer(TypeLocalPod, "")
	s.change(nil, index.Update{LocalPods: map[string]*index.LocalPod{"u2": nil}})
	s.expect("another node's pod went")
	s.change(nil, index.Update{LocalPods: map[string]*index.LocalPod{"u1": nil}})
	s.expect("its own went", "localpod -u1")
}

// TestVersionsAreContent: two replicas, or one before and after a restart, name a state alike.
func TestVersionsAreContent(t *testing.T) {
	a, b := newState(t), newState(t)
	a.change(func(b *mesh.Builder) { b.PutWorkload(pod("w1")) }, index.Update{})
	b.change(nil, index.Update{})
	b.change(func(b *mesh.Builder) { w := pod("w1"); w.Healthy = true; b.PutWorkload(w) }, index.Update{})
	unlike := b.cache.tables[TypeAddress].byName["w1"].version
	b.change(func(b *mesh.Builder) { b.PutWorkload(pod("w1")) }, index.Update{})
	va, vb := a.cache.tables[TypeAddress].byName["w1"].version, b.cache.tables[TypeAddress].byName["w1"].version
	if va != vb || va == unlike {
		t.Errorf("versions %s and %s, of another content %s", va, vb, unlike)
	}
}
