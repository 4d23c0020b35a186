package waypoint

import (
	"cmp"
	"math"
	"slices"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	commonmatcherv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	upstreamhttpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// traffic is how the endpoints of a target are used.
func (b *builder) traffic(t target) *mesh.Traffic {
	if svc := b.lookup(t.service); svc != nil && svc.RuledFor(t.from, b.self.Namespace) {
		if use := svc.TrafficFor(t.from, t.subset, t.port); use != nil {
			return use
		}
	}
	return &mesh.Traffic{}
}

// limits are those that somebody has set; Envoy's own would refuse what comes when there is much of it.
func limits(t *mesh.Traffic) *clusterv3.CircuitBreakers {
	limit := func(n uint32) *wrapperspb.UInt32Value {
		if n == 0 {
			n = math.MaxUint32
		}
		return wrapperspb.UInt32(n)
	}
	out := &clusterv3.CircuitBreakers_Thresholds{
		MaxConnections: limit(t.MaxConnections), MaxPendingRequests: limit(t.MaxPending), MaxRequests: limit(t.MaxRequests), MaxRetries: limit(t.MaxRetries),
	}
	if r := t.RetryBudget; r != nil {
		out.RetryBudget = &clusterv3.CircuitBreakers_Thresholds_RetryBudget{BudgetPercent: &typev3.Percent{Value: r.Percent}, MinRetryConcurrency: wrapperspb.UInt32(r.Least)}
		if r.Over > 0 {
			out.RetryBudget.BudgetInterval = durationpb.New(r.Over)
		}
	}
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{out}}
}

// balance chooses among endpoints.
func balance(c *clusterv3.Cluster, t *mesh.Traffic, everywhere *mesh.LocalityLB) {
	switch t.Balance {
	case mesh.BalanceRandom:
		c.LbPolicy = clusterv3.Cluster_RANDOM
	case mesh.BalanceRoundRobin:
		c.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
	}
	if o := t.Outliers; o != nil {
		c.CommonLbConfig.HealthyPanicThreshold.Value = float64(o.MinHealthyPercent)
	}
	if l := cmp.Or(t.Locality, everywhere); l != nil && (len(l.Distribute) > 0 || l.Zones) {
		c.CommonLbConfig.LocalityConfigSpecifier = &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{LocalityWeightedLbConfig: &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig{}}
	}
	if slow := slowStart(t.Warmup); slow != nil && t.Hash == nil {
		switch c.LbPolicy {
		case clusterv3.Cluster_LEAST_REQUEST:
			c.LbConfig = &clusterv3.Cluster_LeastRequestLbConfig_{LeastRequestLbConfig: &clusterv3.Cluster_LeastRequestLbConfig{SlowStartConfig: slow}}
		case clusterv3.Cluster_ROUND_ROBIN:
			c.LbConfig = &clusterv3.Cluster_RoundRobinLbConfig_{RoundRobinLbConfig: &clusterv3.Cluster_RoundRobinLbConfig{SlowStartConfig: slow}}
		}
	}
	if t.Hash == nil {
		return
	}
	size := func(n, otherwise uint64) *wrapperspb.UInt64Value {
		if n == 0 {
			n = otherwise
		}
		return wrapperspb.UInt64(n)
	}
	if t.Hash.Maglev {
		c.LbPolicy = clusterv3.Cluster_MAGLEV
		c.LbConfig = &clusterv3.Cluster_MaglevLbConfig_{MaglevLbConfig: &clusterv3.Cluster_MaglevLbConfig{TableSize: size(t.Hash.Tables, 65537)}}
		return
	}
	c.LbPolicy = clusterv3.Cluster_RING_HASH
	c.LbConfig = &clusterv3.Cluster_RingHashLbConfig_{RingHashLbConfig: &clusterv3.Cluster_RingHashLbConfig{MinimumRingSize: size(t.Hash.RingSize, 1024)}}
}

func slowStart(w *mesh.Warmup) *clusterv3.Cluster_SlowStartConfig {
	if w == nil {
		return nil
	}
	out := &clusterv3.Cluster_SlowStartConfig{SlowStartWindow: durationpb.New(w.Over)}
	if w.Percent != nil {
		out.MinWeightPercent = &typev3.Percent{Value: *w.Percent}
	}
	if w.Aggression != nil {
		out.Aggression = &corev3.RuntimeDouble{DefaultValue: *w.Aggression, RuntimeKey: "warren.warmup.aggression"} // a key is needed; nobody sets it
	}
	return out
}

// keepalive has the kernel probe connections.
func keepalive(k *mesh.Keepalive) *clusterv3.UpstreamConnectionOptions {
	if k == nil {
		return nil
	}
	set := func(n uint32) *wrapperspb.UInt32Value {
		if n == 0 {
			return nil
		}
		return wrapperspb.UInt32(n)
	}
	return &clusterv3.UpstreamConnectionOptions{TcpKeepalive: &corev3.TcpKeepalive{
		KeepaliveProbes: set(k.Probes), KeepaliveTime: set(uint32(k.Idle / time.Second)), KeepaliveInterval: set(uint32(k.Interval / time.Second)),
	}}
}

// http2Options are those of connections of HTTP/2 to an endpoint.
func http2Options(t *mesh.Traffic) *corev3.Http2ProtocolOptions {
	o := &corev3.Http2ProtocolOptions{}
	if t.MaxStreams > 0 {
		o.MaxConcurrentStreams = wrapperspb.UInt32(t.MaxStreams)
	}
	if t.Ping > 0 {
		o.ConnectionKeepalive = &corev3.KeepaliveSettings{Interval: durationpb.New(t.Ping), Timeout: durationpb.New(t.PingTimeout)}
	}
	return o
}

// connections are the limits of one connection to an endpoint.
func connections(t *mesh.Traffic) *corev3.HttpProtocolOptions {
	if t.IdleTimeout == 0 && t.MaxRequestsPerConnection == 0 && t.ConnectionDuration == 0 {
		return nil
	}
	o := &corev3.HttpProtocolOptions{}
	if t.IdleTimeout > 0 {
		o.IdleTimeout = durationpb.New(t.IdleTimeout)
	}
	if t.ConnectionDuration > 0 {
		o.MaxConnectionDuration = durationpb.New(t.ConnectionDuration)
	}
	if t.MaxRequestsPerConnection > 0 {
		o.MaxRequestsPerConnection = wrapperspb.UInt32(t.MaxRequestsPerConnection)
	}
	return o
}

// maxEjection is Envoy's own, which the first may not exceed.
const maxEjection = 300 * time.Second

// outliers takes endpoints out that fail. By default those do that answer five times in a row with 5xx.
func outliers(o *mesh.Outliers) *clusterv3.OutlierDetection {
	if o == nil {
		return nil
	}
	out := &clusterv3.OutlierDetection{
		SplitExternalLocalOriginErrors: o.SplitLocal,
		// Rates are for who asks for them, and nobody can.
		EnforcingSuccessRate: wrapperspb.UInt32(0),
	}
	count := func(n *uint32, value, enforcing **wrapperspb.UInt32Value) {
		if n == nil {
			return
		}
		if *n > 0 {
			*value, *enforcing = wrapperspb.UInt32(*n), wrapperspb.UInt32(100)
		} else {
			*enforcing = wrapperspb.UInt32(0)
		}
	}
	count(o.Consecutive5xx, &out.Consecutive_5Xx, &out.EnforcingConsecutive_5Xx)
	count(o.ConsecutiveGateway, &out.ConsecutiveGatewayFailure, &out.EnforcingConsecutiveGatewayFailure)
	if o.SplitLocal {
		count(o.ConsecutiveLocal, &out.ConsecutiveLocalOriginFailure, &out.EnforcingConsecutiveLocalOriginFailure)
		out.EnforcingLocalOriginSuccessRate = wrapperspb.UInt32(0)
	}
	if o.Interval > 0 {
		out.Interval = durationpb.New(o.Interval)
	}
	if o.Ejection > 0 {
		out.BaseEjectionTime = durationpb.New(o.Ejection)
		if o.Ejection > maxEjection {
			out.MaxEjectionTime = durationpb.New(o.Ejection)
		}
	}
	if o.MaxPercent > 0 {
		out.MaxEjectionPercent = wrapperspb.UInt32(o.MaxPercent)
	}
	return out
}

// failures are the answers that count as such; nil: those that always do.
func failures(o *mesh.Outliers) *upstreamhttpv3.HttpProtocolOptions_OutlierDetection {
	if o == nil || len(o.Errors) == 0 {
		return nil
	}
	var any []*commonmatcherv3.MatchPredicate
	for _, code := range o.Errors {
		any = append(any, &commonmatcherv3.MatchPredicate{Rule: &commonmatcherv3.MatchPredicate_HttpResponseHeadersMatch{HttpResponseHeadersMatch: &commonmatcherv3.HttpHeadersMatch{
			Headers: []*routev3.HeaderMatcher{headerMatch(":status", mesh.TextMatch{Kind: mesh.TextExact, Value: strconv.Itoa(int(code))}, false)},
		}}})
	}
	if len(any) == 1 {
		return &upstreamhttpv3.HttpProtocolOptions_OutlierDetection{ErrorMatcher: any[0]}
	}
	return &upstreamhttpv3.HttpProtocolOptions_OutlierDetection{ErrorMatcher: &commonmatcherv3.MatchPredicate{Rule: &commonmatcherv3.MatchPredicate_OrMatch{OrMatch: &commonmatcherv3.MatchPredicate_MatchSet{Rules: any}}}}
}

// hashPolicies say what of a request the endpoints of a rule's backends are chosen by.
func (b *builder) hashPolicies(c chain, r *mesh.HTTPRule) []*routev3.RouteAction_HashPolicy {
	var out []*routev3.RouteAction_HashPolicy
	for i := range r.Backends {
		k := b.traffic(b.target(c, &r.Backends[i])).Hash
		if k == nil {
			continue
		}
		p := &routev3.RouteAction_HashPolicy{}
		switch {
		case k.Header != "":
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_Header_{Header: &routev3.RouteAction_HashPolicy_Header{HeaderName: k.Header}}
		case k.Query != "":
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_QueryParameter_{QueryParameter: &routev3.RouteAction_HashPolicy_QueryParameter{Name: k.Query}}
		case k.Cookie != "":
			cookie := &routev3.RouteAction_HashPolicy_Cookie{Name: k.Cookie, Path: k.CookiePath}
			if k.CookieTTL != nil {
				cookie.Ttl = durationpb.New(*k.CookieTTL)
			}
			for _, a := range k.CookieAttributes {
				cookie.Attributes = append(cookie.Attributes, &routev3.RouteAction_HashPolicy_CookieAttribute{Name: a.Name, Value: a.Value})
			}
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_Cookie_{Cookie: cookie}
		default:
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_ConnectionProperties_{ConnectionProperties: &routev3.RouteAction_HashPolicy_ConnectionProperties{SourceIp: true}}
		}
		if !slices.ContainsFunc(out, func(q *routev3.RouteAction_HashPolicy) bool { return proto.Equal(p, q) }) {
			out = append(out, p)
		}
	}
	return out
}

// connectionHash chooses by the client's address where that was asked for.
func (b *builder) connectionHash(c chain) []*typev3.HashPolicy {
	k := b.traffic(target{service: c.svc.Name, port: c.port.Port}).Hash
	if k == nil || !k.SourceIP {
		return nil
	}
	return []*typev3.HashPolicy{{PolicySpecifier: &typev3.HashPolicy_SourceIp_{SourceIp: &typev3.HashPolicy_SourceIp{}}}}
}
