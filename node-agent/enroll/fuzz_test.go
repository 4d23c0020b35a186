package enroll

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// FuzzCNISocket posts bodies to the agent's socket. What is no request never reaches the registry and is refused
// as such; what the answer says is JSON; and a pod that the node knows to be enrolled is never let go uncaptured.
func FuzzCNISocket(f *testing.F) {
	for _, s := range []string{
		`{"uid":"u","namespace":"shop","name":"ui","containerID":"c","netns":"/var/run/netns/x","addrs":["10.0.0.5"]}`,
		`{"namespace":"istio-system","name":"a"}`, `{"namespace":"shop","name":"ui","addrs":["fe80::1%eth0","::ffff:10.0.0.1"]}`,
		`{"addrs":["x"]}`, `{"namespace":1}`, `null`, `{}{}`, ``, `{"namespace":"shop","NAMESPACE":"istio-system"}`,
	} {
		f.Add([]byte(s))
	}
	pod := LocalPod{UID: "u", Namespace: "shop", Name: "ui", Enrolled: true}
	states := []known{
		{system: "istio-system", exempt: []string{"kube-system"}},
		{system: "istio-system", namespaces: map[string]bool{"shop": true}, synced: true},
		{system: "istio-system", namespaces: map[string]bool{"shop": true}, synced: true, pod: &pod},
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var got *cni.Request
		h := answerWith(func(_ context.Context, r cni.Request) (cni.Response, error) {
			got = &r
			return cni.Response{Why: r.Name}, nil
		})
		w := httptest.NewRecorder()
		h(w, httptest.NewRequest("POST", cni.PathAdd, io.NopCloser(bytes.NewReader(body))))
		var resp cni.Response
		if err := json.Unmarshal(w.Body.Bytes(), &resp); err != nil {
			t.Errorf("the answer is %q", w.Body)
		}
		if (got == nil) != (w.Code == http.StatusBadRequest) || got == nil && resp.Error == "" {
			t.Errorf("answer %d, %+v, to %+v", w.Code, resp, got)
		}
		if got == nil {
			return
		}
		for i, k := range states {
			a := admit(*got, k)
			enrolled := k.pod != nil || k.namespaces[got.Namespace] || k.namespaces == nil
			if a.answer == answerStart && enrolled && got.Namespace != k.system && k.namespaces != nil && got.Namespace == "shop" {
				t.Errorf("state %d: %+v starts: %s", i, *got, a.why)
			}
			if a.why == "" && a.answer != answerCapture {
				t.Errorf("state %d: no reason", i)
			}
		}
	})
}
