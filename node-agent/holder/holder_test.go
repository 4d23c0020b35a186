package holder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv(toyAgent) != "" {
		runToyAgent(os.Getenv(toyAgent))
		return
	}
	goleak.VerifyTestMain(m)
}

// start runs a holder until the test or stop ends it.
func start(t *testing.T, cfg ServerConfig) (s *Server, stop func()) {
	t.Helper()
	if cfg.Path == "" {
		cfg.Path = filepath.Join(t.TempDir(), "holder.sock")
	}
	s = NewServer(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	waitFor(t, "the holder listens", func() bool {
		c, err := net.Dial("unixpacket", cfg.Path)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return s, stop
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func connect(t *testing.T, s *Server, writer bool) *Client {
	t.Helper()
	c, err := Dial(t.Context(), s.cfg.Path, writer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func openFiles(t *testing.T) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

var ctx = context.Background()

func TestAnItemComesBackAsItWasPut(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	c := connect(t, s, true)
	r, w := pipe(t)
	key := Key{"pod", "a"}
	if err := c.Put(ctx, Item{Key: key, Meta: []byte("who it is"), Names: []string{"in", "out"}, Files: []*os.File{r, w}}); err != nil {
		t.Fatal(err)
	}
	it, err := connect(t, s, false).Get(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	if string(it.Meta) != "who it is" || len(it.Files) != 2 {
		t.Fatalf("got %q with %d files", it.Meta, len(it.Files))
	}
	if _, err := it.File("out").WriteString("x"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := r.Read(b); err != nil || b[0] != 'x' {
		t.Fatalf("read %q, %v through the pipe that was held", b, err)
	}
	if it.File("other") != nil {
		t.Error("a file that was not put")
	}
	if err := c.Delete(ctx, key); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(ctx, key); !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v after delete", err)
	}
	if err := c.Delete(ctx, key); err != nil {
		t.Fatalf("delete of what is not held: %v", err)
	}
}

func TestTheYoungerAgentWritesAndTheOlderMayRead(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	old := connect(t, s, true)
	put := func(c *Client) error { return c.Put(ctx, Item{Key: Key{"pod", "a"}}) }
	if err := put(old); err != nil {
		t.Fatal(err)
	}
	young := connect(t, s, true)
	if young.Generation() <= old.Generation() {
		t.Fatalf("generation %d after %d", young.Generation(), old.Generation())
	}
	if err := put(old); !errors.Is(err, ErrSuperseded) {
		t.Fatalf("put by the old agent: %v", err)
	}
	if _, err := old.Get(ctx, Key{"pod", "a"}); err != nil {
		t.Fatalf("get by the old agent: %v", err)
	}
	if err := put(young); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(ctx, s.cfg.Path, true, 1); !errors.Is(err, ErrSuperseded) {
		t.Fatalf("an older agent reconnects: %v", err)
	}
	if err := put(connect(t, s, false)); !errors.Is(err, ErrSuperseded) {
		t.Fatalf("put by a reader: %v", err)
	}
}

func TestTheHolderRefusesStrangersAndOtherVersions(t *testing.T) {
	s, _ := start(t, ServerConfig{UID: 4242})
	if _, err := Dial(ctx, s.cfg.Path, true); !errors.Is(err, ErrRefused) {
		t.Errorf("another user: %v", err)
	}
	s, _ = start(t, ServerConfig{})
	conn, err := net.Dial("unixpacket", s.cfg.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	uc := conn.(*net.UnixConn)
	for _, tc := range []struct {
		send string
		want string
	}{
		{`{"op":"list"}`, "invalid"},
		{`{"op":"hello","version":99}`, "version"},
		{`not json`, "invalid"},
		{`{"op":"hello","version":1}`, ""},
		{`{"op":"steal"}`, "invalid"},
		{strings.Repeat(" ", maxRecord+1), "invalid"},
	} {
		if _, err := uc.Write([]byte(tc.send)); err != nil {
			t.Fatal(err)
		}
		var resp response
		if _, err := receive(uc, make([]byte, maxRecord), &resp); err != nil || resp.Code != tc.want {
			t.Errorf("%.40q: code %q, want %q (%v)", tc.send, resp.Code, tc.want, err)
		}
	}
}

func TestLimitsAreSaidAndLeakNothing(t *testing.T) {
	s, _ := start(t, ServerConfig{MaxItems: 3, MaxFiles: 4, MaxBlobBytes: 1000})
	c := connect(t, s, true)
	r, w := pipe(t)
	two := func(name string) Item {
		return Item{Key: Key{"pod", name}, Names: []string{"a", "b"}, Files: []*os.File{r, w}}
	}
	for _, name := range []string{"1", "2"} {
		if err := c.Put(ctx, two(name)); err != nil {
			t.Fatal(err)
		}
	}
	before := openFiles(t)
	for range 50 {
		if err := c.Put(ctx, two("3")); !errors.Is(err, ErrFull) {
			t.Fatalf("a fifth descriptor: %v", err)
		}
		if err := c.Put(ctx, two("2")); err != nil {
			t.Fatalf("in place of one that is held: %v", err)
		}
		if err := c.PutBlob(ctx, "big", make([]byte, 1001)); !errors.Is(err, ErrFull) {
			t.Fatalf("a blob of 1001 bytes: %v", err)
		}
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
	if err := c.Put(ctx, Item{Key: Key{"pod", "3"}}); err != nil {
		t.Fatal(err)
	}
	if err := c.Put(ctx, Item{Key: Key{"pod", "4"}}); !errors.Is(err, ErrFull) {
		t.Fatalf("a fourth item: %v", err)
	}
	if err := c.Put(ctx, Item{Key: Key{"pod", "5"}, Meta: make([]byte, maxMeta+1)}); !errors.Is(err, ErrInvalid) {
		t.Fatalf("too much metadata: %v", err)
	}
	if err := c.Put(ctx, Item{}); !errors.Is(err, ErrInvalid) {
		t.Fatalf("no key: %v", err)
	}
	if u, err := c.Usage(ctx); err != nil || u != (Usage{Items: 3, Files: 4}) {
		t.Fatalf("usage %+v, %v", u, err)
	}
}

func TestABlobIsSealed(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	c := connect(t, s, true)
	secret := bytes.Repeat([]byte("k"), 70<<10) // more than one record
	if err := c.PutBlob(ctx, "certificate", secret); err != nil {
		t.Fatal(err)
	}
	got, err := c.Blob(ctx, "certificate")
	if err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
	it, err := c.Get(ctx, blobKey("certificate"))
	if err != nil {
		t.Fatal(err)
	}
	defer it.Close()
	if _, err := it.Files[0].WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to a held blob: %v", err)
	}
	if err := it.Files[0].Truncate(1); !errors.Is(err, unix.EPERM) {
		t.Errorf("truncate a held blob: %v", err)
	}
	r, _ := pipe(t)
	fds, err := dupFiles([]*os.File{r})
	if err != nil {
		t.Fatal(err)
	}
	defer fds.close()
	if err := c.put(ctx, blobHeld("pipe"), fds); !errors.Is(err, ErrInvalid) {
		t.Errorf("a pipe as a blob: %v", err)
	}
}

func TestListGoesOverManyPages(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	c := connect(t, s, true)
	const n = 300
	for i := range n {
		if err := c.Put(ctx, Item{Key: Key{"pod", fmt.Sprintf("%03d", i)}, Meta: make([]byte, 1000)}); err != nil {
			t.Fatal(err)
		}
	}
	items, err := c.List(ctx)
	if err != nil || len(items) != n {
		t.Fatalf("%d items, %v", len(items), err)
	}
	for i, it := range items {
		if it.Key.Name != fmt.Sprintf("%03d", i) {
			t.Fatalf("item %d is %s", i, it.Key)
		}
	}
}

func TestWeeksOfChurnLeakNoDescriptor(t *testing.T) {
	var log bytes.Buffer
	s, stop := start(t, ServerConfig{Log: slog.New(slog.NewTextHandler(&log, nil))})
	r, w := pipe(t)
	round := func(i int) {
		c, err := Dial(ctx, s.cfg.Path, true)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		k := Key{"pod", fmt.Sprint(i % 7)}
		if err := c.Put(ctx, Item{Key: k, Meta: []byte("marker-in-meta"), Names: []string{"r", "w"}, Files: []*os.File{r, w}}); err != nil {
			t.Fatal(err)
		}
		if err := c.PutBlob(ctx, "b", []byte("marker-in-blob")); err != nil {
			t.Fatal(err)
		}
		it, err := c.Get(ctx, k)
		if err != nil {
			t.Fatal(err)
		}
		it.Close()
		if i%3 == 0 {
			if err := c.Delete(ctx, k); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range 21 {
		round(i)
	}
	settled := func() int { time.Sleep(50 * time.Millisecond); return openFiles(t) }
	before := settled()
	for i := range 2100 {
		round(i)
	}
	if after := settled(); after > before {
		t.Errorf("%d descriptors after 2,100 rounds, %d before", after, before)
	}
	stop()
	if strings.Contains(log.String(), "marker-in") {
		t.Error("content was logged")
	}
}

func TestTheKeeperPutsEverythingAgainWhenTheHolderIsBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "holder.sock")
	k := NewKeeper(KeeperConfig{Path: path, Interval: 10 * time.Millisecond})
	run, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); k.Run(run) }()
	defer func() { cancel(); <-done }()

	r, _ := pipe(t)
	err := k.Put(ctx, Item{Key: Key{"pod", "a"}, Names: []string{"r"}, Files: []*os.File{r}})
	if !errors.Is(err, ErrAbsent) {
		t.Fatalf("put without a holder: %v", err)
	}
	if st := k.State(); st.Connected || st.Err == nil {
		t.Fatalf("state without a holder: %+v", st)
	}
	if err := k.PutBlob(ctx, "snapshot", []byte("1")); !errors.Is(err, ErrAbsent) {
		t.Fatal(err)
	}
	for range 3 {
		s, stop := start(t, ServerConfig{Path: path})
		waitFor(t, "all is held", func() bool { u := s.Usage(); return u.Items == 2 && u.Files == 2 })
		waitFor(t, "the keeper knows", func() bool { return k.State().Connected })
		stop()
		waitFor(t, "the keeper notices", func() bool { return !k.State().Connected })
	}
	if err := k.Delete(ctx, Key{"pod", "a"}); err != nil {
		t.Fatal(err)
	}
	s, _ := start(t, ServerConfig{Path: path})
	waitFor(t, "only the blob is held", func() bool { return k.State().Connected && s.Usage() == (Usage{Items: 1, Files: 1, BlobBytes: 1}) })
}

func TestTheNextAgentRestoresAndTheFirstYields(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	var yielded atomic.Bool
	first := NewKeeper(KeeperConfig{Path: s.cfg.Path, Interval: 10 * time.Millisecond, OnSuperseded: func() { yielded.Store(true) }})
	run, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); first.Run(run) }()
	defer func() { cancel(); <-done }()
	waitFor(t, "the first is connected", func() bool { return first.State().Connected })
	r, w := pipe(t)
	if err := first.Put(ctx, Item{Key: Key{"pod", "a"}, Meta: []byte("m"), Names: []string{"w"}, Files: []*os.File{w}}); err != nil {
		t.Fatal(err)
	}
	if err := first.PutBlob(ctx, "cert/x", []byte("c")); err != nil {
		t.Fatal(err)
	}

	second := NewKeeper(KeeperConfig{Path: s.cfg.Path})
	items, err := second.Restore(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(second.forget)
	defer second.client.Close()
	if len(items) != 1 || string(items[0].Meta) != "m" || items[0].File("w") == nil {
		t.Fatalf("restored %+v", items)
	}
	items[0].File("w").WriteString("y")
	items[0].Close()
	b := make([]byte, 1)
	if _, err := io.ReadFull(r, b); err != nil || b[0] != 'y' {
		t.Fatal("the restored file is another")
	}
	if b, err := second.Blob("cert/x"); err != nil || string(b) != "c" {
		t.Fatalf("blob %q, %v", b, err)
	}
	if n := second.Blobs("cert/"); len(n) != 1 || n[0] != "cert/x" {
		t.Fatalf("blobs %v", n)
	}
	waitFor(t, "the first yields", yielded.Load)
	if err := first.PutBlob(ctx, "cert/x", []byte("d")); !errors.Is(err, ErrSuperseded) {
		t.Fatalf("put by the first: %v", err)
	}
	if err := second.PutBlob(ctx, "cert/x", []byte("e")); err != nil {
		t.Fatal(err)
	}
}

// run runs a keeper until the test or stop ends it.
func run(t *testing.T, k *Keeper) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); k.Run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

// TestASupersededAgentHearsThatItsSuccessorIsGone: be it killed or told to stop; but not while it only reconnects, nor
// when it was told to stop itself.
func TestASupersededAgentHearsThatItsSuccessorIsGone(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	var vacant, told atomic.Bool
	quick := KeeperConfig{Path: s.cfg.Path, Interval: 10 * time.Millisecond, Patience: 200 * time.Millisecond}
	cfg := quick
	cfg.OnVacant = func() { vacant.Store(true) }
	first := NewKeeper(cfg)
	run(t, first)
	waitFor(t, "the first writes", func() bool { return first.State().Connected })
	cfg.OnVacant = func() { told.Store(true) }
	stopped := NewKeeper(cfg)
	run(t, stopped)
	waitFor(t, "the second writes", func() bool { return stopped.State().Connected && first.State().Superseded })
	stopped.Leave()
	third := NewKeeper(quick)
	stopThird := run(t, third)
	waitFor(t, "the third writes", func() bool { return third.State().Connected })

	third.mu.Lock()
	third.client.conn.Close() // it comes back
	third.mu.Unlock()
	time.Sleep(2 * quick.Patience)
	if vacant.Load() || !third.State().Connected {
		t.Fatalf("a writer that reconnects is taken for gone: %+v", third.State())
	}
	stopThird()
	waitFor(t, "the first hears that nobody writes", vacant.Load)
	if told.Load() {
		t.Error("an agent that left was asked back")
	}
}

// TestWhatARestoreMissedStaysHeld: pods are served on it.
func TestWhatARestoreMissedStaysHeld(t *testing.T) {
	s, _ := start(t, ServerConfig{})
	r, _ := pipe(t)
	if err := connect(t, s, true).Put(ctx, Item{Key: Key{"pod", "a"}, Names: []string{"r"}, Files: []*os.File{r}}); err != nil {
		t.Fatal(err)
	}
	k := NewKeeper(KeeperConfig{Path: s.cfg.Path, Interval: 10 * time.Millisecond})
	if err := k.PutBlob(ctx, "cert/x", []byte("c")); !errors.Is(err, ErrAbsent) {
		t.Fatal(err)
	}
	run(t, k)
	waitFor(t, "both are held", func() bool { return k.State().Connected && s.Usage().Items == 2 })
	if err := k.Delete(ctx, Key{"pod", "a"}); err != nil || s.Usage().Items != 1 {
		t.Fatalf("%v, %+v", err, s.Usage())
	}
}

// A holder that ends takes its socket with it; one that has a successor leaves the successor's alone.
func TestTheSocketGoesWithItsHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "holder.sock")
	_, stopFirst := start(t, ServerConfig{Path: path})
	first, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	_, stopSecond := start(t, ServerConfig{Path: path})
	waitFor(t, "the second holder has the socket", func() bool {
		now, err := os.Stat(path)
		return err == nil && !os.SameFile(first, now)
	})
	stopFirst()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the first holder took the second's socket along: %v", err)
	}
	stopSecond()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
}
