package nodeagent

import (
	"context"
	"crypto/fips140"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/tap"
	"github.com/warrenmesh/warren/node-agent/admin"
	"github.com/warrenmesh/warren/node-agent/datapath"
	"github.com/warrenmesh/warren/node-agent/enroll"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
	"github.com/warrenmesh/warren/node-agent/enroll/install"
	"github.com/warrenmesh/warren/node-agent/holder"
	"github.com/warrenmesh/warren/node-agent/proxy"
	"github.com/warrenmesh/warren/node-agent/xds"
)

// stateFile is the last good state of the mesh, in Config.StateDir.
const stateFile = "mesh.state"

// agent is the parts of a running node agent. All are set before anything runs.
type agent struct {
	cfg       Config
	store     *mesh.Store
	keeper    *holder.Keeper
	datapath  *datapath.Datapath
	ca        *identity.CA
	manager   *identity.Manager
	proxy     *proxy.Proxy
	registry  *enroll.Registry
	installer *install.Installer
	xds       *xds.Client
	metrics   *prometheus.Registry

	rotated chan struct{} // certificates have changed: what the holder has is old
	vacant  chan struct{} // the agent that had taken over is gone
	trust   atomic.Pointer[identity.Trust]

	mu      sync.Mutex
	missing map[string]string // what readiness waits for
}

// Run runs the agent until ctx ends, then lets open connections go on for the grace time and returns.
// Pods stay captured, and their listeners stay with the holder: a successor takes over at any time, also while
// this agent still runs. If the successor ends and this agent has not been told to stop, it takes the node back, as a
// successor of itself: what it carries goes on meanwhile.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	var draining sync.WaitGroup
	defer draining.Wait()
	for {
		drain, err := run(ctx, cfg)
		if drain == nil {
			return err
		}
		draining.Go(func() {
			if err := drain(); err != nil {
				cfg.Log.Warn("ending what was carried before the node was taken back", "error", err)
			}
		})
	}
}

// run is one agent, from its start to its end. Where it ends only because it has to take the node back, it returns the
// rest of its end, which waits for open connections.
func run(ctx context.Context, cfg Config) (drain func() error, err error) {
	log := cfg.Log
	log.Info("starting", "version", cfg.Version, "node", cfg.Node, "xds", cfg.XDSAddress, "fips140", fips140.Enabled())
	a := &agent{cfg: cfg, store: &mesh.Store{}, metrics: prometheus.NewRegistry(),
		rotated: make(chan struct{}, 1), vacant: make(chan struct{}, 1),
		missing: map[string]string{"datapath": "is not open", "state": "is not there"}}

	// The background outlives ctx: while connections drain, policies and certificates still have to be current.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	end := func() { stop(); running.Wait() }
	defer func() {
		if drain == nil {
			end()
		}
	}()

	if err := a.build(ctx); err != nil {
		return nil, err
	}
	failed := make(chan error, 16) // more than there are parts
	start := func(name string, f func(context.Context) error) {
		running.Go(func() {
			if err := f(background); err != nil && background.Err() == nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	server, err := a.serveAdmin(ctx)
	if err != nil {
		a.datapath.Close()
		return nil, err
	}
	answering, stopAnswering := context.WithCancel(background)
	defer stopAnswering()
	start("admin", func(context.Context) error { return server.Serve(answering) })
	start("certificates", a.manager.Run)
	start("holder", func(ctx context.Context) error { a.keeper.Run(ctx); return nil })
	start("enforcement", a.enforce)
	start("the kernel's decisions", a.reportKernel)
	start("the kernel's connections", a.measureFlows)
	start("the ways of direct connections", a.chooseWays)
	start("certificates for a successor", a.keepCertificates)
	start("xds", a.xds.Run)
	start("state", a.awaitState)

	enrolling, stopEnrolling := context.WithCancel(ctx)
	defer stopEnrolling()
	enrolled := make(chan struct{})
	running.Go(func() {
		defer close(enrolled)
		if err := a.registry.Run(enrolling); err != nil {
			failed <- fmt.Errorf("enrolment: %w", err)
		}
	})
	running.Go(func() { a.install(enrolling) })

	again := false
	select {
	case <-ctx.Done():
		log.Info("stopping: pods stay captured", "grace", cfg.Grace)
	case err = <-failed:
		log.Error("stopping", "error", err)
	case <-a.vacant:
		log.Warn("the agent that had taken over is gone: taking the node back")
		again = true
		stopAnswering() // the ports are the next one's
	}
	stopEnrolling()
	<-enrolled
	a.yield()
	// From here on a successor may write; what is open still needs sockets of its own.
	a.keeper.Leave()
	rest := func() error {
		grace, cancel := context.WithTimeout(background, cfg.Grace)
		defer cancel()
		return errors.Join(a.proxy.Close(grace), a.datapath.Close())
	}
	if !again {
		return nil, errors.Join(err, rest())
	}
	return func() error {
		defer end()
		defer a.ca.Close()
		defer a.registry.Close()
		return rest()
	}, nil
}

// build puts the parts together, from what does not need the others to what does.
func (a *agent) build(ctx context.Context) error {
	cfg, log := &a.cfg, a.cfg.Log
	if cfg.CNIBinary != "" {
		a.installer = install.New(install.Config{Binary: cfg.CNIBinary, BinDir: cfg.CNIBinDir, ConfDir: cfg.CNIConfDir, Replaces: cfg.CNIReplace, Log: log,
			Settings: cni.Settings{Socket: cfg.CNISocket, StateFile: filepath.Join(cfg.StateDir, filepath.Base(cni.DefaultStateFile)), SystemNamespace: cfg.PodNamespace, Exempt: cfg.Exempt}})
		// A configuration that names a missing binary keeps every pod of the node from starting.
		if err := a.installer.Repair(); err != nil {
			log.Warn("repairing the CNI plugin", "error", err)
		}
	}

	held, err := a.takeOver(ctx)
	if err != nil {
		log.Warn("no holder: listeners do not outlive this process until there is one", "error", err)
	}

	if a.datapath, err = datapath.Open(ctx, datapath.Config{Dir: cfg.BPFDir, CgroupRoot: cfg.CgroupRoot, Proc: cfg.Proc, Spares: 8, Log: log}); err != nil {
		return err
	}
	a.found("datapath")

	a.ca, err = identity.NewCA(identity.CAConfig{Address: cfg.CAAddress, ServerName: cfg.CAServerName, Roots: a.caRoots(),
		TokenFile: cfg.Token, Cluster: cfg.Cluster})
	if err != nil {
		return err
	}
	a.manager = identity.NewManager(identity.Config{Signer: a.ca, RootFile: a.meshRoots(), TTL: cfg.SecretTTL, Log: log,
		OnRotate: a.rotate, OnTrust: a.distrust})
	a.adoptCertificates()

	a.xds, err = xds.New(xds.Config{
		Address: cfg.XDSAddress, ServerName: cfg.XDSServerName, RootFile: cfg.XDSRoot, Roots: a.sentRoots, TokenFile: cfg.Token,
		Node: xds.Node{Name: cfg.Node, Pod: cfg.PodName, Namespace: cfg.PodNamespace, ServiceAccount: cfg.ServiceAccount,
			IP: cfg.InstanceIP, Cluster: cfg.Cluster, ClusterDomain: cfg.ClusterDomain, Network: cfg.Network, Version: cfg.Version},
		Store:     a.store,
		Base:      mesh.Config{SameNode: mesh.SameNodeEncrypt, TrustDomain: cfg.TrustDomain, Cluster: cfg.Cluster, ClusterDomain: cfg.ClusterDomain, Network: cfg.Network, RootNamespace: cfg.PodNamespace},
		StateFile: filepath.Join(cfg.StateDir, stateFile), AwaitEnforced: true, OnLocalPods: a.setPods, OnNamespaces: a.setNamespaces,
		OnTrust: a.setTrust, Log: log,
	})
	if err != nil {
		return err
	}

	// Held listeners are accepted on as soon as the registry is there: by then there has to be a state.
	a.xds.Restore()

	ceiling := proxy.OwnCeiling("/proc/self")
	ceiling.HoldHeap()
	traffic := proxy.NewMetrics()
	a.proxy, err = proxy.New(proxy.Config{Store: a.store, Certs: a.manager, Sockets: a.datapath, Metrics: traffic,
		Log: log, Access: cfg.Access, PoolIdle: cfg.PoolIdle, MaxStreams: cfg.MaxStreams, MaxFrame: cfg.MaxFrame, Ceiling: ceiling})
	if err != nil {
		return err
	}
	a.registry, err = enroll.New(enroll.Config{
		SystemNamespace: cfg.PodNamespace, Exempt: cfg.Exempt, Plumber: a.datapath,
		Acceptor: acceptor{proxy: a.proxy, network: a.network}, Certs: a.manager, Keeper: a.keeper, Held: held,
		Captured: a.captured, Direct: a.datapath.IsDirect, Allowed: a.allowed, Report: a.reportPods,
		Socket: cfg.CNISocket, StateFile: cfg.enrolledFile(), Proc: cfg.Proc, Log: log,
	})
	if err != nil {
		return err
	}
	a.metrics.MustRegister(traffic, &telemetry{agent: a}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return nil
}

// takeOver becomes the agent that writes, and returns what the one before it left with the holder.
func (a *agent) takeOver(ctx context.Context) (held []holder.Item, err error) {
	for range 3 {
		a.keeper = holder.NewKeeper(holder.KeeperConfig{Path: a.cfg.Holder, Log: a.cfg.Log,
			OnSuperseded: a.superseded, OnVacant: func() { notify(a.vacant) }})
		held, err = a.keeper.Restore(ctx)
		// With a holder that is only slow it is worth another try: without what it has, pods are refused their
		// connections until they are captured anew. Superseded is one that a younger agent has overtaken on its way here.
		if err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || ctx.Err() != nil {
			break
		}
	}
	return held, err
}

// superseded is called when another agent has taken over: this one changes nothing on the node any more, and
// its connections go on until it is stopped.
func (a *agent) superseded() {
	a.cfg.Log.Info("another agent has taken over this node")
	a.yield()
}

// yield leaves the node, its state on disk and what the control plane is told of it to another agent.
func (a *agent) yield() {
	a.registry.Yield()
	a.xds.Yield()
	if err := a.datapath.Yield(); err != nil {
		a.cfg.Log.Warn("giving up the datapath", "error", err)
	}
}

// rotate is told of every new certificate. Tunnels under the one before it take no new connections.
func (a *agent) rotate(b *identity.Bundle) {
	notify(a.rotated)
	if a.proxy != nil {
		a.proxy.Renewed(b.ID)
	}
}

// distrust is told of new roots and revocation lists. What is open is checked against them.
func (a *agent) distrust(*identity.Trust) {
	if a.proxy != nil {
		a.proxy.TrustChanged()
	}
}

// install puts the CNI plugin on the node once the plugin has somebody to ask and knows whom to keep waiting.
func (a *agent) install(ctx context.Context) {
	if a.installer == nil {
		return
	}
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for !a.registry.Synced() {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
	t.Stop()
	a.installer.Run(ctx)
}

// network is the network that the node is in.
func (a *agent) network() string {
	if n := a.store.Load().Config().Network; n != "" {
		return n
	}
	return a.cfg.Network
}

// captured tells which addresses' connections go through the mesh, as it is now.
func (a *agent) captured() func(netip.Addr) bool {
	return datapath.Desired(a.store.Load(), a.network()).Captured
}

// allowed decides about a plaintext connection that the agent does not carry.
func (a *agent) allowed(workload string, client, server netip.AddrPort) (why string, ok bool) {
	s := a.store.Load()
	if s.Revision() == 0 {
		return "", true // nothing is known yet: the first state decides
	}
	v := s.Authorize(mesh.Conn{SourceIP: client.Addr(), Dst: server, DstWorkload: s.Workload(workload), Plaintext: true})
	if v.By != (mesh.PolicyName{}) {
		return string(v.Why) + " by policy " + v.By.String(), v.Allow
	}
	return string(v.Why), v.Allow || v.Why == mesh.WhyNoWorkload
}

func (a *agent) serveAdmin(ctx context.Context) (*admin.Server, error) {
	return admin.Listen(ctx, admin.Config{
		AdminAddr: a.cfg.AdminAddr, MetricsAddr: a.cfg.MetricsAddr, ReadyAddr: a.cfg.ReadyAddr,
		Store: a.store, Certificates: a.manager.Bundles, Pods: a.proxy.Pods, Connections: a.proxy.Connections,
		Watch:    func(f tap.Filter) (admin.Watcher, error) { return a.proxy.Watch(f) },
		Gatherer: a.metrics, Missing: a.waiting, Settings: a.cfg.settings(), Version: a.cfg.Version,
		Level: a.cfg.Level, Log: a.cfg.Log,
	})
}

// found says that readiness need not wait for a part any more.
func (a *agent) found(part string) {
	a.mu.Lock()
	delete(a.missing, part)
	a.mu.Unlock()
}

// waiting is what keeps the agent from being ready.
func (a *agent) waiting() []string {
	a.mu.Lock()
	var out []string
	for part, why := range a.missing {
		out = append(out, part+" "+why)
	}
	a.mu.Unlock()
	slices.Sort(out)
	if st := a.manager.Stats(); st.Failed > 0 && st.Signed == 0 && len(a.manager.Bundles()) == 0 {
		out = append(out, "the CA has not signed any certificate yet")
	}
	if err := a.registry.Ready(); err != nil {
		out = append(out, err.Error())
	}
	return out
}

func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
