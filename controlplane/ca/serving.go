package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"sync"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

const servingTTL = 24 * time.Hour

// Serving is the control plane's own certificate, issued by its own key and renewed when half its life is over.
type Serving struct {
	// Names are the DNS names under which clients reach the control plane.
	Names []string
	// Identity is what the control plane runs as.
	Identity mesh.Identity
	// Standing returns what holds now.
	Standing func() *Standing

	mu    sync.Mutex
	cert  *tls.Certificate
	by    *Signer
	renew time.Time
}

// TLS returns the configuration of the xDS and CA port. A client certificate is optional and, where one is
// presented, has to be the mesh's.
func (s *Serving) TLS() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12, // what stock clients of istiod may use
		NextProtos: []string{"h2"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			now := s.Standing()
			if now == nil {
				return nil, errNoKey
			}
			cert, err := s.certificate(now.Own)
			if err != nil {
				return nil, err
			}
			return &tls.Config{
				MinVersion:   tls.VersionTLS12,
				NextProtos:   []string{"h2"},
				Certificates: []tls.Certificate{*cert},
				ClientAuth:   tls.VerifyClientCertIfGiven,
				ClientCAs:    now.Pool,
			}, nil
		},
	}
}

func (s *Serving) certificate(signer *Signer) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := signer.now()
	if s.cert != nil && s.by.Equal(signer) && now.Before(s.renew) {
		return s.cert, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a serving key: %w", err)
	}
	der, notAfter, err := signer.sign(key.Public(), leaf{identity: s.Identity, dns: s.Names, ttl: servingTTL})
	if err != nil {
		return nil, fmt.Errorf("serving certificate: %w", err)
	}
	s.cert = &tls.Certificate{Certificate: append([][]byte{der}, signer.chain...), PrivateKey: key}
	s.by, s.renew = signer, now.Add(notAfter.Sub(now)/2)
	return s.cert, nil
}
