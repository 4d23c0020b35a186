package index

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// SecretKey names a Secret.
type SecretKey struct{ Namespace, Name string }

// SecretState is what a Secret holds. One that cannot be used says why.
type SecretState struct {
	Certificate mesh.Certificate // but for its name
	Problem     string           // why there is no certificate and key in it
}

// Keys of Secrets with certificates: Kubernetes' and Istio's older ones.
var (
	chainKeys = []string{"tls.crt", "cert"}
	keyKeys   = []string{"tls.key", "key"}
	rootKeys  = []string{"ca.crt", "cacert"}
	listKeys  = []string{"ca.crl", "crl"}
)

// ReadSecret makes what is kept of a Secret's data.
func ReadSecret(data map[string][]byte) *SecretState {
	get := func(names []string) []byte {
		for _, n := range names {
			if v, ok := data[n]; ok {
				return v
			}
		}
		return nil
	}
	chain, private := get(chainKeys), get(keyKeys)
	s := &SecretState{}
	if roots := get(rootKeys); len(roots) > 0 && x509.NewCertPool().AppendCertsFromPEM(roots) {
		s.Certificate.Roots = string(roots)
		if list := get(listKeys); len(list) > 0 {
			if b, _ := pem.Decode(list); b != nil {
				s.Certificate.CRL = string(list)
			}
		}
	}
	switch {
	case len(chain) == 0:
		s.Problem = "it has no tls.crt"
	case len(private) == 0:
		s.Problem = "it has no tls.key"
	default:
		if _, err := tls.X509KeyPair(chain, private); err != nil { // says nothing of what is in them
			s.Problem = fmt.Sprintf("tls.crt and tls.key are no certificate and its key: %v", err)
			break
		}
		s.Certificate.Chain, s.Certificate.Key = string(chain), mesh.Redacted(private)
	}
	return s
}

// SetSecret notes what a Secret holds that a gateway needs; nil where there is none.
func (x *Index) SetSecret(k SecretKey, s *SecretState) {
	if s == nil {
		delete(x.secrets, key(k))
	} else {
		x.secrets[key(k)] = s
	}
	for _, all := range x.ingresses {
		for _, f := range all {
			if slices.Contains(f.wants(), key(k)) {
				x.dirtyIngress[f.key] = struct{}{}
			}
		}
	}
	x.touchCredential(k)
	for _, e := range x.entrances {
		x.dirtyEntrance = x.dirtyEntrance || slices.Contains(e.wants(), key(k))
	}
}

func (k key) String() string { return k.Namespace + "/" + k.Name }

// secretOf is the Secret that a Gateway or a ListenerSet refers to.
func secretOf(by ref, r gatewayv1.SecretObjectReference) key {
	return key{string(deref(r.Namespace, gatewayv1.Namespace(by.Namespace))), string(r.Name)}
}

func isSecret(r gatewayv1.SecretObjectReference) bool {
	return deref(r.Group, "") == "" && deref(r.Kind, "Secret") == "Secret"
}

// refers goes through the Secrets that a Gateway and its ListenerSets refer to.
func (f *ingressFact) refers(yield func(by ref, secret key)) {
	for _, l := range f.listeners {
		for _, r := range l.refs {
			if isSecret(r) {
				yield(l.of, secretOf(l.of, r))
			}
		}
	}
	if by := (ref{Gateway, f.key}); f.shown != nil && isSecret(*f.shown) {
		yield(by, secretOf(by, *f.shown))
	}
}

// wants are the Secrets that a Gateway refers to.
func (f *ingressFact) wants() (out []key) {
	f.refers(func(_ ref, k key) { out = append(out, k) })
	return out
}

// wantedSecrets are those that our gateways may have.
func (x *Index) wantedSecrets() []SecretKey {
	seen := map[key]bool{}
	var out []SecretKey
	for _, all := range x.ingresses {
		for _, f := range all {
			if x.classes[f.class] != IngressController {
				continue
			}
			f.refers(func(by ref, k key) {
				if !seen[k] && x.mayHave(by, k) {
					seen[k] = true
					out = append(out, SecretKey(k))
				}
			})
		}
	}
	for _, k := range x.wantedCredentials() {
		if !seen[k] {
			seen[k] = true
			out = append(out, SecretKey(k))
		}
	}
	for _, e := range x.entrances {
		for _, k := range e.wants() {
			if !seen[k] {
				seen[k] = true
				out = append(out, SecretKey(k))
			}
		}
	}
	slices.SortFunc(out, func(a, b SecretKey) int { return compareKeys(key(a), key(b)) })
	for k := range x.secrets {
		if !seen[k] {
			delete(x.secrets, k) // nobody's business any more
		}
	}
	return out
}

// mayHave reports whether a Gateway or a ListenerSet may have a Secret.
func (x *Index) mayHave(by ref, k key) bool {
	return k.Namespace == by.Namespace || x.grantedTo(by.kind.String(), by.Namespace, "Secret", k)
}

// certificates adds those of a listener to what a gateway has, and says which it cannot have.
func (x *Index) certificates(l *ingressListener, in *mesh.Ingress) routing.Verdict {
	var found []mesh.Certificate
	for i, r := range l.refs {
		c, v := x.certificate(l.of, r, gatewayv1.ListenerReasonInvalidCertificateRef)
		if !v.OK() {
			v.Message = fmt.Sprintf("tls.certificateRefs[%d]: %s", i, v.Message)
			return v
		}
		found = append(found, c)
	}
	for _, c := range found {
		in.AddCertificate(c)
	}
	return routing.Verdict{}
}

// certificate is the one that a Gateway or a ListenerSet refers to; the verdict says why it cannot have it.
func (x *Index) certificate(by ref, r gatewayv1.SecretObjectReference, invalid gatewayv1.ListenerConditionReason) (mesh.Certificate, routing.Verdict) {
	k := secretOf(by, r)
	switch {
	case !isSecret(r):
		return mesh.Certificate{}, verdict(invalid, "of kind "+string(deref(r.Kind, "Secret"))+"; only Secrets are followed")
	case !x.mayHave(by, k):
		return mesh.Certificate{}, verdict(gatewayv1.ListenerReasonRefNotPermitted, "no ReferenceGrant in "+k.Namespace+" lets "+by.kind.String()+"s of "+by.Namespace+" have Secret "+k.String())
	}
	s := x.secrets[k]
	if s == nil {
		return mesh.Certificate{}, verdict(invalid, "there is no Secret "+k.String())
	}
	if s.Problem != "" {
		return mesh.Certificate{}, verdict(invalid, "Secret "+k.String()+": "+s.Problem)
	}
	c := s.Certificate
	c.Name = k.String()
	return c, routing.Verdict{}
}
