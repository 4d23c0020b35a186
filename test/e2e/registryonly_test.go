package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// Addresses outside of the cluster, of which nothing in it knows.
const (
	outside4 = "198.51.100.7"
	outside6 = "2001:db8:7::7"
)

// outsideServer answers HTTP requests at both addresses outside, on port 9000, until the test ends. Nodes know the way. What
// it returns grows ten times a second for each request of /held that is being answered, which has no end.
func outsideServer(t *testing.T) *atomic.Int64 {
	t.Helper()
	held := &atomic.Int64{}
	ctx := context.WithoutCancel(t.Context())
	do := func(cmd *exec.Cmd) {
		t.Helper()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", cmd.Args, err, out)
		}
	}
	for _, a := range []struct{ address, bits, link, family string }{{outside4, "/32", "172.30.0.1", "-4"}, {outside6, "/128", "fd00:172:30::1", "-6"}} {
		do(mesh.Cluster.OutsideCommand(ctx, "ip", a.family, "address", "replace", a.address+a.bits, "dev", "lo"))
		for _, n := range mesh.Cluster.Nodes() {
			do(n.Command(ctx, "ip", a.family, "route", "replace", a.address+a.bits, "via", a.link))
		}
		var l net.Listener
		must(t, mesh.Cluster.Outside(func() (err error) {
			l, err = net.Listen("tcp", net.JoinHostPort(a.address, "9000"))
			return err
		}))
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for rc := http.NewResponseController(w); r.URL.Path == "/held"; time.Sleep(100 * time.Millisecond) {
				if _, err := io.WriteString(w, "still there\n"); err != nil || rc.Flush() != nil || r.Context().Err() != nil {
					return
				}
				held.Add(1)
			}
			io.WriteString(w, "outside\n")
		})}
		go server.Serve(l)
		t.Cleanup(func() {
			server.Close()
			for _, n := range mesh.Cluster.Nodes() {
				do(n.Command(ctx, "ip", a.family, "route", "del", a.address+a.bits))
			}
			do(mesh.Cluster.OutsideCommand(ctx, "ip", a.family, "address", "del", a.address+a.bits, "dev", "lo"))
		})
	}
	return held
}

// Under REGISTRY_ONLY a captured pod reaches what the mesh knows and nothing else; what is refused is counted, logged and
// explained. What a cluster needs to work goes on, and so does what was open.
func TestRegistryOnly(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	ns, plain := pair(t, "e2e-registry"), namespace(t, "e2e-registry-plain")
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: plain, Name: "client", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: plain, Name: "server", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000},
		lab.PodSpec{Namespace: plain, Name: "headless", Node: nodes[1], Args: []string{"tcp-echo"}, Port: 9000, Headless: true},
		server(ns, "probed", nodes[0])))
	must(t, mesh.AwaitReady(ctx, plain, time.Minute))
	must(t, mesh.AwaitReady(ctx, ns, time.Minute))
	inMesh(t, ns)
	held := outsideServer(t)

	get := func(from, host, path string) (string, error) {
		return mesh.Exec(ctx, from, "client", "/demo", "get", "-timeout", "3s", "http://"+host+path)
	}
	targets := []string{net.JoinHostPort(outside4, "9000"), net.JoinHostPort(outside6, "9000")}
	reached := func(from string) {
		t.Helper()
		for _, to := range targets {
			must(t, lab.Eventually(ctx, 20*time.Second, func() error {
				out, err := get(from, to, "/")
				if err == nil && !strings.Contains(out, "outside") {
					err = fmt.Errorf("%s answers %q", to, out)
				}
				return err
			}))
		}
	}
	refused := func() {
		t.Helper()
		for _, to := range targets {
			must(t, lab.Eventually(ctx, 20*time.Second, func() error {
				out, err := get(ns, to, "/")
				if !strings.Contains(fmt.Sprint(out, err), "reset by peer") {
					err = fmt.Errorf("%s is not refused by a reset: %q, %v", to, out, err)
					return err
				}
				return nil
			}))
		}
	}
	// What is known is reached as ever, by names, which DNS has to answer for.
	known := func() {
		t.Helper()
		for _, to := range []string{"near", "far", "server." + plain, "headless." + plain, pod(t, plain, "server").IP} {
			must(t, lab.Eventually(ctx, 20*time.Second, func() error {
				_, err := mesh.Exec(ctx, ns, "client", "/demo", "tcp-dial", "-timeout", "5s", net.JoinHostPort(to, "9000"))
				return err
			}))
		}
		// The API server, by its Service, at its own address, and a kubelet: they answer that HTTP is not what they speak.
		api, err := mesh.Kubectl(ctx, "-n", "default", "get", "endpointslices", "-l", "kubernetes.io/service-name=kubernetes",
			"-o", `jsonpath={.items[0].endpoints[0].addresses[0]}:{.items[0].ports[0].port}`)
		must(t, err)
		for _, to := range []string{"kubernetes.default:443", strings.TrimSpace(api), net.JoinHostPort(mesh.Cluster.Nodes()[1].Addrs()[0].String(), "10250")} {
			if out, err := get(ns, to, "/"); !strings.Contains(out, "HTTPS") {
				t.Errorf("%s: %q, %v", to, out, err)
			}
		}
	}

	reached(ns)
	known()
	holding, letGo := context.WithCancel(ctx)
	defer letGo()
	go mesh.Exec(holding, ns, "client", "/demo", "get", "-timeout", "10m", "http://"+targets[0]+"/held")
	lives := func() {
		t.Helper()
		was := held.Load()
		must(t, lab.Eventually(ctx, 5*time.Second, func() error {
			if held.Load() == was {
				return fmt.Errorf("the connection that was open before has ended")
			}
			return nil
		}))
	}
	lives()
	restarts := func() string {
		out, err := mesh.Kubectl(ctx, "-n", ns, "get", "pods", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount} {.items[*].status.containerStatuses[*].ready}")
		must(t, err)
		return out
	}
	before := restarts()

	setMesh(t, "outboundTrafficPolicy: {mode: REGISTRY_ONLY}\n")
	refused()
	known()
	reached(plain) // which is not in the mesh
	if now := restarts(); now != before {
		t.Errorf("containers' restarts and readiness were %s and are %s", before, now)
	}

	// It is counted, logged and explained.
	samples, err := mesh.Metrics(ctx)
	must(t, err)
	if n := lab.Sum(samples, "warren_connections_total", map[string]string{"outcome": "not_in_registry", "reporter": "source"}); n < 2 {
		t.Errorf("%v connections are counted as refused", n)
	}
	must(t, lab.Eventually(ctx, 20*time.Second, func() error {
		out, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "logs", "-l", lab.NodeApp, "--tail=2000")
		if err == nil && (!strings.Contains(out, "not_in_registry") || !strings.Contains(out, targets[0])) {
			err = fmt.Errorf("no line of the access log names it")
		}
		return err
	}))
	if out, err := warren(t, "why", ns+"/client", targets[0]); err == nil || !strings.Contains(out, "refused") || !strings.Contains(out, "REGISTRY_ONLY") {
		t.Errorf("warren why: %v\n%s", err, out)
	}

	// The agent of the client's node dies, and its successor knows it from the first connection on.
	must(t, crashAgent(ctx, nodes[0]))
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		if out, err := get(ns, targets[0], "/"); err == nil {
			t.Fatalf("the outside is reached while an agent is replaced: %s", out)
		}
	}
	refused()

	// What a ServiceEntry declares is let through, and its end closes it again.
	for range 3 {
		applyIn(t, ns, `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: partner, namespace: NS}
spec:
  hosts: [partner.example]
  location: MESH_EXTERNAL
  resolution: NONE
  addresses: [`+outside4+`, "`+outside6+`/128"]
  ports: [{number: 9000, name: tcp, protocol: TCP}]
`)
		start := time.Now()
		reached(ns)
		t.Logf("reached %s after the ServiceEntry was applied", time.Since(start).Round(time.Millisecond))
		_, err := mesh.Kubectl(ctx, "-n", ns, "delete", "serviceentry", "partner")
		must(t, err)
		start = time.Now()
		refused()
		t.Logf("refused %s after it was deleted", time.Since(start).Round(time.Millisecond))
	}

	lives()

	// What another namespace declares for itself alone opens nothing here; the own does.
	private := func(in string, what string) {
		t.Helper()
		_, err := mesh.Kubectl(ctx, "-n", in, "delete", "serviceentry", "private", "--ignore-not-found")
		must(t, err)
		applyIn(t, in, `
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: private, namespace: NS}
spec:
  hosts: [private.example]
  location: MESH_EXTERNAL
  exportTo: ["."]
  ports: [{number: 9000, name: tcp, protocol: TCP}]
`+what)
	}
	byAddress := "  resolution: NONE\n  addresses: [" + outside4 + ", '" + outside6 + "']\n"
	private(plain, byAddress)
	time.Sleep(2 * time.Second) // three times and more what took effect above
	refused()
	private(ns, byAddress)
	reached(ns)
	private(ns, "  resolution: STATIC\n  addresses: [203.0.113.1]\n  endpoints: [{address: "+outside4+"}, {address: '"+outside6+"'}]\n")
	reached(ns)
	private(plain, "  resolution: STATIC\n  addresses: [203.0.113.2]\n  endpoints: [{address: "+outside4+"}, {address: '"+outside6+"'}]\n")
	_, err = mesh.Kubectl(ctx, "-n", ns, "delete", "serviceentry", "private")
	must(t, err)
	refused()
}
