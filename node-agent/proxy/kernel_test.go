package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// kernelDecides gives a node's kernel the policies of now and its proxy what the kernel decides.
func (n *labNode) kernelDecides(t *testing.T) {
	t.Helper()
	check(t, n.dp.SetPolicies(n.lab.store.Load()))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e, err := range n.dp.Events(ctx) {
			if err != nil {
				t.Error(err)
				return
			}
			f := Flow{Client: e.Client, Server: e.Server, Service: e.Service, ClientPod: e.ClientPod, ServerPod: e.ServerPod, Source: e.Source}
			switch e.Kind {
			case datapath.Denied:
				n.proxy.FlowDenied(f, e.Time, e.Verdict)
			case datapath.Opened:
				n.proxy.FlowOpened(f, e.Time)
			case datapath.Closed:
				n.proxy.FlowClosed(f, e.Opened, e.Sent, e.Received)
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
}

func TestWhatTheKernelCarriesIsReportedByBothEnds(t *testing.T) {
	l := shop(t)
	n := l.nodes["node-b"]
	from, to := l.pods["catalog-1"], l.pods["catalog-2"]
	l.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "watch"}, Scope: mesh.ScopeNamespace, Action: mesh.Audit,
		Rules: []mesh.Rule{{}}})
	l.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "try"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, DryRun: true,
		Rules: []mesh.Rule{{}}})
	l.commit()
	n.kernelDecides(t)
	c, err := from.dial(netip.AddrPortFrom(to.v4, appPort))
	check(t, err)
	_, _, remote, err := seen(c)
	check(t, err)
	check(t, lives(c))
	if remote != addrPort(c.LocalAddr()) {
		t.Errorf("the application sees %s, the client is %s", remote, c.LocalAddr())
	}
	eventually(t, "the connection is counted while it lives", func() bool { return n.proxy.Flows() == 1 })
	labels := func(reporter string) map[string]string {
		return map[string]string{"reporter": reporter, "connection_security_policy": "unknown", "source_principal": from.id.String(),
			"destination_principal": to.id.String(), "source_workload": "catalog", "destination_workload": "catalog"}
	}
	for _, reporter := range reporters {
		if v := n.metric("istio_tcp_connections_opened_total", labels(reporter)); v != 1 {
			t.Errorf("%s counts %v connections, want 1", reporter, v)
		}
	}
	greeting := len(to.name) + len(" ") + len(netip.AddrPortFrom(to.v4, appPort).String()) + len(" ") + len(remote.String()) + len("\n")
	for _, reporter := range reporters {
		eventually(t, reporter+" counts the bytes while the connection lives", func() bool { // the last one as soon as it is acknowledged
			check(t, n.proxy.MeasureFlows())
			return n.metric("istio_tcp_received_bytes_total", labels(reporter)) == 1 &&
				n.metric("istio_tcp_sent_bytes_total", labels(reporter)) == float64(greeting+1)
		})
	}
	c.Close()
	for _, reporter := range reporters {
		eventually(t, reporter+" counts the end and the bytes", func() bool {
			return n.metric("istio_tcp_connections_closed_total", labels(reporter)) == 1 &&
				n.metric("istio_tcp_received_bytes_total", labels(reporter)) == 1 &&
				n.metric("istio_tcp_sent_bytes_total", labels(reporter)) == float64(greeting+1)
		})
	}
	line := map[string]any{"msg": "connection complete", "path": "kernel", "src.addr": remote, "dst.addr": netip.AddrPortFrom(to.v4, appPort),
		"src.identity": from.id, "src.workload": from.name, "dst.workload": to.name}
	line["direction"], line["bytes_sent"], line["bytes_recv"] = "outbound", 1, greeting+1
	n.log.find(t, line)
	line["direction"], line["bytes_sent"], line["bytes_recv"] = "inbound", greeting+1, 1
	line["authz.audit"], line["authz.dry_run"] = "shop/watch", "shop/try=denied"
	n.log.find(t, line)
	if v := n.metric("warren_authz_audit_total", map[string]string{"policy": "shop/watch"}); v != 1 {
		t.Errorf("the AUDIT policy is counted %v times, want once", v)
	}
	if v := n.metric("warren_authz_dry_run_total", map[string]string{"policy": "shop/try", "authz_dry_run_action": "deny", "authz_dry_run_result": "denied"}); v != 1 {
		t.Errorf("the dry run is counted %v times, want once", v)
	}
}

// A pod that is an endpoint of the Service it asks for is half the time its own server, through the agent, and half the
// time another's client, which the kernel carries: both are reported under the Service's name.
func TestAServiceThatTheKernelCarriesIsReportedByItsName(t *testing.T) {
	l := shop(t)
	n := l.nodes["node-b"]
	from, to := l.pods["catalog-1"], l.pods["catalog-2"]
	n.kernelDecides(t)
	const tries = 60
	others := 0.0
	for i := range tries {
		c, err := from.dial(service(i%2 == 1))
		check(t, err)
		if got := addrPort(c.RemoteAddr()); got != service(i%2 == 1) {
			t.Errorf("the client sees the server as %s, want %s", got, service(i%2 == 1))
		}
		by, _, _, err := seen(c)
		check(t, err)
		if by == to.name {
			others++
		}
		c.Close()
	}
	if others < tries/6 || others > tries*5/6 {
		t.Errorf("%g of %d connections went to the other endpoint", others, tries)
	}
	labels := map[string]string{"connection_security_policy": "unknown", "source_principal": from.id.String(),
		"destination_service": catalogName.Hostname, "destination_service_name": "catalog", "destination_workload": "catalog"}
	for _, reporter := range reporters {
		labels["reporter"] = reporter
		eventually(t, reporter+" counts the connections of the Service", func() bool {
			return n.metric("istio_tcp_connections_closed_total", labels) == others
		})
	}
	line := map[string]any{"msg": "connection complete", "path": "kernel", "dst.service": catalogName.Hostname, "dst.addr": netip.AddrPortFrom(to.v4, appPort),
		"src.workload": from.name, "dst.workload": to.name}
	for _, direction := range []string{"outbound", "inbound"} {
		line["direction"] = direction
		n.log.find(t, line)
	}
	name := mesh.PolicyName{Namespace: "shop", Name: "nobody"}
	l.builder.PutPolicy(&mesh.Policy{Name: name, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{}}})
	l.commit()
	check(t, n.dp.SetPolicies(l.store.Load()))
	for range tries { // until the other one is drawn
		c, err := from.dial(service(false))
		if err != nil {
			break
		}
		c.Close()
	}
	n.log.find(t, map[string]any{"level": "ERROR", "direction": "outbound", "path": "kernel", "outcome": "policy_denied", "dst.service": catalogName.Hostname,
		"dst.addr": netip.AddrPortFrom(to.v4, appPort)})
}

func TestWhatTheKernelDeniesIsReported(t *testing.T) {
	l := shop(t)
	n := l.nodes["node-b"]
	from, to, outside := l.pods["catalog-1"], l.pods["catalog-2"], l.pods["outside"]
	name := mesh.PolicyName{Namespace: "shop", Name: "nobody"}
	l.builder.PutPolicy(&mesh.Policy{Name: name, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{}}})
	l.commit()
	n.kernelDecides(t)
	for _, p := range []*labPod{from, outside} {
		if c, err := p.dial(netip.AddrPortFrom(to.v4, appPort)); err == nil {
			c.Close()
			t.Errorf("%s was let in", p.name)
		}
	}
	for dir, src := range map[string]*labPod{"outbound": from, "inbound": from} {
		n.log.find(t, map[string]any{"level": "ERROR", "direction": dir, "path": "kernel", "outcome": "policy_denied", "src.workload": src.name,
			"src.identity": src.id, "dst.workload": to.name, "error": "deny_policy by policy shop/nobody"})
	}
	n.log.find(t, map[string]any{"level": "ERROR", "direction": "inbound", "path": "kernel", "outcome": "policy_denied", "dst.workload": to.name,
		"error": "deny_policy by policy shop/nobody"})
	for reporter, want := range map[string]float64{"source": 1, "destination": 2} {
		if v := n.metric("istio_tcp_connections_failed_total", map[string]string{"reporter": reporter, "response_flags": "DENY"}); v != want {
			t.Errorf("%s counts %v denied connections, want %v", reporter, v, want)
		}
	}
}

func TestADirectConnectionThatAPolicyEndsIsReportedAsSuch(t *testing.T) {
	l := newLab(t)
	n := l.nodes["node-b"]
	from, to := l.pods["catalog-1"], l.pods["catalog-2"]
	appEnd := make(chan error, 1)
	to.listen(appPort, func(c *net.TCPConn) { _, err := io.Copy(c, c); appEnd <- err })
	n.kernelDecides(t)
	c, err := from.dial(netip.AddrPortFrom(to.v4, appPort))
	check(t, err)
	defer c.Close()
	check(t, lives(c))
	l.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "nobody"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny, Rules: []mesh.Rule{{}}})
	l.commit()
	check(t, n.dp.SetPolicies(l.store.Load()))
	if err := untilEnd(c, plenty); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	if err := <-appEnd; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNABORTED) {
		t.Errorf("the application saw %v, want a reset", err)
	}
	for _, dir := range []string{"outbound", "inbound"} {
		n.log.find(t, map[string]any{"direction": dir, "path": "kernel", "outcome": "policy_revoked",
			"error": "a policy change ended the connection: deny_policy by policy shop/nobody"})
	}
}

func TestLinesAboutDenialsAreBounded(t *testing.T) {
	var b lineBudget
	now := time.Now()
	written := 0
	for range 1000 {
		if may, _ := b.allow(now); may {
			written++
		}
	}
	if written != denialBurst {
		t.Errorf("%d lines at once, want %d", written, denialBurst)
	}
	may, suppressed := b.allow(now.Add(time.Second))
	if !may || suppressed != 1000-denialBurst {
		t.Errorf("a second later: %v, and %d lines were left out; want true and %d", may, suppressed, 1000-denialBurst)
	}
}

func TestEveryMetricIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/telemetry.md")
	check(t, err)
	descs := make(chan *prometheus.Desc)
	go func() { NewMetrics().Describe(descs); close(descs) }()
	for d := range descs {
		name, _, _ := strings.Cut(strings.TrimPrefix(d.String(), `Desc{fqName: "`), `"`)
		if !strings.Contains(string(page), "`"+name+"`") {
			t.Errorf("docs/telemetry.md does not say what %s counts", name)
		}
	}
}
