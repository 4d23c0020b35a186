package status

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

// Where there are control planes of several revisions, each knows of those waypoints, gateways and nodes alone what they do that
// ask it. Each but the default one writes a condition of its own on the policies that they have to enforce, and the default one
// takes it for theirs.

// elsewhere names the revision of another control plane that tells a waypoint; "" for this one.
func (p *Policies) elsewhere(waypoint mesh.ServiceName) string {
	if p.cfg.Owner == nil {
		return ""
	}
	if r := p.cfg.Owner(waypoint); r != p.cfg.Revision {
		return r
	}
	return ""
}

// asking tells nodes that ask this control plane from those that ask others, which it counts by revision.
func (p *Policies) asking(nodes nodeCount) (home []string, away map[string]int) {
	var elsewhere map[string]string
	if p.cfg.Away != nil {
		elsewhere = p.cfg.Away()
	}
	away = map[string]int{}
	for _, node := range nodes.names() {
		switch rev := cmp.Or(elsewhere[node], revision.Default); {
		case rev == p.cfg.Revision || p.cfg.Owner == nil:
			home = append(home, node)
		default:
			away[rev]++
		}
	}
	return home, away
}

// parts are the revisions that tell waypoints or nodes of an object, beside this control plane's.
func (p *Policies) parts(k index.PolicyKey, s *index.PolicyState) map[string]bool {
	out := map[string]bool{}
	for _, w := range s.Waypoints {
		if r := p.elsewhere(w); r != "" {
			out[r] = true
		}
	}
	if p.cfg.Away != nil && len(p.cfg.Away()) > 0 {
		_, away := p.asking(p.concerned(k, s))
		for rev := range away {
			out[rev] = true
		}
	}
	return out
}

// secondary reports whether this control plane is another than the one that the nodes ask.
func (p *Policies) secondary() bool { return p.cfg.Owner != nil && p.cfg.Revision != revision.Default }

// ours tells by its type whether a condition of an object is this control plane's to write. The default one takes away what is
// left of others.
func (p *Policies) ours(k index.PolicyKey) func(kind string) bool {
	if p.secondary() {
		return func(kind string) bool { return kind == partPrefix+p.cfg.Revision }
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var parts map[string]bool
	if e := p.entries[k]; e != nil {
		parts = p.parts(k, e.state)
	}
	return func(kind string) bool {
		rev, part := strings.CutPrefix(kind, partPrefix)
		return slices.Contains(ownConditions, kind) || part && !parts[rev]
	}
}

// says is what this control plane has to say about an object, and which condition of that tells whether it is enforced.
func (p *Policies) says(k index.PolicyKey, e *entry, o Object, nodes map[string]xds.Progress) (want []condition, said string, done bool) {
	if !p.secondary() {
		c, done := p.enforced(k, e, o, nodes)
		return append(accepted(k, e.state, o), c), c.Type, done
	}
	home, _ := p.asking(p.concerned(k, e.state))
	on := p.onNodes(e, home, nodes)
	ways := p.waypoints(e, &on.pending, &on.refusing, &on.why)
	c := condition{Type: partPrefix + p.cfg.Revision, Status: string(metav1.ConditionTrue), Reason: reasonEnforced, Message: strings.TrimPrefix(ways.text, ", ")}
	if ways.own+len(home) == 0 {
		return []condition{}, c.Type, true
	}
	if len(home) > 0 {
		c.Message = fmt.Sprintf("%d/%d nodes at revision %d", on.n, len(home), on.revision) + ways.text
	}
	on.tell(&c)
	return []condition{c}, c.Type, on.n == len(home) && ways.done
}

// others adds to what waypoints and nodes do what control planes of other revisions say of theirs. It returns how many of the
// nodes that are away do it.
func (p *Policies) others(k index.PolicyKey, s *index.PolicyState, o Object, away map[string]int, ways *atWaypoints, on *onNodes) (n int) {
	for _, rev := range slices.Sorted(maps.Keys(p.parts(k, s))) {
		of := "the control plane of revision " + rev
		c := find(o.Conditions, partPrefix+rev)
		switch {
		case c == nil || c.ObservedGeneration != o.Generation:
			on.pending = append(on.pending, of)
		case c.Status == string(metav1.ConditionTrue):
			ways.text += ", " + atRevision.ReplaceAllString(c.Message, "") + " (" + of + ")"
			n += away[rev]
			continue
		case c.Reason == reasonRefused:
			on.refusing = append(on.refusing, of)
			on.why = first(on.why, of+" says: "+short(c.Message))
		default:
			on.pending = append(on.pending, of)
			on.why = first(on.why, of+" says: "+short(c.Message))
		}
		ways.done = false
	}
	return n
}

// Again has all objects looked at: other control planes tell other waypoints now.
func (p *Policies) Again() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.entries {
		p.look(k)
	}
}
