// Command escape tries to get a TCP connection, or single packets, out of a pod past its mesh, in one way per
// run, and says what came of it. The end-to-end tests run it in pods with different rights and look at the
// link between the nodes and at the agents' counters; it knows nothing of either.
//
//	escape serve                       answers and logs every line that it gets on port 9000, TCP and UDP,
//	                                   and answers probes on port 9001
//	escape WAY -to ADDR:PORT -token T  tries one way and prints "answered: …", "sent" or "failed: …"
//	escape wait                        waits to be told to end
//	escape list                        the ways
package main

import (
	"bufio"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options of a way. Few ways need all of them.
type options struct {
	to    netip.AddrPort // the pod to reach
	via   netip.AddrPort // a destination outside the mesh
	as    netip.Addr     // an address that is not this pod's
	from  uint           // a port to bind
	token string         // what to send: whoever finds it has found it in clear
	n     int
	wait  time.Duration
}

// A way returns what happened. An error is a failure of the way, which the mesh may well be the reason of.
type way func(options) (string, error)

var ways = map[string]way{}

func main() {
	for _, m := range []map[string]way{connecting, handmade, sabotage, onHost} {
		maps.Copy(ways, m)
	}
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: escape serve|list|WAY [flags]")
		os.Exit(2)
	}
	switch verb := os.Args[1]; verb {
	case "serve":
		fmt.Fprintln(os.Stderr, "escape:", serve())
		os.Exit(1)
	case "wait":
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		<-stop
	case "list":
		fmt.Println(strings.Join(slices.Sorted(maps.Keys(ways)), "\n"))
	default:
		w, ok := ways[verb]
		o, err := parse(verb, os.Args[2:])
		if !ok {
			err = fmt.Errorf("there is no way %q", verb)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "escape:", err)
			os.Exit(2)
		}
		said, err := w(o)
		if err != nil {
			said = "failed: " + err.Error()
		}
		fmt.Println(said)
	}
}

func parse(verb string, args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet(verb, flag.ContinueOnError)
	fs.TextVar(&o.to, "to", netip.AddrPort{}, "pod to reach")
	fs.TextVar(&o.via, "via", netip.AddrPort{}, "destination outside the mesh")
	fs.TextVar(&o.as, "as", netip.Addr{}, "address of somebody else")
	fs.StringVar(&o.token, "token", "", "what to send")
	fs.UintVar(&o.from, "from", 0, "port to connect from")
	fs.IntVar(&o.n, "n", 1, "how often")
	fs.DurationVar(&o.wait, "wait", 1500*time.Millisecond, "how long to wait for an answer")
	err := fs.Parse(args)
	return o, err
}

// serve logs every line that reaches it, with who sent it.
func serve() error {
	name, _ := os.Hostname()
	u, err := net.ListenPacket("udp", ":9000")
	if err != nil {
		return err
	}
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := u.ReadFrom(b)
			if err != nil {
				return
			}
			fmt.Printf("reached udp %s from %s\n", strings.TrimSpace(string(b[:n])), from)
		}
	}()
	probed := &http.Server{Addr: ":9001", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close") // the server closes first, so the client's port is free at once
		fmt.Printf("probe from %s\n", r.RemoteAddr)
	})}
	go func() { fmt.Fprintln(os.Stderr, "escape:", probed.ListenAndServe()) }()
	l, err := net.Listen("tcp", ":9000")
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			for s := bufio.NewScanner(c); s.Scan(); {
				fmt.Printf("reached tcp %s from %s\n", s.Text(), c.RemoteAddr())
				fmt.Fprintf(c, "name=%s peer=%s\n", name, c.RemoteAddr())
			}
		}()
	}
}
