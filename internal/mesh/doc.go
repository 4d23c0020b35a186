// Package mesh is the domain of Warren: what a mesh consists of and the two decisions made about a
// connection, where it goes ([Snapshot.Resolve]) and whether it may ([Snapshot.Authorize]).
//
// It owns the immutable [Snapshot]: the control plane builds it from Kubernetes, a node rebuilds it from
// xDS, and map contents, routing, authorization, Envoy configuration, status and the console are functions
// of it. It knows neither Kubernetes nor a wire format and does no I/O; it imports only the standard library.
package mesh
