package controlplane

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

func configMap(name string, data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: name}, Data: data}
}

// Beside an Istio the mesh is what Istio's ConfigMap says, and what only Warren knows is in its own; when Istio's is gone, its own
// says both.
func TestConfigurationBesideIstio(t *testing.T) {
	own := configMap("istio-warren", map[string]string{"mesh": "{rootNamespace: istio-system, trustDomain: prod.example, outboundTrafficPolicy: {mode: ALLOW_ANY}}", "warren": "{sameNode: encrypt}"})
	istios := configMap("istio", map[string]string{"mesh": "{rootNamespace: policies, trustDomain: prod.example, trustDomainAliases: [old.example], outboundTrafficPolicy: {mode: REGISTRY_ONLY}}"})
	c := Config{Namespace: "istio-system", Revision: revision.BesideIstio, BesideIstio: "istio"}.Defaults()
	c.Mesh.TrustDomain = "prod.example"
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	got, err := c.withConfigMap(t.Context(), fake.NewClientset(own, istios))
	if err != nil {
		t.Fatal(err)
	}
	if !got.Mesh.RegistryOnly || got.Mesh.RootNamespace != "policies" || !slices.Equal(got.Mesh.TrustDomainAliases, []string{"old.example"}) || got.Mesh.SameNode != mesh.SameNodeEncrypt {
		t.Errorf("with both: %+v", got.Mesh)
	}
	if got, err = c.withConfigMap(t.Context(), fake.NewClientset(own)); err != nil || got.Mesh.RegistryOnly || got.Mesh.RootNamespace != "istio-system" || got.Mesh.SameNode != mesh.SameNodeEncrypt {
		t.Errorf("without Istio's: %+v, %v", got.Mesh, err)
	}
	if got, err = c.withConfigMap(t.Context(), fake.NewClientset(istios)); err != nil || !got.Mesh.RegistryOnly {
		t.Errorf("without its own: %+v, %v", got.Mesh, err)
	}
	if got, err = c.withConfigMap(t.Context(), fake.NewClientset()); err != nil || got.Mesh.TrustDomain != "prod.example" {
		t.Errorf("without either: %+v, %v", got.Mesh, err)
	}

	c.Mesh.TrustDomain = "cluster.local"
	if _, err := c.withConfigMap(t.Context(), fake.NewClientset(own, istios)); err == nil || !strings.Contains(err.Error(), "mesh.trustDomain=prod.example") {
		t.Errorf("another trust domain than Istio's: %v", err)
	}
	istios.Data["mesh"] = "{}" // Istio's default
	if _, err := c.withConfigMap(t.Context(), fake.NewClientset(istios)); err != nil {
		t.Error(err)
	}

	for _, bad := range []Config{{Revision: "default", BesideIstio: "istio"}, {Revision: revision.BesideIstio, BesideIstio: "istio-warren"}} {
		if err := bad.Defaults().Validate(); err == nil || !strings.Contains(err.Error(), "beside Istio") {
			t.Errorf("%s, %s: %v", bad.Revision, bad.BesideIstio, err)
		}
	}
}
