package release

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"helm.sh/helm/v4/pkg/release/common"
	helmrelease "helm.sh/helm/v4/pkg/release/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Record is one revision of a release: what Helm calls a release.
type Record = helmrelease.Release

// kept is how many revisions are kept, as Helm does.
const kept = 10

// Records keeps revisions of the release in Secrets of a namespace, in Helm's format.
type Records struct {
	Client    kubernetes.Interface
	Namespace string
	Revision  string // of the control plane whose release it is; "" for the mesh's
}

// List returns the revisions, the oldest first.
func (r Records) List(ctx context.Context) ([]*Record, error) {
	list, err := r.Client.CoreV1().Secrets(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: "owner=helm,name=" + NameOf(r.Revision)})
	if err != nil {
		return nil, fmt.Errorf("reading the record of the release in %s: %w", r.Namespace, err)
	}
	var out []*Record
	for _, s := range list.Items {
		rec, err := decode(s.Data["release"])
		if err != nil {
			return nil, fmt.Errorf("reading Secret %s/%s: %w", s.Namespace, s.Name, err)
		}
		out = append(out, rec)
	}
	slices.SortFunc(out, func(a, b *Record) int { return cmp.Compare(a.Version, b.Version) })
	return out, nil
}

// Next makes the next revision; nothing is stored.
func (r Records) Next(history []*Record, values map[string]any, rendered *Rendered) (*Record, error) {
	c, err := chart()
	if err != nil {
		return nil, err
	}
	manifest, err := Manifest(rendered.Objects)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	rec := &Record{Name: NameOf(r.Revision), Namespace: r.Namespace, Version: 1, Chart: c, Config: values, Manifest: string(manifest), Hooks: rendered.Hooks,
		ApplyMethod: "ssa", Info: &helmrelease.Info{FirstDeployed: now, LastDeployed: now, Status: common.StatusPendingInstall,
			Description: "Initial install underway", Notes: rendered.Notes}}
	if len(history) > 0 {
		last := history[len(history)-1]
		rec.Version, rec.Info.FirstDeployed = last.Version+1, last.Info.FirstDeployed
		rec.SetStatus(common.StatusPendingUpgrade, "Preparing upgrade")
	}
	return rec, nil
}

// Put stores a revision, or what has become of it.
func (r Records) Put(ctx context.Context, rec *Record) error {
	s, err := encode(rec)
	if err != nil {
		return err
	}
	secrets := r.Client.CoreV1().Secrets(r.Namespace)
	if _, err = secrets.Create(ctx, s, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(ctx, s, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("recording revision %d of the release in %s: %w", rec.Version, r.Namespace, err)
	}
	return nil
}

// Deployed marks a revision as the one that is in force, supersedes the others and forgets the oldest.
func (r Records) Deployed(ctx context.Context, history []*Record, rec *Record, what string) error {
	rec.SetStatus(common.StatusDeployed, what)
	if err := r.Put(ctx, rec); err != nil {
		return err
	}
	for i, old := range history {
		if len(history)-i >= kept {
			if err := r.forget(ctx, old); err != nil {
				return err
			}
			continue
		}
		if old.Info.Status == common.StatusDeployed {
			old.Info.Status = common.StatusSuperseded
			if err := r.Put(ctx, old); err != nil {
				return err
			}
		}
	}
	return nil
}

// Failed marks a revision that did not come up.
func (r Records) Failed(ctx context.Context, rec *Record, why string) error {
	rec.SetStatus(common.StatusFailed, why)
	return r.Put(ctx, rec)
}

// Forget deletes the record of all revisions.
func (r Records) Forget(ctx context.Context, history []*Record) error {
	for _, rec := range history {
		if err := r.forget(ctx, rec); err != nil {
			return err
		}
	}
	return nil
}

func (r Records) forget(ctx context.Context, rec *Record) error {
	err := r.Client.CoreV1().Secrets(r.Namespace).Delete(ctx, secretName(rec), metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting Secret %s/%s: %w", r.Namespace, secretName(rec), err)
	}
	return nil
}

// InForce returns the newest revision that was deployed, or nil.
func InForce(history []*Record) *Record {
	for _, rec := range slices.Backward(history) {
		if rec.Info.Status == common.StatusDeployed || rec.Info.Status == common.StatusSuperseded {
			return rec
		}
	}
	return nil
}

// Interrupted reports whether the last revision is one that nobody finishes.
func Interrupted(history []*Record) bool {
	return len(history) > 0 && history[len(history)-1].Info.Status.IsPending()
}

func secretName(rec *Record) string {
	return fmt.Sprintf("sh.helm.release.v1.%s.v%d", rec.Name, rec.Version)
}

func encode(rec *Record) (*corev1.Secret, error) {
	b, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encoding the record of the release: %w", err)
	}
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	if _, err := z.Write(b); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secretName(rec), Namespace: rec.Namespace, Labels: map[string]string{
			"owner": "helm", "name": rec.Name, "status": rec.Info.Status.String(), "version": strconv.Itoa(rec.Version),
			"modifiedAt": strconv.FormatInt(time.Now().Unix(), 10)}},
		Type: "helm.sh/release.v1",
		Data: map[string][]byte{"release": []byte(base64.StdEncoding.EncodeToString(buf.Bytes()))},
	}, nil
}

func decode(data []byte) (*Record, error) {
	b, err := base64.StdEncoding.DecodeString(string(data))
	if err != nil {
		return nil, err
	}
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	if b, err = io.ReadAll(z); err != nil {
		return nil, err
	}
	rec := &Record{}
	if err := json.Unmarshal(b, rec); err != nil {
		return nil, err
	}
	if rec.Info == nil {
		rec.Info = &helmrelease.Info{}
	}
	return rec, nil
}
