package proxy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
)

// nothing is what a Proxy needs that carries no bytes.
type nothing struct{}

func (nothing) Dial(context.Context, *netns.Handle, netip.AddrPort) (*net.TCPConn, error) {
	return nil, net.ErrClosed
}
func (nothing) Drawn(*netns.Sock) int { return 0 }
func (nothing) DialInbound(context.Context, *netns.Handle, netip.AddrPort, netip.AddrPort) (*netns.Sock, error) {
	return nil, net.ErrClosed
}
func (nothing) Bundle(context.Context, mesh.Identity) (*identity.Bundle, error) {
	return nil, net.ErrClosed
}

// town is a mesh of a few workloads in two namespaces, whose policies change.
type town struct {
	store   mesh.Store
	builder *mesh.Builder
	rev     uint64
	proxy   *Proxy
	pods    []*PodHandle
}

func newTown(t interface {
	Helper()
	Fatal(...any)
}) *town {
	tw := &town{builder: mesh.NewBuilder(nil)}
	tw.builder.SetConfig(mesh.Config{TrustDomain: "cluster.local"})
	for i := range 4 {
		tw.builder.PutWorkload(tw.workload(i, nil))
	}
	tw.commit()
	var err error
	tw.proxy, err = New(Config{Store: &tw.store, Certs: nothing{}, Sockets: nothing{}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		h := &PodHandle{p: tw.proxy, uid: fmt.Sprint(i)}
		h.pod.Store(&Pod{UID: h.uid, WorkloadUID: tw.workload(i, nil).UID})
		tw.pods = append(tw.pods, h)
	}
	return tw
}

func (tw *town) close() {
	tw.proxy.conns.mu.Lock()
	clear(tw.proxy.conns.conns)
	tw.proxy.conns.mu.Unlock()
	tw.proxy.Close(context.Background())
}

func (tw *town) workload(i int, policies []mesh.PolicyName) *mesh.Workload {
	return &mesh.Workload{UID: fmt.Sprintf("w%d", i), Name: fmt.Sprintf("w%d", i), Namespace: fmt.Sprintf("ns%d", i%2),
		Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)})}, Policies: policies}
}

func (tw *town) commit() { tw.rev++; tw.store.Swap(tw.builder.Commit(tw.rev)) }

// change is one random step of the mesh's state; n chooses.
func (tw *town) change(n func(int) int) {
	name := mesh.PolicyName{Namespace: fmt.Sprintf("ns%d", n(2)), Name: fmt.Sprintf("p%d", n(3))}
	switch n(6) {
	case 0:
		tw.builder.DeletePolicy(name)
	case 1:
		tw.builder.PutWorkload(tw.workload(n(4), nil))
	case 2:
		tw.builder.PutWorkload(tw.workload(n(4), []mesh.PolicyName{name}))
	case 3:
		tw.builder.DeleteWorkload(fmt.Sprintf("w%d", n(4)))
	default:
		m := mesh.Match{}
		switch n(3) {
		case 0:
			m.Principals = []mesh.StringMatch{{Kind: mesh.MatchSuffix, Value: fmt.Sprintf("/sa/c%d", n(3))}}
		case 1:
			m.NotPrincipals = []mesh.StringMatch{{Kind: mesh.MatchPresence}}
		default:
			m.DestinationPorts = []uint16{uint16(80 + n(2))}
		}
		p := &mesh.Policy{Name: name, Scope: mesh.Scope(n(3)), Action: mesh.Action(n(2)),
			Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}}}}
		tw.builder.PutPolicy(p)
	}
	tw.commit()
}

// arrive is a connection as admit sees it: registered, then authorized. It reports whether it was let in.
func (tw *town) arrive(n func(int) int) bool {
	i := n(4)
	c := &conn{dir: Inbound, pod: tw.pods[i], auth: mesh.Conn{SourceIP: netip.AddrFrom4([4]byte{10, 0, 1, byte(n(3))}),
		Dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)}), uint16(80+n(2))), DstWorkload: tw.workload(i, nil)}}
	if n(3) > 0 {
		c.auth.Source = mesh.Identity{TrustDomain: "cluster.local", Namespace: "clients", ServiceAccount: fmt.Sprintf("c%d", n(3))}
	}
	tw.proxy.conns.register(c)
	if !c.authorize(tw.store.Load()).Allow {
		tw.proxy.conns.release(c)
		return false
	}
	return true
}

// wrong are the connections that are open and denied, and those that were reset, under the present state.
func (tw *town) wrong() (denied, reset, open int) {
	s := tw.store.Load()
	for _, c := range tw.proxy.conns.list(func(*conn) bool { return true }) {
		switch {
		case c.endedBy() != nil:
			reset++
		case !s.Authorize(c.auth).Allow:
			denied++
		default:
			open++
		}
	}
	return denied, reset, open
}

func (tw *town) settle(t interface{ Fatal(...any) }) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := tw.proxy.Rechecked(ctx, tw.rev); err != nil {
		t.Fatal("the recheck does not come to an end: ", err)
	}
}

func TestNoConnectionStaysOpenThatIsDenied(t *testing.T) {
	var reset, open int
	rapid.Check(t, func(t *rapid.T) {
		tw := newTown(t)
		defer tw.close()
		n := func(k int) int { return rapid.IntRange(0, k-1).Draw(t, "n") }
		for range n(20) {
			for range n(6) {
				tw.arrive(n)
			}
			tw.change(n)
			if n(2) == 0 { // else several states are one to the watch
				tw.settle(t)
			}
		}
		tw.settle(t)
		denied, r, o := tw.wrong()
		if denied > 0 {
			t.Fatalf("%d connections are open that the state denies", denied)
		}
		reset, open = reset+r, open+o
	})
	if reset == 0 || open == 0 {
		t.Errorf("the test shows nothing: %d reset, %d open", reset, open)
	}
}

func TestConnectionsThatArriveWhileTheStateChangesAreRechecked(t *testing.T) {
	tw := newTown(t)
	defer tw.close()
	var wg sync.WaitGroup
	var stop atomic.Bool
	for i := range 4 {
		rnd := rand.New(rand.NewPCG(1, uint64(i)))
		wg.Go(func() {
			for !stop.Load() {
				tw.arrive(rnd.IntN)
				time.Sleep(time.Duration(rnd.IntN(100)) * time.Microsecond)
			}
		})
	}
	rnd := rand.New(rand.NewPCG(2, 2))
	for range 300 {
		tw.change(rnd.IntN)
		time.Sleep(time.Duration(rnd.IntN(300)) * time.Microsecond)
	}
	stop.Store(true)
	wg.Wait()
	tw.settle(t)
	denied, reset, open := tw.wrong()
	if denied > 0 {
		t.Errorf("%d connections are open that the state denies; %d were reset, %d are open", denied, reset, open)
	}
	if reset == 0 {
		t.Error("the test shows nothing: no connection was reset")
	}
}

func TestOnlyTheConnectionsThatAChangeConcernsAreLookedAt(t *testing.T) {
	tw := newTown(t)
	defer tw.close()
	for i := range 4 {
		for range 10 {
			tw.proxy.conns.register(&conn{dir: Inbound, pod: tw.pods[i], auth: mesh.Conn{DstWorkload: tw.workload(i, nil)}})
		}
	}
	deny := func(ns, name string, scope mesh.Scope) *mesh.Policy {
		return &mesh.Policy{Name: mesh.PolicyName{Namespace: ns, Name: name}, Scope: scope, Action: mesh.Deny}
	}
	table := newConnTable() // the proxy's own watch looks at the other
	for _, c := range tw.proxy.conns.list(func(*conn) bool { return true }) {
		table.register(c)
	}
	for _, step := range []struct {
		name string
		do   func()
		want int
	}{
		{"a service elsewhere", func() {
			tw.builder.PutService(&mesh.Service{Name: mesh.ServiceName{Namespace: "x", Hostname: "x"}})
		}, 0},
		{"a workload elsewhere", func() { tw.builder.PutWorkload(&mesh.Workload{UID: "other", Namespace: "ns0"}) }, 0},
		{"a policy of a namespace", func() { tw.builder.PutPolicy(deny("ns0", "a", mesh.ScopeNamespace)) }, 20},
		{"a policy of a workload that nobody names", func() { tw.builder.PutPolicy(deny("ns0", "b", mesh.ScopeWorkload)) }, 0},
		{"a workload names it", func() { tw.builder.PutWorkload(tw.workload(2, []mesh.PolicyName{{Namespace: "ns0", Name: "b"}})) }, 10},
		{"it changes", func() { p := deny("ns0", "b", mesh.ScopeWorkload); p.DryRun = true; tw.builder.PutPolicy(p) }, 10},
		{"a policy of the mesh", func() { tw.builder.PutPolicy(deny("istio-system", "c", mesh.ScopeMesh)) }, 40},
		{"nothing", func() {}, 0},
	} {
		last := tw.store.Load()
		step.do()
		tw.commit()
		s := tw.store.Load()
		if looked, ended := table.reevaluate(s, compare(s, last)); looked != step.want || ended != 0 {
			t.Errorf("%s: %d connections looked at and %d ended, want %d and 0", step.name, looked, ended, step.want)
		}
	}
}

// A policy that comes and goes before the watch looks is no difference between the states that it sees. A workload that
// names it is open in between.
func TestAConnectionThatOnlyAStateInBetweenLetInIsReset(t *testing.T) {
	tw := newTown(t)
	defer tw.close()
	name := mesh.PolicyName{Namespace: "ns0", Name: "p"}
	tw.builder.PutWorkload(tw.workload(0, []mesh.PolicyName{name}))
	tw.commit()
	last := tw.store.Load()
	tw.builder.PutPolicy(&mesh.Policy{Name: name, Scope: mesh.ScopeWorkload, Action: mesh.Deny})
	tw.commit()
	table := newConnTable() // the proxy's own watch looks at the other
	let, other := &conn{dir: Inbound, pod: tw.pods[0]}, &conn{dir: Inbound, pod: tw.pods[1]}
	for i, c := range []*conn{let, other} {
		c.auth = mesh.Conn{DstWorkload: tw.workload(i, nil)}
		table.register(c)
		if v := c.authorize(tw.store.Load()); !v.Allow {
			t.Fatal("not let in: ", v)
		}
	}
	tw.builder.DeletePolicy(name)
	tw.commit()
	s := tw.store.Load()
	if looked, ended := table.reevaluate(s, compare(s, last)); looked != 2 || ended != 1 || let.endedBy() == nil {
		t.Errorf("%d connections looked at and %d ended, want 2 and 1", looked, ended)
	}
	last = s
	tw.builder.PutService(&mesh.Service{Name: mesh.ServiceName{Namespace: "x", Hostname: "x"}})
	tw.commit()
	tw.commit()
	s = tw.store.Load()
	if looked, _ := table.reevaluate(s, compare(s, last)); looked != 0 {
		t.Errorf("%d connections looked at that no state in between decided about, want 0", looked)
	}
}

// BenchmarkRecheck is a policy change of the whole mesh with 20,000 connections of 50 clients open.
func BenchmarkRecheck(b *testing.B) {
	tw := newTown(b)
	defer tw.close()
	table := newConnTable()
	for i := range 20000 {
		table.register(&conn{dir: Inbound, pod: tw.pods[i%4], auth: mesh.Conn{SourceIP: netip.AddrFrom4([4]byte{10, 0, 1, byte(i % 50)}),
			Dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i%4)}), 80), DstWorkload: tw.workload(i%4, nil)}})
	}
	for i := range 1000 {
		tw.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "istio-system", Name: fmt.Sprint(i)}, Action: mesh.Deny, Rules: []mesh.Rule{
			{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Principals: []mesh.StringMatch{{Value: fmt.Sprintf("cluster.local/ns/a/sa/%d", i)}}}}}}}}})
	}
	tw.commit()
	s := tw.store.Load()
	b.ResetTimer()
	for b.Loop() {
		if looked, _ := table.reevaluate(s, difference{all: true}); looked != 20000 {
			b.Fatal(looked)
		}
	}
}
