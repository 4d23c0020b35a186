package controlplane

import "github.com/warrenmesh/warren/controlplane/status"

// newPolicies makes what writes on policy objects which nodes enforce them.
func (cp *controlPlane) newPolicies() *status.Policies {
	return status.NewPolicies(status.PoliciesConfig{
		Object: status.Objects(cp.source), Write: status.WriteStatus(cp.clients.Istio, cp.clients.Dynamic),
		Nodes: cp.xds.Nodes, Forget: cp.xds.Forget, Waypoint: cp.envoys.Pods,
		Owner: cp.tells, Away: cp.away, Revision: cp.cfg.Revision,
		RootNamespace: cp.cfg.Mesh.RootNamespace, Log: cp.cfg.Log.With("scope", "status"), Metrics: cp.metrics,
	})
}
