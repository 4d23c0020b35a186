package certificates

import (
	"bytes"
	"context"
	"crypto/tls"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/ca"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/results"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// size is for how long and how fast requests run, and how long certificates live.
func size() (life, duration time.Duration, perSecond int) {
	if *long {
		return time.Minute, 10 * time.Minute, 1000
	}
	return 6 * time.Second, 20 * time.Second, 200
}

func record(t *testing.T, rows ...results.Row) {
	if err := results.Record("certificates", rows...); err != nil {
		t.Error(err)
	}
}

// handshake is a connection from ui to catalog under two certificates, whatever a manager would hand out now.
func handshake(t *testing.T, server, client *identity.Bundle) error {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			defer c.Close()
			s := tls.Server(c, server.ServerTLS(identity.Peers{}))
			if err = s.Handshake(); err == nil {
				_, err = s.Write([]byte("x"))
			}
		}
		done <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	tc := tls.Client(c, client.ClientTLS([]string{catalog.String()}))
	err = tc.Handshake()
	if err == nil {
		_, err = tc.Read(make([]byte, 1))
	}
	c.Close()
	if serverErr := <-done; serverErr != nil {
		return serverErr
	}
	return err
}

// TestCertificatesRotateUnderLoad: certificates of both ends are exchanged many times while requests run, and none
// of them notices. Then the CA stays away: the last certificates serve until they end, and nothing is accepted
// after that.
func TestCertificatesRotateUnderLoad(t *testing.T) {
	life, duration, rate := size()
	w := newWorld(t, life)
	l := w.run(w.serve(), rate)
	begun := time.Now()
	time.Sleep(duration)
	l.stop()
	perSecond := float64(l.done.Load()) / time.Since(begun).Seconds()
	signed := w.nodes[0].manager.Stats().Signed + w.nodes[1].manager.Stats().Signed
	rotations := int(signed) - 2
	if rotations < int(duration/life) {
		t.Errorf("only %d rotations of two certificates that live %s, in %s", rotations, life, duration)
	}
	if l.failed.Load() > 0 || l.done.Load() == 0 {
		t.Errorf("%d of %d requests failed: %q", l.failed.Load(), l.done.Load(), l.examples)
	}
	t.Logf("%d requests, %.0f a second, %d rotations, %d failed", l.done.Load(), perSecond, rotations, l.failed.Load())

	server, client := w.nodes[1].manager.Current(catalog), w.nodes[0].manager.Current(ui)
	if server == nil || client == nil {
		t.Fatal("a certificate is missing")
	}
	w.away.Store(true)
	if err := handshake(t, server, client); err != nil && time.Now().Before(client.NotAfter) && time.Now().Before(server.NotAfter) {
		t.Errorf("the CA has just gone away, and the certificates are refused: %v", err)
	}
	for _, n := range w.nodes { // until the last of those that were on their way has ended
		w.eventually("every certificate has ended", 3*life, func() bool { return len(n.manager.Bundles()) == 0 })
	}
	tries, accepted := 200, 0
	for range tries {
		if handshake(t, server, client) == nil {
			accepted++
		}
	}
	if accepted > 0 {
		t.Errorf("%d of %d handshakes under certificates that have ended are accepted", accepted, tries)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if b, err := w.nodes[0].manager.Bundle(ctx, ui); err == nil || !strings.Contains(err.Error(), "the CA is away") {
		t.Errorf("without a CA: %v, %v", b, err)
	}
	w.away.Store(false)
	if _, err := w.nodes[0].manager.Bundle(t.Context(), ui); err != nil {
		t.Errorf("when the CA is back: %v", err)
	}
	record(t,
		results.Row{Name: "certificate-rotation", Inputs: int(l.done.Load()), Failures: int(l.failed.Load()), Figure: float64(rotations), Unit: "rotations"},
		results.Row{Name: "certificate-rotation, how fast", Inputs: int(l.done.Load()), Failures: int(l.failed.Load()), Figure: perSecond, Unit: "requests a second"},
		results.Row{Name: "certificate-rotation, after expiry", Inputs: tries, Failures: accepted, Figure: float64(accepted), Unit: "accepted"})
}

// TestRootRotatesUnderLoad: the self-signed root is exchanged, through all phases, while requests run.
func TestRootRotatesUnderLoad(t *testing.T) {
	life, _, rate := size()
	w := newWorld(t, life)
	l := w.run(w.serve(), rate)
	w.eventually("requests run", time.Minute, func() bool { return l.done.Load() > 10 })
	old := w.server.Standing()
	secrets := w.kube.CoreV1().Secrets(system)
	s, err := secrets.Get(t.Context(), "istio-ca-secret", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.Annotations = map[string]string{ca.AnnotationRotate: "now"}
	if _, err := secrets.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	w.eventually("both roots are published", time.Minute, func() bool { return len(w.server.Standing().DERs) == 2 })
	w.eventually("the new root signs", time.Minute, func() bool { s := w.server.Standing(); return s.Signer != nil && !s.Signer.Equal(old.Signer) })
	for i, n := range w.nodes {
		if got := n.trust.Load(); got == nil || len(got.Roots()) != 2 {
			t.Errorf("the new root signs and node %d does not trust it", i+1)
		}
	}
	w.eventually("the old root is dropped", 10*life, func() bool { return len(w.server.Standing().DERs) == 1 })
	took := time.Since(begun)
	for i, n := range w.nodes {
		w.eventually("the nodes drop it too", time.Minute, func() bool {
			roots := n.trust.Load().Roots()
			return len(roots) == 1 && bytes.Equal(roots[0].Raw, w.server.Standing().DERs[0])
		})
		for _, b := range n.manager.Bundles() {
			if len(b.Roots()) != 1 {
				t.Errorf("node %d: %s still trusts the old root", i+1, b)
			}
		}
	}
	before := l.done.Load()
	w.eventually("requests still run", time.Minute, func() bool { return l.done.Load() > before+10 })
	l.stop()
	if l.failed.Load() > 0 {
		t.Errorf("%d of %d requests failed: %q", l.failed.Load(), l.done.Load(), l.examples)
	}
	t.Logf("%d requests, %d failed, three phases in %s", l.done.Load(), l.failed.Load(), took.Round(time.Millisecond))
	record(t, results.Row{Name: "root-rotation", Inputs: int(l.done.Load()), Failures: int(l.failed.Load()), Figure: took.Seconds(), Unit: "s for three phases"})
}
