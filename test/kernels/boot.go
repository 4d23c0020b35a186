package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
)

// boot runs the machine and follows its serial line.
func boot(ctx context.Context, vmlinuz, initrd string, verbose bool) error {
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", vmlinuz, "-initrd", initrd,
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the virtual machine: %w", err)
	}
	last := ""
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := strings.TrimRight(lines.Text(), "\r")
		if strings.HasPrefix(line, "guest: done") {
			last = line
		}
		if passing := strings.HasPrefix(strings.TrimSpace(line), "--- PASS") || strings.HasPrefix(line, "==="); verbose || !passing {
			fmt.Println(line)
		}
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return errors.New("the virtual machine took too long")
	}
	if last != "guest: done, 0 failed" {
		return fmt.Errorf("tests failed (%q; the machine ended with %v)", last, err)
	}
	return nil
}
