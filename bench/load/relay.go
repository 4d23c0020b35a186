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
func relay(ctx context.Context, pairs []string) error { return hop(ctx, pairs, splice) }

// hop joins each connection that comes to LISTEN with one to TARGET.
func hop(ctx context.Context, pairs []string, join func(in, out *net.TCPConn)) error {
	if len(pairs) == 0 {
		return errors.New("say LISTEN=TARGET")
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
			return fmt.Errorf("%q: write LISTEN=TARGET", p)
		}
		l, err := net.Listen("tcp", listen)
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
		go func() { failed <- hopFrom(l, target, join) }()
	}
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}

func hopFrom(l net.Listener, target string, join func(in, out *net.TCPConn)) error {
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
			join(c.(*net.TCPConn), up.(*net.TCPConn))
		}()
	}
}

func splice(in, out *net.TCPConn) {
	var wg sync.WaitGroup
	wg.Go(func() { half(out, in) })
	half(in, out)
	wg.Wait()
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
