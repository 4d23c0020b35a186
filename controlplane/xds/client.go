package xds

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	nodeapi "github.com/warrenmesh/warren/api/node"
)

// holdAddresses is how long addresses wait for the client to ask for policies too: clients subscribe to one type
// after the other, and an address may refer to a policy.
const holdAddresses = 100 * time.Millisecond

// client is one stream. Its watches belong to the stream's goroutine; news is what others tell it.
type client struct {
	node    string // "" where the caller is no node agent: it gets nothing that is for one node
	watches map[string]*watch
	nonce   uint64
	hold    time.Time // until then addresses wait for a subscription to policies

	wake chan struct{} // one token: there is news

	mu   sync.Mutex
	news map[string]*news
}

// news are the names of one type that changed since the stream last looked.
type news struct {
	names map[string]struct{}
	since time.Time
}

// watch is what the client subscribed to of one type, and what it still has to get.
type watch struct {
	wildcard bool
	names    map[string]struct{} // names or aliases

	pending map[string]struct{} // names that may have to be sent
	all     bool                // everything subscribed to has to be sent
	answer  bool                // a response is due even if it is empty: the subscription's first
	since   time.Time           // when the oldest pending change was made

	retained map[string]string   // what a reconnecting client has, name → version; until its first response
	sent     map[string]struct{} // names sent, for types that are scoped to a node

	inflight *response
	rejected map[string]struct{} // names of rejected responses

	settled uint64            // every change of the type up to this revision of the cache holds on the node
	refused map[string]string // resources that the node refuses, and why; the rest of their responses holds
	trouble string            // why a response as a whole does not hold
}

// response is one that the client has not answered.
type response struct {
	nonce   string
	version string
	names   []string
	covers  uint64 // the revision up to which the node has everything of the type once it holds
	since   time.Time
	sentAt  time.Time
}

func newClient(node string) *client {
	return &client{node: node, watches: map[string]*watch{}, wake: make(chan struct{}, 1), news: map[string]*news{}}
}

// mark notes which names changed. It is called with the cache locked.
func (c *client) mark(dirty map[string][]string, now time.Time) {
	c.mu.Lock()
	for kind, names := range dirty {
		n := c.news[kind]
		if n == nil {
			n = &news{names: map[string]struct{}{}, since: now}
			c.news[kind] = n
		}
		for _, name := range names {
			n.names[name] = struct{}{}
		}
	}
	c.mu.Unlock()
	c.poke()
}

func (c *client) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// takeNews moves what changed to the watches.
func (c *client) takeNews() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for kind, n := range c.news {
		w := c.watches[kind]
		if w == nil {
			continue
		}
		if len(w.pending) == 0 && !w.all {
			w.since = n.since
		}
		for name := range n.names {
			w.pending[name] = struct{}{}
		}
		for name := range w.rejected {
			w.pending[name] = struct{}{}
		}
		clear(w.rejected)
	}
	clear(c.news)
}

// subscribe applies the changes of a request to its watch.
func (c *client) subscribe(req *discovery.DeltaDiscoveryRequest) *watch {
	w := c.watches[req.TypeUrl]
	if w == nil {
		w = &watch{
			names: map[string]struct{}{}, pending: map[string]struct{}{}, rejected: map[string]struct{}{},
			retained: req.InitialResourceVersions, sent: map[string]struct{}{}, refused: map[string]string{}, since: time.Now(),
		}
		// A first request without names is a wildcard, whatever is subscribed to later.
		w.wildcard = len(req.ResourceNamesSubscribe) == 0
		w.all, w.answer = true, true
		c.watches[req.TypeUrl] = w
		if req.TypeUrl == TypeAddress {
			c.hold = time.Now().Add(holdAddresses)
			time.AfterFunc(holdAddresses, c.poke)
		}
	}
	for _, n := range req.ResourceNamesSubscribe {
		if n == "*" {
			w.all = w.all || !w.wildcard
			w.wildcard, w.answer = true, true
			continue
		}
		w.names[n] = struct{}{}
		w.pending[n] = struct{}{}
		w.answer = true
	}
	for _, n := range req.ResourceNamesUnsubscribe {
		if n == "*" {
			w.wildcard = false
			continue
		}
		delete(w.names, n)
	}
	return w
}

// wants reports whether the client subscribed to a resource, given its name and aliases.
func (w *watch) wants(r *resource) bool {
	if w.wildcard {
		return true
	}
	if _, ok := w.names[r.name]; ok {
		return true
	}
	return slices.ContainsFunc(r.aliases, func(a string) bool { _, ok := w.names[a]; return ok })
}

// due reports whether there is something to send.
func (w *watch) due() bool { return w.all || w.answer || len(w.pending) > 0 }

// half picks one side of a type's changes.
type half uint8

const (
	puts half = 1 << iota
	removals
	both = puts | removals
)

// plan decides what to send now and takes it off the watches. It is called with the cache read-locked, so that
// the responses of one plan fit together.
func (c *client) plan(cache *Cache) []*discovery.DeltaDiscoveryResponse {
	c.takeNews()
	var out []*discovery.DeltaDiscoveryResponse
	policies, addresses := c.watches[TypeAuthorization], c.watches[TypeAddress]
	for _, kind := range types {
		w := c.watches[kind]
		if w == nil || w.inflight != nil {
			continue
		}
		if !w.due() {
			if w.trouble == "" {
				w.settle(cache.revision)
			}
			continue
		}
		side := both
		switch kind {
		case TypeAuthorization:
			if addresses != nil && (addresses.due() || addresses.inflight != nil) {
				side = puts // the addresses in between may be those that let go of a removed policy
			}
		case TypeAddress:
			if policies == nil && time.Now().Before(c.hold) {
				continue
			}
			if policies != nil && policies.owes(cache.tables[TypeAuthorization]) {
				continue // they may refer to a policy that the client has yet to get
			}
		}
		if res := c.respond(cache, kind, w, side); res != nil {
			out = append(out, res)
		} else if len(w.pending) == 0 && w.trouble == "" {
			w.settle(cache.revision)
		}
	}
	return out
}

// owes reports whether a put is still waiting behind an unanswered response.
func (w *watch) owes(t *table) bool {
	if w.all {
		return true
	}
	for name := range w.pending {
		if r := t.byName[name]; r != nil && w.wants(r) {
			return true
		}
	}
	return false
}

// respond builds the response of one type, nil where it would be empty and none is due.
func (c *client) respond(cache *Cache, kind string, w *watch, side half) *discovery.DeltaDiscoveryResponse {
	t := cache.tables[kind]
	res := &discovery.DeltaDiscoveryResponse{TypeUrl: kind, SystemVersionInfo: strconv.FormatUint(cache.revision, 10)}
	have := map[string]bool{}
	put := func(r *resource) {
		if have[r.name] || (r.node != "" && r.node != c.node) {
			return
		}
		have[r.name] = true
		if w.retained[r.name] == r.version {
			return
		}
		out := &discovery.Resource{Name: r.name, Version: r.version, Resource: r.body}
		if !w.wildcard {
			out.Aliases = r.aliases
		}
		res.Resources = append(res.Resources, out)
		if r.node != "" || !w.wildcard {
			w.sent[r.name] = struct{}{}
		}
	}
	gone := func(name string) {
		_, sent := w.sent[name]
		_, named := w.names[name]
		delete(w.sent, name)
		if sent || named || (w.wildcard && kind != TypeLocalPod) { // what it never had is another node's
			res.RemovedResources = append(res.RemovedResources, name)
		}
	}
	kept := map[string]struct{}{} // removals put off
	if w.all {
		if w.wildcard {
			for _, r := range t.byName {
				put(r)
			}
		}
		for name := range w.retained {
			switch r := t.byName[name]; {
			case r != nil && w.wants(r) && (r.node == "" || r.node == c.node):
				if r.node != "" {
					w.sent[name] = struct{}{}
				}
			case side&removals == 0:
				kept[name] = struct{}{}
			default:
				res.RemovedResources = append(res.RemovedResources, name)
			}
		}
	}
	for name := range w.pending {
		r := t.byName[name]
		if _, ok := w.names[name]; ok {
			for _, a := range t.byAlias[name] {
				put(a)
				r = a
			}
		}
		switch {
		case r != nil && w.wants(r):
			put(r)
		case r != nil:
		case side&removals == 0:
			kept[name] = struct{}{}
		default:
			gone(name)
		}
	}
	w.pending = kept
	if len(res.Resources)+len(res.RemovedResources) == 0 && !w.answer {
		w.all = false
		return nil
	}
	w.all, w.answer, w.retained = false, false, nil
	slices.SortFunc(res.Resources, func(a, b *discovery.Resource) int { return cmp.Compare(a.Name, b.Name) })
	slices.Sort(res.RemovedResources)
	res.RemovedResources = slices.Compact(res.RemovedResources)

	c.nonce++
	res.Nonce = strconv.FormatUint(c.nonce, 10)
	names := slices.Clone(res.RemovedResources)
	for _, r := range res.Resources {
		names = append(names, r.Name)
	}
	w.inflight = &response{nonce: res.Nonce, version: res.SystemVersionInfo, names: names, covers: cache.revision, since: w.since, sentAt: time.Now()}
	if len(kept) > 0 {
		w.inflight.covers = w.settled // what is put off is not in it
	}
	return res
}

// answered takes an ACK or NACK. It returns nil for one that belongs to an older response.
func (w *watch) answered(req *discovery.DeltaDiscoveryRequest) *response {
	r := w.inflight
	if r == nil || r.nonce != req.ResponseNonce {
		return nil
	}
	w.inflight = nil
	for _, n := range r.names {
		delete(w.refused, n)
	}
	bad, message := r.names, clip(req.ErrorDetail.GetMessage())
	named := rejectedIn(req.ErrorDetail, r.names)
	switch {
	case req.ErrorDetail == nil:
		bad, w.trouble = nil, ""
		w.settle(r.covers)
	case len(named) > 0: // the rest of the response holds
		bad, w.trouble = named, ""
		w.settle(r.covers)
	default:
		w.trouble = message
	}
	for _, n := range bad {
		w.rejected[n] = struct{}{}
		if len(named) > 0 {
			w.refused[n] = message
		}
	}
	return r
}

// rejectedIn are the resources that a NACK names, if it comes from an agent that does, out of those that were sent:
// what else it names would be remembered for ever.
func rejectedIn(s *rpcstatus.Status, sent []string) []string {
	for _, d := range s.GetDetails() {
		var t nodeapi.TypeStatus
		if d.MessageIs(&t) && d.UnmarshalTo(&t) == nil {
			have := make(map[string]bool, len(t.Rejected))
			for _, n := range t.Rejected {
				have[n] = true
			}
			var named []string
			for _, n := range sent {
				if have[n] {
					named = append(named, n)
				}
			}
			return named
		}
	}
	return nil
}

// maxNack is how much is taken of what a node says, which goes into the status of policies.
const maxNack = 1000

func clip(s string) string {
	if len(s) > maxNack {
		return strings.ToValidUTF8(s[:maxNack], "") + "…"
	}
	return s
}

func (w *watch) settle(revision uint64) { w.settled = max(w.settled, revision) }

// retry puts rejected names back; it reports whether there were any.
func (w *watch) retry() bool {
	if len(w.rejected) == 0 {
		return false
	}
	for n := range w.rejected {
		w.pending[n] = struct{}{}
	}
	clear(w.rejected)
	return true
}
