package routing

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	networking "istio.io/api/networking/v1alpha3"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

func host(namespace, name string) mesh.ServiceName {
	return mesh.ServiceName{Namespace: namespace, Hostname: name}
}

func ui(subset string, weight uint32) mesh.HTTPBackend {
	return mesh.HTTPBackend{Service: host("shop", "ui"), Subset: subset, Weight: weight}
}

func TestVirtualService(t *testing.T) {
	all := []mesh.HTTPBackend{ui("", 1)}
	prefix := "/v2"
	for _, c := range []struct {
		name, spec string
		want       []mesh.HTTPRule
		problems   []string
	}{
		{"split", `http: [{route: [{destination: {host: ui, subset: v1}, weight: 80}, {destination: {host: ui, subset: v2}, weight: 20}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: []mesh.HTTPBackend{ui("v1", 80), ui("v2", 20)}}}, nil},
		{"one destination has everything, whatever its weight", `http: [{name: only, route: [{destination: {host: ui}, weight: 0}]}]`,
			[]mesh.HTTPRule{{Name: "only", Backends: all}}, nil},
		{"all weights zero", `http: [{route: [{destination: {host: ui, subset: v1}}, {destination: {host: ui, subset: v2}}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: []mesh.HTTPBackend{ui("v1", 0), ui("v2", 0)}, Invalid: "the weights of its 2 destinations are all zero"}},
			[]string{"http[0]: the weights"}},
		{"matches", `http: [{match: [{uri: {exact: /a}, method: {exact: GET}, headers: {who: {regex: "a.*"}, any: {}}, withoutHeaders: {x: {}}, queryParams: {q: {exact: "1"}}, ignoreUriCase: true, port: 80}], route: [{destination: {host: ui}}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: all, Matches: []mesh.HTTPMatch{{
				Port: 80, IgnoreCase: true, Path: mesh.TextMatch{Kind: mesh.TextExact, Value: "/a"}, Method: mesh.TextMatch{Kind: mesh.TextExact, Value: "GET"},
				Headers: []mesh.NamedMatch{{Name: "any"}, {Name: "who", Match: mesh.TextMatch{Kind: mesh.TextRegex, Value: "a.*"}}, {Name: "x", Invert: true}},
				Query:   []mesh.NamedMatch{{Name: "q", Match: mesh.TextMatch{Kind: mesh.TextExact, Value: "1"}}},
			}}}}, nil},
		{"a match that cannot be had leaves the others", `http: [{match: [{uri: {regex: "("}}, {sourceLabels: {a: b}}, {uri: {prefix: /x}}], route: [{destination: {host: ui}}]}, {match: [{method: {regex: "("}}], redirect: {uri: /}}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: all, Matches: []mesh.HTTPMatch{{Labels: map[string]string{"a": "b"}}, {Path: mesh.TextMatch{Kind: mesh.TextPrefix, Value: "/x"}}}}},
			[]string{"match[0].uri has an invalid", "http[1]: match[0].method has an invalid"}},
		{"clients of a namespace", `http: [{match: [{sourceNamespace: blog, uri: {prefix: /x}}], route: [{destination: {host: ui}}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: all, Matches: []mesh.HTTPMatch{{Path: mesh.TextMatch{Kind: mesh.TextPrefix, Value: "/x"}, Source: "blog"}}}}, nil},
		{"faults, timeout, retries", `http: [{timeout: 3s, retries: {attempts: 2, perTryTimeout: 1s, retryOn: "5xx,503,odd"}, fault: {delay: {fixedDelay: 2s, percentage: {value: 0.1}}, abort: {httpStatus: 503}}, route: [{destination: {host: ui}}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: all, Timeout: 3 * time.Second,
				Retries: &mesh.HTTPRetries{Attempts: 2, PerTry: time.Second, On: "5xx", StatusCodes: []uint32{503}},
				Delay:   &mesh.HTTPDelay{Fixed: 2 * time.Second, Millionths: 1000}, Abort: &mesh.HTTPAbort{Status: 503, Millionths: mesh.Million}}},
			[]string{`"odd" is unknown`}},
		{"rewrite and headers", `http: [{rewrite: {uri: /v2, authority: b}, headers: {request: {set: {Host: c, x: "1"}, remove: ["y"]}}, route: [{destination: {host: ui}}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: all, Rewrite: &mesh.HTTPRewrite{Host: "c", Prefix: &prefix},
				Request: mesh.HTTPHeaders{Set: []mesh.HTTPHeader{{Name: "x", Value: "1"}}, Remove: []string{"y"}}}}, nil},
		{"redirect and direct response", `http: [{match: [{uri: {exact: /a}}], redirect: {uri: /b, redirectCode: 308}}, {directResponse: {status: 503, body: {string: "no"}}}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Matches: []mesh.HTTPMatch{{Path: mesh.TextMatch{Kind: mesh.TextExact, Value: "/a"}}}, Redirect: &mesh.HTTPRedirect{Path: "/b", Code: 308}},
				{Name: "shop/v/1", Direct: &mesh.HTTPDirect{Status: 503, Body: "no"}}}, nil},
		{"mirror", `http: [{mirror: {host: ui, subset: v2}, mirrorPercentage: {value: 50}, route: [{destination: {host: ui}}]}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: all, Mirrors: []mesh.HTTPMirror{{Backend: ui("v2", 0), Millionths: 500_000}}}}, nil},
		{"what is not followed fails its requests", `http: [{delegate: {name: x}}, {name: empty}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Invalid: "delegate shop/x is no VirtualService without hosts and gateways that may be one, or there are routes beside it"}, {Name: "empty", Invalid: "it has neither route, redirect nor directResponse"}},
			[]string{"delegate", "neither"}},
		{"preflights of others are not for the application", `http: [{route: [{destination: {host: ui}}], corsPolicy: {allowOrigins: [{exact: "https://a.example"}], unmatchedPreflights: IGNORE}}]`,
			[]mesh.HTTPRule{{Name: "shop/v/0", Backends: []mesh.HTTPBackend{ui("", 1)}, CORS: &mesh.HTTPCORS{Origins: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "https://a.example"}}, Answer: true}}}, nil},
		{"nothing about requests", `tcp: [{route: [{destination: {host: ui}}]}]`, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var v networking.VirtualService
			if err := yaml.Unmarshal([]byte("hosts: [ui]\n"+c.spec), &v); err != nil {
				t.Fatal(err)
			}
			got, problems := VirtualService("shop", "v", &v, host)
			if d := cmp.Diff(c.want, got.HTTP); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if len(problems) != len(c.problems) {
				t.Fatalf("problems %q, want %d", problems, len(c.problems))
			}
			for i, p := range c.problems {
				if !strings.Contains(problems[i], p) {
					t.Errorf("problem %q, want %q in it", problems[i], p)
				}
			}
		})
	}
}

// Connections have routes of their own; one that cannot be followed closes what it is for, rather than let it go on.
func TestVirtualServiceForConnections(t *testing.T) {
	var v networking.VirtualService
	if err := yaml.Unmarshal([]byte(`
hosts: [ui]
gateways: [mesh, edge]
tls:
- match: [{sniHosts: [A.example, "*.b.example"], port: 443}, {sniHosts: [c.example], gateways: [edge]}, {port: 443}]
  route: [{destination: {host: ui, subset: v1, port: {number: 8443}}}]
tcp:
- {match: [{port: 9000}, {port: 9001, gateways: [edge]}, {port: 9002, sourceLabels: {a: b}}, {port: 9003, sourceNamespace: blog, sourceSubnet: 10.0.0.1/8, destinationSubnets: [10.96.0.1, "fd00::/8"]}, {port: 9004, sourceSubnet: x}], route: [{destination: {host: ui, subset: v1}, weight: 1}, {destination: {host: ui, subset: v2}, weight: 3}]}
- {route: [{destination: {host: ""}}]}
`), &v); err != nil {
		t.Fatal(err)
	}
	got, problems := VirtualService("shop", "v", &v, host)
	to := ui("v1", 1)
	to.Port = 8443
	want := &AtGateway{
		TLS: []ConnectionRule{{Name: "shop/v/0/0", Port: 443, Names: []string{"a.example", "*.b.example"}, Backends: []mesh.HTTPBackend{to}}},
		TCP: []ConnectionRule{
			{Name: "shop/v/0", Port: 9000, Backends: []mesh.HTTPBackend{ui("v1", 1), ui("v2", 3)}},
			{Name: "shop/v/0", Port: 9003, Backends: []mesh.HTTPBackend{ui("v1", 1), ui("v2", 3)}, Only: &mesh.RoutedOnly{Source: "blog",
				From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, To: []netip.Prefix{netip.MustParsePrefix("10.96.0.1/32"), netip.MustParsePrefix("fd00::/8")}}},
			{Name: "shop/v/1", Backends: []mesh.HTTPBackend{{Weight: 1, Invalid: "the route cannot be followed"}}},
		},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	for i, p := range []string{"tls[0]: match[2] has no sniHosts", "tcp[0]: match[2] has sourceLabels", "tcp[0]: match[4].sourceSubnet", "tcp[1]: a destination without a host"} {
		if len(problems) != 4 || !strings.Contains(problems[i], p) {
			t.Fatalf("problems %q, want %q", problems, p)
		}
	}
}
