package waypoint

import (
	"slices"
	"strings"
	"testing"

	statsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
)

func TestShownLabels(t *testing.T) {
	for in, want := range map[string]string{
		`r{source_app="",a="=",response_flags="",grpc_response_status="",source_canonical_revision=""} 1`: `r{source_app="unknown",a="=",response_flags="-",grpc_response_status="",source_canonical_revision="latest"} 1`,
		`r{warren_response="200||-"} 1`:                       `r{response_code="200",grpc_response_status="",response_flags="-"} 1`,
		`r{a="b",warren_response="0|7|UF",c="d"} 1`:           `r{a="b",response_code="0",grpc_response_status="7",response_flags="UF",c="d"} 1`,
		`r{warren_response="200|-"} 1`:                        `r{response_code="0",grpc_response_status="",response_flags="-"} 1`,
		`r{x="warren_response=",not_warren_response="a|b"} 1`: `r{x="warren_response=",not_warren_response="a|b"} 1`,
		`r{warren_source="waypoint|mutual_tls|ui-v7|shop|ui|v7||Kubernetes"} 2`: `r{reporter="waypoint",connection_security_policy="mutual_tls",source_workload="ui-v7",source_workload_namespace="shop",` +
			`source_canonical_service="ui",source_app="ui",source_canonical_revision="v7",source_version="v7",source_principal="unknown",source_cluster="Kubernetes"} 2`,
	} {
		if got := string(Shown([]byte(in))); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

// Whatever is grouped is shown again under the names that it had, and what was changed is left as it is.
func TestGroupedLabels(t *testing.T) {
	var before []*statsv3.Config_Tag
	for _, g := range groups {
		for _, names := range g.parts {
			for _, n := range names {
				before = append(before, &statsv3.Config_Tag{Name: n, ValueFormat: "%" + names[0] + "%"})
			}
		}
	}
	show := func(tags []*statsv3.Config_Tag) (out []string) {
		var line []string
		for _, t := range tags {
			line = append(line, t.Name+`="`+t.ValueFormat+`"`)
		}
		text := string(Shown([]byte("m{" + strings.Join(line, ",") + "} 1")))
		return strings.Split(strings.TrimSuffix(strings.TrimPrefix(text, "m{"), "} 1"), ",")
	}
	all := grouped(before, before)
	if len(all) != len(groups) {
		t.Errorf("%d labels are left, want %d", len(all), len(groups))
	}
	shown := show(all)
	if len(shown) != len(before) {
		t.Errorf("%d labels are shown, want %d: %v", len(shown), len(before), shown)
	}
	for _, tag := range before {
		if !slices.Contains(shown, tag.Name+`="`+tag.ValueFormat+`"`) {
			t.Errorf("%s is not among %v", tag.Name, shown)
		}
	}
	set := append(append([]*statsv3.Config_Tag{}, before[1:]...), &statsv3.Config_Tag{Name: before[0].Name, ValueFormat: "mine"})
	shown = show(grouped(set, before))
	if len(shown) != len(before) || !slices.Contains(shown, before[0].Name+`="mine"`) || !slices.Contains(shown, before[3].Name+`="`+before[3].ValueFormat+`"`) {
		t.Errorf("with one that was set: %v", shown)
	}
	if shown = show(grouped(before[1:], before)); len(shown) != len(before)-1 {
		t.Errorf("without one: %v", shown)
	}
}
