package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	securityv1beta1 "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// The cases are Istio's own (pilot/pkg/security/trustdomain), in its words.
func TestTrustDomainAliases(t *testing.T) {
	for _, c := range []struct {
		domain  string
		aliases []string
		in, out string
	}{
		{"td2", []string{"td1"}, "td1/ns/foo/sa/bar", "td2/ns/foo/sa/bar td1/ns/foo/sa/bar"},
		{"td2", []string{"td1"}, "cluster.local/ns/foo/sa/bar", "td2/ns/foo/sa/bar td1/ns/foo/sa/bar"},
		{"td2", []string{"td1"}, "other/ns/foo/sa/bar", "other/ns/foo/sa/bar"},
		{"td1", nil, "*/ns/foo/sa/bar", "*/ns/foo/sa/bar"},
		{"td1", []string{"td2"}, "*", "*"},
		{"td1", []string{"td2"}, "sa/bar", "sa/bar"},
		{"td1", []string{"td2"}, "td1/ns/foo/*", "td1/ns/foo/*"},
		{"new-td", []string{"old-td"}, "*-td/ns/foo/sa/bar", "*-td/ns/foo/sa/bar"},
		{"new-td", []string{"old-td", "example"}, "*-td/ns/foo/sa/bar", "*-td/ns/foo/sa/bar example/ns/foo/sa/bar"},
	} {
		got := Mesh{TrustDomain: c.domain, TrustDomainAliases: c.aliases}.principals([]string{c.in})
		if s := strings.Join(got, " "); s != c.out {
			t.Errorf("%s in the mesh %s with %v: %s, want %s", c.in, c.domain, c.aliases, s, c.out)
		}
	}
}

func rules(n int, r *securityv1beta1.Rule) []*securityv1beta1.Rule {
	out := make([]*securityv1beta1.Rule, n)
	for i := range out {
		out[i] = r
	}
	return out
}

// What is beyond all bounds is refused with the bound it exceeds, denies or allows nothing, and costs next to nothing.
func TestHostilePolicies(t *testing.T) {
	m := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}
	many := make([]string, 200_000)
	for i := range many {
		many[i] = fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255)
	}
	source := func(s *securityv1beta1.Source) *securityv1beta1.Rule {
		return &securityv1beta1.Rule{From: []*securityv1beta1.Rule_From{{Source: s}}}
	}
	froms := make([]*securityv1beta1.Rule_From, 100_000)
	for name, c := range map[string]struct {
		rules []*securityv1beta1.Rule
		limit string
	}{
		"10,000 rules":             {rules(10_000, &securityv1beta1.Rule{}), "10000 rules"},
		"10 MB in one value":       {rules(1, source(&securityv1beta1.Source{Principals: []string{strings.Repeat("a*", 5<<20)}})), "256 KiB"},
		"10 MB in many":            {rules(500, source(&securityv1beta1.Source{Namespaces: slices.Repeat([]string{strings.Repeat("x", 2000)}, 10)})), "256 KiB"},
		"200,000 addresses":        {rules(1, source(&securityv1beta1.Source{IpBlocks: many})), "8192 values"},
		"100,000 sources, all nil": {rules(1, &securityv1beta1.Rule{From: froms}), "8192 values"},
		"conditions":               {rules(512, &securityv1beta1.Rule{When: slices.Repeat([]*securityv1beta1.Condition{{Key: strings.Repeat("k", 1000)}}, 20)}), "8192 values"},
	} {
		for _, action := range []securityv1beta1.AuthorizationPolicy_Action{0, 1, 2, 3} {
			p := &securityv1.AuthorizationPolicy{}
			p.Namespace, p.Name, p.Spec.Action, p.Spec.Rules = "shop", "p", action, c.rules
			start := time.Now()
			got := m.Compile(p)
			problems := m.Check(p)
			if took := time.Since(start); took > 2*time.Second { // it takes a millisecond; the machine may be busy
				t.Errorf("%s: judged in %s", name, took)
			}
			if got.Exact || got.Reason != ReasonTooLarge || !strings.Contains(got.Message, c.limit) || len(got.Message) > 500 {
				t.Errorf("%s, %s: %t %s %.200q", name, action, got.Exact, got.Reason, got.Message)
			}
			everything := got.Policy.Matches(mesh.Conn{SourceIP: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddrPort("10.0.0.2:80")})
			if deny := got.Policy.Action == mesh.Deny; everything != deny || len(got.Policy.Rules) > 1 {
				t.Errorf("%s, %s: it becomes %+v", name, action, got.Policy)
			}
			if len(problems) == 0 || problems[0].Severity != Error || !strings.Contains(problems[0].Message, c.limit) {
				t.Errorf("%s, %s: Check says %.300v", name, action, problems)
			}
		}
	}
}

// What is as large as it may be is compiled whole.
func TestLargestPolicy(t *testing.T) {
	p := &securityv1.AuthorizationPolicy{}
	p.Namespace, p.Name = "shop", "p"
	p.Spec.Rules = rules(MaxRules, &securityv1beta1.Rule{
		From: []*securityv1beta1.Rule_From{{Source: &securityv1beta1.Source{Namespaces: slices.Repeat([]string{"shop"}, 14)}}},
	})
	got := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}.Compile(p)
	if !got.Exact || len(got.Policy.Rules) != MaxRules {
		t.Errorf("%d rules, exact %t: %s", len(got.Policy.Rules), got.Exact, got.Message)
	}
}

// What is said about values that mean nothing is short, whatever they are.
func TestAbsurdStrings(t *testing.T) {
	m := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}
	p := &securityv1.AuthorizationPolicy{}
	p.Spec.Rules = rules(1, &securityv1beta1.Rule{From: []*securityv1beta1.Rule_From{{Source: &securityv1beta1.Source{
		IpBlocks:        slices.Repeat([]string{strings.Repeat("\x00\xff\n", 30)}, 1000),
		ServiceAccounts: []string{"a/b/c", "/", "", strings.Repeat("x", 1000)},
	}}}, When: []*securityv1beta1.Condition{{Key: strings.Repeat("(a+)+", 1000), Values: []string{"x"}}}})
	got := m.Compile(p)
	if got.Exact || len(got.Policy.Rules) != 0 || len(got.Message) > 2000 {
		t.Errorf("exact %t, %d rules, a message of %d characters", got.Exact, len(got.Policy.Rules), len(got.Message))
	}
	for _, problem := range m.Check(p) {
		if len(problem.String()) > 600 {
			t.Errorf("a problem of %d characters: %.300s", len(problem.String()), problem)
		}
	}
}

// Trust domains stand beside principals in one source; both have to hold, for each source apart.
func TestTrustDomainsBesidePrincipals(t *testing.T) {
	p := &securityv1.AuthorizationPolicy{}
	p.Spec.Rules = rules(1, &securityv1beta1.Rule{From: []*securityv1beta1.Rule_From{
		{Source: &securityv1beta1.Source{Principals: []string{"*/sa/a"}, TrustDomains: []string{"one"}}},
		{Source: &securityv1beta1.Source{Principals: []string{"*/sa/b"}}},
		{Source: &securityv1beta1.Source{NotTrustDomains: []string{"one", "two"}}},
	}})
	got := Mesh{TrustDomain: "one", RootNamespace: "istio-system"}.Compile(p)
	for _, c := range []struct {
		domain, account string
		want            bool
	}{{"one", "a", true}, {"two", "a", false}, {"two", "b", true}, {"one", "c", false}, {"three", "c", true}, {"oneone", "a", true}, {"two", "c", false}} {
		conn := mesh.Conn{Source: mesh.Identity{TrustDomain: c.domain, Namespace: "n", ServiceAccount: c.account}}
		if m := got.Policy.Matches(conn); m != c.want {
			t.Errorf("%s: %t, want %t", conn.Source, m, c.want)
		}
	}
}

// What selects the pods of a Gateway is decided there, request by request: nobody is told that it takes a waypoint.
func TestPoliciesOfGatewaysNeedNoWaypoint(t *testing.T) {
	for label, warned := range map[string]bool{LabelGateway: false, "app": true} {
		selector := &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{label: "edge"}}
		a := &securityv1.AuthorizationPolicy{Spec: securityv1beta1.AuthorizationPolicy{Selector: selector,
			Rules: []*securityv1beta1.Rule{{To: []*securityv1beta1.Rule_To{{Operation: &securityv1beta1.Operation{Paths: []string{"/a"}}}}}}}}
		r := &securityv1.RequestAuthentication{Spec: securityv1beta1.RequestAuthentication{Selector: selector,
			JwtRules: []*securityv1beta1.JWTRule{{Issuer: "https://issuer.example"}}}}
		for _, obj := range []any{a, r} {
			got := Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}.Check(obj)
			if has := slices.ContainsFunc(got, func(p Problem) bool { return p.Code == NeedsWaypoint }); has != warned {
				t.Errorf("%T by the label %s: %v", obj, label, got)
			}
		}
	}
}
