package datapath

import (
	"io"
	"net/netip"
	"testing"
)

// Both sides see the addresses they would see without a mesh.
func TestCapturedConnectionsKeepTheirAddresses(t *testing.T) {
	l := newLab(t)
	l.cat.serve(appPort)
	l.ui.enroll()
	l.cat.enroll()
	check(t, l.dp.SetDestinations(l.destinations()))

	each := 500
	if testing.Short() {
		each = 50
	}
	for _, dst := range []netip.AddrPort{
		netip.AddrPortFrom(l.cat.v4, appPort), netip.AddrPortFrom(l.cat.v6, appPort),
		netip.AddrPortFrom(vip4, servicePort), netip.AddrPortFrom(vip6, servicePort),
	} {
		client, server := l.ui.v4, netip.AddrPortFrom(l.cat.v4, appPort)
		if dst.Addr().Is6() {
			client, server = l.ui.v6, netip.AddrPortFrom(l.cat.v6, appPort)
		}
		l.counted(map[string]int{
			"connect_captured": each, "ticket_agent": each, "ticket_used": each, "ticket_unused": 0,
			// At least: a late acknowledgement of a socket that is gone is looked up as well.
			"lookup_outbound": -each, "lookup_ticket": -each, "guard_drop_captured": 0,
		}, func() {
			for range each {
				c, err := l.ui.dial(dst)
				if err != nil {
					t.Fatalf("dial %s: %v", dst, err)
				}
				local, remote, err := seen(c)
				if err != nil {
					t.Fatalf("%s: %v", dst, err)
				}
				if got := addrOf(c.RemoteAddr()); got != dst {
					t.Fatalf("the client's peer is %s, want %s", got, dst)
				}
				if me := addrOf(c.LocalAddr()); me.Addr() != client || remote != me || local != server {
					t.Fatalf("client %s; the server sees %s as the client and %s as itself, want %s", me, remote, local, server)
				}
				c.CloseWrite()
				io.Copy(io.Discard, c)
				c.Close()
			}
		})
	}
}
