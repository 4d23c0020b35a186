package proxy

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

func service(v6 bool) netip.AddrPort {
	if v6 {
		return netip.AddrPortFrom(catalogVIP6, catalogPort)
	}
	return netip.AddrPortFrom(catalogVIP4, catalogPort)
}

// shop is a lab whose catalog pods greet.
func shop(t *testing.T) *lab {
	l := newLab(t)
	for _, name := range []string{"catalog-1", "catalog-2"} {
		p := l.pods[name]
		p.listen(appPort, p.greet)
	}
	return l
}

func TestConnectionCrossesNodesUnderTheClientsIdentity(t *testing.T) {
	l := shop(t)
	ui := l.pods["ui"]
	for _, tc := range []struct {
		name string
		dst  netip.AddrPort
	}{
		{"Service, IPv4", service(false)},
		{"Service, IPv6", service(true)},
		{"pod, IPv4", netip.AddrPortFrom(l.pods["catalog-1"].v4, appPort)},
		{"pod, IPv6", netip.AddrPortFrom(l.pods["catalog-2"].v6, appPort)},
		{"pod of the same node", netip.AddrPort{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client := ui
			if !tc.dst.IsValid() {
				client, tc.dst = l.pods["catalog-1"], netip.AddrPortFrom(l.pods["catalog-2"].v4, appPort)
			}
			for range 20 {
				c, err := client.dial(tc.dst)
				check(t, err)
				if got := addrPort(c.RemoteAddr()); got != tc.dst {
					t.Errorf("the client sees the server as %s, want %s", got, tc.dst)
				}
				by, local, remote, err := seen(c)
				check(t, err)
				if want := addrPort(c.LocalAddr()); remote != want {
					t.Errorf("%s sees the client as %s, want %s", by, remote, want)
				}
				if local.Addr() != l.pods[by].v4 && local.Addr() != l.pods[by].v6 {
					t.Errorf("%s sees itself as %s", by, local)
				}
				c.Close()
			}
		})
	}
}

func TestAPodReachesItselfThroughItsService(t *testing.T) {
	l := shop(t)
	c1 := l.pods["catalog-1"]
	own := 0
	for range 40 {
		c, err := c1.dial(service(false))
		check(t, err)
		by, _, remote, err := seen(c)
		check(t, err)
		if by == "catalog-1" {
			own++
		}
		if remote.Addr() != c1.v4 {
			t.Errorf("%s sees %s, want %s", by, remote.Addr(), c1.v4)
		}
		c.Close()
	}
	if own == 0 || own == 40 {
		t.Errorf("%d of 40 connections came back to the pod itself", own)
	}
}

func TestEveryConnectionIsLoggedAndCountedOnBothNodes(t *testing.T) {
	l := shop(t)
	c, err := l.pods["ui"].dial(service(false))
	check(t, err)
	by, _, _, err := seen(c)
	check(t, err)
	const sent = 100_000
	go c.Write(make([]byte, sent))
	_, err = io.ReadFull(c, make([]byte, sent))
	check(t, err)
	a, b := l.nodes["node-a"], l.nodes["node-b"]

	greeting := len(fmt.Sprintf("%s %s:%d %s\n", by, l.pods[by].v4, appPort, addrPort(c.LocalAddr())))
	want := map[string]string{
		"source_workload": "ui", "source_canonical_service": "ui", "source_canonical_revision": "v1", "source_workload_namespace": "shop",
		"source_principal": "spiffe://cluster.local/ns/shop/sa/ui", "source_app": "ui", "source_version": "v1", "source_cluster": "test",
		"destination_service": catalogName.Hostname, "destination_service_namespace": "shop", "destination_service_name": "catalog",
		"destination_workload": "catalog", "destination_canonical_service": "catalog", "destination_canonical_revision": "v1",
		"destination_workload_namespace": "shop", "destination_principal": "spiffe://cluster.local/ns/shop/sa/catalog",
		"destination_app": "catalog", "destination_version": "v1", "destination_cluster": "test",
		"request_protocol": "tcp", "response_flags": "-", "connection_security_policy": "mutual_tls",
	}
	metric := func(n *labNode, reporter, name string, v float64) {
		t.Helper()
		want["reporter"] = reporter
		eventually(t, fmt.Sprintf("%s{reporter=%s} is %v", name, reporter, v), func() bool { return n.metric(name, want) == v })
	}
	// While it is open: the bytes are there already.
	for reporter, n := range map[string]*labNode{"source": a, "destination": b} {
		metric(n, reporter, "istio_tcp_connections_opened_total", 1)
		metric(n, reporter, "istio_tcp_connections_closed_total", 0)
		metric(n, reporter, "istio_tcp_received_bytes_total", sent)
		metric(n, reporter, "istio_tcp_sent_bytes_total", float64(sent+greeting))
	}
	c.Close()
	for reporter, n := range map[string]*labNode{"source": a, "destination": b} {
		metric(n, reporter, "istio_tcp_connections_closed_total", 1)
		metric(n, reporter, "istio_tcp_received_bytes_total", sent)
		metric(n, reporter, "istio_tcp_connections_failed_total", 0)
	}

	client := addrPort(c.LocalAddr()).String()
	tunnel, app := netip.AddrPortFrom(l.pods[by].v4, HBONEPort).String(), netip.AddrPortFrom(l.pods[by].v4, appPort).String()
	common := map[string]any{
		"level": "INFO", "msg": "connection complete", "src.addr": client, "src.workload": "ui", "src.namespace": "shop",
		"src.identity": "spiffe://cluster.local/ns/shop/sa/ui", "dst.addr": tunnel, "dst.hbone_addr": app, "dst.service": catalogName.Hostname,
		"dst.workload": by, "dst.namespace": "shop", "dst.identity": "spiffe://cluster.local/ns/shop/sa/catalog",
	}
	common["direction"], common["bytes_sent"], common["bytes_recv"] = "outbound", sent, sent+greeting
	line := a.log.find(t, common)
	if d, _ := line["duration"].(string); !strings.HasSuffix(d, "ms") {
		t.Errorf("duration is %q", d)
	}
	common["direction"], common["bytes_sent"], common["bytes_recv"] = "inbound", sent+greeting, sent
	b.log.find(t, common)
}

func TestPlaintextFromOutsideReachesAPermissivePod(t *testing.T) {
	l := shop(t)
	out, cat := l.pods["outside"], l.pods["catalog-1"]
	for _, dst := range []netip.AddrPort{netip.AddrPortFrom(cat.v4, appPort), netip.AddrPortFrom(cat.v6, appPort)} {
		c, err := out.dial(dst)
		check(t, err)
		_, local, remote, err := seen(c)
		check(t, err)
		if local != dst || remote.Addr() != addrPort(c.LocalAddr()).Addr() {
			t.Errorf("the application sees %s from %s, want %s from %s", local, remote, dst, c.LocalAddr())
		}
		c.Close()
		l.nodes["node-b"].log.find(t, map[string]any{"direction": "inbound", "src.addr": addrPort(c.LocalAddr()), "dst.addr": dst, "msg": "connection complete"})
	}
	if n := l.nodes["node-b"].metric("istio_tcp_connections_opened_total", map[string]string{"connection_security_policy": "unknown", "source_principal": "unknown"}); n != 2 {
		t.Errorf("%v connections counted without identity, want 2", n)
	}
}

// strict is what the control plane makes of PeerAuthentication STRICT.
func strict() *mesh.Policy {
	return &mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "istio_converted_static_strict"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{NotPrincipals: []mesh.StringMatch{{Kind: mesh.MatchPresence}}}}}}}}}
}

func TestStrictRefusesPlaintextAndLetsTheMeshIn(t *testing.T) {
	l := shop(t)
	l.builder.PutPolicy(strict())
	l.commit()
	cat := l.pods["catalog-1"]
	c, err := l.pods["outside"].dial(netip.AddrPortFrom(cat.v4, appPort))
	if err == nil {
		if _, _, _, err := seen(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("a plaintext client got %v, want a reset", err)
		}
		c.Close()
	}
	l.nodes["node-b"].log.find(t, map[string]any{"level": "ERROR", "direction": "inbound", "outcome": "policy_denied",
		"error": "deny_policy by policy shop/istio_converted_static_strict"})
	if n := l.nodes["node-b"].metric("istio_tcp_connections_failed_total", map[string]string{"response_flags": "DENY"}); n != 1 {
		t.Errorf("%v connections counted as denied, want 1", n)
	}
	c, err = l.pods["ui"].dial(service(false))
	check(t, err)
	_, _, _, err = seen(c)
	check(t, err)
	c.Close()
}

// The API server has no identity to show and calls webhooks all the same: STRICT excepts its address, on their port.
func TestAnExceptionFromStrictForAnAddressIsSeen(t *testing.T) {
	l := shop(t)
	out, cat, n := l.pods["outside"], l.pods["catalog-1"], l.nodes["node-b"]
	p := strict()
	p.Rules = nil
	for _, m := range []mesh.Match{{NotDestinationPorts: []uint16{appPort}}, {DestinationPorts: []uint16{appPort}, NotSourceIPs: []netip.Prefix{netip.PrefixFrom(out.v4, 32)}}} {
		m.NotPrincipals = []mesh.StringMatch{{Kind: mesh.MatchPresence}}
		p.Rules = append(p.Rules, mesh.Rule{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}})
	}
	l.builder.PutPolicy(p)
	l.commit()
	cat.listen(appPort+1, cat.greet)
	try := func(dst netip.AddrPort) error {
		c, err := out.dial(dst)
		if err != nil {
			return err
		}
		defer c.Close()
		_, _, _, err = seen(c)
		return err
	}
	check(t, try(netip.AddrPortFrom(cat.v4, appPort)))
	n.log.find(t, map[string]any{"level": "INFO", "direction": "inbound", "authz.exception": p.Name, "dst.addr": netip.AddrPortFrom(cat.v4, appPort)})
	if v := n.metric("warren_authz_exceptions_total", map[string]string{"policy": p.Name.String()}); v != 1 {
		t.Errorf("the exception is counted %v times, want once", v)
	}
	for what, dst := range map[string]netip.AddrPort{"another port": netip.AddrPortFrom(cat.v4, appPort+1), "another address": netip.AddrPortFrom(cat.v6, appPort)} {
		if err := try(dst); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v, want a reset", what, err)
		}
	}
}

func TestAPolicyChangeResetsWhatItNoLongerAllows(t *testing.T) {
	l := shop(t)
	var kept, lost *net.TCPConn
	for name, c := range map[string]**net.TCPConn{"ui": &lost, "load": &kept} {
		var err error
		*c, err = l.pods[name].dial(service(false))
		check(t, err)
		_, _, _, err = seen(*c)
		check(t, err)
		defer (*c).Close()
	}
	l.builder.PutPolicy(&mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: "no-ui"}, Scope: mesh.ScopeNamespace, Action: mesh.Deny,
		Rules: []mesh.Rule{{Clauses: []mesh.Clause{{Matches: []mesh.Match{{Principals: []mesh.StringMatch{{Value: "cluster.local/ns/shop/sa/ui"}}}}}}}}})
	l.commit()
	lost.SetReadDeadline(time.Now().Add(plenty))
	if _, err := lost.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection that is denied now got %v, want a reset", err)
	}
	l.nodes["node-b"].log.find(t, map[string]any{"direction": "inbound", "outcome": "policy_revoked", "src.workload": "ui"})
	kept.Write([]byte("x"))
	kept.SetReadDeadline(time.Now().Add(plenty))
	if _, err := io.ReadFull(kept, make([]byte, 1)); err != nil {
		t.Errorf("the connection that is still allowed: %v", err)
	}
	c, err := l.pods["ui"].dial(service(false))
	if err == nil { // else the reset was faster than the dialler
		_, _, _, err = seen(c)
		c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a new connection of the denied client got %v, want a reset", err)
	}
	l.nodes["node-a"].log.find(t, map[string]any{"direction": "outbound", "outcome": "policy_denied", "src.workload": "ui"})
}

func TestAnEndpointThatRefusesIsReplacedByAnotherBeforeAnyByte(t *testing.T) {
	l := newLab(t)
	cat := l.pods["catalog-2"]
	cat.listen(appPort, cat.greet) // catalog-1 has no listener
	for range 30 {
		c, err := l.pods["ui"].dial(service(false))
		check(t, err)
		by, _, _, err := seen(c)
		check(t, err)
		if by != "catalog-2" {
			t.Errorf("served by %s", by)
		}
		c.Close()
	}
	if n := l.nodes["node-a"].metric("warren_failovers_total", map[string]string{"result": "tried"}); n < 5 {
		t.Errorf("%v connections failed over, want about 15", n)
	}
}

func TestAConnectionThatNobodyTakesIsReset(t *testing.T) {
	l := newLab(t)
	for _, dst := range []netip.AddrPort{service(false), service(true), netip.AddrPortFrom(l.pods["catalog-1"].v4, appPort)} {
		c, err := l.pods["ui"].dial(dst)
		if err == nil {
			_, _, _, err = seen(c)
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, want a reset", dst, err)
		}
	}
	l.nodes["node-a"].log.find(t, map[string]any{"direction": "outbound", "outcome": "app_refused", "level": "ERROR"})
	l.nodes["node-b"].log.find(t, map[string]any{"direction": "inbound", "outcome": "app_refused"})
	eventually(t, "3 connections are counted as failed", func() bool { // which happens after the reset
		return l.nodes["node-a"].metric("istio_tcp_connections_failed_total", map[string]string{"response_flags": "CONNECT"}) == 3
	})
}

func TestTCPsManners(t *testing.T) {
	l := newLab(t)
	cat := l.pods["catalog-1"]
	dst := netip.AddrPortFrom(cat.v4, appPort)
	app := make(chan *net.TCPConn)
	cat.listen(appPort, func(c *net.TCPConn) {
		app <- c
		<-app
	})
	// both returns the two applications' ends of one connection.
	both := func(t *testing.T) (client, server *net.TCPConn) {
		client, err := l.pods["ui"].dial(dst)
		check(t, err)
		server = <-app
		t.Cleanup(func() { client.Close(); server.Close(); app <- nil })
		for _, c := range []*net.TCPConn{client, server} {
			c.SetDeadline(time.Now().Add(plenty))
		}
		return client, server
	}
	t.Run("the server speaks first", func(t *testing.T) {
		client, server := both(t)
		io.WriteString(server, "220 hello")
		b := make([]byte, 9)
		_, err := io.ReadFull(client, b)
		check(t, err)
	})
	t.Run("the client's half-close leaves the other half open", func(t *testing.T) {
		client, server := both(t)
		io.WriteString(client, "question")
		client.CloseWrite()
		q, err := io.ReadAll(server)
		check(t, err)
		io.WriteString(server, "answer to "+string(q))
		server.Close()
		a, err := io.ReadAll(client)
		check(t, err)
		if string(a) != "answer to question" {
			t.Errorf("got %q", a)
		}
	})
	t.Run("the server's half-close leaves the other half open", func(t *testing.T) {
		client, server := both(t)
		server.CloseWrite()
		_, err := io.ReadAll(client)
		check(t, err)
		io.WriteString(client, "still here")
		client.Close()
		b, err := io.ReadAll(server)
		check(t, err)
		if string(b) != "still here" {
			t.Errorf("got %q", b)
		}
	})
	t.Run("the client's reset is a reset", func(t *testing.T) {
		client, server := both(t)
		abort(client)
		if _, err := server.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server got %v", err)
		}
	})
	t.Run("the server's reset is a reset", func(t *testing.T) {
		client, server := both(t)
		abort(server)
		if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client got %v", err)
		}
	})
	t.Run("a reader that does not read holds the writer back", func(t *testing.T) {
		client, server := both(t)
		client.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := io.Copy(client, io.LimitReader(zeros{}, 1<<30))
		if err == nil {
			t.Fatalf("1 GiB went out and nobody read it")
		}
		client.CloseWrite()
		got, err := io.Copy(io.Discard, server)
		check(t, err)
		if got != n {
			t.Errorf("%d bytes written, %d read", n, got)
		}
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestManyConnectionsAtOnce(t *testing.T) {
	l := shop(t)
	const total, parallel = 2000, 32
	var wrong sync.Map
	var wg sync.WaitGroup
	work := make(chan int)
	for range parallel {
		wg.Go(func() {
			for i := range work {
				dst := service(i%2 == 0)
				c, err := l.pods["ui"].dial(dst)
				if err != nil {
					wrong.Store(i, err.Error())
					continue
				}
				_, _, remote, err := seen(c)
				if err != nil || remote.Addr() != addrPort(c.LocalAddr()).Addr() {
					wrong.Store(i, fmt.Sprintf("%v %v", remote, err))
				}
				c.Close()
			}
		})
	}
	for i := range total {
		work <- i
	}
	close(work)
	wg.Wait()
	n := 0
	wrong.Range(func(k, v any) bool {
		if n++; n < 5 {
			t.Logf("connection %v: %v", k, v)
		}
		return true
	})
	if n > 0 {
		t.Errorf("%d of %d connections went wrong", n, total)
	}
}

// TestBudgetOfAnIdleConnection holds what one open connection costs, both agents together: they and the
// applications are in this process, so the applications' share is measured without a mesh and taken off.
func TestBudgetOfAnIdleConnection(t *testing.T) {
	l := newLab(t)
	cat := l.pods["catalog-1"]
	hold := make(chan struct{})
	cat.listen(appPort, func(c *net.TCPConn) { <-hold })
	defer close(hold)
	const conns = 500
	open := func(from *labPod) (goroutines int, bytes int64) {
		var before, after runtime.MemStats
		settle(&before)
		g := runtime.NumGoroutine()
		var all []*net.TCPConn
		for range conns {
			c, err := from.dial(netip.AddrPortFrom(cat.v4, appPort))
			check(t, err)
			all = append(all, c)
		}
		eventually(t, "the connections are there", func() bool { return l.nodes["node-b"].proxy.conns.len() >= conns })
		settle(&after)
		goroutines = runtime.NumGoroutine() - g
		bytes = int64(after.HeapAlloc+after.StackInuse) - int64(before.HeapAlloc+before.StackInuse)
		for _, c := range all {
			defer c.Close()
		}
		return goroutines, bytes
	}
	g, b := open(l.pods["ui"])
	t.Logf("one idle connection: %.2f goroutines, %d bytes of heap and stack, the applications' included", float64(g)/conns, b/conns)
	// One is the server application's. The agents have none, but for those that wait for new connections.
	if per := float64(g) / conns; per > 1.3 {
		t.Errorf("%.2f goroutines a connection, want at most 1", per)
	}
	if per := b / conns; per > 16<<10 && !raceEnabled { // the race detector keeps shadows of its own
		t.Errorf("%d bytes a connection, want at most 16 KiB", per)
	}
}

func settle(m *runtime.MemStats) {
	time.Sleep(50 * time.Millisecond)
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(m)
}

func TestAConnectionWaitsForItsPodToBeKnown(t *testing.T) {
	l := shop(t)
	l.builder.DeleteWorkload("test//Pod/shop/ui")
	l.commit()
	const late = 300 * time.Millisecond
	start := time.Now()
	time.AfterFunc(late, func() {
		l.builder.PutWorkload(l.workload("ui"))
		l.commit()
	})
	c, err := l.pods["ui"].dial(service(false))
	check(t, err)
	defer c.Close()
	_, _, _, err = seen(c)
	check(t, err)
	if d := time.Since(start); d < late {
		t.Errorf("answered after %s, before the pod was known", d)
	}
}
