package policy

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	securityv1beta1 "istio.io/api/security/v1beta1"
	typev1beta1 "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Severity tells an object that must not be stored from one that does something its author may not expect.
type Severity uint8

const (
	Error Severity = iota
	Warning
)

// Problem is one thing that is wrong with an object.
type Problem struct {
	Code     Code
	Severity Severity
	Field    string // spec.rules[0].from[0].source.namespaces
	Message  string // what is wrong, and how to mend it
}

func (p Problem) String() string { return p.Field + ": " + p.Message + " (" + string(p.Code) + ")" }

// MaxProblems is how many problems of each severity Check reports of one object.
const MaxProblems = 20

// checker collects problems, by severity: no number of warnings hides an error.
type checker struct {
	mesh  Mesh
	found [2][]Problem
	more  [2]int
}

func (c *checker) add(s Severity, code Code, field, format string, args ...any) {
	if len(c.found[s]) >= MaxProblems {
		c.more[s]++
		return
	}
	c.found[s] = append(c.found[s], Problem{code, s, field, fmt.Sprintf(format, args...)})
}

// problems has the errors first.
func (c *checker) problems() []Problem {
	var out []Problem
	for s, found := range c.found {
		out = append(out, found...)
		if n := c.more[s]; n > 0 {
			out = append(out, Problem{More, Severity(s), "spec", fmt.Sprintf("and %d more", n)})
		}
	}
	return out
}

func (c *checker) err(code Code, field, format string, args ...any) {
	c.add(Error, code, field, format, args...)
}
func (c *checker) warn(code Code, field, format string, args ...any) {
	c.add(Warning, code, field, format, args...)
}

// Check tells what is wrong with an AuthorizationPolicy, a PeerAuthentication, a RequestAuthentication or a Telemetry: errors
// where Istio's own validation refuses the object, warnings where it means something else than it seems to say.
// Errors come first. Other kinds have no problems.
func (m Mesh) Check(obj any) []Problem {
	c := &checker{mesh: m}
	switch o := obj.(type) {
	case *securityv1.AuthorizationPolicy:
		c.authorization(o)
	case *securityv1.PeerAuthentication:
		c.peer(o)
	case *securityv1.RequestAuthentication:
		c.request(o)
	case *telemetryv1.Telemetry:
		c.telemetry(o)
	}
	return c.problems()
}

func (c *checker) authorization(p *securityv1.AuthorizationPolicy) {
	spec := &p.Spec
	c.attachment(p.Namespace, spec.Selector, spec.TargetRef, spec.TargetRefs)
	if v, ok := p.Annotations[AnnotationDryRun]; ok {
		switch _, err := strconv.ParseBool(v); {
		case spec.Action != securityv1beta1.AuthorizationPolicy_ALLOW && spec.Action != securityv1beta1.AuthorizationPolicy_DENY:
			c.err(BadDryRun, dryRunField, "only ALLOW and DENY can be tried without effect, this is %s; remove the annotation", spec.Action)
		case err != nil:
			c.err(BadDryRun, dryRunField, "%s is neither true nor false, and the policy would be in force; write \"true\" or \"false\"", quote(v))
		}
	}
	if problem := tooLarge(spec); problem != "" {
		c.err(TooLarge, "spec.rules", "there are %s; divide it into several policies (values of one list can also be replaced by a pattern or a CIDR)", problem)
		return
	}
	custom := spec.Action == securityv1beta1.AuthorizationPolicy_CUSTOM
	switch spec.Action {
	case securityv1beta1.AuthorizationPolicy_DENY, securityv1beta1.AuthorizationPolicy_CUSTOM:
		if len(spec.Rules) == 0 {
			c.err(NoRules, "spec.rules", "a policy with action %s and without rules matches nothing and does nothing; to match every connection write one empty rule: rules: [{}]", spec.Action)
		}
	case securityv1beta1.AuthorizationPolicy_ALLOW:
		if len(spec.Rules) == 0 {
			c.warn(AllowsNothing, "spec.rules", "an ALLOW policy without rules allows nothing, so that everything it applies to is denied unless another policy allows it")
		}
	}
	if custom && spec.GetProvider().GetName() == "" {
		c.err(NoProvider, "spec.provider.name", "action CUSTOM asks a provider, and none is named; name one of meshConfig.extensionProviders")
	}
	if !custom && spec.GetProvider() != nil {
		c.err(ProviderWithoutCustom, "spec.provider", "only action CUSTOM has a provider, this is %s; remove the provider or change the action", spec.Action)
	}
	for i, r := range spec.Rules {
		c.rule(fmt.Sprintf("spec.rules[%d]", i), r, spec)
	}
	c.enforcement(p)
}

// enforcement warns of what nodes cannot do.
func (c *checker) enforcement(p *securityv1.AuthorizationPolicy) {
	compiled := c.mesh.Compile(p)
	deny := compiled.Policy.Action == mesh.Deny
	switch {
	case len(compiled.Targets) > 0:
		names := make([]string, 0, len(compiled.Targets))
		for _, t := range compiled.Targets {
			names = append(names, t.String())
		}
		switch a := compiled.Attached; {
		case a.Message != "":
			c.warn(NeedsWaypoint, "spec", "%s", a.Message)
		case compiled.Inert:
			c.warn(NeedsWaypoint, "spec", "it is for the waypoint of %s; while there is none, nothing is reported", some(names, 5))
		default:
			c.warn(NeedsWaypoint, "spec", "it is for the waypoint of %s; while there is none, connections to the workloads behind it are refused", some(names, 5))
		}
	case ForGateway(compiled.Selector):
		if a := c.mesh.AtGateway(p); a.Message != "" {
			c.warn(NeedsWaypoint, "spec", "%s", a.Message)
		}
	case p.Spec.Action == securityv1beta1.AuthorizationPolicy_CUSTOM:
		c.warn(NeedsWaypoint, "spec", "%s", compiled.Message)
	case len(compiled.HTTP) > 0:
		effect := "an ALLOW rule with them matches nothing, so that what it was to allow is denied"
		if compiled.Policy.Action == mesh.Audit {
			effect = "an AUDIT rule with them matches nothing"
		} else if deny {
			effect = "a DENY rule with them denies every connection that its other conditions match, HTTP or not"
		}
		c.warn(NeedsWaypoint, "spec.rules", "%s: HTTP, which only a waypoint sees. Without one, %s. "+Waypoints,
			some(compiled.HTTP, 8), effect)
	}
}

// set reports whether anything in a list of fields has values.
func set(fields []field) bool {
	return slices.ContainsFunc(fields, func(f field) bool { return len(f.values) > 0 })
}

func (c *checker) rule(at string, r *securityv1beta1.Rule, spec *securityv1beta1.AuthorizationPolicy) {
	if r == nil {
		c.err(Unreadable, at, "the rule is null; remove it, or write {} for a rule that matches everything")
		return
	}
	if r.From != nil && len(r.From) == 0 {
		c.err(EmptyClause, at+".from", "the list is empty; remove it for any source, or name one")
	}
	for i, f := range r.From {
		c.source(fmt.Sprintf("%s.from[%d]", at, i), f)
	}
	if r.To != nil && len(r.To) == 0 {
		c.err(EmptyClause, at+".to", "the list is empty; remove it for any operation, or name one")
	}
	for i, t := range r.To {
		path := fmt.Sprintf("%s.to[%d]", at, i)
		switch fields := operationFields(t.GetOperation()); {
		case t.GetOperation() == nil:
			c.err(EmptyOperation, path+".operation", "there is no operation; remove the entry for any operation, or name ports, methods, paths or hosts")
		case !set(fields[:]):
			c.err(EmptyOperation, path+".operation", "the operation says nothing: lists such as ports or methods that have no values count as left out, and an operation needs at least one value. Give one, as in ports: [\"8080\"], or remove \"to\" for any operation")
		}
	}
	for i, w := range r.When {
		c.condition(fmt.Sprintf("%s.when[%d]", at, i), w)
	}
	for l := range lists(r) {
		field := at + "." + l.path + "." + l.name
		if spec.Action == securityv1beta1.AuthorizationPolicy_CUSTOM && len(l.values) > 0 && !l.custom && !strings.HasPrefix(l.path, "when") {
			c.err(CustomCannotSee, field, "action CUSTOM cannot look at %s; use ipBlocks or conditions on the request", l.name)
		}
		c.values(field, l)
	}
	if spec.Action == securityv1beta1.AuthorizationPolicy_CUSTOM {
		for i, w := range r.When {
			a, known := attributes[w.GetKey()]
			if known && !a.custom || strings.HasPrefix(w.GetKey(), "request.auth.") {
				c.err(CustomCannotSee, fmt.Sprintf("%s.when[%d].key", at, i), "action CUSTOM cannot look at %s", w.GetKey())
			}
		}
	}
}

func (c *checker) source(at string, f *securityv1beta1.Rule_From) {
	s := f.GetSource()
	fields := sourceFields(s)
	switch {
	case s == nil:
		c.err(EmptySource, at+".source", "there is no source; remove the entry for any source, or name namespaces, principals, serviceAccounts or ipBlocks")
		return
	case !set(fields[:]):
		c.err(EmptySource, at+".source", "the source says nothing: lists such as namespaces that have no values count as left out, and a source needs at least one value. Give one, as in namespaces: [\"shop\"], or remove \"from\" for any source")
	}
	if len(s.ServiceAccounts)+len(s.NotServiceAccounts) > 0 && len(s.Principals)+len(s.NotPrincipals)+len(s.Namespaces)+len(s.NotNamespaces) > 0 {
		c.err(MixedSource, at+".source", "serviceAccounts cannot stand beside namespaces or principals; a service account is written with its namespace (shop/ui), so remove the other list")
	}
}

func (c *checker) condition(at string, w *securityv1beta1.Condition) {
	key := w.GetKey()
	if key == "" {
		c.err(BadKey, at+".key", "a condition needs a key, such as source.ip")
		return
	}
	name, argument, bracket := strings.Cut(key, "[")
	_, known := attributes[key]
	switch {
	case known:
	case name == "request.headers" || name == "request.auth.claims" || strings.HasPrefix(key, "experimental.envoy.filters."):
		if !bracket || len(argument) < 2 || !strings.HasSuffix(argument, "]") {
			c.err(BadKey, at+".key", "%s needs a name in brackets, as in request.headers[User-Agent]", quote(key))
		}
	case key == "destination.namespace":
		c.err(BadKey, at+".key", "destination.namespace is no condition: a policy applies to its own namespace; make one in that namespace")
	case name == "destination.labels":
		c.err(BadKey, at+".key", "destination.labels is no condition: write the labels into spec.selector.matchLabels")
	default:
		c.err(BadKey, at+".key", "%s is not an attribute that a policy can look at; nodes know %s", quote(key),
			"source.ip, source.namespace, source.principal, source.serviceAccount, source.trustDomain, destination.ip and destination.port")
	}
	if len(w.Values)+len(w.NotValues) == 0 {
		c.err(EmptyCondition, at, "the condition on %s has neither values nor notValues; give at least one", quote(key))
	}
}

// values checks the values of one list.
func (c *checker) values(at string, l list) {
	if l.kind == kindAccount && len(l.values) > 16 {
		c.err(TooManyAccounts, at, "%d service accounts; a list may have 16. Use namespaces or a pattern in principals for more", len(l.values))
		return
	}
	for i, v := range l.values {
		here := fmt.Sprintf("%s[%d]", at, i)
		if v == "" {
			c.err(EmptyValue, here, "the value is empty; remove it, or write \"*\" for any")
			continue
		}
		switch l.kind {
		case kindPrefix:
			if _, ok := mesh.ParseRange(v); !ok {
				c.err(BadAddress, here, "%s is neither an IP address nor a CIDR range, such as 10.1.2.3 or 10.1.0.0/16", quote(v))
			}
		case kindPort:
			if n, ok := parsePort(v); !ok {
				c.err(BadPort, here, "%s is not a port number from 1 to 65535; names of ports cannot be used here", quote(v))
			} else if n == 0 {
				c.warn(PortZero, here, "no connection has the port 0")
			}
		case kindAccount:
			c.account(here, v)
		case kindDomain:
			if strings.Contains(v, "/") {
				c.err(BadTrustDomain, here, "%s is not a trust domain, which has no '/'; whole identities go into principals", quote(v))
			} else {
				c.pattern(here, v)
			}
		case kindPath:
			c.path(here, v)
		case kindPrincipal:
			if strings.HasPrefix(v, "spiffe://") {
				c.warn(SpiffePrefix, here, "principals are written without spiffe://, so this matches nobody; write %s", quote(strings.TrimPrefix(v, "spiffe://")))
			}
			c.wildcards(here, v)
		case kindNamespace:
			c.wildcards(here, v)
			if strings.Contains(v, "/") {
				c.warn(NotANamespace, here, "no namespace is called %s; whole identities go into principals", quote(v))
			}
		}
	}
}

func (c *checker) account(at, v string) {
	ns, sa, qualified := strings.Cut(v, "/")
	switch {
	case len(v) > 320:
		c.err(BadServiceAccount, at, "%d characters; a service account has at most 320", len(v))
	case strings.Contains(v, "*"):
		c.err(BadServiceAccount, at, "%s has a wildcard, which service accounts cannot have; use namespaces for all of a namespace", quote(v))
	case qualified && (ns == "" || sa == "" || strings.Contains(sa, "/")):
		c.err(BadServiceAccount, at, "%s is neither serviceAccount nor namespace/serviceAccount", quote(v))
	}
}

// pattern refuses wildcards anywhere but at one end.
func (c *checker) pattern(at, v string) {
	if n := strings.Count(v, "*"); n > 1 || n == 1 && !strings.HasPrefix(v, "*") && !strings.HasSuffix(v, "*") {
		c.err(BadPattern, at, "%s: one wildcard is allowed, at the start or at the end", quote(v))
	}
}

// wildcards warns of them where Istio takes them literally.
func (c *checker) wildcards(at, v string) {
	inner, ok := strings.CutPrefix(v, "*")
	if !ok {
		inner = strings.TrimSuffix(v, "*")
	}
	if strings.Contains(inner, "*") {
		c.warn(LiteralWildcard, at, "%s: a * counts as a wildcard at the start or else at the end alone; the other is taken literally, and matches nothing that exists", quote(v))
	}
}

// path checks templates as Istio does.
func (c *checker) path(at, v string) {
	template := strings.Contains(v, "{*}") || strings.Contains(v, "{**}")
	rest := false
	for _, g := range strings.Split(strings.Trim(v, "/"), "/") {
		switch {
		case (g == "{*}" || g == "{**}") && rest:
			c.err(BadPath, at, "%s: {**} has to be the last operator", quote(v))
			return
		case g == "{**}":
			rest = true
		case g == "{*}":
		case strings.ContainsAny(g, "{}"):
			c.err(BadPath, at, "%s: { and } are for the operators {*} and {**}, each a whole segment", quote(v))
			return
		case template && strings.ContainsFunc(g, func(r rune) bool {
			return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._~%!$&'()+,;:@=", r))
		}):
			c.err(BadPath, at, "%s: the segment %s has characters that a path with operators cannot have", quote(v), quote(g))
			return
		}
	}
}

func (c *checker) attachment(namespace string, sel *typev1beta1.WorkloadSelector, ref *typev1beta1.PolicyTargetReference, refs []*typev1beta1.PolicyTargetReference) {
	given := 0
	for _, there := range []bool{sel != nil, ref != nil, len(refs) > 0} {
		if there {
			given++
		}
	}
	if given > 1 {
		c.err(SelectorAndTargets, "spec", "selector and targetRefs exclude each other: a selector is for workloads, targetRefs are for waypoints; remove one")
	}
	c.selector(sel)
	if len(refs) > 16 {
		c.err(BadTarget, "spec.targetRefs", "%d entries; at most 16 are allowed", len(refs))
		return
	}
	for i, r := range refs {
		c.target(fmt.Sprintf("spec.targetRefs[%d]", i), namespace, r)
	}
	if ref != nil {
		c.target("spec.targetRef", namespace, ref)
	}
}

func (c *checker) selector(sel *typev1beta1.WorkloadSelector) {
	if sel == nil {
		return
	}
	if len(sel.MatchLabels) == 0 {
		c.warn(EmptySelector, "spec.selector", "the selector has no labels and selects every workload; remove it, or give labels")
	}
	for _, k := range slices.Sorted(maps.Keys(sel.MatchLabels)) {
		v := sel.MatchLabels[k]
		switch {
		case k == "":
			c.err(BadSelector, "spec.selector.matchLabels", "a label has an empty name")
		case strings.Contains(k, "*") || strings.Contains(v, "*"):
			c.err(BadSelector, "spec.selector.matchLabels", "%s: wildcards are not supported in a selector; give the label's exact value", quote(k+"="+v))
		}
	}
}

func (c *checker) target(at, namespace string, r *typev1beta1.PolicyTargetReference) {
	if r.GetName() == "" {
		c.err(BadTarget, at+".name", "the target has no name")
	}
	if r.GetNamespace() != "" {
		c.err(BadTarget, at+".namespace", "a target is in the policy's own namespace; remove the field, or make the policy there")
	}
	switch t := targetOf(r); {
	case t.Kind == TargetUnknown:
		c.err(BadTarget, at, "%s of group %s cannot be a target; use Service, ServiceEntry (networking.istio.io), Gateway or GatewayClass (gateway.networking.k8s.io)",
			quote(r.GetKind()), quote(r.GetGroup()))
	case t.Kind == TargetGatewayClass && namespace != c.mesh.RootNamespace:
		c.warn(AppliesToNothing, at, "outside of the root namespace %s a policy for a GatewayClass applies to nothing; make it there, or name a Gateway", c.mesh.RootNamespace)
	}
}

const dryRunField = `metadata.annotations["` + AnnotationDryRun + `"]`

// noDryRun refuses the annotation on kinds that are always in force.
func (c *checker) noDryRun(annotations map[string]string) {
	if _, ok := annotations[AnnotationDryRun]; ok {
		c.err(BadDryRun, dryRunField, "only an AuthorizationPolicy can be tried without effect; remove the annotation")
	}
}

func (c *checker) peer(p *securityv1.PeerAuthentication) {
	c.noDryRun(p.Annotations)
	c.selector(p.Spec.Selector)
	bare := len(p.Spec.Selector.GetMatchLabels()) == 0
	if ports := p.Spec.PortLevelMtls; ports != nil {
		switch {
		case bare && len(ports) > 0:
			c.err(PortsWithoutSelector, "spec.portLevelMtls", "modes of ports need a selector; a PeerAuthentication for a namespace or the mesh has one mode for all ports")
		case len(ports) == 0:
			c.err(EmptyPorts, "spec.portLevelMtls", "the map is empty; remove it, or name a port")
		}
		for _, port := range slices.Sorted(maps.Keys(ports)) {
			if port == 0 || port > 65535 {
				c.err(BadPort, "spec.portLevelMtls", "%d is not a port number from 1 to 65535", port)
			}
		}
	}
	if !bare && p.Namespace == c.mesh.RootNamespace {
		c.warn(AppliesToNothing, "spec.selector", "in the root namespace %s a PeerAuthentication with a selector applies to nothing; make it in the workloads' namespace", p.Namespace)
	}
	if p.Spec.GetMtls().GetMode() == securityv1beta1.PeerAuthentication_MutualTLS_DISABLE {
		c.warn(DisableIsPermissive, "spec.mtls.mode", "DISABLE means the same to nodes as PERMISSIVE: plaintext is accepted, and captured clients go on to encrypt")
	}
}
