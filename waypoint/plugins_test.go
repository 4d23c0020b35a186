package waypoint

import (
	"os"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// teapot is a module that proxies run.
func teapot() *mesh.Module {
	b, err := os.ReadFile("../examples/wasm/teapot.wasm")
	if err != nil {
		panic(err)
	}
	return &mesh.Module{Digest: "of the teapot", Code: b}
}

// plugins are one of each phase, of which two have no module and one is for another port.
func plugins() []mesh.Plugin {
	m := teapot()
	return []mesh.Plugin{
		{Object: "shop/last", Version: "1", Root: "one", Config: `{"x":1}`, Module: m},
		{Object: "shop/counts", Version: "1", Phase: mesh.PluginStats, Fails: mesh.PluginOpens, Module: m},
		{Object: "shop/elsewhere", Version: "1", Ports: []uint16{81, 8080}, Module: m},
		{Object: "istio-system/judges", Version: "1", Phase: mesh.PluginAuthZ, Fails: mesh.PluginReloads, Module: m,
			Env: []mesh.PluginEnv{{Name: "WHO", Value: "me"}}, Ports: []uint16{80}},
		{Object: "shop/who", Version: "1", Phase: mesh.PluginAuthN},
		{Object: "shop/perhaps", Version: "1", Phase: mesh.PluginAuthN, Fails: mesh.PluginOpens},
	}
}

// filtersAt are the names of the filters of requests to the catalog.
func filtersAt(t *testing.T, r *Resources) (names []string) {
	t.Helper()
	for _, f := range managersOf(t, r)["inbound-vip|80|http|"+catalog.Hostname].HttpFilters {
		names = append(names, f.Name)
	}
	return names
}

func TestPluginsStandWhereTheirPhaseSays(t *testing.T) {
	r, err := Build(shop(func(s *mesh.Service) { s.Plugins = plugins() }), gateway)
	if err != nil {
		t.Fatal(err)
	}
	names := filtersAt(t, r)
	at := func(name string) int {
		i := slices.IndexFunc(names, func(n string) bool { return n == name || strings.HasSuffix(n, "wasmplugin/"+name) })
		if i < 0 {
			t.Errorf("there is no %s among %q", name, names)
		}
		return i
	}
	order := []string{"shop.who", "shop.perhaps", tokenFilter, "istio-system.judges", auditFilter, customFilter, askFilter, denyFilter, allowFilter, corsFilter, "shop.counts", "shop.last", faultFilter, routerFilter}
	for i := range order[1:] {
		if at(order[i]) >= at(order[i+1]) {
			t.Errorf("%s does not come before %s: %q", order[i], order[i+1], names)
		}
	}
	if slices.ContainsFunc(names, func(n string) bool { return strings.Contains(n, "elsewhere") }) {
		t.Errorf("a plugin for other ports is there: %q", names)
	}
}

// extension is a filter that has a resource of its own.
func extension(t *testing.T, r *Resources, name string) *corev3.TypedExtensionConfig {
	t.Helper()
	i := slices.IndexFunc(r.Extensions, func(e *corev3.TypedExtensionConfig) bool { return e.Name == pluginPrefix+name })
	if i < 0 {
		t.Fatalf("there is no %s", name)
	}
	return r.Extensions[i]
}

// TestPluginsAreWrittenOnce has one resource for a module at several ports of several services, the same one while nothing of it
// changes, and one that refuses while the module does not run.
func TestPluginsAreWrittenOnce(t *testing.T) {
	p := mesh.Plugin{Object: "shop/last", Version: "1", Module: teapot()}
	with := func(p mesh.Plugin, more ...mesh.RateLimit) *mesh.Snapshot {
		return shop(func(s *mesh.Service) {
			s.Plugins, s.Limits = []mesh.Plugin{p}, more
			s.Ports = append(s.Ports, mesh.ServicePort{Port: 81, Target: 81, App: mesh.AppHTTP1})
		})
	}
	w := NewWriter(gateway)
	write := func(s *mesh.Snapshot) *Resources {
		t.Helper()
		r, err := w.Write(s, Bound(s)[gateway])
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, e := range r.Extensions {
			if e.Name == pluginPrefix+"shop.last" {
				n++
			}
		}
		if n != 1 {
			t.Fatalf("%d resources of a plugin", n)
		}
		return r
	}
	first := extension(t, write(with(p)), "shop.last")
	if _, ok := w.Patched()[p.Key()][resource.ExtensionConfigType]; !ok {
		t.Error("it is not said that the plugin is there")
	}
	again := p
	again.Module = teapot() // another one that is the same
	if extension(t, write(with(again, mesh.RateLimit{Name: "shop/a/0", Requests: 1, Per: 1e9, Burst: 1})), "shop.last") != first {
		t.Error("it is written anew because something else is")
	}
	told := p
	told.Version, told.Config = "2", "{}"
	if extension(t, write(with(told)), "shop.last") == first {
		t.Error("what it is told is not written")
	}
	w.LeaveOff(map[string]string{told.Key(): "Envoy refuses it"})
	for what, p := range map[string]mesh.Plugin{"is left off": told, "has no module": {Object: p.Object, Version: "3"}} {
		e := extension(t, write(with(p)), "shop.last")
		if !strings.HasSuffix(e.TypedConfig.TypeUrl, ".lua.v3.Lua") || !strings.Contains(string(e.TypedConfig.Value), "503") {
			t.Errorf("what %s does not refuse: %s", what, e.TypedConfig.TypeUrl)
		}
		if len(w.Patched()) > 0 {
			t.Errorf("what %s is said to be there", what)
		}
		p.Fails = mesh.PluginOpens
		if e := extension(t, write(with(p)), "shop.last"); !strings.HasSuffix(e.TypedConfig.TypeUrl, ".rbac.v3.RBAC") || len(e.TypedConfig.Value) > 0 {
			t.Errorf("what %s does not let pass: %v", what, e)
		}
	}
}
