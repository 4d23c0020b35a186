package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// The two objects that users copy first, as they stand in articles about Istio: in the root namespace both hold for
// the whole mesh.
func TestPoliciesThatUsersCopy(t *testing.T) {
	web := namespace(t, "e2e-copy", ambient)
	other := namespace(t, "e2e-copy-other", ambient)
	out := namespace(t, "e2e-copy-out")
	ctx := t.Context()
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: web, Name: "server", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000},
		lab.PodSpec{Namespace: web, Name: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: other, Name: "client", Node: nodes[1], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: out, Name: "client", Node: nodes[0], Args: []string{"sleep"}},
	))
	for _, ns := range []string{web, other, out} {
		must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	}
	for _, ns := range []string{web, other} {
		if _, err := mesh.AwaitRedirection(ctx, ns, "enabled", 30*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	// who says which clients are let in.
	who := func() string {
		var in []string
		for _, ns := range []string{web, other, out} {
			if _, err := mesh.Exec(ctx, ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "server."+web+":9000"); err == nil {
				in = append(in, ns)
			}
		}
		return strings.Join(in, " ")
	}
	becomes := func(what, want string) {
		t.Helper()
		if err := lab.Eventually(ctx, 30*time.Second, func() error {
			if got := who(); got != want {
				return fmt.Errorf("%s: let in are %q, want %q", what, got, want)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if _, err := mesh.Kubectl(context.WithoutCancel(ctx), "delete", "authorizationpolicy", "copied", "-n", "istio-system", "--ignore-not-found"); err != nil {
			t.Error(err)
		}
	})
	becomes("no policy", strings.Join([]string{web, other, out}, " "))
	meshWideStrict(t)
	becomes("STRICT in the root namespace", web+" "+other)

	policy := func(source, operation string) string {
		return fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: copied
  namespace: istio-system
spec:
  action: ALLOW
  rules:
  - from:
    - source:
        namespaces:%s
    to:
    - operation:
        methods:%s
`, source, operation)
	}
	must(t, mesh.Apply(ctx, policy(` ["`+web+`"]`, ` ["GET"]`)))
	becomes("methods without a waypoint: an ALLOW rule with them matches nothing", "")
	must(t, lab.Eventually(ctx, 20*time.Second, func() error {
		got, err := mesh.Kubectl(ctx, "get", "authorizationpolicy", "copied", "-n", "istio-system", "-o", "jsonpath={.status.conditions}")
		if err == nil && (!strings.Contains(got, "NoWaypoint") || !strings.Contains(got, "methods")) {
			err = fmt.Errorf("the status does not say why: %s", got)
		}
		return err
	}))
	must(t, mesh.Apply(ctx, strings.Split(policy(` ["`+web+`"]`, ""), "    to:")[0]))
	becomes("namespaces alone", web)

	// With the lists left empty it is not stored, and the message says what is missing.
	err := mesh.Apply(ctx, policy("", ""))
	if err == nil {
		t.Error("a policy whose lists are empty was stored")
	} else if text := err.Error(); !strings.Contains(text, "source") || !strings.Contains(text, "namespaces") {
		t.Errorf("the message does not name what is missing: %s", text)
	} else {
		t.Logf("the message: %s", text)
	}
	becomes("after the refused change", web)
}
