// Package netns works in other network namespaces: it holds a namespace by a file descriptor, runs a
// function in it, makes sockets that live in it, and reads its interfaces and addresses.
//
// It owns the rule that an OS thread never returns to the Go scheduler in a foreign namespace. It knows
// nothing of pods, meshes or BPF.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrClosed is returned for a Handle that has been closed.
var ErrClosed = errors.New("network namespace handle is closed")

// Handle keeps a network namespace alive and gives access to it. It is safe for concurrent use.
type Handle struct {
	name   string
	cookie uint64

	mu sync.RWMutex // held for reading while fd is in use, so that Close cannot have the number reused under a setns
	fd int          // -1 once closed
}

// Open returns the namespace that a path names: a bind mount as the CNI makes it, or /proc/PID/ns/net.
func Open(path string) (*Handle, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	return adopt(fd, path)
}

// FromPID returns the namespace of a process. The process id must not have been reused: callers compare
// what they know about the process before and after.
func FromPID(pid int) (*Handle, error) {
	return Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
}

// FromFD duplicates a namespace descriptor; the caller keeps its own.
func FromFD(fd int) (*Handle, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate network namespace descriptor %d: %w", fd, err)
	}
	return adopt(dup, "fd "+strconv.Itoa(fd))
}

// Current returns the namespace of the calling thread.
func Current() (*Handle, error) { return Open("/proc/thread-self/ns/net") }

// New makes an empty namespace. It lasts as long as the handle, or something in it, does.
func New() (*Handle, error) {
	own, err := Current()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	var made *Handle
	// A visit to the own namespace: it ends by coming back to it. Simply ending the thread will not do, since
	// the runtime keeps the process's first thread for ever, and /proc/PID/ns/net names that one's namespace.
	err = own.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		made, err = Current()
		return err
	})
	return made, err
}

// adopt takes ownership of fd, checks that it is a network namespace and reads its cookie.
func adopt(fd int, name string) (*Handle, error) {
	// NS_GET_NSTYPE answers with the CLONE_ flag of the namespace; another kind of file has no such ioctl.
	typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE)
	if err != nil || typ != unix.CLONE_NEWNET {
		unix.Close(fd)
		return nil, fmt.Errorf("%s is not a network namespace", name)
	}
	h := &Handle{name: name, fd: fd}
	s, err := h.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	defer unix.Close(s)
	if h.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("read the cookie of network namespace %s: %w", name, err)
	}
	return h, nil
}

// Cookie is the kernel's number for the namespace: unique until the next boot and never reused.
func (h *Handle) Cookie() uint64 { return h.cookie }

// String names the namespace in errors and logs.
func (h *Handle) String() string { return h.name }

// File duplicates the descriptor, to be handed to another process.
func (h *Handle) File() (*os.File, error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.fd < 0 {
		return nil, ErrClosed
	}
	dup, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate network namespace %s: %w", h.name, err)
	}
	return os.NewFile(uintptr(dup), h.name), nil
}

// WithFD calls f with the descriptor, which stays open until f returns.
func (h *Handle) WithFD(f func(fd int) error) error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.fd < 0 {
		return ErrClosed
	}
	return f(h.fd)
}

// Close releases the namespace. Closing twice is fine.
func (h *Handle) Close() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fd < 0 {
		return nil
	}
	fd := h.fd
	h.fd = -1
	return unix.Close(fd)
}

// Do runs f in the namespace, on a thread of its own. Goroutines that f starts are not in the namespace.
func (h *Handle) Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := h.visit(f)
		if home {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// visit runs f in the namespace on the calling thread, which the caller has locked. Only when it reports
// home may the thread be unlocked; a thread that could not return must end with its goroutine.
func (h *Handle) visit(f func() error) (home bool, err error) {
	own, err := openOwn()
	if err != nil {
		return true, err
	}
	defer unix.Close(own)
	return h.visitFrom(own, f)
}

// visitFrom is visit for a caller that knows its thread's own namespace.
func (h *Handle) visitFrom(own int, f func() error) (home bool, err error) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.fd < 0 {
		return true, ErrClosed
	}
	if err := enter(h.fd); err != nil {
		return true, fmt.Errorf("enter network namespace %s: %w", h.name, err)
	}
	err = f()
	if back := enter(own); back != nil {
		return false, errors.Join(err, fmt.Errorf("leave network namespace %s: %w", h.name, back))
	}
	return true, err
}

// openOwn opens the namespace of the calling thread.
func openOwn() (int, error) {
	fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open own network namespace: %w", err)
	}
	return fd, nil
}
