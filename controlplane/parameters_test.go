package controlplane

import (
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/warrenmesh/warren/controlplane/deploy"
)

// What a ConfigMap says is followed as it changes, and that there is none is known, too.
func TestParametersAreFollowed(t *testing.T) {
	t.Setenv("KUBE_FEATURE_WatchListClient", "false") // the fake cannot do it
	kube := fake.NewClientset()
	p := newParameters(kube, "istio-system", slog.New(slog.DiscardHandler))
	done := make(chan struct{})
	go func() { defer close(done); p.run(t.Context()) }()
	t.Cleanup(func() { <-done })
	key := deploy.ParametersKey{Namespace: "shop", Name: "options"}
	becomes := func(what string, ok func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	p.Want([]deploy.ParametersKey{key})
	becomes("it is not known that there is none", func() bool { s, known := p.Get(key); return known && s == nil })
	becomes("it is not known that there are no defaults", func() bool { all, known := p.Defaults("istio"); return known && len(all) == 0 })

	maps := kube.CoreV1().ConfigMaps("shop")
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "options"}, Data: map[string]string{"deployment": "spec: {replicas: 2}"}}
	if _, err := maps.Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	becomes("it is not there", func() bool { s, _ := p.Get(key); return s != nil && s.Problem() == "" })
	m.Data = map[string]string{"deployment": "spec: {paused: true}"}
	if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	becomes("it is still what it was", func() bool { s, _ := p.Get(key); return s != nil && s.Problem() != "" })
	if err := maps.Delete(t.Context(), "options", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	becomes("it is still there", func() bool { s, _ := p.Get(key); return s == nil })

	d := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: "all", Labels: map[string]string{deploy.LabelDefaults: "istio"}}}
	if _, err := kube.CoreV1().ConfigMaps("istio-system").Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	becomes("there are no defaults", func() bool { all, _ := p.Defaults("istio"); return all["all"] != nil })
	if all, _ := p.Defaults("istio-waypoint"); len(all) > 0 {
		t.Errorf("another class has them too: %v", all)
	}
}
