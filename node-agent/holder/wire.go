package holder

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// fdset is descriptors that this process keeps without using them. They are not os.Files: those of listeners
// would join the runtime's poller, and each connection that arrives would wake the process that only holds.
type fdset []int

func (s fdset) close() {
	for _, fd := range s {
		unix.Close(fd)
	}
}

// dup returns other descriptors of the same open files.
func (s fdset) dup() (fdset, error) {
	out := make(fdset, 0, len(s))
	for _, fd := range s {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			out.close()
			return nil, fmt.Errorf("duplicate a descriptor: %w", err)
		}
		out = append(out, d)
	}
	return out, nil
}

// files hands the descriptors over to os.Files.
func (s fdset) files(names []string) []*os.File {
	out := make([]*os.File, len(s))
	for i, fd := range s {
		out[i] = os.NewFile(uintptr(fd), names[i])
	}
	return out
}

// rawFD calls fn with the descriptor of f. os.File.Fd is not used anywhere in this package: it would clear
// O_NONBLOCK, which two processes share when they share a listener, and the other one's accept would block.
func rawFD(f syscall.Conn, fn func(fd int) error) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := rc.Control(func(fd uintptr) { ferr = fn(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// dupFiles returns descriptors of the same open files.
func dupFiles(files []*os.File) (fdset, error) {
	out := make(fdset, 0, len(files))
	for _, f := range files {
		err := rawFD(f, func(fd int) error {
			d, err := fdset{fd}.dup()
			out = append(out, d...)
			return err
		})
		if err != nil {
			out.close()
			return nil, err
		}
	}
	return out, nil
}

// send writes one record with descriptors, which stay the caller's.
func send(c *net.UnixConn, msg any, fds fdset) error {
	b, err := json.Marshal(msg)
	if err != nil {
		return err
	}
	if len(b) > maxRecord {
		return fmt.Errorf("%w: record of %d bytes, at most %d", ErrInvalid, len(b), maxRecord)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, oob, nil)
	return err
}

// receive reads one record into msg and returns its descriptors, which the caller owns.
// With an error none is left open.
func receive(c *net.UnixConn, buf []byte, msg any) (fdset, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	fds, ferr := rights(oob[:oobn])
	switch {
	case err != nil:
	case ferr != nil:
		err = ferr
	case n == 0 && oobn == 0: // SOCK_SEQPACKET: the peer has closed
		err = io.EOF
	case flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("%w: a record is longer than %d bytes", ErrInvalid, len(buf))
	case flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("%w: more than %d descriptors in one record, or none left for them here", ErrInvalid, maxFiles)
	default:
		if e := json.Unmarshal(buf[:n], msg); e != nil {
			err = fmt.Errorf("%w: %v", ErrInvalid, e)
		}
	}
	if err != nil {
		fds.close()
		return nil, err
	}
	return fds, nil
}

func rights(oob []byte) (fdset, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	var fds fdset
	for i := range cmsgs {
		got, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			fds.close()
			return nil, err
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// peerUID is the user at the other end of c, as the kernel recorded it at connect.
func peerUID(c *net.UnixConn) (uint32, error) {
	var cred *unix.Ucred
	err := rawFD(c, func(fd int) (err error) {
		cred, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read the peer's credentials: %w", err)
	}
	return cred.Uid, nil
}
