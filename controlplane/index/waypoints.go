package index

import (
	"slices"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// WaypointWish is a Service that asks for a waypoint, by its own label or its namespace's.
type WaypointWish struct {
	Namespace, Name, UID string
	Waypoint             struct{ Namespace, Name string }
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
		if k != (key{}) && svc.Labels[labelManaged] == "" {
			out = append(out, WaypointWish{Namespace: svc.Namespace, Name: svc.Name, UID: string(svc.UID), Waypoint: k})
		}
	}
	return out
}

// OurGateways lists the Gateways of our classes, waypoints among them, as the watch has them now; false where they are not
// read.
func (s *Source) OurGateways() ([]*gatewayv1.Gateway, bool) {
	store, ok := s.stores.Load(Gateway)
	if !ok {
		return nil, false
	}
	ours := map[gatewayv1.ObjectName]bool{WaypointClass: true, IngressClass: true}
	for _, c := range s.Classes() {
		ours[gatewayv1.ObjectName(c.Name)] = true
	}
	var out []*gatewayv1.Gateway
	for _, o := range store.(cache.Store).List() {
		if g, ok := o.(*gatewayv1.Gateway); ok && ours[g.Spec.GatewayClassName] {
			out = append(out, g)
		}
	}
	return out, true
}

// ListenerSets lists them as the watch has them now.
func (s *Source) ListenerSets() []*gatewayv1.ListenerSet {
	return listed[*gatewayv1.ListenerSet](s, ListenerSet)
}

// Balanced is where a load balancer takes what is for a Service, as the watch has it now.
func (s *Source) Balanced(namespace, name string) []corev1.LoadBalancerIngress {
	o, _ := s.Object(Service, namespace, name)
	if svc, ok := o.(*corev1.Service); ok {
		return svc.Status.LoadBalancer.Ingress
	}
	return nil
}

// Classes lists the GatewayClasses for gateways that this control plane is the controller of.
func (s *Source) Classes() []*gatewayv1.GatewayClass {
	return slices.DeleteFunc(listed[*gatewayv1.GatewayClass](s, GatewayClass), func(c *gatewayv1.GatewayClass) bool {
		return c.Spec.ControllerName != IngressController || c.Name == WaypointClass
	})
}

// listed are the objects of a kind.
func listed[T any](s *Source, kind Kind) (out []T) {
	store, ok := s.stores.Load(kind)
	if !ok {
		return nil
	}
	for _, o := range store.(cache.Store).List() {
		if t, ok := o.(T); ok {
			out = append(out, t)
		}
	}
	return out
}

// IsWaypoint reports whether there is a Gateway of that name and class.
func (s *Source) IsWaypoint(namespace, name string) bool {
	o, _ := s.Object(Gateway, namespace, name)
	g, ok := o.(*gatewayv1.Gateway)
	return ok && g.Spec.GatewayClassName == WaypointClass
}

// ServiceEntries lists them as the watch has them now.
func (s *Source) ServiceEntries() []*networkingv1.ServiceEntry {
	return listed[*networkingv1.ServiceEntry](s, ServiceEntry)
}
