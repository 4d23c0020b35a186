package identity

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// shake runs a handshake and returns both ends' errors and the server's view.
func shake(t testing.TB, server, client *tls.Config) (cs tls.ConnectionState, serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // a net.Pipe has no buffer for an alert that crosses data
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	b, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	deadline := time.Now().Add(10 * time.Second)
	_ = a.SetDeadline(deadline)
	_ = b.SetDeadline(deadline)
	s, c := tls.Server(a, server), tls.Client(b, client)
	done := make(chan error, 1)
	go func() {
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte("x"))
		} else {
			a.Close()
		}
		done <- err
	}()
	clientErr = c.Handshake()
	if clientErr == nil {
		_, clientErr = c.Read(make([]byte, 1))
	} else {
		b.Close()
	}
	serverErr = <-done
	return s.ConnectionState(), serverErr, clientErr
}

func TestHandshake(t *testing.T) {
	ca := newTestCA(t)
	server, client := ca.bundle(t, catalog, nil), ca.bundle(t, ui, nil)
	cs, serverErr, clientErr := shake(t, server.ServerTLS(Peers{}), client.ClientTLS([]string{"spiffe://x/ns/y/sa/z", catalog.String()}))
	if serverErr != nil || clientErr != nil {
		t.Fatalf("server: %v, client: %v", serverErr, clientErr)
	}
	peer, err := PeerIdentity(cs)
	if err != nil || peer != ui {
		t.Errorf("the peer is %v (%v)", peer, err)
	}
	if cs.Version != tls.VersionTLS13 || cs.NegotiatedProtocol != "h2" || cs.ServerName != "" || cs.DidResume {
		t.Errorf("version %x, ALPN %q, SNI %q, resumed %v", cs.Version, cs.NegotiatedProtocol, cs.ServerName, cs.DidResume)
	}
	if cs.CurveID != tls.X25519MLKEM768 || cs.HelloRetryRequest {
		t.Errorf("key exchange %v, HelloRetryRequest %v", cs.CurveID, cs.HelloRetryRequest)
	}
}

// A ztunnel has X25519 alone; neither end may be sent back for another key share. Envoy prefers the hybrid.
func TestKeyExchangeWithOthers(t *testing.T) {
	ca := newTestCA(t)
	ours, theirs := ca.bundle(t, catalog, nil), ca.bundle(t, ui, nil)
	for name, curves := range map[string][]tls.CurveID{
		"ztunnel": {tls.X25519}, "envoy": {tls.X25519MLKEM768, tls.X25519, tls.CurveP256}, "old envoy": {tls.X25519, tls.CurveP256},
	} {
		want := tls.X25519
		if curves[0] == tls.X25519MLKEM768 {
			want = tls.X25519MLKEM768
		}
		client := theirs.ClientTLS([]string{catalog.String()})
		client.CurvePreferences = curves
		cs, serverErr, clientErr := shake(t, ours.ServerTLS(Peers{}), client)
		if serverErr != nil || clientErr != nil || cs.CurveID != want || cs.HelloRetryRequest {
			t.Errorf("%s as client: %v %v, key exchange %v, HelloRetryRequest %v", name, serverErr, clientErr, cs.CurveID, cs.HelloRetryRequest)
		}
		server := theirs.ServerTLS(Peers{})
		server.CurvePreferences = curves
		cs, serverErr, clientErr = shake(t, server, ours.ClientTLS([]string{ui.String()}))
		if serverErr != nil || clientErr != nil || cs.CurveID != want || cs.HelloRetryRequest {
			t.Errorf("%s as server: %v %v, key exchange %v, HelloRetryRequest %v", name, serverErr, clientErr, cs.CurveID, cs.HelloRetryRequest)
		}
	}
}

func TestPeersThatAreRefused(t *testing.T) {
	ca, foreign := newTestCA(t), newTestCA(t)
	good := ca.bundle(t, catalog, nil)
	abroad := mesh.Identity{TrustDomain: "elsewhere", Namespace: "shop", ServiceAccount: "ui"}
	with := func(f func(*x509.Certificate), uris ...string) *Bundle { return ca.bundle(t, ui, f, uris...) }
	nothing := func(*x509.Certificate) {}
	stranger := foreign.bundle(t, ui, nil)
	stranger.roots = good.roots // it trusts us, we do not trust it
	for name, tc := range map[string]struct {
		peer           *Bundle
		server, client string // reasons as seen by a server and by a client
	}{
		"foreign CA":         {stranger, ReasonUnknownCA, ReasonUnknownCA},
		"expired":            {with(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }, ui.String()), ReasonExpired, ReasonExpired},
		"not yet":            {with(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) }, ui.String()), ReasonNotYetValid, ReasonNotYetValid},
		"server only":        {with(func(c *x509.Certificate) { c.ExtKeyUsage = bothUsages[:1] }, ui.String()), ReasonUsage, ""},
		"client only":        {with(func(c *x509.Certificate) { c.ExtKeyUsage = bothUsages[1:] }, ui.String()), "", ReasonUsage},
		"no URI":             {with(nothing), ReasonNoURI, ReasonNoURI},
		"two URIs":           {with(nil, ui.String(), catalog.String()), ReasonSeveralURIs, ReasonSeveralURIs},
		"not SPIFFE":         {with(nil, "https://shop/ui"), ReasonNotIdentity, ReasonNotIdentity},
		"another form":       {with(nil, "spiffe://cluster.local/shop/ui"), ReasonNotIdentity, ReasonNotIdentity},
		"percent escape":     {with(nil, "spiffe://cluster.local/ns/shop/sa/u%69"), ReasonNotIdentity, ReasonNotIdentity},
		"NUL":                {with(nil, ui.String()+"\x00.evil"), ReasonMalformed, ReasonMalformed}, // x509 does not parse it
		"other trust domain": {ca.bundle(t, abroad, nil), ReasonTrustDomain, ReasonNotWanted},
		"other identity":     {ca.bundle(t, catalog, nil), "", ReasonNotWanted},
		"a CA": {with(func(c *x509.Certificate) {
			c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
		}, ui.String()), ReasonCA, ReasonCA},
	} {
		t.Run(name, func(t *testing.T) {
			everybody := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{tc.peer.cert}}
			_, err, _ := shake(t, good.ServerTLS(Peers{}), everybody)
			check(t, "server", err, tc.server)
			everybody = &tls.Config{NextProtos: []string{"h2"}, Certificates: []tls.Certificate{tc.peer.cert}, ClientAuth: tls.RequestClientCert}
			_, _, err = shake(t, everybody, good.ClientTLS([]string{ui.String()}))
			check(t, "client", err, tc.client)
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		_, err, _ := shake(t, good.ServerTLS(Peers{}), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		check(t, "server", err, ReasonNoCertificate)
	})
	t.Run("nobody wanted", func(t *testing.T) {
		_, _, err := shake(t, ca.bundle(t, ui, nil).ServerTLS(Peers{}), good.ClientTLS(nil))
		check(t, "client", err, ReasonNotWanted)
	})
	t.Run("TLS 1.2", func(t *testing.T) {
		c := ca.bundle(t, ui, nil).ClientTLS([]string{catalog.String()})
		c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		_, err, _ := shake(t, good.ServerTLS(Peers{}), c)
		check(t, "server", err, ReasonVersion)
	})
	t.Run("trust domain alias", func(t *testing.T) {
		_, err, _ := shake(t, good.ServerTLS(Peers{TrustDomains: []string{"cluster.local", "elsewhere"}}), ca.bundle(t, abroad, nil).ClientTLS([]string{catalog.String()}))
		check(t, "server", err, "")
	})
	t.Run("the clock is the caller's", func(t *testing.T) {
		later := func() time.Time { return time.Now().Add(25 * time.Hour) }
		_, err, _ := shake(t, good.ServerTLS(Peers{Now: later}), ca.bundle(t, ui, nil).ClientTLS([]string{catalog.String()}))
		check(t, "server", err, ReasonExpired)
	})
}

func check(t *testing.T, end string, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("the %s refuses: %v", end, err)
	case want != "" && err == nil:
		t.Errorf("the %s lets it in, want %s", end, want)
	case want != "" && Reason(err) != want:
		t.Errorf("the %s refuses for %s (%v), want %s", end, Reason(err), err, want)
	}
}

func BenchmarkHandshake(b *testing.B) {
	ca := newTestCA(b)
	server, client := ca.bundle(b, catalog, nil), ca.bundle(b, ui, nil)
	want := []string{catalog.String()}
	for b.Loop() {
		if _, err, _ := shake(b, server.ServerTLS(Peers{}), client.ClientTLS(want)); err != nil {
			b.Fatal(err)
		}
	}
}
