package nodeagent

import (
	"context"
	"time"

	"github.com/warrenmesh/warren/internal/identity"
)

// certificatesBlob is where the holder keeps the certificates with their keys, in sealed memory: an agent that
// starts while the control plane is away serves its pods with them. They never touch a disk.
const certificatesBlob = "certificates"

// adoptCertificates takes the certificates that the agent before this one left with the holder.
func (a *agent) adoptCertificates() {
	data, err := a.keeper.Blob(certificatesBlob)
	if err != nil || len(data) == 0 {
		return
	}
	bundles, err := identity.Unmarshal(data)
	clear(data)
	if err != nil {
		a.cfg.Log.Warn("the certificates that the holder has are of no use; asking for new ones", "error", err)
		return
	}
	a.manager.Adopt(bundles)
	a.cfg.Log.Info("certificates taken over", "identities", len(bundles))
}

// keepCertificates has the holder keep the current certificates for a successor.
func (a *agent) keepCertificates(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.rotated:
		}
		// Pods come in crowds: one write for all that arrive within a moment.
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(200 * time.Millisecond):
		}
		data, err := identity.Marshal(a.manager.Bundles())
		if err == nil {
			err = a.keeper.PutBlob(ctx, certificatesBlob, data)
		}
		clear(data)
		if err != nil && ctx.Err() == nil {
			a.cfg.Log.Warn("certificates do not outlive this process: the holder does not have them", "error", err)
		}
	}
}

// externalCA reports whether somebody other than the control plane signs. Then the control plane's roots are those
// of its own certificate alone, and what peers are checked against is what the CA answers.
func (c *Config) externalCA() bool { return c.CAAddress != c.XDSAddress }

// meshRoots is the file of roots that hold for peers besides those in the CA's answers, "" for none.
func (a *agent) meshRoots() string {
	if a.cfg.externalCA() {
		return ""
	}
	return a.cfg.CARoot
}

// caRoots are the roots of the CA's own certificate.
func (a *agent) caRoots() identity.ControlPlaneRoots {
	r := identity.ControlPlaneRoots{File: a.cfg.CARoot}
	if !a.cfg.externalCA() {
		r.More = a.sentRoots
	}
	return r
}

// sentRoots are those that the control plane has sent, nil before.
func (a *agent) sentRoots() *identity.Trust { return a.trust.Load() }

// setTrust takes the roots and revocation lists that the control plane has published. When it returns, they hold.
func (a *agent) setTrust(roots, lists [][]byte) error {
	t, err := identity.NewTrust(roots, lists)
	if err != nil {
		return err
	}
	if old := a.trust.Swap(t); old != nil && old.Equal(t) {
		return nil // said again after a reconnection
	}
	if !a.cfg.externalCA() {
		a.manager.SetTrust(t)
	}
	return nil
}
