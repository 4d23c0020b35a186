// Command demo installs Warren on a Kubernetes, puts a small application in, and shows with figures from the
// link between the nodes and from the agents what became of its traffic.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "use this cluster instead of starting one here; images must be pullable there")
	watch := flag.Duration("watch", 4*time.Second, "how long to watch the traffic, before and after")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *kubeconfig, *watch); err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

var began = time.Now()

func say(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
}

func run(ctx context.Context, kubeconfig string, watch time.Duration) error {
	l, err := lab.Open(ctx, kubeconfig, say)
	if err != nil {
		return err
	}
	if l.Cluster != nil {
		say("building the images and loading them onto the nodes")
		if err := l.BuildImages(ctx); err != nil {
			return err
		}
	}
	say("helm install warren charts/warren -n %s --create-namespace", lab.Namespace)
	if err := l.Install(ctx); err != nil {
		return err
	}
	say("Warren runs. Deploying the shop: load calls ui, ui calls catalog (v1, v2), catalog calls inventory")
	// A second run begins where the first did: outside the mesh.
	if err := l.Shop(ctx); err != nil {
		return err
	}
	if err := l.Enrol(ctx, "shop", false); err != nil {
		return err
	}
	if _, err := l.AwaitRedirection(ctx, "shop", "", 30*time.Second); err != nil {
		return err
	}
	uids, err := containers(ctx, l)
	if err != nil {
		return err
	}
	before, err := measure(ctx, l, watch)
	if err != nil {
		return err
	}
	say("kubectl label namespace shop %s=ambient", lab.Label)
	labelled := time.Now()
	if err := l.Enrol(ctx, "shop", true); err != nil {
		return err
	}
	took, err := l.AwaitRedirection(ctx, "shop", "enabled", 30*time.Second)
	if err != nil {
		return fmt.Errorf("%w\n%s", err, l.Diagnose(ctx))
	}
	say("all pods are captured, %.1f s after the label", took.Seconds())
	// The shop renews its connections every two seconds; those from before the label go on in clear until then.
	if err := sleep(ctx, 5*time.Second); err != nil {
		return err
	}
	start, err := l.Metrics(ctx)
	if err != nil {
		return err
	}
	after, err := measure(ctx, l, watch)
	if err != nil {
		return err
	}
	end, err := l.Metrics(ctx)
	if err != nil {
		return err
	}
	now, err := containers(ctx, l)
	if err != nil {
		return err
	}
	answer, err := l.Kubectl(ctx, "-n", "shop", "exec", "deploy/load", "--", "/demo", "get", "http://ui:8080/")
	if err != nil {
		return fmt.Errorf("the shop does not answer: %w", err)
	}

	fmt.Printf("\nWho talked to whom, and as whom\n\n")
	pairs := printPairs(start, end)
	fmt.Println("\nWhat crossed the link between the nodes")
	fmt.Println()
	if before != nil {
		t := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
		fmt.Fprintf(t, "\tframes\tTCP with payload\tof these in the tunnel\twith the marker in clear\t\n")
		fmt.Fprintf(t, "before the label\t%d\t%d\t%d\t%d\t\n", before.Frames, before.TCP, before.Tunnel, before.Clear)
		fmt.Fprintf(t, "after\t%d\t%d\t%d\t%d\t\n", after.Frames, after.TCP, after.Tunnel, after.Clear)
		t.Flush()
		fmt.Printf("\nEvery request and every answer of the shop holds the text %q.\n", lab.Marker)
	} else {
		fmt.Println("  not watched: that needs the cluster that `make demo` starts itself")
	}
	ok, failed, err := calls(ctx, l, labelled)
	if err != nil {
		return err
	}
	fmt.Printf("The front page answers (%d bytes). Since the label the load has made %d calls, of which %d failed, and no container was restarted.\n", len(answer), ok+failed, failed)
	if !slices.Equal(uids, now) {
		return fmt.Errorf("pods changed meanwhile: %v became %v", uids, now)
	}
	if pairs == 0 {
		return fmt.Errorf("no agent reports a connection of the shop under mutual TLS\n%s", l.Diagnose(ctx))
	}
	if before != nil {
		switch {
		case before.Dropped+after.Dropped > 0:
			return fmt.Errorf("the capture lost %d frames, so it proves nothing", before.Dropped+after.Dropped)
		case before.Clear == 0:
			return fmt.Errorf("no marker crossed the link before the label, so its absence afterwards proves nothing")
		case after.Clear > 0:
			return fmt.Errorf("%d frames carried the marker in clear, one of them %s", after.Clear, after.Sample)
		case after.Tunnel == 0:
			return fmt.Errorf("nothing went through the tunnel")
		}
	}
	next(l)
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// containers identifies the shop's pods and their restarts.
func containers(ctx context.Context, l *lab.Lab) ([]string, error) {
	pods, err := l.Pods(ctx, "shop", "")
	if err != nil {
		return nil, err
	}
	var out []string
	for _, p := range pods {
		if !p.Terminating {
			out = append(out, fmt.Sprintf("%s/%d", p.Name, p.Restarts))
		}
	}
	return out, nil
}

// calls reads from the load's log how many of its calls went well and failed since a moment.
func calls(ctx context.Context, l *lab.Lab, since time.Time) (ok, failed int, err error) {
	logs, err := l.Kubectl(ctx, "-n", "shop", "logs", "deploy/load")
	if err != nil {
		return 0, 0, err
	}
	var before, last struct {
		Time       time.Time
		Msg        string
		OK, Failed int
	}
	for line := range strings.Lines(logs) {
		entry := last
		entry.Msg = ""
		if json.Unmarshal([]byte(line), &entry) != nil || entry.Msg != "load" {
			continue
		}
		if entry.Time.Before(since) {
			before = entry
		}
		last = entry
	}
	return last.OK - before.OK, last.Failed - before.Failed, nil
}

// measure watches the link, or only waits where it cannot be watched.
func measure(ctx context.Context, l *lab.Lab, d time.Duration) (*lab.Wire, error) {
	if l.Cluster == nil {
		return nil, sleep(ctx, d)
	}
	stop, err := l.Watch(ctx)
	if err != nil {
		return nil, err
	}
	if err := sleep(ctx, d); err != nil {
		return nil, err
	}
	w, err := stop()
	return &w, err
}

// printPairs prints the connections that the agents counted between two readings, as the servers' side saw
// them, and returns how many pairs used mutual TLS.
func printPairs(start, end []lab.Sample) int {
	type pair struct{ from, fromID, to, toID, policy string }
	counts := map[pair]float64{}
	add := func(samples []lab.Sample, sign float64) {
		for _, s := range samples {
			l := s.Labels
			if s.Name == "istio_tcp_connections_opened_total" && l["reporter"] == "destination" &&
				l["destination_workload_namespace"] == "shop" {
				counts[pair{l["source_workload"], l["source_principal"], l["destination_workload"],
					l["destination_principal"], l["connection_security_policy"]}] += sign * s.Value
			}
		}
	}
	add(end, 1)
	add(start, -1)
	var pairs []pair
	for p, n := range counts {
		if n > 0 {
			pairs = append(pairs, p)
		}
	}
	slices.SortFunc(pairs, func(a, b pair) int {
		return cmp.Or(strings.Compare(a.from, b.from), strings.Compare(a.to, b.to), strings.Compare(a.policy, b.policy))
	})
	protected := 0
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "  from\tto\tclient's identity\tserver's identity\tprotection\tconnections")
	for _, p := range pairs {
		n := counts[p]
		switch {
		case p.policy == "mutual_tls":
			protected++
		case p.policy == "unknown" && strings.HasPrefix(p.fromID, "spiffe://"): // the metrics' word for what nothing encrypts
			p.policy = "same node, kernel"
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\t%s\t%s\t%.0f\n", p.from, p.to, p.fromID, p.toID, p.policy, n)
	}
	t.Flush()
	return protected
}

func next(l *lab.Lab) {
	alias := ""
	if _, err := exec.LookPath("kubectl"); err != nil {
		alias = "\n  alias kubectl=" + l.KubectlPath()
	}
	fmt.Printf(`
Try next
  export KUBECONFIG=%s%s
  go run ./cmd/warren status
  go run ./cmd/warren node-config connections
  kubectl -n shop logs deploy/inventory --tail=3             # the client address is catalog's own
  kubectl -n %s logs ds/warren-node --tail=5      # the access log
  kubectl label namespace shop %s-       # out again, nothing breaks
  make cluster-down
`, l.Kubeconfig(), alias, lab.Namespace, lab.Label)
}
