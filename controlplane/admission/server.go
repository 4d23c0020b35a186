package admission

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// Bounds. The API server itself takes no request above 3 MiB; a review of an update holds two objects.
const (
	maxBody   = 8 << 20  // of a review that is read
	maxDrain  = 32 << 20 // of a review that is only read to be answered
	smallBody = 64 << 10

	smallReviews = 8 // at once
	smallQueue   = 256
	largeReviews = 1 // at once: large ones wait for each other, and nobody else for them
	largeQueue   = 8 // that are read or wait; the next is refused

	maxConns = 512
	// answerIn is below timeoutSeconds of the webhook, so that a refusal for want of time still arrives.
	answerIn = 2 * time.Second
)

// Path is where reviews are posted.
const Path = "/validate"

// Config is what a Server needs.
type Config struct {
	// Judge says what is wrong with an object, by itself or also in its cluster. It runs on many goroutines at once.
	Judge func(o *Object, cluster bool) []policy.Problem
	// APIServer tells whether an address is one of the API server's, which by default shows no certificate. Anybody
	// in the cluster can ask; others must not learn from the warnings what there is in it.
	APIServer func(netip.Addr) bool
	Log       *slog.Logger
	Metrics   prometheus.Registerer
}

// Server answers AdmissionReviews.
type Server struct {
	cfg          Config
	small, large lane

	passed, failed *prometheus.CounterVec
	errors         *prometheus.CounterVec
	strangers      prometheus.Counter
	took           prometheus.Histogram
	warnStranger   sync.Once
}

// NewServer registers its metrics: Istio's names, and the time that a review takes.
func NewServer(cfg Config) *Server {
	s := &Server{
		cfg:   cfg,
		small: newLane(smallReviews, smallQueue),
		large: newLane(largeReviews, largeQueue),
		passed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "galley_validation_passed", Help: "Objects that were let pass.",
		}, []string{"group", "version", "resource"}),
		failed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "galley_validation_failed", Help: "Objects that were refused, by the first reason.",
		}, []string{"group", "version", "resource", "reason"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "galley_validation_http_error", Help: "Reviews that were not answered, by HTTP status.",
		}, []string{"status"}),
		strangers: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "warren_admission_strangers_total", Help: "Reviews from addresses that are not known as the API server's.",
		}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "warren_admission_review_seconds", Help: "Time to answer a review.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .25, .5, 1, 2},
		}),
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(s.passed, s.failed, s.errors, s.strangers, s.took)
	}
	return s
}

// Serve serves on l until ctx ends, then finishes what it has begun.
func (s *Server) Serve(ctx context.Context, l net.Listener, config *tls.Config) error {
	mux := http.NewServeMux()
	mux.Handle("POST "+Path, s)
	srv := &http.Server{
		Handler:        mux,
		MaxHeaderBytes: 16 << 10,
		// A client that trickles holds a connection for no longer than this. Anybody in the cluster may connect.
		ReadHeaderTimeout: 3 * time.Second,
		ReadTimeout:       5 * time.Second,
		WriteTimeout:      10 * time.Second,
		IdleTimeout:       30 * time.Second,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		// One request at a time on a connection: a large body does not stand in the way of a small one.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerIn)
		defer cancel()
		if srv.Shutdown(end) != nil {
			srv.Close()
		}
	}()
	err := srv.Serve(tls.NewListener(netutil.LimitListener(l, maxConns), config))
	if ctx.Err() != nil {
		<-stopped
		return nil
	}
	return err
}

// HTTP1 is a server's TLS configuration with HTTP/1.1 in the place of what it speaks.
func HTTP1(c *tls.Config) *tls.Config {
	c = c.Clone()
	c.NextProtos = []string{"http/1.1"}
	if get := c.GetConfigForClient; get != nil {
		c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			one, err := get(hello)
			if err != nil || one == nil {
				return nil, err
			}
			one = one.Clone()
			one.NextProtos = []string{"http/1.1"}
			return one, nil
		}
	}
	return c
}

var errBusy = errors.New("too many reviews at once")

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(r.Context(), answerIn)
	defer cancel()
	review, code, err := s.review(ctx, r)
	if err != nil {
		s.errors.WithLabelValues(fmt.Sprint(code)).Inc()
		s.cfg.Log.Debug("review not answered", "error", err)
		http.Error(w, err.Error(), code)
		return
	}
	s.took.Observe(time.Since(start).Seconds())
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(review); err != nil {
		s.cfg.Log.Debug("answer not sent", "error", err)
	}
}

// review reads one question and answers it. An error, with its HTTP status, is for what is no question; the API
// server then goes on without an answer.
func (s *Server) review(ctx context.Context, r *http.Request) (*admissionv1.AdmissionReview, int, error) {
	if r.ContentLength > maxBody {
		return tooLarge(r.Body), 0, nil
	}
	small := r.ContentLength >= 0 && r.ContentLength <= smallBody
	l := s.large
	if small {
		l = s.small
	}
	if !l.queue() {
		if small {
			return nil, http.StatusServiceUnavailable, errBusy
		}
		return busy(uidOf(r.Body)), 0, nil
	}
	defer l.unqueue()
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if err != nil {
		return nil, http.StatusBadRequest, fmt.Errorf("read the review: %w", err)
	}
	if len(body) > maxBody {
		return tooLarge(io.MultiReader(bytes.NewReader(body), r.Body)), 0, nil
	}
	if !l.enter(ctx) {
		if small {
			return nil, http.StatusServiceUnavailable, errBusy
		}
		return busy(uidOf(bytes.NewReader(body))), 0, nil
	}
	defer l.leave()
	var in admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, http.StatusBadRequest, fmt.Errorf("read the review: %w", err)
	}
	if in.Request == nil || in.APIVersion != admissionv1.SchemeGroupVersion.String() {
		return nil, http.StatusBadRequest, fmt.Errorf("want an AdmissionReview of %s with a request", admissionv1.SchemeGroupVersion)
	}
	return s.answer(in.Request, s.fromAPIServer(r.RemoteAddr)), 0, nil
}

// fromAPIServer reports whether a review was posted from an address of the API server.
func (s *Server) fromAPIServer(remote string) bool {
	from, err := netip.ParseAddrPort(remote)
	if err == nil && s.cfg.APIServer(from.Addr().Unmap().WithZone("")) {
		return true
	}
	s.strangers.Inc()
	s.warnStranger.Do(func() {
		s.cfg.Log.Info("review from an address that is not known as the API server's: it gets no warnings about what is in the cluster; if it is the API server's, name it in mesh.apiServerSources of the chart",
			"address", remote)
	})
	return false
}

// labelsOf are a review's labels. Anybody in the cluster can post reviews: what the webhook is not for is counted
// under one name, or a pod could fill the memory with counters.
func labelsOf(q *admissionv1.AdmissionRequest) []string {
	switch r := q.Resource.Resource; {
	case q.Kind.Group == "telemetry.istio.io" && q.Kind.Version == "v1" && r == "telemetries":
		return []string{q.Kind.Group, q.Kind.Version, r}
	case q.Kind.Group != "security.istio.io" || q.Kind.Version != "v1":
	case r == "authorizationpolicies", r == "peerauthentications", r == "requestauthentications":
		return []string{q.Kind.Group, q.Kind.Version, r}
	}
	return []string{"other", "other", "other"}
}

// answer judges the object of one request.
func (s *Server) answer(q *admissionv1.AdmissionRequest, cluster bool) (out *admissionv1.AdmissionReview) {
	labels := labelsOf(q)
	refused := func(reason string, a *admissionv1.AdmissionReview) *admissionv1.AdmissionReview {
		s.failed.WithLabelValues(append(labels, reason)...).Inc()
		return a
	}
	// What makes this code fail may make the index fail as well: it must not be stored.
	defer func() {
		if p := recover(); p != nil {
			s.cfg.Log.Error("checking an object failed", "kind", q.Kind.Kind, "namespace", q.Namespace, "name", q.Name,
				"panic", p, "stack", string(debug.Stack()))
			out = refused("internal-error", refuse(q.UID, http.StatusInternalServerError, metav1.StatusReasonInternalError,
				"Warren failed while it checked this object and refuses it; its log says where. Please report it"))
		}
	}()
	pass := func(warnings ...string) *admissionv1.AdmissionReview {
		s.passed.WithLabelValues(labels...).Inc()
		return respond(&admissionv1.AdmissionResponse{UID: q.UID, Allowed: true, Warnings: warnings})
	}
	if q.Operation != admissionv1.Create && q.Operation != admissionv1.Update {
		return pass()
	}
	o, err := Parse(q.Object.Raw)
	if err != nil {
		return refused("unreadable", refuse(q.UID, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, err.Error()))
	}
	if o.deleted {
		return pass()
	}
	o.Kind, o.Namespace = q.Kind.Kind, q.Namespace
	if o.Name == "" {
		o.Name = q.Name
	}
	problems := s.cfg.Judge(o, cluster)
	if q.Operation == admissionv1.Update && anyError(problems) {
		// What was stored before may stay: labels, owners and finalizers of it can be changed.
		if old, err := Parse(q.OldObject.Raw); err == nil && old.sameMeaning(o) {
			return pass(warnings(problems)...)
		}
	}
	if anyError(problems) {
		return refused(string(problems[0].Code), refuseProblems(q.UID, problems))
	}
	return pass(warnings(problems)...)
}
