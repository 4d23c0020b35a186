// Package enroll decides which pods of this node are captured and makes it so.
//
//	control plane ── LocalPod, Namespace ──►┐                        ┌──► datapath: rule, route, hooks
//	CNI plugin ───── /run/warren/cni.sock ──► Registry: desired ─────┼──► proxy: accept loops
//	holder ───────── what an earlier agent ─►┘  against actual       ├──► holder: namespace, listeners
//	                 left behind                                     └──► report: enabled or pending, and why
//
// It owns a pod's life on the node, from CNI ADD to the end of its network namespace, across restarts of the
// agent and reboots of the node. It must not know Kubernetes' API, policies or tunnels.
//
// The order of one enrolment is what keeps it closed: listeners, certificate, accept loops, holder, and only
// then capture. Captured before the listeners are held, a pod would be refused everything if the agent died
// in between. A release goes the other way round.
package enroll
