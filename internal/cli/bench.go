package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/warrenmesh/warren/bench"
)

// benchFlags are the command line of bench.
type benchFlags struct {
	workloads, variants, dirs, nodes []string
	rounds                           int
	duration, hold                   time.Duration
	results, compare, commit         string
	image, sidecar                   string
	keep                             bool
}

func (a *app) benchCommand() *cobra.Command {
	f := benchFlags{rounds: 5, duration: 3 * time.Second, hold: time.Minute}
	cmd := &cobra.Command{
		Use: "bench", Short: "Measure what the mesh costs on the nodes of this cluster",
		Long: "Measure what the mesh costs on the nodes of this cluster: pods of one node pair, without a mesh, with Warren and with Envoy\n" +
			"sidecars, take turns. The pods are in namespaces of their own, which are deleted in the end. The load takes all that two\n" +
			"nodes can give.\n\nWith --compare, exit code 3 says that a ratio to no mesh is worse than in the report that is named.",
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.bench(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringSliceVar(&f.workloads, "workloads", nil, "only these")
	fl.StringSliceVar(&f.variants, "variants", nil, "only these, and what they are compared with")
	fl.StringSliceVar(&f.dirs, "variant-dir", nil, "folder of a variant of your own")
	fl.StringSliceVar(&f.nodes, "nodes", nil, "the client's node and the server's node (default two nodes that have an agent)")
	fl.IntVar(&f.rounds, "rounds", f.rounds, "how often everything is repeated")
	fl.DurationVar(&f.duration, "duration", f.duration, "of one sample")
	fl.DurationVar(&f.hold, "hold", f.hold, "how long idle connections and resting pods are watched")
	fl.StringVar(&f.results, "results", "", "directory for the report: JSON, table, plots; workloads that it has already are replaced")
	fl.StringVar(&f.compare, "compare", "", "report (latest.json) whose ratios must not get worse")
	fl.StringVar(&f.commit, "commit", a.env.Version, "what the report says was measured")
	fl.StringVar(&f.image, "image", "ghcr.io/warrenmesh/warren/bench:"+a.env.Version, "image of the load program")
	fl.StringVar(&f.sidecar, "sidecar-image", "", "image of the sidecars, in place of what their variants name")
	fl.BoolVar(&f.keep, "keep", false, "leave the pods in the cluster")
	return cmd
}

// options makes a run of the flags.
func (f *benchFlags) options() (o bench.Options, err error) {
	o = bench.Options{Rounds: f.rounds, Duration: f.duration, Hold: f.hold}
	if o.Workloads, err = bench.SelectWorkloads(f.workloads); err != nil {
		return o, err
	}
	all, err := bench.Builtin()
	if err != nil {
		return o, err
	}
	for _, d := range f.dirs {
		v, err := bench.ReadVariant(d)
		if err != nil {
			return o, err
		}
		all = append(all, v)
	}
	if o.Variants, err = bench.SelectVariants(all, f.variants); err != nil {
		return o, err
	}
	return o, o.Validate()
}

func (a *app) bench(ctx context.Context, f benchFlags) (err error) {
	o, err := f.options()
	if err != nil {
		return usageError{err}
	}
	if len(f.nodes) != 0 && len(f.nodes) != 2 {
		return usageError{fmt.Errorf("--nodes names %s: name the client's and the server's", plural(len(f.nodes), "node"))}
	}
	var committed *bench.Report
	if f.compare != "" {
		if committed, err = bench.ReadReport(f.compare); err != nil {
			return fmt.Errorf("reading what to compare with: %w", err)
		}
	}
	c, err := a.connect(a)
	if err != nil {
		return err
	}
	site, err := openBenchSite(ctx, a, c, f)
	if err != nil {
		return err
	}
	if !f.keep {
		defer func() { err = errors.Join(err, site.close(context.WithoutCancel(ctx))) }()
	}
	o.Progress = bench.ShowProgress(a.env.Err, isTerminal(a.env.Err) && !a.env.NoColor)
	run, failed := bench.Run(ctx, site, o)
	if run == nil || len(run.Lines) == 0 {
		return failed
	}
	run.Commit = f.commit
	report := run.Report()
	if f.results != "" { // also what was finished before it failed
		if report, err = bench.Write(f.results, run); err != nil {
			return errors.Join(failed, fmt.Errorf("writing the report: %w", err))
		}
	}
	if failed != nil {
		return failed
	}
	if err := a.print(report, func(w io.Writer) error {
		_, err := io.WriteString(w, report.Markdown())
		return err
	}); err != nil {
		return err
	}
	if committed == nil {
		return nil
	}
	worse := bench.Worse(run, committed)
	for _, w := range worse {
		fmt.Fprintln(a.env.Err, "worse:", w)
	}
	if len(worse) > 0 {
		return errFound
	}
	return nil
}

// pickNodes takes the nodes that are named, or the first two that have an agent.
func pickNodes(named []string, agents []string) (client, server string, err error) {
	if len(named) == 2 {
		return named[0], named[1], nil
	}
	slices.Sort(agents)
	if len(agents) < 2 {
		return "", "", fmt.Errorf("%s with an agent: the benchmark needs two; %s", plural(len(agents), "node"),
			cmp.Or(strings.Join(agents, ", "), "is Warren installed?"))
	}
	return agents[0], agents[1], nil
}
