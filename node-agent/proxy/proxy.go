package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// The ports of a captured pod's network namespace.
const (
	OutboundPort  = 15001
	PlaintextPort = 15006
	HBONEPort     = 15008
)

// Config is what a Proxy needs. Zero durations and counts take the defaults named here.
type Config struct {
	Store   *mesh.Store
	Certs   identity.Source
	Sockets Sockets

	Metrics *Metrics     // nil: a new one
	Log     *slog.Logger // what the operator has to know
	Access  *slog.Logger // a line per connection

	HandshakeTimeout time.Duration // TLS with a peer: 10 s
	ConnectTimeout   time.Duration // TCP to a peer or an application: 10 s
	Attempts         int           // endpoints tried for one connection: 3
	// StateTimeout is how long a connection waits for its pod to appear in the state of the mesh: 5 s. A new agent
	// accepts before it has read the last good state, and a new pod may connect before the control plane names it.
	StateTimeout time.Duration
	PoolIdle     time.Duration // a tunnel without streams is closed: 5 min
	MaxStreams   int           // streams of one tunnel: 100
	MaxFrame     int           // longest DATA frame that peers are told to send: 1 MiB
	// Memory bounds what both directions of all connections together hold of bytes that applications do not take. When
	// most of it is used, new connections are reset. 0: 256 MiB, or an eighth of the Ceiling if that is less.
	Memory int64
	// Ceiling is the memory that the process may use: when three quarters are used, new connections are reset.
	Ceiling *Ceiling
	// MaxConns bounds the connections of one pod; those beyond it are reset. 0: 65536.
	MaxConns int
}

// Pod is a captured pod.
type Pod struct {
	UID         string // Kubernetes' uid
	WorkloadUID string // mesh.Workload.UID
	Identity    mesh.Identity
	Network     string
	Addrs       []netip.Addr
	NetNS       *netns.Handle
}

// Listeners are a pod's listening sockets, one per address family and role.
type Listeners struct{ Outbound, Inbound, HBONE []net.Listener }

// Proxy carries the connections of all pods of the node.
type Proxy struct {
	cfg      Config
	store    *mesh.Store
	metrics  *Metrics
	log      *slog.Logger
	access   *slog.Logger
	parties  parties
	conns    *connTable
	peers    *peerTable
	pool     *hbone.Pool
	memory   *hbone.Memory
	loops    *hbone.Loops
	workers  hbone.Workers
	files    int // descriptors that connections may have
	shaking  handshakes
	penalty  penalties
	suspects suspects
	watchers watchers

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // watch, accept loops, connections

	mu      sync.Mutex
	pods    map[string]*PodHandle // by Pod.UID
	closed  bool
	changed chan struct{} // closed and replaced when the state changes
	checked progress

	flowsMu sync.Mutex
	flows   map[flowKey]*flow

	started, stopped atomic.Uint64 // pods
}

// PodHandle is a pod that the Proxy serves.
type PodHandle struct {
	p   *Proxy
	uid string
	pod atomic.Pointer[Pod]

	accepting context.Context // ends when no new connection is to be taken
	stop      context.CancelFunc
	listeners []*listener
	loops     sync.WaitGroup
	open      atomic.Int64
	denials   lineBudget
	refusals  lineBudget
}

// New returns a Proxy without pods. Close ends it.
func New(cfg Config) (*Proxy, error) {
	switch {
	case cfg.Store == nil:
		return nil, errors.New("proxy: no mesh state")
	case cfg.Certs == nil:
		return nil, errors.New("proxy: no source of certificates")
	case cfg.Sockets == nil:
		return nil, errors.New("proxy: no way to make sockets in a pod")
	}
	def(&cfg.HandshakeTimeout, 10*time.Second)
	def(&cfg.ConnectTimeout, 10*time.Second)
	def(&cfg.Attempts, 3)
	def(&cfg.StateTimeout, 5*time.Second)
	def(&cfg.MaxConns, 65536)
	if cfg.Memory == 0 && cfg.Ceiling.Limit() > 0 {
		cfg.Memory = min(cfg.Ceiling.buffers(), hbone.DefaultMemory)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics()
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Access == nil {
		cfg.Access = slog.New(slog.DiscardHandler)
	}
	p := &Proxy{cfg: cfg, store: cfg.Store, metrics: cfg.Metrics, log: cfg.Log, access: cfg.Access,
		conns: newConnTable(), peers: newPeerTable(), memory: hbone.NewMemory(cfg.Memory), pods: map[string]*PodHandle{}, flows: map[flowKey]*flow{}, changed: make(chan struct{})}
	var err error
	if p.loops, err = hbone.NewLoops(); err != nil {
		return nil, fmt.Errorf("proxy: wait for sockets: %w", err)
	}
	p.memory.Short = cfg.Ceiling.Short
	p.files, _ = descriptors()
	p.shaking.from = map[netip.Addr][]*net.TCPConn{}
	p.penalty.of = map[party]penalty{}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.pool = hbone.NewPool(hbone.PoolConfig{Dial: p.dialTunnel,
		DialTimeout:  cfg.ConnectTimeout + cfg.HandshakeTimeout,
		Ended:        p.peers.ended,
		ClientConfig: hbone.ClientConfig{MaxStreams: cfg.MaxStreams, MaxFrame: cfg.MaxFrame, Memory: p.memory, Loops: p.loops, Idle: cfg.PoolIdle}})
	// Before any connection: a state that comes between one's authorization and the watch would be missed.
	changed, now := p.store.Watch(), p.store.Load()
	p.checked.reach(now.Revision())
	p.wg.Go(func() { p.watch(changed, now) })
	p.wg.Go(p.watchPeers)
	return p, nil
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// AddPod begins to serve a pod. The listeners belong to the Proxy from then on; closing them does not end
// what listens where somebody else (the holder) has the same sockets.
func (p *Proxy) AddPod(pod Pod, l Listeners) (*PodHandle, error) {
	if pod.UID == "" || pod.NetNS == nil || pod.Identity.IsZero() || len(pod.Addrs) == 0 {
		return nil, fmt.Errorf("serve pod %q: uid, network namespace, identity and an address are needed", pod.UID)
	}
	h := &PodHandle{p: p, uid: pod.UID}
	h.pod.Store(&pod)
	h.accepting, h.stop = context.WithCancel(p.ctx)
	p.mu.Lock()
	// A handle that has stopped accepting only drains, beside its successor.
	if old := p.pods[pod.UID]; p.closed || old != nil && old.accepting.Err() == nil {
		p.mu.Unlock()
		h.stop()
		return nil, fmt.Errorf("serve pod %s: it is served already or the agent is stopping", pod.UID)
	}
	if err := h.listen(l); err != nil {
		p.mu.Unlock()
		h.stop()
		return nil, fmt.Errorf("serve pod %s: %w", pod.UID, err)
	}
	p.pods[pod.UID] = h
	p.mu.Unlock()
	p.started.Add(1)
	for _, ln := range h.listeners {
		h.loops.Go(func() { h.accept(ln) })
	}
	return h, nil
}

// listen takes the listeners over, all or none.
func (h *PodHandle) listen(ls Listeners) error {
	for _, role := range []struct {
		listeners []net.Listener
		dir       Direction
		hard      bool
		serve     func(*PodHandle, *netns.Sock)
	}{
		{ls.Outbound, Outbound, true, (*PodHandle).serveOutbound},
		{ls.Inbound, Inbound, false, polled((*PodHandle).servePlaintext)},
		{ls.HBONE, Inbound, false, polled((*PodHandle).serveTunnel)},
	} {
		for _, ln := range role.listeners {
			l, err := newListener(ln, role.dir, role.hard, role.serve)
			if err != nil {
				for _, l := range h.listeners {
					l.file.Close()
				}
				return err
			}
			h.listeners = append(h.listeners, l)
		}
	}
	ls.Close()
	return nil
}

// Pod returns what is known about the pod.
func (h *PodHandle) Pod() *Pod { return h.pod.Load() }

// Update replaces what is known about the pod, for new connections. Its UID stays.
func (h *PodHandle) Update(pod Pod) {
	pod.UID = h.uid
	h.pod.Store(&pod)
}

// Open returns how many connections of the pod are open.
func (h *PodHandle) Open() int { return int(h.open.Load()) }

// StopAccepting takes no new connections: a successor that has the same listening sockets does. Tunnels are
// told to bring no new streams. Open connections go on.
func (h *PodHandle) StopAccepting() {
	h.stop()
	for _, l := range h.listeners {
		l.file.Close()
	}
	h.loops.Wait()
}

// Close ends the service of a pod: nothing new is accepted, and what is still open when ctx ends is reset.
func (h *PodHandle) Close(ctx context.Context) {
	h.StopAccepting()
	p := h.p
	p.mu.Lock()
	if p.pods[h.uid] == h {
		delete(p.pods, h.uid)
		p.stopped.Add(1)
	}
	p.mu.Unlock()
	p.pool.Drain(func(k hbone.Key) bool { return k.Pod == h.uid })
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for h.open.Load() > 0 && ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-t.C:
		}
	}
	p.conns.endAll(func(c *conn) bool { return c.pod == h }, Drained, "the pod left the mesh")
	p.forgetFlows(h)
}

func (p *Proxy) podByUID(uid string) *PodHandle {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pods[uid]
}

// Pods returns the pods that are served, by uid.
func (p *Proxy) Pods() []*PodHandle {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]*PodHandle, 0, len(p.pods))
	for _, h := range p.pods {
		out = append(out, h)
	}
	slices.SortFunc(out, func(a, b *PodHandle) int {
		if a.uid < b.uid {
			return -1
		}
		return 1
	})
	return out
}

// Served returns how many pods were ever added, how many of them have left, and how many are served now.
func (p *Proxy) Served() (started, stopped uint64, active int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.started.Load(), p.stopped.Load(), len(p.pods)
}

// Tunnels returns how many outbound tunnel connections there are, and how many streams on them.
func (p *Proxy) Tunnels() (conns, streams int) { return p.pool.Stats() }

// Connections lists what is open, oldest first.
func (p *Proxy) Connections() []ConnInfo {
	all := p.conns.list(func(*conn) bool { return true })
	out := make([]ConnInfo, 0, len(all))
	for _, c := range all {
		c.mu.Lock()
		out = append(out, c.info)
		c.mu.Unlock()
	}
	slices.SortFunc(out, func(a, b ConnInfo) int { return a.Since.Compare(b.Since) })
	return out
}

// StopAccepting takes no new connections for any pod.
func (p *Proxy) StopAccepting() {
	var wg sync.WaitGroup
	for _, h := range p.Pods() {
		wg.Go(h.StopAccepting)
	}
	wg.Wait()
}

// Close takes no new connections, waits for the open ones until ctx ends, resets the rest and returns when
// every goroutine is gone.
func (p *Proxy) Close(ctx context.Context) error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.StopAccepting()
	if !p.conns.drained(ctx.Done()) {
		p.log.Info("resetting the connections that are still open", "connections", p.conns.len())
		p.conns.endAll(func(*conn) bool { return true }, Drained, "the agent stops")
	}
	p.cancel()
	err := p.pool.Close()
	p.wg.Wait()
	p.loops.Close()
	p.workers.Close()
	return err
}

// state returns the current Snapshot, after the pod has appeared in it.
func (h *PodHandle) state(ctx context.Context) (*mesh.Snapshot, *mesh.Workload, error) {
	p := h.p
	var timeout <-chan time.Time
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		s := p.store.Load()
		uid := h.Pod().WorkloadUID
		if w := s.Workload(uid); w != nil {
			return s, w, nil
		}
		if timeout == nil {
			t := time.NewTimer(p.cfg.StateTimeout)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-changed:
		case <-timeout:
			return s, nil, fail(SourceUnknown, "pod %s is not in the state of the mesh", uid)
		case <-ctx.Done():
			return s, nil, fail(SourceUnknown, "pod %s was not yet in the state of the mesh", uid)
		}
	}
}

// dropVanished lets go of tunnels to endpoints that are gone, before somebody else gets their address.
func (p *Proxy) dropVanished(s, last *mesh.Snapshot) {
	var gone map[netip.Addr]bool
	workloads, _, _ := s.Changes(last)
	for c := range workloads {
		if c.New == nil {
			for _, a := range c.Old.Addrs {
				if gone == nil {
					gone = map[netip.Addr]bool{}
				}
				gone[a] = true
			}
		}
	}
	if gone != nil {
		p.pool.Drain(func(k hbone.Key) bool { return gone[k.Addr.Addr()] })
	}
}

// Close closes listeners that no pod was added with.
func (l Listeners) Close() {
	for _, role := range [][]net.Listener{l.Outbound, l.Inbound, l.HBONE} {
		for _, ln := range role {
			ln.Close()
		}
	}
}
