package bench

import (
	"fmt"
	"slices"
)

// slack is by how much a ratio may be worse whatever the spread says: a short run has a bias that all its rounds
// share. On two cores at rest, half a second a sample gave 0.26 and 0.29 where a second gave 0.34 (http-c16).
const slack = 0.35

// compared are the metrics whose ratios mean the same in a short run on a busy machine as in a long one on a quiet
// one. Tails do not, nor does what the rest of a node does meanwhile.
var compared = []string{metricRate, metricP50}

// Worse lists the ratios of a run that are worse than the committed ones by more than the run's own spread.
// Only ratios are compared: another machine has other figures.
func Worse(run *Series, committed *Report) []string {
	var out []string
	for _, now := range run.Report().Rows {
		was := committed.row(now.Workload, now.Variant, now.Metric)
		if was == nil || was.Ratio == nil || now.Ratio == nil || !slices.Contains(compared, now.Metric) {
			continue
		}
		by := *now.Ratio - *was.Ratio
		if higherIsBetter(now.Metric) {
			by = -by
		}
		if spread := now.highest - now.lowest; by > spread && by > slack**was.Ratio {
			out = append(out, fmt.Sprintf("%s, %s, %s: ×%.3f of no mesh, committed is ×%.3f (this run's rounds: %.3f to %.3f)",
				now.Workload, now.Variant, now.Metric, *now.Ratio, *was.Ratio, now.lowest, now.highest))
		}
	}
	return out
}
