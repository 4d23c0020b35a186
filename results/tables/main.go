// Command tables fills the tables of README.md and docs/*.md from the files in results/. A table stands between
//
//	<!-- results
//	SUITE: ROW
//	SUITE
//	SUITE = WORDS
//	-->
//	<!-- /results -->
//
// Each line of the comment makes rows: one row of a suite, all of them, or under WORDS the one that adds them up.
// What stands between the comments is replaced. A suite or row that is not there is an error.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/warrenmesh/warren/results"
)

const (
	opening = "<!-- results\n"
	closing = "<!-- /results -->"
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "tables:", err)
		os.Exit(1)
	}
}

func run() error {
	root, err := results.Root()
	if err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		return err
	}
	rows := func(suite string) ([]results.Row, error) {
		all, err := results.Read(filepath.Join(root, "results", suite+".json"))
		if err == nil && len(all) == 0 {
			err = fmt.Errorf("results/%s.json has no rows", suite)
		}
		return all, err
	}
	for _, file := range append(files, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		filled, err := fill(string(text), rows)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if filled != string(text) {
			if err := os.WriteFile(file, []byte(filled), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// fill replaces the tables of one document.
func fill(text string, rows func(suite string) ([]results.Row, error)) (string, error) {
	var out strings.Builder
	for {
		before, after, found := strings.Cut(text, opening)
		out.WriteString(before)
		if !found {
			return out.String(), nil
		}
		request, after, ok := strings.Cut(after, "-->\n")
		if !ok {
			return "", errors.New("the comment of a table does not end")
		}
		_, rest, ok := strings.Cut(after, closing)
		if !ok {
			return "", fmt.Errorf("the table after %q does not end with %s", strings.TrimSpace(request), closing)
		}
		t, err := table(request, rows)
		if err != nil {
			return "", err
		}
		out.WriteString(opening + request + "-->\n" + t + closing)
		text = rest
	}
}

// table makes the table that a comment asks for. Columns in which nothing stands are left out.
func table(request string, read func(string) ([]results.Row, error)) (string, error) {
	var all []results.Row
	for line := range strings.Lines(request) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		suite, words, sum := strings.Cut(line, " = ")
		name := ""
		if !sum {
			suite, name, _ = strings.Cut(line, ": ")
		}
		rows, err := read(suite)
		if err != nil {
			return "", err
		}
		switch {
		case sum:
			r, err := row(suite, rows, suite)
			if err != nil {
				return "", err
			}
			r.Name, r.Figure = words, math.NaN()
			all = append(all, r)
		case name == "":
			all = append(all, slices.DeleteFunc(rows, func(r results.Row) bool { return r.Unit == results.Summed })...)
		default:
			r, err := row(suite, rows, name)
			if err != nil {
				return "", err
			}
			all = append(all, r)
		}
	}
	var b bytes.Buffer
	b.WriteString("| What | Tried | Failed | Measured | At commit |\n|---|---|---|---|---|\n")
	for _, r := range all {
		fmt.Fprintf(&b, "| %s | %d | %d | %s | %s |\n", strings.ReplaceAll(r.Name, "|", `\|`), r.Inputs, r.Failures, measured(r), r.Commit)
	}
	return b.String(), nil
}

// row is the row of that name.
func row(suite string, rows []results.Row, name string) (results.Row, error) {
	i := slices.IndexFunc(rows, func(r results.Row) bool { return r.Name == name })
	if i < 0 {
		return results.Row{}, fmt.Errorf("results/%s.json has no row %q", suite, name)
	}
	return rows[i], nil
}

// measured is a figure with three digits that count, and its unit.
func measured(r results.Row) string {
	if math.IsNaN(r.Figure) || r.Unit == "" {
		return ""
	}
	f := r.Figure
	if a := math.Abs(f); a >= 100 || f == math.Trunc(f) {
		f = math.Round(f)
	} else if a > 0 {
		scale := math.Pow(10, 2-math.Floor(math.Log10(a)))
		f = math.Round(f*scale) / scale
	}
	return strconv.FormatFloat(f, 'f', -1, 64) + " " + r.Unit
}
