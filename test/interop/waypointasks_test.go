package interop

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayfake "sigs.k8s.io/gateway-api/pkg/client/clientset/versioned/fake"
)

// authorizes answers as an extension provider: yes to who asks for it.
func authorizes(t *testing.T, at string) {
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// What a request already has of its own.
		w.Header().Set("Host", "evil.example")
		w.Header().Set("Content-Language", "evil")
		w.Header().Set("X-Saw", strings.Join(slices.Sorted(maps.Keys(r.Header)), " "))
		if r.Header.Get("X-Ask") == "please" {
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("X-Said", "yes to "+r.URL.Path)
			w.Header().Set("X-Body", string(body))
			return
		}
		w.Header().Set("X-Why", "because")
		w.WriteHeader(http.StatusUnavailableForLegalReasons)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
}

// checks answers as a provider of Envoy's protocol.
func checks(t *testing.T, at string) {
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	authv3.RegisterAuthorizationServer(srv, checker{})
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
}

type checker struct {
	authv3.UnimplementedAuthorizationServer
}

func (checker) Check(_ context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	headers := r.GetAttributes().GetRequest().GetHttp().GetHeaders()
	if headers["x-ask"] != "please" {
		return &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.PermissionDenied)}, HttpResponse: &authv3.CheckResponse_DeniedResponse{
			DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode_PaymentRequired}},
		}}, nil
	}
	var add []*corev3.HeaderValueOption
	for k, v := range map[string]string{"X-Said": "yes to " + r.GetAttributes().GetRequest().GetHttp().GetPath(), "X-Saw": strings.Join(slices.Sorted(maps.Keys(headers)), " "), ":path": "/evil", "host": "evil.example"} {
		add = append(add, &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: k, Value: v}})
	}
	return &authv3.CheckResponse{Status: &status.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{Headers: add}}}, nil
}

// waypointRouteAsks has whom a route names decide about its requests, by both protocols, of which it sees what the route says.
func waypointRouteAsks(t *testing.T, gateways *gatewayfake.Clientset, ask func(authority, path string, headers ...string) (*http.Response, string, error)) {
	apply, remove := inventoryRoute(t, gateways)
	at := func(path string, headers ...string) (int, http.Header, string) {
		t.Helper()
		res, body, err := ask("10.96.0.9:80", path, headers...)
		if err != nil {
			t.Error(err)
			return 0, nil, ""
		}
		return res.StatusCode, res.Header, body
	}
	const please, other = "x-ask: please\r\n", "x-other: secret\r\nx-said: spoofed\r\n"
	to := `, backendRefs: [{name: inventory, port: 80}]}`
	asking := func(what, auth string, code int) {
		t.Helper()
		apply(`[{matches: [{path: {value: /guarded}}], filters: [{type: ExternalAuth, externalAuth: ` + auth + `}]` + to +
			`, {filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-rule, value: ` + what + `}]}}]` + to + `]`)
		eventually(t, what, 30*time.Second, func() error {
			res, body, err := ask("10.96.0.9:80", "/")
			if err == nil && res.Header.Get("X-Rule") != what {
				err = fmt.Errorf("%s %s", res.Status, body)
			}
			return err
		})
		if got, _, body := at("/guarded/a", please, other); got != code {
			t.Errorf("%s: %d, want %d\n%s", what, got, code, body)
		}
	}
	refused := map[string]int{"http": 451, "grpc": 402}
	for what, auth := range map[string]string{
		"http": `{protocol: HTTP, backendRef: {name: authz, port: 9001}, http: {allowedHeaders: [X-Ask]}}`,
		"grpc": `{protocol: GRPC, backendRef: {name: authz, port: 9002}, grpc: {allowedHeaders: [x-ask]}}`,
	} {
		asking(what, auth, 200)
		_, _, body := at("/guarded/a", please, other)
		for _, has := range []string{"X-Said: yes to /guarded/a\n", "X-Other: secret\n", "Asked-Host: inventory\n"} {
			if !strings.Contains(strings.ReplaceAll(body, "\r", ""), has) {
				t.Errorf("%s: the application does not see %q:\n%s", what, has, body)
			}
		}
		for _, not := range []string{"evil", "spoofed"} {
			if strings.Contains(body, not) {
				t.Errorf("%s: the application sees %q:\n%s", what, not, body)
			}
		}
		if saw := regexp.MustCompile("X-Saw: .*").FindString(body); !strings.Contains(strings.ToLower(saw), "x-ask") || strings.Contains(strings.ToLower(saw), "x-other") {
			t.Errorf("%s: who is asked saw %q", what, saw)
		}
		if code, h, body := at("/guarded/a"); code != refused[what] || what == "http" && h.Get("X-Why") != "because" {
			t.Errorf("%s: who does not ask well: %d %v\n%s", what, code, h, body)
		}
	}
	asking("all", `{protocol: GRPC, backendRef: {name: authz, port: 9002}}`, 200)
	if _, _, body := at("/guarded/a", please, other); !regexp.MustCompile("X-Saw: .*x-other").MatchString(body) {
		t.Errorf("who is asked by gRPC about everything does not see it:\n%s", body)
	}
	asking("unseen", `{protocol: HTTP, backendRef: {name: authz, port: 9001}}`, 451)
	asking("below", `{protocol: HTTP, backendRef: {name: authz, port: 9001}, http: {path: /check, allowedHeaders: [x-ask], allowedResponseHeaders: [x-said]}}`, 200)
	if _, _, body := at("/guarded/a", please); !strings.Contains(body, "X-Said: yes to /check/guarded/a") || strings.Contains(body, "X-Saw") {
		t.Errorf("a prefix, and one header to copy:\n%s", body)
	}
	asking("body", `{protocol: HTTP, backendRef: {name: authz, port: 9001}, http: {allowedHeaders: [x-ask]}, forwardBody: {maxSize: 10}}`, 200)
	if code, _, body := at("/guarded/a", please, "content-length: 5\r\n\r\nhello"); code != 200 || !strings.Contains(body, "X-Body: hello") || !strings.Contains(body, "Content-Length: 5") {
		t.Errorf("a body: %d\n%s", code, body)
	}
	if code, _, body := at("/guarded/a", please, "content-length: 11\r\n\r\nhello again"); code != 413 {
		t.Errorf("a body that is too long to be asked about: %d, want 413\n%s", code, body)
	}
	asking("dead", `{protocol: HTTP, backendRef: {name: authz, port: 9003}}`, 403)
	asking("absent", `{protocol: HTTP, backendRef: {name: absent, port: 80}}`, 500)
	remove()
	eventually(t, "nobody to be asked", 30*time.Second, func() error {
		res, _, err := ask("10.96.0.9:80", "/guarded/a")
		if err == nil && res.StatusCode != 200 {
			err = errors.New(res.Status)
		}
		return err
	})
}

// waypointAsks has a provider of the mesh's configuration decide about what a CUSTOM policy matches, and about nothing else.
func waypointAsks(t *testing.T, istio *istiofake.Clientset, guarded func(name, spec string), get func(authority, path string, headers ...string) (int, string, error)) {
	remove := func(name string) {
		t.Helper()
		if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	guarded("asks", "action: CUSTOM\nprovider: {name: asked}\n"+`rules: [{to: [{operation: {paths: ["/ext*"]}}]}]`)
	please := "x-ask: please\r\n"
	for _, c := range []struct {
		path, headers string
		want          int
	}{
		{"/", "", 200}, {"/ext", "", 451}, {"/ext/a", please, 200},
		{"/ext/a", "x-ask: no\r\nx-said: yes\r\n", 451}, {"/public/../ext", "", 451}, {"/ext%2Fa", "", 451},
	} {
		code, body, err := get("10.96.0.9:80", c.path, c.headers)
		if err != nil || code != c.want {
			t.Errorf("%s %q: %d %v, want %d\n%s", c.path, c.headers, code, err, c.want, body)
		}
		if c.path != "/" && code == 200 && !strings.Contains(body, "X-Said: yes to /ext/a") {
			t.Errorf("what the provider said does not reach the application:\n%s", body)
		}
	}
	// The other policies have their say too.
	guarded("none-of-that", "action: DENY\n"+`rules: [{to: [{operation: {paths: ["/ext/deny"]}}]}]`)
	if code, _, err := get("10.96.0.9:80", "/ext/deny", please); err != nil || code != 403 {
		t.Errorf("what a provider allows and a DENY policy matches: %d %v", code, err)
	}
	remove("none-of-that")
	remove("asks")
	guarded("asks-nobody", "action: CUSTOM\nprovider: {name: absent}\n"+`rules: [{to: [{operation: {paths: ["/ext*"]}}]}]`)
	if code, _, err := get("10.96.0.9:80", "/ext", please); err != nil || code != 403 {
		t.Errorf("a provider that is not there: %d %v, want 403", code, err)
	}
	if code, _, err := get("10.96.0.9:80", "/", ""); err != nil || code != 200 {
		t.Errorf("what nobody has to be asked about: %d %v", code, err)
	}
	remove("asks-nobody")
	eventually(t, "nobody to be asked", time.Minute, func() error {
		code, _, err := get("10.96.0.9:80", "/ext")
		if err == nil && code != 200 {
			err = fmt.Errorf("%d", code)
		}
		return err
	})
}
