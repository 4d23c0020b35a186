package proxy

import (
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/node-agent/hbone"
)

// TestPeersCannotFillTheMetrics: a peer that calls itself something else on every connection gets series of its
// own up to a bound, and then one.
func TestPeersCannotFillTheMetrics(t *testing.T) {
	m := NewMetrics()
	dst := &mesh.Workload{UID: "u", Namespace: "shop", WorkloadName: "catalog"}
	for i := range maxSeries + 500 {
		c := &conn{dir: Inbound}
		k := seriesKey{dir: Inbound, src: &mesh.Workload{Namespace: "shop", WorkloadName: fmt.Sprint("w", i)}, dst: dst, peer: stranger, mtls: true}
		m.closed(c, m.opened(c, k, false), Completed)
	}
	if n := len(m.byLabel); n > maxSeries+1 {
		t.Errorf("%d series", n)
	}
	var opened uint64
	for _, s := range m.byLabel {
		opened += s.opened.Load()
	}
	if opened != maxSeries+500 {
		t.Errorf("%d connections are counted of %d", opened, maxSeries+500)
	}
}

// TestErrorsInTheLogAreBounded: an error may quote what a stranger has sent, a certificate's names for one.
func TestErrorsInTheLogAreBounded(t *testing.T) {
	for _, s := range []string{strings.Repeat("é\n", 40_000), strings.Repeat("\n", maxErrorLog), "two\nlines"} {
		if got := fold(s); strings.Contains(got, "\n") || len(got) > 3*maxErrorLog || !utf8.ValidString(got) {
			t.Errorf("%d bytes become %d", len(s), len(got))
		}
	}
}

// TestWhatPeersSayCanBeExported: a label that is no UTF-8 would spoil every scrape from then on.
func TestWhatPeersSayCanBeExported(t *testing.T) {
	m := NewMetrics()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(m)
	for _, header := range []string{"service.name=%FF", "k8s.deployment.name=%C3%28,service.name=x", "service.version=%ED%A0%80", "service.name=%C3%A9"} {
		b, err := hbone.ParseBaggage(header)
		if err != nil {
			b = hbone.Baggage{}
		}
		c := &conn{dir: Inbound}
		k := seriesKey{dir: Inbound, src: &mesh.Workload{WorkloadName: b.Workload, CanonicalName: b.Service, CanonicalRevision: b.Version}, peer: stranger, mtls: true}
		m.opened(c, k, false)
		func() {
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("%s: %v", header, p)
				}
			}()
			out := make(chan prometheus.Metric, 10_000)
			m.Collect(out)
		}()
	}
	if _, err := r.Gather(); err != nil {
		t.Error(err)
	}
}
