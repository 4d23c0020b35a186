package hbone

import "sync"

// Workers are goroutines that outlive what they do: their stacks have grown already, which is copied for a new goroutine
// each time. The zero value is ready.
type Workers struct {
	mu     sync.Mutex
	idle   []chan func() // the last has worked last
	closed bool
}

// idleWorkers is how many wait for something to do.
const idleWorkers = 32

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
		f()
		w.mu.Lock()
		if len(w.idle) >= idleWorkers || w.closed {
			w.mu.Unlock()
			return
		}
		w.idle = append(w.idle, next)
		w.mu.Unlock()
	}
}

// Close lets idle goroutines end, and the others when they are done.
func (w *Workers) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	for _, next := range w.idle {
		close(next)
	}
	w.idle = nil
}
