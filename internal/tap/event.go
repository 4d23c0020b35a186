// Package tap is what node agents tell of connections while they begin and end: the events, which they send as lines of
// JSON, and the filter that says which ones somebody wants. The agent and the command line share it. It must not know
// how connections are carried, nor how events are sent.
package tap

import (
	"net/netip"
	"time"
)

// What says what has happened.
type What string

const (
	Open   What = "open"   // both ends are connected
	Close  What = "close"  // a connection that was open has ended; Outcome says how
	Failed What = "failed" // a connection was refused before it was open; Outcome says by what
	Missed What = "missed" // there were more events than the reader took: Count of them were not sent
)

// Event is one of them, as one agent sees it. A connection between captured pods of two nodes is told by both.
type Event struct {
	Time time.Time `json:"time"`
	What What      `json:"event"`
	// Node is filled in by who asks several.
	Node string `json:"node,omitempty"`
	// Direction is of the pod that the agent carries it for: outbound is told by the client's node, inbound by the server's.
	Direction string `json:"direction,omitempty"`
	// ID is the same for the two ends of a connection's life, and is never used again by the same agent. 0: it was open before
	// anybody looked, or never.
	ID     uint64 `json:"id,omitempty"`
	Source End    `json:"source"`
	// Destination is the endpoint that was chosen.
	Destination End `json:"destination"`
	// Asked is the address that the client asked for, known to its own node alone; Service is the hostname behind it.
	Asked   netip.AddrPort `json:"asked,omitzero"`
	Service string         `json:"service,omitempty"`
	// Path is tunnel (encrypted, and both ends proven), kernel (within the node, identities asserted) or plaintext.
	Path string `json:"path,omitempty"`

	// Of close and failed.
	Outcome    string `json:"outcome,omitempty"` // the access log's word
	Error      string `json:"error,omitempty"`   // in words; of a policy, its name
	Sent       int64  `json:"bytesSent,omitempty"`
	Received   int64  `json:"bytesReceived,omitempty"` // both as the client sees them
	DurationMS int64  `json:"durationMs,omitempty"`

	Count uint64 `json:"count,omitempty"` // of missed
}

// End is one end of a connection, as far as it is known.
type End struct {
	Addr      netip.AddrPort `json:"address,omitzero"`
	Namespace string         `json:"namespace,omitempty"`
	Pod       string         `json:"pod,omitempty"`
	Workload  string         `json:"workload,omitempty"` // what the pod belongs to, such as a Deployment
	Identity  string         `json:"identity,omitempty"` // SPIFFE
}

// Denied reports whether a policy, that about what pods may reach outside among them, has refused or ended the connection.
func (e *Event) Denied() bool {
	return e.Outcome == "policy_denied" || e.Outcome == "policy_revoked" || e.Outcome == "not_in_registry"
}
