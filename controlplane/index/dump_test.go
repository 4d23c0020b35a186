package index

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/internal/mesh"
)

// sentFrom says whose sending something is about.
func sentFrom(namespace string) string {
	if namespace == "" {
		return ""
	}
	return " for what " + namespace + " sends"
}

// dump writes everything that was derived, in an order of its own and without revisions.
func dump(x *Index) string {
	var b strings.Builder
	s := x.Snapshot()
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	for _, w := range slices.SortedFunc(s.Workloads(), func(a, b *mesh.Workload) int { return cmp.Compare(a.UID, b.UID) }) {
		line("workload %s", w.UID)
		line("  addrs %v%s net %q node %q host-network %t", w.Addrs, w.Hostname, w.Network, w.Node, w.HostNetwork)
		line("  identity %q tunnel %d native %t healthy %t", w.Identity, w.Tunnel, w.NativeTunnel, w.Healthy)
		line("  of %s (kind %d), canonical %s/%s, locality %+v, capacity %d", w.WorkloadName, w.Kind, w.CanonicalName, w.CanonicalRevision, w.Locality, w.Capacity)
		for _, n := range slices.SortedFunc(maps.Keys(w.Services), mesh.ServiceName.Compare) {
			line("  backs %s %v", n, w.Services[n])
		}
		if len(w.Policies) > 0 {
			line("  policies %v", w.Policies)
		}
		if len(w.Audits) > 0 {
			line("  audits %v", w.Audits)
		}
	}
	for _, v := range slices.SortedFunc(s.Services(), func(a, b *mesh.Service) int { return a.Name.Compare(b.Name) }) {
		line("service %s", v.Name)
		line("  vips %v%v ports %v lb %+v sans %v canonical %t", v.VIPs, v.VIPNets, v.Ports, v.LB, v.SANs, v.Canonical)
		if v.Limited() {
			line("  for %v alone", v.VisibleIn)
		}
		if v.Waypoint != nil {
			line("  waypoint %s", v.Waypoint.Service)
		}
		if v.IngressUseWaypoint {
			line("  gateways send by it")
		}
		for _, r := range v.HTTP {
			line("  http %s port %d from %q matches %+v backends %+v invalid %q", r.Name, r.Port, r.From, r.Matches, r.Backends, r.Invalid)
		}
		for _, a := range v.Access {
			line("  access %s action %d dry-run %t rules %+v", a.Name, a.Action, a.DryRun, a.Rules)
		}
		for _, r := range v.Tokens {
			line("  tokens %+v", r)
		}
		if v.Telemetry != nil {
			line("%s", toldText(v.Telemetry))
		}
		lineLimits(line, v.Limits)
		linePatches(line, v.Patches)
		linePlugins(line, v.Plugins)
		for _, r := range v.Routed {
			line("  routed port %d%v from %q to %+v", r.Port, r.Names, r.From, r.Backends)
		}
		for _, e := range v.TLS {
			line("  encrypted port %d host %s names %+v roots %d bytes invalid %q", e.Port, e.Host, e.Names, len(e.Roots), e.Invalid)
		}
		if v.RuleIn != nil {
			line("  ruled in %v alone", v.RuleIn)
		}
		for _, s := range v.Subsets {
			line("  subset %s %v%s", s.Name, s.Labels, sentFrom(s.From))
		}
		for _, t := range v.Traffic {
			tls := ""
			if t.TLS != nil {
				tls = fmt.Sprintf(" TLS for %q invalid %q", t.TLS.Host, t.TLS.Invalid)
			}
			line("  traffic subset %q port %d balance %d%s%s", t.Subset, t.Port, t.Balance, tls, sentFrom(t.From))
		}
	}
	for _, g := range slices.SortedFunc(s.Ingresses(), func(a, b *mesh.Ingress) int { return a.Name.Compare(b.Name) }) {
		line("ingress %s", g.Name)
		if g.Tunnels {
			line("  takes tunnels")
		}
		for _, l := range g.Listeners {
			line("  listener %s port %d names %v tls %+v", l.Name, l.Port, l.Names, l.TLS)
			if l.Tunnelled {
				line("    by tunnel alone")
			}
			for _, to := range l.Backends {
				line("    to %s port %d subset %q weight %d", to.Service, to.Port, to.Subset, to.Weight)
			}
			for _, h := range l.Hosts {
				only := ""
				if h.HTTPSOnly {
					only = " by https only"
				}
				line("    hosts %v misdirects %t%s", h.Names, h.Misdirects, only)
				for _, r := range h.Rules {
					line("      http %s matches %+v backends %+v invalid %q", r.Name, r.Matches, r.Backends, r.Invalid)
				}
			}
		}
		for _, c := range g.Certificates {
			line("  certificate %s", c.Name)
		}
		for _, a := range g.Access {
			line("  access %s action %d dry-run %t rules %+v", a.Name, a.Action, a.DryRun, a.Rules)
		}
		for _, r := range g.Tokens {
			line("  tokens %+v", r)
		}
		lineLimits(line, g.Limits)
		linePatches(line, g.Patches)
		linePlugins(line, g.Plugins)
		if g.Telemetry != nil {
			line("%s", toldText(g.Telemetry))
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(x.gatewayStates), compareKeys) {
		g := x.gatewayStates[k]
		line("gateway %s accepted %+v", k, g.Accepted)
		if !g.Resolved.OK() {
			line("  resolved %+v", g.Resolved)
		}
		for _, set := range g.Sets {
			line("  set %s/%s accepted %+v", set.Namespace, set.Name, set.Accepted)
			for _, l := range set.Listeners {
				line("    listener %s attached %d accepted %+v resolved %+v conflicted %+v", l.Name, l.Attached, l.Accepted, l.Resolved, l.Conflicted)
			}
		}
		for _, l := range g.Listeners {
			line("  listener %s attached %d accepted %+v resolved %+v conflicted %+v", l.Name, l.Attached, l.Accepted, l.Resolved, l.Conflicted)
			for _, kind := range l.Kinds {
				line("    takes %s", kind.Kind)
			}
		}
	}
	for _, p := range slices.SortedFunc(s.Policies(), func(a, b *mesh.Policy) int { return a.Name.Compare(b.Name) }) {
		line("policy %s scope %d action %d dry-run %t", p.Name, p.Scope, p.Action, p.DryRun)
		for _, r := range p.Rules {
			line("  rule")
			for _, c := range r.Clauses {
				for i, m := range c.Matches {
					line("    %s %s", map[bool]string{true: "and", false: "or "}[i == 0], matchText(m))
				}
			}
		}
	}
	if ns := s.Config().UDPNamespaces; len(ns) > 0 {
		line("policies apply to UDP of %v", ns)
	}
	for _, k := range sortedKeys(keySet(x.locals)) {
		p := x.locals[k]
		line("pod %s/%s %s on %s: enrolled %t (%s) strict %t phase %d", p.Namespace, p.Name, p.UID, p.Node, p.Enrolled, p.Reason, p.Strict, p.Phase)
	}
	for _, n := range slices.Sorted(maps.Keys(x.nsStates)) {
		line("namespace %s enrolled %t", n, x.nsStates[n].Enrolled)
	}
	for _, k := range slices.SortedFunc(maps.Keys(x.states), func(a, b PolicyKey) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	}) {
		s := x.states[k]
		at := ""
		if len(s.Waypoints) > 0 {
			at = fmt.Sprintf(" at %v", s.Waypoints)
		}
		line("state %s %s/%s: compiled %v%s exact %t %s: %s", k.Kind, k.Namespace, k.Name, s.Compiled, at, s.Exact, s.Reason, s.Message)
	}
	for _, k := range slices.SortedFunc(maps.Keys(x.routeStates), func(a, b RouteKey) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	}) {
		for _, p := range x.routeStates[k].Parents {
			line("route %s %s/%s at %s: accepted %+v resolved %+v partly %+v", k.Kind, k.Namespace, k.Name, p.Ref.Name, p.Accepted, p.Resolved, p.Partly)
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(x.notices), func(a, b NoticeKey) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	}) {
		line("notice %s %s/%s: %s: %s", k.Kind, k.Namespace, k.Name, x.notices[k].Reason, x.notices[k].Message)
	}
	return b.String()
}

func toldText(t *mesh.Telemetry) string {
	out := "  told"
	if tr := t.Tracing; tr != nil {
		out += fmt.Sprintf(" by spans to %s, %g%% tags %v workloads %t", tr.To.Name, tr.Percent, tr.Tags, !tr.NoWorkloads)
	}
	for _, l := range t.Logs {
		out += fmt.Sprintf(" by lines to %s if %q", l.To.Name, l.Filter)
	}
	for _, m := range t.Metrics {
		out += fmt.Sprintf(" metric %q disabled %t without %v with %v", m.Metric, m.Disable != nil && *m.Disable, m.Remove, m.Set)
	}
	return out
}

func keySet[V any](m map[key]V) map[key]struct{} {
	out := map[key]struct{}{}
	for k := range m {
		out[k] = struct{}{}
	}
	return out
}

func matchText(m mesh.Match) string {
	var out []string
	add := func(name string, n int, v any) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%s %v", name, v))
		}
	}
	add("ns", len(m.Namespaces), m.Namespaces)
	add("not-ns", len(m.NotNamespaces), m.NotNamespaces)
	add("principal", len(m.Principals), m.Principals)
	add("not-principal", len(m.NotPrincipals), m.NotPrincipals)
	add("sa", len(m.ServiceAccounts), m.ServiceAccounts)
	add("not-sa", len(m.NotServiceAccounts), m.NotServiceAccounts)
	add("src", len(m.SourceIPs), m.SourceIPs)
	add("not-src", len(m.NotSourceIPs), m.NotSourceIPs)
	add("dst", len(m.DestinationIPs), m.DestinationIPs)
	add("not-dst", len(m.NotDestinationIPs), m.NotDestinationIPs)
	add("port", len(m.DestinationPorts), m.DestinationPorts)
	add("not-port", len(m.NotDestinationPorts), m.NotDestinationPorts)
	return strings.Join(out, ", ")
}

func linePatches(line func(string, ...any), all []mesh.Patch) {
	for _, p := range all {
		line("  patch %s %s op %d port %d names %q filter %q value %s", p.Object, p.At, p.Op, p.Port, p.ServerName, p.Filter, p.Value)
	}
}

func linePlugins(line func(string, ...any), all []mesh.Plugin) {
	for _, p := range all {
		line("  plugin %s phase %d fails %d root %q ports %v env %v config %s module %s", p.Object, p.Phase, p.Fails, p.Root, p.Ports, p.Env, p.Config, p.Module)
	}
}

func lineLimits(line func(string, ...any), list []mesh.RateLimit) {
	for _, l := range list {
		by := l.CountedBy
		l.CountedBy = nil
		line("  limit %+v", l)
		if by != nil {
			line("    counted by %+v", *by)
		}
	}
}
