package enroll

import (
	"context"
	"net/netip"
	"time"

	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
	"github.com/warrenmesh/warren/node-agent/datapath"
)

// LocalPod is what the control plane says about one pod scheduled to this node.
type LocalPod struct {
	UID         string // metadata.uid; empty where the control plane has no LocalPod records: then Addrs identify it
	Namespace   string
	Name        string
	WorkloadUID string
	Identity    mesh.Identity
	Addrs       []netip.Addr // empty until the pod has one
	Enrolled    bool
	Reason      string // why it is enrolled or not, a stable word
	Strict      bool   // plaintext from before enrolment must end
	HostNetwork bool
	Finished    bool // succeeded or failed: nothing of it runs any more
	DNSCapture  bool // its questions for hosts of ServiceEntries are answered by the node
}

// Plumber is the kernel side; *datapath.Datapath is one.
type Plumber interface {
	Enroll(datapath.Pod) error
	Release(uid string) error
	Prune(keep func(uid string) bool) error
	Audit() ([]datapath.PodState, error)
}

// Pod is what the accept loops of an enrolled pod need to know about it.
type Pod struct {
	UID         string
	Namespace   string
	Name        string
	WorkloadUID string
	Identity    mesh.Identity
	Addrs       []netip.Addr
	NetNS       *netns.Handle // valid until Accepting.Close has returned
}

// Acceptor serves a pod's connections; the proxy is one. The listeners stay the caller's: AddPod duplicates
// them (net.FileListener does).
type Acceptor interface {
	AddPod(Pod, datapath.Listeners) (Accepting, error)
}

// Accepting is a pod's accept loops; *proxy.PodHandle is one.
type Accepting interface {
	// StopAccepting takes no new connections. Open ones go on.
	StopAccepting()
	// Close stops accepting and returns when the last connection has ended, those that are left when ctx ends
	// having been reset.
	Close(ctx context.Context)
}

// Certs fetches certificates ahead of the first connection.
type Certs interface {
	// Warm returns when a valid certificate of id is there.
	Warm(ctx context.Context, id mesh.Identity) error
	// Forget says that no pod of this node has the identity any more.
	Forget(id mesh.Identity)
}

// Redirection is what the node's kernel does with a pod.
type Redirection string

const (
	Enabled  Redirection = "enabled"
	Pending  Redirection = "pending"  // to be captured, and not yet or, as Reason says, not possible
	Disabled Redirection = "disabled" // not captured and not to be
)

// PodStatus is the truth about one pod that is, was or should be captured.
type PodStatus struct {
	UID             string
	Namespace       string
	Name            string
	Redirection     Redirection
	Reason          string // in words for the operator; empty when enabled, and when it has not been tried yet
	OpenConnections int    // that were open at enrolment and are not captured
	Since           time.Time
}
