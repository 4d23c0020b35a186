package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/warrenmesh/warren/internal/tap"
)

// tapRetry is how long an agent that ended is given for its successor to be ready.
const tapRetry = time.Second

type tapFlags struct {
	from, to, direction, verdict, node string
	count                              int
	duration                           time.Duration
}

func (a *app) tapCommand() *cobra.Command {
	var f tapFlags
	cmd := &cobra.Command{
		Use: "tap [PARTY]", Short: "Show connections while they begin and end",
		Long: "Show connections while they begin and end, as the node agents carry, refuse or end them, until it is interrupted.\n\n" +
			"A PARTY is NAMESPACE, NAMESPACE/NAME (of a pod, of what it belongs to, or of a Service), a host, an address, each with or without :PORT, or\n" +
			"a prefix. A connection between pods of two nodes is shown by both: outbound by the client's, inbound by the server's. Those that the\n" +
			"agents do not carry, such as to outside the mesh, are not there. Times are UTC.\n\n" +
			"-o json prints a line for each; -o yaml a document.",
		Args: args(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, party []string) error {
			filter, err := f.filter(party)
			if err != nil {
				return usageError{err}
			}
			return a.tap(cmd.Context(), f, filter)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&f.from, "from", "", "only those that this `PARTY` makes")
	fs.StringVar(&f.to, "to", "", "only those to this `PARTY`")
	fs.StringVar(&f.direction, "direction", "", "only as the client's node (outbound) or the server's (inbound) sees them")
	fs.StringVar(&f.verdict, "verdict", "", "only those that policies refuse or end (denied), or the others (allowed)")
	fs.StringVar(&f.node, "node", "", "only this node's: its name, or NAMESPACE/POD of a pod on it")
	fs.IntVarP(&f.count, "count", "c", 0, "end after so many lines; 0: never")
	fs.DurationVar(&f.duration, "for", 0, "end after this time; 0: never")
	_ = cmd.RegisterFlagCompletionFunc("verdict", cobra.FixedCompletions([]string{"allowed", "denied"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("direction", cobra.FixedCompletions([]string{"inbound", "outbound"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// filter reads what the agents will be asked for, as they read it.
func (f *tapFlags) filter(party []string) (tap.Filter, error) {
	q := map[string][]string{"from": {f.from}, "to": {f.to}, "direction": {f.direction}, "verdict": {f.verdict}}
	if len(party) == 1 {
		q["of"] = party
	}
	if f.count < 0 || f.duration < 0 {
		return tap.Filter{}, errors.New("--count and --for are 0 or more")
	}
	return tap.ParseQuery(q)
}

func (a *app) tap(ctx context.Context, f tapFlags, filter tap.Filter) error {
	c, err := a.connect(a)
	if err != nil {
		return err
	}
	agents, err := a.someAgents(ctx, c, f.node)
	if err != nil {
		return err
	}

	ctx, stop := context.WithCancel(ctx)
	var reading sync.WaitGroup
	defer func() { stop(); reading.Wait() }()
	t := tapping{a: a, c: c, path: "/connections/watch", events: make(chan tap.Event)}
	if q := filter.Query().Encode(); q != "" {
		t.path += "?" + q
	}
	// What one agent tells is no substitute for what another does not: all, or none.
	streams := make([]io.ReadCloser, len(agents))
	defer func() {
		for _, s := range streams {
			if s != nil {
				s.Close()
			}
		}
	}()
	for i := range agents {
		if streams[i], err = t.open(ctx, &agents[i]); err != nil {
			return err
		}
	}
	fmt.Fprintf(a.env.Err, "watching %s\n", plural(len(agents), "node"))
	for i := range agents {
		s := streams[i]
		streams[i] = nil
		reading.Go(func() { t.read(ctx, agents[i], s) })
	}
	return t.show(ctx, f)
}

// tapping is one run of the command.
type tapping struct {
	a      *app
	c      *conn
	path   string
	events chan tap.Event
	mu     sync.Mutex // standard error
}

func (t *tapping) open(ctx context.Context, agent *corev1.Pod) (io.ReadCloser, error) {
	s, err := t.c.stream(ctx, agent, adminPort, t.path)
	if answer, ok := errors.AsType[*answerError](err); ok && answer.status == http.StatusNotFound {
		return nil, fmt.Errorf("the agent on %s is of a version that does not tell of connections: see %s upgrade", agent.Spec.NodeName, t.a.name())
	}
	return s, err
}

// read hands on what an agent tells. When the agent ends, its successor on the node is asked.
func (t *tapping) read(ctx context.Context, agent corev1.Pod, s io.ReadCloser) {
	node := agent.Spec.NodeName
	for {
		err := t.lines(ctx, node, s)
		if ctx.Err() != nil {
			return
		}
		t.say("%s: %v; asking the agent there again: what happens meanwhile is not shown", node, err)
		for s = nil; s == nil; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(tapRetry):
			}
			next, err := t.a.agentFor(ctx, t.c, node)
			if err == nil {
				s, err = t.open(ctx, next)
			}
			if err != nil {
				t.say("%s: %v", node, err)
				s = nil
			}
		}
		t.say("%s: watching again", node)
	}
}

// lines reads one stream to its end.
func (t *tapping) lines(ctx context.Context, node string, s io.ReadCloser) error {
	end := context.AfterFunc(ctx, func() { s.Close() })
	defer func() {
		if end() {
			s.Close()
		}
	}()
	lines := bufio.NewScanner(s)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e tap.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return fmt.Errorf("what the agent tells is of another version: %w", err)
		}
		e.Node = node
		select {
		case t.events <- e:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	return errors.New("the agent has ended")
}

func (t *tapping) say(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(t.a.env.Err, format+"\n", args...)
}

// show prints events until it is enough.
func (t *tapping) show(ctx context.Context, f tapFlags) error {
	if f.duration > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, f.duration)
		defer stop()
	}
	rows := flowing{floor: []int{12, 5, 9, 6, 20, 25, 20, 9}}
	if t.a.output == "table" {
		if err := rows.write(t.a.env.Out, []string{"TIME", "NODE", "DIRECTION", "EVENT", "SOURCE", "DESTINATION", "SERVICE", "PATH", "RESULT"}); err != nil {
			return err
		}
	}
	var opened, closed, failed, denied, shown int
	defer func() {
		t.say("%d opened, %d closed, %d failed; %d of these by policy", opened, closed, failed, denied)
	}()
	for f.count == 0 || shown < f.count {
		var e tap.Event
		select {
		case <-ctx.Done():
			return nil
		case e = <-t.events:
		}
		switch e.What {
		case tap.Open:
			opened++
		case tap.Close:
			closed++
		case tap.Failed:
			failed++
		}
		if e.Denied() {
			denied++
		}
		var err error
		switch {
		case t.a.output == "json":
			err = json.NewEncoder(t.a.env.Out).Encode(&e)
		case t.a.output == "yaml":
			var b []byte
			if b, err = yaml.Marshal(&e); err == nil {
				_, err = fmt.Fprintf(t.a.env.Out, "---\n%s", b)
			}
		case e.What == tap.Missed:
			t.say("%s: %d more are not shown: they came faster than they could be sent; ask for fewer", e.Node, e.Count)
		default:
			err = rows.write(t.a.env.Out, t.a.tapRow(&e))
		}
		if err != nil {
			return err
		}
		if e.What != tap.Missed {
			shown++
		}
	}
	return nil
}

// tapRow is an event as a line of the table.
func (a *app) tapRow(e *tap.Event) []string {
	who := func(x tap.End, port bool) string {
		name := x.Pod
		if name == "" {
			name = x.Workload
		}
		switch {
		case !x.Addr.IsValid() && name == "":
			return "-"
		case name == "":
			if !port || x.Addr.Port() == 0 {
				return x.Addr.Addr().String()
			}
			return x.Addr.String()
		case !port || x.Addr.Port() == 0:
			return x.Namespace + "/" + name
		}
		return fmt.Sprintf("%s/%s:%d", x.Namespace, name, x.Addr.Port())
	}
	to := e.Destination
	if !to.Addr.IsValid() && to.Pod == "" { // nothing was chosen
		to.Addr = e.Asked
	}
	service := e.Service
	if name, _, ok := strings.Cut(service, ".svc."); ok {
		service = name
	}
	if service != "" && e.Asked != (netip.AddrPort{}) {
		service = fmt.Sprintf("%s:%d", service, e.Asked.Port())
	}
	what, result := string(e.What), ""
	if e.What != tap.Open {
		result = e.Outcome
		if e.Error != "" {
			result += ": " + e.Error
		}
		if e.What == tap.Close {
			result += fmt.Sprintf(", %s, %s sent, %s received", time.Duration(e.DurationMS)*time.Millisecond, size(float64(e.Sent)), size(float64(e.Received)))
		}
	}
	switch {
	case e.Denied() || e.What == tap.Failed:
		what, result = a.paint(red, what), a.paint(red, result)
	case e.What == tap.Open:
		what = a.paint(green, what)
	}
	return []string{e.Time.UTC().Format("15:04:05.000"), e.Node, e.Direction, what, who(e.Source, false), who(to, true), dash(service), dash(e.Path), result}
}

// flowing lays out rows that come one by one: a column is as wide as its widest cell so far.
type flowing struct{ floor []int }

func (t *flowing) write(w io.Writer, cells []string) error {
	var line strings.Builder
	for i, c := range cells {
		line.WriteString(c)
		if i < len(cells)-1 {
			t.floor[i] = max(t.floor[i], visible(c))
			line.WriteString(strings.Repeat(" ", t.floor[i]-visible(c)+2))
		}
	}
	_, err := io.WriteString(w, strings.TrimRight(line.String(), " ")+"\n")
	return err
}

// size writes bytes for people.
func size(n float64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for n >= 1024 && i < len(units)-1 {
		n /= 1024
		i++
	}
	if i == 0 || n >= 100 {
		return fmt.Sprintf("%.0f %s", n, units[i])
	}
	return fmt.Sprintf("%.1f %s", n, units[i])
}
