package mesh

import (
	"sync"
	"sync/atomic"
)

// Store holds the current Snapshot of a process: one writer, any number of readers.
type Store struct {
	current atomic.Pointer[Snapshot]

	mu       sync.Mutex
	watchers map[<-chan struct{}]chan struct{}
}

// Load returns the current Snapshot. It is never nil: before the first Swap it is the empty one of revision 0.
// A decision loads once.
func (s *Store) Load() *Snapshot {
	if now := s.current.Load(); now != nil {
		return now
	}
	return empty
}

// Swap makes next the current Snapshot and wakes the watchers.
func (s *Store) Swap(next *Snapshot) {
	s.current.Store(next)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.watchers {
		select {
		case w <- struct{}{}:
		default: // it has not looked since the last one
		}
	}
}

// Watch returns a channel that receives after a Swap. Several Swaps may be one receive: load, then act.
// Call it once and keep the channel; Unwatch gives it up.
func (s *Store) Watch() <-chan struct{} {
	w := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watchers == nil {
		s.watchers = make(map[<-chan struct{}]chan struct{})
	}
	s.watchers[w] = w
	return w
}

// Unwatch ends what Watch began.
func (s *Store) Unwatch(w <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watchers, w)
}
