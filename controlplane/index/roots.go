package index

import (
	"crypto/x509"
	"fmt"
	"slices"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Roots that certificates are checked against: those of a gateway's clients and of the applications that it speaks TLS with.

// RootsKey names a ConfigMap with roots.
type RootsKey struct{ Namespace, Name string }

// RootsState is what a ConfigMap holds. One that cannot be used says why.
type RootsState struct {
	Roots   string // PEM
	Problem string // why there are none in it
}

// ReadRoots makes what is kept of a ConfigMap's data.
func ReadRoots(data map[string]string) *RootsState {
	switch roots := data["ca.crt"]; {
	case roots == "":
		return &RootsState{Problem: "it has no ca.crt"}
	case !x509.NewCertPool().AppendCertsFromPEM([]byte(roots)):
		return &RootsState{Problem: "its ca.crt is no certificate in PEM"}
	default:
		return &RootsState{Roots: roots}
	}
}

// SetRoots notes what a ConfigMap holds that an Update asked for; nil where there is none.
func (x *Index) SetRoots(k RootsKey, s *RootsState) {
	if s == nil {
		delete(x.roots, key(k))
	} else {
		x.roots[key(k)] = s
	}
	for _, all := range x.ingresses {
		for _, f := range all {
			if slices.Contains(f.wantsRoots(), key(k)) {
				x.dirtyIngress[f.key] = struct{}{}
			}
		}
	}
	for _, f := range x.backendTLS[k.Namespace] {
		if slices.Contains(configMaps(f.refs, f.Namespace), key(k)) {
			x.touchBackendTLS(f)
		}
	}
}

// wantedRoots are the ConfigMaps that our gateways and policies may have.
func (x *Index) wantedRoots() []RootsKey {
	seen := map[key]bool{}
	for _, all := range x.ingresses {
		for _, f := range all {
			if x.classes[f.class] == IngressController {
				for _, k := range f.wantsRoots() {
					seen[k] = seen[k] || k.Namespace == f.Namespace || x.grantedTo("Gateway", f.Namespace, "ConfigMap", k)
				}
			}
		}
	}
	for _, all := range x.backendTLS {
		for _, f := range all {
			for _, k := range configMaps(f.refs, f.Namespace) {
				seen[k] = true
			}
		}
	}
	out := []RootsKey{}
	for k, granted := range seen {
		if granted {
			out = append(out, RootsKey(k))
		}
	}
	slices.SortFunc(out, func(a, b RootsKey) int { return compareKeys(key(a), key(b)) })
	for k := range x.roots {
		if !seen[k] {
			delete(x.roots, k) // nobody's business any more
		}
	}
	return out
}

// clientChecks is how the certificates of a listener's clients are checked.
type clientChecks struct {
	refs     []gatewayv1.ObjectReference
	insecure bool // whatever comes of it, clients are let in
}

// checksOf is what a Gateway says about the clients of a listener for HTTPS; nil where it asks for no certificates.
func checksOf(t *gatewayv1.GatewayTLSConfig, l *ingressListener) *clientChecks {
	if t == nil || t.Frontend == nil || l.protocol != gatewayv1.HTTPSProtocolType {
		return nil
	}
	v := t.Frontend.Default.Validation
	for i := range t.Frontend.PerPort {
		if p := &t.Frontend.PerPort[i]; uint16(p.Port) == l.port {
			v = p.TLS.Validation
		}
	}
	if v == nil {
		return nil
	}
	return &clientChecks{refs: v.CACertificateRefs, insecure: v.Mode == gatewayv1.AllowInsecureFallback}
}

// wantsRoots are the ConfigMaps that a Gateway refers to.
func (f *ingressFact) wantsRoots() (out []key) {
	for _, l := range f.listeners {
		if l.clients != nil {
			out = append(out, configMaps(l.clients.refs, f.Namespace)...)
		}
	}
	return out
}

func rootsOf(r gatewayv1.ObjectReference, namespace string) key {
	return key{string(deref(r.Namespace, gatewayv1.Namespace(namespace))), string(r.Name)}
}

// clientsName is what the roots for the clients of a port are called. Its listeners share them.
func clientsName(port uint16) string { return fmt.Sprintf("clients of %d", port) }

// configMaps are the ConfigMaps that references of a namespace name.
func configMaps(refs []gatewayv1.ObjectReference, namespace string) (out []key) {
	for _, r := range refs {
		if isConfigMap(r) {
			out = append(out, rootsOf(r, namespace))
		}
	}
	return out
}

func isConfigMap(r gatewayv1.ObjectReference) bool { return r.Group == "" && r.Kind == "ConfigMap" }

// rootsReasons are those of a reference that leads to no roots.
type rootsReasons struct{ kind, invalid string }

// gatherRoots puts the roots together that references of a namespace lead to, and tells how many lead to none and why the first
// of these does not. at names a reference.
func (x *Index) gatherRoots(refs []gatewayv1.ObjectReference, namespace string, not rootsReasons, at func(i int) string) (roots string, bad int, why routing.Verdict) {
	for i, r := range refs {
		k := rootsOf(r, namespace)
		state := x.roots[k]
		problem := routing.Verdict{Reason: not.invalid}
		switch {
		case !isConfigMap(r):
			problem = routing.Verdict{Reason: not.kind, Message: "of kind " + string(r.Kind) + "; only ConfigMaps are followed"}
		case k.Namespace != namespace && !x.grantedTo("Gateway", namespace, "ConfigMap", k):
			problem = verdict(gatewayv1.ListenerReasonRefNotPermitted, "no ReferenceGrant in "+k.Namespace+" lets Gateways of "+namespace+" have ConfigMap "+k.String())
		case state == nil:
			problem.Message = "there is no ConfigMap " + k.String()
		case state.Problem != "":
			problem.Message = "ConfigMap " + k.String() + ": " + state.Problem
		default:
			roots += state.Roots
			continue
		}
		bad++
		if why.OK() {
			problem.Message = at(i) + problem.Message
			why = problem
		}
	}
	return roots, bad, why
}

// clientRootsAt adds to what a gateway has the roots for a listener's clients, and says what is wrong with them.
func (x *Index) clientRootsAt(f *ingressFact, l *ingressListener, in *mesh.Ingress) (accepted, resolved routing.Verdict) {
	roots, bad, resolved := x.gatherRoots(l.clients.refs, f.Namespace,
		rootsReasons{string(gatewayv1.ListenerReasonInvalidCACertificateKind), string(gatewayv1.ListenerReasonInvalidCACertificateRef)},
		func(i int) string { return fmt.Sprintf("caCertificateRefs[%d] for port %d: ", i, l.port) })
	switch {
	case len(l.clients.refs) == 0:
		resolved = verdict(gatewayv1.ListenerReasonInvalidCACertificateRef, "caCertificateRefs names no roots")
		fallthrough
	case bad == len(l.clients.refs):
		accepted = verdict(gatewayv1.ListenerReasonNoValidCACertificate, resolved.Message)
	case bad == 0:
		in.AddCertificate(mesh.Certificate{Name: clientsName(l.port), Roots: roots})
	}
	return accepted, resolved
}
