package ca

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// The ConfigMaps of every namespace, as Istio has them: the roots, and the revocation lists where there are any.
const (
	RootConfigMap  = "istio-ca-root-cert"
	ListsConfigMap = "istio-ca-crl"
)

const rootKey = "root-cert.pem"

// Copies keeps a ConfigMap of one name, with the same content, in every namespace. It runs in one replica at a time.
type Copies struct {
	client    kubernetes.Interface
	name, key string
	data      func() ([]byte, error)
	log       *slog.Logger

	mu      sync.Mutex
	pending map[string]bool
	exists  map[string]bool // namespaces in which one was seen
	wake    chan struct{}
}

func newCopies(client kubernetes.Interface, name, key string, data func() ([]byte, error), log *slog.Logger) *Copies {
	return &Copies{client: client, name: name, key: key, data: data, log: log,
		pending: map[string]bool{}, exists: map[string]bool{}, wake: make(chan struct{}, 1)}
}

// NewRoots returns the Copies of the roots; they know of no namespace yet.
func NewRoots(client kubernetes.Interface, standing func() *Standing, log *slog.Logger) *Copies {
	return newCopies(client, RootConfigMap, rootKey, func() ([]byte, error) {
		if s := standing(); s != nil && len(s.Roots) > 0 {
			return s.Roots, nil
		}
		return nil, errNoKey
	}, log)
}

// NewLists returns the Copies of the revocation lists. While there are none no ConfigMap is made, and one that is
// there is emptied: who has mounted it reads that nothing is revoked any more.
func NewLists(client kubernetes.Interface, standing func() *Standing, log *slog.Logger) *Copies {
	return newCopies(client, ListsConfigMap, fileLists, func() ([]byte, error) {
		s := standing()
		if s == nil {
			return nil, errNoKey
		}
		var out []byte
		for _, der := range s.Lists {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
		}
		return out, nil
	}, log)
}

// Name is that of the ConfigMaps.
func (c *Copies) Name() string { return c.name }

// Check has the namespace's ConfigMap looked at. It does not block.
func (c *Copies) Check(namespace string) {
	c.mu.Lock()
	c.pending[namespace] = true
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Saw says that a namespace has the ConfigMap, and has it looked at if it says something else.
func (c *Copies) Saw(have *corev1.ConfigMap) {
	c.mu.Lock()
	c.exists[have.Namespace] = true
	c.mu.Unlock()
	if data, err := c.data(); err != nil || have.Data[c.key] != string(data) {
		c.Check(have.Namespace)
	}
}

// Forget drops a namespace that is gone.
func (c *Copies) Forget(namespace string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, namespace)
	delete(c.exists, namespace)
}

const copyRetry = 5 * time.Second

// Run writes until ctx ends. What could not be written is tried again.
func (c *Copies) Run(ctx context.Context) {
	retry := time.NewTicker(copyRetry)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		case <-retry.C:
		}
		c.mu.Lock()
		todo := c.pending
		c.pending = map[string]bool{}
		c.mu.Unlock()
		for ns := range todo {
			err := c.write(ctx, ns)
			if err == nil || ctx.Err() != nil {
				continue
			}
			c.log.Warn("not distributed", "configmap", ns+"/"+c.name, "error", err)
			c.mu.Lock()
			c.pending[ns] = true
			c.mu.Unlock()
		}
	}
}

func (c *Copies) write(ctx context.Context, ns string) error {
	data, err := c.data()
	if err != nil {
		return err
	}
	c.mu.Lock()
	exists := c.exists[ns]
	c.mu.Unlock()
	if len(data) == 0 && !exists {
		return nil
	}
	maps := c.client.CoreV1().ConfigMaps(ns)
	have, err := maps.Get(ctx, c.name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err) && len(data) == 0:
		return nil
	case apierrors.IsNotFound(err):
		_, err = maps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: c.name, Namespace: ns, Labels: map[string]string{"istio.io/config": "true"}},
			Data:       map[string]string{c.key: string(data)},
		}, metav1.CreateOptions{})
		if apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil // the namespace is going or gone
		}
	case err == nil && have.Data[c.key] != string(data):
		next := have.DeepCopy()
		if next.Data == nil {
			next.Data = map[string]string{}
		}
		next.Data[c.key] = string(data)
		_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("ConfigMap %s/%s: %w", ns, c.name, err)
	}
	return nil
}
