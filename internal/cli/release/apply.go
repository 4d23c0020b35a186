package release

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/csaupgrade"
)

// manager is the field manager; Helm's, so that either can go on from the other.
const manager = "helm"

// formerManagers wrote objects without server-side apply; their fields become ours, or else what the chart no longer
// has would stay.
var formerManagers = sets.New("helm", "kubectl-client-side-apply", "kubectl")

// Cluster is where objects are applied.
type Cluster struct {
	Client dynamic.Interface
	Mapper meta.RESTMapper
}

// Apply applies the objects kind after kind, those of one kind side by side. done is called for each.
func (c Cluster) Apply(ctx context.Context, objects []*unstructured.Unstructured, done func(*unstructured.Unstructured)) error {
	var mu sync.Mutex
	for len(objects) > 0 {
		n := 1
		for n < len(objects) && rank(objects[n]) == rank(objects[0]) {
			n++
		}
		group := objects[:n]
		objects = objects[n:]
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(8)
		for _, o := range group {
			g.Go(func() error {
				if err := c.apply(ctx, o); err != nil {
					return fmt.Errorf("applying %s: %w", Describe(o), err)
				}
				mu.Lock()
				defer mu.Unlock()
				done(o)
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	return nil
}

func (c Cluster) apply(ctx context.Context, o *unstructured.Unstructured) error {
	r, err := c.resource(o)
	if err != nil {
		return err
	}
	b, err := json.Marshal(o.Object)
	if err != nil {
		return err
	}
	force := true
	opts := metav1.PatchOptions{FieldManager: manager, Force: &force}
	got, err := r.Patch(ctx, o.GetName(), types.ApplyPatchType, b, opts)
	if err != nil {
		return err
	}
	former := slices.ContainsFunc(got.GetManagedFields(), func(f metav1.ManagedFieldsEntry) bool {
		return f.Operation == metav1.ManagedFieldsOperationUpdate && f.Subresource == "" && formerManagers.Has(f.Manager)
	})
	if !former {
		return nil
	}
	p, err := csaupgrade.UpgradeManagedFieldsPatch(got, formerManagers, manager)
	if err != nil || len(p) == 0 {
		return err
	}
	if _, err := r.Patch(ctx, o.GetName(), types.JSONPatchType, p, metav1.PatchOptions{}); err != nil {
		return err
	}
	_, err = r.Patch(ctx, o.GetName(), types.ApplyPatchType, b, opts)
	return err
}

// Delete deletes the objects in reverse order, waits for none, and leaves alone what is not there, what is to be kept,
// and what others have taken over. It returns how many it deleted.
func (c Cluster) Delete(ctx context.Context, objects []*unstructured.Unstructured) (int, error) {
	n := 0
	var errs []error
	background := metav1.DeletePropagationBackground
	for _, o := range slices.Backward(objects) {
		if o.GetAnnotations()["helm.sh/resource-policy"] == "keep" {
			continue
		}
		r, err := c.resource(o)
		if meta.IsNoMatchError(err) {
			continue
		}
		if err == nil {
			err = r.Delete(ctx, o.GetName(), metav1.DeleteOptions{PropagationPolicy: &background})
		}
		switch {
		case err == nil:
			n++
		case !apierrors.IsNotFound(err):
			errs = append(errs, fmt.Errorf("deleting %s: %w", Describe(o), err))
		}
	}
	return n, errors.Join(errs...)
}

// Ending describes those of the objects that are still there, with what the API server says that they wait for. It has the API
// server try again at once to end definitions whose end has failed.
func (c Cluster) Ending(ctx context.Context, objects []*unstructured.Unstructured) ([]string, error) {
	var left []string
	for _, o := range objects {
		r, err := c.resource(o)
		if meta.IsNoMatchError(err) {
			continue
		}
		var got *unstructured.Unstructured
		if err == nil {
			got, err = r.Get(ctx, o.GetName(), metav1.GetOptions{})
		}
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", Describe(o), err)
		}
		what := Describe(o)
		conditions, _, _ := unstructured.NestedSlice(got.Object, "status", "conditions")
		for _, item := range conditions {
			x, _ := item.(map[string]any)
			ends := x["type"] == "Terminating" || strings.HasPrefix(fmt.Sprint(x["type"]), "Namespace")
			if message, _ := x["message"].(string); ends && x["status"] == "True" && message != "" {
				what += " (" + message + ")"
			}
			if x["reason"] == "InstanceDeletionFailed" {
				remind(ctx, r, o.GetName())
			}
		}
		left = append(left, what)
	}
	return left, nil
}

// remindEvery is how often a definition is touched whose end has failed.
const remindEvery = 5 * time.Second

// remind touches a definition that is being deleted. Where the API server cannot list its objects, because definitions that were
// changed shortly before have no storage for a moment, it tries again by itself too, but after pauses that double up to a
// quarter of an hour (apiextensions-apiserver, pkg/controller/finalizer). That it fails is nothing worse than that wait.
func remind(ctx context.Context, r dynamic.ResourceInterface, name string) {
	now := time.Now().Truncate(remindEvery).UTC().Format(time.RFC3339)
	_, _ = r.Patch(ctx, name, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"annotations":{"warren.io/awaited":%q}}}`, now), metav1.PatchOptions{})
}

func (c Cluster) resource(o *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	gvk := o.GroupVersionKind()
	m, err := c.Mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if err != nil {
		return nil, err
	}
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return c.Client.Resource(m.Resource).Namespace(o.GetNamespace()), nil
	}
	return c.Client.Resource(m.Resource), nil
}

// Own marks objects as the release's of a revision, for Helm.
func Own(objects []*unstructured.Unstructured, rev, namespace string) {
	for _, o := range objects {
		l := o.GetLabels()
		if l == nil {
			l = map[string]string{}
		}
		l["app.kubernetes.io/managed-by"] = "Helm"
		o.SetLabels(l)
		a := o.GetAnnotations()
		if a == nil {
			a = map[string]string{}
		}
		a["meta.helm.sh/release-name"], a["meta.helm.sh/release-namespace"] = NameOf(rev), namespace
		o.SetAnnotations(a)
	}
}

// Gone returns what was and is no more.
func Gone(was, is []*unstructured.Unstructured) []*unstructured.Unstructured {
	same := func(a, b *unstructured.Unstructured) bool {
		return a.GroupVersionKind().GroupKind() == b.GroupVersionKind().GroupKind() && a.GetNamespace() == b.GetNamespace() && a.GetName() == b.GetName()
	}
	return slices.DeleteFunc(slices.Clone(was), func(o *unstructured.Unstructured) bool {
		return slices.ContainsFunc(is, func(n *unstructured.Unstructured) bool { return same(o, n) })
	})
}

// Present returns those of the objects that are in the cluster and say that they are Warren's, as they are there.
func (c Cluster) Present(ctx context.Context, objects []*unstructured.Unstructured) ([]*unstructured.Unstructured, error) {
	var mu sync.Mutex
	at := map[int]*unstructured.Unstructured{}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, o := range objects {
		g.Go(func() error {
			r, err := c.resource(o)
			if meta.IsNoMatchError(err) {
				return nil
			}
			var got *unstructured.Unstructured
			if err == nil {
				got, err = r.Get(ctx, o.GetName(), metav1.GetOptions{})
			}
			if apierrors.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("reading %s: %w", Describe(o), err)
			}
			mu.Lock()
			defer mu.Unlock()
			at[i] = got
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []*unstructured.Unstructured
	for i := range objects {
		if got := at[i]; got != nil && got.GetLabels()["app.kubernetes.io/part-of"] == "warren" {
			out = append(out, got)
		}
	}
	return out, nil
}
