package proxy

import (
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// Direction is the side of a connection that this node reports.
type Direction uint8

const (
	Outbound Direction = iota // reporter="source"
	Inbound                   // reporter="destination"
)

// String returns the word of the access log.
func (d Direction) String() string {
	if d == Outbound {
		return "outbound"
	}
	return "inbound"
}

// conn is one connection from registration to its log line. Fields above mu are written before register.
type conn struct {
	dir   Direction
	pod   *PodHandle
	start time.Time
	auth  mesh.Conn        // what Authorize decides on; zero for outbound
	bytes hbone.RelayStats // client to server, server to client
	via   atomic.Pointer[tunnel]
	by    atomic.Uint64 // revision of the state that authorize decided by; 0 before that
	// For the log; set before its report ends.
	noted    mesh.Verdict    // Audit and DryRun of its authorization
	excepted mesh.PolicyName // the policy that let it in for its address alone

	mu      sync.Mutex
	info    ConnInfo // for listings
	reset   func()   // closes the sockets hard; nil until there are any
	ended   bool     // end was called
	outcome Outcome  // why, when ended
	why     string
}

// ConnInfo is an open connection as the admin endpoint lists it.
type ConnInfo struct {
	Direction   Direction
	Pod         string // uid of the local workload
	Src         netip.AddrPort
	OriginalDst netip.AddrPort // what the application addressed
	ActualDst   netip.AddrPort // what the agent connected to
	Protocol    string         // "HBONE" or "TCP"
	Peer        mesh.Identity
	Since       time.Time
}

func (c *conn) begin(i ConnInfo) {
	c.start = time.Now()
	i.Since = c.start
	c.info = i
}

// onEnd says how to close the connection's sockets hard. When it was ended already, that happens now.
func (c *conn) onEnd(reset func()) {
	c.mu.Lock()
	ended := c.ended
	c.reset = reset
	c.mu.Unlock()
	if ended {
		reset()
	}
}

// end resets the connection with a stated reason. The first call counts.
func (c *conn) end(o Outcome, why string) {
	c.mu.Lock()
	if c.ended {
		c.mu.Unlock()
		return
	}
	c.ended, c.outcome, c.why = true, o, why
	reset := c.reset
	c.mu.Unlock()
	if reset != nil {
		reset()
	}
}

// endedBy returns the failure that end left, if it was called.
func (c *conn) endedBy() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		return nil
	}
	return fail(c.outcome, "%s", c.why)
}

// authorize decides about an inbound connection, which is registered.
func (c *conn) authorize(s *mesh.Snapshot) mesh.Verdict {
	c.by.Store(s.Revision())
	return s.Authorize(c.auth)
}

func (c *conn) setInfo(f func(*ConnInfo)) {
	c.mu.Lock()
	f(&c.info)
	c.mu.Unlock()
}

// connTable holds the open connections of all pods. A connection is in the table before it is authorized,
// so that a policy that arrives between the two is not missed: it is either seen by Authorize or by reevaluate.
type connTable struct {
	mu    sync.Mutex
	conns map[*conn]struct{}
	empty *sync.Cond
}

func newConnTable() *connTable {
	t := &connTable{conns: map[*conn]struct{}{}}
	t.empty = sync.NewCond(&t.mu)
	return t
}

func (t *connTable) register(c *conn) {
	t.mu.Lock()
	t.conns[c] = struct{}{}
	t.mu.Unlock()
}

func (t *connTable) release(c *conn) {
	t.mu.Lock()
	delete(t.conns, c)
	if len(t.conns) == 0 {
		t.empty.Broadcast()
	}
	t.mu.Unlock()
}

// list returns the connections that match.
func (t *connTable) list(match func(*conn) bool) []*conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*conn
	for c := range t.conns {
		if match(c) {
			out = append(out, c)
		}
	}
	return out
}

func (t *connTable) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.conns)
}

// endAll resets the connections that match.
func (t *connTable) endAll(match func(*conn) bool, o Outcome, why string) {
	var all []ending
	for _, c := range t.list(match) {
		all = append(all, ending{c, o, why})
	}
	endEach(all)
}

// drained waits until no connection is left or done is closed; it reports whether none is left.
func (t *connTable) drained(done <-chan struct{}) bool {
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-done:
			t.mu.Lock()
			t.empty.Broadcast()
			t.mu.Unlock()
		case <-stop:
		}
	}()
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.conns) > 0 {
		select {
		case <-done:
			return false
		default:
		}
		t.empty.Wait()
	}
	return true
}

// denial puts a verdict into words.
func denial(v mesh.Verdict) string {
	if v.By != (mesh.PolicyName{}) {
		return string(v.Why) + " by policy " + v.By.String()
	}
	return string(v.Why)
}
