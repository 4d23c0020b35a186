package waypoint

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/compression/brotli/compressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/compression/brotli/decompressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/compression/gzip/compressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/compression/gzip/decompressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/compression/zstd/compressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/compression/zstd/decompressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/adaptive_concurrency/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/admission_control/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/bandwidth_limit/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/buffer/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/compressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/csrf/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/decompressor/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_authz/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_http1_bridge/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_json_transcoder/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_stats/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/grpc_web/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ratelimit/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// patchFilters are the filters of requests that a patch may bring, by their types, all of which Envoy has. Left out is what
// reads or writes files and environments, runs programs or modules, leads elsewhere, or verifies who somebody is.
var patchFilters = []string{
	"adaptive_concurrency.v3.AdaptiveConcurrency", "admission_control.v3.AdmissionControl", "bandwidth_limit.v3.BandwidthLimit", "buffer.v3.Buffer",
	"compressor.v3.Compressor", "cors.v3.Cors", "csrf.v3.CsrfPolicy", "decompressor.v3.Decompressor", "ext_authz.v3.ExtAuthz", "ext_proc.v3.ExternalProcessor",
	"fault.v3.HTTPFault", "grpc_http1_bridge.v3.Config", "grpc_json_transcoder.v3.GrpcJsonTranscoder", "grpc_stats.v3.FilterConfig", "grpc_web.v3.GrpcWeb",
	"header_mutation.v3.HeaderMutation", "header_to_metadata.v3.Config", "local_ratelimit.v3.LocalRateLimit", "lua.v3.Lua", "ratelimit.v3.RateLimit", "rbac.v3.RBAC",
}

const httpFilterPackage = "envoy.extensions.filters.http."

// patchParts are types that may be within them.
var patchParts = []string{
	"envoy.extensions.compression.brotli.compressor.v3.Brotli", "envoy.extensions.compression.brotli.decompressor.v3.Brotli",
	"envoy.extensions.compression.gzip.compressor.v3.Gzip", "envoy.extensions.compression.gzip.decompressor.v3.Gzip",
	"envoy.extensions.compression.zstd.compressor.v3.Zstd", "envoy.extensions.compression.zstd.decompressor.v3.Zstd",
}

// ownFilters are names of filters that tables of routes say something to: a patch's filter of the same name would hear it.
var ownFilters = []string{tokenFilter, auditFilter, customFilter, askFilter, denyFilter, allowFilter, routeAskFilter, askedFilter, corsFilter, faultFilter, sessionFilter, routerFilter}

// PatchFilters are the types of filters of requests that patches may bring, as users write them.
func PatchFilters() (out []string) {
	for _, t := range patchFilters {
		out = append(out, httpFilterPackage+t)
	}
	return out
}

// CheckPatch says what of a patch cannot be had, by its field below patch. What passes is of a form that Envoy takes.
func CheckPatch(p mesh.Patch) error {
	if p.To != mesh.PatchHTTPFilter {
		return checkMerge(p)
	}
	switch {
	case p.Op == mesh.PatchRemove:
		return named(p)
	case p.Value == "":
		return errors.New("patch.value: it is missing")
	case p.Op == mesh.PatchBefore && slices.Contains(deciding, p.Filter):
		return fmt.Errorf("patch.operation: before %s it would change what is decided about; INSERT_FIRST puts it right after that", p.Filter)
	case p.Op == mesh.PatchAfter && p.Filter == routerFilter:
		return fmt.Errorf("patch.operation: nothing comes after %s; use INSERT_BEFORE", p.Filter)
	case p.Op == mesh.PatchReplace || p.Op == mesh.PatchMerge:
		if err := named(p); err != nil {
			return err
		}
	}
	f := &hcmv3.HttpFilter{}
	if err := parsePatch(p.Value, f); err != nil {
		return fmt.Errorf("patch.value: %w", err)
	}
	if p.Op == mesh.PatchMerge {
		if f.Name != "" && f.Name != p.Filter {
			return errors.New("patch.value.name: a filter keeps its name; use REPLACE")
		}
		f.Name = p.Filter
	}
	switch {
	case f.Name == "":
		return errors.New("patch.value.name: it is missing")
	case reserved(f.Name):
		return fmt.Errorf("patch.value.name: %s is the name of one of Warren's own filters; give it another one", f.Name)
	case f.GetConfigDiscovery() != nil:
		return errors.New("patch.value.config_discovery: filters come from Warren's control plane alone; write typed_config")
	case f.GetTypedConfig() == nil:
		return errors.New("patch.value.typed_config: it is missing")
	}
	if kind := string(f.GetTypedConfig().MessageName()); !slices.Contains(patchFilters, strings.TrimPrefix(kind, httpFilterPackage)) {
		return fmt.Errorf("patch.value.typed_config: a filter of type %s cannot be brought; those that can are %s", kind, strings.Join(PatchFilters(), ", "))
	}
	m, err := f.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return fmt.Errorf("patch.value.typed_config: %w", err)
	}
	if err := allowed(m, patchParts); err != nil {
		return fmt.Errorf("patch.value.typed_config%w", err)
	}
	if v, ok := m.(interface{ ValidateAll() error }); ok && p.Op != mesh.PatchMerge { // what is merged may be a part
		if err := v.ValidateAll(); err != nil {
			return fmt.Errorf("patch.value.typed_config: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		}
	}
	return nil
}

// reserved reports whether a filter of ours has a name, or may have.
func reserved(name string) bool {
	return slices.Contains(ownFilters, name) || strings.HasPrefix(name, "warren.") || strings.Contains(name, "|")
}

// named reports a patch of one of our own filters.
func named(p mesh.Patch) error {
	if p.Filter == "" {
		return errors.New("match: it names no filter (filterChain.filter.subFilter)")
	}
	if slices.Contains(ownFilters, p.Filter) || slices.Contains(deciding, p.Filter) {
		return fmt.Errorf("patch.operation: %s is one of Warren's own filters, which a patch changes as little as it removes them", p.Filter)
	}
	return nil
}

// parsePatch reads JSON strictly.
func parsePatch(text string, m proto.Message) error {
	err := protojson.Unmarshal([]byte(text), m)
	if err == nil {
		return nil
	}
	// The library varies its spaces, so that nobody depends on them.
	said := strings.TrimPrefix(strings.ReplaceAll(err.Error(), "\u00a0", " "), "proto: ")
	if strings.Contains(said, "unable to resolve") {
		said += "; types of filters that can be brought are " + strings.Join(PatchFilters(), ", ")
	}
	return errors.New(said)
}

// allowed looks for what no patch may have, wherever it is; the error begins with the field. Extensions in it are of some types
// alone.
func allowed(m proto.Message, types []string) error {
	return protorange.Range(m.ProtoReflect(), func(v protopath.Values) error {
		at := field(v.Path)
		last := v.Index(-1).Value
		switch x := last.Interface().(type) {
		case string:
			if s := v.Path.Index(-1); s.Kind() == protopath.FieldAccessStep {
				switch name := s.FieldDescriptor().Name(); {
				case name == "metadata_namespace" && ownMetadata(x):
					return fmt.Errorf("%s: %s is what Warren, Istio and Envoy's own filters say", at, x)
				case name == "proto_descriptor":
					return fmt.Errorf("%s: files are the proxy's own; write proto_descriptor_bin", at)
				}
			}
			for _, word := range []string{"%ENVIRONMENT(", "%FILE_CONTENT("} {
				if strings.Contains(strings.ToUpper(x), word) {
					return fmt.Errorf("%s: %s...)%% reads what is the proxy's own", at, word)
				}
			}
			return clusterAllowed(v, at, x)
		case protoreflect.Message:
			return messageAllowed(x.Interface(), types, at)
		}
		return nil
	})
}

// ownMetadata reports whether metadata of a namespace is what logs, metrics and policies believe.
func ownMetadata(namespace string) bool {
	return slices.ContainsFunc([]string{"warren", "envoy", "istio", "io.istio"}, func(p string) bool { return namespace == p || strings.HasPrefix(namespace, p+".") })
}

func messageAllowed(m proto.Message, types []string, at string) error {
	switch x := m.(type) {
	case *anypb.Any:
		if kind := string(x.MessageName()); !slices.Contains(types, kind) {
			return fmt.Errorf("%s: an extension of type %s cannot be brought; those that can are %s", at, kind, strings.Join(types, ", "))
		}
	case *corev3.DataSource:
		switch x.GetSpecifier().(type) {
		case *corev3.DataSource_Filename, *corev3.DataSource_EnvironmentVariable:
			return fmt.Errorf("%s: files and variables are the proxy's own; write it inline", at)
		}
		if x.GetWatchedDirectory() != nil {
			return fmt.Errorf("%s.watched_directory: files are the proxy's own", at)
		}
	case *corev3.ConfigSource, *tlsv3.SdsSecretConfig, *corev3.GrpcService_GoogleGrpc, *corev3.Pipe, *corev3.EnvoyInternalAddress, *corev3.ApiConfigSource:
		return fmt.Errorf("%s: a %s leads to what is the proxy's own, its keys and its configuration among that, or past the mesh", at, m.ProtoReflect().Descriptor().Name())
	case *luav3.LuaPerRoute:
		if len(x.PackagePaths)+len(x.PackageCpaths) > 0 || x.SharedVmId != "" {
			return fmt.Errorf("%s: code of a route is run apart from other code, and gets no files (package_paths, package_cpaths, shared_vm_id)", at)
		}
		return textual(sourceCode(proto.CloneOf(x.GetSourceCode())), at)
	case *luav3.Lua:
		switch {
		case len(x.PackagePaths) > 0 || len(x.PackageCpaths) > 0:
			return fmt.Errorf("%s.package_paths: files are the proxy's own", at)
		case x.SharedVmId != "":
			return fmt.Errorf("%s.shared_vm_id: code is run apart from other code", at)
		}
		return textual(luaCode(proto.CloneOf(x)), at)
	}
	return nil
}

func textual(codes []*string, at string) error {
	for _, code := range codes {
		if strings.HasPrefix(*code, "\x1b") {
			return fmt.Errorf("%s: code is given as text, not compiled", at)
		}
	}
	return nil
}

// clusterAllowed looks at names of clusters: a patch can name a service's port.
func clusterAllowed(v protopath.Values, at, name string) error {
	step := v.Path.Index(-1)
	if step.Kind() != protopath.FieldAccessStep || name == "" {
		return nil
	}
	if f := string(step.FieldDescriptor().Name()); f != "cluster" && f != "cluster_name" && f != "cluster_header" {
		return nil
	}
	if !istioCluster.MatchString(name) {
		return fmt.Errorf("%s: %s is not outbound|port||host, as the cluster of a port of a Service or ServiceEntry is named", at, name)
	}
	return nil
}

// field writes a path as users do.
func field(p protopath.Path) string {
	var out strings.Builder
	for _, s := range p {
		switch s.Kind() {
		case protopath.FieldAccessStep:
			out.WriteString("." + string(s.FieldDescriptor().Name()))
		case protopath.ListIndexStep:
			fmt.Fprintf(&out, "[%d]", s.ListIndex())
		case protopath.MapIndexStep:
			fmt.Fprintf(&out, "[%s]", s.MapIndex())
		}
	}
	return out.String()
}
