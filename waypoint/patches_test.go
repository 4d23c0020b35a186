package waypoint

import (
	"slices"
	"strings"
	"testing"

	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
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
	names := func(change func(*mesh.Service)) (out []string) {
		r, err := Build(shop(change), gateway)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range managersOf(t, r)["inbound-vip|80|http|"+catalog.Hostname].HttpFilters {
			out = append(out, f.Name)
		}
		return out
	}
	before := names(nil)
	after := names(func(s *mesh.Service) { s.Patches = patched() })
	decided := slices.Index(before, faultFilter)
	want := append(slices.Clone(before[:decided]), "buffer", "web", faultFilter, "lua", "zip", "asks", routerFilter)
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
