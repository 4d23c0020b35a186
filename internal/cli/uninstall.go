package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/warrenmesh/warren/internal/cli/release"
	"github.com/warrenmesh/warren/internal/revision"
)

// uninstallCommand takes everything away.
func (a *app) uninstallCommand() *cobra.Command {
	limit, purge, force, rev := 3*time.Minute, false, false, revision.Default
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Clean the nodes and remove the mesh; pods go on without it",
		Long: "Clean the nodes and remove the mesh; pods go on without it. It also removes what kubectl apply of a generated manifest\n" +
			"installed, and what is left of an installation half removed.\n\n" +
			"The namespace, the root key and the definitions, with what users stored under them, stay unless --purge is given.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), limit)
			defer cancel()
			if rev != revision.Default && purge {
				return usageError{errors.New("--purge removes the whole mesh, and --revision a control plane beside it")}
			}
			if err := revision.Check(rev); err != nil {
				return usageError{fmt.Errorf("--revision: %w", err)}
			}
			if !force {
				if err := a.mayUninstall(ctx, c, rev); err != nil {
					return err
				}
			}
			if rev != revision.Default {
				return a.uninstallRevision(ctx, c, rev)
			}
			return a.uninstall(ctx, c, purge)
		},
	}
	cmd.Flags().DurationVar(&limit, "timeout", limit, "give up after this long")
	cmd.Flags().StringVar(&rev, "revision", rev, "only the control plane of this revision, beside the mesh's")
	cmd.Flags().BoolVar(&force, "force", false, "though Gateways or tags are left that are for it, or control planes of other revisions")
	cmd.Flags().BoolVar(&purge, "purge", false, "remove the namespace, the root key, and the definitions with all policies, routes and gateways under them")
	return cmd
}

func (a *app) uninstall(ctx context.Context, c *conn, purge bool) error {
	start, p := time.Now(), a.progress()
	records := release.Records{Client: c, Namespace: a.namespace}
	history, err := records.List(ctx)
	if err != nil {
		return err
	}
	objects, err := a.installedObjects(history, revision.Default)
	if err != nil {
		return err
	}
	beside := a.besideIstio(ctx, c)
	if rec := release.InForce(history); rec != nil {
		beside = beside || release.BesideIstio(rec.Config)
	}
	if beside && purge {
		return usageError{errors.New("--purge removes the root key and the definitions, which are Istio's too while Warren is beside it")}
	}
	found, err := c.objects.Present(ctx, objects)
	if err != nil {
		return err
	}
	// Definitions alone are no installation: they stay on purpose.
	if len(history) == 0 && !slices.ContainsFunc(found, func(o *unstructured.Unstructured) bool { return o.GetKind() != "CustomResourceDefinition" }) && !purge {
		p.done("nothing of Warren is installed in %s", a.namespace)
		return nil
	}
	p.now("cleaning the nodes")
	if err := a.cleanAll(ctx, c, found, objects); err != nil {
		return err
	}
	n, err := c.objects.Delete(ctx, found)
	if err != nil {
		return err
	}
	if err := a.deleteTags(ctx, c, revision.TagLabel+",app.kubernetes.io/part-of=warren"); err != nil {
		return err
	}
	copies, rev := 0, revision.Default
	if beside { // they are Istio's
		rev = revision.BesideIstio
	} else if copies, err = a.removeCopies(ctx, c); err != nil {
		return err
	}
	if err := a.awaitGone(ctx, c, p, agentSelector, holderSelector, controlSelector, "app="+cleanName); err != nil {
		return err
	}
	if err := a.deleteLease(ctx, c, rev); err != nil {
		return err
	}
	if err := records.Forget(ctx, history); err != nil {
		return err
	}
	if purge {
		kept := []*unstructured.Unstructured{release.NamespaceObject(a.namespace)} // and the root key with it
		for _, o := range found {
			if o.GetKind() == "CustomResourceDefinition" {
				o.SetAnnotations(nil)
				kept = append(kept, o)
			}
		}
		m, err := c.objects.Delete(ctx, kept)
		if err != nil {
			return err
		}
		n += m
		// An installation before the last of them is gone would lose what it has just applied.
		if err := a.poll(ctx, "waiting for the namespace and the definitions to go", func() (string, error) {
			left, err := c.objects.Ending(ctx, kept)
			if err == nil && len(left) > 0 {
				p.now("waiting for %s to go", some(left))
			}
			return strings.Join(left, ", "), err
		}); err != nil {
			return err
		}
	}
	p.done("%s removed after %s", plural(n+copies, "object"), time.Since(start).Round(100*time.Millisecond))
	return nil
}

// deleteLease removes that by which the replicas of a control plane elected one, which they made themselves.
func (a *app) deleteLease(ctx context.Context, c *conn, rev string) error {
	if err := c.CoordinationV1().Leases(a.namespace).Delete(ctx, revision.Lease(rev), metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting the Lease of the control plane's replicas: %w", err)
	}
	return nil
}

// uninstallRevision removes a control plane beside the mesh's. Nodes, definitions and the root stay: they are the mesh's.
func (a *app) uninstallRevision(ctx context.Context, c *conn, rev string) error {
	start, p := time.Now(), a.progress()
	records := release.Records{Client: c, Namespace: a.namespace, Revision: rev}
	history, err := records.List(ctx)
	if err != nil {
		return err
	}
	objects, err := a.installedObjects(history, rev)
	if err != nil {
		return err
	}
	found, err := c.objects.Present(ctx, objects)
	if err != nil {
		return err
	}
	if len(history) == 0 && len(found) == 0 {
		p.done("there is no control plane of revision %s in %s", rev, a.namespace)
		return nil
	}
	n, err := c.objects.Delete(ctx, found)
	if err != nil {
		return err
	}
	if err := a.awaitGone(ctx, c, p, controlSelector+","+revision.Label+"="+rev); err != nil {
		return err
	}
	if err := a.deleteLease(ctx, c, rev); err != nil {
		return err
	}
	if err := records.Forget(ctx, history); err != nil {
		return err
	}
	p.done("control plane of revision %s: %s removed after %s", rev, plural(n, "object"), time.Since(start).Round(100*time.Millisecond))
	return nil
}

// installedObjects is what may be there: what the record has, or else what the chart can yield.
func (a *app) installedObjects(history []*release.Record, rev string) ([]*unstructured.Unstructured, error) {
	var out []*unstructured.Unstructured
	for _, rec := range history {
		o, err := release.Parse(rec.Manifest)
		if err != nil {
			return nil, fmt.Errorf("reading revision %d of the release: %w", rec.Version, err)
		}
		out = append(release.Gone(out, o), o...)
	}
	if len(history) > 0 {
		return out, nil
	}
	for _, names := range []bool{false, true} {
		on := map[string]any{"enabled": true}
		r, err := release.Render(map[string]any{"revision": rev, "compat": map[string]any{"istioNames": names}, "networkPolicies": on, "resourceQuotas": on,
			"securityContextConstraints": on, "node": map[string]any{"canary": map[string]any{"nodes": "of=any"}}}, release.Target{Namespace: a.namespace})
		if err != nil {
			return nil, err
		}
		out = append(release.Gone(out, r.Objects), r.Objects...)
	}
	return out, nil
}

// cleanAll cleans the nodes, with the chart's own agent where that in the cluster is gone.
func (a *app) cleanAll(ctx context.Context, c *conn, found, objects []*unstructured.Unstructured) error {
	if slices.ContainsFunc(found, isAgents) {
		return a.clean(ctx, c, nil)
	}
	i := slices.IndexFunc(objects, func(o *unstructured.Unstructured) bool { return isAgents(o) && !isCanary(o) })
	if i < 0 { // it never had agents
		return a.clean(ctx, c, nil)
	}
	ds := &appsv1.DaemonSet{}
	if err := convert(objects[i], ds); err != nil {
		return err
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: a.namespace, Name: ds.Spec.Template.Spec.ServiceAccountName}}
	accounts := c.CoreV1().ServiceAccounts(a.namespace)
	switch _, err := accounts.Create(ctx, account, metav1.CreateOptions{}); {
	case err == nil:
		defer func() { _ = accounts.Delete(context.WithoutCancel(ctx), account.Name, metav1.DeleteOptions{}) }()
	case !apierrors.IsAlreadyExists(err):
		return fmt.Errorf("creating ServiceAccount %s: %w", account.Name, err)
	}
	return a.clean(ctx, c, ds)
}

// removeCopies deletes the root certificates that the control plane published.
func (a *app) removeCopies(ctx context.Context, c *conn) (int, error) {
	n := 0
	for _, name := range []string{"istio-ca-root-cert", "istio-ca-crl"} {
		list, err := c.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
		if err != nil {
			return n, fmt.Errorf("finding the copies of %s: %w", name, err)
		}
		for _, m := range list.Items {
			if m.Name != name {
				continue
			}
			if err := c.CoreV1().ConfigMaps(m.Namespace).Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				return n, fmt.Errorf("deleting ConfigMap %s/%s: %w", m.Namespace, name, err)
			}
			n++
		}
	}
	return n, nil
}

// awaitGone waits for the last pod, which has sockets on the nodes.
func (a *app) awaitGone(ctx context.Context, c *conn, p *progress, selectors ...string) error {
	return a.poll(ctx, "waiting for the pods to end", func() (string, error) {
		n := 0
		for _, selector := range selectors {
			list, err := c.CoreV1().Pods(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
			if err != nil {
				return "", err
			}
			n += len(list.Items)
		}
		if n == 0 {
			return "", nil
		}
		p.now("waiting for %s to end", plural(n, "pod"))
		return strconv.Itoa(n) + " left", nil
	})
}
