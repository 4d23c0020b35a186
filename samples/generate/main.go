// Command generate writes the dashboards into the manifest of Grafana.
//
//go:generate go run . -out ../addons/grafana.yaml
package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
)

// base is the manifest without the dashboards.
//
//go:embed grafana.yaml
var base string

func main() {
	out := flag.String("out", "", "file to write")
	flag.Parse()
	if err := run(*out); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run(out string) error {
	var b bytes.Buffer
	b.WriteString("# Made by go generate ./samples/...: edit samples/generate.\n")
	b.WriteString(base)
	b.WriteString("---\n# The dashboards. Grafana reads them again when they change.\napiVersion: v1\nkind: ConfigMap\n" +
		"metadata: {name: grafana-dashboards, namespace: istio-system, labels: {app: grafana}}\ndata:\n")
	for _, d := range dashboards {
		text, err := json.MarshalIndent(d.json(), "", " ")
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "  %s.json: |\n    %s\n", d.uid, strings.ReplaceAll(string(text), "\n", "\n    "))
	}
	return os.WriteFile(out, b.Bytes(), 0o644)
}

// dashboard is a page of Grafana.
type dashboard struct {
	uid, title, about string
	variables         []variable
	rows              []row
}

// variable is a choice above the page: the values of a label.
type variable struct {
	name, label string
	values      string // label_values(...)
}

// row is a line of panels of the same width under a heading.
type row struct {
	title  string
	panels []panel
}

// panel is a diagram of some queries, or one figure.
type panel struct {
	title, about, unit string
	stat               bool
	queries            []query
}

// query is an expression and how its series are called.
type query struct{ expr, legend string }

type object = map[string]any

// columns is the width of Grafana's grid.
const columns = 24

func (d dashboard) json() object {
	source := object{"type": "prometheus", "uid": "${datasource}"}
	list := []any{object{"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}}
	for _, v := range d.variables {
		list = append(list, object{
			"name": v.name, "label": v.label, "type": "query", "datasource": source, "query": object{"query": v.values, "refId": "variable"},
			"definition": v.values, "refresh": 2, "sort": 1, "includeAll": true, "allValue": ".*", "multi": true,
			"current": object{"text": "All", "value": "$__all"},
		})
	}
	panels := []any{}
	y, id := 0, 0
	for _, r := range d.rows {
		id++
		panels = append(panels, object{"id": id, "type": "row", "title": r.title, "collapsed": false, "gridPos": object{"x": 0, "y": y, "w": columns, "h": 1}, "panels": []any{}})
		y++
		width, height := columns/len(r.panels), 8
		if r.panels[0].stat {
			height = 4
		}
		for i, p := range r.panels {
			id++
			targets := []any{}
			for j, q := range p.queries {
				targets = append(targets, object{"refId": string(rune('A' + j)), "datasource": source, "expr": q.expr, "legendFormat": q.legend, "instant": p.stat, "range": !p.stat})
			}
			kind, options := "timeseries", object{"legend": object{"displayMode": "list", "placement": "bottom", "showLegend": true}, "tooltip": object{"mode": "multi", "sort": "desc"}}
			if p.stat {
				kind, options = "stat", object{"reduceOptions": object{"calcs": []string{"lastNotNull"}, "fields": "", "values": false}, "colorMode": "value", "graphMode": "none"}
			}
			panels = append(panels, object{
				"id": id, "type": kind, "title": p.title, "description": p.about, "datasource": source, "targets": targets, "options": options,
				"gridPos":     object{"x": i * width, "y": y, "w": width, "h": height},
				"fieldConfig": object{"defaults": object{"unit": p.unit, "min": 0}, "overrides": []any{}},
			})
		}
		y += height
	}
	return object{
		"uid": d.uid, "title": d.title, "description": d.about, "tags": []string{"warren"}, "schemaVersion": 39, "version": 1, "editable": true,
		"time": object{"from": "now-30m", "to": "now"}, "refresh": "15s", "timezone": "browser", "graphTooltip": 1,
		"templating": object{"list": list}, "panels": panels, "annotations": object{"list": []any{}},
		"links": []any{object{"type": "dashboards", "tags": []string{"warren"}, "title": "Warren", "asDropdown": true, "keepTime": true, "includeVars": true}},
	}
}
