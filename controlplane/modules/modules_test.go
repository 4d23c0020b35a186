package modules

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// bare is a module that shows one function, of a name.
func bare(name string) []byte {
	b := bytes.NewBuffer(bytes.Clone(header))
	section := func(id byte, body ...byte) { b.Write(append([]byte{id, byte(len(body))}, body...)) }
	section(1, 1, 0x60, 0, 0)                                                // a type: nothing of nothing
	section(3, 1, 0)                                                         // a function of it
	section(7, append(append([]byte{1, byte(len(name))}, name...), 0, 0)...) // which is shown
	section(10, 1, 2, 0, 0x0b)                                               // and does nothing
	return b.Bytes()
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func TestModule(t *testing.T) {
	good := bare("proxy_abi_version_0_2_1")
	for _, c := range []struct {
		what   string
		b      []byte
		digest string
		want   string
	}{
		{"a module", good, "", ""},
		{"the module that it has to be", good, digestOf(good), ""},
		{"another one", good, digestOf(nil), "its sha256 is " + digestOf(good)},
		{"half of one", good[:len(good)-3], "", "ends before"},
		{"one with something behind it", append(bytes.Clone(good), 7), "", "ends before"},
		{"one with too many exports", bytes.Replace(good, []byte{7, 27, 1}, []byte{7, 27, 9}, 1), "", "ends before"},
		{"one for others", bare("run"), "", "not made for proxies"},
		{"nothing but the header", header, "", "not made for proxies"},
		{"a component", []byte("\x00asm\x0d\x00\x01\x00"), "", "component"},
		{"a compressed one", []byte("\x1f\x8b\x08\x00"), "", "compressed"},
		{"a page", []byte("<html>secret</html>"), "", "no Wasm module"},
		{"nothing", nil, "", "no Wasm module"},
	} {
		m, err := module(c.b, c.digest)
		switch {
		case c.want == "" && (err != nil || m.Digest != digestOf(c.b) || !bytes.Equal(m.Code, c.b)):
			t.Errorf("%s: %v %v", c.what, m, err)
		case c.want != "" && (m != nil || err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret")):
			t.Errorf("%s: %v %v, want %q", c.what, m, err, c.want)
		}
	}
}

func FuzzModule(f *testing.F) {
	f.Add(bare("proxy_abi_version_0_2_1"))
	f.Add([]byte("\x00asm\x01\x00\x00\x00\x07\x80"))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = module(b, "") })
}

type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestFetchedOnce has a module fetched until it is there, and no more; without TLS only where it is known.
func TestFetchedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		good := bare("proxy_abi_version_0_2_1")
		type told struct {
			from   string
			module *mesh.Module
			why    string
		}
		var all []told
		tried := map[string]int{}
		by := transport(func(r *http.Request) (*http.Response, error) {
			rec := httptest.NewRecorder()
			switch tried[r.URL.String()]++; {
			case r.URL.Path == "/large":
				rec.Write(good)
				rec.Write(make([]byte, maxBytes))
			case tried[r.URL.String()] < 3:
				rec.WriteHeader(http.StatusNotFound)
			default:
				rec.Write(good)
			}
			return rec.Result(), nil
		})
		f := New(by, nil, func(from policy.ModuleSource, m *mesh.Module, problem string) {
			all = append(all, told{from.URL, m, problem})
		}, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { f.Run(ctx); close(done) }()
		look := func(s policy.ModuleSource) []told {
			all = nil
			f.Want([]policy.ModuleSource{s})
			time.Sleep(time.Hour)
			synctest.Wait()
			return all
		}
		got := look(policy.ModuleSource{URL: "https://m.example/a"})
		if len(got) != 2 || !strings.Contains(got[0].why, "404") || got[1].module == nil || tried["https://m.example/a"] != 3 {
			t.Errorf("%+v after %v", got, tried)
		}
		if got := look(policy.ModuleSource{URL: "http://m.example/b", SHA256: digestOf(good)}); len(got) != 2 || got[1].module == nil {
			t.Errorf("what is known is not fetched without TLS: %+v", got)
		}
		if got := look(policy.ModuleSource{URL: "http://m.example/c"}); len(got) != 1 || !strings.Contains(got[0].why, "without TLS") || tried["http://m.example/c"] != 0 {
			t.Errorf("what is not known is fetched without TLS: %+v", got)
		}
		if got := look(policy.ModuleSource{URL: "https://m.example/large"}); len(got) != 1 || !strings.Contains(got[0].why, fmt.Sprint(maxBytes)) {
			t.Errorf("more than the limit is taken: %+v", got)
		}
		stop()
		<-done
	})
}
