package proxy

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"time"
)

// accept is the accept loop of all three listeners: it takes connections until the listener is closed and
// serves each in a goroutine of its own, which the Proxy waits for.
func (h *PodHandle) accept(l net.Listener, dir Direction, serve func(*PodHandle, *net.TCPConn)) {
	var wait time.Duration
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || h.accepting.Err() != nil {
				return
			}
			// Out of descriptors or memory: the kernel's queue holds the connection meanwhile.
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			h.p.log.Error("accept failed", "pod", h.Pod().UID, "listener", l.Addr(), "error", err, "retry_in", wait)
			select {
			case <-h.accepting.Done():
				return
			case <-time.After(wait):
			}
			continue
		}
		wait = 0
		tc, ok := c.(*net.TCPConn)
		if !ok {
			c.Close()
			continue
		}
		if err := h.overload(tc); err != nil {
			local, remote := ends(tc)
			abort(tc)
			h.refuse(dir, remote, local, err)
			continue
		}
		h.open.Add(1)
		h.p.wg.Go(func() {
			deepen()
			defer h.open.Add(-1)
			serve(h, tc)
		})
	}
}

// abort closes with a RST, which tells the other side that its connection did not end in order.
func abort(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// keepAlive is what ztunnel has: first probe after 3 min, dead after 9 without an answer.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 180 * time.Second, Interval: 180 * time.Second, Count: 9}

// ends returns the addresses of an accepted connection as everybody else writes them: an IPv4 address that
// an IPv6 socket accepted is an IPv4 address.
func ends(c net.Conn) (local, remote netip.AddrPort) {
	return addrPort(c.LocalAddr()), addrPort(c.RemoteAddr())
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// deepen gives a new goroutine the stack that a connection needs: it would be copied again and again, with more on it
// each time, if it grew as it is used.
//
//go:noinline
func deepen() byte {
	var frame [6 << 10]byte
	return frame[runtime.NumCPU()&1]
}
