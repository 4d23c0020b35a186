package mesh

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// MaxTerms is how many terms the policies of one workload may come to in a Compiled.
const MaxTerms = 512

// ErrTooManyTerms says that the policies of a workload are too many for a Compiled. Authorize has no such limit.
var ErrTooManyTerms = errors.New("the policies that apply come to more terms than the kernel takes")

// Compiled is what the policies in force for one workload say about connections to one of its addresses, in the
// form that the kernel decides by. It says what Authorize says: a property test holds the two together.
//
// A term is one way for a policy to match: a conjunction of conditions on the client's identity, on its address
// and on the destination port. Whether a condition holds depends on that one attribute alone, so a decision is three
// sets of terms, one for each attribute, and their intersection. AUDIT policies and dry runs decide nothing and are
// not in it.
type Compiled struct {
	Terms   []Term // those of DENY policies first
	Closed  bool   // there is an ALLOW policy: who matches none is denied
	Missing *PolicyName
	ByDst   bool // some policy looks at the destination address: it differs by address
}

// Term is one conjunction of one policy's rule.
type Term struct {
	Policy  PolicyName
	Action  Action // Allow or Deny
	Matches []*Match
}

// Compile compiles the policies for connections to a workload at one of its addresses. A workload that the
// Snapshot does not have is an error, as are more than MaxTerms terms.
func (s *Snapshot) Compile(uid string, dst netip.Addr) (*Compiled, error) {
	return s.compile(uid, dst, false)
}

// CompileUDP compiles what applies to datagrams: the AuthorizationPolicies. Nothing encrypts UDP, so a
// PeerAuthentication has nothing to say about it.
func (s *Snapshot) CompileUDP(uid string, dst netip.Addr) (*Compiled, error) {
	return s.compile(uid, dst, true)
}

func (s *Snapshot) compile(uid string, dst netip.Addr, udp bool) (*Compiled, error) {
	w := s.Workload(uid)
	if w == nil {
		return nil, fmt.Errorf("workload %s: %s", uid, WhyNoWorkload)
	}
	policies, missing := s.PoliciesOf(w)
	if missing != nil {
		return &Compiled{Missing: missing}, nil
	}
	c := &Compiled{}
	seen := map[PolicyName]bool{}
	for p := range policies {
		if p.Action == Audit || p.DryRun || seen[p.Name] || udp && p.Name.OfPeerAuthentication() {
			continue
		}
		seen[p.Name] = true
		if err := c.add(p, dst.Unmap()); err != nil {
			return nil, fmt.Errorf("policy %s: %w", p.Name, err)
		}
	}
	slices.SortStableFunc(c.Terms, func(a, b Term) int { return cmp.Compare(b.Action, a.Action) }) // Deny, then Allow
	return c, nil
}

func (c *Compiled) add(p *Policy, dst netip.Addr) error {
	switch p.Action {
	case Allow:
		c.Closed = true
	case Deny:
	default: // an action of a later version denies
		return c.append(Term{Policy: p.Name, Action: Deny})
	}
	for i := range p.Rules {
		clauses, possible := c.possible(&p.Rules[i], dst)
		if !possible {
			continue
		}
		n := 1
		for _, ms := range clauses {
			if n *= len(ms); n > MaxTerms {
				return ErrTooManyTerms
			}
		}
		for k := range n { // each combination of one match of every clause
			t := Term{Policy: p.Name, Action: p.Action}
			for _, ms := range clauses {
				t.Matches = append(t.Matches, ms[k%len(ms)])
				k /= len(ms)
			}
			if err := c.append(t); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Compiled) append(t Term) error {
	if len(c.Terms) == MaxTerms {
		return ErrTooManyTerms
	}
	c.Terms = append(c.Terms, t)
	return nil
}

// possible returns the clauses of a rule with the matches that can hold for the destination address, and whether the
// rule can hold at all.
func (c *Compiled) possible(r *Rule, dst netip.Addr) (clauses [][]*Match, _ bool) {
	for i := range r.Clauses {
		all := r.Clauses[i].Matches
		if len(all) == 0 {
			continue
		}
		var ms []*Match
		for j := range all {
			m := &all[j]
			c.ByDst = c.ByDst || len(m.DestinationIPs)+len(m.NotDestinationIPs) > 0
			if !m.empty() && within(m.DestinationIPs, m.NotDestinationIPs, dst) {
				ms = append(ms, m)
			}
		}
		if len(ms) == 0 {
			return nil, false
		}
		clauses = append(clauses, ms)
	}
	return clauses, true
}

func (t *Term) byIdentity() bool {
	return slices.ContainsFunc(t.Matches, func(m *Match) bool {
		return len(m.ServiceAccounts)+len(m.NotServiceAccounts)+len(m.Principals)+len(m.NotPrincipals)+len(m.Namespaces)+len(m.NotNamespaces) > 0
	})
}

// ByIdentity reports whether any condition looks at the client's identity.
func (c *Compiled) ByIdentity() bool {
	return slices.ContainsFunc(c.Terms, func(t Term) bool { return t.byIdentity() })
}

// BySource reports whether any condition looks at the client's address, be it one that holds for none.
func (c *Compiled) BySource() bool {
	return slices.ContainsFunc(c.Terms, func(t Term) bool {
		return slices.ContainsFunc(t.Matches, func(m *Match) bool { return len(m.SourceIPs)+len(m.NotSourceIPs) > 0 })
	})
}

// MatchesIdentity reports whether the term's conditions on the client's identity hold.
func (t *Term) MatchesIdentity(id Identity) bool {
	for _, m := range t.Matches {
		if !accounts(m.ServiceAccounts, m.NotServiceAccounts, id) || !principals(m.Principals, m.NotPrincipals, id) ||
			!namespaces(m.Namespaces, m.NotNamespaces, id.Namespace) {
			return false
		}
	}
	return true
}

// MatchesSource reports whether the term's conditions on the client's address hold.
func (t *Term) MatchesSource(a netip.Addr) bool {
	for _, m := range t.Matches {
		if !within(m.SourceIPs, m.NotSourceIPs, a) {
			return false
		}
	}
	return true
}

// MatchesPort reports whether the term's conditions on the destination port hold.
func (t *Term) MatchesPort(port uint16) bool {
	for _, m := range t.Matches {
		if !one(m.DestinationPorts, m.NotDestinationPorts, port) {
			return false
		}
	}
	return true
}

// MatchesSourcesAt reports whether the term's conditions on the client's address hold for an address of which p is
// the longest prefix that any condition names.
func (t *Term) MatchesSourcesAt(p netip.Prefix) bool {
	within := func(ps []netip.Prefix) bool {
		return slices.ContainsFunc(ps, func(o netip.Prefix) bool { return o.Bits() <= p.Bits() && o.Contains(p.Addr()) })
	}
	for _, m := range t.Matches {
		if len(m.SourceIPs) > 0 && !within(m.SourceIPs) || within(m.NotSourceIPs) {
			return false
		}
	}
	return true
}

// Sources returns the prefixes that conditions on the client's address name, each once.
func (c *Compiled) Sources() []netip.Prefix {
	seen := map[netip.Prefix]struct{}{}
	for _, t := range c.Terms {
		for _, m := range t.Matches {
			for _, p := range slices.Concat(m.SourceIPs, m.NotSourceIPs) {
				// A prefix of mapped addresses holds none: addresses are compared unmapped.
				if p = p.Masked(); p.IsValid() && !p.Addr().Is4In6() {
					seen[p] = struct{}{}
				}
			}
		}
	}
	return slices.Collect(maps.Keys(seen))
}

// Ports returns the destination ports that conditions name, each once.
func (c *Compiled) Ports() []uint16 {
	seen := map[uint16]struct{}{}
	for _, t := range c.Terms {
		for _, m := range t.Matches {
			for _, p := range slices.Concat(m.DestinationPorts, m.NotDestinationPorts) {
				seen[p] = struct{}{}
			}
		}
	}
	return slices.Collect(maps.Keys(seen))
}

// Decide says what the kernel says.
func (c *Compiled) Decide(id Identity, src netip.Addr, port uint16) Verdict {
	if c.Missing != nil {
		return Verdict{By: *c.Missing, Why: WhyPolicyMissing}
	}
	for i := range c.Terms {
		t := &c.Terms[i]
		if t.MatchesIdentity(id) && t.MatchesSource(src) && t.MatchesPort(port) {
			return c.Because(i)
		}
	}
	return c.Because(-1)
}

// Because is the verdict of the first term that matched; -1 says that none did.
func (c *Compiled) Because(term int) Verdict {
	switch {
	case c.Missing != nil:
		return Verdict{By: *c.Missing, Why: WhyPolicyMissing}
	case term < 0 || term >= len(c.Terms):
		if c.Closed {
			return Verdict{Why: WhyNoAllow}
		}
		return Verdict{Allow: true, Why: WhyNoPolicy}
	case c.Terms[term].Action == Deny:
		return Verdict{By: c.Terms[term].Policy, Why: WhyDenied}
	default:
		return Verdict{Allow: true, By: c.Terms[term].Policy, Why: WhyAllowed}
	}
}

// Digest is the same for two Compiled that say the same in the same words.
func (c *Compiled) Digest() [sha256.Size]byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	// All of it is data of exported fields: it cannot fail.
	if err := e.Encode(c); err != nil {
		panic("encode compiled policies: " + err.Error())
	}
	return sha256.Sum256(b.Bytes())
}
