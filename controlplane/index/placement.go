package index

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
)

const (
	indexPlacement = "placement" // pods by node and service account
	indexNode      = "node"      // pods by node
)

func placementKey(node, namespace, serviceAccount string) string {
	return node + "/" + namespace + "/" + serviceAccount
}

// placementKeys leaves out pods that have finished: none of their processes needs an identity.
func placementKeys(obj any) ([]string, error) {
	p, ok := obj.(*corev1.Pod)
	if !ok {
		return nil, fmt.Errorf("index %T as a pod", obj)
	}
	f := podFactOf(p)
	if f.node == "" || f.phase == podFinished {
		return nil, nil
	}
	return []string{placementKey(f.node, f.Namespace, f.serviceAccount)}, nil
}

func nodeKeys(obj any) ([]string, error) {
	if p, ok := obj.(*corev1.Pod); ok && p.Spec.NodeName != "" {
		return []string{p.Spec.NodeName}, nil
	}
	return nil, nil
}

// Placed is where a pod was scheduled to, as the watch has it now: ahead of the Snapshot by what is not committed.
type Placed struct {
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	Node           string
	Phase          PodPhase
	Redirection    string // annotation ambient.istio.io/redirection
}

func placedOf(p *corev1.Pod) Placed {
	f := podFactOf(p)
	return Placed{
		UID: f.uid, Namespace: f.Namespace, Name: f.Name, ServiceAccount: f.serviceAccount, Node: f.node, Phase: f.phase,
		Redirection: p.Annotations[AnnotationRedirection],
	}
}

// PodByName returns the pod of that name.
func (s *Source) PodByName(namespace, name string) (Placed, bool) {
	obj, ok, err := s.pods.GetStore().GetByKey(namespace + "/" + name)
	if err != nil || !ok {
		return Placed{}, false
	}
	return placedOf(obj.(*corev1.Pod)), true
}

// PodsOn returns the pods scheduled to a node.
func (s *Source) PodsOn(node string) []Placed {
	objs, err := s.pods.GetIndexer().ByIndex(indexNode, node)
	if err != nil {
		return nil
	}
	out := make([]Placed, 0, len(objs))
	for _, o := range objs {
		out = append(out, placedOf(o.(*corev1.Pod)))
	}
	return out
}

// Runs reports whether a pod of the service account is on the node and has not finished.
func (s *Source) Runs(node, namespace, serviceAccount string) bool {
	if node == "" {
		return false
	}
	keys, err := s.pods.GetIndexer().IndexKeys(indexPlacement, placementKey(node, namespace, serviceAccount))
	return err == nil && len(keys) > 0
}
