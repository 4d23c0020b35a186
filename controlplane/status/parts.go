package status

import (
	"maps"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/controlplane/xds"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/revision"
)

// Where there are control planes of several revisions, each knows of its own waypoints and gateways alone what they do, and the
// default one of nodes. Each of the others writes a condition of its own on the policies that its waypoints have to enforce,
// and the default one takes it for theirs.

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

// parts are the revisions that tell waypoints of an object, beside this control plane's.
func (p *Policies) parts(s *index.PolicyState) map[string]bool {
	out := map[string]bool{}
	for _, w := range s.Waypoints {
		if r := p.elsewhere(w); r != "" {
			out[r] = true
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
		parts = p.parts(e.state)
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
	var pending, refusing []string
	why := ""
	ways := p.waypoints(e, &pending, &refusing, &why)
	c := condition{Type: partPrefix + p.cfg.Revision, Status: string(metav1.ConditionTrue), Reason: reasonEnforced, Message: strings.TrimPrefix(ways.text, ", ")}
	if ways.own == 0 {
		return []condition{}, c.Type, true
	}
	c.lack(reasonPending, "waiting for", pending)
	c.lack(reasonRefused, "refused by", refusing)
	if why != "" {
		c.Message += "; " + why
	}
	return []condition{c}, c.Type, ways.done
}

// others adds to what waypoints do what control planes of other revisions say of theirs.
func (p *Policies) others(s *index.PolicyState, o Object, ways *atWaypoints, pending, refusing *[]string, why *string) {
	for _, rev := range slices.Sorted(maps.Keys(p.parts(s))) {
		of := "the control plane of revision " + rev
		c := find(o.Conditions, partPrefix+rev)
		switch {
		case c == nil || c.ObservedGeneration != o.Generation:
			*pending = append(*pending, of)
		case c.Status == string(metav1.ConditionTrue):
			ways.text += ", " + c.Message + " (" + of + ")"
			continue
		case c.Reason == reasonRefused:
			*refusing = append(*refusing, of)
			*why = first(*why, of+" says: "+short(c.Message))
		default:
			*pending = append(*pending, of)
			*why = first(*why, of+" says: "+short(c.Message))
		}
		ways.done = false
	}
}

// Again has all objects looked at: other control planes tell other waypoints now.
func (p *Policies) Again() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.entries {
		p.look(k)
	}
}
