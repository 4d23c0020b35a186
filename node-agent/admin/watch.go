package admin

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/warrenmesh/warren/internal/tap"
	"github.com/warrenmesh/warren/node-agent/proxy"
)

// missedEvery is how often a reader is told what it missed, when nothing else happens.
const missedEvery = time.Second

// Watcher is what Config.Watch returns: a proxy's Watcher.
type Watcher interface {
	Events() <-chan tap.Event
	Missed() uint64
	Stop()
}

var _ Watcher = (*proxy.Watcher)(nil)

// watch sends a line of JSON for each connection that begins or ends, until the reader goes or the agent stops. The answer's
// header is sent at once: who has it hears of all that happens from then on.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	f, err := tap.ParseQuery(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	x, err := s.cfg.Watch(f)
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer x.Stop()
	w.Header().Set("Content-Type", "application/x-ndjson")
	out, enc := http.NewResponseController(w), json.NewEncoder(w)
	if out.Flush() != nil {
		return
	}
	t := time.NewTicker(missedEvery)
	defer t.Stop()
	for {
		var e tap.Event
		select {
		case <-r.Context().Done():
			return
		case e = <-x.Events():
		case <-t.C:
			n := x.Missed()
			if n == 0 {
				continue
			}
			e = tap.Event{Time: time.Now(), What: tap.Missed, Count: n}
		}
		if enc.Encode(&e) != nil {
			return
		}
		// What comes in a burst goes in one write.
		if len(x.Events()) == 0 && out.Flush() != nil {
			return
		}
	}
}
