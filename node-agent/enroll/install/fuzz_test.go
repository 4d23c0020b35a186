package install

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// FuzzConf chains the plugin into whatever a node's CNI configuration may be: the entry comes last and once,
// doing it again changes nothing, and taking it out leaves the other plugins as they were.
func FuzzConf(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"bridge","ipam":{"x":1}},{"type":"portmap"}]}`,
		`{"plugins":[{"type":"warren-cni"},{"type":"bridge"},{"type":"warren-cni","socket":"/old"}]}`,
		`{"cniVersion":"0.3.1","name":"n","type":"bridge"}`, `{"plugins":[]}`, `{"plugins":{}}`, `{"plugins":null,"type":"x"}`, `{"plugins":[1,"a",null]}`, `[]`, ``,
	} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	settings := cni.Settings{Type: cni.PluginType, Socket: cni.DefaultSocket, StateFile: cni.DefaultStateFile, SystemNamespace: "istio-system"}
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, "10-net.conf"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := readConf(dir)
		if err != nil {
			return
		}
		before, err := c.plugins()
		if err != nil {
			return
		}
		if _, err := c.insert(settings); err != nil {
			return
		}
		after, err := c.plugins()
		if err != nil || len(after) == 0 || !isOurs(after[len(after)-1]) {
			t.Fatalf("%s becomes %s (%v)", before, after, err)
		}
		for _, p := range after[:len(after)-1] {
			if isOurs(p) {
				t.Errorf("the entry is there twice: %s", after)
			}
		}
		c.from = ""
		if changed, err := c.insert(settings); changed || err != nil {
			t.Errorf("changed again, %v", err)
		}
		c.remove()
		left, err := c.plugins()
		if err != nil {
			t.Fatal(err)
		}
		var others []json.RawMessage
		for _, p := range before {
			if !isOurs(p) {
				others = append(others, p)
			}
		}
		if len(left) != len(others) {
			t.Fatalf("%s becomes %s", before, left)
		}
		for i := range left {
			if !equal(left[i], others[i]) {
				t.Errorf("%s becomes %s", others[i], left[i])
			}
		}
	})
}
