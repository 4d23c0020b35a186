package hbone

import (
	"sync"
	"sync/atomic"
)

// Memory bounds what the connections that share it hold, all together, of bytes that their applications do not
// take. As it fills up, connections that hold much shrink their streams' windows; then no new streams are taken;
// when it is full, the stream that holds most is reset. The others go on.
type Memory struct {
	// Short tells of another reason why new work is to be refused; nil: there is none. It is set before the first
	// connection.
	Short func() bool

	limit     int64
	held      atomic.Int64
	relieving atomic.Bool

	mu    sync.Mutex
	conns map[*conn]struct{}
}

const DefaultMemory = 256 << 20

// NewMemory returns one of so many bytes, 0 for DefaultMemory.
func NewMemory(limit int64) *Memory {
	if limit == 0 {
		limit = DefaultMemory
	}
	return &Memory{limit: limit, conns: map[*conn]struct{}{}}
}

// Held is how many bytes are waiting for applications.
func (m *Memory) Held() int64 { return m.held.Load() }

// Full reports that new work is to be refused: seven eighths are used, or Short says so.
func (m *Memory) Full() bool { return m.held.Load() > m.limit-m.limit/8 || m.Short != nil && m.Short() }

func (m *Memory) join(c *conn) {
	m.mu.Lock()
	m.conns[c] = struct{}{}
	m.mu.Unlock()
}

func (m *Memory) leave(c *conn) {
	m.mu.Lock()
	delete(m.conns, c)
	m.mu.Unlock()
}

// add is called under some conn.mu.
func (m *Memory) add(n int) {
	if m.held.Add(int64(n)) > m.limit && n > 0 && m.relieving.CompareAndSwap(false, true) {
		go m.relieve()
	}
}

// relieve resets streams, those that hold most first, until there is room.
func (m *Memory) relieve() {
	defer m.relieving.Store(false)
	for m.held.Load() > m.limit {
		m.mu.Lock()
		var hog *conn
		most := 0
		for c := range m.conns {
			c.mu.Lock()
			if c.buffered > most {
				hog, most = c, c.buffered
			}
			c.mu.Unlock()
		}
		m.mu.Unlock()
		if hog == nil || !hog.resetLargest() {
			return
		}
	}
}

// resetLargest resets the stream that holds most; it reports whether there was one.
func (c *conn) resetLargest() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	var hog *Stream
	for _, st := range c.streams {
		if st.q.n > 0 && (hog == nil || st.q.n > hog.q.n) {
			hog = st
		}
	}
	if hog == nil {
		return false
	}
	hog.resetLocked(CodeEnhanceYourCalm)
	hog.dropQueue()
	c.flush(false)
	return true
}
