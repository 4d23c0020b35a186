// Package status writes back what the nodes and the index found out: the annotation that says whether a pod is
// captured, and events on the objects that an operator should look at.
//
// A node is the only one who knows what its kernel redirects, so its report decides about the annotation; the
// control plane only checks that a node speaks of its own pods. Every replica writes for the nodes that are
// connected to it; events about objects come from the leader.
package status
