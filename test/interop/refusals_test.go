package interop

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/node-agent/hbone"
	"github.com/warrenmesh/warren/results"
)

var long = flag.Bool("long", false, "the numbers of a soak instead of those of a check")

// numbers are how many handshakes each class gets: from Go's TLS, from openssl s_client, which is a process for
// each, and with openssl s_server.
func numbers() (goes, sClient, sServer int) {
	switch {
	case *long:
		return 5000, 100, 500
	case raceEnabled:
		return 8, 1, 2
	default:
		return 50, 3, 10
	}
}

// tally counts what became of handshakes.
type tally struct {
	mu       sync.Mutex
	accepted int
	refused  map[string]int // by identity.Reason
	example  map[string]error
}

func (t *tally) add(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil {
		t.accepted++
		return
	}
	if t.refused == nil {
		t.refused, t.example = map[string]int{}, map[string]error{}
	}
	t.refused[identity.Reason(err)]++
	t.example[identity.Reason(err)] = err
}

func (t *tally) sum() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.accepted
	for _, c := range t.refused {
		n += c
	}
	return n
}

// agent is both sides of the tunnel as the node agent makes them.
type agent struct {
	t      *testing.T
	bundle *identity.Bundle // of catalog on the server's side, of ui on the client's
	dir    string
}

// serve is the server's side, whose handler answers every CONNECT with 200.
func (a *agent) serve() (addr string, handshakes *tally, served *atomic.Int32) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		a.t.Fatal(err)
	}
	handshakes, served = &tally{}, &atomic.Int32{}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				tc := hbone.TLSServer(c, a.bundle.ServerTLS(identity.Peers{}))
				hctx, stop := context.WithTimeout(ctx, 30*time.Second)
				err := tc.HandshakeContext(hctx)
				stop()
				if err == nil {
					_, err = identity.PeerIdentity(tc.ConnectionState())
				}
				handshakes.add(err)
				if err != nil {
					return
				}
				_ = hbone.Serve(ctx, tc, hbone.ServerConfig{Handler: func(_ context.Context, s *hbone.ServerStream) {
					served.Add(1)
					if st, err := s.Accept(); err == nil {
						_ = st.Close()
					}
				}})
			})
		}
	})
	a.t.Cleanup(func() { l.Close(); cancel(); wg.Wait() })
	return l.Addr().String(), handshakes, served
}

// dial is the client's side: TCP, TLS with one that has to be catalog, and a CONNECT.
func (a *agent) dial(addr string, connect bool) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("no connection: %w", err)
	}
	defer c.Close()
	tc := hbone.TLSClient(c, a.bundle.ClientTLS([]string{catalogID.String()}))
	if err := tc.HandshakeContext(ctx); err != nil || !connect {
		return err
	}
	return open(ctx, tc)
}

// open asks for a stream over a connection whose handshake is done.
func open(ctx context.Context, tc net.Conn) error {
	client := hbone.NewClient(tc, hbone.ClientConfig{})
	defer client.Close()
	st, _, err := client.Open(ctx, hbone.Request{Authority: "10.0.0.1:80"})
	if err == nil {
		_ = st.Close()
	}
	return err
}

// each runs f n times, several at a time.
func each(n int, f func(i int)) {
	var next atomic.Int32
	var wg sync.WaitGroup
	for range min(n, 2*runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// presents is the configuration of a peer that cares about nothing and shows what it is told to.
func (p peer) presents(tweak func(*tls.Config)) *tls.Config {
	c := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert}
	if p.chain != nil {
		own := p.certificate()
		c.Certificates = []tls.Certificate{own}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &own, nil }
	}
	if tweak != nil {
		tweak(c)
	}
	return c
}

// TestPeersThatMustBeRefused runs every class of bad peer against both sides of the agent's TLS, as Go and as
// openssl play it. No handshake may be accepted, no CONNECT served, and each is refused for the reason that the
// counter warren_tls_failures_total is to show.
func TestPeersThatMustBeRefused(t *testing.T) {
	p := newPKI(t)
	classes, lists := p.badPeers()
	server := &agent{t, p.bundle(catalogID, lists...), t.TempDir()}
	client := &agent{t, p.bundle(uiID, lists...), t.TempDir()}
	goes, sClient, sServer := numbers()

	var rows []results.Row
	total := results.Row{Name: "tls-negative", Unit: "accepted"}
	judge := func(t *testing.T, name, reason string, n int, got *tally, served int) {
		t.Helper()
		got.mu.Lock()
		defer got.mu.Unlock()
		named := got.refused[reason]
		if got.accepted > 0 || served > 0 || named != n {
			t.Errorf("%d accepted, %d served, %d of %d refused as %s: %v %v", got.accepted, served, named, n, reason, got.refused, got.example)
		}
		rows = append(rows, results.Row{Name: name, Inputs: n, Failures: n - named, Figure: float64(named), Unit: "refused as " + reason})
		total.Inputs += n
		total.Failures += n - named
		total.Figure += float64(got.accepted + served)
	}

	t.Run("control", func(t *testing.T) {
		s := &agent{t, server.bundle, ""}
		addr, handshakes, served := s.serve()
		const n = 20
		each(n, func(int) {
			if err := client.dial(addr, true); err != nil {
				t.Error("a good peer:", err)
			}
		})
		handshakes.mu.Lock()
		defer handshakes.mu.Unlock()
		if handshakes.accepted != n || served.Load() != n {
			t.Errorf("%d handshakes and %d CONNECTs of %d: %v", handshakes.accepted, served.Load(), n, handshakes.example)
		}
	})
	for _, class := range classes {
		if class.server != "" {
			t.Run("server/"+class.name, func(t *testing.T) {
				addr, handshakes, served := (&agent{t, server.bundle, ""}).serve()
				each(goes, func(i int) {
					if err := connects(addr, class.peers[i%len(class.peers)].presents(class.tweak)); err == nil {
						t.Error("a CONNECT was answered with 200")
					}
				})
				settled(t, handshakes, goes)
				judge(t, "server, peer is Go: "+class.name, class.server, goes, handshakes, int(served.Load()))
			})
		}
		if class.client != "" {
			t.Run("client/"+class.name, func(t *testing.T) {
				tallied := &tally{}
				addrs := goServers(t, class)
				each(goes, func(i int) { tallied.add(client.dial(addrs[i%len(addrs)], true)) })
				judge(t, "client, peer is Go: "+class.name, class.client, goes, tallied, 0)
			})
		}
		if class.openssl == nil {
			continue
		}
		files := opensslFiles(t, class)
		if class.server != "" {
			t.Run("server/openssl/"+class.name, func(t *testing.T) {
				n := max(sClient, len(class.peers))
				addr, handshakes, served := (&agent{t, server.bundle, ""}).serve()
				each(n, func(i int) { sClientRun(t, addr, files[i%len(files)], class.openssl) })
				settled(t, handshakes, n)
				judge(t, "server, peer is openssl: "+class.name, class.server, n, handshakes, int(served.Load()))
			})
		}
		if class.client != "" {
			t.Run("client/openssl/"+class.name, func(t *testing.T) {
				tallied := &tally{}
				n, reason := 0, class.client
				if files[0] == nil {
					reason = identity.ReasonVersion // openssl says that it cannot do TLS 1.3
				}
				for _, f := range files {
					addr := sServerRun(t, f, class.openssl)
					some := max(1, sServer/len(files))
					n += some
					each(some, func(int) { tallied.add(client.dial(addr, false)) })
				}
				judge(t, "client, peer is openssl: "+class.name, reason, n, tallied, 0)
			})
		}
	}
	t.Run("server/a session of another server", func(t *testing.T) {
		cfg := sessionOfAnother(t, p.good(catalogID.String(), nil))
		addr, handshakes, served := (&agent{t, server.bundle, ""}).serve()
		each(goes, func(int) { _ = connects(addr, cfg) })
		settled(t, handshakes, goes)
		judge(t, "server, peer is Go: session of another server instead of a certificate", identity.ReasonNoCertificate, goes, handshakes, int(served.Load()))
	})
	t.Run("server/openssl/early data", func(t *testing.T) {
		args := earlyData(t, opensslFiles(t, badPeer{name: "early", peers: []peer{p.good(catalogID.String(), nil)}})[0])
		addr, handshakes, served := (&agent{t, server.bundle, ""}).serve()
		each(sClient, func(int) { sClientRun(t, addr, nil, args) })
		settled(t, handshakes, sClient)
		judge(t, "server, peer is openssl: early data", identity.ReasonEarlyData, sClient, handshakes, int(served.Load()))
	})
	t.Run("server/not TLS", func(t *testing.T) {
		addr, handshakes, served := (&agent{t, server.bundle, ""}).serve()
		each(goes, func(int) {
			if c, err := net.Dial("tcp", addr); err == nil {
				_, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			}
		})
		settled(t, handshakes, goes)
		judge(t, "server, peer is Go: HTTP/2 without TLS", identity.ReasonNotTLS, goes, handshakes, int(served.Load()))
	})
	t.Run("alias of the trust domain", func(t *testing.T) {
		cfg := server.bundle.ServerTLS(identity.Peers{TrustDomains: []string{"cluster.local", "other.mesh"}})
		if err := handshake(cfg, p.good("spiffe://other.mesh/ns/shop/sa/catalog", nil).presents(nil)); err != nil {
			t.Error("configured:", err)
		}
		if err := handshake(cfg, p.good("spiffe://third.mesh/ns/shop/sa/catalog", nil).presents(nil)); identity.Reason(err) != identity.ReasonTrustDomain {
			t.Error("another one:", err)
		}
	})
	if t.Failed() {
		return
	}
	if err := results.Record("tls-negative", append([]results.Row{total}, rows...)...); err != nil {
		t.Error(err)
	}
	t.Logf("%d handshakes, %v accepted", total.Inputs, total.Figure)
}

// settled waits for the server's word on n handshakes.
func settled(t *testing.T, handshakes *tally, n int) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for handshakes.sum() < n {
		if time.Now().After(deadline) {
			t.Fatalf("the server has seen %d of %d handshakes", handshakes.sum(), n)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// connects tries to get a CONNECT through as a peer with that configuration.
func connects(addr string, cfg *tls.Config) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	tc := tls.Client(c, cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		return err
	}
	return open(ctx, tc)
}

// handshake is the server's verdict on one client.
func handshake(server, client *tls.Config) error {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go func() { _ = tls.Client(b, client).Handshake(); _, _ = io.Copy(io.Discard, b) }()
	_ = a.SetDeadline(time.Now().Add(30 * time.Second))
	return tls.Server(a, server).Handshake()
}

// goServers listens as each of the class's peers.
func goServers(t *testing.T, class badPeer) (addrs []string) {
	for _, p := range class.peers {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		cfg := p.presents(class.tweak)
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(30 * time.Second))
					tc := tls.Server(c, cfg)
					if tc.Handshake() == nil {
						_ = hbone.Serve(context.Background(), tc, hbone.ServerConfig{Handler: func(_ context.Context, s *hbone.ServerStream) {
							if st, err := s.Accept(); err == nil {
								_ = st.Close()
							}
						}})
					}
				})
			}
		})
		t.Cleanup(func() { l.Close(); wg.Wait() })
		addrs = append(addrs, l.Addr().String())
	}
	return addrs
}

// sessionOfAnother is a client without a certificate that has a session ticket from a server that resumes.
func sessionOfAnother(t *testing.T, p peer) *tls.Config {
	cfg := peer{}.presents(nil)
	cfg.ServerName, cfg.ClientSessionCache = "mesh", tls.NewLRUClientSessionCache(8)
	other := p.presents(nil)
	for _, want := range []bool{false, true} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if c, err := l.Accept(); err == nil {
				s := tls.Server(c, other)
				_, _ = s.Write([]byte("x"))
				_, _ = io.Copy(io.Discard, s)
				c.Close()
			}
		}()
		c, err := tls.Dial("tcp", l.Addr().String(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != nil || c.ConnectionState().DidResume != want {
			t.Fatalf("resumed %v, %v: the ticket is none", c.ConnectionState().DidResume, err)
		}
		c.Close()
		l.Close()
	}
	return cfg
}

// opensslFiles writes what the class's peers present and returns the arguments that name the files.
func opensslFiles(t *testing.T, class badPeer) (args [][]string) {
	t.Helper()
	dir := t.TempDir()
	for i, p := range class.peers {
		if p.chain == nil {
			args = append(args, nil)
			continue
		}
		b, err := identityKey(p)
		if err != nil {
			t.Fatal(err)
		}
		cert, key, chain := filepath.Join(dir, fmt.Sprint(i, ".crt")), filepath.Join(dir, fmt.Sprint(i, ".key")), filepath.Join(dir, fmt.Sprint(i, ".chain"))
		var rest []byte
		for _, der := range p.chain[1:] {
			rest = append(rest, pemBlock("CERTIFICATE", der)...)
		}
		if err := errors.Join(os.WriteFile(cert, pemBlock("CERTIFICATE", p.chain[0]), 0o600), os.WriteFile(key, b, 0o600), os.WriteFile(chain, rest, 0o600)); err != nil {
			t.Fatal(err)
		}
		a := []string{"-cert", cert, "-key", key}
		if len(rest) > 0 {
			a = append(a, "-cert_chain", chain)
		}
		args = append(args, a)
	}
	return args
}

// opensslArgs puts a command together; what a class says about version and ALPN replaces what is usual.
func opensslArgs(command string, first, files, class []string) []string {
	args := append([]string{command}, first...)
	args = append(args, files...)
	if !slices.Contains(class, "-tls1_2") {
		args = append(args, "-tls1_3")
	}
	if !slices.Contains(class, "-alpn") && !slices.Contains(class, "-noalpn") {
		args = append(args, "-alpn", "h2")
	}
	for _, a := range class {
		if a != "-noalpn" {
			args = append(args, a)
		}
	}
	return args
}

func sClientRun(t *testing.T, addr string, files, class []string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "openssl", opensslArgs("s_client", []string{"-connect", addr}, files, class)...)
	out, err := cmd.CombinedOutput() // it fails as it should: what counts is the server's word
	if err != nil && strings.Contains(string(out), "usage") {
		t.Errorf("openssl: %s", out)
	}
}

// sServerRun starts a server and returns its address once it listens.
func sServerRun(t *testing.T, files, class []string) string {
	t.Helper()
	addr := freeAddr(t)
	first := []string{"-accept", addr, "-Verify", "1", "-quiet"}
	if files == nil {
		first = append(first, "-nocert")
	}
	cmd := exec.Command("openssl", opensslArgs("s_server", first, files, class)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			t.Fatalf("openssl s_server does not listen: %v\n%s", err, out.String())
		}
	}
}

// earlyData gets a session that allows early data from an openssl server, and returns the arguments with which
// a client sends some to another.
func earlyData(t *testing.T, files []string) []string {
	t.Helper()
	addr := sServerRun(t, files, []string{"-early_data", "-max_early_data", "16384", "-num_tickets", "1"}) // a second ticket would be written over the first
	dir := t.TempDir()
	session, data := filepath.Join(dir, "session"), filepath.Join(dir, "data")
	if err := os.WriteFile(data, []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("openssl", opensslArgs("s_client", []string{"-connect", addr, "-sess_out", session}, files, nil)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if b, err := os.ReadFile(session); err == nil && strings.Contains(string(b), "END SSL SESSION") {
			break
		}
	}
	in.Close()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	return append(append([]string{}, files...), "-sess_in", session, "-early_data", data)
}
