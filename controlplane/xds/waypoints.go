package xds

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoytypes "github.com/envoyproxy/go-control-plane/pkg/cache/types"
	envoycache "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/delta/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// Waypoints serves Envoy's resources, of which each waypoint gets its own. What has not changed is not sent again: its
// version is a hash of it.
type Waypoints struct {
	cache  envoycache.SnapshotCache
	log    *slog.Logger
	failed *prometheus.CounterVec

	// OnProgress is called where a waypoint has come further.
	OnProgress func()

	mu       sync.Mutex
	snapshot *mesh.Snapshot
	revision uint64 // of [Cache.Revision] that goes with snapshot
	serial   uint64
	open     map[mesh.ServiceName]*told
}

// told is what the pods of one waypoint are told.
type told struct {
	writer    *waypoint.Writer
	resources *waypoint.Resources // that the cache has
	versions  map[string]string   // of them, by waypoint.ActiveKey
	failed    string              // why they are not told what holds now
	pods      map[*envoyPod]struct{}
	places    map[waypoint.Place]*place // where they run
	late      lateNames
	arriving  *arriving // nil: the cache has all of resources

	off    map[string]string // patches that an Envoy has refused, which are left off: why, by mesh.Patch.Key
	proven waypoint.Made     // those that an Envoy does
}

// envoyPod is one stream.
type envoyPod struct {
	name   string
	peer   string // its address
	place  waypoint.Place
	end    context.CancelFunc // of the stream
	self   described
	active map[string]string    // as its Envoy was read
	nack   map[string]string    // by type
	told   map[string]TypeState // by type: of revisions it has the nonces of responses
	at     uint64               // revision as of which its Envoy did all that it was told
	gets   map[string][]string  // while clusters arrive: the endpoints of responses, by nonce
	has    map[string]struct{}  // and those that it has taken
}

// NewWaypoints knows no waypoint.
func NewWaypoints(log *slog.Logger, metrics prometheus.Registerer) *Waypoints {
	w := &Waypoints{
		cache: envoycache.NewSnapshotCache(true, envoycache.IDHash{}, nil), log: log, open: map[mesh.ServiceName]*told{},
		snapshot: &mesh.Snapshot{},
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "warren_waypoint_rejects_total", Help: "Responses that a waypoint's Envoy rejected, by type.",
		}, []string{"type"}),
	}
	for _, url := range []string{envoyresource.ClusterType, envoyresource.EndpointType, envoyresource.ListenerType, envoyresource.RouteType,
		envoyresource.ExtensionConfigType, envoyresource.SecretType} {
		w.failed.WithLabelValues(url) // from the start: a series that begins with its first event has no increase
	}
	if metrics != nil {
		metrics.MustRegister(w.failed)
	}
	return w
}

// Update gives connected waypoints what s changes for them, which is what [Cache.Revision] calls revision.
func (w *Waypoints) Update(s *mesh.Snapshot, revision uint64) {
	w.mu.Lock()
	changed := s != w.snapshot
	w.snapshot, w.revision = s, revision
	var bound map[mesh.ServiceName][]*mesh.Service
	if changed && len(w.open) > 0 {
		bound = waypoint.Bound(s)
	}
	for name, t := range w.open {
		if changed {
			w.moved(t)
			w.build(name, t, bound[name])
		}
		t.look(revision)
	}
	w.mu.Unlock()
	w.progress()
}

func (w *Waypoints) progress() {
	if w.OnProgress != nil {
		w.OnProgress()
	}
}

// look finds which pods do all that they are told.
func (t *told) look(revision uint64) {
	for p := range t.pods {
		done := t.failed == "" && t.versions != nil
		for k, v := range t.versions {
			done = done && p.active[k] == v
		}
		switch {
		case done:
			p.at = revision
			t.proven = t.writer.Patched()
		case p.at >= revision: // what is only for waypoints does not make a revision
			p.at = max(revision, 1) - 1
		}
	}
}

// Pods tells how far the pods of a waypoint are that are connected to this replica.
func (w *Waypoints) Pods(name mesh.ServiceName) map[string]Progress {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := w.open[name]
	if t == nil {
		return nil
	}
	out := map[string]Progress{}
	for p := range t.pods {
		at := Progress{Revision: p.at, Trouble: t.failed, Refused: t.off}
		for _, text := range p.nack {
			at.Trouble = text
		}
		out[p.name] = at
	}
	return out
}

// build writes one waypoint's resources. What cannot be written leaves the last good ones.
func (w *Waypoints) build(name mesh.ServiceName, t *told, bound []*mesh.Service) {
	r, err := t.writer.Write(w.snapshot, bound)
	for bad := (*waypoint.PatchError)(nil); errors.As(err, &bad); r, err = t.writer.Write(w.snapshot, bound) {
		if _, ok := t.off[bad.Key]; ok { // it is not written of what is left off
			break
		}
		t.leave(map[string]string{bad.Key: clip(bad.Text)})
	}
	t.failed = ""
	if err != nil {
		t.failed = clip(err.Error())
		w.log.Error("configuration of a waypoint not written; it keeps what it has", "waypoint", name.String(), "error", err)
		return
	}
	if r == t.resources {
		return
	}
	w.arrive(t, r)
	if err := w.send(t, r); err != nil {
		t.failed = clip(err.Error())
		w.log.Error("configuration of a waypoint not sent", "waypoint", name.String(), "error", err)
		return
	}
	t.sent(r)
}

// leaveOff has what an Envoy refuses be without the patches that it may be refused for: those that no Envoy has done yet, or
// else all. It reports whether there were any. What else is new reaches the Envoys, and nothing that they refuse is sent again.
func (w *Waypoints) leaveOff(name mesh.ServiceName, t *told, kind, why string) bool {
	blamed, all := map[string]string{}, map[string]string{}
	for k, kinds := range t.writer.Patched() {
		if _, ok := kinds[kind]; !ok {
			continue
		}
		all[k] = why
		if _, ok := t.proven[k]; !ok {
			blamed[k] = why
		}
	}
	if len(blamed) == 0 {
		blamed = all
	}
	if len(blamed) == 0 {
		return false
	}
	t.leave(blamed)
	w.build(name, t, waypoint.Bound(w.snapshot)[name])
	return true
}

// leave adds patches to those that are left off, in the place of what was left off of the same objects. Whoever reads the progress
// of pods has the map that there was.
func (t *told) leave(why map[string]string) {
	objects := map[string]bool{}
	for k := range why {
		object, _, _ := strings.Cut(k, "@")
		objects[object] = true
	}
	next := maps.Clone(why)
	for k, text := range t.off {
		if object, _, _ := strings.Cut(k, "@"); !objects[object] {
			next[k] = text
		}
	}
	t.off = next
	t.writer.LeaveOff(next)
}

// sent notes what its Envoys are told.
func (t *told) sent(r *waypoint.Resources) {
	t.resources = r
	t.versions = map[string]string{}
	for _, kind := range waypoint.ActiveTypes {
		for k, v := range r.Versions(kind) {
			t.versions[waypoint.ActiveKey(kind, k)] = v
		}
	}
}

// served is what the library's cache serves: whoever wrote the resources knows their hashes.
type served struct {
	*waypoint.Resources
	was    *waypoint.Resources // see arriving
	serial string
	late   map[string]envoytypes.Resource
	near   *waypoint.Nearby
}

func (s served) GetVersion(string) string   { return s.serial }
func (s served) ConstructVersionMap() error { return nil }

func (s served) GetVersionMap(kind string) map[string]string {
	all := beside(s.was, kind, s.Versions(kind), (*waypoint.Resources).Versions)
	if kind != envoyresource.EndpointType {
		return all
	}
	return with(with(all, s.near.Versions()), lateVersions(s.late))
}

func (s served) GetResources(kind string) map[string]envoytypes.Resource {
	all := beside(s.was, kind, s.ByName(kind), (*waypoint.Resources).ByName)
	if kind != envoyresource.EndpointType {
		return all
	}
	return with(with(all, s.near.ByName()), s.late)
}

func (s served) GetResourcesAndTTL(kind string) map[string]envoytypes.ResourceWithTTL {
	out := map[string]envoytypes.ResourceWithTTL{}
	for name, r := range s.GetResources(kind) {
		out[name] = envoytypes.ResourceWithTTL{Resource: r}
	}
	return out
}

// serve answers the Envoy of a waypoint until its stream ends.
func (w *Waypoints) serve(stream grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse], name mesh.ServiceName, peer string) error {
	ctx, end := context.WithCancel(stream.Context())
	defer end()
	me := &envoyPod{name: peer, peer: peer, end: end, nack: map[string]string{}, told: map[string]TypeState{}}
	log := w.log.With("waypoint", name.String(), "peer", peer)
	w.mu.Lock()
	t := w.open[name]
	if t == nil {
		t = &told{writer: waypoint.NewWriter(name), pods: map[*envoyPod]struct{}{}, places: map[waypoint.Place]*place{}, late: lateNames{}}
		w.open[name] = t
	}
	w.join(name, t, me)
	switch {
	case t.resources == nil:
		w.build(name, t, waypoint.Bound(w.snapshot)[name])
	case t.places[me.place].pods == 1:
		if err := w.send(t, t.resources); err != nil {
			log.Error("configuration of a waypoint not sent", "error", err)
		}
	}
	id := t.places[me.place].id
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		t.late.forget(me)
		if w.leave(t, me); len(t.pods) == 0 {
			t.stopWaiting()
			delete(w.open, name)
		} else {
			t.haveArrived() // it may have been the last that was waited for
		}
		w.mu.Unlock()
		w.progress()
	}()
	log.Info("waypoint connected")
	h := heard{w, t, me, name, log}
	err := delta.NewServer(ctx, w.cache, h).DeltaStreamHandler(owned{stream, id, h}, envoyresource.AnyType)
	log.Info("waypoint disconnected", "error", err)
	return err
}

// owned is a stream of a caller who is known: it gets its own waypoint's resources, as they are for where it runs, whoever it says that it is.
type owned struct {
	grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]
	id    string // see place
	heard heard
}

func (s owned) Recv() (*discovery.DeltaDiscoveryRequest, error) {
	for {
		req, err := s.BidiStreamingServer.Recv()
		if err != nil {
			return req, err
		}
		if req.TypeUrl == waypoint.TypeActive { // from the process beside Envoy, which reads it
			s.heard.active(req)
			continue
		}
		if req.TypeUrl == envoyresource.EndpointType {
			s.heard.asked(req)
		}
		s.heard.named(req.GetNode())
		req.Node = &core.Node{Id: s.id}
		return req, nil
	}
}

// heard listens to what an Envoy says of what it got.
type heard struct {
	w    *Waypoints
	told *told
	pod  *envoyPod
	name mesh.ServiceName // of the waypoint
	log  *slog.Logger
}

// active notes what an Envoy does: all of it, or what is different.
func (h heard) active(req *discovery.DeltaDiscoveryRequest) {
	h.w.mu.Lock()
	if h.pod.active == nil || slices.Contains(req.ResourceNamesSubscribe, "*") {
		h.pod.active = map[string]string{}
	}
	maps.Copy(h.pod.active, req.InitialResourceVersions)
	for _, k := range req.ResourceNamesUnsubscribe {
		delete(h.pod.active, k)
	}
	h.told.look(h.w.revision)
	h.w.mu.Unlock()
	h.w.progress()
}

// named notes what the pod calls itself, for who reads conditions.
func (h heard) named(n *core.Node) {
	if d := describe(n); d.proxy != "" {
		h.w.mu.Lock()
		h.pod.self = d
		h.pod.name, _, _ = strings.Cut(d.proxy, ".")
		h.w.mu.Unlock()
	}
}

func (heard) OnDeltaStreamOpen(context.Context, int64, string) error { return nil }
func (heard) OnDeltaStreamClosed(int64, *core.Node)                  {}

func (h heard) OnStreamDeltaResponse(_ int64, _ *discovery.DeltaDiscoveryRequest, res *discovery.DeltaDiscoveryResponse) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	t := h.pod.told[res.TypeUrl]
	t.Sent, t.At = res.Nonce, time.Now()
	h.pod.told[res.TypeUrl] = t
	h.told.given(h.pod, res)
}

func (h heard) OnStreamDeltaRequest(_ int64, req *discovery.DeltaDiscoveryRequest) error {
	h.w.mu.Lock()
	t := h.pod.told[req.TypeUrl]
	if req.ResponseNonce != "" {
		if req.ErrorDetail != nil {
			h.pod.nack[req.TypeUrl] = clip(req.ErrorDetail.Message)
		} else {
			t.Acked = req.ResponseNonce
			h.told.taken(h.pod, req.ResponseNonce)
			delete(h.pod.nack, req.TypeUrl)
		}
	}
	h.pod.told[req.TypeUrl] = t // asked for, at least
	without := req.ErrorDetail != nil && h.w.leaveOff(h.name, h.told, req.TypeUrl, clip(req.ErrorDetail.Message))
	h.w.mu.Unlock()
	if without {
		h.log.Warn("EnvoyFilters or modules are left off, because the waypoint's Envoy refuses what they make")
		h.w.progress()
	}
	if req.ErrorDetail != nil {
		h.w.failed.WithLabelValues(req.TypeUrl).Inc()
		h.log.Error("the waypoint's Envoy rejected its configuration and keeps what it has", "type", req.TypeUrl, "error", clip(req.ErrorDetail.Message))
	}
	return nil
}
