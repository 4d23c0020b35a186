package routing

import (
	"cmp"
	"fmt"

	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// DestinationRule returns the subsets of a DestinationRule and how endpoints are used, and in words what of it does not
// work.
func DestinationRule(d *networking.DestinationRule) (subsets []mesh.Subset, traffic []mesh.Traffic, problems []string) {
	c := &trafficConverter{}
	base := settings{d.TrafficPolicy.GetLoadBalancer(), d.TrafficPolicy.GetConnectionPool(), d.TrafficPolicy.GetOutlierDetection(), d.TrafficPolicy.GetTls(), d.TrafficPolicy.GetRetryBudget()}
	c.at = "trafficPolicy"
	c.unfollowed(d.TrafficPolicy)
	traffic = c.add(traffic, "", base, d.TrafficPolicy.GetPortLevelSettings())
	for i, s := range d.Subsets {
		if s.Name == "" {
			continue
		}
		subsets = append(subsets, mesh.Subset{Name: s.Name, Labels: s.Labels})
		p := s.TrafficPolicy
		if p == nil {
			continue
		}
		c.at = fmt.Sprintf("subsets[%d].trafficPolicy", i)
		c.unfollowed(p)
		own := settings{cmp.Or(p.LoadBalancer, base.balancer), cmp.Or(p.ConnectionPool, base.pool), cmp.Or(p.OutlierDetection, base.outliers), cmp.Or(p.Tls, base.tls), cmp.Or(p.RetryBudget, base.retries)}
		ports := p.PortLevelSettings
		if len(ports) == 0 {
			ports = d.TrafficPolicy.GetPortLevelSettings()
		}
		traffic = c.add(traffic, s.Name, own, ports)
	}
	return subsets, traffic, c.problems
}

// settings are the parts of a policy that are followed.
type settings struct {
	balancer *networking.LoadBalancerSettings
	pool     *networking.ConnectionPoolSettings
	outliers *networking.OutlierDetection
	tls      *networking.ClientTLSSettings
	retries  *networking.TrafficPolicy_RetryBudget
}

type trafficConverter struct {
	at       string
	problems []string
}

func (c *trafficConverter) say(field, text string) {
	c.problems = append(c.problems, c.at+"."+field+" "+text)
}

// ignored names a field that is there and not followed.
func (c *trafficConverter) ignored(there bool, field string) {
	if there {
		c.say(field, "is not followed")
	}
}

func (c *trafficConverter) unfollowed(p *networking.TrafficPolicy) {
	c.ignored(p.GetTunnel() != nil, "tunnel")
	c.ignored(p.GetProxyProtocol() != nil, "proxyProtocol")
}

// add converts what holds for a subset, and for its ports what they do not take from it.
func (c *trafficConverter) add(out []mesh.Traffic, subset string, s settings, ports []*networking.TrafficPolicy_PortTrafficPolicy) []mesh.Traffic {
	if s != (settings{}) {
		out = append(out, c.convert(mesh.Traffic{Subset: subset}, s))
	}
	at := c.at
	defer func() { c.at = at }()
	for i, p := range ports {
		c.at = fmt.Sprintf("%s.portLevelSettings[%d]", at, i)
		n := p.GetPort().GetNumber()
		if n == 0 || n > 65535 {
			c.say("port.number", "is no port")
			continue
		}
		out = append(out, c.convert(mesh.Traffic{Subset: subset, Port: uint16(n)}, settings{p.LoadBalancer, p.ConnectionPool, p.OutlierDetection, p.Tls, nil}))
	}
	return out
}

func (c *trafficConverter) convert(t mesh.Traffic, s settings) mesh.Traffic {
	c.balance(&t, s.balancer)
	c.pool(&t, s.pool)
	c.outliers(&t, s.outliers)
	t.Locality = c.locality(s.balancer.GetLocalityLbSetting(), t.Outliers != nil)
	t.RetryBudget = c.retryBudget(s.retries)
	t.TLS = c.tls(s.tls)
	return t
}

func (c *trafficConverter) balance(t *mesh.Traffic, b *networking.LoadBalancerSettings) {
	c.ignored(b.GetZoneAwareLbSetting() != nil, "loadBalancer.zoneAwareLbSetting")
	t.Warmup = c.warmup(b)
	switch p := b.GetLbPolicy().(type) {
	case *networking.LoadBalancerSettings_Simple:
		switch p.Simple {
		case networking.LoadBalancerSettings_RANDOM:
			t.Balance = mesh.BalanceRandom
		case networking.LoadBalancerSettings_ROUND_ROBIN:
			t.Balance = mesh.BalanceRoundRobin
		case networking.LoadBalancerSettings_PASSTHROUGH:
			c.say("loadBalancer.simple", "PASSTHROUGH is not followed: the endpoint with the fewest requests is next")
		}
	case *networking.LoadBalancerSettings_ConsistentHash:
		t.Hash = c.hash(p.ConsistentHash)
	}
}

func (c *trafficConverter) hash(h *networking.LoadBalancerSettings_ConsistentHashLB) *mesh.HashKey {
	k := &mesh.HashKey{}
	switch p := h.GetHashKey().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		k.Header = p.HttpHeaderName
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		k.Query = p.HttpQueryParameterName
	case *networking.LoadBalancerSettings_ConsistentHashLB_UseSourceIp:
		k.SourceIP = p.UseSourceIp
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		k.Cookie, k.CookiePath = p.HttpCookie.GetName(), p.HttpCookie.GetPath()
		if ttl := p.HttpCookie.GetTtl(); ttl != nil {
			d := ttl.AsDuration()
			k.CookieTTL = &d
		}
	}
	if k.Header == "" && k.Query == "" && k.Cookie == "" && !k.SourceIP {
		c.say("loadBalancer.consistentHash", "names nothing to go by and is not followed")
		return nil
	}
	//lint:ignore SA1019 it is what most rules have
	k.RingSize = h.GetMinimumRingSize()
	switch p := h.GetHashAlgorithm().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_RingHash_:
		k.RingSize = p.RingHash.GetMinimumRingSize()
	case *networking.LoadBalancerSettings_ConsistentHashLB_Maglev:
		k.Maglev, k.Tables = true, p.Maglev.GetTableSize()
		if k.Tables > 5_000_011 {
			c.say("loadBalancer.consistentHash.maglev.tableSize", "is above 5000011, and left out")
			k.Tables = 0
		}
	}
	if k.RingSize > 8<<20 {
		c.say("loadBalancer.consistentHash.minimumRingSize", "is above 8388608, and left out")
		k.RingSize = 0
	}
	return k
}

func (c *trafficConverter) pool(t *mesh.Traffic, p *networking.ConnectionPoolSettings) {
	limit := func(field string, n int32) uint32 {
		if n < 0 {
			c.say(field, "is negative, and left out")
			return 0
		}
		return uint32(n)
	}
	if tcp := p.GetTcp(); tcp != nil {
		t.MaxConnections = limit("connectionPool.tcp.maxConnections", tcp.MaxConnections)
		if t.ConnectTimeout = c.length("connectionPool.tcp.connectTimeout", tcp.ConnectTimeout); t.ConnectTimeout > 0 {
			c.say("connectionPool.tcp.connectTimeout", "is followed for endpoints outside the mesh alone")
		}
		if k := tcp.TcpKeepalive; k != nil {
			const at = "connectionPool.tcp.tcpKeepalive"
			c.say(at, "is followed for endpoints outside the mesh alone")
			t.Keepalive = &mesh.Keepalive{Probes: k.Probes, Idle: c.seconds(at+".time", k.Time), Interval: c.seconds(at+".interval", k.Interval)}
		}
		t.ConnectionDuration = c.length("connectionPool.tcp.maxConnectionDuration", tcp.MaxConnectionDuration)
		t.TCPIdleTimeout = c.length("connectionPool.tcp.idleTimeout", tcp.IdleTimeout)
	}
	if h := p.GetHttp(); h != nil {
		t.MaxPending = limit("connectionPool.http.http1MaxPendingRequests", h.Http1MaxPendingRequests)
		t.MaxRequests = limit("connectionPool.http.http2MaxRequests", h.Http2MaxRequests)
		t.MaxRequestsPerConnection = limit("connectionPool.http.maxRequestsPerConnection", h.MaxRequestsPerConnection)
		t.MaxRetries = limit("connectionPool.http.maxRetries", h.MaxRetries)
		t.IdleTimeout = c.length("connectionPool.http.idleTimeout", h.IdleTimeout)
		t.MaxStreams = limit("connectionPool.http.maxConcurrentStreams", h.MaxConcurrentStreams)
		switch {
		case h.UseClientProtocol:
			t.Speak = mesh.SpeakClient
		case h.H2UpgradePolicy == networking.ConnectionPoolSettings_HTTPSettings_UPGRADE:
			t.Speak = mesh.SpeakHTTP2
		}
		if k := h.Http2KeepAlive; k != nil {
			t.Ping = c.length("connectionPool.http.http2KeepAlive.interval", k.Interval)
			t.PingTimeout = c.length("connectionPool.http.http2KeepAlive.timeout", k.Timeout)
			if t.Ping == 0 || t.PingTimeout == 0 {
				c.say("connectionPool.http.http2KeepAlive", "needs interval and timeout, and is left out")
				t.Ping, t.PingTimeout = 0, 0
			}
		}
	}
}

func (c *trafficConverter) outliers(t *mesh.Traffic, o *networking.OutlierDetection) {
	if o == nil {
		return
	}
	count := func(v *wrapperspb.UInt32Value) *uint32 {
		if v == nil {
			return nil
		}
		return &v.Value
	}
	t.Outliers = &mesh.Outliers{
		Consecutive5xx: count(o.Consecutive_5XxErrors), ConsecutiveGateway: count(o.ConsecutiveGatewayErrors),
		ConsecutiveLocal: count(o.ConsecutiveLocalOriginFailures), SplitLocal: o.SplitExternalLocalOriginErrors,
		Interval: max(0, o.Interval.AsDuration()), Ejection: max(0, o.BaseEjectionTime.AsDuration()),
		MaxPercent: uint32(min(max(0, o.MaxEjectionPercent), 100)), MinHealthyPercent: uint32(min(max(0, o.MinHealthPercent), 100)),
	}
	//lint:ignore SA1019 it is there in old rules
	c.ignored(o.ConsecutiveErrors != 0, "outlierDetection.consecutiveErrors")
	c.ignored(len(o.OutlierDetectionHttpErrorCodes) > 0, "outlierDetection.outlierDetectionHttpErrorCodes")
}
