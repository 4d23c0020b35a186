package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
)

// A root is exchanged in three phases that overlap:
//
//  1. the new root is published beside the old one; the old one signs
//  2. every node trusts the new root: it signs; the old one stays published
//  3. nothing that the old root signed can be valid any more: it is dropped
//
// published is how far that has come. It is a value: next says what follows from it and from what is seen, and
// nothing in it depends on which replica looks, or whether that was restarted in between.
type published struct{ roots []publishedRoot }

// publishedRoot is one root that nodes are told to trust.
type publishedRoot struct {
	cert      *x509.Certificate
	published time.Time
	trusted   time.Time // since when every node trusts it; zero: not all do yet
	retire    time.Time // when it is dropped; zero: it stays
}

// margin is what a lifetime is waited for in addition: a replica may be late to see a change, clocks may differ.
func margin(life time.Duration) time.Duration { return min(life/2, 5*time.Minute) }

// begin is the state of a mesh that has none yet: seen are the roots that its namespaces have been given before,
// empty for a new mesh.
func begin(now time.Time, want *Signer, seen []*x509.Certificate) published {
	var p published
	for _, c := range seen {
		p.roots = append(p.roots, publishedRoot{cert: c, published: now, trusted: now})
	}
	for _, c := range want.anchors {
		if p.find(c) < 0 {
			r := publishedRoot{cert: c, published: now}
			if len(seen) == 0 { // nobody has a certificate yet
				r.trusted = now
			}
			p.roots = append(p.roots, r)
		}
	}
	return p
}

func (p published) find(c *x509.Certificate) int {
	return slices.IndexFunc(p.roots, func(r publishedRoot) bool { return r.cert.Equal(c) })
}

// trusts reports whether every node trusts a root to which the signer leads.
func (p published) trusts(s *Signer) bool {
	return s != nil && slices.ContainsFunc(p.roots, func(r publishedRoot) bool {
		return !r.trusted.IsZero() && s.leads[sumOf(r.cert)]
	})
}

// waiting are the roots that not every node trusts yet.
func (p published) waiting() []publishedRoot {
	return slices.Collect(func(yield func(publishedRoot) bool) {
		for _, r := range p.roots {
			if r.trusted.IsZero() && !yield(r) {
				return
			}
		}
	})
}

// digest is what a node reports that trusts all this.
func (p published) digest() string { return identity.RootsDigest(p.ders()) }

func (p published) ders() [][]byte {
	var out [][]byte
	for _, r := range p.roots {
		out = append(out, r.cert.Raw)
	}
	return out
}

func (p published) pem() []byte {
	var out bytes.Buffer
	for _, r := range p.roots {
		out.Write(pemBlock("CERTIFICATE", r.cert.Raw))
	}
	return out.Bytes()
}

// next is what follows. want is the signer that is to be used; ready says that every node trusts all that is
// published; life is the longest lifetime of a certificate.
func (p published) next(now time.Time, want *Signer, ready bool, life time.Duration) published {
	n := published{roots: slices.Clone(p.roots)}
	for i := range n.roots {
		r := &n.roots[i]
		// After a lifetime every certificate that is valid was issued together with this root, also those of
		// nodes that do not report.
		if r.trusted.IsZero() && (ready || now.After(r.published.Add(life+margin(life)))) {
			r.trusted = now
		}
	}
	for _, c := range want.anchors {
		if i := n.find(c); i >= 0 {
			n.roots[i].retire = time.Time{}
		} else {
			n.roots = append(n.roots, publishedRoot{cert: c, published: now})
		}
	}
	for i := range n.roots {
		r := &n.roots[i]
		switch wanted := slices.ContainsFunc(want.anchors, r.cert.Equal); {
		case wanted:
		case !n.trusts(want):
			r.retire = time.Time{} // it still signs
		case r.retire.IsZero():
			r.retire = now.Add(life + margin(life))
		}
	}
	n.roots = slices.DeleteFunc(n.roots, func(r publishedRoot) bool {
		return !r.retire.IsZero() && !now.Before(r.retire) || now.After(r.cert.NotAfter) && !slices.ContainsFunc(want.anchors, r.cert.Equal)
	})
	return n
}

func (p published) equal(o published) bool {
	return slices.EqualFunc(p.roots, o.roots, func(a, b publishedRoot) bool {
		return a.cert.Equal(b.cert) && a.published.Equal(b.published) && a.trusted.Equal(b.trusted) && a.retire.Equal(b.retire)
	})
}

// short names a root for a reader.
func short(c *x509.Certificate) string { return sumOf(c)[:12] }

// describe says in a sentence how far an exchange has come.
func (p published) describe(want *Signer, lacking []string) string {
	if w := p.waiting(); len(w) > 0 {
		names := "all nodes"
		if len(lacking) > 0 {
			names = strings.Join(lacking[:min(len(lacking), 5)], ", ")
			if len(lacking) > 5 {
				names += fmt.Sprintf(" and %d more", len(lacking)-5)
			}
		}
		if p.trusts(want) {
			return fmt.Sprintf("root %s is published; waiting for %s to trust it", short(w[0].cert), names)
		}
		return fmt.Sprintf("phase 1 of 3: root %s is published and does not sign before it is trusted by %s", short(w[0].cert), names)
	}
	for _, r := range p.roots {
		if !r.retire.IsZero() {
			return fmt.Sprintf("phase 2 of 3: the new root signs; root %s stays trusted until %s", short(r.cert), r.retire.UTC().Format(time.RFC3339))
		}
	}
	return "settled"
}

// rootRecord is a publishedRoot in the ConfigMap.
type rootRecord struct {
	Certificate string     `json:"certificate"`
	Sum         string     `json:"sha256"`
	Published   time.Time  `json:"published"`
	Trusted     *time.Time `json:"trusted,omitempty"`
	Retire      *time.Time `json:"retire,omitempty"`
}

func (p published) marshal() (string, error) {
	stamp := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		t = t.UTC()
		return &t
	}
	records := []rootRecord{}
	for _, r := range p.roots {
		records = append(records, rootRecord{
			Certificate: string(pemBlock("CERTIFICATE", r.cert.Raw)), Sum: sumOf(r.cert),
			Published: r.published.UTC(), Trusted: stamp(r.trusted), Retire: stamp(r.retire),
		})
	}
	text, err := json.MarshalIndent(records, "", "  ")
	return string(text), err
}

func parsePublished(text string) (published, error) {
	var records []rootRecord
	if err := json.Unmarshal([]byte(text), &records); err != nil {
		return published{}, err
	}
	var p published
	for _, r := range records {
		certs, err := parseCertificates([]byte(r.Certificate))
		if err != nil {
			return published{}, err
		}
		root := publishedRoot{cert: certs[0], published: r.Published}
		if r.Trusted != nil {
			root.trusted = *r.Trusted
		}
		if r.Retire != nil {
			root.retire = *r.Retire
		}
		p.roots = append(p.roots, root)
	}
	return p, nil
}
