package proxy

import (
	"errors"
	"fmt"
)

// Outcome is how a connection ended: a stable word for the log, the counter warren_connections_total and,
// through Flag, the label response_flags. The zero Outcome is an orderly end.
type Outcome uint8

const (
	Completed           Outcome = iota
	Reset                       // either application reset an established connection
	Drained                     // the agent ended it: pod deleted or agent stopped
	SourceUnknown               // the pod is not (yet) in the mesh state, so nothing can be decided for it
	RouteRefused                // no way to the destination: no endpoint, no waypoint, no listener to reach directly
	PolicyDenied                // by this node's policy, or by the peer's (401)
	PolicyRevoked               // an open connection that a policy change no longer allows
	IdentityUnavailable         // no certificate for the pod
	TLSFailed                   // handshake with the peer failed: chain, trust domain, identity, protocol or timeout
	TunnelFailed                // HTTP/2 with the peer failed
	PeerUnreachable             // TCP to the peer failed
	AppRefused                  // the server application refused or did not answer
	RequestInvalid              // a CONNECT for something that is not an address of the pod (400), here or at the peer
	PeerUntrusted               // an open connection whose peer's certificate has ended, was revoked or lost its root
	Overloaded                  // the node has no room for a new connection
	NotInRegistry               // the mesh does not know the destination, and lets pods reach only what it knows
	outcomes
)

var outcomeNames = [outcomes]string{
	"completed", "reset", "drained", "source_unknown", "route_refused", "policy_denied", "policy_revoked",
	"identity_unavailable", "tls_failed", "tunnel_failed", "peer_unreachable", "app_refused", "request_invalid",
	"peer_untrusted", "overloaded", "not_in_registry",
}

// String returns the word that logs and the outcome counter use.
func (o Outcome) String() string { return outcomeNames[o] }

// flag indexes flagNames, the values of response_flags as Istio's ztunnel has them.
type flag uint8

const (
	flagNone flag = iota
	flagDeny
	flagConnect
	flagTLS
	flagH2
	flagIdentity
	flags
)

var flagNames = [flags]string{"-", "DENY", "CONNECT", "TLS_FAILURE", "H2_HANDSHAKE_FAILURE", "IDENTITY_ERROR"}

func (o Outcome) flag() flag {
	switch o {
	case Completed, Reset, Drained:
		return flagNone
	case PolicyDenied, PolicyRevoked, NotInRegistry:
		return flagDeny
	case TLSFailed, PeerUntrusted:
		return flagTLS
	case TunnelFailed:
		return flagH2
	case IdentityUnavailable:
		return flagIdentity
	default:
		return flagConnect
	}
}

// Flag returns the value of the label response_flags.
func (o Outcome) Flag() string { return flagNames[o.flag()] }

// failure is an error that knows its outcome.
type failure struct {
	outcome Outcome
	err     error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(o Outcome, format string, args ...any) error {
	return &failure{outcome: o, err: fmt.Errorf(format, args...)}
}

// outcomeOf returns the outcome that err carries, or otherwise where it carries none.
func outcomeOf(err error, otherwise Outcome) Outcome {
	var f *failure
	switch {
	case err == nil:
		return Completed
	case errors.As(err, &f):
		return f.outcome
	default:
		return otherwise
	}
}
