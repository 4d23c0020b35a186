package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
)

// PodState is what the kernel says about an enrolled pod.
type PodState struct {
	UID      string
	Cookie   uint64 // of its network namespace
	Addrs    []netip.Addr
	Problems []string // what is missing or wrong, in words; empty when all is in force
}

// InForce reports whether nothing can pass around the agent.
func (s PodState) InForce() bool { return len(s.Problems) == 0 }

// Enrolled reads from the kernel which pods are enrolled and what of each is in force.
func (d *Datapath) Enrolled() ([]PodState, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.enrolled()
}

func (d *Datapath) enrolled() ([]PodState, error) {
	var common []string
	for _, a := range d.attachments() {
		if !a.inForce(d.dir) {
			common = append(common, a.name+" is not attached")
		}
	}
	var pods []*bpf.MeshPod
	var out []PodState
	var cookie uint64
	var pod bpf.MeshPod
	it := d.kernel.Pods.Iterate()
	for it.Next(&cookie, &pod) {
		p := pod
		pods = append(pods, &p)
		out = append(out, PodState{UID: uidOf(&p), Cookie: cookie, Addrs: addrsOf(&p)})
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the enrolled pods: %w", err)
	}
	d.hear()
	guarded := map[string]bool{}
	if err := d.node.Do(func() error {
		for i, s := range out {
			guarded[s.UID] = d.guardInForce(s.UID, int(pods[i].Ifindex))
		}
		return nil
	}); err != nil {
		return nil, err
	}
	for i := range out {
		s := &out[i]
		s.Problems = append(slices.Clone(common), d.problems(*s, pods[i], guarded[s.UID])...)
	}
	slices.SortFunc(out, func(a, b PodState) int { return cmp.Compare(a.UID, b.UID) })
	return out, nil
}

// problems compares one pod's hooks, maps, rule and route with what they should be.
func (d *Datapath) problems(s PodState, pod *bpf.MeshPod, guarded bool) (out []string) {
	for _, a := range s.Addrs {
		var o bpf.MeshOwner
		if err := d.kernel.Owners.Lookup(kernelAddr(a), &o); err != nil || o.Cookie != s.Cookie || o.Slot != pod.Slot {
			out = append(out, fmt.Sprintf("address %s is not entered for it", a))
		}
	}
	for kind, name := range map[bpf.MeshListener]string{
		bpf.MeshListenerLISTENER_OUTBOUND: "outbound",
		bpf.MeshListenerLISTENER_INBOUND:  "inbound",
		bpf.MeshListenerLISTENER_HBONE:    "HBONE",
	} {
		var socket uint64
		if err := d.kernel.Listeners.Lookup(listenerKey(pod.Slot, kind), &socket); err != nil {
			out = append(out, fmt.Sprintf("the %s listener is gone", name))
		}
	}
	var g bpf.MeshGuarded
	if err := d.kernel.Guards.Lookup(pod.Ifindex, &g); err != nil || g.V4 != pod.V4 || g.V6 != pod.V6 {
		out = append(out, "the guard does not know it")
	}
	if !guarded {
		out = append(out, "the guard is not attached, or not first")
	}
	if _, asked := d.gates.udp.gates.have[pod.Ifindex]; asked && !d.udpInForce(s.UID, pod.Ifindex) {
		out = append(out, "the filter for UDP is not attached, or not first")
	}
	if !d.lookupInForce(s.UID) {
		out = append(out, "sk_lookup is not attached")
	}
	given, ok := d.given[s.UID]
	if !ok {
		return append(out, "its network namespace is not known to this process yet")
	}
	out = append(out, d.namespaceProblems(s.UID, given)...)
	slices.Sort(out)
	return out
}

// guardInForce runs in the node's namespace.
func (d *Datapath) guardInForce(uid string, ifindex int) bool {
	dir := d.podDir(uid)
	w := d.watches[uid]
	if w == nil {
		return guardHook.inForce(dir, ifindex)
	}
	q, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: guardHook.attach})
	if err == nil && w.guarded != 0 && w.guarded == q.Revision && w.wiring.nodeIndex == ifindex && pinned(guardHook.pin(dir)) {
		return true
	}
	ok := guardHook.inForce(dir, ifindex)
	w.guarded = 0
	if ok && err == nil {
		w.guarded = q.Revision
	}
	return ok
}

// lookupInForce asks what is attached to the pod's namespace. What its link says of itself it asks where that is not the
// program that was found to be the link's.
func (d *Datapath) lookupInForce(uid string) bool {
	pin := lookupPin(d.podDir(uid))
	p, known := d.given[uid]
	w := d.watches[uid]
	if known && w != nil && w.lookup != 0 && pinned(pin) {
		var q *link.QueryResult
		err := p.NetNS.WithFD(func(fd int) (err error) {
			q, err = link.QueryPrograms(link.QueryOptions{Target: fd, Attach: ebpf.AttachSkLookup})
			return err
		})
		if err == nil && slices.ContainsFunc(q.Programs, func(a link.AttachedProgram) bool { return a.ID == w.lookup }) {
			return true
		}
	}
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return false
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil || info.NetNs() == nil || info.NetNs().NetnsInode == 0 {
		return false
	}
	if !known {
		return true
	}
	same := false
	err = p.NetNS.WithFD(func(fd int) (err error) {
		same, err = sameNetNS(l, fd)
		return err
	})
	if w != nil && err == nil && same {
		w.lookup = info.Program
	}
	return err == nil && same
}

// pinned reports whether there is something at a path.
func pinned(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil
}

// Audit compares every enrolled pod, the captured destinations and the policies with what they should be and repairs
// them. The states are those found before the repair; what else was wrong is logged and counted in Drift.
func (d *Datapath) Audit() ([]PodState, error) {
	if err := d.write(); err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	states, err := d.enrolled()
	if err != nil {
		return nil, err
	}
	var errs []error
	if err := d.attachCgroups(); err != nil {
		errs = append(errs, err)
	}
	for _, s := range states {
		p, ok := d.given[s.UID]
		if s.InForce() || !ok {
			continue
		}
		d.cfg.Log.Warn("repairing the capture of a pod", "uid", s.UID, "problems", s.Problems)
		d.drift["pods"]++
		if err := d.repair(p); err != nil {
			errs = append(errs, err)
		}
	}
	errs = append(errs, d.auditDestinations(), d.auditPolicies(), d.auditNames(), d.pruneDirects(), d.pruneNears())
	return states, errors.Join(errs...)
}

// auditDestinations compares the captured destinations with the last SetDestinations.
func (d *Datapath) auditDestinations() error {
	if d.dest == nil {
		return nil
	}
	want := *d.dest
	have, err := d.readDestinations()
	if err != nil {
		return err
	}
	wrong := difference(have.Addrs, want.Addrs) + difference(have.Prefixes, want.Prefixes)
	if wrong == 0 {
		return nil
	}
	d.drifted("destinations", wrong)
	d.dest = &have
	return d.setDestinations(want)
}

func difference[K comparable](a, b map[K]bool) (n int) {
	for k, v := range a {
		if w, ok := b[k]; !ok || v != w {
			n++
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			n++
		}
	}
	return n
}

// auditPolicies compares the kernel's policies with those of the last SetPolicies.
func (d *Datapath) auditPolicies() error {
	if d.gates.compiler == nil {
		return nil
	}
	drift, err := d.gates.compare()
	if err != nil {
		return err
	}
	for name, n := range drift {
		d.drifted(name, n)
	}
	if err := d.auditUDP(drift); err != nil {
		return err
	}
	for uid, r := range d.pods {
		var now bpf.MeshPod
		if err := d.kernel.Pods.Lookup(r.cookie, &now); err == nil && now.Identity != r.pod.Identity {
			d.drifted("identities", 1)
			if err := d.kernel.Pods.Put(r.cookie, r.pod); err != nil {
				return fmt.Errorf("enter the identity of pod %s: %w", uid, err)
			}
		}
	}
	return d.applyPolicies()
}

func (d *Datapath) drifted(what string, n int) {
	d.drift[what] += uint64(n)
	d.cfg.Log.Warn("the kernel's state was not what it should be: repairing it", "map", what, "rows", n)
}

// Drift returns how much audits have found wrong in the kernel so far, by what it was: rows of a map, or pods.
func (d *Datapath) Drift() map[string]uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return maps.Clone(d.drift)
}

// repair enrols a pod again.
func (d *Datapath) repair(p Pod) error {
	w, err := d.inspect(p)
	if err != nil {
		return err
	}
	r, err := d.assign(p, w)
	if err != nil {
		return err
	}
	return d.plumb(p, w, r)
}

// SetDestinations makes the addresses whose connections are captured equal to want.
//
// What is new is entered before what is gone is removed: a service that changes its address is at no moment
// without one. Addresses come before prefixes, so that none of the known ones is in everything for a moment; where one
// is nevertheless, the agent passes it on. An error means that some of want is not captured.
func (d *Datapath) SetDestinations(want Destinations) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.dest == nil {
		have, err := d.readDestinations()
		if err != nil {
			return err
		}
		d.dest = &have
	}
	return d.setDestinations(want)
}

func (d *Datapath) setDestinations(want Destinations) error {
	var errs []error
	if err := reconcile(d.dest.Addrs, want.Addrs, d.kernel.Destinations, kernelAddr); err != nil {
		errs = append(errs, fmt.Errorf("set mesh addresses: %w", err))
	}
	// Also where there is no room for an address: a prefix around everything must not wait for that.
	if err := reconcile(d.dest.Prefixes, want.Prefixes, d.kernel.Prefixes, kernelPrefix); err != nil {
		errs = append(errs, fmt.Errorf("set mesh prefixes: %w", err))
	}
	return errors.Join(errs...)
}

// readDestinations reads what an earlier process left, so that the first SetDestinations prunes it.
func (d *Datapath) readDestinations() (Destinations, error) {
	have := Destinations{Addrs: map[netip.Addr]bool{}, Prefixes: map[netip.Prefix]bool{}}
	var a bpf.MeshAddr
	var p bpf.MeshPrefix
	var v uint32
	it := d.kernel.Destinations.Iterate()
	for it.Next(&a, &v) {
		have.Addrs[goAddr(a)] = v != 0
	}
	pit := d.kernel.Prefixes.Iterate()
	for pit.Next(&p, &v) {
		have.Prefixes[goPrefix(p)] = v != 0
	}
	if err := errors.Join(it.Err(), pit.Err()); err != nil {
		return have, fmt.Errorf("read mesh addresses: %w", err)
	}
	return have, nil
}

// reconcile makes a map equal to want; have follows each step, so that a failure loses no track.
func reconcile[K comparable, V any](have, want map[K]bool, m *ebpf.Map, key func(K) V) error {
	for k, captured := range want {
		if had, ok := have[k]; ok && had == captured {
			continue
		}
		value := uint32(0)
		if captured {
			value = 1
		}
		if err := m.Put(key(k), value); err != nil {
			return fmt.Errorf("add %v: %w", k, err)
		}
		have[k] = captured
	}
	for k := range have {
		if _, ok := want[k]; ok {
			continue
		}
		if err := m.Delete(key(k)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove %v: %w", k, err)
		}
		delete(have, k)
	}
	return nil
}
