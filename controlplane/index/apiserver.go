package index

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/warrenmesh/warren/internal/mesh"
)

// The API server calls webhooks, aggregated APIs and conversion webhooks, and has no identity of the mesh to call
// them with. Under STRICT it would be refused, and with it whoever creates an object. So the ports that objects
// tell it to call are kept open for it, and for it alone:
//
//	webhook configuration ─▶ Service port ─▶ pods and their ports      what is called
//	default/kubernetes ─▶ addresses ─▶ nodes that have them            from where
//
// The pods' STRICT policy is then one that lets these addresses in to these ports. They are addresses, which is
// less than an identity: a process in the host network of the API server's machine has them too.

// called is a port of a Service that the API server calls.
type called struct {
	service key
	port    uint16
}

func compareCalled(a, b called) int {
	return cmp.Or(compareKeys(a.service, b.service), cmp.Compare(a.port, b.port))
}

func sortedCalled(list []called) []called {
	slices.SortFunc(list, compareCalled)
	return slices.Compact(list)
}

func calledBy(out []called, c *admissionv1.WebhookClientConfig) []called {
	if c.Service == nil {
		return out
	}
	port := uint16(443)
	if c.Service.Port != nil {
		port = uint16(*c.Service.Port)
	}
	return append(out, called{key{c.Service.Namespace, c.Service.Name}, port})
}

func calledByValidating(o *admissionv1.ValidatingWebhookConfiguration) []called {
	var out []called
	for i := range o.Webhooks {
		out = calledBy(out, &o.Webhooks[i].ClientConfig)
	}
	return sortedCalled(out)
}

func calledByMutating(o *admissionv1.MutatingWebhookConfiguration) []called {
	var out []called
	for i := range o.Webhooks {
		out = calledBy(out, &o.Webhooks[i].ClientConfig)
	}
	return sortedCalled(out)
}

// calledByUnstructured reads an APIService or a CustomResourceDefinition.
func calledByUnstructured(o *unstructured.Unstructured) []called {
	path := []string{"spec", "service"}
	if o.GetKind() == CustomResourceDefinition.String() {
		if s, _, _ := unstructured.NestedString(o.Object, "spec", "conversion", "strategy"); s != "Webhook" {
			return nil
		}
		path = []string{"spec", "conversion", "webhook", "clientConfig", "service"}
	}
	s, ok, err := unstructured.NestedMap(o.Object, path...)
	if err != nil || !ok {
		return nil
	}
	ns, _ := s["namespace"].(string)
	name, _ := s["name"].(string)
	port := int64(443)
	if p, ok := s["port"].(int64); ok {
		port = p
	}
	if ns == "" || name == "" || port < 1 || port > 65535 {
		return nil
	}
	return []called{{key{ns, name}, uint16(port)}}
}

// stripUnstructured keeps what calledByUnstructured reads.
func stripUnstructured(o *unstructured.Unstructured) *unstructured.Unstructured {
	out := &unstructured.Unstructured{Object: map[string]any{}}
	out.SetAPIVersion(o.GetAPIVersion())
	out.SetKind(o.GetKind())
	out.SetName(o.GetName())
	out.SetUID(o.GetUID())
	out.SetResourceVersion(o.GetResourceVersion())
	spec := map[string]any{}
	for _, name := range []string{"service", "conversion"} {
		if v, ok, _ := unstructured.NestedMap(o.Object, "spec", name); ok {
			spec[name] = v
		}
	}
	out.Object["spec"] = spec
	return out
}

// setCalled records what an object has the API server call; nothing for one that is gone.
func (x *Index) setCalled(r ref, now []called) {
	old := x.calledBy[r]
	if slices.Equal(old, now) {
		return
	}
	if len(now) == 0 {
		delete(x.calledBy, r)
	} else {
		x.calledBy[r] = now
	}
	for _, c := range old {
		unlinkCaller(x.callers, c, r)
	}
	for _, c := range now {
		if x.callers[c.service] == nil {
			x.callers[c.service] = map[uint16]map[ref]struct{}{}
		}
		if x.callers[c.service][c.port] == nil {
			x.callers[c.service][c.port] = map[ref]struct{}{}
		}
		x.callers[c.service][c.port][r] = struct{}{}
	}
	for _, c := range append(slices.Clone(old), now...) {
		if s := x.services[c.service.Namespace][c.service.Name]; s != nil {
			x.touchBackends(s)
		}
	}
}

func unlinkCaller(m map[key]map[uint16]map[ref]struct{}, c called, r ref) {
	delete(m[c.service][c.port], r)
	if len(m[c.service][c.port]) == 0 {
		delete(m[c.service], c.port)
	}
	if len(m[c.service]) == 0 {
		delete(m, c.service)
	}
}

// calledPorts are the ports of a workload that the API server calls.
func (x *Index) calledPorts(s subject) []uint16 {
	if len(x.callers) == 0 {
		return nil
	}
	var out []uint16
	for name, ports := range s.services {
		w := x.winners[name]
		if w == nil || w.owner.entry {
			continue
		}
		for _, p := range ports {
			if _, ok := x.callers[w.owner.key][p.Port]; !ok {
				continue
			}
			target := p.Target
			if target == 0 {
				target = p.Port
			}
			out = append(out, target)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// nodeFact is what the mesh needs of a Node.
type nodeFact struct {
	locality mesh.Locality
	addrs    []netip.Addr // its own
	inside   []netip.Addr // with which its own processes reach pods: of bridges and overlays
}

// overlayAnnotations hold addresses of a node inside the pods' network, as network plugins write them.
var overlayAnnotations = []string{
	"network.cilium.io/ipv4-cilium-host", "network.cilium.io/ipv6-cilium-host",
	"projectcalico.org/IPv4IPIPTunnelAddr", "projectcalico.org/IPv4VXLANTunnelAddr", "projectcalico.org/IPv6VXLANTunnelAddr",
}

func nodeFactOf(n *corev1.Node) *nodeFact {
	f := &nodeFact{locality: localityOf(n)}
	for _, a := range n.Status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if ip, err := netip.ParseAddr(a.Address); err == nil {
			f.addrs = append(f.addrs, ip.Unmap())
		}
	}
	for _, cidr := range n.Spec.PodCIDRs {
		if p, err := netip.ParsePrefix(cidr); err == nil && !p.IsSingleIP() {
			first := p.Masked().Addr()
			f.inside = append(f.inside, first, first.Next()) // flannel's and a bridge's
		}
	}
	for _, name := range overlayAnnotations {
		if ip, err := netip.ParseAddr(n.Annotations[name]); err == nil {
			f.inside = append(f.inside, ip.Unmap())
		}
	}
	return f
}

func (f *nodeFact) equal(o *nodeFact) bool {
	if f == nil || o == nil {
		return f == o
	}
	return f.locality == o.locality && slices.Equal(f.addrs, o.addrs) && slices.Equal(f.inside, o.inside)
}

func (x *Index) setNode(name string, f *nodeFact) {
	old := x.nodes[name]
	if old.equal(f) {
		return
	}
	if f == nil {
		delete(x.nodes, name)
	} else {
		x.nodes[name] = f
	}
	if old != nil {
		for _, a := range old.inside {
			if x.inside[a]--; x.inside[a] == 0 {
				delete(x.inside, a)
			}
		}
	}
	if f != nil {
		for _, a := range f.inside {
			x.inside[a]++
		}
	}
	x.dirtyAPIServer = true
	if old != nil && f != nil && old.locality == f.locality {
		return
	}
	for k := range x.podsByNode[name] {
		x.touch(Pod, k)
	}
}

func (x *Index) localityOf(node string) mesh.Locality {
	if n := x.nodes[node]; n != nil {
		return n.locality
	}
	return mesh.Locality{}
}

// apiServerService has the API servers' addresses.
var apiServerService = key{"default", "kubernetes"}

// apiServerAddrs are the addresses from which the API server calls pods: those under which it is known, and where
// it runs on a node of the cluster, the node's others, but for any that a pod has.
func (x *Index) apiServerAddrs() []netip.Prefix {
	known := map[netip.Addr]bool{}
	for k := range x.slicesOf[apiServerService] {
		if k != apiServerService { // the API server writes the one of this name; others may be anybody's
			continue
		}
		for _, e := range x.slices[k].endpoints {
			known[e.addr] = true
		}
	}
	all := maps.Clone(known)
	for _, n := range x.nodes {
		if !slices.ContainsFunc(n.addrs, func(a netip.Addr) bool { return known[a] }) {
			continue
		}
		for _, a := range n.addrs {
			all[a] = true
		}
		for _, a := range n.inside {
			if len(x.podsByAddr[a]) == 0 {
				all[a] = true
			}
		}
	}
	out := slices.Clone(x.c.APIServerSources)
	for a := range all {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return slices.Compact(out)
}

// exemption is a STRICT policy with ports that the API server may call.
type exemption struct {
	workload key      // PeerAuthentication with exceptions by port; zero: STRICT on every port
	ports    []uint16 // of the API server
	users    map[source]struct{}
}

const exemptSuffix = "_but_api_server_"

func exemptName(base mesh.PolicyName, ports []uint16) mesh.PolicyName {
	words := make([]string, len(ports))
	for i, p := range ports {
		words[i] = fmt.Sprint(p)
	}
	base.Name += exemptSuffix + strings.Join(words, "_")
	return base
}

// exempt puts, for a workload with ports that the API server calls, the policy that lets it in into the place
// of the one that would not.
func (x *Index) exempt(b *bindings, s subject, workload *peerAuthFact, strict bool, base mesh.PolicyName) {
	ports := x.calledPorts(s)
	if workload != nil { // only ports that are strict
		except := workload.exceptions(strict)
		ports = slices.DeleteFunc(ports, func(p uint16) bool { return slices.Contains(except, p) == strict })
	}
	if len(ports) == 0 {
		return
	}
	b.exempt = &exemption{ports: ports}
	if workload != nil && len(workload.exceptions(strict)) > 0 {
		b.exempt.workload = workload.key
	}
	i := slices.Index(b.policies, base)
	b.exemptName = exemptName(base, ports)
	b.policies[i] = b.exemptName
}

// use records which exemption an object's workloads need.
func (x *Index) use(src source, b bindings) {
	x.useGuards(src, b.guards)
	old, had := x.exemptOf[src]
	if had && (b.exempt == nil || old != b.exemptName) {
		delete(x.exemptions[old].users, src)
		delete(x.exemptOf, src)
		x.dirtyExemptions[old] = struct{}{}
	}
	if b.exempt == nil {
		return
	}
	e := x.exemptions[b.exemptName]
	if e == nil {
		e = b.exempt
		e.users = map[source]struct{}{}
		x.exemptions[b.exemptName] = e
	}
	e.users[src] = struct{}{}
	x.exemptOf[src] = b.exemptName
	x.dirtyExemptions[b.exemptName] = struct{}{}
}

func (x *Index) commitExemptions(b *mesh.Builder) {
	if x.dirtyAPIServer {
		x.dirtyAPIServer = false
		x.apiServer = x.apiServerAddrs()
		for name := range x.exemptions {
			x.dirtyExemptions[name] = struct{}{}
		}
	}
	if len(x.dirtyExemptions) == 0 {
		return
	}
	for name := range x.dirtyExemptions {
		e := x.exemptions[name]
		if e == nil || len(e.users) == 0 {
			delete(x.exemptions, name)
			b.DeletePolicy(name)
			continue
		}
		b.PutPolicy(x.exemptPolicy(name, e, x.apiServer))
	}
	for ns := range x.peerAuths { // they tell of the exemptions
		for name := range x.peerAuths[ns] {
			x.dirtyStates[PolicyKey{PeerAuthentication, ns, name}] = struct{}{}
		}
	}
}

// exemptPolicy denies plaintext but on ports that accept it anyway, and on the API server's ports but from there.
func (x *Index) exemptPolicy(name mesh.PolicyName, e *exemption, addrs []netip.Prefix) *mesh.Policy {
	strict, except := true, []uint16(nil)
	if f := x.peerAuths[e.workload.Namespace][e.workload.Name]; f != nil {
		meshWide, namespace := x.peerAuthLevels(e.workload.Namespace)
		strict = effectiveStrict(meshWide, namespace, f)
		except = f.exceptions(strict)
	}
	p := &mesh.Policy{Name: name, Scope: mesh.ScopeWorkload, Action: mesh.Deny}
	deny := func(m mesh.Match) {
		m.NotPrincipals = anyPrincipal()
		p.Rules = append(p.Rules, mesh.Rule{Clauses: []mesh.Clause{{Matches: []mesh.Match{m}}}})
	}
	if strict {
		others := append(slices.Clone(except), e.ports...)
		slices.Sort(others)
		deny(mesh.Match{NotDestinationPorts: slices.Compact(others)})
	} else if others := slices.DeleteFunc(slices.Clone(except), func(p uint16) bool { return slices.Contains(e.ports, p) }); len(others) > 0 {
		deny(mesh.Match{DestinationPorts: others})
	}
	deny(mesh.Match{DestinationPorts: e.ports, NotSourceIPs: addrs})
	return p
}

// exempted is a pod that the API server calls, and how.
type exempted struct {
	namespace string
	labels    map[string]string
	calls     []string // service:port
}

// exempted lists the pods of the mesh with an exemption.
func (x *Index) exempted() []exempted {
	var out []exempted
	for _, e := range x.exemptions {
		for src := range e.users {
			f := x.pods[src.Namespace][src.Name]
			if l := x.locals[src.key]; src.kind != Pod || f == nil || l == nil || !l.Enrolled {
				continue // nothing is refused at a pod outside the mesh
			}
			p := exempted{namespace: src.Namespace, labels: f.labels}
			for name := range x.servicesOfPod(f) {
				w := x.winners[name]
				if w == nil || w.owner.entry {
					continue
				}
				for port := range x.callers[w.owner.key] {
					p.calls = append(p.calls, fmt.Sprintf("%s/%s:%d", w.owner.Namespace, w.owner.Name, port))
				}
			}
			out = append(out, p)
		}
	}
	return out
}

// exemptText tells of the exemptions among the pods of a namespace, or of all for "", that have the labels.
func exemptText(pods []exempted, ns string, selector map[string]string) string {
	calls := map[string]bool{}
	for _, p := range pods {
		if ns != "" && p.namespace != ns || len(selector) > 0 && !selects(selector, p.labels) {
			continue
		}
		for _, c := range p.calls {
			calls[c] = true
		}
	}
	list := slices.Sorted(maps.Keys(calls))
	if len(list) == 0 {
		return ""
	}
	const most = 10
	more := ""
	if len(list) > most {
		more = fmt.Sprintf(" and %d more", len(list)-most)
		list = list[:most]
	}
	return "exempt for the API server alone, which calls them: " + strings.Join(list, ", ") + more
}
