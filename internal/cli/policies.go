package cli

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	metav1alpha1 "istio.io/api/meta/v1alpha1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// policyStatus is what the control plane has written on one policy object.
type policyStatus struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Enforced  string `json:"enforced"` // True, False or Unknown
	Reason    string `json:"reason,omitempty"`
	Message   string `json:"message"`
}

// policies reads what is said about the policies. A cluster without their definitions has none.
func (a *app) policies(ctx context.Context, client istio.Interface) ([]policyStatus, error) {
	if client == nil {
		return nil, nil
	}
	var out []policyStatus
	add := func(kind string, m metav1.Object, s *metav1alpha1.IstioStatus) {
		p := policyStatus{Kind: kind, Namespace: m.GetNamespace(), Name: m.GetName(), Enforced: "Unknown", Message: "nothing has been said about it yet"}
		for _, c := range s.GetConditions() {
			switch {
			case c.GetType() != "Enforced":
			case c.GetObservedGeneration() < m.GetGeneration():
				p.Message = "nothing has been said about its last change yet"
			default:
				p.Enforced, p.Reason, p.Message = c.GetStatus(), c.GetReason(), c.GetMessage()
			}
		}
		out = append(out, p)
	}
	security := client.SecurityV1()
	all := metav1.ListOptions{}
	authorizations, err := security.AuthorizationPolicies("").List(ctx, all)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the policies: %w", err)
	}
	peers, err := security.PeerAuthentications("").List(ctx, all)
	if err != nil {
		return nil, fmt.Errorf("reading the policies: %w", err)
	}
	requests, err := security.RequestAuthentications("").List(ctx, all)
	if err != nil {
		return nil, fmt.Errorf("reading the policies: %w", err)
	}
	for _, p := range authorizations.Items {
		add("AuthorizationPolicy", p, &p.Status)
	}
	for _, p := range peers.Items {
		add("PeerAuthentication", p, &p.Status)
	}
	for _, p := range requests.Items {
		add("RequestAuthentication", p, &p.Status)
	}
	slices.SortFunc(out, func(x, y policyStatus) int {
		return strings.Compare(x.Namespace+"/"+x.Kind+"/"+x.Name, y.Namespace+"/"+y.Kind+"/"+y.Name)
	})
	return out, nil
}

func (a *app) printPolicies(w io.Writer, policies []policyStatus) error {
	if len(policies) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := table{head: []string{"NAMESPACE", "POLICY", "ENFORCED", "REASON", "NODES"}}
	for _, p := range policies {
		enforced := p.Enforced
		switch enforced {
		case "True":
			enforced = a.paint(green, enforced)
		case "False":
			enforced = a.paint(red, enforced)
		default:
			enforced = a.paint(yellow, enforced)
		}
		t.add(p.Namespace, strings.ToLower(p.Kind)+"/"+p.Name, enforced, dash(p.Reason), p.Message)
	}
	return t.write(w)
}
