package status

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	metav1alpha1 "istio.io/api/meta/v1alpha1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/mesh"
)

// api is an API server with policy objects, and the nodes of a mesh.
type api struct {
	*testing.T
	p *Policies

	mu      sync.Mutex
	objects map[index.PolicyKey]Object
	writes  int
	fail    error // of the next writes
	nodes   map[string]xds.Progress
	envoys  map[string]xds.Progress // pods of every waypoint

	snap     *mesh.Snapshot
	revision uint64
	stop     func()
}

func newAPI(t *testing.T) *api {
	a := &api{T: t, objects: map[index.PolicyKey]Object{}, nodes: map[string]xds.Progress{}}
	a.p = a.newPolicies()
	return a
}

func (a *api) newPolicies() *Policies {
	return NewPolicies(PoliciesConfig{
		Object: func(k index.PolicyKey) (Object, bool) {
			a.mu.Lock()
			defer a.mu.Unlock()
			o, ok := a.objects[k]
			return o, ok
		},
		Write: a.write,
		Nodes: func() map[string]xds.Progress {
			a.mu.Lock()
			defer a.mu.Unlock()
			out := map[string]xds.Progress{}
			for k, v := range a.nodes {
				out[k] = v
			}
			return out
		},
		Waypoint: func(mesh.ServiceName) map[string]xds.Progress {
			a.mu.Lock()
			defer a.mu.Unlock()
			return maps.Clone(a.envoys)
		},
		Forget:        func(n string) { a.mu.Lock(); defer a.mu.Unlock(); delete(a.nodes, n) },
		RootNamespace: "istio-system", Log: slog.New(slog.DiscardHandler),
	})
}

// write does what the API server does with a merge patch of a status.
func (a *api) write(_ context.Context, k index.PolicyKey, patch []byte) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.writes++
	if a.fail != nil {
		return a.fail
	}
	o, ok := a.objects[k]
	gr := schema.GroupResource{Group: "security.istio.io", Resource: k.Kind.String()}
	if !ok {
		return apierrors.NewNotFound(gr, k.Name)
	}
	var body struct {
		Metadata struct{ UID, ResourceVersion string }
		Status   struct{ Conditions []json.RawMessage }
	}
	if err := json.Unmarshal(patch, &body); err != nil {
		a.Errorf("patch %s: %v", patch, err)
	}
	if body.Metadata.UID != o.UID || body.Metadata.ResourceVersion != o.ResourceVersion {
		return apierrors.NewConflict(gr, k.Name, fmt.Errorf("it has changed"))
	}
	o.Conditions = nil
	for _, raw := range body.Status.Conditions {
		c := &metav1alpha1.IstioCondition{}
		if err := json.Unmarshal(raw, c); err != nil {
			a.Errorf("condition %s: %v", raw, err)
		}
		var number struct{ ObservedGeneration any }
		if err := json.Unmarshal(raw, &number); err != nil {
			a.Error(err)
		}
		if _, ok := number.ObservedGeneration.(float64); !ok && c.Type != "Foreign" {
			a.Errorf("kubectl wait does not read the generation in %s", raw)
		}
		o.Conditions = append(o.Conditions, c)
	}
	n, _ := strconv.Atoi(o.ResourceVersion)
	o.ResourceVersion = strconv.Itoa(n + 1)
	a.objects[k] = o
	return nil
}

func key(name string) index.PolicyKey {
	return index.PolicyKey{Kind: index.AuthorizationPolicy, Namespace: "shop", Name: name}
}

func compiled(name string) *mesh.Policy {
	return &mesh.Policy{Name: mesh.PolicyName{Namespace: "shop", Name: name}, Scope: mesh.ScopeNamespace}
}

// take is one Update.
func (a *api) take(f func(*mesh.Builder), states map[index.PolicyKey]*index.PolicyState) {
	b := mesh.NewBuilder(a.snap)
	b.SetConfig(mesh.Config{TrustDomain: "cluster.local"})
	if f != nil {
		f(b)
	}
	a.revision++
	a.snap = b.Commit(a.revision)
	a.p.Take(&index.Update{Snapshot: a.snap, Policies: states}, a.revision)
}

// apply makes or changes an object, as of a generation.
func (a *api) apply(name string, generation int64, f func(*index.PolicyState)) {
	k := key(name)
	a.mu.Lock()
	o := a.objects[k]
	n, _ := strconv.Atoi(o.ResourceVersion)
	o.UID, o.ResourceVersion, o.Generation = "uid-"+name, strconv.Itoa(n+100), generation
	a.objects[k] = o
	a.mu.Unlock()
	s := &index.PolicyState{UID: o.UID, Generation: generation, Exact: true, Compiled: []mesh.PolicyName{compiled(name).Name}}
	if f != nil {
		f(s)
	}
	a.take(func(b *mesh.Builder) {
		p := compiled(name)
		p.Rules = make([]mesh.Rule, generation)
		b.PutPolicy(p)
	}, map[index.PolicyKey]*index.PolicyState{k: s})
}

func (a *api) pods(nodes ...string) {
	a.take(func(b *mesh.Builder) {
		for i, n := range nodes {
			b.PutWorkload(&mesh.Workload{UID: "pod-on-" + n, Name: n, Namespace: "shop", Node: n, Tunnel: mesh.TunnelHBONE,
				Identity: mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "s"},
				Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i), byte(len(a.nodes))})}})
		}
	}, nil)
}

// reach says how far a node has come, counted from the last revision.
func (a *api) reach(node string, behind uint64, f func(*xds.Progress)) {
	a.mu.Lock()
	p := xds.Progress{Revision: a.revision - behind, Connected: time.Now()}
	if f != nil {
		f(&p)
	}
	a.nodes[node] = p
	a.mu.Unlock()
	a.p.Progress()
}

func (a *api) lead() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	p := a.p
	go func() { p.Run(ctx); close(done) }()
	a.stop = func() { cancel(); <-done }
	synctest.Wait()
}

// says is the condition of an object now.
func (a *api) says(name, kind string) string {
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.objects[key(name)]
	c := find(o.Conditions, kind)
	if c == nil {
		return ""
	}
	return fmt.Sprintf("%s %s g%d: %s", c.Status, c.Reason, c.ObservedGeneration, atRevision.ReplaceAllString(c.Message, ""))
}

func (a *api) want(what, want string) {
	a.Helper()
	if got := a.says("p", ConditionEnforced); got != want {
		a.Errorf("%s: %q, want %q", what, got, want)
	}
}

func (a *api) wrote(what string, want int) {
	a.Helper()
	if n := a.written(); n != want {
		a.Errorf("%s: %d writes, want %d", what, n, want)
	}
}

// written is how many writes there were since the last call.
func (a *api) written() int {
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.writes
	a.writes = 0
	return n
}

func TestEnforcedCountsTheNodesThatHaveTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.lead()
		defer func() { a.stop() }()
		a.pods("n1", "n2")
		a.take(func(b *mesh.Builder) { // not captured: nobody enforces anything for it
			b.PutWorkload(&mesh.Workload{UID: "plain", Namespace: "shop", Node: "n9"})
		}, nil)
		a.apply("p", 1, nil)
		a.reach("n1", 0, nil)
		a.reach("n2", 1, nil)
		a.want("n2 is behind, for no time", "")
		a.reach("n2", 0, nil)
		a.want("both have it", "True Enforced g1: 2/2 nodes")
		a.wrote("both have it", 1)
		if got := a.says("p", ConditionZtunnelAccepted); got != "True Accepted g1: attached to ztunnel" {
			t.Errorf("%q", got)
		}
		// A flip is one write too, and until then the condition is of the older generation.
		a.apply("p", 2, nil)
		a.reach("n1", 0, nil)
		a.want("n2 does not have it", "True Enforced g1: 2/2 nodes")
		a.reach("n2", 0, nil)
		a.want("flipped", "True Enforced g2: 2/2 nodes")
		a.wrote("flipped", 1)
		// Changes of the mesh that are not about it are no reason to write.
		a.apply("other", 1, nil)
		a.reach("n1", 0, nil)
		a.reach("n2", 0, nil)
		a.written()
		for range 10 {
			a.take(func(b *mesh.Builder) {
				b.PutWorkload(&mesh.Workload{UID: "plain", Namespace: "shop", Node: "n9", Healthy: a.revision%2 == 0})
			}, nil)
			a.reach("n1", 0, nil)
		}
		time.Sleep(time.Hour)
		a.wrote("an hour of other changes", 0)
	})
}

func TestNodesThatLagAreNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.lead()
		defer func() { a.stop() }()
		var nodes []string
		for i := range 12 {
			nodes = append(nodes, fmt.Sprintf("n%02d", i))
		}
		a.pods(nodes...)
		for _, n := range nodes {
			a.reach(n, 0, nil)
		}
		a.apply("p", 1, nil)
		a.reach("n00", 0, nil)
		time.Sleep(2 * patience)
		a.want("eleven lag", "False NodesPending g1: 1/12 nodes; waiting for n01, n02, n03, n04, n05 and 6 more")
		for _, n := range nodes[1:11] {
			a.reach(n, 0, nil)
		}
		a.reach("n11", 1, func(p *xds.Progress) { p.Connected = time.Time{} })
		time.Sleep(2 * pace)
		a.want("one is away", "False NodesPending g1: 11/12 nodes; not connected and behind: n11")
		a.reach("n11", 0, nil)
		a.want("it came back", "True Enforced g1: 12/12 nodes")
		// A node that is away goes on with what it had.
		a.reach("n11", 0, func(p *xds.Progress) { p.Connected = time.Time{} })
		time.Sleep(time.Minute)
		a.want("away, and nothing changed", "True Enforced g1: 12/12 nodes")
		// Pods come to a node that has not heard of them: it has moments to catch up.
		a.written()
		a.pods("n20")
		time.Sleep(lagPatience / 2)
		a.want("a node has just come", "True Enforced g1: 12/12 nodes")
		time.Sleep(lagPatience)
		a.want("a node that nobody knows", "Unknown NodesDisconnected g1: 12/13 nodes; not connected: n20")
		// It is removed with its pods.
		a.take(func(b *mesh.Builder) { b.DeleteWorkload("pod-on-n20") }, nil)
		a.want("it is gone", "True Enforced g1: 12/12 nodes")
		a.wrote("coming and going", 2)
	})
}

func TestANodeThatRefusesAPolicyIsNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.lead()
		defer func() { a.stop() }()
		a.pods("n1", "n2")
		a.apply("p", 1, nil)
		a.reach("n1", 0, nil)
		a.reach("n2", 0, nil)
		a.want("enforced", "True Enforced g1: 2/2 nodes")
		a.apply("p", 2, nil)
		a.reach("n1", 0, nil)
		a.reach("n2", 0, func(p *xds.Progress) { p.Refused = map[string]string{"shop/p": "the action 9"} })
		time.Sleep(2 * patience)
		a.want("n2 refuses it", "False NodesRefuse g2: 1/2 nodes; refused by n2; n2 says: the action 9")
		a.reach("n2", 0, func(p *xds.Progress) { p.Refused = map[string]string{"shop/other": "the action 9"} })
		a.want("n2 refuses another", "True Enforced g2: 2/2 nodes")
		a.apply("p", 3, nil)
		a.reach("n1", 0, nil)
		a.reach("n2", 1, func(p *xds.Progress) { p.Trouble = "not enforced: the map is full " + strings.Repeat("x", 9999) })
		time.Sleep(2 * patience)
		got := a.says("p", ConditionEnforced)
		if !strings.HasPrefix(got, "False NodesRefuse g3: 1/2 nodes; refused by n2; n2 says: not enforced: the map is full") || len(got) > 500 {
			t.Errorf("%d bytes: %.200s", len(got), got)
		}
	})
}

// A waypoint's Envoy may have been read to do what it refuses a moment later: what is left off then is not enforced any more.
func TestWhatAnEnvoyRefusesLaterIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.lead()
		defer func() { a.stop() }()
		at := func(refused map[string]string) {
			a.mu.Lock()
			a.envoys = map[string]xds.Progress{"way-1": {Revision: a.revision, Connected: time.Now(), Refused: refused}}
			a.mu.Unlock()
			a.p.Progress()
		}
		a.apply("p", 1, func(s *index.PolicyState) {
			s.Compiled, s.Patches, s.Waypoints = nil, "filter", []mesh.ServiceName{{Namespace: "shop", Hostname: "way.shop.svc.cluster.local"}}
		})
		at(nil)
		a.want("done", "True Enforced g1: 0/0 nodes, 1/1 pods of waypoint shop/way")
		at(map[string]string{"filter": "no such filter"})
		time.Sleep(2 * patience)
		a.want("refused", "False NodesRefuse g1: 0/0 nodes, 0/1 pods of waypoint shop/way; refused by way-1; way-1 says: no such filter")
	})
}

func TestWhatNodesDoInsteadIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.lead()
		defer func() { a.stop() }()
		a.pods("n1")
		a.apply("p", 1, func(s *index.PolicyState) {
			s.Exact, s.Reason, s.Message = false, policy.ReasonNoWaypoint, "methods need a waypoint; DENY rules hold without them"
		})
		a.reach("n1", 0, nil)
		a.want("no waypoint", "False NoWaypoint g1: methods need a waypoint; DENY rules hold without them (so on 1/1 nodes)")
		if got := a.says("p", ConditionZtunnelAccepted); got != "True UnsupportedValue g1: methods need a waypoint; DENY rules hold without them" {
			t.Errorf("%q", got)
		}
		a.mu.Lock()
		o := a.objects[key("p")]
		o.Targets = []string{"Service shop/ui"}
		a.objects[key("p")] = o
		a.mu.Unlock()
		a.apply("p", 2, func(s *index.PolicyState) {
			s.Exact, s.Reason, s.Message = false, policy.ReasonNoWaypoint, "it is for a waypoint"
		})
		a.reach("n1", 0, nil)
		if got := a.says("p", ConditionWaypointAccepted); got != "False AncestorNotBound g2: Service shop/ui is not bound to a waypoint" {
			t.Errorf("%q", got)
		}
		if got := a.says("p", ConditionZtunnelAccepted); got != "" {
			t.Errorf("with targetRefs: %q", got)
		}
		// Nothing to select is not a failure: it holds for whoever comes.
		a.take(func(b *mesh.Builder) { b.DeleteWorkload("pod-on-n1") }, nil)
		a.apply("p", 3, nil)
		a.want("no workload", "True NoWorkloads g3: no captured workload is selected, so there is nothing to enforce yet")
	})
}

func TestWritesSurviveConflictsDeletionAndFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.lead()
		defer func() { a.stop() }()
		a.pods("n1")
		a.mu.Lock()
		a.fail = apierrors.NewInternalError(fmt.Errorf("etcd is away"))
		a.objects[key("p")] = Object{Conditions: []*metav1alpha1.IstioCondition{{Type: "Foreign", Status: "True", ObservedGeneration: 1}}}
		a.mu.Unlock()
		a.apply("p", 1, nil)
		a.reach("n1", 0, nil)
		time.Sleep(time.Minute)
		a.want("the API server is away", "")
		if n := a.written(); n > 15 {
			t.Errorf("%d attempts in a minute", n)
		}
		a.mu.Lock()
		a.fail = nil
		a.mu.Unlock()
		time.Sleep(time.Minute)
		a.want("it is back", "True Enforced g1: 1/1 nodes")
		if got := a.says("p", "Foreign"); got == "" {
			t.Error("a condition of somebody else is gone")
		}
		// Deleted under our hands.
		a.apply("p", 2, nil)
		a.written()
		a.mu.Lock()
		delete(a.objects, key("p"))
		a.mu.Unlock()
		a.reach("n1", 0, nil)
		time.Sleep(time.Hour)
		a.wrote("it is gone", 0)
		a.take(func(b *mesh.Builder) { b.DeletePolicy(compiled("p").Name) }, map[index.PolicyKey]*index.PolicyState{key("p"): nil})
		if n := len(a.p.entries) + len(a.p.byCompiled) + len(a.p.byNamespace) + len(a.p.waiting); n != 0 {
			t.Errorf("%d things are left of it", n)
		}
	})
}

func TestANewLeaderWritesOnlyWhatIsNotThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.pods("n1")
		a.apply("p", 1, nil)
		a.apply("q", 1, nil)
		a.reach("n1", 0, nil)
		time.Sleep(time.Minute)
		a.wrote("who does not lead", 0)
		a.lead()
		a.wrote("who leads", 2)
		a.stop()
		a.apply("q", 2, nil)
		a.reach("n1", 0, nil)
		time.Sleep(time.Minute)
		a.wrote("who does not lead any more", 0)
		// Another replica, with revisions of its own, in which the nodes are not connected yet.
		nodes := a.nodes
		a.nodes = map[string]xds.Progress{}
		a.p, a.revision = a.newPolicies(), 5
		snap := a.snap
		a.p.Take(&index.Update{Snapshot: snap, Policies: map[index.PolicyKey]*index.PolicyState{
			key("p"): {UID: "uid-p", Generation: 1, Exact: true, Compiled: []mesh.PolicyName{compiled("p").Name}},
			key("q"): {UID: "uid-q", Generation: 2, Exact: true, Compiled: []mesh.PolicyName{compiled("q").Name}},
		}}, a.revision)
		a.lead()
		defer func() { a.stop() }()
		time.Sleep(patience / 2)
		for n := range nodes {
			a.reach(n, 0, nil)
		}
		a.wrote("the one that changed meanwhile", 1)
		if got := a.says("q", ConditionEnforced); got != "True Enforced g2: 1/1 nodes" {
			t.Errorf("%q", got)
		}
	})
}

// Thousands of policies do not melt the API server: each is written once, at a bounded rate.
func TestManyPoliciesAreWrittenOnceAndSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI(t)
		a.pods("n1", "n2")
		const n = 3000
		states := map[index.PolicyKey]*index.PolicyState{}
		a.take(func(b *mesh.Builder) {
			for i := range n {
				name := fmt.Sprintf("p%05d", i)
				b.PutPolicy(compiled(name))
				a.objects[key(name)] = Object{UID: "uid-" + name, ResourceVersion: "1", Generation: 1}
				states[key(name)] = &index.PolicyState{UID: "uid-" + name, Generation: 1, Exact: true, Compiled: []mesh.PolicyName{compiled(name).Name}}
			}
		}, states)
		a.reach("n1", 0, nil)
		a.reach("n2", 0, nil)
		a.lead()
		defer func() { a.stop() }()
		time.Sleep(time.Second)
		soon := a.written()
		if soon > burst+2*writesPerS {
			t.Errorf("%d writes in the first second", soon)
		}
		time.Sleep(n / writesPerS * time.Second)
		a.wrote("all the rest", n-soon)
		time.Sleep(time.Hour)
		a.wrote("an hour later", 0)
		a.apply("p00042", 2, nil)
		a.reach("n1", 0, nil)
		a.reach("n2", 0, nil)
		a.wrote("one has changed", 1)
	})
}
