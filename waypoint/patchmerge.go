package waypoint

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Of what is not a filter of requests, some fields may be set and no others: none of those that say who a client is, what decides
// about it, in which form a path is decided about, or where something leads.

// managerFields are those of what is done with connections that carry requests.
var managerFields = []string{
	"always_set_request_id_in_response", "common_http_protocol_options", "delayed_close_timeout", "drain_timeout", "generate_request_id",
	"max_request_headers_kb", "preserve_external_request_id", "proxy_100_continue", "request_headers_timeout", "request_timeout",
	"server_header_transformation", "server_name", "stream_idle_timeout", "via",
}

var (
	headerFields  = []string{"request_headers_to_add", "request_headers_to_remove", "response_headers_to_add", "response_headers_to_remove", "typed_per_filter_config"}
	hostFields    = append([]string{"include_attempt_count_in_response", "include_request_attempt_count", "rate_limits"}, headerFields...)
	routeFields   = append([]string{"name", "route"}, headerFields...)
	actionFields  = []string{"hash_policy", "idle_timeout", "max_stream_duration", "rate_limits", "retry_policy", "timeout"}
	clusterFields = []string{
		"common_lb_config", "connect_timeout", "lb_policy", "least_request_lb_config", "outlier_detection", "per_connection_buffer_limit_bytes",
		"ring_hash_lb_config", "round_robin_lb_config", "upstream_connection_options",
	}
)

// perRoute are what a route may say to filters that patches brought.
var perRoute = append([]string{
	httpFilterPackage + "buffer.v3.BufferPerRoute", httpFilterPackage + "compressor.v3.CompressorPerRoute", httpFilterPackage + "csrf.v3.CsrfPolicy",
	httpFilterPackage + "ext_authz.v3.ExtAuthzPerRoute", httpFilterPackage + "ext_proc.v3.ExtProcPerRoute", httpFilterPackage + "header_mutation.v3.HeaderMutationPerRoute",
	httpFilterPackage + "local_ratelimit.v3.LocalRateLimit", httpFilterPackage + "lua.v3.LuaPerRoute", httpFilterPackage + "ratelimit.v3.RateLimitPerRoute",
	httpFilterPackage + "rbac.v3.RBACPerRoute", "envoy.config.route.v3.FilterConfig",
}, patchParts...)

// checkMerge says what of a patch that is merged into something cannot be had.
func checkMerge(p mesh.Patch) error {
	if p.Op != mesh.PatchMerge {
		return errors.New("patch.operation: MERGE alone is supported here")
	}
	m, fields := merging(p.To)
	if err := parsePatch(p.Value, m); err != nil {
		return fmt.Errorf("patch.value: %w", err)
	}
	if err := onlyFields(m, fields, "patch.value"); err != nil {
		return err
	}
	if r, ok := m.(*routev3.Route); ok {
		switch r.Action.(type) {
		case nil, *routev3.Route_Route:
		default:
			return errors.New("patch.value: what a route does is not another patch's to say; route alone may be there")
		}
		if a := r.GetRoute(); a != nil {
			if err := onlyFields(a, actionFields, "patch.value.route"); err != nil {
				return err
			}
		}
	}
	if h, ok := m.(interface {
		GetTypedPerFilterConfig() map[string]*anypb.Any
	}); ok {
		for name := range h.GetTypedPerFilterConfig() {
			if reserved(name) {
				return fmt.Errorf("patch.value.typed_per_filter_config[%s]: it is the name of one of Warren's own filters", name)
			}
		}
	}
	if err := allowed(m, perRoute); err != nil {
		return fmt.Errorf("patch.value%w", err)
	}
	return nil
}

// merging is what a patch of a kind is read into, and the fields that it may have.
func merging(to mesh.PatchedKind) (proto.Message, []string) {
	switch to {
	case mesh.PatchManager:
		return &hcmv3.HttpConnectionManager{}, managerFields
	case mesh.PatchRoutes:
		return &routev3.RouteConfiguration{}, headerFields
	case mesh.PatchHost:
		return &routev3.VirtualHost{}, hostFields
	case mesh.PatchRoute:
		return &routev3.Route{}, routeFields
	}
	return &clusterv3.Cluster{}, clusterFields
}

// onlyFields refuses what a message has beside some fields.
func onlyFields(m proto.Message, fields []string, at string) (err error) {
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
		if !slices.Contains(fields, string(f.Name())) {
			err = fmt.Errorf("%s.%s: it is Warren's own to say; what may be set are %s", at, f.Name(), strings.Join(fields, ", "))
		}
		return err == nil
	})
	return err
}

// merge sets in a message what a patch has.
func (b *builder) merge(p mesh.Patch, into proto.Message) {
	from, _ := merging(p.To)
	err := parsePatch(p.Value, from)
	if err == nil {
		err = b.adoptAll(p, from)
	}
	if err != nil { // it has been checked
		b.fails(p, err)
		return
	}
	if r, ok := into.(*routev3.Route); ok && r.GetRoute() == nil { // of what is answered or redirected there is nothing of forwarding
		from.(*routev3.Route).Action = nil
	}
	set(into.ProtoReflect(), from.ProtoReflect())
	if v, ok := into.(interface{ ValidateAll() error }); ok {
		if err := v.ValidateAll(); err != nil {
			b.fails(p, err)
		}
	}
}

// set is proto.Merge, but that what stands for one value, as a duration does, is set as a whole.
func set(into, from protoreflect.Message) {
	from.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsList():
			list := into.Mutable(f).List()
			for i := range v.List().Len() {
				list.Append(v.List().Get(i))
			}
		case f.IsMap():
			all := into.Mutable(f).Map()
			v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
				all.Set(k, v)
				return true
			})
		case f.Message() != nil && f.Message().ParentFile().Package() != "google.protobuf":
			set(into.Mutable(f).Message(), v.Message())
		default:
			into.Set(f, v)
		}
		return true
	})
}

// patchManager changes what is done with connections that carry requests.
func (b *builder) patchManager(c chain, m *hcmv3.HttpConnectionManager) {
	for _, p := range b.patchesAt(c, mesh.PatchManager, resource.ListenerType) {
		b.merge(p, m)
	}
}

// patchRoutes changes a table of routes.
func (b *builder) patchRoutes(c chain, table *routev3.RouteConfiguration) {
	for _, p := range b.patchesAt(c, mesh.PatchRoutes, resource.RouteType) {
		b.merge(p, table)
	}
	hosts, routes := b.patchesAt(c, mesh.PatchHost, resource.RouteType), b.patchesAt(c, mesh.PatchRoute, resource.RouteType)
	for _, vh := range table.VirtualHosts {
		for _, p := range hosts {
			if c.hosts(p.Host, vh) {
				b.merge(p, vh)
			}
		}
		for _, p := range routes {
			if !c.hosts(p.Host, vh) {
				continue
			}
			for _, r := range vh.Routes {
				if (p.Route == "" || r.Name == p.Route || strings.HasSuffix(r.Name, "/"+p.Route)) && does(r, p.Action) {
					b.merge(p, r)
				}
			}
		}
	}
}

// hosts reports whether a virtual host is for a host that a patch names.
func (c chain) hosts(name string, vh *routev3.VirtualHost) bool {
	return name == "" || slices.Contains(vh.Domains, name) || c.ingress == nil && name == c.svc.Name.Hostname
}

func does(r *routev3.Route, a mesh.PatchedAction) bool {
	switch a {
	case mesh.PatchForwards:
		return r.GetRoute() != nil
	case mesh.PatchRedirects:
		return r.GetRedirect() != nil
	case mesh.PatchResponds:
		return r.GetDirectResponse() != nil
	}
	return true
}

// patchTarget changes how a target is reached: for a waypoint those patches that it makes of the target's service.
func (b *builder) patchTarget(t target, c *clusterv3.Cluster) {
	var all []mesh.Patch
	if b.ingress != nil {
		all = b.ingress.Patches
	} else if svc := b.lookup(t.service); svc != nil && svc.Waypoint != nil && svc.Waypoint.Service == b.self {
		all = svc.Patches
	}
	for _, p := range all {
		if p.To == mesh.PatchCluster && (p.Port == 0 || p.Port == t.port) && (p.Service == "" || p.Service == t.service.Hostname) && (p.Subset == "" || p.Subset == t.subset) && b.holds(p.Key(), resource.ClusterType) {
			b.merge(p, c)
		}
	}
}
