package index

import (
	"fmt"
	"testing"
)

// TestClientsByLabels has rules for clients with labels follow the pods that have them, and no others, and be forgotten with the rules.
func TestClientsByLabels(t *testing.T) {
	x, err := New(testConfig)
	if err != nil {
		t.Fatal(err)
	}
	pod := func(name, app, ip, more string) any {
		return decode(t, fmt.Sprintf(`{kind: Pod, metadata: {namespace: %[1]s, name: %[2]s, uid: %[2]s, labels: {app: %[3]s, x: "1"}}, spec: {nodeName: n, serviceAccountName: sa%[5]s}, status: {phase: Running, podIP: %[4]s, podIPs: [{ip: %[4]s}], conditions: [{type: Ready, status: "True"}]}}`, "blog", name, app, ip, more))
	}
	for _, doc := range []string{
		`{kind: Namespace, metadata: {name: shop, labels: {istio.io/use-waypoint: way}}}`,
		`{kind: Service, metadata: {namespace: shop, name: ui}, spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}}`,
		`{kind: VirtualService, metadata: {namespace: shop, name: v}, spec: {hosts: [ui], http: [{match: [{sourceLabels: {app: reader}}], redirect: {uri: /}}, {match: [{sourceLabels: {app: nobody}}], redirect: {uri: /}}, {route: [{destination: {host: ui}}]}]}}`,
	} {
		x.Set(decode(t, doc))
	}
	at := func(want string) {
		t.Helper()
		u := x.Commit()
		s := u.Snapshot.Service(x.c.serviceName(key{"shop", "ui"}))
		if s == nil || len(s.HTTP) == 0 {
			t.Fatalf("the Service has no rules: %+v", s)
		}
		got := ""
		for _, r := range s.HTTP {
			for _, m := range r.Matches {
				got += fmt.Sprint(m.At)
			}
		}
		if got != want {
			t.Errorf("clients at %s, want %s", got, want)
		}
	}
	at("[][]")
	x.Set(pod("r1", "reader", "10.0.0.2", ""))
	x.Set(pod("w1", "writer", "10.0.0.3", ""))
	x.Set(pod("host", "reader", "10.0.0.9", ", hostNetwork: true"))
	at("[10.0.0.2][]")
	x.Set(pod("w1", "reader", "10.0.0.3", "")) // its labels change
	x.Set(pod("r2", "reader", "10.0.0.1", ""))
	at("[10.0.0.1 10.0.0.2 10.0.0.3][]")
	x.Delete(Pod, "blog", "r1")
	at("[10.0.0.1 10.0.0.3][]")
	if len(x.clients) != 2 {
		t.Errorf("%d groups", len(x.clients))
	}
	x.Set(decode(t, `{kind: VirtualService, metadata: {namespace: shop, name: v}, spec: {hosts: [ui], http: [{match: [{sourceLabels: {x: "1"}}], redirect: {uri: /}}, {route: [{destination: {host: ui}}]}]}}`))
	at("[10.0.0.1 10.0.0.3]")
	x.Delete(VirtualService, "shop", "v")
	x.Commit()
	if len(x.clients)+len(x.asking) != 0 {
		t.Errorf("what nobody asks for any more is kept: %v, %v", x.clients, x.asking)
	}
}
