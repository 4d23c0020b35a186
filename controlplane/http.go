package controlplane

import (
	"crypto/fips140"
	"encoding/json"
	"net/http"
	"net/netip"
	"runtime"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/warrenmesh/warren/controlplane/xds"
)

const namespaceType = xds.TypeNamespace

func newRegistry(cfg Config) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "istio_build", Help: "Version of the component."}, []string{"component", "tag"})
	build.WithLabelValues("pilot", cfg.Version).Set(1)
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "pilot_info", Help: "Version of the control plane."}, []string{"version"})
	info.WithLabelValues(cfg.Version).Set(1)
	r.MustRegister(build, info)
	return r
}

// monitoring is the port that Prometheus, Kiali and istioctl know.
func (cp *controlPlane) monitoring() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(cp.metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /version", cp.version)
	mux.HandleFunc("GET /ready", cp.serveReady)
	mux.HandleFunc("GET /debug/syncz", cp.synced)
	return mux
}

// synced tells how far nodes and waypoints are, to who may forward a port to this pod: from elsewhere it would name every node.
func (cp *controlPlane) synced(w http.ResponseWriter, r *http.Request) {
	if a, err := netip.ParseAddrPort(r.RemoteAddr); err != nil || !a.Addr().Unmap().IsLoopback() {
		http.Error(w, "ask from the pod itself, through kubectl port-forward or warren proxy-status", http.StatusForbidden)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(cp.xds.Synced())
}

func (cp *controlPlane) readiness() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", cp.serveReady)
	return mux
}

func (cp *controlPlane) serveReady(w http.ResponseWriter, _ *http.Request) {
	if !cp.ready.Load() {
		http.Error(w, "the cluster's state has not been read yet", http.StatusServiceUnavailable)
		return
	}
	w.WriteHeader(http.StatusOK)
}

// version answers in istiod's shape: version-revision-status on one line.
func (cp *controlPlane) version(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Accept") == "application/json" {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]string{
			"version": cp.cfg.Version, "revision": cp.cfg.Revision, "golang_version": runtime.Version(), "status": "Clean", "tag": cp.cfg.Version,
			"fips140": strconv.FormatBool(fips140.Enabled()),
		})
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	_, _ = w.Write([]byte(cp.cfg.Version + "-warren-Clean"))
}
