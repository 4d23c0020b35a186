package datapath

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Who sends from which address, followed from Snapshot to Snapshot, is what one Snapshot says by itself; and who is new is told.
func TestSendersAreFollowed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u := newDatagrams(&bpf.MeshObjects{})
		b := mesh.NewBuilder(nil)
		for rev := range uint64(20) {
			for range rapid.IntRange(0, 4).Draw(t, "changes") {
				uid := fmt.Sprint("w", rapid.IntRange(0, 5).Draw(t, "workload"))
				if rapid.IntRange(0, 4).Draw(t, "gone") == 0 {
					b.DeleteWorkload(uid)
					continue
				}
				w := &mesh.Workload{UID: uid, Namespace: "shop", Node: rapid.SampledFrom([]string{"", "n"}).Draw(t, "node"), Healthy: true,
					Identity: mesh.Identity{TrustDomain: "td", Namespace: "shop", ServiceAccount: fmt.Sprint("sa", rapid.IntRange(0, 2).Draw(t, "account"))},
					Tunnel:   rapid.SampledFrom([]mesh.TunnelProtocol{mesh.TunnelHBONE, mesh.TunnelHBONE, 0}).Draw(t, "tunnel"),
					Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(rapid.IntRange(0, 3).Draw(t, "address"))})}}
				w.HostNetwork = rapid.IntRange(0, 5).Draw(t, "host") == 0
				w.NativeTunnel = rapid.IntRange(0, 5).Draw(t, "native") == 0
				b.PutWorkload(w)
			}
			s := b.Commit(rev + 1)
			asked := rapid.IntRange(0, 5).Draw(t, "asked") > 0
			before := maps.Clone(u.known)
			strangers := u.follow(s, asked)

			want, known := map[netip.Addr]mesh.Identity{}, map[mesh.Identity]int{}
			for w := range s.Workloads() {
				for _, a := range w.Addrs {
					if who := senderAt(s, a); asked && !who.IsZero() && want[a] != who {
						want[a] = who
						known[who]++
					}
				}
			}
			if !maps.Equal(u.pods, want) || !maps.Equal(u.known, known) {
				t.Fatalf("%v %v, want %v %v", u.pods, u.known, want, known)
			}
			for who := range known {
				if before[who] == 0 && !strangers {
					t.Fatalf("%s is new, and that is not told", who)
				}
			}
		}
	})
}
