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

	"github.com/warrenmesh/warren/internal/mesh"
)

// AnnotationDryRun makes a policy one that is evaluated and reported, not enforced.
const AnnotationDryRun = "istio.io/dry-run"

// What one policy may have. The API allows 512 rules; the other limits keep what every node gets and evaluates
// for it within bounds.
const (
	MaxRules  = 512
	MaxValues = 8192      // values of all lists
	MaxBytes  = 256 << 10 // of all values
)

// Compiled is what the nodes do about one AuthorizationPolicy.
type Compiled struct {
	Policy   *mesh.Policy
	Selector map[string]string // of a policy with ScopeWorkload that has no Targets
	Targets  []Target          // what a policy with targetRefs is attached to

	// Inert says that Policy decides and reports nothing: no node need have it.
	Inert bool

	// Exact says that nodes do all that the policy asks for. If not, Reason and Message say what they do instead.
	Exact           bool
	Reason, Message string
	// HTTP are the attributes that nodes do not see, sorted.
	HTTP []string

	// Attached is what the waypoints of Targets do; nil for a policy without any.
	Attached *Attached
}

// Attached is a policy as waypoints decide it. What of it they cannot do Reason and Message say; it is never weaker for that.
type Attached struct {
	Action          mesh.Action
	DryRun          bool
	Ask             *mesh.AuthProvider
	Rules           []mesh.AccessRule
	Reason, Message string
}

// TargetKind is a kind that a targetRef may name.
type TargetKind uint8

const (
	TargetService TargetKind = iota
	TargetServiceEntry
	TargetGateway
	TargetGatewayClass
	TargetIstioGateway // of networking.istio.io; RateLimits alone name one
	TargetUnknown
)

var targetKinds = [...]string{"Service", "ServiceEntry", "Gateway", "GatewayClass", "Gateway of networking.istio.io", "unknown kind"}

func (k TargetKind) String() string { return targetKinds[k] }

// Target is what a targetRef names, in the policy's namespace.
type Target struct {
	Kind TargetKind
	Name string
}

func (t Target) String() string { return t.Kind.String() + " " + short(t.Name) }

func targetOf(r *typev1beta1.PolicyTargetReference) Target {
	t := Target{Kind: TargetUnknown, Name: r.GetName()}
	switch group := r.GetGroup(); {
	case r.GetKind() == "Service" && (group == "" || group == "core"):
		t.Kind = TargetService
	case r.GetKind() == "ServiceEntry" && group == "networking.istio.io":
		t.Kind = TargetServiceEntry
	case r.GetKind() == "Gateway" && group == "gateway.networking.k8s.io":
		t.Kind = TargetGateway
	case r.GetKind() == "GatewayClass" && group == "gateway.networking.k8s.io":
		t.Kind = TargetGatewayClass
	}
	return t
}

func targetRefs(spec *securityv1beta1.AuthorizationPolicy) []*typev1beta1.PolicyTargetReference {
	if len(spec.TargetRefs) > 0 {
		return spec.TargetRefs
	}
	if spec.TargetRef != nil {
		return []*typev1beta1.PolicyTargetReference{spec.TargetRef}
	}
	return nil
}

// Compile compiles a policy for nodes.
//
// A CUSTOM policy hands the decision to a service that nobody asks: what it matches is denied, before any ALLOW.
// A policy with targetRefs belongs to the waypoint of its targets: until there is one, its targets' workloads accept
// nothing, whatever the policy's action and rules, because a rule that is not evaluated may be the one that keeps
// somebody out.
func (m Mesh) Compile(p *securityv1.AuthorizationPolicy) Compiled {
	spec := &p.Spec
	c := Compiled{Exact: true}
	if spec.Selector != nil {
		c.Selector = spec.Selector.MatchLabels
	}
	refs := targetRefs(spec)
	out := &mesh.Policy{Name: mesh.PolicyName{Namespace: p.Namespace, Name: p.Name}}
	c.Policy = out
	switch {
	case len(c.Selector) > 0 || len(refs) > 0:
		out.Scope = mesh.ScopeWorkload
	case p.Namespace == m.RootNamespace:
		out.Scope = mesh.ScopeMesh
	default:
		out.Scope = mesh.ScopeNamespace
	}
	switch spec.Action {
	case securityv1beta1.AuthorizationPolicy_ALLOW:
		out.Action = mesh.Allow
	case securityv1beta1.AuthorizationPolicy_AUDIT:
		out.Action = mesh.Audit
	default: // CUSTOM, and actions of a later version
		out.Action = mesh.Deny
	}
	if v, ok := p.Annotations[AnnotationDryRun]; ok && out.Action != mesh.Audit {
		out.DryRun, _ = strconv.ParseBool(v) // Check complains about other words; they do not take a policy out of force
	}
	if len(refs) > 0 {
		c.Attached = m.attached(p, out)
		c.attach(refs)
		return c
	}
	if problem := tooLarge(spec); problem != "" {
		if out.Action == mesh.Deny {
			out.Rules = []mesh.Rule{{}}
		}
		c.not(ReasonTooLarge, problem+"; "+instead(out))
		return c
	}
	b := ruleCompiler{mesh: m, namespace: p.Namespace, deny: out.Action == mesh.Deny, audit: out.Action == mesh.Audit, unseen: map[string]bool{}}
	for _, r := range spec.Rules {
		if r != nil {
			out.Rules = append(out.Rules, b.rule(r)...)
		}
	}
	c.HTTP = slices.Sorted(maps.Keys(b.unseen))
	if len(b.invalid) > 0 {
		c.not(ReasonUnsupported, "not understood: "+some(b.invalid, 5)+"; "+b.effect())
	}
	if len(c.HTTP) > 0 {
		c.not(ReasonNoWaypoint, fmt.Sprintf("nodes do not see %s, for which a waypoint is needed: %s",
			some(c.HTTP, 8), b.effect()))
	}
	if spec.Action == securityv1beta1.AuthorizationPolicy_CUSTOM {
		c.not(ReasonNoWaypoint, fmt.Sprintf("only a waypoint can ask the provider %q: until there is one, what the rules match is denied",
			spec.GetProvider().GetName()))
	}
	return c
}

// AtGateway compiles a policy without targetRefs for the gateways among its workloads.
func (m Mesh) AtGateway(p *securityv1.AuthorizationPolicy) *Attached {
	return m.attached(p, m.Compile(p).Policy)
}

// not notes a reason; the last one given is the one that is shown first.
func (c *Compiled) not(reason, message string) {
	if c.Message != "" {
		message += ". Also " + c.Message
	}
	c.Exact, c.Reason, c.Message = false, reason, message
}

// attached compiles a policy for waypoints.
func (m Mesh) attached(p *securityv1.AuthorizationPolicy, out *mesh.Policy) *Attached {
	a := &Attached{Action: out.Action, DryRun: out.DryRun}
	if problem := tooLarge(&p.Spec); problem != "" {
		if a.Action == mesh.Deny {
			a.Rules = []mesh.AccessRule{{}}
		}
		a.Reason, a.Message = ReasonTooLarge, problem+"; "+instead(out)
		return a
	}
	rules, unseen, invalid := m.access(p.Namespace, &p.Spec, out.Action)
	a.Rules = rules
	effect := (&ruleCompiler{deny: a.Action == mesh.Deny, audit: a.Action == mesh.Audit}).effect()
	var texts []string
	if len(invalid) > 0 {
		texts = append(texts, "not understood: "+some(invalid, 5)+"; "+effect)
	}
	if len(unseen) > 0 {
		texts = append(texts, fmt.Sprintf("waypoints do not look at %s: %s", some(unseen, 8), effect))
	}
	if p.Spec.Action == securityv1beta1.AuthorizationPolicy_CUSTOM {
		if name := p.Spec.GetProvider().GetName(); m.Providers[name] != nil {
			a.Action, a.Ask = mesh.Custom, m.Providers[name]
		} else {
			texts = append(texts, fmt.Sprintf("the mesh's configuration has no extension provider %q: what the rules match is denied", name))
		}
	}
	if len(texts) > 0 {
		a.Reason, a.Message = ReasonUnsupported, strings.Join(texts, ". Also ")
	}
	return a
}

// attach makes of a policy with targetRefs what nodes do while its targets have no waypoint.
func (c *Compiled) attach(refs []*typev1beta1.PolicyTargetReference) {
	c.Selector = nil
	names := make([]string, 0, len(refs))
	for _, r := range refs[:min(len(refs), 16)] { // as many as the API allows
		t := targetOf(r)
		c.Targets = append(c.Targets, t)
		names = append(names, t.String())
	}
	what := "connections to the workloads behind it are refused until there is one"
	if c.Policy.Action != mesh.Audit && !c.Policy.DryRun {
		c.Policy.Action, c.Policy.Rules = mesh.Deny, []mesh.Rule{{}}
	} else {
		what = "it is neither evaluated nor reported until there is one"
		c.Inert, c.Policy.Rules = true, nil
	}
	c.not(ReasonNoWaypoint, fmt.Sprintf("for the waypoint of %s, and there is none: %s", strings.Join(names, ", "), what))
}

// instead says what a policy without its rules does.
func instead(p *mesh.Policy) string {
	switch {
	case p.Action == mesh.Audit || p.DryRun:
		return "nothing is reported for it"
	case p.Action == mesh.Deny:
		return "it denies everything it applies to"
	}
	return "it allows nothing"
}

// tooLarge says which limit a policy exceeds, "" for none. It costs no more than the limits.
func tooLarge(spec *securityv1beta1.AuthorizationPolicy) string {
	if len(spec.Rules) > MaxRules {
		return fmt.Sprintf("%d rules, of which a policy may have %d", len(spec.Rules), MaxRules)
	}
	values, bytes := 0, 0
	for _, r := range spec.Rules {
		values += len(r.GetFrom()) + len(r.GetTo()) + len(r.GetWhen())
		if values > MaxValues {
			return fmt.Sprintf("more than %d values", MaxValues)
		}
		for list := range lists(r) {
			values += len(list.values)
			if values > MaxValues {
				return fmt.Sprintf("more than %d values", MaxValues)
			}
			for _, v := range list.values {
				bytes += len(v)
			}
			if bytes > MaxBytes {
				return fmt.Sprintf("values of more than %d KiB", MaxBytes>>10)
			}
		}
	}
	return ""
}

func some(list []string, most int) string {
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}
