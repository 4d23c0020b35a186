// Package xds serves the mesh's state to node agents: delta ADS for Istio's workload types, which a stock ztunnel
// understands, and for the types that only Warren knows.
//
//	index.Update ──▶ Cache (resources encoded once, versions are content hashes)
//	                   │ names that changed
//	                   ▼
//	             one queue per client and type, coalescing ──▶ one response in flight per type
//
// Invariants. A response is built under one read lock of the cache, so what it says fits together. Policies are
// sent before the addresses that refer to them and taken back after those: a node denies what refers to a policy
// it does not have. A response that was rejected is sent again with the next change, or after a while.
//
// istioctl asks on the other variant of the protocol, for istio.io/debug types, how far everybody is.
//
// It owns the wire side of the control plane's state and knows what each node has acknowledged. It knows nothing
// of Kubernetes.
package xds
