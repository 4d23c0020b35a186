package index

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

const annotationTrafficDistribution = "networking.istio.io/traffic-distribution"

// serviceFact is what the mesh needs of a Service, or of one host of a ServiceEntry.
type serviceFact struct {
	owner    owner
	created  metav1.Time
	service  mesh.Service      // complete but for what the namespace adds (finish)
	ports    []portFact        // as many as service.Ports
	selector map[string]string // of workloads; empty: none is selected
	spread   distribution      // trafficDistribution of the object itself
	local    bool              // internalTrafficPolicy: Local
	fixedLB  bool              // resolution NONE: passthrough whatever the annotations say

	waypoint     key // asked for by labels; the zero key where it wants none
	waypointSaid bool
	ingressUses  string // whether gateways send by the waypoint; "" where that is left to the namespace
	managed      bool   // made for a Gateway: a waypoint's own
}

// portFact is how a service port finds its target on one endpoint.
type portFact struct {
	name   string // of the service port
	target string // named target port; "" where it is a number
}

// owner is the object a service was declared by.
type owner struct {
	entry bool // ServiceEntry rather than Service
	key
}

// distribution is trafficDistribution.
type distribution uint8

const (
	spreadUnset distribution = iota
	spreadAny
	spreadZone
	spreadNode
)

func distributionOf(v string) distribution {
	switch strings.ToLower(v) {
	case "":
		return spreadUnset
	case "preferclose", "prefersamezone":
		return spreadZone
	case "prefersamenode":
		return spreadNode
	}
	return spreadAny
}

// serviceFactOf returns nil for an ExternalName: it has no address of its own, so nothing can be captured.
func (c *compiled) serviceFactOf(s *corev1.Service) *serviceFact {
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return nil
	}
	f := &serviceFact{
		owner:    owner{key: keyOf(s)},
		created:  s.CreationTimestamp,
		selector: s.Spec.Selector,
		spread:   distributionOf(s.Annotations[annotationTrafficDistribution]),
		local:    s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
	}
	f.waypoint, f.waypointSaid = waypointOf(s.Labels, s.Namespace)
	f.ingressUses = s.Labels[labelIngressUses]
	f.managed = s.Labels[labelManaged] != ""
	if s.Spec.TrafficDistribution != nil {
		if d := distributionOf(*s.Spec.TrafficDistribution); d != spreadAny {
			f.spread = d
		}
	}
	f.service = mesh.Service{
		Name:      c.serviceName(keyOf(s)),
		Short:     s.Name,
		Canonical: true,
	}
	f.service.LB.AllowUnhealthy = s.Spec.PublishNotReadyAddresses
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip); err == nil { // "None" and "" are no addresses
			f.service.VIPs = append(f.service.VIPs, mesh.NetAddr{Network: c.Network, Addr: a.Unmap()})
		}
	}
	for _, p := range s.Spec.Ports {
		if p.Protocol != "" && p.Protocol != corev1.ProtocolTCP {
			continue
		}
		name := p.Name
		if p.AppProtocol != nil {
			name = *p.AppProtocol
		}
		f.service.Ports = append(f.service.Ports, mesh.ServicePort{
			Port:   uint16(p.Port),
			Target: uint16(p.TargetPort.IntVal),
			App:    appProtocolOf(uint16(p.Port), name),
		})
		f.ports = append(f.ports, portFact{name: p.Name, target: p.TargetPort.StrVal})
	}
	return f
}

// ServiceName is what the mesh calls a Kubernetes Service.
func (c Config) ServiceName(namespace, name string) mesh.ServiceName {
	return mesh.ServiceName{Namespace: namespace, Hostname: name + "." + namespace + ".svc." + c.ClusterDomain}
}

func (c *compiled) serviceName(k key) mesh.ServiceName { return c.ServiceName(k.Namespace, k.Name) }

// wellKnownTCP are ports where the server may speak first, so that they are TCP unless declared otherwise.
var wellKnownTCP = []uint16{25, 3306, 27017, 6379, 9042, 5432}

// appProtocolOf reads Kubernetes' appProtocol values and Istio's port name prefixes.
func appProtocolOf(port uint16, name string) mesh.AppProtocol {
	switch name {
	case "kubernetes.io/h2c":
		return mesh.AppHTTP2
	case "kubernetes.io/ws":
		return mesh.AppHTTP1
	case "kubernetes.io/wss":
		return mesh.AppTLS
	}
	name = strings.ToLower(name)
	if strings.HasPrefix(name, "grpc-web") {
		return mesh.AppUnknown // HTTP/1 or 2: left to sniffing
	}
	prefix, _, _ := strings.Cut(name, "-")
	switch prefix {
	case "http":
		return mesh.AppHTTP1
	case "http2":
		return mesh.AppHTTP2
	case "grpc":
		return mesh.AppGRPC
	case "tls", "https":
		return mesh.AppTLS
	case "tcp", "mongo", "mysql", "redis":
		return mesh.AppTCP
	}
	if slices.Contains(wellKnownTCP, port) {
		return mesh.AppTCP
	}
	return mesh.AppUnknown
}

// finish adds what the namespace says to a service of its own.
func (f *serviceFact) finish(ns *namespaceFact) *mesh.Service {
	s := f.service
	uses := f.ingressUses
	if uses == "" && ns != nil {
		uses = ns.labels[labelIngressUses]
	}
	s.IngressUseWaypoint = uses == "true"
	if f.fixedLB {
		return &s
	}
	if f.local {
		s.LB.Prefer, s.LB.Mode = []mesh.LBScope{mesh.ScopeNode}, mesh.LBStrict
		return &s
	}
	spread := f.spread
	if spread == spreadUnset && ns != nil {
		spread = distributionOf(ns.trafficDistribution)
	}
	switch spread {
	case spreadZone:
		s.LB.Mode = mesh.LBFailover
		s.LB.Prefer = []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone}
	case spreadNode:
		s.LB.Mode = mesh.LBFailover
		s.LB.Prefer = []mesh.LBScope{mesh.ScopeNetwork, mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeSubzone, mesh.ScopeNode}
	}
	return &s
}

// portsOn resolves the service's ports on a pod. A named port that the pod does not have is left out.
func (f *serviceFact) portsOn(p *podFact) []mesh.ServicePort {
	return f.resolvePorts(func(port portFact, target uint16) (uint16, bool) {
		if port.target != "" {
			return p.namedPort(port.target)
		}
		if f.owner.entry {
			if t, ok := p.namedPort(port.name); ok {
				return t, true
			}
		}
		return target, true
	})
}

// portsOnEntry resolves the service's ports on an endpoint that lists its ports by name.
func (f *serviceFact) portsOnEntry(named map[string]uint32) []mesh.ServicePort {
	return f.resolvePorts(func(port portFact, target uint16) (uint16, bool) {
		if port.target != "" {
			t, ok := named[port.target]
			return uint16(t), ok
		}
		if t, ok := named[port.name]; ok {
			return uint16(t), true
		}
		return target, true
	})
}

// portsOnSlice resolves the service's ports on the endpoints of a slice.
func (f *serviceFact) portsOnSlice(s *sliceFact) []mesh.ServicePort {
	return f.resolvePorts(func(port portFact, _ uint16) (uint16, bool) {
		t, ok := s.ports[port.name]
		return t, ok
	})
}

func (f *serviceFact) resolvePorts(target func(portFact, uint16) (uint16, bool)) []mesh.ServicePort {
	out := make([]mesh.ServicePort, 0, len(f.ports))
	for i, p := range f.service.Ports {
		if t, ok := target(f.ports[i], p.Target); ok && t != 0 {
			out = append(out, mesh.ServicePort{Port: p.Port, Target: t, App: p.App})
		}
	}
	return out
}

// entryFact is what the mesh needs of a ServiceEntry.
type entryFact struct {
	key
	labels    map[string]string
	hosts     []*serviceFact // one to a host
	endpoints []*endpointFact
	implicit  bool // endpoints are the hosts themselves, by DNS
	uid       string
	problems  []string // what of it is not followed
}

// endpointFact is a WorkloadEntry, or an endpoint written inside a ServiceEntry.
type endpointFact struct {
	key
	created        metav1.Time
	labels         map[string]string
	addr           netip.Addr // invalid where the address is a name
	hostname       string
	ports          map[string]uint32
	network        string
	serviceAccount string
	locality       mesh.Locality
	weight         uint32
	tunnel         bool // networking.istio.io/tunnel=http: speaks HBONE itself
	redirected     bool
}

func (c *compiled) entryFactOf(e *networkingv1.ServiceEntry) *entryFact {
	f := &entryFact{key: keyOf(e), uid: string(e.UID), labels: e.Labels}
	spec := &e.Spec
	template := serviceFact{
		owner:   owner{entry: true, key: f.key},
		created: e.CreationTimestamp,
		spread:  distributionOf(e.Annotations[annotationTrafficDistribution]),
	}
	template.waypoint, template.waypointSaid = waypointOf(e.Labels, e.Namespace)
	template.ingressUses = e.Labels[labelIngressUses]
	if spec.WorkloadSelector != nil {
		template.selector = spec.WorkloadSelector.Labels
	}
	template.service = mesh.Service{Short: e.Name, SANs: spec.SubjectAltNames, VisibleIn: visibleIn(spec.ExportTo, e.Namespace)}
	template.service.Name.Namespace = e.Namespace
	for _, p := range spec.Ports {
		if p.Number == 0 || p.Number > 65535 || strings.EqualFold(p.Protocol, "UDP") {
			continue
		}
		target := p.TargetPort
		if target == 0 || target > 65535 {
			target = p.Number
		}
		template.service.Ports = append(template.service.Ports, mesh.ServicePort{
			Port: uint16(p.Number), Target: uint16(target), App: appProtocolOf(uint16(p.Number), p.Protocol),
		})
		template.ports = append(template.ports, portFact{name: p.Name})
	}
	template.service.Dynamic = spec.Resolution == networkingv1alpha3.ServiceEntry_DYNAMIC_DNS
	template.service.OneAddress = spec.Resolution == networkingv1alpha3.ServiceEntry_DNS_ROUND_ROBIN
	if spec.Resolution == networkingv1alpha3.ServiceEntry_NONE {
		template.fixedLB = true
		template.service.LB = mesh.LoadBalancing{Mode: mesh.LBPassthrough, AllowUnhealthy: true}
	}
	var vips []mesh.NetAddr
	var nets []mesh.NetPrefix
	for _, a := range spec.Addresses {
		if p, err := netip.ParsePrefix(a); err == nil && !p.IsSingleIP() {
			nets = append(nets, mesh.NetPrefix{Network: c.Network, Prefix: p.Masked()})
		} else if err == nil {
			vips = append(vips, mesh.NetAddr{Network: c.Network, Addr: p.Addr().Unmap()})
		} else if ip, err := netip.ParseAddr(a); err == nil {
			vips = append(vips, mesh.NetAddr{Network: c.Network, Addr: ip.Unmap()})
		}
	}
	for _, host := range spec.Hosts {
		h := template
		h.service.Name.Hostname = host
		h.service.VIPs, h.service.VIPNets = vips, nets
		if len(vips) == 0 && len(nets) == 0 && spec.Resolution != networkingv1alpha3.ServiceEntry_NONE {
			for _, assigned := range e.Status.Addresses { // allocated by a controller
				if ip, err := netip.ParseAddr(assigned.Value); err == nil && assigned.Host == host {
					h.service.VIPs = append(h.service.VIPs, mesh.NetAddr{Network: c.Network, Addr: ip.Unmap()})
				}
			}
		}
		f.hosts = append(f.hosts, &h)
	}
	f.problems = entryProblems(spec)
	for _, w := range spec.Endpoints {
		ep := c.endpointFactOf(key{e.Namespace, e.Name}, w, w.Labels, nil)
		ep.created = e.CreationTimestamp
		f.endpoints = append(f.endpoints, ep)
	}
	byName := spec.Resolution == networkingv1alpha3.ServiceEntry_DNS || spec.Resolution == networkingv1alpha3.ServiceEntry_DNS_ROUND_ROBIN
	f.implicit = len(f.endpoints) == 0 && byName && spec.WorkloadSelector == nil
	return f
}

// visibleIn are the namespaces that exportTo of an object names, sorted; nil for all. "~" is none.
func visibleIn(exportTo []string, own string) []string {
	if len(exportTo) == 0 || slices.Contains(exportTo, "*") {
		return nil
	}
	out := []string{}
	for _, to := range exportTo {
		if to == "." {
			to = own
		}
		if to != "~" && !slices.Contains(out, to) {
			out = append(out, to)
		}
	}
	slices.Sort(out)
	return out
}

// entryProblems is what of a ServiceEntry is not followed, whatever else there is.
func entryProblems(spec *networkingv1alpha3.ServiceEntry) (out []string) {
	wild := slices.ContainsFunc(spec.Hosts, func(h string) bool { return strings.HasPrefix(h, "*") })
	switch spec.Resolution {
	case networkingv1alpha3.ServiceEntry_DYNAMIC_DNS:
		if len(spec.Endpoints) > 0 || spec.WorkloadSelector != nil {
			out = append(out, "endpoints and workloadSelector have no effect with resolution: DYNAMIC_DNS, by which requests go where the name that they are for leads")
		}
		for i, p := range spec.Ports {
			if appProtocolOf(uint16(p.Number), p.Protocol).HTTP() && p.TargetPort != 0 && p.TargetPort != p.Number {
				out = append(out, "requests to ports["+strconv.Itoa(i)+"] are answered with 403: with resolution: DYNAMIC_DNS the port is that of the name that they are for, and its targetPort is another")
			}
		}
	case networkingv1alpha3.ServiceEntry_DNS, networkingv1alpha3.ServiceEntry_DNS_ROUND_ROBIN:
		if wild && len(spec.Endpoints) == 0 && spec.WorkloadSelector == nil {
			out = append(out, "a host with a wildcard cannot be resolved: it has no endpoint; write endpoints, or the hosts that are meant")
		}
	}
	for i, a := range spec.Addresses {
		if _, err := netip.ParsePrefix(a); err != nil {
			if _, err := netip.ParseAddr(a); err != nil {
				out = append(out, "addresses["+strconv.Itoa(i)+"] is neither an address nor a range of them, and left out")
			}
		}
	}
	return out
}

func (c *compiled) workloadEntryFactOf(e *networkingv1.WorkloadEntry) *endpointFact {
	l := e.Labels
	if len(e.Spec.Labels) > 0 { // both places count, the spec wins
		l = make(map[string]string, len(e.Labels)+len(e.Spec.Labels))
		for k, v := range e.Labels {
			l[k] = v
		}
		for k, v := range e.Spec.Labels {
			l[k] = v
		}
	}
	f := c.endpointFactOf(keyOf(e), &e.Spec, l, e.Annotations)
	f.created = e.CreationTimestamp
	return f
}

func (c *compiled) endpointFactOf(k key, w *networkingv1alpha3.WorkloadEntry, l, annotations map[string]string) *endpointFact {
	f := &endpointFact{
		key: k, labels: l, ports: w.Ports, network: w.Network, serviceAccount: w.ServiceAccount, weight: w.Weight,
		tunnel:     l[labelTunnel] == "http",
		redirected: annotations[AnnotationRedirection] == RedirectionEnabled,
	}
	if f.network == "" {
		f.network = c.Network
	}
	if a, err := netip.ParseAddr(w.Address); err == nil {
		f.addr = a.Unmap().WithZone("")
	} else {
		f.hostname = w.Address
	}
	parts := strings.SplitN(w.Locality, "/", 3)
	for i, dst := range []*string{&f.locality.Region, &f.locality.Zone, &f.locality.Subzone} {
		if i < len(parts) {
			*dst = parts[i]
		}
	}
	return f
}
