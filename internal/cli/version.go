package cli

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/internal/revision"
)

// versions is what version prints.
type versions struct {
	Client  string         `json:"client"`
	Control []podVersion   `json:"control,omitempty"`
	Nodes   []podVersion   `json:"nodes,omitempty"`
	Images  map[string]int `json:"images,omitempty"` // image tag: pods
}

type podVersion struct {
	Pod      string `json:"pod"`
	Node     string `json:"node"`
	Tag      string `json:"tag"`
	Revision string `json:"revision,omitempty"` // of a control plane beside the mesh's, or of that which an agent asks
}

func (a *app) versionCommand() *cobra.Command {
	client := false
	cmd := &cobra.Command{
		Use: "version", Short: "Say which versions run here and in the cluster", Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := versions{Client: a.env.Version}
			if !client {
				c, err := a.connect(a)
				if err != nil {
					return err
				}
				for _, s := range []struct {
					selector string
					to       *[]podVersion
				}{{controlSelector, &v.Control}, {agentSelector, &v.Nodes}} {
					list, err := c.CoreV1().Pods(a.namespace).List(cmd.Context(), metav1.ListOptions{LabelSelector: s.selector})
					if err != nil {
						return fmt.Errorf("listing pods of %s: %w; --client asks no cluster", a.namespace, err)
					}
					for i := range list.Items {
						p := &list.Items[i]
						rev := p.Labels[revision.Label]
						if rev == revision.Default {
							rev = ""
						}
						*s.to = append(*s.to, podVersion{p.Name, p.Spec.NodeName, imageTag(p), rev})
					}
				}
			}
			v.Images = map[string]int{}
			for _, p := range append(append([]podVersion{}, v.Control...), v.Nodes...) {
				v.Images[p.Tag]++
			}
			return a.print(v, func(w io.Writer) error {
				fmt.Fprintf(w, "warren %s\n", v.Client)
				for tag, n := range v.Images {
					fmt.Fprintf(w, "cluster %s on %s\n", tag, plural(n, "pod"))
				}
				for _, p := range v.Control {
					if p.Revision != "" {
						fmt.Fprintf(w, "control plane of revision %s: %s in %s\n", p.Revision, p.Tag, p.Pod)
					}
				}
				if !client && len(v.Images) == 0 {
					fmt.Fprintf(w, "nothing of Warren runs in %s\n", a.namespace)
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&client, "client", false, "only this program's")
	return cmd
}

func imageTag(p *corev1.Pod) string {
	if len(p.Spec.Containers) == 0 {
		return ""
	}
	image := p.Spec.Containers[0].Image
	return image[strings.LastIndexByte(image, ':')+1:]
}
