package waypoint

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	sfsvaluev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	compositev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/composite/v3"
	corsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	headermutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	sessionv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/stateful_session/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	earlyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	networkinputsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Filter state that connect_terminate leaves for the rest of the way.
const (
	stateLocal     = "envoy.filters.listener.original_dst.local_ip"
	stateRemote    = "envoy.filters.listener.original_dst.remote_ip"
	statePrincipal = "io.istio.peer_principal" // as Istio's proxies name it
	stateAddress   = stateRemote
	stateForwarded = "warren.forwarded" // what the tunnel says of the connection in it: a node's record names it so
)

// terminate is the only listener with a port: the far end of the clients' tunnels.
func (b *builder) terminate() *listenerv3.Listener {
	hcm := &hcmv3.HttpConnectionManager{
		StatPrefix:                   connectTerminate,
		CodecType:                    hcmv3.HttpConnectionManager_HTTP2,
		Http2ProtocolOptions:         b.tunnelOptions(),
		ForwardClientCertDetails:     hcmv3.HttpConnectionManager_SANITIZE,
		StreamIdleTimeout:            durationpb.New(0),
		ServerHeaderTransformation:   hcmv3.HttpConnectionManager_PASS_THROUGH,
		UpgradeConfigs:               []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "CONNECT"}},
		CommonHttpProtocolOptions:    &corev3.HttpProtocolOptions{IdleTimeout: durationpb.New(0)},
		RouteSpecifier:               &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: connectRoute()},
		HttpFilters:                  []*hcmv3.HttpFilter{b.readBaggage(), b.httpFilter("envoy.filters.http.set_filter_state", b.tunnelState()), b.router()},
		DelayedCloseTimeout:          durationpb.New(time.Second),
		GenerateRequestId:            wrapperspb.Bool(false),
		AlwaysSetRequestIdInResponse: false,

		EarlyHeaderMutationExtensions: []*corev3.TypedExtensionConfig{b.writePrincipal()},
	}
	l := &listenerv3.Listener{
		Name:    connectTerminate,
		Address: socket("0.0.0.0", mesh.HBONEPort),
		FilterChains: []*listenerv3.FilterChain{{
			Name:    connectTerminate,
			Filters: []*listenerv3.Filter{b.networkFilter("envoy.filters.network.http_connection_manager", hcm)},
			TransportSocket: b.transport("envoy.transport_sockets.tls", &tlsv3.DownstreamTlsContext{
				RequireClientCertificate: wrapperspb.Bool(true),
				CommonTlsContext:         b.tls(),
			}),
		}},
	}
	if b.hasIPv6() {
		l.AdditionalAddresses = []*listenerv3.AdditionalAddress{{Address: socket("::", mesh.HBONEPort)}}
	}
	return l
}

// hasIPv6 reports whether pods of the waypoint have such an address; where they have none there may be no such stack.
func (b *builder) hasIPv6() bool {
	for w := range b.s.Endpoints(b.self) {
		for _, a := range w.Addrs {
			if a.Is6() {
				return true
			}
		}
	}
	return false
}

func connectRoute() *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{
		Name: connectTerminate,
		VirtualHosts: []*routev3.VirtualHost{{
			Name: connectTerminate, Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_ConnectMatcher_{ConnectMatcher: &routev3.RouteMatch_ConnectMatcher{}}},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: mainInternal},
					Timeout:          durationpb.New(0), IdleTimeout: durationpb.New(0),
					UpgradeConfigs: []*routev3.RouteAction_UpgradeConfig{{
						UpgradeType: "CONNECT", ConnectConfig: &routev3.RouteAction_UpgradeConfig_ConnectConfig{},
					}},
				}},
			}},
		}},
	}
}

// tunnelState is what is known only here: who asks, from where and for what.
func (b *builder) tunnelState() proto.Message {
	value := func(key, factory, format string) *sfsvaluev3.FilterStateValue {
		return &sfsvaluev3.FilterStateValue{
			Key:        &sfsvaluev3.FilterStateValue_ObjectKey{ObjectKey: key},
			FactoryKey: factory,
			Value: &sfsvaluev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
				Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
					Specifier: &corev3.DataSource_InlineString{InlineString: format},
				}},
			}},
			SharedWithUpstream: sfsvaluev3.FilterStateValue_ONCE,
		}
	}
	forwarded := value(stateForwarded, "envoy.string", "%REQ(FORWARDED):256%")
	forwarded.GetFormatString().OmitEmptyValues, forwarded.SkipIfEmpty = true, true
	return &sfsv3.Config{OnRequestHeaders: append([]*sfsvaluev3.FilterStateValue{
		value(stateLocal, "", "%REQ(:AUTHORITY)%"),
		value(stateRemote, "", "%DOWNSTREAM_REMOTE_ADDRESS%"),
		value(statePrincipal, "envoy.string", "%DOWNSTREAM_PEER_URI_SAN%"),
		provenNamespace(value), forwarded,
	}, peerState(value)...)}
}

// served is how the main listener serves a port of a service.
type served struct {
	chain
	chains []*listenerv3.FilterChain
	on     *matcherv3.Matcher_OnMatch
	named  bool // server names in TLS decide
}

// serve writes the filter chains of a port.
func (b *builder) serve(c chain) served {
	out := served{chain: c}
	if c.http() {
		out.on = b.chainNamed(c.name("http"))
		out.chains = append(out.chains, &listenerv3.FilterChain{Name: c.name("http"), Filters: []*listenerv3.Filter{b.serveHTTP(c)}})
	}
	if c.tcp() && c.dynamic() {
		requests := out.on
		b.followTLS(&out)
		if c.sniffed() {
			out.on = b.byProtocol(requests, out.on)
		}
		return out
	}
	if c.tcp() {
		requests := out.on
		out.on = b.chainNamed(c.name("tcp"))
		out.chains = append(out.chains, &listenerv3.FilterChain{Name: c.name("tcp"), Filters: append(b.connectionAccess(c), b.serveTCP(c))})
		opaque := out.on
		b.byRest(&out)
		b.byServerName(&out, "")
		if c.sniffed() {
			out.on = b.byProtocol(requests, out.on)
		}
		b.byClient(&out, requests, opaque)
	}
	return out
}

// main has the filter chains of each port of each service.
func (b *builder) main(ports []served) *listenerv3.Listener {
	l := &listenerv3.Listener{
		Name:              mainInternal,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		ListenerFilters:   []*listenerv3.ListenerFilter{b.listenerFilter("envoy.filters.listener.original_dst", &originaldstv3.OriginalDst{})},
	}
	taken := map[string]map[string]*matcherv3.Matcher_OnMatch{} // by address and port
	sniffed, declared, named := map[uint16]bool{}, map[uint16]bool{}, map[uint16]bool{}
	for _, p := range ports {
		if p.named {
			named[p.port.Port] = true
		}
		if p.sniffed() {
			sniffed[p.port.Port] = true
		} else {
			declared[p.port.Port] = true
		}
		used := false
		for _, vip := range p.svc.VIPs {
			addr, port := vip.Addr.String(), strconv.Itoa(int(p.port.Port))
			if taken[addr] == nil {
				taken[addr] = map[string]*matcherv3.Matcher_OnMatch{}
			}
			if taken[addr][port] == nil { // two ServiceEntries may claim an address; the first by name has it
				taken[addr][port], used = p.on, true
			}
		}
		if used {
			l.FilterChains = append(l.FilterChains, p.chains...)
		}
	}
	if len(l.FilterChains) == 0 { // Envoy wants one; no matcher leads to it
		l.FilterChains = []*listenerv3.FilterChain{{Name: blackHole, Filters: []*listenerv3.Filter{b.networkFilter("envoy.filters.network.tcp_proxy",
			&tcpproxyv3.TcpProxy{StatPrefix: blackHole, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: blackHole}})}}}
	}
	addrs := map[string]*matcherv3.Matcher_OnMatch{}
	for addr, p := range taken {
		addrs[addr] = nested(exactly("port", b.extension(&networkinputsv3.DestinationPortInput{}), p))
	}
	if len(addrs) == 0 { // a matcher wants an entry too
		addrs["0.0.0.0"] = b.chainNamed("none")
	}
	l.FilterChainMatcher = exactly("ip", b.extension(&networkinputsv3.DestinationIPInput{}), addrs)
	if len(named) > 0 {
		inspector := b.listenerFilter("envoy.filters.listener.tls_inspector", &tlsinspectorv3.TlsInspector{})
		inspector.FilterDisabled = &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_NotMatch{
			NotMatch: onPorts(slices.Sorted(maps.Keys(named))),
		}}
		l.ListenerFilters = append(l.ListenerFilters, inspector)
		l.ListenerFiltersTimeout, l.ContinueOnListenerFiltersTimeout = durationpb.New(5*time.Second), true
	}
	if len(sniffed) > 0 {
		inspector := b.listenerFilter("envoy.filters.listener.http_inspector", &httpinspectorv3.HttpInspector{})
		// Whoever declared a protocol is not waited for: on some ports the server speaks first.
		var never []uint16
		for p := range declared {
			if !sniffed[p] {
				never = append(never, p)
			}
		}
		slices.Sort(never)
		inspector.FilterDisabled = onPorts(never)
		l.ListenerFilters = append(l.ListenerFilters, inspector)
		l.ListenerFiltersTimeout = durationpb.New(5 * time.Second)
		l.ContinueOnListenerFiltersTimeout = true
	}
	return l
}

func onPorts(ports []uint16) *listenerv3.ListenerFilterChainMatchPredicate {
	var any []*listenerv3.ListenerFilterChainMatchPredicate
	for _, p := range ports {
		any = append(any, &listenerv3.ListenerFilterChainMatchPredicate{
			Rule: &listenerv3.ListenerFilterChainMatchPredicate_DestinationPortRange{DestinationPortRange: portRange(p)},
		})
	}
	switch len(any) {
	case 0:
		return nil
	case 1:
		return any[0]
	}
	return &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_OrMatch{
		OrMatch: &listenerv3.ListenerFilterChainMatchPredicate_MatchSet{Rules: any},
	}}
}

// byProtocol tells requests from other bytes.
func (b *builder) byProtocol(http, others *matcherv3.Matcher_OnMatch) *matcherv3.Matcher_OnMatch {
	m := exactly("protocol", b.extension(&networkinputsv3.ApplicationProtocolInput{}), map[string]*matcherv3.Matcher_OnMatch{
		"'http/1.0'": http, "'http/1.1'": http, "'h2c'": http,
	})
	m.OnNoMatch = others
	return nested(m)
}

func exactly(name string, input *xdscore.TypedExtensionConfig, m map[string]*matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	input.Name = name
	return &matcherv3.Matcher{MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
		Input:    input,
		TreeType: &matcherv3.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: m}},
	}}}
}

func nested(m *matcherv3.Matcher) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{Matcher: m}}
}

func (b *builder) chainNamed(name string) *matcherv3.Matcher_OnMatch {
	action := b.extension(wrapperspb.String(name))
	action.Name = name
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: action}}
}

func (b *builder) extension(m proto.Message) *xdscore.TypedExtensionConfig {
	return &xdscore.TypedExtensionConfig{TypedConfig: b.config(m)}
}

// serveHTTP routes requests. Nothing that a client says of itself in headers is believed: they come from outside as far as
// Envoy's own headers and client certificates go.
func (b *builder) serveHTTP(c chain) *listenerv3.Filter {
	m := &hcmv3.HttpConnectionManager{
		Tracing:            b.tracing(c),
		RequestIdExtension: b.requestID(c),
		StatPrefix:         c.name("http"),
		CodecType:          hcmv3.HttpConnectionManager_AUTO,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			ConfigSource: adsSource(), RouteConfigName: c.name("http"),
		}},
		HttpFilters: b.patchHTTP(c, slices.Concat(
			b.pluginFilters(c, mesh.PluginAuthN), b.tokenFilters(c), b.pluginFilters(c, mesh.PluginAuthZ), b.accessFilters(),
			[]*hcmv3.HttpFilter{
				b.routesFilter(askedFilter, &headermutationv3.HeaderMutation{}),
				b.routesFilter(corsFilter, &corsv3.Cors{}),               // before the limits, so that a page can read their answer
				b.routesFilter(routeAskFilter, &compositev3.Composite{}), // after CORS, whose preflights have no credentials
				b.limitFilter(c),
			},
			b.counterFilters(c),
			b.pluginFilters(c, mesh.PluginStats, mesh.PluginLast),
			[]*hcmv3.HttpFilter{b.routesFilter(faultFilter, &faultv3.HTTPFault{}), b.routesFilter(sessionFilter, &sessionv3.StatefulSession{})}, b.followFilter(c), []*hcmv3.HttpFilter{b.router()},
		)),
		UseRemoteAddress:              wrapperspb.Bool(true),
		InternalAddressConfig:         nobodyInternal(),
		EarlyHeaderMutationExtensions: []*corev3.TypedExtensionConfig{b.noEnvoyHeaders()},
		PreserveExternalRequestId:     true,
		ForwardClientCertDetails:      hcmv3.HttpConnectionManager_SANITIZE,
		ServerHeaderTransformation:    hcmv3.HttpConnectionManager_PASS_THROUGH,
		NormalizePath:                 wrapperspb.Bool(true),
		StripTrailingHostDot:          true,
		StreamIdleTimeout:             durationpb.New(0),
		HttpProtocolOptions:           &corev3.Http1ProtocolOptions{AcceptHttp_10: true},
		UpgradeConfigs:                []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		AccessLog:                     b.tells(c, true),
	}
	b.patchManager(c, m)
	return b.networkFilter("envoy.filters.network.http_connection_manager", m)
}

// nobodyInternal has Envoy take no client for one of its own. An empty list would mean all private addresses.
func nobodyInternal() *hcmv3.HttpConnectionManager_InternalAddressConfig {
	return &hcmv3.HttpConnectionManager_InternalAddressConfig{
		CidrRanges: []*corev3.CidrRange{{AddressPrefix: "255.255.255.255", PrefixLen: wrapperspb.UInt32(32)}},
	}
}

// noEnvoyHeaders drops what a client sends in the name of Envoy, before anything reads it.
func (b *builder) noEnvoyHeaders() *corev3.TypedExtensionConfig {
	return &corev3.TypedExtensionConfig{
		Name: "envoy.http.early_header_mutation.header_mutation",
		TypedConfig: b.config(&earlyv3.HeaderMutation{Mutations: []*mutationv3.HeaderMutation{{
			Action: &mutationv3.HeaderMutation_RemoveOnMatch_{RemoveOnMatch: &mutationv3.HeaderMutation_RemoveOnMatch{
				KeyMatcher: &envoymatcherv3.StringMatcher{MatchPattern: &envoymatcherv3.StringMatcher_Prefix{Prefix: "x-envoy-"}},
			}},
		}}}),
	}
}

func (b *builder) serveTCP(c chain) *listenerv3.Filter {
	p := b.tcpProxy(c)
	p.HashPolicy = b.connectionHash(c)
	to := b.overTLS(c, target{service: c.svc.Name, port: c.port.Port})
	p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: to.name()}
	b.patience(p, to)
	if f := b.asks(to); f != nil && f.To == "" {
		p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: blackHole}
	} else {
		ask(p, f)
	}
	if r := c.svc.RoutedAt("", c.port.Port); r != nil {
		b.share(p, c, r.Backends)
	}
	return b.networkFilter("envoy.filters.network.tcp_proxy", p)
}

// logFields are what is written about each request or connection.
func (b *builder) logFields(c chain, http bool) map[string]string {
	fields := map[string]string{
		"start_time": "%START_TIME%", "duration": "%DURATION%", "bytes_received": "%BYTES_RECEIVED%", "bytes_sent": "%BYTES_SENT%",
		"response_flags": "%RESPONSE_FLAGS%", "response_code_details": "%RESPONSE_CODE_DETAILS%",
		"downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%", "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
		"upstream_host": "%UPSTREAM_HOST%", "upstream_cluster": "%UPSTREAM_CLUSTER%",
		"upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
		"source_principal":                  "%FILTER_STATE(" + statePrincipal + ":PLAIN)%",
		"destination_service":               c.svc.Name.Hostname,
	}
	whoAndWhom(fields)
	if b.ingress != nil {
		fields["destination_service"] = ofService("host")
		fields["requested_server_name"] = "%REQUESTED_SERVER_NAME%"
		if !b.ingress.Tunnels { // all clients are from outside
			for _, f := range []string{"source_principal", "source_workload", "source_namespace"} {
				delete(fields, f)
			}
		}
	} else {
		fields["tunnel_forwarded"] = "%FILTER_STATE(" + stateForwarded + ":PLAIN)%"
	}
	if http {
		for k, v := range map[string]string{
			"method": "%REQ(:METHOD)%", "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "protocol": "%PROTOCOL%", "authority": "%REQ(:AUTHORITY)%",
			"response_code": "%RESPONSE_CODE%", "route_name": "%ROUTE_NAME%", "request_id": "%REQ(X-REQUEST-ID)%", "user_agent": "%REQ(USER-AGENT)%",
			"x_forwarded_for": "%REQ(X-FORWARDED-FOR)%", "traceparent": "%REQ(TRACEPARENT)%",
		} {
			fields[k] = v
		}
		reports(fields, rbacResults)
	} else {
		reports(fields, connectionResults)
	}
	return fields
}

// atEnd has a connection written about when it is over.
func atEnd(http bool) *accesslogv3.AccessLogFilter {
	if http {
		return nil
	}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_LogTypeFilter{
		LogTypeFilter: &accesslogv3.LogTypeFilter{Types: []datav3.AccessLogType{datav3.AccessLogType_TcpConnectionEnd}},
	}}
}

// originate puts one connection to an endpoint into the endpoint's tunnel.
func (b *builder) originate() *listenerv3.Listener {
	return &listenerv3.Listener{
		Name:              connectOriginate,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		ListenerFilters:   []*listenerv3.ListenerFilter{b.listenerFilter("envoy.filters.listener.original_dst", &originaldstv3.OriginalDst{})},
		FilterChains: []*listenerv3.FilterChain{{
			Name: connectOriginate,
			Filters: []*listenerv3.Filter{b.networkFilter("envoy.filters.network.tcp_proxy", &tcpproxyv3.TcpProxy{
				StatPrefix:       connectOriginate,
				ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: hboneCluster},
				IdleTimeout:      durationpb.New(0),
				TunnelingConfig: &tcpproxyv3.TcpProxy_TunnelingConfig{
					Hostname: "%DOWNSTREAM_LOCAL_ADDRESS%",
					HeadersToAdd: []*corev3.HeaderValueOption{{
						Header: &corev3.HeaderValue{Key: "baggage", Value: b.baggage()},
					}},
				},
			})},
		}},
	}
}

// baggage names the waypoint to the endpoint's node, for its telemetry.
func (b *builder) baggage() string {
	cfg := b.s.Config()
	out := fmt.Sprintf("k8s.cluster.name=%s,k8s.namespace.name=%s", cfg.Cluster, b.self.Namespace)
	if g := b.ingress; g != nil {
		out += fmt.Sprintf(",k8s.deployment.name=%[1]s,service.name=%[1]s,service.version=latest", g.Workload)
	} else if svc := b.lookup(b.self); svc != nil {
		out += fmt.Sprintf(",k8s.deployment.name=%[1]s,service.name=%[1]s,service.version=latest", svc.Short)
	}
	return out
}

// tls is the waypoint's side of both kinds of tunnel.
func (b *builder) tls() *tlsv3.CommonTlsContext {
	var sans []*tlsv3.SubjectAltNameMatcher
	for _, d := range b.s.Config().TrustDomains() {
		sans = append(sans, &tlsv3.SubjectAltNameMatcher{
			SanType: tlsv3.SubjectAltNameMatcher_URI,
			Matcher: &envoymatcherv3.StringMatcher{MatchPattern: &envoymatcherv3.StringMatcher_Prefix{Prefix: "spiffe://" + d + "/"}},
		})
	}
	return &tlsv3.CommonTlsContext{
		AlpnProtocols: []string{"h2"},
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: CertSecret, SdsConfig: sdsSource()}},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: sans},
				ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: RootsSecret, SdsConfig: sdsSource()},
			},
		},
	}
}

// tunnelOptions are the windows of a tunnel, as nodes have them.
func (b *builder) tunnelOptions() *corev3.Http2ProtocolOptions {
	return &corev3.Http2ProtocolOptions{
		AllowConnect:                true,
		InitialStreamWindowSize:     wrapperspb.UInt32(4 << 20),
		InitialConnectionWindowSize: wrapperspb.UInt32(16 << 20),
		ConnectionKeepalive:         &corev3.KeepaliveSettings{Interval: durationpb.New(10 * time.Second), Timeout: durationpb.New(20 * time.Second)},
	}
}

func (b *builder) router() *hcmv3.HttpFilter {
	return b.httpFilter(routerFilter, &routerv3.Router{SuppressEnvoyHeaders: true})
}

func (b *builder) httpFilter(name string, m proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: b.config(m)}}
}

// routesFilter is not there for a request whose route says nothing of it, and costs that one nothing.
func (b *builder) routesFilter(name string, m proto.Message) *hcmv3.HttpFilter {
	f := b.httpFilter(name, m)
	f.Disabled = true
	return f
}

// apart is a filter whose configuration is a resource of its own.
func (b *builder) apart(name string, m proto.Message) *hcmv3.HttpFilter {
	config := b.config(m)
	b.extensions = append(b.extensions, &corev3.TypedExtensionConfig{Name: name, TypedConfig: config})
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{
		ConfigSource: adsSource(), TypeUrls: []string{config.TypeUrl},
	}}}
}

func (b *builder) networkFilter(name string, m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: b.config(m)}}
}

func (b *builder) listenerFilter(name string, m proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: b.config(m)}}
}

func (b *builder) transport(name string, m proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: name, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: b.config(m)}}
}
