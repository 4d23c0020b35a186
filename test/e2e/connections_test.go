package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// A client that knows nothing of the mesh has connections to a pod: some from before the pod's enrolment, which
// nobody carries, and some that came in later, in plaintext. All end when the pod becomes STRICT, also where the
// agent that enrolled it is gone since.
func TestPlaintextThatIsOpenEndsUnderStrict(t *testing.T) {
	ownCluster(t)
	ctx := t.Context()
	out := namespace(t, "e2e-plain-out")
	in := namespace(t, "e2e-plain-in")
	deploy(t, out, false, client(out, "early", nodes[0]), client(out, "late", nodes[0]))
	deploy(t, in, false, server(in, "far", nodes[1]))
	early, late := size(10, 9000), size(10, 4000) // each of the late ones has two descriptors of the agent, of 20,000 here
	held := func(client string, hold, lasting int) func() loadReport {
		return startLoad(t, out, client, "-rate", "0", "-for", fmt.Sprint(lasting, "s"), "-hold", fmt.Sprint(hold), "-every", fmt.Sprint(size(1, 20), "s"),
			"-timeout", "60s", net.JoinHostPort(pod(t, in, "far").IP, "9000"))
	}
	before := held("early", early, size(60, 240))
	must(t, mesh.Enrol(ctx, in, true))
	_, err := mesh.AwaitRedirection(ctx, in, "enabled", 30*time.Second)
	must(t, err)
	must(t, crashAgent(ctx, nodes[1]))
	must(t, awaitAgents(ctx, 90*time.Second))
	after := held("late", late, size(20, 120))

	changed := time.Now()
	must(t, mesh.Apply(ctx, `{"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication", "metadata": {"name": "default", "namespace": "`+in+`"},
		"spec": {"mtls": {"mode": "STRICT"}}}`))
	for _, of := range []struct {
		name   string
		hold   int
		report func() loadReport
	}{
		{"plaintext through the agent", late, after},
		{"plaintext from before enrolment, after a restart of the agent", early, before},
	} {
		r := of.report()
		var slowest time.Duration
		missed := r.Held - len(r.HeldEnds)
		for _, ms := range r.HeldEnds {
			at := time.UnixMilli(ms)
			slowest = max(slowest, at.Sub(changed))
			if at.Before(changed.Truncate(time.Millisecond)) {
				missed++
			}
		}
		record("open-connections", of.name+": cut when the pod becomes STRICT, the slowest", r.Held, missed, float64(slowest.Milliseconds()), "ms after kubectl apply began")
		if r.Held != of.hold || missed > 0 {
			t.Errorf("%s: of %d connections %d went on or ended before the change: %+v", of.name, r.Held, missed, r)
		}
	}
	if *long { // not every one of so many has a line
		return
	}
	must(t, lab.Eventually(ctx, 10*time.Second, func() error {
		logs, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "logs", "-l", lab.NodeApp, "--tail=1000")
		if err != nil {
			return err
		}
		carried, reset := 0, 0
		for line := range strings.Lines(logs) {
			switch {
			case strings.Contains(line, "policy_revoked") && strings.Contains(line, "dst.namespace="+in) && strings.Contains(line, "by policy"):
				carried++
			case strings.Contains(line, "connections from before enrolment reset") && strings.Contains(line, "namespace="+in):
				reset++
			}
		}
		if carried != late || reset == 0 {
			return fmt.Errorf("%d lines of the access log name the policy, want %d; the connections from before enrolment are told of %d times", carried, late, reset)
		}
		return nil
	}))
}

// What policies say without being enforced is in the access log and in the metrics, of connections that the kernel
// carries as of those in a tunnel. Only these count as mutual TLS.
func TestAuditAndDryRunAreReported(t *testing.T) {
	ctx := t.Context()
	ns := namespace(t, "e2e-audit", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "near", nodes[0]), server(ns, "far", nodes[1]))
	policy := func(name, action, annotations string) string {
		return `{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "` + name + `", "namespace": "` + ns + `", "annotations": {` + annotations + `}},
			"spec": {"action": "` + action + `", "rules": [{"from": [{"source": {"namespaces": ["` + ns + `"]}}]}]}}`
	}
	must(t, mesh.Apply(ctx, policy("watch", "AUDIT", "")))
	must(t, mesh.Apply(ctx, policy("try", "DENY", `"istio.io/dry-run": "true"`)))
	for _, o := range []string{"watch", "try"} {
		_, err := mesh.Kubectl(ctx, "-n", ns, "wait", "--for=condition=Enforced", "authorizationpolicy/"+o, "--timeout=30s")
		must(t, err)
	}
	for name, want := range map[string][]string{
		"near": {"path=kernel"},
		"far":  {"dst.hbone_addr="},
	} {
		_, err := mesh.Exec(ctx, ns, "client", tcpcheck, "who", net.JoinHostPort(pod(t, ns, name).IP, "9000"))
		must(t, err)
		want = append(want, "direction=inbound", "dst.workload="+name, "dst.namespace="+ns, "src.identity=spiffe://cluster.local/ns/"+ns+"/sa/client",
			"authz.audit="+ns+"/watch", `authz.dry_run="`+ns+`/try=denied"`)
		must(t, lab.Eventually(ctx, 10*time.Second, func() error {
			logs, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "logs", "-l", lab.NodeApp, "--tail=400")
			if err != nil {
				return err
			}
		lines:
			for line := range strings.Lines(logs) {
				for _, w := range want {
					if !strings.Contains(line, w) {
						continue lines
					}
				}
				return nil
			}
			return fmt.Errorf("no line has all of %q", want)
		}))
	}
	must(t, lab.Eventually(ctx, 10*time.Second, func() error {
		m, err := mesh.Metrics(ctx)
		if err != nil {
			return err
		}
		for _, of := range []struct {
			name   string
			labels map[string]string
		}{
			{"warren_authz_audit_total", map[string]string{"policy": ns + "/watch"}},
			{"warren_authz_dry_run_total", map[string]string{"policy": ns + "/try", "authz_dry_run_action": "deny", "authz_dry_run_result": "denied"}},
		} {
			if n := lab.Sum(m, of.name, of.labels); n != 2 {
				return fmt.Errorf("%s%v is %v, want 2", of.name, of.labels, n)
			}
		}
		for server, security := range map[string]string{"near": "unknown", "far": "mutual_tls"} {
			for _, reporter := range []string{"source", "destination"} {
				labels := map[string]string{"reporter": reporter, "destination_workload_namespace": ns, "destination_workload": server, "connection_security_policy": security,
					"source_principal": "spiffe://cluster.local/ns/" + ns + "/sa/client"}
				if n := lab.Sum(m, "istio_tcp_connections_closed_total", labels); n != 1 {
					return fmt.Errorf("%v connections%v, want 1", n, labels)
				}
			}
		}
		return nil
	}))
}
