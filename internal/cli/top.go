package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// load is what a workload does, as the last interval saw it.
type load struct {
	Namespace string `json:"namespace"`
	Workload  string `json:"workload"`
	// Open is how many connections it has, as client and as server.
	Open int64 `json:"open"`
	// The others are of a second: connections that began, those of them that failed or were ended by the mesh, and of these the
	// ones by policy; bytes.
	New      float64 `json:"newPerSecond"`
	Failed   float64 `json:"failedPerSecond"`
	Denied   float64 `json:"deniedPerSecond"`
	Received float64 `json:"receivedBytesPerSecond"`
	Sent     float64 `json:"sentBytesPerSecond"`
	// Requests is absent where no waypoint and no gateway knows them. Errors are those answered with 5xx.
	Requests *float64 `json:"requestsPerSecond,omitempty"`
	Errors   *float64 `json:"errorsPerSecond,omitempty"`
}

// topOrders are the columns that rows may be sorted by, the largest first.
var topOrders = map[string]func(load) float64{
	"open":     func(l load) float64 { return float64(l.Open) },
	"new":      func(l load) float64 { return l.New },
	"failed":   func(l load) float64 { return l.Failed },
	"bytes":    func(l load) float64 { return l.Received + l.Sent },
	"requests": func(l load) float64 { return value(l.Requests) },
	"errors":   func(l load) float64 { return value(l.Errors) },
}

func value(p *float64) float64 {
	if p == nil {
		return 0
	}
	return *p
}

type topFlags struct {
	sort     string
	interval time.Duration
	limit    int
}

func (a *app) topCommand() *cobra.Command {
	f := topFlags{}
	cmd := &cobra.Command{
		Use: "top [NAMESPACE]", Short: "Show which workloads have connections, traffic and failures",
		Long: "Show which workloads have connections, traffic, requests and failures, from the metrics of all agents, waypoints and gateways.\n\n" +
			"On a terminal it is shown anew every interval, until it is interrupted; elsewhere, and with -o json or yaml, once, over one interval.\n" +
			"A workload is counted as client by its own node and as server by its own node. Requests are there where a waypoint serves the workload,\n" +
			"or it is a gateway. What the kernel carries within a node is counted when it opens and ends, its bytes every ten seconds.",
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, names []string) error {
			switch {
			case topOrders[f.sort] == nil:
				return usageError{fmt.Errorf("--sort %s is none of open, new, failed, bytes, requests, errors", f.sort)}
			case f.interval < 100*time.Millisecond:
				return usageError{fmt.Errorf("--interval %s is shorter than 100ms", f.interval)}
			case f.limit < 0:
				return usageError{errors.New("--limit is 0 or more")}
			}
			return a.top(cmd.Context(), f, strings.Join(names, ""))
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.sort, "sort", "open", "the largest first of open, new, failed, bytes, requests or errors")
	fs.DurationVar(&f.interval, "interval", 2*time.Second, "over what time it is measured")
	fs.IntVar(&f.limit, "limit", 0, "at most so many rows; 0: all, or what the terminal holds")
	_ = cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions([]string{"open", "new", "failed", "bytes", "requests", "errors"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) top(ctx context.Context, f topFlags, namespace string) error {
	c, err := a.connect(a)
	if err != nil {
		return err
	}
	last, err := a.counts(ctx, c)
	if err != nil {
		return err
	}
	live := a.terminal() && a.output == "table"
	for t := time.NewTicker(f.interval); ; {
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		now, err := a.counts(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		rows := loads(last, now)
		last = now
		if namespace != "" {
			rows = slices.DeleteFunc(rows, func(l load) bool { return l.Namespace != namespace })
		}
		by := topOrders[f.sort]
		slices.SortStableFunc(rows, func(x, y load) int { return cmp.Compare(by(y), by(x)) })
		limit := f.limit
		if live && limit == 0 {
			limit = a.terminalRows() - 3 // the head, the summary and the cursor
		}
		all := len(rows)
		if limit > 0 && len(rows) > limit {
			rows = rows[:limit]
		}
		if live {
			fmt.Fprint(a.env.Out, "\x1b[H\x1b[2J")
		}
		err = a.print(rows, func(w io.Writer) error {
			if err := a.printLoads(w, rows); err != nil || !live && all == len(rows) {
				return err
			}
			_, err := fmt.Fprintf(w, "%d of %s, over %s\n", len(rows), plural(all, "workload"), f.interval)
			return err
		})
		if err != nil || !live {
			t.Stop()
			return err
		}
	}
}

// terminalRows is the height of the terminal, or a small one's.
func (a *app) terminalRows() int {
	if f, ok := a.env.Out.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Row > 3 {
			return int(size.Row)
		}
	}
	return 24
}

func (a *app) printLoads(w io.Writer, rows []load) error {
	t := table{head: []string{"NAMESPACE", "WORKLOAD", "OPEN", "NEW/s", "FAILED/s", "DENIED/s", "RECEIVED/s", "SENT/s", "REQUESTS/s", "ERRORS/s"}}
	rate := func(v float64) string { return fmt.Sprintf("%.1f", v) }
	alarm := func(v float64) string {
		if v > 0 {
			return a.paint(red, rate(v))
		}
		return rate(v)
	}
	for _, l := range rows {
		requests, errs := "-", "-"
		if l.Requests != nil {
			requests, errs = rate(*l.Requests), alarm(value(l.Errors))
		}
		t.add(l.Namespace, l.Workload, fmt.Sprint(l.Open), rate(l.New), alarm(l.Failed), alarm(l.Denied), size(l.Received), size(l.Sent), requests, errs)
	}
	return t.write(w)
}

// counts is what all agents, waypoints and gateways have counted until now.
func (a *app) counts(ctx context.Context, c *conn) (*counted, error) {
	agents, err := a.someAgents(ctx, c, "")
	if err != nil {
		return nil, err
	}
	ways, err := c.CoreV1().Pods("").List(ctx, metav1.ListOptions{LabelSelector: gatewayLabel})
	if err != nil {
		return nil, fmt.Errorf("listing the waypoints' pods: %w", err)
	}
	proxies := slices.DeleteFunc(ways.Items, func(p corev1.Pod) bool { return !ready(&p) || p.DeletionTimestamp != nil })
	return scrape(ctx, c, agents, proxies)
}
