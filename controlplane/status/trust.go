package status

import (
	"context"
	"encoding/json"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/controlplane/ca"
)

// noteTrust writes on the agent's own pod which roots its node has reported to trust. There it outlives this
// replica, and the one that leads reads it whichever replica the node reports to.
func (n *Nodes) noteTrust(ctx context.Context, agent *auth.Caller, digest string) {
	pods := n.cfg.Kube.CoreV1().Pods(agent.Identity.Namespace)
	if digest == "" {
		return
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": agent.PodUID, "annotations": map[string]any{ca.AnnotationTrusts: digest},
	}})
	if err == nil {
		_, err = pods.Patch(ctx, agent.PodName, types.MergePatchType, patch, metav1.PatchOptions{})
	}
	if err != nil && ctx.Err() == nil {
		n.cfg.Log.Warn("which roots a node trusts is not written to its agent's pod", "pod", agent.PodName, "error", err)
	}
}
