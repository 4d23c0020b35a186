package waypoint

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"hash"
	"maps"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// All pods of a waypoint are told the same but for one thing: which endpoints are near is another question in each zone. A part of the
// configuration that depends on where a proxy runs is written once, with where the endpoints are, and put in order for each place that
// proxies connect from.

// Place is where a pod runs, by which endpoints are near to it or far.
type Place struct {
	mesh.Locality
	Node, Network, Cluster string
	Labels                 string // of the pod, "key=value", each in a line, in order
}

// PlaceOf is where a workload runs; of nil, nowhere, to which nothing is near.
func PlaceOf(w *mesh.Workload) Place {
	if w == nil {
		return Place{}
	}
	at := Place{Locality: w.Locality, Node: w.Node, Network: w.Network, Cluster: w.Cluster}
	for i, k := range slices.Sorted(maps.Keys(w.Labels)) {
		if i > 0 {
			at.Labels += "\n"
		}
		at.Labels += k + "=" + w.Labels[k]
	}
	return at
}

// label is the value of a label of the pod, or of its node where that says where the node is.
func (p Place) label(key string) string {
	switch key {
	case "topology.kubernetes.io/region":
		return p.Region
	case "topology.kubernetes.io/zone":
		return p.Zone
	case "topology.istio.io/subzone":
		return p.Subzone
	case "kubernetes.io/hostname":
		return p.Node
	case "topology.istio.io/network":
		return p.Network
	case "topology.istio.io/cluster":
		return p.Cluster
	}
	for line := range strings.Lines(p.Labels) {
		if k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "="); k == key {
			return v
		}
	}
	return ""
}

// in reports whether a place is in a locality of Istio's, "region/zone/subzone", and how much of it is named.
func (p Place) in(locality string) (named int, ok bool) {
	for i, part := range strings.SplitN(locality, "/", 3) {
		if part == "*" || part == "" {
			continue
		}
		if part != []string{p.Region, p.Zone, p.Subzone}[i] {
			return 0, false
		}
		named++
	}
	return named, true
}

// of is what is the same for all places in one scope.
func (p *Place) of(scope mesh.LBScope) string {
	return scope.Of(&p.Locality, p.Node, p.Cluster, p.Network)
}

// nearness says by what endpoints are near or far, and where each of them is.
type nearness struct {
	Scopes []mesh.LBScope   // the more of them are shared, from the first, the nearer; or
	Rule   *mesh.LocalityLB // of a DestinationRule
	Where  []Place          // in the order of the endpoints
	Own    []Place          // of the proxies, where Rule goes by zones
}

// nearnessOf is by what the endpoints of a service are told apart, nil for nothing. As in Istio, a DestinationRule that says something
// of localities comes before what the Service says, and that before what holds everywhere: nil for failing over to what is farther, which
// takes outlier detection.
func nearnessOf(svc *mesh.Service, use *mesh.Traffic, everywhere *mesh.LocalityLB) *nearness {
	switch l := use.Locality; {
	case l != nil && l.Zones:
		return &nearness{Rule: l}
	case l != nil && (l.Off || len(l.Distribute) == 0 && use.Outliers == nil):
		return nil
	case l != nil:
		return &nearness{Rule: l}
	case svc.LB.Mode == mesh.LBFailover:
		return &nearness{Scopes: svc.LB.Prefer}
	case everywhere == nil && use.Outliers != nil:
		return &nearness{Rule: &mesh.LocalityLB{}}
	case everywhere != nil && !everywhere.Off && (len(everywhere.Distribute) > 0 || use.Outliers != nil):
		return &nearness{Rule: everywhere}
	}
	return nil
}

func (n *nearness) add(w *mesh.Workload) {
	if n == nil {
		return
	}
	at := PlaceOf(w)
	if n.Rule == nil || len(n.Rule.Labels) == 0 {
		at.Labels = ""
	}
	n.Where = append(n.Where, at)
}

// write adds it to a hash.
func (n *nearness) write(h hash.Hash) {
	if n != nil {
		_ = json.NewEncoder(h).Encode(n) // which consists of text, numbers and lists of them; a hash takes all
	}
}

// rank is how far an endpoint is from a place: 0 is nearest.
func (n *nearness) rank(from, to Place) int {
	switch {
	case n.Rule == nil:
		for i, scope := range n.Scopes {
			if from.of(scope) != to.of(scope) {
				return len(n.Scopes) - i
			}
		}
		return 0
	case n.Rule.Zones:
		return 3*n.byLabels(from, to) + n.byRegion(from, to)
	case len(n.Rule.Labels) > 0:
		return n.byLabels(from, to)
	case from.Locality == (mesh.Locality{}):
		return 0
	case from.Locality == to.Locality:
		return 0
	case from.Region == to.Region && from.Zone == to.Zone:
		return 1
	case from.Region == to.Region:
		return 2
	}
	return 2 + n.byRegion(from, to)
}

// byLabels is how few labels are shared.
func (n *nearness) byLabels(from, to Place) int {
	for i, label := range n.Rule.Labels {
		key, want, fixed := strings.Cut(label, "=")
		if !fixed {
			want = from.label(key)
		}
		if to.label(key) != want {
			return len(n.Rule.Labels) - i
		}
	}
	return 0
}

// byRegion is 0 for the own region, and then 1 or, where another region is named to fail over to, 2.
func (n *nearness) byRegion(from, to Place) int {
	if from.Region == to.Region || from.Locality == (mesh.Locality{}) {
		return 0
	}
	for _, f := range n.Rule.Failover {
		if f.From == from.Region && f.To != to.Region {
			return 2
		}
	}
	return 1
}

// arrange puts endpoints in the order of a place, nil where all are alike to it.
func (n *nearness) arrange(m *endpointv3.ClusterLoadAssignment, at Place) *endpointv3.ClusterLoadAssignment {
	if len(m.Endpoints) != 1 || len(m.Endpoints[0].LbEndpoints) != len(n.Where) {
		return nil
	}
	groups := n.distribute(m.Endpoints[0].LbEndpoints, at)
	switch {
	case groups != nil:
	case n.Rule != nil && n.Rule.Zones:
		groups = n.byZones(m.Endpoints[0].LbEndpoints, at)
	case n.Rule == nil || len(n.Rule.Distribute) == 0:
		groups = n.order(m.Endpoints[0].LbEndpoints, at)
	}
	if groups == nil {
		return nil
	}
	return &endpointv3.ClusterLoadAssignment{ClusterName: m.ClusterName, Endpoints: groups, Policy: m.Policy}
}

// order makes of each rank a priority: what is farther is for when too little of what is nearer is healthy.
func (n *nearness) order(all []*endpointv3.LbEndpoint, at Place) (groups []*endpointv3.LocalityLbEndpoints) {
	ranks := map[int][]*endpointv3.LbEndpoint{}
	for i, e := range all {
		if e.HealthStatus == corev3.HealthStatus_UNHEALTHY { // it would count as one that has failed
			continue
		}
		r := n.rank(at, n.Where[i])
		ranks[r] = append(ranks[r], e)
	}
	if len(ranks) < 2 {
		return nil
	}
	for i, r := range slices.Sorted(maps.Keys(ranks)) {
		groups = append(groups, &endpointv3.LocalityLbEndpoints{Priority: uint32(i), LoadBalancingWeight: wrapperspb.UInt32(1), LbEndpoints: ranks[r]})
	}
	return groups
}

// countProxies notes where the pods of the proxy itself run, where what each sends to its zone depends on how many there are of them.
func (b *builder) countProxies(n *nearness) {
	if n == nil || n.Rule == nil || !n.Rule.Zones {
		return
	}
	b.through[b.self] = true
	for w := range b.s.Endpoints(b.self) {
		at := PlaceOf(w)
		at.Labels = ""
		n.Own = append(n.Own, at)
	}
	slices.SortFunc(n.Own, func(x, y Place) int {
		return cmp.Or(cmp.Compare(x.Region, y.Region), cmp.Compare(x.Zone, y.Zone), cmp.Compare(x.Node, y.Node))
	})
}

// whole is a share of everything in the weights of zones.
const whole = 10_000

// byZones has a proxy keep to its zone as far as endpoints there are for it: as Envoy's zone aware routing, which a proxy that knew its
// neighbours would do by itself. If a zone has the share u of a region's endpoints and l of its proxies, a proxy there sends u/l of what
// it has to its zone, all if that is 1 or more, and the rest to zones that have more endpoints than proxies, by how many more. Zones that
// get nothing, and then other regions, are for when too little of that is healthy.
func (n *nearness) byZones(all []*endpointv3.LbEndpoint, at Place) []*endpointv3.LocalityLbEndpoints {
	groups := n.order(all, at)
	nearest := all
	if groups != nil {
		nearest = groups[0].LbEndpoints
	}
	zones, total := map[string][]*endpointv3.LbEndpoint{}, 0
	for i, e := range all {
		if len(nearest) == 0 || nearest[0] != e { // they stand in the same order
			continue
		}
		if nearest = nearest[1:]; e.HealthStatus != corev3.HealthStatus_UNHEALTHY {
			zones[n.Where[i].Zone] = append(zones[n.Where[i].Zone], e)
			total++
		}
	}
	proxies, ours := map[string]int{}, 0
	for _, p := range n.Own {
		if p.Region == at.Region {
			proxies[p.Zone]++
			ours++
		}
	}
	if at.Zone == "" || len(zones) < 2 || total < int(n.Rule.Least) || len(zones[at.Zone]) == 0 || proxies[at.Zone] == 0 {
		return groups
	}
	// In units of 1/(total*ours), which are whole numbers.
	more := func(zone string) int { return len(zones[zone])*ours - proxies[zone]*total }
	own, spare := whole, 0
	if have, need := len(zones[at.Zone])*ours, proxies[at.Zone]*total; have < need {
		own = whole * have / need
	}
	for zone := range zones {
		if zone != at.Zone {
			spare += max(0, more(zone))
		}
	}
	group := func(zone string, priority uint32, weight int) *endpointv3.LocalityLbEndpoints {
		return &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Region: at.Region, Zone: zone}, Priority: priority, LoadBalancingWeight: wrapperspb.UInt32(uint32(weight)), LbEndpoints: zones[zone]}
	}
	var first, rest []*endpointv3.LocalityLbEndpoints
	for _, zone := range slices.Sorted(maps.Keys(zones)) {
		weight := own
		if zone != at.Zone {
			weight = 0
			if spare > 0 {
				weight = (whole - own) * max(0, more(zone)) / spare
			}
		}
		if weight > 0 {
			first = append(first, group(zone, 0, weight))
		} else {
			rest = append(rest, group(zone, 1, 1))
		}
	}
	later := uint32(1)
	if len(rest) > 0 {
		later = 2
	}
	out := append(first, rest...)
	for i := 1; i < len(groups); i++ {
		groups[i].Priority = later + uint32(i) - 1
		out = append(out, groups[i])
	}
	return out
}

// distribute gives each share its endpoints, nil where nothing is said of what is sent from the place.
func (n *nearness) distribute(all []*endpointv3.LbEndpoint, at Place) (groups []*endpointv3.LocalityLbEndpoints) {
	if n.Rule == nil || at.Locality == (mesh.Locality{}) {
		return nil
	}
	i := slices.IndexFunc(n.Rule.Distribute, func(d mesh.Distribution) bool { _, ok := at.in(d.From); return ok })
	if i < 0 {
		return nil
	}
	shares := n.Rule.Distribute[i].To
	of := make([][]*endpointv3.LbEndpoint, len(shares))
	for i, e := range all {
		best, most := -1, -1
		for j, s := range shares {
			if named, ok := n.Where[i].in(s.Locality); ok && named > most {
				best, most = j, named
			}
		}
		if best >= 0 {
			of[best] = append(of[best], e)
		}
	}
	groups = []*endpointv3.LocalityLbEndpoints{}
	for j, s := range shares {
		if s.Percent == 0 || len(of[j]) == 0 {
			continue
		}
		where := &corev3.Locality{}
		for k, part := range strings.SplitN(s.Locality, "/", 3) {
			*[]*string{&where.Region, &where.Zone, &where.SubZone}[k] = part
		}
		groups = append(groups, &endpointv3.LocalityLbEndpoints{Locality: where, LoadBalancingWeight: wrapperspb.UInt32(s.Percent), LbEndpoints: of[j]})
	}
	return groups
}

// Nearby are the endpoints that proxies at a place get, where those are not what all get. It is not to be changed; nil has none.
type Nearby struct {
	from     map[string]*item // what they were looked for in
	byName   map[string]types.Resource
	versions map[string]string
}

// ByName are those endpoints.
func (n *Nearby) ByName() map[string]types.Resource {
	if n == nil {
		return nil
	}
	return n.byName
}

// Versions are the hashes of them.
func (n *Nearby) Versions() map[string]string {
	if n == nil {
		return nil
	}
	return n.versions
}

// Nearby puts endpoints in the order of a place. What has not changed since the last time is taken from there.
func (r *Resources) Nearby(at Place, last *Nearby) *Nearby {
	c := r.byType[resource.EndpointType]
	if c == nil || !c.near || at == (Place{}) {
		return nil
	}
	if last == nil {
		last = &Nearby{}
	}
	out := &Nearby{map[string]*item{}, map[string]types.Resource{}, map[string]string{}}
	for _, i := range c.items {
		if i.near == nil {
			continue
		}
		out.from[i.name] = i
		if last.from[i.name] == i {
			if m := last.byName[i.name]; m != nil {
				out.byName[i.name], out.versions[i.name] = m, last.versions[i.name]
			}
		} else if m := i.near.arrange(i.message.(*endpointv3.ClusterLoadAssignment), at); m != nil {
			// The order is a function of what is hashed already, and of the place.
			h := sha256.New()
			fmt.Fprintf(h, "%s %q", i.version, at)
			out.byName[i.name], out.versions[i.name] = m, sum(h)
		}
	}
	return out
}
