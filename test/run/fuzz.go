package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// fuzzTime is the environment variable that says how long each target is fuzzed, as go test's -fuzztime. With it
// the targets are built for fuzzing and guided by coverage; without it each gets a moment in its plain test
// binary, which takes no second build of everything.
const fuzzTime = "FUZZTIME"

const fuzzMoment = 2 * time.Second

var fuzzTarget = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(\w+ \*testing\.F\)`)

// target is one fuzz target.
type target struct{ dir, name string }

func fuzzTargets() (all []target, err error) {
	err = filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if n := d.Name(); p != "." && (strings.HasPrefix(n, ".") || n == "testdata" || n == "out" || n == "bin") {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, "_test.go") {
			return nil
		}
		src, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		for _, m := range fuzzTarget.FindAllSubmatch(src, -1) {
			all = append(all, target{filepath.Dir(p), string(m[1])})
		}
		return nil
	})
	return all, err
}

// fuzzLimit bounds the whole stage.
func fuzzLimit() time.Duration {
	if os.Getenv(fuzzTime) != "" {
		return 24 * time.Hour
	}
	return 10 * time.Minute
}

// timeWasUp is whether a target failed only because its time ended while an input ran, which go test reports as a
// failure (golang.org/issue/75804). A crash, a hang or a t.Error names an input.
func timeWasUp(out string) bool {
	return strings.Contains(out, "\n    context deadline exceeded\n") && !strings.Contains(out, "Failing input") && !strings.Contains(out, "panic:") &&
		!strings.Contains(out, "fuzzing process")
}

// fuzz fuzzes every target. Each counts as a test; the seed corpora are part of the unit tests.
func fuzz(ctx context.Context, _ step) result {
	all, err := fuzzTargets()
	if err != nil {
		return verdict(err, "")
	}
	tmp, err := os.MkdirTemp("", "warren-fuzz")
	if err != nil {
		return verdict(err, "")
	}
	defer os.RemoveAll(tmp)
	var res result
	built := map[string]string{}
	for _, t := range all {
		start := time.Now()
		args := []string{"go", "test", "-run=^$", "-fuzz=^" + t.name + "$", "-fuzztime=" + os.Getenv(fuzzTime), "-timeout=0", "."}
		if os.Getenv(fuzzTime) == "" {
			bin := built[t.dir]
			if bin == "" {
				bin = filepath.Join(tmp, fmt.Sprint(len(built)))
				built[t.dir] = bin
				if out, err := command(ctx, t.dir, "go", "test", "-c", "-vet=off", "-o", bin, ".").CombinedOutput(); err != nil {
					res.failed++
					res.detail += fmt.Sprintf("%s: %v\n%s", t.dir, err, out)
					continue
				}
			}
			args = []string{bin, "-test.run=^$", "-test.fuzz=^" + t.name + "$", "-test.fuzztime=" + fuzzMoment.String(), "-test.fuzzcachedir=" + filepath.Join(tmp, "cache")}
		}
		out, err := command(ctx, t.dir, args[0], args[1:]...).CombinedOutput()
		if err != nil && !timeWasUp(string(out)) {
			res.failed++
			res.detail += fmt.Sprintf("%s %s: %v\n%s", t.dir, t.name, err, out)
			continue
		}
		res.passed++
		if os.Getenv(fuzzTime) != "" {
			fmt.Printf("        %s %s: nothing found in %v\n", t.dir, t.name, time.Since(start).Round(time.Second))
		}
	}
	return res
}
