package mesh

import (
	"cmp"
	"maps"
	"slices"
	"strings"
)

// Builder makes the next Snapshot out of a base and changes to it. It is for one goroutine.
//
// What is put belongs to the Builder from then on: the caller must not change it. Putting what is already
// there unchanged is no change, and the object keeps its revision.
type Builder struct {
	next    Snapshot
	ed      *edit
	changed bool

	// What changed since the last Commit, to be stamped and indexed by it.
	workloads map[string]struct{}
	services  map[ServiceName]struct{}
	policies  map[PolicyName]struct{}
	ingresses map[ServiceName]struct{}
	nets      bool

	// Endpoint sets, node lists and policy lists that are being edited. A nil value is a removal.
	endpoints map[ServiceName]map[string]*endpoint
	nodes     map[string]map[string]*member
	scopes    map[string]map[PolicyName]*Policy
}

// NewBuilder starts from base; nil is the empty Snapshot.
func NewBuilder(base *Snapshot) *Builder {
	b := &Builder{}
	if base != nil {
		b.next = *base
	}
	b.reset()
	return b
}

func (b *Builder) reset() {
	b.ed = new(edit)
	b.changed, b.nets = false, false
	b.workloads = make(map[string]struct{})
	b.services = make(map[ServiceName]struct{})
	b.policies = make(map[PolicyName]struct{})
	b.ingresses = make(map[ServiceName]struct{})
	b.endpoints = make(map[ServiceName]map[string]*endpoint)
	b.nodes = make(map[string]map[string]*member)
	b.scopes = make(map[string]map[PolicyName]*Policy)
}

// Workload returns the workload as it is now in the making, or nil.
func (b *Builder) Workload(uid string) *Workload { return b.next.Workload(uid) }

// WorkloadAt is Snapshot.WorkloadAt on what is in the making.
func (b *Builder) WorkloadAt(a NetAddr) *Workload { return b.next.WorkloadAt(a) }

// Service returns the service as it is now in the making, or nil.
func (b *Builder) Service(n ServiceName) *Service { return b.next.Service(n) }

// Policy returns the policy as it is now in the making, or nil.
func (b *Builder) Policy(n PolicyName) *Policy { return b.next.Policy(n) }

// Changed reports whether a Commit would differ from the base.
func (b *Builder) Changed() bool { return b.changed }

// SetConfig sets the mesh-wide settings.
func (b *Builder) SetConfig(c Config) {
	if !b.next.config.Equal(c) {
		b.next.config = c
		b.changed = true
	}
}

// PutWorkload adds or replaces a workload.
//
// An address belongs to one pod at a time: a pod (a workload with a node, not on the host network) that comes
// with an address of another drops that other altogether, because its address was given away and it can only
// be gone. Other workloads may share an address, with each other and with a pod.
func (b *Builder) PutWorkload(w *Workload) {
	if old, ok := b.next.workloads.get(w.UID); ok {
		if old.Equal(w) {
			return
		}
		b.unindexWorkload(old)
	}
	if w.pod() {
		for _, a := range w.Addrs {
			for _, other := range membersAt(b.next.addrs, NetAddr{w.Network, a}) {
				if other.pod() && other.UID != w.UID {
					b.DeleteWorkload(other.UID)
				}
			}
		}
	}
	m := &member{Workload: w}
	if id := w.Identity.String(); id != "" {
		m.want = []string{id}
	}
	b.next.workloads.set(b.ed, w.UID, m)
	b.workloads[w.UID] = struct{}{}
	b.indexWorkload(m)
	b.changed = true
}

// pod reports whether the workload owns its addresses.
func (w *Workload) pod() bool { return w.Node != "" && !w.HostNetwork }

// DeleteWorkload removes a workload; a missing one is fine.
func (b *Builder) DeleteWorkload(uid string) {
	old, ok := b.next.workloads.get(uid)
	if !ok {
		return
	}
	b.unindexWorkload(old)
	b.next.workloads.delete(b.ed, uid)
	delete(b.workloads, uid)
	b.changed = true
}

func membersAt(addrs pmap[NetAddr, *addrMembers], a NetAddr) []*member {
	if at, ok := addrs.get(a); ok {
		return at.list
	}
	return nil
}

// addrsOf is the index that has the addresses of a workload.
func (b *Builder) addrsOf(m *member) *pmap[NetAddr, *addrMembers] {
	if m.HostNetwork {
		return &b.next.hosts
	}
	return &b.next.addrs
}

func (b *Builder) indexWorkload(m *member) {
	addrs := b.addrsOf(m)
	for _, a := range m.Addrs {
		key := NetAddr{m.Network, a}
		list := append([]*member{m}, membersAt(*addrs, key)...)
		slices.SortFunc(list, compareAt)
		addrs.set(b.ed, key, &addrMembers{slices.Compact(list)})
	}
	for name, ports := range m.Services {
		set := b.endpointsOf(name)
		set[m.UID] = &endpoint{member: m, ports: ports}
	}
	if m.Node != "" {
		b.nodeOf(m.Node)[m.UID] = m
	}
}

// compareAt orders the workloads of one address: a pod, then by UID.
func compareAt(x, y *member) int {
	if x.pod() != y.pod() {
		if x.pod() {
			return -1
		}
		return 1
	}
	return strings.Compare(x.UID, y.UID)
}

func (b *Builder) unindexWorkload(m *member) {
	addrs := b.addrsOf(m)
	for _, a := range m.Addrs {
		key := NetAddr{m.Network, a}
		list := slices.DeleteFunc(slices.Clone(membersAt(*addrs, key)), func(o *member) bool { return o.UID == m.UID })
		if len(list) == 0 {
			addrs.delete(b.ed, key)
		} else {
			addrs.set(b.ed, key, &addrMembers{list})
		}
	}
	for name := range m.Services {
		b.endpointsOf(name)[m.UID] = nil
	}
	if m.Node != "" {
		b.nodeOf(m.Node)[m.UID] = nil
	}
}

func (b *Builder) endpointsOf(n ServiceName) map[string]*endpoint { return editing(b.endpoints, n) }
func (b *Builder) nodeOf(node string) map[string]*member          { return editing(b.nodes, node) }
func (b *Builder) scopeOf(ns string) map[PolicyName]*Policy       { return editing(b.scopes, ns) }

func editing[O, K comparable, V any](all map[O]map[K]V, of O) map[K]V {
	m := all[of]
	if m == nil {
		m = make(map[K]V)
		all[of] = m
	}
	return m
}

// PutService adds or replaces a service.
func (b *Builder) PutService(s *Service) {
	if old := b.next.Service(s.Name); old != nil {
		if old.Equal(s) {
			return
		}
		b.unindexService(old)
	}
	b.next.services.set(b.ed, s.Name, s)
	b.services[s.Name] = struct{}{}
	for _, vip := range s.VIPs {
		list := []*Service{s}
		if at, ok := b.next.vips.get(vip); ok {
			list = append(list, at.list...)
		}
		slices.SortFunc(list, compareVIP)
		b.next.vips.set(b.ed, vip, &vipServices{slices.Compact(list)})
	}
	b.nets = b.nets || len(s.VIPNets) > 0
	b.changed = true
}

// compareVIP orders the services of one address: the canonical ones, then by name.
func compareVIP(x, y *Service) int {
	if x.Canonical != y.Canonical {
		if x.Canonical {
			return -1
		}
		return 1
	}
	return x.Name.Compare(y.Name)
}

// DeleteService removes a service; a missing one is fine. Its endpoints stay workloads.
func (b *Builder) DeleteService(n ServiceName) {
	old := b.next.Service(n)
	if old == nil {
		return
	}
	b.unindexService(old)
	b.next.services.delete(b.ed, n)
	delete(b.services, n)
	b.changed = true
}

func (b *Builder) unindexService(s *Service) {
	for _, vip := range s.VIPs {
		at, ok := b.next.vips.get(vip)
		if !ok {
			continue
		}
		list := slices.DeleteFunc(slices.Clone(at.list), func(o *Service) bool { return o.Name == s.Name })
		if len(list) == 0 {
			b.next.vips.delete(b.ed, vip)
		} else {
			b.next.vips.set(b.ed, vip, &vipServices{list})
		}
	}
	b.nets = b.nets || len(s.VIPNets) > 0
}

// PutPolicy adds or replaces a policy.
func (b *Builder) PutPolicy(p *Policy) {
	if old := b.next.Policy(p.Name); old != nil {
		if old.Equal(p) {
			return
		}
		b.unindexPolicy(old)
	}
	b.next.policies.set(b.ed, p.Name, p)
	b.policies[p.Name] = struct{}{}
	if ns, ok := p.scopeKey(); ok {
		b.scopeOf(ns)[p.Name] = p
	}
	b.changed = true
}

// DeletePolicy removes a policy; a missing one is fine. A workload that still names it is denied everything.
func (b *Builder) DeletePolicy(n PolicyName) {
	old := b.next.Policy(n)
	if old == nil {
		return
	}
	b.unindexPolicy(old)
	b.next.policies.delete(b.ed, n)
	delete(b.policies, n)
	b.changed = true
}

func (b *Builder) unindexPolicy(p *Policy) {
	if ns, ok := p.scopeKey(); ok {
		b.scopeOf(ns)[p.Name] = nil
	}
}

// scopeKey is where Snapshot.byScope has the policy; false for one that binds by name.
func (p *Policy) scopeKey() (string, bool) {
	switch p.Scope {
	case ScopeMesh:
		return "", true
	case ScopeNamespace:
		return p.Name.Namespace, true
	default:
		return "", false
	}
}

// Commit returns the Snapshot as it now is, under the given revision, which it also writes into every object
// that changed. The Builder goes on from there.
func (b *Builder) Commit(rev uint64) *Snapshot {
	for uid := range b.workloads {
		m, _ := b.next.workloads.get(uid)
		m.Revision = rev
	}
	for n := range b.services {
		b.next.Service(n).Revision = rev
	}
	for n := range b.policies {
		b.next.Policy(n).Revision = rev
	}
	for n := range b.ingresses {
		b.next.Ingress(n).Revision = rev
	}
	for name, edits := range b.endpoints {
		var old []endpoint
		if set, ok := b.next.endpoints.get(name); ok {
			old = set.list
		}
		list := merge(old, edits, func(e endpoint) string { return e.UID }, func(e *endpoint) (endpoint, bool) {
			if e == nil {
				return endpoint{}, false
			}
			return *e, true
		})
		if len(list) == 0 {
			b.next.endpoints.delete(b.ed, name)
		} else {
			b.next.endpoints.set(b.ed, name, &endpointSet{list})
		}
	}
	for node, edits := range b.nodes {
		var old []*member
		if on, ok := b.next.byNode.get(node); ok {
			old = on.list
		}
		list := merge(old, edits, func(m *member) string { return m.UID }, func(m *member) (*member, bool) { return m, m != nil })
		if len(list) == 0 {
			b.next.byNode.delete(b.ed, node)
		} else {
			b.next.byNode.set(b.ed, node, &nodeMembers{list})
		}
	}
	for ns, edits := range b.scopes {
		b.commitScope(ns, edits)
	}
	if b.nets {
		b.commitNets()
	}
	b.next.rev = rev
	done := b.next
	b.reset()
	return &done
}

// merge applies edits, keyed as the list is ordered, to an ordered list and returns a new one.
func merge[T, E any](old []T, edits map[string]E, key func(T) string, value func(E) (T, bool)) []T {
	keys := slices.Sorted(maps.Keys(edits))
	list := make([]T, 0, len(old)+len(keys))
	i := 0
	for _, k := range keys {
		for i < len(old) && key(old[i]) < k {
			list = append(list, old[i])
			i++
		}
		if i < len(old) && key(old[i]) == k {
			i++
		}
		if v, ok := value(edits[k]); ok {
			list = append(list, v)
		}
	}
	return append(list, old[i:]...)
}

func (b *Builder) commitScope(ns string, edits map[PolicyName]*Policy) {
	var list []*Policy
	if l, ok := b.next.byScope.get(ns); ok {
		for _, p := range l.list {
			if _, edited := edits[p.Name]; !edited {
				list = append(list, p)
			}
		}
	}
	for _, p := range edits {
		if p != nil {
			list = append(list, p)
		}
	}
	if len(list) == 0 {
		b.next.byScope.delete(b.ed, ns)
		return
	}
	slices.SortFunc(list, func(x, y *Policy) int { return x.Name.Compare(y.Name) })
	b.next.byScope.set(b.ed, ns, &policyList{list})
}

// commitNets rebuilds the prefixes from every service: they are few and seldom change.
func (b *Builder) commitNets() {
	var nets []netService
	for _, s := range b.next.services.all() {
		for _, n := range s.VIPNets {
			nets = append(nets, netService{n, s})
		}
	}
	slices.SortFunc(nets, func(x, y netService) int {
		return cmp.Or(y.Prefix.Bits()-x.Prefix.Bits(), compareVIP(x.service, y.service))
	})
	b.next.nets = nets
}
