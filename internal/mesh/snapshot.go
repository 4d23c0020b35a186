package mesh

import (
	"cmp"
	"iter"
	"net/netip"
	"reflect"
	"slices"
	"strings"
)

// Config is what holds for the whole mesh.
type Config struct {
	TrustDomain        string
	TrustDomainAliases []string // peers of these are accepted too
	Cluster            string
	ClusterDomain      string
	Network            string
	RootNamespace      string
	ControlRevision    string // istio.io/rev of the control plane
	SameNode           SameNode
	UDPNamespaces      []string // whose pods have policies applied to UDP, sorted
	RegistryOnly       bool     // captured pods reach nothing that the mesh does not know (outboundTrafficPolicy)

	Locality *LocalityLB // of services of which neither a DestinationRule nor the Service says anything; for waypoints and gateways alone
}

// SameNode says how captured pods of one node may reach each other. It is part of the wire contract; an agent
// that knows only the tunnel uses the tunnel, whatever it says, which is never less than was asked for.
type SameNode uint8

const (
	SameNodeAuto    SameNode = iota // kernel where the server is PERMISSIVE, encrypt where it is STRICT
	SameNodeKernel                  // identity asserted by the kernel, plaintext in its memory
	SameNodeEncrypt                 // the tunnel, as between nodes
)

// Snapshot is the state of the mesh at one revision. It is immutable and safe for concurrent use; revisions
// share what did not change between them. A Builder makes one.
//
// Revision 0 is the state before anything is known: Resolve refuses and Authorize denies.
type Snapshot struct {
	rev    uint64
	config Config

	workloads pmap[string, *member]
	services  pmap[ServiceName, *Service]
	policies  pmap[PolicyName, *Policy]
	ingresses pmap[ServiceName, *Ingress]

	// Indexes. Each is a function of the first three maps above, but for workloads that share an address, see
	// Builder.PutWorkload.
	addrs     pmap[NetAddr, *addrMembers]
	hosts     pmap[NetAddr, *addrMembers] // of the workloads on a host's network
	vips      pmap[NetAddr, *vipServices]
	nets      []netService // by prefix length, longest first
	endpoints pmap[ServiceName, *endpointSet]
	byScope   pmap[string, *policyList] // by namespace; "" for the mesh-wide ones
	byNode    pmap[string, *nodeMembers]
}

// member is a Workload with what is computed from it once instead of per connection.
type member struct {
	*Workload
	want []string // the identity, as Route.Want has it
}

// addrMembers are the workloads at one address, the one that answers for it first.
type addrMembers struct{ list []*member }

// vipServices are the services at one virtual address, the canonical ones first, then by name.
type vipServices struct{ list []*Service }

type netService struct {
	NetPrefix
	service *Service
}

// endpointSet holds the endpoints of one service, by UID.
type endpointSet struct{ list []endpoint }

type endpoint struct {
	*member
	ports []ServicePort
}

type policyList struct{ list []*Policy } // by name

type nodeMembers struct{ list []*member } // by UID

var empty = &Snapshot{}

// Revision is the number given to Builder.Commit.
func (s *Snapshot) Revision() uint64 { return s.rev }

// Config returns the mesh-wide settings.
func (s *Snapshot) Config() Config { return s.config }

// Workload returns the workload of that UID, or nil.
func (s *Snapshot) Workload(uid string) *Workload {
	if m, ok := s.workloads.get(uid); ok {
		return m.Workload
	}
	return nil
}

// WorkloadAt returns the workload that answers for an address, or nil. Host-network workloads share their
// node's address and are never found by it. Of several (endpoints written in ServiceEntries may repeat an
// address) a pod comes first, then the lowest UID.
func (s *Snapshot) WorkloadAt(a NetAddr) *Workload {
	if m := s.memberAt(a); m != nil {
		return m.Workload
	}
	return nil
}

func (s *Snapshot) memberAt(a NetAddr) *member {
	if at, ok := s.addrs.get(a); ok {
		return at.list[0]
	}
	return nil
}

// Service returns the service of that name, or nil.
func (s *Snapshot) Service(n ServiceName) *Service {
	svc, _ := s.services.get(n)
	return svc
}

// ServiceAt returns the service that owns a virtual address, or nil; prefixes count, the longest first.
// Of several services at one address a canonical one comes first, then the lowest name.
// [Snapshot.Resolve] prefers one of the client's namespace besides.
func (s *Snapshot) ServiceAt(a NetAddr) *Service {
	if at, ok := s.vips.get(a); ok {
		return at.list[0]
	}
	return s.serviceByPrefix(a, "")
}

// serviceFor is ServiceAt as a client in a namespace sees it, exact addresses only.
func (s *Snapshot) serviceFor(a NetAddr, namespace string) *Service {
	at, ok := s.vips.get(a)
	if !ok {
		return nil
	}
	return Meant(at.list, namespace)
}

// serviceByPrefix returns the service with the longest prefix around a. With a namespace it leaves out those
// that are not visible there and prefers, at the same length, the namespace's own.
func (s *Snapshot) serviceByPrefix(a NetAddr, namespace string) *Service {
	var best *Service
	bits := -1
	for i := range s.nets {
		n := &s.nets[i]
		if n.Prefix.Bits() < bits {
			break
		}
		if n.Network != a.Network || !n.Prefix.Contains(a.Addr) {
			continue
		}
		own := n.service.Name.Namespace == namespace
		if namespace != "" && !n.service.Visible(namespace) {
			continue
		}
		if best == nil || own {
			best, bits = n.service, n.Prefix.Bits()
			if own || namespace == "" {
				break
			}
		}
	}
	return best
}

// Policy returns the policy of that name, or nil.
func (s *Snapshot) Policy(n PolicyName) *Policy {
	p, _ := s.policies.get(n)
	return p
}

// Workloads yields every workload, in no particular order.
func (s *Snapshot) Workloads() iter.Seq[*Workload] {
	return func(yield func(*Workload) bool) {
		for _, m := range s.workloads.all() {
			if !yield(m.Workload) {
				return
			}
		}
	}
}

// WorkloadsOn yields the workloads of a node, by UID.
func (s *Snapshot) WorkloadsOn(node string) iter.Seq[*Workload] {
	return func(yield func(*Workload) bool) {
		on, ok := s.byNode.get(node)
		if !ok {
			return
		}
		for _, m := range on.list {
			if !yield(m.Workload) {
				return
			}
		}
	}
}

// Services yields every service, in no particular order.
func (s *Snapshot) Services() iter.Seq[*Service] { return values(s.services) }

// Policies yields every policy, in no particular order.
func (s *Snapshot) Policies() iter.Seq[*Policy] { return values(s.policies) }

// PoliciesOf yields the policies that apply to a workload: mesh-wide, of its namespace, then those bound to
// it, each group by name. missing reports a policy that the workload names and that is not there: it denies.
func (s *Snapshot) PoliciesOf(w *Workload) (_ iter.Seq[*Policy], missing *PolicyName) {
	for i, n := range w.Policies {
		if s.Policy(n) == nil {
			missing = &w.Policies[i]
			break
		}
	}
	return func(yield func(*Policy) bool) {
		for _, scope := range [2]string{"", w.Namespace} {
			if l, ok := s.byScope.get(scope); ok {
				for _, p := range l.list {
					if !yield(p) {
						return
					}
				}
			}
		}
		for _, n := range w.Policies {
			if p := s.Policy(n); p != nil && p.Scope == ScopeWorkload && !yield(p) {
				return
			}
		}
		for _, n := range w.Audits {
			if p := s.Policy(n); p != nil && p.Scope == ScopeWorkload && p.Action == Audit && !yield(p) {
				return
			}
		}
	}, missing
}

// Endpoints yields the workloads behind a service with the ports as each serves them, by UID, healthy or not.
func (s *Snapshot) Endpoints(n ServiceName) iter.Seq2[*Workload, []ServicePort] {
	return func(yield func(*Workload, []ServicePort) bool) {
		set, ok := s.endpoints.get(n)
		if !ok {
			return
		}
		for i := range set.list {
			if !yield(set.list[i].Workload, set.list[i].ports) {
				return
			}
		}
	}
}

// SameEndpoints reports whether the endpoints of a service are what they were in old. It costs nothing, and may say false
// of endpoints that are the same.
func (s *Snapshot) SameEndpoints(old *Snapshot, n ServiceName) bool {
	if old == nil {
		return false
	}
	now, _ := s.endpoints.get(n)
	was, _ := old.endpoints.get(n)
	return now == was
}

// Len returns how many workloads, services and policies there are.
func (s *Snapshot) Len() (workloads, services, policies int) {
	return s.workloads.len, s.services.len, s.policies.len
}

// Change is one object before and after; Old is nil where it is new, New where it is gone.
type Change[T any] struct{ Old, New *T }

// Changes yields what differs between old and s, workloads, services and policies apart. It costs what
// changed, not what there is. old may be nil.
func (s *Snapshot) Changes(old *Snapshot) (iter.Seq[Change[Workload]], iter.Seq[Change[Service]], iter.Seq[Change[Policy]]) {
	if old == nil {
		old = empty
	}
	workloads := func(yield func(Change[Workload]) bool) {
		for _, d := range diff(old.workloads, s.workloads) {
			var c Change[Workload]
			if d[0] != nil {
				c.Old = d[0].Workload
			}
			if d[1] != nil {
				c.New = d[1].Workload
			}
			if !yield(c) {
				return
			}
		}
	}
	return workloads, changes(old.services, s.services), changes(old.policies, s.policies)
}

func changes[K comparable, T any](old, now pmap[K, *T]) iter.Seq[Change[T]] {
	return func(yield func(Change[T]) bool) {
		for _, d := range diff(old, now) {
			if !yield(Change[T]{d[0], d[1]}) {
				return
			}
		}
	}
}

func values[K comparable, V any](m pmap[K, V]) iter.Seq[V] {
	return func(yield func(V) bool) {
		for _, v := range m.all() {
			if !yield(v) {
				return
			}
		}
	}
}

// Compare orders by namespace, then hostname.
func (n ServiceName) Compare(o ServiceName) int {
	return cmp.Or(strings.Compare(n.Namespace, o.Namespace), strings.Compare(n.Hostname, o.Hostname))
}

// Compare orders by namespace, then name.
func (n PolicyName) Compare(o PolicyName) int {
	return cmp.Or(strings.Compare(n.Namespace, o.Namespace), strings.Compare(n.Name, o.Name))
}

// TrustDomains returns the domain of the mesh and its aliases.
func (c Config) TrustDomains() []string {
	return append([]string{c.TrustDomain}, c.TrustDomainAliases...)
}

// Equal reports whether two configurations are the same.
func (c Config) Equal(o Config) bool {
	return slices.Equal(c.TrustDomainAliases, o.TrustDomainAliases) && c.TrustDomain == o.TrustDomain && c.Cluster == o.Cluster && c.ClusterDomain == o.ClusterDomain &&
		c.Network == o.Network && c.RootNamespace == o.RootNamespace && c.ControlRevision == o.ControlRevision &&
		c.SameNode == o.SameNode && slices.Equal(c.UDPNamespaces, o.UDPNamespaces) && c.RegistryOnly == o.RegistryOnly &&
		reflect.DeepEqual(c.Locality, o.Locality)
}

// FiltersUDP reports whether policies apply to the UDP that arrives at a namespace's pods.
func (c Config) FiltersUDP(namespace string) bool {
	_, found := slices.BinarySearch(c.UDPNamespaces, namespace)
	return found
}

// has reports whether the workload has the address.
func (w *Workload) has(a netip.Addr) bool { return slices.Contains(w.Addrs, a) }
