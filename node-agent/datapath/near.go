package datapath

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/netns"
)

// The short way: packets of a direct connection go from one pod's veth into the other pod, and the node's stack does
// not see them (bpf/near.h). It is for pods whose packets nothing on the node has to see, which is looked into here, at
// enrolment and again and again. Whatever is in doubt takes the way through the node.

// Detour says why a pod's direct connections go through the node's stack.
type Detour string

const (
	NoDetour        Detour = ""
	DetourPolicy    Detour = "network-policy"         // a NetworkPolicy selects the pod
	DetourUntold    Detour = "network-policy-unknown" // the control plane does not say whether one does
	DetourEngine    Detour = "policy-engine"          // the node's firewall has rules of somebody unknown
	DetourProgram   Detour = "program"                // somebody else's program or filter is at the pod's veth
	DetourCapture   Detour = "capture"                // a packet socket listens there
	DetourShaping   Detour = "shaping"                // so does a qdisc: bandwidth is limited
	DetourInterface Detour = "interface"              // the veth is part of something that is no plain bridge
)

// cuts reports whether open connections may not go on past what is in their way: it might refuse them, and they would
// never know if it sees them from the middle on.
func (w Detour) cuts() bool { return w == DetourPolicy || w == DetourEngine || w == DetourProgram }

// nearby is what is known of the ways of the pods. Guarded by Datapath.mu.
type nearby struct {
	selected map[string]bool // by UID, whether a NetworkPolicy selects the pod; nil before anybody said
	detours  map[string]Detour
	found    surroundings
	looked   bool
}

// surroundings is what the node has at its pods' veths.
type surroundings struct {
	links  map[int]linkSeen
	shaped map[int]string // qdisc by interface
	tapped map[int]bool   // packet sockets by interface; 0: of all
	engine string         // the firewall's chain that nobody knows, "" for none
	hooked map[string]bool
	// loose: the node's connection tracker takes up a connection in its middle.
	loose bool
}

type linkSeen struct {
	name    string
	master  int
	foreign string // what is attached that is not ours
	// uid is the pod's, and revisions are those of what is attached to tcx, ingress and egress, where it was found to be
	// the pod's own. The kernel counts them up with each change.
	uid       string
	revisions [2]uint64
}

// lookAround runs in the node's namespace. all: else only what may come any second and is cheap to see.
func (d *Datapath) lookAround(all bool) (s surroundings, err error) {
	s = d.near.found
	if s.tapped, err = packetSockets(d.cfg.Proc); err != nil || !all {
		return s, err
	}
	b, err := os.ReadFile(filepath.Join(d.cfg.Proc, "sys/net/netfilter/nf_conntrack_tcp_loose"))
	s.loose = err != nil || strings.TrimSpace(string(b)) != "0"
	if s.engine, s.hooked, err = unknownEngine(d.cfg.Proc); err != nil {
		return s, err
	}
	qdiscs, err := netlink.QdiscList(nil)
	if err != nil {
		return s, fmt.Errorf("list qdiscs: %w", err)
	}
	s.shaped, s.links = map[int]string{}, map[int]linkSeen{}
	filtered := map[int]bool{}
	for _, q := range qdiscs {
		switch index := q.Attrs().LinkIndex; q.Type() {
		case "noqueue":
		case "clsact", "ingress":
			filtered[index] = true
		default:
			s.shaped[index] = q.Type()
		}
	}
	list, err := netlink.LinkList()
	if err != nil {
		return s, fmt.Errorf("list interfaces: %w", err)
	}
	byIndex := make(map[int]netlink.Link, len(list))
	for _, l := range list {
		byIndex[l.Attrs().Index] = l
	}
	for uid, r := range d.pods {
		index := int(r.pod.Ifindex)
		l, ok := byIndex[index]
		if !ok {
			continue
		}
		a := l.Attrs()
		seen := linkSeen{name: a.Name, master: a.MasterIndex, uid: uid}
		if a.Xdp != nil && a.Xdp.Attached {
			seen.foreign = "an XDP program"
		}
		if m := byIndex[a.MasterIndex]; a.MasterIndex != 0 && (m == nil || m.Type() != "bridge") {
			seen.master = -1
		}
		if seen.foreign == "" {
			if err := d.lookAt(&seen, l, filtered[index]); err != nil {
				return s, err
			}
		}
		s.links[index] = seen
	}
	return s, nil
}

// lookAt notes what is attached to a pod's veth that is not pinned for the pod.
func (d *Datapath) lookAt(seen *linkSeen, l netlink.Link, filtered bool) error {
	seen.foreign, seen.revisions = d.foreignPrograms(seen.uid, l.Attrs().Index)
	if seen.foreign != "" || !filtered {
		return nil
	}
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS, netlink.MakeHandle(0xffff, 0)} {
		list, err := netlink.FilterList(l, parent)
		if err != nil {
			return fmt.Errorf("list the filters of %s: %w", l.Attrs().Name, err)
		}
		for _, f := range list {
			if b, ok := f.(*netlink.BpfFilter); ok && (b.Name == guardHook.filter || b.Name == udpHook.filter) {
				continue
			}
			seen.foreign = "a filter of type " + f.Type()
			return nil
		}
	}
	return nil
}

// foreignPrograms names one at tcx that is not pinned for the pod. Where there is none it returns the revisions at which
// that was so; on a kernel before 6.6, which has no tcx, zeros.
func (d *Datapath) foreignPrograms(uid string, index int) (foreign string, at [2]uint64) {
	var attached []link.AttachedProgram
	for i, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		q, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: hook})
		if err != nil {
			return "", at
		}
		attached = append(attached, q.Programs...)
		at[i] = q.Revision
	}
	if before := d.near.found.links[index]; before.uid == uid && before.revisions == at && at != ([2]uint64{}) {
		return "", at
	}
	own := map[ebpf.ProgramID]bool{}
	pins, _ := os.ReadDir(d.podDir(uid))
	for _, p := range pins {
		if k, err := link.LoadPinnedLink(filepath.Join(d.podDir(uid), p.Name()), nil); err == nil {
			if info, err := k.Info(); err == nil {
				own[info.Program] = true
			}
			k.Close()
		}
	}
	for _, p := range attached {
		if !own[p.ID] {
			return fmt.Sprintf("BPF program %d", p.ID), [2]uint64{}
		}
	}
	return "", at
}

// packetSockets reads which interfaces somebody captures packets on.
func packetSockets(proc string) (map[int]bool, error) {
	b, err := os.ReadFile(filepath.Join(proc, "thread-self/net/packet"))
	if errors.Is(err, os.ErrNotExist) { // the kernel has no packet sockets, or /proc is another machine's
		if b, err = os.ReadFile("/proc/thread-self/net/packet"); errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("read the packet sockets: %w", err)
	}
	out := map[int]bool{}
	for i, line := range strings.Split(string(b), "\n") {
		// sk RefCnt Type Proto Iface R Rmem User Inode
		f := strings.Fields(line)
		if i == 0 || len(f) < 5 {
			continue
		}
		var proto, index int
		if _, err := fmt.Sscanf(f[3]+" "+f[4], "%x %d", &proto, &index); err != nil {
			return nil, fmt.Errorf("read the packet sockets: %q", line)
		}
		switch proto {
		case 0x0003, 0x0800, 0x86dd: // all, IPv4, IPv6
			out[index] = true
		}
	}
	return out, nil
}

// detour says which way a pod's direct connections take, and why in words.
func (d *Datapath) detour(uid string, r record) (Detour, string) {
	s := &d.near.found
	selected, told := d.near.selected[uid]
	if d.near.selected == nil {
		told = r.pod.Near != 0 // to an earlier process; until the control plane is heard
	}
	l, seen := s.links[int(r.pod.Ifindex)]
	switch {
	case !told:
		return DetourUntold, "the control plane does not say whether a NetworkPolicy selects the pod"
	case selected:
		return DetourPolicy, "a NetworkPolicy selects the pod"
	case !seen:
		return DetourInterface, "its veth has not been looked at"
	case s.engine != "":
		return DetourEngine, s.engine
	case s.hooked[l.name]:
		return DetourEngine, "nftables has a chain for " + l.name
	case l.foreign != "":
		return DetourProgram, l.foreign + " is attached to " + l.name
	case s.shaped[int(r.pod.Ifindex)] != "":
		return DetourShaping, l.name + " has the qdisc " + s.shaped[int(r.pod.Ifindex)]
	case s.tapped[0], s.tapped[int(r.pod.Ifindex)]:
		return DetourCapture, "packets are captured on " + l.name
	case l.master < 0:
		return DetourInterface, l.name + " is part of an interface that is no bridge"
	}
	return NoDetour, ""
}

// SetSelected tells which pods NetworkPolicies select, by their UIDs. Open connections of one that is selected now are
// reset: whether the policy would have let them be is for its engine to say, which has not seen them.
func (d *Datapath) SetSelected(selected map[string]bool) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.near.selected != nil && maps.Equal(d.near.selected, selected) {
		return nil
	}
	d.near.selected = maps.Clone(selected)
	return d.chooseWays(!d.near.looked)
}

// CheckWays looks at what is attached to the node and its pods' veths, and has direct connections take another way
// where that has changed. all: else only at packet captures.
func (d *Datapath) CheckWays(all bool) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	return d.chooseWays(all)
}

// Detours returns why the direct connections of each enrolled pod go through the node's stack; NoDetour for a pod whose
// packets are redirected.
func (d *Datapath) Detours() map[string]Detour {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.near.detours)
}

// chooseWays decides for every pod. What it cannot find out changes nothing, and is an error.
func (d *Datapath) chooseWays(all bool) error {
	var found surroundings
	err := d.node.Do(func() (err error) {
		found, err = d.lookAround(all || !d.near.looked)
		return err
	})
	if err != nil {
		return fmt.Errorf("look for what is attached to the pods' interfaces: %w", err)
	}
	d.near.found = found
	d.near.looked = d.near.looked || all
	var errs []error
	ended := map[uint32]bool{} // and whether they are cut
	detours := make(map[string]Detour, len(d.pods))
	for uid, r := range d.pods {
		why, text := d.detour(uid, r)
		detours[uid] = why
		want := uint32(0)
		if why == NoDetour {
			want = max(1, uint32(found.links[int(r.pod.Ifindex)].master)) // 1 is the loopback interface: no bridge
		}
		if old, known := d.near.detours[uid]; !known || old != why {
			d.cfg.Log.Info("the way of a pod's direct connections", "uid", uid, "redirected", why == NoDetour, "why", text)
		}
		if want == r.pod.Near {
			continue
		}
		if r.pod.Near != 0 {
			ended[r.pod.Ifindex] = why.cuts()
		}
		r.pod.Near = want
		if err := d.kernel.Pods.Put(r.cookie, r.pod); err != nil {
			errs = append(errs, fmt.Errorf("set the way of pod %s: %w", uid, err))
			continue
		}
		d.pods[uid] = r
	}
	d.near.detours = detours
	if len(ended) > 0 {
		time.Sleep(inFlight) // who read the pod before writes down its connection
		errs = append(errs, d.endNears(ended))
	}
	return errors.Join(errs...)
}

// endNears has the open connections of some interfaces go on through the node's stack, or cuts them. Where the node's
// connection tracker takes up none in its middle, those that need not be cut stay as they are.
func (d *Datapath) endNears(ended map[uint32]bool) error {
	var over []bpf.MeshFlow
	var cut []direct
	err := d.eachNear(func(f bpf.MeshFlow, n bpf.MeshNear) {
		cuts, named := false, false
		for _, index := range []uint32{n.Client, n.Server} {
			c, ok := ended[index]
			named = named || ok
			cuts = cuts || c
		}
		switch {
		case !named:
		case n.Ended != 0:
			over = append(over, f)
		case cuts:
			cut = append(cut, direct{client: netip.AddrPortFrom(goAddr(f.Client), f.ClientPort), server: netip.AddrPortFrom(goAddr(f.Server), f.ServerPort)})
			over = append(over, f)
		case d.near.found.loose:
			over = append(over, f)
		}
	})
	if err != nil {
		return err
	}
	return errors.Join(d.cut(cut), d.forgetNears(over))
}

// eachNear goes through the connections that are redirected, and some that have ended.
func (d *Datapath) eachNear(do func(bpf.MeshFlow, bpf.MeshNear)) error {
	var f bpf.MeshFlow
	var n bpf.MeshNear
	it := d.kernel.Nears.Iterate()
	for it.Next(&f, &n) {
		do(f, n)
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return fmt.Errorf("read the connections that are redirected: %w", err)
	}
	return nil
}

// forgetNears ends the short way of connections; one whose is gone already is fine.
func (d *Datapath) forgetNears(flows []bpf.MeshFlow) error {
	var errs []error
	for _, f := range flows {
		if err := d.kernel.Nears.Delete(f); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("end the short way of a connection: %w", err))
		}
	}
	if len(flows) > 0 {
		errs = append(errs, d.newGeneration())
	}
	return errors.Join(errs...)
}

// newGeneration has sockets look up their way again, which some know by heart. It is the time, so that it is no other
// process's.
func (d *Datapath) newGeneration() error {
	if err := d.kernel.NearGeneration.Set(uint64(time.Now().UnixNano())); err != nil {
		return fmt.Errorf("have sockets look up their ways again: %w", err)
	}
	return nil
}

// cut resets connections by their addresses, at both ends.
func (d *Datapath) cut(conns []direct) error {
	if len(conns) == 0 {
		return nil
	}
	byAddr := map[netip.Addr]*netns.Handle{}
	for _, p := range d.given {
		for _, a := range p.Addrs {
			byAddr[a.Unmap()] = p.NetNS
		}
	}
	err := resetBothEnds(conns, func(c direct) (client, server *netns.Handle) { return byAddr[c.client.Addr()], byAddr[c.server.Addr()] })
	d.cfg.Log.Info("direct connections reset that may not go past the node's stack any more", "count", len(conns))
	return err
}

// leaveNear takes a pod that is released off the short way.
func (d *Datapath) leaveNear(uid string, r record) error {
	delete(d.near.detours, uid)
	if r.pod.Near == 0 {
		return nil
	}
	r.pod.Near = 0
	if err := d.kernel.Pods.Update(r.cookie, r.pod, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("set the way of its connections: %w", err)
	}
	time.Sleep(inFlight)
	// Without its guard nothing redirects them: they cannot stay as they are.
	return d.endNears(map[uint32]bool{r.pod.Ifindex: !d.near.found.loose})
}

// pruneNears forgets connections of interfaces that no pod has any more.
func (d *Datapath) pruneNears() error {
	known := map[uint32]bool{}
	for _, r := range d.pods {
		known[r.pod.Ifindex] = true
	}
	var gone []bpf.MeshFlow
	err := d.eachNear(func(f bpf.MeshFlow, n bpf.MeshNear) {
		if !known[n.Client] || !known[n.Server] {
			gone = append(gone, f)
		}
	})
	if err != nil {
		return err
	}
	return d.forgetNears(gone)
}
