package admission

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

// Names that the chart gives.
const (
	// ConfigurationName is that of the ValidatingWebhookConfiguration.
	ConfigurationName = "warren-validator"
	// WebhookName is that of the only webhook in it.
	WebhookName = "validation.warren.io"
)

// Bundle keeps the webhook's configuration trusting the mesh's root: without that the API server does not believe
// the server and goes on without it.
type Bundle struct {
	Client kubernetes.Interface
	Root   func() []byte // PEM; nil while there is none
	Log    *slog.Logger
	// Every is how often the configuration is looked at; 10 s. Somebody may have exchanged it, or the root.
	Every time.Duration
}

// Run looks until ctx ends. One replica does it.
func (b *Bundle) Run(ctx context.Context) {
	every := b.Every
	if every == 0 {
		every = 10 * time.Second
	}
	for said := ""; ; {
		err := b.reconcile(ctx)
		wait, say := every, ""
		if err != nil {
			wait, say = min(every, time.Second), err.Error()
		}
		if say != said && ctx.Err() == nil && say != "" {
			b.Log.Warn("admission webhook is not called until this is mended", "error", err)
		}
		said = say
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// reconcile does nothing where there is no configuration: the chart was installed without it.
func (b *Bundle) reconcile(ctx context.Context) error {
	root := b.Root()
	if root == nil {
		return nil
	}
	configs := b.Client.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	have, err := configs.Get(ctx, ConfigurationName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read ValidatingWebhookConfiguration %s: %w", ConfigurationName, err)
	}
	for i := range have.Webhooks {
		if have.Webhooks[i].Name != WebhookName || bytes.Equal(have.Webhooks[i].ClientConfig.CABundle, root) {
			continue
		}
		// A strategic merge by the webhook's name changes nothing else.
		patch, err := json.Marshal(map[string]any{"webhooks": []any{map[string]any{
			"name": WebhookName, "clientConfig": map[string]any{"caBundle": root},
		}}})
		if err != nil {
			return fmt.Errorf("encode the root certificate: %w", err)
		}
		if _, err := configs.Patch(ctx, ConfigurationName, types.StrategicMergePatchType, patch,
			metav1.PatchOptions{FieldManager: "warren-control"}); err != nil {
			return fmt.Errorf("write the root certificate into ValidatingWebhookConfiguration %s: %w", ConfigurationName, err)
		}
		b.Log.Info("admission webhook trusts the mesh's root", "configuration", ConfigurationName)
	}
	return nil
}
