// Package results keeps what the suites measured: rows in the JSON files beside this source, one file a suite,
// committed. Tests write them, the tables in the documents are generated from them (package tables below), and
// nobody types a figure. It knows no suite.
package results

//go:generate go run ./tables

import (
	"bytes"
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
)

// Row is one figure of a suite.
type Row struct {
	Name     string  `json:"name"`
	Inputs   int     `json:"inputs"`   // how much was tried
	Failures int     `json:"failures"` // how much of that did not do what it has to
	Figure   float64 `json:"figure"`
	Unit     string  `json:"unit"`
	Commit   string  `json:"commit"`
}

// Summed is the unit of a row that has its suite's name and adds up the suite's other rows.
const Summed = "rows with failures"

// Recording is the environment variable without which Record writes nothing: a test that somebody runs by hand
// at a small size must not replace what a long run has measured.
const Recording = "WARREN_RECORD"

// Record replaces, in results/<suite>.json, the rows of the same names. The first row of a suite has the suite's
// name: its one headline where it records one itself, or the sum of the others.
func Record(suite string, rows ...Row) error {
	if os.Getenv(Recording) == "" {
		return nil
	}
	root, err := Root()
	if err != nil {
		return err
	}
	commit := "unknown"
	if out, err := exec.Command("git", "-C", root, "rev-parse", "--short", "HEAD").Output(); err == nil {
		commit = string(bytes.TrimSpace(out))
	}
	for i := range rows {
		rows[i].Commit = commit
	}
	return update(filepath.Join(root, "results", suite+".json"), rows)
}

// update is Record on a file; test processes that write to one take turns.
func update(file string, rows []Row) error {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", file, err)
	}
	all, err := Read(file)
	if err != nil {
		return err
	}
	for _, r := range rows {
		if i := slices.IndexFunc(all, func(have Row) bool { return have.Name == r.Name }); i >= 0 {
			all[i] = r
		} else {
			all = append(all, r)
		}
	}
	all = headed(strings.TrimSuffix(filepath.Base(file), ".json"), all)
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(all); err != nil {
		return err
	}
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err = f.WriteAt(out.Bytes(), 0)
	return err
}

// headed puts the row that is called as the suite first.
func headed(suite string, rows []Row) []Row {
	sum := Row{Name: suite, Unit: Summed}
	rest := make([]Row, 0, len(rows)+1)
	for _, r := range rows {
		if r.Name == suite {
			if r.Unit != Summed {
				sum = r
			}
			continue
		}
		rest = append(rest, r)
	}
	if sum.Unit == Summed {
		commits := map[string]bool{}
		for _, r := range rest {
			sum.Inputs += r.Inputs
			sum.Failures += r.Failures
			if r.Failures > 0 {
				sum.Figure++
			}
			commits[r.Commit] = true
			sum.Commit = r.Commit
		}
		if len(commits) > 1 {
			sum.Commit = "several"
		}
	}
	return slices.Insert(rest, 0, sum)
}

// Read returns the rows of a file; none where it is not there or empty.
func Read(file string) ([]Row, error) {
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || len(bytes.TrimSpace(text)) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var rows []Row
	if err := json.Unmarshal(text, &rows); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return rows, nil
}

// Root finds the repository above the working directory.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "results", "results.go")); err == nil {
			return d, nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("no repository above %s", dir)
		}
	}
}
