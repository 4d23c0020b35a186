package holder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ServerConfig configures a Server. Zero limits take their defaults.
type ServerConfig struct {
	Path string // DefaultPath
	UID  int    // the only user that may connect, by the kernel's word; 0 is root
	Log  *slog.Logger

	MaxItems     int   // 4096
	MaxFiles     int   // 16384 descriptors
	MaxBlobBytes int64 // 256 MiB
	MaxClients   int   // 16 connections
}

func (c ServerConfig) withDefaults() ServerConfig {
	c.Path = cmp.Or(c.Path, DefaultPath)
	c.MaxItems = cmp.Or(c.MaxItems, 4096)
	c.MaxFiles = cmp.Or(c.MaxFiles, 16384)
	c.MaxBlobBytes = cmp.Or(c.MaxBlobBytes, 256<<20)
	c.MaxClients = cmp.Or(c.MaxClients, 16)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Server holds items for its clients.
type Server struct {
	cfg ServerConfig

	mu         sync.Mutex // guards what follows
	items      map[Key]*stored
	usage      Usage
	generation uint64 // of the client that may write
	born       int64  // when that client's agent started
	vacant     bool   // its connection is closed

	clients sync.WaitGroup
}

type stored struct {
	held
	fds   fdset
	bytes int64
}

// NewServer returns a Server that holds nothing.
func NewServer(cfg ServerConfig) *Server {
	return &Server{cfg: cfg.withDefaults(), items: map[Key]*stored{}}
}

// Run listens and serves until ctx ends, then closes everything it holds.
func (s *Server) Run(ctx context.Context) error {
	l, own, err := listen(s.cfg.Path)
	if err != nil {
		return err
	}
	s.cfg.Log.Info("holding", "socket", s.cfg.Path)
	defer func() { // nothing stays on a node
		if err := own.remove(); err != nil {
			s.cfg.Log.Warn("remove the holder socket", "socket", s.cfg.Path, "err", err)
		}
	}()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer s.closeItems()
	defer s.clients.Wait()

	slots := make(chan struct{}, s.cfg.MaxClients)
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			s.cfg.Log.Warn("accept on the holder socket", "err", err)
			select { // out of descriptors, most likely: the listener is still good
			case <-time.After(100 * time.Millisecond):
				continue
			case <-ctx.Done():
				return nil
			}
		}
		select {
		case slots <- struct{}{}:
		default:
			s.cfg.Log.Warn("refuse a client", "err", "too many connections", "limit", s.cfg.MaxClients)
			c.Close()
			continue
		}
		s.clients.Go(func() {
			defer func() { <-slots }()
			s.serve(ctx, c)
		})
	}
}

// listen binds the socket under a name of its own and moves it into place, so that a client finds the old
// socket or the new one and never none.
func listen(path string) (*net.UnixListener, socket, error) {
	fail := func(err error) (*net.UnixListener, socket, error) {
		return nil, socket{}, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fail(err)
	}
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	os.Remove(tmp)
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: tmp, Net: "unixpacket"})
	if err != nil {
		return fail(err)
	}
	l.SetUnlinkOnClose(false)
	own := socket{path: path}
	err = os.Chmod(tmp, 0o600)
	if err == nil {
		own.file, err = os.Stat(tmp)
	}
	if err == nil {
		err = own.exclusively(func() error { return os.Rename(tmp, path) })
	}
	if err != nil {
		l.Close()
		os.Remove(tmp)
		return fail(err)
	}
	return l, own, nil
}

// socket is the file that a holder listens on.
type socket struct {
	path string
	file os.FileInfo
}

// remove deletes the file, unless a successor has put its own in its place.
func (s socket) remove() error {
	return s.exclusively(func() error {
		now, err := os.Stat(s.path)
		if err == nil && os.SameFile(s.file, now) {
			err = os.Remove(s.path)
		}
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return err
	})
}

// exclusively runs f while no other holder puts a socket into the directory or takes one out. The lock is the
// directory's own, so that it leaves no file.
func (s socket) exclusively(f func() error) error {
	dir, err := os.Open(filepath.Dir(s.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", dir.Name(), err)
	}
	return f()
}

func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()

	uid, err := peerUID(c)
	if err == nil && int(uid) != s.cfg.UID {
		err = fmt.Errorf("%w: user %d may not use the holder", ErrRefused, uid)
	}
	if err != nil {
		s.cfg.Log.Warn("refuse a client", "err", err)
		// Its first record is read, and thrown away: a socket that closes with something unread resets the peer, which
		// then would not learn why.
		c.SetReadDeadline(time.Now().Add(time.Second))
		var req request
		in, _ := receive(c, make([]byte, maxRecord), &req)
		in.close()
		send(c, response{Code: codeOf(err), Error: err.Error()}, nil)
		return
	}

	var generation uint64 // of this client; 0 until its Hello, and for readers
	defer func() { s.leave(generation) }()
	greeted := false
	buf := make([]byte, maxRecord)
	for {
		var req request
		in, err := receive(c, buf, &req)
		switch {
		case errors.Is(err, ErrInvalid): // records have borders: the next one is readable
			if send(c, response{Code: codeOf(err), Error: err.Error()}, nil) != nil {
				return
			}
			continue
		case err != nil:
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				s.cfg.Log.Debug("client gone", "err", err)
			}
			return
		}
		var resp response
		var out fdset
		switch {
		case req.Op == opHello:
			generation, err = s.hello(req)
			greeted = err == nil
			resp.Generation = generation
		case !greeted:
			err = fmt.Errorf("%w: %q before hello", ErrInvalid, req.Op)
		default:
			resp, out, err = s.handle(req, generation, &in)
		}
		in.close() // those that put did not take
		if err != nil {
			resp = response{Code: codeOf(err), Error: err.Error()}
		}
		resp.Usage = s.Usage()
		err = send(c, resp, out)
		out.close()
		if err != nil {
			s.cfg.Log.Debug("client gone", "err", err)
			return
		}
	}
}

func (s *Server) hello(req request) (uint64, error) {
	if req.Version != Version {
		return 0, fmt.Errorf("%w: the holder speaks %d, the client %d", ErrVersion, Version, req.Version)
	}
	if !req.Writer {
		return 0, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.Born < s.born { // an old agent that reconnects while it drains must not take the node back
		return 0, fmt.Errorf("%w: it started %v later", ErrSuperseded, time.Duration(s.born-req.Born))
	}
	s.born, s.vacant = req.Born, false
	s.generation++
	s.cfg.Log.Info("agent takes over", "generation", s.generation, "items", s.usage.Items, "files", s.usage.Files)
	return s.generation, nil
}

// leave notes that a client's connection is closed.
func (s *Server) leave(generation uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if generation == s.generation && generation != 0 {
		s.vacant = true
	}
}

// handle executes one request. It takes descriptors from *in by emptying it; the caller closes those returned.
func (s *Server) handle(req request, generation uint64, in *fdset) (response, fdset, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch req.Op {
	case opPing, opPut, opDelete:
		if generation != s.generation || generation == 0 {
			return response{}, nil, fmt.Errorf("%w: generation %d, now %d", ErrSuperseded, generation, s.generation)
		}
	}
	switch req.Op {
	case opPing:
		return response{Generation: s.generation}, nil, nil
	case opWriter:
		return response{Generation: s.generation, Vacant: s.vacant}, nil, nil
	case opPut:
		err := s.put(req, *in)
		if err == nil {
			*in = nil
		}
		return response{}, nil, err
	case opGet:
		it, ok := s.items[req.Key]
		if !ok {
			return response{}, nil, fmt.Errorf("%w: %s", ErrNotFound, req.Key)
		}
		out, err := it.fds.dup() // duplicates: a put may replace the item before they are sent
		if err != nil {
			return response{}, nil, err
		}
		return response{Items: []held{it.held}}, out, nil
	case opList:
		items, more := s.page(req.Key)
		return response{Items: items, More: more}, nil, nil
	case opDelete:
		s.remove(req.Key)
		return response{}, nil, nil
	}
	return response{}, nil, fmt.Errorf("%w: unknown operation %q", ErrInvalid, req.Op)
}

func (s *Server) put(req request, fds fdset) error {
	if err := checkItem(req.Key, req.Meta, req.Names, len(fds)); err != nil {
		return err
	}
	var size int64
	if req.Blob {
		if len(fds) != 1 {
			return fmt.Errorf("%w: a blob is one file, %s has %d", ErrInvalid, req.Key, len(fds))
		}
		var err error
		if size, err = blobSize(fds[0]); err != nil {
			return err
		}
	}
	after := s.usage
	if old := s.items[req.Key]; old != nil {
		after.Items--
		after.Files -= len(old.fds)
		after.BlobBytes -= old.bytes
	}
	after.Items++
	after.Files += len(fds)
	after.BlobBytes += size
	switch {
	case after.Items > s.cfg.MaxItems:
		return fmt.Errorf("%w: %s would be item %d of at most %d", ErrFull, req.Key, after.Items, s.cfg.MaxItems)
	case after.Files > s.cfg.MaxFiles:
		return fmt.Errorf("%w: %s would make %d descriptors of at most %d", ErrFull, req.Key, after.Files, s.cfg.MaxFiles)
	case after.BlobBytes > s.cfg.MaxBlobBytes:
		return fmt.Errorf("%w: %s would make %d bytes of blobs of at most %d", ErrFull, req.Key, after.BlobBytes, s.cfg.MaxBlobBytes)
	}
	s.remove(req.Key)
	s.items[req.Key] = &stored{
		held: held{Key: req.Key, Meta: req.Meta, Names: req.Names, Stamp: req.Stamp, Blob: req.Blob},
		fds:  fds, bytes: size,
	}
	s.usage = after
	return nil
}

func (s *Server) remove(k Key) {
	it, ok := s.items[k]
	if !ok {
		return
	}
	it.fds.close()
	delete(s.items, k)
	s.usage.Items--
	s.usage.Files -= len(it.fds)
	s.usage.BlobBytes -= it.bytes
}

// page lists items in the order of their keys, after the given one.
func (s *Server) page(after Key) (items []held, more bool) {
	keys := make([]Key, 0, len(s.items))
	for k := range s.items {
		if compareKeys(k, after) > 0 {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, compareKeys)
	bytes := 0
	for _, k := range keys {
		it := s.items[k]
		bytes += len(it.Meta)*4/3 + len(k.Kind) + len(k.Name) + len(it.Stamp) + 64
		for _, n := range it.Names {
			bytes += len(n) + 3
		}
		if bytes > listBytes && len(items) > 0 {
			return items, true
		}
		items = append(items, it.held)
	}
	return items, false
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
}

// Usage returns what is held now.
func (s *Server) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.usage
}

func (s *Server) closeItems() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.items {
		s.remove(k)
	}
}
