package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/warrenmesh/warren/bpf"
)

// Enroll captures a pod's connections, or brings what is there into line with p. A pod that cannot be
// captured is an *UnsupportedError and is left as it was.
//
// The order, and what each other one would break:
//
//  1. rule, route, sysctls  Nothing is marked yet, so they do nothing. Later than 5, a captured SYN would
//     leave by the main table.
//  2. listeners             Before 4, or every connection in between is refused.
//  3. owner of the address  Before 4: sk_lookup drops what it cannot assign to a pod. From here on kubelet's
//     connections carry tickets, so that its probes pass step 4 unharmed.
//  4. sk_lookup             From here on what comes in goes to the agent. Before 5: a marked SYN that finds no
//     sk_lookup is delivered to whatever the pod itself has on that port.
//  5. the pod, for connect  From here on what goes out is captured or vouched for.
//  6. the guard             Last: before 5 it would drop the SYN of every connection that nobody vouched for.
func (d *Datapath) Enroll(p Pod) error {
	if len(p.UID) == 0 || len(p.UID) >= len(bpf.MeshPod{}.Uid) {
		return fmt.Errorf("enrol pod %q: its UID must have 1 to %d bytes", p.UID, len(bpf.MeshPod{}.Uid)-1)
	}
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	w, err := d.inspect(p)
	if err != nil {
		return err
	}
	if old, ok := d.pods[p.UID]; ok && old.cookie != p.NetNS.Cookie() {
		// The same pod in a new sandbox: nothing of the old namespace is worth keeping.
		if err := d.release(p.UID); err != nil {
			return err
		}
	}
	_, known := d.pods[p.UID]
	if !known { // of one that is captured it would be a way out
		if err := p.NetNS.Do(func() error { return otherMesh(p.UID) }); err != nil {
			return err
		}
	}
	r, err := d.assign(p, w)
	if err != nil {
		return err
	}
	if err := d.plumb(p, w, r); err != nil {
		err = fmt.Errorf("enrol pod %s: %w", p.UID, err)
		if !known { // half captured is worse than not captured: the caller reports and tries again
			d.pods[p.UID] = r
			err = errors.Join(err, d.release(p.UID))
		}
		return err
	}
	d.given[p.UID] = p
	if w := d.watches[p.UID]; w != nil {
		w.right = false
	}
	d.near.looked = false // CheckWays chooses its way
	d.spares.fill(d.loadSpare)
	if err := d.applyPolicies(); err != nil { // the pod is captured: what the kernel does not decide, the agent does
		d.cfg.Log.Error("telling the kernel the policies of a new pod", "uid", p.UID, "error", err)
	}
	if err := d.applyNames(); err != nil { // it asks its resolver as before
		d.cfg.Log.Error("answering the questions of a new pod", "uid", p.UID, "error", err)
	}
	return nil
}

// assign computes the pod's row. A pod keeps its slot; a new one gets the lowest that is free.
func (d *Datapath) assign(p Pod, w wiring) (record, error) {
	r := record{cookie: p.NetNS.Cookie(), pod: bpf.MeshPod{
		V4: kernelAddr(w.v4), V6: kernelAddr(w.v6), Ifindex: uint32(w.nodeIndex),
	}}
	copy(r.pod.Uid[:], p.UID)
	if old, ok := d.pods[p.UID]; ok {
		r.pod.Slot, r.pod.Identity = old.pod.Slot, old.pod.Identity
		if r.pod.Ifindex == old.pod.Ifindex {
			r.pod.Near = old.pod.Near
		}
		return r, nil
	}
	taken := make(map[uint32]bool, len(d.pods))
	for _, other := range d.pods {
		taken[other.pod.Slot] = true
	}
	for slot := range d.kernel.Pods.MaxEntries() {
		if !taken[slot] {
			r.pod.Slot = slot
			return r, nil
		}
	}
	return r, &UnsupportedError{p.UID, TooManyPods, fmt.Sprintf("%d pods are captured on this node", len(taken))}
}

func (d *Datapath) plumb(p Pod, w wiring, r record) error {
	dir := d.podDir(p.UID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := p.NetNS.Do(func() error { return d.setRouting(w) }); err != nil { // 1
		return err
	}
	if _, known := d.pods[p.UID]; !known {
		for _, account := range []uint32{r.pod.Slot, d.kernel.Pods.MaxEntries() + r.pod.Slot} {
			if err := d.kernel.Handshakes.Put(account, int32(0)); err != nil {
				return fmt.Errorf("clear the count of handshakes: %w", err)
			}
		}
		if err := errors.Join(d.closeGate(r.pod.Slot), d.forgetUDPFlows(r.pod.Slot)); err != nil {
			return err
		}
	}
	if err := d.setListeners(r.pod.Slot, p.Listeners); err != nil { // 2
		return err
	}
	owner := bpf.MeshOwner{Cookie: r.cookie, Slot: r.pod.Slot}
	for _, a := range addrsOf(&r.pod) { // 3
		if err := d.kernel.Owners.Put(kernelAddr(a), owner); err != nil {
			return fmt.Errorf("enter address %s: %w", a, err)
		}
	}
	if err := d.dropForeignAddrs(p.UID, r); err != nil {
		return err
	}
	if err := d.ensureLookup(p, r, dir); err != nil { // 4
		return err
	}
	if err := d.kernel.Pods.Put(r.cookie, r.pod); err != nil { // 5
		return fmt.Errorf("enter the pod: %w", err)
	}
	d.pods[p.UID] = r
	if err := d.kernel.Guards.Put(r.pod.Ifindex, bpf.MeshGuarded{V4: r.pod.V4, V6: r.pod.V6}); err != nil { // 6
		return fmt.Errorf("enter interface %s: %w", w.nodeName, err)
	}
	return d.ensureHook(guardHook, dir, w.nodeIndex)
}

// dropForeignAddrs forgets addresses that the pod had before and has no more.
func (d *Datapath) dropForeignAddrs(uid string, now record) error {
	old, ok := d.pods[uid]
	if !ok {
		return nil
	}
	for _, a := range addrsOf(&old.pod) {
		if k := kernelAddr(a); k != now.pod.V4 && k != now.pod.V6 {
			if err := d.forgetAddr(a, old.cookie); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *Datapath) setListeners(slot uint32, l Listeners) error {
	for kind, f := range map[bpf.MeshListener]*os.File{
		bpf.MeshListenerLISTENER_OUTBOUND: l.Outbound,
		bpf.MeshListenerLISTENER_INBOUND:  l.Inbound,
		bpf.MeshListenerLISTENER_HBONE:    l.HBONE,
	} {
		if f == nil {
			return errors.New("a listener is missing")
		}
		c, err := f.SyscallConn() // Fd() would make the socket blocking
		if err != nil {
			return err
		}
		var put error
		if err := c.Control(func(fd uintptr) { put = d.kernel.Listeners.Put(listenerKey(slot, kind), uint64(fd)) }); err != nil {
			return err
		}
		if put != nil {
			return fmt.Errorf("enter %s: %w", f.Name(), put)
		}
	}
	return nil
}

func listenerKey(slot uint32, kind bpf.MeshListener) uint32 {
	return slot*uint32(bpf.MeshListenerLISTENERS) + uint32(kind)
}

func lookupPin(podDir string) string { return filepath.Join(podDir, "lookup") }

func (d *Datapath) podDir(uid string) string { return filepath.Join(d.dir, "enrolled", uid) }

// ensureLookup attaches sk_lookup to the pod's namespace, or points what is attached at a new program.
func (d *Datapath) ensureLookup(p Pod, r record, dir string) error {
	program, err := d.loadLookup(&r.pod)
	if err != nil {
		return err
	}
	defer program.Close()
	pin := lookupPin(dir)
	return p.NetNS.WithFD(func(fd int) error {
		if old, err := link.LoadPinnedLink(pin, nil); err == nil {
			defer old.Close()
			if same, err := sameNetNS(old, fd); err != nil {
				return err
			} else if same {
				return old.Update(program)
			}
		}
		l, err := link.AttachNetNs(fd, program)
		if err != nil {
			return fmt.Errorf("attach sk_lookup to the pod's network namespace: %w", explain(err))
		}
		defer l.Close()
		return repin(l, pin)
	})
}

// loadAnother loads one more instance of a program.
func (d *Datapath) loadAnother(name string) (*ebpf.Program, error) {
	c, err := d.loadInstance(name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.DetachProgram(name), nil
}

// loadInstance loads a program with variables of its own, over the maps that all share. Only the maps that it refers
// to are passed: each one costs a comparison with the kernel's.
func (d *Datapath) loadInstance(name string) (*ebpf.Collection, error) {
	spec := d.spec.Copy()
	spec.Programs = map[string]*ebpf.ProgramSpec{name: spec.Programs[name]}
	used := spec.Programs[name].Instructions.ReferenceOffsets()
	shared := d.sharedMaps()
	for m := range spec.Maps {
		if _, ok := used[m]; !ok && !strings.HasPrefix(m, ".") { // their variables
			delete(spec.Maps, m)
			delete(shared, m)
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", name, explain(err))
	}
	return c, nil
}

func (d *Datapath) sharedMaps() map[string]*ebpf.Map {
	return map[string]*ebpf.Map{
		bpf.MeshMapAgentSockets:    d.kernel.AgentSockets,
		bpf.MeshMapDestinations:    d.kernel.Destinations,
		bpf.MeshMapDirects:         d.kernel.Directs,
		bpf.MeshMapDnsClients:      d.kernel.DnsClients,
		bpf.MeshMapDnsNames:        d.kernel.DnsNames,
		bpf.MeshMapDnsScratches:    d.kernel.DnsScratches,
		bpf.MeshMapEventBudgets:    d.kernel.EventBudgets,
		bpf.MeshMapEvents:          d.kernel.Events,
		bpf.MeshMapGates:           d.kernel.Gates,
		bpf.MeshMapGuards:          d.kernel.Guards,
		bpf.MeshMapHandshakes:      d.kernel.Handshakes,
		bpf.MeshMapListeners:       d.kernel.Listeners,
		bpf.MeshMapNears:           d.kernel.Nears,
		bpf.MeshMapNearsEnded:      d.kernel.NearsEnded,
		bpf.MeshMapNearsNext:       d.kernel.NearsNext,
		bpf.MeshMapOutcomes:        d.kernel.Outcomes,
		bpf.MeshMapOwners:          d.kernel.Owners,
		bpf.MeshMapPods:            d.kernel.Pods,
		bpf.MeshMapPrefixes:        d.kernel.Prefixes,
		bpf.MeshMapRulesIdentities: d.kernel.RulesIdentities,
		bpf.MeshMapRulesPorts:      d.kernel.RulesPorts,
		bpf.MeshMapRulesSources:    d.kernel.RulesSources,
		bpf.MeshMapRulesets:        d.kernel.Rulesets,
		bpf.MeshMapServiceDraws:    d.kernel.ServiceDraws,
		bpf.MeshMapServices:        d.kernel.Services,
		bpf.MeshMapTickets:         d.kernel.Tickets,
		bpf.MeshMapUdpBegun:        d.kernel.UdpBegun,
		bpf.MeshMapUdpGates:        d.kernel.UdpGates,
		bpf.MeshMapUdpLetIn:        d.kernel.UdpLetIn,
		bpf.MeshMapUdpSources:      d.kernel.UdpSources,
		bpf.MeshMapVerdicts:        d.kernel.Verdicts,
		bpf.MeshMapWays:            d.kernel.Ways,
	}
}

// Release ends capture. Open connections go on: the rule and the route that carry them stay until the
// namespace ends. Releasing a pod that is unknown or whose namespace is gone is fine.
//
// The order is Enroll's backwards: the guard first, or it would drop connections that nobody vouches for any
// more; sk_lookup only when nothing is captured any more.
func (d *Datapath) Release(uid string) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	return d.release(uid)
}

// inFlight is what a connection takes from the connect hook to its SYN. One that was captured last needs sk_lookup still.
const inFlight = 10 * time.Millisecond

func (d *Datapath) release(uid string) error {
	dir := d.podDir(uid)
	r, ok := d.pods[uid]
	if !ok {
		return removePins(dir)
	}
	if err := d.closeGate(r.pod.Slot); err != nil {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	if err := d.leaveNear(uid, r); err != nil {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	if err := errors.Join(d.releaseUDP(uid, r), d.releaseNames(uid, r)); err != nil {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	if !d.interfaceShared(uid, r.pod.Ifindex) {
		if err := d.removeHook(guardHook, dir, int(r.pod.Ifindex)); err != nil {
			return fmt.Errorf("release pod %s: %w", uid, err)
		}
		if err := d.kernel.Guards.Delete(r.pod.Ifindex); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("release pod %s: forget its interface: %w", uid, err)
		}
	}
	if err := d.kernel.Pods.Delete(r.cookie); err == nil {
		time.Sleep(inFlight)
	} else if !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	if err := removePins(dir); err != nil {
		return fmt.Errorf("release pod %s: %w", uid, err)
	}
	for _, a := range addrsOf(&r.pod) {
		if err := d.forgetAddr(a, r.cookie); err != nil {
			return fmt.Errorf("release pod %s: %w", uid, err)
		}
	}
	for kind := range bpf.MeshListenerLISTENERS {
		err := d.kernel.Listeners.Delete(listenerKey(r.pod.Slot, kind))
		if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) && !errors.Is(err, os.ErrInvalid) && !noSocket(err) {
			return fmt.Errorf("release pod %s: forget its listeners: %w", uid, err)
		}
	}
	delete(d.pods, uid)
	delete(d.given, uid)
	d.unwatch(uid)
	return nil
}

// interfaceShared: an interface number may belong to a newer pod by now.
func (d *Datapath) interfaceShared(uid string, ifindex uint32) bool {
	for other, r := range d.pods {
		if other != uid && r.pod.Ifindex == ifindex {
			return true
		}
	}
	return false
}

// forgetAddr removes an address unless another pod has it by now.
func (d *Datapath) forgetAddr(a netip.Addr, cookie uint64) error {
	var o bpf.MeshOwner
	k := kernelAddr(a)
	if err := d.kernel.Owners.Lookup(k, &o); errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && o.Cookie != cookie {
		return nil
	}
	if err := d.kernel.Owners.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("forget address %s: %w", a, err)
	}
	return nil
}

// removePins detaches what is pinned for a pod: a link without pin or descriptor is gone.
func removePins(dir string) error {
	for _, pin := range []string{guardHook.pin(dir), udpHook.pin(dir), lookupPin(dir)} {
		if err := unpin(pin); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// Prune releases every enrolled pod that keep does not want. It is called once after a restart, when it is
// known which pods there are.
func (d *Datapath) Prune(keep func(uid string) bool) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	var errs []error
	for uid := range d.pods {
		if !keep(uid) {
			errs = append(errs, d.release(uid))
		}
	}
	// Pins of a pod that an earlier process died over between making them and entering the pod.
	entries, err := os.ReadDir(filepath.Join(d.dir, "enrolled"))
	errs = append(errs, err)
	for _, e := range entries {
		if _, ok := d.pods[e.Name()]; !ok {
			errs = append(errs, removePins(d.podDir(e.Name())))
		}
	}
	return errors.Join(append(errs, d.pruneSchemas())...)
}

// updatePodLinks points the links of all enrolled pods at this process's programs.
func (d *Datapath) updatePodLinks() error {
	for uid, r := range d.pods {
		dir := d.podDir(uid)
		if l, err := link.LoadPinnedLink(lookupPin(dir), nil); err == nil {
			var program *ebpf.Program
			if program, err = d.loadLookup(&r.pod); err == nil {
				err = l.Update(program)
				program.Close()
			}
			l.Close()
			if err != nil && !linkDead(err) {
				return fmt.Errorf("update sk_lookup of pod %s: %w", uid, err)
			}
		}
		for _, h := range []vethHook{guardHook, udpHook} {
			if err := d.updateHook(h, dir, int(r.pod.Ifindex)); err != nil {
				return fmt.Errorf("update the %s of pod %s: %w", h.name, uid, err)
			}
		}
	}
	return nil
}
