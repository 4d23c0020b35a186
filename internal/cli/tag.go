package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warrenmesh/warren/internal/revision"
)

// tagRow is one line of tag list.
type tagRow struct {
	Tag      string   `json:"tag"`
	Revision string   `json:"revision"`
	There    bool     `json:"there"`              // the control plane of that revision is
	Gateways []string `json:"gateways,omitempty"` // that ask for the tag
}

func (a *app) tagCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "tag", Short: "Name revisions of the control plane", Args: args(cobra.NoArgs),
		Long: "Name revisions of the control plane. Gateways and namespaces whose label " + revision.Label + " has the name of a tag go with it to another revision.\n" +
			"The tag " + revision.Default + " is for those that have no such label.\n\n" +
			"A tag is a Service without ports in the control plane's namespace, with the labels " + revision.TagLabel + " and " + revision.Label + "; kubectl can make one too.",
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.tagSet(), a.tagList(), a.tagRemove())
	return cmd
}

func (a *app) tagSet() *cobra.Command {
	rev, overwrite := "", false
	cmd := &cobra.Command{
		Use: "set NAME", Short: "Name a revision", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			name := names[0]
			if err := revision.Check(name); err != nil {
				return usageError{err}
			}
			if rev == "" {
				return usageError{errors.New("--revision says which one is meant")}
			}
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			return a.setTag(cmd.Context(), c, name, rev, overwrite)
		},
	}
	cmd.Flags().StringVar(&rev, "revision", "", "of the control plane that is meant")
	cmd.Flags().BoolVar(&overwrite, "overwrite", false, "though the tag is for another revision now")
	return cmd
}

func (a *app) setTag(ctx context.Context, c *conn, name, rev string, overwrite bool) error {
	known, err := a.revisions(ctx, c)
	if err != nil {
		return err
	}
	if !known.Revisions[rev] {
		return fmt.Errorf("there is no control plane of revision %s in %s: there are %s", rev, a.namespace, strings.Join(slices.Sorted(maps.Keys(known.Revisions)), ", "))
	}
	if name != revision.Default && known.Revisions[name] {
		return fmt.Errorf("%s is the name of a revision: choose another", name)
	}
	was, there := known.Tags[name]
	if there && was == rev {
		a.progress().done("the tag %s is for revision %s already", name, rev)
		return nil
	}
	if there && !overwrite {
		return fmt.Errorf("the tag %s is for revision %s; --overwrite moves it, and with it the Gateways that ask for it", name, was)
	}
	services := c.CoreV1().Services(a.namespace)
	_, err = services.Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: revision.TagService + name, Namespace: a.namespace, Labels: map[string]string{
			revision.TagLabel: name, revision.Label: rev, "app.kubernetes.io/part-of": "warren", "app.kubernetes.io/managed-by": fieldManager}},
		Spec: corev1.ServiceSpec{ClusterIP: corev1.ClusterIPNone},
	}, metav1.CreateOptions{FieldManager: fieldManager})
	if apierrors.IsAlreadyExists(err) {
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q,%q:%q}}}`, revision.TagLabel, name, revision.Label, rev)
		_, err = services.Patch(ctx, revision.TagService+name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
	}
	if err != nil {
		return fmt.Errorf("writing Service %s/%s: %w", a.namespace, revision.TagService+name, err)
	}
	a.progress().done("the tag %s is for revision %s", name, rev)
	return nil
}

func (a *app) tagList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the names of revisions", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			all, known, err := a.owners(cmd.Context(), c)
			if err != nil {
				return err
			}
			rows := []tagRow{}
			for _, tag := range slices.Sorted(maps.Keys(known.Tags)) {
				rev := known.Tags[tag]
				rows = append(rows, tagRow{tag, rev, known.Revisions[rev], asking(all, tag)})
			}
			return a.print(rows, func(w io.Writer) error {
				if len(rows) == 0 {
					fmt.Fprintf(w, "no revision has a tag: %s tag set NAME --revision REVISION\n", a.name())
					return nil
				}
				t := table{head: []string{"TAG", "REVISION", "ASKED FOR BY"}}
				for _, r := range rows {
					rev := r.Revision
					if !r.There {
						rev = a.paint(red, rev+" (not there)")
					}
					t.add(r.Tag, rev, dash(some(r.Gateways)))
				}
				return t.write(w)
			})
		},
	}
}

// asking are the Gateways that ask for a revision or a tag.
func asking(all []owned, name string) (out []string) {
	for _, o := range all {
		if o.asked == name {
			out = append(out, o.String())
		}
	}
	return out
}

func (a *app) tagRemove() *cobra.Command {
	force := false
	cmd := &cobra.Command{
		Use: "remove NAME", Aliases: []string{"rm"}, Short: "Take a name from a revision", Args: args(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			c, err := a.connect(a)
			if err != nil {
				return err
			}
			return a.removeTag(cmd.Context(), c, names[0], force)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "though Gateways ask for it, which nobody makes or configures then")
	return cmd
}

func (a *app) removeTag(ctx context.Context, c *conn, name string, force bool) error {
	all, known, err := a.owners(ctx, c)
	if err != nil {
		return err
	}
	if _, ok := known.Tags[name]; !ok {
		return fmt.Errorf("there is no tag %s in %s: see %s tag list", name, a.namespace, a.name())
	}
	if using := asking(all, name); len(using) > 0 && name != revision.Default && !force {
		return fmt.Errorf("the Gateways %s ask for the tag %s, and nobody would make or configure them without it: label them otherwise first, or say --force", some(using), name)
	}
	if err := a.deleteTags(ctx, c, revision.TagLabel+"="+name); err != nil {
		return err
	}
	a.progress().done("the tag %s is gone", name)
	return nil
}

// deleteTags deletes those with some labels.
func (a *app) deleteTags(ctx context.Context, c *conn, selector string) error {
	list, err := c.CoreV1().Services(a.namespace).List(ctx, metav1.ListOptions{LabelSelector: selector})
	if err != nil {
		return fmt.Errorf("reading the tags in %s: %w", a.namespace, err)
	}
	for _, s := range list.Items {
		if err := c.CoreV1().Services(a.namespace).Delete(ctx, s.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting Service %s/%s: %w", a.namespace, s.Name, err)
		}
	}
	return nil
}
