// Package boot holds the two programs that run as PID 1: the supervisor of a
// cluster and the init of a node. They turn the plan into processes. They must
// not know who started them or wait for anyone: the supervisor's death ends
// everything.
package boot

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/warrenmesh/warren/test/cluster/internal/plan"
	"golang.org/x/sys/unix"
)

// initProcess is the part of PID 1 both programs share: it starts processes and
// reaps every child, also those it inherits. Nothing else in the process may
// wait for a child.
type initProcess struct {
	mu       sync.Mutex // held across start, so that an exit is never seen before its entry
	children map[int]*child

	bin string // where components are
	log string // where their logs go
}

// child is a started process; status is set when done is closed.
type child struct {
	done   chan struct{}
	status unix.WaitStatus
}

// newInit also sets the environment every child inherits.
func newInit(bin, log string) *initProcess {
	os.Clearenv()
	os.Setenv("PATH", bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	p := &initProcess{children: map[int]*child{}, bin: bin, log: log}
	go p.reap()
	return p
}

// start runs cmd without waiting for it.
func (p *initProcess) start(cmd *exec.Cmd) (*child, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{done: make(chan struct{})}
	p.children[cmd.Process.Pid] = c
	return c, nil
}

func (p *initProcess) reap() {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch err {
		case nil:
			p.mu.Lock()
			if c, ok := p.children[pid]; ok {
				delete(p.children, pid)
				c.status = status
				close(c.done)
			}
			p.mu.Unlock()
		case unix.ECHILD:
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// keep runs a component and starts it again whenever it ends.
func (p *initProcess) keep(c plan.Process) {
	go func() {
		for {
			if err := p.run(c, 0); err != nil {
				slog.Error("component failed", "name", c.Name, "error", err)
			} else {
				slog.Warn("component ended", "name", c.Name)
			}
			time.Sleep(time.Second)
		}
	}()
}

// run runs one component to its end, its output appended to its log. With a
// limit, a component that exceeds it is told to write its stacks and die.
func (p *initProcess) run(c plan.Process, limit time.Duration) error {
	out, err := os.OpenFile(filepath.Join(p.log, c.Name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(p.bin, c.Name), c.Args...)
	cmd.Stdout, cmd.Stderr = out, out
	started, err := p.start(cmd)
	out.Close()
	if err != nil {
		return err
	}
	var expired <-chan time.Time
	if limit > 0 {
		expired = time.After(limit)
	}
	select {
	case <-started.done:
		if started.status != 0 {
			return fmt.Errorf("%s ended with status %#x: see its log", c.Name, started.status)
		}
		return nil
	case <-expired:
	}
	_ = cmd.Process.Signal(unix.SIGQUIT) // it may have ended meanwhile
	select {
	case <-started.done:
	case <-time.After(5 * time.Second):
		_ = cmd.Process.Kill()
		<-started.done
	}
	return fmt.Errorf("%s took longer than %s", c.Name, limit)
}

// patience is how long a step waits for the one before it. Whoever started the
// cluster gives up earlier; a very slow machine still gets there.
const patience = 15 * time.Minute

// until polls f every 50 ms.
func until(what string, f func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
