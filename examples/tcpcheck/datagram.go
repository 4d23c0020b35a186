package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// answer answers each datagram with itself until the socket is closed.
func answer(c *net.UDPConn) error {
	b := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return err
		}
		_, _ = c.WriteToUDPAddrPort(b[:n], from) // the asker asks again
	}
}

// ask sends a datagram to each server from one socket that is not connected, and reports which have answered.
func ask(_ context.Context, args []string) error {
	fs := flag.NewFlagSet("ask", flag.ContinueOnError)
	wait := fs.Duration("wait", time.Second, "for the answers")
	if err := fs.Parse(args); err != nil {
		return err
	}
	servers, err := endpoints(fs.Args())
	if err != nil {
		return err
	}
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return err
	}
	defer c.Close()
	text := fmt.Appendf(nil, "%s %d", marker, rand.Uint64())
	for _, s := range servers {
		if _, err := c.WriteToUDPAddrPort(text, s); err != nil {
			return err
		}
	}
	if err := c.SetReadDeadline(time.Now().Add(*wait)); err != nil {
		return err
	}
	answered := []string{}
	b := make([]byte, 2048)
	for len(answered) < len(servers) {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err == nil && string(b[:n]) == string(text) {
			answered = append(answered, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()).String())
		}
	}
	slices.Sort(answered)
	return report(answered)
}

func endpoints(args []string) (out []netip.AddrPort, err error) {
	for _, a := range args {
		ap, err := netip.ParseAddrPort(a)
		if err != nil {
			return nil, err
		}
		out = append(out, ap)
	}
	return out, nil
}

// resolve asks for a name again and again until its standard input ends, as musl's resolver does: every server at once, from one
// socket that is not connected, and the first answer counts.
func resolve(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("resolve", flag.ContinueOnError)
	every := fs.Duration("every", 50*time.Millisecond, "between two questions")
	again := fs.Duration("again", 2500*time.Millisecond, "ask again after")
	name := fs.String("name", "kubernetes.default.svc.cluster.local.", "to ask for")
	if err := fs.Parse(args); err != nil {
		return err
	}
	servers, err := endpoints(fs.Args())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	fmt.Fprintln(os.Stderr, "resolving")
	var out struct{ Asked, Again, Failed int }
	next := time.NewTicker(*every)
	defer next.Stop()
	for ctx.Err() == nil {
		out.Asked++
		ok := question(*name, *again, servers)
		if !ok {
			out.Again++
			if ok = question(*name, *again, servers); !ok {
				out.Failed++
			}
		}
		select {
		case <-ctx.Done():
		case <-next.C:
		}
	}
	return report(out)
}

// question reports whether the name was answered in time.
func question(name string, within time.Duration, servers []netip.AddrPort) bool {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		return false
	}
	defer c.Close()
	host, err := dnsmessage.NewName(name)
	if err != nil {
		return false
	}
	id := uint16(rand.Uint32())
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: host, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}}}
	packed, err := q.Pack()
	if err != nil {
		return false
	}
	for _, s := range servers {
		if _, err := c.WriteToUDPAddrPort(packed, s); err != nil {
			continue // one of several
		}
	}
	if c.SetReadDeadline(time.Now().Add(within)) != nil {
		return false
	}
	b := make([]byte, 2048)
	for {
		n, from, err := c.ReadFromUDPAddrPort(b)
		if err != nil {
			return false
		}
		var m dnsmessage.Message
		if m.Unpack(b[:n]) == nil && m.ID == id && m.Response && slices.Contains(servers, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())) {
			return m.RCode == dnsmessage.RCodeSuccess && len(m.Answers) > 0
		}
	}
}
