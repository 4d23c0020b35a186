package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	extensions "istio.io/api/extensions/v1alpha1"
	typeapi "istio.io/api/type/v1beta1"
	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// ModuleSource is where a Wasm module is fetched from. The zero value is nowhere.
type ModuleSource struct {
	URL    string
	SHA256 string // that the module has to have, in hexadecimal; "": any
	// For names the object, as it is, that is not content with what was fetched for another one or before it was changed;
	// "": any that was fetched is.
	For string
	// Secret, namespace/name, has the password of the registry; "": the image is for everybody.
	Secret string
}

func (m ModuleSource) String() string { return m.URL }

// CompiledPlugin is a WasmPlugin as waypoints and gateways read it.
type CompiledPlugin struct {
	Targets  []Target
	Selector map[string]string // of pods of gateways, where there are no Targets
	Priority int32             // the higher ones come first; [math.MinInt32] where nobody says
	Source   ModuleSource
	// Gateway and Waypoint are what it is for which; nil: it is not for them, or not for requests.
	Gateway, Waypoint *mesh.Plugin
	// Problems are what cannot be had. Of an object that has any no module is loaded, and it fails as it is to fail.
	Problems []string
}

// CompileWasmPlugin reads a WasmPlugin.
func CompileWasmPlugin(w *extensionsv1alpha1.WasmPlugin) CompiledPlugin {
	spec := &w.Spec
	out := CompiledPlugin{Selector: spec.GetSelector().GetMatchLabels(), Priority: math.MinInt32}
	problem := func(format string, args ...any) { out.Problems = append(out.Problems, fmt.Sprintf(format, args...)) }
	if spec.Priority != nil {
		out.Priority = spec.Priority.Value
	}
	if r := spec.TargetRef; r != nil {
		out.Targets = append(out.Targets, targetOf(r))
	}
	for _, r := range spec.TargetRefs {
		out.Targets = append(out.Targets, targetOf(r))
	}
	if len(out.Targets) > 0 && len(out.Selector) > 0 {
		problem("spec: it has a selector and targetRefs; write one of them")
	}
	p := mesh.Plugin{Object: w.Namespace + "/" + w.Name, Root: spec.PluginName}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(spec)
	if err != nil {
		problem("spec: %s", short(err.Error()))
	}
	sum := sha256.Sum256(raw)
	p.Version = hex.EncodeToString(sum[:8])
	var text string
	if out.Source, text = moduleSource(spec); text != "" {
		problem("spec.%s", text)
	}
	if s := spec.ImagePullSecret; s != "" && strings.HasPrefix(out.Source.URL, Images) {
		if strings.Contains(s, "/") {
			problem("spec.imagePullSecret: %s is not the name of a Secret, which is in the namespace of the object", quote(s))
		}
		out.Source.Secret = w.Namespace + "/" + s
	}
	if spec.ImagePullPolicy == extensions.PullPolicy_Always || spec.ImagePullPolicy == extensions.PullPolicy_UNSPECIFIED_POLICY && latest(out.Source) {
		out.Source.For = p.Key()
	}
	connections := spec.Type != extensions.PluginType_UNSPECIFIED_PLUGIN_TYPE && spec.Type != extensions.PluginType_HTTP
	if connections {
		problem("spec.type: %s is not supported yet; HTTP is", spec.Type)
	}
	if spec.VerificationKey != "" {
		problem("spec.verificationKey: it is not supported; pin the module by sha256")
	}
	var ok bool
	if p.Phase, ok = phases[spec.Phase]; !ok {
		problem("spec.phase: %s is none", spec.Phase)
	}
	if p.Fails, ok = failures[spec.FailStrategy]; !ok {
		problem("spec.failStrategy: %s is none", spec.FailStrategy)
	}
	if c := spec.PluginConfig; len(c.GetFields()) > 0 {
		b, err := json.Marshal(c.AsMap())
		if err != nil {
			problem("spec.pluginConfig: %s", short(err.Error()))
		}
		p.Config = string(b)
	}
	for i, e := range spec.GetVmConfig().GetEnv() {
		at := fmt.Sprintf("spec.vmConfig.env[%d]", i)
		switch {
		case !variable.MatchString(e.GetName()):
			problem("%s.name: %s is no name of a variable", at, quote(e.GetName()))
		case e.GetValueFrom() != extensions.EnvValueSource_INLINE:
			problem("%s.valueFrom: %s would show the module the proxy's own environment; write the value", at, e.GetValueFrom())
		case slices.ContainsFunc(p.Env, func(o mesh.PluginEnv) bool { return o.Name == e.GetName() }):
			problem("%s.name: %s is there twice", at, quote(e.GetName()))
		default:
			p.Env = append(p.Env, mesh.PluginEnv{Name: e.GetName(), Value: e.GetValue()})
		}
	}
	if len(out.Problems) > 0 {
		out.Source = ModuleSource{}
	}
	if connections {
		return out
	}
	out.Gateway, out.Waypoint = matched(p, spec.Match, typeapi.WorkloadMode_CLIENT), matched(p, spec.Match, typeapi.WorkloadMode_SERVER)
	return out
}

var (
	phases = map[extensions.PluginPhase]mesh.PluginPhase{
		extensions.PluginPhase_UNSPECIFIED_PHASE: mesh.PluginLast, extensions.PluginPhase_AUTHN: mesh.PluginAuthN,
		extensions.PluginPhase_AUTHZ: mesh.PluginAuthZ, extensions.PluginPhase_STATS: mesh.PluginStats,
	}
	failures = map[extensions.FailStrategy]mesh.PluginFailure{
		extensions.FailStrategy_FAIL_CLOSE: mesh.PluginCloses, extensions.FailStrategy_FAIL_OPEN: mesh.PluginOpens,
		extensions.FailStrategy_FAIL_RELOAD: mesh.PluginReloads,
	}
	variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	digest   = regexp.MustCompile(`^[a-f0-9]{64}$`)
)

// moduleSource reads where the module is.
func moduleSource(spec *extensions.WasmPlugin) (from ModuleSource, problem string) {
	if spec.Sha256 != "" && !digest.MatchString(spec.Sha256) {
		return from, "sha256: " + quote(spec.Sha256) + " is no SHA-256 in hexadecimal, which has 64 digits"
	}
	u, err := url.Parse(spec.Url)
	if err != nil && !strings.Contains(spec.Url, "://") { // an image of a registry with a port
		return imageSource(spec)
	}
	if err != nil || spec.Url == "" {
		return from, "url: " + quote(spec.Url) + " is no address; write it as in https://modules.example/filter.wasm"
	}
	switch u.Scheme {
	case "https":
	case "http":
		if spec.Sha256 == "" {
			return from, "url: what comes without TLS may be anybody's; write https, or the sha256 of the module"
		}
	case "file":
		return from, "url: a file would be one of the proxy's own image, of which nobody but who builds it knows what is there; serve it by https"
	default:
		if u.Scheme == "oci" || !strings.Contains(spec.Url, "://") { // as Istio has it, an image
			return imageSource(spec)
		}
		return from, "url: modules are not fetched by " + quote(u.Scheme) + "; write https"
	}
	if u.Host == "" || u.User != nil {
		return from, "url: it has to have a host, and no user name or password, which everybody could read who reads the object"
	}
	return ModuleSource{URL: spec.Url, SHA256: spec.Sha256}, ""
}

// Images begins the address of a module that is in an image.
const Images = "oci://"

// imageSource reads where the image is that has the module. Its digest is that of the manifest.
func imageSource(spec *extensions.WasmPlugin) (from ModuleSource, problem string) {
	name, pinned, digested := strings.Cut(strings.TrimPrefix(spec.Url, Images), "@")
	if digested {
		sum, ok := strings.CutPrefix(pinned, "sha256:")
		switch {
		case !ok || !digest.MatchString(sum):
			return from, "url: " + quote(pinned) + " is no digest; write it as in registry.example/name@sha256:..."
		case spec.Sha256 != "" && spec.Sha256 != sum:
			return from, "sha256: it is not the digest in the url"
		}
		return ModuleSource{URL: Images + name + "@" + pinned, SHA256: sum}, ""
	}
	return ModuleSource{URL: Images + name, SHA256: spec.Sha256}, ""
}

// latest reports whether an image is the one that is called so: there may be another one the next time.
func latest(from ModuleSource) bool {
	name, ok := strings.CutPrefix(from.URL, Images)
	_, tag, tagged := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
	return ok && from.SHA256 == "" && (!tagged || tag == "latest")
}

// matched is a plugin for proxies of a mode: those at the ports that one of the selectors is for, all where there is none.
func matched(p mesh.Plugin, selectors []*extensions.WasmPlugin_TrafficSelector, mode typeapi.WorkloadMode) *mesh.Plugin {
	if len(selectors) == 0 {
		return &p
	}
	is, all := false, false
	for _, s := range selectors {
		if m := s.GetMode(); m != mode && m != typeapi.WorkloadMode_UNDEFINED && m != typeapi.WorkloadMode_CLIENT_AND_SERVER {
			continue
		}
		is, all = true, all || len(s.GetPorts()) == 0
		for _, port := range s.GetPorts() {
			if n := port.GetNumber(); n > 0 && n <= math.MaxUint16 && !slices.Contains(p.Ports, uint16(n)) {
				p.Ports = append(p.Ports, uint16(n))
			}
		}
	}
	switch {
	case all:
		p.Ports = nil
	case !is, len(p.Ports) == 0: // no port that there could be
		return nil
	}
	slices.Sort(p.Ports)
	return &p
}
