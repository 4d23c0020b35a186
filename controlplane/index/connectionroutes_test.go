package index

import (
	"slices"
	"testing"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// TestTerminatedConnections has TLS end at a listener for connections, and pass at another of the same port.
func TestTerminatedConnections(t *testing.T) {
	x, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{
		`{apiVersion: v1, kind: Service, metadata: {name: db, namespace: shop}, spec: {clusterIPs: [10.96.0.10], ports: [{name: tcp, port: 3306}]}}`,
		`{apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: edge, namespace: shop, generation: 1}, spec: {gatewayClassName: istio, listeners: [
			{name: ends, port: 443, protocol: TLS, hostname: a.example, tls: {mode: Terminate, certificateRefs: [{name: cert}]}, allowedRoutes: {kinds: [{kind: HTTPRoute}, {kind: TLSRoute}]}},
			{name: passes, port: 443, protocol: TLS, hostname: b.example, tls: {mode: Passthrough}},
			{name: whatever, port: 444, protocol: TLS, tls: {mode: Terminate, certificateRefs: [{name: cert}]}}]}}`,
		`{apiVersion: gateway.networking.k8s.io/v1, kind: TLSRoute, metadata: {name: by-name, namespace: shop}, spec: {hostnames: [a.example, b.example], parentRefs: [{name: edge, port: 443}], rules: [{backendRefs: [{name: db, port: 3306}]}]}}`,
		`{apiVersion: gateway.networking.k8s.io/v1, kind: TCPRoute, metadata: {name: all, namespace: shop}, spec: {parentRefs: [{name: edge, port: 444}], rules: [{backendRefs: [{name: db, port: 3306}]}]}}`,
	} {
		x.Set(decode(t, doc))
	}
	db := mesh.ServiceName{Namespace: "shop", Hostname: "db.shop.svc.cluster.local"}
	type served struct {
		name, host string
		ends       bool
	}
	check := func(certificates int, want ...served) {
		t.Helper()
		in := x.Snapshot().Ingress(mesh.ServiceName{Namespace: "shop", Hostname: "edge-istio.shop.svc.cluster.local"})
		var got []served
		for _, l := range in.Listeners {
			if len(l.Names) != 1 || len(l.Backends) != 1 || l.Backends[0].Service != db || l.Backends[0].Port != 3306 || l.TLS != nil && !slices.Equal(l.TLS.Certificates, []string{"shop/cert"}) {
				t.Errorf("%+v", l)
				continue
			}
			got = append(got, served{l.Name, l.Names[0], l.TLS != nil})
		}
		if !slices.Equal(got, want) || len(in.Certificates) != certificates {
			t.Errorf("%+v with %d certificates, want %+v with %d", got, len(in.Certificates), want, certificates)
		}
	}
	passes := served{"tls/443/passes/TLSRoute/shop/by-name/0", "b.example", false}
	u := x.Commit()
	if !slices.Contains(u.Secrets, SecretKey{"shop", "cert"}) {
		t.Errorf("asked for %v", u.Secrets)
	}
	check(0, passes)
	x.SetSecret(SecretKey{"shop", "cert"}, ReadSecret(pair(t)))
	u = x.Commit()
	check(1, served{"tls/443/ends/TLSRoute/shop/by-name/0", "a.example", true}, passes, served{"tls/444/whatever/TCPRoute/shop/all/0", "*", true})
	s := u.Gateways[GatewayKey{"shop", "edge"}].Listeners
	for i, want := range []struct {
		resolved string
		kinds    []gatewayv1.Kind
	}{{string(gatewayv1.ListenerReasonInvalidRouteKinds), []gatewayv1.Kind{"TLSRoute"}}, {"", []gatewayv1.Kind{"TLSRoute"}}, {"", []gatewayv1.Kind{"TLSRoute", "TCPRoute"}}} {
		var kinds []gatewayv1.Kind
		for _, k := range s[i].Kinds {
			kinds = append(kinds, k.Kind)
		}
		if s[i].Resolved.Reason != want.resolved || !slices.Equal(kinds, want.kinds) || !s[i].Programmed() || s[i].Attached != 1 {
			t.Errorf("listener %s: %+v, programmed %t, want %+v", s[i].Name, s[i], s[i].Programmed(), want)
		}
	}
	x.SetSecret(SecretKey{"shop", "cert"}, nil)
	u = x.Commit()
	check(0, passes)
	if r := u.Gateways[GatewayKey{"shop", "edge"}].Listeners[0].Resolved; r.Reason != string(gatewayv1.ListenerReasonInvalidCertificateRef) {
		t.Errorf("without its Secret: %+v", r)
	}
}
