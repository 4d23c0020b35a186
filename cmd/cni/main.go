// Command cni is the CNI plugin warren-cni. It comes last in a node's plugin chain and lets a pod start when the
// node agent has captured it, or need not.
package main

import (
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

func main() {
	p := cni.Plugin{Stdout: os.Stdout, Stderr: os.Stderr}
	skel.PluginMainFuncs(skel.CNIFuncs{Add: p.Add, Del: p.Del, Check: p.Check, GC: p.GC, Status: p.Status},
		cni.Versions(), "warren-cni: captures pods for the Warren mesh")
}
