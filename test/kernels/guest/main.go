// Command guest is /init of the virtual machine that test/kernels starts: it mounts what the tests need, loads
// the kernel modules it was given, runs every test binary and switches the machine off.
//
// The last line it prints tells the outcome; the machine has no other way to say it.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	failed, err := run()
	if err != nil {
		fmt.Println("guest:", err)
		failed++
	}
	fmt.Printf("guest: done, %d failed\n", failed)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() (failed int, err error) {
	for _, m := range []struct{ kind, at string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"cgroup2", "/sys/fs/cgroup"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return 0, err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return 0, fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return 0, err
	}
	fmt.Println("guest: Linux", unix.ByteSliceToString(u.Release[:]))

	list, err := os.ReadFile("/modules.list") // in the order of their dependencies
	if err != nil {
		return 0, err
	}
	for _, name := range strings.Fields(string(list)) {
		if err := load("/modules/" + name); err != nil {
			return 0, fmt.Errorf("load module %s: %w", name, err)
		}
	}

	tests, err := filepath.Glob("/tests/*.test")
	if err != nil {
		return 0, err
	}
	for _, path := range tests {
		start := time.Now()
		cmd := exec.Command(path, "-test.v", "-test.short", "-test.timeout=50m") // emulated: slow
		cmd.Dir = "/tmp"
		cmd.Env = []string{"PATH=/", "TMPDIR=/tmp"}
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		result := "ok"
		if err := cmd.Run(); err != nil {
			failed++
			result = "FAIL " + err.Error()
		}
		fmt.Printf("guest: %s %s %.1fs\n", filepath.Base(path), result, time.Since(start).Seconds())
	}
	return failed, nil
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}
