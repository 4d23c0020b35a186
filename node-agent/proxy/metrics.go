package proxy

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/warrenmesh/warren/internal/mesh"
)

// labelNames is Istio's label set for TCP metrics, in ztunnel's order. Dashboards and Kiali depend on it.
var labelNames = [...]string{
	"reporter",
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster",
	"destination_service", "destination_service_namespace", "destination_service_name",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision",
	"destination_workload_namespace", "destination_principal", "destination_app", "destination_version",
	"destination_cluster",
	"request_protocol", "response_flags", "connection_security_policy",
}

// flagLabel is the index of response_flags, the only label that differs between the counters of a series.
const flagLabel = 21

type labels [len(labelNames)]string

// unknown is what Istio writes for a label that has no value.
const unknown = "unknown"

// seriesKey says whose connections are counted together. Objects of a Snapshot are immutable and shared
// between revisions, so their addresses are as good as their contents while they are reachable from here.
type seriesKey struct {
	dir      Direction
	src, dst *mesh.Workload
	service  *mesh.Service
	peer     mesh.Identity // authenticated source
	mtls     bool
}

// series is the counters of one label set. Bytes follow ztunnel: received is what the client sent and sent
// is what the server answered, at both reporters.
type series struct {
	labels         labels
	opened         atomic.Uint64
	closed, failed [flags]atomic.Uint64

	// Guarded by Metrics.mu:
	live           map[*conn]struct{} // connections that are open
	received, sent uint64             // by those that are not
	idle           time.Time          // since when live is empty
}

// seriesIdle is how long a label set without connections is still exported. Without a bound a node would
// export every client that ever was.
const seriesIdle = 15 * time.Minute

// maxSeries is how many label sets there may be before what a peer says about itself is left out of new ones: it
// could say something else on every connection.
const maxSeries = 10_000

// Metrics counts connections. It is a prometheus.Collector: counting is an atomic addition on a series
// found once per connection, bytes are read from the open connections when somebody asks, and label values
// are put together then.
type Metrics struct {
	now func() time.Time

	mu      sync.Mutex
	recent  map[seriesKey]*series // emptied at every collection, so that it keeps no dead workload
	byLabel map[labels]*series

	sockets  [2]atomic.Int64            // by Direction
	outcomes [2][outcomes]atomic.Uint64 // by Direction
	attempts [2]atomic.Uint64           // failovers: tried again, given up
	refused  map[refusal]uint64         // guarded by mu
	shadows  map[unenforced]uint64      // guarded by mu
	descs    struct {
		opened, closed, failed, received, sent, sockets, outcomes, failovers, refused, audits, dryRuns, exceptions *prometheus.Desc
	}
}

// unenforced is a result that is reported beside what is enforced.
type unenforced struct {
	policy         mesh.PolicyName
	action, result string
}

// refusal is a failed TLS handshake by side and by identity.Reason.
type refusal struct {
	dir    Direction
	reason string
}

// NewMetrics returns empty counters.
func NewMetrics() *Metrics {
	m := &Metrics{now: time.Now, recent: map[seriesKey]*series{}, byLabel: map[labels]*series{}, refused: map[refusal]uint64{},
		shadows: map[unenforced]uint64{}}
	traffic := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labelNames[:], nil)
	}
	d := &m.descs
	d.opened = traffic("istio_tcp_connections_opened_total", "The total number of TCP connections opened.")
	d.closed = traffic("istio_tcp_connections_closed_total", "The total number of TCP connections closed.")
	d.failed = traffic("istio_tcp_connections_failed_total", "The total number of TCP connections that failed to establish (unstable).")
	d.received = traffic("istio_tcp_received_bytes_total", "The size of total bytes received during request in case of a TCP connection.")
	d.sent = traffic("istio_tcp_sent_bytes_total", "The size of total bytes sent during response in case of a TCP connection.")
	d.sockets = prometheus.NewDesc("istio_tcp_sockets_open", "The current number of open TCP sockets (unstable).", []string{"reporter"}, nil)
	d.outcomes = prometheus.NewDesc("warren_connections_total", "Connections by how they ended.", []string{"reporter", "outcome"}, nil)
	d.failovers = prometheus.NewDesc("warren_failovers_total",
		"Connections tried on another endpoint before any byte was sent, by whether that was possible.", []string{"result"}, nil)
	d.refused = prometheus.NewDesc("warren_tls_failures_total", "TLS handshakes with a peer that failed, by why.", []string{"reporter", "reason"}, nil)
	d.audits = prometheus.NewDesc("warren_authz_audit_total", "Connections that an AUDIT policy matched.", []string{"policy"}, nil)
	d.dryRuns = prometheus.NewDesc("warren_authz_dry_run_total", "What policies under istio.io/dry-run would have decided.",
		[]string{"policy", "authz_dry_run_action", "authz_dry_run_result"}, nil)
	d.exceptions = prometheus.NewDesc("warren_authz_exceptions_total",
		"Plaintext connections that a DENY policy lets in for their source address alone, such as the API server's under STRICT.", []string{"policy"}, nil)
	return m
}

func (m *Metrics) unenforced(u unenforced) {
	m.mu.Lock()
	m.shadows[u]++
	m.mu.Unlock()
}

// opened counts a new connection and returns its series, which the caller gives back to closed. shared says
// that the objects of k are the Snapshot's, so that other connections will come with the same key.
func (m *Metrics) opened(c *conn, k seriesKey, shared bool) *series {
	m.mu.Lock()
	s := m.recent[k]
	if s == nil {
		l := labelsOf(k)
		if s = m.byLabel[l]; s == nil && !shared && k.src != nil && len(m.byLabel) >= maxSeries {
			k.src = &mesh.Workload{Namespace: k.src.Namespace}
			l = labelsOf(k)
			s = m.byLabel[l]
		}
		if s == nil {
			s = &series{labels: l, live: map[*conn]struct{}{}}
			m.byLabel[l] = s
		}
		if shared {
			m.recent[k] = s
		}
	}
	s.live[c] = struct{}{}
	m.mu.Unlock()
	s.opened.Add(1)
	m.sockets[k.dir].Add(1)
	return s
}

func (m *Metrics) closed(c *conn, s *series, o Outcome) {
	f, dir := o.flag(), c.dir
	s.closed[f].Add(1)
	if f != flagNone {
		s.failed[f].Add(1)
	}
	m.sockets[dir].Add(-1)
	m.outcome(dir, o)
	m.mu.Lock()
	delete(s.live, c)
	s.received += uint64(c.bytes.AtoB.Load())
	s.sent += uint64(c.bytes.BtoA.Load())
	if len(s.live) == 0 {
		s.idle = m.now()
	}
	m.mu.Unlock()
}

// outcome counts connections that end before anything is known about them, and is part of closed for the others.
func (m *Metrics) outcome(dir Direction, o Outcome) { m.outcomes[dir][o].Add(1) }

func (m *Metrics) peerRefused(dir Direction, reason string) {
	m.mu.Lock()
	m.refused[refusal{dir, reason}]++
	m.mu.Unlock()
}

func (m *Metrics) failover(possible bool) {
	if possible {
		m.attempts[0].Add(1)
	} else {
		m.attempts[1].Add(1)
	}
}

// labelsOf follows ztunnel: the app labels repeat the canonical service, the source's principal is only ever
// the authenticated one, the destination's is the one it has in the mesh.
func labelsOf(k seriesKey) labels {
	var l labels
	for i := range l {
		l[i] = unknown
	}
	set := func(i int, v string) {
		if v != "" {
			l[i] = v
		}
	}
	l[0] = reporters[k.dir]
	if w := k.src; w != nil {
		set(1, w.WorkloadName)
		set(2, w.CanonicalName)
		set(3, w.CanonicalRevision)
		set(4, w.Namespace)
		set(6, w.CanonicalName)
		set(7, w.CanonicalRevision)
		set(8, w.Cluster)
	}
	set(5, k.peer.String())
	if s := k.service; s != nil {
		set(9, s.Name.Hostname)
		set(10, s.Name.Namespace)
		set(11, s.Short)
	}
	if w := k.dst; w != nil {
		set(12, w.WorkloadName)
		set(13, w.CanonicalName)
		set(14, w.CanonicalRevision)
		set(15, w.Namespace)
		set(16, w.Identity.String())
		set(17, w.CanonicalName)
		set(18, w.CanonicalRevision)
		set(19, w.Cluster)
	}
	l[20] = "tcp"
	l[flagLabel] = flagNames[flagNone]
	if k.mtls {
		l[22] = "mutual_tls"
	}
	return l
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	d := &m.descs
	for _, x := range []*prometheus.Desc{d.opened, d.closed, d.failed, d.received, d.sent, d.sockets, d.outcomes, d.failovers, d.refused, d.audits, d.dryRuns, d.exceptions} {
		ch <- x
	}
}

// Collect implements prometheus.Collector. It also retires label sets that were idle for seriesIdle.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	for _, x := range m.current() {
		s := x.series
		counter := func(d *prometheus.Desc, v uint64, f flag) {
			l := s.labels
			l[flagLabel] = flagNames[f]
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), l[:]...)
		}
		counter(m.descs.opened, s.opened.Load(), flagNone)
		counter(m.descs.received, x.received, flagNone)
		counter(m.descs.sent, x.sent, flagNone)
		for f := range flags {
			if v := s.closed[f].Load(); v > 0 {
				counter(m.descs.closed, v, f)
			}
			if v := s.failed[f].Load(); v > 0 {
				counter(m.descs.failed, v, f)
			}
		}
	}
	for dir, reporter := range reporters {
		ch <- prometheus.MustNewConstMetric(m.descs.sockets, prometheus.GaugeValue, float64(m.sockets[dir].Load()), reporter)
		for o := range outcomes {
			ch <- prometheus.MustNewConstMetric(m.descs.outcomes, prometheus.CounterValue, float64(m.outcomes[dir][o].Load()), reporter, o.String())
		}
	}
	for i, result := range [...]string{"tried", "exhausted"} {
		ch <- prometheus.MustNewConstMetric(m.descs.failovers, prometheus.CounterValue, float64(m.attempts[i].Load()), result)
	}
	m.mu.Lock()
	refused, shadows := maps.Clone(m.refused), maps.Clone(m.shadows)
	m.mu.Unlock()
	for u, n := range shadows {
		switch u.action {
		case "audit":
			ch <- prometheus.MustNewConstMetric(m.descs.audits, prometheus.CounterValue, float64(n), u.policy.String())
		case "exception":
			ch <- prometheus.MustNewConstMetric(m.descs.exceptions, prometheus.CounterValue, float64(n), u.policy.String())
		default:
			ch <- prometheus.MustNewConstMetric(m.descs.dryRuns, prometheus.CounterValue, float64(n), u.policy.String(), u.action, u.result)
		}
	}
	for r, n := range refused {
		ch <- prometheus.MustNewConstMetric(m.descs.refused, prometheus.CounterValue, float64(n), reporters[r.dir], r.reason)
	}
}

var reporters = [...]string{Outbound: "source", Inbound: "destination"}

// total is a series with the bytes of its open connections added up.
type total struct {
	*series
	received, sent uint64
}

func (m *Metrics) current() []total {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.recent)
	old := m.now().Add(-seriesIdle)
	out := make([]total, 0, len(m.byLabel))
	for l, s := range m.byLabel {
		if len(s.live) == 0 && s.idle.Before(old) {
			delete(m.byLabel, l)
			continue
		}
		t := total{series: s, received: s.received, sent: s.sent}
		for c := range s.live {
			t.received += uint64(c.bytes.AtoB.Load())
			t.sent += uint64(c.bytes.BtoA.Load())
		}
		out = append(out, t)
	}
	return out
}
