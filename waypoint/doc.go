// Package waypoint writes Envoy's configuration: what a waypoint serves, as a pure function of the Snapshot.
//
//	         15008, mTLS, CONNECT VIP:port            per address and port            one per endpoint
//	client ───────► connect_terminate ──► main_internal ───────► routes ──► cluster ──► connect_originate ──► hbone ──► pod:15008
//	                                      (internal listener)                  └─ raw TCP, endpoints without a tunnel
//
// connect_terminate knows who the client is and what it asked for; both travel on as filter state. main_internal picks the
// chain of that address and port; there is none for what is not bound to this waypoint, and such a connection is closed.
// Routes are resources of their own (RDS), so that a change reaches the next request of connections that are open.
//
// It knows the Snapshot and Envoy's messages. It must not know Kubernetes or who is connected.
package waypoint
