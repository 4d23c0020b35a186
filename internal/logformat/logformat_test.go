package logformat

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestLevelsAreInLowerCaseAndKeysAreIstios(t *testing.T) {
	for _, tc := range []struct {
		json bool
		want []string
	}{
		{false, []string{"level=warn", "msg=hello", "a=1"}},
		{true, []string{`"level":"warn"`, `"message":"hello"`, `"a":1`}},
	} {
		var out bytes.Buffer
		log := slog.New(New(&out, tc.json, slog.LevelInfo))
		log.Debug("not this")
		log.Warn("hello", "a", 1)
		for _, w := range tc.want {
			if !strings.Contains(out.String(), w) {
				t.Errorf("%q lacks %q", out.String(), w)
			}
		}
		if strings.Contains(out.String(), "not this") {
			t.Errorf("a line below the level: %q", out.String())
		}
	}
}
