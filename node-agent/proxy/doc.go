// Package proxy carries the TCP connections of the pods of one node. Its file names tell the story of a
// connection:
//
//	client app ─▶ outbound.go (15001, in the client pod's network namespace)
//	                  │ decide: mesh.Snapshot.Resolve → Request
//	                  ├─ passthrough / direct ─▶ plain TCP
//	                  └─ HBONE ─▶ hbone.Pool ═══ mTLS ═══▶ inbound.go (15008, in the server pod's namespace)
//	                                                          │ register, authorize, dial, answer
//	client without a tunnel ─▶ passthrough.go (15006) ────────┴─▶ server app, which sees the client's address
//
// accept.go is the one accept loop of the three listeners, dial.go makes sockets in a pod's namespace,
// conns.go is the table of open connections (drain, re-evaluation after a policy change), outcome.go names
// every way in which a connection can end, metrics.go and accesslog.go report it.
//
// The package owns sockets between accept and close. It must not know xDS, Kubernetes, BPF maps or how a
// listener came to be: it is given listeners, a [mesh.Store] and certificates.
package proxy
