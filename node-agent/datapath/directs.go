package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
)

// direct is a connection between two pods of this node that the agent has no part in.
type direct struct {
	key            bpf.MeshFlow
	client, server netip.AddrPort
	from           uint64 // cookies of the namespaces
	to             uint64
	identity       uint64
}

func (d *Datapath) directs() ([]direct, error) {
	var out []direct
	var f bpf.MeshFlow
	var v bpf.MeshDirect
	it := d.kernel.Directs.Iterate()
	for it.Next(&f, &v) {
		if v.Closed != 0 {
			continue
		}
		out = append(out, direct{key: f, from: v.Client, to: v.Server, identity: v.Identity,
			client: netip.AddrPortFrom(goAddr(f.Client), f.ClientPort), server: netip.AddrPortFrom(goAddr(f.Server), f.ServerPort)})
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, fmt.Errorf("read the direct connections: %w", err)
	}
	return out, nil
}

// IsDirect reports whether the kernel carries a connection without the agent, and keeps an eye on it.
func (d *Datapath) IsDirect(client, server netip.AddrPort) bool {
	var v bpf.MeshDirect
	key := bpf.MeshFlow{Client: kernelAddr(client.Addr()), Server: kernelAddr(server.Addr()), ClientPort: client.Port(), ServerPort: server.Port()}
	return d.kernel.Directs.Lookup(key, &v) == nil
}

// recheck resets the direct connections that a Snapshot no longer allows. New ones are decided by it already, and
// one whose SYN is under way is either in the map or decided again when it arrives.
func (d *Datapath) recheck(s *mesh.Snapshot) error {
	open, err := d.directs()
	if err != nil || len(open) == 0 {
		return err
	}
	servers := map[uint64]Pod{}
	for uid, p := range d.given {
		servers[d.pods[uid].cookie] = p
	}
	denied := slices.DeleteFunc(open, func(c direct) bool { return d.stillAllowed(s, &c, servers) })
	err = resetBothEnds(denied, func(c direct) (client, server *netns.Handle) { return servers[c.from].NetNS, servers[c.to].NetNS })
	if len(denied) > 0 {
		d.cfg.Log.Info("direct connections reset that policy no longer allows", "count", len(denied))
	}
	return err
}

func (d *Datapath) stillAllowed(s *mesh.Snapshot, c *direct, servers map[uint64]Pod) bool {
	p, ok := servers[c.to]
	if !ok {
		return true // its server is released: an ordinary connection of an ordinary pod
	}
	w := s.Workload(p.Workload)
	who, known := d.gates.wanted.identities[c.identity]
	if !known {
		if x := d.index.Load(); x != nil {
			who, known = x.identities[c.identity]
		}
	}
	return w != nil && known && s.Authorize(mesh.Conn{Source: who, SourceIP: c.client.Addr(), Dst: c.server, DstWorkload: w}).Allow
}

// resetBothEnds resets connections in the namespaces of both ends; where says which those are, nil for none to reset in.
func resetBothEnds(conns []direct, where func(direct) (client, server *netns.Handle)) error {
	ends := map[*netns.Handle]map[[2]netip.AddrPort]bool{} // local, remote
	note := func(ns *netns.Handle, local, remote netip.AddrPort) {
		if ns == nil {
			return
		}
		if ends[ns] == nil {
			ends[ns] = map[[2]netip.AddrPort]bool{}
		}
		ends[ns][[2]netip.AddrPort{local, remote}] = true
	}
	for _, c := range conns {
		client, server := where(c)
		note(client, c.client, c.server)
		note(server, c.server, c.client)
	}
	var errs []error
	for ns, e := range ends {
		errs = append(errs, resetConnections(ns, e))
	}
	return errors.Join(errs...)
}

// resetConnections resets those of a namespace's connections that are named by their local and remote ends.
func resetConnections(ns *netns.Handle, ends map[[2]netip.AddrPort]bool) error {
	dg, err := netns.OpenDiag(ns)
	if err != nil {
		return err
	}
	defer dg.Close()
	open, err := dg.List(netns.Carrying | 1<<netns.TCPLastAck | 1<<netns.TCPClosing | 1<<netns.TCPNewSynRecv)
	if err != nil {
		return err
	}
	var denied []netns.TCPSocket
	for i := range open {
		if ends[[2]netip.AddrPort{open[i].Local, open[i].Remote}] {
			denied = append(denied, open[i])
		}
	}
	_, err = dg.Destroy(denied)
	return err
}

// pruneDirects forgets direct connections of which neither end is there any more: pods that went without their
// sockets being closed one by one.
func (d *Datapath) pruneDirects() error {
	open, err := d.directs()
	if err != nil {
		return err
	}
	cookies := map[uint64]bool{}
	for _, r := range d.pods {
		cookies[r.cookie] = true
	}
	for _, c := range open {
		if !cookies[c.from] && !cookies[c.to] {
			if err := d.kernel.Directs.Delete(c.key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("forget a direct connection: %w", err)
			}
		}
	}
	return nil
}

// canReset reports whether this kernel ends connections on request. Without that, connections that a later policy
// denies would go on; so there are no direct ones, and the agent has them all.
func canReset(ns *netns.Handle) bool {
	dg, err := netns.OpenDiag(ns)
	if err != nil {
		return false
	}
	defer dg.Close()
	return !errors.Is(dg.TryDestroy(), unix.EOPNOTSUPP)
}
