package identity

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Why a peer was refused: stable words for counters.
const (
	// What its certificate lacks.
	ReasonNoCertificate   = "no_certificate"
	ReasonMalformed       = "malformed_certificate"
	ReasonSelfSigned      = "self_signed"
	ReasonUnknownCA       = "unknown_ca"
	ReasonExpired         = "expired" // it or an intermediate
	ReasonNotYetValid     = "not_yet_valid"
	ReasonUsage           = "wrong_usage"
	ReasonCA              = "ca_certificate" // a CA's own, instead of a workload's
	ReasonIssuerNotCA     = "issuer_not_ca"
	ReasonNameConstraint  = "name_constraint"    // of a CA in its chain
	ReasonCritical        = "critical_extension" // one that nobody here understands
	ReasonWeakSignature   = "weak_signature"
	ReasonWeakKey         = "weak_key"
	ReasonSeveralURIs     = "several_uri_sans"
	ReasonNoURI           = "no_uri_san"
	ReasonNotIdentity     = "not_an_identity"
	ReasonTrustDomain     = "wrong_trust_domain"
	ReasonNotWanted       = "unexpected_identity"
	ReasonKeyNotPossessed = "key_not_possessed" // the certificate is good, its key is not the peer's

	// What its TLS lacks.
	ReasonVersion   = "tls_version"
	ReasonALPN      = "alpn"
	ReasonEarlyData = "early_data"
	ReasonNotTLS    = "not_tls"

	// What went wrong before or beside the checks here.
	ReasonRefusedByPeer = "refused_by_peer"
	ReasonTimeout       = "timeout"
	ReasonHungUp        = "hung_up"
	ReasonHandshake     = "handshake" // anything else
)

// PeerError is the refusal of a peer's certificate.
type PeerError struct {
	Reason string
	Err    error
}

func (e *PeerError) Error() string { return "verifying the peer: " + e.Err.Error() }
func (e *PeerError) Unwrap() error { return e.Err }

// Reason returns the word for a failed handshake.
func Reason(err error) string {
	var p *PeerError
	if errors.As(err, &p) {
		return p.Reason
	}
	for _, w := range tlsErrors {
		if err != nil && strings.Contains(err.Error(), w.text) {
			return w.reason
		}
	}
	var op *net.OpError
	var header tls.RecordHeaderError
	switch {
	case errors.As(err, &op) && op.Op == "remote error":
		return ReasonRefusedByPeer
	case errors.As(err, &header):
		return ReasonNotTLS
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return ReasonTimeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return ReasonHungUp
	}
	return ReasonHandshake
}

// tlsErrors are what crypto/tls says in words alone. A test of each in test/interop notices when the words change.
var tlsErrors = []struct{ text, reason string }{
	{"client didn't provide a certificate", ReasonNoCertificate},
	{"received empty certificates message", ReasonNoCertificate},
	{"failed to parse client certificate", ReasonMalformed},
	{"failed to parse certificate from server", ReasonMalformed},
	{"invalid signature by the client certificate", ReasonKeyNotPossessed},
	{"invalid signature by the server certificate", ReasonKeyNotPossessed},
	{"certificate used with invalid signature algorithm", ReasonWeakSignature},
	{"client offered only unsupported versions", ReasonVersion},
	{"server selected unsupported protocol version", ReasonVersion},
	{"tls: protocol version not supported", ReasonVersion},
	{"unsupported application protocols", ReasonALPN},
	{"tls: no application protocol", ReasonALPN},
	{"did not select an ALPN protocol", ReasonALPN},
	{"selected unadvertised ALPN protocol", ReasonALPN},
	{"unexpected early data", ReasonEarlyData},
	{"early_data without pre_shared_key", ReasonEarlyData},
}

// chainReason names what is wrong with a chain that x509 does not accept. It decides nothing: the chain is
// refused in any case.
func chainReason(chain []*x509.Certificate, err error, now time.Time) string {
	leaf := chain[0]
	var known *PeerError
	if errors.As(err, &known) {
		return known.Reason
	}
	var invalid x509.CertificateInvalidError
	if errors.As(err, &invalid) {
		switch invalid.Reason {
		case x509.Expired:
			if slices.ContainsFunc(chain, func(c *x509.Certificate) bool { return now.Before(c.NotBefore) }) {
				return ReasonNotYetValid
			}
			return ReasonExpired
		case x509.IncompatibleUsage:
			return ReasonUsage
		case x509.CANotAuthorizedForThisName, x509.NameConstraintsWithoutSANs, x509.UnconstrainedName, x509.TooManyConstraints:
			return ReasonNameConstraint
		case x509.NotAuthorizedToSign, x509.TooManyIntermediates:
			return ReasonIssuerNotCA
		}
	}
	var critical x509.UnhandledCriticalExtension
	if errors.As(err, &critical) {
		return ReasonCritical
	}
	if slices.ContainsFunc(chain, weaklySigned) {
		return ReasonWeakSignature
	}
	if leaf.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
		return ReasonSelfSigned
	}
	for _, c := range chain[1:] {
		if (!c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0) && c.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil {
			return ReasonIssuerNotCA
		}
	}
	return ReasonUnknownCA
}

func weaklySigned(c *x509.Certificate) bool {
	switch c.SignatureAlgorithm {
	case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.DSAWithSHA1, x509.ECDSAWithSHA1:
		return true
	}
	return false
}

// minRSA is the shortest RSA modulus that is trusted, in bits. x509 itself has no lower bound worth the name.
const minRSA = 2048

// strong reports whether every key of a chain is one that nobody can break. The root is the operator's choice.
func strong(chain []*x509.Certificate) bool {
	for i, c := range chain {
		if i > 0 && i == len(chain)-1 {
			break
		}
		switch k := c.PublicKey.(type) {
		case *rsa.PublicKey:
			if k.N.BitLen() < minRSA {
				return false
			}
		case *ecdsa.PublicKey:
			if k.Curve == elliptic.P224() {
				return false
			}
		case ed25519.PublicKey:
		default:
			return false
		}
	}
	return true
}
