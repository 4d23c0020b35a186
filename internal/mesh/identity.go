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

const (
	spiffeScheme = "spiffe://"
	maxIdentity  = 2048 // bytes of the URI: SPIFFE-ID, section 2.3
)

// ParseIdentity reads the URI form of an identity. It accepts exactly the form that String writes:
// letters, digits, '.', '-' and '_' (SPIFFE-ID, section 2; a trust domain with capitals is let through, and is
// another one than that without), and no part that is a step in a path.
func ParseIdentity(uri string) (Identity, error) {
	rest, ok := strings.CutPrefix(uri, spiffeScheme)
	if !ok {
		return Identity{}, fmt.Errorf("%w: %q does not begin with %s", ErrIdentity, uri, spiffeScheme)
	}
	if len(uri) > maxIdentity {
		return Identity{}, fmt.Errorf("%w: it has %d bytes, at most %d are read", ErrIdentity, len(uri), maxIdentity)
	}
	for i := range len(rest) {
		switch c := rest[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '-', c == '_', c == '/':
		default:
			return Identity{}, fmt.Errorf("%w: %q has the byte %#02x", ErrIdentity, uri, c)
		}
	}
	p := strings.Split(rest, "/")
	if len(p) != 5 || p[1] != "ns" || p[3] != "sa" {
		return Identity{}, fmt.Errorf("%w: %q is not spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT", ErrIdentity, uri)
	}
	id := Identity{TrustDomain: p[0], Namespace: p[2], ServiceAccount: p[4]}
	for _, part := range []string{id.TrustDomain, id.Namespace, id.ServiceAccount} {
		if part == "" || part == "." || part == ".." {
			return Identity{}, fmt.Errorf("%w: %q has the part %q", ErrIdentity, uri, part)
		}
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
