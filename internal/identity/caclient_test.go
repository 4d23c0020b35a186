package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
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
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/warrenmesh/warren/api/ca"
)

// caServer is a CA as a control plane serves it.
type caServer struct {
	ca.UnimplementedIstioCertificateServiceServer
	sign *testCA

	mu   sync.Mutex
	last *ca.IstioCertificateRequest
	md   metadata.MD
}

func (s *caServer) CreateCertificate(ctx context.Context, req *ca.IstioCertificateRequest) (*ca.IstioCertificateResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = req
	s.md, _ = metadata.FromIncomingContext(ctx)
	if s.md.Get("authorization")[0] != "Bearer token" {
		return nil, status.Error(codes.Unauthenticated, "request authenticate failure")
	}
	chain, err := s.sign.Sign(ctx, ui, []byte(req.Csr), 0)
	return &ca.IstioCertificateResponse{CertChain: chain}, err
}

func TestCAClient(t *testing.T) {
	authority := newTestCA(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := parseCerts([]byte(authority.issue(key.Public(), func(c *x509.Certificate) { c.DNSNames = []string{"istiod.istio-system.svc"} })))
	if err != nil {
		t.Fatal(err)
	}
	server := &caServer{sign: authority}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certs[0].Raw}, PrivateKey: key}}})))
	ca.RegisterIstioCertificateServiceServer(g, server)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() { _ = g.Serve(l) })
	t.Cleanup(func() { g.Stop(); served.Wait() })

	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	cfg := CAConfig{
		Address: l.Addr().String(), ServerName: "istiod.istio-system.svc", Cluster: "c1",
		Roots: ControlPlaneRoots{File: write("root", authority.rootPEM())}, TokenFile: write("token", "old\n"),
	}
	client, err := NewCA(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })

	csr, err := newCSR(ui, key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := client.Sign(ctx, ui, csr, time.Hour); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), ui.String()) {
		t.Errorf("with a wrong token: %v", err)
	}
	write("token", "token\n") // it is read for each call
	chain, err := client.Sign(ctx, ui, csr, time.Hour)
	if err != nil || len(chain) != 2 {
		t.Fatalf("got %d certificates, %v", len(chain), err)
	}
	if _, err := NewBundle(ui, key, []byte(chain[0]), []byte(chain[1])); err != nil {
		t.Error(err)
	}
	server.mu.Lock()
	defer server.mu.Unlock()
	if got := server.last.Metadata.AsMap()["ImpersonatedIdentity"]; got != ui.String() || server.last.ValidityDuration != 3600 {
		t.Errorf("it asked for %v, %d s", got, server.last.ValidityDuration)
	}
	if got := server.md.Get("clusterid"); len(got) != 1 || got[0] != "c1" {
		t.Errorf("the cluster is %v", got)
	}

	for name, f := range map[string]func(*CAConfig){
		"foreign roots":    func(c *CAConfig) { c.Roots.File = write("foreign", newTestCA(t).rootPEM()) },
		"another name":     func(c *CAConfig) { c.ServerName = "evil" },
		"no roots at all":  func(c *CAConfig) { c.Roots.File = write("empty", "") },
		"no file of roots": func(c *CAConfig) { c.Roots.File = filepath.Join(dir, "none") },
	} {
		bad := cfg
		f(&bad)
		client, err := NewCA(bad)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, err := client.Sign(ctx, ui, csr, time.Hour); err == nil {
			t.Errorf("%s: it trusts that CA", name)
		}
		cancel()
		client.Close()
	}
}
