package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/node-agent/enroll/cni"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const conflist = `{"cniVersion":"0.4.0","name":"cbr0","disableCheck":true,"plugins":[
 {"type":"bridge","bridge":"cni0","ipam":{"type":"host-local"}},{"type":"portmap","capabilities":{"portMappings":true}}]}`

type nodeDirs struct {
	*Installer
	t *testing.T
}

func newNode(t *testing.T) *nodeDirs {
	dir := t.TempDir()
	bin := filepath.Join(dir, "image", "warren-cni")
	os.MkdirAll(filepath.Dir(bin), 0o755)
	if err := os.WriteFile(bin, []byte("binary 1"), 0o755); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(filepath.Join(dir, "net.d"), 0o755)
	return &nodeDirs{t: t, Installer: New(Config{
		Binary: bin, BinDir: filepath.Join(dir, "bin"), ConfDir: filepath.Join(dir, "net.d"), Interval: 10 * time.Millisecond,
		Settings: cni.Settings{Socket: "/run/s", SystemNamespace: "istio-system"},
	})}
}

func (n *nodeDirs) put(name, content string) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(n.cfg.ConfDir, name), []byte(content), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

// types returns the plugins of the configuration that the runtime uses, and the file it is in.
func (n *nodeDirs) types() ([]string, string) {
	n.t.Helper()
	c, err := readConf(n.cfg.ConfDir)
	if err != nil {
		return nil, ""
	}
	ps, err := c.plugins()
	if err != nil {
		n.t.Fatal(err)
	}
	var out []string
	for _, p := range ps {
		var m struct{ Type string }
		json.Unmarshal(p, &m)
		out = append(out, m.Type)
	}
	return out, filepath.Base(c.path)
}

func (n *nodeDirs) binaryThere() bool { _, err := os.Stat(n.target()); return err == nil }

// Istio leaves its plugin in the list when its DaemonSet leaves a node. Who replaces it takes it out, and nobody else does.
func TestThePluginReplacesAnother(t *testing.T) {
	const with = `{"cniVersion":"0.4.0","name":"cbr0","plugins":[{"type":"bridge"},{"type":"istio-cni","plugin_log_level":"info"},{"type":"portmap"}]}`
	n := newNode(t)
	n.put("10-flannel.conflist", with)
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	if got, _ := n.types(); !slices.Equal(got, []string{"bridge", "istio-cni", "portmap", "warren-cni"}) {
		t.Errorf("what it does not replace is %v", got)
	}
	n.cfg.Replaces = []string{"istio-cni"}
	for range 2 {
		if err := n.Install(); err != nil {
			t.Fatal(err)
		}
		if got, _ := n.types(); !slices.Equal(got, []string{"bridge", "portmap", "warren-cni"}) {
			t.Errorf("replaced: %v", got)
		}
	}
	n.put("10-flannel.conflist", `{"cniVersion":"0.4.0","name":"x","plugins":[{"type":"istio-cni"}]}`)
	if err := n.Install(); err == nil {
		t.Error("a list without a plugin that makes the interface is written")
	}
}

func TestThePluginIsChainedAndTakenOut(t *testing.T) {
	n := newNode(t)
	if err := n.Install(); !errors.Is(err, errNoConf) {
		t.Fatalf("without a configuration: %v", err)
	}
	n.put("10-flannel.conflist", conflist)
	n.put("99-later.conflist", `{"cniVersion":"1.0.0","name":"later","plugins":[{"type":"macvlan"}]}`)
	n.put("05-notes.txt", "not a configuration")
	n.put("06-broken.conf", "{")
	for range 2 {
		if err := n.Install(); err != nil {
			t.Fatal(err)
		}
		got, file := n.types()
		if !slices.Equal(got, []string{"bridge", "portmap", "warren-cni"}) || file != "10-flannel.conflist" {
			t.Fatalf("%v in %s", got, file)
		}
	}
	b, _ := os.ReadFile(filepath.Join(n.cfg.ConfDir, "10-flannel.conflist"))
	var have, was map[string]any
	if err := errors.Join(json.Unmarshal(b, &have), json.Unmarshal([]byte(conflist), &was)); err != nil {
		t.Fatal(err)
	}
	if have["cniVersion"] != "0.4.0" || have["name"] != "cbr0" || have["disableCheck"] != true {
		t.Errorf("the rest of the file changed: %s", b)
	}
	if st, err := os.Stat(n.target()); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("binary: %v, %v", st, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Uninstall(ctx); err != nil {
		t.Fatal(err)
	}
	if got, _ := n.types(); !slices.Equal(got, []string{"bridge", "portmap"}) || n.binaryThere() {
		t.Errorf("after uninstall: %v, binary %v", got, n.binaryThere())
	}
	if err := n.Uninstall(ctx); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestASinglePluginBecomesAListAndIsBroughtBack(t *testing.T) {
	n := newNode(t)
	const single = `{"cniVersion":"0.3.1","name":"net","type":"bridge","bridge":"b0"}`
	n.put("10-net.conf", single)
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	if got, file := n.types(); !slices.Equal(got, []string{"bridge", "warren-cni"}) || file != "10-net.conflist" {
		t.Fatalf("%v in %s", got, file)
	}
	n.put("10-net.conf", single) // its owner writes it again
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	if got, file := n.types(); !slices.Equal(got, []string{"bridge", "warren-cni"}) || file != "10-net.conflist" {
		t.Fatalf("%v in %s", got, file)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Uninstall(ctx); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(n.cfg.ConfDir, "10-net.conf"))
	if err != nil || string(b) != single {
		t.Errorf("brought back %q, %v", b, err)
	}
	if e, _ := os.ReadDir(n.cfg.ConfDir); len(e) != 1 {
		t.Errorf("%d files left", len(e))
	}
}

func TestAnOverwrittenConfigurationIsChainedAgain(t *testing.T) {
	n := newNode(t)
	n.put("10-flannel.conflist", conflist)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); n.Run(ctx) }()
	defer func() { cancel(); <-done }()
	chained := func() bool { got, _ := n.types(); return slices.Contains(got, "warren-cni") && n.binaryThere() }
	eventually(t, chained)
	n.put("10-flannel.conflist", conflist)
	eventually(t, chained)
	n.put("01-first.conflist", `{"cniVersion":"1.0.0","name":"first","plugins":[{"type":"ptp"}]}`)
	eventually(t, func() bool {
		got, file := n.types()
		return file == "01-first.conflist" && slices.Equal(got, []string{"ptp", "warren-cni"})
	})
	os.Remove(n.target())
	eventually(t, n.binaryThere)
	if err := cni.WriteFile(n.cfg.Binary, []byte("binary 2"), 0o755); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { b, _ := os.ReadFile(n.target()); return string(b) == "binary 2" })
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not within 30 s")
		}
	}
}

// A network plugin that wants no other beside it is named, once, and not with each time that the entry is written.
func TestWhoTakesTheEntryOutAgainAndAgainIsNamed(t *testing.T) {
	n := newNode(t)
	var log bytes.Buffer
	n.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	for range 3 * contested {
		n.put("05-cilium.conflist", conflist)
		if err := n.Install(); err != nil {
			t.Fatal(err)
		}
		if got, _ := n.types(); !slices.Contains(got, "warren-cni") {
			t.Fatalf("it is given up: %v", got)
		}
	}
	if said := strings.Count(log.String(), "again and again"); said != 1 {
		t.Errorf("it is said %d times:\n%s", said, log.String())
	}
	if said := strings.Count(log.String(), "CNI plugin chained"); said >= contested {
		t.Errorf("%d lines about what is written anew", said)
	}
	if got := n.wrote(time.Now().Add(2 * contestedWithin)); got != 1 {
		t.Errorf("%d times lately, after a quiet time", got)
	}
}

func TestUninstallTakesTheEntryOutOfEveryConfiguration(t *testing.T) {
	n := newNode(t)
	n.put("10-flannel.conflist", conflist)
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	n.put("01-first.conflist", conflist) // hides the other, which would show again when this one is removed
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Uninstall(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"01-first.conflist", "10-flannel.conflist"} {
		b, _ := os.ReadFile(filepath.Join(n.cfg.ConfDir, name))
		if len(b) == 0 || slices.Contains([]byte(string(b)), 0) || containsPlugin(b) {
			t.Errorf("%s still names the plugin: %s", name, b)
		}
	}
}

// A directory of plugins that cannot be written to has none of ours in it, and the node is clean.
func TestUninstallWhereNothingCouldBeInstalled(t *testing.T) {
	n := newNode(t)
	if err := os.MkdirAll(n.cfg.BinDir, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the mounts end with the thread
		done <- func() error {
			if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS|unix.CLONE_FS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
				unix.Mount("none", n.cfg.BinDir, "tmpfs", unix.MS_RDONLY, "")); err != nil {
				return err
			}
			if err := os.Remove(n.target()); !errors.Is(err, unix.EROFS) {
				return fmt.Errorf("the directory is not read-only: %w", err)
			}
			return n.Uninstall(ctx)
		}()
	}()
	if err := <-done; errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		t.Skip("needs root")
	} else if err != nil {
		t.Error(err)
	}
}

func containsPlugin(b []byte) bool {
	var c struct{ Plugins []json.RawMessage }
	json.Unmarshal(b, &c)
	return slices.ContainsFunc(c.Plugins, isOurs)
}

func TestAMissingBinaryIsRepairedFirst(t *testing.T) {
	n := newNode(t)
	if err := n.Repair(); err != nil || n.binaryThere() {
		t.Fatalf("nothing to repair: %v, binary %v", err, n.binaryThere())
	}
	n.put("10-flannel.conflist", conflist)
	if err := n.Repair(); err != nil || n.binaryThere() {
		t.Fatalf("not chained: %v, binary %v", err, n.binaryThere())
	}
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(n.cfg.BinDir)
	if err := New(n.cfg).Repair(); err != nil || !n.binaryThere() {
		t.Fatalf("%v, binary %v", err, n.binaryThere())
	}
}

func TestAVersionWithTheSameTimeAndSizeReplacesTheBinary(t *testing.T) {
	n := newNode(t)
	n.put("10-flannel.conflist", conflist)
	stamp := time.Unix(0, 0)
	os.Chtimes(n.cfg.Binary, stamp, stamp)
	if err := n.Install(); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(n.cfg.Binary, []byte("binary 2"), 0o755)
	os.Chtimes(n.cfg.Binary, stamp, stamp)
	if err := New(n.cfg).Install(); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(n.target()); string(b) != "binary 2" {
		t.Errorf("on the node: %q", b)
	}
}
