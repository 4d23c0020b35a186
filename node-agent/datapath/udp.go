package datapath

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// UDP is left alone but in namespaces that ask for policies to apply to it (mesh.Config.UDPNamespaces). For their pods the
// kernel decides about each datagram that arrives; the agent sees none. What stands here is
//
//	udp_gates    the pods that ask for it, each with its rulesets; a pod whose policies are not known has none and
//	             gets nothing but answers
//	udp_sources  who has which address, in the whole mesh: there while any pod of this node asks
//	udp_begun,   what each such pod began and whom policy let in: made here, filled by the kernel
//	udp_let_in
//	udp          the hook at the egress of the pod's veth
//
// Nothing of it goes because an agent starts and does not know its pods yet.

var udpHook = vethHook{"udp", bpf.MeshProgMeshUdp, ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS, "warren_udp"}

// settle is how long the kernel notes what a pod begins before it drops what is no answer to that: answers that are under
// way while a namespace begins to ask are not lost.
const settle = 50 * time.Millisecond

// nobody is an identity that no ruleset has a row for: the kernel drops what it sends.
const nobody = math.MaxUint64

// udpRules are the rulesets of a pod that asks for them; 0: not known.
type udpRules struct{ v4, v6 uint64 }

// udp compiles what applies to datagrams that arrive at a pod.
func (c *compiler) udp(p Pod, out *rules) (r udpRules) {
	w := c.s.Workload(p.Workload)
	if w == nil || w.Identity != p.Identity {
		return r
	}
	for _, a := range p.Addrs {
		if a = a.Unmap(); !slices.Contains(w.Addrs, a) {
			continue
		}
		set, err := c.ruleset(w, a, true)
		if err == nil {
			err = out.add(set)
		}
		if err != nil {
			out.problems = append(out.problems, fmt.Errorf("UDP to pod %s/%s is dropped: %w", w.Namespace, w.Name, err))
			continue
		}
		out.udpSets[set.id] = true
		if a.Is4() {
			r.v4 = set.id
		} else {
			r.v6 = set.id
		}
	}
	return r
}

// datagrams is what the agent knows of the kernel's state for UDP, and what that depends on.
type datagrams struct {
	gates   *table[uint32, bpf.MeshUdpGate] // by the node's interface
	sources *table[bpf.MeshAddr, bpf.MeshUdpSource]

	at      *mesh.Snapshot // that the pods are of; nil: nobody asks
	pods    map[netip.Addr]mesh.Identity
	known   map[mesh.Identity]int   // how many of the addresses each has
	pending map[netip.Addr]struct{} // whose rows may have to be written

	kept    map[uint64]bool   // rulesets of pods that an earlier process enrolled and this one not yet
	hooked  map[string]uint32 // interface by UID
	open    map[string]bool   // pods whose UDP was not filtered at the last applyUDP
	tables  map[uint32]bool   // slots that have tables of their own
	bridges map[uint32]uint32 // that interfaces are ports of
}

func newDatagrams(k *bpf.MeshObjects) datagrams {
	return datagrams{
		gates:   newTable[uint32, bpf.MeshUdpGate]("udp_gates", k.UdpGates),
		sources: newTable[bpf.MeshAddr, bpf.MeshUdpSource]("udp_sources", k.UdpSources),
		pods:    map[netip.Addr]mesh.Identity{}, known: map[mesh.Identity]int{}, pending: map[netip.Addr]struct{}{},
		kept: map[uint64]bool{}, hooked: map[string]uint32{}, open: map[string]bool{}, tables: map[uint32]bool{}, bridges: map[uint32]uint32{},
	}
}

// follow brings the addresses of the mesh's pods up to a Snapshot. It reports whether one has an identity that none had
// before: rulesets have no row for it. It costs what has changed.
func (u *datagrams) follow(s *mesh.Snapshot, asked bool) (strangers bool) {
	if !asked || u.at != nil && u.at.Config().Network != s.Config().Network {
		for a := range u.pods {
			u.pending[a] = struct{}{}
		}
		clear(u.pods)
		clear(u.known)
		u.at = nil
		if !asked {
			return false
		}
	}
	if u.at == nil {
		u.touchAll()
	}
	workloads, _, _ := s.Changes(u.at)
	u.at = s
	for c := range workloads {
		for _, w := range []*mesh.Workload{c.Old, c.New} {
			if w == nil {
				continue
			}
			for _, a := range w.Addrs {
				strangers = u.set(a.Unmap(), senderAt(s, a)) || strangers
			}
		}
	}
	return strangers
}

// senderAt is who has an address, as far as a datagram from there tells: pods that are captured, since the guard of each
// lets it use no other address.
func senderAt(s *mesh.Snapshot, a netip.Addr) mesh.Identity {
	w := s.WorkloadAt(mesh.NetAddr{Network: s.Config().Network, Addr: a})
	if w == nil || w.Node == "" || w.HostNetwork || w.NativeTunnel || w.Tunnel != mesh.TunnelHBONE {
		return mesh.Identity{}
	}
	return w.Identity
}

func (u *datagrams) set(a netip.Addr, who mesh.Identity) (stranger bool) {
	old := u.pods[a]
	if old == who {
		return false
	}
	u.pending[a] = struct{}{}
	if !old.IsZero() {
		delete(u.pods, a)
		if u.known[old]--; u.known[old] == 0 {
			delete(u.known, old)
		}
	}
	if who.IsZero() {
		return false
	}
	u.pods[a] = who
	u.known[who]++
	return u.known[who] == 1
}

// touchAll has every row compared.
func (u *datagrams) touchAll() {
	for k := range u.sources.have {
		u.pending[goAddr(k)] = struct{}{}
	}
	for a := range u.pods {
		u.pending[a] = struct{}{}
	}
}

// asksForUDP reports whether policies apply to the UDP of any pod of this node.
func (d *Datapath) asksForUDP(s *mesh.Snapshot) bool {
	for uid, r := range d.pods {
		if p, given := d.given[uid]; given && s.Config().FiltersUDP(p.Identity.Namespace) {
			return true
		} else if _, kept := d.gates.udp.gates.have[r.pod.Ifindex]; !given && kept {
			return true
		}
	}
	return false
}

// applySources writes who has which address, as far as it has changed. The rows of the node's own pods name their
// interface besides, and come before what the mesh says about the address.
func (d *Datapath) applySources() error {
	u := &d.gates.udp
	own := map[netip.Addr]string{}
	for uid, r := range d.pods {
		for _, a := range addrsOf(&r.pod) {
			own[a] = uid
			u.pending[a] = struct{}{}
		}
	}
	for a := range u.pending {
		k := kernelAddr(a)
		who, want := u.pods[a]
		row := bpf.MeshUdpSource{}
		if uid, local := own[a]; local && u.at != nil {
			p, given := d.given[uid]
			if !given { // what an earlier process wrote holds
				delete(u.pending, a)
				continue
			}
			who, want = p.Identity, !p.Identity.IsZero()
			row.Ifindex = d.pods[uid].pod.Ifindex
			row.Bridge = d.bridgeOf(row.Ifindex)
		}
		if row.Identity = idOf(who); d.gates.wanted.identity(row.Identity) != who {
			row.Identity = nobody
		}
		var err error
		if want {
			err = u.sources.put(k, row)
		} else if _, have := u.sources.have[k]; have {
			err = u.sources.remove(k)
		}
		if err != nil {
			return err
		}
		delete(u.pending, a)
	}
	return nil
}

// identity is who has a number, as far as rulesets know.
func (r *rules) identity(id uint64) mesh.Identity {
	if who, ok := r.identities[id]; ok {
		return who
	}
	return r.remote[id]
}

// bridgeOf is the bridge that an interface is a port of, 0 for none.
func (d *Datapath) bridgeOf(ifindex uint32) uint32 {
	u := &d.gates.udp
	if b, ok := u.bridges[ifindex]; ok {
		return b
	}
	var bridge uint32
	err := d.node.Do(func() error {
		l, err := netlink.LinkByIndex(int(ifindex))
		if err == nil {
			bridge = uint32(l.Attrs().MasterIndex)
		}
		return err
	})
	if err == nil {
		u.bridges[ifindex] = bridge
	}
	return bridge
}

// applyUDP makes the pods that ask for it, and no others, have their UDP filtered by what is wanted. It comes after the
// rulesets are written. A gate comes after what it refers to; the hook comes last, and goes first.
func (d *Datapath) applyUDP(broken map[uint64]bool) error {
	g := d.gates
	u := &g.udp
	wanted := map[uint32]bpf.MeshUdpGate{}
	asking := map[string]uint32{}
	clear(u.kept)
	for uid, r := range d.pods {
		ifindex, slot := r.pod.Ifindex, r.pod.Slot
		if _, given := d.given[uid]; !given {
			if row, ok := u.gates.have[ifindex]; ok && row.Slot == slot {
				wanted[ifindex] = row
				u.kept[row.V4], u.kept[row.V6] = true, true
			}
			continue
		}
		want, asks := g.wanted.udp[uid]
		if !asks {
			u.open[uid] = true
			continue
		}
		for _, id := range []*uint64{&want.v4, &want.v6} {
			if broken[*id] {
				*id = 0
			}
		}
		wanted[ifindex] = bpf.MeshUdpGate{V4: want.v4, V6: want.v6, Ifindex: ifindex, Slot: slot}
		asking[uid] = ifindex
	}

	errs := []error{d.applySources()}
	for ifindex, row := range wanted {
		old, have := u.gates.have[ifindex]
		errs = append(errs, d.makeUDPTables(row.Slot, !have || old.Slot != row.Slot), u.gates.put(ifindex, row))
	}
	errs = append(errs, d.attachUDP(asking))
	for uid, r := range d.pods {
		ifindex := r.pod.Ifindex
		if _, want := wanted[ifindex]; want {
			continue
		}
		if _, have := u.gates.have[ifindex]; have || u.hooked[uid] != 0 {
			errs = append(errs, d.removeHook(udpHook, d.podDir(uid), int(ifindex)), u.gates.remove(ifindex), d.forgetUDPFlows(r.pod.Slot))
			delete(u.hooked, uid)
		}
	}
	for ifindex := range u.gates.have { // of no pod
		if _, want := wanted[ifindex]; !want {
			errs = append(errs, u.gates.remove(ifindex))
		}
	}
	return errors.Join(errs...)
}

func (d *Datapath) attachUDP(asking map[string]uint32) error {
	u := &d.gates.udp
	var errs []error
	settled := false
	for uid, ifindex := range asking {
		if u.hooked[uid] == ifindex {
			continue
		}
		if !d.udpInForce(uid, ifindex) {
			if u.open[uid] && !settled {
				time.Sleep(settle)
				settled = true
			}
			if err := d.ensureHook(udpHook, d.podDir(uid), int(ifindex)); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		u.hooked[uid] = ifindex
		delete(u.open, uid)
	}
	return errors.Join(errs...)
}

func (d *Datapath) udpInForce(uid string, ifindex uint32) bool {
	in := false
	err := d.node.Do(func() error {
		in = udpHook.inForce(d.podDir(uid), int(ifindex))
		return nil
	})
	return err == nil && in
}

// udpTables are the maps of which each pod that asks for it has one.
func (d *Datapath) udpTables() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{bpf.MeshMapUdpBegun: d.kernel.UdpBegun, bpf.MeshMapUdpLetIn: d.kernel.UdpLetIn}
}

// makeUDPTables gives a slot tables of its own; fresh says that those which are there are another pod's.
func (d *Datapath) makeUDPTables(slot uint32, fresh bool) error {
	u := &d.gates.udp
	if u.tables[slot] && !fresh {
		return nil
	}
	for name, m := range d.udpTables() {
		var old *ebpf.Map
		if err := m.Lookup(slot, &old); err == nil {
			old.Close()
			if !fresh {
				continue
			}
		}
		table, err := ebpf.NewMap(d.spec.Maps[name].InnerMap)
		if err != nil {
			return fmt.Errorf("make a table for %s: %w", name, err)
		}
		err = m.Put(slot, table)
		table.Close()
		if err != nil {
			return fmt.Errorf("enter a table into %s: %w", name, err)
		}
	}
	u.tables[slot] = true
	return nil
}

// forgetUDPFlows takes a slot's tables away.
func (d *Datapath) forgetUDPFlows(slot uint32) error {
	delete(d.gates.udp.tables, slot)
	for name, m := range d.udpTables() {
		if err := m.Delete(slot); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove a table from %s: %w", name, err)
		}
	}
	return nil
}

// releaseUDP ends the filtering of a pod that is released.
func (d *Datapath) releaseUDP(uid string, r record) error {
	u := &d.gates.udp
	delete(u.hooked, uid)
	delete(u.open, uid)
	errs := []error{d.forgetUDPFlows(r.pod.Slot)}
	if !d.interfaceShared(uid, r.pod.Ifindex) {
		delete(u.bridges, r.pod.Ifindex)
		errs = append(errs, d.removeHook(udpHook, d.podDir(uid), int(r.pod.Ifindex)), u.gates.remove(r.pod.Ifindex))
	}
	for _, a := range addrsOf(&r.pod) {
		var row bpf.MeshUdpSource
		if k := kernelAddr(a); u.sources.m.Lookup(k, &row) == nil && row.Ifindex == r.pod.Ifindex {
			errs = append(errs, u.sources.remove(k))
		}
		u.pending[a] = struct{}{}
	}
	return errors.Join(errs...)
}

// auditUDP has what is not as it should be made anew by the applyUDP that follows.
func (d *Datapath) auditUDP(drift map[string]int) error {
	u := &d.gates.udp
	for uid, ifindex := range u.hooked {
		if !d.udpInForce(uid, ifindex) {
			d.drifted(udpHook.name, 1)
			delete(u.hooked, uid)
		}
	}
	for slot := range u.tables {
		for name, m := range d.udpTables() {
			var table *ebpf.Map
			if err := m.Lookup(slot, &table); err == nil {
				table.Close()
			} else if errors.Is(err, ebpf.ErrKeyNotExist) {
				d.drifted(name, 1)
				delete(u.tables, slot)
			} else {
				return fmt.Errorf("read %s: %w", name, err)
			}
		}
	}
	if drift[u.sources.name] > 0 {
		u.touchAll()
	}
	clear(u.bridges)
	return nil
}
