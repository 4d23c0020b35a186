package hbone

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const h2specModule = "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible"

// h2spec returns the path of the tool, built into the user's cache.
func h2spec(t *testing.T) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Skip("h2spec: no cache directory: ", err)
	}
	dir := filepath.Join(cache, "warren", "h2spec-2.2.1")
	bin := filepath.Join(dir, "h2spec")
	if _, err := os.Stat(bin); err == nil {
		return bin
	}
	cmd := exec.Command("go", "install", h2specModule)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=")
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("h2spec cannot be built here: %v\n%s", err, out)
	}
	return bin
}

// TestH2spec runs the public conformance suite against the server, over plain TCP.
func TestH2spec(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	bin := h2spec(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		serveAll(ctx, l, func(_ context.Context, s *ServerStream) {
			buf := make([]byte, 4096)
			for { // the answer comes after the whole request
				if _, err := s.st.Read(buf); err != nil {
					break
				}
			}
			_ = s.Reply(200, []byte("h2spec\n"), Field{"content-type", "text/plain"})
		})
	}()
	defer func() {
		cancel()
		l.Close()
		<-done
	}()
	host, port, _ := net.SplitHostPort(l.Addr().String())
	run := func(args ...string) (total, passed int, out string) {
		ctx, stop := context.WithTimeout(ctx, 2*time.Minute)
		defer stop()
		b, err := exec.CommandContext(ctx, bin, append(args, "-h", host, "-p", port, "-o", "3")...).CombinedOutput()
		m := regexp.MustCompile(`(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed`).FindStringSubmatch(string(b))
		if m == nil {
			t.Fatalf("h2spec: %v\n%s", err, b)
		}
		total, _ = strconv.Atoi(m[1])
		passed, _ = strconv.Atoi(m[2])
		return total, passed, string(b)
	}
	total, passed, out := run()
	if passed == total-1 && strings.Contains(out, "× 3: Sends a large size HEADERS frame") {
		// The tool takes the frame limit to be the default of 16 KiB, but the server announces 1 MiB, as ztunnel's
		// does: its 20 KB frame is within the limit. Again with a frame that exceeds it.
		if n, ok, again := run("http2/4.2/3", "--max-header-length", "250000"); n == ok && n == 1 {
			passed++
		} else {
			t.Error(again)
		}
	}
	t.Logf("h2spec: %d of %d", passed, total)
	if passed != total {
		i := strings.Index(out, "Failures:")
		t.Error(out[max(i, 0):])
	}
}

func serveAll(ctx context.Context, l net.Listener, h func(context.Context, *ServerStream)) {
	conns := make(chan struct{})
	n := 0
	for {
		c, err := l.Accept()
		if err != nil {
			break
		}
		n++
		go func() {
			_ = Serve(ctx, c, ServerConfig{Handler: h, DrainTimeout: time.Millisecond})
			conns <- struct{}{}
		}()
	}
	for range n {
		<-conns
	}
}
