package proxy

import (
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/tap"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// Under REGISTRY_ONLY a pod is reset at once by what the mesh does not know: counted, logged and told of by a word of its
// own. What a ServiceEntry declares it reaches without the agent, and what was open goes on.
func TestRegistryOnly(t *testing.T) {
	l := shop(t)
	ui, outside := l.pods["ui"], l.pods["outside"]
	outside.listen(appPort, outside.greet)
	targets := []netip.AddrPort{netip.AddrPortFrom(outside.v4, appPort), netip.AddrPortFrom(outside.v6, appPort)}
	change := func(only bool, declared ...mesh.NetAddr) {
		t.Helper()
		l.builder.SetConfig(mesh.Config{TrustDomain: "cluster.local", Cluster: "test", RegistryOnly: only})
		name := mesh.ServiceName{Namespace: "shop", Hostname: "declared.example"}
		l.builder.DeleteService(name)
		if len(declared) > 0 {
			l.builder.PutService(&mesh.Service{Name: name, VIPs: declared, Ports: []mesh.ServicePort{{Port: appPort, Target: appPort}},
				LB: mesh.LoadBalancing{Mode: mesh.LBPassthrough}})
		}
		l.commit()
		for _, n := range l.nodes {
			check(t, n.dp.SetDestinations(datapath.Desired(l.store.Load(), "")))
		}
	}
	passed := func() float64 { return ui.node.metric("istio_tcp_connections_opened_total", nil) }
	reach := func() {
		t.Helper()
		before := passed()
		for _, dst := range targets {
			c, err := ui.dial(dst)
			check(t, err)
			_, _, _, err = seen(c)
			check(t, err)
			c.Close()
		}
		if n := passed() - before; n != 0 {
			t.Errorf("the agent has carried %v connections to what the mesh knows", n)
		}
	}

	reach()
	open, err := ui.dial(targets[0])
	check(t, err)
	_, _, _, err = seen(open)
	check(t, err)

	change(true)
	events := ui.node.look(tap.Filter{Verdict: "denied"})
	refused := map[string]string{"outcome": "not_in_registry", "reporter": "source"}
	for i, dst := range targets {
		start := time.Now()
		c, err := ui.dial(dst)
		if err == nil { // the agent's listener has accepted it before it could be decided
			_, _, _, err = seen(c)
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) || time.Since(start) > 5*time.Second {
			t.Errorf("%s: %v after %s, want a reset at once", dst, err, time.Since(start))
		}
		e := next(t, events)
		if e.What != tap.Failed || !e.Denied() || e.Outcome != "not_in_registry" || e.Asked != dst || e.Source.Pod != ui.name || !strings.Contains(e.Error, "ServiceEntry") {
			t.Errorf("%s is told of as %+v", dst, e)
		}
		eventually(t, "the connections to be counted as refused", func() bool {
			return ui.node.metric("warren_connections_total", refused) == float64(i+1)
		})
	}
	eventually(t, "two failed connections under DENY", func() bool {
		return ui.node.metric("istio_tcp_connections_failed_total", map[string]string{"response_flags": "DENY", "reporter": "source"}) == 2
	})
	eventually(t, "a line of the log for each", func() bool {
		log := ui.node.log.String()
		return strings.Count(log, `"outcome":"not_in_registry"`) == 2 && strings.Count(log, `"dst.addr":"`+targets[0].String()) == 1
	})
	if err := lives(open); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	c, err := ui.dial(service(false))
	check(t, err)
	_, _, _, err = seen(c)
	check(t, err)
	c.Close()

	change(true, mesh.NetAddr{Addr: outside.v4}, mesh.NetAddr{Addr: outside.v6})
	reach()
	change(true)
	if c, err := ui.dial(targets[0]); err == nil {
		if _, _, _, err = seen(c); err == nil {
			t.Error("what is not declared any more is reached")
		}
		c.Close()
	}
	change(false)
	reach()
}
