package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// grace is how long rows stay after the last gate has let go of their ruleset: a program that read the gate before
// still reads them. It runs for microseconds; this allows for one that the scheduler took off the CPU.
const grace = 5 * time.Second

// table is a kernel map of which the agent knows what is in it.
type table[K, V comparable] struct {
	name string
	m    *ebpf.Map
	have map[K]V
	gone map[K]time.Time // since when nobody wants it
}

func newTable[K, V comparable](name string, m *ebpf.Map) *table[K, V] {
	return &table[K, V]{name: name, m: m, have: map[K]V{}, gone: map[K]time.Time{}}
}

// read is what the kernel has.
func (t *table[K, V]) read() (map[K]V, error) {
	out := map[K]V{}
	var k K
	var v V
	it := t.m.Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read %s: %w", t.name, err)
	}
	return out, nil
}

func (t *table[K, V]) put(k K, v V) error {
	delete(t.gone, k)
	if old, ok := t.have[k]; ok && old == v {
		return nil
	}
	if err := t.m.Put(k, v); err != nil {
		return fmt.Errorf("write %s: %w", t.name, err)
	}
	t.have[k] = v
	return nil
}

func (t *table[K, V]) putAll(rows map[K]V) error {
	for k, v := range rows {
		if err := t.put(k, v); err != nil {
			return err
		}
	}
	return nil
}

// putOrRemove writes rows that may be missing, but not be others. It returns how many are missing for want of room.
func (t *table[K, V]) putOrRemove(rows map[K]V) (missing int, err error) {
	for k, v := range rows {
		if t.put(k, v) == nil {
			continue
		}
		if err := t.remove(k); err != nil {
			return missing, err
		}
		missing++
	}
	return missing, nil
}

// keep removes all rows but those of the keys in wanted.
func (t *table[K, V]) keep(wanted map[K]V) error {
	for k := range t.have {
		if _, ok := wanted[k]; !ok {
			if err := t.remove(k); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *table[K, V]) remove(k K) error {
	if err := t.m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove from %s: %w", t.name, err)
	}
	delete(t.have, k)
	delete(t.gone, k)
	return nil
}

// sweep removes what nobody has wanted for longer than the grace.
func (t *table[K, V]) sweep(wanted func(K) bool, now time.Time) error {
	for k := range t.have {
		if wanted(k) {
			delete(t.gone, k)
		} else if since, ok := t.gone[k]; !ok {
			t.gone[k] = now
		} else if now.Sub(since) > grace {
			if err := t.remove(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// compare reads the kernel's rows and makes them what is known. It returns how many were not as they should be.
func (t *table[K, V]) compare() (drift int, err error) {
	now, err := t.read()
	if err != nil {
		return 0, err
	}
	for k, v := range t.have {
		if got, ok := now[k]; !ok || got != v {
			drift++
		}
	}
	for k := range now {
		if _, ok := t.have[k]; !ok {
			drift++
		}
	}
	t.have = now
	return drift, nil
}

// gatekeeper is the policies in the kernel: what is wanted, what is there, and how the one becomes the other.
type gatekeeper struct {
	rulesets   *table[uint64, bpf.MeshRuleset]
	identities *table[bpf.MeshRulesIdentity, bpf.MeshWords]
	ports      *table[bpf.MeshRulesPort, bpf.MeshWords]
	sources    *table[bpf.MeshRulesSource, bpf.MeshWords]
	gates      *table[uint32, bpf.MeshGate]
	udp        datagrams
	services   services

	compiler *compiler      // of the last Snapshot; nil before there is one
	applied  *mesh.Snapshot // what the kernel decides by; nil where that failed
	read     bool           // the tables know what an earlier process left
	wanted   rules
	told     string // the problems that were logged
}

func newGatekeeper(k *bpf.MeshObjects) *gatekeeper {
	return &gatekeeper{
		rulesets:   newTable[uint64, bpf.MeshRuleset]("rulesets", k.Rulesets),
		identities: newTable[bpf.MeshRulesIdentity, bpf.MeshWords]("rules_identities", k.RulesIdentities),
		ports:      newTable[bpf.MeshRulesPort, bpf.MeshWords]("rules_ports", k.RulesPorts),
		sources:    newTable[bpf.MeshRulesSource, bpf.MeshWords]("rules_sources", k.RulesSources),
		gates:      newTable[uint32, bpf.MeshGate]("gates", k.Gates),
		udp:        newDatagrams(k),
		services:   newServices(k),
	}
}

// compare compares all tables with the kernel's.
func (g *gatekeeper) compare() (drift map[string]int, err error) {
	drift = map[string]int{}
	for _, t := range []struct {
		name    string
		compare func() (int, error)
	}{{g.gates.name, g.gates.compare}, {g.rulesets.name, g.rulesets.compare}, {g.identities.name, g.identities.compare},
		{g.ports.name, g.ports.compare}, {g.sources.name, g.sources.compare},
		{g.udp.gates.name, g.udp.gates.compare}, {g.udp.sources.name, g.udp.sources.compare},
		{g.services.ports.name, g.services.ports.compare}, {g.services.draws.name, g.services.draws.compare}} {
		n, err := t.compare()
		if err != nil {
			return nil, err
		}
		if n > 0 {
			drift[t.name] = n
		}
	}
	return drift, nil
}

// write puts a ruleset into the kernel. Its head comes last: until then the kernel does not find it.
func (g *gatekeeper) write(r *ruleset) error {
	return errors.Join(g.ports.putAll(r.ports), g.sources.putAll(r.sources), g.identities.putAll(r.identities),
		g.rulesets.put(r.id, r.head))
}

// sweep removes the rows that nobody wants any more.
func (g *gatekeeper) sweep(now time.Time) error {
	wanted := func(id uint64) bool { return g.wanted.sets[id] != nil || g.udp.kept[id] }
	return errors.Join(
		g.rulesets.sweep(wanted, now),
		g.ports.sweep(func(k bpf.MeshRulesPort) bool { return wanted(k.Rules) }, now),
		g.sources.sweep(func(k bpf.MeshRulesSource) bool { return wanted(uint64(k.Rules[0]) | uint64(k.Rules[1])<<32) }, now),
		g.identities.sweep(func(k bpf.MeshRulesIdentity) bool {
			return g.udp.kept[k.Rules] || wanted(k.Rules) && g.wanted.knows(k.Rules, k.Identity)
		}, now),
	)
}

// SetPolicies makes the kernel decide by a Snapshot: connections between pods of this node when they are made, and
// plaintext from outside when it arrives. What the kernel cannot hold is left to the agent, and logged; so is every
// connection to a pod that Enroll was not told the workload and identity of. An error means that s is not in force.
//
// A connection is decided by the old policies or by the new ones, whole: a ruleset is complete before the gate that
// names it is written, in one exchange, and an old one goes some time after. When SetPolicies returns, whatever is
// decided is decided by s, and direct connections that it does not allow are reset.
func (d *Datapath) SetPolicies(s *mesh.Snapshot) error {
	if err := d.write(); err != nil {
		return err
	}
	defer d.mu.Unlock()
	if s.Revision() == 0 {
		return nil // nothing is known: what an earlier process knew holds
	}
	g := d.gates
	same := g.applied != nil && d.unaffected(g.applied, s)
	drawn := same && g.services.unaffected(g.applied, s)
	g.compiler = newCompiler(s, g.wanted.sets)
	strangers := g.udp.follow(s, d.asksForUDP(s))
	g.applied = nil
	if same && !strangers {
		if err := d.applySources(); err != nil {
			return err
		}
		if !drawn {
			if err := d.applyServices(); err != nil {
				return err
			}
			g.tell(d.cfg.Log)
		}
	} else if err := errors.Join(d.applyPolicies(), d.recheck(s)); err != nil {
		return err
	}
	g.applied = s
	return nil
}

// unaffected reports whether nothing has changed between two Snapshots that the kernel's policies depend on. Most changes
// are other nodes' pods.
func (d *Datapath) unaffected(old, now *mesh.Snapshot) bool {
	if !old.Config().Equal(now.Config()) {
		return false
	}
	local := make(map[string]bool, len(d.given))
	for _, p := range d.given {
		local[p.Workload] = true
	}
	workloads, services, policies := now.Changes(old)
	for c := range workloads {
		if c.Old != nil && local[c.Old.UID] || c.New != nil && local[c.New.UID] {
			return false
		}
	}
	for range services {
		return false
	}
	for range policies {
		return false
	}
	return true
}

// applyPolicies brings the kernel's policies into line with the last Snapshot and the pods that are enrolled.
func (d *Datapath) applyPolicies() error {
	g := d.gates
	if g.compiler == nil {
		return nil
	}
	if !g.read {
		if _, err := g.compare(); err != nil {
			return err
		}
		g.read = true
		g.udp.touchAll()
	}
	pods := slices.Collect(maps.Values(d.given))
	g.udp.follow(g.compiler.s, d.asksForUDP(g.compiler.s))
	g.compiler.remote = g.udp.known
	g.wanted = g.compiler.desired(pods, d.canReset)
	var errs []error
	broken := map[uint64]bool{}
	for id, set := range g.wanted.sets {
		if err := g.write(set); err != nil {
			broken[id] = true
			g.wanted.problems = append(g.wanted.problems, fmt.Errorf("policies of %d terms: %w", len(set.compiled.Terms), err))
		}
	}
	gates := map[uint32]bpf.MeshGate{}
	for uid, r := range d.pods {
		want := g.wanted.pods[uid]
		if err := d.setIdentity(uid, r, want.identity); err != nil {
			errs = append(errs, err)
		}
		for _, id := range []*uint64{&want.v4, &want.v6} {
			if broken[*id] {
				*id = 0
			}
		}
		if want.v4|want.v6 != 0 {
			gates[r.pod.Slot] = bpf.MeshGate{V4: want.v4, V6: want.v6, Flags: want.flags, Slot: r.pod.Slot}
		}
	}
	errs = append(errs, g.gates.putAll(gates))
	for slot := range g.gates.have {
		if _, ok := gates[slot]; !ok {
			errs = append(errs, g.gates.remove(slot))
		}
	}
	errs = append(errs, d.applyUDP(broken), d.applyServices())
	if err := g.sweep(time.Now()); err != nil {
		g.wanted.problems = append(g.wanted.problems, err)
	}
	d.index.Store(newEventIndex(d, g))
	g.tell(d.cfg.Log)
	return errors.Join(errs...)
}

// tell logs what is left to the agent, once.
func (g *gatekeeper) tell(log *slog.Logger) {
	text := ""
	if err := errors.Join(append(slices.Clip(g.wanted.problems), g.services.problems...)...); err != nil {
		text = err.Error()
	}
	if text != g.told && text != "" {
		log.Warn("the kernel leaves connections to the agent", "why", text)
	}
	g.told = text
}

// setIdentity tells the connect hook who a pod is.
func (d *Datapath) setIdentity(uid string, r record, id uint64) error {
	if r.pod.Identity == id {
		return nil
	}
	r.pod.Identity = id
	if err := d.kernel.Pods.Put(r.cookie, r.pod); err != nil {
		return fmt.Errorf("enter the identity of pod %s: %w", uid, err)
	}
	d.pods[uid] = r
	return nil
}

// closeGate forgets the policies of a pod: from then on the agent decides. A slot that is given to another pod has no
// gate of the one before.
func (d *Datapath) closeGate(slot uint32) error {
	return d.gates.gates.remove(slot)
}
