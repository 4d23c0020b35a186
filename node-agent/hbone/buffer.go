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

	// readBuffer is what one read from a tunnel takes. It holds the longest frame that must be complete before it
	// is read, and a record.
	readBuffer = 128 << 10

	// muchData is what is sent at once, without a copy, instead of together with what else a loop finds.
	muchData = 8 << 10

	// sealBatch is how much is encrypted before it is sent.
	sealBatch = 128 << 10
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

func (o *outBuffer) free() {
	if cap(o.b) <= outCeiling {
		outPool.Put(o)
	}
}

// span is what is left of received bytes, buf[r:w] of a borrowed buffer: a large one while it is worked on, a
// small one while a little waits for the rest, none while nothing does.
type span struct {
	buf  *[readBuffer]byte
	few  *chunk
	r, w int
}

func (s *span) empty() bool { return s.r == s.w }

// borrow makes sure that there is a large buffer.
func (s *span) borrow() *[readBuffer]byte {
	if s.buf == nil {
		s.buf = readPool.Get().(*[readBuffer]byte)
		if s.few != nil {
			copy(s.buf[s.r:], s.few.buf[:s.w-s.r])
			s.few.free()
			s.few = nil
		}
	}
	return s.buf
}

// compact moves what is left to the front.
func (s *span) compact() {
	if s.r > 0 && s.buf != nil {
		s.w = copy(s.buf[:], s.buf[s.r:s.w])
		s.r = 0
	}
}

// room reports whether n more bytes fit in, if need be after compacting.
func (s *span) room(n int) bool {
	if s.w+n > readBuffer {
		s.compact()
	}
	return s.w+n <= readBuffer
}

// settle gives the large buffer back, if what is left is little.
func (s *span) settle() {
	n := s.w - s.r
	if s.buf == nil || n > smallChunk {
		return
	}
	if n > 0 {
		s.few = newChunk(n)
		copy(s.few.buf, s.buf[s.r:s.w])
	}
	s.r, s.w = 0, n
	readPool.Put(s.buf)
	s.buf = nil
}

func (s *span) drop() {
	s.r, s.w = 0, 0
	s.settle()
	if s.few != nil {
		s.few.free()
		s.few = nil
	}
}

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

// unpop puts a chunk back.
func (q *queue) unpop(c *chunk) {
	c.next = q.head
	if q.head = c; q.tail == nil {
		q.tail = c
	}
	q.n += c.w - c.r
}

func (q *queue) clear() int {
	n := q.n
	for c := q.pop(); c != nil; c = q.pop() {
		c.free()
	}
	return n
}
