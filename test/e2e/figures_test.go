package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// What the mesh costs a node: recorded, because the machine decides as much about these figures as Warren does.
func TestFigures(t *testing.T) {
	ownCluster(t)
	const pods = 30
	ns := namespace(t, "e2e-figures")
	var specs []lab.PodSpec
	for i := range pods {
		specs = append(specs, lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("idle-%02d", i), Node: nodes[0], Args: []string{"sleep"}})
	}
	deploy(t, ns, false, specs...)
	must(t, mesh.Enrol(t.Context(), ns, true))
	took, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", 30*time.Second)
	must(t, err)
	record("figures", "30 running pods of a node enrolled, from the label to the annotations", pods, 0, float64(took.Milliseconds()), "ms")

	pid, err := agentPID(t.Context(), nodes[0])
	must(t, err)
	time.Sleep(5 * time.Second) // certificates, reports
	before, err := cpuTime(t.Context(), nodes[0], pid)
	must(t, err)
	began := time.Now()
	time.Sleep(time.Duration(size(15, 60)) * time.Second)
	after, err := cpuTime(t.Context(), nodes[0], pid)
	must(t, err)
	record("figures", "idle agent with 30 pods", pods, 0, 100*(after-before).Seconds()/time.Since(began).Seconds(), "% of a core")
	n, err := mesh.Cluster.Node(nodes[0])
	must(t, err)
	status, err := n.Exec(t.Context(), "cat", "/proc/"+pid+"/status")
	must(t, err)
	kb := regexp.MustCompile(`RssAnon:\s+(\d+) kB`).FindStringSubmatch(status)
	if kb == nil {
		t.Fatalf("no RssAnon in %s", status)
	}
	rss, err := strconv.ParseFloat(kb[1], 64)
	must(t, err)
	record("figures", "RssAnon of an agent with 30 pods", pods, 0, rss/1024, "MiB")

	// The agent says at level debug how long it kept the runtime waiting.
	level := func(level string) error {
		_, err := agentAdmin(nodes[0], http.MethodPost, "/logging?level="+level)
		return err
	}
	must(t, level("debug"))
	specs = nil
	for i := range 10 {
		specs = append(specs, lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("added-%d", i), Node: nodes[0], Args: []string{"sleep"}})
	}
	must(t, mesh.Run(t.Context(), specs...))
	must(t, mesh.AwaitReady(t.Context(), ns, time.Minute))
	must(t, level("info"))
	by, err := agents(t.Context())
	must(t, err)
	logs, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "logs", by[nodes[0]].Name, "--since=90s")
	must(t, err)
	var waits []float64
	for _, m := range regexp.MustCompile(`CNI ADD.*`+ns+`.*took["=:]+([0-9.a-zµ]+)`).FindAllStringSubmatch(logs, -1) {
		d, err := time.ParseDuration(m[1])
		if err != nil {
			ns, e := strconv.ParseFloat(m[1], 64)
			must(t, e)
			d = time.Duration(ns)
		}
		waits = append(waits, float64(d.Microseconds())/1000)
	}
	if len(waits) < 10 {
		t.Fatalf("%d of 10 CNI ADDs are in the log", len(waits))
	}
	slices.Sort(waits)
	record("figures", "CNI ADD waits for the agent, median", len(waits), 0, waits[len(waits)/2], "ms")
	record("figures", "CNI ADD waits for the agent, longest", len(waits), 0, waits[len(waits)-1], "ms")
	t.Logf("enrolment %s, CPU %s, RssAnon %.1f MiB, CNI ADD %v ms", took, after-before, rss/1024, waits)
}

// agentPID is the agent's process in the node's own pid namespace.
func agentPID(ctx context.Context, node string) (string, error) {
	pids, err := agentProcesses(ctx, node)
	if err == nil && len(pids) != 1 {
		err = fmt.Errorf("agents on %s: %v", node, pids)
	}
	return strings.Join(pids, " "), err
}

// cpuTime is what a process has used, user and system.
func cpuTime(ctx context.Context, node, pid string) (time.Duration, error) {
	n, err := mesh.Cluster.Node(node)
	if err != nil {
		return 0, err
	}
	out, err := n.Exec(ctx, "cat", "/proc/"+pid+"/stat")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(out, ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("stat of process %s: %q", pid, out)
	}
	user, e1 := strconv.ParseInt(f[11], 10, 64)
	system, e2 := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(e1, e2)
}
