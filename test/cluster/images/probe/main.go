// Command probe is the test cluster's own workload: an HTTP echo server, an HTTP
// client and a resolver in one small binary.
//
//	probe serve [PORT]      answer every request with host name, node and peer
//	probe get URL...        print each answer; exit 1 if one failed
//	probe lookup NAME...    print the addresses of each name
//	probe cat FILE...       print files
//	probe ls DIR...         list directories
//	probe sleep             do nothing until told to end
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: probe serve|get|lookup|cat|ls|sleep [argument...]")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(verb string, args []string) error {
	switch verb {
	case "serve":
		return serve(append(args, "8080")[0])
	case "get":
		return each(args, get)
	case "lookup":
		return each(args, lookup)
	case "cat":
		return each(args, func(f string) error {
			b, err := os.ReadFile(f)
			os.Stdout.Write(b)
			return err
		})
	case "ls":
		return each(args, func(d string) error {
			es, err := os.ReadDir(d)
			var names []string
			for _, e := range es {
				names = append(names, e.Name())
			}
			fmt.Println(strings.Join(names, " "))
			return err
		})
	case "sleep":
		<-interrupted()
		return nil
	}
	return fmt.Errorf("unknown command %q", verb)
}

func each(args []string, f func(string) error) error {
	var errs []error
	for _, a := range args {
		errs = append(errs, f(a))
	}
	return errors.Join(errs...)
}

func interrupted() <-chan os.Signal {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	return c
}

func serve(port string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	s := &http.Server{Addr: ":" + port, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "host=%s node=%s remote=%s\n", name, os.Getenv("NODE"), r.RemoteAddr)
	})}
	go func() {
		<-interrupted()
		s.Close()
	}()
	if err := s.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func get(url string) error {
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Get(url)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	fmt.Printf("%d %s", r.StatusCode, b)
	return err
}

func lookup(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	a, err := net.DefaultResolver.LookupHost(ctx, name)
	fmt.Println(strings.Join(a, " "))
	return err
}
