package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// agentProcesses are the processes of agents on a node.
func agentProcesses(ctx context.Context, node string) ([]string, error) {
	n, err := mesh.Cluster.Node(node)
	if err != nil {
		return nil, err
	}
	out, err := n.Exec(ctx, "sh", "-c", `for p in /proc/[0-9]*; do read -r name 2>/dev/null <$p/comm && [ "$name" = node-agent ] && echo ${p#/proc/}; done; true`)
	return strings.Fields(out), err
}

// killAgent kills the agent of a node outright. The kubelet starts another.
func killAgent(ctx context.Context, node string) error {
	pids, err := agentProcesses(ctx, node)
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return fmt.Errorf("no agent runs on %s", node)
	}
	n, err := mesh.Cluster.Node(node)
	if err != nil {
		return err
	}
	for _, p := range pids {
		if _, err := n.Exec(ctx, "sh", "-c", "kill -9 "+p); err != nil {
			return err
		}
	}
	return nil
}

// replaceAgent deletes the pod of a killed agent: its successor comes at once, and not when the kubelet's back-off
// for containers that end too often has passed.
func replaceAgent(ctx context.Context, node string) error {
	_, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "delete", "pods", "-l", lab.NodeApp, "--field-selector=spec.nodeName="+node,
		"--force", "--grace-period=0", "--wait=false")
	if err != nil {
		return err
	}
	return agentReady(ctx, node)
}

// agentReady waits for the node's agent, and for the end of any that came before it.
func agentReady(ctx context.Context, node string) error {
	return lab.Eventually(ctx, 90*time.Second, func() error { return soleAgent(ctx, node) })
}

// soleAgent says why a node has not exactly one agent, and that ready. One whose pod was deleted by force may run
// for seconds next to its successor, and what it carries ends with it.
func soleAgent(ctx context.Context, node string) error {
	by, err := agents(ctx)
	if err != nil {
		return err
	}
	if p := by[node]; !p.Ready || p.Terminating {
		return fmt.Errorf("the agent on %s is not ready", node)
	}
	pids, err := agentProcesses(ctx, node)
	if err == nil && len(pids) != 1 {
		err = fmt.Errorf("%d agents run on %s", len(pids), node)
	}
	return err
}

// New connections wait while an agent is away, killed or replaced: none is refused and none goes in clear.
func TestAgentsEndIsNotSeenByNewConnections(t *testing.T) {
	ownCluster(t)
	ns := pair(t, "e2e-kill")
	strict(t, ns)
	target := net.JoinHostPort(pod(t, ns, "far").IP, "9000")
	n := 4000
	if *long {
		n = 100000
	}
	must(t, lab.Eventually(t.Context(), 15*time.Second, func() error { // both nodes know the server
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-storm", "-n", "20", "-c", "2", "-timeout", "2s", target)
		return err
	}))
	for _, c := range []struct {
		name string
		end  func() error
	}{
		{"replacement (maxSurge 1)", func() error { return restartAgents(t.Context()) }},
		{"kill -9 at the client", func() error { return killAgent(t.Context(), nodes[0]) }},
		{"kill -9 at the server", func() error { return killAgent(t.Context(), nodes[1]) }},
	} {
		name, end := c.name, c.end
		t.Run(name, func(t *testing.T) {
			stop, err := mesh.Watch(t.Context())
			must(t, err)
			ended := make(chan error, 1)
			go func() {
				time.Sleep(500 * time.Millisecond) // somewhere in the storm
				ended <- end()
			}()
			out, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-storm", "-n", strconv.Itoa(n), "-c", "4", "-timeout", "60s", target)
			must(t, <-ended)
			w, e := stop()
			must(t, e)
			var s storm
			if e := json.Unmarshal([]byte(out), &s); e != nil {
				t.Fatalf("%v, %v: %s", e, err, out)
			}
			// What an agent carries when it is killed ends with it, at most all that was open; what is new waits.
			failed := s.bad()
			if killed := strings.HasPrefix(name, "kill"); killed && failed == s.Cut && s.Cut <= 4 {
				failed = 0
			}
			if failed > 0 {
				t.Errorf("%+v", s)
			}
			if w.Clear > 0 {
				failed++
				t.Errorf("%+v", w)
			}
			record("agent-kills", name, n, failed, float64(w.Clear), "clear frames")
			for _, node := range nodes[:2] {
				must(t, agentReady(t.Context(), node))
			}
		})
	}
}

// A second agent of a node takes over from the first, as in an upgrade. If it ends and the first was not told to, the
// first takes the node back: pods go on to start, and nothing is said in clear meanwhile.
func TestASecondAgentEnds(t *testing.T) {
	ownCluster(t)
	ns := pair(t, "e2e-second")
	strict(t, ns)
	stop, err := mesh.Watch(t.Context())
	must(t, err)
	node, err := mesh.Cluster.Node(nodes[0])
	must(t, err)
	starts := func(name string) {
		t.Helper()
		must(t, mesh.Run(t.Context(), lab.PodSpec{Namespace: ns, Name: name, Node: nodes[0], Once: true, Program: tcpcheck, Args: []string{"first", "far:9000"}}))
		must(t, lab.Eventually(t.Context(), time.Minute, func() error {
			p, err := mesh.Pod(t.Context(), ns, name)
			if err == nil && p.Phase != "Succeeded" {
				err = fmt.Errorf("pod %s is %s", name, p.Phase)
			}
			return err
		}))
	}
	for _, signal := range []string{"KILL", "TERM"} {
		must(t, soleAgent(t.Context(), nodes[0]))
		first, err := agentProcesses(t.Context(), nodes[0])
		must(t, err)
		// In the first one's container, with its environment.
		_, err = node.Exec(t.Context(), "sh", "-c", `n=$(command -v nsenter); p=`+first[0]+`
			xargs -0 -a /proc/$p/environ sh -c 'setsid env -i "$@" '"$n -m -t $p $(readlink /proc/$p/exe)"' >/dev/null 2>&1 </dev/null &' sh`)
		must(t, err)
		var second string
		must(t, lab.Eventually(t.Context(), time.Minute, func() error {
			pids, err := agentProcesses(t.Context(), nodes[0])
			if i := slices.IndexFunc(pids, func(p string) bool { return p != first[0] }); err == nil && i >= 0 {
				second = pids[i]
				_, err = node.Exec(t.Context(), "sh", "-c", "ls -l /proc/"+second+"/fd | grep -q bpf-map") // it has the data path
			} else if err == nil {
				err = errors.New("there is no second agent")
			}
			return err
		}))
		starts("beside-" + strings.ToLower(signal))
		_, err = node.Exec(t.Context(), "sh", "-c", "kill -"+signal+" "+second)
		must(t, err)
		starts("after-" + strings.ToLower(signal))
		must(t, agentReady(t.Context(), nodes[0]))
		if now, err := agentProcesses(t.Context(), nodes[0]); err != nil || !slices.Equal(now, first) {
			t.Errorf("after SIG%s of the second agent %v run, and not the first one, %v: %v", signal, now, first, err)
		}
	}
	w, err := stop()
	must(t, err)
	if w.Clear > 0 || w.Dropped > 0 || w.Tunnel == 0 {
		t.Errorf("%+v", w)
	}
}

func restartAgents(ctx context.Context) error {
	if _, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "rollout", "restart", "ds/warren-node"); err != nil {
		return err
	}
	return mesh.Rollout(ctx, lab.Namespace, "ds/warren-node")
}

// attempts reads from the logs of `tcpcheck first` how often a connection was begun again because an agent that
// carried it was killed.
func attempts(logs string) (again int) {
	for line := range strings.Lines(logs) {
		var said struct{ Attempts int }
		if json.Unmarshal([]byte(line), &said) == nil && said.Attempts > 1 {
			again += said.Attempts - 1
		}
	}
	return again
}

// Pods that start while agents are killed at random moments run captured or wait; none speaks in clear. What an
// agent carries when it is killed ends with it, as with a server that crashes, and their program then connects
// again; nothing else may fail, the connection first of all.
func TestPodStartsWhileAgentsDie(t *testing.T) {
	ownCluster(t)
	ns := pair(t, "e2e-starts")
	strict(t, ns)
	total := 50
	if *long {
		total = 1000
	}
	stop, err := mesh.Watch(t.Context())
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	killed := make(chan int, 1)
	go func() {
		n := 0
		for ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(rand.N(8000)) * time.Millisecond):
				node := nodes[rand.N(2)]
				if killAgent(ctx, node) == nil {
					n++
					if err := replaceAgent(ctx, node); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
				}
			}
		}
		killed <- n
	}()
	cut, bad, done := 0, 0, 0
	for began := time.Now(); done < total && (*within == 0 || time.Since(began) < *within); {
		batch := min(10, total-done)
		var specs []lab.PodSpec
		for i := range batch {
			specs = append(specs, lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("start-%d", done+i), Node: nodes[i%2], Once: true,
				Program: tcpcheck, Init: []string{"first", "far:9000"}, Args: []string{"first", "far:9000"}})
		}
		must(t, mesh.Run(ctx, specs...))
		err := lab.Eventually(ctx, 3*time.Minute, func() error {
			pods, err := mesh.Pods(ctx, ns, "")
			if err != nil {
				return err
			}
			ended := 0
			for _, p := range pods {
				if strings.HasPrefix(p.Name, "start-") && (p.Phase == "Succeeded" || p.Phase == "Failed") {
					ended++
				}
			}
			if ended < batch {
				return fmt.Errorf("%d of %d pods have ended", ended, batch)
			}
			return nil
		})
		must(t, err)
		pods, err := mesh.Pods(ctx, ns, "")
		must(t, err)
		for _, p := range pods {
			if !strings.HasPrefix(p.Name, "start-") {
				continue
			}
			logs, err := mesh.Logs(ctx, ns, p.Name, "first", "demo")
			cut += attempts(logs)
			if p.Phase == "Failed" {
				bad++
				t.Errorf("%s failed: %s (%v)", p.Name, logs, err)
			}
		}
		_, err = mesh.Kubectl(ctx, "-n", ns, "delete", "pods", "--field-selector=status.phase!=Running", "--wait=true")
		must(t, err)
		done += batch
	}
	cancel()
	kills := <-killed
	w, err := stop()
	must(t, err)
	record("pod-starts", "agents killed at random", done, bad, float64(w.Clear), "clear frames")
	record("pod-starts", "agents killed at random: kills meanwhile", done, 0, float64(kills), "kills")
	record("pod-starts", "agents killed at random: first connection cut in flight", done, 0, float64(cut), "connections")
	t.Logf("%d pods, %d kills, %d connections cut, %+v", done, kills, cut, w)
	if w.Clear > 0 || w.Dropped > 0 || w.Tunnel == 0 || kills == 0 {
		t.Errorf("%d kills, %+v", kills, w)
	}
	for _, node := range nodes[:2] {
		must(t, agentReady(t.Context(), node))
	}
}

// A pod of an enrolled namespace waits for an agent that is not there.
func TestPodsWaitForTheAgent(t *testing.T) {
	ownCluster(t)
	for _, node := range nodes[:2] {
		must(t, agentReady(t.Context(), node))
	}
	ns := namespace(t, "e2e-wait", ambient)
	free := namespace(t, "e2e-wait-free")
	some := namespace(t, "e2e-wait-some") // where pods are enrolled one by one
	labelled := func(name string) lab.PodSpec {
		return lab.PodSpec{Namespace: some, Name: name, Node: nodes[0], Labels: map[string]string{lab.Label: "ambient"}, Args: []string{"sleep"}}
	}
	must(t, mesh.Run(t.Context(), labelled("before")))
	must(t, mesh.AwaitReady(t.Context(), some, time.Minute))
	// The node has heard of the namespace when it captures a pod of it.
	deploy(t, ns, true, client(ns, "before", nodes[0]))
	// No agent can be scheduled while the DaemonSet wants a node that does not exist.
	patch := func(p string) {
		_, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "patch", "ds/warren-node", "--type=merge", "-p", p)
		must(t, err)
	}
	patch(`{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"true"}}}}}`)
	t.Cleanup(func() {
		if _, err := mesh.Kubectl(context.WithoutCancel(t.Context()), "-n", lab.Namespace, "patch", "ds/warren-node", "--type=merge",
			"-p", `{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}`); err != nil {
			t.Error(err)
		}
		for _, n := range nodes[:2] {
			if err := agentReady(context.WithoutCancel(t.Context()), n); err != nil {
				t.Error(err)
			}
		}
	})
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		pods, err := mesh.Pods(t.Context(), lab.Namespace, lab.NodeApp)
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("%d agents still run", len(pods))
		}
		return err
	}))
	must(t, mesh.Run(t.Context(), lab.PodSpec{Namespace: ns, Name: "waits", Node: nodes[0], Args: []string{"sleep"}},
		labelled("waits"), lab.PodSpec{Namespace: free, Name: "starts", Node: nodes[0], Args: []string{"sleep"}}))
	must(t, mesh.AwaitReady(t.Context(), free, time.Minute))
	for _, ns := range []string{ns, some} {
		must(t, held(t.Context(), ns, "waits"))
		if p := pod(t, ns, "waits"); p.Phase != "Pending" {
			t.Errorf("a pod of namespace %s is %s without an agent", ns, p.Phase)
		}
	}
	patch(`{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}`)
	for _, ns := range []string{ns, some} {
		must(t, mesh.AwaitReady(t.Context(), ns, 2*time.Minute))
		if p := pod(t, ns, "waits"); p.Redirection() != "enabled" {
			t.Errorf("the pod of namespace %s then runs with redirection=%q", ns, p.Redirection())
		}
	}
}

// held waits until the runtime has tried to start pods and was told that they wait for the mesh.
func held(ctx context.Context, ns string, pods ...string) error {
	return lab.Eventually(ctx, time.Minute, func() error {
		for _, name := range pods {
			events, err := mesh.Kubectl(ctx, "-n", ns, "get", "events", "--field-selector=reason=FailedCreatePodSandBox,involvedObject.name="+name,
				"-o", "jsonpath={.items[*].message}")
			if err != nil {
				return err
			}
			if !strings.Contains(events, " waits") {
				return fmt.Errorf("the events of %s do not say what it waits for: %q", name, events)
			}
		}
		return nil
	})
}

// After a power cut no enrolled pod of the node runs uncaptured.
func TestReboot(t *testing.T) {
	ownCluster(t)
	ns := pair(t, "e2e-reboot")
	strict(t, ns)
	must(t, mesh.Run(t.Context(), lab.PodSpec{Namespace: ns, Name: "talker", Node: nodes[1], Labels: map[string]string{"talks": "yes"},
		Args: []string{"load", "-url", "http://near:9000/", "-every", "50ms"}}))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	stop, err := mesh.Watch(t.Context())
	must(t, err)
	n, err := mesh.Cluster.Node(nodes[1])
	must(t, err)
	must(t, n.Reboot(t.Context()))
	must(t, mesh.Cluster.WaitReady(t.Context()))
	must(t, agentReady(t.Context(), nodes[1]))
	must(t, lab.Eventually(t.Context(), 2*time.Minute, func() error {
		_, err := mesh.Exec(t.Context(), ns, "client", "/demo", "tcp-dial", "-timeout", "3s", "far:9000")
		return err
	}))
	w, err := stop()
	must(t, err)
	record("clear-packets", "reboot of a node", int(w.Frames), int(w.Clear), float64(w.Tunnel), "tunnel frames")
	if w.Clear > 0 {
		t.Errorf("%+v", w)
	}
}
