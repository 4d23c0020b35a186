// Package cli is the command line of Warren: install, upgrade, uninstall, manifest, profile, check, status, analyze, why, describe,
// authz, waypoint, node-config, proxy-config, proxy-status, tap, top, dashboard, migrate, sysdump, bench, version.
//
// It owns what an operator reads: tables, JSON and YAML of the same values, and errors that say what to do. It
// talks to the Kubernetes API and, through a port forward, to the admin port of node agents and waypoints; it must not
// import what runs in the cluster.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// Exit codes. They are part of the interface.
const (
	ExitOK    = 0
	ExitError = 1 // it could not be done
	ExitUsage = 2 // the command line is wrong
	ExitFound = 3 // it was done, and what was looked at is not in order
)

// Env is what the process gives the command line.
type Env struct {
	Program  string
	Args     []string
	Version  string
	Out, Err io.Writer
	NoColor  bool
	// Analyze judges objects as the control plane does, of which this package knows nothing.
	Analyze Analyzer
}

// errFound is returned by commands that have printed what is not in order.
var errFound = errors.New("not everything is in order")

// usageError marks a wrong command line.
type usageError struct{ err error }

func (e usageError) Error() string { return e.err.Error() }
func (e usageError) Unwrap() error { return e.err }

// app is what the commands share.
type app struct {
	env       Env
	context   string
	file      string
	namespace string
	output    string
	connect   func(*app) (*conn, error)
}

// Main runs the command line and returns the exit code.
func Main(ctx context.Context, env Env) int {
	a := &app{env: env, connect: dialCluster}
	return a.main(ctx)
}

func (a *app) main(ctx context.Context) int {
	root := a.root()
	root.SetArgs(a.env.Args)
	root.SetOut(a.env.Out)
	root.SetErr(a.env.Err)
	err := root.ExecuteContext(ctx)
	switch {
	case err == nil:
		return ExitOK
	case errors.Is(err, errFound):
		return ExitFound
	}
	fmt.Fprintln(a.env.Err, "error:", err)
	if _, ok := errors.AsType[usageError](err); ok || strings.HasPrefix(err.Error(), "unknown command") {
		fmt.Fprintf(a.env.Err, "see %s --help\n", a.name())
		return ExitUsage
	}
	return ExitError
}

// name is how the user called us.
func (a *app) name() string {
	if strings.HasPrefix(filepath.Base(a.env.Program), "kubectl-") {
		return "kubectl warren"
	}
	return "warren"
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "warren",
		Short:         "Install, see and explain a Warren mesh",
		Long:          "Install, see and explain a Warren mesh.\n\nExit codes: 0 in order, 1 failed, 2 wrong command line, 3 done, and something is not in order.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: a.name()},
		PersistentPreRunE: func(*cobra.Command, []string) error {
			switch a.output {
			case "table", "json", "yaml":
				return nil
			}
			return usageError{fmt.Errorf("-o %s is none of table, json, yaml", a.output)}
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	f := root.PersistentFlags()
	f.StringVarP(&a.namespace, "namespace", "n", "istio-system", "namespace of the control plane")
	f.StringVar(&a.file, "kubeconfig", "", "kubeconfig file (default $KUBECONFIG, then ~/.kube/config)")
	f.StringVar(&a.context, "context", "", "context of the kubeconfig")
	f.StringVarP(&a.output, "output", "o", "table", "table, json or yaml")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(a.installCommand(), a.upgradeCommand(), a.uninstallCommand(), a.manifestCommand(), a.profileCommand(),
		a.checkCommand(), a.statusCommand(), a.analyzeCommand(), a.whyCommand(), a.describeCommand(), a.waypointCommand(), a.nodeConfigCommand(), a.proxyConfigCommand(), a.proxyStatusCommand(), a.tapCommand(), a.topCommand(), a.dashboardCommand(), a.migrateCommand(), a.sysdumpCommand(), a.authzCommand(),
		a.tagCommand(), a.versionCommand(), a.benchCommand(), a.cleanCommand())
	return root
}

// args turns an arguments check of cobra into a usage error.
func args(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, got []string) error {
		if err := check(cmd, got); err != nil {
			return usageError{err}
		}
		return nil
	}
}
