package nodeagent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"math/big"
	"testing"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
)

func rootDER(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestWhoseRootsHold: where somebody else signs, the control plane's roots are for its own certificate alone.
func TestWhoseRootsHold(t *testing.T) {
	for name, tt := range map[string]struct {
		ca       string
		external bool
	}{
		"the control plane signs":                      {"", false},
		"the control plane signs, written another way": {"istiod.istio-system.svc:15012", false},
		"somebody else signs":                          {"https://ca.example:443", true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Config{Node: "n1", XDSAddress: "https://istiod.istio-system.svc:15012", XDSServerName: "control", CAAddress: tt.ca, CARoot: "/ca.pem"}
			if err := cfg.Validate(); err != nil {
				t.Fatal(err)
			}
			if (cfg.CAServerName == "") != tt.external {
				t.Errorf("the CA's name is %q", cfg.CAServerName)
			}
			a := &agent{cfg: cfg, manager: identity.NewManager(identity.Config{Log: slog.New(slog.DiscardHandler)})}
			if (a.meshRoots() == "") != tt.external {
				t.Errorf("peers are checked against the file %q", a.meshRoots())
			}
			if (a.caRoots().More == nil) != tt.external {
				t.Error("the control plane's roots hold for the CA's certificate too")
			}
			if err := a.setTrust([][]byte{rootDER(t)}, nil); err != nil {
				t.Fatal(err)
			}
			if a.sentRoots() == nil {
				t.Error("the control plane's own certificate is not checked against what it sent")
			}
			if (a.manager.Trust() == nil) != tt.external {
				t.Error("peers are checked against the control plane's roots")
			}
			before := a.sentRoots()
			if a.setTrust(nil, nil) == nil || a.setTrust([][]byte{[]byte("x")}, nil) == nil || a.sentRoots() != before {
				t.Error("a bundle without roots, or with garbage, was taken")
			}
		})
	}
}
