package waypoint

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"maps"
	"net/netip"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Writer writes the configuration of one waypoint for one snapshot after the other. What it writes is a function of the
// snapshot alone: a part is taken from the last time only where everything that it was written from is the same object. It
// is for one goroutine.
type Writer struct {
	self     mesh.ServiceName
	snapshot *mesh.Snapshot // that was last written of
	services map[mesh.ServiceName]*part
	targets  map[target]*reached
	served   []*part // in the main listener
	main     *item
	tunnels  *tunnels
	last     *Resources
	ingress  *ingressPart       // of a gateway
	plugins  map[string]plugged // by the names of their filters

	off     map[string]string // see LeaveOff
	patched Made              // see Patched

	written int // parts of the last Write that were not taken over
}

// LeaveOff has what is written from now on be without some patches and the modules of some plugins, which Envoy refuses: why, by [mesh.Patch.Key].
func (w *Writer) LeaveOff(why map[string]string) {
	*w = Writer{self: w.self, last: w.last, off: maps.Clone(why)}
}

// Self is the waypoint, or the gateway, that is written for.
func (w *Writer) Self() mesh.ServiceName { return w.self }

// Patched are the patches and the plugins that what was written last is made with. It is not to be changed.
func (w *Writer) Patched() Made { return w.patched }

func (w *Writer) builder(s *mesh.Snapshot) *builder {
	b := newBuilder(s, w.self)
	b.off = w.off
	return b
}

// item is a resource, and the hash of it: SHA-256 in hexadecimal, which the library that serves it makes its version.
type item struct {
	name, version string
	message       proto.Message
	near          *nearness // of endpoints; nil: all proxies get the same
}

// part is what a service asks for.
type part struct {
	from       map[mesh.ServiceName]*mesh.Service // what it was written from
	ports      []served
	shape      string // hash of what the main listener needs
	routes     []*item
	extensions []*item
	targets    []target
	plugins    []*mesh.Plugin
	patched    Made
}

// reached is a target.
type reached struct {
	target
	from               map[mesh.ServiceName]*mesh.Service
	name               string
	cluster, endpoints *item                     // endpoints: nil where the cluster has them
	pods               []netip.AddrPort          // that are reached by tunnel
	through            map[mesh.ServiceName]bool // whose endpoints count, too
	secrets            []*item
	patched            Made
}

// collection is all resources of a type.
type collection struct {
	items    []*item
	near     bool // some of them are endpoints that may be near or far
	byName   map[string]types.Resource
	versions map[string]string
}

// NewWriter has written nothing yet.
func NewWriter(self mesh.ServiceName) *Writer { return &Writer{self: self} }

// ByName are the resources of a type. The map is not to be changed.
func (r *Resources) ByName(typeURL string) map[string]types.Resource {
	if c := r.byType[typeURL]; c != nil {
		return c.byName
	}
	return nil
}

// Versions are the hashes of the resources of a type. The map is not to be changed.
func (r *Resources) Versions(typeURL string) map[string]string {
	if c := r.byType[typeURL]; c != nil {
		return c.versions
	}
	return nil
}

// Write writes the configuration for a snapshot, of which bound are the services behind the waypoint (see [Bound]). Where
// nothing has changed it is the very same as the last time. After an error the last good one still holds.
func (w *Writer) Write(s *mesh.Snapshot, bound []*mesh.Service) (*Resources, error) {
	if w.snapshot == nil || !w.snapshot.Config().Equal(s.Config()) {
		*w = Writer{self: w.self, last: w.last, off: w.off}
	}
	if g := s.Ingress(w.self); g != nil {
		return w.writeIngress(s, g)
	}
	w.written = 0
	services := make(map[mesh.ServiceName]*part, len(bound))
	parts := make([]*part, 0, len(bound))
	for _, svc := range bound {
		p := w.services[svc.Name]
		if p == nil || !same(p.from, s) {
			var err error
			if p, err = w.part(s, svc, p); err != nil {
				return nil, fmt.Errorf("%s: %w", svc.Name, err)
			}
		}
		services[svc.Name] = p
		parts = append(parts, p)
	}
	targets, list, err := w.reach(s, parts)
	if err != nil {
		return nil, err
	}
	b := w.builder(s)
	main := w.main
	if main == nil || !slices.EqualFunc(parts, w.served, func(x, y *part) bool { return x == y || x.shape == y.shape }) {
		main = b.mainItem(parts)
	}
	var listeners, clusters []*item
	for _, l := range []*listenerv3.Listener{b.originate(), b.terminate()} {
		listeners = append(listeners, b.item(w.previous(resource.ListenerType).all(), l.Name, l))
	}
	for _, c := range b.fixedClusters() {
		clusters = append(clusters, b.item(w.previous(resource.ClusterType).all(), c.Name, c))
	}
	listeners = append(listeners, main)
	var routes, extensions, endpoints, shared []*item
	var ends []netip.AddrPort
	patched := Made{}
	var plugins []*mesh.Plugin
	for _, p := range parts {
		patched.addAll(p.patched)
		routes, extensions, plugins = append(routes, p.routes...), append(extensions, p.extensions...), append(plugins, p.plugins...)
	}
	extensions = append(extensions, w.plugIn(b, plugins)...)
	patched.addAll(b.patched)
	for _, r := range list {
		patched.addAll(r.patched)
		clusters = append(clusters, r.cluster)
		for _, i := range r.secrets {
			if !slices.ContainsFunc(shared, func(o *item) bool { return o.name == i.name }) {
				shared = append(shared, i)
			}
		}
		if r.endpoints != nil {
			endpoints = append(endpoints, r.endpoints)
			ends = append(ends, r.pods...)
		}
	}
	tunnels := w.tunnelTo(b, ends)
	clusters, endpoints = append(clusters, tunnels.cluster), append(endpoints, tunnels.endpoints)
	if b.err != nil {
		return nil, b.err
	}
	for _, list := range [][]*item{endpoints, shared} {
		slices.SortFunc(list, func(x, y *item) int { return strings.Compare(x.name, y.name) })
	}
	w.patched = patched
	w.snapshot, w.services, w.targets, w.served, w.main, w.tunnels = s, services, targets, parts, main, tunnels
	return w.keep(map[string][]*item{
		resource.ListenerType: listeners, resource.RouteType: routes, resource.ClusterType: clusters, resource.EndpointType: endpoints,
		resource.ExtensionConfigType: extensions, resource.SecretType: shared,
	}), nil
}

// resourceTypes are those of which Resources consist.
var resourceTypes = []string{
	resource.ListenerType, resource.RouteType, resource.ClusterType, resource.EndpointType, resource.ExtensionConfigType, resource.SecretType,
}

// previous are the resources of the last time.
func (w *Writer) previous(kind string) *collection {
	if w.last == nil {
		return nil
	}
	return w.last.byType[kind]
}

// keep returns resources of these items by type, and the last ones where they are the same.
func (w *Writer) keep(all map[string][]*item) *Resources {
	next, changed := map[string]*collection{}, w.last == nil
	for _, kind := range resourceTypes {
		old := w.previous(kind)
		next[kind] = old.next(all[kind])
		changed = changed || next[kind] != old
	}
	if changed {
		w.last = &Resources{
			Listeners: messages[*listenerv3.Listener](all[resource.ListenerType]), Routes: messages[*routev3.RouteConfiguration](all[resource.RouteType]),
			Clusters: messages[*clusterv3.Cluster](all[resource.ClusterType]), Endpoints: messages[*endpointv3.ClusterLoadAssignment](all[resource.EndpointType]),
			Extensions: messages[*corev3.TypedExtensionConfig](all[resource.ExtensionConfigType]), Secrets: messages[*tlsv3.Secret](all[resource.SecretType]), byType: next,
		}
	}
	return w.last
}

// same reports whether the services that something was written from are what they were.
func same(from map[mesh.ServiceName]*mesh.Service, s *mesh.Snapshot) bool {
	for n, svc := range from {
		if s.Service(n) != svc {
			return false
		}
	}
	return true
}

// part writes what a service asks for.
func (w *Writer) part(s *mesh.Snapshot, svc *mesh.Service, old *part) (*part, error) {
	w.written++
	b := w.builder(s)
	b.lookup(svc.Name)
	p := &part{from: b.from}
	if old == nil {
		old = &part{}
	}
	h := sha256.New()
	for _, vip := range svc.VIPs {
		fmt.Fprintf(h, "%s\n", vip.Addr)
	}
	for _, port := range svc.Ports {
		if r := svc.RoutedAt("", port.Port); r != nil && !r.Beside { // requests, too
			port.App = mesh.AppTCP
		}
		c := chain{svc: svc, port: port}
		if c.http() {
			p.routes = append(p.routes, b.item(old.routes, c.name("http"), b.routes(c)))
			b.targets[target{service: svc.Name, port: port.Port, http: true}] = true
		}
		if c.tcp() {
			b.targets[b.overTLS(c, target{service: svc.Name, port: port.Port})] = true
		}
		ready := b.serve(c)
		fmt.Fprintf(h, "%d %d\n", port.Port, port.App)
		for _, m := range ready.chains {
			b.write(h, m)
		}
		b.write(h, ready.on) // which has names that the chains have not
		p.ports = append(p.ports, ready)
	}
	for _, e := range b.extensions {
		p.extensions = append(p.extensions, b.item(old.extensions, e.Name, e))
	}
	p.shape = sum(h)
	if p.shape == old.shape {
		p.ports = old.ports // the chains are those in the listener
	}
	for t := range b.targets {
		p.targets = append(p.targets, t)
	}
	p.patched, p.plugins = b.patched, b.plugins
	return p, b.err
}

// reach writes how all targets are reached, in order.
func (w *Writer) reach(s *mesh.Snapshot, parts []*part) (map[target]*reached, []*reached, error) {
	out := make(map[target]*reached, len(w.targets))
	list := make([]*reached, 0, len(w.targets))
	for _, p := range parts {
		for _, t := range p.targets {
			if out[t] != nil {
				continue
			}
			r := w.targets[t]
			if r == nil || !same(r.from, s) || !s.SameEndpoints(w.snapshot, t.service) || r.recount(w.snapshot, s) {
				w.written++
				b := w.builder(s)
				b.lookup(t.service)
				if r == nil {
					r = &reached{}
				}
				c, e, near := b.reach(t)
				next := &reached{target: t, from: b.from, through: b.through, name: t.name(), cluster: b.item([]*item{r.cluster}, c.Name, c)}
				next.secrets, next.patched = b.secretItems(r.secrets), b.patched
				if e != nil {
					next.endpoints, next.pods = b.endpointsItem([]*item{r.endpoints}, e, near), pods(e)
				}
				r = next
				if b.err != nil {
					return nil, nil, fmt.Errorf("%s: %w", r.name, b.err)
				}
			}
			out[t] = r
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(x, y *reached) int {
		return cmp.Or(x.service.Compare(y.service), cmp.Compare(x.port, y.port), strings.Compare(x.name, y.name))
	})
	return out, list, nil
}

// recount reports whether endpoints have changed that count beside those of the target.
func (r *reached) recount(was, is *mesh.Snapshot) bool {
	for n := range r.through {
		if !is.SameEndpoints(was, n) {
			return true
		}
	}
	return false
}

// secretItems are the secrets that what was written refers to.
func (b *builder) secretItems(old []*item) (out []*item) {
	for _, name := range slices.Sorted(maps.Keys(b.credentials)) {
		for _, m := range secrets(b.credentials[name]) {
			out = append(out, b.item(old, m.Name, m))
		}
	}
	return out
}

// mainItem puts the main listener together.
func (b *builder) mainItem(parts []*part) *item {
	var ports []served
	for _, p := range parts {
		ports = append(ports, p.ports...)
	}
	l := b.main(ports)
	return b.item(nil, l.Name, l)
}

// item makes a resource of a message, the one there was where it is the same.
func (b *builder) item(old []*item, name string, m proto.Message) *item {
	return b.itemOf(old, name, m, nil)
}

// endpointsItem makes a resource of endpoints, which may be near or far.
func (b *builder) endpointsItem(old []*item, e *endpointv3.ClusterLoadAssignment, near *nearness) *item {
	return b.itemOf(old, e.ClusterName, e, near)
}

func (b *builder) itemOf(old []*item, name string, m proto.Message, near *nearness) *item {
	h := sha256.New()
	b.write(h, m)
	near.write(h)
	out := &item{name, sum(h), m, near}
	for _, o := range old {
		if o != nil && o.name == name && o.version == out.version {
			return o
		}
	}
	return out
}

func (c *collection) all() []*item {
	if c == nil {
		return nil
	}
	return c.items
}

// next is the collection of these resources.
func (c *collection) next(list []*item) *collection {
	if c != nil && slices.Equal(c.items, list) {
		return c
	}
	out := &collection{items: list, byName: make(map[string]types.Resource, len(list)), versions: make(map[string]string, len(list))}
	for _, i := range list {
		out.byName[i.name], out.versions[i.name] = i.message, i.version
		out.near = out.near || i.near != nil
	}
	return out
}

func messages[M proto.Message](list []*item) []M {
	out := make([]M, len(list))
	for i, x := range list {
		out[i] = x.message.(M)
	}
	return out
}

// write adds a message to a hash.
func (b *builder) write(h hash.Hash, m proto.Message) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil && b.err == nil {
		b.err = err
	}
	_, _ = h.Write(data) // never fails
}

func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)) }
