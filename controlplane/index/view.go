package index

import (
	"iter"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
)

// SeenPod is what a reader of the cluster may know of a pod that has not finished.
type SeenPod struct {
	Namespace, Name, ServiceAccount string
	Node                            string // "" before it has one
	Labels                          map[string]string
	HostNetwork                     bool
	Captured                        bool // its node says that it is captured
	Ending                          bool
}

// SeenPods yields the pods of a namespace, or those of all for "", as the watch has them now.
func (s *Source) SeenPods(namespace string) iter.Seq[SeenPod] {
	var objs []any
	if namespace == "" {
		objs = s.pods.GetStore().List()
	} else if in, err := s.pods.GetIndexer().ByIndex(cache.NamespaceIndex, namespace); err == nil {
		objs = in
	}
	return func(yield func(SeenPod) bool) {
		for _, o := range objs {
			p, ok := o.(*corev1.Pod)
			if !ok || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
				continue
			}
			sa := p.Spec.ServiceAccountName
			if sa == "" {
				sa = "default"
			}
			if !yield(SeenPod{
				Namespace: p.Namespace, Name: p.Name, ServiceAccount: sa, Node: p.Spec.NodeName, Labels: p.Labels, HostNetwork: p.Spec.HostNetwork,
				Captured: p.Annotations[AnnotationRedirection] == RedirectionEnabled, Ending: p.DeletionTimestamp != nil,
			}) {
				return
			}
		}
	}
}

// NamespaceNames are the namespaces that the watch has now, in no order.
func (s *Source) NamespaceNames() []string {
	return s.core.Core().V1().Namespaces().Informer().GetStore().ListKeys()
}

// HasNamespace reports whether the watch has a namespace now.
func (s *Source) HasNamespace(name string) bool {
	_, ok, err := s.core.Core().V1().Namespaces().Informer().GetStore().GetByKey(name)
	return ok && err == nil
}

// PeerAuthentications yields those of a namespace, as the watch has them now.
func (s *Source) PeerAuthentications(namespace string) iter.Seq[*securityv1.PeerAuthentication] {
	return func(yield func(*securityv1.PeerAuthentication) bool) {
		store, _ := s.stores.Load(PeerAuthentication)
		i, ok := store.(cache.Indexer)
		if !ok { // the cluster has no such kind yet
			return
		}
		objs, err := i.ByIndex(cache.NamespaceIndex, namespace)
		if err != nil {
			return
		}
		for _, o := range objs {
			if p, ok := o.(*securityv1.PeerAuthentication); ok && !yield(p) {
				return
			}
		}
	}
}
