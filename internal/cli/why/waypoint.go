package why

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/warrenmesh/warren/internal/cli/envoy"
	"github.com/warrenmesh/warren/internal/mesh"
)

// waypoint follows a request through a waypoint and on to the endpoints that its Envoy has.
func (q *Question) waypoint(src *mesh.Workload, r mesh.Route, e *End, add func(Step)) {
	here := r.Workload.Node
	unknown := func(what, hint string) {
		e.Steps = append(e.Steps, Step{Stage: "waypoint", Node: here, Result: "warning", What: what, Hint: hint})
		if e.Outcome == Allowed {
			e.Outcome = Unknown
		}
	}
	var held *envoy.Config
	if q.Waypoint != nil {
		held = q.Waypoint(r.Workload)
	}
	if held == nil {
		unknown("the Envoy of "+name(r.Workload)+" could not be asked what it does", "this needs the right to forward a port to it")
		return
	}
	ask := q.Request
	ask.Dst, ask.Source, ask.Principal = q.Dst, address(src, q.Dst.Addr()), src.Identity.String()
	if ask.Host == "" {
		ask.Host = q.Dst.String()
		if r.Service != nil {
			ask.Host = r.Service.Name.Hostname
			if q.Dst.Port() != 80 {
				ask.Host += ":" + strconv.Itoa(int(q.Dst.Port()))
			}
		}
	}
	out := held.Decide(ask)
	what := "the connection"
	if out.HTTP {
		what = ask.Method + " " + ask.Path + " for " + ask.Host
	}
	for _, u := range out.Unknown {
		unknown(what+": "+u, "")
	}
	s := Step{Stage: "waypoint", Node: here, Result: "ok", What: what + ": " + out.Why}
	if out.Policy != "" {
		s.Object, s.Rule = "AuthorizationPolicy "+out.Policy, out.Rule
	}
	switch {
	case len(out.Unknown) > 0 && !out.Allowed && out.Policy == "" && out.Status == 0: // nothing was decided
		return
	case out.Status >= 400:
		s.Result, s.What = "refused", s.What+", with "+strconv.Itoa(out.Status)
	case !out.Allowed && out.Status > 0:
		s.What += ", with " + strconv.Itoa(out.Status)
	case !out.Allowed:
		s.Result = "refused"
		s.Hint = map[bool]string{true: "change the policy, or exempt the client in it", false: "add a rule for this client to an ALLOW policy of the service"}[out.Policy != ""]
		if out.HTTP {
			s.What += ", with 403"
		}
	}
	add(s)
	if s.Result == "refused" || len(out.To) == 0 {
		return
	}
	for _, l := range out.Limits {
		whose := "all clients"
		if l.Clients {
			whose = "each client"
		}
		by := "each pod of the waypoint"
		if l.Together {
			by = "all pods together, as a service counts"
		}
		add(Step{Stage: "waypoint", Node: here, Result: "ok", Object: "RateLimit " + path.Dir(l.Name),
			What: fmt.Sprintf("%d requests of %s are let through in %s by %s, more are refused with 429", l.Requests, whose, l.Per, by)})
	}
	var ends []End
	for _, to := range out.To {
		ends = append(ends, q.behind(r.Workload, here, to, len(out.To) > 1, held)...)
	}
	var outcomes []Outcome
	for _, x := range ends {
		e.Steps = append(e.Steps, x.Steps...)
		outcomes = append(outcomes, x.Outcome)
	}
	if e.Outcome != Allowed {
		return
	}
	if e.Outcome = outcomes[0]; slices.ContainsFunc(outcomes, func(o Outcome) bool { return o != outcomes[0] }) {
		e.Outcome = Depends
	}
}

// behind are the endpoints of a cluster, each with what its node says of the waypoint that comes.
func (q *Question) behind(way *mesh.Workload, here string, to envoy.Target, share bool, held *envoy.Config) []End {
	route := Step{Stage: "route", Node: here, Result: "ok", What: "to " + to.Cluster}
	if share {
		route.What += ", with the weight " + strconv.Itoa(to.Weight)
	}
	first := End{Outcome: Allowed, Steps: []Step{route}}
	out := []End{}
	endpoints := held.Endpoints(to.Cluster)
	for _, at := range sorted(endpoints) {
		x := End{Outcome: Allowed}
		add := func(s Step) {
			if s.Result == "refused" {
				x.Outcome = Refused
			}
			x.Steps = append(x.Steps, s)
		}
		app, err := netip.ParseAddrPort(at)
		if err != nil {
			x.Outcome = Unknown
			x.Steps = append(x.Steps, Step{Stage: "route", Node: here, Result: "warning", What: at + " is no address that could be followed"})
			out = append(out, x)
			continue
		}
		w := q.Client.Mesh.WorkloadAt(mesh.NetAddr{Network: way.Network, Addr: app.Addr()})
		switch {
		case !endpoints[at]: // a healthy one is preferred, and where there is none the request is refused
			continue
		case w == nil:
			add(Step{Stage: "route", Node: here, Result: "ok", What: fmt.Sprintf("%s is not of the mesh", at)})
		case w.Tunnel == mesh.TunnelNone:
			add(Step{Stage: "policy", Node: dash(w.Node), Result: "ok", What: name(w) + " at " + at + " is not captured: no policy of the mesh applies at it"})
		default:
			q.policy(way, mesh.Route{Kind: mesh.RouteHBONE, Workload: w, Authority: app}, app, true, &x, add)
			for i := range x.Steps {
				x.Steps[i].What = name(w) + " at " + at + ", from the waypoint: " + x.Steps[i].What
			}
		}
		out = append(out, x)
	}
	if len(out) == 0 {
		first.Outcome = Refused
		first.Steps = append(first.Steps, Step{Stage: "route", Node: here, Result: "refused", What: "the waypoint has no endpoint there that works: it answers 503", Hint: "warren proxy-config endpoints, and the readiness of the pods"})
		return []End{first}
	}
	out[0].Steps = append(first.Steps, out[0].Steps...)
	return out
}

func sorted(m map[string]bool) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.SortFunc(out, strings.Compare)
	return out
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
