// Package environ reads settings from environment variables and collects what is wrong with them, so that a program
// that does not start says everything at once.
package environ

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"
)

// A Reader reads variables. One that is empty is one that is not set. The zero Reader reads the environment of the
// process.
type Reader struct {
	// Get stands in for os.Getenv in tests.
	Get  func(name string) string
	errs []error
}

// Err tells what was wrong with the variables read so far.
func (r *Reader) Err() error { return errors.Join(r.errs...) }

// Wrong notes that a variable's value cannot be used, and what could.
func (r *Reader) Wrong(name, value, use string) {
	r.errs = append(r.errs, fmt.Errorf("%s=%q: %s", name, value, use))
}

// Text returns the first of the variables that is set, or "".
func (r *Reader) Text(names ...string) string {
	for _, n := range names {
		if v := r.get(n); v != "" {
			return v
		}
	}
	return ""
}

// TextOr returns otherwise for a variable that is not set.
func (r *Reader) TextOr(name, otherwise string) string {
	if v := r.get(name); v != "" {
		return v
	}
	return otherwise
}

// List splits at commas and drops what is empty.
func (r *Reader) List(name string) []string {
	var out []string
	for _, v := range strings.Split(r.get(name), ",") {
		if v = strings.TrimSpace(v); v != "" {
			out = append(out, v)
		}
	}
	return out
}

// Duration is 0 for a variable that is not set, and never negative.
func (r *Reader) Duration(name string) time.Duration {
	v := r.get(name)
	if v == "" {
		return 0
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 {
		r.Wrong(name, v, "use a duration such as 30s")
		return 0
	}
	return d
}

// Number is never negative.
func (r *Reader) Number(name string, otherwise int) int {
	v := r.get(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 {
		r.Wrong(name, v, "use a number")
		return otherwise
	}
	return n
}

// Bool returns otherwise for a variable that is not set.
func (r *Reader) Bool(name string, otherwise bool) bool {
	v := r.get(name)
	if v == "" {
		return otherwise
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		r.Wrong(name, v, "use true or false")
		return otherwise
	}
	return b
}

// Level leaves l alone when the variable is not set, and tells whether it is.
func (r *Reader) Level(name string, l *slog.LevelVar) bool {
	v := r.get(name)
	if v != "" && l.UnmarshalText([]byte(v)) != nil {
		r.Wrong(name, v, "use debug, info, warn or error")
	}
	return v != ""
}

func (r *Reader) get(name string) string {
	if r.Get == nil {
		return os.Getenv(name)
	}
	return r.Get(name)
}
