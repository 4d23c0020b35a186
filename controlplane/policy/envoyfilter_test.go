package policy

import (
	"strings"
	"testing"

	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

func filterOf(t *testing.T, patches string) CompiledPatches {
	t.Helper()
	f := &networkingv1alpha3.EnvoyFilter{}
	if err := yaml.Unmarshal([]byte("metadata: {namespace: shop, name: f}\nspec: {targetRefs: [{kind: Service, name: ui}], configPatches: "+patches+"}"), f); err != nil {
		t.Fatal(err)
	}
	return CompileEnvoyFilter(f, waypoint.CheckPatch)
}

// TestPatchesThatAreRefused are those that would undo what the mesh decides, lead to what is the proxy's own, or mean nothing. Of
// an object with one of them nothing is made.
func TestPatchesThatAreRefused(t *testing.T) {
	const fine = `{applyTo: HTTP_FILTER, patch: {operation: ADD, value: {name: web, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb}}}}`
	at := func(op, sub, value string) string {
		return `{applyTo: HTTP_FILTER, match: {listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager, subFilter: {name: ` + sub + `}}}}}, patch: {operation: ` + op + value + `}}`
	}
	filter := func(kind, fields string) string {
		return `, value: {name: mine, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.` + kind + fields + `}}`
	}
	web := filter("grpc_web.v3.GrpcWeb", "")
	manager := func(fields string) string {
		return `{applyTo: NETWORK_FILTER, match: {listener: {filterChain: {filter: {name: envoy.filters.network.http_connection_manager}}}}, patch: {operation: MERGE, value: {typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, ` + fields + `}}}}`
	}
	if c := filterOf(t, "["+fine+"]"); len(c.Problems) > 0 || len(c.Waypoints) != 1 {
		t.Fatalf("what is fine is refused: %v", c.Problems)
	}
	for _, c := range []struct{ patch, want string }{
		{at("REMOVE", "envoy.filters.http.ext_authz", ""), "patch.operation: envoy.filters.http.ext_authz is one of Warren's own"},
		{at("REMOVE", "warren.deny", ""), "patch.operation: warren.deny is one of"},
		{at("REPLACE", "warren.allow", web), "patch.operation: warren.allow is one of"},
		{at("MERGE", "envoy.filters.http.router", filter("router.v3.Router", ", suppress_envoy_headers: false")), "patch.operation: envoy.filters.http.router is one of"},
		{at("REMOVE", "envoy.filters.http.jwt_authn", ""), "patch.operation: envoy.filters.http.jwt_authn is one of"},
		{at("MERGE", "other", web), "patch.value.name: a filter keeps its name"},
		{at("INSERT_FIRST", "x", filter("header_to_metadata.v3.Config", ", request_rules: [{header: x, on_header_present: {metadata_namespace: warren.peer, key: a}}]")), "metadata_namespace: warren.peer is what"},
		{at("INSERT_BEFORE", "envoy.filters.http.jwt_authn", web), "patch.operation: before envoy.filters.http.jwt_authn it would change"},
		{at("INSERT_BEFORE", "envoy.filters.http.rbac", web), "patch.operation: before"},
		{at("INSERT_AFTER", "envoy.filters.http.router", web), "patch.operation: nothing comes after"},
		{at("INSERT_FIRST", "x", `, value: {name: warren.deny, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC}}`), "patch.value.name: warren.deny is the name"},
		{at("INSERT_FIRST", "x", `, value: {name: "ingress|80|tokens|http/80", typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC}}`), "patch.value.name: ingress|80|tokens|http/80 is the name"},
		{at("INSERT_FIRST", "x", filter("set_filter_state.v3.Config", "")), "a filter of type envoy.extensions.filters.http.set_filter_state.v3.Config cannot be brought"},
		{at("INSERT_FIRST", "x", filter("nothing.v3.Nothing", "")), "unable to resolve"},
		{at("INSERT_FIRST", "x", filter("buffer.v3.Buffer", ", max_requst_bytes: 1")), `unknown field "max_requst_bytes"`},
		{at("INSERT_FIRST", "x", filter("buffer.v3.Buffer", ", max_request_bytes: 0")), "invalid Buffer.MaxRequestBytes"},
		{at("INSERT_FIRST", "x", `, value: {name: mine, config_discovery: {config_source: {ads: {}}, type_urls: [a]}}`), "patch.value.config_discovery: filters come from"},
		{at("INSERT_FIRST", "x", ""), "patch.value: it is missing"},
		{at("INSERT_FIRST", "x", filter("lua.v3.Lua", ", default_source_code: {filename: /etc/passwd}")), "patch.value.typed_config.default_source_code: files and variables"},
		{at("INSERT_FIRST", "x", filter("lua.v3.Lua", ", source_codes: {a: {environment_variable: HOME}}")), "typed_config.source_codes[a]: files and variables"},
		{at("INSERT_FIRST", "x", filter("grpc_json_transcoder.v3.GrpcJsonTranscoder", ", services: [a], proto_descriptor: /etc/passwd")), "proto_descriptor: files are the proxy's own"},
		{at("INSERT_FIRST", "x", filter("lua.v3.Lua", ", package_paths: [/x]")), "package_paths: files are the proxy's own"},
		{at("INSERT_FIRST", "x", filter("lua.v3.Lua", ", shared_vm_id: a")), "shared_vm_id: code is run apart"},
		{at("INSERT_FIRST", "x", filter("ext_authz.v3.ExtAuthz", ", grpc_service: {envoy_grpc: {cluster_name: agent}}")), "typed_config.grpc_service.envoy_grpc.cluster_name: agent is not outbound|port||host"},
		{at("INSERT_FIRST", "x", filter("ext_authz.v3.ExtAuthz", ", grpc_service: {google_grpc: {target_uri: a, stat_prefix: a}}")), "a GoogleGrpc leads"},
		{at("INSERT_FIRST", "x", filter("ext_proc.v3.ExternalProcessor", ", grpc_service: {envoy_grpc: {cluster_name: hbone}}")), "hbone is not outbound|port||host"},
		{at("INSERT_FIRST", "x", filter("header_mutation.v3.HeaderMutation", `, mutations: {request_mutations: [{append: {header: {key: x, value: "%ENVIRONMENT(HOME)%"}}}]}`)), "reads what is the proxy's own"},
		{at("INSERT_FIRST", "x", filter("compressor.v3.Compressor", `, compressor_library: {name: x, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer}}`)), "an extension of type"},
		{`{applyTo: LISTENER, patch: {operation: REMOVE}}`, "applyTo: LISTENER is not supported yet"},
		{`{applyTo: CLUSTER, patch: {operation: REMOVE}}`, "patch.operation: REMOVE is not supported yet for CLUSTER"},
		{`{applyTo: CLUSTER, patch: {operation: ADD, value: {name: x}}}`, "patch.operation: ADD is not supported yet for CLUSTER"},
		{`{applyTo: CLUSTER, match: {cluster: {name: agent}}, patch: {operation: MERGE, value: {connect_timeout: 1s}}}`, "match.cluster.name"},
		{`{applyTo: CLUSTER, patch: {operation: MERGE, value: {transport_socket: {name: x}}}}`, "patch.value.transport_socket: it is Warren's own"},
		{`{applyTo: CLUSTER, patch: {operation: MERGE, value: {load_assignment: {cluster_name: x}}}}`, "patch.value.load_assignment: it is"},
		{`{applyTo: NETWORK_FILTER, patch: {operation: MERGE, value: {typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy}}}}`, "patch.value.typed_config: of network filters"},
		{manager("use_remote_address: false"), "patch.value.use_remote_address: it is"},
		{manager("forward_client_cert_details: ALWAYS_FORWARD_ONLY"), "patch.value.forward_client_cert_details: it is"},
		{manager("http_filters: [{name: x}]"), "patch.value.http_filters: it is"},
		{manager("normalize_path: false"), "patch.value.normalize_path: it is"},
		{manager("route_config: {name: x}"), "patch.value.route_config: it is"},
		{manager("early_header_mutation_extensions: [{name: x}]"), "patch.value.early_header_mutation_extensions: it is"},
		{`{applyTo: VIRTUAL_HOST, patch: {operation: MERGE, value: {domains: ["*"]}}}`, "patch.value.domains: it is"},
		{`{applyTo: VIRTUAL_HOST, patch: {operation: MERGE, value: {typed_per_filter_config: {warren.deny: {"@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBACPerRoute}}}}}`, "patch.value.typed_per_filter_config[warren.deny]: it is the name"},
		{`{applyTo: ROUTE_CONFIGURATION, patch: {operation: MERGE, value: {typed_per_filter_config: {envoy.filters.http.ext_authz: {"@type": type.googleapis.com/envoy.config.route.v3.FilterConfig, disabled: true}}}}}`, "patch.value.typed_per_filter_config[envoy.filters.http.ext_authz]: it is the name"},
		{`{applyTo: HTTP_ROUTE, patch: {operation: MERGE, value: {typed_per_filter_config: {"inbound-vip|80|limits|x": {"@type": type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit, stat_prefix: x}}}}}`, "it is the name of one of Warren's own"},
		{`{applyTo: HTTP_ROUTE, patch: {operation: MERGE, value: {route: {cluster: hbone}}}}`, "patch.value.route.cluster: it is"},
		{`{applyTo: HTTP_ROUTE, patch: {operation: MERGE, value: {redirect: {host_redirect: x}}}}`, "patch.value.redirect: it is"},
		{`{applyTo: HTTP_ROUTE, patch: {operation: MERGE, value: {match: {prefix: /}}}}`, "patch.value.match: it is"},
		{`{applyTo: HTTP_ROUTE, patch: {operation: MERGE, value: {typed_per_filter_config: {mine: {"@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.LuaPerRoute, source_code: {filename: /etc/passwd}}}}}}`, "files and variables"},
		{`{applyTo: HTTP_ROUTE, patch: {operation: MERGE, value: {response_headers_to_add: [{header: {key: x, value: "%ENVIRONMENT(HOME)%"}}]}}}`, "reads what is the proxy's own"},
		{`{applyTo: HTTP_ROUTE, match: {listener: {portNumber: 80}}, patch: {operation: MERGE, value: {}}}`, "match.listener"},
		{`{applyTo: HTTP_ROUTE, match: {routeConfiguration: {name: x}}, patch: {operation: MERGE, value: {}}}`, "match.routeConfiguration.name"},
		{`{applyTo: VIRTUAL_HOST, match: {routeConfiguration: {vhost: {name: "a.example:x"}}}, patch: {operation: MERGE, value: {}}}`, "match.routeConfiguration.vhost.name"},
		{`{applyTo: HTTP_FILTER, match: {proxy: {metadata: {a: b}}}, patch: {operation: ADD}}`, "match.proxy.metadata"},
		{`{applyTo: HTTP_FILTER, match: {proxy: {proxyVersion: "("}}, patch: {operation: ADD}}`, "match.proxy.proxyVersion"},
		{`{applyTo: HTTP_FILTER, match: {listener: {name: virtualInbound}}, patch: {operation: ADD}}`, "match.listener.name"},
		{`{applyTo: HTTP_FILTER, match: {listener: {portNumber: 70000}}, patch: {operation: ADD}}`, "match.portNumber"},
		{`{applyTo: HTTP_FILTER, match: {cluster: {}}, patch: {operation: ADD}}`, "match.cluster"},
		{`{applyTo: HTTP_FILTER, match: {listener: {filterChain: {filter: {name: envoy.filters.network.tcp_proxy}}}}, patch: {operation: ADD}}`, "match.filter.name"},
	} {
		got := filterOf(t, "["+fine+", "+c.patch+"]")
		if len(got.Gateways)+len(got.Waypoints) != 0 || len(got.Problems) != 1 || !strings.HasPrefix(got.Problems[0], "spec.configPatches[1].") || !strings.Contains(got.Problems[0], c.want) {
			t.Errorf("%s\nwant %s\ngot %d patches and %v", c.patch, c.want, len(got.Waypoints), got.Problems)
		}
	}
}

// TestPatchesForSome are for proxies of another version, or for sidecars: they are none of ours, and no mistake.
func TestPatchesForSome(t *testing.T) {
	patch := func(match string) string {
		return `[{applyTo: HTTP_FILTER, match: {` + match + `}, patch: {operation: INSERT_FIRST, value: {name: web, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb}}}}]`
	}
	for _, c := range []struct {
		match               string
		gateways, waypoints int
		note                string
	}{
		{"context: ANY", 1, 1, "after what verifies tokens"},
		{"context: GATEWAY", 1, 0, "after what verifies tokens"},
		{"context: SIDECAR_INBOUND", 0, 1, "after what verifies tokens"},
		{"context: SIDECAR_OUTBOUND", 0, 0, "sidecars"},
		{`proxy: {proxyVersion: '^1\.20.*'}`, 0, 0, "not for proxies of Istio"},
		{`proxy: {proxyVersion: '^1\.31.*'}`, 1, 1, "after what verifies tokens"},
	} {
		got := filterOf(t, patch(c.match))
		if len(got.Problems) > 0 || len(got.Gateways) != c.gateways || len(got.Waypoints) != c.waypoints || len(got.Notes) != 1 || !strings.Contains(got.Notes[0], c.note) {
			t.Errorf("%s: %+v", c.match, got)
		}
		for _, p := range got.Gateways {
			if p.Op != mesh.PatchFirst || p.Object != "shop/f" || p.Version == "" {
				t.Errorf("%+v", p)
			}
		}
	}
}

// TestWhatPatchesMatch are Istio's ways to name a host, a route and a cluster.
func TestWhatPatchesMatch(t *testing.T) {
	for _, c := range []struct {
		patch string
		want  mesh.Patch
	}{
		{`{applyTo: VIRTUAL_HOST, match: {routeConfiguration: {vhost: {name: "a.example:80"}}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchHost, Port: 80, Host: "a.example"}},
		{`{applyTo: VIRTUAL_HOST, match: {routeConfiguration: {vhost: {name: "inbound|http|8080"}}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchHost, Port: 8080}},
		{`{applyTo: VIRTUAL_HOST, match: {routeConfiguration: {portNumber: 81, vhost: {domainName: b.example}}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchHost, Port: 81, Host: "b.example"}},
		{`{applyTo: ROUTE_CONFIGURATION, match: {routeConfiguration: {name: http.8080}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchRoutes, Port: 8080}},
		{`{applyTo: HTTP_ROUTE, match: {routeConfiguration: {vhost: {route: {name: canary, action: REDIRECT}}}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchRoute, Route: "canary", Action: mesh.PatchRedirects}},
		{`{applyTo: HTTP_ROUTE, match: {context: WAYPOINT, waypoint: {portNumber: 80, route: {name: default}}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchRoute, Route: "default", Port: 80}},
		{`{applyTo: CLUSTER, match: {cluster: {service: ui.shop.svc.cluster.local, portNumber: 80, subset: v1}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchCluster, Service: "ui.shop.svc.cluster.local", Port: 80, Subset: "v1"}},
		{`{applyTo: CLUSTER, match: {cluster: {name: "outbound|80|v1|ui.shop.svc.cluster.local"}}, patch: {operation: MERGE, value: {}}}`, mesh.Patch{To: mesh.PatchCluster, Service: "ui.shop.svc.cluster.local", Port: 80, Subset: "v1"}},
		{`{applyTo: NETWORK_FILTER, match: {listener: {portNumber: 80, filterChain: {filter: {name: envoy.filters.network.http_connection_manager}}}}, patch: {operation: MERGE, value: {typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, server_name: x}}}}`,
			mesh.Patch{To: mesh.PatchManager, Port: 80, Value: `{"server_name":"x"}`}},
	} {
		got := filterOf(t, "["+c.patch+"]")
		if len(got.Problems) > 0 || len(got.Waypoints) != 1 {
			t.Errorf("%s: %v", c.patch, got.Problems)
			continue
		}
		c.want.Object, c.want.At, c.want.Version, c.want.Op = "shop/f", "spec.configPatches[0]", got.Waypoints[0].Version, mesh.PatchMerge
		if c.want.Value == "" {
			c.want.Value = "{}"
		}
		if got.Waypoints[0] != c.want {
			t.Errorf("%s\ngot  %+v\nwant %+v", c.patch, got.Waypoints[0], c.want)
		}
	}
}
