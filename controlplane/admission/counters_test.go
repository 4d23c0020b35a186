package admission

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// TestCountersAreBounded: who posts reviews of kinds that do not exist makes no new counters.
func TestCountersAreBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := NewServer(Config{Judge: func(*Object, bool) []policy.Problem { return nil }, APIServer: anywhere, Log: slog.New(slog.DiscardHandler), Metrics: reg})
	for i := range 500 {
		q := strings.ReplaceAll(question("CREATE", object("", good), ""), "authorizationpolicies", fmt.Sprint("kind-", i))
		q = strings.ReplaceAll(q, `"version":"v1"`, fmt.Sprintf(`"version":"v%d"`, i))
		s.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, Path, strings.NewReader(q)))
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if n := len(family.Metric); n > 10 {
			t.Errorf("%s has %d counters", family.GetName(), n)
		}
	}
}
