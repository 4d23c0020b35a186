// Package cni is the conversation between the CNI plugin and the node agent: what is asked over the agent's
// socket, the file that answers while the agent is away, and the plugin's decisions.
//
// It owns the rule that a pod of an enrolled namespace never starts uncaptured and that no state of the node
// can keep the mesh's own pods from starting. It must not know the Kubernetes API, BPF or the proxy: the plugin
// is a short-lived process that links this package and little else.
package cni

import (
	"net/netip"
	"time"
)

const (
	// DefaultSocket is where the agent listens, HTTP/1.1 with JSON bodies.
	DefaultSocket = "/run/warren/cni.sock"
	// DefaultStateFile survives a reboot.
	DefaultStateFile = "/var/lib/warren/enrolled.json"
	// PluginType is the plugin's name in a network configuration and the name of its binary.
	PluginType = "warren-cni"
)

// Paths of the requests.
const (
	PathAdd    = "/v1/add"
	PathDel    = "/v1/del"
	PathCheck  = "/v1/check"
	PathStatus = "/v1/status"
)

// Request names a pod's sandbox. UID is empty where the container runtime does not pass it.
type Request struct {
	UID         string       `json:"uid,omitempty"`
	Namespace   string       `json:"namespace"`
	Name        string       `json:"name"`
	ContainerID string       `json:"containerID"` // of the sandbox
	NetNS       string       `json:"netns,omitempty"`
	IfName      string       `json:"ifName,omitempty"`
	Addrs       []netip.Addr `json:"addrs,omitempty"`
}

// Response is the agent's answer. With a status other than 200 only Error is set.
type Response struct {
	Captured bool   `json:"captured"`
	Why      string `json:"why,omitempty"`
	Error    string `json:"error,omitempty"`
}

// addTimeout bounds the whole conversation of an ADD. The agent answers within its own wait for the control
// plane, the certificate and the kernel.
const addTimeout = 20 * time.Second
