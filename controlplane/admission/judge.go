package admission

import (
	"fmt"
	"slices"
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"

	"github.com/warrenmesh/warren/controlplane/policy"
	"github.com/warrenmesh/warren/controlplane/routing"
)

const (
	maxEmptyLists = 5 // are named of one object

	// maxSpec is beyond every policy within policy.MaxValues and policy.MaxBytes: what is larger is not read.
	maxSpec = 1 << 20
)

// Judge says what is wrong with objects: by themselves, as they are written, and in their cluster.
type Judge struct {
	Mesh    policy.Mesh
	Cluster Cluster
}

// Judge names errors first. Without the cluster, by which alone no object is refused, it says nothing about what is
// there and what is not. It is safe for concurrent use.
func (j Judge) Judge(o *Object, cluster bool) []policy.Problem {
	if len(o.Spec) > maxSpec {
		return []policy.Problem{{Code: policy.TooLarge, Severity: policy.Error, Field: "spec",
			Message: fmt.Sprintf("%d KiB; every node gets every policy, so divide it into several (values of one list can also be replaced by a pattern or a CIDR)", len(o.Spec)>>10)}}
	}
	obj, err := o.typed()
	if err != nil {
		return []policy.Problem{{Code: policy.Unreadable, Severity: policy.Error, Field: "spec", Message: err.Error()}}
	}
	if obj == nil {
		return nil
	}
	if g, ok := obj.(*networkingv1.Gateway); ok {
		return servers(g)
	}
	out := j.Mesh.Check(obj)
	if o.Kind == "AuthorizationPolicy" {
		n := 0
		emptyClauses(o.Spec, func(path string) {
			if n++; n <= maxEmptyLists {
				out = append([]policy.Problem{{Code: policy.EmptyClause, Severity: policy.Error, Field: path,
					Message: "the list is empty; remove it for any, or give it an entry"}}, out...)
			}
		})
	}
	if anyError(out) {
		return out
	}
	if o.Kind == "AuthorizationPolicy" {
		n := 0
		emptyLists(o.Spec, func(path string) {
			if n++; n <= maxEmptyLists {
				out = append(out, policy.Problem{Code: policy.EmptyList, Severity: policy.Warning, Field: path,
					Message: fmt.Sprintf("an empty list counts as one that is left out: it restricts nothing. Remove %s, or give it a value", path[strings.LastIndexByte(path, '.')+1:])})
			}
		})
	}
	if !cluster {
		return out
	}
	return slices.Concat(out, around(j.Mesh, j.Cluster, obj))
}

// servers says what of a Gateway of Istio's cannot be served.
func servers(g *networkingv1.Gateway) (out []policy.Problem) {
	_, problems := routing.Gateway(g.Namespace, &g.Spec)
	for _, p := range problems[:min(len(problems), policy.MaxProblems)] {
		out = append(out, policy.Problem{Code: policy.BadServer, Severity: policy.Error, Field: "spec." + p.Field, Message: p.Message})
	}
	return out
}
