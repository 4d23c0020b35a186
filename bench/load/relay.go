package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
)

// relay is the least that a hop through user space can be in this language: for each LISTEN=TARGET it copies
// between two sockets, in the kernel where it can (splice), without encryption and without looking.
func relay(ctx context.Context, pairs []string) error {
	if len(pairs) == 0 {
		return errors.New("relay needs LISTEN=TARGET")
	}
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	failed := make(chan error, len(pairs))
	for _, p := range pairs {
		listen, target, ok := strings.Cut(p, "=")
		if !ok {
			return fmt.Errorf("relay %q: write LISTEN=TARGET", p)
		}
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
		go func() { failed <- relayFrom(l, target) }()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

func relayFrom(l net.Listener, target string) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() { // ends with its connection
			defer c.Close()
			up, err := net.Dial("tcp", target)
			if err != nil {
				return
			}
			defer up.Close()
			var wg sync.WaitGroup
			wg.Go(func() { half(up, c) })
			half(c, up)
			wg.Wait()
		}()
	}
}

// half copies one direction and passes its end on.
func half(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if t, ok := to.(*net.TCPConn); ok && err == nil {
		err = t.CloseWrite()
	}
	if err != nil {
		to.Close()
		from.Close()
	}
}
