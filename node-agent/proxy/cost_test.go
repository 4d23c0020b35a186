package proxy

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// callCounter counts the system calls of this process, without those by which threads wait and the runtime manages
// its memory: how many of these there are depends on what else the machine does.
type callCounter struct{ fds []int }

// countCalls returns nil where the kernel does not count.
func countCalls(t *testing.T) *callCounter {
	t.Helper()
	b, err := os.ReadFile("/sys/kernel/tracing/events/raw_syscalls/sys_enter/id")
	if err != nil {
		t.Log("the kernel does not count system calls: ", err)
		return nil
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	check(t, err)
	var filter []string
	for _, n := range []int{unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP, unix.SYS_SCHED_YIELD, unix.SYS_MADVISE, unix.SYS_TGKILL,
		unix.SYS_RT_SIGRETURN, unix.SYS_MMAP, unix.SYS_MUNMAP} {
		filter = append(filter, fmt.Sprintf("id != %d", n))
	}
	c := &callCounter{}
	t.Cleanup(func() {
		for _, fd := range c.fds {
			unix.Close(fd)
		}
	})
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Size: unix.PERF_ATTR_SIZE_VER5, Bits: unix.PerfBitInherit}
	seen := map[string]bool{}
	for range 2 { // threads that are made meanwhile are heirs of others, or in the second list
		tasks, err := os.ReadDir("/proc/self/task")
		check(t, err)
		for _, task := range tasks {
			tid, _ := strconv.Atoi(task.Name())
			if seen[task.Name()] {
				continue
			}
			seen[task.Name()] = true
			fd, err := unix.PerfEventOpen(&attr, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
			if err == unix.ESRCH {
				continue
			} else if err != nil {
				t.Log("system calls cannot be counted: ", err)
				return nil
			}
			c.fds = append(c.fds, fd)
			f, err := unix.BytePtrFromString(strings.Join(filter, " && "))
			check(t, err)
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(f))); e != 0 {
				t.Fatal(e)
			}
		}
	}
	return c
}

func (c *callCounter) total(t *testing.T) (n uint64) {
	t.Helper()
	if c == nil {
		return 0
	}
	for _, fd := range c.fds {
		var b [8]byte
		_, err := unix.Read(fd, b[:])
		check(t, err)
		n += binary.NativeEndian.Uint64(b[:])
	}
	return n
}

// What a connection costs the agents of both nodes, in system calls and in allocations, is what it costs through the
// mesh less what it costs to a pod that is not in it: both ends and both agents are in this process. The budgets are
// counts, so that they hold on any machine.
func TestAConnectionCostsFewSystemCallsAndAllocations(t *testing.T) {
	l := newLab(t)
	answer := bytes.Repeat([]byte("x"), 1000)
	for _, name := range []string{"catalog-1", "outside"} {
		l.pods[name].listen(appPort, func(c *net.TCPConn) {
			if _, err := io.ReadFull(c, make([]byte, 100)); err == nil {
				c.Write(answer)
			}
		})
	}
	visit := func(to *labPod, times int) {
		dst := netip.AddrPortFrom(to.v4, appPort)
		check(t, l.pods["ui"].as(func() error {
			for range times {
				c, err := net.Dial("tcp", dst.String())
				if err != nil {
					return err
				}
				if _, err := c.Write(make([]byte, 100)); err != nil {
					return err
				}
				if b, err := io.ReadAll(c); err != nil || len(b) != len(answer) {
					return fmt.Errorf("%d bytes, %w", len(b), err)
				}
				c.Close()
			}
			return nil
		}))
	}
	closed := func() (n float64) {
		for _, node := range l.nodes {
			n += node.metric("istio_tcp_connections_closed_total", nil)
		}
		return n
	}
	const times = 300
	cost := func(to *labPod, reports float64) (calls, allocs float64) {
		visit(to, 20)
		eventually(t, "the last of them is reported", func() bool { return closed() >= 20*reports })
		runtime.GC()
		c := countCalls(t)
		before := closed()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		mallocs, began := m.Mallocs, c.total(t)
		visit(to, times)
		ended := c.total(t)
		runtime.ReadMemStats(&m)
		eventually(t, "all are reported", func() bool { return closed() == before+times*reports })
		return float64(ended-began) / times, float64(m.Mallocs-mallocs) / times
	}
	direct, directAllocs := cost(l.pods["outside"], 0)
	meshed, meshedAllocs := cost(l.pods["catalog-1"], 2)
	calls, allocs := meshed-direct, meshedAllocs-directAllocs
	t.Logf("a connection takes %.1f system calls (0: not counted) and %.1f allocations in both agents", calls, allocs)
	if calls > 54 {
		t.Errorf("a connection takes %.1f system calls in both agents", calls)
	}
	if allocs > 95 && !raceEnabled {
		t.Errorf("a connection takes %.1f allocations in both agents", allocs)
	}
}
