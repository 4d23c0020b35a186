package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/internal/netns"
)

// Uninstall removes everything that Open and Enroll have made: programs, maps, pins, and in every namespace
// that still exists the rule, the route and the sysctls. Captured connections end with it. It waits until
// the writer has gone or ctx is done.
func Uninstall(ctx context.Context, cfg Config) error {
	d, err := Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer d.Close()
	var errs []error
	for uid := range d.pods {
		ns, err := d.namespaceOf(ctx, uid)
		errs = append(errs, err, d.Release(uid))
		if ns != nil {
			errs = append(errs, ns.Do(func() error { return clearRouting(d.cfg.Proc) }), ns.Close())
		}
	}
	errs = append(errs, os.RemoveAll(d.cfg.Dir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("uninstall the data path: %w", err)
	}
	return nil
}

// dyingNamespace is how long a network namespace that nothing holds may take until the kernel has cleared it away:
// its sockets and devices are ended by a worker, and a link knows its number until then.
const dyingNamespace = 5 * time.Second

// namespaceOf finds the namespace that a pod's sk_lookup is attached to, by way of a process in it or of the
// runtime's bind mount: a link knows the number, not the name. No namespace and no error: it is gone.
func (d *Datapath) namespaceOf(ctx context.Context, uid string) (*netns.Handle, error) {
	l, err := link.LoadPinnedLink(lookupPin(d.podDir(uid)), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer l.Close()
	for began := time.Now(); ; {
		info, err := l.Info()
		if err != nil {
			return nil, err
		}
		n := info.NetNs()
		if n == nil || n.NetnsInode == 0 {
			return nil, nil
		}
		if ns := d.namespaceByInode(uint64(n.NetnsInode)); ns != nil {
			return ns, nil
		}
		if ctx.Err() != nil || time.Since(began) > dyingNamespace {
			return nil, fmt.Errorf("the network namespace of pod %s (inode %d) is in use, but by no process that can be seen",
				uid, n.NetnsInode)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// namespaceByInode looks through mounts, processes, threads and descriptors; nil if none leads there.
func (d *Datapath) namespaceByInode(inode uint64) *netns.Handle {
	paths, _ := filepath.Glob("/run/netns/*")
	for _, pattern := range []string{"[0-9]*/ns/net", "[0-9]*/task/[0-9]*/ns/net", "[0-9]*/fd/*"} {
		found, _ := filepath.Glob(filepath.Join(d.cfg.Proc, pattern))
		paths = append(paths, found...)
	}
	for _, path := range paths {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil && st.Ino == inode {
			if ns, err := netns.Open(path); err == nil {
				return ns
			}
		}
	}
	return nil
}
