package index

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// BackendTLSPolicies: gateways speak TLS to the Services that they name. One that cannot be followed has what it names refuse,
// since what is meant to be encrypted and checked is sent to nobody otherwise.

// backendTLSFact is a BackendTLSPolicy.
type backendTLSFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	targets    []backendTarget
	refs       []gatewayv1.ObjectReference // in its own namespace
	tls        mesh.BackendTLS             // but for port and roots
	accepted   routing.Verdict             // as far as it alone says
}

// backendTarget is a Service of the policy's namespace.
type backendTarget struct{ service, port string } // the port's name; "" for all

// backendAPI is what the index has of them.
type backendAPI struct {
	backendTLS      map[string]map[string]*backendTLSFact
	dirtyBackendTLS bool // what has become of them

	saidOfTLS map[key]struct{} // those with a state
}

func newBackendAPI() backendAPI {
	return backendAPI{backendTLS: map[string]map[string]*backendTLSFact{}, saidOfTLS: map[key]struct{}{}}
}

func backendTLSFactOf(p *gatewayv1.BackendTLSPolicy) *backendTLSFact {
	v := &p.Spec.Validation
	f := &backendTLSFact{key: keyOf(p), uid: string(p.UID), generation: p.Generation, created: p.CreationTimestamp}
	for _, r := range v.CACertificateRefs {
		f.refs = append(f.refs, gatewayv1.ObjectReference{Group: r.Group, Kind: r.Kind, Name: r.Name})
	}
	for _, t := range p.Spec.TargetRefs {
		if t.Group == "" && t.Kind == "Service" {
			f.targets = append(f.targets, backendTarget{string(t.Name), string(deref(t.SectionName, ""))})
		}
	}
	f.tls.Host = strings.ToLower(string(v.Hostname))
	for _, n := range v.SubjectAltNames {
		switch n.Type {
		case gatewayv1.HostnameSubjectAltNameType:
			f.tls.Names = append(f.tls.Names, mesh.CertificateName{Name: strings.ToLower(string(n.Hostname))})
		case gatewayv1.URISubjectAltNameType:
			f.tls.Names = append(f.tls.Names, mesh.CertificateName{URI: true, Name: string(n.URI)})
		default:
			f.accepted = verdict(gatewayv1.PolicyReasonInvalid, "validation.subjectAltNames of type "+string(n.Type)+" are not followed; Hostname and URI are")
		}
	}
	if len(v.SubjectAltNames) == 0 {
		f.tls.Names = []mesh.CertificateName{{Name: f.tls.Host}}
	}
	switch {
	case len(f.targets) == 0:
		f.accepted = verdict(gatewayv1.PolicyReasonTargetNotFound, "targetRefs names no Service; other kinds are not followed")
	case len(f.refs) == 0 && deref(v.WellKnownCACertificates, "") != gatewayv1.WellKnownCACertificatesSystem:
		f.accepted = verdict(gatewayv1.PolicyReasonInvalid, "validation.wellKnownCACertificates "+string(deref(v.WellKnownCACertificates, ""))+" is not followed; System is, or roots in a ConfigMap, key ca.crt, that caCertificateRefs names")
	}
	f.tls.PublicRoots = len(f.refs) == 0
	return f
}

func (f *backendTLSFact) older(o *backendTLSFact) int {
	return cmp.Or(f.created.Compare(o.created.Time), compareKeys(f.key, o.key))
}

func (x *Index) setBackendTLS(k key, f *backendTLSFact) {
	old := put(x.backendTLS, k, f)
	if old == nil && f == nil || old != nil && f != nil && f.generation != 0 && old.generation == f.generation && old.uid == f.uid {
		return
	}
	x.touchBackendTLS(old)
	x.touchBackendTLS(f)
}

// touchBackendTLS marks what a policy is about.
func (x *Index) touchBackendTLS(f *backendTLSFact) {
	if f == nil {
		return
	}
	x.dirtyBackendTLS = true
	for _, t := range f.targets {
		x.dirtyHosts[x.c.serviceName(key{f.Namespace, t.service})] = struct{}{}
	}
}

// policyRoots are the roots that a policy names, and what is wrong with them.
func (x *Index) policyRoots(f *backendTLSFact) (roots string, accepted, resolved routing.Verdict) {
	roots, bad, resolved := x.gatherRoots(f.refs, f.Namespace,
		rootsReasons{string(gatewayv1.BackendTLSPolicyReasonInvalidKind), string(gatewayv1.BackendTLSPolicyReasonInvalidCACertificateRef)},
		func(i int) string { return fmt.Sprintf("validation.caCertificateRefs[%d]: ", i) })
	if bad > 0 && bad == len(f.refs) {
		accepted = verdict(gatewayv1.BackendTLSPolicyReasonNoValidCACertificate, resolved.Message)
	}
	return roots, accepted, resolved
}

// policiesNaming are the policies that name a Service, the oldest first.
func (x *Index) policiesNaming(k key) (out []*backendTLSFact) {
	for _, f := range x.backendTLS[k.Namespace] {
		if slices.ContainsFunc(f.targets, func(t backendTarget) bool { return t.service == k.Name }) {
			out = append(out, f)
		}
	}
	slices.SortFunc(out, (*backendTLSFact).older)
	return out
}

// backendTLSOf is how gateways speak TLS to a service. For each port, and for all ports, the oldest policy holds.
func (x *Index) backendTLSOf(s *serviceFact) (out []mesh.BackendTLS) {
	if s.owner.entry {
		return nil
	}
	for _, f := range x.policiesNaming(s.owner.key) {
		roots, accepted, resolved := x.policyRoots(f)
		for _, t := range f.targets {
			b := f.tls
			b.Roots = roots
			for _, v := range []routing.Verdict{f.accepted, accepted, resolved} {
				b.Invalid = cmp.Or(b.Invalid, v.Message)
			}
			if t.port != "" {
				i := slices.IndexFunc(s.ports, func(p portFact) bool { return p.name == t.port })
				if i < 0 {
					continue
				}
				b.Port = s.service.Ports[i].Port
			}
			if t.service == s.owner.Name && !slices.ContainsFunc(out, func(o mesh.BackendTLS) bool { return o.Port == b.Port }) {
				out = append(out, b)
			}
		}
	}
	slices.SortFunc(out, func(a, b mesh.BackendTLS) int { return cmp.Compare(a.Port, b.Port) })
	return out
}

// encrypted reports whether gateways speak TLS to a port of a service.
func (x *Index) encrypted(s *serviceFact, port uint16) bool {
	return slices.ContainsFunc(x.backendTLSOf(s), func(b mesh.BackendTLS) bool { return b.Port == 0 || b.Port == port })
}

// targetVerdict is why a policy does not hold for what it names.
func (x *Index) targetVerdict(f *backendTLSFact) routing.Verdict {
	for _, t := range f.targets {
		k := key{f.Namespace, t.service}
		s := x.services[k.Namespace][k.Name]
		switch {
		case s == nil:
			return verdict(gatewayv1.PolicyReasonTargetNotFound, "Service "+k.String()+" was not found")
		case t.port != "" && !slices.ContainsFunc(s.ports, func(p portFact) bool { return p.name == t.port }):
			return verdict(gatewayv1.PolicyReasonTargetNotFound, "Service "+k.String()+" has no port "+t.port)
		}
		for _, o := range x.policiesNaming(k) {
			if o == f {
				break
			}
			if slices.Contains(o.targets, t) {
				return verdict(gatewayv1.PolicyReasonConflicted, "for Service "+k.String()+" "+o.Name+" holds, which is older")
			}
		}
	}
	return routing.Verdict{}
}

// ancestors are the Gateways whose routes send to what a policy names.
func (x *Index) ancestors(f *backendTLSFact) []key {
	out := map[key]struct{}{}
	for _, t := range f.targets {
		for r := range x.routesOn[x.c.serviceName(key{f.Namespace, t.service})] {
			for _, b := range x.routesBound[r] {
				if b.gateway != (key{}) && b.parent.Accepted.OK() && r.kind != TCPRoute {
					out[b.gateway] = struct{}{}
				}
			}
		}
	}
	return slices.SortedFunc(maps.Keys(out), compareKeys)
}

// commitBackendTLS notes what has become of the policies: for each Gateway that they are for, as for the parents of a route.
func (x *Index) commitBackendTLS(u *Update) {
	if !x.dirtyBackendTLS {
		return
	}
	x.dirtyBackendTLS = false
	for k := range x.saidOfTLS {
		if x.backendTLS[k.Namespace][k.Name] == nil {
			delete(x.saidOfTLS, k)
			delete(x.routeStates, RouteKey{BackendTLSPolicy, k.Namespace, k.Name})
			u.Routes[RouteKey{BackendTLSPolicy, k.Namespace, k.Name}] = nil
			x.notice(u, NoticeKey{Kind: BackendTLSPolicy, Namespace: k.Namespace, Name: k.Name}, "", "", "")
		}
	}
	group, kind := gatewayv1.Group(gatewayv1.GroupName), gatewayv1.Kind("Gateway")
	for _, all := range x.backendTLS {
		for _, f := range all {
			_, accepted, resolved := x.policyRoots(f)
			for _, v := range []routing.Verdict{x.targetVerdict(f), f.accepted} {
				if !v.OK() {
					accepted = v
				}
			}
			next := &RouteState{UID: f.uid}
			for _, g := range x.ancestors(f) {
				ns := gatewayv1.Namespace(g.Namespace)
				next.Parents = append(next.Parents, RouteParent{
					Ref:      gatewayv1.ParentReference{Group: &group, Kind: &kind, Namespace: &ns, Name: gatewayv1.ObjectName(g.Name)},
					Accepted: accepted, Resolved: resolved,
				})
			}
			k := RouteKey{BackendTLSPolicy, f.Namespace, f.Name}
			x.saidOfTLS[f.key] = struct{}{}
			if old := x.routeStates[k]; old == nil || !sameState(old, next) {
				x.routeStates[k], u.Routes[k] = next, next
			}
			worst := accepted
			if worst.OK() {
				worst = resolved
			}
			x.notice(u, NoticeKey{Kind: BackendTLSPolicy, Namespace: f.Namespace, Name: f.Name}, f.uid, worst.Reason, worst.Message)
		}
	}
}
