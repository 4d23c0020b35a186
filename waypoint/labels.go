package waypoint

import (
	"bytes"
	"slices"
	"strings"

	statsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
)

// To Envoy a label costs a text, and an entry in a table of names, for each metric of each request: with Istio's 25 that would be two
// fifths of what a request costs (BenchmarkWaypoint). So what is said of one party is one label to it, whose parts become Istio's
// labels where metrics are shown. Labels that a Telemetry changes are left apart, and those of their group with them.

// group is a label of Envoy's, and what its parts are called, of which each may be several labels.
type group struct {
	name  string
	parts [][]string
}

var groups = []group{
	{"warren_source", [][]string{
		{"reporter"}, {"connection_security_policy"}, {"source_workload"}, {"source_workload_namespace"}, {"source_canonical_service", "source_app"},
		{"source_canonical_revision", "source_version"}, {"source_principal"}, {"source_cluster"},
	}},
	{"warren_destination", [][]string{
		{"destination_service"}, {"destination_service_namespace"}, {"destination_service_name"}, {"destination_workload"}, {"destination_workload_namespace"},
		{"destination_canonical_service", "destination_app"}, {"destination_canonical_revision", "destination_version"}, {"destination_principal"}, {"destination_cluster"},
	}},
	{"warren_response", [][]string{{"response_code"}, {"grpc_response_status"}, {"response_flags"}}},
}

// partsEnd separates them. Nothing that is said of a workload has it: see [builder.readBaggage].
const partsEnd = "|"

// grouped has labels in groups, where all of a group are as they were before a Telemetry changed some.
func grouped(tags, before []*statsv3.Config_Tag) []*statsv3.Config_Tag {
	for _, g := range groups {
		var formats []string
		in := map[*statsv3.Config_Tag]bool{}
		for _, names := range g.parts {
			for i, name := range names {
				at := slices.IndexFunc(tags, func(t *statsv3.Config_Tag) bool { return t.Name == name })
				if at < 0 || !slices.Contains(before, tags[at]) || tags[at].Rules != nil || i > 0 && tags[at].ValueFormat != formats[len(formats)-1] {
					break
				}
				in[tags[at]] = true
				if i == 0 {
					formats = append(formats, tags[at].ValueFormat)
				}
			}
		}
		if len(in) < g.labels() {
			continue
		}
		tags = slices.DeleteFunc(slices.Clone(tags), func(t *statsv3.Config_Tag) bool { return in[t] })
		tags = append(tags, &statsv3.Config_Tag{Name: g.name, ValueFormat: strings.Join(formats, partsEnd)})
	}
	return tags
}

func (g group) labels() (n int) {
	for _, names := range g.parts {
		n += len(names)
	}
	return n
}

// Shown is a line of Envoy's metrics with the labels that Istio has: groups are taken apart, and no label is without a value.
// Within a value there is no quote that is not escaped.
func Shown(line []byte) []byte {
	for _, g := range groups {
		begin := bytes.Index(line, []byte(g.name+`="`))
		if begin < 1 || line[begin-1] != '{' && line[begin-1] != ',' {
			continue
		}
		value := line[begin+len(g.name)+2:]
		end := bytes.IndexByte(value, '"')
		if end < 0 {
			continue
		}
		parts := strings.Split(string(value[:end]), partsEnd)
		var out []byte
		for i, names := range g.parts {
			part := ""
			if len(parts) == len(g.parts) {
				part = parts[i]
			}
			for _, name := range names {
				out = append(append(append(append(out, name...), `="`...), part...), `",`...)
			}
		}
		line = slices.Concat(line[:begin], out[:len(out)-1], value[end+1:])
	}
	return filled(line)
}

func filled(line []byte) []byte {
	var out []byte
	for {
		i := bytes.Index(line, []byte(`=""`))
		if i < 0 {
			return append(out, line...)
		}
		label := line[:i]
		label = label[bytes.LastIndexAny(label, "{,")+1:]
		out = append(append(out, line[:i+2]...), unsaid(string(label))...)
		line = line[i+2:]
	}
}

// unsaid is what a label has where nothing is known, as Istio writes it.
func unsaid(label string) string {
	switch label {
	case "source_canonical_revision", "destination_canonical_revision":
		return "latest"
	case "response_flags":
		return "-"
	case "response_code":
		return "0"
	case "grpc_response_status":
		return ""
	}
	return "unknown"
}
