package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Site is where variants are set up.
type Site interface {
	// Machine describes what it all runs on.
	Machine(ctx context.Context) (Machine, error)
	// Stage sets a variant up; it stays until the site is closed.
	Stage(ctx context.Context, v *Variant) (Stage, error)
	// Rest adds pods that do nothing to a variant, on one node, and returns what takes them away. Other variants may be
	// gone afterwards.
	Rest(ctx context.Context, v *Variant, pods int) (end func(context.Context) error, err error)
}

// Machine is what a report says of where it was made.
type Machine struct {
	Name   string `json:"machine"` // processor, cores, memory, nodes
	Kernel string `json:"kernel"`
}

// Stage is a variant that is set up: a client that can reach its server.
type Stage interface {
	// Load runs the load program as the client.
	Load(ctx context.Context, args ...string) (*Outcome, error)
	// Targets are where the client connects.
	Targets() (http, tcp string)
	// Meter reads each kernel once, with the variant's proxies.
	Meter(ctx context.Context) ([]Reading, error)
}

// Options of Run.
type Options struct {
	Workloads []Workload
	Variants  []*Variant
	Rounds    int
	Duration  time.Duration // of a sample
	Hold      time.Duration // how long idle connections are held, and how long pods rest
	// Progress is told of every step before it is made.
	Progress func(Step)
}

// Step is where a run is.
type Step struct {
	Done, Total int
	What        string
	Took        string // of the step before: its figures
}

// Validate says what is wrong with the options.
func (o Options) Validate() error {
	switch {
	case o.Rounds < 1 || o.Rounds > 100:
		return fmt.Errorf("%d rounds: use 1 to 100", o.Rounds)
	case o.Duration < 100*time.Millisecond || o.Duration > 10*time.Minute:
		return fmt.Errorf("a sample of %s: use 100ms to 10m", o.Duration)
	case o.Hold < time.Second:
		return fmt.Errorf("holding for %s: use at least 1s", o.Hold)
	case len(o.Variants) == 0 || len(o.Workloads) == 0:
		return errors.New("there is nothing to run")
	}
	for i, v := range o.Variants {
		if slices.ContainsFunc(o.Variants[:i], func(x *Variant) bool { return x.Name == v.Name }) {
			return fmt.Errorf("two variants are called %s", v.Name)
		}
	}
	return nil
}

// sample is the figures of one workload through one variant in one round.
type sample map[string]float64

// Run measures: for every workload, round after round, every variant in turn, each round beginning with another.
// With an error it returns the workloads that it has finished.
func Run(ctx context.Context, site Site, o Options) (*Series, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	machine, err := site.Machine(ctx)
	if err != nil {
		return nil, err
	}
	out := &Series{Machine: machine}
	r := runner{Options: o, site: site, stages: map[string]Stage{}}
	for _, w := range o.Workloads {
		r.total += len(r.through(w)) * w.rounds(o.Rounds)
	}
	r.total += len(o.Variants)
	for _, v := range o.Variants {
		r.step("setting up " + v.Name)
		if r.stages[v.Name], err = site.Stage(ctx, v); err != nil {
			return nil, fmt.Errorf("setting up variant %s: %w", v.Name, err)
		}
		if err := r.warm(ctx, v); err != nil {
			return nil, fmt.Errorf("variant %s: %w", v.Name, err)
		}
	}
	for _, w := range o.Workloads {
		variants := r.through(w)
		for round := range w.rounds(o.Rounds) {
			for i := range variants {
				v := variants[(i+round)%len(variants)]
				r.step(fmt.Sprintf("%s, round %d: %s", w.Name, round+1, v.Name))
				s, err := r.measure(ctx, w, v)
				if ctx.Err() != nil {
					err = ctx.Err()
				}
				if err != nil {
					out.drop(w.Name)
					return out, fmt.Errorf("%s through %s, round %d: %w", w.Name, v.Name, round+1, err)
				}
				r.last = s.String()
				out.add(w.Name, v, round, s)
			}
		}
	}
	r.step("done")
	return out, nil
}

// rounds is how often a workload is repeated. What holds thousands of connections or pods is not a matter of
// luck, and takes long.
func (w Workload) rounds(n int) int {
	if w.idle > 0 || w.rest > 0 {
		return 1
	}
	return n
}

type runner struct {
	Options
	site   Site
	stages map[string]Stage
	done   int
	total  int
	last   string
}

func (r *runner) step(what string) {
	if r.Progress != nil {
		r.Progress(Step{Done: r.done, Total: r.total, What: what, Took: r.last})
	}
	r.done++
	r.last = ""
}

// through are the variants that a workload goes through.
func (r *runner) through(w Workload) []*Variant {
	return slices.DeleteFunc(slices.Clone(r.Variants), func(v *Variant) bool {
		_, ok := w.runs(v)
		return !ok
	})
}

// warm waits until the path answers, and has every cache, certificate and tunnel made.
func (r *runner) warm(ctx context.Context, v *Variant) error {
	http, tcp := r.stages[v.Name].Targets()
	var runs [][]string
	if http != "" {
		runs = append(runs, []string{"http", "-c", "16", "-d", "500ms", http})
	}
	if tcp != "" {
		runs = append(runs, []string{"rr", "-d", "200ms", tcp})
	}
	deadline := time.Now().Add(time.Minute)
	for _, args := range runs {
		for {
			o, err := r.stages[v.Name].Load(ctx, args...)
			if err == nil && o.Failed == 0 && o.Done > 0 {
				break
			}
			if err == nil {
				err = fmt.Errorf("%d requests answered, %d not: %s", o.Done, o.Failed, strings.Join(o.Errors, "; "))
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("the server does not answer: %w", err)
			}
			if e := pause(ctx, 500*time.Millisecond); e != nil {
				return e
			}
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func (r *runner) measure(ctx context.Context, w Workload, v *Variant) (sample, error) {
	switch {
	case w.idle > 0:
		return r.idle(ctx, w, v)
	case w.rest > 0:
		return r.rest(ctx, w, v)
	}
	s := r.stages[v.Name]
	http, tcp := s.Targets()
	addr := http
	if w.tcp {
		addr = tcp
	}
	before, err := s.Meter(ctx)
	if err != nil {
		return nil, err
	}
	o, err := s.Load(ctx, w.command(addr, r.Duration)...)
	if err != nil {
		return nil, err
	}
	after, err := s.Meter(ctx)
	if err != nil {
		return nil, err
	}
	if o.Done == 0 || float64(o.Failed) > float64(o.Done)/1000 {
		return nil, fmt.Errorf("%d requests answered, %d not: %s", o.Done, o.Failed, strings.Join(o.Errors, "; "))
	}
	return w.figures(o, before, after)
}

// figures makes a sample of a run and the readings around it.
func (w Workload) figures(o *Outcome, before, after []Reading) (sample, error) {
	u, err := used(before, after)
	if err != nil {
		return nil, err
	}
	s := sample{}
	if w.bulk {
		s[metricRate] = float64(o.Bytes) * 8 / 1e9 / o.Seconds
		gb := float64(o.Bytes) / 1e9
		s[metricNodeGB] = u.node.Seconds() / gb
		if u.processes > 0 {
			s[metricCPUGB] = u.proxies.Seconds() / gb
		}
	} else {
		s[metricRate] = float64(o.Done) / o.Seconds
		thousands := float64(o.Done) / 1000
		s[metricNode] = float64(u.node.Milliseconds()) / thousands
		if u.processes > 0 {
			s[metricCPU] = float64(u.proxies.Milliseconds()) / thousands
		}
	}
	if w.latency && o.Latency != nil {
		s[metricP50], s[metricP90], s[metricP99], s[metricP999] = o.Latency.P50, o.Latency.P90, o.Latency.P99, o.Latency.P999
	}
	if u.processes > 0 {
		s[metricRSS], s[metricRSSAnon] = float64(u.rss)/1e6, float64(u.anon)/1e6
	}
	return s, nil
}

// usage is what went on between two readings.
type usage struct {
	node      time.Duration // of all cores of all kernels
	proxies   time.Duration
	processes int
	rss, anon int64 // of the largest process, at the end
	growth    int64 // of RssAnon, of the process that grew most
}

func used(before, after []Reading) (u usage, err error) {
	if len(before) != len(after) {
		return u, fmt.Errorf("%d kernels before, %d after", len(before), len(after))
	}
	for i, a := range after {
		b := before[i]
		if a.BootTime != b.BootTime {
			return u, errors.New("a node has booted meanwhile")
		}
		u.node += a.Busy - b.Busy
		if len(a.Processes) != len(b.Processes) {
			return u, fmt.Errorf("there were %d proxies, now there are %d", len(b.Processes), len(a.Processes))
		}
		for _, p := range a.Processes {
			j := slices.IndexFunc(b.Processes, func(x Process) bool { return x.PID == p.PID })
			if j < 0 {
				return u, fmt.Errorf("%s has been started anew", p.Name)
			}
			u.proxies += p.CPU - b.Processes[j].CPU
			u.processes++
			u.rss, u.anon = max(u.rss, p.RSS), max(u.anon, p.RSSAnon)
			u.growth = max(u.growth, p.RSSAnon-b.Processes[j].RSSAnon)
		}
	}
	return u, nil
}

// idle holds connections and reads the memory while they are there.
func (r *runner) idle(ctx context.Context, w Workload, v *Variant) (sample, error) {
	s := r.stages[v.Name]
	_, tcp := s.Targets()
	before, err := s.Meter(ctx)
	if err != nil {
		return nil, err
	}
	type end struct {
		o   *Outcome
		err error
	}
	ended := make(chan end, 1)
	go func() {
		o, err := s.Load(ctx, "idle", "-c", fmt.Sprint(w.idle), "-d", r.Hold.String(), tcp)
		ended <- end{o, err}
	}()
	last := before
	for {
		select {
		case e := <-ended:
			if e.err != nil {
				return nil, e.err
			}
			if e.o.Failed > 0 || e.o.Done != int64(w.idle) {
				return nil, fmt.Errorf("%d of %d connections were there in the end: %s", e.o.Done, w.idle, strings.Join(e.o.Errors, "; "))
			}
			u, err := used(before, last)
			if err != nil {
				return nil, err
			}
			out := sample{metricRate: float64(e.o.Done)}
			if u.processes > 0 {
				out[metricRSS], out[metricRSSAnon] = float64(u.rss)/1e6, float64(u.anon)/1e6
				out[metricPerConn] = float64(u.growth) / 1024 / float64(w.idle)
			}
			return out, nil
		case <-time.After(r.Hold / 8):
			reading, err := s.Meter(ctx)
			if err != nil {
				return nil, err
			}
			select {
			case e := <-ended: // they may have been closed already when this was read
				ended <- e
			default:
				last = reading
			}
		}
	}
}

// rest has pods do nothing and reads what the proxies do meanwhile.
func (r *runner) rest(ctx context.Context, w Workload, v *Variant) (out sample, err error) {
	end, err := r.site.Rest(ctx, v, w.rest)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, end(context.WithoutCancel(ctx))) }()
	if err := pause(ctx, 10*time.Second); err != nil { // certificates, reports
		return nil, err
	}
	before, err := r.stages[v.Name].Meter(ctx)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := pause(ctx, r.Hold); err != nil {
		return nil, err
	}
	after, err := r.stages[v.Name].Meter(ctx)
	took := time.Since(start)
	if err != nil {
		return nil, err
	}
	u, err := used(before, after)
	if err != nil {
		return nil, err
	}
	most := time.Duration(0) // of the node with the pods
	for i, a := range after {
		for j, p := range a.Processes {
			most = max(most, p.CPU-before[i].Processes[j].CPU)
		}
	}
	return sample{metricCPU: 1000 * most.Seconds() / took.Seconds(), metricRSS: float64(u.rss) / 1e6, metricRSSAnon: float64(u.anon) / 1e6}, nil
}

// String is the sample for a line of progress.
func (s sample) String() string {
	var out []string
	for _, m := range []string{metricRate, metricP50, metricP99, metricCPU, metricCPUGB, metricPerConn} {
		if v, ok := s[m]; ok {
			out = append(out, m+" "+number(v))
		}
	}
	return strings.Join(out, ", ")
}
