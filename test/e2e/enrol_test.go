package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A label captures running pods without a restart, and taking it away ends that without breaking them.
func TestLabelCapturesRunningPods(t *testing.T) {
	ns := namespace(t, "e2e-label")
	must(t, mesh.Run(t.Context(),
		lab.PodSpec{Namespace: ns, Name: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: ns, Name: "far", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000},
		lab.PodSpec{Namespace: ns, Name: "host", Node: nodes[1], Args: []string{"sleep"}, HostNetwork: true},
		lab.PodSpec{Namespace: ns, Name: "opted-out", Node: nodes[1], Args: []string{"sleep"}, Labels: map[string]string{lab.Label: "none"}},
	))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	before, err := mesh.Pods(t.Context(), ns, "")
	must(t, err)
	redirections := func(want string) error {
		pods, err := mesh.Pods(t.Context(), ns, "")
		if err != nil {
			return err
		}
		for _, p := range pods {
			w := want
			if p.Name == "host" || p.Name == "opted-out" {
				w = ""
			}
			if p.Redirection() != w {
				return fmt.Errorf("%s has redirection=%q, want %q", p.Name, p.Redirection(), w)
			}
		}
		return nil
	}
	start := time.Now()
	must(t, mesh.Enrol(t.Context(), ns, true))
	must(t, lab.Eventually(t.Context(), 30*time.Second, func() error { return redirections("enabled") }))
	record("enrolment", "label to annotation, running pods", 2, 0, time.Since(start).Seconds(), "s")
	strict(t, ns)
	must(t, lab.Eventually(t.Context(), 15*time.Second, func() error { // the other node hears that far is captured
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		return err
	}))

	must(t, mesh.Enrol(t.Context(), ns, false))
	must(t, lab.Eventually(t.Context(), 30*time.Second, func() error { return redirections("") }))
	must(t, lab.Eventually(t.Context(), 15*time.Second, func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		return err
	}))
	after, err := mesh.Pods(t.Context(), ns, "")
	must(t, err)
	for i := range before {
		if before[i].UID != after[i].UID || after[i].Restarts != 0 {
			t.Errorf("%s was replaced or restarted", before[i].Name)
		}
	}
}

// A new pod is captured before its first process: an init container that connects at once is let in by a
// server that takes nothing but mutual TLS.
func TestNewPodsAreCapturedBeforeTheirFirstProcess(t *testing.T) {
	ns := pair(t, "e2e-first")
	strict(t, ns)
	n := 5
	var specs []lab.PodSpec
	for i := range n {
		specs = append(specs, lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("early-%d", i), Node: nodes[i%2],
			Init: []string{"tcp-dial", "far:9000"}, Args: []string{"tcp-dial", "far:9000"}, Once: true})
	}
	must(t, mesh.Run(t.Context(), specs...))
	err := mesh.AwaitReady(t.Context(), ns, 2*time.Minute)
	pods, e := mesh.Pods(t.Context(), ns, "")
	must(t, e)
	failed := 0
	for _, p := range pods {
		if strings.HasPrefix(p.Name, "early-") && p.Phase != "Succeeded" {
			failed++
		}
	}
	record("pod-starts", "init container through mutual TLS at once", n, failed, 0, "")
	must(t, err)
}

// The kubelet's probes reach pods under the strictest policies.
func TestProbesPass(t *testing.T) {
	ns := namespace(t, "e2e-probes", ambient)
	strict(t, ns)
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-all, namespace: %s}
spec: {}
`, ns)))
	probe := func(kind string, what map[string]any) lab.PodSpec {
		p := map[string]any{kind: what, "periodSeconds": 1, "timeoutSeconds": 2, "failureThreshold": 5}
		return lab.PodSpec{Namespace: ns, Name: strings.ToLower(kind), Args: []string{"inventory"},
			Container: map[string]any{"readinessProbe": p, "livenessProbe": p}}
	}
	must(t, mesh.Run(t.Context(),
		probe("httpGet", map[string]any{"path": "/healthz", "port": 8080}),
		probe("tcpSocket", map[string]any{"port": 8080}),
		probe("exec", map[string]any{"command": []string{"/demo", "get", "http://127.0.0.1:8080/healthz"}}),
	))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	_, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", 30*time.Second)
	must(t, err)
	time.Sleep(8 * time.Second) // as long as a failing probe needs to be noticed
	pods, err := mesh.Pods(t.Context(), ns, "")
	must(t, err)
	for _, p := range pods {
		if !p.Ready || p.Restarts > 0 {
			t.Errorf("%s: ready %v, %d restarts", p.Name, p.Ready, p.Restarts)
		}
	}
}

// Guides for sidecars say istio-injection=enabled. That is answered, not ignored.
func TestInjectionLabelIsAnswered(t *testing.T) {
	ns := namespace(t, "e2e-injection", "istio-injection=enabled")
	must(t, lab.Eventually(t.Context(), 20*time.Second, func() error {
		events, err := mesh.Kubectl(t.Context(), "get", "events", "-A", "--field-selector=involvedObject.name="+ns, "-o", "jsonpath={.items[*].message}")
		if err != nil {
			return err
		}
		if !strings.Contains(events, lab.Label) {
			return fmt.Errorf("no event on the namespace names %s: %q", lab.Label, events)
		}
		return nil
	}))
}
