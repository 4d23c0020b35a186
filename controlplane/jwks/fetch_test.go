package jwks

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/warrenmesh/warren/controlplane/fetch"
	"github.com/warrenmesh/warren/controlplane/policy"
)

const keys = `{"keys":[{"kty":"EC","kid":"a","crv":"P-256","x":"mrZ-Co1ePQxhma2yMx8yCIQtdcVGfs6JSQJIqsIl6TY","y":"zXZTK7M2ubn-cUMEj766gAPDPqLwgqSDKbtRdv957qw","d":"secret"},{"kty":"oct","k":"shared"},{"kty":"EC","kid":"broken","crv":"P-256","x":"AA","y":"AA"}]}`

// reaches is what reaches srv under the names of addrs, and no other.
func reaches(srv *httptest.Server, addrs map[string][]string) http.RoundTripper {
	at := srv.Listener.Addr().String()
	asked := map[string]int{}
	var mu sync.Mutex
	return fetch.Guarded(fetch.Dialer{
		Lookup: func(_ context.Context, host string) ([]netip.Addr, error) {
			mu.Lock()
			defer mu.Unlock()
			list := addrs[host]
			if len(list) == 0 {
				return nil, &net.DNSError{Err: "no such host", Name: host}
			}
			one := list[min(asked[host], len(list)-1)] // a name may have another address every time
			asked[host]++
			return []netip.Addr{netip.MustParseAddr(one)}, nil
		},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if !strings.HasPrefix(address, "192.0.2.") {
				return nil, fmt.Errorf("%s was dialled", address)
			}
			var d net.Dialer
			return d.DialContext(ctx, network, at)
		},
	}, &tls.Config{InsecureSkipVerify: true}) // the name of the test's certificate is another
}

func TestFetch(t *testing.T) {
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to := func(u string) { http.Redirect(w, r, u, http.StatusFound) }
		switch r.URL.Path {
		case "/keys":
			fmt.Fprint(w, keys)
		case "/.well-known/openid-configuration":
			fmt.Fprint(w, `{"jwks_uri":"https://good.example/keys"}`)
		case "/lies/.well-known/openid-configuration":
			fmt.Fprint(w, `{"jwks_uri":"https://127.0.0.1/keys"}`)
		case "/moved":
			to("https://other.example/keys")
		case "/inside":
			to("https://169.254.169.254/latest")
		case "/named":
			to("https://inside.example/keys")
		case "/plain":
			to("http://good.example/keys")
		case "/circle":
			to("https://good.example/circle")
		case "/again": // the same name, which has another address by then
			to("https://rebinds.example/keys")
		case "/large":
			fmt.Fprint(w, strings.Repeat(" ", maxBytes), keys)
		case "/empty":
			fmt.Fprint(w, `{"keys":[]}`)
		case "/text":
			fmt.Fprint(w, `root:x:0:0`)
		default:
			http.NotFound(w, r)
		}
	}))
	defer srv.Close()
	addrs := map[string][]string{
		"good.example": {"192.0.2.1"}, "other.example": {"192.0.2.2"}, "inside.example": {"127.0.0.1"}, "rebinds.example": {"192.0.2.3", "169.254.169.254"},
	}
	for _, c := range []struct{ url, want string }{
		{"https://good.example/keys", ""},
		{"issuer:https://good.example", ""},
		{"issuer:https://good.example/lies", "is not called"},
		{"issuer:https://good.example/nobody", "jwksUri"},
		{"https://good.example/moved", ""},
		{"https://good.example/inside", "is not called"},
		{"https://good.example/named", "is not called"},
		{"https://rebinds.example/again", "is not called"},
		{"https://good.example/plain", "without TLS"},
		{"https://good.example/circle", "too often"},
		{"https://good.example/large", "more than"},
		{"https://good.example/empty", "no key"},
		{"https://good.example/text", "not JSON"},
		{"https://good.example/absent", "404"},
		{"http://good.example/keys", "without TLS"},
		{"https://127.0.0.1/keys", "is not called"},
		{"https://[::1]/keys", "is not called"},
		{"https://[::ffff:169.254.169.254]/keys", "is not called"},
		{"https://2130706433/keys", "no such host"}, // 127.0.0.1 to some
		{"https://nobody.example/keys", "no such host"},
		{"https://me:secret@good.example/keys", "password"},
		{"file:///etc/passwd", "by \"file\""},
		{"https:///keys", "no host"},
	} {
		t.Run(c.url, func(t *testing.T) {
			from := policy.KeySource{URL: c.url}
			if rest, ok := strings.CutPrefix(c.url, "issuer:"); ok {
				from = policy.KeySource{URL: rest, Discover: true}
			}
			got, err := source(false, reaches(srv, addrs))(t.Context(), from)
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want == "" && (!strings.Contains(got, `"kid":"a"`) || strings.Contains(got, "secret") || strings.Contains(got, "shared") || strings.Contains(got, "broken")):
				t.Errorf("got %s", got)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%q, %v; want %q", got, err, c.want)
			case err != nil && strings.Contains(err.Error(), "root:"):
				t.Errorf("the error shows what was answered: %v", err)
			}
		})
	}
}

// TestKept has a key set that was fetched outlive failures, and nobody told of the same failure twice.
func TestKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type told struct{ keys, problem string }
		var all []told
		n := 0
		by := transport(func(*http.Request) (*http.Response, error) {
			n++
			rec := httptest.NewRecorder()
			if n >= 3 && n <= 6 {
				rec.WriteHeader(http.StatusBadGateway)
			} else if n != 1 {
				fmt.Fprint(rec, keys)
			} else {
				rec.WriteHeader(http.StatusNotFound)
			}
			return rec.Result(), nil
		})
		f := New(false, by, func(_ policy.KeySource, keys, problem string) { all = append(all, told{keys, problem}) }, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		f.Want([]policy.KeySource{{URL: "https://good.example/keys"}})
		done := make(chan struct{})
		go func() { f.Run(ctx); close(done) }()
		time.Sleep(refresh + time.Hour)
		synctest.Wait()
		f.Want(nil)
		tried := n
		time.Sleep(time.Hour)
		if n != tried {
			t.Error("what nobody wants is fetched")
		}
		stop()
		<-done
		if len(all) != 4 || all[0].keys != "" || !strings.Contains(all[0].problem, "404") || all[1].keys == "" || all[1].problem != "" ||
			all[2].keys != all[1].keys || !strings.Contains(all[2].problem, "502") || all[3] != all[1] {
			t.Errorf("told %+v", all)
		}
	})
}

type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
