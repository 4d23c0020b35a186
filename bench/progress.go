package bench

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// ShowProgress returns a function that shows where a run is: one line that changes where somebody watches, a line
// for every sample elsewhere.
func ShowProgress(out io.Writer, live bool) func(Step) {
	began, what := time.Now(), ""
	return func(s Step) {
		took := time.Since(began)
		if live {
			fmt.Fprint(out, "\r\x1b[K"+s.line(took))
			return
		}
		if s.Took != "" {
			fmt.Fprintf(out, "%6.1f s  %3d/%d  %s: %s\n", took.Seconds(), s.Done, s.Total, what, s.Took)
		} else if s.Done < s.Total {
			fmt.Fprintf(out, "%6.1f s  %3d/%d  %s\n", took.Seconds(), s.Done, s.Total, s.What)
		}
		what = s.What
	}
}

// line is empty when all is done.
func (s Step) line(took time.Duration) string {
	if s.Done >= s.Total {
		return ""
	}
	const width = 24
	full, left := width*s.Done/s.Total, ""
	if s.Done > 3 {
		left = ", " + (took * time.Duration(s.Total-s.Done) / time.Duration(s.Done)).Round(time.Second).String() + " left"
	}
	return fmt.Sprintf("%s%s %3d/%d%s  %s", strings.Repeat("█", full), strings.Repeat("░", width-full), s.Done, s.Total, left, s.What)
}
