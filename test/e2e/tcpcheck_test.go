package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
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
		Container: map[string]any{"readinessProbe": map[string]any{"tcpSocket": map[string]any{"port": 9000}, "periodSeconds": 1}}}
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
		inMesh(t, ns)
	}
}

// inMesh waits until the pods of a namespace are captured and every node knows the way to them.
func inMesh(t *testing.T, ns string) {
	t.Helper()
	_, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", time.Minute)
	must(t, err)
	waysKnown(t, ns)
}

// waysKnown waits until both nodes know that captured pods are reached by the tunnel. A pod's own node says that it
// is captured; the other one hears of it a moment later.
func waysKnown(t *testing.T, ns string) {
	t.Helper()
	if mesh.Cluster == nil {
		return
	}
	must(t, lab.Eventually(t.Context(), 30*time.Second, func() error {
		pods, err := mesh.Pods(t.Context(), ns, "")
		if err != nil {
			return err
		}
		for _, node := range nodes[:2] {
			dump, err := agentAdmin(node, "GET", "/config_dump")
			if err != nil {
				return err
			}
			var known struct {
				Workloads []struct{ Name, Namespace, Protocol string }
			}
			if err := json.Unmarshal(dump, &known); err != nil {
				return fmt.Errorf("what the agent on %s knows: %w", node, err)
			}
			tunnels := map[string]bool{}
			for _, w := range known.Workloads {
				if w.Namespace == ns && w.Protocol == "HBONE" {
					tunnels[w.Name] = true
				}
			}
			for _, p := range pods {
				if p.Redirection() == "enabled" && !p.Terminating && !tunnels[p.Name] {
					return fmt.Errorf("%s does not know the way to %s/%s", node, ns, p.Name)
				}
			}
		}
		return nil
	}))
}

// agentAdmin asks a node's agent what it answers on the node alone.
func agentAdmin(node, method, path string) ([]byte, error) {
	n, err := mesh.Cluster.Node(node)
	if err != nil {
		return nil, err
	}
	var body []byte
	err = n.InNetNS(func() error {
		// Not the shared transport: its connections are of another network namespace.
		c, err := net.DialTimeout("tcp", "127.0.0.1:15000", 5*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintf(c, "%s %s HTTP/1.0\r\nHost: localhost\r\n\r\n", method, path)
		req, err := http.NewRequest(method, "http://localhost"+path, nil)
		if err != nil {
			return err
		}
		res, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if body, err = io.ReadAll(res.Body); err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s %s on %s: %s: %s", method, path, node, res.Status, body)
		}
		return err
	})
	return body, err
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

// String leaves out the times of thousands of ends.
func (r loadReport) String() string {
	type plain loadReport
	p := plain(r)
	p.HeldEnds = nil
	return fmt.Sprintf("%+v and %d of the held ended", p, len(r.HeldEnds))
}

// failures are new connections that did not come to a right end.
func (r loadReport) failures() int { return r.Refused + r.TimedOut + r.Cut + r.WrongSource }

// startLoad begins a load in a pod and returns when connections are made; the function it returns waits for the report.
func startLoad(t *testing.T, ns, pod string, args ...string) func() loadReport {
	t.Helper()
	return reported(t, ns, pod, args, (*lab.Running).Wait)
}

// loadUntil is startLoad for a load that goes on, for at most the time that its flags say, until the function it returns is
// called.
func loadUntil(t *testing.T, ns, pod string, args ...string) func() loadReport {
	t.Helper()
	return reported(t, ns, pod, append([]string{"-until-stdin-ends"}, args...), (*lab.Running).Stop)
}

func reported(t *testing.T, ns, pod string, args []string, end func(*lab.Running) (string, error)) func() loadReport {
	t.Helper()
	running := mesh.Start(t.Context(), "begun", ns, pod, append([]string{tcpcheck, "load"}, args...)...)
	return sync.OnceValue(func() loadReport {
		t.Helper()
		out, ended := end(running)
		var r loadReport
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("no report from %s/%s: %v, %v: %s", ns, pod, ended, err, out)
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
