// Package charts_test holds the chart to the code: what the control plane says it needs is what it gets.
package charts_test

import (
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane"
)

func TestControlPlaneRights(t *testing.T) {
	b, err := os.ReadFile("warren/templates/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var got [][]rbacv1.PolicyRule
	for doc := range strings.SplitSeq(string(b), "\n---\n") {
		// The rules are the last part of their document and hold no template.
		_, rules, ok := strings.Cut(doc, "\nrules:\n")
		if !ok {
			continue
		}
		var r []rbacv1.PolicyRule
		if err := yaml.UnmarshalStrict([]byte(rules), &r); err != nil {
			t.Fatal(err)
		}
		got = append(got, r)
	}
	want := [][]rbacv1.PolicyRule{controlplane.Rules, controlplane.NamespaceRules}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the chart does not grant exactly what controlplane.Rules and NamespaceRules list (-want +got):\n%s", d)
	}
}
