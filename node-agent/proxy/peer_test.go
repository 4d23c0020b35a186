package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

var stranger = mesh.Identity{TrustDomain: "cluster.local", Namespace: "elsewhere", ServiceAccount: "stranger"}

// tunnelTo speaks HBONE with a pod from the machine outside, under a certificate of the test's making.
func (l *lab) tunnelTo(p *labPod, b *identity.Bundle) (*hbone.Client, error) {
	c, err := l.pods["outside"].dial(netip.AddrPortFrom(p.v4, HBONEPort))
	check(l.t, err)
	l.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(plenty))
	tc := tls.Client(c, b.ClientTLS([]string{p.id.String()}))
	if err := tc.Handshake(); err != nil {
		return nil, err
	}
	c.SetDeadline(time.Time{})
	client := hbone.NewClient(tc, hbone.ClientConfig{})
	l.t.Cleanup(func() { client.Close() })
	return client, nil
}

func TestAConnectForAnythingButThePodIsRefused(t *testing.T) {
	l := shop(t)
	cat, other := l.pods["catalog-1"], l.pods["catalog-2"]
	now := time.Now()
	client, err := l.tunnelTo(cat, l.ca.sign(stranger, now.Add(-time.Minute), now.Add(time.Hour), nil))
	check(t, err)
	for _, authority := range []string{
		netip.AddrPortFrom(other.v4, appPort).String(), netip.AddrPortFrom(l.pods["ui"].v4, appPort).String(), // another pod
		"127.0.0.1:8080", "[::1]:8080", "0.0.0.0:8080", "[::]:8080", "localhost:8080", "169.254.169.254:80",
		service(false).String(), "catalog.shop.svc.cluster.local:80",
		"[::ffff:" + cat.v4.String() + "]:8080", "[" + cat.v6.String() + "%eth0]:8080",
		cat.v4.String() + ":0", cat.v4.String() + ":15001", cat.v4.String() + ":15006", cat.v4.String() + ":15008",
		cat.v4.String(), cat.v4.String() + ":http", cat.v4.String() + ":65536", ":8080", "",
	} {
		ctx, cancel := context.WithTimeout(context.Background(), plenty)
		st, _, err := client.Open(ctx, hbone.Request{Authority: authority})
		cancel()
		var open *hbone.OpenError
		if !errors.As(err, &open) || open.Status != 0 && open.Status != 400 {
			t.Errorf("CONNECT %q: %v, want 400", authority, err)
		}
		if st != nil {
			st.Close()
		}
	}
	st, _, err := client.Open(context.Background(), hbone.Request{Authority: netip.AddrPortFrom(cat.v4, appPort).String()})
	check(t, err)
	st.Close()
	if n := l.nodes["node-b"].metric("warren_connections_total", map[string]string{"outcome": "request_invalid", "reporter": "destination"}); n < 15 {
		t.Errorf("%v requests counted as invalid", n)
	}
	for _, why := range []string{
		"authority 127.0.0.1:8080 is not an address of this pod", "authority 169.254.169.254:80 is not an address of this pod",
		"authority [::ffff:" + cat.v4.String() + "]:8080 is not an address of this pod",
		"authority " + cat.v4.String() + ":15008 has a port that no application may have",
		`authority "localhost:8080" is not an address and port`,
	} {
		l.nodes["node-b"].log.find(t, map[string]any{"msg": "connection failed", "direction": "inbound", "outcome": "request_invalid", "error": why})
	}
}

func TestAPeerThatCannotProveItselfIsRefused(t *testing.T) {
	l := shop(t)
	cat := l.pods["catalog-1"]
	now := time.Now()
	foreign := newTestCA(t, "cluster.local")
	for _, tc := range []struct {
		name   string
		bundle *identity.Bundle
		reason string
	}{
		{"trust domain of another mesh", l.ca.sign(mesh.Identity{TrustDomain: "other.mesh", Namespace: "shop", ServiceAccount: "ui"},
			now.Add(-time.Minute), now.Add(time.Hour), nil), identity.ReasonTrustDomain},
		{"expired", l.ca.sign(stranger, now.Add(-time.Hour), now.Add(-time.Minute), nil), identity.ReasonExpired},
		{"not valid yet", l.ca.sign(stranger, now.Add(time.Hour), now.Add(2*time.Hour), nil), identity.ReasonNotYetValid},
		{"signed by another CA", foreign.sign(stranger, now.Add(-time.Minute), now.Add(time.Hour), l.ca.pem), identity.ReasonUnknownCA},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client, err := l.tunnelTo(cat, tc.bundle)
			if err == nil {
				ctx, cancel := context.WithTimeout(context.Background(), plenty)
				defer cancel()
				_, _, err = client.Open(ctx, hbone.Request{Authority: netip.AddrPortFrom(cat.v4, appPort).String()})
			}
			if err == nil {
				t.Error("it was let in")
			}
			want := map[string]string{"reporter": "destination", "reason": tc.reason}
			eventually(t, "the refusal is counted as "+tc.reason, func() bool {
				return l.nodes["node-b"].metric("warren_tls_failures_total", want) >= 1
			})
			l.nodes["node-b"].log.find(t, map[string]any{"msg": "connection failed", "outcome": "tls_failed", "direction": "inbound"})
		})
	}
}

func TestAServerUnderAnotherIdentityIsNotTalkedTo(t *testing.T) {
	l := shop(t)
	// What a pod would present that has got the address of a catalog pod while this node still believes the old one there.
	w := *l.workload("catalog-1")
	w.Identity = mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "predecessor"}
	w.Services = nil
	l.builder.PutWorkload(&w)
	l.commit()
	c, err := l.pods["ui"].dial(netip.AddrPortFrom(l.pods["catalog-1"].v4, appPort))
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1))
		c.Close()
	}
	if err == nil {
		t.Fatal("a byte came from a server that could not prove the expected identity")
	}
	l.nodes["node-a"].log.find(t, map[string]any{"direction": "outbound", "outcome": "tls_failed"})
	eventually(t, "counted", func() bool {
		return l.nodes["node-a"].metric("warren_tls_failures_total", map[string]string{"reporter": "source", "reason": identity.ReasonNotWanted}) >= 1 &&
			l.nodes["node-a"].metric("istio_tcp_connections_failed_total", map[string]string{"response_flags": "TLS_FAILURE"}) == 1
	})
}

func TestWithoutACertificateNothingGoesOut(t *testing.T) {
	l := shop(t)
	l.ca.mu.Lock()
	l.ca.fail = errors.New("the CA is away")
	l.ca.bundles = map[mesh.Identity]*identity.Bundle{}
	l.ca.mu.Unlock()
	c, err := l.pods["ui"].dial(service(false))
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 1))
		c.Close()
	}
	if err == nil {
		t.Fatal("a byte came without a certificate")
	}
	l.nodes["node-a"].log.find(t, map[string]any{"direction": "outbound", "outcome": "identity_unavailable", "level": "ERROR"})
	if n := l.nodes["node-a"].metric("istio_tcp_connections_failed_total", map[string]string{"response_flags": "IDENTITY_ERROR"}); n != 1 {
		t.Errorf("%v connections counted as failed for want of an identity, want 1", n)
	}
}

func TestASlowPeerDoesNotHoldAHandshakeForever(t *testing.T) {
	l := newLab(t, configured(func(c *Config) { c.HandshakeTimeout = time.Second }))
	c, err := l.pods["outside"].dial(netip.AddrPortFrom(l.pods["catalog-1"].v4, HBONEPort))
	check(t, err)
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(plenty))
	if _, err := c.Read(make([]byte, 1)); err == nil || isTimeout(err) {
		t.Errorf("a peer that says nothing got %v, want its connection to end", err)
	}
	eventually(t, "the connection is gone", func() bool { return l.pods["catalog-1"].handle.Open() == 0 })
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}
