package xds

import (
	"fmt"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	nodeapi "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
)

// TestANodesWordsAreBounded: a node that refuses what nobody sent, at any length, is remembered for what it was
// sent alone.
func TestANodesWordsAreBounded(t *testing.T) {
	s := newState(t)
	s.change(func(b *mesh.Builder) { b.PutPolicy(policy("p1")); b.PutPolicy(policy("p2")) }, index.Update{})
	s.subscribe(TypeAuthorization)
	s.plan()
	w := s.c.watches[TypeAuthorization]
	names := []string{policy("p1").Name.String()}
	for i := range 10_000 {
		names = append(names, fmt.Sprint("shop/nobody-sent-", i))
	}
	d, err := anypb.New(&nodeapi.TypeStatus{TypeUrl: TypeAuthorization, Rejected: names})
	if err != nil {
		t.Fatal(err)
	}
	if w.answered(&discovery.DeltaDiscoveryRequest{TypeUrl: TypeAuthorization, ResponseNonce: w.inflight.nonce,
		ErrorDetail: &rpcstatus.Status{Message: strings.Repeat("é", 1<<20), Details: []*anypb.Any{d}}}) == nil {
		t.Fatal("the answer was not taken")
	}
	if len(w.rejected) != 1 || len(w.refused) != 1 {
		t.Errorf("%d are remembered as rejected, %d as refused", len(w.rejected), len(w.refused))
	}
	if got := w.refused[names[0]]; got == "" || len(got) > maxNack+3 {
		t.Errorf("%d bytes of reason", len(got))
	}
}
