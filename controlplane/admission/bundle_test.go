package admission

import (
	"context"
	"log/slog"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

func TestBundle(t *testing.T) {
	ctx := context.Background()
	ignore := admissionregistrationv1.Ignore
	kube := fake.NewClientset(&admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: ConfigurationName},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{
			{Name: "somebody.else", ClientConfig: admissionregistrationv1.WebhookClientConfig{CABundle: []byte("theirs")}},
			{Name: WebhookName, FailurePolicy: &ignore},
		},
	})
	root := []byte(nil)
	b := &Bundle{Client: kube, Root: func() []byte { return root }, Log: slog.New(slog.DiscardHandler)}
	writes := func() (n int) {
		for _, a := range kube.Actions() {
			if a.GetVerb() == "patch" {
				n++
			}
		}
		return n
	}
	for _, step := range []struct {
		root   string
		writes int
	}{{"", 0}, {"first", 1}, {"first", 1}, {"first and second", 2}} {
		if step.root != "" {
			root = []byte(step.root)
		}
		if err := b.reconcile(ctx); err != nil {
			t.Fatal(err)
		}
		if n := writes(); n != step.writes {
			t.Errorf("root %q: %d writes, want %d", step.root, n, step.writes)
		}
		have, err := kube.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(ctx, ConfigurationName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(have.Webhooks) != 2 || string(have.Webhooks[0].ClientConfig.CABundle) != "theirs" || *have.Webhooks[1].FailurePolicy != ignore {
			t.Fatalf("what is not ours changed: %+v", have.Webhooks)
		}
		if got := string(have.Webhooks[1].ClientConfig.CABundle); got != step.root {
			t.Errorf("root %q: the webhook trusts %q", step.root, got)
		}
	}
	none := &Bundle{Client: fake.NewClientset(), Root: b.Root, Log: b.Log}
	if err := none.reconcile(ctx); err != nil {
		t.Errorf("without a configuration: %v", err)
	}
}
