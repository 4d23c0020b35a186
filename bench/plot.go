package bench

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// chart is a bar chart of groups: in each group a bar for every variant.
type chart struct {
	title, unit string
	groups      []group
	line        float64 // a line across all groups, 0 is none
	logarithmic bool
}

type group struct {
	name string
	bars []bar
}

type bar struct {
	variant      string
	mid, low, up float64
}

// plots are the report's pictures by file name.
func (r *Report) plots() map[string]chart {
	ratio := func(x *Row) (bar, bool) {
		if x.Ratio == nil || x.Variant == Baseline || x.Variant == baselineNear {
			return bar{}, false
		}
		return bar{mid: *x.Ratio, low: *x.Ratio, up: *x.Ratio}, true
	}
	figure := func(x *Row) (bar, bool) { return bar{mid: x.Median, low: x.Min, up: x.Max}, true }
	collect := func(metric string, pick func(*Row) (bar, bool), workloads ...string) (out []group) {
		for _, w := range workloads {
			g := group{name: w}
			for _, v := range r.variants() {
				if x := r.row(w, v, metric); x != nil {
					if b, ok := pick(x); ok {
						b.variant = v
						g.bars = append(g.bars, b)
					}
				}
			}
			if len(g.bars) > 0 {
				out = append(out, g)
			}
		}
		return out
	}
	all := map[string]chart{
		"rate.svg":    {title: "Throughput against no mesh (higher is better)", unit: "×", line: 1, groups: collect(metricRate, ratio, "rr-c1", "http-c1", "http-c16", "http-c64", "new-conn-c1", "new-conn-c16", "bulk-1", "bulk-4")},
		"latency.svg": {title: "Median latency, logarithmic (lower is better)", unit: "µs", logarithmic: true, groups: collect(metricP50, figure, "rr-c1", "http-1000qps", "http-c1", "new-conn-200")},
		"tail.svg":    {title: "99th percentile, logarithmic (lower is better)", unit: "µs", logarithmic: true, groups: collect(metricP99, figure, "http-1000qps", "new-conn-200")},
		"cpu.svg":     {title: "Proxies' CPU per 1000 requests (lower is better)", unit: "ms", groups: collect(metricCPU, figure, "http-1000qps", "http-c1", "http-c16", "http-c64", "new-conn-c16")},
		"bulk.svg":    {title: "Proxies' CPU per GB (lower is better)", unit: "s", groups: collect(metricCPUGB, figure, "bulk-1", "bulk-4")},
	}
	for name, c := range all {
		if len(c.groups) == 0 {
			delete(all, name)
		}
	}
	return all
}

// colours of the variants, readable on light and on dark; others take the rest in turn.
var colours = []struct{ variant, fill string }{
	{Baseline, "#8b949e"}, {"same-node", "#2da44e"}, {"same-node-encrypt", "#74b816"}, {"cross-node", "#1f6feb"},
	{"envoy-tcp", "#d4792a"}, {"envoy-http", "#c2255c"}, {baselineNear, "#adb5bd"}, {"relay", "#6e7fb3"}, {"relay-encrypt", "#9775fa"}, {"", "#15aabf"},
}

func fill(variant string, at int) string {
	for _, c := range colours {
		if c.variant == variant {
			return c.fill
		}
	}
	return colours[len(colours)-2+at%2].fill
}

const (
	plotLeft, plotRight   = 130.0, 130.0
	plotTop, plotBottom   = 64.0, 16.0
	plotWidth             = 860.0
	barHeight, barGap     = 14.0, 3.0
	groupGap              = 14.0
	legendLine, legendRow = 150.0, 18.0
	legendColumns         = 5
)

// svg draws horizontal bars: names are read without turning the head.
func (c chart) svg() string {
	var variants []string
	top := c.line
	for _, g := range c.groups {
		for _, b := range g.bars {
			top = max(top, b.up)
			if !slices.Contains(variants, b.variant) {
				variants = append(variants, b.variant)
			}
		}
	}
	slices.SortFunc(variants, func(a, b string) int { return compareVariants(&Variant{Name: a}, &Variant{Name: b}) })
	perLine := legendColumns
	head := plotTop + float64((len(variants)-1)/perLine)*legendRow
	height := head + plotBottom
	for _, g := range c.groups {
		height += float64(len(g.bars))*(barHeight+barGap) + groupGap
	}
	low := 0.0
	if c.logarithmic {
		low = math.Inf(1)
		for _, g := range c.groups {
			for _, b := range g.bars {
				low = min(low, b.low)
			}
		}
		low = math.Pow(10, math.Floor(math.Log10(max(low, 0.001))))
	}
	room := plotWidth - plotLeft - plotRight
	x := func(v float64) float64 {
		if c.logarithmic {
			return plotLeft + room*math.Log(max(v, low)/low)/math.Log(top/low)
		}
		return plotLeft + room*v/top
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %.0f %.0f" font-family="system-ui, sans-serif" font-size="12" role="img">
<style>
  .text { fill: #1f2328 } .faint { fill: #656d76 } .axis { stroke: #d0d7de } .whisker { stroke: #1f2328 } .paper { fill: #ffffff }
  @media (prefers-color-scheme: dark) { .text { fill: #e6edf3 } .faint { fill: #8d96a0 } .axis { stroke: #3d444d } .whisker { stroke: #e6edf3 } .paper { fill: #0d1117 } }
</style>
<title>%s</title>
<rect class="paper" width="100%%" height="100%%"/>
<text class="text" x="10" y="22" font-size="15" font-weight="600">%s</text>
`, plotWidth, height, html.EscapeString(c.title), html.EscapeString(c.title))
	for i, v := range variants {
		lx, ly := 10+float64(i%perLine)*legendLine, 38+float64(i/perLine)*legendRow
		fmt.Fprintf(&b, "<rect x=\"%.0f\" y=\"%.0f\" width=\"11\" height=\"11\" rx=\"2\" fill=\"%s\"/><text class=\"text\" x=\"%.0f\" y=\"%.0f\">%s</text>\n",
			lx, ly, fill(v, i), lx+16, ly+10, html.EscapeString(v))
	}
	y := head
	for _, g := range c.groups {
		h := float64(len(g.bars)) * (barHeight + barGap)
		fmt.Fprintf(&b, "<text class=\"text\" x=\"%.0f\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", plotLeft-10, y+h/2+3, html.EscapeString(g.name))
		for _, v := range g.bars {
			end := max(x(v.mid), plotLeft+1)
			fmt.Fprintf(&b, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.0f\" rx=\"2\" fill=\"%s\"/>",
				plotLeft, y, end-plotLeft, barHeight, fill(v.variant, slices.Index(variants, v.variant)))
			if x(v.up)-x(v.low) > 1 {
				mid := y + barHeight/2
				fmt.Fprintf(&b, "<path class=\"whisker\" d=\"M%.1f %.1fH%.1fM%.1f %.1fv6M%.1f %.1fv6\"/>", x(v.low), mid, x(v.up), x(v.low), mid-3, x(v.up), mid-3)
			}
			fmt.Fprintf(&b, "<text class=\"faint\" x=\"%.1f\" y=\"%.1f\">%s %s</text>\n", max(end, x(v.up))+6, y+barHeight-3, number(v.mid), c.unit)
			y += barHeight + barGap
		}
		y += groupGap
	}
	fmt.Fprintf(&b, "<path class=\"axis\" d=\"M%.1f %.1fV%.1f\"/>\n", plotLeft, head-4, y-groupGap+2)
	if c.line > 0 {
		fmt.Fprintf(&b, "<path class=\"axis\" stroke-dasharray=\"4 3\" d=\"M%.1f %.1fV%.1f\"/><text class=\"faint\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">no mesh</text>\n",
			x(c.line), head-4, y-groupGap+2, x(c.line), y+2)
	}
	b.WriteString("</svg>\n")
	return b.String()
}
