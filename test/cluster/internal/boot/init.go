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
	children map[int]chan struct{}

	bin string // where components are
	log string // where their logs go
}

// newInit also sets the environment every child inherits.
func newInit(bin, log string) *initProcess {
	os.Clearenv()
	os.Setenv("PATH", bin+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/root")
	p := &initProcess{children: map[int]chan struct{}{}, bin: bin, log: log}
	go p.reap()
	return p
}

// start runs cmd and returns a channel that is closed when it has ended.
func (p *initProcess) start(cmd *exec.Cmd) (<-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	p.children[cmd.Process.Pid] = done
	return done, nil
}

func (p *initProcess) reap() {
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		switch err {
		case nil:
			p.mu.Lock()
			if c, ok := p.children[pid]; ok {
				delete(p.children, pid)
				close(c)
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
			if err := p.run(c); err != nil {
				slog.Error("cannot run component", "name", c.Name, "error", err)
			} else {
				slog.Warn("component ended", "name", c.Name)
			}
			time.Sleep(time.Second)
		}
	}()
}

// run runs one component to its end, its output appended to its log.
func (p *initProcess) run(c plan.Process) error {
	out, err := os.OpenFile(filepath.Join(p.log, c.Name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(p.bin, c.Name), c.Args...)
	cmd.Stdout, cmd.Stderr = out, out
	done, err := p.start(cmd)
	out.Close()
	if err != nil {
		return err
	}
	<-done
	return nil
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
