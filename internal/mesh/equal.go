package mesh

import (
	"maps"
	"slices"
)

// Equal reports whether two workloads are the same but for Revision.
func (w *Workload) Equal(o *Workload) bool {
	if w == nil || o == nil {
		return w == o
	}
	return w.UID == o.UID && w.Name == o.Name && w.Namespace == o.Namespace &&
		w.Cluster == o.Cluster && w.Network == o.Network &&
		slices.Equal(w.Addrs, o.Addrs) && w.Hostname == o.Hostname &&
		w.Identity == o.Identity && w.Tunnel == o.Tunnel && w.NativeTunnel == o.NativeTunnel &&
		w.HostNetwork == o.HostNetwork && w.Node == o.Node && w.Healthy == o.Healthy &&
		w.CanonicalName == o.CanonicalName && w.CanonicalRevision == o.CanonicalRevision &&
		w.WorkloadName == o.WorkloadName && w.Kind == o.Kind &&
		w.Locality == o.Locality && w.Capacity == o.Capacity &&
		maps.EqualFunc(w.Services, o.Services, slices.Equal) &&
		slices.Equal(w.Policies, o.Policies) && slices.Equal(w.Audits, o.Audits) &&
		w.Waypoint.Equal(o.Waypoint) && w.NetworkGateway.Equal(o.NetworkGateway) &&
		w.AppTunnel == o.AppTunnel && maps.Equal(w.Labels, o.Labels)
}

// Equal reports whether two gateways are the same.
func (g *Gateway) Equal(o *Gateway) bool {
	if g == nil || o == nil {
		return g == o
	}
	return *g == *o
}

// Equal reports whether two services are the same but for Revision.
func (s *Service) Equal(o *Service) bool {
	if s == nil || o == nil {
		return s == o
	}
	return s.Name == o.Name && s.Short == o.Short &&
		slices.Equal(s.VIPs, o.VIPs) && slices.Equal(s.VIPNets, o.VIPNets) &&
		slices.Equal(s.Ports, o.Ports) && slices.Equal(s.SANs, o.SANs) &&
		s.Waypoint.Equal(o.Waypoint) && s.IngressUseWaypoint == o.IngressUseWaypoint &&
		s.LB.Equal(o.LB) && s.Canonical == o.Canonical && (s.VisibleIn == nil) == (o.VisibleIn == nil) && slices.Equal(s.VisibleIn, o.VisibleIn) &&
		equalHTTP(s, o)
}

// Equal reports whether two settings are the same.
func (l LoadBalancing) Equal(o LoadBalancing) bool {
	return slices.Equal(l.Prefer, o.Prefer) && l.Mode == o.Mode && l.AllowUnhealthy == o.AllowUnhealthy
}

// Equal reports whether two policies are the same but for Revision.
func (p *Policy) Equal(o *Policy) bool {
	if p == nil || o == nil {
		return p == o
	}
	return p.Name == o.Name && p.Scope == o.Scope && p.Action == o.Action && p.DryRun == o.DryRun &&
		slices.EqualFunc(p.Rules, o.Rules, func(a, b Rule) bool {
			return slices.EqualFunc(a.Clauses, b.Clauses, func(a, b Clause) bool {
				return slices.EqualFunc(a.Matches, b.Matches, Match.Equal)
			})
		})
}

// Equal reports whether two matches are the same.
func (m Match) Equal(o Match) bool {
	return slices.Equal(m.Namespaces, o.Namespaces) && slices.Equal(m.NotNamespaces, o.NotNamespaces) &&
		slices.Equal(m.Principals, o.Principals) && slices.Equal(m.NotPrincipals, o.NotPrincipals) &&
		slices.Equal(m.ServiceAccounts, o.ServiceAccounts) && slices.Equal(m.NotServiceAccounts, o.NotServiceAccounts) &&
		slices.Equal(m.SourceIPs, o.SourceIPs) && slices.Equal(m.NotSourceIPs, o.NotSourceIPs) &&
		slices.Equal(m.DestinationIPs, o.DestinationIPs) && slices.Equal(m.NotDestinationIPs, o.NotDestinationIPs) &&
		slices.Equal(m.DestinationPorts, o.DestinationPorts) && slices.Equal(m.NotDestinationPorts, o.NotDestinationPorts)
}
