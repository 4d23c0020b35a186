package hbone

import (
	"bytes"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"testing"
)

// ioCalls is how many system calls of this process have read or written.
func ioCalls(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/io")
	if err != nil {
		t.Skip("the kernel does not count system calls: ", err)
	}
	for _, line := range bytes.Split(b, []byte("\n")) {
		if name, v, ok := bytes.Cut(line, []byte(": ")); ok && (string(name) == "syscr" || string(name) == "syscw") {
			k, err := strconv.Atoi(string(v))
			if err != nil {
				t.Fatal(err)
			}
			n += k
		}
	}
	return n
}

// cost is what one run of f takes in reading and writing system calls and in allocations.
func cost(t *testing.T, runs int, f func()) (calls, allocs float64) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	began := ioCalls(t)
	for range runs {
		f()
	}
	ended := ioCalls(t)
	runtime.ReadMemStats(&after)
	return float64(ended-began) / float64(runs), float64(after.Mallocs-before.Mallocs) / float64(runs)
}

// Both ends, both agents and their four sockets are in this process; what the same takes without agents is
// subtracted. The budgets are counts, so that they hold on any machine.
func TestWhatPassesATunnelCostsFewSystemCallsAndNoAllocations(t *testing.T) {
	direct := func(t *testing.T) (net.Conn, net.Conn) { return tcpPair(t) }
	tunnelled := func(t *testing.T) (net.Conn, net.Conn) {
		x, y, _ := newRelayed(t)
		return x, y
	}
	request := func(pair func(*testing.T) (net.Conn, net.Conn)) (calls, allocs float64) {
		x, y := pair(t)
		p, q := make([]byte, 1000), make([]byte, 1000)
		return cost(t, 3000, func() {
			for _, c := range [][2]net.Conn{{x, y}, {y, x}} {
				if _, err := c[0].Write(p); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(c[1], q); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	without, _ := request(direct)
	with, allocs := request(tunnelled)
	// A request and its answer pass two agents: a read and a write each, and nothing that finds nothing. The
	// applications themselves read in vain once each, because an answer takes longer.
	if d := with - without; d > 10.5 {
		t.Errorf("a request takes %.1f system calls in the agents", d)
	} else {
		t.Logf("a request takes %.1f system calls in the agents and %.2f allocations", d, allocs)
	}
	if allocs > 1 && !raceEnabled { // with it, pools forget on purpose
		t.Errorf("a request takes %.2f allocations", allocs)
	}

	bulk := func(pair func(*testing.T) (net.Conn, net.Conn)) (calls, allocs float64) {
		x, y := pair(t)
		const size = 64 << 20
		done := make(chan error, 1)
		go func() {
			_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.LimitReader(y, size)}, make([]byte, 1<<20))
			done <- err
		}()
		p := make([]byte, 1<<20)
		calls, allocs = cost(t, 1, func() {
			for range size / len(p) {
				if _, err := x.Write(p); err != nil {
					t.Fatal(err)
				}
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		})
		return calls / (size >> 20), allocs / (size >> 20)
	}
	without, _ = bulk(direct)
	with, allocs = bulk(tunnelled)
	if d := with - without; d > 120 {
		t.Errorf("a mebibyte takes %.1f system calls in the agents", d)
	} else {
		t.Logf("a mebibyte takes %.1f system calls in the agents and %.2f allocations", d, allocs)
	}
	if allocs > 10 && !raceEnabled {
		t.Errorf("a mebibyte takes %.2f allocations", allocs)
	}
}
