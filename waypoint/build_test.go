package waypoint

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

var update = flag.Bool("update", false, "write the golden files")

var (
	gateway = mesh.ServiceName{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}
	catalog = mesh.ServiceName{Namespace: "shop", Hostname: "catalog.shop.svc.cluster.local"}
	outside = mesh.ServiceName{Namespace: "shop", Hostname: "api.example"}    // two endpoints are names, one an address, one a pod
	single  = mesh.ServiceName{Namespace: "shop", Hostname: "single.example"} // of whose name one address is used at a time
	stock   = mesh.ServiceName{Namespace: "shop", Hostname: "stock.shop.svc.cluster.local"}
)

// shop is a catalog of two versions, of which one has no tunnel, and a stock service behind the same waypoint.
func shop(change func(*mesh.Service)) *mesh.Snapshot {
	b := mesh.NewBuilder(nil)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local", Cluster: "Kubernetes", ClusterDomain: "cluster.local", RootNamespace: "istio-system"})
	bound := &mesh.Gateway{Service: gateway, HBONEPort: mesh.HBONEPort}
	svc := &mesh.Service{
		Name: catalog, Short: "catalog", Canonical: true, Waypoint: bound,
		VIPs:  []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.10")}},
		Ports: []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppHTTP1}},
	}
	if change != nil {
		change(svc)
	}
	b.PutService(svc)
	b.PutService(&mesh.Service{
		Name: stock, Short: "stock", Canonical: true, Waypoint: bound,
		VIPs:  []mesh.NetAddr{{Addr: netip.MustParseAddr("10.96.0.11")}, {Addr: netip.MustParseAddr("fd00::11")}},
		Ports: []mesh.ServicePort{{Port: 50051, Target: 50051, App: mesh.AppGRPC}, {Port: 9000, Target: 9000}, {Port: 3306, Target: 3306, App: mesh.AppTCP}},
	})
	b.PutService(&mesh.Service{Name: gateway, Short: "way", Canonical: true, Ports: []mesh.ServicePort{{Port: 15008, Target: 15008}}})
	b.PutService(&mesh.Service{Name: outside, Short: "api", Ports: []mesh.ServicePort{{Port: 80, Target: 8080, App: mesh.AppTCP}}})
	b.PutService(&mesh.Service{Name: single, Short: "single", Ports: []mesh.ServicePort{{Port: 80, Target: 80, App: mesh.AppTCP}}, OneAddress: true})
	backs := func(n mesh.ServiceName, ports ...mesh.ServicePort) map[mesh.ServiceName][]mesh.ServicePort {
		return map[mesh.ServiceName][]mesh.ServicePort{n: ports}
	}
	for i, w := range []*mesh.Workload{
		{Name: "catalog-1", Tunnel: mesh.TunnelHBONE, Healthy: true, Labels: map[string]string{"version": "v1"}, Services: backs(catalog, mesh.ServicePort{Port: 80, Target: 8080})},
		{Name: "catalog-2", Healthy: true, Labels: map[string]string{"version": "v2"}, Services: backs(catalog, mesh.ServicePort{Port: 80, Target: 8080})},
		{Name: "stock-1", Tunnel: mesh.TunnelHBONE, Services: backs(stock, mesh.ServicePort{Port: 50051, Target: 50051})},
	} {
		w.UID, w.Namespace = "Kubernetes//Pod/shop/"+w.Name, "shop"
		w.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}
		b.PutWorkload(w)
	}
	for _, w := range []*mesh.Workload{
		{Hostname: "one.example", Capacity: 3, Services: backs(outside)}, {Hostname: "two.example", Services: backs(outside, mesh.ServicePort{Port: 80, Target: 9090})},
		{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.7")}, Services: backs(outside)},
		{Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}, Tunnel: mesh.TunnelHBONE, Services: backs(outside)},
		{Hostname: "single.example", Services: backs(single)},
	} {
		w.UID, w.Namespace, w.Name, w.Healthy = "Kubernetes/networking.istio.io/ServiceEntry/shop/"+w.Hostname+fmt.Sprint(w.Addrs), "shop", "api", true
		b.PutWorkload(w)
	}
	return b.Commit(1)
}

func text(kind mesh.TextKind, v string) mesh.TextMatch { return mesh.TextMatch{Kind: kind, Value: v} }

func to(subset string, weight uint32) mesh.HTTPBackend {
	return mesh.HTTPBackend{Service: catalog, Subset: subset, Weight: weight}
}

var versions = []mesh.Subset{{Name: "v1", Labels: map[string]string{"version": "v1"}}, {Name: "v2", Labels: map[string]string{"version": "v2"}}}

// rules makes the catalog's routing.
func rules(all ...mesh.HTTPRule) func(*mesh.Service) {
	return func(s *mesh.Service) { s.HTTP, s.Subsets = all, versions }
}

func one(r mesh.HTTPRule) func(*mesh.Service) {
	if r.Redirect == nil && r.Direct == nil && len(r.Backends) == 0 {
		r.Backends = []mesh.HTTPBackend{to("", 1)}
	}
	return rules(r)
}

func ptr[T any](v T) *T { return &v }

// told is everything that somebody may ask for, with spans to a provider.
func told(to *mesh.TelemetryProvider) *mesh.Telemetry {
	return &mesh.Telemetry{
		Tracing: &mesh.Tracing{To: to, Percent: 12.5, NoPropagation: true, IgnoreRequestID: true, Tags: []mesh.SpanTag{
			{Name: "team", Literal: "100%"}, {Name: "tenant", Header: "x-tenant", Default: "none"}, {Name: "zone", Environment: "ZONE"},
			{Name: "istio.destination_workload", Literal: "mine"},
		}},
		Logs: []mesh.AccessLog{
			{To: &mesh.TelemetryProvider{Kind: mesh.TelemetryStdout}, Filter: `response.code >= 400 || request.headers["x-log"] == "1"`},
			{To: &mesh.TelemetryProvider{Name: "logs", Kind: mesh.TelemetryOTLPLogs, Service: stock, Port: 50051, LogName: "mesh"}, Filter: `has(request.url_path) && request.url_path.matches("^/(a|b)/[0-9]+$") && !("x" in metadata.filter_metadata)`},
		},
		Metrics: []mesh.MetricChange{
			{Metric: "istio_requests_total", Remove: []string{"response_flags"}, Set: map[string]string{"team": "a%b"}},
			{Metric: "istio_request_bytes", Disable: ptr(true)}, {Metric: "istio_response_bytes", Disable: ptr(true)},
		},
	}
}

var cases = map[string]func(*mesh.Service){
	"plain": nil,
	"not-exported": func(s *mesh.Service) { // to this waypoint's namespace
		s.RuleIn = []string{"bank"}
		s.Traffic, s.Subsets = []mesh.Traffic{{Balance: mesh.BalanceRandom}}, versions
		s.HTTP = []mesh.HTTPRule{{Name: "shop/v/0", Backends: []mesh.HTTPBackend{to("", 1), to("v1", 1)}}}
	},
	"sender": func(s *mesh.Service) { // the rule of who sends comes before the service's own, where there is one
		s.Traffic = []mesh.Traffic{{Balance: mesh.BalanceRandom}, {From: "blog", Subset: "v1", Balance: mesh.BalanceRoundRobin}}
		s.Subsets = append(slices.Clone(versions), mesh.Subset{Name: "v1", Labels: map[string]string{"version": "v2"}, From: "blog"})
		to := func(from, subset string) mesh.HTTPBackend {
			return mesh.HTTPBackend{Service: catalog, Subset: subset, From: from, Weight: 1}
		}
		s.HTTP = []mesh.HTTPRule{{Name: "blog/v/0", Backends: []mesh.HTTPBackend{to("blog", "v1"), to("blog", "v2"), to("other", "v1")}}}
	},
	"connections": func(s *mesh.Service) {
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 9000, Target: 9000}, mesh.ServicePort{Port: 5432, Target: 5432, App: mesh.AppTCP})
		s.Routed = []mesh.Routed{{Port: 5432, Backends: []mesh.HTTPBackend{{Invalid: "there is no such Service", Weight: 1}}},
			{Port: 9000, Backends: []mesh.HTTPBackend{{Service: stock, Port: 3306, Weight: 3}, {Service: catalog, Port: 9000, Weight: 1}, {Service: catalog, Port: 80}}}}
	},
	"encrypted": func(s *mesh.Service) {
		s.Subsets = versions
		s.HTTP = []mesh.HTTPRule{{Name: "both", Backends: []mesh.HTTPBackend{to("", 1), to("v1", 1), to("v2", 1), {Service: stock, Port: 50051, Weight: 1}}}}
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 443, Target: 8443, App: mesh.AppTLS}, mesh.ServicePort{Port: 5432, Target: 5432, App: mesh.AppTCP}, mesh.ServicePort{Port: 6379, Target: 6379, App: mesh.AppTCP})
		chain, key := site()
		s.Traffic = []mesh.Traffic{
			{TLS: &mesh.BackendTLS{PublicRoots: true}},
			{Subset: "v1", TLS: &mesh.BackendTLS{Host: "api.example", Names: []mesh.CertificateName{{URI: true, Name: "spiffe://d/ns/a/sa/b"}}, Mutual: true, Credential: "shown",
				Credentials: []mesh.Certificate{{Name: "edge/shown"}, {Name: "shop/shown", Chain: chain, Key: mesh.Redacted(key), Roots: chain}}}},
			{Subset: "v2", TLS: &mesh.BackendTLS{Mutual: true, Credential: "absent"}},
			{Port: 5432, TLS: &mesh.BackendTLS{Unchecked: true}},
			{Port: 6379, TLS: &mesh.BackendTLS{Invalid: "it is a file"}},
		}
	},
	"server-names": func(s *mesh.Service) {
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 443, Target: 8443, App: mesh.AppTLS}, mesh.ServicePort{Port: 9000, Target: 9000}, mesh.ServicePort{Port: 5432, Target: 5432, App: mesh.AppTCP})
		s.Subsets = versions
		other := []mesh.HTTPBackend{{Service: stock, Port: 3306, Weight: 1}}
		s.Routed = []mesh.Routed{
			{Port: 443, Names: []string{"*.example", "*"}, Beside: true, Backends: other}, {Port: 443, Names: []string{"a.example", "*.b.example"}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1), to("v2", 3)}},
			{Port: 443, Names: []string{"a.example"}, Beside: true, Backends: []mesh.HTTPBackend{{Invalid: "it is the second", Weight: 1}}},
			{Port: 9000, Names: []string{"c.example"}, Beside: true, Backends: other}, {Port: 9000, Beside: true, Backends: []mesh.HTTPBackend{to("v2", 1)}},
			{Port: 5432, Beside: true, Backends: []mesh.HTTPBackend{{Invalid: "the route cannot be followed", Weight: 1}}},
		}
	},
	"clients": func(s *mesh.Service) { // of which something else is asked than their names
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 443, Target: 8443, App: mesh.AppTLS}, mesh.ServicePort{Port: 9000, Target: 9000}, mesh.ServicePort{Port: 5432, Target: 5432, App: mesh.AppTCP})
		s.Subsets = versions
		nets := func(list ...string) (out []netip.Prefix) {
			for _, n := range list {
				out = append(out, netip.MustParsePrefix(n))
			}
			return out
		}
		s.Routed = []mesh.Routed{
			{Port: 443, Names: []string{"a.example"}, Only: &mesh.RoutedOnly{Source: "blog"}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Port: 443, Names: []string{"a.example"}, Beside: true, Backends: []mesh.HTTPBackend{to("v2", 1)}},
			{Port: 9000, Only: &mesh.RoutedOnly{From: nets("10.0.0.0/8", "fd00::/8")}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Port: 5432, Only: &mesh.RoutedOnly{Source: "blog", From: nets("10.0.0.0/8"), To: nets("10.96.0.10/32")}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Port: 5432, Beside: true, Backends: []mesh.HTTPBackend{{Invalid: "the route cannot be followed", Weight: 1}}},
		}
		s.HTTP = []mesh.HTTPRule{
			{Name: "known", Matches: []mesh.HTTPMatch{{Labels: map[string]string{"app": "ui"}, At: []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00::3")}, Source: "blog"}}, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Name: "nobody", Matches: []mesh.HTTPMatch{{Labels: map[string]string{"app": "absent"}, At: []netip.Addr{}}}, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Name: "rest", Backends: []mesh.HTTPBackend{to("v2", 1)}},
		}
	},
	"consumers": func(s *mesh.Service) { // connections of other namespaces' clients
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 443, Target: 8443, App: mesh.AppTLS}, mesh.ServicePort{Port: 9000, Target: 9000})
		s.Subsets = versions
		s.Routed = []mesh.Routed{
			{Port: 443, Names: []string{"a.example"}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Port: 443, From: "blog", Names: []string{"a.example"}, Beside: true, Backends: []mesh.HTTPBackend{to("v2", 1)}},
			{Port: 443, From: "bank", Backends: []mesh.HTTPBackend{{Invalid: "it is not there", Weight: 1}}},
			{Port: 9000, From: "blog", Names: []string{"b.example"}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Port: 9000, From: "bank", Names: []string{"b.example"}, Beside: true, Backends: []mesh.HTTPBackend{to("v1", 1)}},
			{Port: 9000, From: "bank", Backends: []mesh.HTTPBackend{to("v1", 1), to("v2", 3)}},
		}
	},
	"dynamic": func(s *mesh.Service) {
		s.Name.Hostname, s.Canonical, s.Dynamic = "*.Example.com", false, true
		s.Ports = []mesh.ServicePort{{Port: 80, Target: 80, App: mesh.AppHTTP1}, {Port: 443, Target: 8443, App: mesh.AppTLS}, {Port: 8080, Target: 8080},
			{Port: 81, Target: 8081, App: mesh.AppHTTP1}, {Port: 5432, Target: 5432, App: mesh.AppTCP}}
		s.Traffic = []mesh.Traffic{ // of which what is about endpoints has no place
			{Balance: mesh.BalanceRoundRobin, Warmup: &mesh.Warmup{Over: time.Minute}, MaxConnections: 10, Outliers: &mesh.Outliers{},
				Locality: &mesh.LocalityLB{Distribute: []mesh.Distribution{{From: "eu/*", To: []mesh.LocalityShare{{Locality: "us/*", Percent: 100}}}}}},
			{Port: 443, Hash: &mesh.HashKey{Header: "x-user"}},
			{Port: 8080, TLS: &mesh.BackendTLS{PublicRoots: true}},
		}
	},
	"names": func(s *mesh.Service) {
		s.Routed = []mesh.Routed{{Port: 80, Backends: []mesh.HTTPBackend{{Service: outside, Port: 80, Weight: 1}, {Service: single, Port: 80, Weight: 1}}}}
	},
	"split": one(mesh.HTTPRule{Name: "shop/canary/0", Backends: []mesh.HTTPBackend{to("v1", 80), to("v2", 20)}}),
	"matches": rules(
		mesh.HTTPRule{Name: "exact", Backends: []mesh.HTTPBackend{to("v1", 1)}, Matches: []mesh.HTTPMatch{
			{Path: text(mesh.TextExact, "/one"), Method: text(mesh.TextExact, "GET")},
			{Path: text(mesh.TextPrefix, "/two"), IgnoreCase: true, Scheme: text(mesh.TextExact, "http"), Authority: text(mesh.TextPrefix, "catalog")},
			{Path: text(mesh.TextPath, "/three/"), Query: []mesh.NamedMatch{{Name: "a", Match: text(mesh.TextExact, "1")}, {Name: "b"}}},
		}},
		mesh.HTTPRule{Name: "headers", Backends: []mesh.HTTPBackend{to("v2", 1)}, Matches: []mesh.HTTPMatch{{
			Path: text(mesh.TextRegex, "/v[0-9]+/.*"),
			Headers: []mesh.NamedMatch{
				{Name: "end-user", Match: text(mesh.TextExact, "jason")}, {Name: "x-any"}, {Name: "x-none", Match: text(mesh.TextAbsent, "")},
				{Name: "x-not", Match: text(mesh.TextRegex, "a.*"), Invert: true},
			},
		}, {Port: 81}, {Path: text(mesh.TextExact, "/blog"), Source: "blog"}}},
	),
	"retries":  one(mesh.HTTPRule{Timeout: 3 * time.Second, Retries: &mesh.HTTPRetries{Attempts: 3, PerTry: time.Second, On: "gateway-error", StatusCodes: []uint32{503}}}),
	"faults":   one(mesh.HTTPRule{Delay: &mesh.HTTPDelay{Fixed: 2 * time.Second, Millionths: 100_000}, Abort: &mesh.HTTPAbort{Status: 555, Millionths: mesh.Million}}),
	"redirect": one(mesh.HTTPRule{Redirect: &mesh.HTTPRedirect{Scheme: "https", Host: "other.example", Path: "/there", Port: 8443, Code: 308}}),
	"direct":   one(mesh.HTTPRule{Direct: &mesh.HTTPDirect{Status: 418, Body: "no"}}),
	"rewrite": rules(
		mesh.HTTPRule{Name: "prefix", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/a")}}, Backends: []mesh.HTTPBackend{to("", 1)}, Rewrite: &mesh.HTTPRewrite{Host: "b.example", Prefix: ptr("/")}},
		mesh.HTTPRule{Name: "whole", Backends: []mesh.HTTPBackend{to("", 1)}, Rewrite: &mesh.HTTPRewrite{Path: ptr("/x")}},
	),
	"headers": one(mesh.HTTPRule{
		Request:  mesh.HTTPHeaders{Set: []mesh.HTTPHeader{{Name: "x-set", Value: "100%"}}, Add: []mesh.HTTPHeader{{Name: "x-add", Value: "1"}}, Remove: []string{"x-gone"}},
		Response: mesh.HTTPHeaders{Set: []mesh.HTTPHeader{{Name: "x-answer", Value: "yes"}}},
	}),
	"mirror": one(mesh.HTTPRule{Mirrors: []mesh.HTTPMirror{{Backend: to("v2", 1), Millionths: 500_000}}}),
	"sessions": rules(
		mesh.HTTPRule{Name: "cookie", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/a")}}, Session: &mesh.HTTPSession{Name: "s", TTL: time.Hour}, Backends: []mesh.HTTPBackend{to("", 1)}},
		mesh.HTTPRule{Name: "browser", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/b")}}, Session: &mesh.HTTPSession{Name: "s"}, Backends: []mesh.HTTPBackend{to("", 1)}},
		mesh.HTTPRule{Name: "header", Session: &mesh.HTTPSession{Name: "x-session", Header: true}, Backends: []mesh.HTTPBackend{to("", 1)}},
	),
	"cors": one(mesh.HTTPRule{CORS: &mesh.HTTPCORS{Origins: []mesh.TextMatch{text(mesh.TextExact, "https://a.example")}, Methods: []string{"GET", "PUT"}, AllowHeaders: []string{"x-a"}, MaxAge: time.Hour, Credentials: true}}),
	"traffic": func(s *mesh.Service) {
		s.Subsets = versions
		s.HTTP = []mesh.HTTPRule{{Name: "both", Backends: []mesh.HTTPBackend{to("v1", 50), to("v2", 50)}}}
		s.Traffic = []mesh.Traffic{
			{Balance: mesh.BalanceRoundRobin, ConnectTimeout: time.Second, IdleTimeout: time.Minute, MaxConnections: 10, MaxPending: 11, MaxRequests: 12, MaxRetries: 13, MaxRequestsPerConnection: 14,
				Outliers: &mesh.Outliers{Consecutive5xx: ptr(uint32(0)), ConsecutiveGateway: ptr(uint32(3)), ConsecutiveLocal: ptr(uint32(4)), SplitLocal: true, Interval: 5 * time.Second, Ejection: 10 * time.Minute, MaxPercent: 100, MinHealthyPercent: 30}},
			{Subset: "v1", Hash: &mesh.HashKey{Header: "x-user", RingSize: 2048}},
			{Subset: "v2", Port: 80, Hash: &mesh.HashKey{Cookie: "user", CookiePath: "/", CookieTTL: ptr(time.Hour), Maglev: true}},
		}
	},
	"traffic-connections": func(s *mesh.Service) {
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 443, Target: 8443, App: mesh.AppTCP})
		s.Subsets = versions
		s.HTTP = []mesh.HTTPRule{{Name: "both", Backends: []mesh.HTTPBackend{to("v1", 50), to("v2", 50)}}}
		s.Traffic = []mesh.Traffic{
			{Keepalive: &mesh.Keepalive{Probes: 3, Idle: time.Hour}, ConnectionDuration: time.Minute, TCPIdleTimeout: 30 * time.Second, Warmup: &mesh.Warmup{Over: time.Minute},
				RetryBudget: &mesh.RetryBudget{Percent: 20, Over: time.Second, Least: 3}, MaxStreams: 9, Ping: 10 * time.Second, PingTimeout: time.Second},
			{Subset: "v1", Speak: mesh.SpeakHTTP2, MaxStreams: 7, Balance: mesh.BalanceRoundRobin, Warmup: &mesh.Warmup{Over: time.Minute, Percent: ptr(20.), Aggression: ptr(2.)}},
			{Subset: "v2", Speak: mesh.SpeakClient, Outliers: &mesh.Outliers{},
				Locality: &mesh.LocalityLB{Distribute: []mesh.Distribution{{From: "eu/*", To: []mesh.LocalityShare{{Locality: "eu/*", Percent: 90}, {Locality: "us/*", Percent: 10}}}}}},
		}
	},
	"forwarded": func(s *mesh.Service) { // connections that a proxy brings on, and what is told of their clients
		s.Ports = append(s.Ports, mesh.ServicePort{Port: 443, Target: 8443, App: mesh.AppTLS}, mesh.ServicePort{Port: 5432, Target: 5432, App: mesh.AppTCP},
			mesh.ServicePort{Port: 6379, Target: 6379, App: mesh.AppTCP}, mesh.ServicePort{Port: 7000, Target: 7000, App: mesh.AppTCP}, mesh.ServicePort{Port: 7001, Target: 7001, App: mesh.AppTCP}, mesh.ServicePort{Port: 7002, Target: 7002, App: mesh.AppTCP},
			mesh.ServicePort{Port: 3128, Target: 3128, App: mesh.AppHTTP2})
		s.Subsets = versions
		proxy := func(subset string, port uint16, weight uint32) mesh.HTTPBackend {
			return mesh.HTTPBackend{Service: catalog, Subset: subset, Port: port, Weight: weight}
		}
		s.Routed = []mesh.Routed{
			{Port: 6379, Beside: true, Backends: []mesh.HTTPBackend{proxy("v1", 3128, 1), proxy("v2", 3128, 2)}}, // the second would be asked for another server
			{Port: 7000, Beside: true, Backends: []mesh.HTTPBackend{proxy("v1", 3128, 1)}},
			{Port: 7001, Beside: true, Backends: []mesh.HTTPBackend{proxy("v1", 6379, 1)}}, // of which nothing can be asked
			{Port: 7002, Beside: true, Backends: []mesh.HTTPBackend{proxy("", 3128, 1)}},   // by POST in HTTP/2; port 5432 is by POST, and says no HTTP/2
		}
		s.Traffic = []mesh.Traffic{
			{Proxied: 1}, {Port: 443, Forward: &mesh.Forward{To: "db.example:443"}, Proxied: 2, TLS: &mesh.BackendTLS{PublicRoots: true}}, {Port: 5432, Forward: &mesh.Forward{To: "db.example:5432", Post: true}},
			{Subset: "v1", Port: 3128, Forward: &mesh.Forward{To: "[2001:db8::1]:6379"}, TLS: &mesh.BackendTLS{Unchecked: true}}, {Subset: "v2", Port: 3128, Forward: &mesh.Forward{To: "other.example:6379"}},
			{Subset: "v1", Port: 6379, Forward: &mesh.Forward{}}, {Port: 7000, Forward: &mesh.Forward{}}, {Port: 3128, Forward: &mesh.Forward{To: "post.example:1", Post: true}},
		}
	},
	"failures": func(s *mesh.Service) {
		s.Subsets = versions
		s.HTTP = []mesh.HTTPRule{{Name: "both", Backends: []mesh.HTTPBackend{to("v1", 50), to("v2", 50)}}}
		s.Traffic = []mesh.Traffic{
			{Subset: "v1", Outliers: &mesh.Outliers{Errors: []uint32{429, 503}}, Hash: &mesh.HashKey{Cookie: "u", CookieTTL: ptr(time.Hour), CookieAttributes: []mesh.HTTPHeader{{Name: "SameSite", Value: "Strict"}, {Name: "Secure"}}}},
			{Subset: "v2", Outliers: &mesh.Outliers{Errors: []uint32{429}}, Locality: &mesh.LocalityLB{Zones: true, Least: 6}},
		}
	},
	"access": func(s *mesh.Service) {
		s.Access = []mesh.AccessPolicy{
			{Name: mesh.PolicyName{Namespace: "shop", Name: "admin"}, Action: mesh.Deny, Rules: []mesh.AccessRule{{Clauses: []mesh.AccessClause{
				{Any: [][]mesh.AccessTest{
					{{On: mesh.AccessPath, Text: []mesh.TextMatch{text(mesh.TextPrefix, "/admin/")}}, {On: mesh.AccessHost, Text: []mesh.TextMatch{text(mesh.TextExact, "catalog"), text(mesh.TextSuffix, ".shop")}}},
					{{On: mesh.AccessHeader, Header: "x-debug", Text: []mesh.TextMatch{text(mesh.TextAny, "")}}},
				}},
				{Who: true, Any: [][]mesh.AccessTest{{{On: mesh.AccessNamespace, Not: true, Text: []mesh.TextMatch{text(mesh.TextExact, "ops")}}}}},
			}}}},
			{Name: mesh.PolicyName{Namespace: "shop", Name: "readers"}, Rules: []mesh.AccessRule{{Clauses: []mesh.AccessClause{
				{Who: true, Any: [][]mesh.AccessTest{
					{{On: mesh.AccessPrincipal, Text: []mesh.TextMatch{text(mesh.TextExact, "cluster.local/ns/shop/sa/ui")}}, {On: mesh.AccessSourceIP, Nets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}},
					{{On: mesh.AccessServiceAccount, Text: []mesh.TextMatch{text(mesh.TextExact, "shop/bot")}}},
				}},
				{Any: [][]mesh.AccessTest{{{On: mesh.AccessMethod, Text: []mesh.TextMatch{text(mesh.TextExact, "GET")}}, {On: mesh.AccessPort, Ports: []uint16{80}}}}},
			}}}},
		}
	},
	"custom": func(s *mesh.Service) {
		byHTTP := &mesh.AuthProvider{Service: stock, Port: 9000, Timeout: time.Second, PathPrefix: "/check",
			Add: []mesh.HTTPHeader{{Name: "x-from", Value: "mesh"}}, ToApplication: []mesh.TextMatch{text(mesh.TextExact, "x-user")}, ToClientOnDeny: []mesh.TextMatch{text(mesh.TextExact, "location")}, MaxBody: 1024}
		byGRPC := &mesh.AuthProvider{Service: stock, Port: 50051, GRPC: true}
		rule := []mesh.AccessRule{{Clauses: []mesh.AccessClause{{Any: [][]mesh.AccessTest{{{On: mesh.AccessPath, Text: []mesh.TextMatch{text(mesh.TextPrefix, "/admin")}}}}}}}}
		s.Access = []mesh.AccessPolicy{
			{Name: mesh.PolicyName{Namespace: "shop", Name: "asks"}, Action: mesh.Custom, Ask: byHTTP, Rules: rule},
			{Name: mesh.PolicyName{Namespace: "shop", Name: "asks-others"}, Action: mesh.Custom, Ask: byGRPC, Rules: rule},
		}
	},
	"external-auth": rules(
		mesh.HTTPRule{Name: "http", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/a")}}, Backends: []mesh.HTTPBackend{to("", 1)}, Ask: &mesh.AuthProvider{Service: stock, Port: 9000, Timeout: time.Second, PathPrefix: "/check",
			Sees: []mesh.TextMatch{text(mesh.TextExact, "cookie")}, ToApplication: []mesh.TextMatch{text(mesh.TextExact, "x-user")}, MaxBody: 1024}},
		mesh.HTTPRule{Name: "grpc", Backends: []mesh.HTTPBackend{to("", 1)}, Ask: &mesh.AuthProvider{Service: stock, Port: 50051, GRPC: true, Timeout: time.Second}},
	),
	"telemetry": func(s *mesh.Service) {
		s.Telemetry = told(&mesh.TelemetryProvider{Name: "otel", Kind: mesh.TelemetryOpenTelemetry, Service: stock, Port: 50051, MaxPath: 512})
	},
	// A provider whose Service is not there is sent nothing, and the request goes on.
	"telemetry-zipkin": func(s *mesh.Service) {
		s.Telemetry = &mesh.Telemetry{Tracing: &mesh.Tracing{Percent: 100, NoWorkloads: true, To: &mesh.TelemetryProvider{Name: "zipkin", Kind: mesh.TelemetryZipkin, Path: "/api/v2/spans",
			Service: mesh.ServiceName{Namespace: "shop", Hostname: "absent"}, Port: 9411, TraceParents: true}},
			Metrics: []mesh.MetricChange{{Disable: ptr(true)}}}
	},
	"tokens": func(s *mesh.Service) {
		s.Tokens = []mesh.TokenRule{
			{Issuer: "https://issuer.example/", Audiences: []string{"shop"}, Keys: `{"keys":[{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM"}]}`,
				FromHeaders: []mesh.TokenHeader{{Name: "x-token", Prefix: "Token "}}, FromParams: []string{"token"}, FromCookies: []string{"token"},
				Forward: true, PayloadHeader: "x-payload", Claims: []mesh.TokenClaim{{Header: "x-group", Claim: "group"}}, SpaceLists: []string{"roles"}},
			{Issuer: "unreachable"},
		}
		s.Access = []mesh.AccessPolicy{
			{Name: mesh.PolicyName{Namespace: "shop", Name: "known"}, Rules: []mesh.AccessRule{{Clauses: []mesh.AccessClause{
				{Who: true, Any: [][]mesh.AccessTest{{{On: mesh.AccessTokenPrincipal, Text: []mesh.TextMatch{text(mesh.TextAny, ""), text(mesh.TextSuffix, "/me")}}}}},
				{Who: true, Any: [][]mesh.AccessTest{{{On: mesh.AccessClaim, Claim: []string{"realm", "groups"}, Text: []mesh.TextMatch{text(mesh.TextExact, "admin"), text(mesh.TextAny, "")}}}}},
			}}}},
			{Name: mesh.PolicyName{Namespace: "shop", Name: "later"}, DryRun: true, Rules: []mesh.AccessRule{{}}},
			{Name: mesh.PolicyName{Namespace: "shop", Name: "later-not"}, Action: mesh.Deny, DryRun: true, Rules: []mesh.AccessRule{{}}},
			{Name: mesh.PolicyName{Namespace: "shop", Name: "noted"}, Action: mesh.Audit, Rules: []mesh.AccessRule{{}}},
		}
	},
	"limits": func(s *mesh.Service) {
		s.Limits = []mesh.RateLimit{
			{Name: "shop/all/0", Requests: 100, Per: time.Second, Burst: 200},
			{Name: "shop/all/1", Requests: 10, Per: time.Minute, Burst: 1, By: []mesh.LimitKey{{On: mesh.LimitPrincipal}, {On: mesh.LimitHeader, Header: "x-user"}}, Match: mesh.LimitMatch{
				Methods: []string{"POST", "PUT"}, Paths: []mesh.TextMatch{text(mesh.TextExact, "/orders"), text(mesh.TextPath, "/api/v1/"), text(mesh.TextRegex, "/x[0-9]+|/y")},
				Headers: []mesh.NamedMatch{{Name: "x-tier", Match: text(mesh.TextExact, "free")}, {Name: "x-any"}, {Name: "x-not", Match: text(mesh.TextRegex, "a.*"), Invert: true}},
			}},
			{Name: "shop/more/0", Requests: 4294967295, Per: time.Hour, Burst: 4294967295, By: []mesh.LimitKey{{On: mesh.LimitNamespace}, {On: mesh.LimitAddress}}},
		}
	},
	"limits-together": func(s *mesh.Service) {
		one := &mesh.LimitCounter{Service: stock, Port: 50051, Domain: "warren", Timeout: 100 * time.Millisecond}
		s.Limits = []mesh.RateLimit{
			{Name: "shop/all/0", Requests: 100, Per: time.Second, Burst: 100, CountedBy: one},
			{Name: "shop/all/1", Requests: 10, Per: time.Minute, Burst: 10, CountedBy: one, By: []mesh.LimitKey{{On: mesh.LimitPrincipal}}, Match: mesh.LimitMatch{Methods: []string{"POST"}}},
			{Name: "shop/each/0", Requests: 7, Per: time.Second, Burst: 7},
			{Name: "shop/nobody/0", Requests: 4294967295, Per: time.Hour, Burst: 1, CountedBy: &mesh.LimitCounter{Port: 8081, Domain: "other", Timeout: time.Second, FailOpen: true}},
		}
	},
	"patches": func(s *mesh.Service) { s.Patches = patched() },
	"plugins": func(s *mesh.Service) { s.Plugins = plugins() },
	// What routes of the Gateway API add: rules for a port, for the clients of a namespace, and shares that fail.
	"consumer": rules(
		mesh.HTTPRule{Name: "blog/theirs/0", From: "blog", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/")}}, Backends: []mesh.HTTPBackend{to("v2", 1)}},
		mesh.HTTPRule{Name: "news/theirs/0", From: "news", Port: 80, Matches: []mesh.HTTPMatch{{Path: text(mesh.TextExact, "/a")}}, Backends: []mesh.HTTPBackend{to("v1", 1)}},
	),
	"port": rules(
		mesh.HTTPRule{Name: "other", Port: 81, Backends: []mesh.HTTPBackend{to("v1", 1)}},
		mesh.HTTPRule{Name: "one", Port: 80, Backends: []mesh.HTTPBackend{to("v2", 1)}},
	),
	"share": rules(
		mesh.HTTPRule{Name: "partly", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/a")}}, Backends: []mesh.HTTPBackend{to("v1", 3), {Weight: 1, Invalid: "it was not found"}}},
		mesh.HTTPRule{Name: "calls", GRPC: true, Matches: []mesh.HTTPMatch{{Path: text(mesh.TextExact, "/a.B/C")}}, Backends: []mesh.HTTPBackend{to("v1", 3), {Weight: 1, Invalid: "it was not found"}}},
		mesh.HTTPRule{Name: "no-calls", GRPC: true, Invalid: "it was not found"},
	),
	"redirects": rules(
		mesh.HTTPRule{Name: "prefix", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/a")}}, Redirect: &mesh.HTTPRedirect{Prefix: ptr("/b"), Code: 302, OwnPort: true}},
		mesh.HTTPRule{Name: "slash", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/c")}}, Redirect: &mesh.HTTPRedirect{Prefix: ptr("/"), Host: "other.example", Code: 307, OwnPort: true}},
		mesh.HTTPRule{Name: "scheme", Matches: []mesh.HTTPMatch{{Path: text(mesh.TextPath, "/d")}}, Redirect: &mesh.HTTPRedirect{Scheme: "https", Host: "other.example", Code: 303, OwnPort: true}},
		mesh.HTTPRule{Name: "port", Redirect: &mesh.HTTPRedirect{Port: 8083, Code: 308, OwnPort: true}},
	),
	"route": one(mesh.HTTPRule{
		Retries: &mesh.HTTPRetries{Attempts: 4, PerTry: 2 * time.Second, Backoff: 100 * time.Millisecond, StatusCodes: []uint32{500}},
		Mirrors: []mesh.HTTPMirror{{Backend: to("v1", 0), Millionths: mesh.Million}, {Backend: to("v2", 0), Millionths: 333_333}},
		CORS:    &mesh.HTTPCORS{Origins: []mesh.TextMatch{text(mesh.TextRegex, ".*")}, Methods: []string{"*"}, MaxAge: 5 * time.Second, Answer: true},
	}),
	"cors-asked": one(mesh.HTTPRule{CORS: &mesh.HTTPCORS{Origins: []mesh.TextMatch{text(mesh.TextRegex, ".*")}, Methods: []string{"*"}, AllowHeaders: []string{"*"}, Credentials: true, Asked: true, Answer: true}}),
	"invalid":    rules(mesh.HTTPRule{Name: "bad", Invalid: "there is nothing to do"}, mesh.HTTPRule{Name: "nowhere", Backends: []mesh.HTTPBackend{{Service: mesh.ServiceName{Namespace: "shop", Hostname: "absent"}, Weight: 1}}}),
}

// withoutMetrics leaves out the loggers of [builder.metrics].
func withoutMetrics(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			v[k] = withoutMetrics(x)
		}
	case []any:
		v = slices.DeleteFunc(v, func(x any) bool {
			o, ok := x.(map[string]any)
			return ok && o["name"] == "envoy.access_loggers.stats"
		})
		for i, x := range v {
			v[i] = withoutMetrics(x)
		}
		return v
	}
	return v
}

// measured are the cases whose files have the loggers that make metrics, thousands of lines that are the same in all.
var measured = []string{"plain", "telemetry"}

// golden is what a file holds; test/interop has Envoy load it.
func golden(t *testing.T, name string, r *Resources) []byte {
	t.Helper()
	all := map[string][]any{}
	add := func(kind string, m proto.Message) {
		b, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(measured, name) {
			v = withoutMetrics(v)
		}
		all[kind] = append(all[kind], v)
	}
	for _, m := range r.Listeners {
		add("listeners", m)
	}
	for _, m := range r.Routes {
		add("routes", m)
	}
	for _, m := range r.Clusters {
		add("clusters", m)
	}
	for _, m := range r.Endpoints {
		add("endpoints", m)
	}
	for _, m := range r.Extensions {
		add("extensions", m)
	}
	for _, m := range r.Secrets {
		add("secrets", m)
	}
	b, err := yaml.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestGoldens(t *testing.T) {
	for name, change := range cases {
		t.Run(name, func(t *testing.T) {
			r, err := Build(shop(change), gateway)
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
		})
	}
}

// TestRedirectPort is the port that a redirect of the Gateway API leads to: that of its scheme, or the one that was asked.
func TestRedirectPort(t *testing.T) {
	for _, c := range []struct {
		asked uint16
		r     mesh.HTTPRedirect
		want  uint32
	}{
		{80, mesh.HTTPRedirect{}, 0},
		{8080, mesh.HTTPRedirect{}, 0}, // in the request's host
		{8080, mesh.HTTPRedirect{Host: "h"}, 8080},
		{80, mesh.HTTPRedirect{Host: "h"}, 0},
		{8080, mesh.HTTPRedirect{Scheme: "https", Host: "h"}, 0},
		{8080, mesh.HTTPRedirect{Scheme: "https"}, 443},
		{80, mesh.HTTPRedirect{Scheme: "https"}, 0},
		{80, mesh.HTTPRedirect{Scheme: "https", Port: 443}, 0},
		{80, mesh.HTTPRedirect{Port: 8083}, 8083},
		{8080, mesh.HTTPRedirect{Port: 80}, 80},
		{8080, mesh.HTTPRedirect{Port: 80, Host: "h"}, 0},
	} {
		c.r.OwnPort = true
		if got := redirectPort(chain{port: mesh.ServicePort{Port: c.asked}}, &c.r); got != c.want {
			t.Errorf("asked at %d for %+v: port %d, want %d", c.asked, c.r, got, c.want)
		}
	}
}

// TestNothingBound is a waypoint that nobody asks for yet: it is configured too, so that it can become ready.
func TestNothingBound(t *testing.T) {
	r, err := Build(shop(nil), mesh.ServiceName{Namespace: "shop", Hostname: "idle.shop.svc.cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Listeners) != 3 || len(r.Routes) != 0 || len(r.Endpoints) != 1 || len(pods(r.Endpoints[0])) != 0 {
		t.Errorf("%d listeners, %d routes, %d endpoints", len(r.Listeners), len(r.Routes), len(r.Endpoints))
	}
}

// TestOneChange has a change of a route leave everything else as it was: only what changed is sent.
func TestOneChange(t *testing.T) {
	before, err := Build(shop(cases["split"]), gateway)
	if err != nil {
		t.Fatal(err)
	}
	after, err := Build(shop(one(mesh.HTTPRule{Name: "shop/canary/0", Backends: []mesh.HTTPBackend{to("v1", 20), to("v2", 80)}})), gateway)
	if err != nil {
		t.Fatal(err)
	}
	changed := 0
	for i := range before.Routes {
		if !proto.Equal(before.Routes[i], after.Routes[i]) {
			changed++
		}
	}
	if changed != 1 {
		t.Errorf("%d route tables changed, want 1", changed)
	}
	for i := range before.Listeners {
		if !proto.Equal(before.Listeners[i], after.Listeners[i]) {
			t.Errorf("listener %s changed", before.Listeners[i].Name)
		}
	}
	for i := range before.Clusters {
		if !proto.Equal(before.Clusters[i], after.Clusters[i]) {
			t.Errorf("cluster %s changed", before.Clusters[i].Name)
		}
	}
}
