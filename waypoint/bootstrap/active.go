package bootstrap

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"

	"github.com/warrenmesh/warren/waypoint"
)

// How often Envoy is read while it does not do yet what it was told.
const (
	readFirst = 50 * time.Millisecond
	readLater = 2 * time.Second
)

// readBack finds out which of the resources that were passed on to Envoy it uses.
type readBack struct {
	get    func(ctx context.Context, path string) (*http.Response, error) // of Envoy's admin endpoint
	passed func(context.Context) error                                    // returns when all workers are where the main thread was
	log    *slog.Logger

	mu      sync.Mutex
	waiting map[string]passed // by key
	active  map[string]string // version by key
	news    chan struct{}     // one token: something was passed on
	changed chan struct{}     // one token: something is active
}

// passed is a resource that Envoy was given.
type passed struct {
	kind, name, version string
	nonce               string // of the response
	taken               bool   // Envoy has acknowledged that
}

// found is what Envoy says that it has.
type found struct {
	version string
	settled bool // a listener of which no other version is about to become active
}

func newReadBack(get func(context.Context, string) (*http.Response, error), all func(context.Context) error, log *slog.Logger) *readBack {
	return &readBack{get: get, passed: all, log: log, waiting: map[string]passed{}, active: map[string]string{}, news: make(chan struct{}, 1), changed: make(chan struct{}, 1)}
}

// note remembers what a response gives and takes.
func (r *readBack) note(res *discovery.DeltaDiscoveryResponse) {
	if !slices.Contains(waypoint.ActiveTypes, res.TypeUrl) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range res.Resources {
		r.waiting[waypoint.ActiveKey(res.TypeUrl, x.Name)] = passed{kind: res.TypeUrl, name: x.Name, version: x.Version, nonce: res.Nonce}
	}
	for _, name := range res.RemovedResources {
		k := waypoint.ActiveKey(res.TypeUrl, name)
		delete(r.waiting, k)
		delete(r.active, k)
	}
	token(r.news)
}

// acknowledged remembers which responses Envoy has taken.
func (r *readBack) acknowledged(req *discovery.DeltaDiscoveryRequest) {
	if req.ResponseNonce == "" || req.ErrorDetail != nil || !slices.Contains(waypoint.ActiveTypes, req.TypeUrl) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, p := range r.waiting {
		if p.kind == req.TypeUrl && p.nonce == req.ResponseNonce {
			p.taken = true
			r.waiting[k] = p
			token(r.news)
		}
	}
}

// is reports whether f, which was read after Envoy had or had not acknowledged p, is p. A listener of which only filter
// chains were exchanged keeps the version that it had (Envoy 1.40): of listeners it counts that Envoy has taken the
// response and that nothing is left of it to come.
func (f found) is(p passed) bool {
	return f.version == p.version || p.taken && f.settled
}

func token(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// report is what to tell a control plane that was told what is in told; nil where it was told nothing yet.
func (r *readBack) report(told map[string]string) (req *discovery.DeltaDiscoveryRequest, now map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	req = &discovery.DeltaDiscoveryRequest{TypeUrl: waypoint.TypeActive, InitialResourceVersions: map[string]string{}}
	if told == nil {
		req.ResourceNamesSubscribe = []string{"*"}
	}
	for k, v := range r.active {
		if told[k] != v {
			req.InitialResourceVersions[k] = v
		}
	}
	for k := range told {
		if _, ok := r.active[k]; !ok {
			req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, k)
		}
	}
	return req, maps.Clone(r.active)
}

// run reads until ctx ends.
func (r *readBack) run(ctx context.Context) {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-r.news:
		}
		for wait := readFirst; r.read(ctx); wait = min(2*wait, readLater) {
			select {
			case <-ctx.Done():
				return
			case <-r.news:
				wait = readFirst
			case <-time.After(wait):
			}
		}
	}
}

// read asks Envoy for what is waited for; more says that not all of it is active.
func (r *readBack) read(ctx context.Context) (more bool) {
	r.mu.Lock()
	want := maps.Clone(r.waiting)
	r.mu.Unlock()
	byKind := map[string][]string{}
	for _, p := range want {
		byKind[p.kind] = append(byKind[p.kind], regexp.QuoteMeta(p.name))
	}
	have := map[string]found{}
	for kind, names := range byKind {
		if err := r.dump(ctx, kind, names, have); err != nil {
			r.log.Debug("Envoy not read", "error", err)
		}
	}
	some := false
	for k, p := range want {
		some = some || have[k].is(p)
	}
	if some {
		if err := r.passed(ctx); err != nil {
			r.log.Debug("Envoy not read", "error", err)
			return true
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, p := range want {
		if r.waiting[k] == p && have[k].is(p) {
			delete(r.waiting, k)
			r.active[k] = p.version
			token(r.changed)
		}
	}
	return len(r.waiting) > 0
}

// dump reads the versions of a type's resources into have.
func (r *readBack) dump(ctx context.Context, kind string, names []string, have map[string]found) error {
	what := map[string]string{resource.ListenerType: "dynamic_listeners", resource.RouteType: "dynamic_route_configs", resource.ExtensionConfigType: "ecds_filters"}[kind]
	q := url.Values{"resource": {what}}
	if len(names) <= 20 { // a request has to fit into Envoy's limit of headers
		q.Set("name_regex", "^("+strings.Join(names, "|")+")$")
	}
	if kind == resource.ExtensionConfigType { // there may be modules in them
		q.Set("mask", "version_info,ecds_filter.name")
	}
	res, err := r.get(ctx, "/config_dump?"+q.Encode())
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("config_dump: %s", res.Status)
	}
	var dump struct {
		Configs []struct {
			Name        string `json:"name"`
			ActiveState *struct {
				Version string `json:"version_info"`
			} `json:"active_state"`
			Warming     *struct{} `json:"warming_state"`
			Version     string    `json:"version_info"`
			RouteConfig struct {
				Name string `json:"name"`
			} `json:"route_config"`
			Extension struct {
				Name string `json:"name"`
			} `json:"ecds_filter"`
		} `json:"configs"`
	}
	if err := json.NewDecoder(res.Body).Decode(&dump); err != nil {
		return fmt.Errorf("config_dump: %w", err)
	}
	for _, c := range dump.Configs {
		switch kind {
		case resource.ListenerType:
			if c.ActiveState != nil {
				have[waypoint.ActiveKey(kind, c.Name)] = found{c.ActiveState.Version, c.Warming == nil}
			}
		case resource.ExtensionConfigType:
			have[waypoint.ActiveKey(kind, c.Extension.Name)] = found{version: c.Version}
		default:
			have[waypoint.ActiveKey(kind, c.RouteConfig.Name)] = found{version: c.Version}
		}
	}
	return nil
}
