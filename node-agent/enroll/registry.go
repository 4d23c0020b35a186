package enroll

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
	"github.com/warrenmesh/warren/node-agent/holder"
)

// Config is what a Registry needs. Zero durations and paths take the defaults named here.
type Config struct {
	SystemNamespace string   // the agent's own; its pods are never captured and never wait. Default istio-system
	Exempt          []string // namespaces whose pods never wait for the agent, such as kube-system
	Plumber         Plumber
	Acceptor        Acceptor
	Certs           Certs
	Keeper          *holder.Keeper
	Held            []holder.Item // what Keeper.Restore returned; New takes the files over
	// Captured returns which addresses' connections go through the mesh now: of the connections that were open at
	// enrolment only outbound ones to such addresses count. Nil: none do.
	Captured func() func(netip.Addr) bool
	// Direct reports whether a connection is one that capture has seen and left to the kernel. Nil: none is.
	Direct func(client, server netip.AddrPort) bool
	// Allowed decides about the inbound ones of them. Nil: only STRICT ends them.
	Allowed Allowed
	// Report is called with the whole state after each change, never concurrently. Nil: nobody is told.
	Report func([]PodStatus)

	Socket    string // where the CNI plugin asks. Default cni.DefaultSocket
	StateFile string // last known state for the plugin. Default cni.DefaultStateFile
	Proc      string // /proc with the node's processes in it. Default /proc
	Log       *slog.Logger

	AddWait  time.Duration // how long a CNI ADD waits for the control plane to name the pod: 5 s
	CertWait time.Duration // how long an enrolment waits for the certificate: 2 s
	Resync   time.Duration // between two audits of the kernel: 15 s
	Linger   time.Duration // how long a pod that left the mesh is still served for peers that do not know yet: 10 s
	Drain    time.Duration // how long open connections of a pod that left may go on: 1 h
}

// briefWait is how long the ADD of a pod in a namespace that is not enrolled waits for a record of the pod. The
// record is there already unless the control plane is slower than the container runtime.
const briefWait = 300 * time.Millisecond

// Registry makes the node's pods what the control plane says they should be.
type Registry struct {
	cfg       Config
	log       *slog.Logger
	node      uint64 // cookie of the node's network namespace
	listen    func(*netns.Handle) (datapath.Listeners, error)
	goneAfter time.Duration
	kick      chan struct{} // something to reconcile
	tell      chan struct{} // something to report
	tasks     sync.WaitGroup

	drains   sync.WaitGroup // connections of pods that left
	draining context.Context
	endDrain context.CancelFunc

	mu         sync.Mutex // guards what follows and the fields of each pod that say so
	desired    map[string]LocalPod
	unnamed    []LocalPod      // desired, without a uid
	namespaces map[string]bool // nil until known
	synced     bool            // desired is the control plane's word, not only what was restored
	pruned     bool            // what an earlier agent left in the kernel has been compared with desired
	yielded    bool            // another agent has taken over
	listening  bool            // the CNI socket answers
	pods       map[string]*pod
	changed    chan struct{} // closed and replaced when desired or namespaces change
}

// New restores what an earlier agent left with the holder, so that waiting connections are accepted again, and
// reads the last known state. It changes nothing else.
func New(cfg Config) (*Registry, error) {
	if cfg.Plumber == nil || cfg.Acceptor == nil || cfg.Certs == nil || cfg.Keeper == nil {
		return nil, errors.New("enroll: a plumber, an acceptor, certificates and a keeper are needed")
	}
	cfg.SystemNamespace = cmp.Or(cfg.SystemNamespace, "istio-system")
	cfg.Socket = cmp.Or(cfg.Socket, cni.DefaultSocket)
	cfg.StateFile = cmp.Or(cfg.StateFile, cni.DefaultStateFile)
	cfg.Proc = cmp.Or(cfg.Proc, "/proc")
	cfg.AddWait = cmp.Or(cfg.AddWait, 5*time.Second)
	cfg.CertWait = cmp.Or(cfg.CertWait, 2*time.Second)
	cfg.Resync = cmp.Or(cfg.Resync, 15*time.Second)
	cfg.Linger = cmp.Or(cfg.Linger, 10*time.Second)
	cfg.Drain = cmp.Or(cfg.Drain, time.Hour)
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	node, err := netns.Current()
	if err != nil {
		return nil, err
	}
	defer node.Close()
	r := &Registry{
		cfg: cfg, log: cfg.Log, node: node.Cookie(), listen: datapath.Listen, goneAfter: goneAfter,
		kick: make(chan struct{}, 1), tell: make(chan struct{}, 1),
		desired: map[string]LocalPod{}, pods: map[string]*pod{}, changed: make(chan struct{}),
	}
	r.draining, r.endDrain = context.WithCancel(context.Background())
	last, err := cni.ReadLastKnown(cfg.StateFile)
	switch {
	case err == nil:
		r.namespaces = map[string]bool{}
		for _, ns := range last.Namespaces {
			r.namespaces[ns] = true
		}
	case !errors.Is(err, cni.ErrNoState):
		r.log.Warn("last known state is of no use; pods wait until the control plane is reached", "err", err)
	}
	r.restore(cfg.Held)
	return r, nil
}

// Run answers the CNI plugin and reconciles until ctx ends. Then it stops accepting connections and leaves
// everything else as it is: pods remain captured, and the holder has their listeners.
func (r *Registry) Run(ctx context.Context) error {
	stopCNI, err := r.serveCNI(ctx)
	if err != nil {
		return err
	}
	r.tasks.Go(func() { r.reports(ctx) })
	r.poke()
	audit := time.NewTicker(r.cfg.Resync)
	defer audit.Stop()
	retry := time.NewTicker(time.Second)
	defer retry.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-r.kick:
			r.reconcile(ctx, false)
		case <-retry.C:
			if r.due(time.Now()) {
				r.reconcile(ctx, false)
			}
		case <-audit.C:
			r.reconcile(ctx, true)
		}
	}
	stopCNI()
	r.tasks.Wait()
	r.mu.Lock()
	left := slices.Collect(maps.Values(r.pods))
	r.mu.Unlock()
	for _, p := range left {
		p.work.Lock()
		if p.accepting != nil {
			p.accepting.StopAccepting()
		}
		p.work.Unlock()
	}
	return nil
}

// Close resets what is left of the connections of pods that left, and frees what the Registry has open. Pods
// remain captured. It is called after Run has returned and the proxy has drained.
func (r *Registry) Close() {
	r.endDrain()
	r.drains.Wait()
	r.mu.Lock()
	left := slices.Collect(maps.Values(r.pods))
	r.mu.Unlock()
	for _, p := range left {
		p.work.Lock()
		if p.accepting != nil {
			p.accepting.Close(r.draining)
		}
		if p.listeners != nil {
			p.listeners.Close()
		}
		if p.ns != nil {
			p.ns.Close()
		}
		p.accepting, p.listeners, p.ns = nil, nil, nil
		p.work.Unlock()
	}
}

// SetPods replaces what the control plane says about this node's pods. Not live is what it said to an earlier
// process: it adds to what was restored, ends nothing, and is ignored once there was a live word.
func (r *Registry) SetPods(pods []LocalPod, live bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !live && r.synced {
		return
	}
	r.unnamed = nil
	if live {
		r.desired, r.synced = make(map[string]LocalPod, len(pods)), true
	}
	for _, p := range pods {
		switch _, restored := r.desired[p.UID]; {
		case p.UID == "" && p.Enrolled:
			r.unnamed = append(r.unnamed, p)
		case p.UID != "" && (live || !restored):
			r.desired[p.UID] = p
		}
	}
	r.wake()
	r.poke()
}

// SetNamespaces replaces the set of namespaces, with true for those whose pods are to be captured, and writes it
// down for the plugin. An error means that it could not be written: the plugin goes by the older state.
func (r *Registry) SetNamespaces(namespaces map[string]bool) error {
	r.mu.Lock()
	same := r.namespaces != nil && slices.Equal(enrolledOf(r.namespaces), enrolledOf(namespaces))
	r.namespaces = maps.Clone(namespaces)
	if r.namespaces == nil {
		r.namespaces = map[string]bool{}
	}
	yielded := r.yielded
	r.wake()
	r.mu.Unlock()
	if yielded {
		return nil
	}
	if same {
		if _, err := cni.ReadLastKnown(r.cfg.StateFile); err == nil {
			return nil
		}
	}
	return cni.WriteLastKnown(r.cfg.StateFile, enrolledOf(namespaces))
}

func enrolledOf(namespaces map[string]bool) []string {
	var out []string
	for ns, on := range namespaces {
		if on {
			out = append(out, ns)
		}
	}
	slices.Sort(out)
	return out
}

// Yield stops changing the node: another agent has taken over. Open connections go on, and so does accepting
// until Run ends, from the sockets that both have.
func (r *Registry) Yield() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.yielded = true
}

// Ready tells why the node's pods cannot be enrolled, or nil.
func (r *Registry) Ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !r.listening:
		return errors.New("the CNI socket is not open yet")
	case r.namespaces == nil:
		return errors.New("the control plane has not said yet which namespaces are enrolled")
	}
	return nil
}

// Synced reports whether the control plane has named this node's pods and the state file is written, which is
// when the plugin may be installed.
func (r *Registry) Synced() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.synced && r.namespaces != nil
}

// Statuses returns the truth about all pods that are, were or should be captured, by namespace and name.
func (r *Registry) Statuses() []PodStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []PodStatus
	for uid, p := range r.pods {
		s := p.status
		if d, ok := r.desired[uid]; ok && !d.Enrolled && s.Redirection == Disabled {
			s.Reason = d.Reason
		}
		out = append(out, s)
	}
	for uid, d := range r.desired {
		if r.pods[uid] != nil {
			continue
		}
		s := PodStatus{UID: uid, Namespace: d.Namespace, Name: d.Name, Redirection: Disabled, Reason: d.Reason}
		if d.Enrolled && d.HostNetwork {
			s.Reason = errHostNetwork.Error()
		} else if d.Enrolled {
			s.Redirection, s.Reason = Pending, "" // not tried yet
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b PodStatus) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return out
}

// reports calls Report with the newest state after each change. Changes that come while it is busy, or within
// 50 ms, are told together.
func (r *Registry) reports(ctx context.Context) {
	for {
		select {
		case <-r.tell:
		case <-ctx.Done():
			return
		}
		if r.cfg.Report != nil {
			r.cfg.Report(r.Statuses())
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return
		}
	}
}

// wake lets waiting ADDs look again; the caller holds mu.
func (r *Registry) wake() {
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *Registry) poke() {
	notify(r.kick)
	notify(r.tell)
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// due reports whether a pod waits for another attempt or for its end.
func (r *Registry) due(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.pods {
		if p.status.Redirection == Pending && now.After(p.retryAt) || p.status.Redirection == Disabled && now.After(p.lingerUntil) {
			return true
		}
	}
	if len(r.unnamed) > 0 {
		return true
	}
	for uid, d := range r.desired {
		if r.pods[uid] == nil && d.Enrolled && !d.HostNetwork && !d.Finished && len(d.Addrs) > 0 {
			return true
		}
	}
	return false
}

// reconcile compares what should be with what is, once. An audit asks the kernel.
func (r *Registry) reconcile(ctx context.Context, audit bool) {
	running, err := scan(r.cfg.Proc)
	if err != nil {
		r.log.Error("reconcile", "err", err)
		return
	}
	now := time.Now()
	todo := r.plan(running, now, audit)
	// The kernel is asked before anything is changed: what is enrolled meanwhile would look like a stranger.
	if todo.audit || todo.prune {
		r.audit(todo.prune)
	}
	slots := make(chan struct{}, 8)
	var wg sync.WaitGroup
	do := func(f func()) {
		slots <- struct{}{}
		wg.Go(func() { defer func() { <-slots }(); f() })
	}
	for _, uid := range todo.gone {
		do(func() { r.dispose(uid, false) })
	}
	wg.Wait() // before their successors, which may have their addresses
	for _, uid := range todo.release {
		do(func() { r.release(ctx, uid) })
	}
	for _, d := range todo.enrol {
		do(func() {
			if err := r.enrol(ctx, d, sandbox{processes: running[d.UID]}); err != nil && !errors.Is(err, errNoProcess) {
				r.log.Warn("pod is not captured", "namespace", d.Namespace, "pod", d.Name, "uid", d.UID, "err", err)
			}
		})
	}
	wg.Wait()
}

// work is what a reconciliation found to do.
type work struct {
	enrol   []LocalPod
	release []string
	gone    []string
	audit   bool // ask the kernel what is in force
	prune   bool // strangers in the kernel may be released: it is known which pods there are
}

func (r *Registry) plan(running processes, now time.Time, audit bool) work {
	r.mu.Lock()
	defer r.mu.Unlock()
	var w work
	if r.yielded {
		return w
	}
	r.name(running)
	w.audit = audit
	w.prune = r.synced && (audit || !r.pruned)
	r.pruned = r.pruned || w.prune
	for uid, d := range r.desired {
		p := r.pods[uid]
		switch {
		case !d.Enrolled || d.HostNetwork:
			if p != nil && p.status.Redirection != Disabled {
				w.release = append(w.release, uid)
			}
		case p == nil:
			// Without processes it is for its CNI ADD to enrol the pod.
			if len(running[uid]) > 0 && !d.Finished {
				w.enrol = append(w.enrol, d)
			}
		case p.status.Redirection == Enabled && !p.differs(d):
		case p.status.Redirection == Enabled || now.After(p.retryAt):
			if len(running[uid]) > 0 || p.busy || p.ns != nil { // busy: only its worker may read its fields
				w.enrol = append(w.enrol, d)
			}
		}
	}
	for uid, p := range r.pods {
		d, listed := r.desired[uid]
		_, alive := running[uid]
		switch {
		case p.status.Redirection == Disabled:
			if now.After(p.lingerUntil) {
				w.gone = append(w.gone, uid)
			}
		case alive:
			p.missing = time.Time{}
		case r.synced && (!listed || d.Finished), p.sandboxGone():
			// Between its CNI ADD and its first process a pod has none either, and its record can be late.
			if p.missing.IsZero() {
				p.missing = now
			} else if now.Sub(p.missing) > r.goneAfter {
				w.gone = append(w.gone, uid)
			}
		}
	}
	return w
}

// goneAfter is how long a pod must have had no process before it counts as gone without a CNI DEL. A record that
// is missing is not enough: a control plane that lost its state would end capture everywhere.
const goneAfter = 30 * time.Second

// name gives the uid to pods that a control plane without LocalPod records describes by address; the caller
// holds mu.
func (r *Registry) name(running processes) {
	if len(r.unnamed) == 0 {
		return
	}
	var left []LocalPod
	byName := map[string]string{}
	for uid, p := range r.pods {
		byName[p.status.Namespace+"/"+p.status.Name] = uid
	}
	for _, d := range r.unnamed {
		d.UID = byName[d.Namespace+"/"+d.Name]
		if d.UID == "" {
			d.UID = byAddress(r.cfg.Proc, running, d.Addrs, r.node)
		}
		if d.UID == "" {
			left = append(left, d)
			continue
		}
		r.desired[d.UID] = d
	}
	r.unnamed = left
}

// audit has the kernel's state compared and repaired, and with prune what nobody knows released.
func (r *Registry) audit(prune bool) {
	if prune {
		err := r.cfg.Plumber.Prune(func(uid string) bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return r.desired[uid].Enrolled || r.pods[uid] != nil
		})
		if err != nil {
			r.log.Error("release pods that are gone", "err", err)
		}
	}
	states, err := r.cfg.Plumber.Audit()
	if err != nil {
		r.log.Error("audit the kernel's state", "err", err)
		return
	}
	inForce := map[string]datapath.PodState{}
	for _, s := range states {
		inForce[s.UID] = s
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for uid, p := range r.pods {
		if p.status.Redirection != Enabled || p.busy || p.restored {
			continue
		}
		s, ok := inForce[uid]
		switch {
		case !ok:
			p.set(Pending, "the kernel has lost the pod's capture; it is being set up again")
			p.retryAt = time.Time{}
			r.log.Error("capture was lost", "namespace", p.local.Namespace, "pod", p.local.Name, "uid", uid)
			r.poke()
		case len(s.Problems) > 0:
			r.log.Error("capture was damaged and has been repaired", "namespace", p.local.Namespace, "pod", p.local.Name, "uid", uid, "problems", s.Problems)
		}
	}
}

// String names the pod in errors.
func (p LocalPod) String() string { return fmt.Sprintf("%s/%s", p.Namespace, p.Name) }
