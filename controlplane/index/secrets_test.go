package index

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

// pair is a certificate and its key.
func pair(t *testing.T) map[string][]byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"a.example"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return map[string][]byte{"tls.crt": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), "tls.key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})}
}

func TestReadSecret(t *testing.T) {
	good, other := pair(t), pair(t)
	for name, c := range map[string]struct {
		data    map[string][]byte
		problem string
	}{
		"a pair":              {good, ""},
		"Istio's older names": {map[string][]byte{"cert": good["tls.crt"], "key": good["tls.key"]}, ""},
		"nothing":             {nil, "no tls.crt"},
		"no key":              {map[string][]byte{"tls.crt": good["tls.crt"]}, "no tls.key"},
		"another's key":       {map[string][]byte{"tls.crt": good["tls.crt"], "tls.key": other["tls.key"]}, "no certificate and its key"},
		"no certificate":      {map[string][]byte{"tls.crt": []byte("x"), "tls.key": good["tls.key"]}, "no certificate and its key"},
	} {
		s := ReadSecret(c.data)
		if (s.Problem == "") != (c.problem == "") || !strings.Contains(s.Problem, c.problem) {
			t.Errorf("%s: %q, want %q", name, s.Problem, c.problem)
		}
		if (s.Certificate.Key == "") != (c.problem != "") {
			t.Errorf("%s: a key is there: %t", name, s.Certificate.Key != "")
		}
		if out := fmt.Sprintf("%v %+v %#v", s, *s, *s); strings.Contains(out, "PRIVATE") {
			t.Errorf("%s: the key is printed", name)
		}
	}
}

// TestSecretsOfGateways has a Secret asked for, and given, only where the Gateway may have it.
func TestSecretsOfGateways(t *testing.T) {
	x, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	g := &gatewayv1.Gateway{}
	g.Namespace, g.Name, g.Generation = "shop", "edge", 1
	mustDo(t, `{gatewayClassName: istio, listeners: [{name: https, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert, namespace: vault}]}}]}`, &g.Spec)
	x.Set(g)
	serves := func() int {
		in := x.Snapshot().Ingress(mesh.ServiceName{Namespace: "shop", Hostname: "edge-istio.shop.svc.cluster.local"})
		if len(in.Listeners) != len(in.Certificates) {
			t.Errorf("%d listeners with %d certificates", len(in.Listeners), len(in.Certificates))
		}
		return len(in.Listeners)
	}
	asked := func(u *Update, want bool) {
		t.Helper()
		if slices.Contains(u.Secrets, SecretKey{"vault", "cert"}) != want {
			t.Errorf("asked for %v", u.Secrets)
		}
	}
	k, state := SecretKey{"vault", "cert"}, ReadSecret(pair(t))
	u := x.Commit()
	asked(u, false)
	if r := u.Gateways[GatewayKey{"shop", "edge"}].Listeners[0].Resolved; r.Reason != "RefNotPermitted" || serves() != 0 {
		t.Errorf("without a grant: %+v", r)
	}
	x.SetSecret(k, state) // that nobody asked for
	if x.Commit(); serves() != 0 {
		t.Error("a Secret is shown that was not granted")
	}
	grant := &gatewayv1beta1.ReferenceGrant{}
	grant.Namespace, grant.Name = "vault", "grant"
	mustDo(t, `{from: [{group: gateway.networking.k8s.io, kind: Gateway, namespace: shop}], to: [{group: "", kind: Secret, name: cert}]}`, &grant.Spec)
	x.Set(grant)
	u = x.Commit()
	asked(u, true)
	if r := u.Gateways[GatewayKey{"shop", "edge"}].Listeners[0].Resolved; r.Reason != "InvalidCertificateRef" {
		t.Errorf("before it is read: %+v", r)
	}
	x.SetSecret(k, state)
	if u = x.Commit(); !u.Gateways[GatewayKey{"shop", "edge"}].Listeners[0].Programmed() || serves() != 1 {
		t.Error("a Secret that is granted and there is not shown")
	}
	x.SetSecret(k, &SecretState{Problem: "it has no tls.key"})
	if x.Commit(); serves() != 0 {
		t.Error("a listener is served without a key")
	}
	x.SetSecret(k, state)
	x.Delete(ReferenceGrant, "vault", "grant")
	u = x.Commit()
	asked(u, false)
	if serves() != 0 {
		t.Error("a Secret is shown whose grant was taken back")
	}
}

func mustDo(t *testing.T, doc string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(doc), into); err != nil {
		t.Fatal(err)
	}
}
