package analysis

import (
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	networkingv1alpha3 "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/warrenmesh/warren/controlplane/admission"
	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/revision"
)

// references finds names that lead nowhere.
func (r *run) references() {
	for _, kind := range []string{"Namespace", "Service", "ServiceEntry", "Pod"} {
		for _, o := range r.objects[kind] {
			r.waypoint(o)
		}
	}
	known := r.revisions()
	for _, kind := range []string{"Namespace", "Gateway"} {
		for _, o := range r.objects[kind] {
			r.revision(o, known)
		}
	}
	for _, o := range r.objects["VirtualService"] {
		r.virtualService(o, r.typed[idOf(o)].(*networkingv1.VirtualService))
	}
	for _, o := range r.objects["DestinationRule"] {
		r.destinationRule(o, r.typed[idOf(o)].(*networkingv1.DestinationRule))
	}
}

// waypoint looks at the label that asks for one: while there is none, what asks is refused.
func (r *run) waypoint(o *unstructured.Unstructured) {
	name := o.GetLabels()[index.LabelWaypoint]
	if name == "" || name == "none" {
		return
	}
	ns := o.GetLabels()[index.LabelWaypointNamespace]
	if ns == "" {
		ns = o.GetNamespace()
		if o.GetKind() == "Namespace" {
			ns = o.GetName()
		}
	}
	at := "metadata.labels." + index.LabelWaypoint
	gateway, ok := r.typed[id{"Gateway", ns, name}].(*gatewayv1.Gateway)
	if !ok {
		var there []string
		for _, g := range r.objects["Gateway"] {
			if g.GetNamespace() == ns {
				there = append(there, g.GetName())
			}
		}
		hint := "make it with: warren waypoint apply -n " + ns + " --name " + name
		if near := admission.Nearest(name, there); near != "" {
			hint = "is " + near + " meant?"
		}
		r.add(idOf(o), Error, string(UnknownWaypoint), at, fmt.Sprintf("there is no Gateway %s/%s, and what asks for a waypoint that is not there is refused; %s", ns, name, hint))
		return
	}
	if class := gateway.Spec.GatewayClassName; class != index.WaypointClass {
		r.add(idOf(o), Error, string(NotAWaypoint), at, fmt.Sprintf("the Gateway %s/%s is of class %s; a waypoint's is %s", ns, name, class, index.WaypointClass))
	}
}

// revisions are the control planes and tags that there are.
func (r *run) revisions() revision.Known {
	var services []revision.Service
	for _, o := range r.objects["Service"] {
		if o.GetNamespace() == r.Config.RootNamespace {
			services = append(services, o.GetLabels())
		}
	}
	return revision.Read(services)
}

// revision looks at the label that asks for a control plane. A namespace's is for the Gateways in it, of which there may be none.
func (r *run) revision(o *unstructured.Unstructured, known revision.Known) {
	asked := o.GetLabels()[revision.Label]
	if asked == "" {
		return
	}
	_, problem := known.Owner(asked)
	if problem == "" {
		return
	}
	severity, what := Error, "nobody makes or configures it"
	if o.GetKind() == "Namespace" {
		severity, what = Warning, "nobody makes or configures the Gateways in it that say nothing else"
	}
	hint := "install it with warren install --revision, name one with warren tag set, or take the label away"
	if _, tagged := known.Tags[asked]; tagged {
		hint = "install it with warren install --revision, or move the tag with warren tag set --overwrite"
	} else if near := admission.Nearest(asked, slices.Concat(slices.Sorted(maps.Keys(known.Revisions)), slices.Sorted(maps.Keys(known.Tags)))); near != "" {
		hint = "is " + near + " meant?"
	}
	r.add(idOf(o), severity, string(UnknownRevision), "metadata.labels."+revision.Label, fmt.Sprintf("%s: %s; %s", what, problem, hint))
}

// host finds the Service that a host of an object in a namespace means. known is false for a name outside of the cluster, of which
// nothing can be said.
func (r *run) host(namespace, host string) (service *corev1.Service, known bool) {
	name := r.Config.ResolveHost(namespace, host)
	short, _, _ := strings.Cut(name.Hostname, ".")
	if name != r.Config.ServiceName(name.Namespace, short) {
		return nil, false
	}
	s, _ := r.typed[id{"Service", name.Namespace, short}].(*corev1.Service)
	return s, true
}

// declared reports whether a ServiceEntry has a host.
func (r *run) declared(host string) bool {
	return slices.ContainsFunc(r.objects["ServiceEntry"], func(o *unstructured.Unstructured) bool {
		return slices.ContainsFunc(r.typed[idOf(o)].(*networkingv1.ServiceEntry).Spec.Hosts, func(h string) bool {
			return h == host || strings.HasPrefix(h, "*.") && strings.HasSuffix(host, h[1:])
		})
	})
}

// service is what a field names; nil where it is not there, which is said, or not of the cluster.
func (r *run) service(o *unstructured.Unstructured, field, host string) *corev1.Service {
	if host == "" || strings.Contains(host, "*") || r.declared(host) {
		return nil
	}
	s, known := r.host(o.GetNamespace(), host)
	if s != nil {
		return s
	}
	hint := "make it, or correct the name"
	var there []string
	for _, s := range r.objects["Service"] {
		if s.GetNamespace() == o.GetNamespace() {
			there = append(there, s.GetName())
		}
	}
	if near := admission.Nearest(strings.SplitN(host, ".", 2)[0], there); near != "" {
		hint = "is " + near + " meant?"
	}
	if !known {
		hint = "a host outside of the cluster needs a ServiceEntry"
		if name, ns, _ := strings.Cut(strings.TrimSuffix(host, ".svc"), "."); r.typed[id{"Service", ns, name}] != nil {
			hint = "write " + r.Config.ServiceName(ns, name).Hostname
		}
	}
	r.add(idOf(o), Error, string(UnknownHost), field, fmt.Sprintf("there is no Service %s; %s", host, hint))
	return nil
}

func (r *run) virtualService(o *unstructured.Unstructured, v *networkingv1.VirtualService) {
	for i, h := range v.Spec.Hosts {
		r.service(o, fmt.Sprintf("spec.hosts[%d]", i), h)
	}
	for i, http := range v.Spec.Http {
		for j, d := range http.Route {
			r.destination(o, fmt.Sprintf("spec.http[%d].route[%d].destination", i, j), d.GetDestination())
		}
		if http.Mirror != nil {
			r.destination(o, fmt.Sprintf("spec.http[%d].mirror", i), http.Mirror)
		}
		for j, m := range http.Mirrors {
			r.destination(o, fmt.Sprintf("spec.http[%d].mirrors[%d].destination", i, j), m.GetDestination())
		}
	}
}

// routed warns of an object for the requests to a Service that nobody looks at.
func (r *run) routed(o *unstructured.Unstructured, field string, s *corev1.Service) {
	is := r.snapshot.Service(r.Config.ServiceName(s.Namespace, s.Name))
	if is != nil && is.Waypoint == nil {
		r.add(idOf(o), Warning, kebab(policy.ReasonNoWaypoint), field, fmt.Sprintf("no waypoint is in front of Service %s/%s (label %s), so that this has no effect on it", s.Namespace, s.Name, index.LabelWaypoint))
	}
}

func (r *run) destination(o *unstructured.Unstructured, field string, d *networkingv1alpha3.Destination) {
	s := r.service(o, field+".host", d.GetHost())
	if s == nil {
		return
	}
	if n := d.GetPort().GetNumber(); n != 0 && !slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return uint32(p.Port) == n }) {
		r.add(idOf(o), Error, string(UnknownPort), field+".port", fmt.Sprintf("Service %s/%s has no port %d", s.Namespace, s.Name, n))
	}
	if d.GetSubset() == "" {
		return
	}
	var there []string
	for _, rule := range r.rulesFor(s) {
		for _, subset := range rule.Spec.Subsets {
			if subset.Name == d.Subset {
				return
			}
			there = append(there, subset.Name)
		}
	}
	hint := "declare it in a DestinationRule for the host"
	if near := admission.Nearest(d.Subset, there); near != "" {
		hint = "is " + near + " meant?"
	}
	r.add(idOf(o), Error, string(UnknownSubset), field+".subset", fmt.Sprintf("Service %s/%s has no subset %s; %s", s.Namespace, s.Name, d.Subset, hint))
}

// rulesFor are the DestinationRules of a Service.
func (r *run) rulesFor(s *corev1.Service) []*networkingv1.DestinationRule {
	var out []*networkingv1.DestinationRule
	for _, o := range r.objects["DestinationRule"] {
		d := r.typed[idOf(o)].(*networkingv1.DestinationRule)
		if is, _ := r.host(d.Namespace, d.Spec.Host); is == s {
			out = append(out, d)
		}
	}
	return out
}

func (r *run) destinationRule(o *unstructured.Unstructured, d *networkingv1.DestinationRule) {
	s := r.service(o, "spec.host", d.Spec.Host)
	if s != nil {
		r.routed(o, "spec.host", s)
	}
	if s == nil || len(s.Spec.Selector) == 0 {
		return
	}
	selected := labels.SelectorFromSet(s.Spec.Selector)
	for i, subset := range d.Spec.Subsets {
		chosen := labels.SelectorFromSet(subset.Labels)
		if !slices.ContainsFunc(r.objects["Pod"], func(p *unstructured.Unstructured) bool {
			return p.GetNamespace() == s.Namespace && selected.Matches(labels.Set(p.GetLabels())) && chosen.Matches(labels.Set(p.GetLabels()))
		}) {
			r.add(idOf(o), Warning, string(SubsetSelectsNothing), fmt.Sprintf("spec.subsets[%d].labels", i),
				fmt.Sprintf("no pod of Service %s/%s is in the subset %s now: what is sent to it is answered with 503", s.Namespace, s.Name, subset.Name))
		}
	}
}

// surroundings shows the objects to the judgement of policies.
type surroundings struct{ *run }

func (s surroundings) Namespaces() []string {
	var out []string
	for _, o := range s.objects["Namespace"] {
		out = append(out, o.GetName())
	}
	return out
}

func (s surroundings) HasNamespace(name string) bool {
	return s.typed[id{"Namespace", "", name}] != nil
}

func (s surroundings) Pods(namespace string) iter.Seq[admission.Pod] {
	return func(yield func(admission.Pod) bool) {
		for _, k := range slices.SortedFunc(maps.Keys(s.typed), func(a, b id) int { return strings.Compare(a.namespace+"/"+a.name, b.namespace+"/"+b.name) }) {
			p, ok := s.typed[k].(*corev1.Pod)
			if !ok || namespace != "" && p.Namespace != namespace || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
				continue
			}
			out := admission.Pod{Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.Spec.ServiceAccountName, Labels: p.Labels,
				Captured: p.Annotations[index.AnnotationRedirection] == index.RedirectionEnabled}
			if out.ServiceAccount == "" {
				out.ServiceAccount = "default"
			}
			if s.snapshot.Ingress(s.Config.ServiceName(p.Namespace, out.ServiceAccount)) != nil {
				out.Captured, out.Waypoint = true, true // a gateway decides for itself
			} else if w := s.snapshot.Workload(s.Config.ClusterID + "//Pod/" + p.Namespace + "/" + p.Name); w != nil {
				out.Waypoint = w.Waypoint != nil
			}
			if !yield(out) {
				return
			}
		}
	}
}

func (s surroundings) HasTarget(kind policy.TargetKind, namespace, name string) bool {
	of := "Service"
	if kind == policy.TargetServiceEntry {
		of = "ServiceEntry"
	}
	return s.typed[id{of, namespace, name}] != nil
}

func (s surroundings) PeerAuthentications(namespace string) iter.Seq[*securityv1.PeerAuthentication] {
	return func(yield func(*securityv1.PeerAuthentication) bool) {
		for _, o := range s.objects["PeerAuthentication"] {
			if o.GetNamespace() != namespace {
				continue
			}
			if p, ok := s.typed[idOf(o)].(*securityv1.PeerAuthentication); ok && !yield(p) {
				return
			}
		}
	}
}
