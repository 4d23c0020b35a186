package analysis

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	telemetryv1 "istio.io/client-go/pkg/apis/telemetry/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/controlplane/admission"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Severities of findings, the worst first.
const (
	Error   = "error"   // it does not do what it says
	Warning = "warning" // it may not do what is expected
)

// Finding is one thing that is wrong.
type Finding struct {
	Code      string
	Severity  string
	Kind      string
	Namespace string
	Name      string
	Field     string // "" where it is of the whole object
	Message   string
	From      string // the object's
}

// Object is one that is looked at.
type Object struct {
	*unstructured.Unstructured
	From string // where it stands, for whoever reads the finding; "" is the cluster
}

// Input is what is analyzed.
type Input struct {
	Objects []Object
	Config  index.Config
	// Cluster says that Objects are all that there is. Without it, what they name may be elsewhere, and only what is wrong
	// by itself is found.
	Cluster bool
}

// run is one analysis.
type run struct {
	Input
	found   []Finding
	typed   map[id]any
	source  map[id]string
	objects map[string][]*unstructured.Unstructured // by kind

	snapshot *mesh.Snapshot // what the mesh makes of them
}

// id names an object.
type id struct{ kind, namespace, name string }

func idOf(o *unstructured.Unstructured) id {
	kind := o.GetKind()
	if group, _, _ := strings.Cut(o.GetAPIVersion(), "/"); kind == "Gateway" && group == istioGroup {
		kind = istioGateway
	}
	return id{kind, o.GetNamespace(), o.GetName()}
}

// istioGateway tells a Gateway of Istio's own API from one of the Gateway API, in findings too.
const (
	istioGroup   = "networking.istio.io"
	istioGateway = "Gateway." + istioGroup
)

// Run returns what is wrong, the worst first. It fails only where the configuration cannot be used.
func Run(in Input) ([]Finding, error) {
	x, err := index.New(in.Config)
	if err != nil {
		return nil, err
	}
	r := &run{Input: in, typed: map[id]any{}, source: map[id]string{}, objects: map[string][]*unstructured.Unstructured{}}
	for _, o := range in.Objects {
		if o.From != "" && r.unknownFields(o) {
			continue // what else is said of it would follow from that
		}
		k := idOf(o.Unstructured)
		obj, err := typed(o.Unstructured)
		if err != nil {
			r.source[k] = o.From
			r.add(k, Error, string(policy.Unreadable), "", err.Error())
			continue
		}
		r.source[k] = o.From
		if obj == nil {
			r.notFollowed(o.Unstructured)
			continue
		}
		r.objects[k.kind] = append(r.objects[k.kind], o.Unstructured)
		r.typed[k] = obj
		x.Set(obj)
	}
	update := x.Commit()
	takeAsThere(x, update)
	r.snapshot = update.Snapshot
	judged := r.policies(update)
	for k, n := range update.Notices {
		of := id{k.Kind.String(), k.Namespace, k.Name}
		if k.Kind == index.IstioGateway {
			of.kind = istioGateway
		}
		if n == nil || judged[of] || !r.Cluster && !alone(n.Reason) {
			continue
		}
		r.add(of, severityOf(k.Kind, n.Reason), kebab(n.Reason), "", n.Message)
	}
	if r.Cluster {
		r.references()
	}
	slices.SortFunc(r.found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Severity, b.Severity), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name),
			cmp.Compare(a.Code, b.Code), cmp.Compare(a.Field, b.Field), cmp.Compare(a.Message, b.Message))
	})
	return slices.Compact(r.found), nil
}

// takeAsThere has the index find what it asks for, Secrets, roots and modules, of which nothing is read here, and adds what follows.
func takeAsThere(x *index.Index, u *index.Update) {
	if len(u.Secrets)+len(u.Roots)+len(u.Modules) == 0 {
		return
	}
	for _, k := range u.Secrets {
		x.SetSecret(k, &index.SecretState{})
	}
	for _, k := range u.Roots {
		x.SetRoots(k, &index.RootsState{})
	}
	for _, k := range u.Modules {
		x.SetModule(k, index.ModuleState{Module: &mesh.Module{}})
	}
	then := x.Commit()
	maps.Copy(u.Notices, then.Notices)
	maps.Copy(u.Policies, then.Policies)
	u.Snapshot = then.Snapshot
}

func (r *run) add(of id, severity, code, field, message string) {
	r.found = append(r.found, Finding{Code: code, Severity: severity, Kind: of.kind, Namespace: of.namespace, Name: of.name, Field: field, Message: message, From: r.source[of]})
}

// policies judges as the webhook does, and reports of which objects the index need not speak again.
func (r *run) policies(u *index.Update) map[id]bool {
	j := admission.Judge{Mesh: r.Config.PolicyMesh(), Cluster: surroundings{r}}
	said := map[id]bool{}
	for _, kind := range []string{"AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication", "Telemetry"} {
		for _, o := range r.objects[kind] {
			raw, err := o.MarshalJSON()
			if err != nil {
				continue // it came from JSON
			}
			parsed, err := admission.Parse(raw)
			if err != nil {
				continue
			}
			decided := r.Cluster && atWaypoint(u, o)
			for _, p := range j.Judge(parsed, r.Cluster) {
				if decided && p.Code == policy.NeedsWaypoint {
					continue // it has one
				}
				severity := Warning
				if p.Severity == policy.Error {
					severity = Error
				}
				r.add(idOf(o), severity, string(p.Code), p.Field, p.Message)
				switch p.Code {
				case policy.UnusedServiceAccount, policy.UnknownNamespace, policy.NotCaptured, policy.SelectsNothing:
				default:
					said[idOf(o)] = true
				}
			}
		}
	}
	return said
}

// atWaypoint reports whether waypoints decide all that a policy asks for.
func atWaypoint(u *index.Update, o *unstructured.Unstructured) bool {
	kind := index.AuthorizationPolicy
	for _, other := range []index.Kind{index.RequestAuthentication, index.Telemetry} {
		if o.GetKind() == other.String() {
			kind = other
		}
	}
	s := u.Policies[index.PolicyKey{Kind: kind, Namespace: o.GetNamespace(), Name: o.GetName()}]
	return s != nil && len(s.Waypoints) > 0 && s.Reason != policy.ReasonNoWaypoint
}

// severityOf is how bad it is what the index says of an object.
func severityOf(kind index.Kind, reason string) string {
	if kind == index.VirtualService && reason == policy.ReasonNoWaypoint {
		return Warning // it may be for gateways, too, which follow it
	}
	switch reason {
	case "PartlyIgnored", "InjectionLabelIgnored", index.ReasonConflicted, index.ReasonNoProxy:
		return Warning
	}
	return Error
}

// alone reports whether what the index says does not depend on what else there is.
func alone(reason string) bool {
	switch reason {
	case "PartlyIgnored", "InjectionLabelIgnored", "UnknownUDPPolicy", "UnknownDataplaneMode", policy.ReasonUnsupported, policy.ReasonTooLarge, policy.ReasonIgnored:
		return true
	}
	return false
}

// kebab writes a reason as a code.
func kebab(reason string) string {
	var b strings.Builder
	runes := []rune(reason)
	for i, c := range runes {
		if i > 0 && unicode.IsUpper(c) && (unicode.IsLower(runes[i-1]) || i+1 < len(runes) && unicode.IsLower(runes[i+1])) {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(c))
	}
	return b.String()
}

// typed returns an object as the index takes it; nil for a kind that it does not.
func typed(o *unstructured.Unstructured) (any, error) {
	var out any
	group, _, _ := strings.Cut(o.GetAPIVersion(), "/")
	switch group + "/" + o.GetKind() {
	case "v1/Pod":
		out = &corev1.Pod{}
	case "v1/Namespace":
		out = &corev1.Namespace{}
	case "v1/Service":
		out = &corev1.Service{}
	case "v1/Node":
		out = &corev1.Node{}
	case "discovery.k8s.io/EndpointSlice":
		out = &discoveryv1.EndpointSlice{}
	case "security.istio.io/AuthorizationPolicy":
		out = &securityv1.AuthorizationPolicy{}
	case "security.istio.io/PeerAuthentication":
		out = &securityv1.PeerAuthentication{}
	case "security.istio.io/RequestAuthentication":
		out = &securityv1.RequestAuthentication{}
	case "telemetry.istio.io/Telemetry":
		out = &telemetryv1.Telemetry{}
	case "extensions.istio.io/WasmPlugin":
		out = &extensionsv1alpha1.WasmPlugin{}
	case "networking.istio.io/EnvoyFilter":
		out = &networkingv1alpha3.EnvoyFilter{}
	case policy.RateLimitGroup + "/RateLimit":
		return policy.ReadRateLimit(o), nil
	case "networking.istio.io/ServiceEntry":
		out = &networkingv1.ServiceEntry{}
	case "networking.istio.io/WorkloadEntry":
		out = &networkingv1.WorkloadEntry{}
	case "networking.istio.io/VirtualService":
		out = &networkingv1.VirtualService{}
	case "networking.istio.io/DestinationRule":
		out = &networkingv1.DestinationRule{}
	case "networking.istio.io/Gateway":
		out = &networkingv1.Gateway{}
	case gatewayv1.GroupName + "/Gateway":
		out = &gatewayv1.Gateway{}
	case gatewayv1.GroupName + "/ListenerSet":
		out = &gatewayv1.ListenerSet{}
	case gatewayv1.GroupName + "/HTTPRoute":
		out = &gatewayv1.HTTPRoute{}
	case gatewayv1.GroupName + "/GRPCRoute":
		out = &gatewayv1.GRPCRoute{}
	case gatewayv1.GroupName + "/TLSRoute":
		out = &gatewayv1.TLSRoute{}
	case gatewayv1.GroupName + "/TCPRoute":
		out = &gatewayv1.TCPRoute{}
	case gatewayv1.GroupName + "/BackendTLSPolicy":
		out = &gatewayv1.BackendTLSPolicy{}
	case gatewayv1.GroupName + "/ReferenceGrant":
		out = &gatewayv1beta1.ReferenceGrant{}
	default:
		return nil, nil
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, out); err != nil {
		return nil, fmt.Errorf("it cannot be read: %w", err)
	}
	return out, nil
}

// ConfigOf reads what the ConfigMap of the mesh says as far as it decides about objects: its keys mesh and warren, which may be empty.
func ConfigOf(rootNamespace, meshKey, warrenKey string) (index.Config, error) {
	c := index.Config{ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: "cluster.local", Revision: "default", RootNamespace: rootNamespace}
	var m struct {
		RootNamespace      string   `json:"rootNamespace"`
		TrustDomain        string   `json:"trustDomain"`
		TrustDomainAliases []string `json:"trustDomainAliases"`
		ExtensionProviders []struct {
			Name string         `json:"name"`
			HTTP map[string]any `json:"envoyExtAuthzHttp"`
			GRPC map[string]any `json:"envoyExtAuthzGrpc"`
			policy.TelemetrySource
		} `json:"extensionProviders"`
	}
	var w struct {
		ClusterID     string `json:"clusterID"`
		ClusterDomain string `json:"clusterDomain"`
	}
	if err := yaml.Unmarshal([]byte(meshKey), &m); err != nil {
		return c, fmt.Errorf("reading the mesh configuration: %w", err)
	}
	if err := yaml.Unmarshal([]byte(warrenKey), &w); err != nil {
		return c, fmt.Errorf("reading the mesh configuration: %w", err)
	}
	c.RootNamespace, c.TrustDomain = cmp.Or(m.RootNamespace, c.RootNamespace), cmp.Or(m.TrustDomain, c.TrustDomain)
	c.ClusterID, c.ClusterDomain = cmp.Or(w.ClusterID, c.ClusterID), cmp.Or(w.ClusterDomain, c.ClusterDomain)
	c.TrustDomainAliases = m.TrustDomainAliases
	c.Providers, c.Telemetry.ByName = map[string]*mesh.AuthProvider{}, map[string]*mesh.TelemetryProvider{}
	for _, p := range m.ExtensionProviders {
		if p.HTTP != nil || p.GRPC != nil {
			c.Providers[p.Name] = &mesh.AuthProvider{} // that there is one decides
			continue
		}
		to, err := p.Provider(p.Name, c.ClusterDomain)
		if err != nil {
			return c, fmt.Errorf("reading the mesh configuration: extensionProviders: %w", err)
		}
		c.Telemetry.ByName[p.Name] = to
	}
	return c, nil
}
