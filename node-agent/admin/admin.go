// Package admin answers questions about a running node agent over HTTP:
//
//	127.0.0.1:15000  /config_dump /connections /version /logging /debug/pprof   for istioctl, Kiali and operators
//	                 /connections/watch   connections as they begin and end, for warren tap
//	                 /debug/mesh   the state of the mesh as on the wire         for warren why
//	*:15020          /metrics /stats/prometheus                                 for Prometheus
//	*:15021          /healthz/ready                                             for the kubelet
//
// The paths and the JSON of /config_dump are those of Istio's ztunnel, so that tools made for it can read
// ours. The package owns their form. It must not decide anything, and it never shows a key or a token.
package admin

import (
	"context"
	"crypto/fips140"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/tap"
	"github.com/warrenmesh/warren/internal/wds"
	"github.com/warrenmesh/warren/node-agent/proxy"
)

// Config is where the answers come from. An empty address leaves that server out.
type Config struct {
	AdminAddr   string // 127.0.0.1:15000
	MetricsAddr string // :15020
	ReadyAddr   string // :15021

	Store        *mesh.Store
	Certificates func() []*identity.Bundle
	Pods         func() []*proxy.PodHandle
	Connections  func() []proxy.ConnInfo
	// Watch tells of connections that begin or end.
	Watch    func(tap.Filter) (Watcher, error)
	Gatherer prometheus.Gatherer
	// Missing says what the agent still waits for before it is ready; nothing means ready.
	Missing func() []string
	// Settings is the section "config" of the dump; Extra adds sections of its own.
	Settings any
	Extra    func() map[string]any
	Version  string
	Level    *slog.LevelVar
	Log      *slog.Logger
}

// Server answers. Its zero value is of no use: see Listen.
type Server struct {
	cfg     Config
	servers []*http.Server
	lns     []net.Listener
}

// Listen opens the ports. Serve answers on them.
func Listen(ctx context.Context, cfg Config) (*Server, error) {
	s := &Server{cfg: cfg}
	var lc net.ListenConfig
	// A successor may run beside this agent until it has taken over, on the same ports of the node.
	lc.Control = reusePort
	for _, x := range []struct {
		addr string
		mux  *http.ServeMux
	}{
		{cfg.AdminAddr, s.adminMux()}, {cfg.MetricsAddr, s.metricsMux()}, {cfg.ReadyAddr, s.readyMux()},
	} {
		if x.addr == "" {
			continue
		}
		ln, err := lc.Listen(ctx, "tcp", x.addr)
		if err != nil {
			s.close()
			return nil, fmt.Errorf("admin: %w", err)
		}
		s.lns = append(s.lns, ln)
		s.servers = append(s.servers, &http.Server{Handler: x.mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10})
	}
	return s, nil
}

// Addrs returns where it listens, in the order of Config.
func (s *Server) Addrs() []net.Addr {
	var out []net.Addr
	for _, l := range s.lns {
		out = append(out, l.Addr())
	}
	return out
}

// Serve answers until ctx ends.
func (s *Server) Serve(ctx context.Context) error {
	errs := make(chan error, len(s.servers))
	for i, srv := range s.servers {
		go func() { errs <- srv.Serve(s.lns[i]) }()
	}
	var first error
	left := len(s.servers)
	select {
	case <-ctx.Done():
	case first = <-errs:
		left--
	}
	s.close()
	for range left {
		<-errs
	}
	if errors.Is(first, http.ErrServerClosed) {
		first = nil
	}
	return first
}

func (s *Server) close() {
	for _, srv := range s.servers {
		srv.Close()
	}
	for _, l := range s.lns {
		l.Close()
	}
}

func (s *Server) adminMux() *http.ServeMux {
	m := http.NewServeMux()
	m.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.dump()) })
	m.HandleFunc("GET /connections", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, s.connections()) })
	m.HandleFunc("GET /connections/watch", s.watch)
	m.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, map[string]string{"version": s.cfg.Version, "fips140": strconv.FormatBool(fips140.Enabled())})
	})
	m.HandleFunc("GET /debug/mesh", s.mesh)
	m.HandleFunc("POST /logging", s.logging)
	m.HandleFunc("GET /debug/pprof/", pprof.Index)
	m.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	m.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	m.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	m.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	m.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, "config_dump\nconnections\nconnections/watch\nversion\nlogging (POST, ?level=error|warn|info|debug)\ndebug/pprof/\n")
	})
	return m
}

func (s *Server) metricsMux() *http.ServeMux {
	m := http.NewServeMux()
	h := promhttp.HandlerFor(s.cfg.Gatherer, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4})
	m.Handle("GET /metrics", h)
	m.Handle("GET /stats/prometheus", h)
	return m
}

func (s *Server) readyMux() *http.ServeMux {
	m := http.NewServeMux()
	m.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		if missing := s.cfg.Missing(); len(missing) > 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, "not ready, waiting for: "+strings.Join(missing, ", "))
			return
		}
		fmt.Fprintln(w, "ready")
	})
	return m
}

var levels = map[string]slog.Level{
	"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn,
	"error": slog.LevelError, "off": slog.LevelError + 4,
}

// logging tells or sets the log level. As with ztunnel and Envoy only POST does.
func (s *Server) logging(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	want := q.Get("level") // istioctl asks with an empty one
	if q.Has("reset") && want == "" {
		want = "info"
	}
	if want != "" {
		l, ok := levels[want]
		if !ok {
			http.Error(w, fmt.Sprintf("level %q is invalid: take error, warn, info, debug or off", want), http.StatusBadRequest)
			return
		}
		s.cfg.Level.Set(l)
		s.cfg.Log.Info("log level set", "level", want)
	}
	fmt.Fprintf(w, "current log level is %s\n", strings.ToLower(s.cfg.Level.Level().String()))
}

// mesh shows all that the node knows of the mesh, without loss, so that others decide with it as the node does.
func (s *Server) mesh(w http.ResponseWriter, _ *http.Request) {
	b, err := wds.EncodeSnapshot(s.cfg.Store.Load())
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b)
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.Encode(v)
}
