package interop

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	metav1alpha1 "istio.io/api/meta/v1alpha1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// judged reports whether what is said of an object of a generation is what is wanted, by the types of conditions.
func judged(all []*metav1alpha1.IstioCondition, generation int64, want func(map[string]string) bool) error {
	said := map[string]string{}
	for _, c := range all {
		if c.ObservedGeneration == generation {
			said[c.Type] = c.Status + " " + c.Reason + ": " + c.Message
		}
	}
	if !want(said) {
		return fmt.Errorf("%v", said)
	}
	return nil
}

// holds wants conditions to begin with these words.
func holds(accepted, enforced string) func(map[string]string) bool {
	return func(said map[string]string) bool {
		return strings.HasPrefix(said["Accepted"], accepted) && strings.HasPrefix(said["Enforced"], enforced)
	}
}

// waypointPatches has a waypoint run code of EnvoyFilters, keep it from what is the proxy's own, and do without what Envoy refuses.
func waypointPatches(t *testing.T, istio *istiofake.Clientset, guarded func(name, spec string), ask func(authority, path string, headers ...string) (*http.Response, string, error)) {
	ctx := t.Context()
	api := istio.NetworkingV1alpha3().EnvoyFilters("shop")
	generation := int64(0)
	apply := func(name, spec string, want func(map[string]string) bool) {
		t.Helper()
		generation++
		f := &networkingv1alpha3.EnvoyFilter{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Generation: generation}}
		if err := yaml.Unmarshal([]byte(spec), &f.Spec); err != nil {
			t.Fatal(err)
		}
		_ = api.Delete(ctx, name, metav1.DeleteOptions{}) // there may be none
		if _, err := api.Create(ctx, f, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, name+" to be judged", time.Minute, func() error {
			f, err := api.Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			return judged(f.Status.Conditions, generation, want)
		})
	}
	lua := func(code string) string {
		return `targetRefs: [{kind: Service, name: inventory}]
configPatches:
- applyTo: HTTP_FILTER
  match:
    context: SIDECAR_INBOUND
    listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager, subFilter: {name: envoy.filters.http.router}}}}
  patch:
    operation: INSERT_BEFORE
    value:
      name: envoy.lua
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
        inlineCode: |
          ` + strings.ReplaceAll(strings.TrimSpace(code), "\n", "\n          ") + "\n"
	}
	// says is what the code below puts into a header of the answer.
	says := func(path string) (string, int) {
		t.Helper()
		res, body, err := ask("10.96.0.9:80", path)
		if err != nil {
			t.Fatal(err, body)
		}
		return res.Header.Get("x-lua"), res.StatusCode
	}

	apply("code", lua(`
function envoy_on_request(handle)
  handle:headers():add("x-from-lua", handle:headers():get(":path"))
end
function envoy_on_response(handle)
  handle:headers():add("x-lua", "yes")
end`), holds("True Accepted", "True Enforced"))
	res, body, err := ask("10.96.0.9:80", "/items")
	if err != nil || res.Header.Get("x-lua") != "yes" || !strings.Contains(body, "X-From-Lua: /items") {
		t.Fatalf("the code does not run: %v %v\n%s", err, res, body)
	}

	// Who may ask is decided before, whatever the code says of a request.
	guarded("no-lua", "action: DENY\n"+`rules: [{to: [{operation: {paths: ["/no*"]}}]}]`)
	apply("code", lua(`
function envoy_on_request(handle)
  handle:headers():replace(":path", "/yes")
end`), holds("True Accepted", "True Enforced"))
	if _, code := says("/no"); code != 403 {
		t.Errorf("what is denied is answered with %d, because code names it in another way", code)
	}
	if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(ctx, "no-lua", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	// Code gets nothing that is the proxy's own: what would be nil is "nil" in the answer.
	apply("code", lua(`
local kinds = {}
for _, name in ipairs({"io", "package", "require", "module", "debug", "jit", "ffi", "load", "loadstring", "loadfile", "dofile", "getfenv", "setfenv", "newproxy"}) do
  if _G[name] ~= nil then kinds[#kinds + 1] = name end
end
if os.execute or os.getenv or os.remove or string.dump or type(os.time()) ~= "number" then kinds[#kinds + 1] = "os" end
if pcall(setmetatable, _G, {}) then kinds[#kinds + 1] = "setmetatable" end
if pcall(rawset, _G, "envoy_on_response", print) then kinds[#kinds + 1] = "rawset" end
counter = 0
function envoy_on_response(handle) handle:headers():add("x-lua", "replaced") end
function envoy_on_response(handle)
  counter = counter + 1
  local function try(cluster)
    local ok, why = pcall(function() return handle:httpCall(cluster, {[":method"] = "POST", [":path"] = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets", [":authority"] = "x"}, "", 1000) end)
    if ok or not string.find(why, "outbound|port||host alone", 1, true) then kinds[#kinds + 1] = tostring(cluster) .. tostring(why) end
  end
  for _, cluster in ipairs({"agent", "hbone", "main_internal", "outbound|80|http|inventory.shop.svc.cluster.local"}) do try(cluster) end
  try({})
  handle:headers():add("x-lua", "got " .. table.concat(kinds, ","))
end`), holds("True Accepted", "True Enforced"))
	if got, code := says("/"); got != "got" || code != 200 {
		t.Errorf("code gets what is the proxy's own: %q %d", got, code)
	}

	// It may ask a Service of the mesh, by the name that Istio has for it.
	apply("code", lua(`
function envoy_on_request(handle)
  local headers, body = handle:httpCall("outbound|9001||authz.shop.svc.cluster.local", {[":method"] = "GET", [":path"] = "/asked", [":authority"] = "authz"}, nil, 5000)
  handle:headers():add("x-authz", headers[":status"])
end`), holds("True Accepted", "True Enforced"))
	if _, body, err := ask("10.96.0.9:80", "/"); err != nil || !strings.Contains(body, "X-Authz: ") || strings.Contains(body, "X-Authz: 503") {
		t.Errorf("a Service is not asked: %v\n%s", err, body)
	}

	// What Envoy refuses is left off, and the rest goes on: also what another EnvoyFilter brings.
	apply("other", strings.ReplaceAll(lua(`function envoy_on_response(handle) handle:headers():add("x-lua", "other") end`), "envoy.lua", "other"), holds("True Accepted", "True Enforced"))
	apply("code", lua(`function this is no code`), holds("True Accepted", "False NodesRefuse"))
	if got, code := says("/"); got != "other" || code != 200 {
		t.Errorf("with code that Envoy refuses it says %q %d", got, code)
	}
	guarded("while-refused", "action: DENY\n"+`rules: [{to: [{operation: {paths: ["/no*"]}}]}]`)
	if _, code := says("/no"); code != 403 {
		t.Errorf("a policy that came while a patch was refused does not hold: %d", code)
	}
	if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(ctx, "while-refused", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	apply("code", lua(`function envoy_on_response(handle) handle:headers():add("x-mended", "yes") end`), holds("True Accepted", "True Enforced"))
	if res, _, err := ask("10.96.0.9:80", "/"); err != nil || res.Header.Get("x-mended") != "yes" || res.Header.Get("x-lua") != "other" {
		t.Errorf("mended code does not run: %v %v", err, res)
	}
	// Routes, what is done with connections, and clusters, of which Envoy may refuse each.
	apply("code", `targetRefs: [{kind: Service, name: inventory}]
configPatches:
- {applyTo: NETWORK_FILTER, match: {listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager}}}}, patch: {operation: MERGE, value: {typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, server_name: patched, server_header_transformation: APPEND_IF_ABSENT}}}}
- {applyTo: VIRTUAL_HOST, patch: {operation: MERGE, value: {response_headers_to_add: [{header: {key: x-host, value: "yes"}}], typed_per_filter_config: {other: {"@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.LuaPerRoute, source_code: {inline_string: 'function envoy_on_response(handle) handle:headers():add("x-lua", io == nil and "route" or "io") end'}}}}}}
- {applyTo: HTTP_ROUTE, match: {routeConfiguration: {vhost: {route: {action: ROUTE}}}}, patch: {operation: MERGE, value: {response_headers_to_add: [{header: {key: x-route, value: "yes"}}], route: {timeout: 7s}}}}
- {applyTo: CLUSTER, match: {cluster: {service: inventory.shop.svc.cluster.local}}, patch: {operation: MERGE, value: {connect_timeout: 1.5s}}}
`, holds("True Accepted", "True Enforced"))
	res, body, err = ask("10.96.0.9:80", "/")
	if err != nil || res.Header.Get("server") != "patched" || res.Header.Get("x-host") != "yes" || res.Header.Get("x-route") != "yes" || res.Header.Get("x-lua") != "route" {
		t.Errorf("what is merged does not hold: %v %v\n%s", err, res, body)
	}
	apply("code", strings.Replace(lua(`x = 1`), "configPatches:", `configPatches:
- {applyTo: VIRTUAL_HOST, patch: {operation: MERGE, value: {typed_per_filter_config: {other: {"@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.LuaPerRoute, source_code: {inline_string: 'function is'}}}}}}`, 1), holds("True Accepted", "False NodesRefuse"))
	if got, code := says("/"); got != "other" || code != 200 {
		t.Errorf("with routes that Envoy refuses it says %q %d", got, code)
	}

	// What is refused at once is not sent.
	apply("code", strings.Replace(lua(`x = 1`), "inlineCode: |", "inlnCode: |", 1), holds("False Invalid: nothing of it is made, because of spec.configPatches[0].patch.value", "False UnsupportedValue"))
	if got, code := says("/"); got != "other" || code != 200 {
		t.Errorf("with what is refused it says %q %d", got, code)
	}
	for _, name := range []string{"code", "other"} {
		if err := api.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "no EnvoyFilter", time.Minute, func() error {
		if got, code := says("/"); got != "" || code != 200 {
			return fmt.Errorf("%q %d", got, code)
		}
		return nil
	})
}
