package index

import (
	"fmt"
	"net/netip"
	"slices"

	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	kubenetworkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Kind is an object kind that the index reads.
type Kind uint8

const (
	Pod Kind = iota
	Namespace
	Service
	EndpointSlice
	Node
	AuthorizationPolicy
	PeerAuthentication
	ServiceEntry
	WorkloadEntry
	RequestAuthentication
	NetworkPolicy
	ValidatingWebhookConfiguration
	MutatingWebhookConfiguration
	APIService
	CustomResourceDefinition
	VirtualService
	DestinationRule
	Gateway
	HTTPRoute
	GRPCRoute
	ReferenceGrant
	GatewayClass
	Telemetry
	IstioGateway // of networking.istio.io
	TLSRoute
	TCPRoute
	BackendTLSPolicy
	RateLimit
	ListenerSet
	EnvoyFilter
	WasmPlugin
)

var kindNames = [...]string{
	"Pod", "Namespace", "Service", "EndpointSlice", "Node", "AuthorizationPolicy", "PeerAuthentication", "ServiceEntry", "WorkloadEntry",
	"RequestAuthentication", "NetworkPolicy", "ValidatingWebhookConfiguration", "MutatingWebhookConfiguration", "APIService", "CustomResourceDefinition",
	"VirtualService", "DestinationRule", "Gateway", "HTTPRoute", "GRPCRoute", "ReferenceGrant", "GatewayClass", "Telemetry", "Gateway",
	"TLSRoute", "TCPRoute", "BackendTLSPolicy", "RateLimit", "ListenerSet", "EnvoyFilter", "WasmPlugin",
}

func (k Kind) String() string { return kindNames[k] }

// Follows reports whether objects of a kind of Istio's or the Gateway API's mean anything to the mesh.
func Follows(group, kind string) bool {
	return slices.ContainsFunc(crds, func(c crd) bool { return c.resource.Group == group && c.kind.String() == kind })
}

// LocalPod is what the node that runs a pod has to know about it, enrolled or not.
type LocalPod struct {
	UID            string // metadata.uid
	Namespace      string
	Name           string
	ServiceAccount string
	Node           string
	Addrs          []netip.Addr
	Enrolled       bool
	Reason         EnrolReason
	Strict         bool // PeerAuthentication STRICT holds on every port
	HostNetwork    bool
	Phase          PodPhase
	WorkloadUID    string
	Selected       Selected // by a NetworkPolicy
	DNSCapture     mesh.DNSCapture
}

// PodPhase is a pod's phase as far as capture cares.
type PodPhase = podPhase

const (
	PodPending     = podPending
	PodRunning     = podRunning
	PodTerminating = podTerminating
	PodFinished    = podFinished
)

// NamespaceState says whether new pods of a namespace may have to be captured, so that none starts before that is
// known of it.
type NamespaceState struct {
	Name     string
	Enrolled bool
}

// NoticeKey names what a notice is about.
type NoticeKey struct {
	Kind            Kind
	Namespace, Name string // Namespace is empty for a Namespace
}

// Notice is something an operator should hear about an object, as a Kubernetes event.
type Notice struct {
	UID     string // of the object
	Reason  string // CamelCase
	Message string
}

// Update is what one Commit changed: beside the Snapshot, from which the rest is told by
// [mesh.Snapshot.Changes], what is not in it. Maps hold nil for what is gone.
type Update struct {
	Snapshot   *mesh.Snapshot
	LocalPods  map[string]*LocalPod // by pod UID
	Namespaces map[string]*NamespaceState
	Policies   map[PolicyKey]*PolicyState
	Routes     map[RouteKey]*RouteState
	Gateways   map[GatewayKey]*GatewayState // but for waypoints
	Notices    map[NoticeKey]*Notice
	APIServer  []netip.Prefix        // from where it calls, changed or not
	Keys       []policy.KeySource    // that are needed, changed or not
	Secrets    []SecretKey           // that gateways need, changed or not
	Roots      []RootsKey            // the same, and policies about their backends
	Modules    []policy.ModuleSource // that are needed, changed or not
}

// source is an object that workloads are made from.
type source struct {
	kind Kind
	key
}

// Index holds the facts and derives the Snapshot from them. It is not safe for concurrent use: one
// goroutine owns it.
type Index struct {
	c        compiled
	snapshot *mesh.Snapshot

	pods         map[string]map[string]*podFact // by namespace and name
	podsByNode   map[string]map[key]struct{}
	podsByAddr   map[netip.Addr]map[key]struct{} // but for those on the host network
	namespaces   map[string]*namespaceFact
	labelled     map[string]int // pods of a namespace that are enrolled by their own label
	nodes        map[string]*nodeFact
	inside       map[netip.Addr]int                 // how many nodes have it, see nodeFact
	services     map[string]map[string]*serviceFact // by namespace and name
	slices       map[key]*sliceFact
	slicesOf     map[key]map[key]struct{} // Service → its slices
	slicesFor    map[key]map[key]struct{} // Pod → the slices that refer to it
	entries      map[string]map[string]*entryFact
	endpoints    map[string]map[string]*endpointFact
	authz        map[string]map[string]*authorizationFact
	peerAuths    map[string]map[string]*peerAuthFact
	requests     map[string]map[string]*requestFact
	telemetries  map[string]map[string]*telemetryFact
	rateLimits   map[string]map[string]*rateLimitFact
	envoyFilters map[string]map[string]*envoyFilterFact
	wasmPlugins  map[string]map[string]*wasmPluginFact
	keys         fetched[policy.KeySource, KeyState]       // of rules of RequestAuthentications
	modules      fetched[policy.ModuleSource, ModuleState] // of WasmPlugins
	virtuals     map[string]map[string]*routeFact          // VirtualServices
	destinations map[string]map[string]*routeFact          // DestinationRules
	gateways     map[string]map[string]*gatewayFact        // waypoints
	selectors    map[string]map[string]*selectorFact
	calledBy     map[ref][]called                    // what the API server calls on behalf of an object
	callers      map[key]map[uint16]map[ref]struct{} // the same by Service and port

	gatewayAPI
	ingressAPI
	istioGatewayAPI
	backendAPI
	credentialAPI
	delegateAPI
	consumerAPI
	clientAPI

	selectorsKnown bool // there are no other NetworkPolicies

	candidates map[mesh.ServiceName]map[owner]*serviceFact // who claims a host
	winners    map[mesh.ServiceName]*serviceFact           // as of the last Commit

	// What was derived at the last Commit.
	workloadsOf map[source][]string
	locals      map[key]*LocalPod
	nsStates    map[string]*NamespaceState
	udp         []string // namespaces, sorted
	states      map[PolicyKey]*PolicyState
	notices     map[NoticeKey]*Notice
	exemptions  map[mesh.PolicyName]*exemption
	exemptOf    map[source]mesh.PolicyName
	guards      map[guard]map[source]struct{} // who is behind it
	guardsOf    map[source][]guard
	apiServer   []netip.Prefix // from where it calls

	// What has to be derived anew.
	dirtySources    map[source]struct{}
	dirtyHosts      map[mesh.ServiceName]struct{}
	dirtyPolicies   map[mesh.PolicyName]struct{}
	dirtyStates     map[PolicyKey]struct{}
	dirtyExemptions map[mesh.PolicyName]struct{}
	dirtyGuards     map[guard]struct{}
	dirtyRoutes     map[ref]struct{}
	dirtyAPIServer  bool // its addresses
	dirtyNamespaces map[string]struct{}
}

// New returns an empty index.
func New(cfg Config) (*Index, error) {
	c, err := cfg.compile()
	if err != nil {
		return nil, err
	}
	return &Index{
		c:               c,
		snapshot:        &mesh.Snapshot{},
		pods:            map[string]map[string]*podFact{},
		podsByNode:      map[string]map[key]struct{}{},
		podsByAddr:      map[netip.Addr]map[key]struct{}{},
		namespaces:      map[string]*namespaceFact{},
		labelled:        map[string]int{},
		nodes:           map[string]*nodeFact{},
		inside:          map[netip.Addr]int{},
		services:        map[string]map[string]*serviceFact{},
		slices:          map[key]*sliceFact{},
		slicesOf:        map[key]map[key]struct{}{},
		slicesFor:       map[key]map[key]struct{}{},
		entries:         map[string]map[string]*entryFact{},
		endpoints:       map[string]map[string]*endpointFact{},
		authz:           map[string]map[string]*authorizationFact{},
		peerAuths:       map[string]map[string]*peerAuthFact{},
		requests:        map[string]map[string]*requestFact{},
		telemetries:     map[string]map[string]*telemetryFact{},
		rateLimits:      map[string]map[string]*rateLimitFact{},
		envoyFilters:    map[string]map[string]*envoyFilterFact{},
		wasmPlugins:     map[string]map[string]*wasmPluginFact{},
		keys:            newFetched[policy.KeySource, KeyState](),
		modules:         newFetched[policy.ModuleSource, ModuleState](),
		virtuals:        map[string]map[string]*routeFact{},
		destinations:    map[string]map[string]*routeFact{},
		gateways:        map[string]map[string]*gatewayFact{},
		dirtyRoutes:     map[ref]struct{}{},
		gatewayAPI:      newGatewayAPI(),
		ingressAPI:      newIngressAPI(),
		istioGatewayAPI: newIstioGatewayAPI(),
		backendAPI:      newBackendAPI(),
		credentialAPI:   newCredentialAPI(),
		delegateAPI:     newDelegateAPI(),
		consumerAPI:     newConsumerAPI(),
		clientAPI:       newClientAPI(),
		selectors:       map[string]map[string]*selectorFact{},
		calledBy:        map[ref][]called{},
		callers:         map[key]map[uint16]map[ref]struct{}{},
		exemptions:      map[mesh.PolicyName]*exemption{},
		exemptOf:        map[source]mesh.PolicyName{},
		guards:          map[guard]map[source]struct{}{},
		guardsOf:        map[source][]guard{},
		dirtyGuards:     map[guard]struct{}{},
		dirtyExemptions: map[mesh.PolicyName]struct{}{},
		candidates:      map[mesh.ServiceName]map[owner]*serviceFact{},
		winners:         map[mesh.ServiceName]*serviceFact{},
		workloadsOf:     map[source][]string{},
		locals:          map[key]*LocalPod{},
		nsStates:        map[string]*NamespaceState{},
		states:          map[PolicyKey]*PolicyState{},
		notices:         map[NoticeKey]*Notice{},
		dirtySources:    map[source]struct{}{},
		dirtyHosts:      map[mesh.ServiceName]struct{}{},
		dirtyPolicies:   map[mesh.PolicyName]struct{}{},
		dirtyStates:     map[PolicyKey]struct{}{},
		dirtyNamespaces: map[string]struct{}{},
		dirtyAPIServer:  true, // where it calls from is configured too
	}, nil
}

// Set records an object as it is now. Objects of other kinds are a programming error.
func (x *Index) Set(obj any) {
	switch o := obj.(type) {
	case *corev1.Pod:
		x.setPod(keyOf(o), podFactOf(o))
	case *corev1.Namespace:
		x.setNamespace(o.Name, namespaceFactOf(o))
	case *corev1.Service:
		x.setService(keyOf(o), x.c.serviceFactOf(o))
	case *discoveryv1.EndpointSlice:
		x.setSlice(keyOf(o), sliceFactOf(o))
	case *corev1.Node:
		x.setNode(o.Name, nodeFactOf(o))
	case *securityv1.AuthorizationPolicy:
		x.setAuthorization(keyOf(o), x.c.authorizationFactOf(o))
	case *securityv1.PeerAuthentication:
		x.setPeerAuth(keyOf(o), peerAuthFactOf(o))
	case *securityv1.RequestAuthentication:
		x.setRequestAuth(keyOf(o), x.c.requestFactOf(o))
	case *telemetryv1.Telemetry:
		x.setTelemetry(keyOf(o), x.c.telemetryFactOf(o))
	case *policy.RateLimit:
		x.setRateLimit(keyOf(o), rateLimitFactOf(o))
	case *networkingv1alpha3.EnvoyFilter:
		x.setEnvoyFilter(keyOf(o), envoyFilterFactOf(o))
	case *extensionsv1alpha1.WasmPlugin:
		x.setWasmPlugin(keyOf(o), wasmPluginFactOf(o))
	case *networkingv1.ServiceEntry:
		x.setEntry(keyOf(o), x.c.entryFactOf(o))
	case *kubenetworkingv1.NetworkPolicy:
		x.setNetworkPolicy(keyOf(o), selectorFactOf(o))
	case *networkingv1.WorkloadEntry:
		x.setEndpoint(keyOf(o), x.c.workloadEntryFactOf(o))
	case *admissionv1.ValidatingWebhookConfiguration:
		x.setCalled(ref{ValidatingWebhookConfiguration, keyOf(o)}, calledByValidating(o))
	case *admissionv1.MutatingWebhookConfiguration:
		x.setCalled(ref{MutatingWebhookConfiguration, keyOf(o)}, calledByMutating(o))
	case *networkingv1.VirtualService:
		x.setVirtualService(keyOf(o), o)
	case *networkingv1.DestinationRule:
		x.setRoutes(DestinationRule, x.destinations, keyOf(o), x.c.destinationRuleFactOf(o))
	case *networkingv1.Gateway:
		x.setIstioGateway(keyOf(o), istioGatewayFactOf(o))
	case *gatewayv1.Gateway:
		x.setGateway(keyOf(o), gatewayFactOf(o))
		x.setIngress(keyOf(o), ingressFactOf(o))
	case *gatewayv1.ListenerSet:
		x.setListenerSet(keyOf(o), listenerSetFactOf(o))
	case *gatewayv1.GatewayClass:
		x.setClass(o.Name, string(o.Spec.ControllerName))
	case *gatewayv1.HTTPRoute:
		x.setGatewayRoute(HTTPRoute, keyOf(o), x.c.httpRouteFactOf(o))
	case *gatewayv1.GRPCRoute:
		x.setGatewayRoute(GRPCRoute, keyOf(o), x.c.grpcRouteFactOf(o))
	case *gatewayv1.TLSRoute:
		x.setGatewayRoute(TLSRoute, keyOf(o), x.c.tlsRouteFactOf(o))
	case *gatewayv1.TCPRoute:
		x.setGatewayRoute(TCPRoute, keyOf(o), x.c.tcpRouteFactOf(o))
	case *gatewayv1.BackendTLSPolicy:
		x.setBackendTLS(keyOf(o), backendTLSFactOf(o))
	case *gatewayv1beta1.ReferenceGrant:
		x.setGrant(keyOf(o), &grantFact{key: keyOf(o), from: o.Spec.From, to: o.Spec.To})
	case *unstructured.Unstructured:
		kind := APIService
		if o.GetKind() == CustomResourceDefinition.String() {
			kind = CustomResourceDefinition
		}
		x.setCalled(ref{kind, keyOf(o)}, calledByUnstructured(o))
	default:
		panic(fmt.Sprintf("index: no converter for %T", obj))
	}
}

// Delete records that an object is gone. One that was never there is fine.
func (x *Index) Delete(kind Kind, namespace, name string) {
	k := key{namespace, name}
	switch kind {
	case Pod:
		x.setPod(k, nil)
	case Namespace:
		x.setNamespace(name, nil)
	case Service:
		x.setService(k, nil)
	case EndpointSlice:
		x.setSlice(k, nil)
	case Node:
		x.setNode(name, nil)
	case AuthorizationPolicy:
		x.setAuthorization(k, nil)
	case PeerAuthentication:
		x.setPeerAuth(k, nil)
	case ValidatingWebhookConfiguration, MutatingWebhookConfiguration, APIService, CustomResourceDefinition:
		x.setCalled(ref{kind, k}, nil)
	case RequestAuthentication:
		x.setRequestAuth(k, nil)
	case Telemetry:
		x.setTelemetry(k, nil)
	case RateLimit:
		x.setRateLimit(k, nil)
	case EnvoyFilter:
		x.setEnvoyFilter(k, nil)
	case WasmPlugin:
		x.setWasmPlugin(k, nil)
	case ServiceEntry:
		x.setEntry(k, nil)
	case WorkloadEntry:
		x.setEndpoint(k, nil)
	case NetworkPolicy:
		x.setNetworkPolicy(k, nil)
	case VirtualService:
		x.setVirtualService(k, nil)
	case DestinationRule:
		x.setRoutes(DestinationRule, x.destinations, k, nil)
	case Gateway:
		x.setGateway(k, nil)
		x.setIngress(k, nil)
	case ListenerSet:
		x.setListenerSet(k, nil)
	case IstioGateway:
		x.setIstioGateway(k, nil)
	case GatewayClass:
		x.setClass(name, "")
	case HTTPRoute, GRPCRoute, TLSRoute, TCPRoute:
		x.setGatewayRoute(kind, k, nil)
	case BackendTLSPolicy:
		x.setBackendTLS(k, nil)
	case ReferenceGrant:
		x.setGrant(k, nil)
	}
}

// Snapshot is the result of the last Commit.
func (x *Index) Snapshot() *mesh.Snapshot { return x.snapshot }

// Commit derives what depends on the changes since the last one.
func (x *Index) Commit() *Update {
	b := mesh.NewBuilder(x.snapshot)
	u := &Update{
		LocalPods:  map[string]*LocalPod{},
		Namespaces: map[string]*NamespaceState{},
		Policies:   map[PolicyKey]*PolicyState{},
		Routes:     map[RouteKey]*RouteState{},
		Gateways:   map[GatewayKey]*GatewayState{},
		Notices:    map[NoticeKey]*Notice{},
	}
	x.dirtyBackendTLS = x.dirtyBackendTLS || len(x.dirtyHosts)+len(x.dirtyGatewayRoutes)+len(x.dirtyIngress) > 0
	x.commitUDP()
	cfg := x.c.meshConfig()
	cfg.UDPNamespaces = x.udp
	b.SetConfig(cfg)
	x.commitPolicies(b)
	x.commitGatewayRoutes(u)
	x.commitIngress(b, u)
	x.commitEntrances(b, u)
	x.commitReaders()
	x.commitServices(b) // before workloads: who owns a host decides what backs it
	x.commitSources(b, u)
	x.commitExemptions(b) // after the workloads, which need them or no more
	x.commitGuards(b)
	x.commitNamespaces(u)
	x.commitStates(u)
	x.commitRoutes(u)
	x.commitBackendTLS(u)

	x.dirtyPolicies = emptied(x.dirtyPolicies)
	x.dirtyHosts = emptied(x.dirtyHosts)
	x.dirtySources = emptied(x.dirtySources)
	x.dirtyNamespaces = emptied(x.dirtyNamespaces)
	x.dirtyStates = emptied(x.dirtyStates)
	x.dirtyExemptions = emptied(x.dirtyExemptions)
	if b.Changed() {
		x.snapshot = b.Commit(x.snapshot.Revision() + 1)
	}
	u.Snapshot, u.APIServer, u.Keys, u.Secrets = x.snapshot, x.apiServer, x.keySources(), x.wantedSecrets()
	u.Roots, u.Modules = x.wantedRoots(), x.moduleSources()
	return u
}

// emptied clears a set. One that was large is dropped instead: clearing costs what a map once held.
func emptied[K comparable](m map[K]struct{}) map[K]struct{} {
	if len(m) > 64 {
		return map[K]struct{}{}
	}
	clear(m)
	return m
}

func (x *Index) commitPolicies(b *mesh.Builder) {
	for name := range x.dirtyPolicies {
		p := x.policy(name)
		if p == nil {
			b.DeletePolicy(name)
			continue
		}
		next := *p // the fact is kept; the Snapshot has its own copy, with a revision
		b.PutPolicy(&next)
	}
}

func (x *Index) commitServices(b *mesh.Builder) {
	for name := range x.dirtyHosts {
		was, is := x.winners[name], winner(x.candidates[name])
		x.touchDeciders(name, is)
		x.touchRules(name)
		if was != is {
			x.touchSenders(name)
			for _, f := range x.candidates[name] {
				x.touchBackends(f)
			}
			if was != nil {
				x.touchBackends(was)
			}
		}
		if is == nil {
			delete(x.winners, name)
			x.asks(name, nil)
			b.DeleteService(name)
			continue
		}
		x.winners[name] = is
		if is.owner.entry { // whether it has a waypoint is told to its author
			x.touch(ServiceEntry, is.owner.key)
		}
		s := is.finish(x.namespaces[name.Namespace])
		s.Waypoint = x.waypointFor(is)
		x.route(s)
		x.forClients(s)
		s.Access, s.Tokens = x.accessOf(is)
		s.Telemetry, s.Limits, s.Patches = x.telemetryOf(is), x.limitsOf(is), x.patchesOf(is)
		s.Plugins = x.pluginsOf(is)
		s.TLS = x.backendTLSOf(is)
		b.PutService(s)
	}
}

// winner picks who owns a host that several objects of a namespace claim: the Service, else the ServiceEntry
// that was made first.
func winner(candidates map[owner]*serviceFact) *serviceFact {
	var best *serviceFact
	for _, f := range candidates {
		switch {
		case best == nil:
			best = f
		case f.owner.entry != best.owner.entry:
			if !f.owner.entry {
				best = f
			}
		case !f.created.Equal(&best.created):
			if f.created.Before(&best.created) {
				best = f
			}
		case compareKeys(f.owner.key, best.owner.key) < 0:
			best = f
		}
	}
	return best
}

func (x *Index) commitSources(b *mesh.Builder, u *Update) {
	var puts []*mesh.Workload
	gone := map[string]bool{}
	for src := range x.dirtySources {
		workloads := x.derive(src, u)
		uids := make([]string, 0, len(workloads))
		for _, w := range workloads {
			uids = append(uids, w.UID)
			puts = append(puts, w)
		}
		for _, uid := range x.workloadsOf[src] {
			gone[uid] = true
		}
		if len(uids) == 0 {
			delete(x.workloadsOf, src)
		} else {
			x.workloadsOf[src] = uids
		}
	}
	for _, w := range puts {
		delete(gone, w.UID)
	}
	heard := map[mesh.ServiceName]bool{}
	if len(x.clients) > 0 {
		for uid := range gone {
			x.noteClient(uid, b.Workload(uid), nil, heard)
		}
		for _, w := range puts {
			x.noteClient(w.UID, b.Workload(w.UID), w, heard)
		}
	}
	// Deletions first: an address may pass from a workload that goes to one that comes.
	for uid := range gone {
		b.DeleteWorkload(uid)
	}
	for _, w := range puts {
		b.PutWorkload(w)
	}
	x.tellClients(b, heard)
}

// commitUDP gathers the namespaces that ask for policies to apply to UDP. The list is in a Snapshot: it is made anew.
func (x *Index) commitUDP() {
	next := slices.Clone(x.udp)
	for name := range x.dirtyNamespaces {
		i, have := slices.BinarySearch(next, name)
		switch want := x.namespaces[name].filtersUDP(); {
		case want && !have:
			next = slices.Insert(next, i, name)
		case !want && have:
			next = slices.Delete(next, i, i+1)
		}
	}
	x.udp = next
}

func (x *Index) commitNamespaces(u *Update) {
	for name := range x.dirtyNamespaces {
		ns := x.namespaces[name]
		nk := NoticeKey{Kind: Namespace, Name: name}
		if ns == nil {
			if x.nsStates[name] != nil {
				delete(x.nsStates, name)
				u.Namespaces[name] = nil
			}
			x.notice(u, nk, "", "", "")
			continue
		}
		next := &NamespaceState{Name: name, Enrolled: x.c.namespaceEnrolled(ns) || x.labelled[name] > 0}
		if old := x.nsStates[name]; old == nil || *old != *next {
			x.nsStates[name] = next
			u.Namespaces[name] = next
		}
		reason, message := x.c.namespaceWarning(ns)
		x.notice(u, nk, ns.uid, reason, message)
	}
}

// notice keeps what is to be said about an object; an empty reason takes it back.
func (x *Index) notice(u *Update, k NoticeKey, uid, reason, message string) {
	old := x.notices[k]
	switch {
	case reason == "" && old != nil:
		delete(x.notices, k)
		u.Notices[k] = nil
	case reason != "" && (old == nil || *old != Notice{uid, reason, message}):
		n := &Notice{UID: uid, Reason: reason, Message: message}
		x.notices[k] = n
		u.Notices[k] = n
	}
}
