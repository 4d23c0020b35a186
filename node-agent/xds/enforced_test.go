package xds

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// silent fails the test if the node answers anything.
func silent(t *testing.T, what string, reqs <-chan *discovery.DeltaDiscoveryRequest) {
	t.Helper()
	select {
	case req := <-reqs:
		t.Fatalf("%s: the node answered %s, error %v", what, req.TypeUrl, req.ErrorDetail)
	case <-time.After(50 * time.Millisecond):
	}
}

func TestAnAcknowledgementWaitsUntilTheNodeEnforces(t *testing.T) {
	c := newControl(t)
	store := &mesh.Store{}
	cl, _ := c.start(func(cfg *Config) { cfg.Store, cfg.AwaitEnforced = store, true })
	st, _ := c.subscribed()
	st.put(wds.AuthorizationType, "1", nil, denyAll("p"))
	st.put(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	<-cl.Live()
	silent(t, "nothing is enforced", st.reqs)
	cl.Enforced(store.Load().Revision(), nil)
	for range 2 {
		if req := receive(t, "the ACKs", st.reqs); req.ErrorDetail != nil {
			t.Errorf("%v", req.ErrorDetail)
		}
	}
	// A kernel that does not take a policy is not acknowledged, and does not keep the next one from coming.
	before := store.Load().Revision()
	st.put(wds.AuthorizationType, "2", nil, denyAll("q"))
	waitRevision(t, store, before+1)
	silent(t, "an older revision is enforced", st.reqs)
	cl.Enforced(before+1, errors.New("the map is full"))
	if req := receive(t, "the NACK", st.reqs); !strings.Contains(req.ErrorDetail.GetMessage(), "the map is full") {
		t.Errorf("it says %v", req.ErrorDetail)
	}
	st.put(wds.AuthorizationType, "3", []string{"shop/q"})
	waitRevision(t, store, before+2)
	silent(t, "after the failure", st.reqs)
	cl.Enforced(before+2, nil)
	if req := receive(t, "the ACK", st.reqs); req.ErrorDetail != nil {
		t.Errorf("%v", req.ErrorDetail)
	}
	// What changes nothing is enforced already.
	st.answer(wds.AuthorizationType, "4", nil, denyAll("p"))
}

func waitRevision(t *testing.T, store *mesh.Store, rev uint64) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); store.Load().Revision() < rev; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("at revision %d, want %d", store.Load().Revision(), rev)
		}
	}
}

func TestANACKNamesWhatItIsAbout(t *testing.T) {
	c := newControl(t)
	c.start(nil)
	st, _ := c.subscribed()
	st.put(wds.AddressType, "1", nil)
	st.answer(wds.AuthorizationType, "1", nil, denyAll("p"))
	broken := denyAll("q")
	_, m := encode(t, broken)
	req := st.answer(wds.AuthorizationType, "2", nil, named{"shop/other", m}, denyAll("r"))
	var d node.TypeStatus
	if len(req.ErrorDetail.GetDetails()) != 1 || req.ErrorDetail.Details[0].UnmarshalTo(&d) != nil || !slices.Equal(d.Rejected, []string{"shop/other"}) {
		t.Errorf("the NACK is %v", req.ErrorDetail)
	}
}

// An agent that is killed right after its ACK has a successor that knows what was acknowledged.
func TestWhatWasAcknowledgedOutlivesTheAgent(t *testing.T) {
	c := newControl(t)
	file := filepath.Join(c.dir, "state", "mesh")
	never := func(cfg *Config) { cfg.StateFile, cfg.SaveInterval = file, time.Hour }
	_, stop := c.start(never)
	st, _ := c.subscribed()
	st.put(wds.AuthorizationType, "1", nil)
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	st.answer(wds.AuthorizationType, "2", nil, denyAll("p"), denyAll("q"))
	st.answer(wds.AuthorizationType, "3", []string{"shop/q"})
	files, err := journals(file)
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	killed, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	stop() // in order, which saves; put back what a kill would have left
	if left, _ := journals(file); len(left) != 0 {
		t.Errorf("a saved state leaves %v", left)
	}
	left := func(data []byte) *mesh.Snapshot {
		t.Helper()
		os.Remove(file)
		if err := os.WriteFile(files[0], data, 0o600); err != nil {
			t.Fatal(err)
		}
		store := &mesh.Store{}
		cl, stop := c.start(func(cfg *Config) { never(cfg); cfg.Store = store })
		_, first := c.subscribed()
		stop()
		os.Remove(files[0])
		if v := first[wds.AuthorizationType].InitialResourceVersions; cl.usable && v["shop/p"] != "2" {
			t.Errorf("it says it has %v", v)
		}
		return store.Load()
	}
	s := left(killed)
	if s.Policy(mesh.PolicyName{Namespace: "shop", Name: "p"}) == nil || s.Policy(mesh.PolicyName{Namespace: "shop", Name: "q"}) != nil || s.Workload("c1//Pod/shop/a") == nil {
		t.Error("the successor knows something else")
	}
	// Cut off in the last record: the rest counts.
	s = left(killed[:len(killed)-3])
	if s.Policy(mesh.PolicyName{Namespace: "shop", Name: "q"}) == nil {
		t.Error("the whole records are lost")
	}
	flipped := slices.Clone(killed)
	flipped[40] ^= 1
	if s := left(flipped); s.Revision() != 0 {
		t.Errorf("a record that is not whole is used: revision %d", s.Revision())
	}
}
