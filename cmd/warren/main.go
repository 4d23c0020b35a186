// Command warren is the operator's view of the mesh. It also works as a kubectl plugin, when its binary is
// called kubectl-warren.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/warrenmesh/warren/controlplane/analysis"
	"github.com/warrenmesh/warren/internal/build"
	"github.com/warrenmesh/warren/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(cli.Main(ctx, cli.Env{
		Program: os.Args[0], Args: os.Args[1:], Version: build.Version,
		Out: os.Stdout, Err: os.Stderr, NoColor: os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb",
		Analyze: analyze,
	}))
}

// analyze lets the command line judge as the control plane does.
func analyze(rootNamespace string, mesh map[string]string, objects []cli.Analyzed, whole bool) ([]cli.Finding, error) {
	cfg, err := analysis.ConfigOf(rootNamespace, mesh["mesh"], mesh["warren"])
	if err != nil {
		return nil, err
	}
	in := analysis.Input{Config: cfg, Cluster: whole}
	for _, o := range objects {
		in.Objects = append(in.Objects, analysis.Object{Unstructured: o.Unstructured, From: o.File})
	}
	found, err := analysis.Run(in)
	if err != nil {
		return nil, err
	}
	out := make([]cli.Finding, 0, len(found))
	for _, f := range found {
		out = append(out, cli.Finding{Severity: f.Severity, Code: f.Code, Kind: f.Kind, Namespace: f.Namespace, Name: f.Name, Field: f.Field, Message: f.Message, File: f.From})
	}
	return out, nil
}
