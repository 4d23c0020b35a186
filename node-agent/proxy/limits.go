package proxy

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// New work is shed first: when descriptors or memory run out, or somebody begins more handshakes than this node can
// do, new connections are reset, and those that are open go on.

// descriptors returns how many this process may use for connections, and how many it may have open. What is
// between them is for connections that have been taken already, for certificates and for the control plane.
func descriptors() (connections, all int) {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil || lim.Cur > 1<<30 {
		return 1 << 30, 1 << 30
	}
	all = int(lim.Cur)
	return all - min(max(all/8, 64), 4096), all
}

// overload is why a connection that was accepted must not be served, nil if it may. fd is its descriptor: the lowest
// that was free.
func (h *PodHandle) overload(fd int) error {
	p := h.p
	if open := int64(p.cfg.MaxConns); h.open.Load() >= open {
		return fail(Overloaded, "the pod has %d connections", open)
	}
	if p.memory.Full() {
		return fail(Overloaded, "%d MiB wait for applications that do not read, the agent uses %d MiB", p.memory.Held()>>20, p.cfg.Ceiling.Used()>>20)
	}
	if fd >= p.files {
		_, all := descriptors()
		return fail(Overloaded, "of %d file descriptors %d are open", all, fd)
	}
	return nil
}

// maxHandshakes is how many handshakes of peers may be under way at a time; what they cost is some 30 KiB each.
const maxHandshakes = 512

// handshakes are the connections of peers that have not proved who they are. When there are too many, the oldest
// of whoever has most is ended: a peer that takes a few milliseconds for one is never among them.
type handshakes struct {
	mu   sync.Mutex
	n    int
	from map[netip.Addr][]*net.TCPConn // in the order of their beginnings
}

// begin enters a connection. It may be closed at any time until end.
func (t *handshakes) begin(from netip.Addr, c *net.TCPConn) {
	t.mu.Lock()
	t.from[from] = append(t.from[from], c)
	t.n++
	var victim *net.TCPConn
	if t.n > maxHandshakes {
		var most netip.Addr
		for a, conns := range t.from {
			if len(conns) > len(t.from[most]) {
				most = a
			}
		}
		victim = t.from[most][0]
		t.remove(most, 0)
	}
	t.mu.Unlock()
	if victim != nil {
		abort(victim)
	}
}

// end reports whether the connection has not been closed by begin.
func (t *handshakes) end(from netip.Addr, c *net.TCPConn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, x := range t.from[from] {
		if x == c {
			t.remove(from, i)
			return true
		}
	}
	return false
}

func (t *handshakes) remove(from netip.Addr, i int) {
	conns := t.from[from]
	copy(conns[i:], conns[i+1:])
	conns[len(conns)-1] = nil
	if t.from[from] = conns[:len(conns)-1]; len(conns) == 1 {
		delete(t.from, from)
	}
	t.n--
}

// A peer that was cut off for what it did makes no new tunnels for a while: a second, and each time twice as long.
const (
	penaltyFirst = time.Second
	penaltyMost  = 30 * time.Second
	penaltyOver  = 2 * time.Minute // after which all is forgotten
	penaltyMax   = 4096            // peers that are remembered
)

// penalties are by who somebody has proved to be, and where: others at the same address go on.
type penalties struct {
	mu sync.Mutex
	of map[party]penalty
}

type penalty struct {
	until, forgotten time.Time
	next             time.Duration
}

// impose follows a flood.
func (p *penalties) impose(x party, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := p.of[x]
	if q.next == 0 || now.After(q.forgotten) {
		q.next = penaltyFirst
	}
	q.until, q.forgotten = now.Add(q.next), now.Add(q.next+penaltyOver)
	q.next = min(2*q.next, penaltyMost)
	if len(p.of) >= penaltyMax {
		for y, r := range p.of { // whose is over, or else any
			delete(p.of, y)
			if now.Before(r.forgotten) {
				break
			}
		}
	}
	p.of[x] = q
}

// left is for how long a peer makes no new tunnels.
func (p *penalties) left(x party, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.of[x].until.Sub(now)
}

var errManyHandshakes = fmt.Errorf("more than %d handshakes are under way", maxHandshakes)
