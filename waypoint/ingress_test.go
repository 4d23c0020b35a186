package waypoint

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warrenmesh/warren/internal/mesh"
)

var ingress = mesh.ServiceName{Namespace: "shop", Hostname: "shop-istio.shop.svc.cluster.local"}

// site is a certificate of a host and its key, for tests alone.
func site() (chain, key string) {
	for name, to := range map[string]*string{"site.crt": &chain, "site.key": &key} {
		b, err := os.ReadFile(filepath.Join("testdata", "certificates", name))
		if err != nil {
			panic(err)
		}
		*to = string(b)
	}
	return chain, key
}

// entrance is a gateway for the catalog, with every kind of listener.
func entrance() *mesh.Ingress {
	chain, key := site()
	rule := func(name string) mesh.HTTPRule {
		return mesh.HTTPRule{Name: name, Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/")}}, Backends: []mesh.HTTPBackend{{Service: catalog, Port: 80, Weight: 1}}}
	}
	away := rule("shop/away/0")
	away.Backends, away.Redirect = nil, &mesh.HTTPRedirect{Host: "b.example", Code: 302, OwnPort: true}
	return &mesh.Ingress{
		Name: ingress, Workload: "shop-istio",
		Certificates: []mesh.Certificate{{Name: "shop/site", Chain: chain, Key: mesh.Redacted(key), Roots: chain}},
		Listeners: []mesh.IngressListener{
			{Name: "http/80", Port: 80, Hosts: []mesh.IngressHost{
				{Names: []string{"*.example"}, Rules: []mesh.HTTPRule{rule("shop/wide/0")}},
				{Names: []string{"a.example"}, Rules: []mesh.HTTPRule{away, rule("shop/wide/0")}},
				{Names: []string{"safe.example"}, HTTPSOnly: true},
			}},
			{Name: "https/443/any", Port: 443, TLS: &mesh.ListenerTLS{Certificates: []string{"shop/site"}}, Hosts: []mesh.IngressHost{
				{Names: []string{"*"}, Rules: []mesh.HTTPRule{rule("shop/secure/0"), away}}, {Names: []string{"b.example"}, Misdirects: true},
			}},
			{Name: "https/443/b", Port: 443, Names: []string{"b.example"}, TLS: &mesh.ListenerTLS{Certificates: []string{"shop/site"}, ClientRoots: "shop/site", MinVersion: 0x0304},
				Hosts: []mesh.IngressHost{{Names: []string{"b.example"}, Rules: []mesh.HTTPRule{rule("shop/mutual/0")}}}},
			{Name: "tls/443/c", Port: 443, Names: []string{"c.example"}, Backends: []mesh.HTTPBackend{{Service: stock, Port: 3306, Weight: 1}, {Service: catalog, Port: 80, Weight: 3}}},
			{Name: "sni/8443/any", Port: 8443, Names: []string{"*"}, Backends: []mesh.HTTPBackend{{Service: catalog, Weight: 1}}},
			{Name: "tls/8444/any", Port: 8444, Names: []string{"*"}, TLS: &mesh.ListenerTLS{Certificates: []string{"shop/site"}}, Backends: []mesh.HTTPBackend{{Invalid: "there is none", Weight: 1}, {Service: stock, Port: 3306, Weight: 1}}},
			{Name: "tls/8444/closed", Port: 8444, Names: []string{"closed.example"}},
			{Name: "tcp/3306", Port: 3306, Backends: []mesh.HTTPBackend{{Service: stock, Port: 3306, Weight: 1}}},
		},
		Access: []mesh.AccessPolicy{{Name: mesh.PolicyName{Namespace: "shop", Name: "none-of-that"}, Action: mesh.Deny, Rules: []mesh.AccessRule{{Clauses: []mesh.AccessClause{
			{Any: [][]mesh.AccessTest{{{On: mesh.AccessPath, Text: []mesh.TextMatch{text(mesh.TextPrefix, "/admin")}}}}},
		}}}}},
	}
}

func TestIngress(t *testing.T) {
	in := entrance()
	in.Telemetry = told(&mesh.TelemetryProvider{Name: "zipkin", Kind: mesh.TelemetryZipkin, Path: "/api/v2/spans", Service: catalog, Port: 80, ShortIDs: true})
	ingressGolden(t, "ingress", shop(nil), in)
}

// TestIngressTunnels has what is of the mesh come to a gateway by tunnel: to the same as from outside, and to what is for it alone.
func TestIngressTunnels(t *testing.T) {
	in := entrance()
	in.Tunnels = true
	in.Listeners = append(in.Listeners, mesh.IngressListener{Name: "http/8081", Port: 8081, Tunnelled: true, Hosts: []mesh.IngressHost{
		{Names: []string{"out.example"}, Rules: []mesh.HTTPRule{{Name: "shop/out/0", Backends: []mesh.HTTPBackend{{Service: outside, Port: 80, Weight: 1}}}}},
	}})
	in.Access = append(in.Access, mesh.AccessPolicy{Name: mesh.PolicyName{Namespace: "shop", Name: "way-only"}, Action: mesh.Allow, Rules: []mesh.AccessRule{{Clauses: []mesh.AccessClause{
		{Who: true, Any: [][]mesh.AccessTest{{{On: mesh.AccessPrincipal, Text: []mesh.TextMatch{text(mesh.TextExact, "cluster.local/ns/shop/sa/way")}}}}},
	}}}})
	ingressGolden(t, "ingress-tunnel", shop(nil), in)
}

// TestEncryptedBackends has a gateway speak TLS to applications, but where TLS passes it or where it cannot be had.
func TestEncryptedBackends(t *testing.T) {
	in := entrance()
	in.BackendCertificate = "shop/site"
	in.Listeners[2].TLS.Optional, in.Listeners[2].TLS.Untrusted = true, true
	in.Listeners[1].Hosts[0].Rules[0].Backends = append(in.Listeners[1].Hosts[0].Rules[0].Backends,
		mesh.HTTPBackend{Service: stock, Port: 50051, Weight: 1}, mesh.HTTPBackend{Service: stock, Port: 9000, Weight: 1})
	s := shop(func(s *mesh.Service) {
		s.TLS = []mesh.BackendTLS{{Host: "catalog.example", Names: []mesh.CertificateName{{Name: "catalog.example"}, {URI: true, Name: "spiffe://example/catalog"}}, Roots: in.Certificates[0].Chain}}
	})
	b := mesh.NewBuilder(s)
	other := *s.Service(stock)
	other.TLS = []mesh.BackendTLS{
		{Host: "stock.example", Names: []mesh.CertificateName{{Name: "stock.example"}}, PublicRoots: true}, {Port: 9000, Invalid: "there are no roots"},
	}
	// Without a BackendTLSPolicy a DestinationRule says how, with a Secret of the gateway's own namespace.
	other.Traffic = []mesh.Traffic{{Port: 3306, TLS: &mesh.BackendTLS{Mutual: true, Credential: "site", Credentials: []mesh.Certificate{in.Certificates[0]}}}}
	other.TLS = append(other.TLS[1:], other.TLS[0])
	other.TLS[1].Port = 50051
	b.PutService(&other)
	ingressGolden(t, "ingress-encrypted", b.Commit(2), in)
}

// TestIngressThroughWaypoint has a gateway send by the waypoint of a Service that asks for it. Without a pod of the waypoint
// it sends nothing there.
func TestIngressThroughWaypoint(t *testing.T) {
	in := entrance()
	s := shop(func(s *mesh.Service) { s.IngressUseWaypoint = true })
	b := mesh.NewBuilder(s)
	other := *s.Service(stock)
	other.IngressUseWaypoint, other.Waypoint = true, &mesh.Gateway{Service: mesh.ServiceName{Namespace: "shop", Hostname: "gone.shop.svc.cluster.local"}}
	b.PutService(&other)
	b.PutWorkload(&mesh.Workload{
		UID: "Kubernetes//Pod/shop/way-1", Namespace: "shop", Name: "way-1", Healthy: true, Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.9")},
		Services: map[mesh.ServiceName][]mesh.ServicePort{gateway: {{Port: 15008, Target: 15008}}},
	})
	s = b.Commit(2)
	ingressGolden(t, "ingress-waypoint", s, in)

	// It follows the waypoint's pods.
	b = mesh.NewBuilder(s)
	b.PutIngress(in)
	s = b.Commit(3)
	w := NewWriter(ingress)
	was, err := w.Write(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	b = mesh.NewBuilder(s)
	b.DeleteWorkload("Kubernetes//Pod/shop/way-1")
	is, err := w.Write(b.Commit(4), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := countEndpoints(was, catalog); n != 1 {
		t.Errorf("%d ways to the catalog, want the waypoint's pod", n)
	}
	if n := countEndpoints(is, catalog); n != 0 {
		t.Errorf("without the waypoint there are %d ways to the catalog", n)
	}
}

func countEndpoints(r *Resources, of mesh.ServiceName) (n int) {
	for _, e := range r.Endpoints {
		if strings.Contains(e.ClusterName, of.Hostname) {
			for _, l := range e.Endpoints {
				n = max(n, len(l.LbEndpoints))
			}
		}
	}
	return n
}

// ingressGolden compares what is written for a gateway with a file.
func ingressGolden(t *testing.T, name string, s *mesh.Snapshot, in *mesh.Ingress) {
	t.Helper()
	b := mesh.NewBuilder(s)
	b.PutIngress(in)
	r, err := Build(b.Commit(s.Revision()+1), ingress)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range r.Listeners {
		if err := m.ValidateAll(); err != nil {
			t.Error(err)
		}
	}
	for _, m := range r.Routes {
		if err := m.ValidateAll(); err != nil {
			t.Error(err)
		}
	}
	for _, m := range r.Clusters {
		if err := m.ValidateAll(); err != nil {
			t.Error(err)
		}
	}
	got, file := golden(t, name, r), filepath.Join("testdata", name+".yaml")
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (-want +got); go test ./waypoint -update writes it:\n%s", file, d)
	}
}

// TestKeysAreNotPrinted prints a gateway in every way in which a log might.
func TestKeysAreNotPrinted(t *testing.T) {
	g := entrance()
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if out := fmt.Sprintf(verb, *g); bytes.Contains([]byte(out), []byte("PRIVATE KEY")) {
			t.Errorf("%s shows the key", verb)
		}
	}
}
