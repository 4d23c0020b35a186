package holder

import (
	"cmp"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

const blobSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// newBlob returns a memfd with data that nobody can change any more.
func newBlob(name string, data []byte) (int, error) {
	fd, err := unix.MemfdCreate("warren-blob", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // MFD_NOEXEC_SEAL came with 6.3
		fd, err = unix.MemfdCreate("warren-blob", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, fmt.Errorf("create a memfd for blob %s: %w", name, err)
	}
	for n := 0; n < len(data) && err == nil; {
		var m int
		m, err = unix.Write(fd, data[n:])
		n += max(m, 0)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, blobSeals)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("write and seal blob %s: %w", name, err)
	}
	return fd, nil
}

// blobSize checks that fd is a sealed memfd and returns its size.
func blobSize(fd int) (int64, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&blobSeals != blobSeals {
		return 0, fmt.Errorf("%w: a blob must be a sealed memfd", ErrInvalid)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("size of a blob: %w", err)
	}
	return st.Size, nil
}

// readBlob returns the content of a sealed memfd. The file's offset is shared with everyone who has it, so the
// read is by position.
func readBlob(fd int) ([]byte, error) {
	size, err := blobSize(fd)
	if err != nil {
		return nil, err
	}
	b := make([]byte, size)
	for n := 0; n < len(b); {
		m, err := unix.Pread(fd, b[n:], int64(n))
		if err != nil || m == 0 {
			return nil, fmt.Errorf("read a blob: %d of %d bytes: %w", n, size, cmp.Or(err, io.ErrUnexpectedEOF))
		}
		n += m
	}
	return b, nil
}
