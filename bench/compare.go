package bench

import "fmt"

// slack is by how much a ratio may be worse whatever the spread says: two runs of the same are never equal.
const slack = 0.10

// Worse lists the ratios of a run that are worse than the committed ones by more than the run's own spread.
// Only ratios are compared: another machine has other figures. Tails are left out: a few requests make them.
func Worse(run *Series, committed *Report) []string {
	var out []string
	for _, now := range run.Report().Rows {
		was := committed.row(now.Workload, now.Variant, now.Metric)
		if was == nil || was.Ratio == nil || now.Ratio == nil || now.Metric == metricP99 || now.Metric == metricP999 {
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
