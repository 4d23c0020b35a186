package waypoint

import (
	"net/netip"
	"strconv"
	"strings"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	dynamicv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dynamic_forward_proxy/v3"
	dnscachev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/dynamic_forward_proxy/v3"
	httpdynamicv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/dynamic_forward_proxy/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	snidynamicv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/sni_dynamic_forward_proxy/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A host with a wildcard may have its requests go to whatever name they are for, below it: Envoy resolves the name that a
// request says, or that TLS asks for. A client chooses where its requests go by that, so three things hold it:
//
//	the name  is below the host, or the request is answered with 403 and the connection is closed
//	the port  is the ServiceEntry's: a port in the name has to be the same
//	what the name resolves to is no address of private networks, of this machine, its link or a cloud's metadata: whoever
//	          has a name below the host could else have the waypoint call what only it can reach
//
// Each such service has a cache of names of its own, so that nothing that another let in is found.

// How many names one service may have at once, and for how long one is kept that nobody asks for.
const (
	dynamicNames = 4096
	dynamicKept  = 5 * time.Minute
)

// unreachedRanges are the addresses that no name leads to. An address that embeds another (NAT64, 6to4, Teredo) is left out whole.
var unreachedRanges = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("168.63.129.16/32"), // metadata at Azure; elsewhere it is in the ranges around
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.0.0.0/24"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("224.0.0.0/3"),
	netip.MustParsePrefix("::/8"), netip.MustParsePrefix("2001::/23"), netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("fc00::/6"), // unique local, link-local, site-local and multicast
}

// names is the cache of the names below a host.
func names(service mesh.ServiceName) *dnscachev3.DnsCacheConfig {
	filter := &envoymatcherv3.AddressMatcher{}
	for _, p := range unreachedRanges {
		filter.Ranges = append(filter.Ranges, &xdscore.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(p.Bits()))})
	}
	return &dnscachev3.DnsCacheConfig{
		Name:            service.String(),
		DnsLookupFamily: clusterv3.Cluster_V4_PREFERRED,
		DnsRefreshRate:  durationpb.New(lookUpEvery), HostTtl: durationpb.New(dynamicKept), MaxHosts: wrapperspb.UInt32(dynamicNames),
		DnsFailureRefreshRate: &clusterv3.Cluster_RefreshRate{BaseInterval: durationpb.New(lookUpAgain), MaxInterval: durationpb.New(lookUpAgainIn)},
		ResolvedAddressFilter: filter,
	}
}

// dynamic reports whether the endpoints of a service are whatever its names have.
func (b *builder) dynamic(n mesh.ServiceName) bool {
	svc := b.lookup(n)
	return svc != nil && svc.Dynamic && !b.goesThrough(svc)
}

// followed has a cluster go where the name says. Where that is to be by TLS it goes nowhere: Envoy would have to check each
// certificate for the name. Nor does it go by a proxy, which would be what the name is resolved to.
func (b *builder) followed(c *clusterv3.Cluster, t target) {
	c.EdsClusterConfig, c.TransportSocketMatches, c.LbConfig, c.LbSubsetConfig, c.CommonLbConfig = nil, nil, nil, nil, nil
	c.TransportSocket = b.proxied(t, b.raw())
	if b.encryption(t) != nil || b.asks(t) != nil {
		c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		return
	}
	c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
		Name: "envoy.clusters.dynamic_forward_proxy",
		TypedConfig: b.config(&dynamicv3.ClusterConfig{
			ClusterImplementationSpecifier: &dynamicv3.ClusterConfig_DnsCacheConfig{DnsCacheConfig: names(t.service)},
			AllowInsecureClusterOptions:    true, // that no certificate is checked: what it sends by itself has no TLS
		}),
	}}
}

// followFilter resolves the name that a request is for.
func (b *builder) followFilter(c chain) []*hcmv3.HttpFilter {
	if !c.dynamic() {
		return nil
	}
	return []*hcmv3.HttpFilter{b.httpFilter("envoy.filters.http.dynamic_forward_proxy", &httpdynamicv3.FilterConfig{
		ImplementationSpecifier: &httpdynamicv3.FilterConfig_DnsCacheConfig{DnsCacheConfig: names(c.svc.Name)},
	})}
}

func (c chain) dynamic() bool { return c.ingress == nil && c.svc.Dynamic }

// domains are the hosts that requests of a port may be for: whoever asks for the address of a service has chosen it, but where its
// names say where to go. None where the port that the name means is not the one to call.
func (c chain) domains() []string {
	if !c.dynamic() {
		return []string{"*"}
	}
	if c.port.Target != c.port.Port {
		return nil
	}
	host := strings.ToLower(c.svc.Name.Hostname)
	out := []string{host + ":" + strconv.Itoa(int(c.port.Port))}
	if c.port.Port == 80 { // which a name means that has no port
		out = append(out, host)
	}
	return out
}

// followTLS has connections with TLS go to the server name that they ask for, where the host of the service covers it; all
// others are closed.
func (b *builder) followTLS(out *served) {
	c := out.chain
	to := b.overTLS(c, target{service: c.svc.Name, port: c.port.Port}).name()
	c.port.App = mesh.AppTLS
	p := b.tcpProxy(c)
	p.ClusterSpecifier = &tcpproxyv3.TcpProxy_Cluster{Cluster: to}
	name := c.name("tls")
	filters := append(b.connectionAccess(c), b.networkFilter("envoy.filters.network.sni_dynamic_forward_proxy", &snidynamicv3.FilterConfig{
		DnsCacheConfig: names(c.svc.Name), PortSpecifier: &snidynamicv3.FilterConfig_PortValue{PortValue: uint32(c.port.Target)},
	}), b.networkFilter("envoy.filters.network.tcp_proxy", p))
	out.chains = append(out.chains, &listenerv3.FilterChain{Name: name, Filters: filters})
	out.named = true
	out.on = nested(&matcherv3.Matcher{MatcherType: &matcherv3.Matcher_MatcherList_{MatcherList: &matcherv3.Matcher_MatcherList{
		Matchers: []*matcherv3.Matcher_MatcherList_FieldMatcher{{Predicate: b.serverName(strings.ToLower(c.svc.Name.Hostname)), OnMatch: b.chainNamed(name)}},
	}}})
}
