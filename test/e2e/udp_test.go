package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

const udpPolicy = "warren.io/udp-policy"

// Two namespaces with the same policies, of which one asks for them to apply to UDP. There they do, by who sends, from the
// same node and from the other; in the other one UDP is left alone, as STRICT leaves it everywhere. Names are resolved in
// both all the time, from one socket that asks two servers, also while an agent dies.
func TestUDPPolicy(t *testing.T) {
	if *plugin == lab.CiliumKubeProxy {
		t.Skip("with BPF host routing Cilium goes around the filter: docs/network-plugins.md")
	}
	ctx := t.Context()
	asks, open := namespace(t, "e2e-udp", ambient), namespace(t, "e2e-udp-open", ambient)
	both := []string{asks, open}
	for _, ns := range both {
		friend, other := client(ns, "friend", nodes[0]), client(ns, "other", nodes[0])
		far, farOther := client(ns, "far-friend", nodes[1]), client(ns, "far-other", nodes[1])
		friend.Account, far.Account, other.Account, farOther.Account = "friend", "friend", "other", "other"
		must(t, mesh.Run(ctx, server(ns, "server", nodes[0]), friend, other, far, farOther))
		strict(t, ns)
		must(t, mesh.Apply(ctx, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: friends, namespace: %[1]s}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/%[1]s/sa/friend]}}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: datagrams, namespace: %[1]s}
spec: {selector: {app: server}, ipFamilyPolicy: PreferDualStack, ports: [{name: udp, port: 9000, protocol: UDP}]}
`, ns)))
	}
	for _, ns := range both {
		must(t, mesh.AwaitReady(ctx, ns, 2*time.Minute))
		inMesh(t, ns)
	}

	// Before the namespace asks, and through everything that follows.
	dns, err := mesh.ServiceAddrs(ctx, "kube-system", "kube-dns")
	must(t, err)
	var servers []string
	for _, a := range dns {
		servers = append(servers, net.JoinHostPort(a, "53"))
	}
	stop := map[string]func() (asked, again, failed int){}
	for _, ns := range both {
		for _, p := range []string{"other", "far-other"} {
			stop[ns+"/"+p] = resolving(t, ns, p, servers)
		}
	}

	targets := map[string][]string{}
	for _, ns := range both {
		for _, ip := range pod(t, ns, "server").IPs {
			targets[ns] = append(targets[ns], net.JoinHostPort(ip, "9000"))
		}
		vips, err := mesh.ServiceAddrs(ctx, ns, "datagrams")
		must(t, err)
		for _, ip := range vips {
			targets[ns] = append(targets[ns], net.JoinHostPort(ip, "9000"))
		}
	}
	// answered asks all the server's addresses from a pod.
	answered := func(ns, from string) (all, none bool, said string, err error) {
		said, err = mesh.Exec(ctx, ns, from, append([]string{tcpcheck, "ask", "-wait", "1s"}, targets[ns]...)...)
		if err != nil {
			return false, false, said, err
		}
		var got []string
		if err := json.Unmarshal([]byte(said), &got); err != nil {
			return false, false, said, err
		}
		return len(got) == len(targets[ns]), len(got) == 0, said, nil
	}
	inputs := 0
	var wrong atomic.Int64
	expect := func(when string, filtered bool) {
		t.Helper()
		var asking sync.WaitGroup
		defer asking.Wait()
		for _, ns := range both {
			for _, from := range []string{"friend", "far-friend", "other", "far-other"} {
				want := !filtered || ns == open || strings.HasSuffix(from, "friend")
				inputs++
				asking.Go(func() {
					err := lab.Eventually(ctx, time.Minute, func() error {
						all, none, said, err := answered(ns, from)
						if err != nil {
							return err
						}
						if want && !all || !want && !none {
							return fmt.Errorf("answered: %s of %v", strings.TrimSpace(said), targets[ns])
						}
						return nil
					})
					if err != nil {
						wrong.Add(1)
						t.Errorf("%s: %s/%s: want %v: %v", when, ns, from, want, err)
					}
				})
			}
		}
	}
	label := func(value string) error {
		_, err := mesh.Kubectl(ctx, "label", "--overwrite", "namespace", asks, udpPolicy+value)
		return err
	}

	expect("nobody asks", false)
	if err := label("=enforced"); err == nil || !strings.Contains(err.Error(), "write 'enforce'") {
		t.Errorf("a label that means nothing: %v", err)
	}
	must(t, label("=enforce"))
	expect("one namespace asks", true)
	wantStatus(t, map[string]string{asks: "by policy", open: "unfiltered"})
	if mesh.Cluster != nil {
		must(t, killAgent(ctx, nodes[0]))
		expect("an agent has died", true)
	}
	must(t, label("-"))
	expect("nobody asks any more", false)

	asked, failed := 0, 0
	for from, end := range stop {
		n, again, bad := end()
		t.Logf("%s: %d names asked for, %d again, %d in vain", from, n, again, bad)
		asked, failed = asked+n, failed+bad
		if n == 0 || bad > 0 {
			t.Errorf("%s: %d of %d names were not resolved", from, bad, n)
		}
	}
	record("udp-policy", "names that were resolved in and out of a namespace with UDP by policy, while that began, ended and an agent died", asked, failed, float64(failed), "in vain")
	record("udp-policy", "datagrams between pods on the cluster, let in or not as policy says", inputs, int(wrong.Load()), float64(wrong.Load()), "wrong")
}

// resolving has a pod resolve a name again and again until the function that it returns is called.
func resolving(t *testing.T, ns, pod string, servers []string) func() (asked, again, failed int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	cmd := mesh.Command(ctx, append([]string{"-n", ns, "exec", "-i", pod, "--", tcpcheck, "resolve"}, servers...)...)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	return func() (int, int, int) {
		t.Helper()
		in.Close()
		var got struct{ Asked, Again, Failed int }
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s/%s: %v: %s", ns, pod, err, errs.String())
			return 0, 0, 0
		}
		must(t, json.Unmarshal([]byte(out.String()), &got))
		return got.Asked, got.Again, got.Failed
	}
}

// wantStatus compares what `warren status` says of UDP.
func wantStatus(t *testing.T, want map[string]string) {
	t.Helper()
	warren := filepath.Join(t.TempDir(), "warren")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", warren, "./cmd/warren")
	build.Dir = mesh.Root()
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	cmd := exec.CommandContext(t.Context(), warren, "status", "-o", "json")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig())
	out, err := cmd.Output()
	var s struct {
		Namespaces []struct{ Name, UDP string }
	}
	if e := json.Unmarshal(out, &s); e != nil {
		t.Fatalf("%v, %v: %s", err, e, out)
	}
	for name, udp := range want {
		if !slices.ContainsFunc(s.Namespaces, func(n struct{ Name, UDP string }) bool { return n.Name == name && n.UDP == udp }) {
			t.Errorf("status says %+v, want %s of %s", s.Namespaces, udp, name)
		}
	}
}
