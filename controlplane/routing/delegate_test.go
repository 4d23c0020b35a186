package routing

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	networking "istio.io/api/networking/v1alpha3"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/mesh"
)

func TestDelegates(t *testing.T) {
	read := func(doc string) *networking.VirtualService {
		t.Helper()
		v := &networking.VirtualService{}
		if err := yaml.Unmarshal([]byte(doc), v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct {
		name, root, leaf, want string
		problems               []string
	}{
		{"what the root says holds before what the delegate says",
			`http: [{name: a, match: [{uri: {prefix: /a}, headers: {x: {exact: "1"}}}], delegate: {name: d}, timeout: 1s, headers: {request: {set: {k: root}}}}]`,
			`http: [{name: b, match: [{uri: {exact: /a/b}, headers: {y: {exact: "2"}}, port: 80}], timeout: 2s, retries: {attempts: 3}, headers: {request: {set: {k: leaf, l: leaf}, remove: [m]}}, route: [{destination: {host: far}}], mirror: {host: other.example}}]`,
			`http: [{name: a-b, match: [{uri: {exact: /a/b}, headers: {x: {exact: "1"}, y: {exact: "2"}}, port: 80}], timeout: 1s, retries: {attempts: 3}, headers: {request: {set: {k: root, l: leaf}, remove: [m]}, response: {}}, route: [{destination: {host: far.there.svc.cluster.local}}], mirror: {host: other.example}}]`, nil},
		{"a delegate without a match has the root's", `http: [{match: [{uri: {prefix: /a}}], delegate: {name: d}}]`, `http: [{redirect: {uri: /b}}]`,
			`http: [{match: [{uri: {prefix: /a}}], redirect: {uri: /b}, headers: {request: {}, response: {}}}]`, nil},
		{"what contradicts is left out", `http: [{match: [{uri: {prefix: /a}}, {uri: {prefix: /b}}], delegate: {name: d}}]`,
			`http: [{match: [{uri: {prefix: /a/x}}], redirect: {uri: /c}}, {match: [{uri: {regex: "/a.*"}}], redirect: {uri: /d}}]`,
			`http: [{match: [{uri: {prefix: /a/x}}], redirect: {uri: /c}, headers: {request: {}, response: {}}}]`,
			[]string{"http[0]: match[0] and match[1] of the route that delegates differ in uri", "http[1]: match[0] and match[1]"}},
		{"one that has hosts is no delegate", `http: [{delegate: {name: d}}]`, `{hosts: [a], http: [{redirect: {uri: /b}}]}`, `http: [{delegate: {name: d}}]`, nil},
		{"nor can a delegate delegate", `http: [{delegate: {name: d}}]`, `http: [{delegate: {name: e}}]`, `{}`, []string{"cannot delegate"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			leaf := read(c.leaf)
			got, problems := Delegated("there", read(c.root), func(d Delegate) *networking.VirtualService {
				if d != (Delegate{"there", "d"}) {
					t.Errorf("asked for %v", d)
				}
				return leaf
			}, func(namespace, name string) mesh.ServiceName {
				if !strings.Contains(name, ".") {
					name += "." + namespace + ".svc.cluster.local"
				}
				return host(namespace, name)
			})
			if d := cmp.Diff(read(c.want), got, protocmp.Transform()); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
			if len(problems) != len(c.problems) {
				t.Fatalf("problems %q, want %q", problems, c.problems)
			}
			for i, p := range c.problems {
				if !strings.Contains(problems[i], p) {
					t.Errorf("problem %q, want %q in it", problems[i], p)
				}
			}
		})
	}
}
