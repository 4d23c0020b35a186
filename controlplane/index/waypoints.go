package index

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
)

// WaypointWish is a Service that asks for a waypoint, by its own label or its namespace's.
type WaypointWish struct {
	Namespace, Name, UID string
	Waypoint             string // namespace/name
}

// WaypointWishes lists them as the watch has them now.
func (s *Source) WaypointWishes() []WaypointWish {
	services, ok := s.stores.Load(Service)
	namespaces, ok2 := s.stores.Load(Namespace)
	if !ok || !ok2 {
		return nil
	}
	var out []WaypointWish
	for _, o := range services.(cache.Store).List() {
		svc, ok := o.(*corev1.Service)
		if !ok {
			continue
		}
		k, said := waypointOf(svc.Labels, svc.Namespace)
		if !said {
			if ns, ok, err := namespaces.(cache.Store).GetByKey(svc.Namespace); ok && err == nil {
				if ns, ok := ns.(*corev1.Namespace); ok {
					k, _ = waypointOf(ns.Labels, ns.Name)
				}
			}
		}
		if k != (key{}) {
			out = append(out, WaypointWish{Namespace: svc.Namespace, Name: svc.Name, UID: string(svc.UID), Waypoint: k.Namespace + "/" + k.Name})
		}
	}
	return out
}
