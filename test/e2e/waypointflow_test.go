package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// behindWaypoint makes a namespace with a waypoint, a service of some replicas behind it, and clients.
func behindWaypoint(t *testing.T, name string, replicas int, clients ...string) string {
	t.Helper()
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	ns := namespace(t, name, ambient)
	for i, c := range clients {
		must(t, mesh.Run(ctx, caller(ns, c, nodes[i%2])))
	}
	applyIn(t, ns, aWaypoint)
	inventory(t, ns, "istio.io/use-waypoint: way", replicas)
	for _, wait := range [][]string{{"--for=condition=Programmed", "gateway/way"}, {"--for=condition=istio.io/WaypointBound", "service/inventory"}} {
		if out, err := mesh.Kubectl(ctx, append([]string{"-n", ns, "wait", "--timeout=180s"}, wait...)...); err != nil {
			t.Fatal(err, out)
		}
	}
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	return ns
}

// caller is a pod that makes requests. As those that answer do, it asks for processor time: on busy cores pods that ask for none
// get a hundredth of what the mesh's get, which do.
func caller(ns, name, node string) lab.PodSpec {
	return lab.PodSpec{Namespace: ns, Name: name, Account: name, Node: node, Args: []string{"sleep"},
		Container: map[string]any{"resources": map[string]any{"requests": map[string]any{"cpu": "200m"}}}}
}

// inventory makes a service of some replicas, and waits for them. It writes no line for each request: at 500 a second what takes
// those lines in, the container's shim and the runtime, has 0.3 of a core, a third of what there is for pods while some start.
func inventory(t *testing.T, ns, label string, replicas int) {
	t.Helper()
	must(t, mesh.Apply(t.Context(), strings.NewReplacer("NS", ns, "IMAGE", lab.Image, "LABEL", label, "REPLICAS", fmt.Sprint(replicas)).Replace(`
apiVersion: v1
kind: Service
metadata: {name: inventory, namespace: NS, labels: {LABEL}}
spec: {selector: {app: inventory}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: inventory, namespace: NS}
spec:
  replicas: REPLICAS
  selector: {matchLabels: {app: inventory}}
  template:
    metadata: {labels: {app: inventory}}
    spec:
      enableServiceLinks: false
      containers:
      - name: inventory
        image: IMAGE
        imagePullPolicy: IfNotPresent
        command: [/demo, inventory, -quiet]
        resources: {requests: {cpu: 50m}}
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
`)))
	if out, err := mesh.Kubectl(t.Context(), "-n", ns, "wait", "--timeout=180s", "--for=condition=Available", "deployment/inventory"); err != nil {
		t.Fatal(err, out)
	}
}

// requestReport is what `tcpcheck requests` prints.
type requestReport struct {
	Requests, Failed int
	P99MS            int64
	Seconds          float64
	Examples         []string
}

// startRequests begins to ask a URL at a rate and returns once it is answered; what it returns ends that.
func startRequests(t *testing.T, ns, pod, url string, rate float64) func() requestReport {
	t.Helper()
	cmd := mesh.Command(context.WithoutCancel(t.Context()), "-n", ns, "exec", "-i", pod, "--", tcpcheck, "requests", "-rate", fmt.Sprint(rate), url)
	in, err := cmd.StdinPipe()
	must(t, err)
	errs, err := cmd.StderrPipe()
	must(t, err)
	var out bytes.Buffer
	cmd.Stdout = &out
	must(t, cmd.Start())
	said, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		seen := sync.OnceFunc(func() { close(said) })
		for s := bufio.NewScanner(errs); s.Scan(); {
			seen()
		}
	}()
	select {
	case <-said:
	case <-time.After(2 * time.Minute):
		t.Fatalf("nobody answers at %s", url)
	}
	stop := sync.OnceValue(func() requestReport {
		in.Close()
		<-ended
		var r requestReport
		if err := cmd.Wait(); err != nil {
			t.Errorf("requests in %s: %v", pod, err)
		} else if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Errorf("requests in %s: %v: %s", pod, err, out.Bytes())
		}
		return r
	})
	t.Cleanup(func() { stop() })
	return stop
}

var rollouts = flag.Int("rollouts", 0, "how many rollouts TestRolloutsThroughAWaypoint makes, instead of a check's or a soak's")

// An application behind a waypoint is rolled out, again and again, and so is its waypoint: no request fails. What becomes of the
// same requests where there is no mesh says what the machine has to do with it.
func TestRolloutsThroughAWaypoint(t *testing.T) {
	times := func(check, soak int) int { return cmp.Or(*rollouts, size(check, soak)) }
	ns := behindWaypoint(t, "e2e-rollouts", size(5, 15), "client")
	under := func(ns, what string, n int, rate float64) requestReport {
		t.Helper()
		stop := startRequests(t, ns, "client", "http://inventory/stock", rate)
		began := time.Now()
		for range n {
			if out, err := mesh.Kubectl(t.Context(), "-n", ns, "rollout", "restart", what); err != nil {
				t.Fatal(err, out)
			}
			if out, err := mesh.Kubectl(t.Context(), "-n", ns, "rollout", "status", what, "--timeout=300s"); err != nil {
				t.Fatal(err, out)
			}
		}
		time.Sleep(2 * time.Second) // what ends then ends after its successors are ready
		r := stop()
		t.Logf("%s: %d rollouts of %s in %s at %g requests/s: %+v", ns, n, what, time.Since(began).Round(time.Second), rate, r)
		return r
	}
	rollout := func(what string, n int, rate float64) requestReport {
		t.Helper()
		r := under(ns, what, n, rate)
		if r.Failed > 0 || r.Requests == 0 {
			t.Errorf("%s: %d of %d requests failed: %v", what, r.Failed, r.Requests, r.Examples)
			lines, err := mesh.Kubectl(t.Context(), "-n", ns, "logs", "-l", "gateway.networking.k8s.io/gateway-name=way", "--tail", "20", "--prefix")
			t.Logf("what the waypoint says of that: %v\n%s", err, lines)
		}
		return r
	}
	fast := float64(size(100, 500))
	for _, rate := range []float64{2, fast} {
		n := times(5, 50)
		r := rollout("deployment/inventory", n, rate)
		name := "rollout-errors"
		if rate == 2 {
			name = "at 2 requests a second"
		} else {
			record("rollout-errors", "p99", r.Requests, 0, float64(r.P99MS), fmt.Sprintf("ms at %g requests/s", rate))
		}
		record("rollout-errors", name, r.Requests, r.Failed, float64(n), fmt.Sprintf("rollouts of %d pods at %g requests/s", size(5, 15), rate))
	}
	n := times(1, 10)
	r := rollout("deployment/way", n, fast)
	record("waypoint-rollout", "waypoint-rollout", r.Requests, r.Failed, float64(n), fmt.Sprintf("rollouts of the waypoint at %g requests/s", fast))
	if !*long {
		return
	}
	bare := namespace(t, "e2e-rollouts-bare")
	must(t, mesh.Run(t.Context(), caller(bare, "client", nodes[0])))
	inventory(t, bare, "", size(5, 15))
	must(t, mesh.AwaitReady(t.Context(), bare, time.Minute))
	n = times(5, 50)
	r = under(bare, "deployment/inventory", n, fast)
	record("rollout-errors", "without a mesh", r.Requests, 0, float64(r.Failed), fmt.Sprintf("requests failed in %d rollouts", n))
	record("rollout-errors", "p99 without a mesh", r.Requests, 0, float64(r.P99MS), fmt.Sprintf("ms at %g requests/s", fast))
}

// requestFlips changes a policy about requests from one that lets a client in to one that keeps it out and back, and asks all the
// while. Several of them run beside each other, each with a waypoint of its own.
type requestFlips struct {
	policies *policies
	states   []object
	probers  map[string]*prober

	flips []flip
	took  []time.Duration // from apply to Enforced
	end   time.Time
}

func newRequestFlips(t *testing.T, name string) *requestFlips {
	t.Helper()
	ns := behindWaypoint(t, name, 1, "client", "friend", "stranger")
	target := []object{{"kind": "Service", "name": "inventory", "group": ""}}
	to := []any{object{"operation": object{"paths": []string{"/stock"}, "methods": []string{"GET"}}}}
	about := func(action, field string, accounts ...string) object {
		rules := from(field, ns, accounts...)
		rules[0].(object)["to"] = to
		return object{"targetRefs": target, "action": action, "rules": rules}
	}
	r := &requestFlips{
		policies: watchPolicies(t, ns), probers: map[string]*prober{},
		states: []object{about("ALLOW", "principals", "client", "friend"), about("DENY", "notPrincipals", "friend")},
	}
	_, err := r.change(t.Context(), 1)
	must(t, err)
	for _, pod := range []string{"client", "friend", "stranger"} {
		r.probers[pod] = probe(t, ns, pod, "way=http://inventory/stock")
	}
	return r
}

func (r *requestFlips) change(ctx context.Context, state int) (f flip, err error) {
	f = flip{allows: state == 0, applied: time.Now()}
	generation, err := r.policies.apply(ctx, "flip", r.states[state])
	if err != nil {
		return flip{}, err
	}
	f.enforced, err = r.policies.enforced(ctx, "flip", generation, 2*time.Minute)
	return f, err
}

// run makes n changes, or those that there is time for.
func (r *requestFlips) run(ctx context.Context, n int) error {
	defer func() { r.end = time.Now() }()
	began := time.Now()
	for i := range n {
		if *within > 0 && time.Since(began) > *within {
			return nil
		}
		f, err := r.change(ctx, i%2)
		if err != nil {
			return err
		}
		r.flips = append(r.flips, f)
		r.took = append(r.took, f.enforced.Sub(f.applied))
		r.probers["client"].decided(f.enforced, 1)
	}
	return nil
}

// A policy about requests is changed from one that lets a client in to one that keeps it out and back: once it says Enforced
// no request is decided by what was before, on a connection that is open all the time. One changes by itself, which says how
// long a change takes; in a long run four such policies of four namespaces then change beside each other.
func TestRequestPolicyFlips(t *testing.T) {
	alone := size(100, 1000)
	all := []*requestFlips{newRequestFlips(t, "e2e-l7flips-0")}
	must(t, all[0].run(t.Context(), alone))
	if *long {
		for i := range 3 {
			all = append(all, newRequestFlips(t, fmt.Sprintf("e2e-l7flips-%d", i+1)))
		}
		var running sync.WaitGroup
		for _, r := range all {
			running.Go(func() {
				if err := r.run(t.Context(), 2500-len(r.flips)); err != nil {
					t.Error(err)
				}
			})
		}
		running.Wait()
	}
	var n, settled, stale, wrong int
	var took, lasted []time.Duration // of the one by itself first
	for _, r := range all {
		if len(r.flips) == 0 {
			t.Fatal("a policy was never changed")
		}
		v, last := judge(r.probers["client"].stop(), r.probers["friend"].stop(), r.probers["stranger"].stop(), r.flips, nil, r.end)
		n, settled, stale, wrong = n+len(r.flips), settled+v.Settled, stale+v.Stale, wrong+v.Stale+v.OpenWindows+v.Shut
		took, lasted = append(took, r.took...), append(lasted, last...)
		if v.Stale+v.OpenWindows+v.Shut+v.Hung > 0 || v.Settled < len(r.flips) {
			t.Errorf("%d flips, %+v", len(r.flips), v)
		}
	}
	alone = min(alone, len(all[0].flips))
	says := func(what, suffix string, took, lasted []time.Duration) {
		t.Logf("%d flips%s; last request by the state before: median %s, p99 %s; Enforced: median %s, p99 %s",
			len(took), what, percentile(lasted, 50), percentile(lasted, 99), percentile(took, 50), percentile(took, 99))
		record("envoy-config-latency", "envoy-config-latency"+suffix, len(took), wrong, milliseconds(percentile(lasted, 99)), "ms from apply to the last request decided by what was before, p99")
		record("envoy-config-latency", "apply to Enforced, p99"+suffix, len(took), 0, milliseconds(percentile(took, 99)), "ms")
	}
	says(" by themselves", "", took[:alone], lasted[:alone])
	if n > alone {
		says(" beside others", ", four policies changing beside each other", took[alone:], lasted[alone:])
	}
	record("envoy-config-latency", "stale requests after Enforced", settled, stale, float64(n), "flips of a policy about requests")
}
