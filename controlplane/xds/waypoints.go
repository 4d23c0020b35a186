package xds

import (
	"context"
	"log/slog"
	"strconv"
	"sync"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoytypes "github.com/envoyproxy/go-control-plane/pkg/cache/types"
	envoycache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// Waypoints serves Envoy's resources, of which each waypoint gets its own. What has not changed is not sent again: its
// version is a hash of it.
type Waypoints struct {
	cache  envoycache.SnapshotCache
	log    *slog.Logger
	failed *prometheus.CounterVec

	mu       sync.Mutex
	snapshot *mesh.Snapshot
	serial   uint64
	open     map[mesh.ServiceName]int // streams
}

// NewWaypoints knows no waypoint.
func NewWaypoints(log *slog.Logger, metrics prometheus.Registerer) *Waypoints {
	w := &Waypoints{
		cache: envoycache.NewSnapshotCache(true, envoycache.IDHash{}, nil), log: log, open: map[mesh.ServiceName]int{},
		snapshot: &mesh.Snapshot{},
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "warren_waypoint_rejects_total", Help: "Responses that a waypoint's Envoy rejected, by type.",
		}, []string{"type"}),
	}
	if metrics != nil {
		metrics.MustRegister(w.failed)
	}
	return w
}

// Update gives connected waypoints what s changes for them.
func (w *Waypoints) Update(s *mesh.Snapshot) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if s == w.snapshot {
		return
	}
	w.snapshot = s
	for name := range w.open {
		w.build(name)
	}
}

// build writes one waypoint's resources. What cannot be written leaves the last good ones.
func (w *Waypoints) build(name mesh.ServiceName) {
	r, err := waypoint.Build(w.snapshot, name)
	if err != nil {
		w.log.Error("configuration of a waypoint not written; it keeps what it has", "waypoint", name.String(), "error", err)
		return
	}
	w.serial++
	s, err := envoycache.NewSnapshot(strconv.FormatUint(w.serial, 10), map[envoyresource.Type][]envoytypes.Resource{
		envoyresource.ListenerType: asResources(r.Listeners), envoyresource.RouteType: asResources(r.Routes),
		envoyresource.ClusterType: asResources(r.Clusters), envoyresource.EndpointType: asResources(r.Endpoints),
	})
	if err == nil {
		err = w.cache.SetSnapshot(context.Background(), name.String(), s)
	}
	if err != nil {
		w.log.Error("configuration of a waypoint not sent", "waypoint", name.String(), "error", err)
	}
}

func asResources[M proto.Message](list []M) []envoytypes.Resource {
	out := make([]envoytypes.Resource, len(list))
	for i, m := range list {
		out[i] = m
	}
	return out
}

// serve answers the Envoy of a waypoint until its stream ends.
func (w *Waypoints) serve(stream grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], name mesh.ServiceName, peer string) error {
	w.mu.Lock()
	w.open[name]++
	if w.open[name] == 1 {
		w.build(name)
	}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.open[name]--; w.open[name] == 0 {
			delete(w.open, name)
			w.cache.ClearSnapshot(name.String())
		}
	}()
	log := w.log.With("waypoint", name.String(), "peer", peer)
	log.Info("waypoint connected")
	err := delta.NewServer(stream.Context(), w.cache, heard{w, log}).DeltaStreamHandler(owned{stream, name.String()}, envoyresource.AnyType)
	log.Info("waypoint disconnected", "error", err)
	return err
}

// owned is a stream of a caller who is known: it gets its own waypoint's resources, whoever it says that it is.
type owned struct {
	grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]
	name string
}

func (s owned) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	req, err := s.BidiStreamingServer.Recv()
	if err == nil {
		req.Node = &core.Node{Id: s.name}
	}
	return req, err
}

// heard listens to what an Envoy says of what it got.
type heard struct {
	w   *Waypoints
	log *slog.Logger
}

func (heard) OnDeltaStreamOpen(context.Context, int64, string) error { return nil }
func (heard) OnDeltaStreamClosed(int64, *core.Node)                  {}
func (heard) OnStreamDeltaResponse(int64, *discovery.DeltaDiscoveryRequest, *discovery.DeltaDiscoveryResponse) {
}

func (h heard) OnStreamDeltaRequest(_ int64, req *discovery.DeltaDiscoveryRequest) error {
	if req.ErrorDetail != nil {
		h.w.failed.WithLabelValues(req.TypeUrl).Inc()
		h.log.Error("the waypoint's Envoy rejected its configuration and keeps what it has", "type", req.TypeUrl, "error", clip(req.ErrorDetail.Message))
	}
	return nil
}
