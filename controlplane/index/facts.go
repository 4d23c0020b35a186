package index

import (
	"cmp"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/mesh"
)

// key names a namespaced object.
type key struct{ Namespace, Name string }

func keyOf(o metav1.Object) key { return key{o.GetNamespace(), o.GetName()} }

func compareKeys(a, b key) int {
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
}

// podFact is what the mesh needs of a Pod.
type podFact struct {
	key
	uid            string
	labels         map[string]string
	addrs          []netip.Addr
	serviceAccount string
	node           string
	hostNetwork    bool
	sidecar        bool
	redirected     bool // the node reported that it captures the pod
	dnsCapture     mesh.DNSCapture
	healthy        bool
	phase          podPhase
	started        metav1.Time // when the node took it; zero before
	created        metav1.Time
	namedPorts     []namedPort
	workloadName   string
	kind           mesh.WorkloadKind
}

type podPhase uint8

const (
	podPending podPhase = iota
	podRunning
	podTerminating
	podFinished
)

type namedPort struct {
	name string
	port uint16
}

// dnsCaptureOf reads the annotation of a pod. What is neither true nor false says nothing.
func dnsCaptureOf(value string) mesh.DNSCapture {
	switch on, err := strconv.ParseBool(value); {
	case err != nil:
		return mesh.DNSCaptureUnsaid
	case on:
		return mesh.DNSCaptureOn
	default:
		return mesh.DNSCaptureOff
	}
}

func podFactOf(p *corev1.Pod) *podFact {
	f := &podFact{
		key:            keyOf(p),
		uid:            string(p.UID),
		labels:         p.Labels,
		serviceAccount: p.Spec.ServiceAccountName,
		node:           p.Spec.NodeName,
		hostNetwork:    p.Spec.HostNetwork,
		redirected:     p.Annotations[AnnotationRedirection] == RedirectionEnabled,
		dnsCapture:     dnsCaptureOf(p.Annotations[annotationDNSCapture]),
		created:        p.CreationTimestamp,
	}
	if p.Status.StartTime != nil {
		f.started = *p.Status.StartTime
	}
	if f.serviceAccount == "" {
		f.serviceAccount = "default"
	}
	_, f.sidecar = p.Annotations[annotationSidecar]
	switch {
	case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		f.phase = podFinished
	case p.DeletionTimestamp != nil:
		f.phase = podTerminating
	case p.Status.Phase == corev1.PodRunning:
		f.phase = podRunning
	}
	ips := p.Status.PodIPs
	if len(ips) == 0 && p.Status.PodIP != "" {
		ips = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	for _, ip := range ips {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			f.addrs = append(f.addrs, a.Unmap().WithZone(""))
		}
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			f.healthy = f.phase != podTerminating && f.phase != podFinished
		}
	}
	for _, c := range p.Spec.Containers {
		f.namedPorts = appendNamedPorts(f.namedPorts, c.Ports)
	}
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			f.namedPorts = appendNamedPorts(f.namedPorts, c.Ports)
		}
	}
	f.workloadName, f.kind = controllerOf(p)
	return f
}

// claims are the addresses that are the pod's own.
func (f *podFact) claims() []netip.Addr {
	if f.hostNetwork || f.phase == podFinished {
		return nil
	}
	return f.addrs
}

// owns decides between two pods that claim one address: the API may still show the old holder when the address
// is in use again. The one that is not terminating has it, then the one that its node took last.
func (f *podFact) owns(other *podFact) bool {
	if (f.phase == podTerminating) != (other.phase == podTerminating) {
		return other.phase == podTerminating
	}
	if !f.started.Equal(&other.started) {
		return other.started.Before(&f.started)
	}
	if !f.created.Equal(&other.created) {
		return other.created.Before(&f.created)
	}
	return compareKeys(f.key, other.key) > 0
}

func appendNamedPorts(dst []namedPort, ports []corev1.ContainerPort) []namedPort {
	for _, p := range ports {
		if p.Name != "" && (p.Protocol == corev1.ProtocolTCP || p.Protocol == "") {
			dst = append(dst, namedPort{p.Name, uint16(p.ContainerPort)})
		}
	}
	return dst
}

func (f *podFact) namedPort(name string) (uint16, bool) {
	for _, p := range f.namedPorts {
		if p.name == name {
			return p.port, true
		}
	}
	return 0, false
}

// A CronJob names its Jobs <name>-<scheduled time in minutes since the epoch>.
var cronJobName = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// controllerOf derives what a pod is an instance of, from its owner and the hash labels that ReplicaSets carry;
// it needs no access to the owner. The label service.istio.io/workload-name overrides the name.
func controllerOf(p *corev1.Pod) (string, mesh.WorkloadKind) {
	name, kind := p.Name, mesh.KindPod
	if p.GenerateName != "" {
		if ref := metav1.GetControllerOf(p); ref != nil {
			name = ref.Name
			switch ref.Kind {
			case "ReplicaSet":
				for _, l := range []string{"pod-template-hash", "rollouts-pod-template-hash"} {
					if h := p.Labels[l]; h != "" && strings.HasSuffix(ref.Name, "-"+h) {
						name, kind = strings.TrimSuffix(ref.Name, "-"+h), mesh.KindDeployment
						break
					}
				}
			case "ReplicationController":
				if d := p.Labels["deploymentconfig"]; d != "" {
					name, kind = d, mesh.KindDeployment
				}
			case "Job":
				kind = mesh.KindJob
				if m := cronJobName.FindStringSubmatch(ref.Name); m != nil {
					name, kind = m[1], mesh.KindCronJob
				}
			}
		}
	}
	if n := p.Labels["service.istio.io/workload-name"]; n != "" {
		name = n
	}
	return name, kind
}

// canonical is the name and revision that telemetry groups by.
func canonical(l map[string]string, workloadName string) (name, revision string) {
	return first(l, workloadName, "service.istio.io/canonical-name", "app.kubernetes.io/name", "app"),
		first(l, "latest", "service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
}

func first(l map[string]string, otherwise string, keys ...string) string {
	for _, k := range keys {
		if v, ok := l[k]; ok {
			return v
		}
	}
	return otherwise
}

// namespaceFact is what the mesh needs of a Namespace.
type namespaceFact struct {
	name                string
	uid                 string
	labels              map[string]string
	trafficDistribution string
	terminating         bool
}

func namespaceFactOf(n *corev1.Namespace) *namespaceFact {
	return &namespaceFact{
		name:                n.Name,
		uid:                 string(n.UID),
		labels:              n.Labels,
		trafficDistribution: n.Annotations[annotationTrafficDistribution],
		terminating:         n.Status.Phase == corev1.NamespaceTerminating,
	}
}

func sameNamespace(a, b *namespaceFact) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.uid == b.uid && maps.Equal(a.labels, b.labels) && a.trafficDistribution == b.trafficDistribution && a.terminating == b.terminating
}

// localityOf reads the topology labels of a Node.
func localityOf(n *corev1.Node) mesh.Locality {
	return mesh.Locality{
		Region:  n.Labels[corev1.LabelTopologyRegion],
		Zone:    n.Labels[corev1.LabelTopologyZone],
		Subzone: n.Labels["topology.istio.io/subzone"],
	}
}

// sliceFact is what the mesh needs of an EndpointSlice.
type sliceFact struct {
	key
	service   string            // name of the Service, in the same namespace
	ports     map[string]uint16 // TCP ports by name
	pods      []key             // pods it refers to
	endpoints []opaqueEndpoint  // endpoints that are not pods
}

// opaqueEndpoint is an address about which nothing but its readiness is known.
type opaqueEndpoint struct {
	addr  netip.Addr
	ready bool
}

// sliceFactOf returns nil for slices that belong to no Service or hold names instead of addresses.
func sliceFactOf(s *discoveryv1.EndpointSlice) *sliceFact {
	service := s.Labels[discoveryv1.LabelServiceName]
	if service == "" || s.AddressType == discoveryv1.AddressTypeFQDN {
		return nil
	}
	f := &sliceFact{key: keyOf(s), service: service, ports: map[string]uint16{}}
	for _, p := range s.Ports {
		if p.Port == nil || (p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP) {
			continue
		}
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		f.ports[name] = uint16(*p.Port)
	}
	seen := map[netip.Addr]bool{}
	for _, e := range s.Endpoints {
		if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
			ns := e.TargetRef.Namespace
			if ns == "" {
				ns = s.Namespace
			}
			f.pods = append(f.pods, key{ns, e.TargetRef.Name})
			continue
		}
		if len(e.Addresses) == 0 {
			continue
		}
		a, err := netip.ParseAddr(e.Addresses[0])
		if err != nil || seen[a.Unmap()] {
			continue
		}
		a = a.Unmap().WithZone("")
		seen[a] = true
		f.endpoints = append(f.endpoints, opaqueEndpoint{a, e.Conditions.Ready == nil || *e.Conditions.Ready})
	}
	slices.SortFunc(f.pods, compareKeys)
	f.pods = slices.Compact(f.pods)
	return f
}

// selects reports whether a label selector, given as the labels it asks for, picks something with these
// labels. An empty selector picks nothing here: callers treat it on its own.
func selects(selector, l map[string]string) bool {
	if len(selector) == 0 {
		return false
	}
	for k, v := range selector {
		if have, ok := l[k]; !ok || have != v {
			return false
		}
	}
	return true
}
