// Package auth tells who calls the control plane: a pod, by the service account token that the kubelet projects
// into it, or a workload, by its mesh certificate.
//
// It owns the authentication of callers. What a caller may do is decided where it is done.
package auth

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Audience is what a token must be made out for.
const Audience = "istio-ca"

// Caller is an authenticated peer.
type Caller struct {
	Identity mesh.Identity
	ByToken  bool // rather than by a certificate

	// From the binding of a token to its pod; empty for a certificate or a token that is not bound.
	PodName string
	PodUID  string
	Node    string
}

// ServiceAccount names the caller's service account as namespace/name.
func (c *Caller) ServiceAccount() string {
	return c.Identity.Namespace + "/" + c.Identity.ServiceAccount
}

// Error is why a caller was not authenticated.
type Error struct{ msg string }

func (e *Error) Error() string { return e.msg }

// GRPCStatus makes the error travel as Unauthenticated.
func (e *Error) GRPCStatus() *status.Status { return status.New(codes.Unauthenticated, e.msg) }

func refuse(format string, args ...any) error { return &Error{fmt.Sprintf(format, args...)} }

// Authenticator authenticates the callers of gRPC methods.
type Authenticator struct {
	client      kubernetes.Interface
	trustDomain string
	now         func() time.Time

	mu    sync.Mutex
	known map[[sha256.Size]byte]review
}

// review is an answer of the API server that is good for a while. It is short: what a token stands for (does its
// pod still run, and where) is checked against the current pods at each use.
type review struct {
	caller Caller
	until  time.Time
}

const (
	reviewTTL   = 30 * time.Second
	reviewLimit = 4096
)

// New returns an Authenticator that asks the API server about tokens.
func New(client kubernetes.Interface, trustDomain string) *Authenticator {
	return &Authenticator{client: client, trustDomain: trustDomain, now: time.Now, known: map[[sha256.Size]byte]review{}}
}

// Authenticate returns who calls. A token, where there is one, decides; a bad token is not made good by a
// certificate.
func (a *Authenticator) Authenticate(ctx context.Context) (*Caller, error) {
	token, err := bearer(ctx)
	if err != nil {
		return nil, err
	}
	if token != "" {
		return a.byToken(ctx, token)
	}
	return a.byCertificate(ctx)
}

func bearer(ctx context.Context) (string, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get("authorization")
	if len(values) == 0 {
		return "", nil
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "bearer") || token == "" || len(values) > 1 {
		return "", refuse("authorization metadata is not one \"Bearer TOKEN\"")
	}
	return token, nil
}

func (a *Authenticator) byToken(ctx context.Context, token string) (*Caller, error) {
	sum := sha256.Sum256([]byte(token))
	now := a.now()
	a.mu.Lock()
	r, ok := a.known[sum]
	a.mu.Unlock()
	if ok && now.Before(r.until) {
		c := r.caller
		return &c, nil
	}
	res, err := a.client.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{Audience}},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "ask the API server about the caller's token: %v", err)
	}
	c, err := a.callerOf(&res.Status)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.known) >= reviewLimit {
		for k, r := range a.known {
			if !now.Before(r.until) {
				delete(a.known, k)
			}
		}
		if len(a.known) >= reviewLimit {
			clear(a.known)
		}
	}
	until := now.Add(reviewTTL)
	if exp := expiry(token); !exp.IsZero() && exp.Before(until) {
		until = exp
	}
	a.known[sum] = review{caller: *c, until: until}
	return c, nil
}

// expiry is when a token that the API server has verified ends, zero where it does not say.
func expiry(token string) time.Time {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Exp int64 `json:"exp"`
	}
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Exp == 0 {
		return time.Time{}
	}
	return time.Unix(claims.Exp, 0)
}

// The keys under which the API server reports what a token is bound to.
const (
	extraPodName  = "authentication.kubernetes.io/pod-name"
	extraPodUID   = "authentication.kubernetes.io/pod-uid"
	extraNodeName = "authentication.kubernetes.io/node-name"
)

func (a *Authenticator) callerOf(s *authenticationv1.TokenReviewStatus) (*Caller, error) {
	if s.Error != "" {
		return nil, refuse("the API server refuses the token: %s", s.Error)
	}
	if !s.Authenticated {
		return nil, refuse("the API server does not know the token")
	}
	audience := false
	for _, have := range s.Audiences {
		audience = audience || have == Audience
	}
	if !audience {
		return nil, refuse("the token is for the audience %q, not for %q", s.Audiences, Audience)
	}
	rest, ok := strings.CutPrefix(s.User.Username, "system:serviceaccount:")
	ns, sa, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 || ns == "" || sa == "" || strings.Contains(sa, ":") {
		return nil, refuse("the token belongs to %q, which is not a service account", s.User.Username)
	}
	extra := func(k string) string {
		if v := s.User.Extra[k]; len(v) == 1 {
			return v[0]
		}
		return ""
	}
	return &Caller{
		Identity: mesh.Identity{TrustDomain: a.trustDomain, Namespace: ns, ServiceAccount: sa}, ByToken: true,
		PodName: extra(extraPodName), PodUID: extra(extraPodUID), Node: extra(extraNodeName),
	}, nil
}

// byCertificate reads a client certificate that the TLS layer has already verified.
func (a *Authenticator) byCertificate(ctx context.Context) (*Caller, error) {
	none := refuse("no bearer token and no client certificate")
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, none
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return nil, none
	}
	leaf := info.State.VerifiedChains[0][0]
	if len(leaf.URIs) != 1 {
		return nil, refuse("the client certificate has %d URI names, want 1", len(leaf.URIs))
	}
	id, err := mesh.ParseIdentity(leaf.URIs[0].String())
	if err != nil {
		return nil, refuse("client certificate: %v", err)
	}
	if id.TrustDomain != a.trustDomain {
		return nil, refuse("the client certificate is of the trust domain %q, not %q", id.TrustDomain, a.trustDomain)
	}
	return &Caller{Identity: id}, nil
}

// PeerAddr is the caller's address, for logs.
func PeerAddr(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok {
		if host, _, err := net.SplitHostPort(p.Addr.String()); err == nil {
			return host
		}
		return p.Addr.String()
	}
	return ""
}

// IsUnauthenticated reports whether the caller, rather than the API server, is at fault.
func IsUnauthenticated(err error) bool {
	var e *Error
	return errors.As(err, &e)
}
