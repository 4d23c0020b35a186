package index

import (
	"slices"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A DestinationRule's credential is the waypoint's, of its own namespace: it is asked for by name, and what is missing is said.
func TestCredentialsOfDestinationRules(t *testing.T) {
	x, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{
		`{kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: way, istio.io/use-waypoint-namespace: egress}}}`,
		`{kind: ServiceEntry, metadata: {namespace: shop, name: api}, spec: {hosts: [api.example], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}}`,
		`{kind: DestinationRule, metadata: {namespace: shop, name: api, uid: u1}, spec: {host: api.example, trafficPolicy: {tls: {mode: MUTUAL, credentialName: api}}}}`,
	} {
		x.Set(decode(t, doc))
	}
	api := mesh.ServiceName{Namespace: "shop", Hostname: "api.example"}
	found := func() *mesh.Certificate {
		t.Helper()
		u := x.Commit()
		for _, name := range []string{"api", "api-cacert"} {
			if !slices.Contains(u.Secrets, SecretKey{"egress", name}) || slices.Contains(u.Secrets, SecretKey{"shop", name}) {
				t.Errorf("asked for are %v", u.Secrets)
			}
		}
		return u.Snapshot.Service(api).TrafficFor("", "", 80).TLS.CredentialOf("egress")
	}
	said := func() string {
		if n := x.notices[NoticeKey{DestinationRule, "shop", "api"}]; n != nil {
			return n.Message
		}
		return ""
	}
	if c := found(); c != nil || !strings.Contains(said(), "Secret egress/api, of the waypoint's namespace, is not there") {
		t.Errorf("%v: %q", c, said())
	}
	x.SetSecret(SecretKey{"egress", "api"}, &SecretState{Certificate: mesh.Certificate{Chain: "chain", Key: "key"}})
	if c := found(); c != nil || said() == "" {
		t.Errorf("without roots there is %v: %q", c, said())
	}
	x.SetSecret(SecretKey{"egress", "api-cacert"}, &SecretState{Certificate: mesh.Certificate{Roots: "roots"}, Problem: "it has no tls.crt"})
	if c := found(); c == nil || c.Chain != "chain" || c.Roots != "roots" || said() != "" {
		t.Errorf("%v: %q", c, said())
	}
	x.SetSecret(SecretKey{"egress", "api"}, nil)
	if c := found(); c != nil || said() == "" {
		t.Errorf("the Secret is gone, and there is %v: %q", c, said())
	}
}
