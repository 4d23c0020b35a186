package mesh

import (
	"errors"
	"fmt"
	"strings"
)

// Identity is a workload's SPIFFE identity in the form that Istio uses:
// spiffe://<trust domain>/ns/<namespace>/sa/<service account>.
// The zero Identity means "not authenticated".
type Identity struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
}

// ErrIdentity is wrapped by every error of ParseIdentity.
var ErrIdentity = errors.New("not a workload identity")

const spiffeScheme = "spiffe://"

// ParseIdentity reads the URI form of an identity. It accepts exactly the form that String writes:
// no query, fragment, user info, port, empty part, percent escape or control character (SPIFFE-ID, section 2).
func ParseIdentity(uri string) (Identity, error) {
	rest, ok := strings.CutPrefix(uri, spiffeScheme)
	if !ok {
		return Identity{}, fmt.Errorf("%w: %q does not begin with %s", ErrIdentity, uri, spiffeScheme)
	}
	for i := range len(rest) {
		if c := rest[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("?#%@:\\", c) >= 0 {
			return Identity{}, fmt.Errorf("%w: %q has the byte %#02x", ErrIdentity, uri, c)
		}
	}
	p := strings.Split(rest, "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "sa" {
		return Identity{}, fmt.Errorf("%w: %q is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT", ErrIdentity, uri)
	}
	id := Identity{TrustDomain: p[0], Namespace: p[2], ServiceAccount: p[4]}
	if id.TrustDomain == "" || id.Namespace == "" || id.ServiceAccount == "" {
		return Identity{}, fmt.Errorf("%w: %q has an empty part", ErrIdentity, uri)
	}
	return id, nil
}

// IsZero reports whether nothing is known about the peer.
func (i Identity) IsZero() bool { return i == Identity{} }

// String returns the URI form, or "" for the zero Identity.
func (i Identity) String() string {
	if i.IsZero() {
		return ""
	}
	return spiffeScheme + i.TrustDomain + "/ns/" + i.Namespace + "/sa/" + i.ServiceAccount
}

// Principal is the form that Istio's AuthorizationPolicy matches: the URI without its scheme.
func (i Identity) Principal() string { return strings.TrimPrefix(i.String(), spiffeScheme) }
