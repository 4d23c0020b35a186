// Package nodeagent is the agent that runs on every node: it puts together the datapath, the proxy, the
// certificates, the state of the mesh and the pods' life cycle, and runs them until it is told to stop.
//
// It owns the order in which they start and stop. It must not know how any of them works, and it has no
// access to the Kubernetes API: everything it knows comes by xDS and from the CNI plugin's socket.
package nodeagent
