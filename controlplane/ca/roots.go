package ca

import (
	"context"
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

// RootConfigMap is the ConfigMap by which every namespace gets the root, as Istio has it.
const RootConfigMap = "istio-ca-root-cert"

const rootKey = "root-cert.pem"

// Roots keeps the root certificate in a ConfigMap of every namespace. It runs in one replica at a time.
type Roots struct {
	Client kubernetes.Interface
	// Root returns what the ConfigMaps have to say.
	Root func() []byte
	Log  *slog.Logger

	mu      sync.Mutex
	pending map[string]bool
	wake    chan struct{}
}

// NewRoots returns Roots that know of no namespace yet.
func NewRoots(client kubernetes.Interface, root func() []byte, log *slog.Logger) *Roots {
	return &Roots{Client: client, Root: root, Log: log, pending: map[string]bool{}, wake: make(chan struct{}, 1)}
}

// Check has the namespace's ConfigMap looked at. It does not block.
func (r *Roots) Check(namespace string) {
	r.mu.Lock()
	r.pending[namespace] = true
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Forget drops a namespace that is gone.
func (r *Roots) Forget(namespace string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.pending, namespace)
}

const rootRetry = 5 * time.Second

// Run writes until ctx ends. What could not be written is tried again.
func (r *Roots) Run(ctx context.Context) {
	retry := time.NewTicker(rootRetry)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-retry.C:
		}
		r.mu.Lock()
		todo := r.pending
		r.pending = map[string]bool{}
		r.mu.Unlock()
		for ns := range todo {
			err := r.write(ctx, ns)
			if err == nil || ctx.Err() != nil {
				continue
			}
			r.Log.Warn("root certificate not distributed", "namespace", ns, "error", err)
			r.mu.Lock()
			r.pending[ns] = true
			r.mu.Unlock()
		}
	}
}

func (r *Roots) write(ctx context.Context, ns string) error {
	root := r.Root()
	if len(root) == 0 {
		return errNoKey
	}
	maps := r.Client.CoreV1().ConfigMaps(ns)
	have, err := maps.Get(ctx, RootConfigMap, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = maps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: RootConfigMap, Namespace: ns, Labels: map[string]string{"istio.io/config": "true"}},
			Data:       map[string]string{rootKey: string(root)},
		}, metav1.CreateOptions{})
		if apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil // the namespace is going or gone
		}
	case err == nil && have.Data[rootKey] != string(root):
		next := have.DeepCopy()
		if next.Data == nil {
			next.Data = map[string]string{}
		}
		next.Data[rootKey] = string(root)
		_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("ConfigMap %s/%s: %w", ns, RootConfigMap, err)
	}
	return nil
}
