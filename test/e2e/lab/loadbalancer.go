package lab

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
)

// balanced is the network of the addresses that load balancers have, for clients outside the cluster.
const balanced = "172.31.200."

// Balanced is an address that a Service has only if it asks for it, of our own cluster's load balancer.
const Balanced = balanced + "250"

// Balance is our own cluster's load balancer until ctx ends or the function it returns is called: each Service of that
// type gets an address, that which it asks for if it is to be had, which leads clients outside the cluster to its first node.
func (l *Lab) Balance(ctx context.Context) (end func(), err error) {
	node := ""
	for _, a := range l.Cluster.Nodes()[0].Addrs() {
		if a.Is4() {
			node = a.String()
		}
	}
	if out, err := l.Cluster.OutsideCommand(ctx, "ip", "route", "replace", balanced+"0/24", "via", node).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("lead %s0/24 to %s: %w: %s", balanced, node, err, out)
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, l.kubectl, "get", "services", "-A", "--watch", "-o",
		`jsonpath={.metadata.namespace} {.metadata.name} {.spec.type} asks:{.spec.loadBalancerIP} has:{.status.loadBalancer.ingress[0].ip}{"\n"}`)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.kubeconfig)
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("watch Services: %w", err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		taken := map[string]string{} // Service by address
		for lines := bufio.NewScanner(out); lines.Scan(); {
			f := strings.Fields(lines.Text())
			if len(f) < 5 || f[2] != "LoadBalancer" {
				continue
			}
			me, asks, has := f[0]+"/"+f[1], strings.TrimPrefix(f[3], "asks:"), strings.TrimPrefix(f[4], "has:")
			free := func(a string) bool { return taken[a] == "" || taken[a] == me }
			address := has
			switch {
			case asks != "":
				if address = asks; !strings.HasPrefix(asks, balanced) || !free(asks) {
					address = ""
				}
			case has == "":
				for n := 1; n < 250 && address == ""; n++ {
					if a := balanced + strconv.Itoa(n); free(a) {
						address = a
					}
				}
			}
			ingress := ""
			if address != "" {
				taken[address] = me
				ingress = `{"ip":"` + address + `"}`
			}
			if address == has {
				continue
			}
			if _, err := l.Kubectl(ctx, "-n", f[0], "patch", "service", f[1], "--subresource=status", "--type=merge", "-p",
				`{"status":{"loadBalancer":{"ingress":[`+ingress+`]}}}`); err != nil && ctx.Err() == nil {
				l.log("no address for Service %s: %v", me, err)
			}
		}
		_ = cmd.Wait() // it was ended
	})
	return func() { cancel(); work.Wait() }, nil
}

// DialOutside connects as a client outside our own cluster does.
func (l *Lab) DialOutside(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = l.Cluster.Outside(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}
