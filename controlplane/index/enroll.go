package index

import (
	"fmt"

	"k8s.io/apimachinery/pkg/labels"
)

// Labels and annotations of the enrolment contract, as Istio defines them.
const (
	labelMode          = "istio.io/dataplane-mode"
	labelInjection     = "istio-injection"
	labelSidecarInject = "sidecar.istio.io/inject"
	labelTunnel        = "networking.istio.io/tunnel"

	// Warren's own: whether policies apply to the UDP that arrives at the namespace's pods.
	labelUDP   = "warren.io/udp-policy"
	udpEnforce = "enforce"
	udpNone    = "none"

	annotationSidecar     = "sidecar.istio.io/status"
	AnnotationRedirection = "ambient.istio.io/redirection"
	annotationDNSCapture  = "ambient.istio.io/dns-capture"

	modeAmbient = "ambient"
	modeNone    = "none"

	RedirectionEnabled = "enabled"
	RedirectionPending = "pending"
)

// EnrolReason is the stable word for why a pod is enrolled or is not.
type EnrolReason string

const (
	EnrolledByNamespace  EnrolReason = "namespace"
	EnrolledByPod        EnrolReason = "pod-label"
	EnrolledBySelector   EnrolReason = "selector"
	NotEnrolled          EnrolReason = "not-labelled"
	NotHostNetwork       EnrolReason = "host-network"
	NotSidecar           EnrolReason = "sidecar"
	NotPodOptOut         EnrolReason = "pod-opt-out"
	NotNamespaceOptOut   EnrolReason = "namespace-opt-out"
	NotNamespaceUnknown  EnrolReason = "namespace-label-unknown"
	NotNamespaceNotFound EnrolReason = "namespace-not-found"
)

// Decision is whether a pod is to be captured, and why.
type Decision struct {
	Enrolled bool
	Reason   EnrolReason
	// Warning is set where a label does not mean what its author seems to think; words for the operator.
	Warning string
}

// PodTraits is what the decision looks at in a pod.
type PodTraits struct {
	Labels      map[string]string
	HostNetwork bool
	Sidecar     bool // it has the annotation sidecar.istio.io/status
}

// decide is the whole enrolment rule. A nil ns is a namespace that does not exist (any more).
// The pod's own label wins over its namespace; a value that is neither ambient nor none is no decision at
// that level, and a warning.
func (c *compiled) decide(ns *namespaceFact, pod PodTraits) Decision {
	switch {
	case pod.HostNetwork:
		return Decision{Reason: NotHostNetwork}
	case pod.Sidecar:
		return Decision{Reason: NotSidecar}
	}
	var d Decision
	switch v, ok := pod.Labels[labelMode]; {
	case v == modeNone:
		return Decision{Reason: NotPodOptOut}
	case v == modeAmbient:
		return Decision{Enrolled: true, Reason: EnrolledByPod}
	case ok && v != "":
		d.Warning = fmt.Sprintf("the pod's label %s has the unknown value %q; use %q or %q. The label is ignored and the namespace decides",
			labelMode, v, modeAmbient, modeNone)
	}
	if ns == nil {
		d.Reason = NotNamespaceNotFound
		return d
	}
	for _, e := range c.enablement {
		if e.pod.Matches(labels.Set(pod.Labels)) && e.namespace.Matches(labels.Set(ns.labels)) {
			d.Enrolled, d.Reason = true, EnrolledBySelector
			return d
		}
	}
	d.Enrolled, d.Reason = namespaceMode(ns.labels)
	return d
}

// ownLabel reports whether the pod is enrolled whatever its namespace says.
func (f *podFact) ownLabel() bool {
	return f.labels[labelMode] == modeAmbient && !f.hostNetwork && !f.sidecar
}

// namespaceMode is what a namespace's own label says about pods without one.
func namespaceMode(l map[string]string) (bool, EnrolReason) {
	switch v := l[labelMode]; v {
	case modeAmbient:
		return true, EnrolledByNamespace
	case modeNone:
		return false, NotNamespaceOptOut
	case "":
		return false, NotEnrolled
	default:
		return false, NotNamespaceUnknown
	}
}

// namespaceEnrolled tells whether a new pod of the namespace about which nothing else is known has to be
// captured before it runs, as far as labels of namespaces decide. It errs towards yes: an enablement selector on pods
// may pick any of them.
func (c *compiled) namespaceEnrolled(ns *namespaceFact) bool {
	if ok, _ := namespaceMode(ns.labels); ok {
		return true
	}
	for _, e := range c.enablement {
		if e.namespace.Matches(labels.Set(ns.labels)) {
			return true
		}
	}
	return false
}

// filtersUDP reports whether policies are to apply to the UDP that arrives at the namespace's pods.
func (ns *namespaceFact) filtersUDP() bool { return ns != nil && ns.labels[labelUDP] == udpEnforce }

// namespaceWarning explains a namespace whose labels ask for something that will not happen.
func (c *compiled) namespaceWarning(ns *namespaceFact) (reason, message string) {
	switch v := ns.labels[labelUDP]; v {
	case "", udpEnforce, udpNone:
	default:
		return "UnknownUDPPolicy", fmt.Sprintf("label %s has the unknown value %q, so UDP of the namespace is not filtered; use %q or %q: kubectl label --overwrite namespace %s %s=%s",
			labelUDP, v, udpEnforce, udpNone, ns.name, labelUDP, udpEnforce)
	}
	_, why := namespaceMode(ns.labels)
	if why == NotNamespaceUnknown {
		return "UnknownDataplaneMode", fmt.Sprintf("label %s has the unknown value %q, so the namespace is not in the mesh; use %q or %q",
			labelMode, ns.labels[labelMode], modeAmbient, modeNone)
	}
	if why == NotEnrolled && ns.labels[labelInjection] == "enabled" && !c.namespaceEnrolled(ns) {
		return "InjectionLabelIgnored", fmt.Sprintf(
			"label %s=enabled asks for a sidecar in each pod; this mesh has none and leaves the namespace alone. To enrol it: kubectl label namespace %s %s=%s %s-",
			labelInjection, ns.name, labelMode, modeAmbient, labelInjection)
	}
	return "", ""
}

// Decide is the enrolment rule as a pure function, for tools that explain it.
func Decide(cfg Config, namespaceLabels map[string]string, pod PodTraits) (Decision, error) {
	c, err := cfg.compile()
	if err != nil {
		return Decision{}, err
	}
	return c.decide(&namespaceFact{labels: namespaceLabels}, pod), nil
}
