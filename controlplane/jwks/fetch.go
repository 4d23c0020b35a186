package jwks

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/warrenmesh/warren/controlplane/policy"
)

// Limits of one attempt.
const (
	patience  = 10 * time.Second
	maxBytes  = 1 << 20
	redirects = 3
	atOnce    = 8
)

// How often a key set is fetched anew, and how soon again after a failure.
const (
	refresh    = 20 * time.Minute
	retryFirst = 2 * time.Second
	retryMost  = 5 * time.Minute
)

// Fetcher keeps the key sets that are wanted.
type Fetcher struct {
	// AllowHTTP lets key sets be fetched without TLS, for issuers inside the cluster.
	AllowHTTP bool
	// Told is called with every success and every first failure of its kind, not at the same time about the same set.
	Told func(from policy.KeySource, keys, problem string)
	Log  *slog.Logger

	client *http.Client
	slots  chan struct{}

	mu     sync.Mutex
	ctx    context.Context // of Run
	wanted map[policy.KeySource]context.CancelFunc
	work   sync.WaitGroup
}

// New returns a Fetcher that fetches nothing yet.
func New(told func(from policy.KeySource, keys, problem string), log *slog.Logger) *Fetcher {
	f := &Fetcher{Told: told, Log: log, wanted: map[policy.KeySource]context.CancelFunc{}, slots: make(chan struct{}, atOnce)}
	f.use(newDialer(), nil)
	return f
}

// use makes the client. A proxy of the environment would connect to what it likes.
func (f *Fetcher) use(d dialer, trust *tls.Config) {
	f.client = &http.Client{
		Timeout: patience,
		Transport: &http.Transport{
			DialContext: d.DialContext, TLSClientConfig: trust, DisableKeepAlives: true, ForceAttemptHTTP2: true,
			TLSHandshakeTimeout: patience, ResponseHeaderTimeout: patience, MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > redirects {
				return errors.New("it is redirected too often")
			}
			return f.allowed(r.URL)
		},
	}
}

// allowed judges an address as far as it is written.
func (f *Fetcher) allowed(u *url.URL) error {
	switch {
	case u.Scheme == "https" || u.Scheme == "http" && f.AllowHTTP:
	case u.Scheme == "http":
		return errors.New("keys are not fetched without TLS: write https, or allow it with keySets.allowHTTP in the mesh's configuration")
	default:
		return fmt.Errorf("keys cannot be fetched by %q", u.Scheme)
	}
	if u.Hostname() == "" {
		return errors.New("the address has no host")
	}
	if u.User != nil {
		return errors.New("the address has a user name or a password in it, which everybody can read who reads the object")
	}
	return nil
}

// Want says which key sets are needed from now on.
func (f *Fetcher) Want(sources []policy.KeySource) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := map[policy.KeySource]bool{}
	for _, s := range sources {
		now[s] = true
		if _, ok := f.wanted[s]; !ok {
			f.wanted[s] = f.begin(s)
		}
	}
	for s, stop := range f.wanted {
		if !now[s] {
			if stop != nil {
				stop()
			}
			delete(f.wanted, s)
		}
	}
}

// begin keeps one key set; nil while Run does not run.
func (f *Fetcher) begin(s policy.KeySource) context.CancelFunc {
	if f.ctx == nil || f.ctx.Err() != nil {
		return nil
	}
	ctx, stop := context.WithCancel(f.ctx)
	f.work.Go(func() { f.keep(ctx, s) })
	return stop
}

// Run fetches until ctx ends.
func (f *Fetcher) Run(ctx context.Context) {
	f.mu.Lock()
	f.ctx = ctx
	for s, stop := range f.wanted {
		if stop == nil {
			f.wanted[s] = f.begin(s)
		}
	}
	f.mu.Unlock()
	<-ctx.Done()
	f.work.Wait()
}

func (f *Fetcher) keep(ctx context.Context, s policy.KeySource) {
	keys, problem, told := "", "", false
	for wait := retryFirst; ; {
		got, err := f.slot(ctx, s)
		if ctx.Err() != nil {
			return
		}
		next := refresh
		if err != nil {
			if text := clip(err.Error()); !told || text != problem {
				problem = text
				f.Log.Warn("key set not fetched", "from", s.URL, "error", text, "kept", keys != "")
				f.Told(s, keys, problem)
			}
			next, wait = wait, min(2*wait, retryMost)
		} else {
			if !told || got != keys || problem != "" {
				f.Told(s, got, "")
			}
			keys, problem, wait = got, "", retryFirst
		}
		told = true
		t := time.NewTimer(next)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// slot fetches when not too many others do.
func (f *Fetcher) slot(ctx context.Context, s policy.KeySource) (string, error) {
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case f.slots <- struct{}{}:
	}
	defer func() { <-f.slots }()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return f.fetch(ctx, s)
}

func (f *Fetcher) fetch(ctx context.Context, s policy.KeySource) (string, error) {
	at := s.URL
	if s.Discover {
		b, err := f.get(ctx, strings.TrimSuffix(s.URL, "/")+"/.well-known/openid-configuration")
		if err != nil {
			return "", fmt.Errorf("ask the issuer where its keys are, for there is no jwksUri: %w", err)
		}
		var found struct {
			URI string `json:"jwks_uri"`
		}
		if err := json.Unmarshal(b, &found); err != nil || found.URI == "" {
			return "", errors.New("the issuer does not tell where its keys are; write jwksUri")
		}
		at = found.URI
	}
	b, err := f.get(ctx, at)
	if err != nil {
		return "", err
	}
	return policy.PublicKeys(b, false)
}

func (f *Fetcher) get(ctx context.Context, at string) ([]byte, error) {
	u, err := url.Parse(at)
	if err != nil {
		return nil, errors.New("the address is not one of the form https://host/path")
	}
	if err := f.allowed(u); err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	res, err := f.client.Do(req)
	if err != nil {
		var at *url.Error
		if errors.As(err, &at) { // it repeats the address
			err = at.Err
		}
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %d", res.StatusCode)
	}
	b, err := io.ReadAll(io.LimitReader(res.Body, maxBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxBytes {
		return nil, fmt.Errorf("the answer has more than %d bytes", maxBytes)
	}
	return b, nil
}

func clip(s string) string {
	if len(s) > 300 {
		return s[:300] + "..."
	}
	return s
}
