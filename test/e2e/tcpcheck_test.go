package e2e

import (
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// tcpcheck is the program of examples/tcpcheck in the demo's image.
const tcpcheck = "/tcpcheck"

// server is a pod of `tcpcheck serve` with a Service of its name.
func server(ns, name, node string) lab.PodSpec {
	return lab.PodSpec{Namespace: ns, Name: name, Account: "server", Node: node, Program: tcpcheck, Args: []string{"serve"}, Port: 9000,
		Probes: map[string]any{"readinessProbe": map[string]any{"tcpSocket": map[string]any{"port": 9000}, "periodSeconds": 1}}}
}

// client is a pod to run commands in.
func client(ns, name, node string) lab.PodSpec {
	return lab.PodSpec{Namespace: ns, Name: name, Account: "client", Node: node, Args: []string{"sleep"}}
}

// deploy runs pods and waits until they are ready, and captured if their namespace is of the mesh.
func deploy(t *testing.T, ns string, captured bool, specs ...lab.PodSpec) {
	t.Helper()
	must(t, mesh.Run(t.Context(), specs...))
	must(t, mesh.AwaitReady(t.Context(), ns, 2*time.Minute))
	if captured {
		_, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", 30*time.Second)
		must(t, err)
	}
}

// loadReport is what `tcpcheck load` prints.
type loadReport struct {
	Connections, OK, Refused, TimedOut, Cut, WrongSource int
	SlowestMS, P99MS                                     int64
	Seconds                                              float64
	Servers                                              map[string]int
	Held, HeldLost, HeldHung                             int
	HeldEnds                                             []int64
	Examples                                             []string
}

// failures are new connections that did not come to a right end.
func (r loadReport) failures() int { return r.Refused + r.TimedOut + r.Cut + r.WrongSource }

// startLoad begins a load in a pod; the function it returns waits for the report.
func startLoad(t *testing.T, ns, pod string, args ...string) func() loadReport {
	t.Helper()
	ctx := t.Context()
	type answer struct {
		out string
		err error
	}
	done := make(chan answer, 1)
	go func() {
		out, err := mesh.Exec(ctx, ns, pod, append([]string{tcpcheck, "load"}, args...)...)
		done <- answer{out, err}
	}()
	return sync.OnceValue(func() loadReport {
		t.Helper()
		a := <-done
		var r loadReport
		if err := json.Unmarshal([]byte(a.out), &r); err != nil {
			t.Fatalf("no report from %s/%s: %v, %v: %s", ns, pod, a.err, err, a.out)
		}
		t.Logf("load in %s/%s %s: %+v", ns, pod, strings.Join(args, " "), r)
		return r
	})
}

// agents are the node agents' pods by node, those that end left out.
func agents(ctx context.Context) (map[string]lab.Pod, error) {
	pods, err := mesh.Pods(ctx, lab.Namespace, lab.NodeApp)
	if err != nil {
		return nil, err
	}
	by := map[string]lab.Pod{}
	for _, p := range pods {
		if !p.Terminating {
			by[p.Node] = p
		}
	}
	return by, nil
}

// crashAgent ends a node's agent with SIGKILL. Its pod is replaced at once, so that the kubelet's back-off,
// which grows with each crash of a container, does not decide how long the node is without one.
func crashAgent(ctx context.Context, node string) error {
	by, err := agents(ctx)
	if err != nil {
		return err
	}
	if err := killAgent(ctx, node); err != nil {
		return err
	}
	if p, ok := by[node]; ok {
		_, err = mesh.Kubectl(ctx, "-n", lab.Namespace, "delete", "pod", p.Name, "--wait=false", "--grace-period=0", "--force", "--ignore-not-found")
	}
	return err
}

// awaitAgents waits until one agent runs on every node, and is ready.
func awaitAgents(ctx context.Context, limit time.Duration) error {
	return lab.Eventually(ctx, limit, func() error {
		for _, n := range nodes {
			if err := soleAgent(ctx, n); err != nil {
				return err
			}
		}
		return nil
	})
}

// size is a test's number of inputs: a check's or a soak's.
func size(check, soak int) int {
	if *long {
		return soak
	}
	return check
}
