package mesh

import (
	"net/netip"
	"slices"
)

// NetAddr is an address and the network it is reachable in. Two clusters on networks of their own may use
// the same pod address; "" is the network of a mesh that has only one.
type NetAddr struct {
	Network string
	Addr    netip.Addr // unmapped, no zone
}

// TunnelProtocol says how a workload's node can be reached for it.
type TunnelProtocol uint8

const (
	TunnelNone  TunnelProtocol = iota // not captured: plain TCP only
	TunnelHBONE                       // captured, or speaks HBONE itself
)

// WorkloadKind is the controller kind that metrics and logs name.
type WorkloadKind uint8

const (
	KindDeployment WorkloadKind = iota
	KindCronJob
	KindPod
	KindJob
)

// Workload is one endpoint of the mesh: a pod, a WorkloadEntry or an inline ServiceEntry endpoint.
// It is immutable once it is in a Snapshot.
type Workload struct {
	UID       string // cluster-wide unique, e.g. "Kubernetes//Pod/shop/ui-7d9" (Istio's form: cluster/group/kind/ns/name)
	Name      string
	Namespace string
	Cluster   string
	Network   string
	Addrs     []netip.Addr // all addresses, IPv4 and IPv6; empty where Hostname has to be resolved
	Hostname  string

	Identity     Identity
	Tunnel       TunnelProtocol
	NativeTunnel bool // terminates HBONE itself; the node must not capture what arrives for it
	HostNetwork  bool
	Node         string
	Healthy      bool

	CanonicalName     string
	CanonicalRevision string
	WorkloadName      string
	Kind              WorkloadKind
	Locality          Locality
	Capacity          uint32 // relative weight; 0 means the default 1

	Services       map[ServiceName][]ServicePort // the services it backs, with the ports as this workload serves them
	Policies       []PolicyName                  // selector-bound policies; mesh-wide and namespace-wide ones bind by scope
	Audits         []PolicyName                  // selector-bound AUDIT policies; one that is not there decides nothing
	Waypoint       *Gateway
	NetworkGateway *Gateway

	AppTunnel AppTunnel
	Labels    map[string]string // by which subsets choose; not sent to nodes
	Revision  uint64            // of the Snapshot in which it last changed
}

// AppTunnel says that the workload wants the connection wrapped by its own protocol (sandwiched gateways).
type AppTunnel struct {
	Proxy bool   // PROXY protocol v2
	Port  uint16 // 0: the port of the connection
}

// Locality is where a workload runs, from Kubernetes' topology labels.
type Locality struct{ Region, Zone, Subzone string }

// Gateway names a waypoint or network gateway, by address or by the service it is behind.
type Gateway struct {
	Service   ServiceName // set when named by hostname
	Addr      NetAddr     // set when named by address
	HBONEPort uint16      // 15008 unless the API says otherwise
}

// ServiceName is the key of a Service: Istio identifies one by namespace and hostname.
type ServiceName struct{ Namespace, Hostname string }

// String returns "namespace/hostname", as Istio's wire form does.
func (n ServiceName) String() string { return n.Namespace + "/" + n.Hostname }

// Service is a Kubernetes Service or ServiceEntry host. It is immutable once it is in a Snapshot.
type Service struct {
	Name               ServiceName
	Short              string // metadata.name
	VIPs               []NetAddr
	VIPNets            []NetPrefix // CIDR addresses of a ServiceEntry
	Ports              []ServicePort
	SANs               []string
	Waypoint           *Gateway
	IngressUseWaypoint bool
	LB                 LoadBalancing
	Canonical          bool
	VisibleIn          []string // namespaces whose pods know it (exportTo), sorted; nil: all of them

	// For waypoints alone; not sent to nodes.
	HTTP    []HTTPRule // nil: requests go to the service as they come
	Routed  []Routed   // ports of which connections do not
	Subsets []Subset
	Traffic []Traffic
	RuleIn  []string       // namespaces whose waypoints and gateways Subsets and Traffic are for, but what these send on their own, sorted; nil: all of them
	Access  []AccessPolicy // by name
	Tokens  []TokenRule
	Limits  []RateLimit // by name
	Patches []Patch     // in the order in which they are made
	Plugins []Plugin    // in the order in which requests pass by those of a phase

	Telemetry *Telemetry // of its waypoint; nil: the default

	Dynamic    bool // its endpoints are whatever the name that is asked for has, below its host (DYNAMIC_DNS)
	OneAddress bool // of a name among the endpoints one address is used at a time, and connections to another last (DNS_ROUND_ROBIN)

	TLS []BackendTLS // of gateways, by port

	Revision uint64
}

// Limited reports whether not all namespaces know a service.
func (s *Service) Limited() bool { return s.VisibleIn != nil }

// Visible reports whether the pods of a namespace know a service. Of a client that nobody knows, "", they know what all do.
func (s *Service) Visible(namespace string) bool {
	return s.VisibleIn == nil || slices.Contains(s.VisibleIn, namespace)
}

// NetPrefix is a prefix in a network.
type NetPrefix struct {
	Network string
	Prefix  netip.Prefix
}

// ServicePort maps a service port to what an endpoint listens on.
type ServicePort struct {
	Port   uint16
	Target uint16 // 0 on a Service whose targets differ by endpoint
	App    AppProtocol
}

// AppProtocol is the application protocol of a port as far as the API declares it.
type AppProtocol uint8

const (
	AppUnknown AppProtocol = iota
	AppHTTP1
	AppHTTP2
	AppGRPC
	AppTCP
	AppTLS
)

// HTTP reports whether requests may come, of which whoever carries them knows.
func (a AppProtocol) HTTP() bool {
	return a == AppHTTP1 || a == AppHTTP2 || a == AppGRPC || a == AppUnknown
}

// LBScope is one level of locality preference.
type LBScope uint8

const (
	ScopeUnspecified LBScope = iota
	ScopeRegion
	ScopeZone
	ScopeSubzone
	ScopeNode
	ScopeCluster
	ScopeNetwork
)

// Of is what is the same for all that share a scope with who is there.
func (s LBScope) Of(l *Locality, node, cluster, network string) string {
	switch s {
	case ScopeRegion:
		return l.Region
	case ScopeZone:
		return l.Zone
	case ScopeSubzone:
		return l.Subzone
	case ScopeNode:
		return node
	case ScopeCluster:
		return cluster
	case ScopeNetwork:
		return network
	}
	return "" // shared by all
}

// LBMode says what an endpoint must share with the client.
type LBMode uint8

const (
	LBUnspecified LBMode = iota
	LBStrict             // all scopes must match
	LBFailover           // more matching scopes are preferred
	LBPassthrough        // the destination address itself, never an endpoint
)

// LoadBalancing selects endpoints of a service.
type LoadBalancing struct {
	Prefer         []LBScope
	Mode           LBMode
	AllowUnhealthy bool // publishNotReadyAddresses
}
