package policy

import (
	"maps"
	"regexp"
	"slices"
	"strings"

	securityv1beta1 "istio.io/api/security/v1beta1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// accessCompiler compiles the rules of one policy for waypoints. As on nodes, what cannot be evaluated makes a rule match
// nothing in an ALLOW policy and is left out of it in a DENY policy.
type accessCompiler struct {
	mesh      Mesh
	namespace string
	deny      bool
	unseen    map[string]bool
	invalid   []string
}

// access is what waypoints do about a policy.
func (m Mesh) access(namespace string, spec *securityv1beta1.AuthorizationPolicy, action mesh.Action) (rules []mesh.AccessRule, unseen, invalid []string) {
	b := &accessCompiler{mesh: m, namespace: namespace, deny: action == mesh.Deny, unseen: map[string]bool{}}
	for _, r := range spec.Rules {
		if r == nil {
			continue
		}
		if out, ok := b.rule(r); ok {
			rules = append(rules, out)
		}
	}
	return rules, slices.Sorted(maps.Keys(b.unseen)), b.invalid
}

// tests is a list of tests under construction.
type tests struct {
	list  []mesh.AccessTest
	never bool // it can hold for nothing
}

func (b *accessCompiler) rule(r *securityv1beta1.Rule) (out mesh.AccessRule, ok bool) {
	var from, to []tests
	for _, f := range r.From {
		s, t := f.GetSource(), tests{}
		b.add(&t, mesh.AccessTest{On: mesh.AccessPrincipal}, b.mesh.principals(s.GetPrincipals()), b.mesh.principals(s.GetNotPrincipals()))
		b.add(&t, mesh.AccessTest{On: mesh.AccessNamespace}, s.GetNamespaces(), s.GetNotNamespaces())
		b.add(&t, mesh.AccessTest{On: mesh.AccessServiceAccount}, s.GetServiceAccounts(), s.GetNotServiceAccounts())
		b.add(&t, mesh.AccessTest{On: mesh.AccessTrustDomain}, b.mesh.domains(s.GetTrustDomains()), b.mesh.domains(s.GetNotTrustDomains()))
		b.add(&t, mesh.AccessTest{On: mesh.AccessSourceIP}, s.GetIpBlocks(), s.GetNotIpBlocks())
		b.add(&t, mesh.AccessTest{On: mesh.AccessRemoteIP}, s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks())
		b.add(&t, mesh.AccessTest{On: mesh.AccessTokenPrincipal}, s.GetRequestPrincipals(), s.GetNotRequestPrincipals())
		from = append(from, t)
	}
	for _, o := range r.To {
		op, t := o.GetOperation(), tests{}
		b.add(&t, mesh.AccessTest{On: mesh.AccessPort}, op.GetPorts(), op.GetNotPorts())
		b.add(&t, mesh.AccessTest{On: mesh.AccessHost}, op.GetHosts(), op.GetNotHosts())
		b.add(&t, mesh.AccessTest{On: mesh.AccessMethod}, op.GetMethods(), op.GetNotMethods())
		b.add(&t, mesh.AccessTest{On: mesh.AccessPath}, op.GetPaths(), op.GetNotPaths())
		to = append(to, t)
	}
	ok = true
	if len(r.From) > 0 {
		ok = b.clause(&out, true, from)
	}
	if len(r.To) > 0 {
		ok = b.clause(&out, false, to) && ok
	}
	for _, w := range r.When {
		t := tests{}
		on, known := conditionOn(w.GetKey())
		switch {
		case !known:
			b.unseen[short(w.GetKey())] = true
			t.never = !b.deny
		case on.On == mesh.AccessPrincipal:
			b.add(&t, on, b.mesh.principals(w.GetValues()), b.mesh.principals(w.GetNotValues()))
		case on.On == mesh.AccessTrustDomain:
			b.add(&t, on, b.mesh.domains(w.GetValues()), b.mesh.domains(w.GetNotValues()))
		default:
			b.add(&t, on, w.GetValues(), w.GetNotValues())
		}
		ok = b.clause(&out, on.On.Who(), []tests{t}) && ok
	}
	return out, ok
}

// conditionOn is the attribute that a condition is about, as a test without values; false for one that waypoints do not
// look at.
func conditionOn(key string) (_ mesh.AccessTest, known bool) {
	if rest, ok := strings.CutPrefix(key, "request.headers["); ok {
		name, ok := strings.CutSuffix(rest, "]")
		return mesh.AccessTest{On: mesh.AccessHeader, Header: strings.ToLower(name)}, ok && name != ""
	}
	if rest, ok := strings.CutPrefix(key, "request.auth.claims["); ok {
		rest, ok = strings.CutSuffix(rest, "]")
		path := strings.Split(rest, "][")
		return mesh.AccessTest{On: mesh.AccessClaim, Claim: path}, ok && !slices.Contains(path, "")
	}
	t, known := map[string]mesh.AccessTest{
		"source.ip": {On: mesh.AccessSourceIP}, "source.namespace": {On: mesh.AccessNamespace}, "source.principal": {On: mesh.AccessPrincipal},
		"source.serviceAccount": {On: mesh.AccessServiceAccount}, "source.trustDomain": {On: mesh.AccessTrustDomain}, "remote.ip": {On: mesh.AccessRemoteIP},
		"destination.ip": {On: mesh.AccessDestinationIP}, "destination.port": {On: mesh.AccessPort},
		"request.auth.principal": {On: mesh.AccessTokenPrincipal},
		"request.auth.audiences": {On: mesh.AccessClaim, Claim: []string{"aud"}}, "request.auth.presenter": {On: mesh.AccessClaim, Claim: []string{"azp"}},
	}[key]
	return t, known
}

// clause adds one to a rule; false where it holds for nothing.
func (b *accessCompiler) clause(out *mesh.AccessRule, who bool, all []tests) bool {
	c := mesh.AccessClause{Who: who}
	for _, t := range all {
		switch {
		case t.never:
		case len(t.list) > 0:
			c.Any = append(c.Any, t.list)
		case b.deny: // nothing is left of it but that it holds
			return true
		}
	}
	if len(c.Any) == 0 {
		return false
	}
	out.Clauses = append(out.Clauses, c)
	return true
}

// add adds a test of each of the two lists that has values.
func (b *accessCompiler) add(t *tests, on mesh.AccessTest, values, notValues []string) {
	for _, list := range []struct {
		not    bool
		values []string
	}{{false, values}, {true, notValues}} {
		if len(list.values) == 0 {
			continue
		}
		out, broken := on, false
		out.Not = list.not
		for _, v := range list.values {
			if !b.value(&out, v) {
				b.invalid = append(b.invalid, quote(v))
				broken = true
			}
		}
		n := len(out.Text) + len(out.Nets) + len(out.Ports)
		switch {
		case broken && b.deny && !list.not: // the list is given up, so that more is denied rather than less
			continue
		case broken && !b.deny && (list.not || n == 0):
			t.never = true
		}
		if n > 0 {
			t.list = append(t.list, out)
		}
	}
}

// value adds one to a test; false where it means nothing.
func (b *accessCompiler) value(t *mesh.AccessTest, v string) bool {
	switch t.On {
	case mesh.AccessSourceIP, mesh.AccessRemoteIP, mesh.AccessDestinationIP:
		p, ok := mesh.ParseRange(v)
		if ok {
			t.Nets = append(t.Nets, p)
		}
		return ok
	case mesh.AccessPort:
		p, ok := parsePort(v)
		if ok {
			t.Ports = append(t.Ports, p)
		}
		return ok
	case mesh.AccessServiceAccount:
		rc := ruleCompiler{namespace: b.namespace}
		a, ok := rc.parseServiceAccount(v)
		if ok {
			t.Text = append(t.Text, mesh.TextMatch{Kind: mesh.TextExact, Value: a.Namespace + "/" + a.ServiceAccount})
		}
		return ok
	case mesh.AccessPath:
		if strings.Contains(v, "{*}") || strings.Contains(v, "{**}") {
			r, ok := templateRegex(v)
			if ok {
				t.Text = append(t.Text, mesh.TextMatch{Kind: mesh.TextRegex, Value: r})
			}
			return ok
		}
	case mesh.AccessTrustDomain:
		if strings.Contains(v, "/") {
			return false
		}
	}
	p, ok := parseMatch(v)
	if !ok {
		return false
	}
	t.Text = append(t.Text, mesh.TextMatch{Kind: textKinds[p.Kind], Value: p.Value})
	return true
}

// templateRegex says with a regular expression what a path template does.
func templateRegex(v string) (string, bool) {
	c := &checker{}
	if c.path("", v); len(c.found[Error]) > 0 {
		return "", false
	}
	const letters = `a-zA-Z0-9\-._~%!$&'()+,;:@=`
	return strings.NewReplacer(`\{\*\*\}`, "["+letters+"/]*", `\{\*\}`, "["+letters+"]+").Replace(regexp.QuoteMeta(v)), true
}

var textKinds = map[mesh.StringMatchKind]mesh.TextKind{
	mesh.MatchExact: mesh.TextExact, mesh.MatchPrefix: mesh.TextPrefix, mesh.MatchSuffix: mesh.TextSuffix, mesh.MatchPresence: mesh.TextAny,
}
