package certificates

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
)

// files writes a certificate with its key as openssl wants them.
func files(t *testing.T, b *identity.Bundle) (cert, key string) {
	t.Helper()
	data, err := identity.Marshal([]*identity.Bundle{b})
	if err != nil {
		t.Fatal(err)
	}
	var certs, keys []byte
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case "CERTIFICATE":
			certs = append(certs, pem.EncodeToMemory(block)...)
		case "PRIVATE KEY":
			keys = pem.EncodeToMemory(block)
		}
	}
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, text := range map[string][]byte{cert: certs, key: keys} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// TestKeyExchangeWithOpenSSL: a peer that has no hybrid key exchange gets X25519, or P-256 where it has only that,
// and neither side is sent back for another key share if the peer offered or takes X25519.
func TestKeyExchangeWithOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("there is no openssl")
	}
	w := newWorld(t, time.Minute)
	server, err := w.nodes[1].manager.Bundle(t.Context(), catalog)
	if err != nil {
		t.Fatal(err)
	}
	client, err := w.nodes[0].manager.Bundle(t.Context(), ui)
	if err != nil {
		t.Fatal(err)
	}
	clientCert, clientKey := files(t, client)
	serverCert, serverKey := files(t, server)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, tt := range []struct {
		groups string
		want   tls.CurveID
		retry  bool // as our client sees it: its share is for X25519
	}{{"X25519:P-256", tls.X25519, false}, {"X25519", tls.X25519, false}, {"P-256", tls.CurveP256, true}} {
		t.Run("client "+tt.groups, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			cmd := exec.CommandContext(ctx, "openssl", "s_client", "-connect", l.Addr().String(), "-tls1_3", "-alpn", "h2",
				"-groups", tt.groups, "-cert", clientCert, "-key", clientKey)
			in, err := cmd.StdinPipe() // open, or openssl leaves
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { in.Close(); _ = cmd.Wait() }()
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			s := tls.Server(c, server.ServerTLS(identity.Peers{}))
			if err := s.HandshakeContext(ctx); err != nil {
				t.Fatal(err)
			}
			if cs := s.ConnectionState(); cs.CurveID != tt.want || cs.HelloRetryRequest {
				t.Errorf("key exchange %v, HelloRetryRequest %t", cs.CurveID, cs.HelloRetryRequest)
			}
		})
		t.Run("server "+tt.groups, func(t *testing.T) {
			cmd := exec.CommandContext(ctx, "openssl", "s_server", "-accept", "127.0.0.1:0", "-tls1_3", "-alpn", "h2", "-Verify", "1",
				"-groups", tt.groups, "-cert", serverCert, "-key", serverKey, "-naccept", "1")
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var trouble bytes.Buffer
			cmd.Stderr = &trouble
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			addr := ""
			for addr == "" && lines.Scan() {
				if a, ok := strings.CutPrefix(lines.Text(), "ACCEPT "); ok {
					addr = a
				}
			}
			if addr == "" {
				t.Fatalf("openssl does not listen: %s", trouble.String())
			}
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			tc := tls.Client(c, client.ClientTLS([]string{catalog.String()}))
			err = tc.HandshakeContext(ctx)
			cs := tc.ConnectionState()
			c.Close()
			in.Close()
			_, _ = io.Copy(io.Discard, out)
			_ = cmd.Wait()
			if err != nil || cs.CurveID != tt.want || cs.HelloRetryRequest != tt.retry {
				t.Errorf("%v; key exchange %v, HelloRetryRequest %t; %s", err, cs.CurveID, cs.HelloRetryRequest, trouble.String())
			}
		})
	}
}
