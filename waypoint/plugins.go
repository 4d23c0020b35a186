package waypoint

import (
	"crypto/sha256"
	"encoding/hex"
	"reflect"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	httpwasmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/wasm/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	wasmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/wasm/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/warrenmesh/warren/internal/mesh"
)

// A plugin is a resource of its own (ECDS), with the module in it, so that Envoy fetches nothing by itself and a change of it
// reaches the next request. One resource is for all ports of all services that have the plugin.

const (
	// pluginPrefix begins the names of the filters, as Istio names them.
	pluginPrefix = "extensions.istio.io/wasmplugin/"
	wasmRuntime  = "envoy.wasm.runtime.v8"
)

// pluginKinds are the types of filters that a plugin may be: the module, what refuses while it is not there, and what does not.
var pluginKinds = []string{
	resource.APITypePrefix + string((&httpwasmv3.Wasm{}).ProtoReflect().Descriptor().FullName()),
	resource.APITypePrefix + string((&luav3.Lua{}).ProtoReflect().Descriptor().FullName()),
	resource.APITypePrefix + string((&httprbacv3.RBAC{}).ProtoReflect().Descriptor().FullName()),
}

func pluginName(p *mesh.Plugin) string { return pluginPrefix + strings.Replace(p.Object, "/", ".", 1) }

// pluginFilters are those of plugins of some phases, in this order.
func (b *builder) pluginFilters(c chain, phases ...mesh.PluginPhase) (out []*hcmv3.HttpFilter) {
	for _, phase := range phases {
		for i := range c.svc.Plugins {
			p := &c.svc.Plugins[i]
			if p.Phase != phase || len(p.Ports) > 0 && !slices.Contains(p.Ports, c.port.Port) {
				continue
			}
			if !slices.ContainsFunc(b.plugins, func(o *mesh.Plugin) bool { return o.Object == p.Object }) {
				b.plugins = append(b.plugins, p)
			}
			out = append(out, &hcmv3.HttpFilter{Name: pluginName(p), ConfigType: &hcmv3.HttpFilter_ConfigDiscovery{
				ConfigDiscovery: &corev3.ExtensionConfigSource{ConfigSource: adsSource(), TypeUrls: pluginKinds},
			}})
		}
	}
	return out
}

// plugged is a plugin as it was last written.
type plugged struct {
	plugin *mesh.Plugin
	item   *item
}

// plugIn writes plugins, each once, and notes which are made with their modules. What has not changed is what it was: a module is
// large.
func (w *Writer) plugIn(b *builder, list []*mesh.Plugin) (out []*item) {
	next := map[string]plugged{}
	for _, p := range list {
		name := pluginName(p)
		if _, ok := next[name]; ok {
			continue
		}
		is := w.plugins[name]
		if is.item == nil || is.plugin != p && !reflect.DeepEqual(is.plugin, p) {
			is.item = b.item(nil, name, &corev3.TypedExtensionConfig{Name: name, TypedConfig: b.config(b.plugin(p))})
		}
		if p.Module != nil {
			b.holds(p.Key(), resource.ExtensionConfigType)
		}
		next[name] = plugged{p, is.item}
		out = append(out, is.item)
	}
	w.plugins = next
	return out
}

// plugin is the filter that a plugin is.
func (b *builder) plugin(p *mesh.Plugin) proto.Message {
	_, off := b.off[p.Key()]
	switch {
	case p.Module != nil && !off:
		return b.module(p)
	case p.Fails == mesh.PluginOpens:
		return &httprbacv3.RBAC{} // decides nothing
	}
	return &luav3.Lua{DefaultSourceCode: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{
		InlineString: `function envoy_on_request(handle) handle:respond({[":status"] = "503"}, ` + strconv.Quote("the module of WasmPlugin "+p.Object+" does not run") + `) end`,
	}}}
}

func (b *builder) module(p *mesh.Plugin) proto.Message {
	vm := &wasmv3.VmConfig{
		VmId: p.Object, Runtime: wasmRuntime,
		Code: &corev3.AsyncDataSource{Specifier: &corev3.AsyncDataSource_Local{
			Local: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: p.Module.Code}},
		}},
		CapabilityRestrictionConfig: &wasmv3.CapabilityRestrictionConfig{AllowedCapabilities: map[string]*wasmv3.SanitizationConfig{}},
	}
	for _, name := range capabilities {
		vm.CapabilityRestrictionConfig.AllowedCapabilities[name] = &wasmv3.SanitizationConfig{}
	}
	if len(p.Env) > 0 {
		vm.EnvironmentVariables = &wasmv3.EnvironmentVariables{KeyValues: map[string]string{}}
		h := sha256.New()
		for _, e := range p.Env {
			vm.EnvironmentVariables.KeyValues[e.Name] = e.Value
			_, _ = h.Write([]byte(e.Name + "\x00" + e.Value + "\x00")) // never fails
		}
		vm.VmId += "@" + hex.EncodeToString(h.Sum(nil)[:8]) // machines of the same name and code have the environment of the first
	}
	c := &wasmv3.PluginConfig{
		Name: strings.Replace(p.Object, "/", ".", 1), RootId: p.Root, Vm: &wasmv3.PluginConfig_VmConfig{VmConfig: vm},
		FailurePolicy: pluginFailures[p.Fails],
	}
	if p.Config != "" {
		c.Configuration = b.config(wrapperspb.String(p.Config))
	}
	return &httpwasmv3.Wasm{Config: c}
}

var pluginFailures = map[mesh.PluginFailure]wasmv3.FailurePolicy{
	mesh.PluginCloses: wasmv3.FailurePolicy_FAIL_CLOSED, mesh.PluginOpens: wasmv3.FailurePolicy_FAIL_OPEN, mesh.PluginReloads: wasmv3.FailurePolicy_FAIL_RELOAD,
}

// capabilities are what a module may do and hear of (proxy-wasm 0.2.1, WASI preview 1). Left out is what leads elsewhere: calls by
// HTTP and gRPC may be to any cluster, those by which the proxy gets its keys among them, foreign functions write what decisions
// read, and queues lead to other modules. What is left out of these fails when it is called.
var capabilities = strings.Fields(`
proxy_log proxy_get_log_level proxy_get_status proxy_get_current_time_nanoseconds proxy_set_tick_period_milliseconds
proxy_get_property proxy_set_property proxy_set_effective_context proxy_done
proxy_continue_stream proxy_close_stream proxy_continue_request proxy_continue_response proxy_send_local_response proxy_clear_route_cache
proxy_get_header_map_value proxy_add_header_map_value proxy_replace_header_map_value proxy_remove_header_map_value
proxy_get_header_map_pairs proxy_set_header_map_pairs proxy_get_header_map_size
proxy_get_buffer_bytes proxy_get_buffer_status proxy_set_buffer_bytes
proxy_get_shared_data proxy_set_shared_data
proxy_define_metric proxy_increment_metric proxy_record_metric proxy_get_metric

proxy_on_vm_start proxy_validate_configuration proxy_on_configure proxy_on_tick proxy_on_context_create
proxy_on_request_headers proxy_on_request_body proxy_on_request_trailers proxy_on_request_metadata
proxy_on_response_headers proxy_on_response_body proxy_on_response_trailers proxy_on_response_metadata
proxy_on_done proxy_on_log proxy_on_delete

args_get args_sizes_get clock_res_get clock_time_get environ_get environ_sizes_get
fd_close fd_fdstat_get fd_fdstat_set_flags fd_prestat_dir_name fd_prestat_get fd_read fd_seek fd_write
path_filestat_get path_open poll_oneoff proc_exit random_get sched_yield
`)
