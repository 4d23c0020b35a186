package hbone

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openssl is a running s_server or s_client whose connection is the terminal's: what is typed is sent, what comes
// is printed, and "K" asks for new keys.
type openssl struct {
	t   *testing.T
	in  *os.File
	out *bufio.Reader
}

func startOpenSSL(t *testing.T, args ...string) *openssl {
	t.Helper()
	bin, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("needs openssl")
	}
	cmd := exec.Command(bin, args...)
	stdin, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	w.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		in.Close()
		r.Close()
	})
	_ = r.SetReadDeadline(time.Now().Add(time.Minute))
	return &openssl{t, in, bufio.NewReader(r)}
}

func (o *openssl) prints(line string) {
	o.t.Helper()
	for {
		got, err := o.out.ReadString('\n')
		if err != nil {
			o.t.Fatalf("openssl did not print %q: %v", line, err)
		}
		if strings.TrimSpace(got) == line {
			return
		}
	}
}

// command types what openssl takes for a command only where it begins what is read: it returns when it has been read.
func (o *openssl) command(c string) {
	o.t.Helper()
	fmt.Fprintln(o.in, c)
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		left, err := unix.IoctlGetInt(int(o.in.Fd()), unix.TIOCINQ)
		if err != nil || time.Now().After(end) {
			o.t.Fatalf("openssl did not read %q: %d bytes are left (%v)", c, left, err)
		}
		if left == 0 {
			return
		}
	}
}

// talk goes through what two ends can do to each other's keys.
func talk(t *testing.T, o *openssl, r *records) {
	_ = r.nc.SetReadDeadline(time.Now().Add(time.Minute))
	lines := bufio.NewReader(&linkReader{l: r})
	say := func(format string, args ...any) {
		t.Helper()
		line := fmt.Sprintf(format, args...)
		if err := r.send([]byte(line + "\n")); err != nil {
			t.Fatal(err)
		}
		o.prints(line)
	}
	hear := func(line string) {
		t.Helper()
		fmt.Fprintln(o.in, line)
		if got, err := lines.ReadString('\n'); err != nil || got != line+"\n" {
			t.Fatalf("received %q (%v), want %q", got, err, line)
		}
	}
	say("from this side")
	hear("from openssl")
	for range 3 {
		for _, command := range []string{"K", "k"} {
			before := r.in.secret
			o.command(command)
			hear("under new keys of openssl's")
			if string(before) == string(r.in.secret) {
				t.Error("openssl has not made new keys")
			}
			say("after a request for new keys")
		}
	}
	r.limit = 2
	for i := range 50 {
		say("under new keys of this side's %d", i)
	}
	hear("at last")
	r.close()
}

func pemFiles(t *testing.T) (cert, key string) {
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	der, err := x509.MarshalECPrivateKey(testCert().PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: testCert().Certificate[0]}, key: {Type: "EC PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestTheRecordLayerTalksToOpenSSL(t *testing.T) {
	for _, suite := range []string{"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"} {
		t.Run("server with "+suite, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			addr := l.Addr().String()
			l.Close()
			cert, key := pemFiles(t)
			o := startOpenSSL(t, "s_server", "-tls1_3", "-ciphersuites", suite, "-cert", cert, "-key", key, "-accept", addr, "-alpn", "h2", "-naccept", "1")
			o.prints("ACCEPT")
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			tc := TLSClient(c, testTLS())
			if err := tc.Handshake(); err != nil {
				t.Fatal(err)
			}
			if got := tls.CipherSuiteName(tc.ConnectionState().CipherSuite); got != suite {
				t.Fatalf("the suite is %s", got)
			}
			talk(t, o, taken(t, tc, true))
		})
		t.Run("client with "+suite, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			o := startOpenSSL(t, "s_client", "-tls1_3", "-ciphersuites", suite, "-connect", l.Addr().String(), "-alpn", "h2")
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			tc := TLSServer(c, testTLS())
			if err := tc.Handshake(); err != nil {
				t.Fatal(err)
			}
			talk(t, o, taken(t, tc, false))
			o.prints("closed")
		})
	}
}
