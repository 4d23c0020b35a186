package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// Config configures a Client.
type Config struct {
	Address    string                 // host:port of the control plane
	ServerName string                 // the name in its certificate; empty: the host of Address
	RootFile   string                 // PEM roots of the control plane
	Roots      func() *identity.Trust // more of them, as the control plane itself has sent them; nil: none
	TokenFile  string                 // service account token
	Node       Node

	Store *mesh.Store
	// Base holds until the control plane sends its MeshConfig; a control plane without one leaves it.
	Base mesh.Config

	StateFile string // where the last good state is kept; empty: nowhere

	// Callbacks run on Run's goroutine, after Store.Swap and before the ACK: they must not wait for anything
	// that needs a later state.
	OnLocalPods  func(LocalPods)
	OnNamespaces func(map[string]bool) // name → enrolled; the whole set
	OnMeshConfig func(mesh.Config)
	// OnTrust runs before everything else that came with the same response, and in Restore too: when it returns,
	// peers are checked against these roots and revocation lists (DER).
	OnTrust func(roots, revocationLists [][]byte) error

	// AwaitEnforced makes every answer to the control plane wait until [Client.Enforced] has named its revision:
	// an ACK then says that this node does so, not that it has heard. What cannot be enforced is a NACK.
	AwaitEnforced bool

	Log         *slog.Logger // nil: slog.Default
	DialOptions []grpc.DialOption

	SaveInterval time.Duration // at most one save in this time; 0: 2 s
	DeriveAfter  time.Duration // how long to wait for LocalPod records before deriving them; 0: 5 s
}

// LocalPods is the whole set of pods scheduled to this node.
type LocalPods struct {
	Pods    []wds.LocalPod // by namespace and name
	Live    bool           // said by the control plane to this process; false: from disk
	Derived bool           // the control plane has no LocalPod records: these are its workloads on this node
}

// types in the order they are subscribed to.
var types = []string{wds.MeshConfigType, wds.NamespaceType, wds.AuthorizationType, wds.AuditType, wds.AddressType, wds.LocalPodType, wds.TrustBundleType}

// A Snapshot is committed once these have been received.
var essential = []string{wds.AddressType, wds.AuthorizationType}

// Client subscribes to a control plane.
type Client struct {
	cfg    Config
	synced chan struct{} // closed with the first Snapshot, from disk or live
	live   chan struct{} // closed with the first Snapshot of the control plane

	// Owned by Run's goroutine; by Restore's before that.
	restored   bool // the file has been looked at
	usable     bool // and held a whole state
	builder    *mesh.Builder
	rev        uint64
	types      map[string]*typeState
	pods       map[string]wds.LocalPod
	namespaces map[string]bool
	trust      *node.TrustBundle // nil: none came
	dirty      dirt
	derive     bool
	acks       []answer // due once the state that they are about holds
	saver      *saver
	journal    *journal

	enforced chan struct{} // one token: Enforced was called
	yielded  chan struct{} // closed by Yield

	mu     sync.Mutex
	status Status
	report report
}

// answer is an ACK or NACK and the revision with which its response holds; 0 while that is not committed.
type answer struct {
	*discovery.DeltaDiscoveryRequest
	rev uint64
}

// typeState is how far one type has come.
type typeState struct {
	versions map[string]string // resource name → version, as the control plane gave it
	system   string            // system_version_info of the last response applied
	answered bool              // in the present session
	received bool              // ever, disk included
}

// dirt is what the callbacks have yet to hear.
type dirt struct{ snapshot, pods, namespaces, config bool }

// New makes a Client. Run runs it.
func New(cfg Config) (*Client, error) {
	if cfg.Store == nil || cfg.Address == "" || cfg.Node.Name == "" {
		return nil, errors.New("configuring the xDS client: the store, the address of the control plane and the node's name are required")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.SaveInterval == 0 {
		cfg.SaveInterval = 2 * time.Second
	}
	if cfg.DeriveAfter == 0 {
		cfg.DeriveAfter = 5 * time.Second
	}
	c := &Client{
		cfg:        cfg,
		synced:     make(chan struct{}),
		live:       make(chan struct{}),
		enforced:   make(chan struct{}, 1),
		yielded:    make(chan struct{}),
		builder:    mesh.NewBuilder(nil),
		types:      make(map[string]*typeState),
		pods:       make(map[string]wds.LocalPod),
		namespaces: make(map[string]bool),
	}
	c.journal = newJournal(cfg.StateFile, cfg.Node.Name, c.hasYielded, cfg.Log)
	c.builder.SetConfig(cfg.Base)
	c.status.Types = make(map[string]TypeStatus)
	c.report.init()
	for _, t := range types {
		c.types[t] = &typeState{versions: make(map[string]string)}
	}
	return c, nil
}

// Synced is closed once the Store has a Snapshot, be it the last good one from disk.
func (c *Client) Synced() <-chan struct{} { return c.synced }

// Live is closed once the Store has a Snapshot that the control plane sent to this process.
func (c *Client) Live() <-chan struct{} { return c.live }

// Yield leaves the state on disk, and what the control plane is told of this node, to another agent. It goes on to
// follow the control plane. What this agent knows may be older than what the other one has written.
func (c *Client) Yield() {
	c.mu.Lock()
	defer c.mu.Unlock()
	closeOnce(c.yielded)
}

func (c *Client) hasYielded() bool {
	select {
	case <-c.yielded:
		return true
	default:
		return false
	}
}

// Run announces the last good state, then stays connected until ctx is done. Call it once.
func (c *Client) Run(ctx context.Context) error {
	c.Restore()
	if c.usable {
		c.announce(false)
	}
	c.saver = startSaver(c.cfg.StateFile, c.cfg.SaveInterval, c.journal, c.cfg.Log)
	defer c.saver.stop()
	defer func() {
		c.saver.flush(c.state)
		c.journal.rotate()
	}()

	opts := append([]grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)),
	}, c.cfg.DialOptions...)
	conn, err := identity.DialControlPlane(c.cfg.Address, c.cfg.ServerName,
		identity.ControlPlaneRoots{File: c.cfg.RootFile, More: c.cfg.Roots}, c.cfg.TokenFile, c.cfg.Node.Cluster, opts...)
	if err != nil {
		return fmt.Errorf("preparing the connection to the control plane %s: %w", c.cfg.Address, err)
	}
	defer conn.Close()

	wait := backoffMin
	for ctx.Err() == nil {
		answered, err := c.session(ctx, conn)
		if ctx.Err() != nil {
			break
		}
		if answered {
			wait = backoffMin
		}
		pause := wait/2 + rand.N(wait)
		c.cfg.Log.Warn("the stream from the control plane ended", "address", c.cfg.Address, "error", err, "retry_in", pause.Round(time.Millisecond))
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		wait = min(wait*2, backoffMax)
	}
	return nil
}

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 15 * time.Second
)

// session is one stream, from subscription to error. It reports whether the control plane answered at all.
func (c *Client) session(ctx context.Context, conn *grpc.ClientConn) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	var beside sync.WaitGroup
	defer beside.Wait()
	defer cancel()

	stream, err := discovery.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return false, fmt.Errorf("opening the stream: %w", err)
	}
	c.acks, c.derive = nil, false
	c.forgetDropped()
	for i, t := range types {
		state := c.types[t]
		state.answered = false
		req := &discovery.DeltaDiscoveryRequest{TypeUrl: t, InitialResourceVersions: state.versions}
		if i == 0 {
			req.Node = c.cfg.Node.proto()
		}
		if err := stream.Send(req); err != nil {
			return false, streamError(stream, err)
		}
	}
	c.count(func(s *Status) { s.Connects++ })
	defer c.count(func(s *Status) { s.Connected = false })

	responses := make(chan *discovery.DeltaDiscoveryResponse)
	failed := make(chan error, 1)
	beside.Go(func() {
		for {
			resp, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- resp:
			case <-ctx.Done():
				return
			}
		}
	})
	beside.Go(func() { c.sendReports(ctx, conn) })
	// unsent says why an answer was not sent. Only the receiver can hear that, and a stream has one receiver: gRPC tells
	// the end of a stream once, and a second receiver would leave the first waiting for ever.
	unsent := func(err error) error {
		for ended := !errors.Is(err, io.EOF); !ended; {
			select {
			case <-responses:
			case err = <-failed:
				ended = true
			case <-ctx.Done():
				err, ended = ctx.Err(), true
			}
		}
		return fmt.Errorf("sending: %w", err)
	}

	var deriveTimer <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return answered, ctx.Err()
		case <-c.saver.due:
			c.saver.flush(c.state)
		case err := <-failed:
			c.saver.flush(c.state)
			return answered, fmt.Errorf("receiving: %w", err)
		case <-deriveTimer:
			deriveTimer = nil
			if !c.types[wds.LocalPodType].answered {
				c.cfg.Log.Info("the control plane has no LocalPod records; pods are derived from workloads")
				c.derive = true
				c.dirty.pods = true
				c.publish()
			}
		case resp := <-responses:
			if !answered {
				answered = true
				c.count(func(s *Status) { s.Connected = true })
				c.cfg.Log.Info("connected to the control plane", "address", c.cfg.Address, "control_plane", resp.GetControlPlane().GetIdentifier())
			}
			c.acks = append(c.acks, answer{c.apply(resp), 0})
			c.journal.append(resp)
			if resp.TypeUrl == wds.AddressType && deriveTimer == nil && !c.types[wds.LocalPodType].answered && !c.derive {
				deriveTimer = time.After(c.cfg.DeriveAfter)
			}
			if !c.complete() {
				continue // no Snapshot yet: what is not applied is not acknowledged
			}
			c.publish()
			for i := range c.acks {
				if c.acks[i].rev == 0 {
					c.acks[i].rev = c.rev
				}
			}
			if err := c.answer(stream); err != nil {
				return answered, unsent(err)
			}
		case <-c.enforced:
			if err := c.answer(stream); err != nil {
				return answered, unsent(err)
			}
		}
	}
}

// answer sends the answers that are due. A response of which a part is not enforced is refused as a whole: the
// control plane must not count on it, and sends it again.
func (c *Client) answer(stream grpc.ClientStream) error {
	c.mu.Lock()
	enforced, failed, why := c.status.Enforced, c.status.failed, c.status.NotEnforced
	c.mu.Unlock()
	var wait []answer
	for _, a := range c.acks {
		switch {
		case a.rev == 0 || c.cfg.AwaitEnforced && a.rev > max(enforced, failed):
			wait = append(wait, a)
			continue
		case c.cfg.AwaitEnforced && a.rev > enforced:
			a.ErrorDetail = &status.Status{Code: int32(codes.Internal), Message: "not enforced: " + why}
		}
		if err := stream.SendMsg(a.DeltaDiscoveryRequest); err != nil {
			return err
		}
	}
	c.acks = wait
	return nil
}

// forgetDropped forgets the versions of workloads that the builder dropped by itself, because their address was
// given away: if they are still there, the control plane sends them again.
func (c *Client) forgetDropped() {
	versions := c.types[wds.AddressType].versions
	for name := range versions {
		if c.builder.Workload(name) != nil {
			continue
		}
		if svc, err := wds.ParseServiceName(name); err == nil && c.builder.Service(svc) != nil {
			continue
		}
		delete(versions, name)
	}
}

// streamError is the reason why a Send failed, which only Recv tells. Nobody else may be receiving.
func streamError(stream grpc.ClientStream, err error) error {
	var m discovery.DeltaDiscoveryResponse
	for {
		if r := stream.RecvMsg(&m); r != nil {
			return fmt.Errorf("sending: %w", errors.Join(err, r))
		}
	}
}

// complete reports whether enough was received for a Snapshot.
func (c *Client) complete() bool {
	for _, t := range essential {
		if !c.types[t].received {
			return false
		}
	}
	return true
}

// publish commits what was built and tells everybody.
func (c *Client) publish() {
	if c.builder.Changed() || c.rev == 0 {
		c.rev++
		c.cfg.Store.Swap(c.builder.Commit(c.rev))
		if c.derive {
			c.dirty.pods = true
		}
		c.dirty.snapshot = true
	}
	live := c.types[wds.AddressType].answered && c.types[wds.AuthorizationType].answered
	c.announce(live)
	if live {
		closeOnce(c.live)
	}
	c.saver.mark()
}

// announce makes the callbacks that are due.
func (c *Client) announce(live bool) {
	closeOnce(c.synced)
	if c.dirty.config && c.cfg.OnMeshConfig != nil {
		c.cfg.OnMeshConfig(c.cfg.Store.Load().Config())
	}
	if c.dirty.namespaces && c.cfg.OnNamespaces != nil {
		c.cfg.OnNamespaces(maps.Clone(c.namespaces))
	}
	if c.dirty.pods && c.cfg.OnLocalPods != nil {
		c.cfg.OnLocalPods(c.localPods(live))
	}
	c.dirty = dirt{}
	w, s, p := c.cfg.Store.Load().Len()
	c.count(func(st *Status) {
		st.Revision, st.Workloads, st.Services, st.Policies = c.rev, w, s, p
	})
}

func closeOnce(ch chan struct{}) {
	select {
	case <-ch:
	default:
		close(ch)
	}
}

// localPods is the set for the callback.
func (c *Client) localPods(live bool) LocalPods {
	if c.derive {
		return LocalPods{Pods: derivePods(c.cfg.Store.Load(), c.cfg.Node.Name), Live: live, Derived: true}
	}
	pods := slices.SortedFunc(maps.Values(c.pods), comparePods)
	return LocalPods{Pods: pods, Live: c.types[wds.LocalPodType].answered}
}

// apply takes one response into the builder and returns the ACK or NACK that is due once it is committed.
func (c *Client) apply(resp *discovery.DeltaDiscoveryResponse) *discovery.DeltaDiscoveryRequest {
	ack := &discovery.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce}
	state := c.types[resp.TypeUrl]
	if state == nil {
		err := fmt.Errorf("nobody subscribed to %s", resp.TypeUrl)
		ack.ErrorDetail = &status.Status{Code: int32(codes.InvalidArgument), Message: err.Error()}
		return ack
	}
	if resp.TypeUrl == wds.LocalPodType && len(state.versions) == 0 && len(resp.Resources) == 0 {
		// A stock istiod answers types that it does not know with nothing. From our control plane the set has this
		// agent's own pod at least; to take it for empty would release every pod of the node.
		return ack
	}
	first := !state.answered
	state.answered, state.received = true, true
	if first && resp.TypeUrl == wds.LocalPodType {
		c.derive = false
		c.dirty.pods = true // now they are live
	}
	rejected := c.take(resp, state)

	st := TypeStatus{Applied: resp.SystemVersionInfo, Resources: len(state.versions)}
	if len(rejected) > 0 {
		st.NACK = rejected.Error()
		st.Rejected = rejected.names()
		ack.ErrorDetail = rejected.detail(resp.TypeUrl)
		c.cfg.Log.Error("the control plane sent what cannot be used", "type", resp.TypeUrl, "error", rejected)
	} else {
		state.system = resp.SystemVersionInfo
	}
	c.count(func(s *Status) {
		t := s.Types[resp.TypeUrl]
		st.Responses, st.ACKs, st.NACKs = t.Responses+1, t.ACKs, t.NACKs
		if len(rejected) > 0 {
			st.NACKs++
			st.Applied = t.Applied
		} else {
			st.ACKs++
		}
		s.Types[resp.TypeUrl] = st
	})
	c.report.kick()
	return ack
}

// proto is the node as the control plane knows it from Istio's ztunnel.
func (n Node) proto() *core.Node {
	return &core.Node{
		Id:            fmt.Sprintf("ztunnel~%s~%s.%s~%s.svc.%s", n.IP, n.Pod, n.Namespace, n.Namespace, n.domain()),
		Cluster:       n.Cluster,
		Metadata:      n.metadata(),
		UserAgentName: "warren",
		UserAgentVersionType: &core.Node_UserAgentVersion{
			UserAgentVersion: n.Version,
		},
	}
}
