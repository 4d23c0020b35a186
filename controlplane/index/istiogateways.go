package index

import (
	"maps"
	"slices"
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/routing"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Gateways of Istio's own API. One selects pods by their labels, in any namespace, of those that say of themselves that they are
// a gateway's. Those of one service account are one gateway, which serves what all Gateways that select any of them ask for.

// labelServing marks the pods of gateways that are not made for a Gateway of the Gateway API.
const labelServing = "warren.io/gateway"

// istioGatewayFact is such a Gateway.
type istioGatewayFact struct {
	key
	uid        string
	generation int64
	created    metav1.Time
	selector   map[string]string
	servers    []routing.Server
	problems   []routing.Problem
}

func istioGatewayFactOf(g *networkingv1.Gateway) *istioGatewayFact {
	f := &istioGatewayFact{key: keyOf(g), uid: string(g.UID), generation: g.Generation, created: g.CreationTimestamp, selector: g.Spec.Selector}
	f.servers, f.problems = routing.Gateway(g.Namespace, &g.Spec)
	return f
}

func (f *istioGatewayFact) compare(o *istioGatewayFact) int {
	if !f.created.Equal(&o.created) {
		return f.created.Compare(o.created.Time)
	}
	return compareKeys(f.key, o.key)
}

// entrance is a gateway: pods of a service account that are there for Gateways of Istio's.
type entrance struct {
	key      // namespace and service account
	name     mesh.ServiceName
	workload string
	labels   []map[string]string // of its pods
	gateways []*istioGatewayFact // that select any of them, the oldest first
}

// istioGatewayAPI is what the index has of them.
type istioGatewayAPI struct {
	istioGateways map[string]map[string]*istioGatewayFact
	dirtyEntrance bool // what gateways serve
	dirtyServing  bool // which pods are gateways, too

	// What was derived at the last Commit.
	entrances map[key]*entrance
	saidOf    map[key]struct{} // Gateways with a notice
}

func newIstioGatewayAPI() istioGatewayAPI {
	return istioGatewayAPI{istioGateways: map[string]map[string]*istioGatewayFact{}, entrances: map[key]*entrance{}, saidOf: map[key]struct{}{}}
}

func (x *Index) setIstioGateway(k key, f *istioGatewayFact) {
	old := put(x.istioGateways, k, f)
	if old == nil && f == nil || old != nil && f != nil && f.generation != 0 && old.generation == f.generation && old.uid == f.uid {
		return
	}
	x.dirtyServing = true
	for _, all := range x.virtuals {
		for _, v := range all {
			if v.at[k] != nil {
				x.dirtyRoutes[ref{VirtualService, v.key}] = struct{}{}
			}
		}
	}
}

// touchServing notes that a pod has come, gone or changed that may be a gateway's.
func (x *Index) touchServing(pods ...*podFact) {
	for _, p := range pods {
		x.dirtyServing = x.dirtyServing || p != nil && p.serves()
	}
}

// serves reports whether a pod is a gateway's for Gateways of Istio's.
func (f *podFact) serves() bool {
	return f.labels[labelServing] == "true" && f.labels[labelManaged] == "" && f.phase != podFinished
}

// findEntrances finds which pods are gateways. What is there for a Gateway of the Gateway API is that one's alone.
func (x *Index) findEntrances() map[key]*entrance {
	taken := map[mesh.ServiceName]bool{}
	for _, n := range x.ingressNames {
		taken[n] = true
	}
	out := map[key]*entrance{}
	for _, pods := range x.pods {
		for _, p := range pods {
			k := key{p.Namespace, p.serviceAccount}
			if !p.serves() || x.gateways[k.Namespace][k.Name] != nil || taken[x.c.serviceName(k)] {
				continue
			}
			e := out[k]
			if e == nil {
				e = &entrance{key: k, name: x.c.serviceName(k), workload: p.workloadName}
				out[k] = e
			}
			e.workload = min(e.workload, p.workloadName)
			if !slices.ContainsFunc(e.labels, func(l map[string]string) bool { return maps.Equal(l, p.labels) }) {
				e.labels = append(e.labels, p.labels)
			}
		}
	}
	for _, e := range out {
		for _, all := range x.istioGateways {
			for _, g := range all {
				if slices.ContainsFunc(e.labels, func(l map[string]string) bool { return selects(g.selector, l) }) {
					e.gateways = append(e.gateways, g)
				}
			}
		}
		slices.SortFunc(e.gateways, (*istioGatewayFact).compare)
	}
	return out
}

// commitEntrances writes what gateways serve that Gateways of Istio's ask of, after those of the Gateway API.
func (x *Index) commitEntrances(b *mesh.Builder, u *Update) {
	if !x.dirtyServing && !x.dirtyEntrance {
		return
	}
	if x.dirtyServing {
		next := x.findEntrances()
		taken := slices.Collect(maps.Values(x.ingressNames))
		for k, e := range x.entrances {
			if next[k] == nil && !slices.Contains(taken, e.name) {
				b.DeleteIngress(e.name)
			}
		}
		x.entrances = next
		x.touchUntargeted()
	}
	x.dirtyServing, x.dirtyEntrance = false, false
	virtuals := map[key][]*routeFact{} // by Gateway, the oldest first
	for _, all := range x.virtuals {
		for _, v := range all {
			for k := range v.at {
				virtuals[k] = append(virtuals[k], v)
			}
		}
	}
	for _, all := range virtuals {
		slices.SortFunc(all, func(a, b *routeFact) int {
			if a.older(b) {
				return -1
			}
			return 1
		})
	}
	texts := map[key][]string{}
	for _, k := range slices.SortedFunc(maps.Keys(x.entrances), compareKeys) {
		s := serving{x: x, entrance: x.entrances[k], virtuals: virtuals, texts: texts}
		b.PutIngress(s.serve())
	}
	said := map[key]struct{}{}
	for _, all := range x.istioGateways {
		for _, g := range all {
			nk := NoticeKey{Kind: IstioGateway, Namespace: g.Namespace, Name: g.Name}
			var problems []string
			for _, p := range g.problems {
				problems = append(problems, "spec."+p.String())
			}
			problems = append(problems, texts[g.key]...)
			switch {
			case len(problems) > 0:
				x.notice(u, nk, g.uid, reasonPartlyIgnored, strings.Join(slices.Compact(problems), "; "))
			case !x.entered(g):
				x.notice(u, nk, g.uid, reasonNoPods, "no pod of a gateway (label "+labelServing+": true) has the labels of its selector, so that nothing serves it; charts/gateway makes such pods")
			default:
				x.notice(u, nk, "", "", "")
				continue
			}
			said[g.key] = struct{}{}
		}
	}
	for k := range x.saidOf {
		if _, ok := said[k]; !ok {
			x.notice(u, NoticeKey{Kind: IstioGateway, Namespace: k.Namespace, Name: k.Name}, "", "", "")
		}
	}
	x.saidOf = said
}

const (
	reasonNoPods         = "NoPods"         // a Gateway selects none
	reasonUnknownGateway = "UnknownGateway" // a VirtualService leads nowhere at a Gateway
)

func (x *Index) entered(g *istioGatewayFact) bool {
	for _, e := range x.entrances {
		if slices.Contains(e.gateways, g) {
			return true
		}
	}
	return false
}

// atGateways tells what of a VirtualService leads nowhere at the Gateways that it names.
func (x *Index) atGateways(v *routeFact) (problems []string) {
	for _, k := range slices.SortedFunc(maps.Keys(v.at), compareKeys) {
		g := x.istioGateways[k.Namespace][k.Name]
		switch {
		case g == nil:
			problems = append(problems, "there is no Gateway "+k.String()+" of networking.istio.io")
		case !slices.ContainsFunc(g.servers, func(s routing.Server) bool { return len(hostsAt(&s, v)) > 0 }):
			problems = append(problems, "no server of Gateway "+k.String()+" is for any of its hosts")
		}
	}
	return problems
}

// hostsAt are the hosts of a server that a VirtualService is for.
func hostsAt(s *routing.Server, v *routeFact) (out []string) {
	for _, h := range s.Hosts {
		if h.Namespace == "" || h.Namespace == v.Namespace {
			for _, name := range intersection(h.Name, v.hostnames) {
				if !slices.Contains(out, name) {
					out = append(out, name)
				}
			}
		}
	}
	return out
}

// gatewayNamed is the Gateway that a VirtualService of a namespace names: by its name, as namespace/name, or as name.namespace.
func gatewayNamed(namespace, name string) key {
	if ns, rest, ok := strings.Cut(name, "/"); ok {
		if ns == "." {
			ns = namespace
		}
		return key{ns, rest}
	}
	if first, rest, ok := strings.Cut(name, "."); ok {
		ns, _, _ := strings.Cut(rest, ".")
		return key{ns, first}
	}
	return key{namespace, name}
}

// atGateways adds to a VirtualService what it says at Gateways.
func (f *routeFact) atGateways(v *networkingv1.VirtualService, c *compiled) {
	for _, h := range v.Spec.Hosts {
		h = strings.ToLower(strings.TrimSuffix(h, "."))
		if h != "*" && !strings.Contains(h, ".") {
			h = c.serviceName(key{v.Namespace, h}).Hostname
		}
		f.hostnames = append(f.hostnames, h)
	}
	f.exportTo = v.Spec.ExportTo
	for _, name := range v.Spec.Gateways {
		if name == routing.MeshGateway {
			continue
		}
		k := gatewayNamed(v.Namespace, name)
		here := func(list []string) bool {
			return slices.ContainsFunc(list, func(n string) bool { return n != routing.MeshGateway && gatewayNamed(v.Namespace, n) == k })
		}
		at, problems := routing.VirtualServiceAt(v.Namespace, v.Name, &v.Spec, here, c.ResolveHost)
		if f.at == nil {
			f.at = map[key]*routing.AtGateway{}
		}
		f.at[k] = at
		for _, p := range problems {
			if !slices.Contains(f.problems, p) {
				f.problems = append(f.problems, p)
			}
		}
	}
}

// visible reports whether a VirtualService is for the gateways of a namespace.
func (f *routeFact) visible(namespace string) bool {
	return len(f.exportTo) == 0 || slices.ContainsFunc(f.exportTo, func(to string) bool {
		return to == "*" || to == namespace || to == "." && f.Namespace == namespace
	})
}

// bound reports whether a policy without targets is for a gateway: as Istio has it, by the labels of the gateway's pods.
func (x *Index) bound(f *authorizationFact, e *entrance) bool {
	return len(f.Targets) == 0 && (f.Namespace == e.Namespace || f.Namespace == x.c.RootNamespace) &&
		(len(f.Selector) == 0 || slices.ContainsFunc(e.labels, func(l map[string]string) bool { return selects(f.Selector, l) }))
}

// gatewayPolicy is what gateways do about a policy without targets.
func (x *Index) gatewayPolicy(f *authorizationFact) *policy.Attached {
	if f.atGateway == nil {
		f.atGateway = x.c.PolicyMesh().AtGateway(f.object)
	}
	return f.atGateway
}

// entranceAccess are the policies of a gateway.
func (x *Index) entranceAccess(e *entrance) (access []mesh.AccessPolicy) {
	for _, ns := range namespacesOf(e.Namespace, x.c.RootNamespace) {
		for _, f := range x.authz[ns] {
			if x.bound(f, e) {
				a := x.gatewayPolicy(f)
				access = append(access, mesh.AccessPolicy{Name: f.Policy.Name, Action: a.Action, DryRun: a.DryRun, Ask: a.Ask, Rules: a.Rules})
			}
		}
	}
	slices.SortFunc(access, func(a, b mesh.AccessPolicy) int { return a.Name.Compare(b.Name) })
	return access
}

// touchUntargeted marks the policies that gateways may have come to be among the workloads of.
func (x *Index) touchUntargeted() {
	for _, all := range x.authz {
		for _, f := range all {
			if len(f.Targets) == 0 {
				x.dirtyStates[PolicyKey{AuthorizationPolicy, f.Namespace, f.Name}] = struct{}{}
			}
		}
	}
}

// atEntrances adds to the state of a policy what gateways do about it. One that selects no more than a Gateway of Istio's does is
// theirs alone.
func (x *Index) atEntrances(f *authorizationFact, s *PolicyState) {
	for _, e := range x.entrances {
		if x.bound(f, e) {
			s.Waypoints = append(s.Waypoints, e.name)
		}
	}
	if len(s.Waypoints) == 0 {
		return
	}
	slices.SortFunc(s.Waypoints, mesh.ServiceName.Compare)
	for _, all := range x.istioGateways {
		for _, g := range all {
			if selects(g.selector, f.Selector) {
				a := x.gatewayPolicy(f)
				s.Compiled, s.Exact, s.Reason, s.Message = nil, a.Message == "", a.Reason, a.Message
				if s.Exact {
					s.Message = reported(f)
				}
				return
			}
		}
	}
}
