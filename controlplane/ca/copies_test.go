package ca

import (
	"context"
	"encoding/pem"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// Revocation lists are in every namespace while there are any, and those who have mounted them see when they are
// taken back.
func TestListsInEveryNamespace(t *testing.T) {
	kube := fake.NewClientset(&corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: "left", Name: ListsConfigMap}, Data: map[string]string{fileLists: "of a CA before"},
	})
	var now atomic.Pointer[Standing]
	c := NewLists(kube, now.Load, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	get := func(ns string) (text string, there bool) {
		cm, err := kube.CoreV1().ConfigMaps(ns).Get(t.Context(), ListsConfigMap, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return "", false
		}
		if err != nil {
			t.Fatal(err)
		}
		return cm.Data[fileLists], true
	}
	becomes := func(what, ns, want string) {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			text, there := get(ns)
			if there && text == want {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("%s: %s has %q (there: %t), want %q", what, ns, text, there, want)
			}
		}
	}
	now.Store(&Standing{})
	left, err := kube.CoreV1().ConfigMaps("left").Get(t.Context(), ListsConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.Check("shop")
	c.Saw(left)
	becomes("no list, and one that is left", "left", "")
	if _, there := get("shop"); there {
		t.Error("a ConfigMap is made though there is no list")
	}
	now.Store(&Standing{Lists: [][]byte{{1}, {2}}})
	c.Check("shop")
	both := string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte{1}})) + string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte{2}}))
	becomes("two lists", "shop", both)
	now.Store(&Standing{})
	made, err := kube.CoreV1().ConfigMaps("shop").Get(t.Context(), ListsConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c.Saw(made)
	becomes("the lists are taken back", "shop", "")
}
