package enroll

import (
	"net/netip"
	"slices"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// uncaptured lists, when capture has just been switched on, the connections that it did not see, because it
// happens at connection set-up: inbound ones, and outbound ones to addresses that capture would take. Captured
// ones are told by the mark, which capture sets on a client's socket and the inbound leg hands to the server's,
// and the agent's own by their ports. Looking afterwards leaves no gap between look and switch.
func uncaptured(d *netns.Diag, capture func(netip.Addr) bool) ([]netns.TCPSocket, error) {
	ports, err := listening(d)
	if err != nil {
		return nil, err
	}
	open, err := d.List(netns.Carrying)
	if err != nil {
		return nil, err
	}
	var out []netns.TCPSocket
	for i := range open {
		s := &open[i]
		switch {
		case datapath.Captured(s.Mark), agentPort(s.Local.Port()), s.Remote.Port() == datapath.PortHBONE:
		case s.Remote.Addr().IsLoopback(), s.Remote.Addr() == s.Local.Addr(): // within the pod
		case ports[s.Local.Port()], capture != nil && capture(s.Remote.Addr()):
			out = append(out, *s)
		}
	}
	return out, nil
}

// remaining lists those of the sockets that are still open, by their cookies.
func remaining(d *netns.Diag, cookies map[uint64]bool) ([]netns.TCPSocket, error) {
	open, err := d.List(netns.Carrying)
	return slices.DeleteFunc(open, func(s netns.TCPSocket) bool { return !cookies[s.Cookie()] }), err
}

func agentPort(p uint16) bool {
	return p == datapath.PortOutbound || p == datapath.PortInbound || p == datapath.PortHBONE
}
