package enroll

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// serveCNI answers the plugin until the returned function is called. The socket is made under another name and
// moved into place, so a new agent takes over from the old one without a moment in which none answers. It is
// never removed: by then it may be the successor's.
func (r *Registry) serveCNI(ctx context.Context) (stop func(), err error) {
	path := r.cfg.Socket
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	os.Remove(tmp)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("listen for the CNI plugin: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+cni.PathAdd, answerWith(r.Add))
	mux.HandleFunc("POST "+cni.PathDel, answerWith(r.Del))
	mux.HandleFunc("POST "+cni.PathCheck, answerWith(r.Check))
	srv := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		// The mode of the socket is the first gate; the kernel's word about the peer is the second.
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if !fromRoot(c) {
				c.Close()
			}
			return ctx
		},
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	r.tasks.Go(func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			r.log.Error("CNI socket", "err", err)
		}
	})
	r.mu.Lock()
	r.listening = true
	r.mu.Unlock()
	return func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	}, nil
}

func fromRoot(c net.Conn) bool {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return false
	}
	root := false
	rc.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		root = err == nil && cred.Uid == 0
	})
	return root
}

func answerWith(f func(context.Context, cni.Request) (cni.Response, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, hr *http.Request) {
		var req cni.Request
		code := http.StatusOK
		var resp cni.Response
		err := json.NewDecoder(http.MaxBytesReader(w, hr.Body, 64<<10)).Decode(&req)
		if err != nil {
			code, resp = http.StatusBadRequest, cni.Response{Error: "read the request: " + err.Error()}
		} else if resp, err = f(hr.Context(), req); err != nil {
			code, resp = http.StatusServiceUnavailable, cni.Response{Error: err.Error()}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(resp)
	}
}

// Add answers a CNI ADD. It returns when the pod is captured, or when it is clear that it need not be; an error
// keeps the pod from starting, and the kubelet tries again. The plugin says of which pod it is.
func (r *Registry) Add(ctx context.Context, req cni.Request) (cni.Response, error) {
	began := time.Now()
	for {
		k, changed := r.known(req)
		a := admit(req, k)
		switch a.answer {
		case answerStart:
			return cni.Response{Why: a.why}, nil
		case answerCapture:
			err := r.enrol(ctx, a.pod, sandbox{containerID: req.ContainerID, nsPath: req.NetNS, addrs: req.Addrs})
			if u, never := unsupported(err); never {
				r.log.Warn("pod starts outside the mesh: its traffic cannot be captured", "namespace", req.Namespace, "pod", req.Name, "reason", u.Reason, "err", err)
				return cni.Response{Why: string(u.Reason)}, nil
			}
			if err != nil && !a.exempt {
				return cni.Response{}, err
			}
			r.log.Debug("CNI ADD", "namespace", req.Namespace, "pod", req.Name, "took", time.Since(began), "err", err)
			return cni.Response{Captured: err == nil, Why: a.why}, nil
		}
		wait := r.cfg.AddWait
		if a.brief {
			wait = min(wait, briefWait)
		}
		t := time.NewTimer(time.Until(began.Add(wait)))
		select {
		case <-changed:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return cni.Response{}, context.Cause(ctx)
		case <-t.C:
			if a.brief {
				return cni.Response{Why: a.why}, nil
			}
			return cni.Response{}, errors.New(a.why)
		}
	}
}

// known is what is known about the pod now; the channel is closed when that changes.
func (r *Registry) known(req cni.Request) (known, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := known{system: r.cfg.SystemNamespace, exempt: r.cfg.Exempt, namespaces: r.namespaces, synced: r.synced}
	if d, ok := r.desired[req.UID]; ok && req.UID != "" {
		k.pod = &d
		return k, r.changed
	}
	if req.UID == "" { // the runtime does not pass it; a pod's name is unique while it is there
		for _, d := range r.desired {
			if d.Namespace == req.Namespace && d.Name == req.Name && !d.Finished {
				k.pod = &d
			}
		}
	}
	for _, d := range r.unnamed { // the control plane does not pass it
		if d.Namespace == req.Namespace && d.Name == req.Name && req.UID != "" {
			d.UID = req.UID
			k.pod = &d
		}
	}
	return k, r.changed
}

// delWait is how long a DEL waits for a pod's connections to end, of which the applications have, and then as long for the other
// ends to have heard: with the answer the pod's network goes, and who was not told before that a tunnel has ended waits for it in
// vain. Twice that is less than the plugin waits.
const delWait = time.Second

// Del answers a CNI DEL. A runtime may send it late, when the pod has another sandbox already, and more than
// once: it counts only for the sandbox that is known.
func (r *Registry) Del(ctx context.Context, req cni.Request) (cni.Response, error) {
	r.mu.Lock()
	uid := ""
	for _, p := range r.pods {
		if p.uid == req.UID || req.UID == "" && p.status.Namespace == req.Namespace && p.status.Name == req.Name {
			if p.containerID == req.ContainerID || p.containerID == "" && !r.otherNamespace(p, req.NetNS) {
				uid = p.uid
			}
		}
	}
	r.mu.Unlock()
	if uid != "" {
		if ended := r.dispose(uid, true); ended != nil {
			select {
			case <-ended:
			case <-ctx.Done():
			}
		}
	}
	return cni.Response{}, nil
}

// otherNamespace reports whether path is a namespace and not the one of p, whose sandbox was found without a CNI
// ADD; the caller holds mu.
func (r *Registry) otherNamespace(p *pod, path string) bool {
	if path == "" || p.busy || !p.work.TryLock() {
		return path != ""
	}
	defer p.work.Unlock()
	if p.ns == nil {
		return true
	}
	h, err := netns.Open(path)
	if err != nil {
		return false
	}
	defer h.Close()
	return h.Cookie() != p.ns.Cookie()
}

// Check answers a CNI CHECK: an error when the pod should be captured and is not.
func (r *Registry) Check(_ context.Context, req cni.Request) (cni.Response, error) {
	k, _ := r.known(req)
	a := admit(req, k)
	if a.answer != answerCapture {
		return cni.Response{Why: a.why}, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pods[a.pod.UID]
	if p == nil || p.status.Redirection != Enabled {
		why := errNoProcess.Error()
		if p != nil {
			why = cmp.Or(p.status.Reason, why)
		}
		return cni.Response{}, fmt.Errorf("pod %s/%s is not captured: %s", req.Namespace, req.Name, why)
	}
	return cni.Response{Captured: true, Why: a.why}, nil
}
