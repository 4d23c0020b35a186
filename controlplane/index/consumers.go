package index

import (
	"maps"
	"slices"

	"github.com/warrenmesh/warren/internal/mesh"
)

// DestinationRules for Services of other namespaces. One holds for what VirtualServices of its own namespace have waypoints send
// there, as those of an egress gateway do: for them it comes before that of the Service's namespace. Of what others send there it
// says nothing.

// consumerAPI is what the index has of them.
type consumerAPI struct {
	consumers map[mesh.ServiceName]map[key]struct{} // DestinationRules of other namespaces
}

func newConsumerAPI() consumerAPI {
	return consumerAPI{consumers: map[mesh.ServiceName]map[key]struct{}{}}
}

// away reports whether a rule is for a service of another namespace.
func (f *routeFact) away() bool {
	return slices.ContainsFunc(f.hosts, func(h mesh.ServiceName) bool { return h.Namespace != f.Namespace })
}

// consume has what a rule says hold for what its namespace sends. The Secrets that it may name are those of waypoints, of which the
// namespace may have several and share them with others.
func (f *routeFact) consume() {
	f.subsets, f.traffic = slices.Clone(f.subsets), slices.Clone(f.traffic)
	for i := range f.subsets {
		f.subsets[i].From = f.Namespace
	}
	for i := range f.traffic {
		t := &f.traffic[i]
		t.From = f.Namespace
		if t.TLS != nil && t.TLS.Credential != "" && t.TLS.Invalid == "" {
			tls := *t.TLS
			tls.Invalid = "tls.credentialName is followed for Services of the rule's own namespace alone"
			f.problems = append(f.problems, tls.Invalid+": nothing is sent to "+f.hosts[0].Hostname)
			t.TLS = &tls
		}
	}
}

func (x *Index) setConsumer(old, f *routeFact) {
	if old != nil && old.away() {
		unlink(x.consumers, old.hosts[0], old.key)
	}
	if f != nil && f.away() {
		link(x.consumers, f.hosts[0], f.key)
	}
}

// touchConsumers marks the rules of a namespace that hold for what its VirtualServices send to other ones.
func (x *Index) touchConsumers(namespace string) {
	for _, d := range x.destinations[namespace] {
		if d.away() {
			x.dirtyRoutes[ref{DestinationRule, d.key}] = struct{}{}
		}
	}
}

// touchRules marks the VirtualServices and DestinationRules for a service: whether it has a waypoint that follows them is told to their
// authors.
func (x *Index) touchRules(name mesh.ServiceName) {
	for kind, all := range map[Kind]map[string]*routeFact{VirtualService: x.virtuals[name.Namespace], DestinationRule: x.destinations[name.Namespace]} {
		for _, f := range all {
			if slices.Contains(f.hosts, name) {
				x.dirtyRoutes[ref{kind, f.key}] = struct{}{}
			}
		}
	}
}

// consumed adds to a service what the rules of other namespaces say for what these send to it, of each the oldest.
func (x *Index) consumed(s *mesh.Service) {
	from := map[string]struct{}{}
	for k := range x.consumers[s.Name] {
		from[k.Namespace] = struct{}{}
	}
	for _, ns := range slices.Sorted(maps.Keys(from)) {
		d := oldestIn(x.destinations[ns], s.Name)
		s.Subsets, s.Traffic = slices.Concat(s.Subsets, d.subsets), slices.Concat(s.Traffic, d.traffic)
	}
}

// sendsTo reports whether a VirtualService has waypoints send something to a service.
func (f *routeFact) sendsTo(name mesh.ServiceName) bool {
	to := func(b mesh.HTTPBackend) bool { return b.Service == name }
	for i := range f.rules {
		if slices.ContainsFunc(f.rules[i].Backends, to) || slices.ContainsFunc(f.rules[i].Mirrors, func(m mesh.HTTPMirror) bool { return to(m.Backend) }) {
			return true
		}
	}
	for _, r := range slices.Concat(f.named, f.connections) {
		if slices.ContainsFunc(r.Backends, to) {
			return true
		}
	}
	return false
}

// unconsumed says why a rule for a service of another namespace holds for nobody.
func (x *Index) unconsumed(f *routeFact, namespace map[string]*routeFact) []string {
	h := f.hosts[0]
	if first := oldestIn(namespace, h); first != f {
		return []string{"for " + h.Hostname + " " + first.Name + " holds, which is older"}
	}
	for _, v := range x.virtuals[f.Namespace] {
		if v.sendsTo(h) {
			return nil
		}
	}
	return []string{h.Hostname + " is of another namespace, where this holds for what VirtualServices of " + f.Namespace +
		" have waypoints send there, of which there is none; for what others send there write it in the namespace " + h.Namespace}
}

// withoutWaypoint says for which hosts of a VirtualService nobody follows it within the mesh.
func (x *Index) withoutWaypoint(f *routeFact) (problems []string) {
	if f.rules == nil && len(f.named)+len(f.connections) == 0 {
		return nil
	}
	for _, h := range f.hosts {
		if s := x.winners[h]; s != nil && h.Namespace == f.Namespace && x.waypointFor(s) == nil {
			problems = append(problems, "no waypoint is in front of "+h.Hostname+" (label "+LabelWaypoint+"), so that within the mesh this has no effect on it")
		}
	}
	return problems
}
