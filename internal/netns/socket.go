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
	own, err := openOwn() // not home: the caller may be on a visit
	if err != nil {
		return -1, err
	}
	defer unix.Close(own)
	s, err := h.socketFrom(own, family, typ, proto)
	if err != nil {
		return -1, fmt.Errorf("make a socket in network namespace %s: %w", h.name, err)
	}
	return s, nil
}

// socketFrom makes a socket in the namespace from a thread whose own namespace is known: the thread goes there and back.
func (h *Handle) socketFrom(own, family, typ, proto int) (int, error) {
	s := -1
	runtime.LockOSThread()
	home, err := h.visitFrom(own, func() (err error) {
		s, err = socket(family, typ, proto)
		return err
	})
	if home {
		runtime.UnlockOSThread()
	} // else the thread is lost, and ends with the caller's goroutine
	if err != nil {
		if s >= 0 {
			Close(s)
		}
		return -1, err
	}
	return s, nil
}
