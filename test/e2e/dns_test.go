package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// libc looks a name up as a program of a pod does that uses the C library: with that library, in the pod's network namespace and by
// the pod's resolv.conf. It returns the addresses.
func libc(ctx context.Context, t *testing.T, namespace, name, node, host string) ([]string, error) {
	t.Helper()
	uid, err := mesh.Kubectl(ctx, "-n", namespace, "get", "pod", name, "-o", "jsonpath={.metadata.uid}")
	if err != nil {
		return nil, err
	}
	uid = strings.TrimSpace(uid)
	out, err := mustNode(t, node).Exec(ctx, "sh", "-c", fmt.Sprintf(`
for c in $(grep -ls -e %s -e %s /proc/[0-9]*/cgroup); do
	if [ -e ${c%%/cgroup}/root/demo ]; then p=${c%%/cgroup}; p=${p#/proc/}; fi # the sandbox's has other files
done
f=$(mktemp) && trap 'rm $f' EXIT && cat /proc/$p/root/etc/resolv.conf > $f && # mount would follow the link to the node's own file
nsenter -t $p -n unshare -m sh -c "mount --bind $f /etc/resolv.conf && { getent ahosts %s || { cat /etc/resolv.conf; exit 2; }; }" 2>&1`,
		uid, strings.ReplaceAll(uid, "-", "_"), host))
	var addrs []string
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) > 1 && f[1] == "STREAM" {
			addrs = append(addrs, f[0])
		}
	}
	if err == nil && len(addrs) == 0 {
		err = errors.New("no address")
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return addrs, err
}

// A captured pod that asks for the host of a ServiceEntry is led to the waypoint, by the resolver of Go and by that of the C library;
// all other names, and those of pods that do not want it, are what the cluster's DNS says, and no agent is needed for either.
func TestDNSCapture(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	must(t, mesh.LoadWaypoint(ctx))
	const host = "api.example.com"
	e := egress{clients: namespace(t, "e2e-dns-clients", ambient), outside: namespace(t, "e2e-dns-outside"), way: namespace(t, "e2e-dns")}
	must(t, mesh.Run(ctx,
		lab.PodSpec{Namespace: e.clients, Name: "client", Account: "client", Node: nodes[0], Program: tcpcheck, Args: []string{"serve"}},
		lab.PodSpec{Namespace: e.clients, Name: "other", Account: "other", Node: nodes[1], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: e.outside, Name: "plain", Account: "default", Node: nodes[0], Args: []string{"sleep"}},
		lab.PodSpec{Namespace: e.outside, Name: "stock", Account: "default", Node: nodes[1], Args: []string{"inventory"}},
	))
	must(t, mesh.AwaitReady(ctx, e.clients, time.Minute))
	must(t, mesh.AwaitReady(ctx, e.outside, time.Minute))
	inMesh(t, e.clients)
	e.apply(t, `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: way, namespace: WAY}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: api, namespace: WAY, labels: {istio.io/use-waypoint: way}}
spec:
  hosts: [`+host+`]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  endpoints: [{address: `+pod(t, e.outside, "stock").IP+`}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: api, namespace: WAY}
spec:
  targetRefs: [{group: networking.istio.io, kind: ServiceEntry, name: api}]
  rules: [{to: [{operation: {paths: [/stock]}}]}]
`)
	if out, err := mesh.Kubectl(ctx, "-n", e.way, "wait", "--for=condition=Programmed", "gateway.gateway.networking.k8s.io/way", "--timeout=180s"); err != nil {
		t.Fatal(err, out)
	}
	address := e.allocated(t, "api")
	e.becomes(t, "client", host, "/stock", `"items"`)
	e.becomes(t, "other", host, "/stock", `"items"`)
	e.becomes(t, "client", host, "/healthz", "403") // it is the waypoint that it came to, which writes about it
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		out, err := mesh.Kubectl(ctx, "-n", e.way, "logs", "deploy/way")
		if err == nil && !strings.Contains(out, `"destination_service":"`+host+`"`) {
			err = fmt.Errorf("the waypoint has no line about %s:\n%s", host, out)
		}
		return err
	}))

	known := func(name, node, asked, want string) {
		t.Helper()
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			addrs, err := libc(ctx, t, e.clients, name, node, asked)
			if got := strings.Join(addrs, " "); !strings.Contains(got+" ", want+" ") {
				return fmt.Errorf("%s is told %q for %s (%v), want %s", name, got, asked, err, want)
			}
			return nil
		}))
	}
	api, err := mesh.ServiceAddrs(ctx, "default", "kubernetes")
	must(t, err)
	known("client", nodes[0], host, address)
	known("client", nodes[0], "API.Example.com", address)
	known("client", nodes[0], "kubernetes.default", api[0])
	if addrs, err := libc(ctx, t, e.outside, "plain", nodes[0], host); err == nil {
		t.Errorf("a pod outside the mesh is told %v", addrs)
	}

	// A pod that does not want it, and that does again.
	annotate := func(value string) {
		t.Helper()
		out, err := mesh.Kubectl(ctx, "-n", e.clients, "annotate", "--overwrite", "pod", "other", "ambient.istio.io/dns-capture"+value)
		if err != nil {
			t.Fatal(err, out)
		}
	}
	annotate("=false")
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if addrs, err := libc(ctx, t, e.clients, "other", nodes[1], host); err == nil {
			return fmt.Errorf("it is told %v", addrs)
		}
		return nil
	}))
	known("other", nodes[1], "kubernetes.default", api[0])
	known("client", nodes[0], host, address)
	annotate("-")
	known("other", nodes[1], host, address)

	// Both names, again and again, from one socket that asks all servers, while the agent is killed and replaced.
	dns, err := mesh.ServiceAddrs(ctx, "kube-system", "kube-dns")
	must(t, err)
	var servers []string
	for _, a := range dns {
		servers = append(servers, net.JoinHostPort(a, "53"))
	}
	stops := map[string]func() (asked, again, failed int){
		"a host of a ServiceEntry": resolving(t, e.clients, "client", append([]string{"-name", host + "."}, servers...)),
		"another":                  resolving(t, e.clients, "client", servers),
	}
	for range 3 {
		must(t, killAgent(ctx, nodes[0]))
		known("client", nodes[0], host, address)
		known("client", nodes[0], "kubernetes.default", api[0])
		must(t, replaceAgent(ctx, nodes[0]))
	}
	for what, stop := range stops {
		asked, again, failed := stop()
		t.Logf("%s was asked for %d times while the agent was killed three times, %d of them again, %d in vain", what, asked, again, failed)
		if failed > 0 || asked < 100 {
			t.Errorf("%s: %d of %d questions were not answered", what, failed, asked)
		}
	}
	e.becomes(t, "client", host, "/stock", `"items"`)

	samples, err := mesh.Metrics(ctx)
	must(t, err)
	for _, name := range []string{"istio_dns_requests_total", "istio_dns_upstream_requests_total"} {
		if lab.Sum(samples, name, nil) < 1 {
			t.Errorf("%s is not counted", name)
		}
	}

	// Without the ServiceEntry the name is the cluster's DNS' again.
	if out, err := mesh.Kubectl(ctx, "-n", e.way, "delete", "serviceentry", "api"); err != nil {
		t.Fatal(err, out)
	}
	must(t, lab.Eventually(ctx, time.Minute, func() error {
		if addrs, err := libc(ctx, t, e.clients, "client", nodes[0], host); err == nil {
			return fmt.Errorf("it is told %v", addrs)
		}
		return nil
	}))
}
