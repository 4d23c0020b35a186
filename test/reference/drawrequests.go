package reference

import (
	"fmt"
	"math/rand/v2"
	"strings"

	securityapi "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What policies about requests and requests are drawn from.
var (
	Issuers = []string{"iss-a", "https://b.example/x"}
	Sources = []string{"127.0.0.2", "127.0.0.3", "127.0.0.6", "127.0.1.9"}

	localNets    = []string{"127.0.0.0/8", "127.0.0.2", "127.0.0.2/31", "127.0.1.0/24", "10.0.0.0/8", "0.0.0.0/0"}
	tokens       = []string{"*", "iss-a/me", "iss-a/*", "*/me", "https://b.example/x/you", "https://b.example/*", "*/you", "iss-a/a/me", "nobody/x"}
	hostPatterns = []string{"shop.example", "*.example", "shop.*", "*", "shop.example:80", "Shop.Example", "*.example:8080", "other.example"}
	hosts        = []string{"shop.example", "SHOP.example", "shop.example:80", "shop.example.", "shop.example.:80", "shop.example:8080", "other.example", "shop.example.org", "127.0.0.1"}
	pathPatterns = []string{"/admin", "/admin/*", "/admin*", "/admin/x", "*/x", "/public/*", "/", "*", "/items/{*}", "/items/{**}", "/items/{*}/x", "/{*}/x", "*.css"}
	targets      = []string{"/admin", "/admin/", "/admin/x", "/admin//x", "//admin/x", "/admin%2Fx", "/admin%2fx", "/admin%5Cx", `/admin\x`, "/admin/./x", "/public/../admin/x", "/admin/..",
		"/admin/%2e%2e/public/a", "/%61dmin/x", "/ADMIN/x", "/admin;a=b/x", "/admin/x;a=b", "/admin?a=/public/x", "/public/x", "/public/admin/x", "/admin%00", "/admin#x", "/admin/x#", "/items/1",
		"/items/1/x", "/items/", "/items", "/items//x", "/items/a%2Fx", "/a.css", "/a.css?x", "/", "/.", "/admin/%2E/x", "/admin/x%20", "/admin/.../x", "/x/y/../../admin/x"}
	methods        = []string{"GET", "POST", "PUT"}
	methodPatterns = []string{"GET", "POST", "P*", "*T", "*", "DELETE"}
	teams          = []string{"a", "ab", "b", "za", "z"}
	teamPatterns   = []string{"a", "a*", "*a", "*", "a,b", "c"}
	claimKeys      = []string{"request.auth.claims[groups]", "request.auth.claims[realm][role]", "request.auth.claims[scope]", "request.auth.audiences", "request.auth.presenter", "request.auth.claims[n]"}
	claimPatterns  = []string{"a", "a*", "*b", "*", "admin", "read", "shop"}
)

func (d drawer) requestSource() *securityapi.Source {
	for {
		s := &securityapi.Source{
			IpBlocks: d.some(6, 2, localNets...), NotIpBlocks: d.some(8, 1, localNets...), RemoteIpBlocks: d.some(8, 2, localNets...), NotRemoteIpBlocks: d.some(12, 1, localNets...),
			TrustDomains: d.some(9, 2, tdPatterns...), NotTrustDomains: d.some(12, 2, tdPatterns...),
			RequestPrincipals: d.some(4, 2, tokens...), NotRequestPrincipals: d.some(8, 2, tokens...),
		}
		d.identities(s)
		if len(s.String()) > 0 {
			return s
		}
	}
}

func (d drawer) requestOperation() *securityapi.Operation {
	for {
		o := &securityapi.Operation{
			Ports: d.some(8, 2, ports...), NotPorts: d.some(12, 1, ports...), Methods: d.some(3, 2, methodPatterns...), NotMethods: d.some(8, 1, methodPatterns...),
			Hosts: d.some(4, 2, hostPatterns...), NotHosts: d.some(8, 1, hostPatterns...), Paths: d.some(2, 3, pathPatterns...), NotPaths: d.some(4, 2, pathPatterns...),
		}
		if len(o.String()) > 0 {
			return o
		}
	}
}

func (d drawer) requestCondition() *securityapi.Condition {
	values, keys := claimPatterns, claimKeys
	c := &securityapi.Condition{}
	switch d.IntN(4) {
	case 0:
		c.Key, values = "request.headers[X-Team]", teamPatterns
	case 1:
		c.Key, values = "request.auth.principal", tokens
	case 2:
		c.Key, values = pick(d, "remote.ip", "source.ip"), localNets
	default:
		c.Key = pick(d, keys...)
	}
	for len(c.Values)+len(c.NotValues) == 0 {
		c.Values, c.NotValues = d.some(2, 2, values...), d.some(3, 2, values...)
	}
	return c
}

// DrawPolicies draws those of one Service.
func DrawPolicies(r *rand.Rand, namespace, service string) []*securityv1.AuthorizationPolicy {
	d := drawer{r}
	var out []*securityv1.AuthorizationPolicy
	for i := range 1 + d.IntN(3) {
		p := &securityv1.AuthorizationPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("%s-%d", service, i)}}
		p.Spec.Action = pick(d, securityapi.AuthorizationPolicy_ALLOW, securityapi.AuthorizationPolicy_ALLOW, securityapi.AuthorizationPolicy_DENY,
			securityapi.AuthorizationPolicy_DENY, securityapi.AuthorizationPolicy_AUDIT)
		if d.one(12) {
			p.Annotations = map[string]string{"istio.io/dry-run": "true"}
		}
		for range 1 + d.IntN(3) {
			rule := &securityapi.Rule{}
			for range d.IntN(3) {
				rule.From = append(rule.From, &securityapi.Rule_From{Source: d.requestSource()})
			}
			for range d.IntN(3) {
				rule.To = append(rule.To, &securityapi.Rule_To{Operation: d.requestOperation()})
			}
			if d.one(3) {
				rule.When = append(rule.When, d.requestCondition())
			}
			p.Spec.Rules = append(p.Spec.Rules, rule)
		}
		out = append(out, p)
	}
	return out
}

// DrawRequest draws a request; its connection is left to who makes one. The claims are those of a token that is sent,
// whether anybody verifies it or not.
func DrawRequest(r *rand.Rand) Request {
	d := drawer{r}
	out := Request{Method: pick(d, methods...), Target: pick(d, targets...), Host: pick(d, hosts...), Headers: map[string][]string{}}
	for range d.IntN(3) {
		out.Headers["x-team"] = append(out.Headers["x-team"], pick(d, teams...))
	}
	if d.one(3) {
		out.Headers["x-forwarded-for"] = []string{pick(d, "127.0.0.2", "10.0.0.1")}
	}
	if d.one(3) {
		return out
	}
	out.Claims = map[string]any{"iss": pick(d, Issuers...)}
	for _, c := range []struct {
		claim  string
		values []any
	}{
		{"sub", []any{"me", "you", "a/me", nil}}, {"aud", []any{"shop", []string{"shop", "bank"}, []string{"a", "shop"}}}, {"azp", []any{"a", "shop", nil, nil}},
		{"groups", []any{[]string{"a", "b"}, "a", []string{"ab"}, nil, []string{}}}, {"scope", []any{"read write", "a", nil}}, {"n", []any{1, true, nil, "a"}},
		{"realm", []any{map[string]any{"role": "admin"}, map[string]any{"role": []string{"a", "x"}}, "admin", nil}},
	} {
		if v := pick(d, c.values...); v != nil {
			out.Claims[c.claim] = v
		}
	}
	return out
}

// String is for whoever has to find out why two disagree.
func (r Request) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %q host %q from %s %s headers %v claims %v", r.Method, r.Target, r.Host, r.SourceIP, r.principal(), r.Headers, r.Claims)
	return b.String()
}
