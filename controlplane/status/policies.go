package status

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	metav1alpha1 "istio.io/api/meta/v1alpha1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/flowcontrol"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Object is a policy object as the watch has it.
type Object struct {
	UID, ResourceVersion string
	Generation           int64
	Conditions           []*metav1alpha1.IstioCondition
	Targets              []string // targetRefs, as "Service shop/ui"
}

// PoliciesConfig is what Policies need.
type PoliciesConfig struct {
	// Object returns an object as the watch has it, false where it has none.
	Object func(index.PolicyKey) (Object, bool)
	// Write applies a merge patch to the status of an object.
	Write func(ctx context.Context, k index.PolicyKey, patch []byte) error
	// Nodes tells how far the nodes are; Forget is called about one that is gone.
	Nodes  func() map[string]xds.Progress
	Forget func(node string)
	// Waypoint tells how far the pods of a waypoint are; nil: none is known.
	Waypoint func(mesh.ServiceName) map[string]xds.Progress

	// Owner names the revision whose control plane a waypoint or gateway is told by, and Revision is this one's. With Owner nil
	// there is no other.
	Owner    func(mesh.ServiceName) string
	Revision string
	// Away are the nodes whose agents ask another control plane than the default one, with its revision; nil: none do.
	Away func() map[string]string

	RootNamespace string
	Log           *slog.Logger
	Metrics       prometheus.Registerer
}

// A change that all nodes enforce within patience is written once, and not as pending before.
const (
	patience = time.Second
	// lagPatience is the same where the object was enforced already: nodes catch up with pods that come and go, and
	// agents are replaced.
	lagPatience = 5 * time.Second
	// pace is how often what is still pending is written anew.
	pace = 2 * time.Second
	// watchLag is how long the watch may take to show what was written.
	watchLag = 5 * time.Second
	// resync is how often all objects are compared with what they should say.
	resync = 10 * time.Minute

	writers      = 8
	writesPerS   = 50
	burst        = 100
	retryAtFirst = 20 * time.Millisecond
	retryAtMost  = 30 * time.Second
	fieldManager = "warren-control"
)

// Policies writes on every policy object which nodes enforce it.
//
// Take and Progress only note what has to be looked at again; while this replica leads, Run looks at it and writes
// what is not there yet.
type Policies struct {
	cfg     PoliciesConfig
	writes  *prometheus.CounterVec
	seconds prometheus.Histogram

	moved chan struct{} // one token: nodes have come further

	mu          sync.Mutex
	tally       *tally
	entries     map[index.PolicyKey]*entry
	byNamespace map[string]map[index.PolicyKey]struct{}
	byCompiled  map[mesh.PolicyName]map[index.PolicyKey]struct{}
	waiting     map[index.PolicyKey]struct{} // some nodes do not enforce it yet, or an Envoy may come not to
	refused     map[string]map[string]string // by node, as of the last look
	queue       toWrite[index.PolicyKey]
}

// entry is what is known about one object.
type entry struct {
	state    *index.PolicyState
	revision uint64    // as of which it is what it is
	taken    time.Time // when that was
	timed    bool      // the time until all nodes enforced it has been measured
	behind   time.Time // since when nodes are; zero: they are not

	wrote   []condition // last
	wroteOf int64       // generation
	wroteAt time.Time
}

// NewPolicies returns Policies that know none.
func NewPolicies(cfg PoliciesConfig) *Policies {
	p := &Policies{cfg: cfg, moved: make(chan struct{}, 1), tally: newTally(), entries: map[index.PolicyKey]*entry{},
		byNamespace: map[string]map[index.PolicyKey]struct{}{}, byCompiled: map[mesh.PolicyName]map[index.PolicyKey]struct{}{},
		waiting: map[index.PolicyKey]struct{}{}, refused: map[string]map[string]string{},
		writes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "warren_policy_status_writes_total", Help: "Writes of the conditions of policies, by result.",
		}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "warren_policy_enforcement_seconds",
			Help:    "Seconds from when the control plane learned of a policy's change until all nodes concerned enforced it.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		})}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(p.writes, p.seconds)
	}
	return p
}

// Take follows an Update that is served as of a revision of the xDS cache. It does not block.
func (p *Policies) Take(u *index.Update, revision uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.tally.take(u.Snapshot, revision)
	now := time.Now()
	for k, s := range u.Policies {
		p.set(k, s, revision, now)
	}
	for name := range m.policies {
		for k := range p.byCompiled[name] {
			p.look(k)
		}
	}
	for ns := range m.namespaces {
		for k := range p.byNamespace[ns] {
			p.look(k)
		}
	}
	if m.mesh {
		for k := range p.byNamespace[p.cfg.RootNamespace] {
			p.look(k)
		}
	}
}

func (p *Policies) set(k index.PolicyKey, s *index.PolicyState, revision uint64, now time.Time) {
	if old := p.entries[k]; old != nil {
		for _, name := range old.state.Compiled {
			delete(p.byCompiled[name], k)
			if len(p.byCompiled[name]) == 0 {
				delete(p.byCompiled, name)
			}
		}
	}
	if s == nil {
		delete(p.entries, k)
		delete(p.waiting, k)
		delete(p.byNamespace[k.Namespace], k)
		if len(p.byNamespace[k.Namespace]) == 0 {
			delete(p.byNamespace, k.Namespace)
		}
		return
	}
	e := p.entries[k]
	if e == nil || e.state.UID != s.UID {
		e = &entry{}
		p.entries[k] = e
	}
	e.state, e.revision, e.taken, e.timed, e.behind = s, revision, now, false, time.Time{}
	for _, name := range s.Compiled {
		if p.byCompiled[name] == nil {
			p.byCompiled[name] = map[index.PolicyKey]struct{}{}
		}
		p.byCompiled[name][k] = struct{}{}
	}
	if p.byNamespace[k.Namespace] == nil {
		p.byNamespace[k.Namespace] = map[index.PolicyKey]struct{}{}
	}
	p.byNamespace[k.Namespace][k] = struct{}{}
	p.look(k)
}

// look has an object looked at, if this replica writes.
func (p *Policies) look(k index.PolicyKey) {
	if p.queue != nil {
		p.queue.Add(k)
	}
}

// Progress notes that nodes have come further. It does not block.
func (p *Policies) Progress() {
	select {
	case p.moved <- struct{}{}:
	default:
	}
}

// Run writes until ctx ends, beginning with everything. It is the leader's.
func (p *Policies) Run(ctx context.Context) {
	write(ctx, p.reconcile, func(q toWrite[index.PolicyKey]) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.queue = q
		for k := range p.entries {
			q.Add(k)
		}
	}, p.moved, p.advanced)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue = nil
}

// advanced has everything looked at that the nodes' progress may have changed.
func (p *Policies) advanced() {
	nodes := p.cfg.Nodes()
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.waiting {
		p.look(k)
	}
	for node := range p.refused {
		if _, ok := nodes[node]; !ok {
			delete(p.refused, node)
		}
	}
	for node, now := range nodes {
		was := p.refused[node]
		for _, m := range []map[string]string{was, now.Refused} {
			for name := range m {
				if was[name] == now.Refused[name] {
					continue
				}
				for k := range p.byCompiled[policyName(name)] {
					p.look(k)
				}
			}
		}
		p.refused[node] = now.Refused
		if now.Connected.IsZero() && p.tally.all[node] == 0 {
			p.cfg.Forget(node)
		}
	}
}

// reconcile looks at one object and writes what it has to say, if it does not say so already.
func (p *Policies) reconcile(ctx context.Context, queue toWrite[index.PolicyKey], limit flowcontrol.RateLimiter, k index.PolicyKey) {
	o, ok := p.cfg.Object(k)
	if !ok {
		queue.Forget(k)
		return // gone; the index will say so
	}
	now := time.Now()
	ours := p.ours(k)
	want, again := p.assess(k, o, now, ours)
	if again > 0 {
		queue.AddAfter(k, again)
	}
	if want == nil {
		queue.Forget(k)
		return
	}
	patch, err := statusPatch(o, want, now, ours)
	if err != nil {
		p.cfg.Log.Error("conditions not written", "kind", k.Kind, "namespace", k.Namespace, "name", k.Name, "error", err)
		return
	}
	if limit.Wait(ctx) != nil {
		return
	}
	err = p.cfg.Write(ctx, k, patch)
	switch {
	case err == nil:
		p.writes.WithLabelValues("ok").Inc()
		p.wrote(k, o, want, now)
		queue.Forget(k)
	case apierrors.IsNotFound(err):
		p.writes.WithLabelValues("gone").Inc()
		queue.Forget(k)
	case apierrors.IsConflict(err): // it has changed; the watch will show how
		p.writes.WithLabelValues("conflict").Inc()
		queue.AddRateLimited(k)
	case ctx.Err() != nil:
	default:
		p.writes.WithLabelValues("error").Inc()
		p.cfg.Log.Warn("conditions not written, trying again", "kind", k.Kind, "namespace", k.Namespace, "name", k.Name, "error", err)
		queue.AddRateLimited(k)
	}
}

func (p *Policies) wrote(k index.PolicyKey, o Object, want []condition, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.entries[k]; e != nil && e.state.UID == o.UID {
		e.wrote, e.wroteOf, e.wroteAt = want, o.Generation, now
	}
}

// assess returns the conditions to write, nil for none, and when to look again without a reason to, 0 for never.
func (p *Policies) assess(k index.PolicyKey, o Object, now time.Time, ours func(kind string) bool) (want []condition, again time.Duration) {
	p.mu.Lock()
	p.waiting[k] = struct{}{} // before the nodes are read: what they do from here on has it looked at again
	p.mu.Unlock()
	nodes := p.cfg.Nodes()
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.entries[k]
	if e == nil || e.state.UID != o.UID || e.state.Generation != o.Generation {
		delete(p.waiting, k)
		return nil, 0 // the index has not come as far as the watch: it will
	}
	want, said, done := p.says(k, e, o, nodes)
	if !p.secondary() && len(p.parts(k, e.state)) > 0 {
		again = pace // what others write is no change that the index tells of
	}
	if done {
		if e.state.Patches == "" { // an Envoy may refuse what it was read to do
			delete(p.waiting, k)
		}
		e.behind = time.Time{}
		if !e.timed && len(want) > 0 {
			e.timed = true
			p.seconds.Observe(now.Sub(e.taken).Seconds())
		}
	} else if e.behind.IsZero() {
		e.behind = now
	}
	if unchanged(o.Conditions, want, o.Generation, ours) {
		return nil, again
	}
	if e.wroteOf == o.Generation && now.Sub(e.wroteAt) < watchLag && equalConditions(e.wrote, want) {
		return nil, e.wroteAt.Add(watchLag).Sub(now)
	}
	if !done {
		was := find(o.Conditions, said)
		wait := e.behind.Add(patience)
		switch {
		case slices.ContainsFunc(want, func(c condition) bool { return c.Reason == reasonRefused }): // which is no lag
			if next := e.wroteAt.Add(pace); next.After(wait) {
				wait = next
			}
		case was != nil && was.ObservedGeneration == o.Generation && was.Status == string(metav1.ConditionTrue):
			wait = e.behind.Add(lagPatience)
		case was != nil && was.ObservedGeneration == o.Generation:
			wait = e.wroteAt.Add(pace)
		}
		if now.Before(wait) {
			return nil, wait.Sub(now)
		}
	}
	return want, again
}

func equalConditions(a, b []condition) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := a[i], b[i]
		x.Message, y.Message = atRevision.ReplaceAllString(x.Message, ""), atRevision.ReplaceAllString(y.Message, "")
		if x != y {
			return false
		}
	}
	return true
}

// enforced counts the nodes. done reports that every one that has to holds what is compiled for the object.
func (p *Policies) enforced(k index.PolicyKey, e *entry, o Object, nodes map[string]xds.Progress) (_ condition, done bool) {
	concerned := p.concerned(k, e.state)
	home, away := p.asking(concerned)
	on := p.onNodes(e, home, nodes)
	ways := p.waypoints(e, &on.pending, &on.refusing, &on.why)
	on.n += p.others(k, e.state, o, away, &ways, &on)
	total := len(concerned)
	c := condition{Type: ConditionEnforced, Status: string(metav1.ConditionTrue), Reason: reasonEnforced,
		Message: fmt.Sprintf("%d/%d nodes at revision %d", on.n, total, on.revision) + ways.text}
	on.tell(&c)
	if c.Reason == reasonDisconnected {
		c.Status = string(metav1.ConditionUnknown)
	}
	done = on.n == total && ways.done
	switch {
	case !e.state.Exact:
		if done || c.Reason == reasonPending {
			c.Reason = e.state.Reason
		}
		c.Status = string(metav1.ConditionFalse)
		if total == 0 && len(e.state.Waypoints) == 0 {
			c.Message, done = e.state.Message, true
		} else {
			c.Message = e.state.Message + " (so on " + c.Message + ")"
		}
	case total == 0 && len(e.state.Waypoints) == 0:
		c.Reason, c.Message = reasonNoWorkloads, "no captured workload is selected, so there is nothing to enforce yet"
	case e.state.Message != "":
		c.Message += "; " + e.state.Message
	}
	return c, done
}

// onNodes is what nodes do about a policy.
type onNodes struct {
	revision                                 uint64 // that they have to have come to
	n                                        int    // who have
	pending, disconnected, unknown, refusing []string
	why                                      string
}

// onNodes counts nodes that ask this control plane.
func (p *Policies) onNodes(e *entry, names []string, nodes map[string]xds.Progress) onNodes {
	on := onNodes{revision: max(e.revision, p.tally.since(e.state.Compiled))}
	for _, node := range names {
		at, seen := nodes[node]
		refused, trouble := "", at.Trouble
		for _, name := range e.state.Compiled {
			if r := at.Refused[name.String()]; r != "" {
				refused = r
			}
		}
		switch {
		case refused != "":
			on.refusing = append(on.refusing, node)
			on.why = first(on.why, node+" says: "+short(refused))
		case at.Revision >= on.revision:
			on.n++
		case trouble != "":
			on.refusing = append(on.refusing, node)
			on.why = first(on.why, node+" says: "+short(trouble))
		case !seen:
			on.unknown = append(on.unknown, node)
		case at.Connected.IsZero():
			on.disconnected = append(on.disconnected, node)
		default:
			on.pending = append(on.pending, node)
		}
	}
	return on
}

// tell has a condition say who does not do what it is about, and why.
func (on *onNodes) tell(c *condition) {
	c.lack(reasonPending, "waiting for", on.pending)
	c.lack(reasonPending, "not connected and behind:", on.disconnected)
	c.lack(reasonDisconnected, "not connected:", on.unknown)
	c.lack(reasonRefused, "refused by", on.refusing)
	if on.why != "" {
		c.Message += "; " + on.why
	}
}

// atWaypoints is what the waypoints of a policy do about it.
type atWaypoints struct {
	text string
	done bool
	own  int // that this control plane tells
}

// waypoints counts the pods of those that this control plane tells. One that is not connected lets nobody through, and is waited
// for nevertheless.
func (p *Policies) waypoints(e *entry, pending, refusing *[]string, why *string) atWaypoints {
	out := atWaypoints{done: true}
	for _, name := range e.state.Waypoints {
		way := "waypoint " + gatewayName(name)
		var pods map[string]xds.Progress
		if p.cfg.Waypoint != nil {
			pods = p.cfg.Waypoint(name)
		}
		// One that goes over to another control plane has pods here for as long as they carry something.
		if p.elsewhere(name) != "" && (len(pods) == 0 || p.secondary()) {
			continue
		}
		out.own++
		n := 0
		for _, pod := range slices.Sorted(maps.Keys(pods)) {
			switch at := pods[pod]; {
			case e.state.Patches != "" && at.Refused[e.state.Patches] != "":
				*refusing = append(*refusing, pod)
				*why = first(*why, pod+" says: "+short(at.Refused[e.state.Patches]))
			case at.Revision >= e.revision:
				n++
			case at.Trouble != "":
				*refusing = append(*refusing, pod)
				*why = first(*why, pod+" says: "+short(at.Trouble))
			default:
				*pending = append(*pending, pod)
			}
		}
		if len(pods) == 0 {
			*pending = append(*pending, way)
		}
		out.done = out.done && n > 0 && n == len(pods)
		out.text += fmt.Sprintf(", %d/%d pods of %s", n, len(pods), way)
	}
	return out
}

// concerned are the nodes with workloads that the object selects. A PeerAuthentication with a selector is counted
// on all nodes of its namespace, because it may be the reason why a workload is not strict.
func (p *Policies) concerned(k index.PolicyKey, s *index.PolicyState) nodeCount {
	if len(s.Compiled) == 0 || p.tally.snapshot == nil {
		return nil
	}
	if k.Kind == index.PeerAuthentication {
		if k.Namespace == p.cfg.RootNamespace {
			return p.tally.all
		}
		return p.tally.byNamespace[k.Namespace]
	}
	nodes := nodeCount{}
	for _, name := range s.Compiled {
		if c := p.tally.snapshot.Policy(name); c != nil {
			maps.Copy(nodes, p.tally.nodesOf(c))
		}
	}
	return nodes
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// WriteStatus is Write of PoliciesConfig with a client of the API server.
// Without the second one nothing is written on RateLimits.
func WriteStatus(client istio.Interface, others dynamic.Interface) func(context.Context, index.PolicyKey, []byte) error {
	return func(ctx context.Context, k index.PolicyKey, patch []byte) (err error) {
		o := metav1.PatchOptions{FieldManager: fieldManager}
		security := client.SecurityV1()
		switch k.Kind {
		case index.AuthorizationPolicy:
			_, err = security.AuthorizationPolicies(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.PeerAuthentication:
			_, err = security.PeerAuthentications(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.RequestAuthentication:
			_, err = security.RequestAuthentications(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.Telemetry:
			_, err = client.TelemetryV1().Telemetries(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.EnvoyFilter:
			_, err = client.NetworkingV1alpha3().EnvoyFilters(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.WasmPlugin:
			_, err = client.ExtensionsV1alpha1().WasmPlugins(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		case index.RateLimit:
			_, err = others.Resource(policy.RateLimits).Namespace(k.Namespace).Patch(ctx, k.Name, types.MergePatchType, patch, o, "status")
		default:
			err = errors.New("not a policy object: " + k.Kind.String())
		}
		return err
	}
}
