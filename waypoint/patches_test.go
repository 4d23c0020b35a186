package waypoint

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/internal/mesh"
)

const luaType = `"@type":"type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua"`

// patched has filters of requests, as EnvoyFilters bring them.
func patched() []mesh.Patch {
	p := func(op mesh.PatchOperation, filter, value string) mesh.Patch {
		return mesh.Patch{Object: "shop/f", Version: "1", At: "spec.configPatches[0]", Op: op, Filter: filter, Value: value}
	}
	all := []mesh.Patch{
		p(mesh.PatchBefore, routerFilter, `{"name":"lua","typed_config":{`+luaType+`,"inlineCode":"function envoy_on_response(h)\n  h:headers():add(\"x-lua\", \"yes\")\n  h:httpCall(\"outbound|50051||stock.shop.svc.cluster.local\", {}, nil, 10)\nend"}}`),
		p(mesh.PatchFirst, "", `{"name":"web","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}}`),
		p(mesh.PatchAfter, "envoy.filters.http.rbac", `{"name":"buffer","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer","maxRequestBytes":1024}}`),
		p(mesh.PatchBefore, "istio.stats", `{"name":"zip","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.compressor.v3.Compressor","compressor_library":{"name":"gzip","typed_config":{"@type":"type.googleapis.com/envoy.extensions.compression.gzip.compressor.v3.Gzip"}}}}`),
		p(mesh.PatchLast, "", `{"name":"asks","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz","grpc_service":{"envoy_grpc":{"cluster_name":"outbound|50051||stock.shop.svc.cluster.local"}}}}`),
		p(mesh.PatchMerge, "buffer", `{"typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer","maxRequestBytes":2048}}`),
		p(mesh.PatchFirst, "", `{"name":"gone","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}}`),
		p(mesh.PatchRemove, "gone", ""),
		p(mesh.PatchBefore, "absent", `{"name":"never","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}}`),
	}
	merge := func(to mesh.PatchedKind, value string, where mesh.Patch) {
		where.Object, where.Version, where.At, where.To, where.Op, where.Value = "shop/f", "1", "spec.configPatches[9]", to, mesh.PatchMerge, value
		all = append(all, where)
	}
	merge(mesh.PatchManager, `{"server_name":"shop","stream_idle_timeout":"1.5s"}`, mesh.Patch{})
	merge(mesh.PatchRoutes, `{"response_headers_to_remove":["server"]}`, mesh.Patch{Port: 80})
	merge(mesh.PatchHost, `{"typed_per_filter_config":{"lua":{"@type":"type.googleapis.com/envoy.extensions.filters.http.lua.v3.LuaPerRoute","source_code":{"inline_string":"function envoy_on_request(h) end"}}}}`, mesh.Patch{Host: catalog.Hostname})
	merge(mesh.PatchRoute, `{"route":{"timeout":"10s"},"typed_per_filter_config":{"buffer":{"@type":"type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute","disabled":true}}}`, mesh.Patch{Route: "default", Action: mesh.PatchForwards})
	merge(mesh.PatchRoute, `{"route":{"timeout":"11s"}}`, mesh.Patch{Action: mesh.PatchRedirects})
	merge(mesh.PatchCluster, `{"connect_timeout":"2.5s","upstream_connection_options":{"tcp_keepalive":{"keepalive_time":60}}}`, mesh.Patch{Service: catalog.Hostname, Port: 80})
	merge(mesh.PatchCluster, `{"connect_timeout":"3s"}`, mesh.Patch{Service: catalog.Hostname, Subset: "v9"})
	elsewhere := p(mesh.PatchFirst, "", all[1].Value)
	elsewhere.Port = 81
	return append(all, elsewhere)
}

func managersOf(t *testing.T, r *Resources) map[string]*hcmv3.HttpConnectionManager {
	t.Helper()
	out := map[string]*hcmv3.HttpConnectionManager{}
	for _, l := range r.Listeners {
		for _, c := range l.FilterChains {
			for _, f := range c.Filters {
				m := &hcmv3.HttpConnectionManager{}
				if f.GetTypedConfig().UnmarshalTo(m) == nil {
					out[m.StatPrefix] = m
				}
			}
		}
	}
	return out
}

// TestPatchedFilters are where they are to be: after those that decide, which are all there still and as they were.
func TestPatchedFilters(t *testing.T) {
	filters := func(change func(*mesh.Service)) (names []string, all []*hcmv3.HttpFilter) {
		r, err := Build(shop(change), gateway)
		if err != nil {
			t.Fatal(err)
		}
		all = managersOf(t, r)["inbound-vip|80|http|"+catalog.Hostname].HttpFilters
		for _, f := range all {
			names = append(names, f.Name)
		}
		return names, all
	}
	before, own := filters(nil)
	after, all := filters(func(s *mesh.Service) { s.Patches = patched() })
	decided := slices.Index(before, faultFilter)
	for i, f := range own {
		if j := slices.Index(after, f.Name); j < 0 || i < decided && i != j || !proto.Equal(f, all[j]) {
			t.Errorf("%s is not there as it was", f.Name)
		}
	}
	want := append(slices.Clone(before[:decided]), "buffer", "web", faultFilter, sessionFilter, "lua", "zip", "asks", routerFilter)
	if !slices.Equal(after, want) {
		t.Errorf("the filters are\n%v, want\n%v", after, want)
	}
}

// TestPatchesPassTheCheck are those above: what the tests make of them is what users can have.
func TestPatchesPassTheCheck(t *testing.T) {
	for _, p := range patched() {
		if err := CheckPatch(p); err != nil {
			t.Errorf("%s: %v", p.Value, err)
		}
	}
	for _, kind := range PatchFilters() {
		p := mesh.Patch{Op: mesh.PatchFirst, Value: `{"name":"x","typed_config":{"@type":"type.googleapis.com/` + kind + `"}}`}
		if err := CheckPatch(p); err != nil && strings.Contains(err.Error(), "unable to resolve") {
			t.Errorf("the program does not know %s", kind)
		}
	}
}

// TestPatchesLeftOff leaves what an Envoy refuses off, and nothing else changes by that.
func TestPatchesLeftOff(t *testing.T) {
	other := mesh.Patch{Object: "shop/other", Version: "1", Op: mesh.PatchFirst, Value: `{"name":"kept","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}}`}
	s := shop(func(s *mesh.Service) { s.Patches = append(patched(), other) })
	w := NewWriter(gateway)
	if _, err := w.Write(s, Bound(s)[gateway]); err != nil {
		t.Fatal(err)
	}
	if _, ok := w.Patched()["shop/f@1"]; !ok || len(w.Patched()) != 2 {
		t.Errorf("made are %v", w.Patched())
	}
	w.LeaveOff(map[string]string{"shop/f@1": "why"})
	r, err := w.Write(s, Bound(s)[gateway])
	if err != nil {
		t.Fatal(err)
	}
	plain, err := Build(shop(func(s *mesh.Service) { s.Patches = []mesh.Patch{other} }), gateway)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range plain.Clusters {
		if !proto.Equal(c, r.Clusters[i]) {
			t.Errorf("cluster %s is not what it is without the patches", c.Name)
		}
	}
	for i, c := range plain.Routes {
		if !proto.Equal(c, r.Routes[i]) {
			t.Errorf("routes %s are not what they are without the patches", c.Name)
		}
	}
	for i, l := range plain.Listeners {
		if !proto.Equal(l, r.Listeners[i]) {
			t.Errorf("listener %s is not what it is without the patches", l.Name)
		}
	}
	if len(w.Patched()) != 1 {
		t.Errorf("made are %v", w.Patched())
	}
}

// TestGuardedCode has the guard before code, in the first line of the code, in whatever field it is.
func TestGuardedCode(t *testing.T) {
	b := newBuilder(shop(nil), gateway)
	for _, field := range []string{`"inline_code":"CODE"`, `"default_source_code":{"inline_string":"CODE"}`, `"default_source_code":{"inline_bytes":"Q09ERQ=="}`, `"source_codes":{"a":{"inline_string":"CODE"}}`} {
		f, err := b.patchFilter(mesh.Patch{Object: "shop/f", Value: `{"name":"lua","typed_config":{` + luaType + `,` + field + `}}`})
		if err != nil {
			t.Fatal(err)
		}
		l := &luav3.Lua{}
		if err := f.GetTypedConfig().UnmarshalTo(l); err != nil {
			t.Fatal(err)
		}
		code := luaCode(l)
		if len(code) != 1 || !strings.HasPrefix(*code[0], "do local raise") || !strings.HasSuffix(*code[0], " end CODE") || strings.Contains(*code[0], "\n") {
			t.Errorf("%s becomes %v", field, l)
		}
	}
}

// TestPatchesOfGateways are for listeners by their ports and server names.
func TestPatchesOfGateways(t *testing.T) {
	in := entrance()
	for i, at := range []mesh.Patch{{Port: 80}, {ServerName: "b.example"}, {Port: 81}, {Port: 80, ServerName: "b.example"}} {
		at.Object, at.Version, at.Op = "shop/f", "1", mesh.PatchFirst
		at.Value = `{"name":"mine-` + string(rune('a'+i)) + `","typed_config":{"@type":"type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb"}}`
		in.Patches = append(in.Patches, at)
	}
	b := mesh.NewBuilder(shop(nil))
	b.PutIngress(in)
	w := NewWriter(ingress)
	s := b.Commit(2)
	r, err := w.Write(s, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for name, m := range managersOf(t, r) {
		for _, f := range m.HttpFilters {
			if strings.HasPrefix(f.Name, "mine-") {
				got[name] += f.Name
			}
		}
	}
	if len(got) != 2 || got["ingress|80|http|http/80"] != "mine-a" || got["ingress|443|http|https/443/b"] != "mine-b" {
		t.Errorf("filters: %v", got)
	}
	if _, ok := w.Patched()["shop/f@1"]; !ok {
		t.Errorf("made are %v", w.Patched())
	}
}

// TestMergedPatches are merged as Istio does it: durations as a whole, and what a route does only where it does that.
func TestMergedPatches(t *testing.T) {
	w := NewWriter(gateway)
	s := shop(func(s *mesh.Service) { s.Patches = patched() })
	r, err := w.Write(s, Bound(s)[gateway])
	if err != nil {
		t.Fatal(err)
	}
	m := managersOf(t, r)["inbound-vip|80|http|"+catalog.Hostname]
	if m.ServerName != "shop" || m.StreamIdleTimeout.AsDuration() != 1500*time.Millisecond || !m.GetUseRemoteAddress().GetValue() {
		t.Errorf("connections: %q %v", m.ServerName, m.StreamIdleTimeout.AsDuration())
	}
	for _, c := range r.Clusters {
		want := connectTimeout
		if strings.HasSuffix(c.Name, "|http|"+catalog.Hostname) {
			want = 2500 * time.Millisecond
		}
		if got := c.ConnectTimeout.AsDuration(); got != want && c.Name != hboneCluster {
			t.Errorf("cluster %s waits for %v, want %v", c.Name, got, want)
		}
	}
	for _, table := range r.Routes {
		mine := strings.Contains(table.Name, catalog.Hostname)
		if slices.Contains(table.ResponseHeadersToRemove, "server") != mine {
			t.Errorf("table %s: %v", table.Name, table.ResponseHeadersToRemove)
		}
		for _, route := range table.VirtualHosts[0].Routes {
			if f := route.GetRoute(); f != nil && (f.Timeout.AsDuration() == 10*time.Second) != mine {
				t.Errorf("route %s of %s waits for %v", route.Name, table.Name, f.Timeout.AsDuration())
			}
		}
	}
	for kind, want := range map[string]bool{resource.ListenerType: true, resource.RouteType: true, resource.ClusterType: true, resource.SecretType: false} {
		if _, got := w.Patched()["shop/f@1"][kind]; got != want {
			t.Errorf("made of %s: %t", kind, got)
		}
	}
}

// TestPatchesThatFail are left off as a whole, and nothing is written with them.
func TestPatchesThatFail(t *testing.T) {
	bad := mesh.Patch{Object: "shop/f", Version: "1", At: "spec.configPatches[0]", To: mesh.PatchManager, Op: mesh.PatchMerge, Value: `{"max_request_headers_kb":100000}`}
	s := shop(func(s *mesh.Service) { s.Patches = append(patched()[:1], bad) })
	w := NewWriter(gateway)
	_, err := w.Write(s, Bound(s)[gateway])
	var fails *PatchError
	if !errors.As(err, &fails) || fails.Key != "shop/f@1" || !strings.Contains(fails.Text, "MaxRequestHeadersKb") {
		t.Fatalf("%v", err)
	}
	w.LeaveOff(map[string]string{fails.Key: fails.Text})
	if _, err := w.Write(s, Bound(s)[gateway]); err != nil || len(w.Patched()) > 0 {
		t.Errorf("without it: %v %v", err, w.Patched())
	}
}
