package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

// errNoConf means that the node has no network configuration (yet): its CNI has not been set up.
var errNoConf = errors.New("the node has no CNI network configuration")

// saved is appended to the name of a single-plugin configuration that ours replaces.
const saved = ".warren-saved"

// conf is the network configuration that the node's runtime uses.
type conf struct {
	path string
	list map[string]json.RawMessage // as a list, whatever it was
	from string                     // the single-plugin file it was made of, if any
}

// readConf finds the configuration that libcni takes: the first by name that can be read.
func readConf(dir string) (*conf, error) {
	all, err := readConfs(dir)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// readConfs reads all configurations, in the order of their names; there is at least one.
func readConfs(dir string) ([]*conf, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, fmt.Errorf("%w in %s: %w", errNoConf, dir, err)
	}
	var all []*conf
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if e.IsDir() || ext != ".conf" && ext != ".conflist" && ext != ".json" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			continue // gone meanwhile
		}
		var m map[string]json.RawMessage
		if json.Unmarshal(b, &m) != nil {
			continue // half written, or not what the runtime could use either
		}
		if _, ok := m["plugins"]; ok {
			all = append(all, &conf{path: path, list: m})
		} else if _, ok := m["type"]; ok && ext != ".conflist" {
			c, err := single(path, m)
			if err != nil {
				return nil, err
			}
			all = append(all, c)
		}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w in %s", errNoConf, dir)
	}
	return all, nil
}

// single makes a list of a single-plugin configuration. Version and name move up to the list.
func single(path string, m map[string]json.RawMessage) (*conf, error) {
	plugin, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	list := map[string]json.RawMessage{"plugins": json.RawMessage("[" + string(plugin) + "]")}
	for _, k := range []string{"cniVersion", "name"} {
		if v, ok := m[k]; ok {
			list[k] = v
		}
	}
	return &conf{path: strings.TrimSuffix(path, filepath.Ext(path)) + ".conflist", list: list, from: path}, nil
}

func (c *conf) plugins() ([]json.RawMessage, error) {
	var p []json.RawMessage
	if err := json.Unmarshal(c.list["plugins"], &p); err != nil {
		return nil, fmt.Errorf("read the plugins of %s: %w", c.path, err)
	}
	return p, nil
}

func isOurs(plugin json.RawMessage) bool { return typeOf(plugin) == cni.PluginType }

// typeOf is "" for what is no plugin.
func typeOf(plugin json.RawMessage) string {
	var t struct {
		Type string `json:"type"`
	}
	if json.Unmarshal(plugin, &t) != nil {
		return ""
	}
	return t.Type
}

func (c *conf) has() bool {
	p, err := c.plugins()
	return err == nil && slices.ContainsFunc(p, isOurs)
}

// insert makes the entry the last of the list, takes out those of plugins that it replaces, and reports whether it was not there
// already as it should be. The others, the version and whatever else the file says stay as they are.
func (c *conf) insert(s cni.Settings, replaces ...string) (changed bool, err error) {
	plugins, err := c.plugins()
	if err != nil {
		return false, err
	}
	if len(plugins) == 0 {
		return false, fmt.Errorf("%s has no plugins: the one that makes the pod's interface must come first", c.path)
	}
	want, err := json.Marshal(s)
	if err != nil {
		return false, err
	}
	goes := func(p json.RawMessage) bool { return isOurs(p) || slices.Contains(replaces, typeOf(p)) }
	if last := plugins[len(plugins)-1]; c.from == "" && equal(last, want) && !slices.ContainsFunc(plugins[:len(plugins)-1], goes) {
		return false, nil
	}
	if plugins = append(slices.DeleteFunc(plugins, goes), want); len(plugins) == 1 {
		return false, fmt.Errorf("%s has no plugins but %s, which Warren's replaces: the one that makes the pod's interface must come first", c.path, strings.Join(replaces, ", "))
	}
	return true, c.set(plugins)
}

// remove takes the entry out and reports whether there was one.
func (c *conf) remove() bool {
	plugins, err := c.plugins()
	if err != nil || !slices.ContainsFunc(plugins, isOurs) {
		return false
	}
	return c.set(slices.DeleteFunc(plugins, isOurs)) == nil
}

func (c *conf) set(plugins []json.RawMessage) error {
	b, err := json.Marshal(plugins)
	c.list["plugins"] = b
	return err
}

// write replaces the file in one step. A single-plugin file, which would sort before the list, is put aside
// afterwards: until then the runtime goes on with it.
func (c *conf) write() error {
	b, err := json.MarshalIndent(c.list, "", "  ")
	if err != nil {
		return err
	}
	if err := cni.WriteFile(c.path, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("chain the CNI plugin: %w", err)
	}
	if c.from != "" {
		if err := os.Rename(c.from, c.from+saved); err != nil {
			return fmt.Errorf("chain the CNI plugin: %w", err)
		}
	}
	return nil
}

// restore writes the list without the entry, or brings the single-plugin file back that it was made of.
func (c *conf) restore() error {
	base := strings.TrimSuffix(c.path, ".conflist")
	for _, ext := range []string{".conf", ".json"} {
		if _, err := os.Stat(base + ext + saved); err != nil {
			continue
		}
		if err := os.Rename(base+ext+saved, base+ext); err != nil {
			return fmt.Errorf("restore %s: %w", base+ext, err)
		}
		if err := os.Remove(c.path); err != nil {
			return fmt.Errorf("restore %s: %w", base+ext, err)
		}
		return nil
	}
	return c.write()
}

func equal(a, b json.RawMessage) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var x, y any
	return json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}
