package netns

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Socket makes a socket in the namespace; only the socket call runs there. The socket is close-on-exec and
// non-blocking, and keeps belonging to the namespace wherever it is used from.
//
// The calling thread itself goes there and back. On an idle machine that is 9 µs where a plain socket takes 5;
// handing the call to a goroutine takes 16, to a thread that stays in foreign namespaces 30.
func (h *Handle) Socket(family, typ, proto int) (int, error) {
	s := -1
	runtime.LockOSThread()
	home, err := h.visit(func() (err error) {
		s, err = unix.Socket(family, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
		return err
	})
	if home {
		runtime.UnlockOSThread()
	} // else the thread is lost, and ends with the caller's goroutine
	if err != nil {
		if s >= 0 {
			unix.Close(s)
		}
		return -1, fmt.Errorf("make a socket in network namespace %s: %w", h.name, err)
	}
	return s, nil
}
