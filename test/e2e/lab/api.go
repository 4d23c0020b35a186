package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// Command is kubectl on the lab's cluster, not yet started.
func (l *Lab) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, l.kubectl, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.kubeconfig)
	return cmd
}

// API is the cluster's API over HTTP, for what is measured: starting kubectl takes longer than what it does.
type API struct {
	base string
	cmd  *exec.Cmd
}

// API runs kubectl proxy until ctx ends.
func (l *Lab) API(ctx context.Context) (*API, error) {
	cmd := l.Command(ctx, "proxy", "--port=0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	addr, ok := strings.CutPrefix(strings.TrimSpace(line), "Starting to serve on ")
	if err != nil || !ok {
		return nil, fmt.Errorf("kubectl proxy says %q: %w", line, err)
	}
	return &API{base: "http://" + addr, cmd: cmd}, nil
}

// Close ends the proxy.
func (a *API) Close() {
	_ = a.cmd.Process.Kill() // it has ended otherwise
	_ = a.cmd.Wait()
}

// Object is what the tests read of any object.
type Object struct {
	Metadata struct {
		Name, Namespace, ResourceVersion string
		Generation                       int64
	}
	Status struct {
		Conditions []Condition
	}
}

// Condition is one of an object's.
type Condition struct {
	Type, Status, Reason, Message string
	ObservedGeneration            int64
}

// Condition returns the condition of a type, or a zero one.
func (o *Object) Condition(kind string) Condition {
	for _, c := range o.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return Condition{}
}

// Apply applies an object at its path.
func (a *API) Apply(ctx context.Context, path string, object any) (*Object, error) {
	body, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, a.base+path+"?fieldManager=e2e&force=true", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/apply-patch+yaml")
	o := &Object{}
	return o, a.do(req, o)
}

func (a *API) do(req *http.Request, into any) error {
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %s", req.Method, req.URL.Path, res.Status, b)
	}
	return json.Unmarshal(b, into)
}

// Follower knows the objects of one path as a watch shows them.
type Follower struct {
	mu      sync.Mutex
	objects map[string]*Object
	changed chan struct{}
	err     error
}

// Follow watches the objects at a path until ctx ends.
func (a *API) Follow(ctx context.Context, path string) *Follower {
	f := &Follower{objects: map[string]*Object{}, changed: make(chan struct{})}
	go func() {
		for ctx.Err() == nil {
			err := f.watch(ctx, a.base+path+"?watch=true")
			f.note(func() { f.err = err })
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return f
}

func (f *Follower) watch(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	dec := json.NewDecoder(res.Body)
	for {
		var e struct {
			Type   string
			Object *Object
		}
		if err := dec.Decode(&e); err != nil {
			return err
		}
		f.note(func() {
			if e.Type == "DELETED" {
				delete(f.objects, e.Object.Metadata.Name)
			} else if e.Object != nil {
				f.objects[e.Object.Metadata.Name] = e.Object
			}
		})
	}
}

func (f *Follower) note(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	close(f.changed)
	f.changed = make(chan struct{})
}

// Await returns when the object is as wanted, and when that was seen.
func (f *Follower) Await(ctx context.Context, limit time.Duration, name string, ok func(*Object) bool) (*Object, time.Time, error) {
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	for {
		f.mu.Lock()
		o, changed, err := f.objects[name], f.changed, f.err
		f.mu.Unlock()
		if o != nil && ok(o) {
			return o, time.Now(), nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return o, time.Time{}, ctx.Err()
		case <-timeout.C:
			return o, time.Time{}, fmt.Errorf("%s is not as wanted after %s: %+v (watch: %v)", name, limit, o, err)
		}
	}
}
