package index

import (
	"fmt"
	"slices"
	"strings"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// KeyState is what came of fetching a key set.
type KeyState struct {
	Keys    string // as of the last success; "" for none yet
	Problem string // of the last attempt
}

// requestFact is a RequestAuthentication compiled for waypoints. Nodes see no tokens.
type requestFact struct {
	key
	uid        string
	generation int64
	policy.Tokens
}

func (c *compiled) requestFactOf(p *securityv1.RequestAuthentication) *requestFact {
	return &requestFact{keyOf(p), string(p.UID), p.Generation, c.PolicyMesh().CompileTokens(p)}
}

func (x *Index) setRequestAuth(k key, f *requestFact) {
	old := put(x.requests, k, f)
	x.dirtyStates[PolicyKey{RequestAuthentication, k.Namespace, k.Name}] = struct{}{}
	for _, r := range []*requestFact{old, f} {
		if r != nil {
			x.touchRequest(r)
		}
	}
	x.keys.use(old.sources(), f.sources())
}

// sources are where the keys of the rules of a RequestAuthentication are fetched from that a waypoint or a gateway may need.
func (f *requestFact) sources() []policy.KeySource {
	if f == nil {
		return nil
	}
	var out []policy.KeySource
	for _, r := range f.Rules {
		if r.From != (policy.KeySource{}) {
			out = append(out, r.From)
		}
	}
	return out
}

func (x *Index) touchRequest(f *requestFact) {
	x.touchTargets(f.Namespace, f.Targets)
}

// SetKeys records what came of fetching a key set. One that nobody needs any more is fine.
func (x *Index) SetKeys(from policy.KeySource, s KeyState) {
	if !x.keys.set(from, s) {
		return
	}
	for _, all := range x.requests {
		for _, f := range all {
			if slices.Contains(f.sources(), from) {
				x.dirtyStates[PolicyKey{RequestAuthentication, f.Namespace, f.Name}] = struct{}{}
				x.touchRequest(f)
			}
		}
	}
}

// keySources are the key sets that are needed, sorted.
func (x *Index) keySources() []policy.KeySource {
	return x.keys.wanted(func(a, b policy.KeySource) int { return strings.Compare(a.URL, b.URL) })
}

// tokenRules are the rules of a RequestAuthentication with the keys that there are.
func (x *Index) tokenRules(f *requestFact) []mesh.TokenRule {
	out := make([]mesh.TokenRule, 0, len(f.Rules))
	for _, r := range f.Rules {
		if r.From != (policy.KeySource{}) {
			r.Keys = x.keys.state[r.From].Keys
		}
		out = append(out, r.TokenRule)
	}
	return out
}

// noTokens is what becomes of tokens where no waypoint looks at them.
const noTokens = "tokens are of HTTP, which only a waypoint sees; AuthorizationPolicies that ask for requestPrincipals deny meanwhile"

func (x *Index) requestState(f *requestFact) *PolicyState {
	s := &PolicyState{UID: f.uid, Generation: f.generation, Reason: policy.ReasonNoWaypoint, Message: noTokens}
	waypoints, guards, without := x.decidedAt(f.Namespace, f.Targets)
	elsewhere := ""
	if len(f.Targets) == 0 {
		if waypoints = x.boundGateways(f.untargeted()); len(waypoints) == 0 {
			s.Message += ". For a waypoint write targetRefs"
			return s
		}
		if !x.gatewaysAlone(f.Selector) {
			elsewhere = "gateways alone verify them: elsewhere " + noTokens
		}
	}
	if len(waypoints) == 0 {
		x.misses(f.Namespace, f.Targets, s)
		return s
	}
	s.Waypoints, s.Compiled, s.Exact, s.Reason, s.Message = waypoints, guards, true, "", elsewhere
	not := func(reason, message string) {
		s.Exact, s.Reason, s.Message = false, reason, strings.TrimPrefix(s.Message+"; "+message, "; ")
	}
	var late []string
	for _, from := range f.sources() {
		k := x.keys.state[from]
		text := from.URL + ": " + k.Problem
		switch {
		case k.Keys == "" && k.Problem == "":
			text = from.URL + " is being fetched"
			fallthrough
		case k.Keys == "":
			not(policy.ReasonNoKeys, "no token of it is valid: "+text)
		case k.Problem != "":
			late = append(late, text)
		}
	}
	if len(f.Problems) > 0 {
		not(policy.ReasonUnsupported, strings.Join(f.Problems[:min(len(f.Problems), 5)], "; "))
	}
	if len(without) > 0 {
		not(policy.ReasonNoWaypoint, fmt.Sprintf("no waypoint is in front of %s, where nobody looks at tokens", strings.Join(without, ", ")))
	}
	if s.Exact && len(late) > 0 {
		s.Message = strings.TrimPrefix(s.Message+"; ", "; ") + "the keys fetched before are kept, because the last attempt failed: " + strings.Join(late, "; ")
	}
	return s
}
