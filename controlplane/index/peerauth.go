package index

import (
	"maps"
	"slices"

	securityv1beta1 "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A PeerAuthentication becomes DENY policies for connections without a peer identity, as Istio converts it,
// so that a node has one kind of rule to enforce. '_' cannot occur in a Kubernetes name.
const (
	strictPolicy     = "istio_converted_static_strict"
	peerPolicyPrefix = "converted_peer_authentication_"
)

// mtlsMode is the mode of a PeerAuthentication. DISABLE means the same to a node as PERMISSIVE: plaintext is
// accepted; the tunnel stays available to peers that use it.
type mtlsMode uint8

const (
	mtlsUnset mtlsMode = iota
	mtlsPermissive
	mtlsStrict
)

func mtlsModeOf(m *securityv1beta1.PeerAuthentication_MutualTLS) mtlsMode {
	switch m.GetMode() {
	case securityv1beta1.PeerAuthentication_MutualTLS_STRICT:
		return mtlsStrict
	case securityv1beta1.PeerAuthentication_MutualTLS_PERMISSIVE, securityv1beta1.PeerAuthentication_MutualTLS_DISABLE:
		return mtlsPermissive
	}
	return mtlsUnset
}

// peerAuthFact is what the mesh needs of a PeerAuthentication.
type peerAuthFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	selector   map[string]string // empty: the whole namespace, or mesh in the root namespace
	mode       mtlsMode
	ports      map[uint16]mtlsMode // only with a selector
}

func peerAuthFactOf(p *securityv1.PeerAuthentication) *peerAuthFact {
	f := &peerAuthFact{key: keyOf(p), uid: string(p.UID), generation: p.Generation, created: p.CreationTimestamp, mode: mtlsModeOf(p.Spec.Mtls)}
	if p.Spec.Selector != nil {
		f.selector = p.Spec.Selector.MatchLabels
	}
	if len(f.selector) > 0 {
		for port, m := range p.Spec.PortLevelMtls {
			if port == 0 || port > 65535 {
				continue
			}
			if f.ports == nil {
				f.ports = map[uint16]mtlsMode{}
			}
			f.ports[uint16(port)] = mtlsModeOf(m)
		}
	}
	return f
}

// older decides which of two policies of one level counts: the first that was made.
func (f *peerAuthFact) older(than *peerAuthFact) bool {
	if than == nil {
		return true
	}
	if !f.created.Equal(&than.created) {
		return f.created.Before(&than.created)
	}
	return compareKeys(f.key, than.key) < 0
}

// effectiveStrict resolves inheritance: mesh, then namespace, then workload.
func effectiveStrict(levels ...*peerAuthFact) bool {
	strict := false
	for _, l := range levels {
		if l != nil && l.mode != mtlsUnset {
			strict = l.mode == mtlsStrict
		}
	}
	return strict
}

// exceptions are the ports whose mode differs from the one of the workload.
func (f *peerAuthFact) exceptions(strict bool) []uint16 {
	var out []uint16
	for _, port := range slices.Sorted(maps.Keys(f.ports)) {
		if m := f.ports[port]; m != mtlsUnset && (m == mtlsStrict) != strict {
			out = append(out, port)
		}
	}
	return out
}

func (f *peerAuthFact) portPolicyName() mesh.PolicyName {
	return mesh.PolicyName{Namespace: f.Namespace, Name: peerPolicyPrefix + f.Name}
}

// portPolicy compiles a workload's PeerAuthentication with port exceptions; nil where it needs no policy of
// its own. The static policy does for a workload that is strict on every port: a second DENY next to it could
// not except anything.
func (f *peerAuthFact) portPolicy(meshWide, namespace *peerAuthFact) *mesh.Policy {
	strict := effectiveStrict(meshWide, namespace, f)
	ports := f.exceptions(strict)
	if len(ports) == 0 {
		return nil
	}
	m := mesh.Match{NotPrincipals: anyPrincipal()}
	if strict {
		m.NotDestinationPorts = ports
	} else {
		m.DestinationPorts = ports
	}
	return &mesh.Policy{
		Name:   f.portPolicyName(),
		Scope:  mesh.ScopeWorkload,
		Action: mesh.Deny,
		Rules:  []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}}},
	}
}

// staticStrict denies every connection without a peer identity.
func (c *compiled) staticStrict() *mesh.Policy {
	return &mesh.Policy{
		Name:   c.strictName(),
		Scope:  mesh.ScopeWorkload,
		Action: mesh.Deny,
		Rules:  []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: anyPrincipal()}}}}}},
	}
}

func (c *compiled) strictName() mesh.PolicyName {
	return mesh.PolicyName{Namespace: c.RootNamespace, Name: strictPolicy}
}

func anyPrincipal() []mesh.StringMatch { return []mesh.StringMatch{{Kind: mesh.MatchPresence}} }

// peerPolicies names the converted policies of one workload, given the PeerAuthentications of its namespace
// and the mesh-wide one, and whether the workload is strict on every port.
func (c *compiled) peerPolicies(meshWide, namespace, workload *peerAuthFact) (names []mesh.PolicyName, strict bool) {
	strict = effectiveStrict(meshWide, namespace, workload)
	if workload != nil && len(workload.exceptions(strict)) > 0 {
		return []mesh.PolicyName{workload.portPolicyName()}, false
	}
	if strict {
		return []mesh.PolicyName{c.strictName()}, true
	}
	return nil, false
}
