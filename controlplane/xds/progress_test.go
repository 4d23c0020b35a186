package xds

import (
	"log/slog"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	nodeapi "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
)

// refuse answers as our agent does that cannot use some of a response.
func (s *state) refuse(kind string, names ...string) {
	s.Helper()
	d, err := anypb.New(&nodeapi.TypeStatus{TypeUrl: kind, Rejected: names})
	if err != nil {
		s.Fatal(err)
	}
	w := s.c.watches[kind]
	if w.answered(&discovery.DeltaDiscoveryRequest{TypeUrl: kind, ResponseNonce: w.inflight.nonce,
		ErrorDetail: &rpcstatus.Status{Message: "cannot use it", Details: []*anypb.Any{d}}}) == nil {
		s.Fatal("the answer was not taken")
	}
}

// at compares how far the node has come with the cache, in changes that are not settled.
func (s *state) behind(what string, want uint64) {
	s.Helper()
	s.plan()
	p, ok := s.c.progress()
	if got := s.cache.revision - p.Revision; !ok || got != want {
		s.Fatalf("%s: %d changes behind (known %v), want %d", what, got, ok, want)
	}
}

func TestProgressIsWhatWasAnswered(t *testing.T) {
	s := newState(t)
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("p1")); b.PutWorkload(pod("w1", policy("p1").Name)) }, index.Update{})
	s.subscribe(TypeAuthorization)
	s.plan()
	if _, ok := s.c.progress(); ok {
		t.Error("a client that has not asked for addresses has come somewhere")
	}
	s.subscribe(TypeAddress)
	s.plan()
	s.answer(TypeAuthorization, "")
	if _, ok := s.c.progress(); ok {
		t.Error("addresses are not answered")
	}
	s.answer(TypeAddress, "")
	s.behind("all is answered", 0)
	// A change of one type leaves the other's answer to be counted at once.
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("p2")) }, index.Update{})
	s.behind("sent", 1)
	s.change(func(b *mesh.Builder) { b.PutWorkload(pod("w2")) }, index.Update{})
	s.behind("the next one waits", 2)
	s.answer(TypeAuthorization, "")
	s.behind("now addresses are owed", 1)
	s.answer(TypeAddress, "")
	s.behind("all is answered", 0)
	// What is put off counts as not done.
	s.change(func(b *mesh.Builder) { b.DeletePolicy(policy("p1").Name); b.PutWorkload(pod("w1")) }, index.Update{})
	s.behind("the address lets go", 1)
	s.answer(TypeAddress, "")
	s.behind("the policy is taken back", 1)
	s.answer(TypeAuthorization, "")
	s.behind("done", 0)
	// AUDIT policies have a type of their own, which an agent may ask for.
	s.subscribe(TypeAudit)
	s.plan()
	s.answer(TypeAudit, "")
	s.change(func(b *mesh.Builder) { p := policy("audit"); p.Action = mesh.Audit; b.PutPolicy(p) }, index.Update{})
	s.behind("sent", 1)
	s.refuse(TypeAudit, "a/audit")
	if p, _ := s.c.progress(); len(p.Refused) != 1 {
		t.Errorf("%+v", p)
	}
}

func TestProgressOfANodeThatRefuses(t *testing.T) {
	s := newState(t)
	s.change(nil, index.Update{})
	s.subscribe(TypeAuthorization, TypeAddress)
	s.plan()
	s.answer(TypeAuthorization, "")
	s.answer(TypeAddress, "")
	// One that is named: the others of the response hold.
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("good")); b.PutPolicy(policy("bad")) }, index.Update{})
	s.plan()
	s.refuse(TypeAuthorization, "a/bad")
	s.behind("the good one holds", 0)
	if p, _ := s.c.progress(); len(p.Refused) != 1 || p.Refused["a/bad"] != "cannot use it" || p.Trouble != "" {
		t.Errorf("%+v", p)
	}
	s.c.watches[TypeAuthorization].retry()
	s.expect("that one again", "wads +a/bad")
	s.refuse(TypeAuthorization, "a/bad")
	s.change(func(b *mesh.Builder) { b.DeletePolicy(policy("bad").Name) }, index.Update{})
	s.plan()
	s.answer(TypeAuthorization, "")
	if p, _ := s.c.progress(); len(p.Refused) != 0 {
		t.Errorf("it is gone, and still %+v", p)
	}
	// A response as a whole, as when the kernel does not take it.
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("large")) }, index.Update{})
	s.plan()
	s.answer(TypeAuthorization, "not enforced: the map is full")
	s.behind("nothing of it holds", 1)
	s.behind("nor by itself", 1)
	if p, _ := s.c.progress(); p.Trouble == "" {
		t.Errorf("%+v", p)
	}
	s.change(func(b *mesh.Builder) { b.DeletePolicy(policy("large").Name) }, index.Update{})
	s.plan()
	s.answer(TypeAuthorization, "")
	s.behind("without it", 0)
}

func TestTheLatestStreamSpeaksForTheNode(t *testing.T) {
	s := newState(t)
	changes := 0
	srv := NewServer(Config{Log: slog.New(slog.DiscardHandler), OnProgress: func() { changes++ }}, s.cache)
	s.change(nil, index.Update{})
	s.subscribe(TypeAuthorization, TypeAddress)
	s.plan()
	s.answer(TypeAuthorization, "")
	s.answer(TypeAddress, "")
	s.plan()
	first := &Stream{Node: "n1", Connected: time.Unix(1, 0)}
	srv.noteProgress(first, s.c)
	srv.noteProgress(first, s.c)
	if p := srv.Nodes()["n1"]; p.Revision != 1 || changes != 1 {
		t.Errorf("%+v, %d changes", p, changes)
	}
	// A successor that has not said anything begins with what the first had acknowledged.
	second, c := &Stream{Node: "n1", Connected: time.Unix(2, 0)}, newClient("n1")
	srv.noteProgress(second, c)
	if p := srv.Nodes()["n1"]; p.Revision != 1 || !p.Connected.Equal(second.Connected) {
		t.Errorf("%+v", p)
	}
	srv.noteProgress(first, s.c)
	srv.left(first)
	if p := srv.Nodes()["n1"]; !p.Connected.Equal(second.Connected) {
		t.Errorf("the first still speaks: %+v", p)
	}
	srv.Forget("n1")
	srv.left(second)
	if p := srv.Nodes()["n1"]; p.Revision != 1 || !p.Connected.IsZero() {
		t.Errorf("disconnected: %+v", p)
	}
	srv.Forget("n1")
	if len(srv.Nodes()) != 0 {
		t.Errorf("it is gone: %+v", srv.Nodes())
	}
}
