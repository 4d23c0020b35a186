package e2e

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A steady stream of new connections, an open loop that does not wait for answers, goes on while agents are
// killed and replaced: it waits, and none is refused. What was open in a killed agent ends; what was open in
// one that is replaced lives on in it for the grace time.
func TestLoadWhileAgentsDie(t *testing.T) {
	ownCluster(t)
	ns := namespace(t, "e2e-load", ambient)
	strict(t, ns)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	total := size(6000, 100000)
	const rate = 300
	during := func(t *testing.T, name string, graceful bool, fault func(context.Context, int) error) {
		stop, err := mesh.Watch(t.Context())
		must(t, err)
		much := []string{"-n", fmt.Sprint(total)}
		if graceful { // what is open for longer than the agents' grace time, 30 s, ends with them
			much = []string{"-for", "20s"}
		}
		report := startLoad(t, ns, "client", append(much, "-rate", fmt.Sprint(rate), "-hold", "20", "-timeout", "60s", "far:9000")...)
		ctx, cancel := context.WithCancel(t.Context())
		faults := make(chan int, 1)
		go func() {
			n := 0
			defer func() { faults <- n }()
			for {
				select {
				case <-ctx.Done():
					return
				case <-time.After(time.Second):
				}
				if err := fault(ctx, n); err != nil {
					if ctx.Err() == nil {
						t.Errorf("%s: %v", name, err)
					}
					return
				}
				n++
				if err := awaitAgents(ctx, time.Minute); err != nil && ctx.Err() == nil {
					t.Errorf("after %s: %v", name, err)
					return
				}
			}
		}()
		r := report()
		cancel()
		n := <-faults
		w, err := stop()
		must(t, err)
		failed := r.Refused + r.TimedOut + r.WrongSource + r.HeldHung
		record("agent-kills", name+": refused or lost new connections", r.Connections, failed, float64(n), "faults")
		record("agent-kills", name+": cut while in flight", r.Connections, 0, float64(r.Cut), "connections")
		record("agent-kills", name+": slowest new connection", r.Connections, 0, float64(r.SlowestMS), "ms")
		record("agent-kills", name+": open connections that ended", r.Held, r.HeldHung, float64(r.HeldLost), "connections")
		record("clear-packets", name, int(w.Frames), int(w.Clear), float64(w.Tunnel), "tunnel frames")
		if n == 0 || failed > 0 || w.Clear > 0 || w.Dropped > 0 {
			t.Errorf("%d faults; %+v; %+v", n, r, w)
		}
		if graceful && r.Cut+r.HeldLost > 0 {
			t.Errorf("a replacement cut %d of %d new and %d of %d open connections", r.Cut, r.Connections, r.HeldLost, r.Held)
		}
		must(t, awaitAgents(t.Context(), 2*time.Minute))
	}
	t.Run("kill -9", func(t *testing.T) {
		during(t, "kill -9 under load", false, func(ctx context.Context, n int) error { return crashAgent(ctx, nodes[n%2]) })
	})
	t.Run("rolling restart", func(t *testing.T) {
		once := false
		during(t, "rolling restart under load", true, func(ctx context.Context, _ int) error {
			if once {
				<-ctx.Done()
				return ctx.Err()
			}
			once = true
			return restartAgents(context.WithoutCancel(ctx))
		})
	})
}

// Without a control plane traffic goes on, also across the agents' own restart; a pod that nobody has vouched
// for waits, and starts when the control plane is back; others start at once.
func TestControlPlaneAway(t *testing.T) {
	ownCluster(t)
	ns := namespace(t, "e2e-headless-mesh", ambient)
	free := namespace(t, "e2e-headless-free")
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]))
	scale := func(ctx context.Context, n int) error {
		_, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "scale", "deploy/warren-control", fmt.Sprintf("--replicas=%d", n))
		return err
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := scale(ctx, 1); err != nil {
			t.Error(err)
		}
		if err := mesh.Rollout(ctx, lab.Namespace, "deploy/warren-control"); err != nil {
			t.Error(err)
		}
	})
	must(t, scale(t.Context(), 0))
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		pods, err := mesh.Pods(t.Context(), lab.Namespace, "app=istiod")
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("%d replicas still run", len(pods))
		}
		return err
	}))
	steady := func(name string) {
		t.Helper()
		r := startLoad(t, ns, "client", "-rate", "100", "-for", "5s", "-timeout", "10s", "far:9000")()
		record("control-plane-away", name, r.Connections, r.failures(), float64(r.P99MS), "ms at the 99th percentile")
		if r.failures() > 0 || r.OK == 0 {
			t.Errorf("%s: %+v", name, r)
		}
	}
	steady("traffic")
	for _, n := range nodes[:2] {
		must(t, crashAgent(t.Context(), n))
	}
	began := time.Now()
	out, err := mesh.Exec(t.Context(), ns, "client", tcpcheck, "who", "-timeout", "60s", "far:9000")
	failed := 0
	if err != nil || strings.TrimSpace(out) != "far" {
		failed = 1
		t.Errorf("with new agents and no control plane: %q, %v", out, err)
	}
	record("control-plane-away", "first connection after both agents were killed", 1, failed, time.Since(began).Seconds(), "s")
	must(t, awaitAgents(t.Context(), time.Minute))
	steady("traffic through agents that have only the last good state")

	must(t, mesh.Run(t.Context(), client(ns, "known-account", nodes[0]),
		lab.PodSpec{Namespace: ns, Name: "new-account", Account: "new", Node: nodes[1], Args: []string{"sleep"}}, client(free, "free", nodes[0])))
	must(t, mesh.AwaitReady(t.Context(), free, time.Minute))
	must(t, held(t.Context(), ns, "known-account", "new-account"))
	for _, name := range []string{"known-account", "new-account"} {
		failed := 0
		if p := pod(t, ns, name); p.Phase != "Pending" {
			failed = 1
			t.Errorf("pod %s, of which no control plane has told the node, is %s", name, p.Phase)
		}
		record("control-plane-away", "new pod waits: "+name, 1, failed, 0, "")
	}
	events, err := mesh.Kubectl(t.Context(), "-n", ns, "get", "events", "--field-selector=reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
	must(t, err)
	if !strings.Contains(events, "has not told this node about this one") {
		t.Errorf("the pods' events do not say what they wait for: %s", events)
	}
	must(t, scale(t.Context(), 1))
	began = time.Now()
	must(t, mesh.AwaitReady(t.Context(), ns, 2*time.Minute))
	_, err = mesh.AwaitRedirection(t.Context(), ns, "enabled", 30*time.Second)
	must(t, err)
	record("control-plane-away", "pods that waited run after its return", 2, 0, time.Since(began).Seconds(), "s")
}

// A connection to a Service that cannot be delivered to one endpoint goes to another; the peer that is gone is
// noticed within ten seconds, and nothing of this shows on the link.
func TestNodeLost(t *testing.T) {
	ownCluster(t)
	ns := namespace(t, "e2e-lost", ambient)
	strict(t, ns)
	lost, kept := server(ns, "lost", nodes[1]), server(ns, "kept", nodes[0])
	for _, s := range []*lab.PodSpec{&lost, &kept} {
		s.Labels = map[string]string{"both": "yes"}
	}
	deploy(t, ns, true, client(ns, "client", nodes[0]), client(ns, "holder", nodes[0]), lost, kept)
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: both, namespace: %s}
spec: {selector: {both: "yes"}, ports: [{name: tcp, port: 9000}]}
`, ns)))
	must(t, lab.Eventually(t.Context(), 20*time.Second, func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", tcpcheck, "who", "both:9000")
		return err
	}))
	vips, err := mesh.ServiceAddrs(t.Context(), ns, "both")
	must(t, err)
	stop, err := mesh.Watch(t.Context())
	must(t, err)
	// By address: a resolver's retries are not the mesh's.
	report := startLoad(t, ns, "client", "-rate", "20", "-for", "20s", "-timeout", "20s", net.JoinHostPort(vips[0], "9000"))
	held := startLoad(t, ns, "holder", "-rate", "0", "-for", "20s", "-hold", "8", "-timeout", "25s", net.JoinHostPort(pod(t, ns, "lost").IP, "9000"))
	time.Sleep(time.Second) // some twenty connections, to both servers
	n, err := mesh.Cluster.Node(nodes[1])
	must(t, err)
	cut := time.Now()
	must(t, n.Kill(t.Context()))
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if err := n.Start(ctx); err != nil {
			t.Error(err)
		}
		if err := mesh.Cluster.WaitReady(ctx); err != nil {
			t.Error(err)
		}
		if err := awaitAgents(ctx, 2*time.Minute); err != nil {
			t.Error(err)
		}
	})
	r, h := report(), held()
	w, err := stop()
	must(t, err)
	record("failover", "new connections to a Service of which one node lost power", r.Connections, r.failures(), float64(r.SlowestMS), "ms, the slowest")
	if r.failures() > 0 || r.Servers["kept"] == 0 || r.Servers["lost"] == 0 || r.SlowestMS > 15000 {
		t.Errorf("%+v", r)
	}
	noticed := 0.0
	if len(h.HeldEnds) > 0 {
		noticed = time.UnixMilli(slices.Max(h.HeldEnds)).Sub(cut).Seconds()
	}
	missed := h.Held - len(h.HeldEnds) + h.HeldHung
	record("failover", "open connections to a node that lost power are reset", h.Held, missed, noticed, "s")
	if missed > 0 || noticed > 15 {
		t.Errorf("a dead peer was noticed after %.1f s: %+v", noticed, h)
	}
	record("clear-packets", "power cut of a node", int(w.Frames), int(w.Clear), float64(w.Tunnel), "tunnel frames")
	if w.Clear > 0 || w.Dropped > 0 {
		t.Errorf("%+v", w)
	}
}

// A Service is rolled and its pods are deleted under load, and no connection fails.
func TestRollingUpdateUnderLoad(t *testing.T) {
	ns := namespace(t, "e2e-roll", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]))
	replicas := size(6, 15)
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: rolled, namespace: %[1]s}
spec: {selector: {app: rolled}, ports: [{name: tcp, port: 9000}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: rolled, namespace: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: rolled}}
  template:
    metadata: {labels: {app: rolled}}
    spec:
      terminationGracePeriodSeconds: 20
      containers:
        - name: rolled
          image: %[3]s
          imagePullPolicy: IfNotPresent
          command: [%[4]s, serve]
          env: [{name: LINGER, value: 5s}]
          readinessProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}
`, ns, replicas, lab.Image, tcpcheck)))
	must(t, mesh.Rollout(t.Context(), ns, "deploy/rolled"))
	stopLoad := size(30, 300)
	report := startLoad(t, ns, "client", "-rate", "50", "-for", fmt.Sprintf("%ds", stopLoad), "-timeout", "20s", "rolled:9000")
	rolls := 0
	for until := time.Now().Add(time.Duration(stopLoad-10) * time.Second); time.Now().Before(until); rolls++ {
		_, err := mesh.Kubectl(t.Context(), "-n", ns, "rollout", "restart", "deploy/rolled")
		must(t, err)
		must(t, mesh.Rollout(t.Context(), ns, "deploy/rolled"))
	}
	r := report()
	record("rollout", fmt.Sprintf("%d pods rolled under load", replicas), r.Connections, r.failures(), float64(rolls), "rolls")
	if r.failures() > 0 || len(r.Servers) <= replicas {
		t.Errorf("%+v", r)
	}
}

// An address that changes hands within a second is never served under the name of its last owner, neither as
// the source nor as the destination of a connection.
func TestAddressChangesHands(t *testing.T) {
	ownCluster(t)
	ns := namespace(t, "e2e-reuse", ambient)
	far := server(ns, "far", nodes[1])
	deploy(t, ns, true, client(ns, "client", nodes[1]), far)
	// Alice may talk to far, and to Bob nobody may talk.
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-alice, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: far}}
  action: ALLOW
  rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/alice]}}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: bob-takes-nothing, namespace: %[1]s}
spec: {selector: {matchLabels: {who: bob}}}
`, ns)))
	rounds, inputs, wrong, slowest := size(4, 100), 0, 0, 0.0
	for i := range rounds {
		alice := lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("alice-%d", i), Account: "alice", Node: nodes[0], Labels: map[string]string{"who": "alice"},
			Program: tcpcheck, Args: []string{"serve"}}
		must(t, mesh.Run(t.Context(), alice))
		must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
		a := pod(t, ns, alice.Name)
		at := net.JoinHostPort(a.IP, "9000")
		must(t, lab.Eventually(t.Context(), 20*time.Second, func() error {
			_, err := mesh.Exec(t.Context(), ns, alice.Name, tcpcheck, "who", "far:9000")
			return err
		}))
		asked := loadUntil(t, ns, "client", "-rate", "50", "-for", "1m", "-timeout", "3s", at)
		must(t, freeAddress(t.Context(), a))
		began := time.Now()
		// Bob serves, and asks far from his first moment on: for half of the rounds each.
		bob := lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("bob-%d", i), Account: "bob", Node: nodes[0], Labels: map[string]string{"who": "bob"}, Program: tcpcheck}
		if i%2 == 0 {
			bob.Args = []string{"serve"}
		} else {
			bob.Args = []string{"load", "-rate", "50", "-for", "6s", "-timeout", "3s", "far:9000"}
			bob.Once = true
		}
		must(t, mesh.Run(t.Context(), bob))
		must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
		b := pod(t, ns, bob.Name)
		if !slices.Contains(b.IPs, a.IP) {
			t.Fatalf("%s has %v and not %s, so that this shows nothing", b.Name, b.IPs, a.IP)
		}
		slowest = max(slowest, time.Since(began).Seconds())
		if bob.Once {
			must(t, lab.Eventually(t.Context(), time.Minute, func() error {
				if p, err := mesh.Pod(t.Context(), ns, bob.Name); err != nil || p.Phase != "Succeeded" {
					return fmt.Errorf("%s is %s: %v", bob.Name, p.Phase, err)
				}
				return nil
			}))
			logs, err := mesh.Kubectl(t.Context(), "-n", ns, "logs", bob.Name)
			must(t, err)
			if !strings.Contains(logs, `"OK":0`) {
				wrong++
				t.Errorf("round %d: bob with alice's address reaches far: %s", i, logs)
			}
			inputs++
		} else {
			time.Sleep(6 * time.Second) // in which he is asked, as he asks in the other rounds
		}
		r := asked()
		inputs += r.Connections
		if r.Servers[alice.Name] == 0 {
			t.Errorf("round %d: alice never answered: %+v", i, r)
		}
		if r.Servers[bob.Name] > 0 {
			wrong += r.Servers[bob.Name]
			t.Errorf("round %d: bob was served as alice: %+v", i, r)
		}
		must(t, freeAddress(t.Context(), b))
	}
	record("address-reuse", "served under the last owner's identity", inputs, wrong, slowest, "s until the next owner ran, at most")
}

// freeAddress deletes a pod and makes its addresses the next ones that its node gives out.
func freeAddress(ctx context.Context, p lab.Pod) error {
	if _, err := mesh.Kubectl(ctx, "-n", p.Namespace, "delete", "pod", p.Name, "--grace-period=0", "--force"); err != nil {
		return err
	}
	n, err := mesh.Cluster.Node(p.Node)
	if err != nil {
		return err
	}
	// host-local gives out the address after the last one, and has a file per address in use.
	script := "cd /var/lib/cni/networks/pods\n"
	for _, ip := range p.IPs {
		script += fmt.Sprintf("while [ -e %s ]; do sleep 0.05; done\n", ip)
	}
	for i, ip := range p.IPs {
		last := net.ParseIP(ip)
		last[len(last)-1]--
		script += fmt.Sprintf("printf %s > last_reserved_ip.%d\n", last, i)
	}
	_, err = n.Exec(ctx, "sh", "-c", script)
	return err
}
