package ca

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TrustConfigMap says which roots are published and how far an exchange of roots has come: its key status in a
// sentence, its key roots for the control plane.
const TrustConfigMap = "warren-trust"

const (
	trustRoots  = "roots"
	trustStatus = "status"
)

// AnnotationTrusts is on the pod of a node agent: the digest of the roots that its node has reported to trust.
const AnnotationTrusts = "warren.io/trusted-roots"

// Standing is what holds for certificates now. It is immutable.
type Standing struct {
	Signer *Signer // of workloads' certificates; nil: nobody may sign, for the reason Why
	Why    error
	Own    *Signer        // of the control plane's own certificate
	Roots  []byte         // PEM of what peers are to trust
	DERs   [][]byte       // the same, one by one
	Lists  [][]byte       // revocation lists, DER
	Pool   *x509.CertPool // the roots again
}

// alone is the Standing of a mesh with one signer.
func alone(s *Signer) *Standing { return standing(s, nil, begin(s.now(), s, nil)) }

// standing decides who signs: want, if every node trusts its root, or else another one that they trust.
func standing(want *Signer, others []*Signer, state published) *Standing {
	st := &Standing{Own: want, Roots: state.pem(), DERs: state.ders(), Lists: want.lists, Pool: x509.NewCertPool()}
	for _, r := range state.roots {
		st.Pool.AddCert(r.cert)
	}
	for _, s := range append([]*Signer{want}, others...) {
		if state.trusts(s) && s.now().Before(s.cert.NotAfter) {
			st.Signer, st.Own = s, s
			return st
		}
	}
	st.Why = fmt.Errorf("the root %s is not trusted by every node yet, and the key before it is not here", short(want.anchors[0]))
	return st
}

func (s *Standing) equal(o *Standing) bool {
	same := func(a, b *Signer) bool { return a == nil && b == nil || a.Equal(b) }
	return s != nil && o != nil && same(s.Signer, o.Signer) && same(s.Own, o.Own) && string(s.Roots) == string(o.Roots) &&
		slices.EqualFunc(s.Lists, o.Lists, func(a, b []byte) bool { return string(a) == string(b) })
}

// Agent is a node agent and the digest of the roots that it has reported to trust.
type Agent struct{ Node, Trusts string }

// Authority keeps the Standing current: it follows the Secrets, and on the replica that leads it takes an
// exchange of roots from phase to phase.
type Authority struct {
	Keys *Keys
	// Life is the longest lifetime of a certificate.
	Life time.Duration
	// Agents lists the agents of all nodes.
	Agents func(context.Context) ([]Agent, error)
	// OnChange is told of every new Standing, the first included.
	OnChange func(*Standing)
	// Event tells the operator about an object.
	Event func(on corev1.ObjectReference, kind, reason, message string)
	Log   *slog.Logger
	Every time.Duration // how often everything is looked at; 0: 3 s

	leading atomic.Pointer[context.Context] // of the replica that leads, until it ends
	mu      sync.Mutex                      // one look at a time
	current atomic.Pointer[Standing]
	said    string // the last trouble, so that it is told once
	told    string // and the last phase
}

// Standing returns what holds now, nil before the first look.
func (a *Authority) Standing() *Standing { return a.current.Load() }

// Begin looks until there is a key.
func (a *Authority) Begin(ctx context.Context) error {
	for {
		err := a.look(ctx, false)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(min(a.every(), 2*time.Second)):
		}
	}
}

func (a *Authority) every() time.Duration {
	if a.Every > 0 {
		return a.Every
	}
	return 3 * time.Second
}

// Lead says that this replica does what one does for all, until ctx ends.
func (a *Authority) Lead(ctx context.Context) { a.leading.Store(&ctx) }

// Follow takes over what changed until ctx ends. What cannot be read leaves the last in use.
func (a *Authority) Follow(ctx context.Context) {
	tick := time.NewTicker(a.every())
	defer tick.Stop()
	for {
		if lead := a.leading.Load(); lead != nil && (*lead).Err() == nil {
			_ = a.look(*lead, true) // it has told
		} else {
			_ = a.look(ctx, false)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look reads everything once, does what follows from it and remembers what is new.
func (a *Authority) look(ctx context.Context, lead bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	m, err := a.Keys.load(ctx)
	var bad *badKey
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &bad):
		a.trouble(lead, bad.object, "BadSigningKey", err)
		if lead {
			// The roots that are published go on, with the key that this replica still has.
			if st := a.current.Load(); st != nil && st.Signer != nil {
				_ = a.step(ctx, &material{want: st.Signer}, lead)
			}
		}
		return err
	case err != nil:
		a.trouble(false, corev1.ObjectReference{}, "", err)
		return err
	}
	if lead {
		if why := a.Keys.rotationDue(m, m.want.now()); why != "" {
			if err := a.Keys.rotate(ctx, m, m.want.now()); err != nil {
				a.trouble(false, corev1.ObjectReference{}, "", err)
				return err
			}
			a.Log.Info("a new self-signed root was made", "reason", why)
			if m, err = a.Keys.load(ctx); err != nil {
				return err
			}
		}
	}
	if err := a.step(ctx, m, lead); err != nil {
		a.trouble(false, corev1.ObjectReference{}, "", err)
		return err
	}
	a.said = ""
	return nil
}

// trouble tells what is wrong, once.
func (a *Authority) trouble(lead bool, on corev1.ObjectReference, reason string, err error) {
	if a.said == err.Error() {
		return
	}
	a.said = err.Error()
	if a.current.Load() == nil {
		a.Log.Error("no signing key", "error", err)
	} else {
		a.Log.Warn("signing key not taken over, the last one stays in use", "error", err)
	}
	if lead && on.Name != "" && a.Event != nil {
		a.Event(on, corev1.EventTypeWarning, reason, err.Error()+"; the key before it stays in use")
	}
}

// step brings the published roots to what follows, and the Standing to what is published.
func (a *Authority) step(ctx context.Context, m *material, lead bool) error {
	maps := a.Keys.Client.CoreV1().ConfigMaps(a.Keys.Namespace)
	cm, err := maps.Get(ctx, TrustConfigMap, metav1.GetOptions{})
	absent := apierrors.IsNotFound(err)
	if err != nil && !absent {
		return fmt.Errorf("read ConfigMap %s/%s: %w", a.Keys.Namespace, TrustConfigMap, err)
	}
	now := m.want.now()
	var state published
	if !absent {
		state, err = parsePublished(cm.Data[trustRoots])
		if err != nil {
			a.Log.Warn("ConfigMap is not readable and is written anew", "configmap", a.Keys.Namespace+"/"+TrustConfigMap, "error", err)
		}
	}
	if len(state.roots) == 0 {
		seen, err := a.seen(ctx)
		if err != nil {
			return err
		}
		state = begin(now, m.want, seen)
	}
	if lead {
		lacking, err := a.lacking(ctx, state)
		if err != nil {
			return err
		}
		next := state.next(now, m.want, len(lacking) == 0, a.Life)
		if lacking, err = a.lacking(ctx, next); err != nil {
			return err
		}
		status := next.describe(m.want, lacking)
		if absent || !next.equal(state) || cm.Data[trustStatus] != status {
			if err := a.write(ctx, cm, absent, next, status); err != nil {
				return err
			}
		}
		state = next
		a.tell(m, status)
		if m.secret != nil && len(m.secret.Data[filePreviousKey]) > 0 && a.gone(m, state) {
			if err := a.Keys.settle(ctx, m); err != nil {
				return err
			}
		}
	}
	others := m.others
	if st := a.current.Load(); st != nil && st.Signer != nil {
		others = append(slices.Clone(others), st.Signer) // restarting would forget it
	}
	if st := standing(m.want, others, state); !st.equal(a.current.Load()) {
		old := a.current.Swap(st)
		if old != nil {
			a.Log.Info("certificates: what signs or what is trusted changed", "key", m.where, "state", state.describe(m.want, nil), "roots", len(st.DERs), "revocation_lists", len(st.Lists))
		}
		if st.Why != nil {
			a.Log.Warn("no certificate is signed for now", "error", st.Why)
		}
		a.OnChange(st)
	}
	return nil
}

// gone reports whether the roots before the present one are not published any more.
func (a *Authority) gone(m *material, state published) bool {
	certs, err := parseCertificates(m.secret.Data[filePreviousCert])
	return err != nil || state.find(certs[0]) < 0
}

func (a *Authority) write(ctx context.Context, cm *corev1.ConfigMap, absent bool, state published, status string) error {
	text, err := state.marshal()
	if err != nil {
		return err
	}
	data := map[string]string{trustRoots: text, trustStatus: status, rootKey: string(state.pem())}
	maps := a.Keys.Client.CoreV1().ConfigMaps(a.Keys.Namespace)
	if absent {
		_, err = maps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: TrustConfigMap, Namespace: a.Keys.Namespace}, Data: data,
		}, metav1.CreateOptions{})
	} else {
		next := cm.DeepCopy()
		next.Data = data
		_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s/%s: %w", a.Keys.Namespace, TrustConfigMap, err)
	}
	return nil
}

// tell says to the operator which phase has begun.
func (a *Authority) tell(m *material, status string) {
	phase, _, _ := strings.Cut(status, ":")
	if phase == a.told {
		return
	}
	first := a.told == ""
	a.told = phase
	if first && phase == "settled" {
		return
	}
	a.Log.Info("exchange of roots", "status", status)
	if m.secret != nil && a.Event != nil {
		a.Event(corev1.ObjectReference{Kind: "Secret", APIVersion: "v1", Namespace: m.secret.Namespace, Name: m.secret.Name, UID: m.secret.UID},
			corev1.EventTypeNormal, "RootRotation", status)
	}
}

// seen are the roots that the namespaces were given by a control plane that kept no state.
func (a *Authority) seen(ctx context.Context) ([]*x509.Certificate, error) {
	cm, err := a.Keys.Client.CoreV1().ConfigMaps(a.Keys.Namespace).Get(ctx, RootConfigMap, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read ConfigMap %s/%s: %w", a.Keys.Namespace, RootConfigMap, err)
	}
	certs, err := parseCertificates([]byte(cm.Data[rootKey]))
	if err != nil {
		return nil, nil // whoever had it trusts nothing
	}
	return certs, nil
}

// lacking are the nodes whose agents do not trust all that is published, as far as that matters.
func (a *Authority) lacking(ctx context.Context, state published) ([]string, error) {
	if len(state.waiting()) == 0 {
		return nil, nil
	}
	agents, err := a.Agents(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask which nodes trust the roots: %w", err)
	}
	var nodes []string
	digest := state.digest()
	for _, g := range agents {
		if g.Trusts != digest {
			nodes = append(nodes, g.Node)
		}
	}
	slices.Sort(nodes)
	return slices.Compact(nodes), nil
}
