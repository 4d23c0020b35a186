package proxy

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/results"
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

// strangerTLS connects from the machine outside to a pod's HBONE port and does the TLS handshake.
func (l *lab) strangerTLS(p *labPod) (*tls.Conn, error) {
	now := time.Now()
	b := l.ca.sign(stranger, now.Add(-time.Minute), now.Add(time.Hour), nil)
	c, err := l.pods["outside"].dial(netip.AddrPortFrom(p.v4, HBONEPort))
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(plenty))
	tc := tls.Client(c, b.ClientTLS([]string{p.id.String()}))
	if err := tc.Handshake(); err != nil {
		c.Close()
		return nil, err
	}
	c.SetDeadline(time.Time{})
	return tc, nil
}

// TestH2spec runs the public conformance suite against a pod's HBONE port. The tool knows no client certificates: a
// bridge speaks TLS for it and passes bytes on as they are.
func TestH2spec(t *testing.T) {
	if testing.Short() {
		t.Skip("-short")
	}
	bin := h2spec(t)
	t.Run("frames of 16 KiB", func(t *testing.T) {
		total, passed, out := runH2spec(t, bin, newLab(t, configured(func(c *Config) { c.MaxFrame = 16 << 10 })))
		if passed != total || total < 145 {
			t.Errorf("%d of %d passed\n%s", passed, total, out)
		}
		check(t, results.Record("h2spec", results.Row{Name: "a pod's HBONE port, frames of 16 KiB", Inputs: total, Failures: total - passed, Figure: float64(passed), Unit: "passed"}))
	})
	t.Run("frames of 1 MiB", func(t *testing.T) {
		if raceEnabled {
			t.Skip("once is enough with the race detector")
		}
		l := newLab(t)
		total, passed, out := runH2spec(t, bin, l)
		// The tool takes the limit to be 16 KiB, but the agent announces 1 MiB, as ztunnel does: the tool's frame of
		// 20 KB is within the limit. Again with one that is not.
		if passed == total-1 && strings.Contains(out, "× 3: Sends a large size HEADERS frame") {
			n, ok, again := runH2spec(t, bin, l, "http2/4.2/3", "--max-header-length", "250000")
			if n == 1 && ok == 1 {
				passed++
			}
			out = again
		}
		if passed != total || total < 145 {
			t.Errorf("%d of %d passed\n%s", passed, total, out)
		}
		check(t, results.Record("h2spec", results.Row{Name: "a pod's HBONE port, frames of 1 MiB, case 4.2/3 with a frame beyond that", Inputs: total, Failures: total - passed, Figure: float64(passed), Unit: "passed"}))
	})
}

func runH2spec(t *testing.T, bin string, l *lab, args ...string) (total, passed int, out string) {
	t.Helper()
	bridge, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer bridge.Close()
	wg.Go(func() {
		for {
			c, err := bridge.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				tc, err := l.strangerTLS(l.pods["catalog-1"])
				if err != nil {
					t.Error(err)
					return
				}
				defer tc.Close()
				wg.Go(func() { // until either ends
					_, _ = io.Copy(tc, c)
					tc.Close()
				})
				_, _ = io.Copy(c, tc)
			})
		}
	})
	host, port, _ := net.SplitHostPort(bridge.Addr().String())
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Minute)
	defer stop()
	b, err := exec.CommandContext(ctx, bin, append(args, "-h", host, "-p", port, "-o", "5")...).CombinedOutput()
	m := regexp.MustCompile(`(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed`).FindStringSubmatch(string(b))
	if m == nil {
		t.Fatalf("h2spec: %v\n%s", err, b)
	}
	total, _ = strconv.Atoi(m[1])
	passed, _ = strconv.Atoi(m[2])
	out = string(b)
	return total, passed, out[max(strings.Index(out, "Failures:"), 0):]
}
