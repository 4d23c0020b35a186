package datapath

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"

	"github.com/warrenmesh/warren/internal/netns"
)

// Listeners are the agent's three sockets in a pod's namespace: TCP (never MPTCP), transparent, dual-stack
// where the namespace has IPv6, non-blocking. net.FileListener makes a net.Listener of each.
type Listeners struct {
	Outbound *os.File // local address of what it accepts: the destination the application asked for
	Inbound  *os.File // local address: the pod's, remote: the plaintext client's
	HBONE    *os.File
}

// Listen makes the three listeners in a pod's namespace.
func Listen(ns *netns.Handle) (Listeners, error) { return Listeners{}, errors.ErrUnsupported }

// ListenTransparent makes one listener.
func ListenTransparent(ns *netns.Handle, port uint16) (*os.File, error) {
	return nil, errors.ErrUnsupported
}

// Close closes all three.
func (l Listeners) Close() error { return errors.ErrUnsupported }

// Dial connects from inside a pod's namespace as the agent: to a peer's tunnel port or, on passthrough, to
// the application's destination.
func (d *Datapath) Dial(ctx context.Context, ns *netns.Handle, dst netip.AddrPort) (*net.TCPConn, error) {
	return nil, errors.ErrUnsupported
}

// DialInbound connects to the application in a pod, dst being the pod's own address, and shows it src as
// the peer. Where src's port cannot be had, because the application itself listens on it, or src.Port() is
// 0, another one is taken. For a client that reached the pod in plaintext, src's port must be 0: its own
// connection to the same dst exists in the same namespace under that very 4-tuple.
func (d *Datapath) DialInbound(ctx context.Context, ns *netns.Handle, src, dst netip.AddrPort) (*net.TCPConn, error) {
	return nil, errors.ErrUnsupported
}
