package index

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Rules that are for clients with certain labels (sourceLabels). A client proves its identity, and no labels: whose they are is known of
// the address that it comes from, so that a waypoint is told the addresses of the pods that have them. They change with such pods
// as endpoints of a Service do, and a route table of each service that asks is what is sent then.

// clientAPI is what the index has of the labels that are asked for.
type clientAPI struct {
	clients map[string]*clientGroup              // by their labels
	asking  map[mesh.ServiceName]map[string]bool // services whose rules are for them
}

// clientGroup are the workloads with certain labels.
type clientGroup struct {
	labels  map[string]string
	members map[string][]netip.Addr // by UID
	askers  map[mesh.ServiceName]bool
	changed bool
	at      []netip.Addr // of all, sorted
}

func newClientAPI() clientAPI {
	return clientAPI{clients: map[string]*clientGroup{}, asking: map[mesh.ServiceName]map[string]bool{}}
}

func groupKey(labels map[string]string) string {
	b, _ := json.Marshal(labels) // keys in order; text can always be written
	return string(b)
}

// has reports whether a workload is one of the group: pods of the host network share their address with others.
func (g *clientGroup) has(w *mesh.Workload) bool {
	return w != nil && !w.HostNetwork && len(w.Addrs) > 0 && selects(g.labels, w.Labels)
}

// addresses are those of all members.
func (g *clientGroup) addresses() []netip.Addr {
	if g.changed {
		g.at = []netip.Addr{}
		for _, a := range g.members {
			g.at = append(g.at, a...)
		}
		slices.SortFunc(g.at, netip.Addr.Compare)
		g.at, g.changed = slices.Compact(g.at), false
	}
	return g.at
}

// noteClient follows a workload that changes from one to the other, nil for none, and adds the services that are to hear of it.
func (x *Index) noteClient(uid string, was, is *mesh.Workload, heard map[mesh.ServiceName]bool) {
	for _, g := range x.clients {
		before, after := g.has(was), g.has(is)
		if !before && !after || before && after && slices.Equal(was.Addrs, is.Addrs) {
			continue
		}
		if after {
			g.members[uid] = is.Addrs
		} else {
			delete(g.members, uid)
		}
		g.changed = true
		maps.Copy(heard, g.askers)
	}
}

// forClients notes which clients the rules of a service ask for, and says where they are.
func (x *Index) forClients(s *mesh.Service) {
	wants := map[string]bool{}
	for i := range s.HTTP {
		for j := range s.HTTP[i].Matches {
			labels := s.HTTP[i].Matches[j].Labels
			if len(labels) == 0 {
				continue
			}
			k := groupKey(labels)
			if wants[k] = true; x.clients[k] == nil {
				g := &clientGroup{labels: labels, members: map[string][]netip.Addr{}, askers: map[mesh.ServiceName]bool{}, changed: true}
				for w := range x.snapshot.Workloads() {
					if g.has(w) {
						g.members[w.UID] = w.Addrs
					}
				}
				x.clients[k] = g
			}
			x.clients[k].askers[s.Name] = true
		}
	}
	x.asks(s.Name, wants)
	x.locate(s)
}

// asks replaces what a service asks for.
func (x *Index) asks(name mesh.ServiceName, wants map[string]bool) {
	for k := range x.asking[name] {
		if g := x.clients[k]; !wants[k] {
			if delete(g.askers, name); len(g.askers) == 0 {
				delete(x.clients, k)
			}
		}
	}
	if delete(x.asking, name); len(wants) > 0 {
		x.asking[name] = wants
	}
}

// locate writes where the clients of a service's rules are. The rules may be those of an object, which has no addresses.
func (x *Index) locate(s *mesh.Service) {
	if x.asking[s.Name] == nil {
		return
	}
	s.HTTP = slices.Clone(s.HTTP)
	for i := range s.HTTP {
		r := &s.HTTP[i]
		if !slices.ContainsFunc(r.Matches, func(m mesh.HTTPMatch) bool { return len(m.Labels) > 0 }) {
			continue
		}
		r.Matches = slices.Clone(r.Matches)
		for j := range r.Matches {
			if m := &r.Matches[j]; len(m.Labels) > 0 {
				m.At = x.clients[groupKey(m.Labels)].addresses()
			}
		}
	}
}

// tellClients has the services that ask hear of changed clients, after all workloads are in.
func (x *Index) tellClients(b *mesh.Builder, heard map[mesh.ServiceName]bool) {
	for name := range heard {
		if s := b.Service(name); s != nil {
			next := *s
			x.locate(&next)
			b.PutService(&next)
		}
	}
}
