package proxy

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/tap"
)

// look watches a node.
func (n *labNode) look(f tap.Filter) *Watcher {
	w := must(n.proxy.Watch(f))
	n.lab.t.Cleanup(w.Stop)
	return w
}

func next(t *testing.T, w *Watcher) tap.Event {
	t.Helper()
	select {
	case e := <-w.Events():
		return e
	case <-time.After(plenty):
		t.Fatal("nothing is told")
		panic("")
	}
}

// Both nodes tell of a connection when it begins and when it ends, and of one that a policy refuses.
func TestWatchersSeeBothEndsOfAConnection(t *testing.T) {
	l := shop(t)
	ui, server := l.pods["ui"], l.pods["catalog-1"]
	source, destination := ui.node.look(tap.Filter{}), server.node.look(tap.Filter{})
	dst := netip.AddrPortFrom(server.v4, appPort)
	c, err := ui.dial(dst)
	check(t, err)
	by, _, client, err := seen(c)
	check(t, err)
	var ids [2]uint64
	for i, w := range []*Watcher{source, destination} {
		e := next(t, w)
		ids[i] = e.ID
		if e.What != tap.Open || e.Path != "tunnel" || e.ID == 0 || e.Direction != Direction(i).String() ||
			e.Source.Addr != client || e.Source.Pod != ui.name || e.Source.Identity != ui.id.String() ||
			e.Destination.Addr != dst || e.Destination.Pod != by || e.Destination.Namespace != "shop" || e.Destination.Identity != server.id.String() {
			t.Errorf("%s: %+v", Direction(i), e)
		}
	}
	check(t, lives(c))
	c.Close()
	for i, w := range []*Watcher{source, destination} {
		e := next(t, w)
		if e.What != tap.Close || e.ID != ids[i] || e.Outcome != "completed" || e.Error != "" || e.Sent != 1 || e.Received < 2 {
			t.Errorf("%s: %+v", Direction(i), e)
		}
	}

	l.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "nobody"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{}}})
	l.commit()
	if c, err := ui.dial(dst); err == nil {
		_, _, _, err = seen(c)
		c.Close()
		if err == nil {
			t.Error("the policy let it in")
		}
	}
	if e := next(t, destination); e.What != tap.Failed || e.ID != 0 || !e.Denied() || e.Error != "deny_policy by policy shop/nobody" || e.Source.Pod != ui.name {
		t.Errorf("%+v", e)
	}
	if e := next(t, source); e.What != tap.Failed || !e.Denied() || e.Asked != dst {
		t.Errorf("%+v", e)
	}
}

func TestWatchersSeeWhatTheKernelCarries(t *testing.T) {
	l := shop(t)
	n := l.nodes["node-b"]
	from, to := l.pods["catalog-1"], l.pods["catalog-2"]
	n.kernelDecides(t)
	inbound, err := tap.ParseQuery(map[string][]string{"direction": {"inbound"}, "from": {"shop/" + from.name}})
	check(t, err)
	w := n.look(inbound)
	c, err := from.dial(netip.AddrPortFrom(to.v4, appPort))
	check(t, err)
	_, _, _, err = seen(c)
	check(t, err)
	open := next(t, w)
	if open.What != tap.Open || open.Path != "kernel" || open.Source.Identity != from.id.String() || open.Destination.Pod != to.name {
		t.Errorf("%+v", open)
	}
	c.Close()
	if e := next(t, w); e.What != tap.Close || e.ID != open.ID || e.Outcome != "completed" {
		t.Errorf("%+v", e)
	}
}

// Nobody waits for a watcher, and there are only so many.
func TestWatchersMissWhatTheyDoNotTake(t *testing.T) {
	p := &Proxy{}
	w := must(p.Watch(tap.Filter{}))
	for range watchQueue + 5 {
		p.watchers.tell(&tap.Event{What: tap.Open})
	}
	if n := w.Missed(); n != 5 {
		t.Errorf("%d are said to be missed, want 5", n)
	}
	if n := w.Missed(); n != 0 {
		t.Errorf("%d are said to be missed again", n)
	}
	for range maxWatchers - 1 {
		must(p.Watch(tap.Filter{}))
	}
	if _, err := p.Watch(tap.Filter{}); !errors.Is(err, ErrManyWatchers) {
		t.Errorf("one more: %v", err)
	}
	w.Stop()
	w.Stop()
	must(p.Watch(tap.Filter{}))
	if n := p.watchers.n.Load(); n != maxWatchers {
		t.Errorf("%d watch, want %d", n, maxWatchers)
	}
}
