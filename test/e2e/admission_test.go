package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/warrenmesh/warren/test/e2e/lab"
)

// try applies an object on the server without storing it, and returns what kubectl said.
func try(ctx context.Context, manifest string) (said string, refused bool) {
	cmd := exec.CommandContext(ctx, mesh.KubectlPath(), "apply", "--dry-run=server", "-f", "-")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig())
	cmd.Stdin = strings.NewReader(manifest)
	out, err := cmd.CombinedOutput()
	return string(out), err != nil
}

// post creates an object without storing it, through a proxy of kubectl's: what try does without a process for each.
func post(t *testing.T, proxy, namespace, manifest string) (said string, refused bool) {
	t.Helper()
	var apiVersion, kind string
	for line := range strings.SplitSeq(manifest, "\n") {
		if v, ok := strings.CutPrefix(line, "apiVersion: "); ok {
			apiVersion = v
		}
		if v, ok := strings.CutPrefix(line, "kind: "); ok {
			kind = v
		}
	}
	group := "/apis/" + apiVersion
	if apiVersion == "v1" {
		group = "/api/v1"
	}
	plural := strings.Replace(strings.ToLower(kind)+"s", "ys", "ies", 1)
	res, err := http.Post(proxy+group+"/namespaces/"+namespace+"/"+plural+"?dryRun=All", "application/yaml", strings.NewReader(manifest))
	must(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(t, err)
	for _, w := range res.Header.Values("Warning") {
		said += "Warning: " + w + "\n"
	}
	if res.StatusCode >= 300 {
		var status struct{ Message string }
		must(t, json.Unmarshal(body, &status))
		said += status.Message
	}
	return said, res.StatusCode >= 300
}

func securityObject(kind, namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: %s\nmetadata: {name: %s, namespace: %s}\nspec: %s\n", kind, name, namespace, spec)
}

// judged waits until the webhook is called: its root certificate is written by the replica that leads.
func judged(t *testing.T, namespace string) {
	t.Helper()
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		said, refused := try(t.Context(), securityObject("AuthorizationPolicy", namespace, "probe", `{rules: [{to: [{operation: {ports: [http]}}]}]}`))
		if !refused || !strings.Contains(said, "bad-port") {
			return fmt.Errorf("the webhook is not asked: %s", said)
		}
		return nil
	}))
}

// A user is told what is wrong with a policy, or what it will do that does not meet the eye, when it is applied.
func TestAdmission(t *testing.T) {
	ns := pair(t, "e2e-admission")
	judged(t, ns)
	authz := func(spec string) string { return securityObject("AuthorizationPolicy", ns, "policy", spec) }
	cases := []struct {
		name, object string
		refused      bool
		says         []string // patterns; none: not a word
	}{
		{"mutual TLS for the mesh", securityObject("PeerAuthentication", lab.Namespace, "default", `{mtls: {mode: STRICT}}`), false, nil},
		{"from namespaces, some methods", securityObject("AuthorizationPolicy", lab.Namespace, "read",
			fmt.Sprintf(`{action: ALLOW, rules: [{from: [{source: {namespaces: [%s]}}], to: [{operation: {methods: [GET]}}]}]}`, ns)), false,
			[]string{`Warning: .*methods: HTTP, which only a waypoint sees`, `\d+ workloads that it applies to have no waypoint \(.*` + ns + ` \d+.*\): a rule with methods allows nothing to them`}},
		{"the same with empty lists", securityObject("AuthorizationPolicy", lab.Namespace, "read",
			`{action: ALLOW, rules: [{from: [{source: {namespaces: []}}], to: [{operation: {methods: []}}]}]}`), true,
			[]string{`spec.rules\[0\].from\[0\].source.*the source says nothing.*namespaces: \["shop"\]`}},
		{"the same with nothing behind the colon", securityObject("AuthorizationPolicy", lab.Namespace, "read",
			`{action: ALLOW, rules: [{from: [{source: {namespaces: }}], to: [{operation: {methods: }}]}]}`), true,
			[]string{`spec.rules\[0\].from\[0\].source.*namespaces`}},
		{"empty operation", authz(`{rules: [{to: [{operation: {methods: []}}]}]}`), true, []string{`warren.*the operation says nothing.*\(empty-operation\)`}},
		{"good", authz(fmt.Sprintf(`{rules: [{from: [{source: {namespaces: [%s]}}], to: [{operation: {ports: ["9000"]}}]}]}`, ns)), false, nil},
		{"DENY without rules", authz(`{action: DENY}`), true, []string{`without rules matches nothing and does nothing`}},
		{"port by name", authz(`{rules: [{to: [{operation: {ports: [http]}}]}]}`), true, []string{`"http" is not a port number`}},
		{"bad address", authz(`{rules: [{from: [{source: {ipBlocks: ["10.0.0.0/99"]}}]}]}`), true, []string{`neither an IP address nor a CIDR`}},
		{"service account and namespace", authz(`{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}`), true, []string{`(?i)cannot set serviceAccounts|cannot stand beside`}},
		{"unknown condition", authz(`{rules: [{when: [{key: source.user, values: [x]}]}]}`), true, []string{`not an attribute that a policy can look at`}},
		{"unknown namespace", authz(`{rules: [{from: [{source: {namespaces: [e2e-admision]}}]}]}`), false, []string{`Warning: .*there is no namespace e2e-admision now.*is e2e-admission meant`}},
		{"selects nothing", authz(`{selector: {matchLabels: {app: nobody}}, rules: [{}]}`), false, []string{`Warning: .*no pod in namespace e2e-admission has the labels app=nobody`}},
		{"allows nothing", authz(`{}`), false, []string{`Warning: .*allows nothing`}},
		{"modes of ports for all", securityObject("PeerAuthentication", ns, "p", `{portLevelMtls: {8080: {mode: DISABLE}}}`), true, []string{`portLevelMtls`}},
		{"tokens", securityObject("RequestAuthentication", ns, "r", `{jwtRules: [{issuer: a, jwks: "not a key set"}]}`), true, []string{`the key set is not JSON`}},
		{"the older version of the API", strings.Replace(authz(`{rules: [{to: [{operation: {ports: [http]}}]}]}`), "/v1", "/v1beta1", 1), true, []string{`bad-port`}},
		{"in the way of nobody else", fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c, namespace: %s}\n", ns), false, nil},
	}
	wrong, proxy := 0, proxied(t)
	for _, c := range cases {
		where := ns
		if strings.Contains(c.object, "namespace: "+lab.Namespace+"}") {
			where = lab.Namespace
		}
		said, refused := post(t, proxy, where, c.object)
		bad := refused != c.refused
		for _, p := range c.says {
			bad = bad || !regexp.MustCompile(`(?s)`+p).MatchString(said)
		}
		if len(c.says) == 0 && strings.Contains(said, "Warning") {
			bad = true
		}
		if bad {
			wrong++
			t.Errorf("%s: refused %v, want %v and %q:\n%s", c.name, refused, c.refused, c.says, said)
		}
	}
	record("admission", "admission-messages", len(cases), wrong, float64(len(cases)-wrong), "objects judged as documented")

	// What is stored before can still be changed where it does not matter.
	must(t, mesh.Apply(t.Context(), authz(`{rules: [{from: [{source: {ipBlocks: ["10.0.0.0/8"]}}]}]}`)))
	if _, err := mesh.Kubectl(t.Context(), "-n", ns, "label", "authorizationpolicy", "policy", "team=a"); err != nil {
		t.Error(err)
	}
}

// With no control plane objects are stored as before, and what their definitions say still holds.
func TestAdmissionWithoutControlPlane(t *testing.T) {
	ns := namespace(t, "e2e-admission-down")
	judged(t, ns)
	out, err := mesh.Kubectl(t.Context(), "-n", lab.Namespace, "get", "deploy", "-l", "app=istiod", "-o", "jsonpath={.items[0].metadata.name} {.items[0].spec.replicas}")
	must(t, err)
	name, replicas, _ := strings.Cut(out, " ")
	scale := func(ctx context.Context, n string) error {
		_, err := mesh.Kubectl(ctx, "-n", lab.Namespace, "scale", "deploy", name, "--replicas="+n)
		return err
	}
	must(t, scale(t.Context(), "0"))
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		must(t, scale(ctx, replicas))
		must(t, mesh.Rollout(ctx, lab.Namespace, "deploy/"+name))
		must(t, lab.Eventually(ctx, time.Minute, func() error {
			pods, err := mesh.Pods(ctx, lab.Namespace, "app=istiod")
			if err == nil && fmt.Sprint(len(pods)) != replicas {
				err = fmt.Errorf("%d control planes, want %s", len(pods), replicas)
			}
			return err
		}))
	})
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		pods, err := mesh.Pods(t.Context(), lab.Namespace, "app=istiod")
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("%d control planes are still there", len(pods))
		}
		return err
	}))
	failed := 0
	stored := []string{
		securityObject("PeerAuthentication", ns, "strict", `{mtls: {mode: STRICT}}`),
		securityObject("AuthorizationPolicy", ns, "good", `{rules: [{to: [{operation: {ports: ["80"]}}]}]}`),
		securityObject("AuthorizationPolicy", ns, "unjudged", `{action: DENY, rules: [{to: [{operation: {ports: [http]}}]}]}`),
	}
	var slowest time.Duration
	for _, o := range stored {
		start := time.Now()
		if err := mesh.Apply(t.Context(), o); err != nil {
			failed++
			t.Errorf("a control plane that is down blocks: %v", err)
		}
		slowest = max(slowest, time.Since(start))
	}
	refused := map[string]string{
		`{action: DENY}`: "without rules", `{rules: [{from: []}]}`: "empty list", `{rules: [{from: [{source: {}}]}]}`: "the source says nothing",
		`{rules: [{from: [{source: {namespaces: []}}]}]}`: "the source says nothing", `{rules: [{when: [{key: source.ip}]}]}`: "neither values nor notValues",
		`{rules: [{to: [{}]}]}`: "there is no operation", `{provider: {name: x}}`: "CUSTOM needs a provider",
	}
	proxy := proxied(t)
	for spec, why := range refused {
		if said, no := post(t, proxy, ns, securityObject("AuthorizationPolicy", ns, "bad", spec)); !no || !strings.Contains(said, why) {
			failed++
			t.Errorf("%s: refused %v, want %q:\n%s", spec, no, why, said)
		}
	}
	bothReplicasJudge(t, ns, name, scale)
	record("admission", "admission-control-plane-down", len(stored)+len(refused), failed, slowest.Seconds(), "s slowest apply")
}

// bothReplicasJudge asks two replicas at once, over connections of their own, until each has judged.
func bothReplicasJudge(t *testing.T, ns, name string, scale func(context.Context, string) error) {
	t.Helper()
	must(t, scale(t.Context(), "2"))
	must(t, mesh.Rollout(t.Context(), lab.Namespace, "deploy/"+name))
	judged(t, ns)
	url := proxied(t) + "/apis/security.istio.io/v1/namespaces/" + ns + "/authorizationpolicies?dryRun=All"
	ask := func() {
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				res, err := http.Post(url, "application/yaml", strings.NewReader(securityObject("AuthorizationPolicy", ns, "x", `{rules: [{to: [{operation: {ports: ["80"]}}]}]}`)))
				if err == nil {
					res.Body.Close()
				}
			})
		}
		wg.Wait()
	}
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		ask()
		pods, err := mesh.Pods(t.Context(), lab.Namespace, "app=istiod")
		if err != nil {
			return err
		}
		for _, p := range pods {
			if p.Terminating {
				continue
			}
			text, err := mesh.Kubectl(t.Context(), "get", "--raw", "/api/v1/namespaces/"+lab.Namespace+"/pods/"+p.Name+":15014/proxy/metrics")
			if err != nil {
				return err
			}
			if !strings.Contains(text, "\ngalley_validation_passed{") {
				return fmt.Errorf("%s has judged nothing", p.Name)
			}
		}
		if len(pods) < 2 {
			return fmt.Errorf("there are %d replicas", len(pods))
		}
		return nil
	}))
}

// proxied runs kubectl proxy, by which many requests can be made without a process for each.
func proxied(t *testing.T) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), mesh.KubectlPath(), "proxy", "--port=0")
	cmd.Env = append(os.Environ(), "KUBECONFIG="+mesh.Kubeconfig())
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line := make([]byte, 200)
	n, err := out.Read(line)
	must(t, err)
	m := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(string(line[:n]))
	if m == "" {
		t.Fatalf("kubectl proxy says %q", line[:n])
	}
	return "http://" + m
}

// Hostile objects are refused with a reason while others' objects are all judged, hardly more slowly.
func TestAdmissionHostileObjects(t *testing.T) {
	ns := namespace(t, "e2e-admission-hostile")
	judged(t, ns)
	url := proxied(t) + "/apis/security.istio.io/v1/namespaces/" + ns + "/authorizationpolicies?dryRun=All"
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	send := func(spec any) (status int, message string, warned bool) {
		body, err := json.Marshal(map[string]any{
			"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": map[string]any{"name": "x", "namespace": ns}, "spec": spec,
		})
		if err != nil {
			return 0, err.Error(), false
		}
		res, err := client.Post(url, "application/json", bytes.NewReader(body))
		if err != nil {
			return 0, err.Error(), false
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(text), len(res.Header.Values("Warning")) > 0
	}
	type m = map[string]any
	list := func(n int, f func(int) any) []any {
		out := make([]any, n)
		for i := range out {
			out[i] = f(i)
		}
		return out
	}
	hostile := map[string]struct {
		spec any
		says string
	}{
		"10 MB":               {m{"rules": []any{m{"from": []any{m{"source": m{"namespaces": []any{strings.Repeat("a", 10<<20)}}}}}}}, "too large"},
		"2.5 MB in one value": {m{"rules": []any{m{"from": []any{m{"source": m{"namespaces": []any{strings.Repeat("a", 5<<19)}}}}}}}, "too-large"},
		"10,000 rules":        {m{"rules": list(10_000, func(int) any { return m{} })}, "512"},
		"100,000 addresses":   {m{"rules": []any{m{"from": []any{m{"source": m{"ipBlocks": list(100_000, func(i int) any { return fmt.Sprintf("10.%d.%d.1", i>>8&255, i&255) })}}}}}}, "too-large"},
		"512 × 512 sources": {m{"rules": list(512, func(int) any {
			return m{"from": list(100, func(int) any { return m{"source": m{"namespaces": []any{"a"}}} })}
		})}, ""},
		"expressions in paths": {m{"rules": []any{m{"to": []any{m{"operation": m{"paths": list(2000, func(int) any { return "/" + strings.Repeat("{*}/(a+)+", 12) + "{" })}}}}}}, "bad-path"},
	}
	times := func(rounds int) (all []time.Duration, unjudged int64) {
		var mu sync.Mutex
		var missed atomic.Int64
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				for range rounds {
					start := time.Now()
					status, text, warned := send(m{"rules": []any{m{"from": []any{m{"source": m{"namespaces": []any{"nowhere-at-all"}}}}}}})
					took := time.Since(start)
					if status != http.StatusCreated || !warned { // it is good, and the webhook warns of the namespace
						if missed.Add(1) < 4 {
							t.Logf("good object: status %d, warned %v: %.300s", status, warned, text)
						}
					}
					mu.Lock()
					all = append(all, took)
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		slices.Sort(all)
		return all, missed.Load()
	}
	rounds := 2
	if *long {
		rounds = 100
	}
	times(1) // connections
	calm, missedCalm := times(rounds)

	var stop atomic.Bool
	var thrown, taken atomic.Int64
	var attack sync.WaitGroup
	names := []string{"10 MB", "2.5 MB in one value", "10,000 rules", "100,000 addresses", "512 × 512 sources", "expressions in paths"}
	for i := range 2 {
		attack.Go(func() {
			for n := i; !stop.Load(); n++ {
				h := hostile[names[n%len(names)]]
				status, text, _ := send(h.spec)
				thrown.Add(1)
				if status < 400 || !strings.Contains(text, h.says) {
					taken.Add(1)
					t.Logf("%s: status %d, want a refusal with %q: %.300s", names[n%len(names)], status, h.says, text)
				}
			}
		})
	}
	must(t, lab.Eventually(t.Context(), time.Minute, func() error {
		if thrown.Load() < int64(len(names)) {
			return fmt.Errorf("%d of %d thrown", thrown.Load(), len(names))
		}
		return nil
	}))
	busy, missedBusy := times(rounds)
	stop.Store(true)
	attack.Wait()
	middle := func(d []time.Duration) time.Duration { return d[len(d)/2] }
	ratio := float64(middle(busy)) / float64(middle(calm))
	t.Logf("%d good objects calm: median %s, 95%% %s; among %d hostile ones: median %s, 95%% %s", len(calm), middle(calm), calm[len(calm)*95/100],
		thrown.Load(), middle(busy), busy[len(busy)*95/100])
	// On a machine that stands still for seconds the API server goes on without an answer, as it has to.
	if taken.Load()*20 > thrown.Load() {
		t.Errorf("%d of %d hostile objects were not refused", taken.Load(), thrown.Load())
	}
	if missed := missedCalm + missedBusy; missed*50 > int64(len(calm)+len(busy)) {
		t.Errorf("%d of %d good objects were not judged", missed, len(calm)+len(busy))
	}
	// Most of what is slower is the API server, which reads the hostile objects on the same cores.
	if ratio > 30 {
		t.Errorf("good objects take %.1f times as long beside hostile ones", ratio)
	}
	record("admission", "admission-hostile-refused", int(thrown.Load()), int(taken.Load()), float64(thrown.Load()-taken.Load()), "hostile objects refused")
	record("admission", "admission-beside-hostile", len(busy), int(missedCalm+missedBusy), ratio, "median time with hostile objects / without")
}
