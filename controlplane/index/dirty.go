package index

import (
	"net/netip"

	"github.com/warrenmesh/warren/internal/mesh"
)

// The setters replace one fact and mark what is derived from it. Each marks what depended on the old fact as
// well as what depends on the new one.

func put[F any](m map[string]map[string]*F, k key, f *F) (old *F) {
	inner := m[k.Namespace]
	old = inner[k.Name]
	switch {
	case f != nil:
		if inner == nil {
			inner = map[string]*F{}
			m[k.Namespace] = inner
		}
		inner[k.Name] = f
	case old != nil:
		delete(inner, k.Name)
		if len(inner) == 0 {
			delete(m, k.Namespace)
		}
	}
	return old
}

func link[K, V comparable](m map[K]map[V]struct{}, from K, to V) {
	if m[from] == nil {
		m[from] = map[V]struct{}{}
	}
	m[from][to] = struct{}{}
}

func unlink[K, V comparable](m map[K]map[V]struct{}, from K, to V) {
	delete(m[from], to)
	if len(m[from]) == 0 {
		delete(m, from)
	}
}

func (x *Index) touch(kind Kind, k key) { x.dirtySources[source{kind, k}] = struct{}{} }

func (x *Index) setPod(k key, f *podFact) {
	old := put(x.pods, k, f)
	if old != nil {
		unlink(x.podsByNode, old.node, k)
		for _, a := range old.claims() {
			unlink(x.podsByAddr, a, k)
			x.touchClaimants(a)
		}
	}
	if f != nil {
		if f.node != "" {
			link(x.podsByNode, f.node, k)
		}
		for _, a := range f.claims() {
			link(x.podsByAddr, a, k)
			x.touchClaimants(a)
		}
	}
	if old != nil || f != nil {
		x.touch(Pod, k)
	}
	x.touchServing(old, f)
	x.countLabelled(k.Namespace, old, f)
}

// countLabelled keeps count of a namespace's pods that are enrolled by their own label: others like them may come.
func (x *Index) countLabelled(ns string, old, f *podFact) {
	before := x.labelled[ns]
	if old != nil && old.ownLabel() {
		x.labelled[ns]--
	}
	if f != nil && f.ownLabel() {
		x.labelled[ns]++
	}
	if (before > 0) != (x.labelled[ns] > 0) {
		x.dirtyNamespaces[ns] = struct{}{}
	}
	if x.labelled[ns] == 0 {
		delete(x.labelled, ns)
	}
}

func (x *Index) touchClaimants(a netip.Addr) {
	x.dirtyAPIServer = x.dirtyAPIServer || x.inside[a] > 0
	for k := range x.podsByAddr[a] {
		x.touch(Pod, k)
	}
}

func (x *Index) setNamespace(name string, f *namespaceFact) {
	old := x.namespaces[name]
	if sameNamespace(old, f) {
		return
	}
	if f == nil {
		delete(x.namespaces, name)
	} else {
		x.namespaces[name] = f
	}
	x.dirtyNamespaces[name] = struct{}{}
	x.touchRoutesFrom(name)
	x.touchSetsFrom(name)
	for pod := range x.pods[name] {
		x.touch(Pod, key{name, pod})
	}
	for entry := range x.endpoints[name] {
		x.touch(WorkloadEntry, key{name, entry})
	}
	for _, s := range x.services[name] {
		x.dirtyHosts[s.service.Name] = struct{}{}
	}
	for _, e := range x.entries[name] {
		for _, h := range e.hosts {
			x.dirtyHosts[h.service.Name] = struct{}{}
		}
	}
}

func (x *Index) setService(k key, f *serviceFact) {
	x.touchTargeting(k.Namespace)
	if old := put(x.services, k, f); old != nil {
		x.unclaim(old)
	}
	if f != nil {
		x.claim(f)
	}
}

// claim registers who wants a host, and marks the host and what backs it.
func (x *Index) claim(f *serviceFact) {
	name := f.service.Name
	if x.candidates[name] == nil {
		x.candidates[name] = map[owner]*serviceFact{}
	}
	x.candidates[name][f.owner] = f
	x.dirtyHosts[name] = struct{}{}
	x.touchBackends(f)
}

func (x *Index) unclaim(f *serviceFact) {
	name := f.service.Name
	if x.candidates[name][f.owner] == f {
		delete(x.candidates[name], f.owner)
		if len(x.candidates[name]) == 0 {
			delete(x.candidates, name)
		}
	}
	x.dirtyHosts[name] = struct{}{}
	x.touchBackends(f)
}

// touchBackends marks every object that is, or was, an endpoint of the service.
func (x *Index) touchBackends(f *serviceFact) {
	ns := f.owner.Namespace
	if len(f.selector) > 0 {
		for _, p := range x.pods[ns] {
			if selects(f.selector, p.labels) {
				x.touch(Pod, p.key)
			}
		}
		for _, e := range x.endpoints[ns] {
			if selects(f.selector, e.labels) {
				x.touch(WorkloadEntry, e.key)
			}
		}
	}
	if f.owner.entry {
		x.touch(ServiceEntry, f.owner.key)
		return
	}
	for s := range x.slicesOf[f.owner.key] {
		x.touchSlice(x.slices[s])
	}
}

func (x *Index) touchSlice(f *sliceFact) {
	x.touch(EndpointSlice, f.key)
	for _, p := range f.pods {
		x.touch(Pod, p)
	}
}

func (x *Index) setSlice(k key, f *sliceFact) {
	if k.Namespace == apiServerService.Namespace {
		x.dirtyAPIServer = true
	}
	if old := x.slices[k]; old != nil {
		x.touchSlice(old)
		unlink(x.slicesOf, key{k.Namespace, old.service}, k)
		for _, p := range old.pods {
			unlink(x.slicesFor, p, k)
		}
		delete(x.slices, k)
	}
	if f == nil {
		return
	}
	x.slices[k] = f
	link(x.slicesOf, key{k.Namespace, f.service}, k)
	for _, p := range f.pods {
		link(x.slicesFor, p, k)
	}
	x.touchSlice(f)
}

func (x *Index) setEntry(k key, f *entryFact) {
	x.touchTargeting(k.Namespace)
	if old := put(x.entries, k, f); old != nil {
		for _, h := range old.hosts {
			x.unclaim(h)
		}
		x.touch(ServiceEntry, k)
	}
	if f != nil {
		for _, h := range f.hosts {
			x.claim(h)
		}
		x.touch(ServiceEntry, k)
	}
	for r := range x.routesOf[ref{ServiceEntry, k}] {
		x.dirtyGatewayRoutes[r] = struct{}{}
	}
}

func (x *Index) setEndpoint(k key, f *endpointFact) {
	if old := put(x.endpoints, k, f); old != nil || f != nil {
		x.touch(WorkloadEntry, k)
	}
}

func (x *Index) touchSelected(ns string, selector map[string]string) {
	for _, p := range x.pods[ns] {
		if selects(selector, p.labels) {
			x.touch(Pod, p.key)
		}
	}
	for _, e := range x.endpoints[ns] {
		if selects(selector, e.labels) {
			x.touch(WorkloadEntry, e.key)
		}
	}
}

func (x *Index) setPeerAuth(k key, f *peerAuthFact) {
	old := put(x.peerAuths, k, f)
	if old == nil && f == nil {
		return
	}
	x.dirtyPolicies[x.c.strictName()] = struct{}{}
	x.dirtyPolicies[mesh.PolicyName{Namespace: k.Namespace, Name: peerPolicyPrefix + k.Name}] = struct{}{}
	x.dirtyStates[PolicyKey{PeerAuthentication, k.Namespace, k.Name}] = struct{}{}
	if k.Namespace != x.c.RootNamespace {
		x.touchNamespace(k.Namespace)
		return
	}
	for ns := range x.peerAuths {
		x.touchNamespace(ns)
	}
	for ns := range x.pods {
		x.touchNamespace(ns)
	}
	for ns := range x.endpoints {
		x.touchNamespace(ns)
	}
	x.touchNamespace(k.Namespace)
}

// touchNamespace marks what PeerAuthentications of a namespace decide about.
func (x *Index) touchNamespace(ns string) {
	for _, p := range x.pods[ns] {
		x.touch(Pod, p.key)
	}
	for _, e := range x.endpoints[ns] {
		x.touch(WorkloadEntry, e.key)
	}
	for name := range x.peerAuths[ns] {
		x.dirtyPolicies[mesh.PolicyName{Namespace: ns, Name: peerPolicyPrefix + name}] = struct{}{}
		x.dirtyStates[PolicyKey{PeerAuthentication, ns, name}] = struct{}{}
	}
}
