// Command kernels runs the kernel tests on Debian's kernels: for each it takes the package apart, packs modules
// and static test binaries into an initramfs, and boots that in QEMU without KVM.
//
//	go run ./test/kernels [-series 6.1,6.12] [-package FILE.deb] [-v] [PACKAGE-TO-TEST...]
//
// Needs apt, dpkg-deb, xz and qemu-system-x86_64. A series that apt does not offer is left out, saying so.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// modules that the tests need; what they depend on is added, and what is built in is not missed.
var modules = []string{"veth", "sch_ingress", "cls_bpf", "bridge", "dummy", "tcp_diag"}

func main() {
	series := flag.String("series", "6.1,6.12", "kernel series to test, the newest package of each")
	pkg := flag.String("package", "", "test this kernel package instead")
	timeout := flag.Duration("timeout", 15*time.Minute, "how long one machine may run")
	verbose := flag.Bool("v", false, "print passing tests too")
	flag.Parse()
	tests := flag.Args()
	if len(tests) == 0 {
		tests = []string{"./internal/netns", "./node-agent/datapath"}
	}
	if err := run(strings.Split(*series, ","), *pkg, tests, *timeout, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(series []string, pkg string, tests []string, timeout time.Duration, verbose bool) error {
	packages, err := choose(series, pkg)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kernels-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	guest, binaries, err := build(dir, tests)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range packages {
		start := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		err := testOn(ctx, dir, p, guest, binaries, verbose)
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", filepath.Base(p), err))
			continue
		}
		fmt.Printf("kernels: %s ok in %.0f s\n", filepath.Base(p), time.Since(start).Seconds())
	}
	return errors.Join(errs...)
}

// choose finds the packages; what is downloaded is kept in the user's cache.
func choose(series []string, pkg string) ([]string, error) {
	if pkg != "" {
		return []string{pkg}, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, err
	}
	cache = filepath.Join(cache, "warren", "kernels")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	var found []string
	for _, s := range series {
		name, err := newest(s)
		if err != nil {
			return nil, err
		}
		if name == "" {
			fmt.Printf("kernels: apt offers no kernel %s here; left out\n", s)
			continue
		}
		file, err := download(name, cache)
		if err != nil {
			return nil, err
		}
		found = append(found, file)
	}
	if len(found) == 0 {
		return nil, errors.New("no kernel to test on; run apt-get update first")
	}
	return found, nil
}

// build makes static binaries: the guest has no library.
func build(dir string, tests []string) (guest string, binaries []string, err error) {
	guest = filepath.Join(dir, "guest")
	if err := static("build", "-o", guest, "./test/kernels/guest"); err != nil {
		return "", nil, err
	}
	for _, t := range tests {
		out := filepath.Join(dir, path.Base(t)+".test")
		if err := static("test", "-c", "-ldflags=-s -w", "-o", out, t); err != nil {
			return "", nil, err
		}
		binaries = append(binaries, out)
	}
	return guest, binaries, nil
}

func static(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func testOn(ctx context.Context, dir, pkg, guest string, binaries []string, verbose bool) error {
	k, err := readPackage(pkg)
	if err != nil {
		return err
	}
	order, err := k.closure(modules)
	if err != nil {
		return err
	}
	fs := newInitramfs()
	var list []string
	for _, m := range order {
		fs.file("modules/"+m.name, 0o644, m.body)
		list = append(list, m.name)
	}
	fs.file("modules.list", 0o644, []byte(strings.Join(list, "\n")))
	if err := fs.copy("init", guest); err != nil {
		return err
	}
	for _, b := range binaries {
		if err := fs.copy("tests/"+filepath.Base(b), b); err != nil {
			return err
		}
	}
	vmlinuz, initrd := filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd")
	if err := errors.Join(os.WriteFile(vmlinuz, k.image, 0o600), os.WriteFile(initrd, fs.end(), 0o600)); err != nil {
		return err
	}
	return boot(ctx, vmlinuz, initrd, verbose)
}
