package xds

import (
	"context"
	"maps"
	"net/netip"
	"strconv"

	envoytypes "github.com/envoyproxy/go-control-plane/pkg/cache/types"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// place is where some of a waypoint's pods run. To the library's cache those are one node.
type place struct {
	id   string
	pods int
	near *waypoint.Nearby
}

// placeOf is where the pod of an address runs: nowhere as long as nobody has said so, and for what is not a pod's address.
func (w *Waypoints) placeOf(peer string) waypoint.Place {
	a, err := netip.ParseAddr(peer)
	if err != nil {
		return waypoint.Place{}
	}
	return waypoint.PlaceOf(w.snapshot.WorkloadAt(mesh.NetAddr{Network: w.snapshot.Config().Network, Addr: a.Unmap()}))
}

// join adds a pod to those of its place.
func (w *Waypoints) join(name mesh.ServiceName, t *told, pod *envoyPod) {
	pod.place = w.placeOf(pod.peer)
	p := t.places[pod.place]
	if p == nil {
		w.serial++
		p = &place{id: name.String()}
		if pod.place != (waypoint.Place{}) {
			p.id += "@" + strconv.FormatUint(w.serial, 10)
		}
		t.places[pod.place] = p
	}
	p.pods++
	t.pods[pod] = struct{}{}
}

// leave takes a pod from those of its place.
func (w *Waypoints) leave(t *told, pod *envoyPod) {
	delete(t.pods, pod)
	if p := t.places[pod.place]; p != nil {
		if p.pods--; p.pods == 0 {
			delete(t.places, pod.place)
			w.cache.ClearSnapshot(p.id)
		}
	}
}

// moved ends the streams of pods that turn out to run somewhere else: they come again, and are told what is near there.
func (w *Waypoints) moved(t *told) {
	for p := range t.pods {
		if at := w.placeOf(p.peer); at != p.place && at != (waypoint.Place{}) { // not of one that ends
			p.end()
		}
	}
}

// send has the cache serve resources.
func (w *Waypoints) send(t *told, r *waypoint.Resources) error {
	w.serial++
	s := served{Resources: r, serial: strconv.FormatUint(w.serial, 10), late: t.late.endpoints(r)}
	if t.arriving != nil {
		s.was = t.arriving.was
	}
	for at, p := range t.places {
		p.near = r.Nearby(at, p.near)
		s.near = p.near
		if err := w.cache.SetSnapshot(context.Background(), p.id, s); err != nil {
			return err
		}
	}
	return nil
}

// with puts what is special into a map that others have, too.
func with[V any](all, special map[string]V) map[string]V {
	if len(special) == 0 {
		return all
	}
	out := make(map[string]V, len(all)+len(special))
	maps.Copy(out, all)
	maps.Copy(out, special)
	return out
}

// lateVersions are those of endpoints that are given late.
func lateVersions(late map[string]envoytypes.Resource) map[string]string {
	out := make(map[string]string, len(late))
	for name := range late {
		out[name] = lateVersion
	}
	return out
}
