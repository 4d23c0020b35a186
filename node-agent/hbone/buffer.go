package hbone

import "sync"

// Buffers are borrowed while data is in flight; an idle stream or connection holds none of them.

const (
	smallChunk  = 2 << 10
	mediumChunk = 16 << 10
	largeChunk  = 64 << 10

	// relayBuffer is what one read from an application's socket takes. The frame header goes in front of
	// the data, so that header and data leave in one write without a copy.
	relayBuffer = frameHeaderLen + largeChunk

	// readBuffer holds the longest frame that must be complete before it is read.
	readBuffer = maxControlFrame + 8<<10
)

var (
	smallPool  = sync.Pool{New: func() any { return &chunk{buf: make([]byte, smallChunk)} }}
	mediumPool = sync.Pool{New: func() any { return &chunk{buf: make([]byte, mediumChunk)} }}
	largePool  = sync.Pool{New: func() any { return &chunk{buf: make([]byte, largeChunk)} }}
	relayPool  = sync.Pool{New: func() any { return new([relayBuffer]byte) }}
	readPool   = sync.Pool{New: func() any { return new([readBuffer]byte) }}
	outPool    = sync.Pool{New: func() any { return new(outBuffer) }}
)

// outBuffer is a buffer of frames to be written; it grows to what is needed.
type outBuffer struct{ b []byte }

// chunk holds received bytes buf[r:w] until the application takes them.
type chunk struct {
	buf  []byte
	r, w int
	next *chunk
}

func newChunk(n int) *chunk {
	switch {
	case n <= smallChunk:
		return smallPool.Get().(*chunk)
	case n <= mediumChunk:
		return mediumPool.Get().(*chunk)
	default:
		return largePool.Get().(*chunk)
	}
}

func (c *chunk) free() {
	c.r, c.w, c.next = 0, 0, nil
	switch len(c.buf) {
	case smallChunk:
		smallPool.Put(c)
	case mediumChunk:
		mediumPool.Put(c)
	default:
		largePool.Put(c)
	}
}

// queue is a stream's received bytes.
type queue struct {
	head, tail *chunk
	n          int
}

// push copies p in, into the last chunk where it fits: many small frames share one.
func (q *queue) push(p []byte) {
	q.n += len(p)
	for len(p) > 0 {
		if q.tail == nil || q.tail.w == len(q.tail.buf) {
			c := newChunk(len(p))
			if q.tail == nil {
				q.head = c
			} else {
				q.tail.next = c
			}
			q.tail = c
		}
		n := copy(q.tail.buf[q.tail.w:], p)
		q.tail.w += n
		p = p[n:]
	}
}

// pop takes the first chunk out, nil when there is none.
func (q *queue) pop() *chunk {
	c := q.head
	if c == nil {
		return nil
	}
	if q.head = c.next; q.head == nil {
		q.tail = nil
	}
	c.next = nil
	q.n -= c.w - c.r
	return c
}

func (q *queue) clear() int {
	n := q.n
	for c := q.pop(); c != nil; c = q.pop() {
		c.free()
	}
	return n
}
