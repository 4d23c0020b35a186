package waypoint

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A gateway listens on ports of its own, for clients that nothing is known about. To what it sends requests to it comes as a
// waypoint does: by tunnel, under its own name.

// ingressPrefix begins the names of what a gateway has and a waypoint has not.
const ingressPrefix = "ingress|"

// ingressPart is what a gateway's configuration was written from.
type ingressPart struct {
	gateway *mesh.Ingress
	from    map[mesh.ServiceName]*mesh.Service
	targets map[target]bool
	through map[mesh.ServiceName]bool
	ipv6    bool
}

// writeIngress writes the configuration of a gateway. Where nothing that it is written from has changed it is the last one.
func (w *Writer) writeIngress(s *mesh.Snapshot, g *mesh.Ingress) (*Resources, error) {
	b := w.builder(s)
	b.ingress = g
	if was := w.ingress; was != nil && was.gateway == g && was.ipv6 == b.hasIPv6() && same(was.from, s) {
		unchanged := true
		for t := range was.targets {
			unchanged = unchanged && s.SameEndpoints(w.snapshot, t.service)
		}
		for n := range was.through {
			unchanged = unchanged && s.SameEndpoints(w.snapshot, n)
		}
		if unchanged {
			w.snapshot = s
			return w.last, nil
		}
	}
	w.written++
	listeners := []*listenerv3.Listener{b.originate()}
	var tables []*routev3.RouteConfiguration
	var arriving []arrival
	for from := 0; from < len(g.Listeners); {
		to := from + 1
		for to < len(g.Listeners) && g.Listeners[to].Port == g.Listeners[from].Port {
			to++
		}
		chains, routes := b.ingressChains(g.Listeners[from:to])
		if l := b.ingressPort(chains); l != nil {
			listeners = append(listeners, l)
		}
		arriving, tables = append(arriving, chains...), append(tables, routes...)
		from = to
	}
	if g.Tunnels {
		listeners = append(listeners, b.terminate(), b.arrive(arriving))
	}
	all := map[string][]*item{}
	add := func(kind, name string, m proto.Message) {
		all[kind] = append(all[kind], b.item(w.previous(kind).all(), name, m))
	}
	for _, m := range listeners {
		add(resource.ListenerType, m.Name, m)
	}
	for _, m := range tables {
		add(resource.RouteType, m.Name, m)
	}
	for _, m := range b.extensions {
		add(resource.ExtensionConfigType, m.Name, m)
	}
	all[resource.ExtensionConfigType] = append(all[resource.ExtensionConfigType], w.plugIn(b, b.plugins)...)
	for i := range g.Certificates {
		for _, m := range secrets(&g.Certificates[i]) {
			add(resource.SecretType, m.Name, m)
		}
	}
	for _, m := range b.fixedClusters() {
		if m.Name != mainInternal || g.Tunnels {
			add(resource.ClusterType, m.Name, m)
		}
	}
	if g.Tunnels {
		for _, m := range b.ownPorts() {
			add(resource.ClusterType, m.Name, m)
		}
	}
	var ends []netip.AddrPort
	for _, t := range slices.SortedFunc(maps.Keys(b.targets), compareTargets) {
		c, e, near := b.reach(t)
		c.Metadata = b.named(t)
		add(resource.ClusterType, c.Name, c)
		if e != nil {
			all[resource.EndpointType] = append(all[resource.EndpointType], b.endpointsItem(w.previous(resource.EndpointType).all(), e, near))
			ends = append(ends, pods(e)...)
		}
	}
	tunnels := w.tunnelTo(b, ends)
	all[resource.ClusterType] = append(all[resource.ClusterType], tunnels.cluster)
	all[resource.EndpointType] = append(all[resource.EndpointType], tunnels.endpoints)
	for _, i := range b.secretItems(w.previous(resource.SecretType).all()) {
		if !slices.ContainsFunc(all[resource.SecretType], func(o *item) bool { return o.name == i.name }) { // its own to clients
			all[resource.SecretType] = append(all[resource.SecretType], i)
		}
	}
	slices.SortFunc(all[resource.EndpointType], func(x, y *item) int { return strings.Compare(x.name, y.name) })
	if b.err != nil {
		return nil, b.err
	}
	w.patched = b.patched
	w.snapshot, w.tunnels, w.ingress = s, tunnels, &ingressPart{g, b.from, b.targets, b.through, b.hasIPv6()}
	return w.keep(all), nil
}

func compareTargets(a, b target) int {
	return cmp.Or(a.service.Compare(b.service), cmp.Compare(a.port, b.port), strings.Compare(a.name(), b.name()))
}

// account is the service account of the gateway's pods.
func (b *builder) account() string {
	name, _, _ := strings.Cut(b.self.Hostname, ".")
	return name
}

// metaService is what metrics and logs of a gateway say of the service that a request went to.
const metaService = "warren.service"

func (b *builder) named(t target) *corev3.Metadata {
	fields := map[string]*structpb.Value{"host": structpb.NewStringValue(t.service.Hostname), "namespace": structpb.NewStringValue(t.service.Namespace)}
	if svc := b.lookup(t.service); svc != nil {
		fields["name"] = structpb.NewStringValue(svc.Short)
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metaService: {Fields: fields}}}
}

// ofService is a formatter of what [builder.named] says.
func ofService(field string) string { return "%CLUSTER_METADATA(" + metaService + ":" + field + ")%" }

// ingressChains are the filter chains of what is served on a port.
func (b *builder) ingressChains(list []mesh.IngressListener) (chains []arrival, tables []*routev3.RouteConfiguration) {
	for i := range list {
		in := &list[i]
		c := b.ingressChain(in)
		f := &listenerv3.FilterChain{Name: in.Name}
		if in.Hosts != nil {
			tables = append(tables, b.ingressRoutes(c, in))
			f.Filters = []*listenerv3.Filter{b.serveHTTP(c)}
		} else {
			f.Filters = append(b.connectionAccess(c), b.forwardTCP(c, in))
		}
		if in.TLS != nil || len(in.Names) > 0 {
			f.FilterChainMatch = &listenerv3.FilterChainMatch{TransportProtocol: "tls"}
			if !slices.Contains(in.Names, "*") {
				f.FilterChainMatch.ServerNames = in.Names
			}
		}
		if in.TLS != nil {
			f.TransportSocket = b.transport("envoy.transport_sockets.tls", downstream(in))
		}
		chains = append(chains, arrival{in, f})
	}
	return chains, tables
}

// ingressPort is the listener of a port: a filter chain for each of what is served there; nil where that is the tunnel's alone.
func (b *builder) ingressPort(chains []arrival) *listenerv3.Listener {
	port := chains[0].in.Port
	l := &listenerv3.Listener{
		Name: ingressPrefix + strconv.Itoa(int(port)), Address: socket("0.0.0.0", uint32(port)),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(1 << 20),
	}
	if b.hasIPv6() {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: socket("::", uint32(port))}}
	}
	inspect := false
	for _, a := range chains {
		if !a.in.Tunnelled {
			l.FilterChains = append(l.FilterChains, a.chain)
			inspect = inspect || a.byTLS()
		}
	}
	if len(l.FilterChains) == 0 {
		return nil
	}
	if inspect {
		l.ListenerFilters = []*listenerv3.ListenerFilter{b.listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspectorv3.TlsInspector{})}
	}
	return l
}

// ingressChain has what serves services serve a listener.
func (b *builder) ingressChain(in *mesh.IngressListener) chain {
	return chain{ingress: in, port: mesh.ServicePort{Port: in.Port, App: mesh.AppHTTP1},
		svc: &mesh.Service{Name: mesh.ServiceName{Namespace: b.self.Namespace, Hostname: in.Name}, Access: b.ingress.Access, Tokens: b.ingress.Tokens, Limits: b.ingress.Limits, Patches: b.ingress.Patches, Plugins: b.ingress.Plugins, Telemetry: b.ingress.Telemetry}}
}

// ingressRoutes is the route table of a listener.
func (b *builder) ingressRoutes(c chain, in *mesh.IngressListener) *routev3.RouteConfiguration {
	out := &routev3.RouteConfiguration{
		Name: c.name("http"), ValidateClusters: wrapperspb.Bool(false), IgnorePortInHostMatching: true,
		RequestHeadersToRemove: []string{"x-envoy-external-address"},
	}
	access := b.accessOf(c)
	all := false
	for i := range in.Hosts {
		h := &in.Hosts[i]
		vh := &routev3.VirtualHost{Name: cmp.Or(strings.Join(h.Names, ","), "none"), Domains: h.Names, TypedPerFilterConfig: access, RateLimits: askedOf(c.svc.Limits)}
		all = all || slices.Contains(h.Names, "*")
		rest := catchAll()
		switch {
		case h.HTTPSOnly: // not as the host's RequireTls: that has no policies, and what has none is denied
			rest.Name, rest.Action = "https", &routev3.Route_Redirect{Redirect: &routev3.RedirectAction{
				SchemeRewriteSpecifier: &routev3.RedirectAction_HttpsRedirect{HttpsRedirect: true},
			}}
		case h.Misdirects:
			rest.Action = respond(421, "")
		default:
			for j := range h.Rules {
				vh.Routes = append(vh.Routes, b.rule(c, &h.Rules[j])...)
			}
		}
		vh.Routes = append(vh.Routes, rest)
		out.VirtualHosts = append(out.VirtualHosts, vh)
	}
	if !all { // so that policies decide about what is for nobody, too
		out.VirtualHosts = append(out.VirtualHosts, &routev3.VirtualHost{
			Name: "none", Domains: []string{"*"}, Routes: []*routev3.Route{catchAll()}, TypedPerFilterConfig: access, RateLimits: askedOf(c.svc.Limits),
		})
	}
	b.patchRoutes(c, out)
	return out
}

// forwardTCP shares connections out to backends.
func (b *builder) forwardTCP(c chain, in *mesh.IngressListener) *listenerv3.Filter {
	p := b.tcpProxy(c)
	b.share(p, c, in.Backends)
	return b.networkFilter("envoy.filters.network.tcp_proxy", p)
}

// tcpProxy passes connections on.
func (b *builder) tcpProxy(c chain) *tcpproxyv3.TcpProxy {
	return &tcpproxyv3.TcpProxy{
		StatPrefix: c.name("tcp"), IdleTimeout: durationpb.New(0), AccessLog: b.tells(c, false),
		AccessLogOptions: &tcpproxyv3.TcpProxy_TcpAccessLogOptions{FlushAccessLogOnConnected: true},
	}
}

// patience ends connections to a target that have been silent, or there, for as long as its rule says. Of two targets the shorter one holds.
func (b *builder) patience(p *tcpproxyv3.TcpProxy, t target) {
	use := b.traffic(t)
	if d := p.IdleTimeout.AsDuration(); use.TCPIdleTimeout > 0 && (d == 0 || use.TCPIdleTimeout < d) {
		p.IdleTimeout = durationpb.New(use.TCPIdleTimeout)
	}
	if d := p.MaxDownstreamConnectionDuration.AsDuration(); use.ConnectionDuration > 0 && (d == 0 || use.ConnectionDuration < d) {
		p.MaxDownstreamConnectionDuration = durationpb.New(use.ConnectionDuration)
	}
}

// share has connections go to backends by their weights. All are asked for the same, so that those which are not to be as the first is,
// are closed.
func (b *builder) share(p *tcpproxyv3.TcpProxy, c chain, backends []mesh.HTTPBackend) {
	w := &tcpproxyv3.TcpProxy_WeightedCluster{}
	var asked *mesh.Forward
	first := true
	p.TunnelingConfig = nil
	for _, t := range backends {
		if t.Weight == 0 {
			continue
		}
		name := blackHole
		if svc := b.lookup(t.Service); t.Invalid == "" && svc != nil {
			k := b.overTLS(c, b.target(c, &t))
			f := b.asks(k)
			if first {
				first, asked = false, f
			}
			if sameForward(f, asked) {
				b.targets[k] = true
				name = k.name()
				b.patience(p, k)
			}
		}
		w.Clusters = append(w.Clusters, &tcpproxyv3.TcpProxy_WeightedCluster_ClusterWeight{Name: name, Weight: t.Weight})
	}
	switch len(w.Clusters) {
	case 0:
		p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: blackHole}
	case 1:
		p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: w.Clusters[0].Name}
	default:
		p.ClusterSpecifier = &tcpproxyv3.TcpProxy_WeightedClusters{WeightedClusters: w}
	}
	ask(p, asked)
}

var tlsVersions = map[uint16]tlsv3.TlsParameters_TlsProtocol{
	0x0301: tlsv3.TlsParameters_TLSv1_0, 0x0302: tlsv3.TlsParameters_TLSv1_1, 0x0303: tlsv3.TlsParameters_TLSv1_2, 0x0304: tlsv3.TlsParameters_TLSv1_3,
}

// downstream is TLS as clients from outside have it. Certificates come apart from the listener, so that connections outlive
// their renewal.
func downstream(in *mesh.IngressListener) *tlsv3.DownstreamTlsContext {
	t := in.TLS
	common := &tlsv3.CommonTlsContext{TlsParams: &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: tlsVersions[cmp.Or(t.MinVersion, 0x0303)], TlsMaximumProtocolVersion: tlsVersions[cmp.Or(t.MaxVersion, 0x0304)],
		CipherSuites: t.Ciphers,
	}}
	if in.Hosts != nil {
		common.AlpnProtocols = []string{"h2", "http/1.1"}
	}
	for _, name := range t.Certificates {
		common.TlsCertificateSdsSecretConfigs = append(common.TlsCertificateSdsSecretConfigs, &tlsv3.SdsSecretConfig{Name: name, SdsConfig: adsSource()})
	}
	out := &tlsv3.DownstreamTlsContext{CommonTlsContext: common}
	if t.ClientRoots != "" {
		out.RequireClientCertificate = wrapperspb.Bool(!t.Optional)
		roots := &tlsv3.SdsSecretConfig{Name: t.ClientRoots + rootsSuffix, SdsConfig: adsSource()}
		common.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: roots}
		if t.Untrusted {
			common.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         &tlsv3.CertificateValidationContext{TrustChainVerification: tlsv3.CertificateValidationContext_ACCEPT_UNTRUSTED},
				ValidationContextSdsSecretConfig: roots,
			}}
		}
	}
	return out
}

// rootsSuffix tells the roots of a Secret from its certificate.
const rootsSuffix = "-cacert"

// secrets are what Envoy is given of a certificate.
func secrets(c *mesh.Certificate) (out []*tlsv3.Secret) {
	if c.Chain != "" {
		out = append(out, &tlsv3.Secret{Name: c.Name, Type: &tlsv3.Secret_TlsCertificate{
			TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(c.Chain), PrivateKey: inline(string(c.Key))},
		}})
	}
	if c.Roots != "" {
		v := &tlsv3.CertificateValidationContext{TrustedCa: inline(c.Roots)}
		if c.CRL != "" {
			v.Crl = inline(c.CRL)
		}
		out = append(out, &tlsv3.Secret{Name: c.Name + rootsSuffix, Type: &tlsv3.Secret_ValidationContext{ValidationContext: v}})
	}
	return out
}
