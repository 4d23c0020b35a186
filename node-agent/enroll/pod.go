package enroll

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/holder"
)

// pod is one pod of this node that is, was or should be captured.
type pod struct {
	uid string

	// work is held by whoever changes the pod; it guards these, and is taken before Registry.mu.
	work        sync.Mutex
	dead        bool // no longer in Registry.pods
	ns          *netns.Handle
	addrs       []netip.Addr
	listeners   *datapath.Listeners
	accepting   Accepting
	captured    bool            // by this agent or the one before it
	preexisting map[uint64]bool // cookies of the connections from before enrolment, which go on uncaptured
	open        int             // how many there were
	hasOld      atomic.Bool     // preexisting has some, or may have in a moment

	// Guarded by Registry.mu.
	local       LocalPod
	containerID string // of the sandbox, where CNI ADD named it
	nsPath      string
	status      PodStatus
	busy        bool
	retryAt     time.Time
	failures    int
	lingerUntil time.Time // when a Disabled pod is disposed of
	missing     time.Time // since when it has had no process
	restored    bool      // captured by the agent before this one, and not yet confirmed by this one's Enroll
}

// set changes the status; the caller holds Registry.mu.
func (p *pod) set(to Redirection, reason string) bool {
	if p.status.Redirection == to && p.status.Reason == reason {
		return false
	}
	if p.status.Redirection != to {
		p.status.Since = time.Now()
	}
	p.status.Redirection, p.status.Reason = to, reason
	return true
}

// differs reports whether what the control plane says needs anything done; the caller holds Registry.mu.
func (p *pod) differs(d LocalPod) bool {
	return p.restored || p.local.Identity != d.Identity || p.local.WorkloadUID != d.WorkloadUID || p.local.Strict != d.Strict || p.local.DNSCapture != d.DNSCapture
}

// sandboxGone reports whether the runtime has removed the pod's network namespace; the caller holds Registry.mu.
func (p *pod) sandboxGone() bool {
	if p.nsPath == "" {
		return false
	}
	_, err := os.Stat(p.nsPath)
	return errors.Is(err, fs.ErrNotExist)
}

// sandbox is where a pod to be enrolled lives: as a CNI ADD says, or by its processes.
type sandbox struct {
	containerID string
	nsPath      string
	addrs       []netip.Addr
	processes   []process
}

// unsupported is why the pod cannot be captured at all, as opposed to not yet.
func unsupported(err error) (*datapath.UnsupportedError, bool) {
	var u *datapath.UnsupportedError
	return u, errors.As(err, &u)
}

// enrol captures a pod, or brings one that is captured into line with what the control plane says now. What
// fails is pending, with the reason, and tried again.
func (r *Registry) enrol(ctx context.Context, d LocalPod, sb sandbox) error {
	p := r.claim(d)
	if p == nil {
		return errors.New("another agent has taken over")
	}
	defer r.unclaim(p)
	err := r.capture(ctx, p, d, sb)
	if errors.Is(err, holder.ErrSuperseded) || errors.Is(err, datapath.ErrYielded) {
		return err // says nothing about the pod
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	p.local = d
	changed := false
	if err == nil {
		p.failures, p.missing, p.restored = 0, time.Time{}, false
		changed = p.status.OpenConnections != p.open
		p.status.OpenConnections = p.open
		if p.set(Enabled, "") {
			changed = true
			r.log.Info("pod captured", "namespace", d.Namespace, "pod", d.Name, "uid", d.UID, "open_connections", p.open)
		}
	} else {
		// 1, 2, 4 … 32 s; what cannot be captured is looked at again, as its interfaces may change.
		p.retryAt = time.Now().Add(time.Second << min(p.failures, 5))
		p.failures++
		reason := err.Error()
		if errors.Is(err, errNoProcess) {
			reason = "" // nothing is wrong: its processes come with its CNI ADD, or are on their way out
		}
		changed = p.set(Pending, reason)
	}
	if changed {
		notify(r.tell)
	}
	return err
}

// claim returns the pod's entry, locked for work, or nil when this agent may not change anything any more.
func (r *Registry) claim(d LocalPod) *pod {
	for {
		r.mu.Lock()
		if r.yielded {
			r.mu.Unlock()
			return nil
		}
		p := r.pods[d.UID]
		if p == nil {
			p = &pod{uid: d.UID, local: d, status: PodStatus{UID: d.UID, Namespace: d.Namespace, Name: d.Name, Redirection: Pending, Since: time.Now()}}
			r.pods[d.UID] = p
		}
		r.mu.Unlock()
		p.work.Lock()
		if !p.dead {
			r.mu.Lock()
			p.busy = true
			r.mu.Unlock()
			return p
		}
		p.work.Unlock()
	}
}

func (r *Registry) unclaim(p *pod) {
	r.mu.Lock()
	p.busy = false
	r.mu.Unlock()
	p.work.Unlock()
}

// held returns the entry locked for work, or nil.
func (r *Registry) held(uid string) *pod {
	r.mu.Lock()
	p := r.pods[uid]
	yielded := r.yielded
	r.mu.Unlock()
	if p == nil || yielded {
		return nil
	}
	p.work.Lock()
	if p.dead {
		p.work.Unlock()
		return nil
	}
	r.mu.Lock()
	p.busy = true
	r.mu.Unlock()
	return p
}

// capture does the steps of an enrolment in the order that keeps it closed.
func (r *Registry) capture(ctx context.Context, p *pod, d LocalPod, sb sandbox) error {
	if err := r.locate(p, d, sb); err != nil {
		return err
	}
	r.evict(p)

	r.mu.Lock()
	was := p.local
	r.mu.Unlock()
	if p.listeners == nil {
		l, err := r.listen(p.ns)
		if err != nil {
			return fmt.Errorf("listen in the pod: %w", err)
		}
		p.listeners = &l
	}
	if !p.captured {
		// Capture does not depend on it: without a certificate the pod's mesh connections fail, closed.
		warm, cancel := context.WithTimeout(ctx, r.cfg.CertWait)
		err := r.cfg.Certs.Warm(warm, d.Identity)
		cancel()
		if err != nil {
			r.log.Warn("no certificate yet; connections of the pod wait for it or fail", "namespace", d.Namespace, "pod", d.Name, "identity", d.Identity.String(), "err", err)
		}
	}
	if p.accepting != nil && (was.Identity != d.Identity || was.WorkloadUID != d.WorkloadUID) {
		r.retire(p.accepting, nil, false)
		p.accepting = nil
	}
	if p.accepting == nil {
		a, err := r.cfg.Acceptor.AddPod(p.served(d), *p.listeners)
		if err != nil {
			return fmt.Errorf("accept connections of the pod: %w", err)
		}
		p.accepting = a
	}
	switch err := r.hold(ctx, p, d); {
	case errors.Is(err, holder.ErrSuperseded):
		return err // the listeners would end with this process
	case err != nil:
		r.log.Debug("not held", "uid", d.UID, "err", err)
	}
	if err := r.cfg.Plumber.Enroll(datapath.Pod{UID: p.uid, Workload: d.WorkloadUID, Identity: d.Identity, NetNS: p.ns,
		Addrs: p.addrs, Listeners: *p.listeners, ResolvesNames: d.DNSCapture}); err != nil {
		if _, never := unsupported(err); never {
			r.teardown(p, false)
		}
		return err
	}
	if !p.captured && sb.nsPath == "" { // a pod that a CNI ADD is about has not run yet
		var err error
		p.hasOld.Store(true) // a change of policies from here on looks at them
		p.preexisting, err = r.findOpen(p.ns)
		p.open = len(p.preexisting)
		if err != nil {
			r.log.Warn("connections from before enrolment are not known", "namespace", d.Namespace, "pod", d.Name, "err", err)
		}
	}
	if d.Strict && len(p.preexisting) > 0 {
		r.resetOpen(p, d)
	}
	if err := r.resetDenied(p, d); err != nil {
		r.log.Error("connections from before enrolment are not checked", "namespace", d.Namespace, "pod", d.Name, "err", err)
	}
	if !p.captured {
		p.captured = true
		if err := r.hold(ctx, p, d); err != nil { // now as captured
			r.log.Debug("not held", "uid", d.UID, "err", err)
		}
	}
	return nil
}

func (p *pod) served(d LocalPod) Pod {
	return Pod{UID: d.UID, Namespace: d.Namespace, Name: d.Name, WorkloadUID: d.WorkloadUID, Identity: d.Identity, Addrs: p.addrs, NetNS: p.ns}
}

// locate finds the pod's network namespace and addresses. A sandbox other than the one that is known makes a new
// start: the old one's listeners are of no use there.
func (r *Registry) locate(p *pod, d LocalPod, sb sandbox) error {
	var ns *netns.Handle
	var err error
	switch {
	case sb.nsPath != "":
		ns, sb.nsPath, err = r.openSandbox(sb.nsPath)
		if err == nil && ns.Cookie() == r.node {
			ns.Close()
			err = errHostNetwork
		}
	case p.ns == nil:
		ns, err = namespaceOf(r.cfg.Proc, d.UID, sb.processes, d.Addrs, r.node)
	}
	if err != nil {
		return err
	}
	if ns != nil {
		if p.ns != nil && p.ns.Cookie() == ns.Cookie() {
			ns.Close()
		} else {
			if p.ns != nil {
				r.teardown(p, false)
			}
			p.ns, p.addrs = ns, nil
		}
	}
	switch {
	case len(sb.addrs) > 0:
		p.addrs = sb.addrs
	case len(p.addrs) > 0:
	case len(d.Addrs) > 0:
		p.addrs = d.Addrs
	default:
		if p.addrs, err = addresses(p.ns); err != nil {
			return err
		}
	}
	if len(p.addrs) == 0 {
		return errors.New("the pod has no address yet")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if sb.containerID != "" {
		p.containerID, p.nsPath = sb.containerID, sb.nsPath
	}
	return nil
}

// openSandbox opens a namespace that the container runtime names by a path of the node, and returns the path that
// it has here. The agent's image has no /var/run, which is a link to /run on nodes; and where the agent does not
// have the directory mounted at all, the node's first process does.
func (r *Registry) openSandbox(path string) (ns *netns.Handle, here string, err error) {
	short := path
	if rest, ok := strings.CutPrefix(path, "/var/run/"); ok {
		short = "/run/" + rest
	}
	for _, here := range []string{path, short, filepath.Join(r.cfg.Proc, "1/root", short)} {
		if ns, err = netns.Open(here); !errors.Is(err, fs.ErrNotExist) {
			return ns, here, err
		}
	}
	return nil, "", err
}

// evict disposes of pods that had one of p's addresses before it and whose CNI DEL was missed: an address belongs
// to the pod that was given it last.
func (r *Registry) evict(p *pod) {
	r.mu.Lock()
	var stale []string
	for uid, other := range r.pods {
		if other == p || other.busy { // busy: it is being enrolled itself, and only its worker may read its fields
			continue
		}
		if other.work.TryLock() {
			if slices.ContainsFunc(other.addrs, func(a netip.Addr) bool { return slices.Contains(p.addrs, a) }) {
				stale = append(stale, uid)
			}
			other.work.Unlock()
		}
	}
	r.mu.Unlock()
	for _, uid := range stale {
		r.log.Info("pod is gone: its address belongs to another", "uid", uid, "successor", p.uid)
		r.dispose(uid, false)
	}
}

// findOpen returns the cookies of a running pod's connections that capture came too late for.
func (r *Registry) findOpen(ns *netns.Handle) (map[uint64]bool, error) {
	dg, err := netns.OpenDiag(ns)
	if err != nil {
		return nil, err
	}
	defer dg.Close()
	var captured func(netip.Addr) bool
	if r.cfg.Captured != nil {
		captured = r.cfg.Captured()
	}
	open, err := uncaptured(dg, captured)
	if err != nil {
		return nil, err
	}
	cookies := make(map[uint64]bool, len(open))
	for i := range open {
		a, b := open[i].Local, open[i].Remote
		if direct := r.cfg.Direct; direct != nil && (direct(a, b) || direct(b, a)) {
			continue
		}
		cookies[open[i].Cookie()] = true
	}
	return cookies, nil
}

// resetOpen ends the connections from before enrolment: the pod is STRICT, and they are plaintext.
func (r *Registry) resetOpen(p *pod, d LocalPod) {
	dg, err := netns.OpenDiag(p.ns)
	var n int
	if err == nil {
		defer dg.Close()
		var open []netns.TCPSocket
		if open, err = remaining(dg, p.preexisting); err == nil {
			n, err = dg.Destroy(open)
		}
	}
	if err != nil {
		r.log.Error("connections from before enrolment go on in plaintext", "namespace", d.Namespace, "pod", d.Name, "err", err)
		return
	}
	p.preexisting = nil
	r.log.Info("connections from before enrolment reset", "namespace", d.Namespace, "pod", d.Name, "count", n)
}

// release ends capture of a pod that left the mesh and goes on running. It is served for a while longer: what is
// in the accept queues is answered, and peers that have not heard yet still come through the tunnel.
func (r *Registry) release(_ context.Context, uid string) {
	p := r.held(uid)
	if p == nil {
		return
	}
	defer r.unclaim(p)
	if err := r.cfg.Plumber.Release(uid); err != nil {
		r.log.Error("end capture", "uid", uid, "err", err)
		r.mu.Lock()
		defer r.mu.Unlock()
		p.set(Pending, "capture could not be ended: "+err.Error())
		return
	}
	p.captured, p.preexisting, p.open = false, nil, 0
	p.hasOld.Store(false)
	r.mu.Lock()
	defer r.mu.Unlock()
	p.set(Disabled, "")
	p.status.OpenConnections = 0
	p.lingerUntil = time.Now().Add(r.cfg.Linger)
	notify(r.tell)
	r.log.Info("pod released", "namespace", p.status.Namespace, "pod", p.status.Name, "uid", uid)
}

// dispose ends everything about a pod that is gone, or that has lingered: connections that do not end by themselves in time, and where
// its namespace is deserted, its applications having ended, whatever else there is in it. What it returns is closed after that; nil
// where nobody served it.
func (r *Registry) dispose(uid string, deserted bool) (ended <-chan struct{}) {
	p := r.held(uid)
	if p == nil {
		return nil
	}
	defer r.unclaim(p)
	ended = r.teardown(p, deserted)
	p.dead = true
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.pods, uid)
	last := true
	for _, other := range r.pods {
		last = last && other.local.Identity != p.local.Identity
	}
	if last {
		r.cfg.Certs.Forget(p.local.Identity)
	}
	notify(r.tell)
	return ended
}

// teardown releases what p has on the node: capture first, or the pod would go on being captured with nobody to
// serve it. What it takes and returns is as of [Registry.dispose].
func (r *Registry) teardown(p *pod, deserted bool) (ended <-chan struct{}) {
	if err := r.cfg.Plumber.Release(p.uid); err != nil {
		r.log.Error("end capture", "uid", p.uid, "err", err)
	}
	if err := r.unhold(p.uid); err != nil {
		r.log.Debug("not let go of", "uid", p.uid, "err", err)
	}
	if p.listeners != nil {
		p.listeners.Close()
		p.listeners = nil
	}
	if p.accepting != nil {
		ended = r.retire(p.accepting, p.ns, deserted)
	} else if p.ns != nil {
		p.ns.Close()
	}
	p.accepting, p.ns, p.addrs = nil, nil, nil
	p.captured, p.preexisting, p.open = false, nil, 0
	p.hasOld.Store(false)
	return ended
}

// retire lets open connections end by themselves within a time; their namespace is closed after them, and then what it returns.
func (r *Registry) retire(a Accepting, ns *netns.Handle, deserted bool) <-chan struct{} {
	a.StopAccepting()
	within := r.cfg.Drain
	if deserted {
		within = delWait // a DEL waits for it
	}
	ended := make(chan struct{})
	r.drains.Go(func() {
		defer close(ended)
		ctx, cancel := context.WithTimeout(r.draining, within)
		defer cancel()
		a.Close(ctx)
		if ns == nil {
			return
		}
		if deserted {
			if err := hush(r.draining, ns, within); err != nil {
				r.log.Warn("those at the other end of a pod's connections may not hear that they have ended", "err", err)
			}
		}
		ns.Close()
	})
	return ended
}

// hush waits until all that was sent from a namespace has been acknowledged, and the end of all connections with it: when the
// namespace is gone nobody sends it again, and who is not told that a tunnel has ended sends into it. What has not ended in time
// is reset.
func hush(ctx context.Context, ns *netns.Handle, within time.Duration) error {
	const sending = netns.Carrying&^(1<<netns.TCPFinWait2) | 1<<netns.TCPLastAck | 1<<netns.TCPClosing
	dg, err := netns.OpenDiag(ns)
	if err != nil {
		return err
	}
	defer dg.Close()
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		left, err := dg.List(sending)
		if err != nil || len(left) == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			_, err := dg.Destroy(left)
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}
