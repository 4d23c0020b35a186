// Package e2e tests Warren as its users have it: the chart on a real Kubernetes of two nodes, pods that know
// nothing of the mesh, and what can be seen from outside: addresses, logs, metrics, and the link between the
// nodes.
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/results"
	"github.com/warrenmesh/warren/test/cluster"
	"github.com/warrenmesh/warren/test/e2e/lab"
)

var (
	mesh   *lab.Lab
	nodes  []string // names of two nodes
	long   = flag.Bool("long", false, "the numbers of a soak instead of those of a check")
	plugin = flag.String("cni", "", "the cluster's network plugin, of a cluster that this run starts: "+lab.Cilium+" or "+lab.CiliumKubeProxy+"; bridge and host-local without")
	within = flag.Duration("within", 0, "pods that start while agents die, flips of policies about requests: no more after this long, and those that there were are the result")
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "preparing the cluster:", err)
		return 1
	}
	start := time.Now()
	log := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "%6.1f s  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	_, attachErr := cluster.Attach("")
	l, err := lab.Open(ctx, os.Getenv("WARREN_E2E_KUBECONFIG"), log)
	if err != nil {
		return fail(err)
	}
	mesh = l
	if *plugin != "" && (l.Cluster == nil || attachErr == nil) {
		return fail(errors.New("-cni needs a cluster that this run starts: end the one that runs (make cluster-down)"))
	}
	if l.Cluster != nil {
		if attachErr != nil { // we started it, we end it
			defer func() {
				if err := l.Cluster.Down(context.WithoutCancel(ctx)); err != nil {
					fmt.Fprintln(os.Stderr, "ending the cluster:", err)
				}
			}()
		}
		if *plugin != "" {
			if err := l.RunCilium(ctx, *plugin); err != nil {
				return fail(err)
			}
			log("%s is the network plugin", *plugin)
		}
		if err := l.BuildImages(ctx); err != nil {
			return fail(err)
		}
		// The demo's traffic would be on the link that the tests watch.
		if err := deleteNamespace(ctx, "shop"); err != nil {
			return fail(err)
		}
	}
	if err := l.Install(ctx); err != nil {
		return fail(err)
	}
	log("the chart is installed")
	if nodes, err = l.NodeNames(ctx); err != nil {
		return fail(err)
	}
	if len(nodes) < 2 {
		return fail(fmt.Errorf("two nodes are needed, there is %v", nodes))
	}
	code := m.Run()
	if err := writeResults(); err != nil {
		return fail(err)
	}
	return code
}

// measured is what this run records, by suite, once it has ended.
var measured struct {
	sync.Mutex
	rows map[string][]results.Row
}

// record keeps a figure for results/<suite>.json.
func record(suite, name string, inputs, failures int, figure float64, unit string) {
	measured.Lock()
	defer measured.Unlock()
	if measured.rows == nil {
		measured.rows = map[string][]results.Row{}
	}
	measured.rows[suite] = append(measured.rows[suite], results.Row{Name: name, Inputs: inputs, Failures: failures, Figure: figure, Unit: unit})
}

func writeResults() (err error) {
	for suite, rows := range measured.rows {
		err = errors.Join(err, results.Record(suite, rows...))
	}
	return err
}

// namespace makes a namespace for one test, in the mesh or not, and removes it in the end.
func namespace(t *testing.T, name string, labels ...string) string {
	t.Helper()
	ctx := t.Context()
	must(t, deleteNamespace(ctx, name))
	labelled := object{}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		labelled[k] = v
	}
	_, err := mesh.API().Apply(ctx, namespacePath+name, object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": name, "labels": labelled}})
	must(t, err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		if t.Failed() {
			t.Log(mesh.Diagnose(ctx, name))
		}
		if err := mesh.API().Delete(ctx, namespacePath+name); err != nil {
			t.Error(err)
		}
	})
	return name
}

const namespacePath = "/api/v1/namespaces/"

// deleteNamespace waits until a namespace is gone.
func deleteNamespace(ctx context.Context, name string) error {
	return lab.Eventually(ctx, time.Minute, func() error {
		err := mesh.API().Delete(ctx, namespacePath+name)
		switch {
		case errors.Is(err, lab.ErrNotFound):
			return nil
		case err == nil:
			err = fmt.Errorf("namespace %s is not gone", name)
		}
		return err
	})
}

const ambient = lab.Label + "=ambient"

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pod reads a pod that has to be there.
func pod(t *testing.T, namespace, name string) lab.Pod {
	t.Helper()
	p, err := mesh.Pod(t.Context(), namespace, name)
	must(t, err)
	return p
}

// ownCluster skips a test that does what only our own cluster lets us do.
func ownCluster(t *testing.T) {
	t.Helper()
	if mesh.Cluster == nil {
		t.Skip("needs the cluster that this suite starts itself")
	}
}

var standsForNamespace = regexp.MustCompile(`\bNS\b`) // random keys have the two letters too

// applyIn applies a manifest in which NS stands for a namespace.
func applyIn(t *testing.T, ns, manifest string) {
	t.Helper()
	must(t, mesh.Apply(t.Context(), standsForNamespace.ReplaceAllString(manifest, ns)))
}

// aWaypoint is for the services of a namespace that ask for "way".
const aWaypoint = `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: way, namespace: NS, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
`

// field reads a part of an object; it is the error where it cannot be read.
func field(t *testing.T, ns, what, path string) string {
	t.Helper()
	out, err := mesh.Kubectl(t.Context(), "-n", ns, "get", what, "-o", "jsonpath="+path)
	if err != nil {
		return err.Error()
	}
	return out
}

// fieldBecomes waits until a part of an object has a text in it, or nothing where that is empty.
func fieldBecomes(t *testing.T, ns, what, path, want string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), 90*time.Second, func() error {
		if is := field(t, ns, what, path); !strings.Contains(is, want) || want == "" && is != "" {
			return fmt.Errorf("%s of %s is %q, want %q", path, what, is, want)
		}
		return nil
	}))
}

// enforced waits until policies are, each as KIND/NAME.
func enforced(t *testing.T, ns string, policies ...string) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	for _, p := range policies {
		if out, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Enforced", p, "--timeout=120s"); err != nil {
			said, _ := mesh.Kubectl(ctx, "-n", ns, "get", p, "-o", "jsonpath={.status}")
			t.Fatal(err, out, said)
		}
	}
}

// strict makes a namespace refuse everything that is not mutual TLS.
func strict(t *testing.T, namespace string) {
	t.Helper()
	_, err := mesh.API().Apply(t.Context(), "/apis/security.istio.io/v1/namespaces/"+namespace+"/peerauthentications/default", object{
		"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": object{"name": "default", "namespace": namespace},
		"spec": object{"mtls": object{"mode": "STRICT"}}})
	must(t, err)
}
