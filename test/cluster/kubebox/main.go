// Command kubebox is every Kubernetes component of the test cluster in one
// static binary: it becomes the component its name (or first argument) says.
//
// It lives in a module of its own so that the versions Kubernetes pins never
// meet those of the launcher or of Warren. Two programs are not in here:
// containerd's shim shares containerd's global plugin registry and would start
// the daemon's plugins (./shim), and kubectl is called too often to begin with
// all of this (./kubectl).
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	_ "time/tzdata"

	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"
	"github.com/containerd/containerd/v2/cmd/containerd/command"
	ctr "github.com/containerd/containerd/v2/cmd/ctr/app"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	helm "helm.sh/helm/v4/pkg/cmd"
	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// components maps a program name to the function that is that program. Each
// reads os.Args itself.
var components = map[string]func() error{
	"etcd":                    runEtcd,
	"containerd":              func() error { return command.App().Run(os.Args) },
	"ctr":                     func() error { return ctr.New().Run(os.Args) },
	"coredns":                 runCoreDNS,
	"helm":                    runHelm,
	"kube-apiserver":          func() error { return runCobra(apiserver.NewAPIServerCommand()) },
	"kube-controller-manager": func() error { return runCobra(controllermanager.NewControllerManagerCommand()) },
	"kube-scheduler":          func() error { return runCobra(scheduler.NewSchedulerCommand()) },
	"kube-proxy":              func() error { return runCobra(proxy.NewProxyCommand()) },
	"kubelet":                 func() error { return runCobra(kubelet.NewKubeletCommand(context.Background())) },
}

func main() {
	name := filepath.Base(os.Args[0])
	if name == "kubebox" {
		if len(os.Args) < 2 {
			fmt.Fprintln(os.Stderr, "usage: kubebox COMPONENT [argument...]")
			os.Exit(2)
		}
		name = os.Args[1]
		os.Args = os.Args[1:]
	}
	run, ok := components[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "kubebox: no component %q\n", name)
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

func runEtcd() error {
	etcdmain.Main(os.Args)
	return nil
}

// runCoreDNS limits the server to the two plugins linked in; the order of
// Directives is the order in which a query passes them.
func runCoreDNS() error {
	dnsserver.Directives = []string{"errors", "kubernetes"}
	coremain.Run()
	return nil
}

func runHelm() error {
	cmd, err := helm.NewRootCmd(os.Stdout, os.Args[1:], helm.SetupLogging)
	if err != nil {
		return err
	}
	return cmd.Execute()
}

// runCobra leaves with the component's own exit code.
func runCobra(c *cobra.Command) error {
	os.Exit(cli.Run(c))
	return nil
}
