package policy

import (
	"slices"
	"strings"
)

// defaultDomain in a policy stands for the mesh's own trust domain, whatever that is called.
const defaultDomain = "cluster.local"

// principals puts every trust domain of the mesh in the place of one of them, as Istio does: who changes the
// trust domain of a mesh need not change its policies at the same moment. It takes place where the principal is
// complete and names a trust domain; other patterns stay as they are.
func (m Mesh) principals(values []string) []string {
	all := append([]string{m.TrustDomain}, m.TrustDomainAliases...)
	var out []string
	for _, p := range values {
		domain, rest, _ := strings.Cut(p, "/")
		if strings.Count(p, "/") != 4 || domain == "*" || domain != defaultDomain && !slices.ContainsFunc(all, func(d string) bool { return overlap(domain, d) }) {
			out = append(out, p)
			continue
		}
		var own []string
		for _, d := range all {
			v := d + "/" + rest
			if suffix, ok := strings.CutPrefix(domain, "*"); ok && strings.HasSuffix(d, suffix) {
				v = p // the pattern has this domain in it
			}
			if !slices.Contains(own, v) {
				own = append(own, v)
			}
		}
		out = append(out, own...)
	}
	return out
}

// overlap reports whether a trust domain of a policy names one of the mesh, either being a pattern.
func overlap(a, b string) bool {
	match := func(v, pattern string) bool {
		if p, ok := strings.CutSuffix(pattern, "*"); ok && strings.HasPrefix(v, p) {
			return true
		}
		p, ok := strings.CutPrefix(pattern, "*")
		return ok && strings.HasSuffix(v, p)
	}
	return a == b || match(a, b) || match(b, a)
}

// domains does the same for lists of trust domains.
func (m Mesh) domains(values []string) []string {
	all := append([]string{m.TrustDomain}, m.TrustDomainAliases...)
	var out []string
	for _, v := range values {
		more := []string{v}
		if slices.Contains(all, v) {
			more = all
		}
		for _, d := range more {
			if !slices.Contains(out, d) {
				out = append(out, d)
			}
		}
	}
	return out
}
