package datapath

import "net/netip"

// PodState is what the kernel says about an enrolled pod.
type PodState struct {
	UID      string
	Cookie   uint64 // of its network namespace
	Addrs    []netip.Addr
	Problems []string // what is missing or wrong, in words; empty when all is in force
}

// InForce reports whether nothing can pass around the agent.
func (s PodState) InForce() bool { return len(s.Problems) == 0 }
