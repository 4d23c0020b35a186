package routing

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

// find knows every Service but one, and lets one be sent to by nobody.
func find(r gatewayv1.BackendObjectReference) (mesh.HTTPBackend, Verdict) {
	switch r.Name {
	case "absent":
		return mesh.HTTPBackend{}, Verdict{"BackendNotFound", "Service shop/absent was not found"}
	case "closed":
		return mesh.HTTPBackend{}, Verdict{"RefNotPermitted", "no ReferenceGrant"}
	}
	return mesh.HTTPBackend{Service: host("shop", string(r.Name)), Port: uint16(*r.Port)}, Verdict{}
}

func back(name string, weight uint32) mesh.HTTPBackend {
	return mesh.HTTPBackend{Service: host("shop", name), Port: 80, Weight: weight}
}

func path(kind mesh.TextKind, value string) []mesh.HTTPMatch {
	return []mesh.HTTPMatch{{Path: mesh.TextMatch{Kind: kind, Value: value}}}
}

func TestHTTPRoute(t *testing.T) {
	every, ui := path(mesh.TextPath, "/"), []mesh.HTTPBackend{back("ui", 1)}
	slash, other := "/", "/b"
	for _, c := range []struct {
		name, rules                string
		want                       []mesh.HTTPRule
		accepted, partly, resolved string // each reason: and what its message has
	}{
		{name: "split", rules: `[{backendRefs: [{name: ui, port: 80, weight: 9}, {name: next, port: 80}, {name: last, port: 80, weight: 0}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: []mesh.HTTPBackend{back("ui", 9), back("next", 1)}}}},
		{name: "a share that cannot be sent fails", rules: `[{name: own, backendRefs: [{name: ui, port: 80}, {name: absent, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/own", Matches: every, Backends: []mesh.HTTPBackend{back("ui", 1),
				{Weight: 1, Invalid: "Service shop/absent was not found"}}}}, resolved: "BackendNotFound: Service shop/absent"},
		{name: "nowhere to send", rules: `[{backendRefs: [{name: closed, port: 80}]}, {}, {backendRefs: [{name: ui, port: 80, weight: 0}]}]`,
			want: []mesh.HTTPRule{
				{Name: "shop/r/0", Matches: every, Backends: []mesh.HTTPBackend{{Weight: 1, Invalid: "no ReferenceGrant"}}, Invalid: "no ReferenceGrant"},
				{Name: "shop/r/1", Matches: every, Invalid: "it has no backendRefs"},
				{Name: "shop/r/2", Matches: every, Invalid: "the weights of its backendRefs are all zero"},
			}, resolved: "RefNotPermitted: no ReferenceGrant"},
		{name: "matches", rules: `[{matches: [{path: {type: Exact, value: /a}, method: GET, headers: [{name: Host, value: ui}, {name: X, value: "1"}, {name: x, value: "2"}], queryParams: [{name: q, value: "1"}, {name: q, value: "2"}]},
			{path: {type: RegularExpression, value: "/v[0-9]"}, headers: [{name: z, type: RegularExpression, value: "a.*"}]}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{
				{Name: "shop/r/0", Backends: ui, Matches: []mesh.HTTPMatch{{
					Path: mesh.TextMatch{Kind: mesh.TextExact, Value: "/a"}, Method: mesh.TextMatch{Kind: mesh.TextExact, Value: "GET"},
					Authority: mesh.TextMatch{Kind: mesh.TextExact, Value: "ui"}, Headers: []mesh.NamedMatch{{Name: "X", Match: mesh.TextMatch{Kind: mesh.TextExact, Value: "1"}}},
					Query: []mesh.NamedMatch{{Name: "q", Match: mesh.TextMatch{Kind: mesh.TextExact, Value: "1"}}},
				}}},
				{Name: "shop/r/0", Backends: ui, Matches: []mesh.HTTPMatch{{Path: mesh.TextMatch{Kind: mesh.TextRegex, Value: "/v[0-9]"},
					Headers: []mesh.NamedMatch{{Name: "z", Match: mesh.TextMatch{Kind: mesh.TextRegex, Value: "a.*"}}}}}},
			}},
		{name: "a match that cannot be had matches nothing", rules: `[{matches: [{path: {type: RegularExpression, value: "("}}, {path: {value: /x}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: path(mesh.TextPath, "/x"), Backends: ui}}, partly: "UnsupportedValue: rules[0]: matches[0].path has an invalid"},
		{name: "none of it can be had", rules: `[{matches: [{path: {type: RegularExpression, value: "("}}], backendRefs: [{name: ui, port: 80}]}]`,
			accepted: "UnsupportedValue: rules[0]: matches[0].path"},
		{name: "headers", rules: `[{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: Host, value: other}, {name: a, value: "1"}], add: [{name: b, value: "2"}], remove: [c]}},
			{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: d, value: "3"}]}}], backendRefs: [{name: ui, port: 80, filters: [{type: RequestHeaderModifier, requestHeaderModifier: {add: [{name: e, value: "4"}]}}]}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Rewrite: &mesh.HTTPRewrite{Host: "other"},
				Request:  mesh.HTTPHeaders{Set: []mesh.HTTPHeader{{Name: "a", Value: "1"}}, Add: []mesh.HTTPHeader{{Name: "b", Value: "2"}, {Name: "e", Value: "4"}}, Remove: []string{"c"}},
				Response: mesh.HTTPHeaders{Set: []mesh.HTTPHeader{{Name: "d", Value: "3"}}}}}},
		{name: "what no header can hold", rules: `[{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: "1\n2"}]}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Invalid: "the value for header a has a control character"}}, accepted: "UnsupportedValue: rules[0]: the value"},
		{name: "redirects", rules: `[{filters: [{type: RequestRedirect, requestRedirect: {}}]}, {filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: h, port: 8443, statusCode: 308, path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Redirect: &mesh.HTTPRedirect{Code: 302, OwnPort: true}},
				{Name: "shop/r/1", Matches: every, Redirect: &mesh.HTTPRedirect{Scheme: "https", Host: "h", Port: 8443, Code: 308, Prefix: &slash, OwnPort: true}}}},
		{name: "rewrite", rules: `[{filters: [{type: URLRewrite, urlRewrite: {hostname: h, path: {type: ReplaceFullPath, replaceFullPath: /b}}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Rewrite: &mesh.HTTPRewrite{Host: "h", Path: &other}}}},
		{name: "mirrors", rules: `[{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: a, port: 80}, percent: 25}}, {type: RequestMirror, requestMirror: {backendRef: {name: b, port: 80}, fraction: {numerator: 1, denominator: 3}}},
			{type: RequestMirror, requestMirror: {backendRef: {name: absent, port: 80}}}], backendRefs: [{name: ui, port: 80}]}]`,
			want:     []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Mirrors: []mesh.HTTPMirror{{Backend: back("a", 0), Millionths: 250_000}, {Backend: back("b", 0), Millionths: 333_333}}}},
			resolved: "BackendNotFound"},
		{name: "timeouts and retries", rules: `[{timeouts: {request: 10s, backendRequest: 2s}, retry: {codes: [500, 503], attempts: 4, backoff: 100ms}, backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Timeout: 10 * time.Second,
				Retries: &mesh.HTTPRetries{Attempts: 4, PerTry: 2 * time.Second, Backoff: 100 * time.Millisecond, StatusCodes: []uint32{500, 503}}}}},
		{name: "cors", rules: `[{filters: [{type: CORS, cors: {allowOrigins: ["https://a.example:443", "https://*.b.example"], allowMethods: ["*"], allowCredentials: true, maxAge: 60}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, CORS: &mesh.HTTPCORS{Methods: []string{"*"}, Credentials: true, Asked: true, MaxAge: time.Minute, Answer: true,
				Origins: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "https://a.example"}, {Kind: mesh.TextRegex, Value: `https://[^/:]+\.b\.example`}}}}}},
		{name: "sessions", rules: `[{sessionPersistence: {sessionName: who, absoluteTimeout: 1h30m, cookieConfig: {lifetimeType: Permanent}}, backendRefs: [{name: ui, port: 80}]}, {sessionPersistence: {type: Header, sessionName: X-Session}, backendRefs: [{name: ui, port: 80}]}, {name: own, sessionPersistence: {}, backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Session: &mesh.HTTPSession{Name: "who", TTL: 90 * time.Minute}}, {Name: "shop/r/1", Matches: every, Backends: ui, Session: &mesh.HTTPSession{Name: "X-Session", Header: true}},
				{Name: "shop/r/own", Matches: every, Backends: ui, Session: &mesh.HTTPSession{Name: "session-adml1irpci07"}}}},
		{name: "a session without an end, and none", rules: `[{sessionPersistence: {sessionName: who, absoluteTimeout: 1h}, backendRefs: [{name: ui, port: 80}]}, {sessionPersistence: {sessionName: "a b"}, backendRefs: [{name: ui, port: 80}]}]`,
			want:   []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Session: &mesh.HTTPSession{Name: "who"}}, {Name: "shop/r/1", Matches: every, Backends: ui}},
			partly: `UnsupportedValue: rules[0]: sessionPersistence.absoluteTimeout is followed of permanent cookies alone`},
		{name: "who is asked", rules: `[{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: auth, port: 9000}}}], backendRefs: [{name: ui, port: 80}]},
			{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: auth, port: 9000}, http: {path: check/, allowedHeaders: [cookie], allowedResponseHeaders: [X-User]}, forwardBody: {maxSize: 100}}}], backendRefs: [{name: ui, port: 80}]},
			{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: auth, port: 9001}, grpc: {allowedHeaders: [cookie]}}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{
				{Name: "shop/r/0", Matches: every, Backends: ui, Ask: &mesh.AuthProvider{Service: host("shop", "auth"), Port: 9000, Timeout: 10 * time.Second, ToApplication: []mesh.TextMatch{{Kind: mesh.TextRegex, Value: "[^:].*"}}}},
				{Name: "shop/r/1", Matches: every, Backends: ui, Ask: &mesh.AuthProvider{Service: host("shop", "auth"), Port: 9000, Timeout: 10 * time.Second, PathPrefix: "/check", MaxBody: 100,
					Sees: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "cookie"}}, ToApplication: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "X-User"}}}},
				{Name: "shop/r/2", Matches: every, Backends: ui, Ask: &mesh.AuthProvider{Service: host("shop", "auth"), Port: 9001, GRPC: true, Timeout: 10 * time.Second, Sees: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "cookie"}}}},
			}},
		{name: "nobody to ask", rules: `[{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: absent, port: 80}}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Invalid: "Service shop/absent was not found"}}, resolved: "BackendNotFound: rules[0]: Service shop/absent"},
		{name: "two to ask", rules: `[{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: a, port: 80}}}, {type: ExternalAuth, externalAuth: {protocol: GRPC, backendRef: {name: b, port: 80}}}], backendRefs: [{name: ui, port: 80}]}]`,
			want:     []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Invalid: "it has two filters ExternalAuth", Ask: &mesh.AuthProvider{Service: host("shop", "a"), Port: 80, GRPC: true, Timeout: 10 * time.Second}}},
			accepted: "IncompatibleFilters: rules[0]: it has two"},
		{name: "nothing to be asked with", rules: `[{filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, backendRef: {name: auth, port: 80}, http: {path: "/a?b"}}}], backendRefs: [{name: ui, port: 80}]}]`,
			want: []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Invalid: `http.path "/a?b" of its externalAuth is no path`,
				Ask: &mesh.AuthProvider{Service: host("shop", "auth"), Port: 80, Timeout: 10 * time.Second, PathPrefix: "/a?b", ToApplication: []mesh.TextMatch{{Kind: mesh.TextRegex, Value: "[^:].*"}}}}},
			accepted: `UnsupportedValue: rules[0]: http.path "/a?b"`},
		{name: "filters that are not followed fail their requests", rules: `[{filters: [{type: ExtensionRef, extensionRef: {group: g, kind: K, name: n}}], backendRefs: [{name: ui, port: 80}]}, {backendRefs: [{name: ui, port: 80}]}]`,
			want:   []mesh.HTTPRule{{Name: "shop/r/0", Matches: every, Backends: ui, Invalid: "filters[0].type ExtensionRef is not followed"}, {Name: "shop/r/1", Matches: every, Backends: ui}},
			partly: "UnsupportedValue: rules[0]: filters[0].type ExtensionRef"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var spec gatewayv1.HTTPRouteSpec
			if err := yaml.UnmarshalStrict([]byte("rules: "+c.rules), &spec); err != nil {
				t.Fatal(err)
			}
			got := HTTPRoute("shop", "r", &spec, find)
			var rules []mesh.HTTPRule
			for _, r := range got.Rules {
				rules = append(rules, r.HTTPRule)
			}
			if d := cmp.Diff(c.want, rules); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			for _, v := range []struct {
				what, want string
				got        Verdict
			}{{"accepted", c.accepted, got.Accepted}, {"partly", c.partly, got.Partly}, {"resolved", c.resolved, got.Resolved}} {
				reason, text, _ := strings.Cut(v.want, ": ")
				if v.got.Reason != reason || !strings.Contains(v.got.Message, text) {
					t.Errorf("%s is %+v, want %q", v.what, v.got, v.want)
				}
			}
		})
	}
}

func TestGRPCRoute(t *testing.T) {
	for _, c := range []struct {
		match string
		want  mesh.HTTPMatch
	}{
		{`{}`, mesh.HTTPMatch{}},
		{`{method: {service: a.B, method: C}, headers: [{name: x, value: "1"}]}`, mesh.HTTPMatch{Path: mesh.TextMatch{Kind: mesh.TextExact, Value: "/a.B/C"},
			Headers: []mesh.NamedMatch{{Name: "x", Match: mesh.TextMatch{Kind: mesh.TextExact, Value: "1"}}}}},
		{`{method: {service: a.B}}`, mesh.HTTPMatch{Path: mesh.TextMatch{Kind: mesh.TextPrefix, Value: "/a.B/"}}},
		{`{method: {method: C.D}}`, mesh.HTTPMatch{Path: mesh.TextMatch{Kind: mesh.TextRegex, Value: `/[^/]+/C\.D`}}},
		{`{method: {type: RegularExpression, service: "a.*|b", method: C}}`, mesh.HTTPMatch{Path: mesh.TextMatch{Kind: mesh.TextRegex, Value: "/(?:a.*|b)/(?:C)"}}},
	} {
		var spec gatewayv1.GRPCRouteSpec
		if err := yaml.UnmarshalStrict([]byte(`rules: [{matches: [`+c.match+`], backendRefs: [{name: ui, port: 80}]}]`), &spec); err != nil {
			t.Fatal(err)
		}
		got := GRPCRoute("shop", "r", &spec, find)
		want := mesh.HTTPRule{Name: "shop/r/0", GRPC: true, Matches: []mesh.HTTPMatch{c.want}, Backends: []mesh.HTTPBackend{back("ui", 1)}}
		if d := cmp.Diff(want, got.Rules[0].HTTPRule); d != "" || !got.Accepted.OK() || !got.Partly.OK() {
			t.Errorf("%s: %+v -want +got:\n%s", c.match, got, d)
		}
	}
}

// TestPrecedence has the rules of several routes asked in the Gateway API's order, whatever order they are written in.
func TestPrecedence(t *testing.T) {
	var spec gatewayv1.HTTPRouteSpec
	if err := yaml.UnmarshalStrict([]byte(`rules:
- {name: regex, matches: [{path: {type: RegularExpression, value: /.*}}]}
- {name: default}
- {name: query, matches: [{queryParams: [{name: a, value: b}]}]}
- {name: headers1, matches: [{headers: [{name: a, value: b}]}]}
- {name: headers2, matches: [{headers: [{name: a, value: b}, {name: host, value: b}]}]}
- {name: method, matches: [{method: GET}]}
- {name: short, matches: [{path: {value: /a}, method: GET}]}
- {name: long, matches: [{path: {value: /a/b}}]}
- {name: again, matches: [{path: {value: /a/c}}]}
- {name: exact, matches: [{path: {type: Exact, value: /a}}]}
`), &spec); err != nil {
		t.Fatal(err)
	}
	r := HTTPRoute("shop", "r", &spec, find)
	slices.SortStableFunc(r.Rules, Rule.Compare)
	var got []string
	for _, r := range r.Rules {
		got = append(got, strings.TrimPrefix(r.Name, "shop/r/"))
	}
	if want := "exact long again short method headers2 headers1 query default regex"; strings.Join(got, " ") != want {
		t.Errorf("asked in the order\n%s, want\n%s", got, want)
	}
}
