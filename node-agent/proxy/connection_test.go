package proxy

import (
	"net/netip"
	"testing"
)

func TestConnectionCrossesNodesUnderTheClientsIdentity(t *testing.T) {
	l := newLab(t)
	ui := l.pods["ui"]
	for _, name := range []string{"catalog-1", "catalog-2"} {
		p := l.pods[name]
		p.listen(appPort, p.greet)
	}
	for _, tc := range []struct {
		name string
		dst  netip.AddrPort
		src  netip.Addr
	}{
		{"Service, IPv4", netip.AddrPortFrom(catalogVIP4, catalogPort), ui.v4},
		{"Service, IPv6", netip.AddrPortFrom(catalogVIP6, catalogPort), ui.v6},
		{"pod, IPv4", netip.AddrPortFrom(l.pods["catalog-1"].v4, appPort), ui.v4},
		{"pod, IPv6", netip.AddrPortFrom(l.pods["catalog-2"].v6, appPort), ui.v6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for range 20 {
				c, err := ui.dial(tc.dst)
				check(t, err)
				if got := addrPort(c.RemoteAddr()); got != tc.dst {
					t.Errorf("the client sees the server as %s, want %s", got, tc.dst)
				}
				by, local, remote, err := seen(c)
				check(t, err)
				if want := addrPort(c.LocalAddr()); remote != want {
					t.Errorf("%s sees the client as %s, want %s", by, remote, want)
				}
				if local.Addr() != l.pods[by].v4 && local.Addr() != l.pods[by].v6 {
					t.Errorf("%s sees itself as %s", by, local)
				}
				c.Close()
			}
		})
	}
	line := l.nodes["node-b"].log.find(t, map[string]any{"direction": "inbound", "msg": "connection complete"})
	if line["src.identity"] != "spiffe://cluster.local/ns/shop/sa/ui" {
		t.Errorf("the server's node logs %v", line)
	}
}
