package certificates

import (
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/kubernetes/fake"

	caapi "github.com/warrenmesh/warren/api/ca"
	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/ca"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
)

// TestExternalCA: certificates come from another CA over gRPC, under roots that are not the control plane's. The
// control plane refuses to sign and says who does; peers of its root are refused.
func TestExternalCA(t *testing.T) {
	w := newWorld(t, time.Minute)
	quiet := slog.New(slog.DiscardHandler)

	// The other CA: its own key, its own port, the same tokens.
	other := ca.NewServer(ca.Config{Callers: auth.New(w.kube, "cluster.local"), Log: quiet,
		Authorizer: &ca.Authorizer{TrustDomain: "cluster.local", Nodes: map[string]bool{system + "/warren-node": true}, Pods: placement{}}})
	keys := &ca.Authority{Keys: &ca.Keys{Client: fake.NewClientset(), Namespace: "vault", TrustDomain: "cluster.local"}, Life: time.Minute,
		OnChange: other.Set, Log: quiet}
	if err := keys.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	serving := &ca.Serving{Names: []string{"ca.example"}, Standing: other.Standing}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(serving.TLS())))
	caapi.RegisterIstioCertificateServiceServer(g, other)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() { _ = g.Serve(l) })
	t.Cleanup(func() { g.Stop(); served.Wait() })

	dir := t.TempDir()
	bundle := func(pod string, id mesh.Identity) *identity.Bundle {
		root, token := filepath.Join(dir, pod+".pem"), filepath.Join(dir, pod)
		for file, text := range map[string][]byte{root: other.Standing().Roots, token: []byte(pod)} {
			if err := os.WriteFile(file, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		client, err := identity.NewCA(identity.CAConfig{Address: l.Addr().String(), ServerName: "ca.example", TokenFile: token,
			Roots: identity.ControlPlaneRoots{File: root}})
		if err != nil {
			t.Fatal(err)
		}
		m := identity.NewManager(identity.Config{Signer: client, Log: quiet})
		n := &node{manager: m}
		w.manage(n, client)
		b, err := m.Bundle(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	server, client := bundle("agent-2", catalog), bundle("agent-1", ui)
	if err := handshake(t, server, client); err != nil {
		t.Errorf("two certificates of the external CA: %v", err)
	}
	ours, err := w.nodes[0].manager.Bundle(t.Context(), ui)
	if err != nil {
		t.Fatal(err)
	}
	if handshake(t, server, ours) == nil {
		t.Error("a certificate of the control plane's own root is accepted")
	}

	refusing := ca.NewServer(ca.Config{Callers: auth.New(w.kube, "cluster.local"), External: "ca.example:443", Log: quiet})
	refusing.Set(w.server.Standing())
	if _, err := refusing.CreateCertificate(t.Context(), &caapi.IstioCertificateRequest{}); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "ca.example:443") {
		t.Errorf("the control plane: %v", err)
	}
}

// TestKeyExchange: what the nodes of the mesh agree on, and that nobody is sent back for another key share.
func TestKeyExchange(t *testing.T) {
	w := newWorld(t, time.Minute)
	server, err := w.nodes[1].manager.Bundle(t.Context(), catalog)
	if err != nil {
		t.Fatal(err)
	}
	client, err := w.nodes[0].manager.Bundle(t.Context(), ui)
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	s := tls.Server(a, server.ServerTLS(identity.Peers{}))
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	c := tls.Client(b, client.ClientTLS([]string{catalog.String()}))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if cs := c.ConnectionState(); cs.CurveID != tls.X25519MLKEM768 || cs.HelloRetryRequest || cs.Version != tls.VersionTLS13 {
		t.Errorf("key exchange %v, HelloRetryRequest %t, version %x", cs.CurveID, cs.HelloRetryRequest, cs.Version)
	}
}
