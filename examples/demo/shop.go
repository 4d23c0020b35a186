package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"
)

// marker is planted in every request and answer of the shop. Whoever captures packets between two nodes
// and finds it there has found a packet in clear.
const marker = "warren-demo-marker-7c1e"

// item is one thing the shop sells.
type item struct {
	Name  string `json:"name"`
	Price string `json:"price"`
	Stock int    `json:"stock"`
}

// seen is what a server learned about the connection a request came on.
type seen struct {
	Service string `json:"service"`
	Version string `json:"version"`
	Client  string `json:"client"` // source address as the server's socket has it
	Server  string `json:"server"` // the server's own address
}

// reply travels back through the shop and grows by one hop in each service.
type reply struct {
	Marker string `json:"marker"`
	Hops   []seen `json:"hops"`
	Items  []item `json:"items,omitempty"`
}

func saw(service string, r *http.Request) seen {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	s := seen{Service: service, Version: version, Client: r.RemoteAddr}
	if local != nil {
		s.Server = local.String()
	}
	return s
}

func runInventory(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("inventory", flag.ContinueOnError)
	addr := fs.String("listen", ":8080", "address to listen on")
	quiet := fs.Bool("quiet", false, "no line for each request")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *quiet {
		slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	}
	return serveShop(ctx, *addr, "inventory", "/stock", func(_ context.Context, hop seen) (reply, error) {
		return reply{Marker: marker, Hops: []seen{hop}, Items: []item{
			{Name: "carrot", Stock: 120}, {Name: "dandelion", Stock: 7}, {Name: "clover", Stock: 48},
		}}, nil
	})
}

func runCatalog(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("catalog", flag.ContinueOnError)
	addr := fs.String("listen", ":8080", "address to listen on")
	upstream := fs.String("inventory", "http://inventory:8080/stock", "URL of the inventory")
	if err := fs.Parse(args); err != nil {
		return err
	}
	prices := map[string]string{"carrot": "0.20", "dandelion": "0.35", "clover": "0.10"}
	return serveShop(ctx, *addr, "catalog", "/items", func(ctx context.Context, hop seen) (reply, error) {
		stock, err := call(ctx, *upstream)
		if err != nil {
			return reply{}, err
		}
		for i := range stock.Items {
			stock.Items[i].Price = prices[stock.Items[i].Name]
		}
		stock.Hops = append([]seen{hop}, stock.Hops...)
		return stock, nil
	})
}

func runUI(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("ui", flag.ContinueOnError)
	addr := fs.String("listen", ":8080", "address to listen on")
	upstream := fs.String("catalog", "http://catalog:8080/items", "URL of the catalog")
	if err := fs.Parse(args); err != nil {
		return err
	}
	return serveShop(ctx, *addr, "ui", "/", func(ctx context.Context, hop seen) (reply, error) {
		items, err := call(ctx, *upstream)
		if err != nil {
			return reply{}, err
		}
		items.Hops = append([]seen{hop}, items.Hops...)
		return items, nil
	})
}

// shopClient keeps connections between calls, but not for ever: see renewConnections.
var shopClient = &http.Client{
	Timeout:   5 * time.Second,
	Transport: &http.Transport{IdleConnTimeout: 2 * time.Second, MaxIdleConnsPerHost: 16},
}

// renewConnections closes what is idle every two seconds. A connection that was open when its pod joined the
// mesh stays in clear for as long as it lives, so one that lived for ever would never be protected.
func renewConnections(ctx context.Context) {
	t := time.NewTicker(2 * time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			shopClient.CloseIdleConnections()
		}
	}
}

func call(ctx context.Context, url string) (reply, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return reply{}, err
	}
	req.Header.Set("X-Marker", marker)
	resp, err := shopClient.Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return reply{}, fmt.Errorf("calling %s: %s: %s", url, resp.Status, body)
	}
	var out reply
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

// serveShop answers path with what answer returns, /healthz with 200, and drains when ctx ends.
func serveShop(ctx context.Context, addr, service, path string, answer func(context.Context, seen) (reply, error)) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	pattern := "GET " + path
	if path == "/" {
		pattern += "{$}"
	}
	mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		hop := saw(service, r)
		out, err := answer(r.Context(), hop)
		status := http.StatusOK
		if err != nil {
			status = http.StatusBadGateway
		}
		slog.Info("request", "service", service, "version", version, "client", hop.Client, "server", hop.Server,
			"status", status, "ms", time.Since(start).Milliseconds(), "error", errorText(err))
		if err != nil {
			http.Error(w, err.Error(), status)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		if err := enc.Encode(out); err != nil {
			slog.Info("client went away", "service", service, "error", err)
		}
	})
	return serveHTTP(ctx, addr, service, mux)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func serveHTTP(ctx context.Context, addr, service string, h http.Handler) error {
	srv := &http.Server{Addr: addr, Handler: h, ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- srv.ListenAndServe() }()
	go renewConnections(ctx)
	slog.Info("listening", "service", service, "version", version, "addr", addr)
	select {
	case err := <-failed:
		return fmt.Errorf("listening on %s: %w", addr, err)
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		return fmt.Errorf("draining: %w", err)
	}
	if err := <-failed; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func runGet(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("get", flag.ContinueOnError)
	timeout := fs.Duration("timeout", 5*time.Second, "give up after this long")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() != 1 {
		return errors.New("usage: demo get [-timeout 5s] URL")
	}
	ctx, cancel := context.WithTimeout(ctx, *timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, fs.Arg(0), nil)
	if err != nil {
		return err
	}
	req.Header.Set("X-Marker", marker)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", fs.Arg(0), resp.Status)
	}
	return nil
}

func runLoad(ctx context.Context, args []string) error {
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	url := fs.String("url", "http://ui:8080/", "what to call")
	every := fs.Duration("every", 100*time.Millisecond, "time between calls")
	total := fs.Int("n", 0, "stop after this many calls; 0 runs until told to stop")
	report := fs.Duration("report", 5*time.Second, "time between log lines")
	count := fs.Bool("count", false, "print in the end how many answers came of each version")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var ok, failed int
	last, versions := "", map[string]int{}
	say := func() { slog.Info("load", "url", *url, "ok", ok, "failed", failed, "last_error", last) }
	go renewConnections(ctx)
	next, tell := time.NewTicker(*every), time.NewTicker(*report)
	defer next.Stop()
	defer tell.Stop()
	for *total == 0 || ok+failed < *total {
		select {
		case <-ctx.Done():
			say()
			return nil
		case <-tell.C:
			say()
		case <-next.C:
			if answer, err := call(ctx, *url); err != nil {
				if ctx.Err() != nil {
					continue
				}
				failed++
				last = err.Error()
				slog.Warn("call failed", "url", *url, "error", err)
			} else {
				ok++
				if len(answer.Hops) > 0 {
					versions[answer.Hops[0].Version]++
				}
			}
		}
	}
	say()
	if *count {
		if err := json.NewEncoder(os.Stdout).Encode(versions); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d calls of %s failed, last: %s", failed, ok+failed, *url, last)
	}
	return nil
}
