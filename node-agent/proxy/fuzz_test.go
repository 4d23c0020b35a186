package proxy

import (
	"net/netip"
	"testing"

	"github.com/warrenmesh/warren/node-agent/hbone"
)

// FuzzTarget: whatever a CONNECT asks for, what it gets is a port of an application at one of the pod's own
// addresses, written the one way in which addresses are written.
func FuzzTarget(f *testing.F) {
	for _, a := range []string{
		"10.0.0.5:8080", "[fd00::5]:8080", "10.0.0.6:8080", "127.0.0.1:80", "[::1]:80", "[::ffff:10.0.0.5]:80", "[fd00::5%eth0]:80", "169.254.169.254:80",
		"10.0.0.5:15008", "10.0.0.5:15001", "10.0.0.5:0", "10.0.0.5:080", "10.0.0.5:+80", "10.0.0.5", "010.0.0.5:80", "0x0a000005:80", "10.5:80", "[fd00:0:0::5]:80",
		"10.0.0.5:80@evil", "localhost:80", "ui.shop.svc:80", ":80", "", "10.0.0.5:80 ", "0.0.0.0:80", "[::]:80",
	} {
		f.Add("CONNECT", a)
	}
	f.Add("GET", "10.0.0.5:8080")
	f.Add("", "10.0.0.5:8080")
	own := []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")}
	h := &PodHandle{}
	h.pod.Store(&Pod{Addrs: own})
	f.Fuzz(func(t *testing.T, method, authority string) {
		ap, err := h.target(hbone.Request{Method: method, Authority: authority})
		if err != nil {
			if ap.IsValid() || outcomeOf(err, Completed) != RequestInvalid {
				t.Errorf("%v and %v", ap, err)
			}
			return
		}
		if method != "" && method != "CONNECT" || ap.Addr() != own[0] && ap.Addr() != own[1] || ap.Port() == 0 || agentPort(ap.Port()) {
			t.Errorf("%s %q leads to %v", method, authority, ap)
		}
	})
}
