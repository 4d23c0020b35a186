// Command netns runs the benchmark in network namespaces of this machine, without Kubernetes: nodes and pods are
// namespaces, the agents are the kernel side and the proxy of the node agent, each node's in a process of its own.
// It needs root, and nft. Envoy is $WARREN_ENVOY, or what other tests have put into the user's cache, or envoy in the
// path.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/warrenmesh/warren/bench"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if len(os.Args) == 2 && os.Args[1] == "agent" {
		err = runAgent(ctx, os.Stdin, os.Stdout)
	} else {
		err = run(ctx, os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "netns:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	fs := flag.NewFlagSet("netns", flag.ExitOnError)
	workloads := fs.String("workloads", "", "only these, with commas between")
	variants := fs.String("variants", "", "only these, and what they are compared with")
	results := fs.String("results", "", "directory for the report")
	o := bench.Options{}
	fs.IntVar(&o.Rounds, "rounds", 5, "how often everything is repeated")
	fs.DurationVar(&o.Duration, "duration", 3*time.Second, "of one sample")
	fs.DurationVar(&o.Hold, "hold", 30*time.Second, "how long idle connections are held")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if o.Workloads, err = bench.SelectWorkloads(list(*workloads)); err != nil {
		return err
	}
	all, err := bench.Builtin()
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(v *bench.Variant) bool { return v.Between != nil })
	if o.Variants, err = bench.SelectVariants(append(all, wire), list(*variants)); err != nil {
		return err
	}
	for _, v := range o.Variants {
		v.Rest = false
	}
	if err := o.Validate(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: network namespaces, cgroups and BPF")
	}
	dir, err := os.MkdirTemp("", "warren-bench-")
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = os.RemoveAll(dir)
		}
	}()
	load := filepath.Join(dir, "load")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", load, "github.com/warrenmesh/warren/bench/load").CombinedOutput(); err != nil {
		return fmt.Errorf("build the load program: %w: %s", err, out)
	}
	s, err := open(ctx, dir, load, findEnvoy(), o.Variants)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	o.Progress = bench.ShowProgress(os.Stderr, false)
	series, failed := bench.Run(ctx, s, o)
	if series == nil || len(series.Lines) == 0 {
		return failed
	}
	if out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--dirty", "--exclude=*").Output(); err == nil {
		series.Commit = strings.TrimSpace(string(out))
	}
	report := series.Report()
	if *results != "" {
		if report, err = bench.Write(*results, series); err != nil {
			return err
		}
	}
	fmt.Print(report.Markdown())
	return failed
}

func findEnvoy() string {
	if bin := os.Getenv("WARREN_ENVOY"); bin != "" {
		return bin
	}
	if cache, err := os.UserCacheDir(); err == nil {
		if found, err := filepath.Glob(filepath.Join(cache, "warren", "envoy-*", "envoy", "_bin", "envoy")); err == nil && len(found) > 0 {
			return found[len(found)-1]
		}
	}
	return "envoy"
}

// list splits at commas.
func list(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' })
}
