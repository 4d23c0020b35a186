package hbone

import (
	"runtime"
	"sync"
	"testing"
	"time"
)

// Whatever is given to Workers runs, at once and beside the rest, and no goroutine is left when they are closed.
func TestWorkers(t *testing.T) {
	before := runtime.NumGoroutine()
	var w Workers
	for range 20 {
		const n = 3 * idleWorkers
		var all, met sync.WaitGroup
		all.Add(n)
		met.Add(n)
		for range n {
			w.Go(func() {
				defer all.Done()
				met.Done()
				met.Wait() // for all others, so that none waits for another's goroutine
			})
		}
		all.Wait()
	}
	eventually(t, "some wait for more", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.idle) == idleWorkers
	})
	w.trim() // which notes how many there are
	run := make(chan struct{})
	w.Go(func() { close(run) })
	<-run
	w.trim()
	w.mu.Lock()
	if left := len(w.idle); left > 1 {
		t.Errorf("%d are idle after a time in which one had something to do", left)
	}
	w.mu.Unlock()
	w.Close()
	done := make(chan struct{})
	w.Go(func() { close(done) }) // late, but not lost
	<-done
	eventually(t, "they have ended", func() bool { return runtime.NumGoroutine() <= before })
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}
