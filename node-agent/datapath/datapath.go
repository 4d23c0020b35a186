package datapath

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"github.com/warrenmesh/warren/internal/netns"
)

// Numbers that the kernel side, the agent and the documentation share.
const (
	// Mark is the fwmark of a socket whose packets stay in the pod: captured clients and the inbound leg.
	// Istio uses the same number, so one document serves for both.
	Mark = 0x539
	// Table holds the local default route that marked packets take, and is the priority of its rule.
	Table = 1337

	PortOutbound = 15001 // captured connections
	PortInbound  = 15006 // plaintext from outside the mesh
	PortHBONE    = 15008 // the tunnel
)

// Config says where the kernel's file systems are.
type Config struct {
	// Dir is a directory on a bpffs, which is made if need be. Default /sys/fs/bpf/warren.
	Dir string
	// CgroupRoot is where the node's cgroup file system is mounted (cgroup v2, or hybrid with a "unified"
	// directory). Default /sys/fs/cgroup.
	CgroupRoot string
	// Proc is a writable /proc of the node; the agent's own may have a read-only sys. Default /proc.
	Proc string
	// Node is the node's network namespace. Default: the namespace that Open is called in.
	Node *netns.Handle
	// Log gets what is repaired or refused. Default: discard.
	Log *slog.Logger
}

// Pod is what Enroll captures.
type Pod struct {
	UID       string // Kubernetes' UID, at most 63 bytes
	NetNS     *netns.Handle
	Addrs     []netip.Addr // one IPv4 address, one IPv6 address or both
	Listeners Listeners    // where its connections go; they stay the caller's
}

// Datapath is the loaded and attached kernel side. Its methods may be called concurrently.
type Datapath struct{}

// Open loads the programs, or takes over what an earlier process left pinned without opening a gap, and
// attaches the cgroup programs. It waits until another writer has gone or ctx is done.
// A kernel without a needed feature is a *MissingFeatureError.
func Open(ctx context.Context, cfg Config) (*Datapath, error) { return nil, errors.ErrUnsupported }

// Close gives the lock back. Programs, links and pins stay: pods remain captured.
func (d *Datapath) Close() error { return errors.ErrUnsupported }

// Enroll captures a pod's connections, or brings what is there into line with p. A pod that cannot be
// captured is an *UnsupportedError and is left as it was.
func (d *Datapath) Enroll(p Pod) error { return errors.ErrUnsupported }

// Release ends capture. Open connections go on: the rule and the route that carry them stay until the
// namespace ends. Releasing a pod that is unknown or whose namespace is gone is fine.
func (d *Datapath) Release(uid string) error { return errors.ErrUnsupported }

// Prune releases every enrolled pod that keep does not want. It is called once after a restart, when it is
// known which pods there are.
func (d *Datapath) Prune(keep func(uid string) bool) error { return errors.ErrUnsupported }

// SetDestinations makes the addresses whose connections are captured equal to want.
func (d *Datapath) SetDestinations(want Destinations) error { return errors.ErrUnsupported }

// Enrolled reads from the kernel which pods are enrolled and what of each is in force.
func (d *Datapath) Enrolled() ([]PodState, error) { return nil, errors.ErrUnsupported }

// Audit compares every enrolled pod with what it should be and repairs it. The states are those found
// before the repair.
func (d *Datapath) Audit() ([]PodState, error) { return nil, errors.ErrUnsupported }

// Counters returns the outcomes of all programs since they were first loaded, by name.
func (d *Datapath) Counters() (map[string]uint64, error) { return nil, errors.ErrUnsupported }

// Tag marks a socket as the agent's own: its connections are not captured, and where it dials the pod's
// own address it reaches the application. It is for sockets that are not connected yet.
func (d *Datapath) Tag(fd int) error { return errors.ErrUnsupported }
