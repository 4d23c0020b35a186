package identity

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"time"
)

// ReasonRevoked counts peers whose certificate, or a CA's above it, is on a revocation list.
const ReasonRevoked = "revoked"

// Trust is what peers are checked against: the root certificates, and what the CAs below them have revoked. It
// is immutable.
type Trust struct {
	pool    *x509.CertPool
	certs   []*x509.Certificate
	lists   [][]byte                       // revocation lists as DER
	revoked map[string]map[string]struct{} // raw issuer → serial numbers
}

// NewTrust reads roots and revocation lists (DER each). Who hands the lists over has checked who signed them:
// the certificate of an issuer that is no root is not here.
func NewTrust(roots, lists [][]byte) (*Trust, error) {
	var certs []*x509.Certificate
	for _, der := range roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: a root: %w", ErrBundle, err)
		}
		certs = append(certs, c)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%w: there is no root to trust", ErrBundle)
	}
	t := newRoots(certs...)
	for _, der := range lists {
		if err := t.revoke(der); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// newRoots are trust anchors, each once, in the order they came.
func newRoots(certs ...*x509.Certificate) *Trust {
	t := &Trust{pool: x509.NewCertPool()}
	for _, c := range certs {
		if !t.has(c) {
			t.pool.AddCert(c)
			t.certs = append(t.certs, c)
		}
	}
	return t
}

func (t *Trust) revoke(der []byte) error {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return fmt.Errorf("%w: a revocation list: %w", ErrBundle, err)
	}
	if t.revoked == nil {
		t.revoked = map[string]map[string]struct{}{}
	}
	of := t.revoked[string(list.RawIssuer)]
	if of == nil {
		of = map[string]struct{}{}
		t.revoked[string(list.RawIssuer)] = of
	}
	for _, e := range list.RevokedCertificateEntries {
		of[string(e.SerialNumber.Bytes())] = struct{}{}
	}
	t.lists = append(t.lists, der)
	return nil
}

func (t *Trust) has(c *x509.Certificate) bool {
	return slices.ContainsFunc(t.certs, c.Equal)
}

// plus is t with further roots; t itself where it has them all.
func (t *Trust) plus(certs []*x509.Certificate) *Trust {
	if !slices.ContainsFunc(certs, func(c *x509.Certificate) bool { return !t.has(c) }) {
		return t
	}
	more := newRoots(append(slices.Clone(t.certs), certs...)...)
	more.lists, more.revoked = t.lists, t.revoked
	return more
}

// Roots returns the trusted roots.
func (t *Trust) Roots() []*x509.Certificate { return t.certs }

// Equal reports whether both have the same roots and lists, in any order.
func (t *Trust) Equal(o *Trust) bool {
	lists := func(t *Trust) string { return RootsDigest(t.lists) }
	return t.Digest() == o.Digest() && lists(t) == lists(o)
}

// Digest names the set of roots, whatever their order: what a node reports is compared with what a control plane
// published.
func (t *Trust) Digest() string {
	ders := make([][]byte, len(t.certs))
	for i, c := range t.certs {
		ders[i] = c.Raw
	}
	return RootsDigest(ders)
}

// RootsDigest is the [Trust.Digest] of roots in DER form.
func RootsDigest(roots [][]byte) string {
	var sums [][]byte
	for _, der := range roots {
		s := sha256.Sum256(der)
		sums = append(sums, s[:])
	}
	slices.SortFunc(sums, bytes.Compare)
	all := sha256.Sum256(bytes.Join(slices.CompactFunc(sums, bytes.Equal), nil))
	return hex.EncodeToString(all[:16])
}

// unrevoked returns the chains (leaf first, root last) none of whose certificates was revoked by its issuer.
func (t *Trust) unrevoked(chains [][]*x509.Certificate) [][]*x509.Certificate {
	if len(t.revoked) == 0 {
		return chains
	}
	var good [][]*x509.Certificate
	for _, chain := range chains {
		if !slices.ContainsFunc(chain[:len(chain)-1], t.isRevoked) {
			good = append(good, chain)
		}
	}
	return good
}

func (t *Trust) isRevoked(c *x509.Certificate) bool {
	_, bad := t.revoked[string(c.RawIssuer)][string(c.SerialNumber.Bytes())]
	return bad
}

// Check verifies again a chain that a handshake has accepted, leaf first: what was trusted then may have been
// revoked, may have lost its root or may have ended.
func (t *Trust) Check(chain []*x509.Certificate, now time.Time) error {
	if len(chain) == 0 {
		return refuse(ReasonNoCertificate, "it has no certificate")
	}
	return t.CheckFor(chain, now, x509.ExtKeyUsageAny)
}

// CheckFor is Check for one usage.
func (t *Trust) CheckFor(chain []*x509.Certificate, now time.Time, usage x509.ExtKeyUsage) error {
	_, err := t.chains(chain, now, usage)
	return err
}

// chains are the ways from a leaf to a root that hold at a time and that nobody revoked.
func (t *Trust) chains(chain []*x509.Certificate, now time.Time, usage x509.ExtKeyUsage) ([][]*x509.Certificate, error) {
	opts := x509.VerifyOptions{
		Roots: t.pool, Intermediates: x509.NewCertPool(), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{usage},
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	chains, err := chain[0].Verify(opts)
	if err != nil {
		return nil, err
	}
	good := t.unrevoked(chains)
	if len(good) == 0 {
		i := slices.IndexFunc(chains[0], t.isRevoked)
		bad := chains[0][max(i, 0)]
		return nil, refuse(ReasonRevoked, "the certificate with serial number %s was revoked by its issuer %q", bad.SerialNumber.Text(16), bad.Issuer)
	}
	return good, nil
}

// CheckRevocationList reads a revocation list (DER) and checks that one of the issuers signed it and that it is
// a complete one. An old list is good: what it revokes stays revoked.
func CheckRevocationList(der []byte, issuers []*x509.Certificate) (*x509.RevocationList, error) {
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, err
	}
	for _, e := range list.Extensions {
		// A delta, or a list for some of the certificates, would be taken for the whole.
		if e.Critical && (e.Id.Equal(oidDeltaList) || e.Id.Equal(oidDistributionPoint)) {
			return nil, fmt.Errorf("the list of %s is not complete: it has the critical extension %s", list.Issuer, e.Id)
		}
	}
	for _, c := range issuers {
		if bytes.Equal(c.RawSubject, list.RawIssuer) && list.CheckSignatureFrom(c) == nil {
			return list, nil
		}
	}
	return nil, fmt.Errorf("the list of %q is signed by none of the certificates here", list.Issuer)
}

var (
	oidDeltaList         = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidDistributionPoint = asn1.ObjectIdentifier{2, 5, 29, 28}
)
