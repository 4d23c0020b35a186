package proxy

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warrenmesh/warren/results"
)

func TestTheLowestLimitAboveAProcessIsFound(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) {
		t.Helper()
		name = filepath.Join(dir, name)
		check(t, os.MkdirAll(filepath.Dir(name), 0o755))
		check(t, os.WriteFile(name, []byte(text), 0o644))
	}
	for _, tc := range []struct {
		name, groups, mounts string
		files                map[string]string
		limit                int64
		short                bool
	}{
		{"version 2, a container that sees its own cgroup", "0::/\n", "31 23 0:28 / %s rw - cgroup2 cgroup2 rw\n",
			map[string]string{"memory.max": "800\n", "memory.current": "601\n", "memory.stat": "anon 1\ninactive_file 0\n"}, 800, true},
		{"version 2, beside the node's", "0::/\n", "30 23 0:27 /../../.. %s/host rw - cgroup2 cgroup2 rw\n31 23 0:28 / %s rw - cgroup2 cgroup2 rw\n",
			map[string]string{"memory.max": "800\n", "memory.current": "600\n", "host/memory.max": "10\n", "host/memory.current": "10\n"}, 800, false},
		{"version 2, the limit is above", "0::/pods/x/agent\n", "31 23 0:28 / %s rw shared:1 - cgroup2 cgroup2 rw\n",
			map[string]string{"pods/x/agent/memory.max": "max\n", "pods/x/memory.max": "800\n", "pods/memory.max": "4000\n", "pods/x/memory.current": "700\n", "pods/memory.current": "0\n",
				"pods/x/memory.stat": "anon 600\ninactive_file 90\nactive_file 20\n"}, 800, false},
		{"version 2, none", "0::/pods\n", "31 23 0:28 / %s rw - cgroup2 cgroup2 rw\n", map[string]string{"pods/memory.max": "max\n", "pods/memory.current": "700\n"}, 0, false},
		{"version 1", "4:cpu:/\n3:memory:/pods/x\n0::/\n", "30 23 0:27 / /cpu rw - cgroup cgroup rw,cpu\n31 23 0:28 /pods %s rw - cgroup cgroup rw,memory\n",
			map[string]string{"x/memory.limit_in_bytes": "800\n", "x/memory.usage_in_bytes": "700\n", "memory.limit_in_bytes": "9223372036854771712\n", "memory.usage_in_bytes": "0\n",
				"x/memory.stat": "inactive_file 700\ntotal_inactive_file 99\n"}, 800, true},
		{"nothing is known", "", "", nil, 0, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			check(t, os.RemoveAll(dir))
			file("self/cgroup", tc.groups)
			file("self/mountinfo", strings.ReplaceAll(tc.mounts, "%s", dir))
			for name, text := range tc.files {
				file(name, text)
			}
			c := OwnCeiling(filepath.Join(dir, "self"))
			defer c.Close()
			if c.Limit() != tc.limit || c.Short() != tc.short {
				t.Errorf("limit %d, used %d, short %t; want %d and %t", c.Limit(), c.Used(), c.Short(), tc.limit, tc.short)
			}
		})
	}
	var none *Ceiling
	if none.Short() || none.Limit() != 0 || none.Used() != 0 || none.Close() != nil {
		t.Error("nil is no ceiling")
	}
}

const limited = "WARREN_PROXY_TEST_LIMITED"

// Under a limit of memory new connections are refused, and those that are open go on: the kernel has no reason to kill
// the agent. Agents, applications and clients are in one process here, which the limit is for; its parent sees how it ends.
func TestUnderAMemoryLimitNewConnectionsAreRefused(t *testing.T) {
	if os.Getenv(limited) != "" {
		underALimit(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root: cgroups")
	}
	limit := 192 << 20
	if raceEnabled {
		limit = 768 << 20
	}
	group := memoryCgroup(t, limit)
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=5m", fmt.Sprintf("-long=%t", *long))
	cmd.Env = append(os.Environ(), limited+"="+group)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("the process under the limit: %v", err)
	}
	if !bytes.Contains(out, []byte("are refused")) {
		t.Error("it has not come to the end")
	}
}

// memoryCgroup makes a cgroup with a limit, below this process's.
func memoryCgroup(t *testing.T, limit int) string {
	groups, err := os.ReadFile("/proc/self/cgroup")
	check(t, err)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if f[1] != "memory" {
			continue
		}
		if mount, dir := cgroupDir(string(mounts), "cgroup", f[2]); mount != "" {
			group, err := os.MkdirTemp(dir, "warren-proxy-")
			check(t, err)
			t.Cleanup(func() { eventually(t, "the cgroup is removed", func() bool { return os.Remove(group) == nil }) })
			check(t, os.WriteFile(filepath.Join(group, "memory.limit_in_bytes"), []byte(strconv.Itoa(limit)), 0))
			return group
		}
	}
	t.Skip("the memory controller is not one of version 1: this process's threads, which act for pods, could not be in a cgroup with it")
	return ""
}

func underALimit(t *testing.T) {
	check(t, os.WriteFile(filepath.Join(os.Getenv(limited), "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0))
	ceiling := OwnCeiling("/proc/self")
	ceiling.HoldHeap()
	l := newLab(t, configured(func(c *Config) { c.Ceiling = ceiling }))
	cat := l.pods["catalog-1"]
	cat.listen(appPort, func(c *net.TCPConn) { io.WriteString(c, "!"); echo(c) })
	to := netip.AddrPortFrom(cat.v4, appPort)
	hello := func() (*net.TCPConn, error) {
		c, err := l.pods["ui"].dial(to)
		if err == nil {
			c.SetDeadline(time.Now().Add(plenty))
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		return c, err
	}
	var open []*net.TCPConn
	for range 20 {
		c, err := hello()
		check(t, err)
		defer c.Close()
		open = append(open, c)
	}
	clients := 5000
	if *long {
		clients = 20000
	}
	crowd, err := l.pods["ui"].start(order{To: to.String(), Clients: clients})
	check(t, err)
	a, err := crowd.report()
	check(t, err)
	used := ceiling.read()
	failures := 0
	if a.Served < 50 || a.Refused < clients/10 {
		failures++
		t.Errorf("%+v, want some served and others refused", a)
	}
	l.spared(open)
	_, err = crowd.end()
	check(t, err)
	eventually(t, "new connections are taken again", func() bool {
		c, err := hello()
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	debug.SetMemoryLimit(1 << 62)
	t.Logf("with %d of %d MiB used, of %d connections %d are served and %d are refused", used>>20, ceiling.Limit()>>20, clients, a.Served, a.Refused)
	check(t, results.Record("limits",
		results.Row{Name: "too little memory: new connections refused, with a limit of 192 MiB for both agents, applications and clients; used", Inputs: a.Refused, Failures: failures, Figure: float64(used >> 20), Unit: "MiB"},
		results.Row{Name: "too little memory: open connections that go on", Inputs: len(open), Failures: 0, Figure: float64(len(open)), Unit: ""}))
}
