// Command run runs the tests of this repository stage by stage and says in the end what passed.
//
//	go run ./test/run            every stage
//	go run ./test/run STAGE...   only these
//
// A stage is a list of steps; a step is a program, or go test, whose verdicts are counted one by one.
// The last line is "N passed, N failed". The exit status is 1 when anything failed.
package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// step is one program of a stage.
type step struct {
	name  string
	dir   string        // below the repository
	limit time.Duration // 0 is five minutes
	run   func(ctx context.Context, s step) result
}

// result is what a step came to. A step that is not a go test counts as one test.
type result struct {
	passed, failed, skipped int
	detail                  string // printed when something failed
	broken                  []broken
	unsteady                []string // what tests printed that failed, and passed alone
	slow                    []timed
}

// timed is a test and what it took.
type timed struct {
	name    string
	seconds float64
}

// slowest names the tests that a stage spends its time with.
func (r result) slowest() string {
	slices.SortFunc(r.slow, func(a, b timed) int { return cmp.Compare(b.seconds, a.seconds) })
	var out []string
	for _, t := range r.slow[:min(10, len(r.slow))] {
		out = append(out, fmt.Sprintf("%s %.0f s", t.name, t.seconds))
	}
	return strings.Join(out, ", ")
}

type stage struct {
	name  string
	about string
	steps []step
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	all := stages()
	want := os.Args[1:]
	for _, w := range want {
		if !slices.ContainsFunc(all, func(s stage) bool { return s.name == w }) {
			fmt.Fprintf(os.Stderr, "no stage is called %q; there are:\n", w)
			for _, s := range all {
				fmt.Fprintf(os.Stderr, "  %-8s %s\n", s.name, s.about)
			}
			os.Exit(2)
		}
	}
	if os.Geteuid() != 0 && (len(want) == 0 || slices.Contains(want, "e2e") || slices.Contains(want, "kernel")) {
		fmt.Fprintln(os.Stderr, "kernel and end-to-end tests need root")
		os.Exit(2)
	}
	var aside *aside
	if len(want) == 0 {
		all, aside = beside(all)
	}
	var total result
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "\nstage\tstep\tpassed\tfailed\tskipped\tseconds")
	for i, s := range all {
		if len(want) > 0 && !slices.Contains(want, s.name) {
			continue
		}
		if i == 1 && aside != nil {
			go aside.run(ctx)
		}
		fmt.Printf("== %s: %s\n", s.name, s.about)
		for _, st := range s.steps {
			limit := st.limit
			if limit == 0 {
				limit = 5 * time.Minute
			}
			one, cancel := context.WithTimeout(ctx, limit)
			start := time.Now()
			r := st.run(one, st)
			cancel()
			took := time.Since(start)
			verdict := "ok"
			if r.failed > 0 {
				verdict = "FAILED"
			}
			fmt.Printf("%-6s  %-32s %4d passed %3d failed %3d skipped  %6.1f s\n", verdict, st.name, r.passed, r.failed, r.skipped, took.Seconds())
			if s := r.slowest(); s != "" {
				fmt.Println("        longest: " + s)
			}
			switch {
			case r.detail != "" && r.failed > 0:
				fmt.Println(indent(r.detail))
			case len(r.unsteady) > 0:
				fmt.Println(indent("failed, and passed when run alone:\n" + strings.Join(r.unsteady, "")))
			}
			fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%.1f\n", s.name, st.name, r.passed, r.failed, r.skipped, took.Seconds())
			total.passed += r.passed
			total.failed += r.failed
			total.skipped += r.skipped
			total.unsteady = append(total.unsteady, r.unsteady...)
			if ctx.Err() != nil {
				fmt.Println("interrupted")
				os.Exit(1)
			}
		}
	}
	t.Flush()
	if total.skipped > 0 {
		fmt.Printf("\n%d skipped\n", total.skipped)
	}
	if n := len(total.unsteady); n > 0 {
		fmt.Printf("\n%d unsteady: failed among the others and passed alone; see above\n", n)
	}
	fmt.Printf("\n%d passed, %d failed\n", total.passed, total.failed)
	if total.failed > 0 {
		os.Exit(1)
	}
}

func indent(s string) string {
	return "        " + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n        ")
}
