package waypoint

import (
	_ "embed"
	"errors"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	luav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/lua/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protopath"
	"google.golang.org/protobuf/reflect/protorange"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Patches are made of what has been written, and never before or in what decides: filters of requests come after those that
// verify tokens, decide who may ask and count.

// routerFilter is the last one.
const routerFilter = "envoy.filters.http.router"

// deciding are names that the filters before the place for patches have in Istio, or those that stand where they do.
var deciding = []string{"envoy.filters.http.jwt_authn", "envoy.filters.http.rbac", askFilter, corsFilter, "istio_authn", "istio.metadata_exchange", "envoy.filters.http.peer_metadata"}

// telling are names of Istio's that stand right before the router.
var telling = []string{"istio.stats", "istio.alpn", "envoy.filters.http.grpc_stats"}

// Made are the types of resources that patches have changed, by [mesh.Patch.Key].
type Made map[string]map[string]struct{}

func (m Made) add(key, kind string) {
	if m[key] == nil {
		m[key] = map[string]struct{}{}
	}
	m[key][kind] = struct{}{}
}

func (m Made) addAll(o Made) {
	for key, kinds := range o {
		for kind := range kinds {
			m.add(key, kind)
		}
	}
}

// PatchError is why nothing can be written with a patch. Without it, see [Writer.LeaveOff], it can.
type PatchError struct {
	Key  string // of the patch
	Text string
}

func (e *PatchError) Error() string { return e.Text }

// fails notes that something would not be valid with a patch.
func (b *builder) fails(p mesh.Patch, why error) {
	b.err = errors.Join(b.err, &PatchError{p.Key(), p.At + ": " + strings.ReplaceAll(why.Error(), "\n", "; ")})
}

// holds reports whether a patch, or a plugin, is to be made; that it is made of resources of a type is noted.
func (b *builder) holds(key, kind string) bool {
	if _, off := b.off[key]; off {
		return false
	}
	b.patched.add(key, kind)
	return true
}

// patchesAt are those for a port of a service or a listener of a gateway, but for what is left off.
func (b *builder) patchesAt(c chain, to mesh.PatchedKind, kind string) (out []mesh.Patch) {
	for _, p := range c.svc.Patches {
		if p.To != to || p.Port != 0 && p.Port != c.port.Port || p.ServerName != "" && (c.ingress == nil || !slices.Contains(c.ingress.Names, p.ServerName)) {
			continue
		}
		if b.holds(p.Key(), kind) {
			out = append(out, p)
		}
	}
	return out
}

// patchHTTP puts filters between those that decide and the router, and changes those that were put there.
func (b *builder) patchHTTP(c chain, filters []*hcmv3.HttpFilter) []*hcmv3.HttpFilter {
	patches := b.patchesAt(c, mesh.PatchHTTPFilter, resource.ListenerType)
	if len(patches) == 0 {
		return filters
	}
	decided := slices.IndexFunc(filters, func(f *hcmv3.HttpFilter) bool { return f.Name == faultFilter })
	rest := slices.Clone(filters[decided:])
	for _, p := range patches {
		if p.Op == mesh.PatchMerge {
			continue
		}
		f, err := b.patchFilter(p)
		if err != nil { // it has been checked
			b.fails(p, err)
			continue
		}
		rest = placed(rest, p, f)
	}
	for _, p := range patches { // as in Istio, into what is there after all others
		for i, f := range rest {
			if p.Op != mesh.PatchMerge || f.Name != p.Filter {
				continue
			}
			f, err := b.merged(f, p)
			if err != nil {
				b.fails(p, err)
				continue
			}
			rest[i] = f
		}
	}
	return append(filters[:decided:decided], rest...)
}

// placed puts a filter where a patch wants it. One that is relative to a filter that is not there is not put anywhere.
func placed(list []*hcmv3.HttpFilter, p mesh.Patch, f *hcmv3.HttpFilter) []*hcmv3.HttpFilter {
	i := slices.IndexFunc(list, func(o *hcmv3.HttpFilter) bool { return o.Name == p.Filter })
	switch p.Op {
	case mesh.PatchFirst:
		return slices.Insert(list, 0, f)
	case mesh.PatchLast:
		return slices.Insert(list, len(list)-1, f)
	}
	if i < 0 && (p.Op == mesh.PatchBefore || p.Op == mesh.PatchAfter) {
		switch {
		case slices.Contains(deciding, p.Filter): // after it: what is to be before it is refused
			return slices.Insert(list, 0, f)
		case slices.Contains(telling, p.Filter):
			return slices.Insert(list, len(list)-1, f)
		}
	}
	if i < 0 {
		return list
	}
	switch p.Op {
	case mesh.PatchBefore:
		return slices.Insert(list, i, f)
	case mesh.PatchAfter:
		return slices.Insert(list, i+1, f)
	case mesh.PatchReplace:
		list[i] = f
	case mesh.PatchRemove:
		list = slices.DeleteFunc(list, func(o *hcmv3.HttpFilter) bool { return o.Name == p.Filter })
	}
	return list
}

// patchFilter is the filter that a patch brings; nil where it brings none.
func (b *builder) patchFilter(p mesh.Patch) (*hcmv3.HttpFilter, error) {
	if p.Value == "" {
		return nil, nil
	}
	f := &hcmv3.HttpFilter{}
	if err := parsePatch(p.Value, f); err != nil {
		return nil, err
	}
	return f, b.adopt(p, f)
}

// merged is a filter with what a patch brings.
func (b *builder) merged(f *hcmv3.HttpFilter, p mesh.Patch) (*hcmv3.HttpFilter, error) {
	more := &hcmv3.HttpFilter{}
	if err := parsePatch(p.Value, more); err != nil {
		return nil, err
	}
	into, err := f.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return nil, err
	}
	out := proto.CloneOf(f)
	if c := more.GetTypedConfig(); c != nil {
		from, err := c.UnmarshalNew()
		if err != nil {
			return nil, err
		}
		if from.ProtoReflect().Descriptor() != into.ProtoReflect().Descriptor() {
			return f, nil // as in Istio: of another type it is nothing to merge
		}
		set(into.ProtoReflect(), from.ProtoReflect())
		if v, ok := into.(interface{ ValidateAll() error }); ok {
			if err := v.ValidateAll(); err != nil {
				return nil, err
			}
		}
		out.ConfigType = &hcmv3.HttpFilter_TypedConfig{TypedConfig: b.config(into)}
	}
	return out, b.adopt(p, out)
}

// adopt makes of a filter as an EnvoyFilter has it one of ours: clusters have the names that they have here, and exist, and
// code is guarded.
func (b *builder) adopt(p mesh.Patch, f *hcmv3.HttpFilter) error {
	m, err := f.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return err
	}
	if err := b.adoptAll(p, m); err != nil {
		return err
	}
	f.ConfigType = &hcmv3.HttpFilter_TypedConfig{TypedConfig: b.config(m)}
	return nil
}

// adoptAll does that to whatever is in a message.
func (b *builder) adoptAll(p mesh.Patch, m proto.Message) error {
	namespace, _, _ := strings.Cut(p.Object, "/")
	return protorange.Range(m.ProtoReflect(), func(at protopath.Values) error {
		v, ok := at.Index(-1).Value.Interface().(protoreflect.Message)
		if !ok {
			return nil
		}
		var codes []*string
		switch m := v.Interface().(type) {
		case *corev3.GrpcService_EnvoyGrpc:
			m.ClusterName = b.patchCluster(namespace, m.ClusterName, true)
		case *corev3.HttpUri:
			m.HttpUpstreamType = &corev3.HttpUri_Cluster{Cluster: b.patchCluster(namespace, m.GetCluster(), false)}
		case *luav3.Lua:
			codes = luaCode(m)
		case *luav3.LuaPerRoute:
			codes = sourceCode(m.GetSourceCode())
		}
		for _, code := range codes {
			for _, m := range calledCluster.FindAllString(*code, -1) {
				b.patchCluster(namespace, m, false)
			}
			*code = guarded(*code)
		}
		return nil
	})
}

// istioCluster is how Istio names a service's port.
var istioCluster = regexp.MustCompile(`^outbound\|([0-9]{1,5})\|\|([A-Za-z0-9.*-]+)$`)

// calledCluster is the same in code.
var calledCluster = regexp.MustCompile(`outbound\|[0-9]{1,5}\|\|[A-Za-z0-9.*-]+`)

// patchCluster is a cluster that a patch of a namespace names: a service's port, as Istio names it. What there is none of keeps
// its name, which nothing else has.
func (b *builder) patchCluster(namespace, name string, grpc bool) string {
	m := istioCluster.FindStringSubmatch(name)
	if m == nil {
		return name
	}
	port, err := strconv.ParseUint(m[1], 10, 16)
	if err != nil {
		return name
	}
	n := mesh.ServiceName{Namespace: namespace, Hostname: m[2]}
	if host, ok := strings.CutSuffix(m[2], ".svc."+b.s.Config().ClusterDomain); ok {
		_, n.Namespace, _ = strings.Cut(host, ".")
	}
	t := target{service: n, port: uint16(port), http: true, grpc: grpc}
	if b.lookup(n) != nil {
		b.targets[t] = true
	}
	return t.name()
}

// luaCode are the pieces of code of a filter.
func luaCode(l *luav3.Lua) (out []*string) {
	//lint:ignore SA1019 it is what most EnvoyFilters have
	if code := &l.InlineCode; *code != "" {
		out = append(out, code)
	}
	out = append(out, sourceCode(l.DefaultSourceCode)...)
	for _, s := range l.SourceCodes {
		out = append(out, sourceCode(s)...)
	}
	return out
}

// sourceCode is the code that a source is.
func sourceCode(s *corev3.DataSource) []*string {
	switch v := s.GetSpecifier().(type) {
	case *corev3.DataSource_InlineString:
		return []*string{&v.InlineString}
	case *corev3.DataSource_InlineBytes:
		text := &corev3.DataSource_InlineString{InlineString: string(v.InlineBytes)}
		s.Specifier = text
		return []*string{&text.InlineString}
	}
	return nil
}

//go:embed guard.lua
var guardSource string

// guard is that in one line.
var guard = sync.OnceValue(func() string {
	var out strings.Builder
	for line := range strings.Lines(guardSource) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "--") {
			out.WriteString(line + " ")
		}
	}
	return out.String()
})

// guarded puts the guard before code that does not have it yet.
func guarded(code string) string {
	if strings.HasPrefix(code, guard()) {
		return code
	}
	return guard() + code
}
