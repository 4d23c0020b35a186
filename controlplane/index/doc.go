// Package index turns Kubernetes objects into the mesh's [mesh.Snapshot].
//
//	informers ──▶ facts (facts.go, one pure converter per object kind)
//	                │  Apply marks what depends on the fact
//	                ▼
//	          workloads, services, policies, local pods (pure functions of facts)
//	                │  Commit
//	                ▼
//	          mesh.Snapshot + the keys that changed
//
// It owns which objects are watched, what is kept of them, and the decision whether a pod is enrolled
// ([Decide]). Nothing here depends on the order of events: an [Index] that saw any history equals one built
// from the objects that are left.
//
// It knows neither a wire format nor who consumes the Snapshot, and writes nothing to the cluster.
package index
