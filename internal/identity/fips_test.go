package identity

import (
	"crypto/fips140"
	"crypto/tls"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestUnderFIPS runs what concerns TLS again in the FIPS 140-3 mode of Go's cryptographic module, as the programs
// of the FIPS images run.
func TestUnderFIPS(t *testing.T) {
	if fips140.Enabled() {
		t.Skip("it is on")
	}
	cmd := exec.Command(os.Args[0], "-test.v", "-test.run=^(TestHandshake|TestFIPSKeyExchange|TestPeersThatAreRefused|TestTakeover|TestFirstUseWaits|TestRenewalAndRotation|TestRootsChange|TestCAClient)$")
	cmd.Env = append(os.Environ(), "GODEBUG=fips140=on")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"TestHandshake", "TestFIPSKeyExchange", "TestPeersThatAreRefused", "TestTakeover", "TestRootsChange", "TestCAClient"} {
		if !strings.Contains(string(out), "--- PASS: "+name+" ") {
			t.Errorf("%s did not run in FIPS mode", name)
		}
	}
}

// In FIPS mode nodes agree on the hybrid key exchange as ever; P-256 is left for others, and X25519 alone is not
// approved.
func TestFIPSKeyExchange(t *testing.T) {
	if !fips140.Enabled() {
		t.Skip("run by TestUnderFIPS")
	}
	ca := newTestCA(t)
	ours, theirs := ca.bundle(t, catalog, nil), ca.bundle(t, ui, nil)
	for name, tt := range map[string]struct {
		client []tls.CurveID
		want   tls.CurveID
	}{
		"our own":      {curves, tls.X25519MLKEM768},
		"P-256 alone":  {[]tls.CurveID{tls.CurveP256}, tls.CurveP256},
		"X25519 alone": {[]tls.CurveID{tls.X25519}, 0},
	} {
		client := theirs.ClientTLS([]string{catalog.String()})
		client.CurvePreferences = tt.client
		cs, serverErr, clientErr := shake(t, ours.ServerTLS(Peers{}), client)
		if tt.want == 0 {
			if serverErr == nil && clientErr == nil {
				t.Errorf("%s: accepted", name)
			}
		} else if serverErr != nil || clientErr != nil || cs.CurveID != tt.want || cs.HelloRetryRequest {
			t.Errorf("%s: %v, %v, key exchange %v, HelloRetryRequest %t", name, serverErr, clientErr, cs.CurveID, cs.HelloRetryRequest)
		}
	}
}
