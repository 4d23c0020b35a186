package datapath

import "fmt"

// Unsupported is why a pod's traffic cannot be captured; it is shown in the pod's status.
type Unsupported string

const (
	NoVeth          Unsupported = "NoVeth"          // the pod's interface is not a veth (netkit, ipvlan, macvlan, SR-IOV, tun)
	NoPeer          Unsupported = "NoPeer"          // the veth's other end is not in the node's namespace
	SecondInterface Unsupported = "SecondInterface" // traffic can leave by another interface
	NestedNetwork   Unsupported = "NestedNetwork"   // a bridge in the pod forwards for containers of its own
	NativeXDP       Unsupported = "NativeXDP"       // native XDP on the node side hides which socket sent a packet
	NoAddress       Unsupported = "NoAddress"       // the pod's addresses are not on its interface
	TooManyPods     Unsupported = "TooManyPods"     // all slots are taken
	OtherMesh       Unsupported = "OtherMesh"       // Istio's rules are in the pod's network namespace, from when its ztunnel captured it
)

// UnsupportedError is returned for a pod that no socket hook sees whole; it is left uncaptured.
type UnsupportedError struct {
	UID    string
	Reason Unsupported
	Detail string
}

func (e *UnsupportedError) Error() string {
	return fmt.Sprintf("pod %s cannot be captured: %s (%s)", e.UID, e.Detail, e.Reason)
}

// MissingFeatureError names what the kernel lacks.
type MissingFeatureError struct {
	Feature string // e.g. "BPF_PROG_TYPE_SK_LOOKUP"
	Kernel  string // the first version that has it
	Err     error  // what the kernel said
}

func (e *MissingFeatureError) Error() string {
	return fmt.Sprintf("this kernel lacks %s, which Linux %s or later has: %v", e.Feature, e.Kernel, e.Err)
}

func (e *MissingFeatureError) Unwrap() error { return e.Err }
