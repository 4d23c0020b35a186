package identity

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/warrenmesh/warren/api/ca"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Signer is what a Manager needs of a CA: it signs a CSR (PEM) for an identity and returns the certificates
// (PEM): the leaf, intermediates, and as the last element the roots, one or several.
type Signer interface {
	Sign(ctx context.Context, id mesh.Identity, csr []byte, ttl time.Duration) (chain []string, err error)
}

// CAConfig says where the CA is and how to be known to it.
type CAConfig struct {
	Address    string // host:port
	ServerName string // the name in the CA's certificate; empty: the host of Address
	Roots      ControlPlaneRoots
	TokenFile  string // service account token, read again for each call
	Cluster    string // sent along, for control planes of several clusters
}

// CA speaks istio.v1.auth to a control plane. It is the Signer of a node agent: each request names the
// identity it is for, and the CA decides whether a pod of this node has it.
type CA struct {
	conn *grpc.ClientConn
	stub ca.IstioCertificateServiceClient
	own  bool // only for itself
}

// NewCA prepares a client; the connection is made when it is needed.
func NewCA(cfg CAConfig) (*CA, error) {
	conn, err := DialControlPlane(cfg.Address, cfg.ServerName, cfg.Roots, cfg.TokenFile, cfg.Cluster)
	if err != nil {
		return nil, fmt.Errorf("preparing the connection to the CA %s: %w", cfg.Address, err)
	}
	return NewCAOn(conn), nil
}

// NewOwnCA prepares a client that asks for nothing but the certificate of the service account it runs as.
func NewOwnCA(cfg CAConfig) (*CA, error) {
	c, err := NewCA(cfg)
	if err == nil {
		c.own = true
	}
	return c, err
}

// NewCAOn uses a connection that is there; Close closes it.
func NewCAOn(conn *grpc.ClientConn) *CA {
	return &CA{conn: conn, stub: ca.NewIstioCertificateServiceClient(conn)}
}

// Close ends the connection.
func (c *CA) Close() error { return c.conn.Close() }

// Sign asks for a certificate of id.
func (c *CA) Sign(ctx context.Context, id mesh.Identity, csr []byte, ttl time.Duration) ([]string, error) {
	req := &ca.IstioCertificateRequest{Csr: string(csr), ValidityDuration: int64(ttl / time.Second)}
	if !c.own {
		req.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"ImpersonatedIdentity": structpb.NewStringValue(id.String())}}
	}
	resp, err := c.stub.CreateCertificate(ctx, req)
	if err != nil {
		return nil, fmt.Errorf("asking the CA for a certificate of %s: %w", id, err)
	}
	return resp.GetCertChain(), nil
}
