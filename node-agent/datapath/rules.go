package datapath

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
)

// maxRows bounds what one ruleset takes of the tables that all share.
const maxRows = 4096

var errTooManyRows = fmt.Errorf("the policies that apply name more than %d ports and source prefixes, more than the kernel takes", maxRows)

// ruleset is one workload's policies as the kernel has them. It depends on nothing but what they say, so its
// number, a hash, names it for ever, in the agent's successor as well. The rows of identities come and go with the
// node's pods.
type ruleset struct {
	id         uint64
	digest     [sha256.Size]byte
	compiled   *mesh.Compiled
	head       bpf.MeshRuleset
	ports      map[bpf.MeshRulesPort]bpf.MeshWords
	sources    map[bpf.MeshRulesSource]bpf.MeshWords
	identities map[bpf.MeshRulesIdentity]bpf.MeshWords
}

// rules is everything that the kernel is to know of policies: a function of a Snapshot and the node's pods.
type rules struct {
	sets       map[uint64]*ruleset
	pods       map[string]podRules // by UID; who is missing has no gate and no identity
	identities map[uint64]mesh.Identity
	udp        map[string]udpRules // by UID, of the pods that ask for it
	udpSets    map[uint64]bool     // the rulesets of these, which know the identities of the whole mesh
	remote     map[uint64]mesh.Identity
	problems   []error // what is left to the agent and why
}

// knows reports whether a ruleset has a row for an identity.
func (r *rules) knows(set, identity uint64) bool {
	_, here := r.identities[identity]
	if !here && r.udpSets[set] {
		_, here = r.remote[identity]
	}
	return here || identity == 0
}

type podRules struct {
	identity uint64
	v4, v6   uint64 // rulesets
	flags    bpf.MeshGateFlags
}

// idOf numbers an identity. 0 is who has none.
func idOf(i mesh.Identity) uint64 {
	if i.IsZero() {
		return 0
	}
	sum := sha256.Sum256([]byte(i.String()))
	return number(sum)
}

func number(sum [sha256.Size]byte) uint64 {
	return max(binary.LittleEndian.Uint64(sum[:]), 1)
}

// compiler keeps what was compiled of one Snapshot: pods of one workload kind share their policies.
type compiler struct {
	s      *mesh.Snapshot
	before map[uint64]*ruleset   // of the Snapshot before: most are the same again
	remote map[mesh.Identity]int // who sends datagrams from elsewhere, see addresses
	done   map[string]compiledOrError
}

type compiledOrError struct {
	set *ruleset
	err error
}

func newCompiler(s *mesh.Snapshot, before map[uint64]*ruleset) *compiler {
	return &compiler{s: s, before: before, done: map[string]compiledOrError{}}
}

// ruleset compiles the policies of a workload for connections to one of its addresses, or for datagrams.
func (c *compiler) ruleset(w *mesh.Workload, dst netip.Addr, udp bool) (*ruleset, error) {
	var b strings.Builder
	if udp {
		b.WriteString("udp\x00")
	}
	b.WriteString(w.Namespace)
	for _, n := range w.Policies {
		fmt.Fprintf(&b, "\x00%s", n)
	}
	anywhere := b.String()
	here := anywhere + "\x00" + dst.String()
	for _, key := range []string{here, anywhere} {
		if r, ok := c.done[key]; ok {
			return r.set, r.err
		}
	}
	compile := c.s.Compile
	if udp {
		compile = c.s.CompileUDP
	}
	compiled, err := compile(w.UID, dst)
	key := here
	var r compiledOrError
	if err != nil {
		r.err = err
	} else {
		if !compiled.ByDst {
			key = anywhere
		}
		r.set, r.err = newRuleset(compiled, c.before)
	}
	c.done[key] = r
	return r.set, r.err
}

func newRuleset(c *mesh.Compiled, before map[uint64]*ruleset) (*ruleset, error) {
	digest := c.Digest()
	if old := before[number(digest)]; old != nil && old.digest == digest {
		return old, nil
	}
	r := &ruleset{id: number(digest), digest: digest, compiled: c, ports: map[bpf.MeshRulesPort]bpf.MeshWords{},
		sources: map[bpf.MeshRulesSource]bpf.MeshWords{}, identities: map[bpf.MeshRulesIdentity]bpf.MeshWords{}}
	for i := range r.head.Any.W {
		r.head.Any.W[i] = ^uint64(0)
	}
	if c.Missing != nil {
		r.head.Flags |= bpf.MeshRulesFlagsRULES_REFUSE
		return r, nil
	}
	if c.Closed {
		r.head.Flags |= bpf.MeshRulesFlagsRULES_CLOSED
	}
	r.head.Words = uint32(len(c.Terms)+63) / 64
	r.head.Deny = words(c, func(t *mesh.Term) bool { return t.Action == mesh.Deny })
	r.head.Allow = words(c, func(t *mesh.Term) bool { return t.Action == mesh.Allow })
	if c.ByIdentity() {
		r.head.Flags |= bpf.MeshRulesFlagsRULES_BY_IDENTITY
		r.identity(0, mesh.Identity{})
	}
	ports, sources := c.Ports(), c.Sources()
	if len(ports)+len(sources) > maxRows {
		return nil, errTooManyRows
	}
	if len(ports) > 0 {
		r.head.Flags |= bpf.MeshRulesFlagsRULES_BY_PORT
		other := uint16(1) // a port that no condition names; there is one, by maxRows
		for slices.Contains(ports, other) {
			other++
		}
		row := func(key, port uint16) {
			r.ports[bpf.MeshRulesPort{Rules: r.id, Port: uint32(key)}] = words(c, func(t *mesh.Term) bool { return t.MatchesPort(port) })
		}
		row(0, other)
		for _, p := range ports {
			if p != 0 { // nobody connects to it
				row(p, p)
			}
		}
	}
	if c.BySource() {
		r.head.Flags |= bpf.MeshRulesFlagsRULES_BY_SOURCE
		// The two widest are always there: what no condition names finds one of them.
		all := append(sources, netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0))
		for _, p := range all {
			k := kernelPrefix(p)
			key := bpf.MeshRulesSource{Bits: 64 + k.Bits, Rules: [2]uint32{uint32(r.id), uint32(r.id >> 32)}, Addr: k.Addr}
			r.sources[key] = words(c, func(t *mesh.Term) bool { return t.MatchesSourcesAt(p) })
		}
	}
	return r, nil
}

func words(c *mesh.Compiled, holds func(*mesh.Term) bool) (w bpf.MeshWords) {
	for i := range c.Terms {
		if holds(&c.Terms[i]) {
			w.W[i/64] |= 1 << (i % 64)
		}
	}
	return w
}

// identity makes sure that there is a row for an identity, if the ruleset looks at any.
func (r *ruleset) identity(id uint64, who mesh.Identity) {
	if r.head.Flags&bpf.MeshRulesFlagsRULES_BY_IDENTITY == 0 {
		return
	}
	k := bpf.MeshRulesIdentity{Rules: r.id, Identity: id}
	if _, ok := r.identities[k]; !ok {
		r.identities[k] = words(r.compiled, func(t *mesh.Term) bool { return t.MatchesIdentity(who) })
	}
}

// desired computes what the kernel is to know. Whatever is in doubt about a pod leaves its connections to the agent,
// which decides by the same Snapshot. direct says that the kernel can end the direct connections it lets through.
func (c *compiler) desired(pods []Pod, direct bool) rules {
	out := rules{sets: map[uint64]*ruleset{}, pods: map[string]podRules{}, identities: map[uint64]mesh.Identity{},
		udp: map[string]udpRules{}, udpSets: map[uint64]bool{}, remote: map[uint64]mesh.Identity{}}
	for _, p := range pods {
		var pr podRules
		asks := c.s.Config().FiltersUDP(p.Identity.Namespace)
		if asks {
			out.udp[p.UID] = udpRules{}
		}
		if !p.Identity.IsZero() {
			pr.identity = idOf(p.Identity)
			if other, ok := out.identities[pr.identity]; ok && other != p.Identity {
				out.problems = append(out.problems, fmt.Errorf("identities %s and %s have the same number", other, p.Identity))
				continue
			}
			out.identities[pr.identity] = p.Identity
		}
		out.pods[p.UID] = pr
		if asks {
			out.udp[p.UID] = c.udp(p, &out)
		}
		w := c.s.Workload(p.Workload)
		if w == nil || w.Identity != p.Identity || w.NativeTunnel || w.Tunnel != mesh.TunnelHBONE {
			continue
		}
		var err error
		for _, a := range p.Addrs {
			a = a.Unmap()
			if !slices.Contains(w.Addrs, a) {
				continue // another pod's, or not told of yet
			}
			set, e := c.ruleset(w, a, false)
			if e == nil {
				e = out.add(set)
			}
			if e != nil {
				err = e
				continue
			}
			if a.Is4() {
				pr.v4 = set.id
			} else {
				pr.v6 = set.id
			}
		}
		if err != nil {
			out.problems = append(out.problems, fmt.Errorf("connections to pod %s/%s: %w", w.Namespace, w.Name, err))
		}
		pr.flags = c.flags(w, direct)
		out.pods[p.UID] = pr
	}
	// Also while no pod is given whose rules name them: those that an earlier process enrolled go on by their numbers.
	for who := range c.remote {
		id := idOf(who)
		if other, ok := out.identities[id]; ok && other != who {
			out.problems = append(out.problems, fmt.Errorf("identities %s and %s have the same number", other, who))
			continue
		}
		out.remote[id] = who
	}
	for _, set := range out.sets {
		for id, who := range out.identities {
			set.identity(id, who)
		}
		if out.udpSets[set.id] {
			for id, who := range out.remote {
				set.identity(id, who)
			}
		}
		maps.DeleteFunc(set.identities, func(k bpf.MeshRulesIdentity, _ bpf.MeshWords) bool {
			return !out.knows(set.id, k.Identity)
		})
	}
	return out
}

func (r *rules) add(set *ruleset) error {
	if other, ok := r.sets[set.id]; ok && other.digest != set.digest {
		return errors.New("two policies have the same number")
	}
	r.sets[set.id] = set
	return nil
}

// flags says how other pods of the node may reach a workload.
func (c *compiler) flags(w *mesh.Workload, direct bool) (f bpf.MeshGateFlags) {
	if w.Waypoint != nil || w.AppTunnel != (mesh.AppTunnel{}) {
		return 0
	}
	for _, a := range w.Addrs {
		if c.s.ServiceAt(mesh.NetAddr{Network: w.Network, Addr: a}) != nil {
			return 0 // a service answers for the pod's address
		}
	}
	f = bpf.MeshGateFlagsGATE_PODS
	if direct {
		switch c.s.Config().SameNode {
		case mesh.SameNodeKernel:
			f |= bpf.MeshGateFlagsGATE_DIRECT
		case mesh.SameNodeAuto:
			f |= bpf.MeshGateFlagsGATE_DIRECT | bpf.MeshGateFlagsGATE_UNLESS_STRICT
		}
	}
	return f
}
