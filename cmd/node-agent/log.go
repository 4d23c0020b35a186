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
	direct := slog.New(logformat.New(w, asJSON, level))
	b := &batch{w: w, lost: func(n int) {
		direct.Warn("lines of the access log were left out: whoever reads this log is too slow", "lines", n)
	}}
	return slog.New(logformat.New(writer(b.now), asJSON, level)), slog.New(logformat.New(writer(b.soon), asJSON, level)).With(target, "access"), b.flush
}

const (
	batchEvery = 100 * time.Millisecond
	batchSize  = 64 << 10
	batchMost  = 4 << 20
)

// batch keeps lines until there are many, or the first of them has waited for long enough. Whoever has a line for soon
// never waits for w: a connection does not stand still because a reader of the log does. Beyond batchMost bytes, lines
// are left out and counted.
type batch struct {
	w    io.Writer
	lost func(lines int) // writes to w how many

	out   sync.Mutex // held while w is written to; taken before mu
	spare []byte     // to be the next lines; guarded by out

	mu      sync.Mutex
	lines   []byte
	pending *time.Timer // of flush; nil without lines
	left    int         // lines that were left out
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

func (b *batch) soon(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := len(b.lines)
	if before+len(p) > batchMost {
		b.left++
		return len(p), nil
	}
	b.lines = append(b.lines, p...)
	switch {
	case b.pending == nil:
		b.pending = time.AfterFunc(batchEvery, b.flush)
	case before < batchSize && len(b.lines) >= batchSize:
		b.pending.Reset(0)
	}
	return len(p), nil
}

// now writes a line at once, after those that came before it.
func (b *batch) now(p []byte) (int, error) {
	b.out.Lock()
	defer b.out.Unlock()
	b.mu.Lock()
	b.lines = append(b.lines, p...)
	b.mu.Unlock()
	return len(p), b.write()
}

func (b *batch) flush() {
	b.out.Lock()
	defer b.out.Unlock()
	_ = b.write() // nobody could be told
}

// write is called under out.
func (b *batch) write() error {
	b.mu.Lock()
	lines, left := b.lines, b.left
	b.lines, b.left = b.spare[:0], 0
	if b.pending != nil {
		b.pending.Stop()
		b.pending = nil
	}
	b.mu.Unlock()
	var err error
	if len(lines) > 0 {
		_, err = b.w.Write(lines)
	}
	if left > 0 {
		b.lost(left)
	}
	if b.spare = lines; cap(lines) > 2*batchSize {
		b.spare = nil
	}
	return err
}
