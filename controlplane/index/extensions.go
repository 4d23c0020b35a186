package index

import (
	"slices"
	"strings"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

const (
	// ReasonForeignProxy says of an EnvoyFilter or a WasmPlugin that it is for a Service whose waypoint is another namespace's:
	// what it brings runs there, beside what is that namespace's, under the identity that is that waypoint's.
	ReasonForeignProxy = "ForeignProxy"
	// ReasonNoPatches says of an EnvoyFilter or a WasmPlugin that it changes nothing of waypoints or gateways.
	ReasonNoPatches = "NoPatches"
)

// extension is what is the same about EnvoyFilters and WasmPlugins: where they run is in proxies of their own namespace and,
// from the root namespace, in all.
type extension struct {
	key
	kind     string // of several
	targets  []policy.Target
	selector map[string]string // of gateways' pods, where there are no targets

	waypoints, gateways bool   // there is something for them
	nothing             string // what is said where there is nothing
	asks                string // what may be for others than those that are there
}

func (e extension) untargeted() untargeted { return untargeted{e.Namespace, e.selector} }

// extendsGateway reports whether an extension is for a gateway in a namespace, by a target or by the labels of its pods.
func (x *Index) extendsGateway(e extension, namespace string, pods []map[string]string, is func(ns string, t policy.Target) bool) bool {
	if len(e.targets) == 0 {
		return x.bound(e.untargeted(), namespace, pods)
	}
	return slices.ContainsFunc(e.targets, func(t policy.Target) bool { return is(e.Namespace, t) })
}

// extended are the proxies that an extension is for; foreign are Services whose waypoint is another namespace's.
func (x *Index) extended(e extension) (proxies []mesh.ServiceName, without, foreign []string) {
	add := func(n mesh.ServiceName) {
		if !slices.Contains(proxies, n) {
			proxies = append(proxies, n)
		}
	}
	for _, s := range x.winners {
		if !x.anyTargets(e.Namespace, e.targets, s) {
			continue
		}
		switch w := x.waypointFor(s); {
		case w == nil:
			without = append(without, s.service.Name.Hostname)
		case e.Namespace != x.c.RootNamespace && e.Namespace != x.waypointAsked(s).Namespace:
			foreign = append(foreign, s.service.Name.Hostname)
		case e.waypoints:
			add(w.Service)
		}
	}
	if e.gateways {
		gateways := x.ingressTargets(e.Namespace, e.targets)
		if len(e.targets) == 0 {
			gateways = x.boundGateways(e.untargeted())
		}
		for _, n := range gateways {
			add(n)
		}
	}
	slices.SortFunc(proxies, mesh.ServiceName.Compare)
	slices.Sort(without)
	slices.Sort(foreign)
	return proxies, without, foreign
}

// place says where an extension runs, and where not.
func (x *Index) place(s *PolicyState, e extension) {
	if missing := x.missingTargets(e.Namespace, e.targets); len(missing) > 0 {
		s.lacks(ReasonTargetNotFound, "in namespace %s there is no %s", e.Namespace, strings.Join(missing, ", no "))
	}
	proxies, without, foreign := x.extended(e)
	if len(without) > 0 {
		s.lacks(policy.ReasonNoWaypoint, "no waypoint is in front of %s", strings.Join(without, ", "))
	}
	if len(foreign) > 0 {
		s.lacks(ReasonForeignProxy, "the waypoint of %s is another namespace's, and changed by %s of that namespace and of %s alone", strings.Join(foreign, ", "), e.kind, x.c.RootNamespace)
	}
	switch {
	case len(proxies) > 0:
		s.Waypoints = proxies
	case !s.Exact:
	case !e.gateways && !e.waypoints:
		s.lacks(ReasonNoPatches, "%s", e.nothing)
	case len(e.targets) > 0 && x.waypointsAlone(e.Namespace, e.targets) && e.waypoints:
		s.Message = "no Service asks for this waypoint"
	case len(e.targets) == 0:
		s.lacks(ReasonNoProxy, "it is for gateways by the labels of their pods, and for none that is there; for a waypoint write targetRefs")
	default:
		s.lacks(ReasonNoProxy, "it is for waypoints and gateways, and for none that is there with %s", e.asks)
	}
}
