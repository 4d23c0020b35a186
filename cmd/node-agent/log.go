package main

import (
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/logformat"
)

// loggers makes the agent's log and the access log, which tells itself apart by target=access, as ztunnel's does. The
// lines of the access log are written together: at thousands of connections a second, a write for each, and whoever
// reads the log woken by each, would cost more than the connections do. flush writes what is left of them.
func loggers(w io.Writer, asJSON bool, level slog.Leveler) (log, access *slog.Logger, flush func()) {
	target := "target"
	if asJSON {
		target = "scope"
	}
	b := &batch{w: w}
	return slog.New(logformat.New(writer(b.now), asJSON, level)), slog.New(logformat.New(writer(b.soon), asJSON, level)).With(target, "access"), b.flush
}

const (
	batchEvery = 100 * time.Millisecond
	batchSize  = 64 << 10
)

// batch keeps lines until there are many, or the first of them has waited for long enough.
type batch struct {
	w io.Writer

	mu      sync.Mutex
	lines   []byte
	pending *time.Timer // nil without lines
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

func (b *batch) soon(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, p...)
	if len(b.lines) >= batchSize {
		return len(p), b.write()
	}
	if b.pending == nil {
		b.pending = time.AfterFunc(batchEvery, b.flush)
	}
	return len(p), nil
}

// now writes a line at once, after those that came before it.
func (b *batch) now(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, p...)
	return len(p), b.write()
}

func (b *batch) flush() {
	b.mu.Lock()
	defer b.mu.Unlock()
	_ = b.write() // nobody could be told
}

func (b *batch) write() error {
	if b.pending != nil {
		b.pending.Stop()
		b.pending = nil
	}
	if len(b.lines) == 0 {
		return nil
	}
	_, err := b.w.Write(b.lines)
	b.lines = b.lines[:0]
	return err
}
