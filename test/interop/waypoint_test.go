package interop

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// TestEnvoyLoadsGoldens has Envoy check every configuration that package waypoint is tested with. What is fetched over
// xDS is put in its place, since Envoy fetches nothing to check.
func TestEnvoyLoadsGoldens(t *testing.T) {
	bin := envoyBinary(t)
	files, err := filepath.Glob("../../waypoint/testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no golden files: ", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "envoy.json")
			if err := os.WriteFile(path, inPlace(t, file), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.CommandContext(t.Context(), bin, "--mode", "validate", "--disable-hot-restart", "--concurrency", "1", "-l", "error", "-c", path).CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, bytes.TrimSpace(out))
			}
		})
	}
}

type object = map[string]any

// goldenFile is a waypoint's resources.
type goldenFile struct{ Listeners, Routes, Clusters, Endpoints, Extensions, Secrets []object }

// static puts what is fetched where Envoy has it from the beginning: endpoints in the clusters, and route tables and filters
// by name.
func static(t testing.TB, g goldenFile) (clusters []object, routes, extensions object) {
	t.Helper()
	endpoints := object{}
	routes, extensions = object{}, object{}
	for _, r := range g.Routes {
		// Envoy checks clusters that a table in its place names, and those of another listener come later.
		routes[r["name"].(string)] = r
	}
	for _, e := range g.Endpoints {
		endpoints[e["clusterName"].(string)] = e
	}
	for _, c := range g.Clusters {
		if c["type"] == "EDS" {
			c["type"] = "STATIC"
			c["loadAssignment"] = endpoints[c["edsClusterConfig"].(object)["serviceName"].(string)]
			delete(c, "edsClusterConfig")
			if c["loadAssignment"] == nil {
				t.Errorf("cluster %s has no endpoints resource", c["name"])
			}
		}
	}
	for _, e := range g.Extensions {
		extensions[e["name"].(string)] = e["typedConfig"]
	}
	agent := object{"name": "agent", "type": "STATIC", "load_assignment": object{"cluster_name": "agent", "endpoints": []any{
		object{"lb_endpoints": []any{object{"endpoint": object{"address": object{"pipe": object{"path": "/nowhere"}}}}}},
	}}}
	return append(g.Clusters, agent), routes, extensions
}

// inPlace makes a bootstrap of a golden file.
func inPlace(t testing.TB, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return placed(t, b)
}

// placed makes a bootstrap of resources by kind.
func placed(t testing.TB, b []byte) []byte {
	t.Helper()
	var g goldenFile
	if err := yaml.Unmarshal(b, &g); err != nil {
		t.Fatal(err)
	}
	clusters, routes, extensions := static(t, g)
	inline(t, g.Listeners, routes, extensions)
	inlineSecrets(t, g.Listeners, g.Secrets)
	inlineSecrets(t, clusters, g.Secrets)
	out, err := json.Marshal(object{
		"node": object{"id": "test", "cluster": "test"},
		"bootstrap_extensions": []any{object{"name": "envoy.bootstrap.internal_listener", "typed_config": object{
			"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener"}}},
		"static_resources": object{"listeners": g.Listeners, "clusters": clusters, "secrets": g.Secrets},
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// inlineSecrets has what comes from the control plane be there.
func inlineSecrets(t testing.TB, v any, secrets []object) {
	switch v := v.(type) {
	case []object:
		for _, e := range v {
			inlineSecrets(t, e, secrets)
		}
	case []any:
		for _, e := range v {
			inlineSecrets(t, e, secrets)
		}
	case object:
		if source, ok := v["sdsConfig"].(object); ok && source["ads"] != nil {
			if !slices.ContainsFunc(secrets, func(s object) bool { return s["name"] == v["name"] }) {
				t.Errorf("there is no secret %v", v["name"])
			}
			delete(v, "sdsConfig")
		}
		for _, e := range v {
			inlineSecrets(t, e, secrets)
		}
	}
}

// inline replaces references to route tables and filters by what they refer to.
func inline(t testing.TB, v any, routes, extensions object) {
	switch v := v.(type) {
	case []object:
		for _, e := range v {
			inline(t, e, routes, extensions)
		}
	case []any:
		for _, e := range v {
			inline(t, e, routes, extensions)
		}
	case object:
		delete(v, "sharingName") // an Envoy 1.40 that only validates crashes by it when it ends, after it has said that all is well
		if rds, ok := v["rds"].(object); ok {
			table := routes[rds["routeConfigName"].(string)]
			if table == nil {
				t.Errorf("there is no route table %v", rds["routeConfigName"])
			}
			delete(v, "rds")
			v["routeConfig"] = table
		}
		if _, ok := v["configDiscovery"]; ok {
			delete(v, "configDiscovery")
			if v["typedConfig"] = extensions[v["name"].(string)]; v["typedConfig"] == nil {
				t.Errorf("there is no filter %v", v["name"])
			}
		}
		for _, e := range v {
			inline(t, e, routes, extensions)
		}
	}
}
