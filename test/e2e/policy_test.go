package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// policies is the AuthorizationPolicies of a namespace, as one who applies and watches them has them.
type policies struct {
	api       *lab.API
	namespace string
	seen      *lab.Follower
}

func watchPolicies(t *testing.T, namespace string) *policies {
	t.Helper()
	api := mesh.API()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	t.Cleanup(cancel)
	p := &policies{api: api, namespace: namespace}
	p.seen = api.Follow(ctx, p.path(""))
	return p
}

func (p *policies) path(name string) string {
	return strings.TrimSuffix("/apis/security.istio.io/v1/namespaces/"+p.namespace+"/authorizationpolicies/"+name, "/")
}

type object = map[string]any

func (p *policies) apply(ctx context.Context, name string, spec object) (generation int64, err error) {
	o, err := p.api.Apply(ctx, p.path(name), object{"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
		"metadata": object{"name": name, "namespace": p.namespace}, "spec": spec})
	if err != nil {
		return 0, err
	}
	return o.Metadata.Generation, nil
}

// enforced waits until the condition says that a generation is enforced, and returns when that was seen.
func (p *policies) enforced(ctx context.Context, name string, generation int64, limit time.Duration) (time.Time, error) {
	_, at, err := p.seen.Await(ctx, limit, name, func(o *lab.Object) bool {
		c := o.Condition("Enforced")
		return c.Status == "True" && c.ObservedGeneration == generation
	})
	return at, err
}

// from is a rule for connections from service accounts, or from all others than those.
func from(field, namespace string, accounts ...string) []any {
	var ids []string
	for _, a := range accounts {
		ids = append(ids, "cluster.local/ns/"+namespace+"/sa/"+a)
	}
	return []any{object{"from": []any{object{"source": object{field: ids}}}}}
}

// percentile returns the value that p of 100 do not exceed.
func percentile(v []time.Duration, p int) time.Duration {
	if len(v) == 0 {
		return 0
	}
	v = slices.Clone(v)
	slices.Sort(v)
	return v[(len(v)-1)*p/100]
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// A policy's condition says which nodes enforce it, soon, in the words that kubectl wait understands.
func TestPolicyStatus(t *testing.T) {
	ns := namespace(t, "e2e-status", ambient)
	var specs []lab.PodSpec
	for i := range size(8, 100) {
		specs = append(specs, lab.PodSpec{Namespace: ns, Name: fmt.Sprintf("pod-%d", i), Node: nodes[i%2], Args: []string{"sleep"}})
	}
	deploy(t, ns, true, specs...)
	must(t, mesh.Apply(t.Context(), fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: first, namespace: %[1]s}
spec: {rules: [{from: [{source: {namespaces: [%[1]s]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: %[1]s}
spec: {mtls: {mode: STRICT}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: one-node, namespace: %[1]s}
spec: {selector: {matchLabels: {app: pod-0}}, rules: [{from: [{source: {namespaces: [%[1]s]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: %[1]s}
spec: {selector: {matchLabels: {app: nobody}}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: methods, namespace: %[1]s}
spec: {selector: {matchLabels: {app: pod-1}}, rules: [{to: [{operation: {methods: [GET]}}]}]}
---
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: tokens, namespace: %[1]s}
spec: {jwtRules: [{issuer: "https://issuer.example"}]}
---
apiVersion: v1
kind: Service
metadata: {name: asks, namespace: %[1]s, labels: {istio.io/use-waypoint: way}}
spec: {selector: {app: pod-0}, ports: [{name: tcp, port: 9000}]}
`, ns)))
	_, err := mesh.Kubectl(t.Context(), "-n", ns, "wait", "--for=condition=istio.io/WaypointBound=false", "service/asks", "--timeout=60s")
	must(t, err)
	for _, o := range []string{"authorizationpolicy/first", "peerauthentication/default", "authorizationpolicy/one-node", "authorizationpolicy/nobody"} {
		_, err := mesh.Kubectl(t.Context(), "-n", ns, "wait", "--for=condition=Enforced", o, "--timeout=60s")
		must(t, err)
	}
	for _, o := range []string{"authorizationpolicy/methods", "requestauthentication/tokens"} {
		_, err := mesh.Kubectl(t.Context(), "-n", ns, "wait", "--for=condition=Enforced=false", o, "--timeout=60s")
		must(t, err)
	}
	for object, words := range map[string]string{
		"authorizationpolicy/first":    "2/2 nodes at revision",
		"authorizationpolicy/one-node": "1/1 nodes at revision",
		"authorizationpolicy/nobody":   "no captured workload is selected",
		"peerauthentication/default":   "2/2 nodes at revision",
		"authorizationpolicy/methods":  "methods",
		"requestauthentication/tokens": "waypoint",
	} {
		out, err := mesh.Kubectl(t.Context(), "-n", ns, "get", object, "-o", `jsonpath={.status.conditions[?(@.type=="Enforced")].message}`)
		must(t, err)
		if !strings.Contains(out, words) {
			t.Errorf("%s says %q, want %q", object, out, words)
		}
	}
	out, err := mesh.Kubectl(t.Context(), "-n", ns, "get", "authorizationpolicy/first", "-o", `jsonpath={.status.conditions[?(@.type=="ZtunnelAccepted")].status}`)
	must(t, err)
	if out != "True" {
		t.Errorf("ZtunnelAccepted is %q", out)
	}

	// One change after the other, each waited for.
	p := watchPolicies(t, ns)
	n := size(50, 1000)
	var took []time.Duration
	for i := range n {
		began := time.Now()
		generation, err := p.apply(t.Context(), "timed", object{"rules": from("principals", ns, fmt.Sprintf("client-%d", i))})
		must(t, err)
		at, err := p.enforced(t.Context(), "timed", generation, time.Minute)
		must(t, err)
		took = append(took, at.Sub(began))
	}
	p50, p99 := percentile(took, 50), percentile(took, 99)
	t.Logf("apply to Enforced with 2 nodes and %d pods: median %s, p99 %s, most %s", len(specs), p50, p99, slices.Max(took))
	record("policy-enforce-latency", "policy-enforce-latency", n, 0, milliseconds(p99), fmt.Sprintf("ms, 99th percentile, 2 nodes and %d pods", len(specs)))
	record("policy-enforce-latency", "policy-enforce-latency, median", n, 0, milliseconds(p50), fmt.Sprintf("ms, 2 nodes and %d pods", len(specs)))
}

// decision is one attempt of `tcpcheck decide`.
type decision struct {
	target, outcome string
	began, ended    time.Time
}

// prober is a pod that asks all the time whether it is let in.
type prober struct {
	stop func() []decision // ends it

	mu   sync.Mutex
	last map[string]time.Time // by target, when the last attempt began whose outcome is known
}

// decided waits, but not for ever, until every target has decided about an attempt that began after a time.
func (p *prober) decided(after time.Time, targets int) {
	for limit := time.Now().Add(2 * time.Second); time.Now().Before(limit); time.Sleep(5 * time.Millisecond) {
		p.mu.Lock()
		n := 0
		for _, t := range p.last {
			if t.After(after) {
				n++
			}
		}
		p.mu.Unlock()
		if n == targets {
			return
		}
	}
}

func probe(t *testing.T, ns, pod string, targets ...string) *prober {
	t.Helper()
	cmd := mesh.Command(context.WithoutCancel(t.Context()), append([]string{"-n", ns, "exec", "-i", pod, "--", tcpcheck, "decide"}, targets...)...)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	p := &prober{last: map[string]time.Time{}}
	var all []decision
	read := make(chan struct{})
	begun := make(chan struct{})
	go func() {
		defer close(read)
		for s := bufio.NewScanner(out); s.Scan(); {
			f := strings.Fields(s.Text())
			if len(f) != 4 {
				continue
			}
			began, e1 := strconv.ParseInt(f[1], 10, 64)
			ended, e2 := strconv.ParseInt(f[2], 10, 64)
			if e1 == nil && e2 == nil {
				all = append(all, decision{f[0], f[3], time.Unix(0, began), time.Unix(0, ended)})
				p.mu.Lock()
				p.last[f[0]] = time.Unix(0, began)
				p.mu.Unlock()
				if len(all) == 1 {
					close(begun)
				}
			}
		}
	}()
	p.stop = sync.OnceValue(func() []decision {
		in.Close()
		<-read
		if err := cmd.Wait(); err != nil {
			t.Errorf("the prober in %s: %v", pod, err)
		}
		return all
	})
	t.Cleanup(func() { p.stop() })
	select {
	case <-begun:
	case <-time.After(30 * time.Second):
		t.Fatalf("the prober in %s says nothing", pod)
	}
	return p
}

// flip is one change of the policy.
type flip struct {
	allows            bool // the client
	applied, enforced time.Time
}

// window is a time in which an agent was away.
type window struct{ from, to time.Time }

func (w window) touches(d decision) bool { return !d.ended.Before(w.from) && !d.began.After(w.to) }

// A policy is changed from one that lets a client in to one that keeps it out and back, again and again: once it
// says Enforced no connection is decided by what was before, and at no time is anybody let in whom neither admits.
func TestPolicyFlips(t *testing.T) {
	ns := namespace(t, "e2e-flips", ambient)
	who := func(name string) lab.PodSpec {
		return lab.PodSpec{Namespace: ns, Name: name, Account: name, Node: nodes[0], Args: []string{"sleep"}}
	}
	deploy(t, ns, true, who("client"), who("friend"), who("stranger"), server(ns, "near", nodes[0]), server(ns, "far", nodes[1]))
	var targets []string
	for _, s := range []string{"near", "far"} {
		targets = append(targets, s+"="+net.JoinHostPort(pod(t, ns, s).IP, "9000"))
	}
	p := watchPolicies(t, ns)
	states := []object{
		{"action": "ALLOW", "rules": from("principals", ns, "client", "friend")},
		{"action": "DENY", "rules": from("notPrincipals", ns, "friend")},
	}
	change := func(t *testing.T, state int) flip {
		f := flip{allows: state == 0, applied: time.Now()}
		generation, err := p.apply(t.Context(), "flip", states[state])
		must(t, err)
		f.enforced, err = p.enforced(t.Context(), "flip", generation, 2*time.Minute)
		must(t, err)
		return f
	}
	run := func(t *testing.T, name string, n, faultEvery int) {
		change(t, 1)
		probers := map[string]*prober{}
		for _, pod := range []string{"client", "friend", "stranger"} {
			probers[pod] = probe(t, ns, pod, targets...)
		}
		var flips []flip
		var away []window
		var faults sync.WaitGroup
		for i := range n {
			if faultEvery > 0 && i%faultEvery == faultEvery/2 {
				faults.Wait()
				node := nodes[i/faultEvery%2]
				away = append(away, window{from: time.Now()})
				faults.Go(func() {
					if err := crashAgent(t.Context(), node); err != nil {
						t.Error(err)
					}
					if err := awaitAgents(t.Context(), 2*time.Minute); err != nil {
						t.Error(err)
					}
					away[len(away)-1].to = time.Now()
				})
			}
			flips = append(flips, change(t, i%2))
			probers["client"].decided(flips[i].enforced, len(targets))
		}
		faults.Wait()
		end := time.Now()
		v, lasted := judge(probers["client"].stop(), probers["friend"].stop(), probers["stranger"].stop(), flips, away, end)
		t.Logf("%s: %d flips, %+v", name, n, v)
		row := "policy-flips"
		if faultEvery > 0 {
			row = fmt.Sprintf("policy-flips, an agent killed at each %dth", faultEvery)
		}
		record("policy-flips", row, n, v.Stale+v.OpenWindows+v.Shut, float64(v.Settled+v.Strangers+v.Friends), "decisions")
		record("policy-flips", name+": stale decisions after Enforced", v.Settled, v.Stale, float64(n), "flips")
		record("policy-flips", name+": let in whom no state of the policy admits", v.Strangers, v.OpenWindows, float64(n), "flips")
		record("policy-flips", name+": kept out whom every state admits", v.Friends, v.Shut, float64(n), "flips")
		if v.Stale+v.OpenWindows+v.Shut > 0 || v.Settled < n || len(v.By) < len(targets) {
			t.Errorf("%s: %d flips, %+v", name, n, v)
		}
		if faultEvery == 0 {
			record("policy-enforce-latency", "apply to the last connection decided by what was before, 99th percentile", n, 0, milliseconds(percentile(lasted, 99)), "ms")
		} else if len(away) == 0 {
			t.Error("no agent was killed")
		}
	}
	t.Run("steady", func(t *testing.T) { run(t, "agents run", size(150, 10000), 0) })
	t.Run("agents killed", func(t *testing.T) {
		ownCluster(t)
		run(t, "agents are killed", size(60, 10000), size(30, 200))
	})
}

// verdict is what became of the probes.
type verdict struct {
	Settled, Stale         int // decisions while one state was enforced and the next not yet applied; by another
	Strangers, OpenWindows int
	Friends, Shut          int
	Hung                   int
	By                     map[string]int // settled ones by target
	Examples               []string
}

// judge holds the decisions against the flips. lasted is, for each flip, the time from apply until the last decision
// by the state before.
func judge(client, friend, stranger []decision, flips []flip, away []window, end time.Time) (v verdict, lasted []time.Duration) {
	v = verdict{By: map[string]int{}}
	absent := func(d decision) bool {
		return slices.ContainsFunc(away, func(w window) bool { return w.touches(d) })
	}
	note := func(who string, d decision, why string) {
		if len(v.Examples) < 10 {
			v.Examples = append(v.Examples, fmt.Sprintf("%s to %s at %s +%s: %s, %s", who, d.target, d.began.Format("15:04:05.000"), d.ended.Sub(d.began), d.outcome, why))
		}
	}
	word := map[bool]string{true: "allowed", false: "denied"}
	lasted = make([]time.Duration, len(flips))
	for _, d := range client {
		i, _ := slices.BinarySearchFunc(flips, d.began, func(f flip, t time.Time) int { return f.applied.Compare(t) })
		i-- // the last one applied before the attempt began
		if i < 0 || d.outcome == "hung" {
			v.Hung += map[bool]int{true: 1}[d.outcome == "hung"]
			continue
		}
		f, next := flips[i], end
		if i+1 < len(flips) {
			next = flips[i+1].applied
		}
		if d.ended.After(next) {
			continue
		}
		wrong := d.outcome != word[f.allows]
		if wrong {
			lasted[i] = max(lasted[i], d.ended.Sub(f.applied))
		}
		if d.began.Before(f.enforced) || d.outcome == "denied" && absent(d) {
			continue // a connection that a killed agent carried ends with it
		}
		v.Settled++
		v.By[d.target]++
		if wrong {
			v.Stale++
			note("client", d, fmt.Sprintf("enforced %s before", d.began.Sub(f.enforced)))
		}
	}
	begin := flips[0].enforced
	for _, d := range stranger {
		if d.began.Before(begin) {
			continue
		}
		v.Strangers++
		if d.outcome == "allowed" {
			v.OpenWindows++
			note("stranger", d, "nothing admits it")
		}
	}
	for _, d := range friend {
		if d.began.Before(begin) || absent(d) {
			continue
		}
		v.Friends++
		if d.outcome != "allowed" {
			v.Shut++
			note("friend", d, "everything admits it")
		}
	}
	return v, lasted
}

func TestJudgeFindsWhatIsWrong(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	d := func(outcome string, from, to int) decision { return decision{"near", outcome, at(from), at(to)} }
	flips := []flip{{false, at(100), at(150)}, {true, at(200), at(250)}}
	client := []decision{
		d("allowed", 110, 120), // not enforced yet
		d("denied", 151, 160), d("allowed", 170, 180), d("allowed", 190, 210),
		d("denied", 251, 252), d("denied", 291, 299), d("hung", 260, 261),
	}
	v, lasted := judge(client, []decision{d("denied", 160, 161), d("denied", 295, 296)}, []decision{d("allowed", 120, 130), d("allowed", 160, 161), d("denied", 170, 171)},
		flips, []window{{at(290), at(300)}}, at(400))
	if v.Settled != 3 || v.Stale != 2 || v.OpenWindows != 1 || v.Strangers != 2 || v.Shut != 1 || v.Friends != 1 || v.Hung != 1 {
		t.Errorf("%+v", v)
	}
	if lasted[0] != 80*time.Millisecond || lasted[1] != 99*time.Millisecond {
		t.Errorf("the older state lasted %v", lasted)
	}
}

// Connections that were let in and would not be any more are ended within a second of the policy's change.
func TestOpenConnectionsAreCut(t *testing.T) {
	ns := namespace(t, "e2e-open", ambient)
	deploy(t, ns, true, client(ns, "client", nodes[0]), server(ns, "near", nodes[0]), server(ns, "far", nodes[1]))
	p := watchPolicies(t, ns)
	_, err := p.apply(t.Context(), "open", object{"rules": from("principals", ns, "client")})
	must(t, err)
	hold := size(20, 16_000) // a process has 20,000 descriptors here, and an agent takes no new connections when 17,500 are open
	for _, to := range []string{"near", "far"} {
		generation, err := p.apply(t.Context(), "open", object{"rules": from("principals", ns, "client")})
		must(t, err)
		_, err = p.enforced(t.Context(), "open", generation, time.Minute)
		must(t, err)
		report := startLoad(t, ns, "client", "-rate", "0", "-for", fmt.Sprint(size(10, 240), "s"), "-hold", fmt.Sprint(hold), "-every", fmt.Sprint(size(1, 20), "s"),
			"-timeout", "60s", net.JoinHostPort(pod(t, ns, to).IP, "9000"))
		cut := time.Now()
		generation, err = p.apply(t.Context(), "open", object{"rules": from("principals", ns, "somebody-else")})
		must(t, err)
		enforced, err := p.enforced(t.Context(), "open", generation, time.Minute)
		must(t, err)
		r := report()
		slowest := time.Duration(0)
		early := 0
		for _, ms := range r.HeldEnds {
			at := time.UnixMilli(ms)
			slowest = max(slowest, at.Sub(cut))
			if at.Before(cut.Truncate(time.Millisecond)) {
				early++
			}
		}
		missed := r.Held - len(r.HeldEnds) + r.HeldHung + early
		what := to + " server"
		if *long {
			what += ", thousands at once"
		}
		record("open-connections", what+": open connections that a policy no longer allows are cut, the slowest", r.Held, missed, milliseconds(slowest), "ms after apply")
		t.Logf("%s: enforced after %s, %d of %d cut, the last after %s", to, enforced.Sub(cut), len(r.HeldEnds), r.Held, slowest)
		if missed > 0 {
			t.Errorf("%s: %d of %d connections went on or ended too early: %+v", to, missed, r.Held, r)
		}
	}
}
