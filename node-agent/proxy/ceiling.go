package proxy

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Ceiling is the memory that this process's cgroups leave it. A kernel that finds it above that kills it, and with it
// every connection of the node; so new work is refused before. Nil and the zero value are none.
type Ceiling struct {
	limit   int64    // bytes
	current *os.File // what is used, of the cgroup that has the limit
	stat    string   // what of that are files that the kernel drops when it needs the memory

	readAt  atomic.Int64 // since started, in ns
	used    atomic.Int64
	freedAt atomic.Int64
}

// While there is new work.
const (
	ceilingEvery = 10 * time.Millisecond // the use is looked at
	freeEvery    = time.Second           // a full heap is looked through for what can go
)

var started = time.Now()

// OwnCeiling finds the lowest limit of the cgroups of the process whose directory in /proc is given, of version 2 or 1.
func OwnCeiling(proc string) *Ceiling {
	groups, _ := os.ReadFile(filepath.Join(proc, "cgroup"))
	mounts, _ := os.ReadFile(filepath.Join(proc, "mountinfo"))
	c := &Ceiling{}
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || f[1] != "" && f[1] != "memory" {
			continue
		}
		fs, limit, current := "cgroup2", "memory.max", "memory.current"
		if f[1] != "" {
			fs, limit, current = "cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes"
		}
		mount, dir := cgroupDir(string(mounts), fs, f[2])
		for ; mount != "" && strings.HasPrefix(dir, mount); dir = filepath.Dir(dir) {
			b, err := os.ReadFile(filepath.Join(dir, limit))
			n, bad := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64) // or "max"
			if err != nil || bad != nil || n >= math.MaxInt64>>1 || c.limit > 0 && n >= c.limit {
				continue
			}
			if file, err := os.Open(filepath.Join(dir, current)); err == nil {
				_ = c.Close()
				c.limit, c.current, c.stat = n, file, filepath.Join(dir, "memory.stat")
			}
		}
	}
	return c
}

// cgroupDir is where a hierarchy is mounted that has the cgroup, and the cgroup's directory there. For version 1 the
// hierarchy is the one with the memory controller.
func cgroupDir(mountinfo, fs, group string) (mount, dir string) {
	for line := range strings.Lines(mountinfo) {
		place, kind, ok := strings.Cut(strings.TrimSpace(line), " - ")
		p, k := strings.Fields(place), strings.Fields(kind)
		if !ok || len(p) < 5 || len(k) < 3 || k[0] != fs || fs == "cgroup" && !strings.Contains(","+k[2]+",", ",memory,") {
			continue
		}
		root, at := p[3], p[4]
		if rest, ok := strings.CutPrefix(group, strings.TrimSuffix(root, "/")); ok && (rest == "" || rest[0] == '/') {
			return at, filepath.Join(at, rest)
		}
	}
	return "", ""
}

// Close gives back the descriptor.
func (c *Ceiling) Close() error {
	if c == nil || c.current == nil {
		return nil
	}
	return c.current.Close()
}

// Limit is 0 where there is none.
func (c *Ceiling) Limit() int64 {
	if c == nil {
		return 0
	}
	return c.limit
}

// Shares of the limit: what Go's heap is to stay below, what bytes on their way may take, and from where on new work is
// refused. What those that are served may still come to need is between the last and the limit.
func (c *Ceiling) heap() int64    { return c.Limit() / 8 * 5 }
func (c *Ceiling) buffers() int64 { return c.Limit() / 8 }
func (c *Ceiling) full() int64    { return c.Limit() / 4 * 3 }

// HoldHeap has the garbage collector keep below the limit, unless GOMEMLIMIT has told it something already.
func (c *Ceiling) HoldHeap() {
	if c.Limit() > 0 && debug.SetMemoryLimit(-1) == math.MaxInt64 {
		debug.SetMemoryLimit(c.heap())
	}
}

// Used is what Short saw last.
func (c *Ceiling) Used() int64 {
	if c == nil {
		return 0
	}
	return c.used.Load()
}

// Short reports that new work is to be refused.
func (c *Ceiling) Short() bool {
	if c.Limit() == 0 {
		return false
	}
	now := time.Since(started)
	if due(&c.readAt, now, ceilingEvery) {
		c.used.Store(c.read())
	}
	if c.used.Load() <= c.full() {
		return false
	}
	if due(&c.freedAt, now, freeEvery) { // nothing is allocated for who is refused: the collector has no reason of its own
		go debug.FreeOSMemory()
	}
	return true
}

// due reports, to one caller, that so much time has passed since it did last.
func due(last *atomic.Int64, now, every time.Duration) bool {
	at := last.Load()
	return (at == 0 || int64(now)-at > int64(every)) && last.CompareAndSwap(at, int64(now))
}

// read is a few microseconds; what the kernel could drop is looked at only where it matters.
func (c *Ceiling) read() int64 {
	var b [32]byte
	n, _ := c.current.ReadAt(b[:], 0)
	used, err := strconv.ParseInt(string(bytes.TrimSpace(b[:n])), 10, 64)
	if err != nil || used <= c.full() {
		return used
	}
	stat, _ := os.ReadFile(c.stat)
	total := bytes.Contains(stat, []byte("\ntotal_inactive_file ")) // version 1, which has both
	for line := range strings.Lines(string(stat)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if total {
			var ok bool
			if name, ok = strings.CutPrefix(name, "total_"); !ok {
				continue
			}
		}
		if name == "inactive_file" || name == "active_file" {
			n, _ := strconv.ParseInt(value, 10, 64)
			used -= n
		}
	}
	return used
}
