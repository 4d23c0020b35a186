// Package api holds Warren's wire contracts: the .proto texts and the Go code generated from them, one
// directory to a proto package. It owns no logic and knows nothing of the rest of the module.
//
//	workload  istio.workload    what a workload and a service are, as ztunnel and istiod speak it
//	security  istio.security    L4 authorization, likewise
//	ca        istio.v1.auth     certificate signing
//	node      warren.node.v1    what a node needs to know beyond those, and what it reports back
//
// The first three keep Istio's package, message and field names and numbers, so that either side of the wire
// can be exchanged for Istio's. A proto package may be registered once in a binary: nothing may import
// istio.io/istio or istio.io/api/security/v1alpha1 beside them.
package api
