package index

import (
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// NetworkPolicies are the network plugin's to enforce, on the node's path between pods. All that the mesh has to know is
// which pods they select: the kernel must not lead connections past them.

// Selected says whether a NetworkPolicy selects a pod.
type Selected uint8

const (
	SelectedUnknown Selected = iota // the policies have not been read, or may not be
	SelectedNo
	SelectedYes
)

// selectorFact is what is kept of a NetworkPolicy.
type selectorFact struct{ pods labels.Selector }

// selectorFactOf takes a selector that cannot be read for one of every pod.
func selectorFactOf(p *networkingv1.NetworkPolicy) *selectorFact {
	s, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil {
		s = labels.Everything()
	}
	return &selectorFact{s}
}

func (x *Index) setNetworkPolicy(k key, f *selectorFact) {
	if old := put(x.selectors, k, f); old == nil && f == nil {
		return
	}
	for _, p := range x.pods[k.Namespace] {
		x.touch(Pod, p.key)
	}
}

// KnowNetworkPolicies says that all NetworkPolicies there are have been Set.
func (x *Index) KnowNetworkPolicies() {
	x.selectorsKnown = true
	for _, pods := range x.pods {
		for _, p := range pods {
			x.touch(Pod, p.key)
		}
	}
}

func (x *Index) selected(f *podFact) Selected {
	if !x.selectorsKnown {
		return SelectedUnknown
	}
	for _, s := range x.selectors[f.Namespace] {
		if s.pods.Matches(labels.Set(f.labels)) {
			return SelectedYes
		}
	}
	return SelectedNo
}
