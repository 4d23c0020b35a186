package ca

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/warrenmesh/warren/api/ca"
	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/internal/mesh"
)

// impersonated is the metadata key under which a node agent names the identity it asks for.
const impersonated = "ImpersonatedIdentity"

// Config is what the certificate service needs.
type Config struct {
	Callers interface {
		Authenticate(context.Context) (*auth.Caller, error)
	}
	Authorizer *Authorizer
	DefaultTTL time.Duration // where the request names none; 24h
	MaxTTL     time.Duration // longer requests are shortened to it; 24h
	External   string        // who signs instead; then every request is refused
	Log        *slog.Logger
	Metrics    prometheus.Registerer
}

// Server is istio.v1.auth.IstioCertificateService.
type Server struct {
	ca.UnimplementedIstioCertificateServiceServer
	cfg Config
	now atomic.Pointer[Standing]
	m   metrics
}

type metrics struct {
	requests, issued, unauthenticated, parseErrors, signErrors prometheus.Counter
	refused                                                    *prometheus.CounterVec
	rootExpiry                                                 prometheus.Gauge
}

// NewServer returns a service that answers Unavailable until it has a signer.
func NewServer(cfg Config) *Server {
	if cfg.DefaultTTL <= 0 {
		cfg.DefaultTTL = 24 * time.Hour
	}
	if cfg.MaxTTL <= 0 {
		cfg.MaxTTL = 24 * time.Hour
	}
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	s := &Server{cfg: cfg, m: metrics{
		requests:        counter("citadel_server_csr_count", "Certificate requests received."),
		issued:          counter("citadel_server_success_cert_issuance_count", "Certificates issued."),
		unauthenticated: counter("citadel_server_authentication_failure_count", "Requests refused because of who asked, or for whom."),
		parseErrors:     counter("citadel_server_csr_parsing_err_count", "Requests that are not a proper certificate request."),
		signErrors:      counter("citadel_server_csr_sign_err_count", "Failures to sign."),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "warren_ca_refused_total", Help: "Certificate requests refused, by reason.",
		}, []string{"reason"}),
		rootExpiry: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "citadel_server_root_cert_expiry_timestamp", Help: "When the signing certificate ends, in seconds since the epoch.",
		}),
	}}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(s.m.requests, s.m.issued, s.m.unauthenticated, s.m.parseErrors, s.m.signErrors, s.m.refused, s.m.rootExpiry)
	}
	return s
}

// Set switches to what holds now; requests under way end with what they began with.
func (s *Server) Set(now *Standing) {
	s.now.Store(now)
	s.m.rootExpiry.Set(float64(now.Own.NotAfter().Unix()))
}

// Standing returns what holds now, nil before there is a key.
func (s *Server) Standing() *Standing { return s.now.Load() }

// refusal is an answer to a request that was not granted.
type refusal struct {
	code   codes.Code
	reason string // label of the counter
	err    error
}

// CreateCertificate signs the caller's key for the identity it named, or for its own.
func (s *Server) CreateCertificate(ctx context.Context, req *ca.IstioCertificateRequest) (*ca.IstioCertificateResponse, error) {
	s.m.requests.Inc()
	log := s.cfg.Log.With("peer", auth.PeerAddr(ctx))
	res, id, refused := s.create(ctx, req)
	if refused != nil {
		s.m.refused.WithLabelValues(refused.reason).Inc()
		switch refused.code {
		case codes.Unauthenticated, codes.PermissionDenied:
			s.m.unauthenticated.Inc()
		case codes.InvalidArgument:
			s.m.parseErrors.Inc()
		case codes.Internal:
			s.m.signErrors.Inc()
		}
		log.Warn("certificate refused", "reason", refused.reason, "identity", id.String(), "error", refused.err)
		return nil, status.Error(refused.code, "certificate refused: "+refused.err.Error())
	}
	s.m.issued.Inc()
	log.Debug("certificate issued", "identity", id.String())
	return res, nil
}

func (s *Server) create(ctx context.Context, req *ca.IstioCertificateRequest) (*ca.IstioCertificateResponse, mesh.Identity, *refusal) {
	if s.cfg.External != "" { // nobody trusts what would be signed here
		return nil, mesh.Identity{}, &refusal{codes.FailedPrecondition, "external-ca",
			fmt.Errorf("the mesh's certificates come from the CA at %s", s.cfg.External)}
	}
	caller, err := s.cfg.Callers.Authenticate(ctx)
	if err != nil {
		if auth.IsUnauthenticated(err) {
			return nil, mesh.Identity{}, &refusal{codes.Unauthenticated, "unauthenticated", err}
		}
		return nil, mesh.Identity{}, &refusal{codes.Unavailable, "token-review", err}
	}
	var id mesh.Identity
	if f, ok := req.GetMetadata().GetFields()[impersonated]; ok {
		want := f.GetStringValue()
		if id, err = s.cfg.Authorizer.Impersonate(ctx, caller, want); err != nil {
			return nil, id, &refusal{codes.PermissionDenied, reasonOf(err), err}
		}
	} else if id, err = s.cfg.Authorizer.Own(caller); err != nil {
		return nil, caller.Identity, &refusal{codes.PermissionDenied, "no-pod", err}
	}
	pub, err := checkRequest(req.GetCsr(), id)
	if err != nil {
		return nil, id, &refusal{codes.InvalidArgument, "bad-request", err}
	}
	now := s.now.Load()
	switch {
	case now == nil:
		return nil, id, &refusal{codes.Unavailable, "no-key", errNoKey}
	case now.Signer == nil:
		return nil, id, &refusal{codes.Unavailable, "no-key", now.Why}
	}
	der, _, err := now.Signer.sign(pub, leaf{identity: id, ttl: s.ttl(req.GetValidityDuration())})
	if err != nil {
		return nil, id, &refusal{codes.Internal, "sign", err}
	}
	return &ca.IstioCertificateResponse{CertChain: now.Signer.chainPEM(der, now.Roots)}, id, nil
}

// reasonOf is the label of a refusal to act for somebody else.
func reasonOf(err error) string {
	if errors.Is(err, ErrNotOnNode) {
		return "not-on-node"
	}
	return "not-permitted"
}

func (s *Server) ttl(seconds int64) time.Duration {
	if seconds <= 0 {
		return min(s.cfg.DefaultTTL, s.cfg.MaxTTL)
	}
	if seconds >= int64(s.cfg.MaxTTL/time.Second) {
		return s.cfg.MaxTTL
	}
	return time.Duration(seconds) * time.Second
}
