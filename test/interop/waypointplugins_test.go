package interop

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	extensionsv1alpha1 "istio.io/client-go/pkg/apis/extensions/v1alpha1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// pluginBinary builds the module in plugin/ with the compiler at hand, and returns its path.
func pluginBinary(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "plugin.wasm")
	cmd := exec.Command("go", "build", "-buildmode=c-shared", "-ldflags=-s -w", "-o", bin, ".")
	cmd.Dir, cmd.Env = "plugin", append(os.Environ(), "GOOS=wasip1", "GOARCH=wasm")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building a module: %v\n%s", err, out)
	}
	return bin
}

// waypointPlugins has a waypoint run a module of a WasmPlugin, and refuse requests where it does not run.
func waypointPlugins(t *testing.T, istio *istiofake.Clientset, guarded func(name, spec string), ask func(authority, path string, headers ...string) (*http.Response, string, error)) {
	ctx := t.Context()
	code, err := os.ReadFile(os.Getenv(pluginPath))
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(code)
	digest := hex.EncodeToString(sum[:])
	// Nothing is fetched from a loopback address.
	const host = "192.0.2.80"
	if out, err := exec.Command("ip", "address", "add", host+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l, err := net.Listen("tcp", host+":80")
	if err != nil {
		t.Fatal(err)
	}
	broken := append([]byte{}, code...)
	for i := len(broken) / 2; i < len(broken)/2+64; i++ {
		broken[i] ^= 0x55
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/plugin.wasm":
			_, _ = w.Write(code)
		case "/broken.wasm":
			_, _ = w.Write(broken)
		default:
			http.NotFound(w, r)
		}
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })

	api := istio.ExtensionsV1alpha1().WasmPlugins("shop")
	generation := int64(0)
	apply := func(spec string, want func(said map[string]string) bool) {
		t.Helper()
		generation++
		p := &extensionsv1alpha1.WasmPlugin{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "plugin", UID: "uid-plugin", Generation: generation}}
		if err := yaml.Unmarshal([]byte("targetRefs: [{kind: Service, name: inventory}]\n"+spec), &p.Spec); err != nil {
			t.Fatal(err)
		}
		_, err := api.Update(ctx, p, metav1.UpdateOptions{})
		if err != nil {
			_, err = api.Create(ctx, p, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "the WasmPlugin to be judged", time.Minute, func() error {
			p, err := api.Get(ctx, "plugin", metav1.GetOptions{})
			if err != nil {
				return err
			}
			return judged(p.Status.Conditions, generation, want)
		})
	}
	known := "url: http://" + host + "/plugin.wasm\nsha256: " + digest + "\n"
	runs := holds("True Accepted", "True Enforced")
	says := func(what string, code int, header string, headers ...string) string {
		t.Helper()
		res, body, err := ask("10.96.0.9:80", "/items", headers...)
		if err != nil || res.StatusCode != code || res.Header.Get("x-says") != header {
			t.Errorf("%s: %v %v, want %d and %q\n%s", what, err, res, code, header, body)
			return ""
		}
		return body
	}

	began := time.Now()
	apply(known+"pluginConfig: {says: one}\nvmConfig: {env: [{name: WHO, value: me}]}", runs)
	t.Logf("a module of %d bytes runs %v after its WasmPlugin came", len(code), time.Since(began).Round(time.Millisecond))
	res, body, err := ask("10.96.0.9:80", "/items")
	if err != nil || res.StatusCode != 200 || res.Header.Get("x-says") != "one" || res.Header.Get("x-env") != "me" || !strings.Contains(body, "X-Passed: /items") {
		t.Fatalf("the module does not run: %v %v\n%s", err, res, body)
	}
	if leaks := res.Header.Get("x-leaks"); leaks != "" {
		t.Errorf("the module can: %s", leaks)
	}
	says("a request that it refuses", 418, "one", "x-do: refuse\r\n")

	// What it is told reaches the next request.
	apply(known+"pluginConfig: {says: two}", runs)
	says("told another thing", 200, "two")

	// Who may ask is decided before one that has no phase, and after one before: of what that has made of the request.
	guarded("no-plugin", "action: DENY\n"+`rules: [{to: [{operation: {paths: ["/items", "/no"]}}]}]`)
	apply(known+"pluginConfig: {says: late, path: /yes}", runs)
	if body := says("what is denied", 403, ""); strings.Contains(body, "late") {
		t.Errorf("a plugin of no phase hears of what is denied: %s", body)
	}
	apply(known+"phase: AUTHZ\npluginConfig: {says: early, path: /yes}", runs)
	if body := says("what is not denied any more", 200, "early"); !strings.Contains(body, "X-Passed: /yes") {
		t.Errorf("the request is not what the plugin made of it: %s", body)
	}
	apply(known+"phase: AUTHN\npluginConfig: {says: first, path: /no}", runs)
	says("what is denied for what the plugin made of it", 403, "first")
	if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(ctx, "no-plugin", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}

	// At another port it is nowhere.
	apply(known+"pluginConfig: {says: elsewhere}\nmatch: [{ports: [{number: 81}]}]", runs)
	says("a request to another port", 200, "")

	// A module that fails refuses what comes, or is passed by.
	for strategy, want := range map[string]int{"FAIL_CLOSE": 503, "FAIL_OPEN": 200} {
		apply(known+"pluginConfig: {says: "+strategy+"}\nvmConfig: {env: [{name: WHO, value: "+strategy+"}]}\nfailStrategy: "+strategy, runs)
		says("before it fails, "+strategy, 200, strategy)
		if _, _, err := ask("10.96.0.9:80", "/items", "x-do: fail\r\n"); err != nil {
			t.Fatal(err)
		}
		says("after it has failed, "+strategy, want, "")
	}

	// So it is where the module is not there: what it was before goes on while there is something to fetch, and nothing of what
	// cannot be had.
	apply(known+"pluginConfig: {says: before}\nvmConfig: {env: [{name: WHO, value: again}]}", runs)
	says("before another one", 200, "before")
	apply("url: http://"+host+"/absent.wasm\nsha256: "+digest, holds("True Accepted", "False ModuleNotFetched: what it was before holds meanwhile: http://"+host+"/absent.wasm: the answer is 404"))
	says("while another one is not there", 200, "before")
	apply("url: file:///plugin.wasm", holds("False Invalid: no module is loaded, and requests are answered with 503", "False UnsupportedValue"))
	if body := says("without a module", 503, ""); !strings.Contains(body, "the module of WasmPlugin shop/plugin does not run") {
		t.Errorf("it is not said why: %s", body)
	}
	apply("url: file:///plugin.wasm\nfailStrategy: FAIL_OPEN", holds("False Invalid", "False UnsupportedValue"))
	says("without a module that has to run", 200, "")

	// One that Envoy refuses is left off, and the rest goes on.
	apply(known+"pluginConfig: {bad: true}", holds("True Accepted", "False NodesRefuse"))
	says("with a configuration that the module refuses", 503, "")
	sum = sha256.Sum256(broken)
	apply("url: http://"+host+"/broken.wasm\nsha256: "+hex.EncodeToString(sum[:]), holds("True Accepted", "False NodesRefuse"))
	says("a module that is none", 503, "")
	guarded("nobody", "action: DENY\n"+`rules: [{to: [{operation: {paths: ["/items"]}}]}]`)
	if err := istio.SecurityV1().AuthorizationPolicies("shop").Delete(ctx, "nobody", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	apply(known+"pluginConfig: {says: again}", runs)
	says("after all that", 200, "again")
	if err := api.Delete(ctx, "plugin", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no plugin", time.Minute, func() error {
		res, _, err := ask("10.96.0.9:80", "/items")
		if err == nil && res.Header.Get("x-says") != "" {
			err = fmt.Errorf("%v", res.Header)
		}
		return err
	})
}
