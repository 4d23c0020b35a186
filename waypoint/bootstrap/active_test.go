package bootstrap

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
)

// A listener whose filter chains Envoy exchanges in its place keeps the version that it had. It is active once Envoy has
// taken it and none is warming.
func TestAListenerThatKeepsItsVersion(t *testing.T) {
	dump := ""
	r := newReadBack(func(context.Context, string) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(`{"configs":[{"name":"main",` + dump + `}]}`))}, nil
	}, func(context.Context) error { return nil }, slog.New(slog.DiscardHandler))
	r.note(&discovery.DeltaDiscoveryResponse{TypeUrl: resource.ListenerType, Nonce: "7", Resources: []*discovery.Resource{{Name: "main", Version: "new"}}})
	for _, step := range []struct {
		name, dump string
		answer     *discovery.DeltaDiscoveryRequest
		active     bool
	}{
		{"before it has answered", `"active_state":{"version_info":"old"}`, nil, false},
		{"another answer", `"active_state":{"version_info":"old"}`, &discovery.DeltaDiscoveryRequest{TypeUrl: resource.ListenerType, ResponseNonce: "6"}, false},
		{"a refusal", `"active_state":{"version_info":"old"}`, &discovery.DeltaDiscoveryRequest{TypeUrl: resource.ListenerType, ResponseNonce: "7", ErrorDetail: &status.Status{}}, false},
		{"taken, and warming", `"active_state":{"version_info":"old"},"warming_state":{"version_info":"new"}`, &discovery.DeltaDiscoveryRequest{TypeUrl: resource.ListenerType, ResponseNonce: "7"}, false},
		{"taken, and nothing there", `"warming_state":{"version_info":"new"}`, nil, false},
		{"taken, and nothing warming", `"active_state":{"version_info":"old"}`, nil, true},
	} {
		if dump = step.dump; step.answer != nil {
			r.acknowledged(step.answer)
		}
		r.read(t.Context())
		report, _ := r.report(nil)
		if got := report.InitialResourceVersions["listener/main"] == "new"; got != step.active {
			t.Errorf("%s: active is %v", step.name, got)
		}
	}
}

// A control plane is told what has changed since it was told last.
func TestReports(t *testing.T) {
	r := newReadBack(nil, nil, slog.New(slog.DiscardHandler))
	r.active = map[string]string{"route/a": "1", "route/b": "1"}
	first, told := r.report(nil)
	if !slices.Equal(first.ResourceNamesSubscribe, []string{"*"}) || len(first.InitialResourceVersions) != 2 {
		t.Errorf("first: %v", first)
	}
	delete(r.active, "route/a")
	r.active["route/b"], r.active["route/c"] = "2", "1"
	next, told := r.report(told)
	if want := map[string]string{"route/b": "2", "route/c": "1"}; len(next.ResourceNamesSubscribe) != 0 || !maps.Equal(next.InitialResourceVersions, want) || !slices.Equal(next.ResourceNamesUnsubscribe, []string{"route/a"}) {
		t.Errorf("next: %v", next)
	}
	if last, _ := r.report(told); len(last.InitialResourceVersions)+len(last.ResourceNamesUnsubscribe) != 0 {
		t.Errorf("nothing changed, but is told %v", last)
	}
}
