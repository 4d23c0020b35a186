package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/remotecommand"
)

// Command is kubectl on the lab's cluster, not yet started.
func (l *Lab) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, l.kubectl, args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.kubeconfig)
	return cmd
}

// API is the cluster's API without kubectl, for what is measured and for what is asked again and again: to start kubectl
// takes a sixth of a second of a processor, which whoever is waited for needs.
type API struct {
	config *rest.Config
	client *http.Client
	base   string
}

// openAPI makes the API of a kubeconfig's current context.
func openAPI(kubeconfig string) (*API, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", kubeconfig, err)
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", kubeconfig, err)
	}
	base, _, err := rest.DefaultServerURL(config.Host, "", schema.GroupVersion{}, true)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", kubeconfig, err)
	}
	return &API{config: config, client: client, base: strings.TrimSuffix(base.String(), "/")}, nil
}

// API is the cluster's.
func (l *Lab) API() *API { return l.api }

// Get reads what is at a path into a value. What is not there is [ErrNotFound].
func (a *API) Get(ctx context.Context, path string, into any) error {
	b, err := a.do(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, into)
}

// Delete deletes what is at a path, and does not wait until it is gone. What is not there is [ErrNotFound].
func (a *API) Delete(ctx context.Context, path string) error {
	_, err := a.do(ctx, http.MethodDelete, path, "", nil)
	return err
}

// Apply applies an object at its path.
func (a *API) Apply(ctx context.Context, path string, object any) (*Object, error) {
	body, err := json.Marshal(object)
	if err != nil {
		return nil, err
	}
	b, err := a.do(ctx, http.MethodPatch, path+"?fieldManager=e2e&force=true", "application/apply-patch+yaml", body)
	if err != nil {
		return nil, err
	}
	o := &Object{}
	return o, json.Unmarshal(b, o)
}

// ErrNotFound is returned for an object that is not there.
var ErrNotFound = errors.New("not found")

func (a *API) do(ctx context.Context, method, path, kind string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	res, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return nil, err
	case res.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%s %s: %w: %s", method, path, ErrNotFound, b)
	case res.StatusCode >= 300:
		return nil, fmt.Errorf("%s %s: %s: %s", method, path, res.Status, b)
	}
	return b, nil
}

// exec runs a command in a pod's only container.
func (a *API) exec(ctx context.Context, namespace, pod string, args []string, in io.Reader, out, errs io.Writer) error {
	query := url.Values{"command": args, "stdout": {"true"}, "stderr": {"true"}}
	if in != nil {
		query.Set("stdin", "true")
	}
	at, err := url.Parse(a.base + "/api/v1/namespaces/" + namespace + "/pods/" + pod + "/exec?" + query.Encode())
	if err != nil {
		return err
	}
	e, err := remotecommand.NewSPDYExecutor(a.config, http.MethodPost, at)
	if err != nil {
		return err
	}
	return e.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: out, Stderr: errs})
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
			err := f.watch(ctx, a.client, a.base+path+"?watch=true")
			f.note(func() { f.err = err })
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	}()
	return f
}

func (f *Follower) watch(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
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
