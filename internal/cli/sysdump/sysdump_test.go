package sysdump

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	key   = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIBverysecret\n-----END EC PRIVATE KEY-----"
	token = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJrdWJlIn0.c2lnbmF0dXJl"
)

func TestWhatIsSecretIsTakenOut(t *testing.T) {
	for name, text := range map[string]string{
		"a key":                  "a\n" + key + "\nb",
		"a key in JSON":          `{"k":"` + strings.ReplaceAll(key, "\n", `\n`) + `","x":1}`,
		"a key cut off":          "a\n" + key[:50],
		"a token":                "got " + token + " from it",
		"a header":               "authorization: Bearer abcdef.ghi-verysecret",
		"a password in a URL":    "to https://me:verysecret@example.org/x",
		"a key in base64":        base64.StdEncoding.EncodeToString([]byte(key)),
		"... one byte further":   base64.StdEncoding.EncodeToString([]byte("\n" + key))[4:],
		"a PKCS#8 key in base64": base64.StdEncoding.EncodeToString([]byte(strings.ReplaceAll(key, "EC PRIVATE", "PRIVATE"))),
		"an RSA key in base64":   base64.StdEncoding.EncodeToString([]byte(strings.ReplaceAll(key, "EC PRIVATE", "RSA PRIVATE"))),
		"a sealed key in base64": base64.StdEncoding.EncodeToString([]byte(strings.ReplaceAll(key, "EC PRIVATE", "ENCRYPTED PRIVATE"))),
	} {
		got := string(Clean([]byte(text)))
		plain := got
		if b, err := base64.StdEncoding.DecodeString(got); err == nil {
			plain = string(b)
		}
		for _, s := range []string{"verysecret", token, "PRIVATE KEY"} {
			if name != "... one byte further" && (strings.Contains(got, s) || strings.Contains(plain, s)) {
				t.Errorf("%s: %q is left in %q", name, s, got)
			}
		}
	}
	const harmless = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\nspiffe://cluster.local/ns/shop/sa/ui key=7 https://example.org:80/a@b"
	if got := string(Clean([]byte(harmless))); got != harmless {
		t.Errorf("taken out of what is not secret: %q", got)
	}
}

func TestObjectsAreCleaned(t *testing.T) {
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{"name": "p", "managedFields": []any{map[string]any{"manager": "x"}},
			"annotations": map[string]any{"kubectl.kubernetes.io/last-applied-configuration": "verysecret", "a": "b"}},
		"spec": map[string]any{"serviceAccountToken": "verysecret", "secretName": "stays", "tokenPath": "stays",
			"env": []any{map[string]any{"name": "DB_PASSWORD", "value": "verysecret"}, map[string]any{"name": "LEVEL", "value": "stays"}}},
	}}
	secret := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Secret", "metadata": map[string]any{"name": "s"},
		"data": map[string]any{"file": "dmVyeXNlY3JldA=="}, "stringData": map[string]any{"x": "verysecret"}}}
	var buf bytes.Buffer
	a := New(&buf, "dump", time.Unix(0, 0))
	a.AddObjects("pods.yaml", []*unstructured.Unstructured{o, secret})
	a.Add("log.txt", []byte(key))
	a.Missing("node2", errors.New("no answer"))
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	all := read(t, &buf)
	if s := all["dump/pods.yaml"]; strings.Contains(s, "verysecret") || strings.Contains(s, "dmVyeXNlY3JldA") || strings.Contains(s, "managedFields") ||
		strings.Count(s, "stays") != 3 || !strings.Contains(s, "a: b") {
		t.Error(s)
	}
	if s := all["dump/log.txt"]; s != Gone {
		t.Error(s)
	}
	if s := all["dump/missing.txt"]; s != "node2: no answer\n" {
		t.Error(s)
	}
	if _, _, err := unstructured.NestedString(o.Object, "spec", "serviceAccountToken"); err != nil || o.GetManagedFields() == nil {
		t.Error("the object itself was changed")
	}
}

func read(t *testing.T, r io.Reader) map[string]string {
	t.Helper()
	gz, err := gzip.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for tr := tar.NewReader(gz); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(b)
	}
}
