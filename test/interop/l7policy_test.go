package interop

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	securityapi "istio.io/api/security/v1beta1"
	typeapi "istio.io/api/type/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
	"github.com/warrenmesh/warren/results"
	"github.com/warrenmesh/warren/test/reference"
	"github.com/warrenmesh/warren/waypoint"
)

// TestRequestsAreDecidedAsDocumented draws policies and requests, and has a waypoint's Envoy and the reference decide about
// each. An answer by Envoy that no endpoint is there means that the request was let through.
func TestRequestsAreDecidedAsDocumented(t *testing.T) {
	bin := envoyBinary(t)
	rounds, services, each := 1, 40, 125
	if *long {
		rounds, services, each = 10, 100, 100
	}
	wrong, tried, admitted := 0, 0, 0
	for seed := range rounds {
		w, a, n := l7Round(t, bin, uint64(seed), services, each)
		wrong, tried, admitted = wrong+w, tried+n, admitted+a
	}
	t.Logf("%d requests, of which %d were let through, %d disagreements", tried, admitted, wrong)
	if admitted < tried/50 || admitted > tried*49/50 {
		t.Errorf("%d of %d were let through: too much the same to mean anything", admitted, tried)
	}
	if err := results.Record("l7-policy-differential", results.Row{Name: "l7-policy-differential", Inputs: tried, Failures: wrong, Figure: float64(wrong), Unit: "disagreements of Envoy and the reference"}); err != nil {
		t.Error(err)
	}
}

// who sends from where.
type sender struct {
	bundle *identity.Bundle
	from   netip.Addr
	tunnel *hbone.Pool
}

func l7Round(t *testing.T, bin string, seed uint64, services, each int) (wrong, admitted, tried int) {
	const ns = "a"
	r := rand.New(rand.NewPCG(seed, 7))
	world := &reference.World{RootNamespace: "istio-system", TrustDomain: "td1", TrustDomainAliases: []string{"old"}}
	x, err := index.New(index.Config{ClusterID: "Kubernetes", ClusterDomain: "cluster.local", TrustDomain: world.TrustDomain, TrustDomainAliases: world.TrustDomainAliases, RootNamespace: world.RootNamespace})
	if err != nil {
		t.Fatal(err)
	}
	x.Set(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns, Labels: map[string]string{"istio.io/use-waypoint": "way"}}})
	issuers := map[string]issuer{}
	rules := []*securityapi.JWTRule{}
	for _, name := range reference.Issuers {
		issuers[name] = newIssuer(t, name)
		rules = append(rules, &securityapi.JWTRule{Issuer: name, Jwks: issuers[name].keys(t), ForwardOriginalToken: true})
	}
	policies, verifies := make([][]*securityv1.AuthorizationPolicy, services), make([]bool, services)
	address := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }
	for i := range services {
		name := fmt.Sprintf("s%d", i)
		target := []*typeapi.PolicyTargetReference{{Kind: "Service", Name: name}}
		x.Set(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: corev1.ServiceSpec{ClusterIP: address(i).String(),
			Ports: []corev1.ServicePort{{Name: "http", Port: 80, TargetPort: intstr.FromInt32(8080)}}}})
		policies[i] = reference.DrawPolicies(r, ns, name)
		for _, p := range policies[i] {
			p.Spec.TargetRefs = target
			x.Set(p)
		}
		if verifies[i] = r.IntN(3) > 0; verifies[i] {
			x.Set(&securityv1.RequestAuthentication{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: securityapi.RequestAuthentication{TargetRefs: target, JwtRules: rules}})
		}
	}
	config, err := waypoint.Build(x.Commit().Snapshot, mesh.ServiceName{Namespace: ns, Hostname: "way.a.svc.cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t)
	way := mesh.Identity{TrustDomain: "td1", Namespace: ns, ServiceAccount: "way"}
	ca.issueTo(t, way, "way")
	at, _ := runWaypoint(t, bin, config, ca, noLogs)
	var senders []*sender
	for i, id := range []mesh.Identity{
		{TrustDomain: "td1", Namespace: "a", ServiceAccount: "x"}, {TrustDomain: "td1", Namespace: "b", ServiceAccount: "y"},
		{TrustDomain: "old", Namespace: "a", ServiceAccount: "y"}, {TrustDomain: "td1", Namespace: "istio-system", ServiceAccount: "x"},
	} {
		s := &sender{bundle: ca.issueTo(t, id, fmt.Sprint("sender", i)), from: netip.MustParseAddr(reference.Sources[i])}
		s.tunnel = hbone.NewPool(hbone.PoolConfig{Dial: func(ctx context.Context, k hbone.Key) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: s.from.AsSlice()}}
			c, err := d.DialContext(ctx, "tcp", k.Addr.String())
			if err != nil {
				return nil, err
			}
			tc := hbone.TLSClient(c, s.bundle.ClientTLS(k.Wanted()))
			return tc, tc.HandshakeContext(ctx)
		}})
		defer s.tunnel.Close()
		senders = append(senders, s)
	}
	var work sync.WaitGroup
	var bad, let, all atomic.Int64
	next := make(chan int)
	for range 4 {
		work.Go(func() {
			for i := range next {
				r := rand.New(rand.NewPCG(seed, uint64(i)))
				for _, s := range senders {
					c := l7Stream{t: t, s: s, at: at, way: way, to: netip.AddrPortFrom(address(i), 80)}
					for range each / len(senders) {
						q := reference.DrawRequest(r)
						token := ""
						if q.Claims != nil {
							token = issuers[q.Claims["iss"].(string)].token(t, q.Claims)
						}
						if !verifies[i] {
							q.Claims = nil
						}
						id := s.bundle.ID
						q.Connection = reference.Connection{TrustDomain: id.TrustDomain, Namespace: id.Namespace, ServiceAccount: id.ServiceAccount, SourceIP: s.from, DestIP: address(i), DestPort: 80}
						want := world.Admits(policies[i], q)
						got, code, err := c.ask(q, token)
						if err != nil {
							t.Errorf("seed %d: %s: %v", seed, q, err)
							bad.Add(1)
							continue
						}
						all.Add(1)
						if got {
							let.Add(1)
						}
						if got != want && bad.Add(1) <= 3 {
							var text []string
							for _, p := range policies[i] {
								text = append(text, fmt.Sprint(p.Annotations, p.Spec.String()))
							}
							t.Errorf("seed %d, service %d: let through %t (%d), want %t: %s\n%s", seed, i, got, code, want, q, strings.Join(text, "\n"))
						}
					}
					c.close()
				}
			}
		})
	}
	for i := range services {
		next <- i
	}
	close(next)
	work.Wait()
	return int(bad.Load()), int(let.Load()), int(all.Load())
}

// l7Stream sends one request after the other through a tunnel to a service.
type l7Stream struct {
	t      *testing.T
	s      *sender
	at, to netip.AddrPort
	way    mesh.Identity
	st     io.ReadWriteCloser
	in     *bufio.Reader
}

func (c *l7Stream) close() {
	if c.st != nil {
		c.st.Close()
		c.st = nil
	}
}

// ask tells whether a request was let through.
func (c *l7Stream) ask(q reference.Request, token string) (bool, int, error) {
	if c.st == nil {
		key := hbone.Key{Src: c.s.bundle.ID, Want: hbone.WantKey([]string{c.way.String()}), Addr: c.at}
		st, _, err := c.s.tunnel.Open(c.t.Context(), key, hbone.Request{Authority: c.to.String()})
		if err != nil {
			return false, 0, err
		}
		c.st, c.in = st, bufio.NewReader(st)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nhost: %s\r\ncontent-length: 0\r\n", q.Method, q.Target, q.Host)
	for name, values := range q.Headers {
		for _, v := range values {
			fmt.Fprintf(&b, "%s: %s\r\n", name, v)
		}
	}
	if token != "" {
		fmt.Fprintf(&b, "authorization: Bearer %s\r\n", token)
	}
	b.WriteString("\r\n")
	if _, err := io.WriteString(c.st, b.String()); err != nil {
		return false, 0, err
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return false, 0, err
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return false, 0, err
	}
	if res.Close {
		c.close()
	}
	switch res.StatusCode {
	case http.StatusServiceUnavailable:
		return true, res.StatusCode, nil
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusBadRequest:
		return false, res.StatusCode, nil
	}
	return false, res.StatusCode, fmt.Errorf("the answer is %s: %s", res.Status, body)
}

// runWaypoint runs Envoy with a waypoint's resources in its bootstrap, and returns where its tunnels end, and its process. keep
// says which access loggers it has.
func runWaypoint(t testing.TB, bin string, r *waypoint.Resources, ca *authority, keep func(logger string) bool) (netip.AddrPort, int) {
	t.Helper()
	all := map[string][]object{}
	add := func(kind string, m proto.Message) {
		b, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var o object
		if err := json.Unmarshal(b, &o); err != nil {
			t.Fatal(err)
		}
		all[kind] = append(all[kind], o)
	}
	for _, m := range r.Listeners {
		add("listeners", m)
	}
	for _, m := range r.Routes {
		add("routes", m)
	}
	for _, m := range r.Clusters {
		add("clusters", m)
	}
	for _, m := range r.Endpoints {
		add("endpoints", m)
	}
	for _, m := range r.Extensions {
		add("extensions", m)
	}
	b, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	at, admin := netip.MustParseAddrPort(freeAddr(t)), freeAddr(t)
	var bootstrap object
	if err := json.Unmarshal(placed(t, b), &bootstrap); err != nil {
		t.Fatal(err)
	}
	runnable(bootstrap, ca.dir, at, keep)
	bootstrap["admin"] = object{"address": object{"socket_address": object{"address": "127.0.0.1", "port_value": json.Number(port(admin))}}}
	if b, err = json.Marshal(bootstrap); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(bin, "-c", path, "--disable-hot-restart", "--concurrency", "1", "-l", "warning")
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("envoy: %.4000s", log.String())
		}
	})
	eventually(t, "Envoy", time.Minute, func() error {
		err := fetch("http://" + admin + "/ready")
		if err != nil && cmd.ProcessState != nil {
			err = errors.New("it has ended")
		}
		return err
	})
	return at, cmd.Process.Pid
}

func noLogs(string) bool { return false }

// runnable has certificates in files instead of secrets, one port, and some loggers.
func runnable(v any, dir string, at netip.AddrPort, keep func(logger string) bool) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			runnable(e, dir, at, keep)
		}
	case object:
		if logs, ok := v["accessLog"].([]any); ok {
			v["accessLog"] = slices.DeleteFunc(logs, func(l any) bool { return !keep(l.(object)["name"].(string)) })
		}
		if _, ok := v["tlsCertificateSdsSecretConfigs"]; ok {
			file := func(name string) object { return object{"filename": filepath.Join(dir, name)} }
			delete(v, "tlsCertificateSdsSecretConfigs")
			v["tlsCertificates"] = []any{object{"certificateChain": file("way.crt"), "privateKey": file("way.key")}}
			check := maps.Clone(v["combinedValidationContext"].(object)["defaultValidationContext"].(object))
			check["trustedCa"] = file("root.pem")
			delete(v, "combinedValidationContext")
			v["validationContext"] = check
		}
		if a, ok := v["socketAddress"].(object); ok && a["portValue"] == float64(mesh.HBONEPort) && a["address"] == "0.0.0.0" {
			a["address"], a["portValue"] = at.Addr().String(), at.Port()
		}
		for _, e := range v {
			runnable(e, dir, at, keep)
		}
	}
}
