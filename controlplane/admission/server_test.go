package admission

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	admissionv1 "k8s.io/api/admission/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// nowhere is a cluster with nothing in it.
type nowhere struct{}

func (nowhere) Namespaces() []string                             { return nil }
func (nowhere) HasNamespace(string) bool                         { return true }
func (nowhere) Pods(string) iter.Seq[Pod]                        { return func(func(Pod) bool) {} }
func (nowhere) HasTarget(policy.TargetKind, string, string) bool { return true }
func (nowhere) PeerAuthentications(string) iter.Seq[*securityv1.PeerAuthentication] {
	return func(func(*securityv1.PeerAuthentication) bool) {}
}

// anywhere is where the API server of these tests calls from.
func anywhere(netip.Addr) bool { return true }

func server(judge func(*Object, bool) []policy.Problem) *Server {
	if judge == nil {
		judge = Judge{Mesh: policy.Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}, Cluster: nowhere{}}.Judge
	}
	return NewServer(Config{Judge: judge, APIServer: anywhere, Log: slog.New(slog.DiscardHandler)})
}

// question is a review as the API server writes it.
func question(operation, object, old string) string {
	if old == "" {
		old = "null"
	}
	return fmt.Sprintf(`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u-1",`+
		`"kind":{"group":"security.istio.io","version":"v1","kind":"AuthorizationPolicy"},`+
		`"resource":{"group":"security.istio.io","version":"v1","resource":"authorizationpolicies"},`+
		`"name":"p","namespace":"shop","operation":%q,"userInfo":{},"object":%s,"oldObject":%s}}`, operation, object, old)
}

func object(meta, spec string) string {
	return fmt.Sprintf(`{"apiVersion":"security.istio.io/v1","kind":"AuthorizationPolicy","metadata":{"name":"p","namespace":"shop"%s},"spec":%s}`, meta, spec)
}

func ask(t *testing.T, h http.Handler, body io.Reader) (int, *admissionv1.AdmissionResponse) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Path, body))
	if w.Code != http.StatusOK {
		return w.Code, nil
	}
	var r admissionv1.AdmissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &r); err != nil || r.Response == nil {
		t.Fatalf("answer %q: %v", w.Body, err)
	}
	if r.Kind != "AdmissionReview" || r.APIVersion != "admission.k8s.io/v1" || r.Response.UID != "u-1" {
		t.Errorf("not an answer to this question: %s", w.Body)
	}
	return w.Code, r.Response
}

const (
	good     = `{"rules":[{"to":[{"operation":{"ports":["80"]}}]}]}`
	bad      = `{"rules":[{"to":[{"operation":{"ports":["http"]}}]}]}`
	doubtful = `{"rules":[{"to":[{"operation":{"ports":["0"]}}]}]}`
)

func TestAnswers(t *testing.T) {
	for _, c := range []struct {
		name, body string
		allowed    bool
		code       int32
		says       string // in the refusal or a warning
	}{
		{"good", question("CREATE", object("", good), ""), true, 0, ""},
		{"bad", question("CREATE", object("", bad), ""), false, 422, "spec.rules[0].to[0].operation.ports[0]"},
		{"doubtful", question("CREATE", object("", doubtful), ""), true, 0, "port-zero"},
		{"made bad", question("UPDATE", object("", bad), object("", good)), false, 422, "bad-port"},
		{"bad as it was", question("UPDATE", object(`,"labels":{"a":"b"}`, bad), object("", bad)), true, 0, ""},
		{"bad as it was, and no longer a dry run", question("UPDATE", object("", bad), object(`,"annotations":{"istio.io/dry-run":"true"}`, bad)), false, 422, "bad-port"},
		{"bad, and on its way out", question("UPDATE", object(`,"deletionTimestamp":"2026-01-01T00:00:00Z"`, bad), object("", good)), true, 0, ""},
		{"deleted", question("DELETE", "null", object("", bad)), true, 0, ""},
		{"no object", question("CREATE", "null", ""), false, 422, "cannot be read"},
		{"object that is none", question("CREATE", `"x"`, ""), false, 422, "cannot be read"},
		{"empty clause", question("CREATE", object("", `{"rules":[{"from":[]}]}`), ""), false, 422, "empty-clause"},
		{"one empty list of two", question("CREATE", object("", `{"rules":[{"from":[{"source":{"namespaces":["a"],"ipBlocks":[]}}]}]}`), ""), true, 0, "empty-list"},
		{"null in a list's place", question("CREATE", object("", `{"rules":[{"from":[{"source":{"namespaces":null}}]}]}`), ""), false, 422, "empty-source"},
	} {
		_, r := ask(t, server(nil), strings.NewReader(c.body))
		said := strings.Join(r.Warnings, "\n")
		var code int32
		if r.Result != nil {
			said += r.Result.Message
			code = r.Result.Code
		}
		if r.Allowed != c.allowed || code != c.code || !strings.Contains(said, c.says) {
			t.Errorf("%s: allowed %v, code %d, says %q; want %v, %d, %q", c.name, r.Allowed, code, said, c.allowed, c.code, c.says)
		}
	}
}

// empty is a cluster in which nothing is that anybody names.
type empty struct{ nowhere }

func (empty) HasNamespace(string) bool { return false }

// Anybody in the cluster can post a review. What exists is told to the API server alone; what is wrong with the
// object itself, to everybody.
func TestStrangersLearnNothing(t *testing.T) {
	judge := Judge{Mesh: policy.Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}}
	somewhere := `{"rules":[{"from":[{"source":{"namespaces":["secret"]}}],"to":[{"operation":{"ports":["0"]}}]}]}`
	says := func(c Cluster, from, body string) string {
		judge.Cluster = c
		s := NewServer(Config{Judge: judge.Judge, Log: slog.New(slog.DiscardHandler),
			APIServer: func(a netip.Addr) bool { return a == netip.MustParseAddr("10.9.9.9") }})
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, Path, strings.NewReader(body))
		r.RemoteAddr = from
		s.ServeHTTP(w, r)
		return w.Body.String()
	}
	ask := question("CREATE", object("", somewhere), "")
	if told := says(empty{}, "10.9.9.9:4000", ask); !strings.Contains(told, "there is no namespace secret") || !strings.Contains(told, "port-zero") {
		t.Errorf("the API server is told %s", told)
	}
	if told := says(empty{}, "[::ffff:10.9.9.9]:4000", ask); !strings.Contains(told, "there is no namespace secret") {
		t.Errorf("the API server, by a socket for both families, is told %s", told)
	}
	for _, from := range []string{"10.9.9.8:4000", "[fd00::1]:4000", "[fe80::1%eth0]:4000", "", "pipe"} {
		for _, body := range []string{ask, question("UPDATE", object("", bad), object("", bad)), question("CREATE", object("", bad), "")} {
			there, absent := says(nowhere{}, from, body), says(empty{}, from, body)
			if there != absent {
				t.Errorf("from %q: the answer tells whether the namespace exists:\n%s%s", from, there, absent)
			}
		}
		if told := says(empty{}, from, ask); !strings.Contains(told, "port-zero") {
			t.Errorf("from %q: what is wrong with the object itself is not told: %s", from, told)
		}
	}
}

func TestNoQuestion(t *testing.T) {
	for _, body := range []string{"", "x", "{}", `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1beta1","request":{"uid":"u-1"}}`,
		`{"apiVersion":"admission.k8s.io/v1"}`, strings.Repeat("[", 1<<20)} {
		if code, _ := ask(t, server(nil), strings.NewReader(body)); code != http.StatusBadRequest {
			t.Errorf("%.40q: status %d", body, code)
		}
	}
}

// unsized hides the length of a body, as chunked encoding does.
type unsized struct{ io.Reader }

func TestTooLarge(t *testing.T) {
	huge := question("CREATE", object("", `{"x":"`+strings.Repeat("a", maxBody)+`"}`), "")
	for name, body := range map[string]io.Reader{"with its length": strings.NewReader(huge), "chunked": unsized{strings.NewReader(huge)}} {
		_, r := ask(t, server(nil), body)
		if r.Allowed || r.Result.Code != http.StatusRequestEntityTooLarge {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestUIDOfWhatIsNotRead(t *testing.T) {
	for body, want := range map[string]string{
		question("CREATE", object("", good), ""):                          "u-1",
		`{"request":{"object":{"uid":"forged"},"uid":"u-1"}}`:             "",
		`{"uid":"outside","request":{"uid":"u-1"}}`:                       "u-1",
		`{"kind":{"uid":"x"}}`:                                            "",
		`{"request":"uid"}`:                                               "",
		`{"request":{"uid":["u-1"]}}`:                                     "",
		`{"a":true,"b":1,"c":null,"request":{"dryRun":true,"uid":"u-1"}}`: "u-1",
		"":      "",
		"}{][,": "",
	} {
		if got := uidOf(strings.NewReader(body)); string(got) != want {
			t.Errorf("%.60s: %q, want %q", body, got, want)
		}
	}
}

// What makes the check fail is refused: the same may make the index fail.
func TestPanicIsRefused(t *testing.T) {
	s := server(func(*Object, bool) []policy.Problem { panic("boom") })
	_, r := ask(t, s, strings.NewReader(question("CREATE", object("", good), "")))
	if r.Allowed || r.Result.Code != http.StatusInternalServerError || strings.Contains(r.Result.Message, "boom") {
		t.Errorf("%+v", r.Result)
	}
}

// Large objects wait for each other, small ones for none of them, and of too many large ones the rest is refused.
func TestLargeObjectsAreInNobodysWay(t *testing.T) {
	large := question("CREATE", object("", `{"selector":{"matchLabels":{"a":"`+strings.Repeat("a", smallBody)+`"}}}`), "")
	hold := make(chan struct{})
	begun := make(chan struct{}, largeQueue)
	s := server(func(o *Object, _ bool) []policy.Problem {
		if len(o.Spec) > smallBody {
			begun <- struct{}{}
			<-hold
		}
		return nil
	})
	var wg sync.WaitGroup
	var mu sync.Mutex
	codes := map[int32]int{}
	for range largeQueue {
		wg.Go(func() {
			_, r := ask(t, s, strings.NewReader(large))
			mu.Lock()
			defer mu.Unlock()
			if r.Allowed {
				codes[0]++
			} else {
				codes[r.Result.Code]++
			}
		})
	}
	<-begun
	for len(s.large.held) < largeQueue {
		time.Sleep(time.Millisecond)
	}
	if _, r := ask(t, s, strings.NewReader(large)); r.Allowed || r.Result.Code != http.StatusTooManyRequests {
		t.Errorf("one large object too many: %+v", r)
	}
	for range 200 {
		if _, r := ask(t, s, strings.NewReader(question("CREATE", object("", good), ""))); !r.Allowed {
			t.Errorf("a small object beside large ones: %+v", r)
		}
	}
	if len(begun) > 0 {
		t.Error("two large objects are judged at once")
	}
	close(hold)
	wg.Wait()
	if codes[0]+codes[http.StatusTooManyRequests] != largeQueue || codes[0] == 0 {
		t.Errorf("the large ones that waited: %v", codes)
	}
	if len(s.large.held)+len(s.large.worked)+len(s.small.held)+len(s.small.worked) != 0 {
		t.Error("places are not given back")
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	plain := httptest.NewUnstartedServer(nil)
	plain.StartTLS()
	defer plain.Close()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	config := HTTP1(plain.TLS)
	go func() { done <- server(nil).Serve(ctx, l, config) }()
	client := plain.Client()
	res, err := client.Post("https://"+l.Addr().String()+Path, "application/json", bytes.NewReader([]byte(question("CREATE", object("", good), ""))))
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, res.Body)
	res.Body.Close()
	if res.StatusCode != http.StatusOK || res.ProtoMajor != 1 {
		t.Errorf("status %d over %s", res.StatusCode, res.Proto)
	}
	if res, err := client.Get("https://" + l.Addr().String() + Path); err != nil || res.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %v %v", res, err)
	} else {
		res.Body.Close()
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Serve: %v", err)
	}
	client.CloseIdleConnections()
}

func FuzzReview(f *testing.F) {
	f.Add([]byte(question("CREATE", object("", good), "")))
	f.Add([]byte(question("UPDATE", object("", bad), object("", doubtful))))
	f.Add([]byte(question("CREATE", object(`,"annotations":{"istio.io/dry-run":"x"}`, `{"rules":[{"from":[{"source":{"principals":["*","cluster.local/ns/a/sa/b"],"namespaces":[]}}],"when":[{"key":"source.ip","values":["::1"]}]}]}`), "")))
	f.Add([]byte(strings.ReplaceAll(question("CREATE", object("", `{"selector":{"matchLabels":{"a":"b"}},"portLevelMtls":{"80":{"mode":"STRICT"}}}`), ""), "AuthorizationPolicy", "PeerAuthentication")))
	f.Add([]byte(strings.ReplaceAll(question("CREATE", object("", `{"jwtRules":[{"issuer":"a","jwks":"{\"keys\":[{\"kty\":\"RSA\"}]}"}]}`), ""), "AuthorizationPolicy", "RequestAuthentication")))
	var panicked bool
	s := server(nil)
	s.cfg.Judge = func(o *Object, cluster bool) []policy.Problem {
		panicked = true
		out := Judge{Mesh: policy.Mesh{RootNamespace: "istio-system", TrustDomain: "cluster.local"}, Cluster: nowhere{}}.Judge(o, cluster)
		panicked = false
		return out
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		w := httptest.NewRecorder()
		panicked = false
		s.ServeHTTP(w, httptest.NewRequest(http.MethodPost, Path, bytes.NewReader(body)))
		if panicked {
			t.Error("a panic")
		}
		if w.Code == http.StatusOK && w.Body.Len() > 64<<10 {
			t.Errorf("%d bytes of answer", w.Body.Len())
		}
		uidOf(bytes.NewReader(body))
	})
}
