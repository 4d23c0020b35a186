package xds

import (
	"time"

	nodeapi "github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/wds"
)

// SetTrust publishes what peers are to be checked against: roots and revocation lists, DER each.
func (c *Cache) SetTrust(roots, lists [][]byte) error {
	r, err := newResource(wds.TrustBundleName, &nodeapi.TrustBundle{Roots: roots, RevocationLists: lists})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.tables[TypeTrustBundle].set(r.name, r) {
		return nil
	}
	c.revision++
	now := time.Now()
	for cl := range c.clients {
		cl.mark(map[string][]string{TypeTrustBundle: {r.name}}, now)
	}
	return nil
}
