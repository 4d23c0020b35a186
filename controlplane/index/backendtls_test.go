package index

import (
	"slices"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/internal/mesh"
)

// TestBackendTLSPolicies follows policies while the ConfigMaps with their roots come, go and change.
func TestBackendTLSPolicies(t *testing.T) {
	x, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{
		`{apiVersion: v1, kind: Service, metadata: {name: db, namespace: shop}, spec: {clusterIPs: [10.96.0.10], ports: [{name: https, port: 443}, {name: http, port: 80}]}}`,
		`{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: edge, namespace: shop}, spec: {gatewayClassName: istio, listeners: [{name: http, port: 80, protocol: HTTP}]}}`,
		`{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: r, namespace: shop}, spec: {parentRefs: [{name: edge}], rules: [{backendRefs: [{name: db, port: 443}]}]}}`,
	} {
		x.Set(decode(t, doc))
	}
	resolved := func() string { return x.routeStates[RouteKey{HTTPRoute, "shop", "r"}].Parents[0].Resolved.Reason }
	x.Commit()
	if resolved() != "UnsupportedProtocol" {
		t.Errorf("a port that is declared as TLS, without a policy: %q", resolved())
	}
	all := `{apiVersion: gateway.networking.k8s.io/v1, kind: BackendTLSPolicy, metadata: {name: NAME, namespace: shop, creationTimestamp: "2026-01-0DAYT00:00:00Z"}, spec: {targetRefs: [{group: "", kind: Service, name: db}], validation: VALIDATION}}`
	set := func(name, day, validation string) {
		x.Set(decode(t, strings.NewReplacer("NAME", name, "DAY", day, "VALIDATION", validation).Replace(all)))
	}
	set("first", "1", `{hostname: DB.example, caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}`)
	set("second", "2", `{hostname: db.example, subjectAltNames: [{type: URI, uri: "spiffe://x/db"}], caCertificateRefs: [{group: "", kind: ConfigMap, name: other}]}`)
	x.Set(decode(t, `{apiVersion: gateway.networking.k8s.io/v1, kind: BackendTLSPolicy, metadata: {name: port, namespace: shop, creationTimestamp: "2026-01-03T00:00:00Z"}, spec: {targetRefs: [{group: "", kind: Service, name: db, sectionName: http}], validation: {hostname: http.example, wellKnownCACertificates: System}}}`))
	says := func(name string) (accepted, resolved string) {
		t.Helper()
		s := x.routeStates[RouteKey{BackendTLSPolicy, "shop", name}]
		if s == nil || len(s.Parents) != 1 || s.Parents[0].Ref.Name != "edge" {
			t.Fatalf("policy %s: %+v", name, s)
		}
		return s.Parents[0].Accepted.Reason, s.Parents[0].Resolved.Reason
	}
	db := mesh.ServiceName{Namespace: "shop", Hostname: "db.shop.svc.cluster.local"}
	u := x.Commit()
	if !slices.Equal(u.Roots, []RootsKey{{"shop", "other"}, {"shop", "roots"}}) {
		t.Errorf("asked for %v", u.Roots)
	}
	if resolved() != "" {
		t.Errorf("with a policy: %q", resolved())
	}
	if a, r := says("first"); a != "NoValidCACertificate" || r != "InvalidCACertificateRef" {
		t.Errorf("before the roots are read: %q %q", a, r)
	}
	if a, _ := says("second"); a != "Conflicted" {
		t.Errorf("the younger: %q", a)
	}
	if a, r := says("port"); a != "" || r != "" {
		t.Errorf("with the system's roots: %q %q", a, r)
	}
	tls := x.Snapshot().Service(db).TLS
	if len(tls) != 2 || tls[0].Port != 0 || tls[0].Invalid == "" || tls[1].Port != 80 || tls[1].Invalid != "" || !tls[1].PublicRoots || tls[0].PublicRoots {
		t.Errorf("before the roots are read: %+v", tls)
	}
	roots := string(pair(t)["tls.crt"])
	x.SetRoots(RootsKey{"shop", "roots"}, ReadRoots(map[string]string{"ca.crt": roots}))
	x.Commit()
	if a, r := says("first"); a != "" || r != "" {
		t.Errorf("with its roots: %q %q", a, r)
	}
	tls = x.Snapshot().Service(db).TLS
	want := mesh.BackendTLS{Host: "db.example", Names: []mesh.CertificateName{{Name: "db.example"}}, Roots: roots}
	if len(tls) != 2 || tls[0].Invalid != "" || tls[0].Host != want.Host || tls[0].Roots != roots || !slices.Equal(tls[0].Names, want.Names) {
		t.Errorf("%+v, want %+v", tls, want)
	}
	for name, state := range map[string]*RootsState{"empty": ReadRoots(nil), "no certificate": ReadRoots(map[string]string{"ca.crt": "x"}), "gone": nil} {
		x.SetRoots(RootsKey{"shop", "roots"}, state)
		x.Commit()
		if a, r := says("first"); a != "NoValidCACertificate" || r != "InvalidCACertificateRef" || x.Snapshot().Service(db).TLS[0].Invalid == "" {
			t.Errorf("%s: %q %q %+v", name, a, r, x.Snapshot().Service(db).TLS)
		}
	}
	x.Delete(BackendTLSPolicy, "shop", "first")
	x.SetRoots(RootsKey{"shop", "other"}, ReadRoots(map[string]string{"ca.crt": roots}))
	u = x.Commit()
	if s, ok := u.Routes[RouteKey{BackendTLSPolicy, "shop", "first"}]; !ok || s != nil || !slices.Equal(u.Roots, []RootsKey{{"shop", "other"}}) {
		t.Errorf("the policy is gone: %+v, asked for %v", s, u.Roots)
	}
	if a, r := says("second"); a != "" || r != "" {
		t.Errorf("the younger, alone: %q %q", a, r)
	}
	if tls = x.Snapshot().Service(db).TLS; !slices.Equal(tls[0].Names, []mesh.CertificateName{{URI: true, Name: "spiffe://x/db"}}) || tls[0].Invalid != "" {
		t.Errorf("%+v", tls)
	}
	x.Delete(HTTPRoute, "shop", "r")
	x.Commit()
	if s := x.routeStates[RouteKey{BackendTLSPolicy, "shop", "second"}]; len(s.Parents) > 0 {
		t.Errorf("no Gateway sends there any more: %+v", s)
	}
}

// TestClientsOfListeners has a listener served only while the roots for its clients are there.
func TestClientsOfListeners(t *testing.T) {
	x, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	x.Set(decode(t, `{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: edge, namespace: shop, generation: 1}, spec: {gatewayClassName: istio,
		tls: {backend: {clientCertificateRef: {name: own}}, frontend: {default: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}}, perPort: [
			{port: 444, tls: {validation: {mode: AllowInsecureFallback, caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}}},
			{port: 445, tls: {}}, {port: 446, tls: {validation: {caCertificateRefs: [{group: "", kind: Secret, name: roots}]}}},
			{port: 447, tls: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: roots, namespace: vault}, {group: "", kind: ConfigMap, name: roots}]}}}]}},
		listeners: [{name: http, port: 80, protocol: HTTP}, {name: default, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}},
			{name: insecure, port: 444, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}, {name: unchecked, port: 445, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}},
			{name: kind, port: 446, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}, {name: foreign, port: 447, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}]}}`))
	x.SetSecret(SecretKey{"shop", "cert"}, ReadSecret(pair(t)))
	u := x.Commit()
	if !slices.Equal(u.Roots, []RootsKey{{"shop", "roots"}}) || !slices.Equal(u.Secrets, []SecretKey{{"shop", "cert"}, {"shop", "own"}}) {
		t.Errorf("asked for %v and %v", u.Roots, u.Secrets)
	}
	serves := func() (out map[uint16]*mesh.ListenerTLS, in *mesh.Ingress) {
		in, out = x.Snapshot().Ingress(mesh.ServiceName{Namespace: "shop", Hostname: "edge-istio.shop.svc.cluster.local"}), map[uint16]*mesh.ListenerTLS{}
		for _, l := range in.Listeners {
			out[l.Port] = l.TLS
		}
		return out, in
	}
	states := func() (out []string) {
		for _, l := range x.gatewayStates[key{"shop", "edge"}].Listeners {
			out = append(out, string(l.Name)+" "+l.Accepted.Reason+" "+l.Resolved.Reason)
		}
		return out
	}
	want := []string{"http  ", "default NoValidCACertificate InvalidCACertificateRef", "insecure NoValidCACertificate InvalidCACertificateRef", "unchecked  ",
		"kind NoValidCACertificate InvalidCACertificateKind", "foreign NoValidCACertificate RefNotPermitted"}
	if got := states(); !slices.Equal(got, want) {
		t.Errorf("without roots: %q", got)
	}
	if got, _ := serves(); len(got) != 2 || got[445] == nil || got[445].ClientRoots != "" {
		t.Errorf("without roots: %+v", got)
	}
	if g := x.gatewayStates[key{"shop", "edge"}]; g.Resolved.Reason != "InvalidClientCertificateRef" {
		t.Errorf("without its own certificate: %+v", g.Resolved)
	}
	x.SetSecret(SecretKey{"shop", "own"}, ReadSecret(pair(t)))
	x.SetRoots(RootsKey{"shop", "roots"}, ReadRoots(map[string]string{"ca.crt": string(pair(t)["tls.crt"])}))
	x.Commit()
	want[1], want[2], want[5] = "default  ", "insecure  ", "foreign  RefNotPermitted"
	if got := states(); !slices.Equal(got, want) {
		t.Errorf("with roots: %q", got)
	}
	got, in := serves()
	if len(got) != 4 || got[443].ClientRoots != "clients of 443" || got[443].Optional || got[443].Untrusted || got[444].ClientRoots != "clients of 444" || !got[444].Optional || !got[444].Untrusted {
		t.Errorf("with roots: %+v %+v %+v", got, got[443], got[444])
	}
	if in.BackendCertificate != "shop/own" || x.gatewayStates[key{"shop", "edge"}].Resolved.Reason != "" {
		t.Errorf("shows %q to applications", in.BackendCertificate)
	}
	for _, name := range []string{"clients of 443", "clients of 444", "shop/cert", "shop/own"} {
		if !slices.ContainsFunc(in.Certificates, func(c mesh.Certificate) bool { return c.Name == name }) {
			t.Errorf("%s is not there", name)
		}
	}
}
