package interop

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// authorizes answers as an extension provider: yes to who asks for it.
func authorizes(t *testing.T, at string) {
	l, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Ask") == "please" {
			w.Header().Set("X-Said", "yes to "+r.URL.Path)
			return
		}
		w.Header().Set("X-Why", "because")
		w.WriteHeader(http.StatusUnavailableForLegalReasons)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
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
