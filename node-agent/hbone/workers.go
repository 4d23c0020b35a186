package hbone

import (
	"runtime"
	"sync"
	"time"
)

// Workers are goroutines that outlive what they do: their stacks have grown already, which is copied for a new goroutine
// each time. The zero value is ready.
type Workers struct {
	mu     sync.Mutex
	idle   []chan func() // the last has worked last
	spare  int           // the fewest that were idle since trim was called
	timer  *time.Timer   // of trim; nil while nobody is idle
	closed bool
}

const (
	idleWorkers = 32              // how many wait for something to do
	idleFor     = 5 * time.Second // at least, before they end
)

// Go runs f in a goroutine.
func (w *Workers) Go(f func()) {
	if w == nil {
		go f()
		return
	}
	w.mu.Lock()
	if n := len(w.idle); n > 0 {
		next := w.idle[n-1]
		w.idle = w.idle[:n-1]
		w.spare = min(w.spare, n-1)
		w.mu.Unlock()
		next <- f
		return
	}
	w.mu.Unlock()
	go w.work(f)
}

func (w *Workers) work(f func()) {
	next := make(chan func(), 1)
	for ; f != nil; f = <-next {
		deepen()
		f()
		if !w.wait(next) {
			return
		}
	}
}

// deepen gives a goroutine that is new, or whose stack the garbage collector has made smaller, the stack that a connection
// needs: it would be copied again and again, with more on it each time, if it grew as it is used.
//
//go:noinline
func deepen() byte {
	var frame [6 << 10]byte
	return frame[runtime.NumCPU()&1]
}

// wait enters an idle goroutine, if it may stay.
func (w *Workers) wait(next chan func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || len(w.idle) >= idleWorkers {
		return false
	}
	w.idle = append(w.idle, next)
	if w.timer == nil {
		w.spare = 0
		w.timer = time.AfterFunc(idleFor, w.trim)
	}
	return true
}

// trim ends those that nobody has needed for a while.
func (w *Workers) trim() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.end(w.spare)
	if w.spare = len(w.idle); w.spare == 0 {
		w.timer = nil
	} else {
		w.timer.Reset(idleFor)
	}
}

// end lets go of n that are idle. Called under mu.
func (w *Workers) end(n int) {
	for _, next := range w.idle[:n] {
		close(next)
	}
	w.idle = append(w.idle[:0], w.idle[n:]...)
	clear(w.idle[len(w.idle) : len(w.idle)+n])
}

// Close lets idle goroutines end, and the others when they are done.
func (w *Workers) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.end(len(w.idle))
	w.spare = 0
	if w.timer != nil {
		w.timer.Stop()
	}
}
