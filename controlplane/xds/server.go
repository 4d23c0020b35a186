package xds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Config is what the server needs.
type Config struct {
	Callers interface {
		Authenticate(context.Context) (*auth.Caller, error)
	}
	// NodeOf returns the node that a caller speaks for, or why it is no node agent.
	NodeOf func(*auth.Caller) (string, error)
	// WaypointOf returns the waypoint that a caller is, and false for others; nil where there are none.
	WaypointOf func(*auth.Caller) (mesh.ServiceName, bool)
	Waypoints  *Waypoints
	Log        *slog.Logger
	Metrics    prometheus.Registerer
	// OnProgress is called when [Server.Nodes] has changed. It must not block.
	OnProgress func()
	// Replica says to istioctl who answers it.
	Replica Replica
}

// Server is envoy.service.discovery.v3.AggregatedDiscoveryService, the delta variant of it; the other one answers istioctl.
type Server struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	cfg   Config
	cache *Cache
	m     metrics

	mu      sync.Mutex
	streams map[*Stream]struct{}
	nodes   map[string]Progress
}

type metrics struct {
	connected   prometheus.Gauge
	pushes      *prometheus.CounterVec
	rejects     *prometheus.CounterVec
	pushErrors  *prometheus.CounterVec
	convergence prometheus.Histogram
	refused     prometheus.Counter
}

// NewServer serves a cache.
func NewServer(cfg Config, cache *Cache) *Server {
	s := &Server{cfg: cfg, cache: cache, streams: map[*Stream]struct{}{}, nodes: map[string]Progress{}, m: metrics{
		connected: prometheus.NewGauge(prometheus.GaugeOpts{Name: "pilot_xds", Help: "Clients connected by xDS."}),
		pushes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_xds_pushes", Help: "Responses sent, by type.",
		}, []string{"type"}),
		rejects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_total_xds_rejects", Help: "Responses that a client rejected, by type.",
		}, []string{"type"}),
		pushErrors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pilot_xds_write_errors", Help: "Streams that broke while a response was sent, by type.",
		}, []string{"type"}),
		convergence: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "pilot_proxy_convergence_time", Help: "Seconds from a change to the client's acknowledgement of it.",
			Buckets: []float64{.01, .05, .1, .25, .5, 1, 3, 5, 10, 20, 30},
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "warren_xds_refused_total", Help: "Streams refused because of who asked.",
		}),
	}}
	for _, short := range shortNames { // from the start: a series that begins with its first event has no increase
		s.m.rejects.WithLabelValues(short)
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(s.m.connected, s.m.pushes, s.m.rejects, s.m.pushErrors, s.m.convergence, s.m.refused)
	}
	return s
}

// Stream is what is known about one connected client.
type Stream struct {
	Node      string
	Peer      string
	Connected time.Time

	mu    sync.Mutex
	self  described
	types map[string]TypeState
}

// TypeState is what a client was sent of one type, and what it said about it. Revisions are those of
// [Cache.Revision].
type TypeState struct {
	Sent, Acked string
	Nack        string    // of the last response; "" once a later one was accepted
	At          time.Time // of the last response
}

// Types returns the state by type URL.
func (s *Stream) Types() map[string]TypeState {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]TypeState, len(s.types))
	for k, v := range s.types {
		out[k] = v
	}
	return out
}

func (s *Stream) note(kind string, f func(*TypeState)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.types[kind]
	f(&t)
	s.types[kind] = t
}

// Streams returns the clients connected now.
func (s *Server) Streams() []*Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*Stream, 0, len(s.streams))
	for st := range s.streams {
		out = append(out, st)
	}
	return out
}

var errNotSynced = status.Error(codes.Unavailable, "the control plane has not read the cluster's state yet")

// retryRejected is when a rejected response is sent again without a change that would do so earlier.
const retryRejected = 30 * time.Second

// DeltaAggregatedResources serves one client until it leaves.
func (s *Server) DeltaAggregatedResources(stream grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	ctx := stream.Context()
	caller, err := s.cfg.Callers.Authenticate(ctx)
	if err != nil {
		s.m.refused.Inc()
		s.cfg.Log.Warn("xDS stream refused", "peer", auth.PeerAddr(ctx), "error", err)
		return err
	}
	if s.cfg.WaypointOf != nil {
		if name, ok := s.cfg.WaypointOf(caller); ok {
			if !s.cache.Synced() {
				return errNotSynced
			}
			return s.cfg.Waypoints.serve(stream, name, auth.PeerAddr(ctx))
		}
	}
	node, err := s.cfg.NodeOf(caller)
	if err != nil {
		s.m.refused.Inc()
		s.cfg.Log.Warn("xDS stream refused", "peer", auth.PeerAddr(ctx), "error", err)
		return status.Errorf(codes.PermissionDenied, "xDS refused: %v", err)
	}
	if !s.cache.Synced() {
		return errNotSynced
	}
	info := &Stream{Node: node, Peer: auth.PeerAddr(ctx), Connected: time.Now(), types: map[string]TypeState{}}
	c := newClient(node)
	s.connect(info, c)
	defer s.disconnect(info, c)
	log := s.cfg.Log.With("node", node, "peer", info.Peer)
	log.Info("node connected")
	err = s.serve(stream, c, info, log)
	log.Info("node disconnected", "error", err)
	return err
}

func (s *Server) connect(info *Stream, c *client) {
	s.mu.Lock()
	s.streams[info] = struct{}{}
	s.mu.Unlock()
	s.cache.add(c)
	s.m.connected.Inc()
}

func (s *Server) disconnect(info *Stream, c *client) {
	s.cache.remove(c)
	s.m.connected.Dec()
	s.mu.Lock()
	delete(s.streams, info)
	s.mu.Unlock()
	s.left(info)
}

func (s *Server) serve(stream grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], c *client, info *Stream, log *slog.Logger) error {
	requests := make(chan *discovery.DeltaDiscoveryRequest)
	ended := make(chan error, 1)
	ctx := stream.Context()
	go func() { // ends with the stream's context at the latest, which gRPC cancels when serve returns
		for {
			req, err := stream.Recv()
			if err != nil {
				ended <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()
	retry := time.NewTicker(retryRejected)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
				return nil
			}
			return err
		case req := <-requests:
			s.request(c, info, req, log)
		case <-retry.C:
			again := false
			for _, w := range c.watches {
				again = w.retry() || again
			}
			if !again {
				continue
			}
		case <-c.wake:
		}
		s.cache.mu.RLock()
		responses := c.plan(s.cache)
		s.cache.mu.RUnlock()
		s.noteProgress(info, c)
		for _, res := range responses {
			if err := stream.Send(res); err != nil {
				s.m.pushErrors.WithLabelValues(shortNames[res.TypeUrl]).Inc()
				return err
			}
			s.m.pushes.WithLabelValues(shortNames[res.TypeUrl]).Inc()
			info.note(res.TypeUrl, func(t *TypeState) { t.Sent, t.At = res.SystemVersionInfo, time.Now() })
		}
	}
}

// request applies one request: a subscription, an answer to a response, or both.
func (s *Server) request(c *client, info *Stream, req *discovery.DeltaDiscoveryRequest, log *slog.Logger) {
	short, known := shortNames[req.TypeUrl]
	if !known {
		// A client may ask for what only another control plane serves. It gets no answer, as from Istio's.
		log.Debug("subscription to an unknown type", "type", req.TypeUrl)
		return
	}
	if n := req.GetNode(); n.GetId() != "" {
		info.mu.Lock()
		info.self = describe(n)
		info.mu.Unlock()
	}
	w := c.watches[req.TypeUrl]
	if w != nil && req.ResponseNonce != "" {
		if r := w.answered(req); r != nil {
			if req.ErrorDetail != nil {
				s.m.rejects.WithLabelValues(short).Inc()
				log.Warn("node rejected a response", "type", req.TypeUrl, "revision", r.version, "error", clip(req.ErrorDetail.Message))
				info.note(req.TypeUrl, func(t *TypeState) { t.Nack = clip(req.ErrorDetail.Message) })
			} else {
				s.m.convergence.Observe(time.Since(r.since).Seconds())
				info.note(req.TypeUrl, func(t *TypeState) { t.Acked, t.Nack = r.version, "" })
			}
		}
	}
	if w == nil || len(req.ResourceNamesSubscribe)+len(req.ResourceNamesUnsubscribe) > 0 {
		c.subscribe(req)
	}
}
