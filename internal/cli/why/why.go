package why

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/internal/cli/envoy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Node is what one node holds.
type Node struct {
	Name         string
	Mesh         *mesh.Snapshot
	Captured     map[string]bool   // workloads, by UID, that its agent carries
	Certificates map[string]string // state, by identity; "Available" is the good one
}

// Question is one connection.
type Question struct {
	Source string // the client workload's UID
	Dst    netip.AddrPort
	Client *Node                   // where the client runs
	Node   func(name string) *Node // nil where it cannot be asked
	// Waypoint is what the Envoy of a waypoint's pod holds; nil where it cannot be asked.
	Waypoint func(pod *mesh.Workload) *envoy.Config
	// Request is what is asked of a waypoint; its addresses and its client are filled in.
	Request envoy.Request
}

// Outcome is what becomes of the connection.
type Outcome string

// Outcomes.
const (
	Allowed Outcome = "allowed"
	Refused Outcome = "refused"
	Depends Outcome = "depends" // on which endpoint takes it
	Unknown Outcome = "unknown" // a node could not be asked
)

// Step is one thing that was looked at.
type Step struct {
	Stage  string `json:"stage"`  // capture, resolution, tunnel, policy, waypoint, route, agreement
	Node   string `json:"node"`   // whose state says so
	Result string `json:"result"` // ok, warning, refused
	What   string `json:"what"`
	Object string `json:"object,omitempty"` // that decided: kind namespace/name
	Rule   int    `json:"rule,omitempty"`   // of the object, from 1
	Hint   string `json:"hint,omitempty"`
}

// End is one place where the connection may arrive.
type End struct {
	Workload string      `json:"workload,omitempty"` // namespace/name
	Node     string      `json:"node,omitempty"`
	Way      string      `json:"way"` // hbone, waypoint, plaintext, passthrough, none
	Why      mesh.Reason `json:"why"`
	Verdict  mesh.Reason `json:"verdict,omitempty"`
	Outcome  Outcome     `json:"outcome"`
	Steps    []Step      `json:"steps"`
}

// Answer is the explanation.
type Answer struct {
	Outcome Outcome `json:"outcome"`
	Steps   []Step  `json:"steps"` // that hold whatever endpoint takes it
	Ends    []End   `json:"ends"`
}

// mostDraws bounds how many numbers are tried to find all endpoints.
const mostDraws = 1 << 14

// Explain answers a question.
func Explain(q Question) Answer {
	var a Answer
	src := q.Client.Mesh.Workload(q.Source)
	if src == nil {
		a.Outcome = Refused
		a.Steps = append(a.Steps, Step{Stage: "capture", Node: q.Client.Name, Result: "refused", What: "the node does not know the client " + q.Source,
			Hint: "see whether the agent is connected to the control plane: warren node-config workloads " + q.Client.Name})
		return a
	}
	captured := q.Client.Captured[src.UID]
	switch {
	case captured:
		a.Steps = append(a.Steps, Step{Stage: "capture", Node: q.Client.Name, Result: "ok", What: name(src) + " is captured; it connects as " + src.Identity.String()})
	case src.Tunnel == mesh.TunnelHBONE && !src.NativeTunnel:
		a.Steps = append(a.Steps, Step{Stage: "capture", Node: q.Client.Name, Result: "warning", What: "the mesh counts " + name(src) + " as captured, and its node does not carry it",
			Hint: "warren status says why a pod is pending"})
	default:
		a.Steps = append(a.Steps, Step{Stage: "capture", Node: q.Client.Name, Result: "warning", What: name(src) + " is not captured: it connects in plaintext and without an identity",
			Hint: "kubectl label namespace " + src.Namespace + " istio.io/dataplane-mode=ambient"})
	}
	for _, r := range routes(q.Client.Mesh, src, q.Dst) {
		if !captured && r.Why == mesh.WhyNotInRegistry { // what is not captured is not held back
			r = mesh.Route{Kind: mesh.RoutePassthrough, Dial: q.Dst, Why: mesh.WhyUnknown}
		}
		if !captured && r.Kind == mesh.RouteWaypoint {
			for _, r := range around(q.Client.Mesh, r, q.Dst) {
				a.Ends = append(a.Ends, q.end(src, r, captured))
			}
			continue
		}
		a.Ends = append(a.Ends, q.end(src, r, captured))
	}
	a.Outcome = together(a.Ends)
	return a
}

func together(ends []End) Outcome {
	out := ends[0].Outcome
	for _, e := range ends[1:] {
		if e.Outcome != out {
			return Depends
		}
	}
	return out
}

// routes are all ways that Resolve may take, one for each endpoint.
func routes(s *mesh.Snapshot, src *mesh.Workload, dst netip.AddrPort) []mesh.Route {
	if total, shares := s.Shares(src, dst); total > 0 {
		out := make([]mesh.Route, 0, len(shares))
		for _, sh := range shares {
			out = append(out, s.Resolve(src, dst, func(int) int { return sh.First }))
		}
		return out
	}
	n := 1
	var out []mesh.Route
	seen := map[string]bool{}
	for i := 0; i < min(n, mostDraws); i++ {
		r := s.Resolve(src, dst, func(of int) int { n = of; return i })
		k := r.Dial.String()
		if r.Workload != nil {
			k += r.Workload.UID
		}
		if !seen[k] {
			seen[k] = true
			out = append(out, r)
		}
	}
	return out
}

// around are the endpoints behind a waypoint, for a client that does not go through it.
func around(s *mesh.Snapshot, r mesh.Route, dst netip.AddrPort) []mesh.Route {
	if r.Service == nil {
		w := r.Workload
		for x := range s.Workloads() {
			if !x.HostNetwork && slices.Contains(x.Addrs, dst.Addr()) {
				w = x
			}
		}
		return []mesh.Route{{Kind: mesh.RouteDirect, Dial: dst, Workload: w, Why: mesh.WhyWorkload}}
	}
	var out []mesh.Route
	for w, ports := range s.Endpoints(r.Service.Name) {
		if !w.Healthy && !r.Service.LB.AllowUnhealthy || len(w.Addrs) == 0 {
			continue
		}
		target := uint16(0)
		for _, p := range slices.Concat(r.Service.Ports, ports) {
			if p.Port == dst.Port() && p.Target != 0 {
				target = p.Target
			}
		}
		if target != 0 {
			out = append(out, mesh.Route{Kind: mesh.RouteDirect, Dial: netip.AddrPortFrom(w.Addrs[0], target), Service: r.Service, Workload: w, Why: mesh.WhyEndpoint})
		}
	}
	if len(out) == 0 {
		return []mesh.Route{{Service: r.Service, Why: mesh.WhyNoEndpoint}}
	}
	return out
}

// end follows one route to its end.
func (q *Question) end(src *mesh.Workload, r mesh.Route, captured bool) End {
	e := End{Way: "none", Why: r.Why, Outcome: Allowed}
	here := q.Client.Name
	if r.Workload != nil {
		e.Workload, e.Node = name(r.Workload), r.Workload.Node
	}
	object := ""
	if r.Service != nil {
		object = "Service " + r.Service.Name.String()
	}
	add := func(s Step) {
		if s.Result == "refused" {
			e.Outcome = Refused
		}
		e.Steps = append(e.Steps, s)
	}
	switch r.Kind {
	case mesh.RouteRefuse:
		add(Step{Stage: "resolution", Node: here, Result: "refused", What: say(r.Why), Object: object, Hint: remedy(r.Why)})
		return e
	case mesh.RoutePassthrough:
		e.Way = "passthrough"
		add(Step{Stage: "resolution", Node: here, Result: "ok", What: say(r.Why) + ": plain TCP to " + r.Dial.String(), Object: object})
		return e
	case mesh.RouteWaypoint:
		e.Way = "waypoint"
		add(Step{Stage: "resolution", Node: here, Result: "ok", What: say(r.Why) + ", at " + r.Dial.String(), Object: object})
		q.tunnel(src, r, add)
		q.waypoint(src, r, &e, add)
		return e
	}
	app := r.Dial
	tunnelled := r.Kind == mesh.RouteHBONE && captured
	e.Way = "plaintext"
	if r.Kind == mesh.RouteHBONE {
		app = r.Authority
	}
	if tunnelled {
		e.Way = "hbone"
	}
	add(Step{Stage: "resolution", Node: here, Result: "ok", What: fmt.Sprintf("%s, %s at %s", say(r.Why), name(r.Workload), app), Object: object})
	if r.Why == mesh.WhyOwnPod {
		return e
	}
	if tunnelled {
		q.tunnel(src, r, add)
	}
	if r.Workload.NativeTunnel {
		add(Step{Stage: "policy", Node: r.Workload.Node, Result: "ok", What: name(r.Workload) + " ends the tunnel itself and decides by itself"})
		return e
	}
	if r.Kind == mesh.RouteDirect && r.Workload.Tunnel == mesh.TunnelNone {
		add(Step{Stage: "policy", Node: r.Workload.Node, Result: "ok", What: name(r.Workload) + " is not captured: no policy of the mesh applies at it"})
		return e
	}
	q.policy(src, r, app, tunnelled, &e, add)
	return e
}

// tunnel looks at what the two ends need to trust each other.
func (q *Question) tunnel(src *mesh.Workload, r mesh.Route, add func(Step)) {
	id := src.Identity.String()
	if state, ok := q.Client.Certificates[id]; q.Client.Certificates != nil && (!ok || state != "Available") {
		if !ok {
			state = "missing"
		}
		add(Step{Stage: "tunnel", Node: q.Client.Name, Result: "refused", What: "the client's certificate is " + strings.ToLower(state) + ": " + id,
			Hint: "warren node-config certificates " + q.Client.Name})
	}
	far := q.Node(r.Workload.Node)
	if far == nil {
		return
	}
	if w := far.Mesh.Workload(r.Workload.UID); w != nil && !slices.Contains(r.Want, w.Identity.String()) {
		add(Step{Stage: "tunnel", Node: far.Name, Result: "refused", What: "the far end is " + w.Identity.String() + ", and the client's node expects " + strings.Join(r.Want, " or "),
			Hint: "the two nodes have different states: warren status says which are behind"})
	}
	if r.Workload.NativeTunnel {
		return
	}
	want := r.Workload.Identity.String()
	if state, ok := far.Certificates[want]; far.Certificates != nil && (!ok || state != "Available") {
		if !ok {
			state = "missing"
		}
		add(Step{Stage: "tunnel", Node: far.Name, Result: "refused", What: "the server's certificate is " + strings.ToLower(state) + ": " + want,
			Hint: "warren node-config certificates " + far.Name})
	}
}

// policy asks the far node.
func (q *Question) policy(src *mesh.Workload, r mesh.Route, app netip.AddrPort, tunnelled bool, e *End, add func(Step)) {
	far := q.Node(r.Workload.Node)
	if far == nil {
		e.Outcome = Unknown
		e.Steps = append(e.Steps, Step{Stage: "policy", Node: r.Workload.Node, Result: "warning", What: "the node's agent could not be asked"})
		return
	}
	if !far.Captured[r.Workload.UID] {
		if tunnelled {
			add(Step{Stage: "tunnel", Node: far.Name, Result: "refused", What: "others reach " + name(r.Workload) + " through the tunnel, and its node does not carry it",
				Hint: "warren status says why a pod is pending"})
			return
		}
		add(Step{Stage: "policy", Node: far.Name, Result: "warning", What: "its node does not carry " + name(r.Workload) + ": no policy applies at it", Hint: "warren status says why a pod is pending"})
		return
	}
	c := mesh.Conn{SourceIP: address(src, app.Addr()), Dst: app, DstWorkload: r.Workload, Plaintext: !tunnelled}
	if tunnelled {
		c.Source = src.Identity
	}
	v := far.Mesh.Authorize(c)
	e.Verdict = v.Why
	s := Step{Stage: "policy", Node: far.Name, Result: "ok", What: say(v.Why)}
	if v.By != (mesh.PolicyName{}) {
		s.Object, s.Rule = decided(far.Mesh, v, c)
	}
	if !v.Allow {
		s.Result = "refused"
		s.What, s.Hint = refusal(far.Mesh, v, c, r.Workload)
	}
	add(s)
	for _, d := range v.DryRun {
		if !d.Allow {
			e.Steps = append(e.Steps, Step{Stage: "policy", Node: far.Name, Result: "warning", What: "a dry run would refuse it", Object: "AuthorizationPolicy " + d.Policy.String()})
		}
	}
	if near := q.Client.Mesh.Authorize(c); near.Allow != v.Allow || near.By != v.By {
		e.Steps = append(e.Steps, Step{Stage: "agreement", Node: q.Client.Name, Result: "warning",
			What: fmt.Sprintf("the client's node would say %s%s: one of the two has not the newest state", near.Why, by(near)), Hint: "warren status names nodes that policies wait for"})
	}
}

func by(v mesh.Verdict) string {
	if v.By == (mesh.PolicyName{}) {
		return ""
	}
	return " by " + v.By.String()
}

// decided names the object behind a verdict and the rule of it that matched.
func decided(s *mesh.Snapshot, v mesh.Verdict, c mesh.Conn) (object string, rule int) {
	if v.By.OfPeerAuthentication() {
		return "PeerAuthentication, as " + v.By.String(), 0
	}
	object = "AuthorizationPolicy " + v.By.String()
	p := s.Policy(v.By)
	if p == nil {
		return object, 0
	}
	for i := range p.Rules {
		one := mesh.Policy{Rules: p.Rules[i : i+1]}
		if one.Matches(c) {
			return object, i + 1
		}
	}
	return object, 0
}

// refusal says why a connection may not be, and what would let it.
func refusal(s *mesh.Snapshot, v mesh.Verdict, c mesh.Conn, w *mesh.Workload) (what, hint string) {
	who := c.Source.String()
	if c.Source.IsZero() {
		who = "without an identity, from " + c.SourceIP.String()
	}
	switch {
	case v.Why == mesh.WhyDenied && v.By.OfPeerAuthentication():
		return "STRICT: plaintext is refused", "put the client into the mesh, or write PERMISSIVE for port " + fmt.Sprint(c.Dst.Port())
	case v.Why == mesh.WhyDenied:
		return "denied, " + who, "change the policy, or exempt the client in it"
	case v.Why == mesh.WhyNoAllow:
		var names []string
		list, _ := s.PoliciesOf(w)
		for p := range list {
			if p.Action == mesh.Allow && !p.DryRun {
				names = append(names, p.Name.String())
			}
		}
		return "no ALLOW policy matches, " + who + "; there are " + strings.Join(names, ", "), "add a rule with this source to one of them"
	}
	return say(v.Why) + by(v), ""
}

func address(w *mesh.Workload, like netip.Addr) netip.Addr {
	for _, a := range w.Addrs {
		if a.Is4() == like.Is4() {
			return a
		}
	}
	if len(w.Addrs) > 0 {
		return w.Addrs[0]
	}
	return netip.Addr{}
}

func name(w *mesh.Workload) string {
	if w == nil {
		return "nobody"
	}
	return w.Namespace + "/" + w.Name
}

// words says reasons in a sentence.
var words = map[mesh.Reason]string{
	mesh.WhyNoState: "the client's node knows nothing of the mesh yet", mesh.WhyUnknown: "the address is not in the mesh",
	mesh.WhyNotInRegistry: "the mesh does not know the address, and pods may reach only what it knows (outboundTrafficPolicy REGISTRY_ONLY)",
	mesh.WhyHostAddress:   "a host of the cluster has the address",
	mesh.WhyOwnPod:        "the client is its own server", mesh.WhyServicePassthru: "the service asks for the address itself",
	mesh.WhyHostNetwork: "on its node's network, without a tunnel", mesh.WhyNotCaptured: "an endpoint without a tunnel",
	mesh.WhyEndpoint: "an endpoint of the service", mesh.WhyWorkload: "the pod that was asked for",
	mesh.WhyServiceWaypoint: "the waypoint of the service", mesh.WhyWorkloadWaypoint: "the waypoint of the pod",
	mesh.WhyNoPort: "the service has no such port", mesh.WhyNoEndpoint: "no endpoint serves the port",
	mesh.WhyNoHealthy: "none of the endpoints is ready", mesh.WhyNoLocal: "no endpoint is where the service's traffic policy demands",
	mesh.WhyOtherNetwork: "all endpoints are on a network of their own", mesh.WhyWaypointMissing: "a waypoint is bound and is not there",
	mesh.WhyWaypointNotTunnel: "the waypoint does not take the tunnel", mesh.WhyNoIdentity: "nobody could be expected at the far end: it has no identity",
	mesh.WhyNoPolicy: "no policy applies", mesh.WhyAllowed: "allowed", mesh.WhyDenied: "denied", mesh.WhyNoAllow: "no ALLOW policy matches",
	mesh.WhyPolicyMissing: "a policy that applies is not on the node, which denies", mesh.WhyNoWorkload: "the node does not know the pod, which denies",
	mesh.WhyStateMissing: "the server's node knows nothing of the mesh yet, which denies",
}

func say(r mesh.Reason) string {
	if s := words[r]; s != "" {
		return s
	}
	return string(r)
}

func remedy(r mesh.Reason) string {
	switch r {
	case mesh.WhyNoState:
		return "see whether the agent reaches the control plane: kubectl -n istio-system logs -l app=ztunnel"
	case mesh.WhyNotInRegistry:
		return "declare it by a ServiceEntry with this address"
	case mesh.WhyNoPort:
		return "compare the port with the service's: warren node-config services"
	case mesh.WhyNoEndpoint, mesh.WhyNoHealthy, mesh.WhyNoLocal:
		return "kubectl get endpointslices, and the readiness of the pods behind it"
	case mesh.WhyWaypointMissing, mesh.WhyWaypointNotTunnel:
		return "kubectl get gateways -A, or take the label istio.io/use-waypoint away"
	}
	return ""
}
