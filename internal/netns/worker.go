package netns

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// socket makes a socket on a thread that visits the namespace for it.
func (h *Handle) socket(family, typ, proto int) (int, error) {
	s := -1
	err := h.Do(func() (err error) {
		s, err = unix.Socket(family, typ, proto)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("make a socket in network namespace %s: %w", h.name, err)
	}
	return s, nil
}
