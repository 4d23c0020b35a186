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
		if slices.ContainsFunc(f.refs, func(r gatewayv1.LocalObjectReference) bool { return string(r.Name) == k.Name }) {
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
			for _, r := range f.refs {
				if r.Group == "" && r.Kind == "ConfigMap" {
					seen[key{f.Namespace, string(r.Name)}] = true
				}
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
		if l.clients == nil {
			continue
		}
		for _, r := range l.clients.refs {
			if r.Group == "" && r.Kind == "ConfigMap" {
				out = append(out, rootsOf(f, r))
			}
		}
	}
	return out
}

func rootsOf(f *ingressFact, r gatewayv1.ObjectReference) key {
	return key{string(deref(r.Namespace, gatewayv1.Namespace(f.Namespace))), string(r.Name)}
}

// clientsName is what the roots for the clients of a port are called. Its listeners share them.
func clientsName(port uint16) string { return fmt.Sprintf("clients of %d", port) }

// clientRootsAt adds to what a gateway has the roots for a listener's clients, and says what is wrong with them.
func (x *Index) clientRootsAt(f *ingressFact, l *ingressListener, in *mesh.Ingress) (accepted, resolved routing.Verdict) {
	c, bad := mesh.Certificate{Name: clientsName(l.port)}, 0
	for i, r := range l.clients.refs {
		at, k := fmt.Sprintf("caCertificateRefs[%d] for port %d: ", i, l.port), rootsOf(f, r)
		state := x.roots[k]
		problem := verdict(gatewayv1.ListenerReasonInvalidCACertificateRef, "")
		switch {
		case r.Group != "" || r.Kind != "ConfigMap":
			problem = verdict(gatewayv1.ListenerReasonInvalidCACertificateKind, at+"of kind "+string(r.Kind)+"; only ConfigMaps are followed")
		case k.Namespace != f.Namespace && !x.grantedTo("Gateway", f.Namespace, "ConfigMap", k):
			problem = verdict(gatewayv1.ListenerReasonRefNotPermitted, at+"no ReferenceGrant in "+k.Namespace+" lets Gateways of "+f.Namespace+" have ConfigMap "+k.String())
		case state == nil:
			problem.Message = at + "there is no ConfigMap " + k.String()
		case state.Problem != "":
			problem.Message = at + "ConfigMap " + k.String() + ": " + state.Problem
		default:
			c.Roots += state.Roots
			continue
		}
		bad++
		if resolved.OK() {
			resolved = problem
		}
	}
	switch {
	case len(l.clients.refs) == 0:
		resolved = verdict(gatewayv1.ListenerReasonInvalidCACertificateRef, "caCertificateRefs names no roots")
		fallthrough
	case bad == len(l.clients.refs):
		accepted = verdict(gatewayv1.ListenerReasonNoValidCACertificate, resolved.Message)
	case bad == 0:
		in.AddCertificate(c)
	}
	return accepted, resolved
}
