package routing

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// DestinationRule returns the subsets of a DestinationRule and how endpoints are used, and in words what of it does not
// work.
func DestinationRule(d *networking.DestinationRule) (subsets []mesh.Subset, traffic []mesh.Traffic, problems []string) {
	c := &trafficConverter{}
	base := settings{d.TrafficPolicy.GetLoadBalancer(), d.TrafficPolicy.GetConnectionPool(), d.TrafficPolicy.GetOutlierDetection(), d.TrafficPolicy.GetTls(), d.TrafficPolicy.GetRetryBudget(), d.TrafficPolicy.GetTunnel(), d.TrafficPolicy.GetProxyProtocol()}
	c.at = "trafficPolicy"
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
		own := settings{cmp.Or(p.LoadBalancer, base.balancer), cmp.Or(p.ConnectionPool, base.pool), cmp.Or(p.OutlierDetection, base.outliers), cmp.Or(p.Tls, base.tls), cmp.Or(p.RetryBudget, base.retries),
			cmp.Or(p.Tunnel, base.tunnel), cmp.Or(p.ProxyProtocol, base.header)}
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
	tunnel   *networking.TrafficPolicy_TunnelSettings
	header   *networking.TrafficPolicy_ProxyProtocol
}

type trafficConverter struct {
	at       string
	problems []string
}

func (c *trafficConverter) say(field, text string) {
	c.problems = append(c.problems, c.at+"."+field+" "+text)
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
		out = append(out, c.convert(mesh.Traffic{Subset: subset, Port: uint16(n)}, settings{p.LoadBalancer, p.ConnectionPool, p.OutlierDetection, p.Tls, nil, s.tunnel, s.header})) // the last two a port cannot say
	}
	return out
}

func (c *trafficConverter) convert(t mesh.Traffic, s settings) mesh.Traffic {
	c.balance(&t, s.balancer)
	c.pool(&t, s.pool)
	c.outliers(&t, s.outliers)
	t.Locality = c.locality(s.balancer, t.Outliers != nil)
	t.RetryBudget = c.retryBudget(s.retries)
	t.TLS = c.tls(s.tls)
	t.Forward = c.forward(s.tunnel)
	if s.header != nil {
		t.Proxied = uint8(s.header.Version) + 1
	}
	return t
}

// forward is the proxy that connections go by. What cannot be followed is not sent without it: it has nowhere to go.
func (c *trafficConverter) forward(s *networking.TrafficPolicy_TunnelSettings) *mesh.Forward {
	if s == nil {
		return nil
	}
	say := func(field, text string) {
		if !strings.Contains(c.at, "portLevelSettings") { // which only take it from above
			c.say("tunnel."+field, text)
		}
	}
	broken := func(field, text string) *mesh.Forward {
		say(field, text+": connections that it is for are closed")
		return &mesh.Forward{}
	}
	host := strings.ToLower(s.TargetHost)
	_, err := netip.ParseAddr(host)
	switch {
	case s.Protocol != "" && s.Protocol != "CONNECT" && s.Protocol != "POST":
		return broken("protocol", strconv.Quote(s.Protocol)+" is neither CONNECT nor POST")
	case err != nil && (!validHost(host) || strings.HasPrefix(host, "*")):
		return broken("targetHost", strconv.Quote(s.TargetHost)+" is neither a host nor an address")
	case s.TargetPort == 0 || s.TargetPort > 65535:
		return broken("targetPort", "is no port")
	}
	if s.Protocol == "POST" {
		say("protocol", "POST is followed on ports that are declared as HTTP/2 alone, and other connections are closed: of HTTP/1.1 Envoy does not survive all answers to it")
	}
	return &mesh.Forward{To: net.JoinHostPort(host, strconv.Itoa(int(s.TargetPort))), Post: s.Protocol == "POST"}
}

func (c *trafficConverter) balance(t *mesh.Traffic, b *networking.LoadBalancerSettings) {
	t.Warmup = c.warmup(b)
	switch p := b.GetLbPolicy().(type) {
	case *networking.LoadBalancerSettings_Simple:
		switch p.Simple {
		case networking.LoadBalancerSettings_RANDOM:
			t.Balance = mesh.BalanceRandom
		case networking.LoadBalancerSettings_ROUND_ROBIN:
			t.Balance = mesh.BalanceRoundRobin
		case networking.LoadBalancerSettings_PASSTHROUGH:
			c.say("loadBalancer.simple", "PASSTHROUGH is not followed: what clients ask a waypoint or a gateway for is no endpoint's address; the endpoint with the fewest requests is next")
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
		for _, a := range p.HttpCookie.GetAttributes() {
			k.CookieAttributes = append(k.CookieAttributes, mesh.HTTPHeader{Name: a.GetName(), Value: a.GetValue()})
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
	if o.ConsecutiveErrors != 0 {
		c.say("outlierDetection.consecutiveErrors", "is not followed, as in Istio, which has withdrawn it; write consecutiveGatewayErrors or consecutive5xxErrors")
	}
	for i, code := range o.OutlierDetectionHttpErrorCodes {
		if code < 100 || code > 599 {
			c.say(fmt.Sprintf("outlierDetection.outlierDetectionHttpErrorCodes[%d]", i), "is no status of HTTP, and left out")
		} else if !slices.Contains(t.Outliers.Errors, code) {
			t.Outliers.Errors = append(t.Outliers.Errors, code)
		}
	}
}
