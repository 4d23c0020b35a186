package cli

import (
	"fmt"
	"io"
)

// progress tells what goes on. On a terminal the line of the moment is written over; elsewhere each new state is a line.
type progress struct {
	out      io.Writer
	terminal bool
	last     string
}

func (a *app) progress() *progress {
	return &progress{out: a.env.Err, terminal: isTerminal(a.env.Err)}
}

// now says what is being waited for. It may be called often.
func (p *progress) now(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	if s == p.last {
		return
	}
	p.last = s
	if p.terminal {
		fmt.Fprintf(p.out, "\r\x1b[K%s", s)
		return
	}
	fmt.Fprintln(p.out, s)
}

// done says what has been reached.
func (p *progress) done(format string, args ...any) {
	p.clear()
	fmt.Fprintf(p.out, format+"\n", args...)
}

// clear takes the line of the moment away: what follows is the result itself.
func (p *progress) clear() {
	if p.terminal && p.last != "" {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
	p.last = ""
}
