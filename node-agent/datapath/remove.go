package datapath

import (
	"errors"
	"fmt"
	"os"
)

// Remove takes programs, links and maps out of the kernel: what is pinned is what keeps them there. Pods have
// to be released before. The Datapath is closed afterwards.
func (d *Datapath) Remove() error {
	d.mu.Lock()
	err := os.RemoveAll(d.cfg.Dir)
	d.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("unpin %s: %w", d.cfg.Dir, err)
	}
	return errors.Join(err, d.Close())
}
