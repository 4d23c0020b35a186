package main

import (
	"io"
	"log/slog"

	"github.com/warrenmesh/warren/internal/logformat"
)

// loggers makes the agent's log and the access log, which tells itself apart by target=access, as ztunnel's does.
func loggers(w io.Writer, asJSON bool, level slog.Leveler) (log, access *slog.Logger) {
	h := logformat.New(w, asJSON, level)
	target := "target"
	if asJSON {
		target = "scope"
	}
	return slog.New(h), slog.New(h).With(target, "access")
}
