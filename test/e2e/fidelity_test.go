package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// finding is one line of `tcpcheck manners`.
type finding struct {
	Name string
	OK   bool
	Saw  string
	MS   int64
}

func checkManners(t *testing.T, ns, host string) map[string]finding {
	t.Helper()
	out, err := mesh.Exec(t.Context(), ns, "client", tcpcheck, "manners", "-bytes", fmt.Sprint(size(8<<20, 256<<20)), host)
	var all []finding
	if e := json.Unmarshal([]byte(out), &all); e != nil {
		t.Fatalf("no report: %v, %v: %s", err, e, out)
	}
	by := map[string]finding{}
	for _, f := range all {
		by[f.Name] = f
	}
	return by
}

// What a connection does without a mesh it does with one, and the same program notices the same.
func TestMannersAsWithoutAMesh(t *testing.T) {
	ns := namespace(t, "e2e-fidelity")
	deploy(t, ns, false, client(ns, "client", nodes[0]), server(ns, "far", nodes[1]), server(ns, "near", nodes[0]))
	far, near := pod(t, ns, "far"), pod(t, ns, "near")
	without := checkManners(t, ns, far.IP)
	for name, f := range without {
		if !f.OK {
			t.Errorf("without a mesh, %s: %s", name, f.Saw)
		}
	}
	must(t, mesh.Enrol(t.Context(), ns, true))
	_, err := mesh.AwaitRedirection(t.Context(), ns, "enabled", 30*time.Second)
	must(t, err)
	hosts := []struct{ way, host string }{{"other node", far.IP}, {"same node", near.IP}}
	for _, ip := range far.IPs {
		if strings.Contains(ip, ":") {
			hosts = append(hosts, struct{ way, host string }{"other node, IPv6", ip})
		}
	}
	for _, h := range hosts {
		t.Run(h.way, func(t *testing.T) {
			with := checkManners(t, ns, h.host)
			for name, f := range with {
				failed := 0
				if !f.OK {
					failed = 1
					t.Errorf("%s: %s; without a mesh: %s", name, f.Saw, without[name].Saw)
				} else if w, ok := without[name]; ok && w.Saw != f.Saw {
					t.Logf("%s: %q; without a mesh: %q", name, f.Saw, w.Saw)
				}
				record("tcp-fidelity", name+", "+h.way, 1, failed, float64(f.MS), "ms")
			}
		})
	}
}

// Names of headless Services and ports of nodes lead to the right server.
func TestHeadlessAndNodePort(t *testing.T) {
	ns := namespace(t, "e2e-ways", ambient)
	specs := []lab.PodSpec{client(ns, "client", nodes[0]), server(ns, "headless", nodes[1]), server(ns, "ported", nodes[1])}
	specs[1].Headless = true
	specs[2].ServiceType = "NodePort"
	deploy(t, ns, true, specs...)
	n := size(2000, 20000)
	for _, ip := range pod(t, ns, "headless").IPs {
		name := "headless, IPv4"
		if strings.Contains(ip, ":") {
			name = "headless, IPv6"
		}
		// A headless name resolves to the pod's addresses.
		at := net.JoinHostPort(ip, "9000")
		s := runStorm(t, ns, "client", n, 32, at, at)
		record("wrong-addresses", name, s.Connections, s.bad(), float64(s.Connections)/s.Seconds, "connections/s")
		if s.bad() > 0 {
			t.Errorf("%s: %+v", name, s)
		}
	}
	if out, err := mesh.Exec(t.Context(), ns, "client", tcpcheck, "who", "headless:9000"); err != nil || strings.TrimSpace(out) != "headless" {
		t.Errorf("the headless name leads to %q: %v", out, err)
	}
	port, err := mesh.Kubectl(t.Context(), "-n", ns, "get", "service", "ported", "-o", "jsonpath={.spec.ports[0].nodePort}")
	must(t, err)
	addrs, err := mesh.Kubectl(t.Context(), "get", "nodes", "-o", `jsonpath={range .items[*]}{.status.addresses[?(@.type=="InternalIP")].address}{" "}{end}`)
	must(t, err)
	for _, a := range strings.Fields(addrs) {
		// A node's port is kube-proxy's: it translates both addresses, with a mesh or without.
		out, err := mesh.Exec(t.Context(), ns, "client", tcpcheck, "who", net.JoinHostPort(a, port))
		failed := 0
		if err != nil || strings.TrimSpace(out) != "ported" {
			failed = 1
			t.Errorf("node port by %s leads to %q: %v", a, out, err)
		}
		record("wrong-addresses", "node port by "+a+" (server reached)", 1, failed, 0, "")
	}
}

// The kubelet's probes of every kind pass where only mutual TLS is let in, and what comes in plaintext from
// anywhere else does not.
func TestProbesUnderStrict(t *testing.T) {
	ns := namespace(t, "e2e-strict-probes", ambient)
	strict(t, ns)
	var specs []lab.PodSpec
	kinds := map[string]map[string]any{
		"http": {"httpGet": map[string]any{"path": "/healthz", "port": 9005}},
		"tcp":  {"tcpSocket": map[string]any{"port": 9000}},
		"exec": {"exec": map[string]any{"command": []string{tcpcheck, "who", "127.0.0.1:9000"}}},
		"grpc": {"grpc": map[string]any{"port": 9006}},
	}
	for kind, how := range kinds {
		probe := map[string]any{"periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 3}
		for k, v := range how {
			probe[k] = v
		}
		s := server(ns, "probed-"+kind, nodes[len(specs)%2])
		s.Container = map[string]any{"readinessProbe": probe, "livenessProbe": probe}
		specs = append(specs, s)
	}
	deploy(t, ns, true, append(specs, client(ns, "client", nodes[0]))...)
	time.Sleep(5 * time.Second) // five liveness probes each
	for kind := range kinds {
		p := pod(t, ns, "probed-"+kind)
		failed := 0
		if !p.Ready || p.Restarts > 0 {
			failed = 1
			t.Errorf("%s probes under STRICT: ready %t, %d restarts", kind, p.Ready, p.Restarts)
		}
		record("tcp-fidelity", kind+" probes under STRICT", 5, failed, 0, "")
	}
	if mesh.Cluster == nil {
		return
	}
	p := pod(t, ns, "probed-tcp")
	for _, ip := range p.IPs {
		err := mesh.Cluster.Outside(func() error {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(ip, "9000"), 3*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(3 * time.Second))
			fmt.Fprintln(c, lab.Marker)
			_, err = c.Read(make([]byte, 1))
			return err
		})
		failed := 0
		if !slices.ContainsFunc([]error{syscall.ECONNRESET, syscall.ECONNREFUSED}, func(e error) bool { return errors.Is(err, e) }) {
			failed = 1
			t.Errorf("plaintext from outside to a STRICT pod at %s: %v, want a refusal", ip, err)
		}
		record("tcp-fidelity", "plaintext from outside refused under STRICT, "+ip[:4], 1, failed, 0, "")
	}
}
