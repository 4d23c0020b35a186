package main

import (
	"io"
	"log/slog"
	"strings"
)

// loggers makes the agent's log and the access log, which tells itself apart by target=access. Levels and keys
// are written as ztunnel writes them.
func loggers(w io.Writer, asJSON bool, level slog.Leveler) (log, access *slog.Logger) {
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
	var h slog.Handler = slog.NewTextHandler(w, opts)
	target := "target"
	if asJSON {
		h = slog.NewJSONHandler(w, opts)
		target = "scope"
	}
	return slog.New(h), slog.New(h).With(target, "access")
}
