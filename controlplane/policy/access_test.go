package policy

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

// What a waypoint cannot evaluate makes an ALLOW rule match nothing, and is left out of a DENY rule.
func TestAttached(t *testing.T) {
	get := []mesh.AccessTest{{On: mesh.AccessMethod, Text: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "GET"}}}}
	rule := func(tests ...mesh.AccessTest) []mesh.AccessRule {
		return []mesh.AccessRule{{Clauses: []mesh.AccessClause{{Any: [][]mesh.AccessTest{tests}}}}}
	}
	token := mesh.AccessTest{On: mesh.AccessTokenPrincipal, Text: []mesh.TextMatch{{Kind: mesh.TextAny}}}
	who := func(what []mesh.AccessTest, who mesh.AccessTest) []mesh.AccessRule {
		out := mesh.AccessRule{Clauses: []mesh.AccessClause{{Who: true, Any: [][]mesh.AccessTest{{who}}}}}
		if what != nil {
			out.Clauses = append(out.Clauses, mesh.AccessClause{Any: [][]mesh.AccessTest{what}})
		}
		return []mesh.AccessRule{out}
	}
	all := []mesh.AccessRule{{}}
	for _, c := range []struct {
		name, spec string
		action     mesh.Action
		rules      []mesh.AccessRule
		exact      bool
	}{
		{"methods", `rules: [{to: [{operation: {methods: [GET]}}]}]`, mesh.Allow, rule(get...), true},
		{"everything", `rules: [{}]`, mesh.Allow, all, true},
		{"nothing", ``, mesh.Allow, nil, true},
		{"a token in ALLOW", `rules: [{from: [{source: {requestPrincipals: ["*"]}}], to: [{operation: {methods: [GET]}}]}]`, mesh.Allow, who(get, token), true},
		{"a token in DENY", "action: DENY\nrules: [{from: [{source: {requestPrincipals: [\"*\"]}}], to: [{operation: {methods: [GET]}}]}]", mesh.Deny, who(get, token), true},
		{"a claim", "action: DENY\nrules: [{when: [{key: \"request.auth.claims[a][b]\", values: [c]}]}]", mesh.Deny,
			who(nil, mesh.AccessTest{On: mesh.AccessClaim, Claim: []string{"a", "b"}, Text: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "c"}}}), true},
		{"an audience", "rules: [{when: [{key: request.auth.audiences, values: [c]}]}]", mesh.Allow,
			who(nil, mesh.AccessTest{On: mesh.AccessClaim, Claim: []string{"aud"}, Text: []mesh.TextMatch{{Kind: mesh.TextExact, Value: "c"}}}), true},
		{"the server's name in ALLOW", `rules: [{to: [{operation: {methods: [GET]}}], when: [{key: connection.sni, values: [a]}]}]`, mesh.Allow, nil, false},
		{"the server's name in DENY", "action: DENY\nrules: [{to: [{operation: {methods: [GET]}}], when: [{key: connection.sni, values: [a]}]}]", mesh.Deny, rule(get...), false},
		{"an empty source in ALLOW", `rules: [{from: [{source: {}}]}]`, mesh.Allow, nil, true},
		{"a port that is none in ALLOW", `rules: [{to: [{operation: {ports: [http, "80"]}}]}]`, mesh.Allow, rule(mesh.AccessTest{On: mesh.AccessPort, Ports: []uint16{80}}), false},
		{"an exception that is none in ALLOW", `rules: [{to: [{operation: {methods: [GET], notPorts: [http]}}]}]`, mesh.Allow, nil, false},
		{"a port that is none in DENY", "action: DENY\nrules: [{to: [{operation: {ports: [http, \"80\"]}}]}]", mesh.Deny, all, false},
		{"an exception that is none in DENY", "action: DENY\nrules: [{to: [{operation: {methods: [GET], notPorts: [http]}}]}]", mesh.Deny, rule(get...), false},
		{"CUSTOM", "action: CUSTOM\nprovider: {name: p}\nrules: [{to: [{operation: {methods: [GET]}}]}]", mesh.Deny, rule(get...), false},
		{"a template", `rules: [{to: [{operation: {paths: ["/a.b/{*}/{**}"]}}]}]`, mesh.Allow, rule(mesh.AccessTest{On: mesh.AccessPath, Text: []mesh.TextMatch{
			{Kind: mesh.TextRegex, Value: `/a\.b/[a-zA-Z0-9\-._~%!$&'()+,;:@=]+/[a-zA-Z0-9\-._~%!$&'()+,;:@=/]*`}}}), true},
		{"a template that is none", `rules: [{to: [{operation: {paths: ["/{*}b"]}}]}]`, mesh.Allow, nil, false},
		{"a header", `rules: [{when: [{key: "request.headers[X-A]", values: ["*"]}]}]`, mesh.Allow,
			rule(mesh.AccessTest{On: mesh.AccessHeader, Header: "x-a", Text: []mesh.TextMatch{{Kind: mesh.TextAny}}}), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := &securityv1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"}}
			if err := yaml.Unmarshal([]byte("targetRefs: [{kind: Service, name: ui}]\n"+c.spec), &p.Spec); err != nil {
				t.Fatal(err)
			}
			a := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}.Compile(p).Attached
			if a == nil {
				t.Fatal("waypoints do nothing about it")
			}
			if d := cmp.Diff(c.rules, a.Rules); d != "" || a.Action != c.action || (a.Message == "") != c.exact {
				t.Errorf("action %d, message %q; rules -want +got:\n%s", a.Action, a.Message, d)
			}
		})
	}
}
