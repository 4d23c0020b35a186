package main

import (
	"os"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// The chart's definitions hold Istio's validations and ours, in every version of a kind.
func TestValidationsAreThere(t *testing.T) {
	b, err := os.ReadFile("../warren/files/crds/istio.yaml")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]int{}
	versions := map[string]int{}
	for doc := range strings.SplitSeq(string(b), "\n---\n") {
		var crd map[string]any
		if err := yaml.Unmarshal([]byte(doc), &crd); err != nil {
			t.Fatal(err)
		}
		name, _ := descend(crd, "metadata")["name"].(string)
		list, _ := descend(crd, "spec")["versions"].([]any)
		versions[name] = len(list)
		walk(crd, func(rule string) { found[name+": "+rule]++ })
	}
	for _, r := range rules {
		if n := found[r.crd+": "+r.cel]; n != versions[r.crd] || n == 0 {
			t.Errorf("%d of %d versions of %s have at %s: %s", n, versions[r.crd], r.crd, r.at, r.cel)
		}
	}
	const istio = "peerauthentications.security.istio.io: self.all(key, 0 < int(key) && int(key) <= 65535)"
	if found[istio] == 0 {
		t.Error("Istio's own validations are lost")
	}
}

func walk(v any, rule func(string)) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			if list, ok := e.([]any); ok && k == "x-kubernetes-validations" {
				for _, r := range list {
					text, _ := r.(map[string]any)["rule"].(string)
					rule(strings.TrimSpace(text))
				}
				continue
			}
			walk(e, rule)
		}
	case []any:
		for _, e := range v {
			walk(e, rule)
		}
	}
}
