package bootstrap

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/warrenmesh/warren/internal/identity"
	"github.com/warrenmesh/warren/waypoint"
)

// waypointProcess is one running waypoint.
type waypointProcess struct {
	cfg      Config
	draining atomic.Bool
	client   http.Client // of Envoy's admin endpoint
}

// Run runs Envoy until stop ends, and then for as long as its connections need, at most cfg.Drain.
func Run(stop context.Context, cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	p := &waypointProcess{cfg: cfg, client: http.Client{Timeout: 5 * time.Second}}
	ctx, cancel := context.WithCancel(context.WithoutCancel(stop))
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)

	roots := identity.ControlPlaneRoots{File: cfg.RootFile}
	ca, err := identity.NewOwnCA(identity.CAConfig{Address: cfg.ControlAddress, ServerName: cfg.ControlName, Roots: roots, TokenFile: cfg.TokenFile, Cluster: cfg.ClusterID})
	if err != nil {
		return err
	}
	defer ca.Close()
	control, err := identity.DialControlPlane(cfg.ControlAddress, cfg.ControlName, roots, cfg.TokenFile, cfg.ClusterID)
	if err != nil {
		return fmt.Errorf("prepare the connection to %s: %w", cfg.ControlAddress, err)
	}
	defer control.Close()
	rotated := make(chan *identity.Bundle, 1)
	manager := identity.NewManager(identity.Config{Signer: ca, RootFile: cfg.RootFile, Log: cfg.Log, OnRotate: func(b *identity.Bundle) {
		select { // only the newest counts
		case <-rotated:
		default:
		}
		rotated <- b
	}})
	secrets := newSecrets()
	all := &workers{count: max(1, cfg.Concurrency), dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", cfg.workersSocket())
	}}
	read := newReadBack(p.get, all.passed, cfg.Log)
	g.Go(func() error { defer all.close(); read.run(ctx); return nil })
	srv := grpc.NewServer()
	secrets.register(ctx, srv)
	discovery.RegisterAggregatedDiscoveryServiceServer(srv, &relay{control: discovery.NewAggregatedDiscoveryServiceClient(control), read: read})
	for _, old := range []string{cfg.socket(), cfg.workersSocket()} {
		if err := os.Remove(old); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", cfg.socket())
	if err != nil {
		return err
	}
	g.Go(func() error { return over(ctx, srv.Serve(l)) })
	g.Go(func() error { <-ctx.Done(); srv.Stop(); return nil })
	g.Go(func() error { return over(ctx, manager.Run(ctx)) })
	g.Go(func() error {
		for {
			select {
			case <-ctx.Done():
				return nil
			case b := <-rotated:
				if err := secrets.set(b); err != nil {
					cfg.Log.Error("certificate not given to Envoy", "error", err)
				}
			}
		}
	})
	for addr, h := range map[string]http.Handler{cfg.StatusAddr: p.status(), cfg.TelemetryAddr: p.telemetry()} {
		hl, err := lc.Listen(ctx, "tcp", addr)
		if err != nil {
			cancel()
			return errors.Join(err, g.Wait())
		}
		hs := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}
		g.Go(func() error { return over(ctx, hs.Serve(hl)) })
		g.Go(func() error { <-ctx.Done(); return hs.Close() })
	}
	g.Go(func() error {
		defer cancel()
		return p.envoy(ctx, stop, manager)
	})
	return g.Wait()
}

// over drops the error with which a server says that it was told to end.
func over(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return err
}

// envoy runs Envoy from the first certificate to the last connection.
func (p *waypointProcess) envoy(ctx, stop context.Context, certs identity.Source) error {
	cfg := p.cfg
	first, cancel := context.WithCancel(ctx)
	defer context.AfterFunc(stop, cancel)()
	defer cancel()
	if _, err := certs.Bundle(first, cfg.identity()); err != nil {
		if stop.Err() != nil {
			return nil
		}
		return fmt.Errorf("get the certificate of %s: %w", cfg.identity(), err)
	}
	b, err := cfg.envoy()
	if err != nil {
		return err
	}
	if err := os.WriteFile(cfg.file(), b, 0o600); err != nil {
		return fmt.Errorf("write Envoy's bootstrap: %w", err)
	}
	cmd := exec.Command(cfg.Envoy, "-c", cfg.file(), "--disable-hot-restart", "--concurrency", strconv.Itoa(max(1, cfg.Concurrency)),
		"--log-level", cfg.LogLevel, "--drain-time-s", strconv.Itoa(max(1, int(cfg.Drain/time.Second))))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start Envoy: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	select {
	case err := <-exited:
		return fmt.Errorf("the Envoy of this waypoint ended by itself: %w", err)
	case <-ctx.Done():
	case <-stop.Done():
		p.drain(ctx, exited)
	}
	_ = cmd.Process.Signal(syscall.SIGTERM) // it has ended otherwise
	select {
	case <-exited:
	case <-time.After(5 * time.Second):
		_ = cmd.Process.Kill()
		<-exited
	}
	return nil
}

// drain has clients go elsewhere and waits for those that are there.
func (p *waypointProcess) drain(ctx context.Context, exited chan error) {
	p.draining.Store(true)
	for _, path := range []string{"/healthcheck/fail", "/drain_listeners?graceful&skip_exit"} {
		if err := p.post(ctx, path); err != nil {
			p.cfg.Log.Warn("Envoy does not drain", "path", path, "error", err)
		}
	}
	p.cfg.Log.Info("draining", "at_most", p.cfg.Drain.String())
	limit := time.NewTimer(p.cfg.Drain)
	defer limit.Stop()
	// Until everybody knows that the pod ends, connections still come.
	select {
	case <-time.After(min(5*time.Second, p.cfg.Drain)):
	case err := <-exited:
		exited <- err
		return
	}
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		if n, err := p.active(ctx); err != nil || n == 0 {
			return
		}
		select {
		case <-limit.C:
			return
		case err := <-exited:
			exited <- err
			return
		case <-tick.C:
		}
	}
}

func (p *waypointProcess) admin(path string) string {
	return "http://127.0.0.1:" + strconv.Itoa(p.cfg.AdminPort) + path
}

func (p *waypointProcess) post(ctx context.Context, path string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.admin(path), nil)
	if err != nil {
		return err
	}
	res, err := p.client.Do(req)
	if err != nil {
		return err
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

func (p *waypointProcess) get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.admin(path), nil)
	if err != nil {
		return nil, err
	}
	return p.client.Do(req)
}

// active is how much of what clients have begun is open: requests of their tunnels, or a gateway's requests and connections.
func (p *waypointProcess) active(ctx context.Context) (int, error) {
	res, err := p.get(ctx, "/stats?filter="+url.QueryEscape(`^(http\.(connect_terminate|ingress\|.*)\.downstream_rq_active|tcp\.ingress\|.*\.downstream_cx_active)$`))
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, err
	}
	return sum(string(b))
}

// sum adds up the values of statistics.
func sum(stats string) (total int, err error) {
	for line := range strings.Lines(stats) {
		_, v, _ := strings.Cut(strings.TrimSpace(line), ": ")
		n, err := strconv.Atoi(v)
		if err != nil {
			return 0, fmt.Errorf("statistic %q: %w", line, err)
		}
		total += n
	}
	return total, nil
}

// status answers the kubelet's probe.
func (p *waypointProcess) status() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, r *http.Request) {
		if p.draining.Load() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		p.pass(w, r, "/ready", copyAll)
	})
	return mux
}

// telemetry is where Prometheus scrapes.
func (p *waypointProcess) telemetry() http.Handler {
	mux := http.NewServeMux()
	for _, path := range []string{"/stats/prometheus", "/metrics"} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) { p.pass(w, r, "/stats/prometheus", istioNames) })
	}
	return mux
}

// istioNames copies metrics. It gives back their names and labels to those of the mesh.
func istioNames(w io.Writer, r io.Reader) error {
	in := bufio.NewReaderSize(r, 64<<10)
	ours := false // the line that is being read
	for begin := true; ; {
		line, err := in.ReadSlice('\n')
		if begin {
			line, ours = ourName(line)
		}
		if ours {
			line = waypoint.Shown(line)
		}
		if _, err := w.Write(line); err != nil {
			return err
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
		begin = err == nil // of a long line the rest follows
	}
}

// ourName takes Envoy's prefix from the name of a metric of the mesh.
func ourName(line []byte) (_ []byte, ours bool) {
	for _, prefix := range []string{"", "# TYPE ", "# HELP "} {
		if rest, ok := bytes.CutPrefix(line, []byte(prefix+"envoy_istio_")); ok {
			return append([]byte(prefix+"istio_"), rest...), true
		}
	}
	return line, false
}

func copyAll(w io.Writer, r io.Reader) error {
	_, err := io.Copy(w, r)
	return err
}

// pass answers with what Envoy's admin endpoint says.
func (p *waypointProcess) pass(w http.ResponseWriter, r *http.Request, path string, copy func(io.Writer, io.Reader) error) {
	res, err := p.get(r.Context(), path)
	if err != nil {
		http.Error(w, "Envoy does not answer: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	defer res.Body.Close()
	w.Header().Set("Content-Type", res.Header.Get("Content-Type"))
	w.WriteHeader(res.StatusCode)
	_ = copy(w, res.Body) // the client may have left
}
