package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	api "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/security"
	wl "github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

func TestSubscribeApplyAcknowledge(t *testing.T) {
	c := newControl(t)
	store := &mesh.Store{}
	pods := make(chan LocalPods, 10)
	namespaces := make(chan map[string]bool, 10)
	configs := make(chan mesh.Config, 10)
	cl, _ := c.start(func(cfg *Config) {
		cfg.Store = store
		cfg.OnLocalPods = func(p LocalPods) { pods <- p }
		cfg.OnNamespaces = func(n map[string]bool) { namespaces <- n }
		cfg.OnMeshConfig = func(m mesh.Config) { configs <- m }
	})
	st, first := c.subscribed()
	if got := receive(t, "a token", c.tokens); got != "Bearer secret c1" {
		t.Errorf("the call carries %q", got)
	}
	id := first[wds.MeshConfigType].Node
	if id.GetId() != "ztunnel~192.168.0.1~warren-node-x.istio-system~istio-system.svc.cluster.local" {
		t.Errorf("the node is %q", id.GetId())
	}
	if md := id.GetMetadata().AsMap(); md["NODE_NAME"] != "n1" || md["CLUSTER_ID"] != "c1" || md["INSTANCE_IPS"] != "192.168.0.1" {
		t.Errorf("the metadata is %v", md)
	}
	for _, typ := range types {
		if req := first[typ]; req == nil || len(req.ResourceNamesSubscribe) != 0 || len(req.InitialResourceVersions) != 0 {
			t.Errorf("the subscription to %s is %v", typ, req)
		}
	}

	// Addresses without policies are not a Snapshot, and what is not applied is not acknowledged.
	early := st.put(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	select {
	case req := <-st.reqs:
		t.Fatalf("%v was acknowledged before it was applied", req.TypeUrl)
	case <-time.After(50 * time.Millisecond):
	}
	if store.Load().Revision() != 0 {
		t.Error("there is a Snapshot without policies")
	}
	st.put(wds.AuthorizationType, "1", nil, denyAll("p"))
	if req := receive(t, "the first ACK", st.reqs); req.ResponseNonce != early || req.ErrorDetail != nil {
		t.Errorf("first came %v", req)
	}
	if s := store.Load(); s.Workload("c1//Pod/shop/a") == nil || s.Policy(mesh.PolicyName{Namespace: "shop", Name: "p"}) == nil {
		t.Error("the ACK came before the Snapshot")
	}
	receive(t, "the second ACK", st.reqs)
	<-cl.Live()

	st.answer(wds.LocalPodType, "1", nil, pod("b", false), pod("a", true))
	if p := receive(t, "the pods", pods); !p.Live || p.Derived || len(p.Pods) != 2 || p.Pods[0].Name != "a" || !p.Pods[0].Enrolled {
		t.Errorf("the pods are %+v", p)
	}
	st.answer(wds.NamespaceType, "1", nil, namespace{"shop", true}, namespace{"other", false})
	if n := receive(t, "the namespaces", namespaces); !maps.Equal(n, map[string]bool{"shop": true, "other": false}) {
		t.Errorf("the namespaces are %v", n)
	}
	st.answer(wds.MeshConfigType, "1", nil, mesh.Config{TrustDomain: "td"})
	if m := receive(t, "the config", configs); m.TrustDomain != "td" || store.Load().Config().TrustDomain != "td" {
		t.Errorf("the config is %+v", m)
	}

	st.answer(wds.AddressType, "2", []string{"c1//Pod/shop/a", "never/there"}, captured("b", "10.0.0.2"))
	if s := store.Load(); s.Workload("c1//Pod/shop/a") != nil || s.Workload("c1//Pod/shop/b") == nil {
		t.Error("the second response is not applied")
	}
	st.answer(wds.LocalPodType, "2", []string{"uid-b"})
	if p := receive(t, "the pods", pods); len(p.Pods) != 1 {
		t.Errorf("the pods are %+v", p)
	}
	if s := cl.Status(); !s.Connected || s.Types[wds.AddressType].Applied != "2" || s.Workloads != 1 || s.Policies != 1 {
		t.Errorf("the status is %+v", s)
	}
}

func TestRejectedResourcesKeepTheirLastState(t *testing.T) {
	c := newControl(t)
	store := &mesh.Store{}
	cl, _ := c.start(func(cfg *Config) { cfg.Store = store })
	st, _ := c.subscribed()
	st.put(wds.AuthorizationType, "1", nil, denyAll("p"))
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))

	broken := wds.EncodeWorkload(captured("a", "10.0.0.9"))
	broken.GetWorkload().TunnelProtocol = 77
	req := st.answer(wds.AddressType, "2", nil, named{"c1//Pod/shop/a", broken}, captured("b", "10.0.0.2"),
		named{"other", wds.EncodeWorkload(captured("x", "10.0.0.3"))})
	if e := req.ErrorDetail.GetMessage(); !strings.Contains(e, "c1//Pod/shop/a: ") || !strings.Contains(e, "other: ") || strings.Contains(e, "shop/b") {
		t.Errorf("the NACK says %q", e)
	}
	s := store.Load()
	if a := s.Workload("c1//Pod/shop/a"); a == nil || a.Addrs[0] != netip.MustParseAddr("10.0.0.1") {
		t.Errorf("the rejected one is %+v", a)
	}
	if s.Workload("c1//Pod/shop/b") == nil {
		t.Error("the good one of the same response is lost: nobody sends it again")
	}
	if got := cl.Status().Types[wds.AddressType]; got.Applied != "1" || got.NACKs != 1 || !slices.Equal(got.Rejected, []string{"c1//Pod/shop/a", "other"}) {
		t.Errorf("the status is %+v", got)
	}

	// A policy that is not understood: one with an earlier version keeps it, a new one denies.
	unknown := func(name string) named {
		return named{"shop/" + name, &security.Authorization{Name: name, Namespace: "shop", Scope: security.Scope_WORKLOAD_SELECTOR, Action: 9}}
	}
	req = st.answer(wds.AuthorizationType, "2", nil, unknown("p"), unknown("q"))
	if req.ErrorDetail == nil {
		t.Error("it was acknowledged")
	}
	s = store.Load()
	if p := s.Policy(mesh.PolicyName{Namespace: "shop", Name: "p"}); p == nil || p.Scope != mesh.ScopeNamespace {
		t.Errorf("the earlier version is %+v", p)
	}
	if q := s.Policy(mesh.PolicyName{Namespace: "shop", Name: "q"}); q == nil || q.Action != mesh.Deny || !q.Matches(mesh.Conn{}) {
		t.Errorf("the new one is %+v", q)
	}
	if req := st.answer(wds.AuthorizationType, "3", []string{"shop/p", "shop/q"}); req.ErrorDetail != nil {
		t.Errorf("after the removal: %v", req.ErrorDetail)
	}
	if got := cl.Status().Types[wds.AuthorizationType]; got.Applied != "3" || got.NACK != "" {
		t.Errorf("the status is %+v", got)
	}
	if req := st.answer(wds.AddressType, "4", nil, named{"", &wl.Address{}}); req.ErrorDetail == nil {
		t.Error("an empty address was acknowledged")
	}
}

// A policy that becomes an AUDIT one, or ceases to be, changes its type; the two types come in either order.
func TestPolicyBecomesAudit(t *testing.T) {
	c := newControl(t)
	store := &mesh.Store{}
	c.start(func(cfg *Config) { cfg.Store = store })
	st, _ := c.subscribed()
	st.put(wds.AuthorizationType, "1", nil, denyAll("p"))
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	audit := denyAll("p")
	audit.Action = mesh.Audit
	is := func(what string, want mesh.Action) {
		t.Helper()
		if p := store.Load().Policy(audit.Name); p == nil || p.Action != want {
			t.Errorf("%s: it is %+v", what, p)
		}
	}
	st.answer(wds.AuditType, "2", nil, audit)
	is("put", mesh.Audit)
	st.answer(wds.AuthorizationType, "2", []string{"shop/p"})
	is("taken out of the other type", mesh.Audit)
	st.answer(wds.AuthorizationType, "3", nil, denyAll("p"))
	is("put back", mesh.Deny)
	st.answer(wds.AuditType, "3", []string{"shop/p"})
	is("no audit any more", mesh.Deny)
	st.answer(wds.AuthorizationType, "4", []string{"shop/p"})
	if p := store.Load().Policy(audit.Name); p != nil {
		t.Errorf("removed, and still there: %+v", p)
	}
}

func TestReconnectTellsVersions(t *testing.T) {
	c := newControl(t)
	store := &mesh.Store{}
	cl, _ := c.start(func(cfg *Config) { cfg.Store = store })
	st, _ := c.subscribed()
	st.put(wds.AuthorizationType, "1", nil)
	st.answer(wds.AddressType, "7", nil, captured("a", "10.0.0.1"), captured("b", "10.0.0.2"))
	// b's address is given to c before anybody says that b is gone.
	st.answer(wds.AddressType, "8", nil, captured("c", "10.0.0.2"))
	<-c.tokens
	c.write("token", "renewed")
	st.end <- errors.New("restarting")

	st, again := c.subscribed()
	if got := receive(t, "a token", c.tokens); !strings.HasPrefix(got, "Bearer renewed") {
		t.Errorf("the call carries %q", got)
	}
	want := map[string]string{"c1//Pod/shop/a": "7", "c1//Pod/shop/c": "8"}
	if got := again[wds.AddressType].InitialResourceVersions; !maps.Equal(got, want) {
		t.Errorf("it says it has %v, want %v", got, want)
	}
	if store.Load().Workload("c1//Pod/shop/a") == nil {
		t.Error("the state is gone while the control plane was away")
	}
	st.answer(wds.AddressType, "9", []string{"c1//Pod/shop/a"})
	if n := cl.Status().Workloads; n != 1 {
		t.Errorf("%d workloads, want 1", n)
	}
	if n := cl.Status().Connects; n != 2 {
		t.Errorf("%d streams, want 2", n)
	}
}

func TestLastGoodState(t *testing.T) {
	c := newControl(t)
	file := filepath.Join(c.dir, "state", "mesh")
	_, stop := c.start(func(cfg *Config) { cfg.StateFile = file })
	st, _ := c.subscribed()
	svc := &mesh.Service{Name: mesh.ServiceName{Namespace: "shop", Hostname: "a.shop.svc.cluster.local"}, Ports: []mesh.ServicePort{{Port: 80, Target: 80}}}
	st.put(wds.AuthorizationType, "1", nil, denyAll("p"))
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"), svc)
	st.answer(wds.LocalPodType, "1", nil, pod("a", true))
	st.answer(wds.NamespaceType, "1", nil, namespace{"shop", true})
	st.answer(wds.MeshConfigType, "1", nil, mesh.Config{TrustDomain: "td"})
	stop()

	// The control plane is away now.
	var got LocalPods
	var namespaces map[string]bool
	store := &mesh.Store{}
	restart := func(f func(*Config)) *Client {
		cl, _ := c.start(func(cfg *Config) {
			cfg.StateFile, cfg.Store = file, store
			cfg.Address = "passthrough:///control:1"
			cfg.OnLocalPods = func(p LocalPods) { got = p }
			cfg.OnNamespaces = func(n map[string]bool) { namespaces = n }
			if f != nil {
				f(cfg)
			}
		})
		return cl
	}
	cl := restart(nil)
	<-cl.Synced()
	st, again := c.subscribed()
	s := store.Load()
	if s.Workload("c1//Pod/shop/a") == nil || s.Service(svc.Name) == nil || s.Policy(mesh.PolicyName{Namespace: "shop", Name: "p"}) == nil || s.Config().TrustDomain != "td" {
		t.Errorf("after the restart: %+v", s)
	}
	if got.Live || len(got.Pods) != 1 || !namespaces["shop"] {
		t.Errorf("pods %+v, namespaces %v", got, namespaces)
	}
	select {
	case <-cl.Live():
		t.Error("what is from disk counts as live")
	default:
	}
	if v := again[wds.AddressType].InitialResourceVersions; v["c1//Pod/shop/a"] != "1" || v[svc.Name.String()] != "1" {
		t.Errorf("it says it has %v", v)
	}
	if v := again[wds.MeshConfigType].InitialResourceVersions; v["mesh"] != "1" {
		t.Errorf("it says it has %v", v)
	}
	// Nothing has changed, and the control plane says so.
	st.answer(wds.AuthorizationType, "1", nil)
	st.answer(wds.AddressType, "1", nil)
	st.answer(wds.LocalPodType, "1", nil)
	<-cl.Live()
	if !got.Live || len(got.Pods) != 1 {
		t.Errorf("then the pods are %+v", got)
	}
}

func TestStateThatCannotBeUsed(t *testing.T) {
	good, err := (&state{
		node: "n1", snapshot: (&mesh.Store{}).Load(), received: map[string]bool{wds.AddressType: true, wds.AuthorizationType: true},
	}).encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := decodeState(good, "n1"); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	flipped := slices.Clone(good)
	flipped[len(flipped)-1] ^= 1
	for name, data := range map[string][]byte{
		"empty": nil, "garbage": []byte("garbage"), "cut short": good[:len(good)-3], "a bit flipped": flipped,
		"another version": []byte(strings.Replace(string(good), "state 1", "state 2", 1)),
	} {
		if _, err := decodeState(data, "n1"); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := decodeState(good, "n2"); !errors.Is(err, ErrState) {
		t.Errorf("of another node: %v", err)
	}

	c := newControl(t)
	file := c.write("state", "garbage")
	cl, _ := c.start(func(cfg *Config) { cfg.StateFile = file })
	st, first := c.subscribed()
	if len(first[wds.AddressType].InitialResourceVersions) != 0 {
		t.Error("it claims to have something")
	}
	st.put(wds.AuthorizationType, "1", nil)
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	<-cl.Synced()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeState(data, "n1"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the garbage was not replaced")
		}
	}
}

// A stock istiod knows neither LocalPod nor NodeStatus.
func TestControlPlaneWithoutOurTypes(t *testing.T) {
	c := newControl(t)
	c.noReport = true
	pods := make(chan LocalPods, 10)
	cl, _ := c.start(func(cfg *Config) {
		cfg.Base = mesh.Config{TrustDomain: "cluster.local"}
		cfg.DeriveAfter = 20 * time.Millisecond
		cfg.OnLocalPods = func(p LocalPods) { pods <- p }
	})
	st, _ := c.subscribed()
	host := captured("host", "192.168.0.1")
	host.HostNetwork = true
	far := captured("far", "10.0.1.1")
	far.Node = "n2"
	plain := captured("plain", "10.0.0.2")
	plain.Tunnel = mesh.TunnelNone
	st.put(wds.LocalPodType, "", nil) // istiod's answer to a type that it does not know
	st.put(wds.AuthorizationType, "1", nil)
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"), host, far, plain)
	p := receive(t, "the pods", pods)
	var got []string
	for _, x := range p.Pods {
		got = append(got, fmt.Sprint(x.Name, " ", x.Enrolled, " ", x.Reason))
	}
	if want := []string{"a true workload", "host false host-network", "plain false not-in-mesh"}; !p.Live || !p.Derived || !slices.Equal(got, want) {
		t.Errorf("derived %q (%+v), want %q", got, p, want)
	}
	st.answer(wds.AddressType, "2", []string{"c1//Pod/shop/a"})
	if p := receive(t, "the pods", pods); len(p.Pods) != 2 {
		t.Errorf("after the removal: %+v", p)
	}
	if s := cl.Status(); s.Types[wds.LocalPodType].Responses != 0 {
		t.Errorf("the status is %+v", s)
	}
	// It is upgraded to one that does know them.
	st.answer(wds.LocalPodType, "1", nil, pod("a", true))
	if p := receive(t, "the pods", pods); p.Derived || !p.Live || len(p.Pods) != 1 {
		t.Errorf("after the upgrade: %+v", p)
	}
}

func TestReport(t *testing.T) {
	c := newControl(t)
	cl, _ := c.start(nil)
	st, _ := c.subscribed()
	cl.ReportPods([]PodStatus{{UID: "u", Namespace: "shop", Name: "a", Redirection: RedirectionPending, Reason: "a second NIC", OpenConnections: 3}})
	st.put(wds.AuthorizationType, "5", nil)
	st.answer(wds.AddressType, "6", nil, captured("a", "10.0.0.1"))
	for {
		r := receive(t, "a report", c.reports)
		if len(r.Pods) == 0 || len(r.Types) < 2 {
			continue
		}
		p := r.Pods[0]
		if r.Node != "n1" || p.Redirection != api.PodStatus_REDIRECTION_PENDING || p.Reason != "a second NIC" || p.OpenConnections != 3 {
			t.Errorf("the report is %v", r)
		}
		if r.Types[0].TypeUrl != wds.AuthorizationType || r.Types[0].AppliedVersion != "5" || r.Types[1].AppliedVersion != "6" {
			t.Errorf("the types are %v", r.Types)
		}
		return
	}
}

// TestAfterYieldNothingIsWritten: an older state must not be found where the successor's is, and the node has one voice.
func TestAfterYieldNothingIsWritten(t *testing.T) {
	c := newControl(t)
	dir := filepath.Join(c.dir, "state")
	cl, stop := c.start(func(cfg *Config) { cfg.StateFile = filepath.Join(dir, "mesh") })
	st, _ := c.subscribed()
	cl.Yield()
	st.put(wds.AuthorizationType, "1", nil)
	st.answer(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	if n := cl.Status().Workloads; n != 1 {
		t.Errorf("it follows the control plane no more: %d workloads", n)
	}
	for len(c.reports) > 0 { // from before
		<-c.reports
	}
	cl.ReportPods([]PodStatus{{UID: "u", Namespace: "shop", Name: "a", Redirection: RedirectionPending}})
	time.Sleep(4 * coalesce)
	if len(c.reports) > 0 {
		t.Errorf("it reports: %v", <-c.reports)
	}
	stop()
	if files, err := os.ReadDir(dir); err == nil && len(files) > 0 {
		t.Errorf("it has written %v", files)
	}
}

func TestForeignControlPlane(t *testing.T) {
	c, other := newControl(t), newControl(t)
	root, err := os.ReadFile(filepath.Join(other.dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	right, err := os.ReadFile(filepath.Join(c.dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	c.write("root", string(root))
	c.start(nil)
	select {
	case <-c.streams:
		t.Fatal("it talks to a control plane that its roots do not know")
	case <-time.After(200 * time.Millisecond):
	}
	c.write("root", string(right)) // the file is read again
	c.subscribed()
}

// A stream that ends while the client is answering on it ends for the client too, and another follows: who answers
// learns why from the stream's receiver instead of receiving beside it.
func TestStreamThatEndsWhileItIsAnswered(t *testing.T) {
	c := newControl(t)
	var streams atomic.Int32
	c.start(func(cfg *Config) {
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithStreamInterceptor(func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := open(ctx, d, cc, method, opts...)
			if err != nil || !strings.HasSuffix(method, "/DeltaAggregatedResources") || streams.Add(1) > 1 {
				return s, err
			}
			return &lateReceiver{ClientStream: s, t: t, prompt: 2, ended: make(chan struct{}), other: make(chan struct{})}, nil
		}))
	})
	st, _ := c.subscribed()
	st.put(wds.AuthorizationType, "1", nil)
	st.put(wds.AddressType, "1", nil, captured("a", "10.0.0.1"))
	receive(t, "an answer", st.reqs)
	go func() {
		for range st.reqs {
		}
	}()
	st.end <- errors.New("restarting")
	c.subscribed()
}

// lateReceiver is a stream whose answers are sent until it has ended. Its receiver, who has had the first responses,
// hears of the end a little later than that: whoever else receives meanwhile takes it away, which gRPC does not allow.
type lateReceiver struct {
	grpc.ClientStream
	t      *testing.T
	prompt int32 // responses
	calls  atomic.Int32
	ended  chan struct{}
	other  chan struct{} // closed once another has received
}

func (s *lateReceiver) SendMsg(m any) error {
	err := s.ClientStream.SendMsg(m)
	if m.(*discovery.DeltaDiscoveryRequest).ResponseNonce == "" {
		return err
	}
	for err == nil {
		err = s.ClientStream.SendMsg(m)
	}
	close(s.ended)
	return err
}

func (s *lateReceiver) RecvMsg(m any) error {
	switch s.calls.Add(1) - s.prompt {
	case 1:
		<-s.ended
		select {
		case <-s.other:
		case <-time.After(200 * time.Millisecond):
		}
	case 2:
		s.t.Error("two receive at once: one hears of the end, and the other may wait for ever")
		defer close(s.other)
	}
	return s.ClientStream.RecvMsg(m)
}
