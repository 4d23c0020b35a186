package fetch

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const atOnce = 8

// How soon something is fetched again after a failure.
const (
	retryFirst = 2 * time.Second
	retryMost  = 5 * time.Minute
)

// Source says where something is, and prints as its address.
type Source interface {
	comparable
	fmt.Stringer
}

// Keeper keeps what is wanted: values of type V from where sources of type K say.
type Keeper[K Source, V comparable] struct {
	what  string // in the log
	fetch func(context.Context, K) (V, error)
	every time.Duration
	told  func(from K, v V, problem string)
	log   *slog.Logger

	slots chan struct{}
	mu    sync.Mutex
	ctx   context.Context // of Run
	// wanted end what keeps a value; nil while Run does not run.
	wanted map[K]context.CancelFunc
	work   sync.WaitGroup
}

// NewKeeper returns a Keeper that fetches nothing yet. It fetches anew after a while; with 0 for that, what has been fetched is
// kept for good. Of every success and every first failure of its kind it tells, not at the same time about the same key; the
// value is the last that was fetched, and the zero value where there was none.
func NewKeeper[K Source, V comparable](what string, every time.Duration, fetch func(context.Context, K) (V, error), told func(from K, v V, problem string), log *slog.Logger) *Keeper[K, V] {
	return &Keeper[K, V]{
		what: what, fetch: fetch, every: every, told: told, log: log,
		slots: make(chan struct{}, atOnce), wanted: map[K]context.CancelFunc{},
	}
}

// Want says what is needed from now on.
func (f *Keeper[K, V]) Want(sources []K) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := map[K]bool{}
	for _, s := range sources {
		now[s] = true
		if _, ok := f.wanted[s]; !ok {
			f.wanted[s] = f.begin(s)
		}
	}
	for s, stop := range f.wanted {
		if !now[s] {
			if stop != nil {
				stop()
			}
			delete(f.wanted, s)
		}
	}
}

// begin keeps one value; nil while Run does not run.
func (f *Keeper[K, V]) begin(s K) context.CancelFunc {
	if f.ctx == nil || f.ctx.Err() != nil {
		return nil
	}
	ctx, stop := context.WithCancel(f.ctx)
	f.work.Go(func() { f.run(ctx, s) })
	return stop
}

// Run fetches until ctx ends.
func (f *Keeper[K, V]) Run(ctx context.Context) {
	f.mu.Lock()
	f.ctx = ctx
	for s, stop := range f.wanted {
		if stop == nil {
			f.wanted[s] = f.begin(s)
		}
	}
	f.mu.Unlock()
	<-ctx.Done()
	f.work.Wait()
}

func (f *Keeper[K, V]) run(ctx context.Context, s K) {
	var kept, none V
	problem, told := "", false
	for wait := retryFirst; ; {
		got, err := f.slot(ctx, s)
		if ctx.Err() != nil {
			return
		}
		next := f.every
		if err != nil {
			if text := clip(err.Error()); !told || text != problem {
				problem = text
				f.log.Warn(f.what+" not fetched", "from", s.String(), "error", text, "kept", kept != none)
				f.told(s, kept, problem)
			}
			next, wait = wait, min(2*wait, retryMost)
		} else {
			if !told || got != kept || problem != "" {
				f.told(s, got, "")
			}
			kept, problem, wait = got, "", retryFirst
			if f.every == 0 {
				return
			}
		}
		told = true
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// slot fetches when not too many others do.
func (f *Keeper[K, V]) slot(ctx context.Context, s K) (V, error) {
	select {
	case <-ctx.Done():
		var none V
		return none, ctx.Err()
	case f.slots <- struct{}{}:
	}
	defer func() { <-f.slots }()
	return f.fetch(ctx, s)
}

func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "..."
	}
	return s
}
