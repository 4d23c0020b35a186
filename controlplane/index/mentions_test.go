package index

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A route follows the Services of the mirrors that one of its backends has, as those of a rule.
func TestABackendsMirrorComesAndGoes(t *testing.T) {
	x, err := New(Config{ClusterID: "c", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", RootNamespace: "istio-system"})
	if err != nil {
		t.Fatal(err)
	}
	meta := func(name string) metav1.ObjectMeta { return metav1.ObjectMeta{Namespace: "shop", Name: name} }
	service := func(name, ip string) *corev1.Service {
		return &corev1.Service{ObjectMeta: meta(name), Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Port: 80, Name: "http"}}}}
	}
	x.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"istio.io/use-waypoint": "way"}}})
	x.Set(&gatewayv1.Gateway{ObjectMeta: meta("way"), Spec: gatewayv1.GatewaySpec{GatewayClassName: "istio-waypoint"}})
	x.Set(service("ui", "10.0.0.1"))
	route := &gatewayv1.HTTPRoute{ObjectMeta: meta("r")}
	if err := yaml.Unmarshal([]byte(`
parentRefs: [{group: "", kind: Service, name: ui}]
rules: [{backendRefs: [{name: ui, port: 80, filters: [{type: RequestMirror, requestMirror: {backendRef: {name: copy, port: 80}}}]}]}]
`), &route.Spec); err != nil {
		t.Fatal(err)
	}
	x.Set(route)
	mirrored := func() bool {
		t.Helper()
		rules := x.Commit().Snapshot.Service(mesh.ServiceName{Namespace: "shop", Hostname: "ui.shop.svc.cluster.local"}).HTTP
		if len(rules) != 1 {
			t.Fatalf("%d rules", len(rules))
		}
		return len(rules[0].Mirrors) == 1 && rules[0].Mirrors[0].Backend.Invalid == ""
	}
	if mirrored() {
		t.Error("a Service that is not there gets a copy")
	}
	x.Set(service("copy", "10.0.0.2"))
	if !mirrored() {
		t.Error("the Service is there, and gets no copy")
	}
	x.Delete(Service, "shop", "copy")
	if mirrored() {
		t.Error("the Service is gone, and gets a copy")
	}
}
