// Package logformat makes the log handler of all of Warren's processes: levels and keys are written as Istio's
// ztunnel and istiod write them, so that one rule of a log collector reads all. It must not know who logs what.
package logformat

import (
	"io"
	"log/slog"
	"strings"
)

// New returns a handler that writes lines of text, or of JSON.
func New(w io.Writer, asJSON bool, level slog.Leveler) slog.Handler {
	opts := &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) > 0 {
			return a
		}
		switch {
		case a.Key == slog.LevelKey:
			a.Value = slog.StringValue(strings.ToLower(a.Value.String()))
		case a.Key == slog.MessageKey && asJSON:
			a.Key = "message"
		}
		return a
	}}
	if asJSON {
		return slog.NewJSONHandler(w, opts)
	}
	return slog.NewTextHandler(w, opts)
}
