package ca

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/warrenmesh/warren/controlplane/auth"
	"github.com/warrenmesh/warren/internal/mesh"
)

// Placement knows which pods exist and where they run now.
type Placement interface {
	// PodByName returns the pod of that name, or false.
	PodByName(namespace, name string) (PlacedPod, bool)
	// Runs reports whether a pod of the service account is on the node and has not finished.
	Runs(node, namespace, serviceAccount string) bool
}

// PlacedPod is a pod and the node it was scheduled to.
type PlacedPod struct {
	UID            string
	ServiceAccount string
	Node           string
	Finished       bool
}

// ErrNotOnNode is wrapped where no pod of the wanted account is on the caller's node (yet).
var ErrNotOnNode = errors.New("no pod of this service account is on the caller's node")

// Authorizer decides which identities a node agent may have certificates for.
type Authorizer struct {
	TrustDomain string
	// Nodes are the service accounts of node agents, as namespace/name.
	Nodes map[string]bool
	Pods  Placement

	// Grace is how long to wait for a pod that this replica may not have heard of yet. A CNI plugin asks within
	// milliseconds of the pod's binding.
	Grace time.Duration
}

// Impersonate returns the identity if the caller may have a certificate for it.
//
// The caller has to be a trusted node agent, calling from a pod that exists, has the UID its token was made for
// and runs on the node that the token names; and a pod of the wanted service account has to be on that node.
func (z *Authorizer) Impersonate(ctx context.Context, c *auth.Caller, want string) (mesh.Identity, error) {
	id, err := mesh.ParseIdentity(want)
	if err != nil {
		return mesh.Identity{}, err
	}
	if id.TrustDomain != z.TrustDomain {
		return mesh.Identity{}, fmt.Errorf("%s is not of this mesh's trust domain %q", want, z.TrustDomain)
	}
	node, err := z.NodeOf(c)
	if err != nil {
		return mesh.Identity{}, err
	}
	if z.Pods.Runs(node, id.Namespace, id.ServiceAccount) || z.await(ctx, node, id) {
		return id, nil
	}
	return mesh.Identity{}, fmt.Errorf("%w: %s/%s, node %s", ErrNotOnNode, id.Namespace, id.ServiceAccount, node)
}

func (z *Authorizer) await(ctx context.Context, node string, id mesh.Identity) bool {
	if z.Grace <= 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, z.Grace)
	defer cancel()
	tick := time.NewTicker(z.Grace / 10)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
			if z.Pods.Runs(node, id.Namespace, id.ServiceAccount) {
				return true
			}
		}
	}
}

// Own returns the caller's own identity if a pod of it runs that the caller's token is bound to. A certificate is
// not enough: whoever stole one could renew it for ever.
func (z *Authorizer) Own(c *auth.Caller) (mesh.Identity, error) {
	if c.Identity.TrustDomain != z.TrustDomain {
		return mesh.Identity{}, fmt.Errorf("%s is not of this mesh's trust domain %q", c.Identity, z.TrustDomain)
	}
	if _, err := z.podOf(c); err != nil {
		return mesh.Identity{}, err
	}
	return c.Identity, nil
}

// NodeOf returns the node that a node agent speaks for, or why the caller is not one.
func (z *Authorizer) NodeOf(c *auth.Caller) (string, error) {
	if !z.Nodes[c.ServiceAccount()] {
		return "", fmt.Errorf("service account %s is not a trusted node agent", c.ServiceAccount())
	}
	return z.podOf(c)
}

// podOf returns the node of the pod that a caller's token is bound to, or why there is none.
func (z *Authorizer) podOf(c *auth.Caller) (string, error) {
	if c.PodName == "" || c.PodUID == "" {
		return "", errors.New("the caller's token is not bound to a pod; use a projected service account token")
	}
	p, ok := z.Pods.PodByName(c.Identity.Namespace, c.PodName)
	switch {
	case !ok:
		return "", fmt.Errorf("the caller's pod %s/%s does not exist", c.Identity.Namespace, c.PodName)
	case p.UID != c.PodUID:
		return "", fmt.Errorf("the caller's token was made for pod %s/%s with uid %s, which now has uid %s",
			c.Identity.Namespace, c.PodName, c.PodUID, p.UID)
	case p.Finished:
		return "", fmt.Errorf("the caller's pod %s/%s has finished", c.Identity.Namespace, c.PodName)
	case p.ServiceAccount != c.Identity.ServiceAccount:
		return "", fmt.Errorf("the caller's pod %s/%s runs as %s, not as %s",
			c.Identity.Namespace, c.PodName, p.ServiceAccount, c.Identity.ServiceAccount)
	case p.Node == "":
		return "", fmt.Errorf("the caller's pod %s/%s is on no node", c.Identity.Namespace, c.PodName)
	case c.Node != "" && c.Node != p.Node:
		return "", fmt.Errorf("the caller's token was made on node %s, its pod runs on %s", c.Node, p.Node)
	}
	return p.Node, nil
}
