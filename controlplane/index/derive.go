package index

import (
	"cmp"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// derive makes the workloads of one object from the facts, and its local pod and notices.
func (x *Index) derive(src source, u *Update) []*mesh.Workload {
	switch src.kind {
	case Pod:
		return x.derivePod(src.key, u)
	case EndpointSlice:
		return x.deriveSlice(src.key)
	case ServiceEntry:
		x.noteEntry(src.key, u)
		return x.deriveEntry(src.key)
	case WorkloadEntry:
		return x.deriveWorkloadEntry(src.key)
	}
	return nil
}

func (x *Index) derivePod(k key, u *Update) []*mesh.Workload {
	f := x.pods[k.Namespace][k.Name]
	nk := NoticeKey{Kind: Pod, Namespace: k.Namespace, Name: k.Name}
	if f == nil {
		x.setLocal(k, nil, u)
		x.use(source{Pod, k}, bindings{})
		x.notice(u, nk, "", "", "")
		return nil
	}
	services := x.servicesOfPod(f)
	bound := x.policiesFor(subject{k.Namespace, f.labels, services})
	x.use(source{Pod, k}, bound)
	uid := x.uid("", "Pod", k)
	d := x.c.decide(x.namespaces[k.Namespace], PodTraits{Labels: f.labels, HostNetwork: f.hostNetwork, Sidecar: f.sidecar})
	if d.Warning != "" {
		x.notice(u, nk, f.uid, "UnknownDataplaneMode", d.Warning)
	} else {
		x.notice(u, nk, "", "", "")
	}
	addrs := f.addrs
	if f.phase == podFinished || !x.ownsAddrs(f) {
		addrs = nil // the address of a pod that is over may be another's already
	}
	if f.node != "" {
		x.setLocal(k, &LocalPod{
			UID: f.uid, Namespace: k.Namespace, Name: k.Name, ServiceAccount: f.serviceAccount, Node: f.node,
			Addrs: addrs, Enrolled: d.Enrolled, Reason: d.Reason, Strict: bound.strict, HostNetwork: f.hostNetwork,
			Phase: f.phase, WorkloadUID: uid, Selected: x.selected(f), DNSCapture: f.dnsCapture,
		}, u)
	} else {
		x.setLocal(k, nil, u)
	}
	if len(addrs) == 0 {
		return nil
	}
	w := &mesh.Workload{
		UID: uid, Name: k.Name, Namespace: k.Namespace, Cluster: x.c.ClusterID, Network: x.c.Network,
		Addrs:        addrs,
		Identity:     mesh.Identity{TrustDomain: x.c.TrustDomain, Namespace: k.Namespace, ServiceAccount: f.serviceAccount},
		HostNetwork:  f.hostNetwork,
		Node:         f.node,
		Healthy:      f.healthy,
		WorkloadName: f.workloadName,
		Kind:         f.kind,
		Locality:     x.localityOf(f.node),
		Services:     services,
		Policies:     bound.policies,
		Audits:       bound.audits,
		Labels:       f.labels,
	}
	w.CanonicalName, w.CanonicalRevision = canonical(f.labels, f.workloadName)
	setTunnel(w, f.redirected, f.labels[labelTunnel] == "http")
	return []*mesh.Workload{w}
}

// ownsAddrs is false while another pod has the better claim to one of the addresses.
func (x *Index) ownsAddrs(f *podFact) bool {
	for _, a := range f.claims() {
		for k := range x.podsByAddr[a] {
			if other := x.pods[k.Namespace][k.Name]; other != f && !f.owns(other) {
				return false
			}
		}
	}
	return true
}

// setTunnel: a pod is reachable through the tunnel once its node reported that it is captured, or when it
// speaks HBONE itself.
func setTunnel(w *mesh.Workload, redirected, native bool) {
	if redirected || native {
		w.Tunnel = mesh.TunnelHBONE
	}
	w.NativeTunnel = native
}

func (x *Index) setLocal(k key, next *LocalPod, u *Update) {
	old := x.locals[k]
	if old != nil && (next == nil || next.UID != old.UID) && u.LocalPods[old.UID] == nil {
		u.LocalPods[old.UID] = nil
	}
	if next == nil {
		delete(x.locals, k)
		return
	}
	if old == nil || !reflect.DeepEqual(old, next) {
		u.LocalPods[next.UID] = next
	}
	x.locals[k] = next
}

// uid is Istio's workload UID: cluster/group/kind/namespace/name.
func (x *Index) uid(group, kind string, k key) string {
	return x.c.ClusterID + "/" + group + "/" + kind + "/" + k.Namespace + "/" + k.Name
}

// servicesOfPod finds the services by selector, and those without one by the slices that name the pod.
func (x *Index) servicesOfPod(f *podFact) map[mesh.ServiceName][]mesh.ServicePort {
	out := map[mesh.ServiceName][]mesh.ServicePort{}
	for _, s := range x.services[f.Namespace] {
		if selects(s.selector, f.labels) && x.winners[s.service.Name] == s {
			out[s.service.Name] = s.portsOn(f)
		}
	}
	for _, e := range x.entries[f.Namespace] {
		for _, s := range e.hosts {
			if selects(s.selector, f.labels) && x.winners[s.service.Name] == s {
				out[s.service.Name] = s.portsOn(f)
			}
		}
	}
	for _, sk := range sortedKeys(x.slicesFor[f.key]) {
		slice := x.slices[sk]
		s := x.services[slice.Namespace][slice.service]
		if s == nil || len(s.selector) > 0 || x.winners[s.service.Name] != s {
			continue
		}
		out[s.service.Name] = mergePorts(out[s.service.Name], s.portsOnSlice(slice))
	}
	return out
}

func sortedKeys(m map[key]struct{}) []key {
	out := make([]key, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.SortFunc(out, compareKeys)
	return out
}

// mergePorts adds the ports that are not there yet.
func mergePorts(a, b []mesh.ServicePort) []mesh.ServicePort {
	for _, p := range b {
		if !slices.ContainsFunc(a, func(q mesh.ServicePort) bool { return q.Port == p.Port }) {
			a = append(a, p)
		}
	}
	return a
}

// deriveSlice makes a workload of each endpoint of a slice that is not a pod. Nothing is known about it but its
// address, which it may share with others: it is marked as a host's, so that nobody looks it up by address.
func (x *Index) deriveSlice(k key) []*mesh.Workload {
	f := x.slices[k]
	if f == nil {
		return nil
	}
	s := x.services[k.Namespace][f.service]
	if s == nil {
		return nil
	}
	var out []*mesh.Workload
	for _, e := range f.endpoints {
		uid := key{k.Namespace, k.Name + "/" + e.addr.String()}
		out = append(out, &mesh.Workload{
			UID: x.uid("discovery.k8s.io", "EndpointSlice", uid), Name: k.Name, Namespace: k.Namespace,
			Cluster: x.c.ClusterID, Network: x.c.Network, Addrs: []netip.Addr{e.addr},
			HostNetwork: true, Healthy: e.ready, Kind: mesh.KindPod,
			Services: map[mesh.ServiceName][]mesh.ServicePort{s.service.Name: s.portsOnSlice(f)},
		})
	}
	return out
}

func (x *Index) deriveEntry(k key) []*mesh.Workload {
	f := x.entries[k.Namespace][k.Name]
	if f == nil {
		return nil
	}
	owned := make([]*serviceFact, 0, len(f.hosts))
	for _, h := range f.hosts {
		if x.winners[h.service.Name] == h {
			owned = append(owned, h)
		}
	}
	if len(owned) == 0 {
		return nil // every host of it belongs to an older object
	}
	var out []*mesh.Workload
	seen := map[string]bool{}
	add := func(e *endpointFact, hosts []*serviceFact) {
		name := e.hostname
		if e.addr.IsValid() {
			name = e.addr.String()
		}
		uid := x.uid("networking.istio.io", "ServiceEntry", key{k.Namespace, k.Name + "/" + name})
		if name == "" || seen[uid] {
			return
		}
		seen[uid] = true
		w := x.endpointWorkload(e, hosts)
		w.UID, w.Name, w.Namespace, w.WorkloadName = uid, k.Name, k.Namespace, k.Name
		w.CanonicalName, w.CanonicalRevision = canonical(f.labels, k.Name)
		out = append(out, w)
	}
	for _, e := range f.endpoints {
		add(e, owned)
	}
	if f.implicit {
		for _, h := range owned {
			if strings.HasPrefix(h.service.Name.Hostname, "*") {
				continue // a wildcard cannot be resolved
			}
			add(&endpointFact{key: k, hostname: h.service.Name.Hostname, network: x.c.Network}, []*serviceFact{h})
		}
	}
	return out
}

// reasonPartlyIgnored is that of a notice about an object of which something is not followed.
const reasonPartlyIgnored = "PartlyIgnored"

// noteEntry tells the author of a ServiceEntry what of it does not hold.
func (x *Index) noteEntry(k key, u *Update) {
	nk := NoticeKey{Kind: ServiceEntry, Namespace: k.Namespace, Name: k.Name}
	f := x.entries[k.Namespace][k.Name]
	if f == nil {
		x.notice(u, nk, "", "", "")
		return
	}
	problems, reason := slices.Clone(f.problems), ""
	if len(problems) > 0 {
		reason = reasonPartlyIgnored
	}
	named := f.implicit || slices.ContainsFunc(f.endpoints, func(e *endpointFact) bool { return !e.addr.IsValid() })
	for _, h := range f.hosts {
		if !h.service.Dynamic && (!named || strings.HasPrefix(h.service.Name.Hostname, "*")) {
			continue
		}
		if w := x.winners[h.service.Name]; w == h && x.waypointFor(w) == nil {
			reason = cmp.Or(reason, policy.ReasonNoWaypoint)
			problems = append(problems, "the endpoints of "+h.service.Name.Hostname+" are names, which waypoints resolve and nodes do not, and it asks for none: "+
				"connections to its addresses leave as they come; label it, or its namespace, "+LabelWaypoint)
		}
	}
	x.notice(u, nk, f.uid, reason, strings.Join(problems, "; "))
}

func (x *Index) deriveWorkloadEntry(k key) []*mesh.Workload {
	e := x.endpoints[k.Namespace][k.Name]
	if e == nil || (!e.addr.IsValid() && e.hostname == "") {
		x.use(source{WorkloadEntry, k}, bindings{})
		return nil
	}
	var hosts []*serviceFact
	for _, s := range x.services[k.Namespace] {
		if selects(s.selector, e.labels) && x.winners[s.service.Name] == s {
			hosts = append(hosts, s)
		}
	}
	for _, se := range x.entries[k.Namespace] {
		for _, s := range se.hosts {
			if selects(s.selector, e.labels) && x.winners[s.service.Name] == s {
				hosts = append(hosts, s)
			}
		}
	}
	w := x.endpointWorkload(e, hosts)
	w.UID, w.Name, w.Namespace = x.uid("networking.istio.io", "WorkloadEntry", k), k.Name, k.Namespace
	w.WorkloadName = first(e.labels, k.Name, "service.istio.io/workload-name")
	w.CanonicalName, w.CanonicalRevision = canonical(e.labels, w.WorkloadName)
	bound := x.policiesFor(subject{k.Namespace, e.labels, w.Services})
	x.use(source{WorkloadEntry, k}, bound)
	w.Policies, w.Audits = bound.policies, bound.audits
	return []*mesh.Workload{w}
}

// endpointWorkload is what a WorkloadEntry and an endpoint inside a ServiceEntry have in common.
func (x *Index) endpointWorkload(e *endpointFact, hosts []*serviceFact) *mesh.Workload {
	w := &mesh.Workload{
		Cluster: x.c.ClusterID, Network: e.network, Hostname: e.hostname,
		Healthy: true, Kind: mesh.KindPod, Locality: e.locality, Capacity: e.weight, Labels: e.labels,
		Services: map[mesh.ServiceName][]mesh.ServicePort{},
	}
	if e.addr.IsValid() {
		w.Addrs = []netip.Addr{e.addr}
	}
	if e.serviceAccount != "" {
		w.Identity = mesh.Identity{TrustDomain: x.c.TrustDomain, Namespace: e.Namespace, ServiceAccount: e.serviceAccount}
	}
	for _, h := range hosts {
		w.Services[h.service.Name] = h.portsOnEntry(e.ports)
	}
	setTunnel(w, e.redirected, e.tunnel)
	return w
}

// peerAuthLevels finds the PeerAuthentications without selector that hold for a namespace.
func (x *Index) peerAuthLevels(ns string) (meshWide, namespace *peerAuthFact) {
	for _, p := range x.peerAuths[x.c.RootNamespace] {
		if len(p.selector) == 0 && p.older(meshWide) {
			meshWide = p
		}
	}
	if ns == x.c.RootNamespace {
		return meshWide, nil
	}
	for _, p := range x.peerAuths[ns] {
		if len(p.selector) == 0 && p.older(namespace) {
			namespace = p
		}
	}
	return meshWide, namespace
}

// policy compiles what has the name now, nil for nothing.
func (x *Index) policy(name mesh.PolicyName) *mesh.Policy {
	if name == x.c.strictName() {
		if len(x.peerAuths) == 0 {
			return nil
		}
		return x.c.staticStrict()
	}
	if source, ok := strings.CutPrefix(name.Name, peerPolicyPrefix); ok {
		p := x.peerAuths[name.Namespace][source]
		if p == nil || name.Namespace == x.c.RootNamespace || len(p.selector) == 0 {
			return nil
		}
		return p.portPolicy(x.peerAuthLevels(name.Namespace))
	}
	if f := x.authz[name.Namespace][name.Name]; f != nil && !f.Inert {
		return f.Policy
	}
	return nil
}
