package bootstrap

import (
	"bytes"
	"crypto/x509"
	"os"
	"path/filepath"
	"testing"
)

func TestPublicRoots(t *testing.T) {
	all := publicRoots(nil)
	if n := bytes.Count(all, []byte("BEGIN CERTIFICATE")); n < 50 || !x509.NewCertPool().AppendCertsFromPEM(all) {
		t.Errorf("%d roots in an image that has none", n)
	}
	file := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(file, []byte("those of the image"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := publicRoots([]string{file + ".absent", file}); string(got) != "those of the image" {
		t.Errorf("the image's roots are %q", got)
	}
}
