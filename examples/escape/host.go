package main

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// onHost are the ways of a pod in the node's network namespace, where the node's own processes, kubelet before
// all, may go straight to the application.
var onHost = map[string]way{
	"flood": func(o options) (string, error) { // -n connections at once
		var fds []int
		defer func() {
			for _, fd := range fds {
				unix.Close(fd)
			}
		}()
		for range o.n {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				break
			}
			fds = append(fds, fd)
			if err := unix.Connect(fd, sockaddr(o.to, false)); err != nil && err != unix.EINPROGRESS {
				return "", err
			}
		}
		for _, fd := range fds {
			_, _ = unix.Write(fd, []byte(o.token+"\n")) // who is not connected yet says nothing
		}
		b := make([]byte, 64)
		time.Sleep(200 * time.Millisecond)
		for _, fd := range fds {
			if n, err := unix.Read(fd, b); err == nil && n > 0 {
				return "answered: " + string(b[:n]), nil
			}
		}
		return "", fmt.Errorf("none of %d connections was answered", len(fds))
	},
}
