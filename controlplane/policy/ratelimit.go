package policy

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/warrenmesh/warren/internal/mesh"
)

// RateLimitGroup is the group of RateLimits.
const RateLimitGroup = "policy.warren.io"

// RateLimits is where they are in the API.
var RateLimits = schema.GroupVersionResource{Group: RateLimitGroup, Version: "v1alpha1", Resource: "ratelimits"}

// RateLimit is how many requests waypoints and gateways let through to what it is attached to. The chart's definition of the
// kind (files/crds/warren.yaml) says what each field means, and refuses what means nothing.
type RateLimit struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`

	Spec   RateLimitSpec   `json:"spec"`
	Status RateLimitStatus `json:"status"`

	Unreadable string `json:"-"` // why Spec is not what is stored
}

// RateLimitSpec is what is asked for.
type RateLimitSpec struct {
	TargetRefs []RateLimitTarget `json:"targetRefs"`
	CountedBy  *CountedBy        `json:"countedBy"`
	Limits     []Limit           `json:"limits"`
}

// CountedBy is who counts for all pods together.
type CountedBy struct {
	Service struct {
		Namespace string `json:"namespace"` // "": of the object
		Name      string `json:"name"`
		Port      int64  `json:"port"`
	} `json:"service"`
	Domain   string `json:"domain"`  // "": DefaultDomain
	Timeout  string `json:"timeout"` // "": DefaultCountTimeout
	FailOpen bool   `json:"failOpen"`
}

// What is taken where a RateLimit does not say it.
const (
	DefaultDomain       = "warren"
	DefaultCountTimeout = 100 * time.Millisecond
)

// RateLimitTarget is a Service, a ServiceEntry or a Gateway in the namespace of the object.
type RateLimitTarget struct {
	Group string `json:"group"`
	Kind  string `json:"kind"`
	Name  string `json:"name"`
}

// Limit is one of several that all hold.
type Limit struct {
	Requests int64      `json:"requests"`
	Per      string     `json:"per"`   // one of the keys of limitUnits
	Burst    int64      `json:"burst"` // 0: Requests
	Match    LimitMatch `json:"match"`
	By       []LimitBy  `json:"by"`
}

// LimitMatch is which requests count.
type LimitMatch struct {
	Methods []string      `json:"methods"`
	Paths   []LimitPath   `json:"paths"`
	Headers []LimitHeader `json:"headers"`
}

// LimitPath is the path of requests.
type LimitPath struct {
	Type  string `json:"type"` // Exact, or Prefix, which is the default: up to a slash or the end
	Value string `json:"value"`
}

// LimitHeader is a header of requests.
type LimitHeader struct {
	Name  string  `json:"name"`
	Value *string `json:"value"` // nil: any
}

// LimitBy is what tells clients apart.
type LimitBy struct {
	Type   string `json:"type"`   // one of the keys of limitAttributes
	Header string `json:"header"` // of Header alone
}

// RateLimitStatus is what has become of it.
type RateLimitStatus struct {
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// MaxRequests is the most that a limit may say, as the definition of the kind has it.
const MaxRequests = 1_000_000_000

var (
	// limitHeaders are names that Envoy's formatters take as they are.
	limitHeaders    = regexp.MustCompile(`^[A-Za-z0-9_-]{1,256}$`)
	limitUnits      = map[string]time.Duration{"Second": time.Second, "Minute": time.Minute, "Hour": time.Hour}
	limitAttributes = map[string]mesh.LimitAttribute{
		"Principal": mesh.LimitPrincipal, "Namespace": mesh.LimitNamespace, "Address": mesh.LimitAddress, "Header": mesh.LimitHeader,
	}
)

// ReadRateLimit reads an object as the API server has it. One that is not of the form of its kind limits nothing, and says so.
func ReadRateLimit(o *unstructured.Unstructured) *RateLimit {
	out := &RateLimit{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, out); err != nil {
		out = &RateLimit{Unreadable: "the object cannot be read: " + short(err.Error())}
		out.Name, out.Namespace, out.UID = o.GetName(), o.GetNamespace(), o.GetUID()
		out.ResourceVersion, out.Generation = o.GetResourceVersion(), o.GetGeneration()
	}
	return out
}

// CompiledLimits is a RateLimit as waypoints and gateways read it.
type CompiledLimits struct {
	Targets []Target
	Limits  []mesh.RateLimit
	// CountedBy is who counts for all pods together; nil for nobody.
	CountedBy *Counter
	// Problems are the limits that cannot hold, which the definition of the kind refuses.
	Problems []string
	// Identities are the fields by which clients are told apart that have an identity in the mesh.
	Identities []string
}

// Counter is a Service that counts. Whether there is one, and whether it may be asked, depends on what else is in the cluster.
type Counter struct {
	Namespace, Name string
	mesh.LimitCounter
}

// CompileRateLimit reads a RateLimit.
func CompileRateLimit(r *RateLimit) CompiledLimits {
	var out CompiledLimits
	if r.Unreadable != "" {
		out.Problems = []string{r.Unreadable}
	}
	for _, t := range r.Spec.TargetRefs {
		out.Targets = append(out.Targets, limitTarget(t))
	}
	if by := r.Spec.CountedBy; by != nil {
		c, problem := compileCounter(r.Namespace, by)
		if problem != "" { // and no limit is counted in another way than was asked for
			out.Problems = append(out.Problems, "spec.countedBy."+problem)
			return out
		}
		out.CountedBy = c
	}
	for i, l := range r.Spec.Limits {
		at := fmt.Sprintf("spec.limits[%d]", i)
		c, problem := compileLimit(l)
		if problem == "" && out.CountedBy != nil && l.Burst != 0 {
			problem = "burst: who counts for all pods does so by the second, the minute or the hour, and knows no burst"
		}
		if problem != "" {
			out.Problems = append(out.Problems, at+"."+problem)
			continue
		}
		c.Name = fmt.Sprintf("%s/%s/%d", r.Namespace, r.Name, i)
		for j, k := range c.By {
			if k.On == mesh.LimitPrincipal || k.On == mesh.LimitNamespace {
				out.Identities = append(out.Identities, fmt.Sprintf("%s.by[%d]", at, j))
			}
		}
		out.Limits = append(out.Limits, c)
	}
	return out
}

func limitTarget(t RateLimitTarget) Target {
	out := Target{Kind: TargetUnknown, Name: t.Name}
	switch t.Group + "/" + t.Kind {
	case "/Service", "core/Service":
		out.Kind = TargetService
	case "networking.istio.io/ServiceEntry":
		out.Kind = TargetServiceEntry
	case "networking.istio.io/Gateway":
		out.Kind = TargetIstioGateway
	case "gateway.networking.k8s.io/Gateway":
		out.Kind = TargetGateway
	}
	return out
}

// compileCounter returns who counts, or what of that means nothing.
func compileCounter(namespace string, by *CountedBy) (c *Counter, problem string) {
	c = &Counter{Namespace: cmp.Or(by.Service.Namespace, namespace), Name: by.Service.Name}
	c.Domain, c.Timeout, c.FailOpen = cmp.Or(by.Domain, DefaultDomain), DefaultCountTimeout, by.FailOpen
	if by.Timeout != "" {
		d, err := time.ParseDuration(by.Timeout)
		if err != nil || d < time.Millisecond || d > time.Minute {
			return nil, fmt.Sprintf("timeout: %s is not between 1ms and 1m", quote(by.Timeout))
		}
		c.Timeout = d
	}
	if c.Name == "" || by.Service.Port < 1 || by.Service.Port > 65535 {
		return nil, "service: it needs a name and a port"
	}
	c.Port = uint16(by.Service.Port)
	return c, ""
}

// compileLimit returns a limit, or what of it means nothing.
func compileLimit(l Limit) (out mesh.RateLimit, problem string) {
	burst := l.Burst
	if burst == 0 {
		burst = l.Requests
	}
	per := limitUnits[l.Per]
	switch {
	case l.Requests < 1 || l.Requests > MaxRequests:
		return out, fmt.Sprintf("requests: %d is not between 1 and %d", l.Requests, MaxRequests)
	case burst < 1 || burst > MaxRequests:
		return out, fmt.Sprintf("burst: %d is not between 1 and %d", burst, MaxRequests)
	case per == 0:
		return out, fmt.Sprintf("per: %s is not Second, Minute or Hour", quote(l.Per))
	}
	out = mesh.RateLimit{Requests: uint32(l.Requests), Per: per, Burst: uint32(burst), Match: mesh.LimitMatch{Methods: l.Match.Methods}}
	for i, p := range l.Match.Paths {
		if !strings.HasPrefix(p.Value, "/") {
			return out, fmt.Sprintf("match.paths[%d].value: %s does not begin with a slash", i, quote(p.Value))
		}
		kind, ok := map[string]mesh.TextKind{"": mesh.TextPath, "Prefix": mesh.TextPath, "Exact": mesh.TextExact}[p.Type]
		if !ok {
			return out, fmt.Sprintf("match.paths[%d].type: %s is not Exact or Prefix", i, quote(p.Type))
		}
		out.Match.Paths = append(out.Match.Paths, mesh.TextMatch{Kind: kind, Value: p.Value})
	}
	for i, h := range l.Match.Headers {
		if !limitHeaders.MatchString(h.Name) {
			return out, fmt.Sprintf("match.headers[%d].name: %s is not the name of a header", i, quote(h.Name))
		}
		m := mesh.NamedMatch{Name: strings.ToLower(h.Name)}
		if h.Value != nil {
			m.Match = mesh.TextMatch{Kind: mesh.TextExact, Value: *h.Value}
		}
		out.Match.Headers = append(out.Match.Headers, m)
	}
	for i, b := range l.By {
		on, ok := limitAttributes[b.Type]
		switch {
		case !ok:
			return out, fmt.Sprintf("by[%d].type: %s is not Principal, Namespace, Address or Header", i, quote(b.Type))
		case on == mesh.LimitHeader && !limitHeaders.MatchString(b.Header):
			return out, fmt.Sprintf("by[%d].header: %s is not the name of a header", i, quote(b.Header))
		}
		k := mesh.LimitKey{On: on}
		if on == mesh.LimitHeader {
			k.Header = strings.ToLower(b.Header)
		}
		out.By = append(out.By, k)
	}
	return out, ""
}
