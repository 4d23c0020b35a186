package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// addsHeader is the example that articles about EnvoyFilters print, for the pods of a gateway.
const addsHeader = `
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: lua, namespace: OWN}
spec:
  WHOM
  configPatches:
  - applyTo: HTTP_FILTER
    match:
      context: CONTEXT
      listener:
        filterChain:
          filter:
            name: envoy.filters.network.http_connection_manager
            subFilter:
              name: envoy.filters.http.router
    patch:
      operation: INSERT_BEFORE
      value:
        name: envoy.filters.http.lua
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
          inlineCode: |
            CODE
`

// luaFilter is that for somebody, with some code.
func luaFilter(ns, whom, context, code string) string {
	return strings.NewReplacer("OWN", ns, "WHOM", whom, "CONTEXT", context, "CODE", code).Replace(addsHeader)
}

const luaAnswer = `function envoy_on_response(handle) handle:headers():add("x-lua", "yes") end`

// answersWithLua wants the header that luaAnswer adds in an answer of a gateway.
func answersWithLua(t *testing.T, address, what string) {
	t.Helper()
	answersWith(t, address, what, "x-lua", "yes")
}

// answersWith wants a header in an answer of a gateway.
func answersWith(t *testing.T, address, what, header, value string) {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return mesh.DialOutside(ctx, network, net.JoinHostPort(address, "80"))
	}}}
	res, err := client.Get("http://anything.example/stock")
	must(t, err)
	_, err = io.Copy(io.Discard, res.Body)
	must(t, err)
	res.Body.Close()
	if res.StatusCode != 200 || res.Header.Get(header) != value {
		t.Errorf("%s: %d %v", what, res.StatusCode, res.Header)
	}
}

// A waypoint and gateways run what an EnvoyFilter brings; one that would take a policy's filter away does nothing, and one
// that Envoy refuses is left off, with what else there is going on.
func TestEnvoyFilters(t *testing.T) {
	ns := behindWaypoint(t, "e2e-envoyfilters", 1, "client")
	ctx := t.Context()
	balance(t)
	apply := func(whom, context, code string) {
		t.Helper()
		must(t, mesh.Apply(ctx, luaFilter(ns, whom, context, code)))
	}
	atService := `targetRefs: [{group: "", kind: Service, name: inventory}]`
	apply(atService, "SIDECAR_INBOUND", `function envoy_on_request(handle) handle:respond({[":status"] = "418"}, "short and stout") end`)
	enforced(t, ns, "envoyfilter/lua")
	asked := func() string {
		out, err := mesh.Exec(ctx, ns, "client", "/demo", "get", "http://inventory/stock")
		return out + fmt.Sprint(err)
	}
	if out := asked(); !strings.Contains(out, "short and stout") {
		t.Errorf("a waypoint does not run the code: %s", out)
	}
	says := func(kind, want string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			said, err := mesh.Kubectl(ctx, "-n", ns, "get", "envoyfilter", "lua", "-o", `jsonpath={range .status.conditions[*]}{.type}={.status},{.reason}: {.message}{"\n"}{end}`)
			if err == nil && !strings.Contains(said, kind+"="+want) {
				err = fmt.Errorf("%s", said)
			}
			return err
		}))
	}
	apply(atService, "SIDECAR_INBOUND", `function that is none`)
	says("Enforced", "False,NodesRefuse")
	if out := asked(); strings.Contains(out, "short and stout") || !strings.HasSuffix(out, "<nil>") {
		t.Errorf("with code that Envoy refuses: %s", out)
	}
	must(t, mesh.Apply(ctx, strings.ReplaceAll(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: NS}
spec: {targetRefs: [{kind: Service, name: inventory}], action: DENY, rules: [{to: [{operation: {paths: [/stock]}}]}]}
`, "NS", ns)))
	enforced(t, ns, "authorizationpolicy/nobody")
	if out := asked(); !strings.Contains(out, "403") {
		t.Errorf("a policy that came meanwhile does not hold: %s", out)
	}
	must(t, mesh.Apply(ctx, strings.ReplaceAll(`
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: lua, namespace: NS}
spec:
  targetRefs: [{group: "", kind: Service, name: inventory}]
  configPatches:
  - applyTo: HTTP_FILTER
    match: {listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager, subFilter: {name: warren.deny}}}}}
    patch: {operation: REMOVE}
`, "NS", ns)))
	says("Accepted", "False,Invalid: nothing of it is made, because of spec.configPatches[0].patch.operation: warren.deny is one of Warren's own")
	if out := asked(); !strings.Contains(out, "403") {
		t.Errorf("an EnvoyFilter opens what a policy closes: %s", out)
	}
	if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "authorizationpolicy/nobody", "envoyfilter/lua"); err != nil {
		t.Fatal(err, out)
	}

	t.Run("gateway", func(t *testing.T) {
		address := edgeOf(t, ns, "inventory")
		outside{address: address}.becomes(t, "http://shop.example/stock", 200)
		for _, whom := range []string{
			`targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: edge}]`,
			`workloadSelector: {labels: {gateway.networking.k8s.io/gateway-name: edge}}`,
		} {
			apply(whom, "GATEWAY", luaAnswer)
			enforced(t, ns, "envoyfilter/lua")
			answersWithLua(t, address, whom)
			if out, err := mesh.Kubectl(ctx, "-n", ns, "delete", "envoyfilter/lua"); err != nil {
				t.Fatal(err, out)
			}
		}
	})
}
