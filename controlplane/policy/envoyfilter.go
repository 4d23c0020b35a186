package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	istioapi "istio.io/api/networking/v1alpha3"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// istioVersion is the release of Istio whose API is followed, by which patches are made for proxies of some versions alone.
const istioVersion = "1.31.1"

// CompiledPatches is an EnvoyFilter as waypoints and gateways read it.
type CompiledPatches struct {
	Targets  []Target
	Selector map[string]string // of pods of gateways, where there are no Targets
	Priority int32
	// Gateways and Waypoints are what is for which, in order.
	Gateways, Waypoints []mesh.Patch
	// Problems are what cannot be had. Nothing is made of an object that has any: half of it may be worse than nothing.
	Problems []string
	// Notes are what is done in another way than Istio has it.
	Notes []string
}

// Key names the object as it is, as [mesh.Patch.Key] does.
func (c *CompiledPatches) Key() string {
	for _, p := range slices.Concat(c.Gateways, c.Waypoints) {
		return p.Key()
	}
	return ""
}

// CompileEnvoyFilter reads an EnvoyFilter. check says what of a patch Envoy, or Warren, does not take.
func CompileEnvoyFilter(f *networkingv1alpha3.EnvoyFilter, check func(mesh.Patch) error) CompiledPatches {
	spec := &f.Spec
	out := CompiledPatches{Selector: spec.GetWorkloadSelector().GetLabels(), Priority: spec.Priority}
	for _, r := range spec.TargetRefs {
		out.Targets = append(out.Targets, targetOf(r))
	}
	if len(out.Targets) > 0 && len(out.Selector) > 0 {
		out.Problems = append(out.Problems, "spec: it has a workloadSelector and targetRefs; write one of them")
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec)
	if err != nil {
		out.Problems = append(out.Problems, "spec: "+short(err.Error()))
	}
	sum := sha256.Sum256(raw)
	for i, c := range spec.ConfigPatches {
		p := mesh.Patch{Object: f.Namespace + "/" + f.Name, Version: hex.EncodeToString(sum[:8]), At: fmt.Sprintf("spec.configPatches[%d]", i)}
		context := c.GetMatch().GetContext()
		gateways := context == istioapi.EnvoyFilter_ANY || context == istioapi.EnvoyFilter_GATEWAY
		waypoints := context == istioapi.EnvoyFilter_ANY || context == istioapi.EnvoyFilter_SIDECAR_INBOUND || context == istioapi.EnvoyFilter_WAYPOINT
		if !gateways && !waypoints {
			out.Notes = append(out.Notes, fmt.Sprintf("%s.match.context: %s is of sidecars, which there are none of", p.At, context))
			continue
		}
		made, note, problem := compilePatch(c, &p)
		if problem == "" && made {
			if err := check(p); err != nil {
				problem = err.Error()
			}
		}
		switch {
		case problem != "":
			out.Problems = append(out.Problems, p.At+"."+problem)
			continue
		case note != "":
			out.Notes = append(out.Notes, p.At+"."+note)
		}
		if made && gateways {
			out.Gateways = append(out.Gateways, p)
		}
		if made && waypoints {
			out.Waypoints = append(out.Waypoints, p)
		}
	}
	if len(out.Problems) > 0 {
		out.Gateways, out.Waypoints = nil, nil
	}
	return out
}

// compilePatch fills a patch in. It is not made where it is for other proxies.
func compilePatch(c *istioapi.EnvoyFilter_EnvoyConfigObjectPatch, p *mesh.Patch) (made bool, note, problem string) {
	to, ok := patched[c.GetApplyTo()]
	if !ok {
		return false, "", fmt.Sprintf("applyTo: %s is not supported yet; HTTP_FILTER, NETWORK_FILTER, ROUTE_CONFIGURATION, VIRTUAL_HOST, HTTP_ROUTE and CLUSTER are", c.GetApplyTo())
	}
	p.To = to
	if made, problem = forProxy(c.GetMatch().GetProxy()); problem != "" || !made {
		return made, "match.proxy.proxyVersion: it is not for proxies of Istio " + istioVersion + ", whose API Warren follows", problem
	}
	relative, problem := matchPatch(c.GetMatch(), p)
	if problem != "" {
		return false, "", "match." + problem
	}
	if v := c.GetPatch().GetValue(); v != nil && c.GetPatch().GetOperation() != istioapi.EnvoyFilter_Patch_REMOVE {
		value := v.AsMap()
		if p.To == mesh.PatchManager {
			if value, problem = managerOf(value); problem != "" {
				return false, "", problem
			}
		}
		text, err := json.Marshal(value)
		if err != nil {
			return false, "", "patch.value: " + short(err.Error())
		}
		p.Value = string(text)
	}
	if op := c.GetPatch().GetOperation(); p.To != mesh.PatchHTTPFilter {
		if op != istioapi.EnvoyFilter_Patch_MERGE {
			return false, "", fmt.Sprintf("patch.operation: %s is not supported yet for %s; MERGE is", op, c.GetApplyTo())
		}
		p.Op = mesh.PatchMerge
		return true, "", ""
	}
	switch op := c.GetPatch().GetOperation(); op {
	case istioapi.EnvoyFilter_Patch_INSERT_FIRST:
		p.Op, note = mesh.PatchFirst, inserted
	case istioapi.EnvoyFilter_Patch_INSERT_BEFORE:
		p.Op = mesh.PatchBefore
		if !relative {
			p.Op, note = mesh.PatchFirst, inserted
		}
	case istioapi.EnvoyFilter_Patch_INSERT_AFTER:
		p.Op = mesh.PatchAfter
		if !relative {
			p.Op = mesh.PatchLast
		}
	case istioapi.EnvoyFilter_Patch_ADD:
		p.Op = mesh.PatchLast
		if class := c.GetPatch().GetFilterClass(); class == istioapi.EnvoyFilter_Patch_AUTHN || class == istioapi.EnvoyFilter_Patch_AUTHZ {
			p.Op = mesh.PatchFirst
		}
	case istioapi.EnvoyFilter_Patch_MERGE, istioapi.EnvoyFilter_Patch_MERGE_AND_REPLACE_LIST: // of a filter's own configuration lists are not replaced in Istio either
		p.Op = mesh.PatchMerge
	case istioapi.EnvoyFilter_Patch_REPLACE:
		p.Op = mesh.PatchReplace
	case istioapi.EnvoyFilter_Patch_REMOVE:
		p.Op = mesh.PatchRemove
	default:
		return false, "", fmt.Sprintf("patch.operation: %s is none", op)
	}
	return true, note, ""
}

// patched is what patches may be applied to.
var patched = map[istioapi.EnvoyFilter_ApplyTo]mesh.PatchedKind{
	istioapi.EnvoyFilter_HTTP_FILTER: mesh.PatchHTTPFilter, istioapi.EnvoyFilter_NETWORK_FILTER: mesh.PatchManager,
	istioapi.EnvoyFilter_ROUTE_CONFIGURATION: mesh.PatchRoutes, istioapi.EnvoyFilter_VIRTUAL_HOST: mesh.PatchHost,
	istioapi.EnvoyFilter_HTTP_ROUTE: mesh.PatchRoute, istioapi.EnvoyFilter_CLUSTER: mesh.PatchCluster,
}

// managerOf is the configuration in the value of a patch of a network filter.
func managerOf(value map[string]any) (map[string]any, string) {
	config, ok := value["typed_config"].(map[string]any)
	if !ok {
		config, ok = value["typedConfig"].(map[string]any)
	}
	kind, _ := config["@type"].(string)
	if !ok || !strings.HasSuffix(kind, "/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager") {
		return nil, "patch.value.typed_config: of network filters " + managers[1] + " alone can be changed, with its own type"
	}
	config = maps.Clone(config)
	delete(config, "@type")
	return config, ""
}

// inserted is what is different about being first.
const inserted = "patch.operation: it comes first of what may be inserted, which is after what verifies tokens, decides who may ask and counts"

// forProxy reports whether a patch is for proxies of ours.
func forProxy(m *istioapi.EnvoyFilter_ProxyMatch) (ok bool, problem string) {
	if len(m.GetMetadata()) > 0 {
		return false, "match.proxy.metadata: it is not supported; name the proxies in targetRefs or workloadSelector"
	}
	if m.GetProxyVersion() == "" {
		return true, ""
	}
	if len(m.GetProxyVersion()) > 1024 {
		return false, "match.proxy.proxyVersion: it is longer than 1024 bytes"
	}
	r, err := regexp.Compile(m.GetProxyVersion())
	if err != nil {
		return false, "match.proxy.proxyVersion: " + err.Error()
	}
	return r.MatchString(istioVersion), ""
}

// managers are names of the filter that has those of requests.
var managers = []string{"", "envoy.filters.network.http_connection_manager", "envoy.http_connection_manager"}

// matchPatch reads what a patch is about; relative: to a filter that it names.
func matchPatch(m *istioapi.EnvoyFilter_EnvoyConfigObjectMatch, p *mesh.Patch) (relative bool, problem string) {
	switch p.To {
	case mesh.PatchRoutes, mesh.PatchHost, mesh.PatchRoute:
		return false, matchRoutes(m, p)
	case mesh.PatchCluster:
		return false, matchCluster(m, p)
	}
	var port uint32
	var manager string
	switch {
	case m.GetRouteConfiguration() != nil:
		return false, "routeConfiguration: filters are matched by listener"
	case m.GetCluster() != nil:
		return false, "cluster: filters are matched by listener"
	case m.GetWaypoint() != nil:
		w := m.GetWaypoint()
		if w.GetRoute() != nil {
			return false, "waypoint.route: filters are not of routes"
		}
		port, manager, p.Filter = w.GetPortNumber(), w.GetFilter().GetName(), w.GetFilter().GetSubFilter().GetName()
	default:
		l := m.GetListener()
		chain := l.GetFilterChain()
		for _, f := range []struct{ field, value string }{
			{"name", l.GetName()}, {"portName", l.GetPortName()}, {"listenerFilter", l.GetListenerFilter()}, {"filterChain.name", chain.GetName()},
			{"filterChain.transportProtocol", chain.GetTransportProtocol()}, {"filterChain.applicationProtocols", chain.GetApplicationProtocols()},
		} {
			if f.value != "" {
				return false, "listener." + f.field + ": listeners and chains are Warren's own; match by portNumber and filterChain.sni"
			}
		}
		if chain.GetDestinationPort() != 0 {
			return false, "listener.filterChain.destinationPort: match by portNumber"
		}
		port, manager, p.Filter, p.ServerName = l.GetPortNumber(), chain.GetFilter().GetName(), chain.GetFilter().GetSubFilter().GetName(), strings.ToLower(chain.GetSni())
	}
	if port > 65535 {
		return false, fmt.Sprintf("portNumber: %d is not a port", port)
	}
	if !slices.Contains(managers, manager) {
		return false, fmt.Sprintf("filter.name: filters of requests are in %s, and not in %s", managers[1], short(manager))
	}
	if p.Filter == "envoy.router" {
		p.Filter = "envoy.filters.http.router"
	}
	p.Port = uint16(port)
	if p.To == mesh.PatchManager {
		p.Filter = ""
	}
	return p.Filter != "", ""
}

// Istio's names of the table of a gateway's port without TLS, and of the host of a waypoint's.
var (
	gatewayTable = regexp.MustCompile(`^http\.([0-9]{1,5})$`)
	waypointHost = regexp.MustCompile(`^inbound\|http\|([0-9]{1,5})$`)
)

// matchRoutes reads which tables, hosts and routes a patch is about.
func matchRoutes(m *istioapi.EnvoyFilter_EnvoyConfigObjectMatch, p *mesh.Patch) (problem string) {
	port := uint32(0)
	switch {
	case m.GetListener() != nil || m.GetCluster() != nil:
		return "listener: routes are matched by routeConfiguration"
	case m.GetWaypoint() != nil:
		if m.GetWaypoint().GetFilter() != nil {
			return "waypoint.filter: routes are in no filter"
		}
		port, p.Route = m.GetWaypoint().GetPortNumber(), m.GetWaypoint().GetRoute().GetName()
	default:
		r := m.GetRouteConfiguration()
		port = r.GetPortNumber()
		if r.GetPortName() != "" || r.GetGateway() != "" {
			return "routeConfiguration: match by portNumber and vhost; portName and gateway are not supported yet"
		}
		if named := gatewayTable.FindStringSubmatch(r.GetName()); named != nil {
			fromName, _ := strconv.ParseUint(named[1], 10, 32)
			port = uint32(fromName)
		} else if r.GetName() != "" {
			return "routeConfiguration.name: tables are Warren's own, but for http.PORT of gateways; match by portNumber"
		}
		host, number := r.GetVhost().GetName(), ""
		if named := waypointHost.FindStringSubmatch(host); named != nil {
			host, number = "", named[1]
		} else if i := strings.LastIndexByte(host, ':'); i >= 0 {
			host, number = host[:i], host[i+1:]
		}
		if number != "" {
			n, ok := parsePort(number)
			if !ok || port != 0 && port != uint32(n) {
				return "routeConfiguration.vhost.name: " + quote(number) + " is not the port of it"
			}
			port = uint32(n)
		}
		if p.Host = host; p.Host == "" {
			p.Host = r.GetVhost().GetDomainName()
		}
		p.Route = r.GetVhost().GetRoute().GetName()
		switch r.GetVhost().GetRoute().GetAction() {
		case istioapi.EnvoyFilter_RouteConfigurationMatch_RouteMatch_ROUTE:
			p.Action = mesh.PatchForwards
		case istioapi.EnvoyFilter_RouteConfigurationMatch_RouteMatch_REDIRECT:
			p.Action = mesh.PatchRedirects
		case istioapi.EnvoyFilter_RouteConfigurationMatch_RouteMatch_DIRECT_RESPONSE:
			p.Action = mesh.PatchResponds
		}
	}
	if port > 65535 {
		return fmt.Sprintf("portNumber: %d is not a port", port)
	}
	p.Port = uint16(port)
	return ""
}

// clusterName is how Istio names the cluster of a service's port.
var clusterName = regexp.MustCompile(`^outbound\|([0-9]{1,5})\|([^|]*)\|([^|]+)$`)

// matchCluster reads which clusters a patch is about.
func matchCluster(m *istioapi.EnvoyFilter_EnvoyConfigObjectMatch, p *mesh.Patch) (problem string) {
	c := m.GetCluster()
	if c == nil && m.GetObjectTypes() != nil {
		return "object: clusters are matched by cluster"
	}
	port := c.GetPortNumber()
	p.Service, p.Subset = c.GetService(), c.GetSubset()
	if c.GetName() != "" {
		named := clusterName.FindStringSubmatch(c.GetName())
		if named == nil {
			return "cluster.name: " + quote(c.GetName()) + " is not outbound|port|subset|host; others are Warren's own"
		}
		n, _ := strconv.ParseUint(named[1], 10, 32)
		port, p.Subset, p.Service = uint32(n), named[2], named[3]
	}
	if port > 65535 {
		return fmt.Sprintf("cluster.portNumber: %d is not a port", port)
	}
	p.Port = uint16(port)
	return ""
}
