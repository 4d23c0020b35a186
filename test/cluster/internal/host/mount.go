package host

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// MakePrivate stops mount events between this mount namespace and others.
func MakePrivate() error { return propagation(unix.MS_PRIVATE) }

// MakeShared lets mounts travel from here to the mount namespaces of containers.
func MakeShared() error { return propagation(unix.MS_SHARED) }

func propagation(kind uintptr) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|kind, ""); err != nil {
		return fmt.Errorf("change propagation of /: %w", err)
	}
	return nil
}

// Mount mounts a file system that has no source, creating the mount point.
func Mount(kind, at, opts string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(kind, at, kind, 0, opts); err != nil {
		return fmt.Errorf("mount %s on %s: %w", kind, at, err)
	}
	return nil
}

// Bind shows src (a file or a directory with everything mounted below it) at
// dst, creating dst.
func Bind(src, dst string) error {
	fi, err := os.Stat(src)
	if err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if fi.IsDir() {
		err = os.MkdirAll(dst, 0o755)
	} else if err = os.MkdirAll(filepath.Dir(dst), 0o755); err == nil {
		var f *os.File
		if f, err = os.OpenFile(dst, os.O_CREATE|os.O_WRONLY, 0o644); err == nil {
			err = f.Close()
		} else if _, e := os.Lstat(dst); e == nil {
			err = nil // a file of /proc/sys that may not be opened
		}
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(src, dst, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", src, dst, err)
	}
	return nil
}

// BindReadOnly is Bind without the right to write.
func BindReadOnly(src, dst string) error {
	if err := Bind(src, dst); err != nil {
		return err
	}
	if err := unix.Mount("", dst, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", dst, err)
	}
	return nil
}

// PivotRoot makes dir, a mount point, the root of this mount namespace and drops
// the old one.
func PivotRoot(dir string) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	// With "." twice the old root ends up stacked on the new one.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root to %s: %w", dir, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach old root: %w", err)
	}
	return os.Chdir("/")
}
