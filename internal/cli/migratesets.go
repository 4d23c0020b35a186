package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/retry"
)

// setState is what was set of a DaemonSet of Istio's.
type setState struct {
	Affinity *corev1.Affinity               `json:"affinity,omitempty"`
	Strategy appsv1.DaemonSetUpdateStrategy `json:"updateStrategy"`
}

// capturesForIstio reports whether a DaemonSet is Istio's ztunnel or its CNI plugin.
func capturesForIstio(d *appsv1.DaemonSet) bool {
	if isOurs(d.Labels) {
		return false
	}
	labels := map[string]string{}
	maps.Copy(labels, d.Spec.Template.Labels)
	maps.Copy(labels, d.Labels)
	return d.Name == "istio-cni-node" || labels["k8s-app"] == "istio-cni-node" || labels["app"] == "ztunnel"
}

// istioSets are the DaemonSets by which Istio captures.
func istioSets(ctx context.Context, c *conn) ([]appsv1.DaemonSet, error) {
	list, err := c.AppsV1().DaemonSets("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("looking for Istio's ztunnel and CNI plugin: %w", err)
	}
	sets := slices.DeleteFunc(list.Items, func(d appsv1.DaemonSet) bool { return !capturesForIstio(&d) })
	slices.SortFunc(sets, func(x, y appsv1.DaemonSet) int { return strings.Compare(setName(&x), setName(&y)) })
	return sets, nil
}

// istioControls are the control planes of Istio.
func istioControls(ctx context.Context, c *conn) ([]appsv1.Deployment, error) {
	list, err := c.AppsV1().Deployments("").List(ctx, metav1.ListOptions{LabelSelector: anyControl})
	if err != nil {
		return nil, fmt.Errorf("looking for Istio's control plane: %w", err)
	}
	return slices.DeleteFunc(list.Items, func(d appsv1.Deployment) bool { return isOurs(d.Labels) }), nil
}

func setName(d *appsv1.DaemonSet) string { return d.Namespace + "/" + d.Name }

// ownedBy reports whether a DaemonSet made a pod.
func ownedBy(p *corev1.Pod, d *appsv1.DaemonSet) bool {
	o := metav1.GetControllerOf(p)
	return p.Namespace == d.Namespace && o != nil && o.Kind == "DaemonSet" && o.Name == d.Name
}

// ownedByAny reports whether one of the DaemonSets made a pod.
func ownedByAny(p *corev1.Pod, sets []appsv1.DaemonSet) bool {
	return slices.ContainsFunc(sets, func(d appsv1.DaemonSet) bool { return ownedBy(p, &d) })
}

// apart is what keeps a DaemonSet of Istio's off the nodes that are Warren's.
var apart = corev1.NodeSelectorRequirement{Key: migrationLabel, Operator: corev1.NodeSelectorOpDoesNotExist}

// isApart reports whether every way for a DaemonSet onto a node asks that it is not Warren's.
func isApart(d *appsv1.DaemonSet) bool {
	a := d.Spec.Template.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return false
	}
	return !slices.ContainsFunc(a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms, func(t corev1.NodeSelectorTerm) bool {
		return !slices.ContainsFunc(t.MatchExpressions, func(r corev1.NodeSelectorRequirement) bool { return r.Key == apart.Key && r.Operator == apart.Operator })
	})
}

// holdOff keeps a DaemonSet of Istio's off the nodes that are Warren's, and its pods on the others as they are: OnDelete, since the
// pod's template is another one with it.
func (m *mover) holdOff(ctx context.Context, set *appsv1.DaemonSet) error {
	return m.update(ctx, set, func(d *appsv1.DaemonSet) error {
		if isApart(d) {
			return nil
		}
		var was setState
		if text := d.Annotations[beforeNote]; text != "" { // somebody has written another template since
			if err := json.Unmarshal([]byte(text), &was); err != nil {
				return fmt.Errorf("annotation %s: %w; take it away", beforeNote, err)
			}
		}
		was.Affinity = d.Spec.Template.Spec.Affinity.DeepCopy()
		if d.Spec.UpdateStrategy.Type != appsv1.OnDeleteDaemonSetStrategyType || d.Annotations[beforeNote] == "" {
			was.Strategy = d.Spec.UpdateStrategy
		}
		b, err := json.Marshal(was)
		if err != nil {
			return err
		}
		if d.Annotations == nil {
			d.Annotations = map[string]string{}
		}
		d.Annotations[beforeNote] = string(b)
		d.Spec.UpdateStrategy = appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}
		pod := &d.Spec.Template.Spec
		if pod.Affinity == nil {
			pod.Affinity = &corev1.Affinity{}
		}
		if pod.Affinity.NodeAffinity == nil {
			pod.Affinity.NodeAffinity = &corev1.NodeAffinity{}
		}
		required := &pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
		if *required == nil {
			*required = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{}}}
		}
		for i := range (*required).NodeSelectorTerms {
			t := &(*required).NodeSelectorTerms[i]
			t.MatchExpressions = append(t.MatchExpressions, apart)
		}
		return nil
	})
}

// letGo puts Istio's DaemonSets back as they were once no node is Warren's.
func (m *mover) letGo(ctx context.Context) error {
	if !m.back {
		return nil
	}
	nodes, err := m.c.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: migrationLabel})
	if err != nil {
		return fmt.Errorf("listing nodes: %w", err)
	}
	if len(nodes.Items) > 0 {
		return nil
	}
	for i := range m.sets {
		if err := m.update(ctx, &m.sets[i], func(d *appsv1.DaemonSet) error {
			text := d.Annotations[beforeNote]
			if text == "" {
				return nil
			}
			var was setState
			if err := json.Unmarshal([]byte(text), &was); err != nil {
				return fmt.Errorf("annotation %s: %w", beforeNote, err)
			}
			if isApart(d) {
				d.Spec.Template.Spec.Affinity = was.Affinity
			}
			d.Spec.UpdateStrategy = was.Strategy
			delete(d.Annotations, beforeNote)
			return nil
		}); err != nil {
			return err
		}
	}
	m.p.done("no node is Warren's: Istio's DaemonSets are as they were")
	return nil
}

// update changes a DaemonSet of Istio's as it is now.
func (m *mover) update(ctx context.Context, set *appsv1.DaemonSet, change func(*appsv1.DaemonSet) error) error {
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		d, err := m.c.AppsV1().DaemonSets(set.Namespace).Get(ctx, set.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		was := d.DeepCopy()
		if err := change(d); err != nil || equalSets(was, d) {
			return err
		}
		_, err = m.c.AppsV1().DaemonSets(set.Namespace).Update(ctx, d, metav1.UpdateOptions{FieldManager: fieldManager})
		return err
	})
	if err != nil {
		return fmt.Errorf("writing DaemonSet %s: %w", setName(set), err)
	}
	return nil
}

func equalSets(x, y *appsv1.DaemonSet) bool {
	a, errA := json.Marshal(x)
	b, errB := json.Marshal(y)
	return errA == nil && errB == nil && string(a) == string(b)
}
