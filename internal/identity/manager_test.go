package identity

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/warrenmesh/warren/internal/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running runs a Manager until the test ends.
func running(t *testing.T, cfg Config) *Manager {
	t.Helper()
	cfg.Log = slog.New(slog.DiscardHandler)
	m := NewManager(cfg)
	run(t, m)
	return m
}

func run(t *testing.T, m *Manager) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestFirstUseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		m := running(t, Config{Signer: ca})
		b, err := m.Bundle(t.Context(), ui)
		if err != nil || b.ID != ui || !b.Valid(time.Now()) {
			t.Fatalf("got %v, %v", b, err)
		}
		var all sync.WaitGroup
		for range 50 { // and nobody asks twice
			all.Go(func() {
				if again, err := m.Bundle(t.Context(), ui); err != nil || again != b {
					t.Errorf("got %v, %v", again, err)
				}
			})
		}
		all.Wait()
		if n := len(ca.asked()); n != 1 {
			t.Errorf("the CA was asked %d times", n)
		}
	})
}

func TestRenewalAndRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		var rotated []string
		var mu sync.Mutex
		m := running(t, Config{Signer: ca, OnRotate: func(b *Bundle) {
			mu.Lock()
			defer mu.Unlock()
			rotated = append(rotated, b.Serial())
		}})
		first, err := m.Bundle(t.Context(), ui)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(8 * time.Hour)
		synctest.Wait()
		if m.Current(ui) != first {
			t.Error("it was renewed before 40 % of its life")
		}
		time.Sleep(8 * time.Hour)
		synctest.Wait()
		second := m.Current(ui)
		if second == nil || second == first {
			t.Error("it was not renewed after 60 % of its life")
		}
		mu.Lock()
		defer mu.Unlock()
		if len(rotated) != 2 || rotated[0] != first.Serial() || rotated[1] != second.Serial() {
			t.Errorf("OnRotate saw %v", rotated)
		}
	})
}

func TestOldCertificateServesWhileTheCAIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		m := running(t, Config{Signer: ca})
		first, err := m.Bundle(t.Context(), ui)
		if err != nil {
			t.Fatal(err)
		}
		ca.setFail(errors.New("the CA is away"))
		time.Sleep(23 * time.Hour)
		synctest.Wait()
		if m.Current(ui) != first {
			t.Error("the old certificate is gone although it is valid")
		}
		attempts := len(ca.asked())
		if attempts < 100 || attempts > 4000 {
			t.Errorf("%d attempts in about 11 hours: the backoff is 30 s at most", attempts)
		}
		time.Sleep(2 * time.Hour)
		if m.Current(ui) != nil {
			t.Error("an expired certificate is handed out")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if _, err := m.Bundle(ctx, ui); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "the CA is away") {
			t.Errorf("the error is %v", err)
		}
		// When the CA is back, whoever waits does not sit out a long backoff.
		done := make(chan error, 1)
		go func() {
			_, err := m.Bundle(t.Context(), ui)
			done <- err
		}()
		time.Sleep(time.Minute)
		ca.setFail(nil)
		back := time.Now()
		go func() { _, _ = m.Bundle(t.Context(), ui) }()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if waited := time.Since(back); waited > 3*time.Second {
			t.Errorf("waited %s after the CA was back", waited)
		}
	})
}

// gate lets one signature through at a time and tells who came.
type gate struct {
	*testCA
	enter chan mesh.Identity
	leave chan struct{}
}

func (g gate) Sign(ctx context.Context, id mesh.Identity, csr []byte, ttl time.Duration) ([]string, error) {
	g.enter <- id
	<-g.leave
	return g.testCA.Sign(ctx, id, csr, ttl)
}

func TestConnectionsComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gate{newTestCA(t), make(chan mesh.Identity, 100), make(chan struct{})}
		m := running(t, Config{Signer: g})
		var all sync.WaitGroup
		name := func(i int) mesh.Identity {
			return mesh.Identity{TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: fmt.Sprint("w", i)}
		}
		for i := range 20 {
			all.Go(func() { _ = m.Warm(t.Context(), name(i)) })
			synctest.Wait()
		}
		all.Go(func() { _, _ = m.Bundle(t.Context(), ui) })
		synctest.Wait()
		for range parallel {
			if id := <-g.enter; id == ui {
				t.Error("the late one was among the first")
			}
		}
		g.leave <- struct{}{}
		if id := <-g.enter; id != ui {
			t.Errorf("then came %s, want the one that a connection waits for", id)
		}
		for range 20 {
			g.leave <- struct{}{}
		}
		all.Wait()
	})
}

func TestForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		m := running(t, Config{Signer: ca})
		if _, err := m.Bundle(t.Context(), ui); err != nil {
			t.Fatal(err)
		}
		m.Forget(ui)
		synctest.Wait()
		if m.Current(ui) != nil || m.Stats().Identities != 0 {
			t.Error("it is still there")
		}
		time.Sleep(100 * time.Hour)
		if n := len(ca.asked()); n != 1 {
			t.Errorf("the CA was asked %d times", n)
		}
		// Somebody waits while the last pod goes and another comes.
		ca.setFail(errors.New("away"))
		done := make(chan error, 1)
		go func() { _, err := m.Bundle(t.Context(), ui); done <- err }()
		time.Sleep(time.Second)
		m.Forget(ui)
		ca.setFail(nil)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRootsChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, next := newTestCA(t), newTestCA(t)
		file := filepath.Join(t.TempDir(), "root-cert.pem")
		write := func(text string) {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(ca.rootPEM())
		m := running(t, Config{Signer: ca, RootFile: file})
		b, err := m.Bundle(t.Context(), ui)
		if err != nil || len(b.Roots()) != 1 {
			t.Fatalf("got %v with %d roots, %v", b, len(b.Roots()), err)
		}
		write(ca.rootPEM() + next.rootPEM())
		time.Sleep(11 * time.Second)
		synctest.Wait()
		b = m.Current(ui)
		if len(b.Roots()) != 2 || m.Stats().RootSwaps != 1 {
			t.Errorf("%d roots after the change, %d swaps", len(b.Roots()), m.Stats().RootSwaps)
		}
		if _, err := b.verify([]*x509.Certificate{next.bundle(t, catalog, nil).cert.Leaf}, bothUsages[0], time.Now()); err != nil {
			t.Errorf("a peer of the new root: %v", err)
		}
		write("garbage")
		time.Sleep(11 * time.Second)
		synctest.Wait()
		if len(m.Current(ui).Roots()) != 2 {
			t.Error("garbage in the file took the roots away")
		}
	})
}

func TestTakeover(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newTestCA(t)
		before := []*Bundle{ca.bundle(t, ui, nil), ca.bundle(t, catalog, nil)}
		data, err := Marshal(before)
		if err != nil {
			t.Fatal(err)
		}
		after, err := Unmarshal(data)
		if err != nil || len(after) != 2 {
			t.Fatalf("%d came back: %v", len(after), err)
		}
		if _, serverErr, clientErr := shake(t, after[0].ServerTLS(Peers{}), after[1].ClientTLS([]string{ui.String()})); serverErr != nil || clientErr != nil {
			t.Errorf("server: %v, client: %v", serverErr, clientErr)
		}
		m := NewManager(Config{Signer: ca, Log: slog.New(slog.DiscardHandler)})
		m.Adopt(after)
		run(t, m)
		if b, err := m.Bundle(t.Context(), ui); err != nil || b != after[0] {
			t.Errorf("got %v, %v", b, err)
		}
		if len(ca.asked()) != 0 {
			t.Error("the CA was asked for what was there")
		}
		time.Sleep(16 * time.Hour)
		synctest.Wait()
		if len(ca.asked()) != 2 {
			t.Errorf("%d renewals of what was taken over, want 2", len(ca.asked()))
		}
	})
}

func TestUnmarshalRefuses(t *testing.T) {
	ca := newTestCA(t)
	data, err := Marshal([]*Bundle{ca.bundle(t, ui, nil)})
	if err != nil {
		t.Fatal(err)
	}
	other, err := Marshal([]*Bundle{ca.bundle(t, ui, nil)})
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	key := func(s string) string {
		const end = "-----END PRIVATE KEY-----\n"
		return s[strings.Index(s, "-----BEGIN PRIVATE KEY") : strings.Index(s, end)+len(end)]
	}
	for name, s := range map[string]string{
		"garbage":      "garbage",
		"no identity":  text[strings.Index(text, "-----BEGIN PRIVATE KEY"):],
		"another key":  strings.Replace(text, key(text), key(string(other)), 1),
		"without key":  strings.Replace(text, key(text), "", 1),
		"without root": text[:strings.Index(text, "-----BEGIN TRUSTED")],
	} {
		if b, err := Unmarshal([]byte(s)); !errors.Is(err, ErrBundle) {
			t.Errorf("%s: %v, %v", name, b, err)
		}
	}
}

func TestKeysAreNotPrinted(t *testing.T) {
	ca := newTestCA(t)
	b := ca.bundle(t, ui, nil)
	want := fmt.Sprintf("certificate of %s until %s", ui, b.NotAfter.UTC().Format(time.RFC3339))
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "bundle", b)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		for _, x := range []any{b, *b} {
			if got := fmt.Sprintf(verb, x); got != want {
				t.Errorf("%s prints %q", verb, got)
			}
		}
	}
	asJSON, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]string{"the log": log.String(), "JSON": string(asJSON)} {
		if !strings.Contains(got, "shop") || strings.Contains(strings.ToLower(got), "priv") {
			t.Errorf("%s has %s", name, got)
		}
	}
}

func TestWrongAnswersOfTheCA(t *testing.T) {
	ca, other := newTestCA(t), newTestCA(t)
	for name, sign := range map[string]func(csr []byte) ([]string, error){
		"empty":      func([]byte) ([]string, error) { return nil, nil },
		"root alone": func([]byte) ([]string, error) { return []string{ca.rootPEM()}, nil },
		"another key": func([]byte) ([]string, error) {
			return []string{ca.issue(other.key.Public(), nil, ui.String()), ca.rootPEM()}, nil
		},
		"not certificates": func([]byte) ([]string, error) { return []string{"a", "b"}, nil },
		"another identity": func(csr []byte) ([]string, error) { return ca.Sign(context.Background(), catalog, csr, 0) },
	} {
		synctest.Test(t, func(t *testing.T) {
			m := running(t, Config{Signer: signerFunc(sign)})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if b, err := m.Bundle(ctx, ui); err == nil {
				t.Errorf("%s: got %v", name, b)
			}
		})
	}
}

type signerFunc func(csr []byte) ([]string, error)

func (f signerFunc) Sign(_ context.Context, _ mesh.Identity, csr []byte, _ time.Duration) ([]string, error) {
	return f(csr)
}
