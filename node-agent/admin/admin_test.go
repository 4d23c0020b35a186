package admin

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/proxy"
)

// serve starts a Server on free ports and returns the three base URLs.
func serve(t *testing.T, cfg Config) (adminURL, metricsURL, readyURL string) {
	t.Helper()
	cfg.AdminAddr, cfg.MetricsAddr, cfg.ReadyAddr = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	if cfg.Store == nil {
		cfg.Store = &mesh.Store{}
	}
	if cfg.Gatherer == nil {
		cfg.Gatherer = prometheus.NewRegistry()
	}
	if cfg.Missing == nil {
		cfg.Missing = func() []string { return nil }
	}
	cfg.Level, cfg.Log = new(slog.LevelVar), slog.New(slog.DiscardHandler)
	cfg.Certificates = func() []*identity.Bundle { return nil }
	cfg.Pods = func() []*proxy.PodHandle { return nil }
	cfg.Connections = func() []proxy.ConnInfo { return nil }
	s, err := Listen(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	a := s.Addrs()
	return "http://" + a[0].String(), "http://" + a[1].String(), "http://" + a[2].String()
}

func get(t *testing.T, method, url string) (int, string) {
	t.Helper()
	req, _ := http.NewRequestWithContext(t.Context(), method, url, nil)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b)
}

func TestConfigDumpIsWhatIstioctlAndKialiRead(t *testing.T) {
	b := mesh.NewBuilder(nil)
	svc := mesh.ServiceName{Namespace: "shop", Hostname: "catalog.shop.svc.cluster.local"}
	b.PutService(&mesh.Service{Name: svc, Short: "catalog", VIPs: []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.7")}},
		Ports: []mesh.ServicePort{{Port: 80, Target: 8080}}, SANs: []string{"spiffe://cluster.local/ns/shop/sa/catalog"}})
	b.PutWorkload(&mesh.Workload{UID: "Kubernetes//Pod/shop/catalog-1", Name: "catalog-1", Namespace: "shop", Cluster: "Kubernetes", Node: "n1",
		Addrs: []netip.Addr{netip.MustParseAddr("10.244.1.2")}, Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "catalog"},
		Tunnel: mesh.TunnelHBONE, Healthy: true, WorkloadName: "catalog", CanonicalName: "catalog", CanonicalRevision: "v1",
		Services: map[mesh.ServiceName][]mesh.ServicePort{svc: {{Port: 80, Target: 8080}}},
		Policies: []mesh.PolicyName{{Namespace: "shop", Name: "only-ui"}}})
	b.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "only-ui"}, Scope: mesh.ScopeWorkload,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Principals: []mesh.StringMatch{{Value: "cluster.local/ns/shop/sa/ui"}}, DestinationPorts: []uint16{8080}}}}}}}})
	store := &mesh.Store{}
	store.Swap(b.Commit(7))
	admin, _, _ := serve(t, Config{Store: store, Settings: map[string]string{"localNode": "n1"}, Version: "1.2.3"})
	code, body := get(t, "GET", admin+"/config_dump")
	if code != 200 {
		t.Fatal(code, body)
	}
	// The shapes as their readers declare them.
	var dump struct {
		Workloads []struct {
			UID                              string
			WorkloadIPs                      []string `json:"workloadIps"`
			Protocol, Name, Namespace        string
			ServiceAccount, WorkloadName     string
			CanonicalName, CanonicalRevision string
			ClusterID                        string `json:"clusterId"`
			TrustDomain, Node, Status        string
			AuthorizationPolicies            []string
		}
		Services []struct {
			Name, Namespace, Hostname string
			VIPs                      []string       `json:"vips"`
			Ports                     map[string]int `json:"ports"`
			Endpoints                 map[string]struct {
				WorkloadUID string            `json:"workloadUid"`
				Port        map[uint16]uint16 `json:"port"`
			}
			SubjectAltNames []string
		}
		Policies []struct {
			Name, Namespace, Scope, Action string
			Rules                          [][][]struct {
				Principals       []struct{ Exact string }
				DestinationPorts []uint16
			}
		}
		Certificates  []any
		Config        map[string]any
		WorkloadState map[string]any
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if dump.Certificates == nil || dump.Config["localNode"] != "n1" || dump.WorkloadState == nil {
		t.Errorf("certificates, config or workloadState is missing:\n%s", body)
	}
	w := dump.Workloads[0]
	if w.Protocol != "HBONE" || w.Status != "Healthy" || w.WorkloadIPs[0] != "10.244.1.2" || w.ServiceAccount != "catalog" || w.AuthorizationPolicies[0] != "shop/only-ui" {
		t.Errorf("workload %+v", w)
	}
	s := dump.Services[0]
	if s.VIPs[0] != "/10.96.0.7" || s.Ports["80"] != 8080 || s.Endpoints[w.UID].Port[80] != 8080 {
		t.Errorf("service %+v", s)
	}
	p := dump.Policies[0]
	if p.Scope != "WorkloadSelector" || p.Action != "Allow" || p.Rules[0][0][0].Principals[0].Exact != "cluster.local/ns/shop/sa/ui" {
		t.Errorf("policy %+v", p)
	}
}

func TestLogLevelIsSetByPostAlone(t *testing.T) {
	admin, _, _ := serve(t, Config{})
	for _, tc := range []struct {
		method, query string
		code          int
		answer        string
	}{
		{"GET", "?level=debug", 405, ""},
		{"POST", "", 200, "current log level is info"},
		{"POST", "?level=debug", 200, "current log level is debug"},
		{"POST", "?level=loud", 400, `level "loud" is invalid`},
		{"POST", "?reset", 200, "current log level is info"},
	} {
		code, body := get(t, tc.method, admin+"/logging"+tc.query)
		if code != tc.code || !strings.Contains(body, tc.answer) {
			t.Errorf("%s /logging%s: %d %q", tc.method, tc.query, code, body)
		}
	}
}

func TestReadinessNamesWhatItWaitsFor(t *testing.T) {
	missing := []string{"datapath is not open"}
	_, _, ready := serve(t, Config{Missing: func() []string { return missing }})
	if code, body := get(t, "GET", ready+"/healthz/ready"); code != 503 || !strings.Contains(body, "datapath is not open") {
		t.Error(code, body)
	}
	missing = nil
	if code, _ := get(t, "GET", ready+"/healthz/ready"); code != 200 {
		t.Error(code)
	}
}

func TestMetricsHaveBothPaths(t *testing.T) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(proxy.NewMetrics())
	_, metrics, _ := serve(t, Config{Gatherer: reg})
	for _, path := range []string{"/metrics", "/stats/prometheus"} {
		if code, body := get(t, "GET", metrics+path); code != 200 || !strings.Contains(body, `istio_tcp_sockets_open{reporter="source"} 0`) {
			t.Errorf("%s: %d\n%s", path, code, body)
		}
	}
}
