package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// What is written about hosts of ServiceEntries behind a waypoint: for which namespaces objects are (exportTo), routes of the Gateway API,
// and a host that is every name below a domain.
func TestServiceEntries(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	e := egress{clients: namespace(t, "e2e-entry-clients", ambient), outside: namespace(t, "e2e-entry-outside"), way: namespace(t, "e2e-entry")}
	hosts := namespace(t, "e2e-entry-hosts") // where the objects are that the waypoint of another namespace follows
	others := namespace(t, "e2e-entry-others", ambient)
	apply := func(manifest string) {
		t.Helper()
		e.apply(t, strings.NewReplacer("HOSTS", hosts, "OTHERS", others).Replace(manifest))
	}
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: e.clients, Name: "client", Account: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: others, Name: "client", Account: "client", Node: nodes[1], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: e.outside, Name: "stock", Account: "default", Node: nodes[1], Args: []string{"inventory"}, Port: 8080, Headless: true},
	))
	must(t, mesh.AwaitReady(ctx, e.clients, time.Minute))
	must(t, mesh.AwaitReady(ctx, others, time.Minute))
	must(t, mesh.AwaitReady(ctx, e.outside, time.Minute))
	inMesh(t, e.clients)
	inMesh(t, others)
	stock := pod(t, e.outside, "stock").IP
	api, err := mesh.ServiceAddrs(ctx, "default", "kubernetes")
	must(t, err)
	apply(`
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: way, namespace: WAY}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: HOSTS, labels: {istio.io/use-waypoint: way, istio.io/use-waypoint-namespace: WAY}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: server, namespace: HOSTS}
spec:
  hosts: [server.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 443, name: tls, protocol: TLS}]
  endpoints: [{address: ` + api[0] + `}]
`)
	entry := func(exportTo string) {
		t.Helper()
		apply(`
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: api, namespace: HOSTS}
spec:
  hosts: [api.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}, {number: 81, name: http-calls, protocol: HTTP, targetPort: 8080}, {number: 443, name: tls, protocol: TLS, targetPort: 8080}]
  endpoints: [{address: ` + stock + `}]
  exportTo: ` + exportTo + `
`)
	}
	entry(`["*"]`)
	if out, err := mesh.Kubectl(ctx, "-n", e.way, "wait", "--for=condition=Programmed", "gateway.gateway.networking.k8s.io/way", "--timeout=180s"); err != nil {
		t.Fatal(err, out)
	}
	// becomes waits until the answer to a pod has a text in it.
	becomes := func(from, url, want string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			if out, err := mesh.Exec(ctx, from, "client", "/demo", "get", url); !strings.Contains(fmt.Sprint(out, err), want) {
				return fmt.Errorf("%s calls %s: %q (%v), want %q", from, url, out, err, want)
			}
			return nil
		}))
	}
	const answered, unknown = `"items"`, "lookup api.example.com"
	const url = "http://api.example.com/stock"

	for _, c := range []struct{ exportTo, client, other string }{
		{`["*"]`, answered, answered},
		{`[".", CLIENTS]`, answered, unknown},
		{`[OTHERS, "."]`, unknown, answered},
		{`["*", OTHERS]`, answered, answered},
		{`["."]`, unknown, unknown},
		{`[CLIENTS, OTHERS]`, answered, answered},
	} {
		t.Logf("ServiceEntry exportTo %s", c.exportTo)
		entry(c.exportTo)
		becomes(e.clients, url, c.client)
		becomes(others, url, c.other)
	}

	// Of VirtualServices and DestinationRules it is the waypoint's namespace that counts. The rule has TLS spoken to who speaks none.
	for _, c := range []struct {
		exportTo string
		there    bool
	}{{`[WAY]`, true}, {`[".", OTHERS]`, false}, {`["*", OTHERS]`, true}, {`[OTHERS, CLIENTS]`, false}, {`[".", WAY]`, true}} {
		t.Logf("VirtualService and DestinationRule exportTo %s", c.exportTo)
		virtual := func(exportTo string) {
			t.Helper()
			apply(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: api, namespace: HOSTS}
spec: {hosts: [api.example.com], exportTo: ` + exportTo + `, http: [{match: [{uri: {prefix: /virtual}}], directResponse: {status: 200, body: {string: "of the route"}}}, {route: [{destination: {host: api.example.com}}]}]}
`)
		}
		virtual(c.exportTo)
		want := map[bool]string{true: "of the route", false: "404"}[c.there]
		becomes(e.clients, "http://api.example.com/virtual", want)
		apply(`
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: api, namespace: HOSTS}
spec: {host: api.example.com, exportTo: ` + c.exportTo + `, trafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true}}}
`)
		becomes(e.clients, url, map[bool]string{true: "503", false: answered}[c.there])
		if !c.there {
			eventSays(t, hosts, "exportTo leaves out "+e.way)
		}
		for _, kind := range []string{"virtualservice", "destinationrule"} {
			if out, err := mesh.Kubectl(ctx, "-n", hosts, "delete", kind, "api"); err != nil {
				t.Fatal(err, out)
			}
		}
		becomes(e.clients, "http://api.example.com/virtual", "404")
		becomes(e.clients, url, answered)
	}

	// Rules for clients with labels follow the pods that have them; connections go by where they come from.
	apply(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: api, namespace: HOSTS}
spec:
  hosts: [api.example.com]
  http:
  - {match: [{sourceLabels: {role: reader}}], directResponse: {status: 200, body: {string: "for readers"}}}
  - {match: [{sourceNamespace: OTHERS}], directResponse: {status: 200, body: {string: "for others"}}}
  - {route: [{destination: {host: api.example.com}}]}
  tls:
  - {match: [{port: 443, sniHosts: [api.example.com], sourceNamespace: CLIENTS}], route: [{destination: {host: server.example.com, port: {number: 443}}}]}
`)
	const readers = "for readers"
	becomes(e.clients, url, answered)
	becomes(others, url, "for others")
	becomes(e.clients, "https://api.example.com/", "certificate")     // of the API server
	becomes(others, "https://api.example.com/", "gave HTTP response") // it is the server itself
	label := func(ns, change string) {
		t.Helper()
		if out, err := mesh.Kubectl(ctx, "-n", ns, "label", "pod", "client", change); err != nil {
			t.Fatal(err, out)
		}
	}
	began := time.Now()
	label(e.clients, "role=reader")
	becomes(e.clients, url, readers)
	t.Logf("a pod's label is followed after %v", time.Since(began).Round(time.Millisecond))
	becomes(others, url, "for others")
	label(others, "role=reader")
	becomes(others, url, readers)
	label(e.clients, "role-")
	becomes(e.clients, url, answered)
	becomes(others, url, readers)
	if out, err := mesh.Kubectl(ctx, "-n", hosts, "delete", "virtualservice", "api"); err != nil {
		t.Fatal(err, out)
	}

	// Routes of the Gateway API have the ServiceEntry as their parent.
	apply(`
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: api, namespace: HOSTS}
spec:
  parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: api, port: 80}]
  rules:
  - matches: [{path: {type: Exact, value: /old}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /stock}}}]
    backendRefs: [{group: networking.istio.io, kind: Hostname, name: api.example.com, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: api, namespace: HOSTS}
spec:
  parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: api, port: 81}]
  rules:
  - matches: [{method: {service: items.v1.Items}}]
    backendRefs: [{group: networking.istio.io, kind: Hostname, name: absent.example.com, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: api, namespace: HOSTS}
spec:
  parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: api, port: 443}]
  hostnames: [api.example.com]
  rules: [{backendRefs: [{group: networking.istio.io, kind: Hostname, name: server.example.com, port: 443}]}]
`)
	becomes(e.clients, "http://api.example.com/old", answered)
	becomes(e.clients, url, "404") // no rule is for it
	becomes(e.clients, "http://api.example.com:81/items.v1.Items/Get", "503")
	becomes(e.clients, "http://api.example.com:81/stock", "404")
	becomes(e.clients, "https://api.example.com/", "certificate") // of the API server
	const condition = `{.status.parents[?(@.parentRef.kind=="ServiceEntry")].conditions[?(@.type=="%s")].status}`
	for kind, resolved := range map[string]string{"httproute": "True", "grpcroute": "False", "tlsroute": "True"} {
		fieldBecomes(t, hosts, kind+"/api", fmt.Sprintf(condition, "Accepted"), "True")
		fieldBecomes(t, hosts, kind+"/api", fmt.Sprintf(condition, "ResolvedRefs"), resolved)
	}

	// Names below a domain: those that lead outside are called, and those that lead into the cluster are not, whoever answers for them.
	outsideServer(t)
	apply(`
apiVersion: v1
kind: Service
metadata: {name: public, namespace: OUTSIDE}
spec: {clusterIP: None, ports: [{name: http, port: 9000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: public, namespace: OUTSIDE, labels: {kubernetes.io/service-name: public}}
addressType: IPv4
ports: [{name: http, port: 9000}]
endpoints: [{addresses: [` + outside4 + `]}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: below, namespace: HOSTS}
spec:
  hosts: ["*.OUTSIDE.svc"]
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
  ports: [{number: 9000, name: http, protocol: HTTP}, {number: 8080, name: http-own, protocol: HTTP}]
`)
	becomes(e.clients, "http://public."+e.outside+".svc.:9000/", "outside")
	becomes(e.clients, "http://stock."+e.outside+".svc.:8080/stock", "503")              // a pod's address
	becomes(e.clients, "http://nobody."+e.outside+".svc.:8080/stock", "503")             // a name that there is not
	becomes(others, "http://stock."+e.outside+".svc.cluster.local:8080/stock", answered) // the very pod, for who calls it by itself
}

// eventSays waits for an event in a namespace with a text in it.
func eventSays(t *testing.T, ns, want string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		out, err := mesh.Kubectl(t.Context(), "-n", ns, "get", "events", "-o", "jsonpath={.items[*].message}")
		if err == nil && !strings.Contains(out, want) {
			err = fmt.Errorf("no event of %s says %q: %s", ns, want, out)
		}
		return err
	}))
}
