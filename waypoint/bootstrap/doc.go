// Package bootstrap runs the Envoy of a waypoint, as the first process of its pod.
//
//	control plane ◄── TLS, token ── this process ◄── unix socket ── Envoy ◄── 15008
//	                                 ADS passed on, SDS answered here
//
// The key is made here and given to Envoy over the socket; it is on no disk. Readiness is Envoy's own: it is ready when it
// has its configuration and its certificate. On SIGTERM new connections are turned away first, those that are there get
// time to end, and then Envoy ends.
//
// It must not know what Envoy is configured to do.
package bootstrap
