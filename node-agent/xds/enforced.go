package xds

// Enforced says that the Store's Snapshot of a revision, and with it every earlier one, holds on this node: the
// proxy decides by it, the kernel's maps have it, and no connection is open that it does not allow. An error
// says what of it does not hold; then the last revision that did stays. It does not block.
func (c *Client) Enforced(revision uint64, err error) {
	c.mu.Lock()
	if err != nil {
		c.status.NotEnforced, c.status.failed = err.Error(), revision
	} else {
		c.status.Enforced, c.status.NotEnforced = revision, ""
	}
	c.mu.Unlock()
	select {
	case c.enforced <- struct{}{}:
	default:
	}
}
