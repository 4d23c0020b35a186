package admission

import (
	"encoding/json"
	"fmt"
	"iter"
	"strings"
	"testing"

	"github.com/warrenmesh/warren/controlplane/policy"
)

func TestNearest(t *testing.T) {
	all := []string{"shop", "shoe", "default", "e2e-admission", "bank"}
	for name, want := range map[string]string{
		"shpo": "shoe", "shap": "shop", "e2e-admision": "e2e-admission", "bnak": "bank", "nothing": "", "": "", strings.Repeat("a", 500): "",
	} {
		if got := Nearest(name, all); got != want {
			t.Errorf("%.20q: %q, want %q", name, got, want)
		}
		// The order in which names come does not matter.
		if got := Nearest(name, []string{"bank", "e2e-admission", "default", "shoe", "shop"}); got != want {
			t.Errorf("%.20q backwards: %q, want %q", name, got, want)
		}
	}
}

// city is a cluster of many namespaces and pods.
type city struct {
	nowhere
	pods []Pod
}

func (c city) HasNamespace(string) bool { return false }

func (c city) Namespaces() []string {
	out := make([]string, 10_000)
	for i := range out {
		out[i] = fmt.Sprintf("namespace-%d", i)
	}
	return out
}

func (c city) Pods(string) iter.Seq[Pod] {
	return func(yield func(Pod) bool) {
		for _, p := range c.pods {
			if !yield(p) {
				return
			}
		}
	}
}

// What one object may cost is bounded whatever it names: the number of names that are looked up, of problems, and
// of words.
func TestLookUpsAreBounded(t *testing.T) {
	c := city{}
	for i := range 1000 {
		c.pods = append(c.pods, Pod{Namespace: fmt.Sprintf("namespace-%d", i), Labels: map[string]string{"app": fmt.Sprint(i)}, Captured: true})
	}
	var names []string
	for i := range policy.MaxValues / 2 {
		names = append(names, fmt.Sprintf("*missing-%d", i))
	}
	spec, err := json.Marshal(map[string]any{"rules": []any{map[string]any{
		"from": []any{map[string]any{"source": map[string]any{"namespaces": names}}},
		"to":   []any{map[string]any{"operation": map[string]any{"methods": []string{"GET"}}}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	j := Judge{Mesh: policy.Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}, Cluster: c}
	problems := j.Judge(&Object{Kind: "AuthorizationPolicy", Namespace: "istio-system", Name: "p", Spec: spec}, true)
	looked := 0
	for _, p := range problems {
		if p.Severity != policy.Warning {
			t.Errorf("%v", p)
		}
		if p.Code == policy.UnknownNamespace {
			looked++
		}
	}
	if looked != maxNames {
		t.Errorf("%d names are looked up, want %d", looked, maxNames)
	}
	words := warnings(problems)
	if len(words) != maxWarnings+1 {
		t.Errorf("%d warnings are handed on, want %d", len(words), maxWarnings+1)
	}
}

// No number of warnings hides an error.
func TestErrorsAreNotCrowdedOut(t *testing.T) {
	var ports []string
	for range 100 {
		ports = append(ports, `"0"`)
	}
	o := &Object{Kind: "AuthorizationPolicy", Namespace: "shop", Name: "p",
		Spec: []byte(`{"rules":[{"to":[{"operation":{"ports":[` + strings.Join(ports, ",") + `,"http"]}}]}]}`)}
	problems := Judge{Cluster: nowhere{}}.Judge(o, true)
	if !anyError(problems) || problems[0].Code != policy.BadPort {
		t.Errorf("%v", problems)
	}
}
