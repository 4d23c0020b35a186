package interop

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// waypointForward has connections go by a proxy that asks for them by CONNECT and by POST, in plaintext and by TLS, and endpoints be told
// the clients' addresses, by connections and by requests.
func waypointForward(t *testing.T, istio *istiofake.Clientset, me *identity.Bundle, want string) {
	open := opener(t, me, want)
	says := func(from, authority, line string) (string, error) {
		c, err := open(from, authority)
		if err != nil {
			return "", err
		}
		defer c.Close()
		if _, err := io.WriteString(c, line+"\n"); err != nil {
			return "", err
		}
		answer, err := bufio.NewReader(c).ReadString('\n')
		return strings.TrimSpace(answer), err
	}
	cert := httptest.NewUnstartedServer(nil)
	cert.StartTLS()
	t.Cleanup(cert.Close)
	serve := func(at string, config *tls.Config, handle func(c net.Conn, r *bufio.Reader)) {
		t.Helper()
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		if config != nil {
			l = tls.NewListener(l, config)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					handle(c, bufio.NewReader(c))
				}()
			}
		}()
	}
	proxy := func(c net.Conn, r *bufio.Reader) {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		method, rest, _ := strings.Cut(line, " ")
		host := strings.Fields(rest)[0]
		for line != "\r\n" {
			if line, err = r.ReadString('\n'); err != nil {
				return
			}
		}
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\n")
		asked, err := r.ReadString('\n')
		if err != nil {
			return
		}
		fmt.Fprint(c, method, " ", host, " ", asked)
		_, _ = io.Copy(io.Discard, r)
	}
	serve("127.0.2.1:3128", nil, proxy)
	serve("127.0.2.1:3129", &tls.Config{Certificates: cert.TLS.Certificates}, proxy)
	both := &http.Server{Protocols: &http.Protocols{}, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).Flush()
		if asked, err := bufio.NewReader(r.Body).ReadString('\n'); err == nil {
			fmt.Fprint(w, r.Method, " ", r.Host, " ", asked) // and its answer ends before the question does
		}
	})}
	both.Protocols.SetUnencryptedHTTP2(true)
	l, err := net.Listen("tcp", "127.0.2.1:3130")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = both.Serve(l) }()
	t.Cleanup(func() { _ = both.Close() })
	serve("127.0.2.2:9000", nil, func(c net.Conn, r *bufio.Reader) {
		client, err := proxyHeader(r)
		asked, _ := r.ReadString('\n')
		fmt.Fprint(c, client, " ", err, " ", asked)
	})
	serve("127.0.2.2:80", nil, func(c net.Conn, r *bufio.Reader) {
		client, err := proxyHeader(r)
		for {
			if _, err := http.ReadRequest(r); err != nil {
				return
			}
			body := fmt.Sprint(client, " ", err)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s", len(body), body)
		}
	})

	apply := func(name, entry, addr, spec string) {
		t.Helper()
		e := &networkingv1.ServiceEntry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name)}}
		if err := errors.Join(yaml.Unmarshal([]byte(entry), &e.Spec), yaml.Unmarshal([]byte(`addresses: [{value: `+addr+`, host: `+name+`.example}]`), &e.Status)); err != nil {
			t.Fatal(err)
		}
		if _, err := istio.NetworkingV1().ServiceEntries("shop").Create(t.Context(), e, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		d := &networkingv1.DestinationRule{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name)}}
		if err := yaml.Unmarshal([]byte("host: "+name+".example\ntrafficPolicy: "+spec), &d.Spec); err != nil {
			t.Fatal(err)
		}
		if _, err := istio.NetworkingV1().DestinationRules("shop").Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	ruled := func(name, spec string) {
		t.Helper()
		d := &networkingv1.DestinationRule{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name)}}
		if err := yaml.Unmarshal([]byte("host: "+name+".example\ntrafficPolicy: "+spec), &d.Spec); err != nil {
			t.Fatal(err)
		}
		if _, err := istio.NetworkingV1().DestinationRules("shop").Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	const tunnel = `tunnel: {targetHost: db.example, targetPort: 5432`
	apply("proxy", `{hosts: [proxy.example], resolution: STATIC, endpoints: [{address: 127.0.2.1}], ports: [{number: 3128, name: tcp, protocol: TCP}, {number: 3129, name: tcp-tls, protocol: TCP}, {number: 3130, name: http2, protocol: HTTP2}]}`, "240.240.0.11", `{`+tunnel+`}}`)
	apply("db", `{hosts: [db.example], resolution: STATIC, endpoints: [{address: 192.0.2.1}], ports: [{number: 5432, name: tcp, protocol: TCP}, {number: 443, name: tls, protocol: TLS}, {number: 5433, name: tcp2, protocol: TCP}]}`, "240.240.0.12", `{}`)
	apply("told", `{hosts: [told.example], resolution: STATIC, endpoints: [{address: 127.0.2.2}], ports: [{number: 9000, name: tcp, protocol: TCP}, {number: 80, name: http, protocol: HTTP}]}`, "240.240.0.13", `{proxyProtocol: {version: V1}}`)
	v := &networkingv1.VirtualService{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db", UID: "uid-db"}}
	if err := yaml.Unmarshal([]byte(`{hosts: [db.example], tcp: [{match: [{port: 5432}], route: [{destination: {host: proxy.example, port: {number: 3128}}}]}, {match: [{port: 443}], route: [{destination: {host: proxy.example, port: {number: 3129}}}]}, {match: [{port: 5433}], route: [{destination: {host: proxy.example, port: {number: 3130}}}]}]}`), &v.Spec); err != nil {
		t.Fatal(err)
	}
	if _, err := istio.NetworkingV1().VirtualServices("shop").Create(t.Context(), v, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	answered := func(what, authority, want string) {
		t.Helper()
		eventually(t, what, 30*time.Second, func() error {
			got, err := says("127.0.0.8", authority, "hello")
			if err == nil && got != want {
				err = fmt.Errorf("%q, want %q", got, want)
			}
			return err
		})
	}
	answered("a connection by CONNECT", "240.240.0.12:5432", "CONNECT db.example:5432 hello")
	ruled("proxy", `{`+tunnel+`, protocol: POST}}`)
	answered("a connection by POST", "240.240.0.12:5433", "POST db.example:5432 hello")
	if got, err := says("127.0.0.8", "240.240.0.12:5432", "hello"); err == nil { // Envoy 1.40 would not survive it
		t.Errorf("by POST in HTTP/1.1: %q", got)
	}
	ruled("proxy", `{`+tunnel+`}, tls: {mode: SIMPLE, insecureSkipVerify: true}}`)
	answered("a connection by CONNECT in TLS", "240.240.0.12:443", "CONNECT db.example:5432 hello")
	ruled("proxy", `{tunnel: {targetHost: "no host", targetPort: 5432}}`)
	eventually(t, "nothing to be sent where nothing can be asked for", 30*time.Second, func() error {
		got, err := says("127.0.0.8", "240.240.0.12:5432", "hello")
		if err == nil {
			return fmt.Errorf("%q", got)
		}
		return nil
	})
	for _, version := range []string{"V1", "V2"} {
		ruled("told", `{proxyProtocol: {version: `+version+`}}`)
		for _, from := range []string{"127.0.0.8", "127.0.0.7"} {
			eventually(t, version+" of "+from, 30*time.Second, func() error {
				got, err := says(from, "240.240.0.13:9000", "hello")
				if err == nil && got != version+" "+from+" <nil> hello" {
					err = fmt.Errorf("%q", got)
				}
				if err != nil {
					return err
				}
				c, err := open(from, "240.240.0.13:80")
				if err != nil {
					return err
				}
				defer c.Close()
				if _, body, err := roundTrip(c, "told.example", "/"); err != nil || body != version+" "+from+" <nil>" {
					return fmt.Errorf("%q %v", body, err)
				}
				return nil
			})
		}
	}
}

// waypointClients has rules be for clients by the labels of the pods whose addresses they come from, and connections by these addresses, by
// those that are asked for and by the namespaces of identities.
func waypointClients(t *testing.T, istio *istiofake.Clientset, me *identity.Bundle, want string) {
	serve := func(at, says string) {
		t.Helper()
		l, err := net.Listen("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintln(c, says)
				c.Close()
			}
		}()
	}
	serve("127.0.2.3:9000", "known")
	serve("127.0.2.4:9000", "others")
	open := opener(t, me, want)
	for _, e := range []struct{ name, addr, endpoint string }{{"known", "240.240.0.21", "127.0.2.3"}, {"others", "240.240.0.22", "127.0.2.4"}} {
		s := &networkingv1.ServiceEntry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: e.name, UID: types.UID("uid-" + e.name)}}
		if err := errors.Join(yaml.Unmarshal([]byte(`{hosts: [`+e.name+`.example], resolution: STATIC, endpoints: [{address: `+e.endpoint+`}], ports: [{number: 9000, name: tcp, protocol: TCP}, {number: 80, name: http, protocol: HTTP}]}`), &s.Spec),
			yaml.Unmarshal([]byte(`addresses: [{value: `+e.addr+`, host: `+e.name+`.example}]`), &s.Status)); err != nil {
			t.Fatal(err)
		}
		if _, err := istio.NetworkingV1().ServiceEntries("shop").Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	v := &networkingv1.VirtualService{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "others", UID: "uid-others"}}
	apply := func(match string) {
		t.Helper()
		v.Spec.Reset()
		if err := yaml.Unmarshal([]byte(`
hosts: [others.example]
http: [{match: [{sourceLabels: {role: reader}}], directResponse: {status: 200, body: {string: reader}}}, {directResponse: {status: 200, body: {string: other}}}]
tcp: [{match: [{port: 9000, `+match+`}], route: [{destination: {host: known.example, port: {number: 9000}}}]}]`), &v.Spec); err != nil {
			t.Fatal(err)
		}
		api := istio.NetworkingV1().VirtualServices("shop")
		if _, err := api.Update(t.Context(), v, metav1.UpdateOptions{}); err != nil {
			if _, err := api.Create(t.Context(), v, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	says := func(from, want string) {
		t.Helper()
		eventually(t, "connections of "+from, 30*time.Second, func() error {
			c, err := open(from, "240.240.0.22:9000")
			if err != nil {
				return err
			}
			defer c.Close()
			got, err := bufio.NewReader(c).ReadString('\n')
			if strings.TrimSpace(got) != want {
				return fmt.Errorf("%q (%v), want %q", got, err, want)
			}
			return nil
		})
	}
	asks := func(from, want string) {
		t.Helper()
		eventually(t, "requests of "+from, 30*time.Second, func() error {
			c, err := open(from, "240.240.0.22:80")
			if err != nil {
				return err
			}
			defer c.Close()
			if _, body, err := roundTrip(c, "others.example", "/"); err != nil || body != want {
				return fmt.Errorf("%q %v, want %q", body, err, want)
			}
			return nil
		})
	}
	apply("sourceSubnet: 127.0.0.8/31")
	says("127.0.0.8", "known")
	says("127.0.0.7", "others")
	asks("127.0.0.8", "reader") // the pod "client"
	asks("127.0.0.7", "other")
	apply("sourceNamespace: blog")
	says("127.0.0.8", "others")
	apply("sourceNamespace: shop, destinationSubnets: [240.240.0.0/24]")
	says("127.0.0.7", "known")
	apply("destinationSubnets: [240.240.1.0/24]")
	says("127.0.0.7", "others")
	apply("destinationSubnets: [240.240.1.0/24, 240.240.0.22]")
	says("127.0.0.7", "known")
}

// inventoryRoute writes the rules of the HTTPRoute at the Service inventory, and takes it away.
func inventoryRoute(t *testing.T, gateways *gatewayfake.Clientset) (apply func(rules string), remove func()) {
	api := gateways.GatewayV1().HTTPRoutes("shop")
	apply = func(rules string) {
		t.Helper()
		r := &gatewayv1.HTTPRoute{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "inventory", UID: "uid-route"}}
		if err := yaml.UnmarshalStrict([]byte(`{parentRefs: [{group: "", kind: Service, name: inventory}], rules: `+rules+`}`), &r.Spec); err != nil {
			t.Fatal(err)
		}
		if _, err := api.Update(t.Context(), r, metav1.UpdateOptions{}); err != nil {
			if _, err := api.Create(t.Context(), r, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return apply, func() {
		t.Helper()
		if err := api.Delete(t.Context(), "inventory", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// waypointSessions has what comes with the cookie, or the header, of a session meet the endpoint that it says.
func waypointSessions(t *testing.T, gateways *gatewayfake.Clientset, ask func(authority, path string, headers ...string) (*http.Response, string, error)) {
	apply, remove := inventoryRoute(t, gateways)
	session := func(says string) {
		t.Helper()
		apply(`[{sessionPersistence: ` + says + `, backendRefs: [{name: inventory, port: 80}]}]`)
	}
	met := func(headers ...string) (string, http.Header, error) {
		res, body, err := ask("10.96.0.9:80", "/", headers...)
		if err != nil {
			return "", nil, err
		}
		if res.StatusCode != 200 {
			return "", nil, fmt.Errorf("%d %s", res.StatusCode, body)
		}
		return versionName(strings.Count(body, "version v1")), res.Header, nil
	}
	kept := func(what string, said func(http.Header) string) {
		t.Helper()
		eventually(t, what, 30*time.Second, func() error {
			seen := map[string]bool{}
			for range 30 {
				first, h, err := met()
				if err != nil {
					return err
				}
				with := said(h)
				if with == "" {
					return fmt.Errorf("the answer says nothing: %v", h)
				}
				seen[first] = true
				for range 5 {
					if again, _, err := met(with); err != nil || again != first {
						return fmt.Errorf("with %q it met %s, after %s: %v", with, again, first, err)
					}
				}
			}
			if len(seen) != 2 {
				return fmt.Errorf("all met %v", seen)
			}
			return nil
		})
	}
	session(`{sessionName: who, absoluteTimeout: 1h, cookieConfig: {lifetimeType: Permanent}}`)
	kept("a cookie", func(h http.Header) string {
		for _, c := range (&http.Response{Header: h}).Cookies() {
			if c.Name == "who" && c.MaxAge == 3600 {
				return "cookie: who=" + c.Value + "\r\n"
			}
		}
		return ""
	})
	session(`{sessionName: x-session, type: Header}`)
	kept("a header", func(h http.Header) string {
		if v := h.Get("x-session"); v != "" {
			return "x-session: " + v + "\r\n"
		}
		return ""
	})
	// An endpoint that there is not is none to wait for.
	for range 5 {
		if _, _, err := met("x-session: MTkyLjAuMi4xOjgwODA=\r\n"); err != nil {
			t.Error(err)
		}
	}
	remove()
	eventually(t, "no session", 30*time.Second, func() error {
		_, h, err := met()
		if err == nil && h.Get("x-session") != "" {
			err = errors.New("there is one")
		}
		return err
	})
}

// opener makes a client's tunnels to the waypoint from an address.
func opener(t *testing.T, me *identity.Bundle, want string) func(from, authority string) (net.Conn, error) {
	return func(from, authority string) (net.Conn, error) {
		pool := hbone.NewPool(hbone.PoolConfig{Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			c, err := d.DialContext(ctx, "tcp", k.Addr.String())
			if err != nil {
				return nil, err
			}
			tc := tls.Client(c, me.ClientTLS(k.Wanted()))
			return tc, tc.HandshakeContext(ctx)
		}})
		t.Cleanup(func() { pool.Close() })
		st, _, err := pool.Open(t.Context(), hbone.Key{Src: me.ID, Want: hbone.WantKey([]string{want}), Addr: netip.MustParseAddrPort("127.0.0.1:15008")}, hbone.Request{Authority: authority})
		if err != nil {
			return nil, err
		}
		_ = st.SetDeadline(time.Now().Add(10 * time.Second))
		return st, nil
	}
}

// proxyHeader reads the PROXY protocol's header: its version, and the client's address (haproxy.org, proxy-protocol.txt).
func proxyHeader(r *bufio.Reader) (string, error) {
	if b, err := r.Peek(6); err != nil || string(b) == "PROXY " {
		line, err := r.ReadString('\n')
		fields := strings.Fields(line)
		if err != nil || len(fields) != 6 || fields[1] != "TCP4" {
			return "", fmt.Errorf("%q %v", line, err)
		}
		return "V1 " + fields[2], nil
	}
	head := make([]byte, 16)
	if _, err := io.ReadFull(r, head); err != nil || string(head[:12]) != "\r\n\r\n\x00\r\nQUIT\n" || head[12] != 0x21 || head[13] != 0x11 {
		return "", fmt.Errorf("%q %v", head, err)
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, rest); err != nil || len(rest) < 12 {
		return "", fmt.Errorf("%q %v", rest, err)
	}
	return "V2 " + net.IP(rest[:4]).String(), nil
}
