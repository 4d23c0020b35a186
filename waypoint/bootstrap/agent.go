package bootstrap

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/waypoint"
)

// secrets answers SDS. There is one Envoy, whatever it calls itself.
type secrets struct {
	cache  cache.SnapshotCache
	serial uint64
	public []byte // roots
}

type oneNode struct{}

func (oneNode) ID(*corev3.Node) string { return "" }

func newSecrets() *secrets {
	return &secrets{cache: cache.NewSnapshotCache(false, oneNode{}, nil), public: publicRoots(rootFiles)}
}

func (s *secrets) register(ctx context.Context, g *grpc.Server) {
	secretv3.RegisterSecretDiscoveryServiceServer(g, server.NewServer(ctx, s.cache, nil))
}

// set gives Envoy a certificate. It has one caller at a time.
func (s *secrets) set(b *identity.Bundle) error {
	chain, key, roots, err := b.PEM()
	if err != nil {
		return err
	}
	inline := func(p []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: p}}
	}
	s.serial++
	snapshot, err := cache.NewSnapshot(strconv.FormatUint(s.serial, 10), map[resource.Type][]types.Resource{resource.SecretType: {
		&tlsv3.Secret{Name: waypoint.CertSecret, Type: &tlsv3.Secret_TlsCertificate{
			TlsCertificate: &tlsv3.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)},
		}},
		&tlsv3.Secret{Name: waypoint.RootsSecret, Type: &tlsv3.Secret_ValidationContext{
			ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(roots)},
		}},
		&tlsv3.Secret{Name: waypoint.PublicRootsSecret, Type: &tlsv3.Secret_ValidationContext{
			ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(s.public)},
		}},
	}})
	if err != nil {
		return err
	}
	return s.cache.SetSnapshot(context.Background(), "", snapshot)
}

// relay passes Envoy's ADS stream on to the control plane, which wants a token that Envoy does not have.
type relay struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	control discovery.AggregatedDiscoveryServiceClient
	read    *readBack
}

func (r *relay) DeltaAggregatedResources(down grpc.BidiStreamingServer[discovery.DeltaDiscoveryRequest, discovery.DeltaDiscoveryResponse]) error {
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	up, err := r.control.DeltaAggregatedResources(ctx, grpc.MaxCallRecvMsgSize(math.MaxInt32)) // a listener has all services

	if err != nil {
		return fmt.Errorf("open a stream to the control plane: %w", err)
	}
	ended := make(chan error, 1)
	var sending sync.Mutex // a stream has one sender at a time
	send := func(req *discovery.DeltaDiscoveryRequest) error {
		sending.Lock()
		defer sending.Unlock()
		return up.Send(req)
	}
	go func() { // ends with ctx
		token(r.read.changed) // whoever answers now may not have heard
		var told map[string]string
		for {
			select {
			case <-ctx.Done():
				return
			case <-r.read.changed:
				var req *discovery.DeltaDiscoveryRequest
				if req, told = r.read.report(told); send(req) != nil {
					token(r.read.changed) // the stream is over; it is for the next
					return
				}
			}
		}
	}()
	go func() { // ends with ctx at the latest
		for {
			req, err := down.Recv()
			if err == nil {
				r.read.acknowledged(req)
				err = send(req)
			}
			if err != nil {
				cancel()
				ended <- err
				return
			}
		}
	}()
	for {
		res, err := up.Recv()
		if err == nil {
			r.read.note(res)
			err = down.Send(res)
		}
		if err != nil {
			cancel()
			select {
			case first := <-ended:
				return first
			default:
				return err
			}
		}
	}
}
