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

// tunnels reports whether any of its pods takes the mesh's tunnel.
func (e *entrance) tunnels() bool {
	return slices.ContainsFunc(e.labels, func(l map[string]string) bool { return l[labelTunnel] == "http" })
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
func (x *Index) touchServing(old, next *podFact) {
	for _, p := range []*podFact{old, next} {
		x.dirtyServing = x.dirtyServing || p != nil && p.serves()
	}
	a, b := old.gateway(), next.gateway()
	if a == b && (a == key{} || maps.Equal(old.labels, next.labels)) {
		return
	}
	for _, k := range []key{a, b} {
		if x.ingress(k) != nil {
			x.dirtyIngress[k] = struct{}{}
			x.touchUntargeted()
		}
	}
}

// gateway is the Gateway that a pod was made for.
func (f *podFact) gateway() key {
	if f == nil || f.labels[labelManaged] == "" || f.phase == podFinished {
		return key{}
	}
	return key{f.Namespace, f.labels[policy.LabelGateway]}
}

// labelsOf are the labels of the pods that were made for a Gateway.
func (x *Index) labelsOf(f *ingressFact) (out []map[string]string) {
	for _, p := range x.pods[f.Namespace] {
		if p.gateway() == f.key && !slices.ContainsFunc(out, func(l map[string]string) bool { return maps.Equal(l, p.labels) }) {
			out = append(out, p.labels)
		}
	}
	return out
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
	return visible(f.exportTo, f.Namespace, namespace)
}

// visible reports whether an object of a namespace is for another one.
func visible(exportTo []string, from, namespace string) bool {
	in := visibleIn(exportTo, from)
	return in == nil || slices.Contains(in, namespace)
}

// untargeted is what of a policy without targets says whom it is for.
type untargeted struct {
	namespace string
	selector  map[string]string
}

// bound reports whether such a policy is for a gateway: as Istio has it, by the labels of the gateway's pods.
func (x *Index) bound(p untargeted, namespace string, pods []map[string]string) bool {
	return (p.namespace == namespace || p.namespace == x.c.RootNamespace) &&
		(len(p.selector) == 0 || slices.ContainsFunc(pods, func(l map[string]string) bool { return selects(p.selector, l) }))
}

// boundGateways are the gateways that a policy without targets is for.
func (x *Index) boundGateways(p untargeted) (out []mesh.ServiceName) {
	for _, e := range x.entrances {
		if x.bound(p, e.Namespace, e.labels) {
			out = append(out, e.name)
		}
	}
	for _, all := range x.ingresses {
		for _, f := range all {
			if x.classes[f.class] == IngressController && x.bound(p, f.Namespace, x.labelsOf(f)) {
				out = append(out, x.c.serviceName(key{f.Namespace, f.name}))
			}
		}
	}
	slices.SortFunc(out, mesh.ServiceName.Compare)
	return out
}

// gatewaysAlone reports whether a policy without targets selects no more than gateways: the pods of a Gateway, or what a Gateway of
// Istio's does.
func (x *Index) gatewaysAlone(selector map[string]string) bool {
	if policy.ForGateway(selector) {
		return true
	}
	for _, all := range x.istioGateways {
		for _, g := range all {
			if selects(g.selector, selector) {
				return true
			}
		}
	}
	return false
}

// touchGateways marks the gateways that a policy of a namespace without targets may be for.
func (x *Index) touchGateways(namespace string) {
	x.dirtyEntrance = true
	for _, all := range x.ingresses {
		for _, f := range all {
			if namespace == f.Namespace || namespace == x.c.RootNamespace {
				x.dirtyIngress[f.key] = struct{}{}
			}
		}
	}
}

// gatewayPolicy is what gateways do about a policy without targets.
func (x *Index) gatewayPolicy(f *authorizationFact) *policy.Attached {
	if f.atGateway == nil {
		f.atGateway = x.c.PolicyMesh().AtGateway(f.object)
	}
	return f.atGateway
}

// gatewayAccess are the policies of a gateway in a namespace: those that are for it by a target, and those by the labels of its pods.
func (x *Index) gatewayAccess(namespace string, pods []map[string]string, is func(ns string, targets []policy.Target) bool) (access []mesh.AccessPolicy, tokens []mesh.TokenRule) {
	var requests []*requestFact
	for _, ns := range namespacesOf(namespace, x.c.RootNamespace) {
		for _, f := range x.authz[ns] {
			var a *policy.Attached
			switch {
			case len(f.Targets) == 0 && x.bound(f.untargeted(), namespace, pods):
				a = x.gatewayPolicy(f)
			case f.Attached != nil && is(ns, f.Targets):
				a = f.Attached
			default:
				continue
			}
			access = append(access, mesh.AccessPolicy{Name: f.Policy.Name, Action: a.Action, DryRun: a.DryRun, Ask: a.Ask, Rules: a.Rules})
		}
		for _, r := range x.requests[ns] {
			if len(r.Targets) == 0 && x.bound(r.untargeted(), namespace, pods) || is(ns, r.Targets) {
				requests = append(requests, r)
			}
		}
	}
	slices.SortFunc(access, func(a, b mesh.AccessPolicy) int { return a.Name.Compare(b.Name) })
	slices.SortFunc(requests, func(a, b *requestFact) int { return compareKeys(a.key, b.key) })
	for _, r := range requests {
		tokens = append(tokens, x.tokenRules(r)...)
	}
	return access, tokens
}

func (f *authorizationFact) untargeted() untargeted { return untargeted{f.Namespace, f.Selector} }
func (f *requestFact) untargeted() untargeted       { return untargeted{f.Namespace, f.Selector} }

// touchUntargeted marks the policies that gateways may have come to be among the workloads of, and those that name gateways.
func (x *Index) touchUntargeted() {
	for ns := range x.rateLimits {
		x.touchRateLimits(ns)
	}
	for ns := range x.envoyFilters {
		x.touchEnvoyFilters(ns)
	}
	for ns := range x.wasmPlugins {
		x.touchWasmPlugins(ns)
	}
	for _, all := range x.authz {
		for _, f := range all {
			if len(f.Targets) == 0 {
				x.dirtyStates[PolicyKey{AuthorizationPolicy, f.Namespace, f.Name}] = struct{}{}
			}
		}
	}
	for _, all := range x.requests {
		for _, f := range all {
			if len(f.Targets) == 0 {
				x.dirtyStates[PolicyKey{RequestAuthentication, f.Namespace, f.Name}] = struct{}{}
			}
		}
	}
}

// atGatewaysToo adds to the state of a policy what gateways do about it.
func (x *Index) atGatewaysToo(f *authorizationFact, s *PolicyState) {
	s.Waypoints = x.boundGateways(f.untargeted())
	if len(s.Waypoints) == 0 || !x.gatewaysAlone(f.Selector) {
		return
	}
	a := x.gatewayPolicy(f)
	s.Compiled, s.Exact, s.Reason, s.Message = nil, a.Message == "", a.Reason, a.Message
	if s.Exact {
		s.Message = reported(f)
	}
}
