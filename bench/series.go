package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"slices"
)

// Series is what was measured, round by round; everything else is made of it.
type Series struct {
	Machine
	Commit string  `json:"commit"`
	Lines  []*Line `json:"lines"`
}

// Line is one metric of one workload through one variant.
type Line struct {
	Workload string    `json:"workload"`
	Variant  string    `json:"variant"`
	Metric   string    `json:"metric"`
	Baseline string    `json:"baseline"` // variant that it is compared with
	Rounds   []float64 `json:"rounds"`
}

// add keeps a sample. Rounds come in order.
func (s *Series) add(workload string, v *Variant, round int, m sample) {
	for _, metric := range metrics {
		value, ok := m[metric]
		if !ok {
			continue
		}
		l := s.find(workload, v.Name, metric)
		if l == nil {
			l = &Line{Workload: workload, Variant: v.Name, Metric: metric, Baseline: v.baseline()}
			s.Lines = append(s.Lines, l)
		}
		for len(l.Rounds) < round { // a metric that earlier rounds did not have
			l.Rounds = append(l.Rounds, 0)
		}
		l.Rounds = append(l.Rounds, value)
	}
}

func (s *Series) find(workload, variant, metric string) *Line {
	for _, l := range s.Lines {
		if l.Workload == workload && l.Variant == variant && l.Metric == metric {
			return l
		}
	}
	return nil
}

// Merge replaces, in s, the workloads that newer has measured, as a whole: ratios are within one run.
func (s *Series) Merge(newer *Series) {
	s.Lines = slices.DeleteFunc(s.Lines, func(l *Line) bool {
		return slices.ContainsFunc(newer.Lines, func(n *Line) bool { return n.Workload == l.Workload })
	})
	s.Lines = append(s.Lines, newer.Lines...)
	s.Machine, s.Commit = newer.Machine, newer.Commit
}

// drop forgets a workload.
func (s *Series) drop(workload string) {
	s.Lines = slices.DeleteFunc(s.Lines, func(l *Line) bool { return l.Workload == workload })
}

// Row is a line of a report.
type Row struct {
	Workload string   `json:"workload"`
	Variant  string   `json:"variant"`
	Metric   string   `json:"metric"`
	Median   float64  `json:"median"`
	Min      float64  `json:"min"`
	Max      float64  `json:"max"`
	Ratio    *float64 `json:"ratio"` // to no mesh in the same round, median; null where that has no such figure
	// The lowest and highest ratio of a round, for comparing; not in the report.
	lowest, highest float64
}

// Report is latest.json.
type Report struct {
	Machine
	Commit string `json:"commit"`
	Rounds int    `json:"rounds"`
	Rows   []Row  `json:"rows"`
}

// Report makes rows of rounds.
func (s *Series) Report() *Report {
	r := &Report{Machine: s.Machine, Commit: s.Commit, Rows: []Row{}}
	for _, w := range Workloads() {
		for _, v := range s.variants() {
			for _, m := range metrics {
				l := s.find(w.Name, v, m)
				if l == nil || len(l.Rounds) == 0 {
					continue
				}
				row := Row{Workload: w.Name, Variant: v, Metric: m, Median: round(median(l.Rounds)), Min: round(slices.Min(l.Rounds)), Max: round(slices.Max(l.Rounds))}
				if ratios := s.ratios(l); len(ratios) > 0 {
					mid := round(median(ratios))
					row.Ratio, row.lowest, row.highest = &mid, slices.Min(ratios), slices.Max(ratios)
				}
				r.Rows = append(r.Rows, row)
				if w.rounds(2) > 1 && (r.Rounds == 0 || len(l.Rounds) < r.Rounds) {
					r.Rounds = len(l.Rounds)
				}
			}
		}
	}
	r.Rounds = max(r.Rounds, 1)
	return r
}

// ratios are those to the baseline, round by round; none where it has no such figure.
func (s *Series) ratios(l *Line) []float64 {
	base := s.find(l.Workload, l.Baseline, l.Metric)
	if base == nil || len(base.Rounds) != len(l.Rounds) {
		return nil
	}
	var out []float64
	for i, v := range l.Rounds {
		if base.Rounds[i] == 0 {
			return nil
		}
		out = append(out, v/base.Rounds[i])
	}
	return out
}

// variants are those with lines, in the order of reports.
func (s *Series) variants() []string {
	var out []*Variant
	for _, l := range s.Lines {
		if !slices.ContainsFunc(out, func(v *Variant) bool { return v.Name == l.Variant }) {
			out = append(out, &Variant{Name: l.Variant})
		}
	}
	slices.SortFunc(out, compareVariants)
	names := make([]string, len(out))
	for i, v := range out {
		names[i] = v.Name
	}
	return names
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

// round keeps four digits: more is noise.
func round(v float64) float64 {
	if v == 0 {
		return 0
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

// number writes a figure for people.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 10000:
		return fmt.Sprintf("%.1fk", v/1000)
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// ReadSeries reads rounds.json; of a file that is not there it returns nothing measured.
func ReadSeries(file string) (*Series, error) {
	s, err := readJSON[Series](file)
	if errors.Is(err, fs.ErrNotExist) {
		return &Series{}, nil
	}
	return s, err
}

// ReadReport reads latest.json.
func ReadReport(file string) (*Report, error) { return readJSON[Report](file) }

func readJSON[T any](file string) (*T, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	v := new(T)
	if err := json.Unmarshal(b, v); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return v, nil
}

// writeLines writes an object whose list has a line for every element: what changed can be read in a diff.
func writeLines[T any](file string, head any, key string, list []T) error {
	b, err := json.MarshalIndent(head, "", "  ")
	if err != nil {
		return err
	}
	var out bytes.Buffer
	out.Write(bytes.TrimSuffix(b, []byte("\n}")))
	fmt.Fprintf(&out, ",\n  %q: [", key)
	for i, e := range list {
		line, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if i > 0 {
			out.WriteByte(',')
		}
		out.WriteString("\n    ")
		out.Write(line)
	}
	out.WriteString("\n  ]\n}\n")
	return os.WriteFile(file, out.Bytes(), 0o644)
}
