package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// modules are the modules of this repository, the root first.
var modules = []string{".", "test/cluster", "test/e2e", "test/conformance"}

func stages() []stage {
	house := stage{name: "house", about: "format, vet, staticcheck, generated files, chart"}
	house.steps = append(house.steps, step{name: "gofmt", run: gofmt})
	for _, m := range modules { // vet before the others: what it compiles, they need
		house.steps = append(house.steps, step{name: "vet " + m, dir: m, run: compile("go", "vet", "./..."), limit: 15 * time.Minute})
	}
	house.steps = append(house.steps,
		step{name: "generated files are current", run: generated, limit: 10 * time.Minute},
		// No test is charged with it: on a machine that has none of it yet it takes ten minutes.
		step{name: "Kubernetes is built", dir: "test/cluster", run: program("go", "run", "./cmd/cluster", "programs"), limit: 25 * time.Minute},
		step{name: "chart", dir: "test/e2e", run: goTest("./chart"), limit: 15 * time.Minute},
		step{name: staticcheck, run: program("go", "tool", "staticcheck", "./..."), limit: 15 * time.Minute},
		step{name: "workflows", run: program("go", "tool", "actionlint")})
	unit := stage{name: "unit", about: "all packages with the race detector", steps: []step{
		{name: raceCompiled, run: compile(compileRace[0], compileRace[1:]...), limit: 15 * time.Minute},
		{name: "root module", run: goTest("-race", "-p", "2", "./..."), limit: 25 * time.Minute},
		{name: "test/e2e/lab", dir: "test/e2e", run: goTest("./lab/...")},
		{name: "peers that must be refused", run: goTest("-count=1", "-run=TestPeersThatMustBeRefused", "./test/interop")},
	}}
	fuzzing := stage{name: "fuzz", about: "every fuzz target for a moment, or for as long as FUZZTIME says", steps: []step{
		{name: "fuzz targets", run: fuzz, limit: fuzzLimit()},
	}}
	e2e := stage{name: "e2e", about: "on a cluster of two nodes", steps: []step{
		{name: "end to end", dir: "test/e2e", run: goTest("-count=1", "-timeout=59m", "."), limit: time.Hour},
		{name: "the demo", dir: "test/e2e", run: demo, limit: 15 * time.Minute},
		{name: "a real istiod", run: goTest("-count=1", "-timeout=39m", "-run=Istiod", "./test/interop", "-istiod=build"), limit: 40 * time.Minute},
		{name: "the cluster itself", dir: "test/cluster", run: goTest("-count=1", "-timeout=11m", "./..."), limit: 12 * time.Minute},
	}}
	return []stage{house, e2e, unit, fuzzing} // e2e waits for much, so that what unit needs can be compiled beside it
}

// beside takes steps that are long and need no quiet out of the stages, and has them run beside those after the first, one after the other,
// with what of the processors these leave. The programs that tests run of others come first: a test that needs one waits for it.
// A last stage says what came of what no stage waits for.
func beside(stages []stage) ([]stage, *aside) {
	a := &aside{}
	last := stage{name: "beside", about: "what ran beside the others"}
	last.steps = append(last.steps, a.add(step{name: "programs of others", dir: "test/e2e", run: quietly(nil, "go", "run", "./cmd/peers")}))
	for i := range stages {
		stages[i].steps = slices.DeleteFunc(stages[i].steps, func(s step) bool { return s.name == staticcheck })
		for j, s := range stages[i].steps {
			if s.name == raceCompiled {
				stages[i].steps[j] = a.add(step{name: s.name, run: quietly(compiling(compileRace), compileRace[0], compileRace[1:]...)})
			}
		}
	}
	last.steps = append(last.steps, a.add(step{name: staticcheck, run: quietly(nil, "go", "tool", "staticcheck", "./...")}))
	return append(stages, last), a
}

// aside are steps that run beside others.
type aside struct{ steps []later }

// later is a step and where its result is put.
type later struct {
	step
	done chan result // of one
}

// add has a step run after those that were added before, and returns the step that waits for it.
func (a *aside) add(s step) step {
	s.limit = time.Hour
	done := make(chan result, 1)
	a.steps = append(a.steps, later{s, done})
	return step{name: s.name, limit: 30 * time.Minute, run: func(ctx context.Context, _ step) result {
		select {
		case r := <-done:
			return r
		case <-ctx.Done():
			return verdict(ctx.Err(), "")
		}
	}}
}

func (a *aside) run(ctx context.Context) {
	for _, s := range a.steps {
		one, cancel := context.WithTimeout(ctx, s.limit)
		s.done <- s.run(one, s.step)
		cancel()
	}
}

const (
	staticcheck  = "staticcheck"
	raceCompiled = "compiled with the race detector"
)

// compileRace compiles what the tests of the root module are made of, and links none of them.
var compileRace = []string{"go", "list", "-race", "-export", "-deps", "-test", "-f={{with .Error}}{{.}}{{end}}", "./..."}

// demo runs make demo's program, on a cluster of its own that goes with it, or on the one that the tests are for.
func demo(ctx context.Context, s step) result {
	args := []string{"run", "./cmd/demo"}
	if on := os.Getenv("WARREN_E2E_KUBECONFIG"); on != "" {
		return program("go", append(args, "-kubeconfig", on)...)(ctx, s)
	}
	own := append(os.Environ(), "WARREN_CLUSTER_DIR=/var/lib/warren-cluster-demo")
	run := command(ctx, s.dir, "go", args...)
	run.Env = own
	out, err := run.CombinedOutput()
	down := command(context.WithoutCancel(ctx), "test/cluster", "go", "run", "./cmd/cluster", "down")
	down.Env = own
	said, ended := down.CombinedOutput()
	return verdict(errors.Join(err, ended), string(out)+string(said))
}

// program is a step that passes when the program exits with 0.
func program(name string, args ...string) func(context.Context, step) result {
	return programIn(nil, name, args...)
}

// compile is a program that compiles and runs no test.
func compile(name string, args ...string) func(context.Context, step) result {
	return programIn(compiling(args), name, args...)
}

// programIn is a program in an environment; nil is this one's.
func programIn(env []string, name string, args ...string) func(context.Context, step) result {
	return func(ctx context.Context, s step) result {
		cmd := command(ctx, s.dir, name, args...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		return verdict(err, string(out))
	}
}

// quietly is a program that takes what of the processors others leave. A nil environment is this one's.
func quietly(env []string, name string, args ...string) func(context.Context, step) result {
	return func(ctx context.Context, s step) result {
		cmd := command(ctx, s.dir, "nice", append([]string{"-n", "19", name}, args...)...)
		cmd.Env = env
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) } // all of the session, which hears no terminal
		err := cmd.Start()
		if err == nil {
			// Linux weighs sessions against each other, and what is nice only within its own (sched(7), autogroup). Where it
			// does not there is no such file.
			_ = os.WriteFile(fmt.Sprintf("/proc/%d/autogroup", cmd.Process.Pid), []byte("19"), 0)
			err = cmd.Wait()
		}
		return verdict(err, out.String())
	}
}

// compiling is an environment to compile in. A compiler that collects less needs a fifth less time.
func compiling(args []string) []string { return append(forGo(args), "GOGC=800") }

// forGo is the environment of a go command: the race detector needs C.
func forGo(args []string) []string {
	env := os.Environ()
	if slices.Contains(args, "-race") {
		env = append(env, "CGO_ENABLED=1")
	}
	return env
}

func verdict(err error, detail string) result {
	if err != nil {
		return result{failed: 1, detail: strings.TrimSpace(detail + "\n" + err.Error())}
	}
	return result{passed: 1}
}

func command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.WaitDelay = 5 * time.Second
	// An interrupt lets tests clean up; WaitDelay ends those that do not.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd
}

// mostAgain is how many failed tests of a step get a second try. More failures than that are no accident.
const mostAgain = 3

// goTest runs go test and counts its tests, subtests not; the house has vetted them. A test that fails runs once more, alone: what passes then is
// counted as passed and told as unsteady, with what it printed when it failed. A data race, a panic, a package that
// does not build or that ran out of time has no second try.
func goTest(args ...string) func(context.Context, step) result {
	return func(ctx context.Context, s step) result {
		r := runTests(ctx, s, args)
		if len(r.broken) > mostAgain || slices.ContainsFunc(r.broken, broken.final) {
			return r
		}
		for _, b := range r.broken {
			if again := runTests(ctx, s, b.alone(args)); again.failed > 0 || again.passed != 1 {
				continue
			}
			r.failed--
			r.passed++
			r.unsteady = append(r.unsteady, b.detail)
		}
		return r
	}
}

// broken is a test that failed, or with no name a package.
type broken struct{ pkg, test, detail string }

// final says that no second try can tell anything else.
func (b broken) final() bool {
	return b.test == "" || strings.Contains(b.detail, "WARNING: DATA RACE") || strings.Contains(b.detail, "panic: ")
}

// alone is the command line that runs this test and no other.
func (b broken) alone(args []string) []string {
	out := []string{"-count=1", "-run=^" + b.test + "$"}
	for _, a := range args {
		switch {
		case strings.HasPrefix(a, "-run="), strings.HasPrefix(a, "-count="):
		case strings.HasPrefix(a, "."): // the packages
			out = append(out, b.pkg)
		default:
			out = append(out, a)
		}
	}
	return out
}

func runTests(ctx context.Context, s step, args []string) result {
	cmd := command(ctx, s.dir, "go", append([]string{"test", "-json", "-vet=off"}, args...)...)
	cmd.Env = forGo(args)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return verdict(err, "")
	}
	if err := cmd.Start(); err != nil {
		return verdict(err, "")
	}
	r := count(bufio.NewReader(out))
	err = cmd.Wait()
	if err != nil && r.failed == 0 {
		r.failed = 1
		r.broken = []broken{{}}
		r.detail += errs.String() + err.Error()
	}
	return r
}

// event is one line of go test -json.
type event struct {
	Action, Package, Test, Output, ImportPath string
	Elapsed                                   float64 // seconds
}

// count reads go test's events. The detail is the output of what failed.
func count(r *bufio.Reader) result {
	var (
		res    result
		output = map[string][]string{}
		failed = map[string]bool{}   // packages with a failed test: their own failure adds nothing
		said   = map[string]string{} // by package, what a failed test and its subtests printed
	)
	dec := json.NewDecoder(r)
	for {
		var e event
		if err := dec.Decode(&e); err != nil {
			break
		}
		key := e.Package + " " + e.Test
		top := e.Test != "" && !strings.Contains(e.Test, "/")
		if top && e.Elapsed >= 10 {
			res.slow = append(res.slow, timed{e.Test, e.Elapsed})
		}
		switch e.Action {
		case "output", "build-output":
			if e.Action == "build-output" {
				key = e.ImportPath + " "
			}
			output[key] = append(output[key], e.Output)
		case "pass":
			if top {
				res.passed++
			}
		case "skip":
			if top {
				res.skipped++
				fmt.Printf("        skipped %s %s\n", e.Package, e.Test)
			}
		case "fail", "build-fail":
			if e.Test == "" && failed[e.Package] {
				continue
			}
			if e.Action == "build-fail" {
				key = e.ImportPath + " "
			}
			printed := fmt.Sprintf("%s %s\n%s", e.Package, e.Test, excerpt(output[key], 40, 80))
			res.detail += printed
			said[e.Package] += printed
			failed[e.Package] = true
			if e.Test == "" || top {
				res.failed++
				fmt.Printf("        failed  %s %s\n", e.Package, e.Test)
				res.broken = append(res.broken, broken{e.Package, e.Test, said[e.Package]})
				delete(said, e.Package)
			}
		}
	}
	return res
}

// excerpt is the beginning, where a test says what failed, and the end, where it says what it found around it.
func excerpt(lines []string, head, tail int) string {
	if len(lines) <= head+tail {
		return strings.Join(lines, "")
	}
	return strings.Join(lines[:head], "") + fmt.Sprintf("    ... %d lines left out ...\n", len(lines)-head-tail) +
		strings.Join(lines[len(lines)-tail:], "")
}

func gofmt(ctx context.Context, _ step) result {
	out, err := command(ctx, "", "gofmt", "-l", ".").CombinedOutput()
	if err == nil && len(bytes.TrimSpace(out)) > 0 {
		err = errors.New("not formatted: run gofmt -w on these")
	}
	return verdict(err, string(out))
}

// generated runs go generate and compares what it wrote with what was there.
func generated(ctx context.Context, _ step) result {
	before, err := hashes()
	if err != nil {
		return verdict(err, "")
	}
	if out, err := command(ctx, "", "go", "generate", "./...").CombinedOutput(); err != nil {
		return verdict(err, string(out))
	}
	after, err := hashes()
	if err != nil {
		return verdict(err, "")
	}
	var changed []string
	for f, h := range after {
		if before[f] != h {
			changed = append(changed, f)
		}
	}
	if len(changed) > 0 {
		slices.Sort(changed)
		return verdict(errors.New("make generate changes these: commit the result"), strings.Join(changed, "\n"))
	}
	return result{passed: 1}
}

// hashes returns the hash of every generated file.
func hashes() (map[string][32]byte, error) {
	out := map[string][32]byte{}
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); n == ".git" || n == "out" || n == "bin" {
				return filepath.SkipDir
			}
			return nil
		}
		if !isGenerated(filepath.ToSlash(p)) {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		out[p] = sha256.Sum256(b)
		return nil
	})
	return out, err
}

func isGenerated(p string) bool {
	return strings.HasSuffix(p, ".pb.go") || strings.HasPrefix(p, "charts/warren/files/crds/") ||
		p == "README.md" || strings.HasPrefix(p, "docs/") && strings.HasSuffix(p, ".md") || // their tables
		strings.HasPrefix(p, "bpf/") && (strings.HasSuffix(p, ".o") || strings.Contains(p, "_bpfel") || strings.Contains(p, "_x86_") || strings.Contains(p, "_arm64_"))
}
