package main

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

func TestObserve(t *testing.T) {
	addr := freeAddr(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- runEcho(ctx, []string{"-listen", addr}) }()
	waitFor(t, addr)
	o, err := observe(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	if o.ServerPeer != o.ClientLocal || o.ServerLocal != addr || o.ClientPeer != addr {
		t.Errorf("without a mesh the two ends disagree: %+v", o)
	}
	if err := runHalfClose(t.Context(), []string{"-bytes", "100000", addr}); err != nil {
		t.Error(err)
	}
	if err := runStorm(t.Context(), []string{"-n", "50", "-c", "4", "-targets", addr, addr}); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestCallNeedsOK(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, "no stock", http.StatusBadGateway)
	}))
	defer srv.Close()
	if _, err := call(t.Context(), srv.URL); err == nil {
		t.Error("502 was taken for an answer")
	}
}

func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func waitFor(t *testing.T, addr string) {
	t.Helper()
	for range 200 {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("nothing listens on %s", addr)
}
