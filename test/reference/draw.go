package reference

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"time"

	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// drawer draws from few values, so that they meet.
type drawer struct{ *rand.Rand }

func pick[T any](d drawer, of ...T) T { return of[d.IntN(len(of))] }

// one in n.
func (d drawer) one(n int) bool { return d.IntN(n) == 0 }

// some draws up to most values, none more often than not.
func (d drawer) some(chance, most int, from ...string) []string {
	if !d.one(chance) {
		return nil
	}
	var out []string
	for range 1 + d.IntN(most) {
		out = append(out, pick(d, from...))
	}
	return out
}

var (
	namespaces = []string{"a", "b", "istio-system"}
	domains    = []string{"td1", "td12", "old", "cluster.local", "foreign"}
	accounts   = []string{"x", "y"}
	ports      = []string{"80", "8080", "9000", "0"}
	nets       = []string{"10.0.0.0/8", "10.0.0.1", "10.0.0.0/30", "192.0.2.0/24", "fd00::/16", "fd00::1", "0.0.0.0/0", "::/0", "10.0.0.7/31"}
	nsPatterns = []string{"a", "b", "*", "a*", "*b", "istio-*", "*system", "c"}
	tdPatterns = []string{"td1", "old", "cluster.local", "foreign", "*", "td*", "*ign", "f*"}
)

func (d drawer) principals() string {
	return pick(d, "*", pick(d, domains...)+"/ns/"+pick(d, namespaces...)+"/sa/"+pick(d, accounts...),
		"*/ns/"+pick(d, namespaces...)+"/sa/"+pick(d, accounts...), pick(d, domains...)+"/ns/"+pick(d, namespaces...)+"/*",
		pick(d, domains...)+"/*", "*/sa/"+pick(d, accounts...), "*ld/ns/"+pick(d, namespaces...)+"/sa/"+pick(d, accounts...),
		pick(d, domains...)+"/ns/"+pick(d, namespaces...)+"/sa/*", "nonsense")
}

func (d drawer) somePrincipals(chance int) []string {
	if !d.one(chance) {
		return nil
	}
	out := []string{d.principals()}
	if d.one(2) {
		out = append(out, d.principals())
	}
	return out
}

func (d drawer) someAccounts(chance int) []string {
	return d.some(chance, 2, "x", "y", "a/x", "b/y", "istio-system/x")
}

// identities says who a source is: by account, or by all else, since the API takes only one of both.
func (d drawer) identities(s *securityapi.Source) {
	if d.one(3) {
		s.ServiceAccounts, s.NotServiceAccounts = d.someAccounts(2), d.someAccounts(3)
		return
	}
	s.Principals, s.NotPrincipals = d.somePrincipals(3), d.somePrincipals(5)
	s.Namespaces, s.NotNamespaces = d.some(3, 2, nsPatterns...), d.some(5, 2, nsPatterns...)
}

// source is never empty, as the API has it.
func (d drawer) source() *securityapi.Source {
	for {
		s := &securityapi.Source{
			IpBlocks: d.some(4, 2, nets...), NotIpBlocks: d.some(6, 2, nets...),
			TrustDomains: d.some(9, 2, tdPatterns...), NotTrustDomains: d.some(12, 2, tdPatterns...),
			RemoteIpBlocks: d.some(30, 1, nets...), NotRequestPrincipals: d.some(40, 1, "*"), RequestPrincipals: d.some(30, 1, "me/*"),
		}
		d.identities(s)
		if len(s.String()) > 0 {
			return s
		}
	}
}

func (d drawer) operation() *securityapi.Operation {
	for {
		o := &securityapi.Operation{
			Ports: d.some(2, 2, ports...), NotPorts: d.some(4, 2, ports...), Methods: d.some(12, 1, "GET"),
			Paths: d.some(20, 1, "/admin"), NotHosts: d.some(30, 1, "shop.example"),
		}
		if len(o.String()) > 0 {
			return o
		}
	}
}

func (d drawer) condition() *securityapi.Condition {
	c := &securityapi.Condition{Key: pick(d, "source.ip", "source.namespace", "source.principal", "source.serviceAccount",
		"source.trustDomain", "destination.ip", "destination.port", "destination.port")}
	for len(c.Values)+len(c.NotValues) == 0 {
		switch c.Key {
		case "source.ip", "destination.ip":
			c.Values, c.NotValues = d.some(2, 2, nets...), d.some(2, 2, nets...)
		case "source.namespace":
			c.Values, c.NotValues = d.some(2, 2, nsPatterns...), d.some(2, 2, nsPatterns...)
		case "source.principal":
			c.Values, c.NotValues = d.somePrincipals(2), d.somePrincipals(2)
		case "source.serviceAccount":
			c.Values, c.NotValues = d.someAccounts(2), d.someAccounts(2)
		case "source.trustDomain":
			c.Values, c.NotValues = d.some(2, 2, tdPatterns...), d.some(2, 2, tdPatterns...)
		default:
			c.Values, c.NotValues = d.some(2, 2, ports...), d.some(2, 2, ports...)
		}
	}
	if d.one(15) {
		return &securityapi.Condition{Key: "request.headers[x]", Values: []string{"1"}}
	}
	return c
}

func (d drawer) rule() *securityapi.Rule {
	r := &securityapi.Rule{}
	for range pick(d, 0, 1, 1, 2) {
		r.From = append(r.From, &securityapi.Rule_From{Source: d.source()})
	}
	for range pick(d, 0, 0, 1, 2) {
		r.To = append(r.To, &securityapi.Rule_To{Operation: d.operation()})
	}
	for range pick(d, 0, 0, 0, 1, 2) {
		r.When = append(r.When, d.condition())
	}
	return r
}

func (d drawer) selector() *typeapi.WorkloadSelector {
	return pick(d, nil, nil, &typeapi.WorkloadSelector{MatchLabels: map[string]string{"app": pick(d, "x", "y")}})
}

func (d drawer) meta(kind string, i int) metav1.ObjectMeta {
	return metav1.ObjectMeta{
		Namespace: pick(d, namespaces...), Name: fmt.Sprintf("%s%d", kind, i), UID: types.UID(fmt.Sprintf("%s%d", kind, i)),
		CreationTimestamp: metav1.NewTime(time.Unix(int64(d.IntN(3)), 0)),
	}
}

func (d drawer) policy(i int) *securityv1.AuthorizationPolicy {
	p := &securityv1.AuthorizationPolicy{ObjectMeta: d.meta("p", i)}
	p.Spec.Action = pick(d, securityapi.AuthorizationPolicy_ALLOW, securityapi.AuthorizationPolicy_ALLOW, securityapi.AuthorizationPolicy_ALLOW,
		securityapi.AuthorizationPolicy_DENY, securityapi.AuthorizationPolicy_DENY, securityapi.AuthorizationPolicy_AUDIT, securityapi.AuthorizationPolicy_CUSTOM)
	if d.one(10) {
		p.Annotations = map[string]string{"istio.io/dry-run": pick(d, "true", "false")}
	}
	if d.one(10) {
		target := &typeapi.PolicyTargetReference{Kind: "Service", Name: pick(d, "s0", "s1")}
		switch d.IntN(3) {
		case 1:
			target = &typeapi.PolicyTargetReference{Group: "gateway.networking.k8s.io", Kind: "Gateway", Name: "w"}
		case 2:
			target = &typeapi.PolicyTargetReference{Group: "gateway.networking.k8s.io", Kind: "GatewayClass", Name: "istio-waypoint"}
		}
		p.Spec.TargetRefs = []*typeapi.PolicyTargetReference{target}
	} else {
		p.Spec.Selector = d.selector()
	}
	for range pick(d, 0, 1, 1, 2, 3) {
		p.Spec.Rules = append(p.Spec.Rules, d.rule())
	}
	return p
}

func (d drawer) mode() *securityapi.PeerAuthentication_MutualTLS {
	return pick(d, nil, &securityapi.PeerAuthentication_MutualTLS{Mode: securityapi.PeerAuthentication_MutualTLS_Mode(d.IntN(4))})
}

func (d drawer) peer(i int) *securityv1.PeerAuthentication {
	p := &securityv1.PeerAuthentication{ObjectMeta: d.meta("q", i)}
	p.Spec.Mtls, p.Spec.Selector = d.mode(), d.selector()
	if p.Spec.Selector != nil && d.one(2) {
		p.Spec.PortLevelMtls = map[uint32]*securityapi.PeerAuthentication_MutualTLS{}
		for _, port := range []uint32{80, 8080, 9000} {
			if !d.one(3) {
				p.Spec.PortLevelMtls[port] = &securityapi.PeerAuthentication_MutualTLS{Mode: securityapi.PeerAuthentication_MutualTLS_Mode(d.IntN(4))}
			}
		}
	}
	return p
}

func (d drawer) waypointLabels(l map[string]string) map[string]string {
	if d.one(5) {
		l["istio.io/use-waypoint"] = pick(d, "w", "v", "none")
		if d.one(3) {
			l["istio.io/use-waypoint-namespace"] = pick(d, namespaces...)
		}
	}
	return l
}

// Draw makes a world.
func Draw(r *rand.Rand) *World {
	d := drawer{r}
	w := &World{RootNamespace: "istio-system", TrustDomain: pick(d, "cluster.local", "td1"), TrustDomainAliases: pick(d, nil, []string{"old"})}
	for _, name := range namespaces {
		ns := &corev1.Namespace{}
		ns.Name, ns.Labels = name, d.waypointLabels(map[string]string{"istio.io/dataplane-mode": "ambient"})
		w.Namespaces = append(w.Namespaces, ns)
		s := &corev1.Service{ObjectMeta: d.meta("s", d.IntN(2))}
		s.Namespace, s.Labels = name, d.waypointLabels(map[string]string{})
		s.Spec.Selector = map[string]string{"app": pick(d, "x", "y")}
		s.Spec.ClusterIP = fmt.Sprintf("10.96.0.%d", len(w.Services)+1)
		s.Spec.Ports = []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(pick(d, int32(80), 8080))}}
		w.Services = append(w.Services, s)
	}
	for i := range 3 {
		p := &corev1.Pod{ObjectMeta: d.meta("pod", i)}
		p.Labels = d.waypointLabels(map[string]string{"app": pick(d, "x", "y")})
		p.Spec.NodeName, p.Spec.ServiceAccountName = "n", pick(d, accounts...)
		p.Status.Phase = corev1.PodRunning
		p.Status.PodIPs = []corev1.PodIP{{IP: fmt.Sprintf("10.0.0.%d", i+1)}, {IP: fmt.Sprintf("fd00::%d", i+1)}}
		w.Pods = append(w.Pods, p)
	}
	for i := range d.IntN(5) {
		w.Policies = append(w.Policies, d.policy(i))
	}
	for i := range pick(d, 0, 0, 1, 2, 3, 4) {
		w.Peers = append(w.Peers, d.peer(i))
	}
	return w
}

// Connect draws a connection to one of the world's pods.
func (w *World) Connect(r *rand.Rand) Connection {
	d := drawer{r}
	c := Connection{To: pick(d, w.Pods...), DestPort: pick(d, uint16(80), 8080, 9000)}
	c.DestIP = netip.MustParseAddr(pick(d, c.To.Status.PodIPs...).IP)
	c.SourceIP = netip.MustParseAddr(pick(d, "10.0.0.1", "10.0.0.7", "10.9.9.9", "192.0.2.1", "fd00::1", "fd01::1"))
	if !d.one(4) {
		c.TrustDomain, c.Namespace, c.ServiceAccount = pick(d, append(w.ours(), "td1", "td12", "foreign")...), pick(d, append([]string{"c"}, namespaces...)...), pick(d, append([]string{"w"}, accounts...)...)
	}
	return c
}
