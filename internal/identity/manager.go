package identity

import (
	"bytes"
	"container/heap"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
)

// Config configures a Manager.
type Config struct {
	Signer   Signer
	RootFile string        // PEM roots to trust beside those the CA returns; read again when it changes
	TTL      time.Duration // asked for; 0: 24 h
	// OnRotate is told of every new Bundle, the first of an identity included. It must not block.
	OnRotate func(*Bundle)
	// OnTrust is told when SetTrust has changed what peers are checked against: open connections have to be
	// checked again. It must not block.
	OnTrust func(*Trust)
	Log     *slog.Logger // nil: slog.Default

	RootInterval time.Duration // how often RootFile is looked at; 0: 10 s
}

// Manager is the Source of a node agent. One goroutine, Run, owns the schedule: who needs a certificate when,
// and how urgent that is. Requests to the CA run beside it, a few at a time. While the CA is away the old
// certificate serves until it expires.
type Manager struct {
	cfg      Config
	commands chan command
	stale    chan struct{} // one token: certificates may be of no use under the present trust
	done     chan struct{} // closed when Run has returned
	started  atomic.Bool

	mu      sync.RWMutex
	current map[mesh.Identity]*slot
	anchors []byte // the RootFile as last read
	trust   *Trust // set by SetTrust; then RootFile and the CA's answers add nothing that it makes superfluous

	counts counters
}

// slot is what readers see of one identity.
type slot struct {
	bundle *Bundle
	ready  chan struct{} // closed once bundle can be used; a fresh one while there is none
	last   error         // of the last attempt, nil once it succeeded
}

// Stats are the counters of a Manager.
type Stats struct {
	Identities int    // known now
	Signed     uint64 // certificates received
	Failed     uint64 // attempts that failed
	RootSwaps  uint64 // times the roots changed under certificates in use
}

type counters struct{ signed, failed, rootSwaps atomic.Uint64 }

// ErrClosed is returned once Run has ended.
var ErrClosed = errors.New("the certificate manager is closed")

const (
	parallel    = 8 // requests to the CA at a time
	signTimeout = 10 * time.Second
	backoffMin  = 250 * time.Millisecond
	backoffMax  = 30 * time.Second
	hurry       = time.Second // how soon to try again where a connection waits
)

// priority is how urgent a certificate is; a higher one goes first.
type priority int

const (
	renewal  priority = iota // there is one that still serves
	warmup                   // a pod was enrolled
	realtime                 // a connection waits
)

type command struct {
	id     mesh.Identity
	urgent priority
	forget bool
}

// NewManager makes a Manager. It hands out nothing new until Run runs.
func NewManager(cfg Config) *Manager {
	if cfg.TTL == 0 {
		cfg.TTL = 24 * time.Hour
	}
	if cfg.RootInterval == 0 {
		cfg.RootInterval = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Manager{
		cfg:      cfg,
		commands: make(chan command),
		stale:    make(chan struct{}, 1),
		done:     make(chan struct{}),
		current:  make(map[mesh.Identity]*slot),
	}
}

// Bundle returns the current certificate of id. Where there is none it asks for one, before all others, and
// waits until ctx is done; the error then says what the CA said last.
func (m *Manager) Bundle(ctx context.Context, id mesh.Identity) (*Bundle, error) {
	return m.await(ctx, id, realtime)
}

// Warm returns when there is a valid certificate of id. Its wish comes after those of connections.
func (m *Manager) Warm(ctx context.Context, id mesh.Identity) error {
	_, err := m.await(ctx, id, warmup)
	return err
}

func (m *Manager) await(ctx context.Context, id mesh.Identity, urgent priority) (*Bundle, error) {
	if id.IsZero() {
		return nil, fmt.Errorf("%w: there is none for no identity", ErrBundle)
	}
	for {
		b, ready := m.look(id)
		if b != nil {
			return b, nil
		}
		if err := m.send(ctx, command{id: id, urgent: urgent}); err != nil {
			return nil, m.explain(id, err)
		}
		if ready == nil {
			if _, ready = m.look(id); ready == nil {
				continue
			}
		}
		select {
		case <-ready:
		case <-m.done:
			return nil, m.explain(id, ErrClosed)
		case <-ctx.Done():
			return nil, m.explain(id, ctx.Err())
		}
	}
}

// Current returns the certificate of id if there is a valid one now, or nil. It never waits.
func (m *Manager) Current(id mesh.Identity) *Bundle {
	b, _ := m.look(id)
	return b
}

// Forget drops an identity and its key: its last pod is gone. It is for a Manager that runs.
func (m *Manager) Forget(id mesh.Identity) {
	_ = m.send(context.Background(), command{id: id, forget: true})
}

// Stats returns the counters.
func (m *Manager) Stats() Stats {
	m.mu.RLock()
	n := len(m.current)
	m.mu.RUnlock()
	return Stats{n, m.counts.signed.Load(), m.counts.failed.Load(), m.counts.rootSwaps.Load()}
}

// Bundles returns the valid certificates that there are.
func (m *Manager) Bundles() []*Bundle {
	now := time.Now()
	m.mu.RLock()
	defer m.mu.RUnlock()
	var all []*Bundle
	for _, s := range m.current {
		if s.bundle != nil && s.bundle.Valid(now) {
			all = append(all, s.bundle)
		}
	}
	return all
}

// Adopt takes certificates that another process left, before Run runs. Expired ones are ignored.
func (m *Manager) Adopt(bundles []*Bundle) {
	if m.started.Load() {
		panic("identity: Adopt after Run")
	}
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, b := range bundles {
		if b.Valid(now) {
			m.current[b.ID] = &slot{bundle: b, ready: closed}
		}
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

func (m *Manager) look(id mesh.Identity) (*Bundle, chan struct{}) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := m.current[id]
	switch {
	case s == nil:
		return nil, nil
	case s.bundle != nil && s.bundle.Valid(time.Now()):
		return s.bundle, s.ready
	case s.bundle != nil:
		return nil, nil // expired: the command makes a new slot
	default:
		return nil, s.ready
	}
}

func (m *Manager) explain(id mesh.Identity, err error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if s := m.current[id]; s != nil && s.last != nil {
		return fmt.Errorf("waiting for a certificate of %s: %w (last attempt: %w)", id, err, s.last)
	}
	return fmt.Errorf("waiting for a certificate of %s: %w", id, err)
}

func (m *Manager) send(ctx context.Context, c command) error {
	select {
	case m.commands <- c:
		return nil
	case <-m.done:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// task is the schedule of one identity. Only Run touches it.
type task struct {
	id       mesh.Identity
	due      time.Time
	urgent   priority
	failures int
	running  bool
	dropped  bool // forgotten while running
	index    int  // in the heap, -1 outside
}

type outcome struct {
	task   *task
	bundle *Bundle
	err    error
}

// Run keeps the certificates until ctx is done. Call it once.
func (m *Manager) Run(ctx context.Context) error {
	if m.started.Swap(true) {
		return errors.New("running the certificate manager: it runs already")
	}
	defer close(m.done)
	if err := m.readRoots(); err != nil {
		m.cfg.Log.Warn("reading the roots", "error", err)
	}

	tasks := make(map[mesh.Identity]*task)
	var queue taskHeap
	now := time.Now()
	m.mu.RLock()
	for id, s := range m.current {
		t := &task{id: id, due: renewAt(s.bundle, now), index: -1}
		tasks[id] = t
		heap.Push(&queue, t)
	}
	m.mu.RUnlock()

	outcomes := make(chan outcome)
	running := 0
	var workers sync.WaitGroup
	defer workers.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	roots := time.NewTicker(m.cfg.RootInterval)
	defer roots.Stop()
	wake := time.NewTimer(time.Hour)
	defer wake.Stop()
	for {
		now := time.Now()
		for running < parallel {
			t := queue.next(now)
			if t == nil {
				break
			}
			t.running = true
			running++
			workers.Go(func() {
				b, err := m.fetch(ctx, t.id)
				select {
				case outcomes <- outcome{t, b, err}:
				case <-ctx.Done():
				}
			})
		}
		wake.Reset(queue.wait(now, running < parallel))

		select {
		case <-ctx.Done():
			return nil
		case <-wake.C:
		case <-roots.C:
			if err := m.readRoots(); err != nil {
				m.cfg.Log.Warn("reading the roots", "error", err)
			}
		case <-m.stale:
			m.renewUntrusted(tasks, &queue)
		case c := <-m.commands:
			m.obey(c, tasks, &queue)
		case o := <-outcomes:
			running--
			o.task.running = false
			if o.task.dropped {
				continue
			}
			m.settle(o)
			heap.Push(&queue, o.task)
		}
	}
}

// obey carries out a command.
func (m *Manager) obey(c command, tasks map[mesh.Identity]*task, queue *taskHeap) {
	t := tasks[c.id]
	if c.forget {
		m.mu.Lock()
		if s := m.current[c.id]; s != nil && s.bundle == nil {
			close(s.ready) // whoever still waits asks again
		}
		delete(m.current, c.id)
		m.mu.Unlock()
		if t != nil {
			t.dropped = true
			if t.index >= 0 {
				heap.Remove(queue, t.index)
			}
			delete(tasks, c.id)
		}
		return
	}
	now := time.Now()
	m.mu.Lock()
	s := m.current[c.id]
	if s != nil && s.bundle != nil && s.bundle.Valid(now) {
		m.mu.Unlock()
		return
	}
	if s == nil || s.bundle != nil {
		m.current[c.id] = &slot{ready: make(chan struct{})}
	}
	m.mu.Unlock()
	switch {
	case t == nil:
		t = &task{id: c.id, due: now, urgent: c.urgent, index: -1}
		tasks[c.id] = t
		heap.Push(queue, t)
	case t.running:
	default:
		t.urgent = max(t.urgent, c.urgent)
		switch soon := now.Add(mathrand.N(hurry)); {
		case t.failures == 0:
			t.due = now
		case c.urgent == realtime && t.due.After(soon.Add(hurry)):
			t.due = soon // a connection waits: do not sit out a long backoff
		}
		if t.index >= 0 {
			heap.Fix(queue, t.index)
		}
	}
}

// settle takes the result of an attempt and sets when the next one is due.
func (m *Manager) settle(o outcome) {
	now, t := time.Now(), o.task
	if o.err != nil {
		m.counts.failed.Add(1)
		wait := min(backoffMin<<min(t.failures, 10), backoffMax)
		wait = wait/2 + mathrand.N(wait)
		t.failures++
		t.due = now.Add(wait)
		m.mu.Lock()
		if s := m.current[t.id]; s != nil {
			s.last = o.err
		}
		m.mu.Unlock()
		m.cfg.Log.Warn("getting a certificate", "identity", t.id.String(), "error", o.err, "retry_in", wait.Round(time.Millisecond))
		return
	}
	m.counts.signed.Add(1)
	t.failures, t.urgent = 0, renewal
	t.due = renewAt(o.bundle, now)
	m.mu.Lock()
	if m.trust != nil && o.bundle.roots != m.trust { // SetTrust may have come in between
		o.bundle = o.bundle.underTrust(m.trust)
	}
	s := m.current[t.id]
	m.current[t.id] = &slot{bundle: o.bundle, ready: closed}
	m.mu.Unlock()
	if s != nil && s.bundle == nil {
		close(s.ready)
	}
	m.cfg.Log.Debug("got a certificate", "identity", t.id.String(), "not_after", o.bundle.NotAfter, "renew_at", t.due)
	if m.cfg.OnRotate != nil {
		m.cfg.OnRotate(o.bundle)
	}
}

// renewAt is when to renew: at half of what is left of the lifetime, give or take a tenth, so that pods which
// started together do not come back together.
func renewAt(b *Bundle, now time.Time) time.Time {
	if b == nil {
		return now
	}
	left := b.NotAfter.Sub(now)
	if left <= 0 {
		return now
	}
	return now.Add(time.Duration(float64(left) * (0.4 + 0.2*mathrand.Float64())))
}

// fetch gets one certificate under a fresh key.
func (m *Manager) fetch(ctx context.Context, id mesh.Identity) (*Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key for %s: %w", id, err)
	}
	csr, err := newCSR(id, key)
	if err != nil {
		return nil, err
	}
	chain, err := m.cfg.Signer.Sign(ctx, id, csr, m.cfg.TTL)
	if err != nil {
		return nil, err
	}
	if len(chain) < 2 {
		return nil, fmt.Errorf("%w: the CA's answer for %s has %d certificates, expected a leaf and a root", ErrBundle, id, len(chain))
	}
	last := len(chain) - 1
	b, err := NewBundle(id, key, []byte(strings.Join(chain[:last], "\n")), []byte(chain[last]))
	if err != nil {
		return nil, err
	}
	if b, err = m.under(b); err != nil {
		return nil, err
	}
	return b, b.check(time.Now())
}

// under puts a new certificate under what this node trusts. What SetTrust said holds alone if that suffices for
// the certificate: an answer that was late on its way must not bring back a root that was dropped.
func (m *Manager) under(b *Bundle) (*Bundle, error) {
	m.mu.RLock()
	trust, text := m.trust, m.anchors
	m.mu.RUnlock()
	if trust != nil {
		return b.underTrust(trust), nil
	}
	anchors, err := parseCerts(text)
	if err != nil {
		return nil, err
	}
	return b.withRoots(b.roots.plus(anchors)), nil
}

func (b *Bundle) underTrust(t *Trust) *Bundle {
	if own := b.withRoots(t); own.check(time.Now()) == nil {
		return own
	}
	return b.withRoots(t.plus(b.roots.certs))
}

// newCSR asks for a certificate without a subject, for one URI.
func newCSR(id mesh.Identity, key *ecdsa.PrivateKey) ([]byte, error) {
	uri, err := url.Parse(id.String())
	if err != nil {
		return nil, fmt.Errorf("making a request for %s: %w", id, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{}, URIs: []*url.URL{uri}, SignatureAlgorithm: x509.ECDSAWithSHA256,
	}, key)
	if err != nil {
		return nil, fmt.Errorf("making a request for %s: %w", id, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// readRoots reads RootFile and puts new roots under the certificates in use. Old ones stay trusted until the
// certificate that came with them is renewed: peers change over one by one.
func (m *Manager) readRoots() error {
	if m.cfg.RootFile == "" {
		return nil
	}
	text, err := os.ReadFile(m.cfg.RootFile)
	if err != nil {
		return err
	}
	m.mu.RLock()
	same := bytes.Equal(text, m.anchors)
	m.mu.RUnlock()
	if same {
		return nil
	}
	certs, err := parseCerts(text)
	if err != nil {
		return fmt.Errorf("%s: %w", m.cfg.RootFile, err)
	}
	if len(certs) == 0 {
		return fmt.Errorf("%s: %w: there is no certificate in it", m.cfg.RootFile, ErrBundle)
	}
	var changed []*Bundle
	m.mu.Lock()
	m.anchors = text
	for id, s := range m.current {
		if s.bundle == nil || m.trust != nil {
			continue
		}
		if merged := s.bundle.roots.plus(certs); merged != s.bundle.roots {
			b := s.bundle.withRoots(merged)
			m.current[id] = &slot{bundle: b, ready: closed}
			changed = append(changed, b)
		}
	}
	m.mu.Unlock()
	if len(changed) > 0 {
		m.counts.rootSwaps.Add(1)
		m.cfg.Log.Info("the roots changed", "file", m.cfg.RootFile, "certificates", len(changed))
	}
	if m.cfg.OnRotate != nil {
		for _, b := range changed {
			m.cfg.OnRotate(b)
		}
	}
	return nil
}

// SetTrust replaces what peers are checked against, for every certificate there is and every one to come. When it
// returns, no handshake begins under what held before. Roots are distributed so before a CA signs with them, and
// taken back when nothing is signed by them any more.
func (m *Manager) SetTrust(t *Trust) {
	var changed []*Bundle
	m.mu.Lock()
	m.trust = t
	for id, s := range m.current {
		if s.bundle == nil {
			continue
		}
		b := s.bundle.withRoots(t)
		m.current[id] = &slot{bundle: b, ready: closed}
		changed = append(changed, b)
	}
	m.mu.Unlock()
	if len(changed) > 0 {
		m.counts.rootSwaps.Add(1)
	}
	m.cfg.Log.Info("what peers are checked against changed", "roots", len(t.certs), "revocation_lists", len(t.lists), "digest", t.Digest())
	if m.cfg.OnRotate != nil {
		for _, b := range changed {
			m.cfg.OnRotate(b)
		}
	}
	if m.cfg.OnTrust != nil {
		m.cfg.OnTrust(t)
	}
	select {
	case m.stale <- struct{}{}:
	default:
	}
}

// Trust returns what SetTrust set last, nil before that.
func (m *Manager) Trust() *Trust {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.trust
}

// renewUntrusted asks anew for the certificates that peers refuse under the present trust: revoked, or below a
// root that was dropped.
func (m *Manager) renewUntrusted(tasks map[mesh.Identity]*task, queue *taskHeap) {
	now := time.Now()
	m.mu.RLock()
	defer m.mu.RUnlock()
	for id, s := range m.current {
		t := tasks[id]
		if s.bundle == nil || t == nil || t.index < 0 || s.bundle.check(now) == nil {
			continue
		}
		m.cfg.Log.Warn("a certificate is of no use any more and is asked for anew", "certificate", s.bundle)
		t.due, t.urgent = now.Add(mathrand.N(hurry)), warmup
		heap.Fix(queue, t.index)
	}
}
