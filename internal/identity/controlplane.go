package identity

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// ControlPlaneRoots are what a control plane's own certificate is checked against.
type ControlPlaneRoots struct {
	File string // PEM, read again for each handshake
	// More are trusted besides, nil for none: the roots that the control plane has sent, which are here before
	// the kubelet brings the file up to date.
	More func() *Trust
}

// DialControlPlane prepares a gRPC connection to a control plane: TLS under the roots, every call with the token
// in tokenFile. Files are read again each time, because they are rotated under a running process. An empty
// serverName is the host of address; an empty tokenFile sends none.
func DialControlPlane(address, serverName string, roots ControlPlaneRoots, tokenFile, cluster string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	if serverName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, fmt.Errorf("the address %q is not host:port: %w", address, err)
		}
		serverName = host
	}
	all := []grpc.DialOption{
		grpc.WithTransportCredentials(controlPlaneTLS(serverName, roots)),
		// A control plane that went without a word, as a node that lost power does, is noticed within Timeout of the next
		// request: gRPC sets TCP_USER_TIMEOUT from it (gRFC A18).
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.3, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
	}
	if tokenFile != "" {
		all = append(all, grpc.WithPerRPCCredentials(tokenCredentials{tokenFile, cluster}))
	}
	return grpc.NewClient(address, append(all, opts...)...)
}

func controlPlaneTLS(serverName string, roots ControlPlaneRoots) credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         serverName,
		InsecureSkipVerify: true, // VerifyConnection verifies, against the roots as the file has them now
		VerifyConnection: func(cs tls.ConnectionState) error {
			opts := x509.VerifyOptions{Intermediates: x509.NewCertPool(), DNSName: serverName}
			var err error
			if opts.Roots, err = roots.pool(); err != nil {
				return fmt.Errorf("reading the control plane's roots: %w", err)
			}
			if len(cs.PeerCertificates) == 0 {
				return errors.New("the control plane has no certificate")
			}
			for _, c := range cs.PeerCertificates[1:] {
				opts.Intermediates.AddCert(c)
			}
			if _, err := cs.PeerCertificates[0].Verify(opts); err != nil {
				return fmt.Errorf("verifying the control plane %s: %w", serverName, err)
			}
			return nil
		},
	})
}

func (r ControlPlaneRoots) pool() (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	if r.More != nil {
		if t := r.More(); t != nil {
			for _, c := range t.certs {
				pool.AddCert(c)
			}
		}
	}
	text, err := os.ReadFile(r.File)
	if err != nil {
		return nil, err
	}
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("no certificate in %s", r.File)
	}
	return pool, nil
}

// tokenCredentials sends the service account token with each call.
type tokenCredentials struct{ file, cluster string }

func (t tokenCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := os.ReadFile(t.file)
	if err != nil {
		return nil, fmt.Errorf("reading the service account token: %w", err)
	}
	md := map[string]string{"authorization": "Bearer " + strings.TrimSpace(string(token))}
	if t.cluster != "" {
		md["clusterid"] = t.cluster
	}
	return md, nil
}

func (tokenCredentials) RequireTransportSecurity() bool { return true }
