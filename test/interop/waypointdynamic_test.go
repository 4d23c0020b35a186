package interop

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// Where the test's network has what is outside: a server with a public address, and the resolver of all.
const (
	publicServer = "203.0.113.5"
	testResolver = "127.0.3.53"
)

// resolves answers for names on the test's resolver, with addresses of both families, and counts who was asked for.
func resolves(t *testing.T, names map[string][]string) (asked func(name string) int) {
	t.Helper()
	c, err := net.ListenPacket("udp", testResolver+":53")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	var mu sync.Mutex
	counts := map[string]int{}
	go func() {
		b := make([]byte, 4096)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			var p dnsmessage.Parser
			h, err := p.Start(b[:n])
			if err != nil {
				continue
			}
			q, err := p.Question()
			if err != nil {
				continue
			}
			name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
			mu.Lock()
			counts[name]++
			mu.Unlock()
			h.Response, h.RecursionAvailable = true, true
			m := dnsmessage.Message{Header: h, Questions: []dnsmessage.Question{q}}
			addrs, known := names[name]
			if !known {
				m.RCode = dnsmessage.RCodeNameError
			}
			for _, s := range addrs {
				a := netip.MustParseAddr(s)
				r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 30}}
				switch {
				case a.Is4() && q.Type == dnsmessage.TypeA:
					r.Body = &dnsmessage.AResource{A: a.As4()}
				case a.Is6() && q.Type == dnsmessage.TypeAAAA:
					r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
				default:
					continue
				}
				m.Answers = append(m.Answers, r)
			}
			if packed, err := m.Pack(); err == nil {
				_, _ = c.WriteTo(packed, from)
			}
		}
	}()
	return func(name string) int {
		mu.Lock()
		defer mu.Unlock()
		return counts[name]
	}
}

// waypointDynamic has a host with a wildcard lead to whatever name below it a request is for, or TLS asks for, and nowhere else.
func waypointDynamic(t *testing.T, istio *istiofake.Clientset, open func(authority string) (net.Conn, error)) {
	serve := func(at, says string, config *tls.Config) {
		t.Helper()
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		if config != nil {
			l = tls.NewListener(l, config)
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, says, " ", r.Host) })}
		go func() { _ = srv.Serve(l) }()
		t.Cleanup(func() { _ = srv.Close() })
	}
	cert := httptest.NewUnstartedServer(nil)
	cert.StartTLS()
	t.Cleanup(cert.Close)
	config := &tls.Config{Certificates: cert.TLS.Certificates}
	serve(publicServer+":80", "public", nil)
	serve(publicServer+":8443", "public", config)
	serve("127.0.1.1:80", "private", nil)
	serve("127.0.1.1:8443", "private", config)
	asked := resolves(t, map[string][]string{
		"a.dynamic.example": {publicServer}, "b.c.dynamic.example": {publicServer}, "elsewhere.example": {publicServer}, "dynamic.example": {publicServer},
		"private.dynamic.example": {"127.0.1.1"}, "both.dynamic.example": {"127.0.1.1", publicServer}, "link.dynamic.example": {"169.254.169.254"},
		"lan.dynamic.example": {"10.1.2.3"}, "mapped.dynamic.example": {"::ffff:127.0.1.1"}, "nat64.dynamic.example": {"64:ff9b::7f00:101"}, "loop.dynamic.example": {"::1"},
	})
	e := &networkingv1.ServiceEntry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dynamic", UID: "uid-dynamic"}}
	if err := errors.Join(yaml.Unmarshal([]byte(`
hosts: ["*.dynamic.example"]
resolution: DYNAMIC_DNS
ports:
- {number: 80, name: http, protocol: HTTP}
- {number: 443, name: tls, protocol: TLS, targetPort: 8443}
- {number: 9000, name: tcp, protocol: TCP}
`), &e.Spec), yaml.Unmarshal([]byte(`addresses: [{value: 240.240.0.9, host: "*.dynamic.example"}]`), &e.Status)); err != nil {
		t.Fatal(err)
	}
	if _, err := istio.NetworkingV1().ServiceEntries("shop").Create(t.Context(), e, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	get := func(host string) (int, string, error) {
		c, err := open("240.240.0.9:80")
		if err != nil {
			return 0, "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		res, body, err := roundTrip(c, host, "/")
		if err != nil {
			return 0, "", err
		}
		return res.StatusCode, body, nil
	}
	overTLS := func(port, name string) (string, error) {
		c, err := open("240.240.0.9:" + port)
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(30 * time.Second))
		tc := tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true})
		_, body, err := roundTrip(tc, name, "/")
		return body, err
	}
	eventually(t, "an answer by name", time.Minute, func() error {
		code, body, err := get("a.dynamic.example")
		if err == nil && code != 200 {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
	for _, c := range []struct {
		host, says string
		code       int
	}{
		{"a.dynamic.example", "public a.dynamic.example", 200},
		{"A.Dynamic.Example", "public ", 200},
		{"b.c.dynamic.example:80", "public b.c.dynamic.example:80", 200},
		{"both.dynamic.example", "public both.dynamic.example", 200}, // the other address is left out
		{"dynamic.example", "", 403}, {"elsewhere.example", "", 403}, {"xdynamic.example", "", 403},
		{"a.dynamic.example:8443", "", 403}, {"127.0.1.1", "", 403}, {"[::1]", "", 403},
		{"private.dynamic.example", "", 503}, {"link.dynamic.example", "", 503}, {"lan.dynamic.example", "", 503},
		{"mapped.dynamic.example", "", 503}, {"nat64.dynamic.example", "", 503}, {"loop.dynamic.example", "", 503}, {"unknown.dynamic.example", "", 503},
	} {
		code, body, err := get(c.host)
		if err != nil || code != c.code || !strings.HasPrefix(body, c.says) || strings.HasPrefix(body, "private") {
			t.Errorf("%s: %d %q %v, want %d %q", c.host, code, body, err, c.code, c.says)
		}
	}
	for _, c := range []struct {
		port, name string
		ok         bool
	}{
		{"443", "a.dynamic.example", true}, {"443", "b.c.dynamic.example", true}, {"443", "both.dynamic.example", true},
		{"443", "elsewhere.example", false}, {"443", "dynamic.example", false}, {"443", "private.dynamic.example", false}, {"443", "lan.dynamic.example", false},
		{"443", "mapped.dynamic.example", false}, {"443", "", false}, {"9000", "elsewhere.example", false},
	} {
		body, err := overTLS(c.port, c.name)
		if (err == nil) != c.ok || c.ok && body != "public "+c.name || strings.HasPrefix(body, "private") {
			t.Errorf("TLS at %s for %q: %q %v", c.port, c.name, body, err)
		}
	}
	for _, name := range []string{"elsewhere.example", "dynamic.example"} {
		if n := asked(name); n > 0 {
			t.Errorf("%s, which the host does not cover, was looked up %d times", name, n)
		}
	}
}
