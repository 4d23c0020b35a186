package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/url"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
)

func answering(s authenticationv1.TokenReviewStatus, err error) (*fake.Clientset, *int) {
	kube, asked := fake.NewClientset(), new(int)
	kube.PrependReactor("create", "tokenreviews", func(a k8stesting.Action) (bool, runtime.Object, error) {
		*asked++
		return true, &authenticationv1.TokenReview{Status: s}, err
	})
	return kube, asked
}

func withHeader(v string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", v))
}

func account(change func(*authenticationv1.TokenReviewStatus)) authenticationv1.TokenReviewStatus {
	s := authenticationv1.TokenReviewStatus{
		Authenticated: true, Audiences: []string{Audience},
		User: authenticationv1.UserInfo{Username: "system:serviceaccount:istio-system:warren-node", Extra: map[string]authenticationv1.ExtraValue{
			extraPodName: {"agent"}, extraPodUID: {"uid"}, extraNodeName: {"n1"},
		}},
	}
	if change != nil {
		change(&s)
	}
	return s
}

func TestTokens(t *testing.T) {
	for _, tt := range []struct {
		name, header string
		status       authenticationv1.TokenReviewStatus
		err          error
		code         codes.Code
	}{
		{"bound to a pod", "Bearer t", account(nil), nil, codes.OK},
		{"no scheme", "t", account(nil), nil, codes.Unauthenticated},
		{"basic", "Basic dDp0", account(nil), nil, codes.Unauthenticated},
		{"empty", "Bearer ", account(nil), nil, codes.Unauthenticated},
		{"unknown", "Bearer t", authenticationv1.TokenReviewStatus{}, nil, codes.Unauthenticated},
		{"refused", "Bearer t", account(func(s *authenticationv1.TokenReviewStatus) { s.Error = "expired" }), nil, codes.Unauthenticated},
		{"another audience", "Bearer t", account(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = []string{"vault"} }), nil, codes.Unauthenticated},
		{"no audience", "Bearer t", account(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }), nil, codes.Unauthenticated},
		{"a user", "Bearer t", account(func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "admin" }), nil, codes.Unauthenticated},
		{"half an account", "Bearer t", account(func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "system:serviceaccount:x" }), nil, codes.Unauthenticated},
		{"API server away", "Bearer t", account(nil), errors.New("connection refused"), codes.Unavailable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			kube, _ := answering(tt.status, tt.err)
			c, err := New(kube, "cluster.local").Authenticate(withHeader(tt.header))
			if status.Code(err) != tt.code {
				t.Fatalf("got %v, want %s", err, tt.code)
			}
			if err == nil && (c.ServiceAccount() != "istio-system/warren-node" || c.PodName != "agent" || c.PodUID != "uid" || c.Node != "n1") {
				t.Errorf("caller %+v", c)
			}
		})
	}
}

func TestReviewsAreKeptForAWhile(t *testing.T) {
	kube, asked := answering(account(nil), nil)
	a := New(kube, "cluster.local")
	now := time.Now()
	a.now = func() time.Time { return now }
	for range 3 {
		if _, err := a.Authenticate(withHeader("Bearer t")); err != nil {
			t.Fatal(err)
		}
	}
	if *asked != 1 {
		t.Errorf("asked %d times", *asked)
	}
	now = now.Add(reviewTTL)
	if _, err := a.Authenticate(withHeader("Bearer t")); err != nil || *asked != 2 {
		t.Errorf("asked %d times after the answer's life, %v", *asked, err)
	}
}

func TestCertificates(t *testing.T) {
	leaf := func(uris ...string) context.Context {
		c := &x509.Certificate{}
		for _, u := range uris {
			parsed, err := url.Parse(u)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = append(c.URIs, parsed)
		}
		return peer.NewContext(context.Background(), &peer.Peer{
			Addr:     &net.TCPAddr{IP: net.IPv4(10, 0, 0, 1), Port: 1},
			AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{c}}}},
		})
	}
	a := New(fake.NewClientset(), "cluster.local")
	c, err := a.Authenticate(leaf("spiffe://cluster.local/ns/shop/sa/ui"))
	if err != nil || c.ServiceAccount() != "shop/ui" || c.Node != "" {
		t.Errorf("%+v, %v", c, err)
	}
	for name, ctx := range map[string]context.Context{
		"none":                 context.Background(),
		"not verified":         peer.NewContext(context.Background(), &peer.Peer{AuthInfo: credentials.TLSInfo{}}),
		"no name":              leaf(),
		"two names":            leaf("spiffe://cluster.local/ns/shop/sa/ui", "spiffe://cluster.local/ns/shop/sa/db"),
		"another trust domain": leaf("spiffe://evil/ns/shop/sa/ui"),
		"not an identity":      leaf("https://shop/ui"),
	} {
		if _, err := a.Authenticate(ctx); status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A bad token is not made good by a certificate.
	both := metadata.NewIncomingContext(leaf("spiffe://cluster.local/ns/shop/sa/ui"), metadata.Pairs("authorization", "Bearer bad"))
	kube, _ := answering(authenticationv1.TokenReviewStatus{}, nil)
	if _, err := New(kube, "cluster.local").Authenticate(both); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a bad token and a good certificate: %v", err)
	}
}
