package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/warrenmesh/warren/bench"
)

// tick is the unit of times in /proc on every architecture that Linux has today.
const tick = 10 * time.Millisecond

// readMeter reads what the kernel has used, and the processes that have one of the marks in the name of their
// cgroup (a container's id), or as their number or name.
func readMeter(proc string, marks []string) (*bench.Reading, error) {
	b, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return nil, err
	}
	r, err := parseStat(b)
	if err != nil {
		return nil, err
	}
	r.Processes = []bench.Process{}
	if len(marks) == 0 {
		return r, nil
	}
	dirs, err := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		if p, ok := readProcess(d, marks); ok {
			r.Processes = append(r.Processes, p)
		}
	}
	return r, nil
}

// parseStat reads /proc/stat.
func parseStat(b []byte) (*bench.Reading, error) {
	r := &bench.Reading{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		var n []uint64
		for _, v := range f[1:min(len(f), 9)] { // guests are in user and nice
			u, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				return nil, fmt.Errorf("/proc/stat: %q", line)
			}
			n = append(n, u)
		}
		switch f[0] {
		case "cpu":
			if len(n) < 8 {
				return nil, fmt.Errorf("/proc/stat: %q", line)
			}
			// user nice system idle iowait irq softirq steal
			r.Busy = time.Duration(n[0]+n[1]+n[2]+n[5]+n[6]) * tick
			r.SoftIRQ = time.Duration(n[6]) * tick
		case "ctxt":
			r.Switches = n[0]
		case "btime":
			r.BootTime = int64(n[0])
		}
	}
	if r.BootTime == 0 || r.Busy == 0 {
		return nil, fmt.Errorf("/proc/stat has no CPU times: %q", b[:min(len(b), 80)])
	}
	return r, nil
}

// readProcess tells false of a process that is not marked, or has ended.
func readProcess(dir string, marks []string) (p bench.Process, ok bool) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, false
	}
	// 123 (a name) R 1 ...
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return p, false
	}
	p.Name = string(stat[open+1 : end])
	p.PID, _ = strconv.Atoi(strings.TrimSpace(string(stat[:open])))
	cgroup, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
	if !slices.ContainsFunc(marks, func(m string) bool {
		return m == p.Name || m == strconv.Itoa(p.PID) || len(m) > 16 && bytes.Contains(cgroup, []byte(m))
	}) {
		return p, false
	}
	f := strings.Fields(string(stat[end+1:]))
	if len(f) < 13 {
		return p, false
	}
	user, _ := strconv.ParseUint(f[11], 10, 64)
	system, _ := strconv.ParseUint(f[12], 10, 64)
	p.CPU = time.Duration(user+system) * tick
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return p, false
	}
	for line := range strings.Lines(string(status)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			p.RSS = kb << 10
		case "RssAnon:":
			p.RSSAnon = kb << 10
		}
	}
	limits, _ := os.ReadFile(filepath.Join(dir, "limits"))
	if _, rest, found := strings.Cut(string(limits), "Max open files"); found {
		if f := strings.Fields(rest); len(f) > 0 {
			p.Files, _ = strconv.Atoi(f[0])
		}
	}
	return p, true
}
