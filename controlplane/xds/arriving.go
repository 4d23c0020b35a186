package xds

import (
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	envoyresource "github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/waypoint"
)

// An Envoy has no use for a cluster before it has the cluster's endpoints, for which it asks once it was told of the cluster. Listeners
// and routes that came together with the cluster would meanwhile fail their requests (cluster_not_found), so they come after
// it:
//
//	all there is ── new clusters, endpoints ──► Envoys ── "have them" ──► listeners, routes; what nobody names goes
//	                └────────── arriveLimit at most ──────────────────────┘

// arriveLimit is how long listeners and routes wait for clusters: an Envoy that never says that it has them does not keep the others
// from what holds now.
const arriveLimit = time.Second

// arriving are clusters that the Envoys of a waypoint are told of, before what names them.
type arriving struct {
	was   *waypoint.Resources // of which the listeners and routes are served still
	names map[string]struct{} // of the endpoints of what is new
	timer *time.Timer         // ends the waiting
}

// awaited are the names of the endpoints of clusters that r has and was has not.
func awaited(was, r *waypoint.Resources) map[string]struct{} {
	had := was.ByName(envoyresource.ClusterType)
	out := map[string]struct{}{}
	for name := range r.ByName(envoyresource.EndpointType) {
		if had[clusterOf(name)] == nil {
			out[name] = struct{}{}
		}
	}
	return out
}

// arrive has listeners and routes stay as they were, as long as Envoys do not have the clusters that are new in r.
func (w *Waypoints) arrive(t *told, r *waypoint.Resources) {
	if t.resources == nil || len(t.pods) == 0 {
		return
	}
	was := t.resources
	if t.arriving != nil {
		was = t.arriving.was
	}
	names := awaited(was, r)
	if t.arriving == nil {
		if len(names) == 0 {
			return
		}
		a := &arriving{was: was}
		a.timer = time.AfterFunc(arriveLimit, func() { w.arrived(t, a) })
		t.arriving = a
	}
	t.arriving.names = names
	t.haveArrived()
}

// haveArrived ends the waiting where nothing is waited for. A pod that has taken no clusters yet does nothing with them either.
func (t *told) haveArrived() {
	if t.arriving == nil {
		return
	}
	for p := range t.pods {
		if p.told[envoyresource.ClusterType].Acked == "" {
			continue
		}
		for name := range t.arriving.names {
			if _, ok := p.has[name]; !ok {
				return
			}
		}
	}
	t.arriving.timer.Reset(0) // not here: this may be called by the library, whose cache is then asked
}

// arrived gives out the listeners and routes that name what has arrived.
func (w *Waypoints) arrived(t *told, a *arriving) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.arriving != a {
		return
	}
	t.stopWaiting()
	name := t.writer.Self()
	if w.open[name] != t {
		return
	}
	if err := w.send(t, t.resources); err != nil {
		t.failed = clip(err.Error())
		w.log.Error("configuration of a waypoint not sent", "waypoint", name.String(), "error", err)
	}
}

// stopWaiting lets listeners and routes come.
func (t *told) stopWaiting() {
	if t.arriving == nil {
		return
	}
	t.arriving.timer.Stop()
	t.arriving = nil
	for p := range t.pods {
		p.gets, p.has = nil, nil
	}
}

// given notes what of what is waited for a response has.
func (t *told) given(p *envoyPod, res *discovery.DeltaDiscoveryResponse) {
	if t.arriving == nil || res.TypeUrl != envoyresource.EndpointType {
		return
	}
	if p.gets == nil {
		p.gets = map[string][]string{}
	}
	for _, r := range res.Resources {
		p.gets[res.Nonce] = append(p.gets[res.Nonce], r.Name)
	}
}

// taken notes that a pod has what a response gave it.
func (t *told) taken(p *envoyPod, nonce string) {
	names, ok := p.gets[nonce]
	if t.arriving == nil || !ok {
		return
	}
	delete(p.gets, nonce)
	if p.has == nil {
		p.has = map[string]struct{}{}
	}
	for _, n := range names {
		p.has[n] = struct{}{}
	}
	t.haveArrived()
}

// beside has what an Envoy uses of now, and beside it of was, but for the listeners and routes, which are those of was.
func beside[V any](was *waypoint.Resources, kind string, now map[string]V, of func(*waypoint.Resources, string) map[string]V) map[string]V {
	switch {
	case was == nil:
		return now
	case kind == envoyresource.ListenerType || kind == envoyresource.RouteType:
		return of(was, kind)
	}
	return with(of(was, kind), now)
}
