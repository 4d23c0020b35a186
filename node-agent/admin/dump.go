package admin

import (
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/proxy"
)

// The types here are the JSON that ztunnel's /config_dump has and istioctl and Kiali read. Field names and
// enum spellings are theirs.

type workloadJSON struct {
	WorkloadIPs           []netip.Addr  `json:"workloadIps"`
	Waypoint              *gatewayJSON  `json:"waypoint,omitempty"`
	NetworkGateway        *gatewayJSON  `json:"networkGateway,omitempty"`
	Protocol              string        `json:"protocol"`
	NetworkMode           string        `json:"networkMode"`
	UID                   string        `json:"uid"`
	Name                  string        `json:"name"`
	Namespace             string        `json:"namespace"`
	TrustDomain           string        `json:"trustDomain,omitempty"`
	ServiceAccount        string        `json:"serviceAccount,omitempty"`
	Network               string        `json:"network,omitempty"`
	WorkloadName          string        `json:"workloadName,omitempty"`
	WorkloadType          string        `json:"workloadType,omitempty"`
	CanonicalName         string        `json:"canonicalName,omitempty"`
	CanonicalRevision     string        `json:"canonicalRevision,omitempty"`
	Hostname              string        `json:"hostname,omitempty"`
	Node                  string        `json:"node,omitempty"`
	NativeTunnel          bool          `json:"nativeTunnel,omitempty"`
	ApplicationTunnel     *tunnelJSON   `json:"applicationTunnel,omitempty"`
	AuthorizationPolicies []string      `json:"authorizationPolicies,omitempty"`
	Status                string        `json:"status"`
	ClusterID             string        `json:"clusterId"`
	Locality              *localityJSON `json:"locality,omitempty"`
	Services              []string      `json:"services,omitempty"`
	Capacity              uint32        `json:"capacity"`
	Revision              uint64        `json:"revision"`
}

type tunnelJSON struct {
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port,omitempty"`
}

type localityJSON struct {
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Subzone string `json:"subzone,omitempty"`
}

type gatewayJSON struct {
	Destination string `json:"destination"`
	HBONEPort   uint16 `json:"hboneMtlsPort"`
}

type serviceJSON struct {
	Name            string                   `json:"name"`
	Namespace       string                   `json:"namespace"`
	Hostname        string                   `json:"hostname"`
	VIPs            []string                 `json:"vips"`
	CIDRVIPs        []string                 `json:"cidrVips,omitempty"`
	Ports           map[string]uint16        `json:"ports"`
	Endpoints       map[string]*endpointJSON `json:"endpoints"`
	SubjectAltNames []string                 `json:"subjectAltNames"`
	Waypoint        *gatewayJSON             `json:"waypoint,omitempty"`
	LoadBalancer    *balancerJSON            `json:"loadBalancer,omitempty"`
	Canonical       bool                     `json:"canonical"`
	Revision        uint64                   `json:"revision"`
}

type endpointJSON struct {
	WorkloadUID string            `json:"workloadUid"`
	Port        map[string]uint16 `json:"port"`
	Status      string            `json:"status"`
}

type balancerJSON struct {
	RoutingPreferences []string `json:"routingPreferences"`
	Mode               string   `json:"mode"`
	HealthPolicy       string   `json:"healthPolicy"`
}

type policyJSON struct {
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Scope     string          `json:"scope"`
	Action    string          `json:"action"`
	Rules     [][][]matchJSON `json:"rules"`
	DryRun    bool            `json:"dryRun"`
	Revision  uint64          `json:"revision"`
}

type matchJSON struct {
	Namespaces          []map[string]any     `json:"namespaces,omitempty"`
	NotNamespaces       []map[string]any     `json:"notNamespaces,omitempty"`
	ServiceAccounts     []serviceAccountJSON `json:"serviceAccounts,omitempty"`
	NotServiceAccounts  []serviceAccountJSON `json:"notServiceAccounts,omitempty"`
	Principals          []map[string]any     `json:"principals,omitempty"`
	NotPrincipals       []map[string]any     `json:"notPrincipals,omitempty"`
	SourceIPs           []netip.Prefix       `json:"sourceIps,omitempty"`
	NotSourceIPs        []netip.Prefix       `json:"notSourceIps,omitempty"`
	DestinationIPs      []netip.Prefix       `json:"destinationIps,omitempty"`
	NotDestinationIPs   []netip.Prefix       `json:"notDestinationIps,omitempty"`
	DestinationPorts    []uint16             `json:"destinationPorts,omitempty"`
	NotDestinationPorts []uint16             `json:"notDestinationPorts,omitempty"`
}

type serviceAccountJSON struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

type certsJSON struct {
	Identity  string     `json:"identity"`
	State     string     `json:"state"`
	CertChain []certJSON `json:"certChain"`
	RootCerts []certJSON `json:"rootCerts"`
}

type certJSON struct {
	PEM            string `json:"pem"` // base64 of the PEM text
	SerialNumber   string `json:"serialNumber"`
	ValidFrom      string `json:"validFrom"`
	ExpirationTime string `json:"expirationTime"`
}

type workloadStateJSON struct {
	State       string          `json:"state"`
	Connections connectionsJSON `json:"connections"`
	Info        infoJSON        `json:"info"`
}

type infoJSON struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	TrustDomain    string `json:"trustDomain"`
	ServiceAccount string `json:"serviceAccount"`
}

type connectionsJSON struct {
	Inbound  []connJSON `json:"inbound"`
	Outbound []connJSON `json:"outbound"`
}

type connJSON struct {
	Src         string    `json:"src"`
	OriginalDst string    `json:"originalDst"`
	ActualDst   string    `json:"actualDst"`
	Protocol    string    `json:"protocol"`
	Peer        string    `json:"peer,omitempty"`
	Workload    string    `json:"workload,omitempty"`
	Since       time.Time `json:"since"`
}

func (s *Server) dump() map[string]any {
	snap := s.cfg.Store.Load()
	d := map[string]any{}
	if s.cfg.Extra != nil {
		for k, v := range s.cfg.Extra() {
			d[k] = v
		}
	}
	d["workloads"] = workloads(snap)
	d["services"] = services(snap)
	d["policies"] = policies(snap)
	d["certificates"] = s.certificates()
	d["config"] = s.cfg.Settings
	d["version"] = map[string]string{"version": s.cfg.Version}
	d["workloadState"] = s.workloadState()
	d["revision"] = snap.Revision()
	return d
}

func workloads(snap *mesh.Snapshot) []workloadJSON {
	out := []workloadJSON{}
	for w := range snap.Workloads() {
		j := workloadJSON{
			WorkloadIPs: w.Addrs, Waypoint: gateway(w.Waypoint), NetworkGateway: gateway(w.NetworkGateway),
			Protocol: "TCP", NetworkMode: "Standard", UID: w.UID, Name: w.Name, Namespace: w.Namespace,
			TrustDomain: w.Identity.TrustDomain, ServiceAccount: w.Identity.ServiceAccount, Network: w.Network,
			WorkloadName: w.WorkloadName, WorkloadType: kinds[w.Kind], CanonicalName: w.CanonicalName,
			CanonicalRevision: w.CanonicalRevision, Hostname: w.Hostname, Node: w.Node, NativeTunnel: w.NativeTunnel,
			Status: health(w.Healthy), ClusterID: w.Cluster, Capacity: max(w.Capacity, 1), Revision: w.Revision,
		}
		if j.WorkloadIPs == nil {
			j.WorkloadIPs = []netip.Addr{}
		}
		if w.Tunnel == mesh.TunnelHBONE {
			j.Protocol = "HBONE"
		}
		if w.HostNetwork {
			j.NetworkMode = "HostNetwork"
		}
		if w.AppTunnel != (mesh.AppTunnel{}) {
			j.ApplicationTunnel = &tunnelJSON{Protocol: "NONE", Port: w.AppTunnel.Port}
			if w.AppTunnel.Proxy {
				j.ApplicationTunnel.Protocol = "PROXY"
			}
		}
		if w.Locality != (mesh.Locality{}) {
			j.Locality = &localityJSON{w.Locality.Region, w.Locality.Zone, w.Locality.Subzone}
		}
		for _, p := range w.Policies {
			j.AuthorizationPolicies = append(j.AuthorizationPolicies, p.String())
		}
		for n := range w.Services {
			j.Services = append(j.Services, n.String())
		}
		slices.Sort(j.Services)
		out = append(out, j)
	}
	slices.SortFunc(out, func(a, b workloadJSON) int { return cmp.Compare(a.UID, b.UID) })
	return out
}

var kinds = map[mesh.WorkloadKind]string{
	mesh.KindDeployment: "deployment", mesh.KindCronJob: "cronjob", mesh.KindPod: "pod", mesh.KindJob: "job",
}

func health(ok bool) string {
	if ok {
		return "Healthy"
	}
	return "Unhealthy"
}

func gateway(g *mesh.Gateway) *gatewayJSON {
	if g == nil {
		return nil
	}
	d := g.Addr.Network + "/" + g.Addr.Addr.String()
	if g.Service != (mesh.ServiceName{}) {
		d = g.Service.String()
	}
	return &gatewayJSON{Destination: d, HBONEPort: g.HBONEPort}
}

func ports(ps []mesh.ServicePort) map[string]uint16 {
	m := map[string]uint16{}
	for _, p := range ps {
		m[strconv.Itoa(int(p.Port))] = p.Target
	}
	return m
}

var (
	scopes = map[mesh.LBScope]string{mesh.ScopeRegion: "Region", mesh.ScopeZone: "Zone", mesh.ScopeSubzone: "Subzone",
		mesh.ScopeNode: "Node", mesh.ScopeCluster: "Cluster", mesh.ScopeNetwork: "Network"}
	modes = map[mesh.LBMode]string{mesh.LBUnspecified: "Standard", mesh.LBStrict: "Strict",
		mesh.LBFailover: "Failover", mesh.LBPassthrough: "Passthrough"}
)

func services(snap *mesh.Snapshot) []serviceJSON {
	out := []serviceJSON{}
	for svc := range snap.Services() {
		j := serviceJSON{
			Name: svc.Short, Namespace: svc.Name.Namespace, Hostname: svc.Name.Hostname, VIPs: []string{},
			Ports: ports(svc.Ports), Endpoints: map[string]*endpointJSON{}, SubjectAltNames: svc.SANs,
			Waypoint: gateway(svc.Waypoint), Canonical: svc.Canonical, Revision: svc.Revision,
		}
		if j.SubjectAltNames == nil {
			j.SubjectAltNames = []string{}
		}
		for _, v := range svc.VIPs {
			j.VIPs = append(j.VIPs, v.Network+"/"+v.Addr.String())
		}
		for _, v := range svc.VIPNets {
			j.CIDRVIPs = append(j.CIDRVIPs, v.Network+"/"+v.Prefix.String())
		}
		for w, ps := range snap.Endpoints(svc.Name) {
			j.Endpoints[w.UID] = &endpointJSON{WorkloadUID: w.UID, Port: ports(ps), Status: health(w.Healthy)}
		}
		if lb := svc.LB; lb.Mode != mesh.LBUnspecified || len(lb.Prefer) > 0 || lb.AllowUnhealthy {
			j.LoadBalancer = &balancerJSON{RoutingPreferences: []string{}, Mode: modes[lb.Mode], HealthPolicy: "OnlyHealthy"}
			for _, p := range lb.Prefer {
				j.LoadBalancer.RoutingPreferences = append(j.LoadBalancer.RoutingPreferences, scopes[p])
			}
			if lb.AllowUnhealthy {
				j.LoadBalancer.HealthPolicy = "AllowAll"
			}
		}
		out = append(out, j)
	}
	slices.SortFunc(out, func(a, b serviceJSON) int {
		return cmp.Or(cmp.Compare(a.Hostname, b.Hostname), cmp.Compare(a.Namespace, b.Namespace))
	})
	return out
}

func policies(snap *mesh.Snapshot) []policyJSON {
	out := []policyJSON{}
	for p := range snap.Policies() {
		j := policyJSON{Name: p.Name.Name, Namespace: p.Name.Namespace, DryRun: p.DryRun, Revision: p.Revision, Rules: [][][]matchJSON{},
			Scope:  [...]string{"Global", "Namespace", "WorkloadSelector"}[p.Scope],
			Action: [...]string{"Allow", "Deny", "Audit"}[p.Action]}
		for _, r := range p.Rules {
			clauses := [][]matchJSON{}
			for _, c := range r.Clauses {
				matches := []matchJSON{}
				for _, m := range c.Matches {
					matches = append(matches, matchJSON{
						Namespaces: strs(m.Namespaces), NotNamespaces: strs(m.NotNamespaces),
						ServiceAccounts: accounts(m.ServiceAccounts), NotServiceAccounts: accounts(m.NotServiceAccounts),
						Principals: strs(m.Principals), NotPrincipals: strs(m.NotPrincipals),
						SourceIPs: m.SourceIPs, NotSourceIPs: m.NotSourceIPs,
						DestinationIPs: m.DestinationIPs, NotDestinationIPs: m.NotDestinationIPs,
						DestinationPorts: m.DestinationPorts, NotDestinationPorts: m.NotDestinationPorts,
					})
				}
				clauses = append(clauses, matches)
			}
			j.Rules = append(j.Rules, clauses)
		}
		out = append(out, j)
	}
	slices.SortFunc(out, func(a, b policyJSON) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

func strs(ms []mesh.StringMatch) []map[string]any {
	var out []map[string]any
	for _, m := range ms {
		if m.Kind == mesh.MatchPresence {
			out = append(out, map[string]any{"Presence": []string{}})
			continue
		}
		out = append(out, map[string]any{[...]string{"Exact", "Prefix", "Suffix"}[m.Kind]: m.Value})
	}
	return out
}

func accounts(ms []mesh.ServiceAccountMatch) []serviceAccountJSON {
	var out []serviceAccountJSON
	for _, m := range ms {
		out = append(out, serviceAccountJSON{m.Namespace, m.ServiceAccount})
	}
	return out
}

func (s *Server) certificates() []certsJSON {
	out := []certsJSON{}
	for _, b := range s.cfg.Certificates() {
		c := certsJSON{Identity: b.ID.String(), State: state(b), CertChain: []certJSON{}, RootCerts: []certJSON{}}
		for _, der := range b.Chain() {
			if x, err := x509.ParseCertificate(der); err == nil {
				c.CertChain = append(c.CertChain, cert(x))
			}
		}
		for _, x := range b.Roots() {
			c.RootCerts = append(c.RootCerts, cert(x))
		}
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b certsJSON) int { return cmp.Compare(a.Identity, b.Identity) })
	return out
}

func state(b *identity.Bundle) string {
	if b.Valid(time.Now()) {
		return "Available"
	}
	return "Unavailable: expired"
}

func cert(x *x509.Certificate) certJSON {
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: x.Raw})
	return certJSON{
		PEM: base64.StdEncoding.EncodeToString(text), SerialNumber: x.SerialNumber.String(),
		ValidFrom: x.NotBefore.UTC().Format(time.RFC3339), ExpirationTime: x.NotAfter.UTC().Format(time.RFC3339),
	}
}

func connection(c proxy.ConnInfo) connJSON {
	return connJSON{Src: addr(c.Src), OriginalDst: addr(c.OriginalDst), ActualDst: addr(c.ActualDst), Protocol: c.Protocol,
		Peer: c.Peer.String(), Workload: c.Pod, Since: c.Since}
}

func addr(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func (s *Server) connections() connectionsJSON {
	out := connectionsJSON{Inbound: []connJSON{}, Outbound: []connJSON{}}
	for _, c := range s.cfg.Connections() {
		if c.Direction == proxy.Inbound {
			out.Inbound = append(out.Inbound, connection(c))
		} else {
			out.Outbound = append(out.Outbound, connection(c))
		}
	}
	return out
}

func (s *Server) workloadState() map[string]*workloadStateJSON {
	snap := s.cfg.Store.Load()
	byWorkload := map[string]*workloadStateJSON{}
	out := map[string]*workloadStateJSON{}
	for _, h := range s.cfg.Pods() {
		p := h.Pod()
		st := &workloadStateJSON{State: "Up", Connections: connectionsJSON{Inbound: []connJSON{}, Outbound: []connJSON{}},
			Info: infoJSON{Namespace: p.Identity.Namespace, TrustDomain: p.Identity.TrustDomain, ServiceAccount: p.Identity.ServiceAccount}}
		if w := snap.Workload(p.WorkloadUID); w != nil {
			st.Info.Name = w.Name
		}
		out[p.UID], byWorkload[p.WorkloadUID] = st, st
	}
	for _, c := range s.cfg.Connections() {
		st := byWorkload[c.Pod]
		if st == nil {
			continue
		}
		if c.Direction == proxy.Inbound {
			st.Connections.Inbound = append(st.Connections.Inbound, connection(c))
		} else {
			st.Connections.Outbound = append(st.Connections.Outbound, connection(c))
		}
	}
	return out
}
