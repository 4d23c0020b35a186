package proxy

import (
	"context"
	"sync"
)

// progress is a revision that only grows, and those who wait for it. The zero value is at revision 0.
type progress struct {
	mu    sync.Mutex
	at    uint64
	moved chan struct{} // closed and replaced when at grows; nil while nobody waits
}

func (p *progress) reach(revision uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if revision <= p.at {
		return
	}
	p.at = revision
	if p.moved != nil {
		close(p.moved)
		p.moved = nil
	}
}

// await returns when the revision has been reached.
func (p *progress) await(ctx context.Context, revision uint64) error {
	for {
		p.mu.Lock()
		if p.at >= revision {
			p.mu.Unlock()
			return nil
		}
		if p.moved == nil {
			p.moved = make(chan struct{})
		}
		moved := p.moved
		p.mu.Unlock()
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
