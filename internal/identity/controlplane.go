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

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// DialControlPlane prepares a gRPC connection to a control plane: TLS under the roots in rootFile, every call
// with the token in tokenFile. Both files are read again each time, because both are rotated under a running
// process. An empty serverName is the host of address; an empty tokenFile sends none.
func DialControlPlane(address, serverName, rootFile, tokenFile, cluster string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	if serverName == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return nil, fmt.Errorf("the address %q is not host:port: %w", address, err)
		}
		serverName = host
	}
	all := []grpc.DialOption{grpc.WithTransportCredentials(controlPlaneTLS(serverName, rootFile))}
	if tokenFile != "" {
		all = append(all, grpc.WithPerRPCCredentials(tokenCredentials{tokenFile, cluster}))
	}
	return grpc.NewClient(address, append(all, opts...)...)
}

func controlPlaneTLS(serverName, rootFile string) credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{
		MinVersion:         tls.VersionTLS12,
		ServerName:         serverName,
		InsecureSkipVerify: true, // VerifyConnection verifies, against the roots as the file has them now
		VerifyConnection: func(cs tls.ConnectionState) error {
			pem, err := os.ReadFile(rootFile)
			if err != nil {
				return fmt.Errorf("reading the control plane's roots: %w", err)
			}
			opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), DNSName: serverName}
			if !opts.Roots.AppendCertsFromPEM(pem) {
				return fmt.Errorf("reading the control plane's roots: no certificate in %s", rootFile)
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
