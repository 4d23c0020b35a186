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
)

// Keys finds the signing key.
type Keys struct {
	Client      kubernetes.Interface
	Namespace   string
	TrustDomain string
	// Dir is where a plugged-in key is mounted, "" for nowhere.
	Dir string
}

// Load returns the plugged-in key where there is one, as files or in the Secret cacerts; else the self-signed root
// of istio-ca-secret, which it makes if it is not there. Of several replicas that make one at once, the first to
// write wins and the others take its.
func (k *Keys) Load(ctx context.Context) (*Signer, error) {
	if s, err := k.pluggedIn(); s != nil || err != nil {
		return s, err
	}
	secrets := k.Client.CoreV1().Secrets(k.Namespace)
	have, err := secrets.Get(ctx, pluggedInName, metav1.GetOptions{})
	if err == nil && len(have.Data[fileCert]) > 0 {
		s, err := NewSigner(have.Data[fileCert], have.Data[fileKey], have.Data[fileChain], have.Data[fileRoot])
		if err != nil {
			return nil, fmt.Errorf("signing key of Secret %s/%s: %w", k.Namespace, pluggedInName, err)
		}
		return s, nil
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("read the plugged-in signing key from Secret %s/%s: %w", k.Namespace, pluggedInName, err)
	}
	have, err = secrets.Get(ctx, secretName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if have, err = k.selfSigned(ctx); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, fmt.Errorf("read the signing key from Secret %s/%s: %w", k.Namespace, secretName, err)
	}
	s, err := NewSigner(have.Data[fileCert], have.Data[fileKey], have.Data[fileChain], have.Data[fileRoot])
	if err != nil {
		return nil, fmt.Errorf("signing key of Secret %s/%s: %w; repair it, or delete it to have a new root made", k.Namespace, secretName, err)
	}
	return s, nil
}

func (k *Keys) selfSigned(ctx context.Context) (*corev1.Secret, error) {
	cert, key, err := NewSelfSigned(k.TrustDomain, time.Now())
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

// pluggedIn returns nil where no key is mounted.
func (k *Keys) pluggedIn() (*Signer, error) {
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
	var rest [3][]byte
	for i, name := range []string{fileKey, fileRoot, fileChain} {
		if rest[i], err = os.ReadFile(filepath.Join(k.Dir, name)); err != nil && (name != fileChain || !errors.Is(err, fs.ErrNotExist)) {
			return nil, fmt.Errorf("read the plugged-in signing key: %w", err)
		}
	}
	s, err := NewSigner(cert, rest[0], rest[2], rest[1])
	if err != nil {
		return nil, fmt.Errorf("plugged-in signing key in %s: %w", k.Dir, err)
	}
	return s, nil
}
