package interop

import (
	"bufio"
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/results"
	"github.com/warrenmesh/warren/test/reference"
)

// TestValidationIsIstiods: what Istio's validation refuses is refused, and what it accepts is accepted, on random
// objects and on what becomes of them when parts are broken.
func TestValidationIsIstiods(t *testing.T) {
	if *withIstiod == "" {
		t.Skip("builds Istio's validation: give -istiod=build (go run ./test/run e2e does)")
	}
	bin := filepath.Join(istioBuilt(t), "validate")
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	m := policy.Mesh{RootNamespace: "istio-system", TrustDomain: "td1"}
	var in bytes.Buffer
	var lines [][]byte
	var ours [][]policy.Problem
	add := func(kind, namespace, name string, spec any) {
		text, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		var tree map[string]any
		if err := json.Unmarshal(text, &tree); err != nil {
			t.Fatal(err)
		}
		for range r.IntN(3) {
			vandalise(r, tree)
		}
		if text, err = json.Marshal(tree); err != nil {
			t.Fatal(err)
		}
		line, err := json.Marshal(map[string]any{"kind": kind, "namespace": namespace, "name": name, "spec": json.RawMessage(text)})
		if err != nil {
			t.Fatal(err)
		}
		var obj any
		if kind == "PeerAuthentication" {
			p := &securityv1.PeerAuthentication{}
			p.Namespace, p.Name = namespace, name
			err, obj = p.Spec.UnmarshalJSON(text), p
		} else {
			p := &securityv1.AuthorizationPolicy{}
			p.Namespace, p.Name = namespace, name
			err, obj = p.Spec.UnmarshalJSON(text), p
		}
		if err != nil {
			return // neither can be asked about it
		}
		in.Write(append(line, '\n'))
		lines, ours = append(lines, line), append(ours, m.Check(obj))
	}
	for len(lines) < 20_000 {
		w := reference.Draw(r)
		for _, p := range w.Policies {
			add("AuthorizationPolicy", p.Namespace, p.Name, &p.Spec)
		}
		for _, p := range w.Peers {
			add("PeerAuthentication", p.Namespace, p.Name, &p.Spec)
		}
	}
	cmd := exec.CommandContext(t.Context(), bin)
	cmd.Stdin = &in
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("Istio's validation: %v\n%s", err, complaints.String())
	}
	answers := bufio.NewScanner(bytes.NewReader(out))
	answers.Buffer(nil, 16<<20)
	refused, wrong := 0, 0
	for i, line := range lines {
		if !answers.Scan() {
			t.Fatalf("%d answers to %d objects", i, len(lines))
		}
		var theirs string
		if err := json.Unmarshal(answers.Bytes(), &theirs); err != nil {
			t.Fatal(err)
		}
		if theirs != "" {
			refused++
		}
		refuses := slices.ContainsFunc(ours[i], func(p policy.Problem) bool {
			// The one thing that Check refuses and Istio does not: what cannot be a trust domain, in a condition.
			own := p.Code == policy.BadTrustDomain && strings.Contains(p.Field, ".when[")
			return p.Severity == policy.Error && (theirs != "" || !own)
		})
		if (theirs != "") != refuses {
			if wrong++; wrong <= 10 {
				t.Errorf("Istio says %q, Check says %v\nof %s", theirs, ours[i], line)
			}
		}
	}
	if err := results.Record("policy-differential", results.Row{Name: "Istio's validation against ours", Inputs: len(lines), Failures: wrong,
		Figure: float64(wrong), Unit: "disagreements"}); err != nil {
		t.Error(err)
	}
	t.Logf("%d objects, %d refused by Istio, %d judged otherwise", len(lines), refused, wrong)
	if refused < len(lines)/10 || refused > len(lines)*9/10 {
		t.Errorf("%d of %d objects are refused: they try one side only", refused, len(lines))
	}
}

// vandalise changes one thing somewhere below.
func vandalise(r *rand.Rand, node any) {
	pick := func(of ...any) any { return of[r.IntN(len(of))] }
	for {
		switch n := node.(type) {
		case map[string]any:
			if r.IntN(12) == 0 {
				for _, f := range []struct {
					name   string
					values []any
				}{
					{"selector", []any{map[string]any{}, map[string]any{"matchLabels": map[string]any{"app": "x*"}}, map[string]any{"matchLabels": map[string]any{"": "x"}}}},
					{"provider", []any{map[string]any{}, map[string]any{"name": "p"}}},
					{"action", []any{"ALLOW", "DENY", "AUDIT", "CUSTOM"}},
					{"targetRefs", []any{[]any{}, []any{map[string]any{"kind": "Service", "name": "", "namespace": "b"}}, []any{map[string]any{"kind": "Pod", "name": "x"}},
						[]any{map[string]any{"kind": "Service", "group": "core", "name": "x"}}, []any{map[string]any{"kind": "ServiceEntry", "group": "networking.istio.io", "name": "x"}}}},
				} {
					_, spec := n["rules"]
					if spec && r.IntN(4) == 0 {
						n[f.name] = pick(f.values...)
						return
					}
				}
			}
			keys := []string{}
			for k := range n {
				keys = append(keys, k)
			}
			if len(keys) == 0 {
				return
			}
			slices.Sort(keys)
			k := keys[r.IntN(len(keys))]
			switch child := n[k].(type) {
			case map[string]any:
				if r.IntN(8) == 0 {
					delete(n, k)
					return
				}
			case []any:
				switch r.IntN(10) {
				case 0:
					n[k] = []any{}
					return
				case 1:
					delete(n, k)
					return
				}
				if len(child) == 0 {
					return
				}
			case string:
				if k == "key" {
					n[k] = pick("", "request.headers[x]", "request.headers", "request.headers[]", "source.ip", "destination.port", "source.serviceAccount", "source.trustDomain",
						"destination.labels[x]", "destination.namespace", "source.name", "request.auth.claims[a][b]", "connection.sni", "request.auth.principal", "remote.ip")
				}
				return
			default:
				return
			}
			node = n[k]
		case []any:
			i := r.IntN(len(n))
			if _, ok := n[i].(string); ok {
				n[i] = pick("", "*", "a*b", "*a*", "10.0.0.0/8", "10.0.0.0/99", "nonsense", "65536", "70", "a/b", "a/b/c", "/b", "a/", "spiffe://td1/ns/a/sa/x", "/x/{*}/y", "/{**}/x", "/{x}")
				return
			}
			if m, ok := n[i].(map[string]any); ok && r.IntN(10) == 0 {
				clear(m)
				return
			}
			node = n[i]
		default:
			return
		}
	}
}
