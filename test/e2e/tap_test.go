package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// startWarren runs a command that says "watching" once it does, and returns from then on. end waits for it to end by itself.
func startWarren(t *testing.T, args ...string) (end func() (stdout, stderr string, err error)) {
	t.Helper()
	bin, err := warrenProgram()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), bin, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig())
	var out bytes.Buffer
	cmd.Stdout = &out
	pipe, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	errs := bufio.NewReader(pipe)
	first, err := errs.ReadString('\n')
	if err != nil || !strings.HasPrefix(first, "watching ") {
		t.Fatalf("warren %s: %s, %v", strings.Join(args, " "), first, errors.Join(err, cmd.Wait()))
	}
	return func() (string, string, error) {
		rest, _ := io.ReadAll(errs)
		return out.String(), string(rest), cmd.Wait()
	}
}

// What tap tells of connections is what was made: each from both ends, until a policy denies them, and then by its name. What top
// says of a load is the load.
func TestTapAndTop(t *testing.T) {
	ctx := t.Context()
	ns := namespace(t, "e2e-tap", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	to := net.JoinHostPort(pod(t, ns, "far").IP, "9000")
	type event struct {
		Event, Direction, Node, Path, Outcome, Error string
		ID                                           uint64
		Source, Destination                          struct{ Namespace, Pod, Address, Identity string }
		Sent                                         int64 `json:"bytesSent"`
	}
	read := func(end func() (string, string, error)) (out []event) {
		stdout, stderr, err := end()
		if err != nil {
			t.Fatal(err, stderr)
		}
		for line := range strings.Lines(stdout) {
			var e event
			if err := json.Unmarshal([]byte(line), &e); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			out = append(out, e)
		}
		return out
	}

	const calls = 50
	tapped := startWarren(t, "tap", "--from", ns+"/client", "--to", ns+"/far:9000", "-o", "json", "-c", fmt.Sprint(4*calls), "--for", "90s")
	if r := startLoad(t, ns, "client", "-rate", "25", "-n", fmt.Sprint(calls), "-for", "60s", to)(); r.OK < calls {
		t.Fatalf("%d connections came through, want %d: %v", r.OK, calls, r)
	}
	n := map[string]int{}
	opened := map[string]bool{}
	for _, e := range read(tapped) {
		key := fmt.Sprint(e.Direction, e.ID)
		n[e.Event+" "+e.Direction+" "+e.Path]++
		node, ends := nodes[0], e.Source.Pod == "client" && e.Destination.Pod == "far" && e.Destination.Address == to
		if e.Direction == "inbound" {
			node = nodes[1]
		}
		if !ends || e.Node != node || !strings.HasSuffix(e.Source.Identity, "/ns/"+ns+"/sa/client") {
			t.Fatalf("this is not what was done: %+v", e)
		}
		switch e.Event {
		case "open":
			opened[key] = true
		case "close":
			if !opened[key] || e.Outcome != "completed" {
				t.Errorf("it was not open, or did not end in order: %+v", e)
			}
		}
	}
	for _, what := range []string{"open outbound tunnel", "close outbound tunnel", "open inbound tunnel", "close inbound tunnel"} {
		if d := n[what] - calls; d < -2 || d > 2 { // -c ends it among the last ones
			t.Errorf("%d times %s, want %d: %v", n[what], what, calls, n)
		}
	}

	load := loadUntil(t, ns, "client", "-rate", "25", "-for", "120s", to) // begins while it may: one that is denied from the start says nothing before its end
	must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: %s}
spec: {action: DENY, rules: [{from: [{source: {principals: ["*/sa/client"]}}]}]}
`, ns)))
	_, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Enforced", "authorizationpolicy/nobody", "--timeout=60s")
	must(t, err)
	tapped = startWarren(t, "tap", ns, "--verdict", "denied", "-o", "json", "-c", "20", "--for", "90s")
	for _, e := range read(tapped) {
		if e.Event != "failed" || e.Outcome != "policy_denied" || e.Direction == "inbound" && e.Error != "deny_policy by policy "+ns+"/nobody" {
			t.Errorf("%+v", e)
		}
		n[e.Event+" "+e.Direction]++
	}
	if n["failed inbound"] == 0 || n["failed outbound"] == 0 {
		t.Errorf("both nodes tell of what is denied: %v", n)
	}
	// While the load goes on, top sees it.
	out, err := warren(t, "top", ns, "--interval", "2s", "-o", "json")
	must(t, err)
	var rows []struct {
		Workload string
		New      float64 `json:"newPerSecond"`
		Failed   float64 `json:"failedPerSecond"`
		Denied   float64 `json:"deniedPerSecond"`
	}
	must(t, json.Unmarshal([]byte(out), &rows))
	seen := false
	for _, r := range rows {
		if r.Workload == "client" {
			seen = true
			if r.New < 5 || r.Failed < 5 || r.Denied < 5 {
				t.Errorf("25 connections a second are made and denied: %s", out)
			}
		}
	}
	if !seen {
		t.Errorf("the client is not there: %s", out)
	}
	load()

	// An agent that is replaced is asked again.
	_, err = mesh.Kubectl(ctx, "-n", ns, "delete", "authorizationpolicy", "nobody")
	must(t, err)
	if mesh.Cluster == nil {
		return
	}
	tapped = startWarren(t, "tap", "--node", nodes[0], "--from", ns+"/client", "-c", "5", "--for", "120s")
	must(t, crashAgent(ctx, nodes[0]))
	must(t, awaitAgents(ctx, 90*time.Second))
	load = startLoad(t, ns, "client", "-rate", "5", "-for", "10s", to)
	stdout, stderr, err := tapped()
	if err != nil || !strings.Contains(stderr, nodes[0]+": watching again") || strings.Count(stdout, ns+"/client") != 5 {
		t.Errorf("%v\n%s%s", err, stdout, stderr)
	}
	load()
}
