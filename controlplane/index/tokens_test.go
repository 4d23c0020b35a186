package index

import (
	"strings"
	"testing"

	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// TestKeys follows a key set that is fetched, fetched in vain and no longer needed.
func TestKeys(t *testing.T) {
	x, err := New(Config{ClusterID: "c", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", RootNamespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }
	x.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/use-waypoint": "way"}}})
	x.Set(&corev1.Service{ObjectMeta: meta("ui"), Spec: corev1.ServiceSpec{ClusterIP: "10.0.0.1", Ports: []corev1.ServicePort{{Port: 80, Name: "http"}}}})
	request := &securityv1.RequestAuthentication{ObjectMeta: meta("tokens"), Spec: securityapi.RequestAuthentication{
		TargetRefs: []*typeapi.PolicyTargetReference{{Kind: "Service", Name: "ui"}},
		JwtRules:   []*securityapi.JWTRule{{Issuer: "a.example", JwksUri: "https://a.example/keys"}},
	}}
	x.Set(request)
	from := policy.KeySource{URL: "https://a.example/keys"}
	ui := mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}
	check := func(keys, reason, says string) {
		t.Helper()
		u := x.Commit()
		tokens := u.Snapshot.Service(ui).Tokens
		if len(tokens) != 1 || tokens[0].Keys != keys {
			t.Errorf("the waypoint verifies by %+v, want the keys %q", tokens, keys)
		}
		s := x.states[PolicyKey{RequestAuthentication, "shop", "tokens"}]
		if s == nil || s.Reason != reason || s.Exact != (reason == "") || !strings.Contains(s.Message, says) || len(s.Waypoints) != 1 {
			t.Errorf("state %+v, want %s %q", s, reason, says)
		}
		if len(u.Keys) != 1 || u.Keys[0] != from {
			t.Errorf("wanted are %v", u.Keys)
		}
	}
	check("", policy.ReasonNoKeys, "is being fetched")
	x.SetKeys(from, KeyState{Problem: "the answer is 404"})
	check("", policy.ReasonNoKeys, "404")
	x.SetKeys(from, KeyState{Keys: "k1"})
	check("k1", "", "")
	x.SetKeys(from, KeyState{Keys: "k1", Problem: "the answer is 500"})
	check("k1", "", "500")
	x.SetKeys(policy.KeySource{URL: "https://other.example"}, KeyState{Keys: "k2"})
	check("k1", "", "500")
	x.Delete(RequestAuthentication, "shop", "tokens")
	if u := x.Commit(); len(u.Keys) != 0 || len(u.Snapshot.Service(ui).Tokens) != 0 || len(x.keys.state) != 0 {
		t.Errorf("without the object %v is wanted, and the waypoint has %v", u.Keys, u.Snapshot.Service(ui).Tokens)
	}
}
