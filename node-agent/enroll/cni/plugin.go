package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// Settings is the plugin's entry in a network configuration.
type Settings struct {
	Type            string   `json:"type"`
	Socket          string   `json:"socket"`
	StateFile       string   `json:"stateFile"`
	SystemNamespace string   `json:"systemNamespace"`
	Exempt          []string `json:"exemptNamespaces,omitempty"` // whose pods never wait
}

// Plugin is one run of the plugin.
type Plugin struct {
	Stdout io.Writer // the result
	Stderr io.Writer // what the operator may want to know
}

// Versions of the CNI specification that the plugin understands: those with a list of plugins.
func Versions() version.PluginInfo { return version.VersionsStartingFrom("0.3.0") }

// netConf is what the runtime passes on standard input.
type netConf struct {
	cnitypes.PluginConf
	set Settings
}

func parse(stdin []byte) (*netConf, error) {
	var c netConf
	if err := json.Unmarshal(stdin, &c.PluginConf); err != nil {
		return nil, cnitypes.NewError(cnitypes.ErrDecodingFailure, "read the network configuration", err.Error())
	}
	if err := json.Unmarshal(stdin, &c.set); err != nil {
		return nil, cnitypes.NewError(cnitypes.ErrDecodingFailure, "read the plugin's settings", err.Error())
	}
	if c.set.Socket == "" {
		c.set.Socket = DefaultSocket
	}
	if c.set.StateFile == "" {
		c.set.StateFile = DefaultStateFile
	}
	if c.set.SystemNamespace == "" {
		c.set.SystemNamespace = "istio-system"
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, cnitypes.NewError(cnitypes.ErrDecodingFailure, "read the result of the plugin before", err.Error())
	}
	return &c, nil
}

// podArgs reads CNI_ARGS as Kubernetes' runtimes fill it. Unknown keys are none of our business.
func podArgs(args string) (uid, namespace, name string) {
	for pair := range strings.SplitSeq(args, ";") {
		k, v, _ := strings.Cut(pair, "=")
		switch k {
		case "K8S_POD_UID":
			uid = v
		case "K8S_POD_NAMESPACE":
			namespace = v
		case "K8S_POD_NAME":
			name = v
		}
	}
	return uid, namespace, name
}

// Add captures the pod, or fails so that the runtime tries again.
func (p Plugin) Add(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if c.PrevResult == nil {
		return cnitypes.NewError(cnitypes.ErrInvalidNetworkConfig, PluginType+" must come after the plugin that makes the pod's interface", "no prevResult")
	}
	req := request(args)
	if req.Addrs, err = addresses(c.PrevResult); err != nil {
		return cnitypes.NewError(cnitypes.ErrDecodingFailure, "read the pod's addresses", err.Error())
	}
	ctx, cancel := context.WithTimeout(context.Background(), addTimeout)
	defer cancel()
	if err := p.admit(ctx, c, req); err != nil {
		return err
	}
	return printResult(p.Stdout, c.PrevResult, c.CNIVersion)
}

// admit returns nil when the pod may start.
//
//	the mesh's own namespace, or no pod at all    start, without asking
//	the agent says yes, or that it need not be    start
//	an exempt namespace, whatever the agent says  start; the agent captures it as soon as it can
//	the agent says no                             wait
//	the agent is away: namespace not enrolled     start
//	                   namespace enrolled         wait
//	                   nothing known              wait: the file was there when the plugin was installed
//
// Where nothing is known, starting would be the wrong way out: wipe /var/lib on a node, reboot it, and every pod
// of the mesh would come up in clear before the agent does. It cannot lock the node up, because the agent needs
// neither this plugin (host network) nor any pod that waits on it.
func (p Plugin) admit(ctx context.Context, c *netConf, req Request) error {
	if req.Namespace == "" || req.Name == "" || req.Namespace == c.set.SystemNamespace {
		return nil
	}
	exempt := slices.Contains(c.set.Exempt, req.Namespace)
	if exempt {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
	}
	_, err := Client{c.set.Socket}.Do(ctx, PathAdd, req)
	switch {
	case err == nil:
		return nil
	case exempt:
		fmt.Fprintf(p.Stderr, "%s: pod %s/%s starts uncaptured for now: %v\n", PluginType, req.Namespace, req.Name, err)
		return nil
	case !errors.Is(err, ErrAway):
		return waits(req, err.Error())
	}
	known, kerr := ReadLastKnown(c.set.StateFile)
	if kerr == nil && !known.Enrolled(req.Namespace) {
		fmt.Fprintf(p.Stderr, "%s: pod %s/%s starts: its namespace was not enrolled when the node agent was last there: %v\n", PluginType, req.Namespace, req.Name, err)
		return nil
	}
	why := err.Error()
	if kerr != nil {
		why += fmt.Sprintf(", and nobody can tell whether namespace %s is enrolled (%v)", req.Namespace, kerr)
	}
	return waits(req, why+"; see to DaemonSet warren-node in namespace "+c.set.SystemNamespace)
}

// waits is what the runtime shows in an event of the pod. The message has it all: details of its own would be printed
// after it, and say half of it again.
func waits(req Request, why string) error {
	return cnitypes.NewError(cnitypes.ErrTryAgainLater, fmt.Sprintf("pod %s/%s waits to be captured by the mesh: %s", req.Namespace, req.Name, why), "")
}

// Del tells the agent. It never fails: a pod must be able to go whatever the state of the mesh, and the agent
// finds by itself what it was not told.
func (p Plugin) Del(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		fmt.Fprintf(p.Stderr, "%s: %v\n", PluginType, err)
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second) // the agent has the pod's connections end
	defer cancel()
	if _, err := (Client{c.set.Socket}).Do(ctx, PathDel, request(args)); err != nil {
		fmt.Fprintf(p.Stderr, "%s: the node agent was not told that the pod is gone: %v\n", PluginType, err)
	}
	return nil
}

// Check fails when a pod that should be captured is not.
func (p Plugin) Check(args *skel.CmdArgs) error {
	c, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	req := request(args)
	if req.Namespace == "" || req.Namespace == c.set.SystemNamespace {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err = Client{c.set.Socket}.Do(ctx, PathCheck, req)
	if errors.Is(err, ErrAway) {
		if known, kerr := ReadLastKnown(c.set.StateFile); kerr == nil && !known.Enrolled(req.Namespace) {
			return nil
		}
	}
	if err != nil {
		return cnitypes.NewError(cnitypes.ErrTryAgainLater, fmt.Sprintf("pod %s/%s is not captured by the mesh", req.Namespace, req.Name), err.Error())
	}
	return nil
}

// Status always answers that pods can be added: most can without the agent, and a node that is "not ready" for
// the lack of the agent could keep the agent's own pod from being scheduled.
func (p Plugin) Status(*skel.CmdArgs) error { return nil }

// GC has nothing to do: the agent tracks pods by their network namespace.
func (p Plugin) GC(*skel.CmdArgs) error { return nil }

func request(args *skel.CmdArgs) Request {
	r := Request{ContainerID: args.ContainerID, NetNS: args.Netns, IfName: args.IfName}
	r.UID, r.Namespace, r.Name = podArgs(args.Args)
	return r
}

func addresses(prev cnitypes.Result) ([]netip.Addr, error) {
	r, err := current.NewResultFromResult(prev)
	if err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, ip := range r.IPs {
		if a, ok := netip.AddrFromSlice(ip.Address.IP); ok {
			out = append(out, a.Unmap())
		}
	}
	return out, nil
}

func printResult(w io.Writer, r cnitypes.Result, v string) error {
	converted, err := r.GetAsVersion(v)
	if err != nil {
		return err
	}
	return converted.PrintTo(w)
}
