package index

import (
	"cmp"
	"slices"
	"strings"

	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/waypoint"
)

// envoyFilterFact is an EnvoyFilter.
type envoyFilterFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	policy.CompiledPatches
}

func envoyFilterFactOf(f *networkingv1alpha3.EnvoyFilter) *envoyFilterFact {
	return &envoyFilterFact{keyOf(f), string(f.UID), f.Generation, f.CreationTimestamp, policy.CompileEnvoyFilter(f, waypoint.CheckPatch)}
}

func (x *Index) setEnvoyFilter(k key, f *envoyFilterFact) {
	old := put(x.envoyFilters, k, f)
	for _, e := range []*envoyFilterFact{old, f} {
		if e == nil {
			continue
		}
		x.touchTargets(k.Namespace, e.Targets)
	}
	x.dirtyStates[PolicyKey{EnvoyFilter, k.Namespace, k.Name}] = struct{}{}
}

// touchEnvoyFilters marks the EnvoyFilters of a namespace, of which it may have changed where they hold.
func (x *Index) touchEnvoyFilters(ns string) {
	for name := range x.envoyFilters[ns] {
		x.dirtyStates[PolicyKey{EnvoyFilter, ns, name}] = struct{}{}
	}
}

// patchesFrom are the patches of EnvoyFilters for a proxy of a namespace, in Istio's order: by priority, those of the root
// namespace before the proxy's own, the older ones first.
func (x *Index) patchesFrom(proxy string, is func(*envoyFilterFact) []mesh.Patch) (out []mesh.Patch) {
	var all []*envoyFilterFact
	for _, ns := range namespacesOf(proxy, x.c.RootNamespace) {
		for _, f := range x.envoyFilters[ns] {
			if len(is(f)) > 0 {
				all = append(all, f)
			}
		}
	}
	root := func(f *envoyFilterFact) int {
		if f.Namespace == x.c.RootNamespace {
			return 0
		}
		return 1
	}
	slices.SortFunc(all, func(a, b *envoyFilterFact) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), cmp.Compare(root(a), root(b)), a.created.Compare(b.created.Time), compareKeys(a.key, b.key))
	})
	for _, f := range all {
		out = append(out, is(f)...)
	}
	return out
}

// patchesOf are those that the waypoint of a service makes about it.
func (x *Index) patchesOf(s *serviceFact) []mesh.Patch {
	if x.waypointFor(s) == nil {
		return nil
	}
	return x.patchesFrom(x.waypointAsked(s).Namespace, func(f *envoyFilterFact) []mesh.Patch {
		if !x.anyTargets(f.Namespace, f.Targets, s) {
			return nil
		}
		return f.Waypoints
	})
}

// gatewayPatches are those of a gateway in a namespace: that are for it by a target, and by the labels of its pods.
func (x *Index) gatewayPatches(namespace string, pods []map[string]string, is func(ns string, t policy.Target) bool) []mesh.Patch {
	return x.patchesFrom(namespace, func(f *envoyFilterFact) []mesh.Patch {
		if x.extendsGateway(f.extension(), namespace, pods, is) {
			return f.Gateways
		}
		return nil
	})
}

func (f *envoyFilterFact) extension() extension {
	return extension{
		key: f.key, kind: "EnvoyFilters", targets: f.Targets, selector: f.Selector, waypoints: len(f.Waypoints) > 0, gateways: len(f.Gateways) > 0,
		nothing: "there is no patch for waypoints or gateways", asks: "the contexts of its patches",
	}
}

func (x *Index) envoyFilterState(f *envoyFilterFact) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Exact: true, Patches: f.Key()}
	if len(f.Problems) > 0 {
		s.lacks(policy.ReasonUnsupported, "nothing of it is made, because of %s", strings.Join(f.Problems[:min(len(f.Problems), 5)], "; "))
		return s
	}
	x.place(s, f.extension())
	if len(f.Notes) > 0 {
		s.Message = strings.TrimPrefix(s.Message+"; "+strings.Join(f.Notes[:min(len(f.Notes), 5)], "; "), "; ")
	}
	return s
}
