package admission

import (
	"cmp"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	securityv1beta1 "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// Cluster is what a policy is read against. It may be older than the API server's by moments, so that nothing it
// says is more than a warning.
type Cluster interface {
	Namespaces() []string
	HasNamespace(name string) bool
	// Pods yields those of a namespace that have not finished, or those of all for "".
	Pods(namespace string) iter.Seq[Pod]
	// HasTarget reports whether there is what a targetRef names, in the policy's namespace.
	HasTarget(kind policy.TargetKind, namespace, name string) bool
	// PeerAuthentications yields those of a namespace.
	PeerAuthentications(namespace string) iter.Seq[*securityv1.PeerAuthentication]
}

// Pod is a pod as far as policies care.
type Pod struct {
	Namespace, Name, ServiceAccount string
	Labels                          map[string]string
	Captured                        bool // the mesh has its traffic
	Waypoint                        bool // its HTTP is seen
}

// What one object may cost: names beyond these are not looked up.
const (
	maxNames       = 64
	maxSuggestFrom = 5000 // namespaces among which a similar name is looked for
	maxSamples     = 3
)

// surroundings looks at one object in its cluster.
type surroundings struct {
	mesh     policy.Mesh
	cluster  Cluster
	problems []policy.Problem
	accounts map[string]map[string]bool // namespace → service accounts that its pods run as
	asked    map[string]bool
}

func (s *surroundings) warn(code policy.Code, field, format string, args ...any) {
	s.problems = append(s.problems, policy.Problem{Code: code, Severity: policy.Warning, Field: field, Message: fmt.Sprintf(format, args...)})
}

// around tells what will surprise about an object in this cluster.
func around(m policy.Mesh, c Cluster, obj any) []policy.Problem {
	s := &surroundings{mesh: m, cluster: c, accounts: map[string]map[string]bool{}, asked: map[string]bool{}}
	switch o := obj.(type) {
	case *securityv1.AuthorizationPolicy:
		if targets := m.Compile(o).Targets; len(targets) > 0 {
			s.targets(o.Namespace, targets)
		} else {
			in := s.scope(o.Namespace, o.Spec.Selector.GetMatchLabels())
			s.reach(in)
			s.http(o, in)
		}
		s.names(o)
	case *securityv1.PeerAuthentication:
		in := s.scope(o.Namespace, o.Spec.Selector.GetMatchLabels())
		if o.Namespace != m.RootNamespace || len(in.selector) == 0 { // else Check says that it applies to nothing
			s.reach(in)
		}
		s.conflicts(o)
	case *telemetryv1.Telemetry:
		if targets := m.CompileTelemetry(o).Targets; len(targets) > 0 {
			s.targets(o.Namespace, targets)
		}
	}
	return s.problems
}

// scope is what an object applies to.
type scope struct {
	where    string // in words
	selector map[string]string
	pods     int // selected
	captured int
	blind    int            // captured, and nobody sees their HTTP
	blindIn  map[string]int // by namespace
	others   map[string]map[string]bool
	all      int // pods of the namespace, selected or not
}

func (s *surroundings) scope(namespace string, selector map[string]string) scope {
	in := scope{where: "namespace " + namespace, selector: selector, blindIn: map[string]int{}, others: map[string]map[string]bool{}}
	look := namespace
	// In the root namespace an object is for the whole mesh; with a selector an AuthorizationPolicy is for the pods
	// of every namespace that have the labels.
	if namespace == s.mesh.RootNamespace {
		in.where, look = "the cluster", ""
	}
	for p := range s.cluster.Pods(look) {
		in.all++
		if !has(p.Labels, selector) {
			for k := range selector {
				if v, ok := p.Labels[k]; ok && len(in.others[k]) < maxSamples {
					if in.others[k] == nil {
						in.others[k] = map[string]bool{}
					}
					in.others[k][v] = true
				}
			}
			continue
		}
		in.pods++
		if !p.Captured {
			continue
		}
		in.captured++
		if !p.Waypoint {
			in.blind++
			in.blindIn[p.Namespace]++
		}
	}
	return in
}

func has(labels, selector map[string]string) bool {
	for k, v := range selector {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	return true
}

// reach warns of an object that applies to no pod, or to none that the mesh captures.
func (s *surroundings) reach(in scope) {
	switch {
	case in.pods == 0 && len(in.selector) > 0:
		hint := "check the labels with: kubectl get pods --show-labels"
		var near []string
		for _, k := range slices.Sorted(maps.Keys(in.others)) {
			for _, v := range slices.Sorted(maps.Keys(in.others[k])) {
				near = append(near, k+"="+v)
			}
		}
		if len(near) > 0 {
			hint = "pods there have " + strings.Join(near[:min(len(near), maxSamples)], ", ")
		}
		s.warn(policy.SelectsNothing, "spec.selector", "no pod in %s has the labels %s now, so that the policy applies to nothing; %s",
			in.where, labels(in.selector), hint)
	case in.pods > 0 && in.captured == 0:
		s.warn(policy.NotCaptured, "spec", "none of the pods that it applies to (%d now) is in the mesh, so that nothing enforces it; put a namespace in with: kubectl label namespace NAME istio.io/dataplane-mode=ambient",
			in.pods)
	}
}

func labels(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	if len(out) > maxSamples {
		out = append(out[:maxSamples], "…")
	}
	return short(strings.Join(out, ","))
}

// targets warns of those that are not there, of the kinds that are watched.
func (s *surroundings) targets(namespace string, targets []policy.Target) {
	for _, t := range targets {
		if (t.Kind == policy.TargetService || t.Kind == policy.TargetServiceEntry) && !s.cluster.HasTarget(t.Kind, namespace, t.Name) {
			s.warn(policy.UnknownTarget, "spec.targetRefs", "there is no %s in namespace %s now; check the name with: kubectl get %s -n %s",
				short(t.String()), namespace, strings.ToLower(t.Kind.String()), namespace)
		}
	}
}

// http counts the pods for which a rule on HTTP is decided without looking at it.
func (s *surroundings) http(p *securityv1.AuthorizationPolicy, in scope) {
	c := s.mesh.Compile(p)
	if len(c.HTTP) == 0 || in.blind == 0 {
		return
	}
	what := "allows nothing to them"
	switch p.Spec.Action {
	case securityv1beta1.AuthorizationPolicy_DENY, securityv1beta1.AuthorizationPolicy_CUSTOM:
		what = "denies them whatever its other conditions match"
	case securityv1beta1.AuthorizationPolicy_AUDIT:
		return
	}
	var names []string
	for _, n := range slices.SortedFunc(maps.Keys(in.blindIn), func(a, b string) int {
		return cmp.Or(in.blindIn[b]-in.blindIn[a], strings.Compare(a, b))
	}) {
		names = append(names, fmt.Sprintf("%s %d", n, in.blindIn[n]))
	}
	if len(names) > maxSamples {
		names = append(names[:maxSamples], "…")
	}
	s.warn(policy.DeniedWithoutWaypoint, "spec.rules", "%s that it applies to have no waypoint (%s): a rule with %s %s",
		count(in.blind, "workload"), strings.Join(names, ", "), strings.Join(c.HTTP, ", "), what)
}

// names warns of sources that are not there.
func (s *surroundings) names(p *securityv1.AuthorizationPolicy) {
	for i, r := range p.Spec.Rules {
		for j, f := range r.GetFrom() {
			src := f.GetSource()
			at := fmt.Sprintf("spec.rules[%d].from[%d].source.", i, j)
			s.namespaceValues(at+"namespaces", src.GetNamespaces())
			s.namespaceValues(at+"notNamespaces", src.GetNotNamespaces())
			s.accountValues(at+"serviceAccounts", p.Namespace, src.GetServiceAccounts())
			s.accountValues(at+"notServiceAccounts", p.Namespace, src.GetNotServiceAccounts())
			s.principalValues(at+"principals", src.GetPrincipals())
			s.principalValues(at+"notPrincipals", src.GetNotPrincipals())
		}
		for j, w := range r.GetWhen() {
			at := fmt.Sprintf("spec.rules[%d].when[%d].", i, j)
			for _, l := range []struct {
				name   string
				values []string
			}{{"values", w.GetValues()}, {"notValues", w.GetNotValues()}} {
				switch w.GetKey() {
				case "source.namespace":
					s.namespaceValues(at+l.name, l.values)
				case "source.serviceAccount":
					s.accountValues(at+l.name, p.Namespace, l.values)
				case "source.principal":
					s.principalValues(at+l.name, l.values)
				}
			}
		}
		if len(s.asked) >= maxNames {
			return
		}
	}
}

// once reports whether a name is to be looked up: the first time, and within the bound.
func (s *surroundings) once(kind, name string) bool {
	k := kind + name
	if s.asked[k] || len(s.asked) >= maxNames {
		return false
	}
	s.asked[k] = true
	return true
}

func (s *surroundings) namespaceValues(at string, values []string) {
	for i, v := range values {
		if v == "" || v == "*" || strings.Contains(v, "/") || !s.once("n", v) {
			continue
		}
		if !strings.HasPrefix(v, "*") && !strings.HasSuffix(v, "*") {
			s.namespace(fmt.Sprintf("%s[%d]", at, i), v)
			continue
		}
		if !slices.ContainsFunc(s.cluster.Namespaces(), func(n string) bool { return matches(v, n) }) {
			s.warn(policy.UnknownNamespace, fmt.Sprintf("%s[%d]", at, i), "no namespace matches %s now; connections of none match", short(v))
		}
	}
}

// namespace warns of a namespace that is not there, and reports whether it is.
func (s *surroundings) namespace(at, name string) bool {
	if s.cluster.HasNamespace(name) {
		return true
	}
	hint := "make it, or correct the name"
	if near := Nearest(name, s.cluster.Namespaces()); near != "" {
		hint = "is " + near + " meant?"
	}
	s.warn(policy.UnknownNamespace, at, "there is no namespace %s now, so that no connection comes from it; %s", short(name), hint)
	return false
}

func (s *surroundings) accountValues(at, own string, values []string) {
	for i, v := range values {
		ns, sa, qualified := strings.Cut(v, "/")
		if !qualified {
			ns, sa = own, v
		}
		if ns != "" && sa != "" && !strings.ContainsAny(sa, "/*") {
			s.account(fmt.Sprintf("%s[%d]", at, i), ns, sa)
		}
	}
}

func (s *surroundings) account(at, namespace, name string) {
	if !s.once("a", namespace+"/"+name) {
		return
	}
	if !s.cluster.HasNamespace(namespace) {
		if s.once("n", namespace) {
			s.namespace(at, namespace)
		}
		return
	}
	run := s.accounts[namespace]
	if run == nil {
		run = map[string]bool{}
		for p := range s.cluster.Pods(namespace) {
			run[p.ServiceAccount] = true
		}
		s.accounts[namespace] = run
	}
	if run[name] {
		return
	}
	hint := "check the name with: kubectl get serviceaccounts -n " + short(namespace)
	if near := Nearest(name, slices.Sorted(maps.Keys(run))); near != "" {
		hint = "is " + near + " meant?"
	}
	s.warn(policy.UnusedServiceAccount, at, "no pod in namespace %s runs as service account %s now; %s", short(namespace), short(name), hint)
}

// principalValues looks at those that are written out: <trust domain>/ns/<namespace>/sa/<service account>.
func (s *surroundings) principalValues(at string, values []string) {
	for i, v := range values {
		part := strings.Split(v, "/")
		if strings.Contains(v, "*") || len(part) != 5 || part[1] != "ns" || part[3] != "sa" {
			continue
		}
		if part[0] != s.mesh.TrustDomain && !slices.Contains(s.mesh.TrustDomainAliases, part[0]) {
			continue // of another mesh: nothing is known of it
		}
		s.account(fmt.Sprintf("%s[%d]", at, i), part[2], part[4])
	}
}

// conflicts warns of a PeerAuthentication beside which an older one of the same level holds.
func (s *surroundings) conflicts(p *securityv1.PeerAuthentication) {
	selector := p.Spec.Selector.GetMatchLabels()
	for other := range s.cluster.PeerAuthentications(p.Namespace) {
		if other.Name == p.Name {
			continue
		}
		theirs := other.Spec.Selector.GetMatchLabels()
		if (len(theirs) == 0) != (len(selector) == 0) {
			continue // of another level: the more specific one holds
		}
		// The stored object knows when it was made. This one is new, or already compared when it was.
		if len(selector) == 0 {
			s.warn(policy.Conflict, "metadata.name", "PeerAuthentication %s is for the whole of %s as well, and of two the older one holds; change that one, or delete one of them",
				other.Name, p.Namespace)
			return
		}
		for pod := range s.cluster.Pods(p.Namespace) {
			if has(pod.Labels, selector) && has(pod.Labels, theirs) {
				s.warn(policy.Conflict, "spec.selector", "PeerAuthentication %s selects the pod %s as well, and of two the older one holds; make their selectors differ",
					other.Name, pod.Name)
				return
			}
		}
	}
}

// matches is Istio's matching of a pattern with a * at one end.
func matches(pattern, s string) bool {
	if strings.HasPrefix(pattern, "*") {
		return strings.HasSuffix(s, pattern[1:])
	}
	return strings.HasPrefix(s, strings.TrimSuffix(pattern, "*"))
}

// Nearest is the name that a typing mistake may have made of another, "" for none.
func Nearest(name string, all []string) string {
	if len(name) > 63 || len(all) > maxSuggestFrom {
		return ""
	}
	best, at := "", min(2, (len(name)+2)/3)+1
	for _, n := range all {
		if d := distance(name, n, at+1); d < at || d == at && best != "" && n < best {
			best, at = n, d
		}
	}
	return best
}

// distance is the number of letters to change between a and b, or limit where it is not below that.
func distance(a, b string, limit int) int {
	if d := len(a) - len(b); d >= limit || -d >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost = 1 + min(diagonal, row[j], row[j-1])
			}
			diagonal, row[j] = row[j], cost
		}
	}
	return min(row[len(b)], limit)
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// short keeps a stranger's words from filling the answer.
func short(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}
