package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

var errNoKey = errors.New("the control plane has no signing key yet")

// The Secrets that hold a signing key, and their keys, as Istio has them.
const (
	secretName    = "istio-ca-secret" // the self-signed root
	secretType    = "istio.io/ca-root"
	pluggedInName = "cacerts" // made by the operator

	fileCert  = "ca-cert.pem"
	fileKey   = "ca-key.pem"
	fileChain = "cert-chain.pem"
	fileRoot  = "root-cert.pem"
	fileLists = "ca-crl.pem"

	// The self-signed root before the present one, while that is not trusted by every node.
	filePreviousCert = "previous-ca-cert.pem"
	filePreviousKey  = "previous-ca-key.pem"

	// AnnotationRotate on istio-ca-secret, with any value, has a new self-signed root made.
	AnnotationRotate = "warren.io/rotate-root"
)

// Keys finds the signing key.
type Keys struct {
	Client      kubernetes.Interface
	Namespace   string
	TrustDomain string
	// Dir is where a plugged-in key is mounted, "" for nowhere.
	Dir string
	// Joins has the self-signed root made by somebody else, whom the mesh trusts already.
	Joins bool
	// RootLife is how long a self-signed root lives; 0: 10 years. It is replaced when a fifth of that is left.
	RootLife time.Duration
}

// material is what was found.
type material struct {
	want   *Signer
	others []*Signer // that may sign while not every node trusts the root of want
	secret *corev1.Secret
	where  string // for messages
}

// pluggedIn reports whether the key is the operator's.
func (m *material) pluggedIn() bool { return m.secret == nil || m.secret.Name != secretName }

// badKey is a signing key that cannot be used.
type badKey struct {
	object corev1.ObjectReference // the Secret; zero for files
	err    error
}

func (e *badKey) Error() string { return e.err.Error() }
func (e *badKey) Unwrap() error { return e.err }

// load returns the plugged-in key where there is one, as files or in the Secret cacerts; else the self-signed root
// of istio-ca-secret, which it makes if it is not there. Of several replicas that make one at once, the first to
// write wins and the others take its.
func (k *Keys) load(ctx context.Context) (*material, error) {
	m, err := k.fromFiles()
	if err != nil {
		return nil, err
	}
	if m == nil {
		if m, err = k.fromSecret(ctx); err != nil {
			return nil, err
		}
	}
	own, err := k.get(ctx, secretName)
	if err != nil {
		return nil, err
	}
	if m != nil { // plugged in; the self-signed root may have signed before
		if own != nil {
			k.previous(m, own.Data[fileCert], own.Data[fileKey])
		}
		return m, nil
	}
	if own == nil && k.Joins {
		return nil, fmt.Errorf("there is no Secret %s/%s: the root of the mesh is made by the control plane that the agents ask, which has to be there first", k.Namespace, secretName)
	}
	if own == nil {
		if own, err = k.selfSigned(ctx); err != nil {
			return nil, err
		}
	}
	m = &material{secret: own, where: fmt.Sprintf("Secret %s/%s", k.Namespace, secretName)}
	if m.want, err = k.signer(own.Data[fileCert], own.Data[fileKey], own.Data[fileChain], own.Data[fileRoot], nil); err != nil {
		return nil, k.bad(own, fmt.Errorf("%w; repair it, or delete it to have a new root made", err))
	}
	k.previous(m, own.Data[filePreviousCert], own.Data[filePreviousKey])
	return m, nil
}

// previous adds a self-signed root that may still sign. One that cannot is of no interest.
func (k *Keys) previous(m *material, cert, key []byte) {
	if len(cert) == 0 || len(key) == 0 {
		return
	}
	if s, err := k.signer(cert, key, nil, cert, nil); err == nil {
		m.others = append(m.others, s)
	}
}

func (k *Keys) signer(cert, key, chain, roots, lists []byte) (*Signer, error) {
	s, err := NewSigner(cert, key, chain, roots)
	if err != nil {
		return nil, err
	}
	if err := s.revoke(lists); err != nil {
		return nil, err
	}
	return s, s.try(k.TrustDomain)
}

func (k *Keys) get(ctx context.Context, name string) (*corev1.Secret, error) {
	s, err := k.Client.CoreV1().Secrets(k.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the signing key from Secret %s/%s: %w", k.Namespace, name, err)
	}
	return s, nil
}

func (k *Keys) bad(s *corev1.Secret, err error) error {
	return &badKey{
		object: corev1.ObjectReference{Kind: "Secret", APIVersion: "v1", Namespace: s.Namespace, Name: s.Name, UID: s.UID},
		err:    fmt.Errorf("signing key of Secret %s/%s: %w", s.Namespace, s.Name, err),
	}
}

// fromSecret returns nil where the operator has plugged in nothing.
func (k *Keys) fromSecret(ctx context.Context) (*material, error) {
	have, err := k.get(ctx, pluggedInName)
	if err != nil || have == nil {
		return nil, err
	}
	data := have.Data
	if len(data[fileCert]) == 0 && len(data[corev1.TLSCertKey]) > 0 { // as cert-manager writes it
		data = map[string][]byte{fileCert: data[corev1.TLSCertKey], fileChain: data[corev1.TLSCertKey],
			fileKey: data[corev1.TLSPrivateKeyKey], fileRoot: data["ca.crt"], fileLists: data[fileLists]}
	}
	for _, name := range []string{fileCert, fileKey, fileRoot} {
		if len(data[name]) == 0 {
			return nil, k.bad(have, fmt.Errorf("it has no %s; it needs %s, %s and %s, and %s where there are intermediates", name, fileCert, fileKey, fileRoot, fileChain))
		}
	}
	s, err := k.signer(data[fileCert], data[fileKey], data[fileChain], data[fileRoot], data[fileLists])
	if err != nil {
		return nil, k.bad(have, err)
	}
	return &material{want: s, secret: have, where: fmt.Sprintf("Secret %s/%s", k.Namespace, pluggedInName)}, nil
}

func (k *Keys) selfSigned(ctx context.Context) (*corev1.Secret, error) {
	cert, key, err := newRoot(k.TrustDomain, time.Now(), k.rootLife())
	if err != nil {
		return nil, err
	}
	secrets := k.Client.CoreV1().Secrets(k.Namespace)
	made, err := secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secretName, Namespace: k.Namespace},
		Type:       secretType,
		Data:       map[string][]byte{fileCert: cert, fileKey: key, fileRoot: cert, fileChain: {}},
	}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		made, err = secrets.Get(ctx, secretName, metav1.GetOptions{})
	}
	if err != nil {
		return nil, fmt.Errorf("keep a new root in Secret %s/%s: %w", k.Namespace, secretName, err)
	}
	return made, nil
}

func (k *Keys) rootLife() time.Duration {
	if k.RootLife > 0 {
		return k.RootLife
	}
	return rootTTL
}

// rotationDue says why a self-signed root has to be exchanged, "" if it has not. One that is on its way is
// finished first.
func (k *Keys) rotationDue(m *material, now time.Time) string {
	if m.pluggedIn() || len(m.secret.Data[filePreviousKey]) > 0 {
		return ""
	}
	if _, asked := m.secret.Annotations[AnnotationRotate]; asked {
		return "annotation " + AnnotationRotate
	}
	whole := m.want.cert.NotAfter.Sub(m.want.cert.NotBefore)
	if left := m.want.cert.NotAfter.Sub(now); left < whole/5 {
		return fmt.Sprintf("it ends at %s", m.want.cert.NotAfter.UTC().Format(time.RFC3339))
	}
	return ""
}

// rotate writes a new self-signed root into the Secret, the present one beside it.
func (k *Keys) rotate(ctx context.Context, m *material, now time.Time) error {
	cert, key, err := newRoot(k.TrustDomain, now, k.rootLife())
	if err != nil {
		return err
	}
	return k.update(ctx, m, func(s *corev1.Secret) {
		s.Data[filePreviousCert], s.Data[filePreviousKey] = s.Data[fileCert], s.Data[fileKey]
		s.Data[fileCert], s.Data[fileKey], s.Data[fileRoot], s.Data[fileChain] = cert, key, cert, []byte{}
		delete(s.Annotations, AnnotationRotate)
	})
}

// settle deletes the key of the root that was dropped.
func (k *Keys) settle(ctx context.Context, m *material) error {
	return k.update(ctx, m, func(s *corev1.Secret) {
		delete(s.Data, filePreviousCert)
		delete(s.Data, filePreviousKey)
	})
}

// update changes the Secret as it was read: what somebody else has changed since then is not overwritten.
func (k *Keys) update(ctx context.Context, m *material, change func(*corev1.Secret)) error {
	next := m.secret.DeepCopy()
	if next.Data == nil {
		next.Data = map[string][]byte{}
	}
	change(next)
	if _, err := k.Client.CoreV1().Secrets(k.Namespace).Update(ctx, next, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("write Secret %s/%s: %w", k.Namespace, next.Name, err)
	}
	return nil
}

// fromFiles returns nil where no key is mounted.
func (k *Keys) fromFiles() (*material, error) {
	if k.Dir == "" {
		return nil, nil
	}
	cert, err := os.ReadFile(filepath.Join(k.Dir, fileCert))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the plugged-in signing certificate: %w", err)
	}
	rest := map[string][]byte{}
	for _, name := range []string{fileKey, fileRoot, fileChain, fileLists} {
		optional := name == fileChain || name == fileLists
		if rest[name], err = os.ReadFile(filepath.Join(k.Dir, name)); err != nil && (!optional || !errors.Is(err, fs.ErrNotExist)) {
			return nil, fmt.Errorf("read the plugged-in signing key: %w", err)
		}
	}
	s, err := k.signer(cert, rest[fileKey], rest[fileChain], rest[fileRoot], rest[fileLists])
	if err != nil {
		return nil, &badKey{err: fmt.Errorf("plugged-in signing key in %s: %w", k.Dir, err)}
	}
	return &material{want: s, where: k.Dir}, nil
}
