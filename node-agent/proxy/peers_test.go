package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// renew signs new certificates for all pods, valid for a while under the given roots, and tells the proxies.
func (l *lab) renew(valid time.Duration, anchors []byte) {
	now := time.Now()
	bundles := map[mesh.Identity]*identity.Bundle{}
	for _, p := range l.pods {
		if bundles[p.id] == nil {
			bundles[p.id] = l.ca.sign(p.id, now.Add(-time.Minute), now.Add(valid), anchors)
		}
	}
	l.ca.mu.Lock()
	l.ca.bundles = bundles
	l.ca.mu.Unlock()
	for _, n := range l.nodes {
		for id := range bundles {
			n.proxy.Renewed(id)
		}
	}
}

// open opens a connection through a tunnel of the test's own and sees the application answer.
func openStream(t *testing.T, client *hbone.Client, p *labPod) *hbone.Stream {
	t.Helper()
	st, _, err := client.Open(context.Background(), hbone.Request{Authority: netip.AddrPortFrom(p.v4, appPort).String()})
	check(t, err)
	by, _, _, err := seen(st)
	check(t, err)
	if by != p.name {
		t.Fatalf("served by %s", by)
	}
	return st
}

// lives reports whether a byte comes back.
func lives(c net.Conn) error {
	c.SetDeadline(time.Now().Add(plenty))
	defer c.SetDeadline(time.Time{})
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// untilEnd waits until nothing can be read from a connection any more.
func untilEnd(c net.Conn, limit time.Duration) error {
	c.SetReadDeadline(time.Now().Add(limit))
	_, err := c.Read(make([]byte, 1))
	return err
}

func TestATunnelEndsWithItsPeersCertificate(t *testing.T) {
	l := newLab(t)
	cat := l.pods["catalog-1"]
	appEnd := make(chan error, 1000) // one for each connection
	cat.listen(appPort, func(c *net.TCPConn) {
		fmt.Fprintf(c, "%s %s %s\n", cat.name, addrPort(c.LocalAddr()), addrPort(c.RemoteAddr()))
		_, err := io.Copy(c, c)
		appEnd <- err
	})
	now := time.Now().Truncate(time.Second) // certificates know no less
	brief, long := l.ca.sign(stranger, now.Add(-time.Minute), now.Add(4*time.Second), nil), l.ca.sign(stranger, now.Add(-time.Minute), now.Add(time.Hour), nil)
	client, err := l.tunnelTo(cat, brief)
	check(t, err)
	st := openStream(t, client, cat)
	check(t, lives(st))
	if err := untilEnd(st, plenty); err == nil || isTimeout(err) {
		t.Errorf("after the end of the certificate: %v", err)
	}
	if early := time.Until(now.Add(4 * time.Second)); early > 0 {
		t.Errorf("the connection ended %s before the certificate", early)
	}
	if err := <-appEnd; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the application saw %v, want a reset", err)
	}
	l.nodes["node-b"].log.find(t, map[string]any{"direction": "inbound", "outcome": "peer_untrusted", "src.identity": stranger.String()})
	eventually(t, "no tunnel is left", func() bool { return l.nodes["node-b"].proxy.peers.len() == 0 })

	t.Run("and takes no new connections shortly before", func(t *testing.T) {
		now := time.Now().Truncate(time.Second)
		client, err := l.tunnelTo(cat, l.ca.sign(stranger, now.Add(-time.Minute), now.Add(5*time.Second), nil))
		check(t, err)
		st := openStream(t, client, cat)
		for refused := false; !refused; time.Sleep(20 * time.Millisecond) {
			if time.Since(now) > 5*time.Second {
				t.Fatal("the certificate has ended and the client was not told to make another tunnel")
			}
			other, _, err := client.Open(context.Background(), hbone.Request{Authority: netip.AddrPortFrom(cat.v4, appPort).String()})
			if refused = err != nil; !refused {
				other.Close()
			}
		}
		if time.Since(now) < 3*time.Second {
			t.Errorf("new connections were refused after %s of 5 s", time.Since(now))
		}
		check(t, lives(st)) // what is open goes on until the end
		if err := untilEnd(st, plenty); err == nil || isTimeout(err) {
			t.Errorf("after the end of the certificate: %v", err)
		}
	})
	t.Run("unless the peer has shown a newer one", func(t *testing.T) {
		now := time.Now().Truncate(time.Second)
		client, err := l.tunnelTo(cat, l.ca.sign(stranger, now.Add(-time.Minute), now.Add(4*time.Second), nil))
		check(t, err)
		st := openStream(t, client, cat)
		_, err = l.tunnelTo(cat, long)
		check(t, err)
		for time.Since(now) < 5*time.Second {
			check(t, lives(st))
			time.Sleep(100 * time.Millisecond)
		}
	})
}

func TestAConnectionOutlivesTheCertificatesItWasMadeUnder(t *testing.T) {
	l := shop(t)
	const valid = 8 * time.Second
	l.renew(valid, nil)
	c, err := l.pods["ui"].dial(service(false))
	check(t, err)
	defer c.Close()
	_, _, _, err = seen(c)
	check(t, err)
	for range 5 {
		end := time.Now().Add(valid / 4)
		for time.Now().Before(end) {
			if err := lives(c); err != nil {
				t.Fatalf("%v; certificates of %s are renewed at a quarter of that", err, valid)
			}
			time.Sleep(50 * time.Millisecond)
		}
		l.renew(valid, nil)
	}
	// Nobody renews any more: then it ends on both sides.
	if err := untilEnd(c, 2*valid+plenty); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("without new certificates: %v, want a reset", err)
	}
	eventually(t, "nothing is left of the tunnels", func() bool {
		p := l.nodes["node-a"].proxy.peers
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.peers)+len(p.renew)+len(p.tunnels)+len(p.outbound) == 0
	})
}

func TestAConnectionEndsWithTheRootOfItsPeer(t *testing.T) {
	l := shop(t)
	cat, node := l.pods["catalog-1"], l.nodes["node-b"]
	other := newTestCA(t, "cluster.local")
	both := append(append([]byte{}, l.ca.pem...), other.pem...)
	l.renew(time.Hour, both)
	now := time.Now()
	client, err := l.tunnelTo(cat, other.sign(stranger, now.Add(-time.Minute), now.Add(time.Hour), both))
	check(t, err)
	st := openStream(t, client, cat)
	defer st.Close()
	kept, err := l.pods["ui"].dial(netip.AddrPortFrom(cat.v4, appPort))
	check(t, err)
	defer kept.Close()
	_, _, _, err = seen(kept)
	check(t, err)

	l.renew(time.Hour, l.ca.pem)
	changed := time.Now()
	if err := untilEnd(st, plenty); err == nil || isTimeout(err) {
		t.Errorf("after the root was dropped: %v", err)
	}
	t.Logf("ended %s after the root was dropped", time.Since(changed))
	node.log.find(t, map[string]any{"direction": "inbound", "outcome": "peer_untrusted", "src.identity": stranger.String()})
	if err := lives(kept); err != nil {
		t.Errorf("the connection under the root that stays: %v", err)
	}
	if n := node.metric("istio_tcp_connections_closed_total", map[string]string{"response_flags": "TLS_FAILURE"}); n != 1 {
		t.Errorf("%v connections counted as ended for want of trust, want 1", n)
	}
}

func TestAConnectionEndsWithTheRootOfItsServer(t *testing.T) {
	l := shop(t)
	cat := l.pods["catalog-1"]
	other := newTestCA(t, "cluster.local")
	both := append(append([]byte{}, l.ca.pem...), other.pem...)
	l.renew(time.Hour, both)
	now := time.Now()
	set := func(id mesh.Identity, b *identity.Bundle) {
		l.ca.mu.Lock()
		l.ca.bundles[id] = b
		l.ca.mu.Unlock()
	}
	set(cat.id, other.sign(cat.id, now.Add(-time.Minute), now.Add(time.Hour), both))
	c, err := l.pods["ui"].dial(netip.AddrPortFrom(cat.v4, appPort))
	check(t, err)
	defer c.Close()
	_, _, _, err = seen(c)
	check(t, err)
	ui := l.pods["ui"].id

	// The server has a certificate below the root that stays: it is asked for it, and the connection goes on.
	set(cat.id, l.ca.sign(cat.id, now.Add(-time.Minute), now.Add(2*time.Hour), both))
	set(ui, l.ca.sign(ui, now.Add(-time.Minute), now.Add(time.Hour), l.ca.pem))
	l.nodes["node-a"].proxy.TrustChanged()
	time.Sleep(secondChance + 200*time.Millisecond)
	if err := lives(c); err != nil {
		t.Fatalf("the server has a certificate that is trusted: %v", err)
	}

	// Now it has none.
	set(cat.id, other.sign(cat.id, now.Add(-time.Minute), now.Add(3*time.Hour), both))
	set(ui, other.sign(ui, now.Add(-time.Minute), now.Add(time.Hour), newTestCA(t, "cluster.local").pem))
	l.nodes["node-a"].proxy.TrustChanged()
	if err := untilEnd(c, plenty); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a server that nobody trusts: %v, want a reset", err)
	}
	l.nodes["node-a"].log.find(t, map[string]any{"direction": "outbound", "outcome": "peer_untrusted"})
}

func TestAConnectionEndsWithTheTrustDomainOfItsPeer(t *testing.T) {
	l := shop(t)
	cat := l.pods["catalog-1"]
	cfg := mesh.Config{TrustDomain: "cluster.local", TrustDomainAliases: []string{"old.mesh"}, Cluster: "test"}
	l.builder.SetConfig(cfg)
	l.commit()
	now := time.Now()
	old := mesh.Identity{TrustDomain: "old.mesh", Namespace: "elsewhere", ServiceAccount: "stranger"}
	client, err := l.tunnelTo(cat, l.ca.sign(old, now.Add(-time.Minute), now.Add(time.Hour), nil))
	check(t, err)
	st := openStream(t, client, cat)
	cfg.TrustDomainAliases = nil
	l.builder.SetConfig(cfg)
	l.commit()
	if err := untilEnd(st, plenty); err == nil || isTimeout(err) {
		t.Errorf("after its trust domain left the mesh: %v", err)
	}
}
