package host

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// namespaces in the order they are entered: the mount namespace last, because
// the others are opened by path first anyway and / changes with it.
var namespaces = []struct {
	name string
	flag int
}{
	{"cgroup", unix.CLONE_NEWCGROUP},
	{"ipc", unix.CLONE_NEWIPC},
	{"uts", unix.CLONE_NEWUTS},
	{"net", unix.CLONE_NEWNET},
	{"pid", unix.CLONE_NEWPID},
	{"mnt", unix.CLONE_NEWNS},
}

// RunInside runs a program in all namespaces of process pid and waits for it. The
// program is looked up there. The caller moves itself into the wanted cgroup
// before.
func RunInside(pid int, args []string, stdin, stdout, stderr *os.File) error {
	errc := make(chan error, 1)
	go func() {
		// The thread is not unlocked: it ends with the goroutine.
		runtime.LockOSThread()
		errc <- enterAndRun(pid, args, stdin, stdout, stderr)
	}()
	return <-errc
}

func enterAndRun(pid int, args []string, stdin, stdout, stderr *os.File) error {
	var fds []int
	for _, ns := range namespaces {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, ns.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s namespace of process %d: %w", ns.name, pid, err)
		}
		defer unix.Close(fd)
		fds = append(fds, fd)
	}
	// Threads share their root and working directory until told otherwise, and
	// a mount namespace cannot be entered while they do.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare file system attributes: %w", err)
	}
	for i, ns := range namespaces {
		if err := unix.Setns(fds[i], ns.flag); err != nil {
			return fmt.Errorf("enter %s namespace of process %d: %w", ns.name, pid, err)
		}
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	// A parent-death signal cannot do: the child sees no parent in its pid
	// namespace. Terminals signal the whole group, so only these are passed on.
	sig := make(chan os.Signal, 4)
	signal.Notify(sig, unix.SIGTERM, unix.SIGHUP)
	defer signal.Stop(sig)
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case s := <-sig:
				_ = cmd.Process.Signal(s) // it may have ended meanwhile
			case <-ended:
				return
			}
		}
	}()
	return cmd.Wait()
}

// InNetNS runs f with the thread in the network namespace of process pid.
// Sockets made there stay there.
func InNetNS(pid int, f func() error) error {
	errc := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/net", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			errc <- err
			return
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			errc <- fmt.Errorf("enter network namespace of process %d: %w", pid, err)
			return
		}
		errc <- f()
	}()
	return <-errc
}

// PeerPID connects to a Unix socket and returns the pid of the process that
// listens on it, as the caller's pid namespace numbers it.
func PeerPID(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return 0, fmt.Errorf("connect to %s: %w", path, err)
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, err
	}
	if cred.Pid == 0 {
		return 0, fmt.Errorf("%s is served from a pid namespace this process cannot see", path)
	}
	return int(cred.Pid), nil
}

// Alive reports whether a process exists and is not merely waiting to be reaped.
func Alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The name before the state is in parentheses and may contain anything.
	_, rest, ok := strings.Cut(string(b[bytes.LastIndexByte(b, ')'):]), " ")
	return ok && !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

// DefaultCNI prefers a bridge, which needs the kernel to filter bridged packets:
// else answers of a Service's endpoint on the same node bypass its translation.
func DefaultCNI() string {
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		_ = exec.Command("modprobe", "br_netfilter").Run()
	}
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		return "ptp"
	}
	return "bridge"
}
