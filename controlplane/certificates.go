package controlplane

import (
	"context"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warrenmesh/warren/controlplane/ca"
)

// newAuthority makes what finds the signing key and exchanges roots.
func (cp *controlPlane) newAuthority() *ca.Authority {
	cfg := cp.cfg
	return &ca.Authority{
		Keys: &ca.Keys{Client: cp.clients.Kube, Namespace: cfg.Namespace, TrustDomain: cfg.Mesh.TrustDomain,
			Dir: cfg.CACertsDir, RootLife: cfg.RootTTL, Joins: cfg.secondary()},
		Life: cfg.MaxCertTTL, Agents: cp.agents, OnChange: cp.certify, Event: cp.events.Event,
		Log: cfg.Log.With("scope", "ca"),
	}
}

// root is the PEM of what peers are to trust, nil while there is no key.
func (cp *controlPlane) root() []byte {
	if s := cp.ca.Standing(); s != nil {
		return s.Roots
	}
	return nil
}

// certify takes over who signs and what is trusted: first the nodes are told, then the CA begins.
func (cp *controlPlane) certify(s *ca.Standing) {
	if err := cp.cache.SetTrust(s.DERs, s.Lists); err != nil {
		cp.cfg.Log.Error("roots not published", "error", err)
	}
	cp.ca.Set(s)
	cp.recheckCopies()
}

// agents lists the pods of node agents that run, or are about to, with what their nodes reported to trust.
func (cp *controlPlane) agents(ctx context.Context) ([]ca.Agent, error) {
	accounts := map[string]map[string]bool{} // namespace → service accounts
	for _, a := range cp.cfg.TrustedNodes {
		ns, sa, _ := strings.Cut(a, "/")
		if accounts[ns] == nil {
			accounts[ns] = map[string]bool{}
		}
		accounts[ns][sa] = true
	}
	var out []ca.Agent
	for ns, names := range accounts {
		pods, err := cp.clients.Kube.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, fmt.Errorf("list the node agents in namespace %s: %w", ns, err)
		}
		for _, p := range pods.Items {
			if !names[p.Spec.ServiceAccountName] || p.Spec.NodeName == "" || p.DeletionTimestamp != nil ||
				p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded {
				continue
			}
			out = append(out, ca.Agent{Node: p.Spec.NodeName, Trusts: p.Annotations[ca.AnnotationTrusts]})
		}
	}
	return out, nil
}
