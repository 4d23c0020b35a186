package environ_test

import (
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/environ"
)

func reader(values map[string]string) *environ.Reader {
	return &environ.Reader{Get: func(name string) string { return values[name] }}
}

func TestWhatIsSetIsRead(t *testing.T) {
	r := reader(map[string]string{"A": "x", "L": " a,,b ,", "D": "90s", "N": "7", "B": "false", "V": "warn"})
	var level slog.LevelVar
	if r.Text("none", "A") != "x" || r.TextOr("A", "y") != "x" || !slices.Equal(r.List("L"), []string{"a", "b"}) ||
		r.Duration("D") != 90*time.Second || r.Number("N", 1) != 7 || r.Bool("B", true) || !r.Level("V", &level) || level.Level() != slog.LevelWarn {
		t.Error("a value was not read")
	}
	if r.Text("none") != "" || r.TextOr("none", "y") != "y" || r.List("none") != nil || r.Duration("none") != 0 ||
		r.Number("none", 1) != 1 || !r.Bool("none", true) || r.Level("none", &level) || level.Level() != slog.LevelWarn {
		t.Error("a variable that is not set has a value")
	}
	if err := r.Err(); err != nil {
		t.Error(err)
	}
}

func TestEverythingWrongIsTold(t *testing.T) {
	r := reader(map[string]string{"D": "soon", "E": "-1s", "N": "-1", "B": "perhaps", "V": "loud"})
	r.Duration("D")
	r.Duration("E")
	r.Number("N", 1)
	r.Bool("B", true)
	r.Level("V", new(slog.LevelVar))
	err := r.Err()
	for _, want := range []string{`D="soon"`, `E="-1s"`, `N="-1"`, `B="perhaps"`, `V="loud": use debug`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not tell %s", err, want)
		}
	}
}
