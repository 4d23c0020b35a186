package status

import (
	"maps"
	"slices"

	"github.com/warrenmesh/warren/internal/mesh"
)

// tally counts, for everything that policies can be about, the captured workloads on each node, and remembers
// when that or a compiled policy last changed. It follows the Snapshot by what changes in it.
type tally struct {
	snapshot    *mesh.Snapshot
	all         nodeCount
	byNamespace map[string]nodeCount
	byPolicy    map[mesh.PolicyName]nodeCount // bound by name

	// changed is the revision since which a policy is as it is, with what it is bound to.
	changed map[mesh.PolicyName]uint64
}

// nodeCount is how many workloads there are on each node.
type nodeCount map[string]int

func (c nodeCount) add(node string, n int) (came, went bool) {
	before := c[node]
	c[node] += n
	if c[node] <= 0 {
		delete(c, node)
	}
	return before == 0 && n > 0, before > 0 && c[node] == 0
}

func newTally() *tally {
	return &tally{all: nodeCount{}, byNamespace: map[string]nodeCount{}, byPolicy: map[mesh.PolicyName]nodeCount{},
		changed: map[mesh.PolicyName]uint64{}}
}

// moved is what take found changed.
type moved struct {
	mesh       bool                         // nodes came to the mesh or left it
	namespaces map[string]struct{}          // the same for a namespace
	policies   map[mesh.PolicyName]struct{} // compiled anew, or bound to other workloads
}

// take brings the tally to a Snapshot that is served as of a revision.
func (t *tally) take(s *mesh.Snapshot, revision uint64) moved {
	m := moved{namespaces: map[string]struct{}{}, policies: map[mesh.PolicyName]struct{}{}}
	workloads, _, policies := s.Changes(t.snapshot)
	t.snapshot = s
	touch := func(n mesh.PolicyName) {
		t.changed[n] = revision
		m.policies[n] = struct{}{}
	}
	for c := range policies {
		if c.New == nil {
			delete(t.changed, c.Old.Name)
			m.policies[c.Old.Name] = struct{}{}
			continue
		}
		touch(c.New.Name)
	}
	for c := range workloads {
		was, is := bound(c.Old), bound(c.New)
		if c.Old != nil && c.New != nil && counted(c.Old) && counted(c.New) {
			for _, n := range was {
				if !slices.Contains(is, n) {
					touch(n)
				}
			}
			for _, n := range is {
				if !slices.Contains(was, n) {
					touch(n)
				}
			}
		}
		t.count(c.Old, was, -1, &m)
		t.count(c.New, is, 1, &m)
	}
	return m
}

// counted says which workloads nodes enforce policies for. What is not captured is nobody's to protect; what ends
// the tunnel itself enforces for itself.
func counted(w *mesh.Workload) bool {
	return w != nil && w.Node != "" && w.Tunnel == mesh.TunnelHBONE && !w.NativeTunnel && !w.HostNetwork
}

func bound(w *mesh.Workload) []mesh.PolicyName {
	if w == nil {
		return nil
	}
	return slices.Concat(w.Policies, w.Audits)
}

func (t *tally) count(w *mesh.Workload, names []mesh.PolicyName, n int, m *moved) {
	if !counted(w) {
		return
	}
	if came, went := t.all.add(w.Node, n); came || went {
		m.mesh = true
	}
	if came, went := into(t.byNamespace, w.Namespace).add(w.Node, n); came || went {
		m.namespaces[w.Namespace] = struct{}{}
	}
	if len(t.byNamespace[w.Namespace]) == 0 {
		delete(t.byNamespace, w.Namespace)
	}
	for _, name := range names {
		if came, went := into(t.byPolicy, name).add(w.Node, n); came || went {
			m.policies[name] = struct{}{}
		}
		if len(t.byPolicy[name]) == 0 {
			delete(t.byPolicy, name)
		}
	}
}

func into[K comparable](m map[K]nodeCount, k K) nodeCount {
	c := m[k]
	if c == nil {
		c = nodeCount{}
		m[k] = c
	}
	return c
}

// nodesOf are the nodes that have workloads to which a compiled policy applies.
func (t *tally) nodesOf(p *mesh.Policy) nodeCount {
	switch p.Scope {
	case mesh.ScopeMesh:
		return t.all
	case mesh.ScopeNamespace:
		return t.byNamespace[p.Name.Namespace]
	}
	return t.byPolicy[p.Name]
}

// since is the newest of the revisions since which policies are as they are.
func (t *tally) since(names []mesh.PolicyName) uint64 {
	var newest uint64
	for _, n := range names {
		newest = max(newest, t.changed[n])
	}
	return newest
}

// names lists the nodes in order.
func (c nodeCount) names() []string { return slices.Sorted(maps.Keys(c)) }
