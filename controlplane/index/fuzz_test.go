package index

import (
	"encoding/json"
	"net/netip"
	"testing"

	securityv1beta1 "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// FuzzPeerAuthentication: STRICT for the workload refuses plaintext on every port that the object does not except
// itself, and nothing that it says refuses a peer that has proved who it is.
func FuzzPeerAuthentication(f *testing.F) {
	for _, s := range []string{
		`{"metadata":{"name":"default","namespace":"shop"},"spec":{"mtls":{"mode":"STRICT"}}}`,
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"selector":{"matchLabels":{"app":"ui"}},"mtls":{"mode":"STRICT"},"portLevelMtls":{"80":{"mode":"DISABLE"},"81":{"mode":"UNSET"},"82":null}}}`,
		`{"metadata":{"name":"a","namespace":"shop"},"spec":{"selector":{"matchLabels":{"app":"ui"}},"mtls":{"mode":"PERMISSIVE"},"portLevelMtls":{"8443":{"mode":"STRICT"},"0":{"mode":"STRICT"},"65616":{"mode":"STRICT"}}}}`,
		`{"spec":{"selector":{},"portLevelMtls":{"80":{"mode":"DISABLE"}}}}`, `{"spec":{"mtls":null}}`, `{}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &securityv1.PeerAuthentication{}
		if json.Unmarshal(data, p) != nil {
			return
		}
		fact := peerAuthFactOf(p)
		strict := p.Spec.Mtls.GetMode() == securityv1beta1.PeerAuthentication_MutualTLS_STRICT
		if effectiveStrict(nil, nil, fact) != strict {
			t.Errorf("mode %v: strict is %v", p.Spec.Mtls.GetMode(), !strict)
		}
		policy := fact.portPolicy(nil, nil)
		if policy == nil {
			return
		}
		for _, port := range []uint16{0, 1, 80, 81, 82, 8443, 65535} {
			c := mesh.Conn{Plaintext: true, Dst: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port)}
			want := strict
			switch p.Spec.PortLevelMtls[uint32(port)].GetMode() {
			case securityv1beta1.PeerAuthentication_MutualTLS_STRICT:
				want = true
			case securityv1beta1.PeerAuthentication_MutualTLS_PERMISSIVE, securityv1beta1.PeerAuthentication_MutualTLS_DISABLE:
				want = false
			}
			if port == 0 {
				want = strict
			}
			if policy.Matches(c) != want {
				t.Errorf("port %d: plaintext is refused: %v, want %v", port, !want, want)
			}
			c.Plaintext, c.Source = false, mesh.Identity{TrustDomain: "cluster.local", Namespace: "a", ServiceAccount: "b"}
			if policy.Matches(c) {
				t.Errorf("port %d: a peer with an identity is refused", port)
			}
		}
	})
}
