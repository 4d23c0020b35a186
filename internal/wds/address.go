package wds

import (
	"slices"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/api/workload"
	"github.com/warrenmesh/warren/internal/mesh"
)

// What an absent field stands for.
const (
	defaultTrustDomain    = "cluster.local"
	defaultServiceAccount = "default"
)

// EncodeWorkload writes a workload; its resource name is the UID. The wire has one namespace for the workload
// and its identity.
func EncodeWorkload(w *mesh.Workload) *workload.Address {
	p := &workload.Workload{
		Uid:               w.UID,
		Name:              w.Name,
		Namespace:         w.Namespace,
		Addresses:         encodeAll(w.Addrs, encodeAddr),
		Hostname:          w.Hostname,
		Network:           w.Network,
		TunnelProtocol:    workload.TunnelProtocol(w.Tunnel),
		Waypoint:          encodeGateway(w.Waypoint),
		NetworkGateway:    encodeGateway(w.NetworkGateway),
		Node:              w.Node,
		CanonicalName:     w.CanonicalName,
		CanonicalRevision: w.CanonicalRevision,
		WorkloadType:      workload.WorkloadType(w.Kind),
		WorkloadName:      w.WorkloadName,
		NativeTunnel:      w.NativeTunnel,
		AuthorizationPolicies: encodeAll(w.Policies, func(n mesh.PolicyName) string {
			return n.String()
		}),
		ClusterId:  w.Cluster,
		Extensions: encodeAudits(w.Audits),
	}
	if w.Identity.TrustDomain != defaultTrustDomain {
		p.TrustDomain = w.Identity.TrustDomain
	}
	if w.Identity.ServiceAccount != defaultServiceAccount {
		p.ServiceAccount = w.Identity.ServiceAccount
	}
	if w.AppTunnel != (mesh.AppTunnel{}) {
		p.ApplicationTunnel = &workload.ApplicationTunnel{Port: uint32(w.AppTunnel.Port)}
		if w.AppTunnel.Proxy {
			p.ApplicationTunnel.Protocol = workload.ApplicationTunnel_PROXY
		}
	}
	if len(w.Services) > 0 {
		p.Services = make(map[string]*workload.PortList, len(w.Services))
		for name, ports := range w.Services {
			p.Services[name.String()] = &workload.PortList{Ports: encodeAll(ports, encodePort)}
		}
	}
	if !w.Healthy {
		p.Status = workload.WorkloadStatus_UNHEALTHY
	}
	if w.Locality != (mesh.Locality{}) {
		p.Locality = &workload.Locality{Region: w.Locality.Region, Zone: w.Locality.Zone, Subzone: w.Locality.Subzone}
	}
	if w.HostNetwork {
		p.NetworkMode = workload.NetworkMode_HOST_NETWORK
	}
	if w.Capacity != 0 {
		p.Capacity = wrapperspb.UInt32(w.Capacity)
	}
	return &workload.Address{Type: &workload.Address_Workload{Workload: p}}
}

// auditExtension has the audit policies of a workload. They are not among its other policies, because a reader
// that does not know AUDIT would miss them, and may refuse what has a policy it does not know.
const auditExtension = "warren.io/audit"

func encodeAudits(names []mesh.PolicyName) []*workload.Extension {
	if len(names) == 0 {
		return nil
	}
	config, err := anypb.New(&node.AuditPolicies{Names: encodeAll(names, mesh.PolicyName.String)})
	if err != nil { // it is a message of ours, with strings that came out of one
		return nil
	}
	return []*workload.Extension{{Name: auditExtension, Config: config}}
}

func decodeAudits(list []*workload.Extension) ([]mesh.PolicyName, error) {
	for _, ext := range list {
		if ext.GetName() != auditExtension {
			continue
		}
		var audits node.AuditPolicies
		if err := ext.GetConfig().UnmarshalTo(&audits); err != nil {
			return nil, bad("the extension %s: %w", auditExtension, err)
		}
		return decodeAll(audits.Names, ParsePolicyName)
	}
	return nil, nil
}

// visibilityExtension has the namespaces that know a service, where these are others than its own, for which there is a field. A reader
// that does not know it takes the service to be for all.
const visibilityExtension = "warren.io/visible-in"

func encodeVisibility(s *mesh.Service) (workload.Service_Visibility, []*workload.Extension) {
	switch {
	case !s.Limited():
		return workload.Service_PUBLIC, nil
	case slices.Equal(s.VisibleIn, []string{s.Name.Namespace}):
		return workload.Service_NAMESPACE, nil
	}
	list := &structpb.ListValue{Values: encodeAll(s.VisibleIn, structpb.NewStringValue)}
	config, err := anypb.New(list)
	if err != nil { // names of namespaces are ASCII
		return workload.Service_NAMESPACE, nil
	}
	return workload.Service_PUBLIC, []*workload.Extension{{Name: visibilityExtension, Config: config}}
}

// decodeVisibility returns the namespaces that know a service; nil for all.
func decodeVisibility(list []*workload.Extension) ([]string, error) {
	for _, ext := range list {
		if ext.GetName() != visibilityExtension {
			continue
		}
		var names structpb.ListValue
		if err := ext.GetConfig().UnmarshalTo(&names); err != nil {
			return nil, bad("the extension %s: %w", visibilityExtension, err)
		}
		out := make([]string, 0, len(names.Values))
		for _, v := range names.Values {
			if _, ok := v.GetKind().(*structpb.Value_StringValue); !ok {
				return nil, bad("the extension %s: %v is no name", visibilityExtension, v)
			}
			out = append(out, v.GetStringValue())
		}
		return out, nil
	}
	return nil, nil
}

// EncodeService writes a service; its resource name is Name.String().
func EncodeService(s *mesh.Service) *workload.Address {
	p := &workload.Service{
		Name:               s.Short,
		Namespace:          s.Name.Namespace,
		Hostname:           s.Name.Hostname,
		Ports:              encodeAll(s.Ports, encodePort),
		SubjectAltNames:    s.SANs,
		Waypoint:           encodeGateway(s.Waypoint),
		IngressUseWaypoint: s.IngressUseWaypoint,
		Canonical:          s.Canonical,
	}
	var has4, has6 bool
	for _, vip := range s.VIPs {
		p.Addresses = append(p.Addresses, encodeNetAddr(vip))
		has4, has6 = has4 || vip.Addr.Is4(), has6 || vip.Addr.Is6()
	}
	for _, n := range s.VIPNets {
		length := uint32(n.Prefix.Bits())
		p.Addresses = append(p.Addresses, &workload.NetworkAddress{
			Network: n.Network, Address: encodeAddr(n.Prefix.Addr()), Length: &length,
		})
	}
	switch {
	case has4 && has6:
		p.IpFamilies = workload.IPFamilies_DUAL
	case has4:
		p.IpFamilies = workload.IPFamilies_IPV4_ONLY
	case has6:
		p.IpFamilies = workload.IPFamilies_IPV6_ONLY
	}
	if !s.LB.Equal(mesh.LoadBalancing{}) {
		lb := &workload.LoadBalancing{
			RoutingPreference: encodeAll(s.LB.Prefer, func(x mesh.LBScope) workload.LoadBalancing_Scope {
				return workload.LoadBalancing_Scope(x)
			}),
			Mode: workload.LoadBalancing_Mode(s.LB.Mode),
		}
		if s.LB.AllowUnhealthy {
			lb.HealthPolicy = workload.LoadBalancing_ALLOW_ALL
		}
		p.LoadBalancing = lb
	}
	p.Visibility, p.Extensions = encodeVisibility(s)
	return &workload.Address{Type: &workload.Address_Service{Service: p}}
}

func encodeGateway(g *mesh.Gateway) *workload.GatewayAddress {
	if g == nil {
		return nil
	}
	p := &workload.GatewayAddress{HboneMtlsPort: uint32(g.HBONEPort)}
	if g.Service != (mesh.ServiceName{}) {
		p.Destination = &workload.GatewayAddress_Hostname{Hostname: &workload.NamespacedHostname{
			Namespace: g.Service.Namespace, Hostname: g.Service.Hostname,
		}}
	} else {
		p.Destination = &workload.GatewayAddress_Address{Address: encodeNetAddr(g.Addr)}
	}
	return p
}

func encodeNetAddr(a mesh.NetAddr) *workload.NetworkAddress {
	return &workload.NetworkAddress{Network: a.Network, Address: encodeAddr(a.Addr)}
}

func encodePort(p mesh.ServicePort) *workload.Port {
	return &workload.Port{
		ServicePort: uint32(p.Port), TargetPort: uint32(p.Target), AppProtocol: workload.AppProtocol(p.App),
	}
}

// DecodeAddress reads a workload or a service; the other one is nil.
func DecodeAddress(a *workload.Address) (*mesh.Workload, *mesh.Service, error) {
	switch t := a.GetType().(type) {
	case *workload.Address_Workload:
		w, err := decodeWorkload(t.Workload)
		return w, nil, err
	case *workload.Address_Service:
		s, err := decodeService(t.Service)
		return nil, s, err
	default:
		return nil, nil, bad("an address that is neither workload nor service")
	}
}

func decodeWorkload(p *workload.Workload) (*mesh.Workload, error) {
	if p.GetUid() == "" {
		return nil, bad("a workload without a uid")
	}
	w := &mesh.Workload{
		UID: p.Uid, Name: p.Name, Namespace: p.Namespace, Cluster: p.ClusterId, Network: p.Network,
		Hostname: p.Hostname, NativeTunnel: p.NativeTunnel, Node: p.Node,
		CanonicalName: p.CanonicalName, CanonicalRevision: p.CanonicalRevision, WorkloadName: p.WorkloadName,
		Capacity: p.Capacity.GetValue(),
		Identity: mesh.Identity{
			TrustDomain: p.TrustDomain, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount,
		},
		Locality: mesh.Locality{
			Region: p.Locality.GetRegion(), Zone: p.Locality.GetZone(), Subzone: p.Locality.GetSubzone(),
		},
	}
	if w.Identity.TrustDomain == "" {
		w.Identity.TrustDomain = defaultTrustDomain
	}
	if w.Identity.ServiceAccount == "" {
		w.Identity.ServiceAccount = defaultServiceAccount
	}
	if w.Namespace == "" {
		w.Identity = mesh.Identity{} // nobody has an identity outside of a namespace
	} else if _, err := mesh.ParseIdentity(w.Identity.String()); err != nil {
		return nil, bad("%w", err)
	}
	var err error
	if w.Addrs, err = decodeAll(p.Addresses, decodeAddr); err != nil {
		return nil, err
	}
	switch p.TunnelProtocol {
	case workload.TunnelProtocol_NONE, workload.TunnelProtocol_LEGACY_ISTIO_MTLS:
	case workload.TunnelProtocol_HBONE:
		w.Tunnel = mesh.TunnelHBONE
	default:
		return nil, bad("the tunnel protocol %d", p.TunnelProtocol)
	}
	switch p.WorkloadType {
	case workload.WorkloadType_DEPLOYMENT, workload.WorkloadType_CRONJOB, workload.WorkloadType_POD, workload.WorkloadType_JOB:
		w.Kind = mesh.WorkloadKind(p.WorkloadType)
	default: // only a label of metrics: a kind of a later version is no reason to go without the workload
		w.Kind = mesh.KindPod
	}
	switch p.Status {
	case workload.WorkloadStatus_HEALTHY:
		w.Healthy = true
	case workload.WorkloadStatus_UNHEALTHY:
	default:
		return nil, bad("the status %d", p.Status)
	}
	switch p.NetworkMode {
	case workload.NetworkMode_STANDARD:
	case workload.NetworkMode_HOST_NETWORK:
		w.HostNetwork = true
	default:
		return nil, bad("the network mode %d", p.NetworkMode)
	}
	if t := p.ApplicationTunnel; t != nil {
		if w.AppTunnel.Port, err = decodePort(t.Port); err != nil {
			return nil, err
		}
		switch t.Protocol {
		case workload.ApplicationTunnel_NONE:
		case workload.ApplicationTunnel_PROXY:
			w.AppTunnel.Proxy = true
		default:
			return nil, bad("the application tunnel %d", t.Protocol)
		}
	}
	if len(p.Services) > 0 {
		w.Services = make(map[mesh.ServiceName][]mesh.ServicePort, len(p.Services))
		for key, list := range p.Services {
			name, err := ParseServiceName(key)
			if err != nil {
				return nil, err
			}
			if w.Services[name], err = decodeAll(list.GetPorts(), decodeServicePort); err != nil {
				return nil, err
			}
		}
	}
	if w.Policies, err = decodeAll(p.AuthorizationPolicies, ParsePolicyName); err != nil {
		return nil, err
	}
	if w.Audits, err = decodeAudits(p.Extensions); err != nil {
		return nil, err
	}
	if w.Waypoint, err = decodeGateway(p.Waypoint); err != nil {
		return nil, err
	}
	if w.NetworkGateway, err = decodeGateway(p.NetworkGateway); err != nil {
		return nil, err
	}
	return w, nil
}

func decodeService(p *workload.Service) (*mesh.Service, error) {
	s := &mesh.Service{
		Name:  mesh.ServiceName{Namespace: p.GetNamespace(), Hostname: p.GetHostname()},
		Short: p.GetName(), SANs: p.GetSubjectAltNames(),
		IngressUseWaypoint: p.GetIngressUseWaypoint(), Canonical: p.GetCanonical(),
	}
	if _, err := ParseServiceName(s.Name.String()); err != nil {
		return nil, err
	}
	if len(s.SANs) == 0 {
		s.SANs = nil
	}
	for _, a := range p.Addresses {
		addr, err := decodeAddr(a.GetAddress())
		if err != nil {
			return nil, err
		}
		if a.Length == nil || int(*a.Length) == addr.BitLen() {
			s.VIPs = append(s.VIPs, mesh.NetAddr{Network: a.Network, Addr: addr})
			continue
		}
		prefix, err := decodePrefix(a.Address, *a.Length)
		if err != nil {
			return nil, err
		}
		s.VIPNets = append(s.VIPNets, mesh.NetPrefix{Network: a.Network, Prefix: prefix})
	}
	var err error
	if s.Ports, err = decodeAll(p.Ports, decodeServicePort); err != nil {
		return nil, err
	}
	if s.Waypoint, err = decodeGateway(p.Waypoint); err != nil {
		return nil, err
	}
	if s.VisibleIn, err = decodeVisibility(p.Extensions); err != nil {
		return nil, err
	}
	switch p.Visibility {
	case workload.Service_PUBLIC:
	case workload.Service_NAMESPACE:
		s.VisibleIn = []string{s.Name.Namespace}
	default:
		return nil, bad("the visibility %d", p.Visibility)
	}
	if lb := p.LoadBalancing; lb != nil {
		s.LB.Prefer, err = decodeAll(lb.RoutingPreference, func(x workload.LoadBalancing_Scope) (mesh.LBScope, error) {
			if x < 0 || x > workload.LoadBalancing_NETWORK {
				return 0, bad("the routing scope %d", x)
			}
			return mesh.LBScope(x), nil
		})
		if err != nil {
			return nil, err
		}
		if lb.Mode < 0 || lb.Mode > workload.LoadBalancing_PASSTHROUGH {
			return nil, bad("the load balancing mode %d", lb.Mode)
		}
		s.LB.Mode = mesh.LBMode(lb.Mode)
		switch lb.HealthPolicy {
		case workload.LoadBalancing_ONLY_HEALTHY:
		case workload.LoadBalancing_ALLOW_ALL:
			s.LB.AllowUnhealthy = true
		default:
			return nil, bad("the health policy %d", lb.HealthPolicy)
		}
	}
	return s, nil
}

func decodeServicePort(p *workload.Port) (mesh.ServicePort, error) {
	port, err := decodePort(p.GetServicePort())
	if err != nil {
		return mesh.ServicePort{}, err
	}
	target, err := decodePort(p.GetTargetPort())
	if err != nil {
		return mesh.ServicePort{}, err
	}
	sp := mesh.ServicePort{Port: port, Target: target}
	if p.AppProtocol >= 0 && p.AppProtocol <= workload.AppProtocol_TLS {
		sp.App = mesh.AppProtocol(p.AppProtocol) // a later one is not known, and that is a value
	}
	return sp, nil
}

func decodeGateway(p *workload.GatewayAddress) (*mesh.Gateway, error) {
	if p == nil {
		return nil, nil
	}
	port, err := decodePort(p.HboneMtlsPort)
	if err != nil {
		return nil, err
	}
	g := &mesh.Gateway{HBONEPort: port}
	switch d := p.Destination.(type) {
	case *workload.GatewayAddress_Hostname:
		g.Service = mesh.ServiceName{Namespace: d.Hostname.GetNamespace(), Hostname: d.Hostname.GetHostname()}
		if _, err := ParseServiceName(g.Service.String()); err != nil {
			return nil, err
		}
	case *workload.GatewayAddress_Address:
		addr, err := decodeAddr(d.Address.GetAddress())
		if err != nil {
			return nil, err
		}
		g.Addr = mesh.NetAddr{Network: d.Address.GetNetwork(), Addr: addr}
	default:
		return nil, bad("a gateway without a destination")
	}
	return g, nil
}
