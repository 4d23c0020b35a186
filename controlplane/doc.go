// Package controlplane is Warren's control plane: it watches the cluster, derives the mesh from it, serves that to
// the nodes and issues their certificates.
//
//	index      Kubernetes objects → mesh.Snapshot
//	policy     what a policy means, and what is wrong with it
//	admission  words for whoever applies a policy
//	xds        mesh.Snapshot → node agents, and what they acknowledged
//	ca         certificates for identities, to the nodes that run them
//	auth       who calls
//	status     what the nodes report → pod annotations and events
//
// Any number of replicas may run. Each serves; one, the leader, writes what is not about a connected node: the root
// certificate's ConfigMaps and the events on objects. [Rules] is what it has to be permitted.
//
// Package controlplane owns the wiring, the ports and the configuration. It and the node agent know each other by
// the wire alone.
package controlplane
