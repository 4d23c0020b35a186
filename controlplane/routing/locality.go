package routing

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1alpha3"

	"github.com/warrenmesh/warren/internal/mesh"
)

// MeshLocality converts where endpoints are used from where no DestinationRule says it.
func MeshLocality(l *networking.LocalityLoadBalancerSetting) (*mesh.LocalityLB, []string) {
	c := &trafficConverter{at: "meshConfig"}
	return c.localityOf("localityLbSetting", l, true), c.problems
}

// locality converts where endpoints are used from. What Istio's API refuses is left out as a whole.
func (c *trafficConverter) locality(b *networking.LoadBalancerSettings, outliers bool) *mesh.LocalityLB {
	z := b.GetZoneAwareLbSetting()
	if z == nil {
		return c.localityOf("loadBalancer.localityLbSetting", b.GetLocalityLbSetting(), outliers)
	}
	const at = "loadBalancer.zoneAwareLbSetting"
	if b.GetLocalityLbSetting() != nil {
		c.say(at, "is followed, and not localityLbSetting beside it")
	}
	out := &mesh.LocalityLB{Off: z.Enabled != nil && !z.Enabled.Value}
	if out.Off {
		return out
	}
	out.Zones, out.Least = true, leastZoned
	if n := z.MinClusterSize; n != nil {
		out.Least = n.Value
	}
	for i, f := range z.Failover {
		out.Failover = c.failover(out.Failover, fmt.Sprintf("%s.failover[%d]", at, i), f.From, f.To)
	}
	for _, label := range z.FailoverPriority {
		switch key, _, _ := strings.Cut(label, "="); key {
		case "topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone":
			c.say(at+".failoverPriority", key+" is left out: regions and zones are told apart already")
		default:
			out.Labels = append(out.Labels, label)
		}
	}
	return out
}

// leastZoned is how many endpoints of its region a service has at least for zones to be told apart, where nobody says it (Istio's API).
const leastZoned = 6

// failover adds where what fails in a region goes.
func (c *trafficConverter) failover(all []mesh.RegionFailover, at, from, to string) []mesh.RegionFailover {
	if from == "" || to == "" || from == to || strings.ContainsAny(from+to, "*/") {
		c.say(at, "does not lead from one region to another, and is left out")
		return all
	}
	return append(all, mesh.RegionFailover{From: from, To: to})
}

func (c *trafficConverter) localityOf(at string, l *networking.LocalityLoadBalancerSetting, outliers bool) *mesh.LocalityLB {
	if l == nil {
		return nil
	}
	out := &mesh.LocalityLB{Off: l.Enabled != nil && !l.Enabled.Value}
	if out.Off {
		return out
	}
	for i, d := range l.Distribute {
		to := mesh.Distribution{From: d.From}
		var total uint64
		for where, percent := range d.To {
			total += uint64(percent)
			to.To = append(to.To, mesh.LocalityShare{Locality: where, Percent: percent})
		}
		if d.From == "" || total != 100 {
			c.say(fmt.Sprintf("%s.distribute[%d]", at, i), "has no from, or its shares do not sum to 100: localityLbSetting is left out")
			return nil
		}
		slices.SortFunc(to.To, func(a, b mesh.LocalityShare) int { return strings.Compare(a.Locality, b.Locality) })
		out.Distribute = append(out.Distribute, to)
	}
	for i, f := range l.Failover {
		out.Failover = c.failover(out.Failover, fmt.Sprintf("%s.failover[%d]", at, i), f.From, f.To)
	}
	out.Labels = l.FailoverPriority
	switch {
	case len(out.Distribute) > 0 && len(out.Failover)+len(out.Labels) > 0:
		c.say(at+".distribute", "is followed, and neither failover nor failoverPriority beside it")
	case len(out.Failover) > 0 && len(out.Labels) > 0:
		c.say(at+".failoverPriority", "is followed, and not failover beside it")
	}
	if len(out.Distribute) == 0 && !outliers {
		c.say(at, "has no effect without outlierDetection, which says when to fail over")
	}
	return out
}

func (c *trafficConverter) warmup(b *networking.LoadBalancerSettings) *mesh.Warmup {
	w := b.GetWarmup()
	over := cmp.Or(w.GetDuration(), b.GetWarmupDurationSecs())
	if over == nil {
		return nil
	}
	const at = "loadBalancer.warmup"
	switch p := b.GetSimple(); {
	case b.GetConsistentHash() != nil || p == networking.LoadBalancerSettings_RANDOM || p == networking.LoadBalancerSettings_PASSTHROUGH:
		c.say(at, "is followed with ROUND_ROBIN and LEAST_REQUEST alone")
		return nil
	}
	out := &mesh.Warmup{Over: c.length(at+".duration", over)}
	if out.Over == 0 {
		return nil
	}
	if v := w.GetMinimumPercent(); v != nil {
		if v.Value >= 0 && v.Value <= 100 {
			out.Percent = &v.Value
		} else {
			c.say(at+".minimumPercent", "is none of 0 to 100, and left out")
		}
	}
	if v := w.GetAggression(); v != nil {
		if v.Value >= 1 {
			out.Aggression = &v.Value
		} else {
			c.say(at+".aggression", "is below 1, and left out")
		}
	}
	return out
}

func (c *trafficConverter) retryBudget(r *networking.TrafficPolicy_RetryBudget) *mesh.RetryBudget {
	if r == nil {
		return nil
	}
	out := &mesh.RetryBudget{Percent: 20, Least: 3} // as the API says
	if r.Percent != nil {
		out.Percent = r.Percent.Value
	}
	if out.Percent < 0 || out.Percent > 100 {
		c.say("retryBudget.percent", "is none of 0 to 100: retryBudget is left out")
		return nil
	}
	if r.MinRetryConcurrency != 0 {
		out.Least = r.MinRetryConcurrency
	}
	out.Over = max(0, r.BudgetInterval.AsDuration())
	return out
}

func (c *trafficConverter) length(field string, d *durationpb.Duration) time.Duration {
	if d != nil && d.AsDuration() <= 0 {
		c.say(field, "is no time, and left out")
		return 0
	}
	return d.AsDuration()
}

// seconds is a length for the kernel, which has none below one.
func (c *trafficConverter) seconds(field string, d *durationpb.Duration) time.Duration {
	if t := c.length(field, d); t >= time.Second {
		return t.Truncate(time.Second)
	} else if t > 0 {
		c.say(field, "is below a second, and taken for one")
		return time.Second
	}
	return 0
}
