package e2e

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// zipkinSpan is one as Zipkin's API has it.
type zipkinSpan struct {
	TraceID, ID, ParentID, Kind, Name string
	LocalEndpoint                     struct{ ServiceName string }
	Tags                              map[string]string
}

// lacks says which of some tags a span does not have with their values; "*" is any.
func (s zipkinSpan) lacks(want map[string]string) error {
	for k, v := range want {
		if got := s.Tags[k]; got != v && (v != "*" || got == "") {
			return fmt.Errorf("%s of a %s span of %s is %q, want %q, in %v", k, s.Kind, s.LocalEndpoint.ServiceName, got, v, s.Tags)
		}
	}
	return nil
}

// A Zipkin gets a waypoint's spans and a gateway's under the names that Istio gives them. A request that passes both is one
// trace, in which each span is the child of the one before it, and one edge of Zipkin's graph.
func TestZipkin(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	jar, err := mesh.Zipkin(ctx)
	must(t, err)
	ns := behindWaypoint(t, "e2e-zipkin", 1, "client")
	must(t, mesh.RunZipkin(ctx, jar, ns, nodes[0]))
	if out, err := mesh.Kubectl(ctx, "-n", ns, "label", "service", "inventory", "istio.io/ingress-use-waypoint=true"); err != nil {
		t.Fatal(err, out)
	}
	setMesh(t, strings.ReplaceAll("extensionProviders:\n- {name: zipkin, zipkin: {service: zipkin.NS.svc.cluster.local, port: 9411}}\n", "NS", ns))
	makeEdge(t, ns, "inventory")
	applyIn(t, ns, `
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: all, namespace: NS}
spec: {tracing: [{providers: [{name: zipkin}], randomSamplingPercentage: 100, customTags: {team: {literal: {value: blue}}}}]}
`)
	must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
	enforced(t, ns, "telemetry/all")

	const n = 5
	call := func(host string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			_, err := mesh.Exec(ctx, ns, "client", "/demo", "get", "http://"+host+"/stock")
			return err
		}))
		if out, err := mesh.Exec(ctx, ns, "client", "/demo", "load", "-n", fmt.Sprint(n), "-every", "5ms", "-url", "http://"+host+"/stock"); err != nil {
			t.Fatal(err, out)
		}
	}
	call("inventory")
	call("edge-istio")

	way, edge := "way."+ns, "edge-istio."+ns
	identity := "spiffe://cluster.local/ns/" + ns + "/sa/"
	// of is what the waypoint says of a request.
	of := func(source, host string) map[string]string {
		return map[string]string{
			"istio.source_workload": source, "istio.source_namespace": ns, "istio.source_canonical_service": source,
			"istio.source_canonical_revision": "latest", "istio.source_cluster_id": "Kubernetes", "istio.source_principal": identity + source,
			"istio.destination_workload": "inventory", "istio.destination_namespace": ns, "istio.destination_canonical_service": "inventory",
			"istio.destination_canonical_revision": "latest", "istio.destination_cluster_id": "Kubernetes",
			"istio.destination_principal": identity + "default", "istio.destination_service": "inventory." + ns + ".svc.cluster.local",
			"team": "blue", "component": "proxy", "http.method": "GET", "http.status_code": "200", "http.protocol": "HTTP/1.1",
			"http.url": "http://" + host + "/stock", "guid:x-request-id": "*", "node_id": "*", "upstream_cluster": "*", "response_flags": "-",
		}
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		var traces [][]zipkinSpan
		if err := mesh.AskZipkin(ctx, ns, "traces?"+url.Values{"serviceName": {way}, "limit": {"1000"}}.Encode(), &traces); err != nil {
			return err
		}
		direct, through, edges := 0, 0, 0
		for _, trace := range traces {
			kinds := map[string]zipkinSpan{}
			for _, s := range trace {
				kinds[s.LocalEndpoint.ServiceName+" "+s.Kind] = s
				if s.TraceID != trace[0].TraceID || len(s.TraceID) != 32 {
					return fmt.Errorf("a trace with the ids %s and %s", s.TraceID, trace[0].TraceID)
				}
			}
			server, client, entry := kinds[way+" SERVER"], kinds[edge+" CLIENT"], kinds[edge+" SERVER"]
			if client.ID != "" {
				edges++
			}
			if server.Tags["http.status_code"] != "200" {
				continue // from before all was ready
			}
			var err error
			switch {
			case len(trace) == 1 && server.Tags["istio.source_workload"] == "client":
				direct++
				err = server.lacks(of("client", "inventory"))
			case len(trace) != 3 || len(kinds) != 3 || server.ID == "" || client.ID == "" || entry.ID == "":
				return fmt.Errorf("spans of a trace: %+v", trace)
			case entry.ParentID != "" || client.ParentID != entry.ID || server.ParentID != client.ID:
				return fmt.Errorf("spans that are not one another's children: %+v", trace)
			default:
				through++
				err = server.lacks(of("edge-istio", "edge-istio"))
				for _, s := range []zipkinSpan{entry, client} {
					if err == nil {
						err = s.lacks(map[string]string{"istio.source_workload": "edge-istio", "istio.source_namespace": ns, "team": "blue",
							"istio.destination_service": "inventory." + ns + ".svc.cluster.local", "http.status_code": "200", "component": "proxy"})
					}
				}
			}
			if err != nil {
				return err
			}
		}
		if direct < n || through < n {
			return fmt.Errorf("%d traces of the client alone and %d by the gateway, of %d and %d requests at least", direct, through, n, n)
		}
		var links []struct {
			Parent, Child string
			CallCount     int
		}
		if err := mesh.AskZipkin(ctx, ns, "dependencies?endTs="+fmt.Sprint(time.Now().UnixMilli()), &links); err != nil {
			return err
		}
		for _, l := range links {
			if l.Parent == edge && l.Child == way && l.CallCount == edges {
				return nil
			}
		}
		return fmt.Errorf("Zipkin's graph of %d requests through the gateway: %+v", edges, links)
	}))
}
