package reference

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
)

// World is a mesh and what is in it.
type World struct {
	RootNamespace      string
	TrustDomain        string
	TrustDomainAliases []string

	Namespaces []*corev1.Namespace
	Services   []*corev1.Service
	Pods       []*corev1.Pod
	Policies   []*securityv1.AuthorizationPolicy
	Peers      []*securityv1.PeerAuthentication
}

// Connection is one that arrives at a pod.
type Connection struct {
	// The peer's identity as its certificate has it; the zero value for plaintext.
	TrustDomain, Namespace, ServiceAccount string

	SourceIP netip.Addr
	To       *corev1.Pod
	DestIP   netip.Addr
	DestPort uint16
}

func (c Connection) authenticated() bool { return c.TrustDomain != "" }

func (c Connection) principal() string {
	if !c.authenticated() {
		return ""
	}
	return c.TrustDomain + "/ns/" + c.Namespace + "/sa/" + c.ServiceAccount
}

// Allows decides a connection.
func (w *World) Allows(c Connection) bool {
	if w.strict(c.To, c.DestPort) && !c.authenticated() {
		return false
	}
	closed, admitted := false, false
	for _, p := range w.Policies {
		if p.Spec.Action == securityapi.AuthorizationPolicy_AUDIT || p.Annotations["istio.io/dry-run"] == "true" || !w.applies(p, c.To) {
			continue
		}
		if len(p.Spec.TargetRefs) > 0 {
			if w.keptOut(p, c) {
				return false
			}
			continue
		}
		switch p.Spec.Action {
		case securityapi.AuthorizationPolicy_CUSTOM, securityapi.AuthorizationPolicy_DENY:
			if w.anyRule(p, c) {
				return false
			}
		case securityapi.AuthorizationPolicy_ALLOW:
			closed = true
			admitted = admitted || w.anyRule(p, c)
		}
	}
	return !closed || admitted
}

// applies: by targetRefs, else by selector in the policy's namespace, which for the root namespace is everywhere.
func (w *World) applies(p *securityv1.AuthorizationPolicy, pod *corev1.Pod) bool {
	if len(p.Spec.TargetRefs) > 0 {
		return slices.ContainsFunc(p.Spec.TargetRefs, func(t *typeapi.PolicyTargetReference) bool { return w.targets(t, p.Namespace, pod) })
	}
	return (p.Namespace == w.RootNamespace || p.Namespace == pod.Namespace) && labelled(pod.Labels, p.Spec.Selector)
}

func labelled(have map[string]string, s *typeapi.WorkloadSelector) bool {
	for k, v := range s.GetMatchLabels() {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func (w *World) targets(t *typeapi.PolicyTargetReference, namespace string, pod *corev1.Pod) bool {
	waypoints := w.waypointsOf(pod)
	switch t.Kind {
	case "Service":
		return slices.ContainsFunc(w.servicesOf(pod), func(s *corev1.Service) bool { return s.Namespace == namespace && s.Name == t.Name })
	case "Gateway":
		return slices.Contains(waypoints, namespace+"/"+t.Name)
	case "GatewayClass":
		return namespace == w.RootNamespace && t.Name == "istio-waypoint" && len(waypoints) > 0
	}
	return false
}

// keptOut is what a node does for a policy that waypoints decide: on the ports behind the services that it is about it
// admits their waypoints alone. If one of them asks for no waypoint, or the pod itself is behind one, nobody comes in.
func (w *World) keptOut(p *securityv1.AuthorizationPolicy, c Connection) bool {
	guarded := false
	for _, t := range p.Spec.TargetRefs {
		about := 0
		for _, s := range w.servicesOf(c.To) {
			waypoint := w.waypointOf(s.Labels, s.Namespace)
			switch {
			case t.Kind == "Service" && (s.Namespace != p.Namespace || s.Name != t.Name),
				t.Kind == "Gateway" && waypoint != p.Namespace+"/"+t.Name,
				t.Kind == "GatewayClass" && waypoint == "":
				continue
			case waypoint == "":
				return true
			}
			about++
			for _, port := range s.Spec.Ports {
				guarded = guarded || port.TargetPort.IntValue() == int(c.DestPort) && !w.is(c, waypoint)
			}
		}
		if about == 0 && w.targets(t, p.Namespace, c.To) {
			return true
		}
	}
	return guarded
}

// is reports whether the peer is a waypoint: it runs under the service account of the Gateway's name.
func (w *World) is(c Connection, waypoint string) bool {
	return slices.Contains(w.ours(), c.TrustDomain) && c.Namespace+"/"+c.ServiceAccount == waypoint
}

func (w *World) servicesOf(pod *corev1.Pod) []*corev1.Service {
	var out []*corev1.Service
	for _, s := range w.Services {
		if s.Namespace == pod.Namespace && len(s.Spec.Selector) > 0 && labelled(pod.Labels, &typeapi.WorkloadSelector{MatchLabels: s.Spec.Selector}) {
			out = append(out, s)
		}
	}
	return out
}

// waypointsOf are those that the pod and its services ask for.
func (w *World) waypointsOf(pod *corev1.Pod) []string {
	var out []string
	for _, labels := range append([]map[string]string{pod.Labels}, labelsOf(w.servicesOf(pod))...) {
		if name := w.waypointOf(labels, pod.Namespace); name != "" {
			out = append(out, name)
		}
	}
	return out
}

// waypointOf is the one that an object with these labels asks for, else that of its namespace.
func (w *World) waypointOf(labels map[string]string, namespace string) string {
	wish := func(labels map[string]string) (string, bool) {
		name, ok := labels["istio.io/use-waypoint"]
		switch {
		case !ok:
			return "", false
		case name == "none":
			return "", true
		case labels["istio.io/use-waypoint-namespace"] != "":
			return labels["istio.io/use-waypoint-namespace"] + "/" + name, true
		}
		return namespace + "/" + name, true
	}
	name, said := wish(labels)
	for _, ns := range w.Namespaces {
		if ns.Name == namespace && !said {
			name, _ = wish(ns.Labels)
		}
	}
	return name
}

func labelsOf(services []*corev1.Service) []map[string]string {
	var out []map[string]string
	for _, s := range services {
		out = append(out, s.Labels)
	}
	return out
}

// anyRule: "A match occurs when at least one rule matches the request."
func (w *World) anyRule(p *securityv1.AuthorizationPolicy, c Connection) bool {
	return slices.ContainsFunc(p.Spec.Rules, func(r *securityapi.Rule) bool { return w.rule(p, r, c) })
}

// rule: "at least one source, one operation and all conditions". What is not set is not asked for.
func (w *World) rule(p *securityv1.AuthorizationPolicy, r *securityapi.Rule, c Connection) bool {
	m := matcher{w: w, c: c, namespace: p.Namespace}
	from, to := len(r.From) == 0, len(r.To) == 0
	for _, f := range r.From {
		from = m.source(f.Source) || from
	}
	for _, t := range r.To {
		to = m.operation(t.Operation) || to
	}
	all := true
	for _, cond := range r.When {
		all = m.condition(cond) && all
	}
	if m.unknown && p.Spec.Action == securityapi.AuthorizationPolicy_ALLOW {
		return false
	}
	return from && to && all
}

// matcher evaluates one rule, without cutting short: it has to see whether anything unknown is mentioned.
type matcher struct {
	w         *World
	c         Connection
	namespace string
	unknown   bool
}

// list: one of the values has to match, none of the not-values may; what is not set is fulfilled.
func list(values, notValues []string, match func(string) bool) bool {
	return (len(values) == 0 || slices.ContainsFunc(values, match)) && !slices.ContainsFunc(notValues, match)
}

// http notes a list that only a waypoint can look at; in what remains it counts as fulfilled.
func (m *matcher) http(lists ...[]string) {
	for _, l := range lists {
		m.unknown = m.unknown || len(l) > 0
	}
}

// text is the API's string match: exact, prefix, suffix and presence.
func text(pattern, value string) bool {
	switch {
	case pattern == "*":
		return value != ""
	case strings.HasPrefix(pattern, "*"):
		return value != "" && strings.HasSuffix(value, pattern[1:])
	case strings.HasSuffix(pattern, "*"):
		return value != "" && strings.HasPrefix(value, pattern[:len(pattern)-1])
	}
	return value != "" && value == pattern
}

func address(block string, ip netip.Addr) bool {
	if !strings.Contains(block, "/") {
		return netip.MustParseAddr(block) == ip
	}
	return netip.MustParsePrefix(block).Contains(ip)
}

func (m *matcher) port(v string) bool {
	n, err := strconv.Atoi(v)
	return err == nil && n == int(m.c.DestPort)
}

func (m *matcher) sourceIP(v string) bool  { return address(v, m.c.SourceIP) }
func (m *matcher) destIP(v string) bool    { return address(v, m.c.DestIP) }
func (m *matcher) sourceNS(v string) bool  { return text(v, m.c.Namespace) }
func (m *matcher) principal(v string) bool { return m.w.isPrincipal(v, m.c.principal()) }
func (m *matcher) domain(v string) bool    { return m.w.isDomain(v, m.c.TrustDomain) }

func (m *matcher) account(v string) bool {
	if !strings.Contains(v, "/") {
		v = m.namespace + "/" + v
	}
	return m.c.authenticated() && v == m.c.Namespace+"/"+m.c.ServiceAccount
}

// domains splits off the lists that cannot be matched here.
func (m *matcher) domains(values, notValues []string) bool {
	byEnd := func(v string) bool { return len(v) > 1 && v[0] == '*' }
	if slices.ContainsFunc(values, byEnd) {
		m.unknown, values = true, nil
	}
	if slices.ContainsFunc(notValues, byEnd) {
		m.unknown, notValues = true, nil
	}
	return list(values, notValues, m.domain)
}

func (m *matcher) source(s *securityapi.Source) bool {
	m.http(s.RequestPrincipals, s.NotRequestPrincipals, s.RemoteIpBlocks, s.NotRemoteIpBlocks)
	domains := m.domains(s.TrustDomains, s.NotTrustDomains)
	return domains &&
		list(s.Principals, s.NotPrincipals, m.principal) &&
		list(s.Namespaces, s.NotNamespaces, m.sourceNS) &&
		list(s.ServiceAccounts, s.NotServiceAccounts, m.account) &&
		list(s.IpBlocks, s.NotIpBlocks, m.sourceIP)
}

func (m *matcher) operation(o *securityapi.Operation) bool {
	m.http(o.Hosts, o.NotHosts, o.Methods, o.NotMethods, o.Paths, o.NotPaths)
	return list(o.Ports, o.NotPorts, m.port)
}

func (m *matcher) condition(c *securityapi.Condition) bool {
	switch c.Key {
	case "source.ip":
		return list(c.Values, c.NotValues, m.sourceIP)
	case "source.namespace":
		return list(c.Values, c.NotValues, m.sourceNS)
	case "source.principal":
		return list(c.Values, c.NotValues, m.principal)
	case "source.serviceAccount":
		return list(c.Values, c.NotValues, m.account)
	case "source.trustDomain":
		return m.domains(c.Values, c.NotValues)
	case "destination.ip":
		return list(c.Values, c.NotValues, m.destIP)
	case "destination.port":
		return list(c.Values, c.NotValues, m.port)
	}
	m.unknown = true
	return true
}

// ours are the trust domains whose identities are the same.
func (w *World) ours() []string { return append([]string{w.TrustDomain}, w.TrustDomainAliases...) }

// isPrincipal: a complete identity of one of the mesh's trust domains, or of "cluster.local", which stands for
// them, is meant for all of them.
func (w *World) isPrincipal(pattern, value string) bool {
	parts := strings.Split(pattern, "/")
	domain := parts[0]
	if len(parts) != 5 || domain == "*" {
		return text(pattern, value)
	}
	own := domain == "cluster.local"
	for _, d := range w.ours() {
		own = own || text(domain, d)
	}
	if !own {
		return text(pattern, value)
	}
	for _, d := range w.ours() {
		parts[0] = d
		if text(strings.Join(parts, "/"), value) {
			return true
		}
	}
	return domain[0] == '*' && text(pattern, value)
}

func (w *World) isDomain(pattern, value string) bool {
	if slices.Contains(w.ours(), pattern) {
		return slices.Contains(w.ours(), value)
	}
	return text(pattern, value)
}

// strict: the port's mode, else the workload's, the namespace's, the mesh's; PERMISSIVE where nobody says. Of
// several at one level the oldest holds.
func (w *World) strict(pod *corev1.Pod, port uint16) bool {
	type mode = securityapi.PeerAuthentication_MutualTLS_Mode
	set := func(m mode) bool { return m != securityapi.PeerAuthentication_MutualTLS_UNSET }
	mesh := w.oldest(func(p *securityv1.PeerAuthentication) bool {
		return p.Namespace == w.RootNamespace && len(p.Spec.Selector.GetMatchLabels()) == 0
	})
	var namespace, workload *securityv1.PeerAuthentication
	if pod.Namespace != w.RootNamespace {
		namespace = w.oldest(func(p *securityv1.PeerAuthentication) bool {
			return p.Namespace == pod.Namespace && len(p.Spec.Selector.GetMatchLabels()) == 0
		})
		workload = w.oldest(func(p *securityv1.PeerAuthentication) bool {
			return p.Namespace == pod.Namespace && len(p.Spec.Selector.GetMatchLabels()) > 0 && labelled(pod.Labels, p.Spec.Selector)
		})
	}
	if workload != nil {
		if m := workload.Spec.PortLevelMtls[uint32(port)].GetMode(); set(m) {
			return m == securityapi.PeerAuthentication_MutualTLS_STRICT
		}
	}
	for _, p := range []*securityv1.PeerAuthentication{workload, namespace, mesh} {
		if p != nil && set(p.Spec.Mtls.GetMode()) {
			return p.Spec.Mtls.GetMode() == securityapi.PeerAuthentication_MutualTLS_STRICT
		}
	}
	return false
}

func (w *World) oldest(of func(*securityv1.PeerAuthentication) bool) *securityv1.PeerAuthentication {
	var first *securityv1.PeerAuthentication
	for _, p := range w.Peers {
		if of(p) && (first == nil || p.CreationTimestamp.Before(&first.CreationTimestamp) ||
			p.CreationTimestamp.Equal(&first.CreationTimestamp) && p.Name < first.Name) {
			first = p
		}
	}
	return first
}

func addrPort(c Connection) netip.AddrPort { return netip.AddrPortFrom(c.DestIP, c.DestPort) }
