package xds

import (
	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/identity"
)

// takeTrust hands on what peers are to be checked against, and reports it once it holds: the control plane signs
// with a new root only after every node has said so. A bundle that cannot be used leaves the one before it.
func (c *Client) takeTrust(p *node.TrustBundle) error {
	if c.cfg.OnTrust == nil {
		return nil
	}
	if err := c.cfg.OnTrust(p.GetRoots(), p.GetRevocationLists()); err != nil {
		return err
	}
	c.trust = p
	c.mu.Lock()
	c.report.roots = identity.RootsDigest(p.GetRoots())
	c.mu.Unlock()
	c.report.kick()
	return nil
}
