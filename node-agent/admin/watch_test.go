package admin

import (
	"bufio"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/warrenmesh/warren/internal/tap"
)

type watcher struct {
	events  chan tap.Event
	missed  atomic.Uint64
	stopped chan struct{}
}

func (w *watcher) Events() <-chan tap.Event { return w.events }
func (w *watcher) Missed() uint64           { return w.missed.Swap(0) }
func (w *watcher) Stop()                    { close(w.stopped) }

func TestWatchSendsLines(t *testing.T) {
	w := &watcher{events: make(chan tap.Event, 10), stopped: make(chan struct{})}
	var asked tap.Filter
	admin, _, _ := serve(t, Config{Watch: func(f tap.Filter) (Watcher, error) { asked = f; return w, nil }})
	resp, err := http.Get(admin + "/connections/watch?to=shop/catalog:80&verdict=denied")
	if err != nil {
		t.Fatal(err)
	}
	if asked.To.String() != "shop/catalog:80" || asked.Verdict != "denied" {
		t.Errorf("asked for %+v", asked)
	}
	lines := bufio.NewScanner(resp.Body)
	next := func() (e tap.Event) {
		if !lines.Scan() {
			t.Fatal("no line: ", lines.Err())
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatalf("%v: %s", err, lines.Bytes())
		}
		return e
	}
	w.events <- tap.Event{What: tap.Open, ID: 7}
	w.events <- tap.Event{What: tap.Close, ID: 7}
	if a, b := next(), next(); a.What != tap.Open || b.What != tap.Close || b.ID != 7 {
		t.Errorf("%+v, %+v", a, b)
	}
	// What was left out is said though nothing else happens.
	w.missed.Store(5)
	if e := next(); e.What != tap.Missed || e.Count != 5 {
		t.Errorf("%+v", e)
	}
	resp.Body.Close()
	<-w.stopped
}

func TestWatchRefuses(t *testing.T) {
	admin, _, _ := serve(t, Config{Watch: func(tap.Filter) (Watcher, error) { return nil, errors.New("too many") }})
	for query, want := range map[string]struct {
		code int
		says string
	}{"?verdict=no": {400, "allowed, denied"}, "?pod=x": {400, "none of of"}, "": {503, "too many"}} {
		if code, body := get(t, "GET", admin+"/connections/watch"+query); code != want.code || !strings.Contains(body, want.says) {
			t.Errorf("%s: %d %s", query, code, body)
		}
	}
}
