package holder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Client is one connection to a holder.
type Client struct {
	generation uint64

	mu   sync.Mutex // one request at a time
	conn *net.UnixConn
	buf  []byte
	dead error
}

// Dial connects and greets. A writer takes over from the writer before it.
func Dial(ctx context.Context, path string, writer bool) (*Client, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return nil, err
	}
	return dial(ctx, path, writer, now.Nano())
}

func dial(ctx context.Context, path string, writer bool, born int64) (*Client, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("%w at %s: %w", ErrAbsent, path, err)
	}
	cl := &Client{conn: c.(*net.UnixConn), buf: make([]byte, maxRecord)}
	resp, _, err := cl.do(ctx, request{Op: opHello, Version: Version, Writer: writer, Born: born}, nil)
	if err != nil {
		c.Close()
		return nil, err
	}
	cl.generation = resp.Generation
	return cl, nil
}

// Generation is the number of this writer among all that the holder has seen; 0 for a reader.
func (c *Client) Generation() uint64 { return c.generation }

// Close ends the connection. What was put stays held.
func (c *Client) Close() error { return c.conn.Close() }

// do sends one request and waits for its answer. After an error of the transport the answer could arrive
// late and be taken for the next one's, so the connection is given up.
func (c *Client) do(ctx context.Context, req request, fds fdset) (*response, fdset, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dead != nil {
		return nil, nil, c.dead
	}
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(10 * time.Second)
	}
	c.conn.SetDeadline(deadline)
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	var resp response
	err := send(c.conn, req, fds)
	var in fdset
	if err == nil {
		in, err = receive(c.conn, c.buf, &resp)
	} else if errors.Is(err, ErrInvalid) {
		return nil, nil, err // never left this process
	}
	if err != nil {
		c.dead = fmt.Errorf("%w: %s: %w", ErrAbsent, req.Op, err)
		c.conn.Close()
		return nil, nil, c.dead
	}
	if err := resp.err(); err != nil {
		in.close()
		return nil, nil, err
	}
	return &resp, in, nil
}

// Ping asks whether the holder is there and this client may still write.
func (c *Client) Ping(ctx context.Context) error {
	_, _, err := c.do(ctx, request{Op: opPing}, nil)
	return err
}

// Vacant asks whether the last writer of all has closed its connection, and which generation it was. A holder that
// no writer has come to yet is not vacant: one that was there before may be on its way back.
func (c *Client) Vacant(ctx context.Context) (vacant bool, generation uint64, err error) {
	resp, _, err := c.do(ctx, request{Op: opWriter}, nil)
	if err != nil {
		return false, 0, err
	}
	return resp.Vacant, resp.Generation, nil
}

// Put holds an item, in place of the one that had its key. The files stay the caller's.
func (c *Client) Put(ctx context.Context, it Item) error {
	fds, err := dupFiles(it.Files)
	if err != nil {
		return fmt.Errorf("put %s: %w", it.Key, err)
	}
	defer fds.close()
	return c.put(ctx, held{Key: it.Key, Meta: it.Meta, Names: it.Names}, fds)
}

func (c *Client) put(ctx context.Context, h held, fds fdset) error {
	if err := checkItem(h.Key, h.Meta, h.Names, len(fds)); err != nil {
		return err
	}
	_, _, err := c.do(ctx, request{Op: opPut, Key: h.Key, Meta: h.Meta, Names: h.Names, Stamp: h.Stamp, Blob: h.Blob}, fds)
	return err
}

// Get returns an item with files of the caller's own.
func (c *Client) Get(ctx context.Context, k Key) (*Item, error) {
	h, fds, err := c.get(ctx, k)
	if err != nil {
		return nil, err
	}
	return &Item{Key: h.Key, Meta: h.Meta, Names: h.Names, Files: fds.files(h.Names)}, nil
}

func (c *Client) get(ctx context.Context, k Key) (held, fdset, error) {
	resp, fds, err := c.do(ctx, request{Op: opGet, Key: k}, nil)
	if err != nil {
		return held{}, nil, err
	}
	if len(resp.Items) != 1 || len(fds) != len(resp.Items[0].Names) {
		fds.close()
		return held{}, nil, fmt.Errorf("get %s from the holder: %d items with %d files", k, len(resp.Items), len(fds))
	}
	return resp.Items[0], fds, nil
}

// List returns what is held, without files.
func (c *Client) List(ctx context.Context) ([]Item, error) {
	hs, err := c.list(ctx)
	if err != nil {
		return nil, err
	}
	items := make([]Item, len(hs))
	for i, h := range hs {
		items[i] = Item{Key: h.Key, Meta: h.Meta, Names: h.Names}
	}
	return items, nil
}

func (c *Client) list(ctx context.Context) ([]held, error) {
	var all []held
	var after Key
	for {
		resp, fds, err := c.do(ctx, request{Op: opList, Key: after}, nil)
		if err != nil {
			return nil, err
		}
		fds.close()
		all = append(all, resp.Items...)
		if !resp.More || len(resp.Items) == 0 {
			return all, nil
		}
		after = resp.Items[len(resp.Items)-1].Key
	}
}

// Delete lets go of an item. One that is not held is no error.
func (c *Client) Delete(ctx context.Context, k Key) error {
	_, _, err := c.do(ctx, request{Op: opDelete, Key: k}, nil)
	return err
}

// Usage returns what the holder keeps now.
func (c *Client) Usage(ctx context.Context) (Usage, error) {
	resp, fds, err := c.do(ctx, request{Op: opList, Key: Key{Kind: "\xff"}}, nil)
	if err != nil {
		return Usage{}, err
	}
	fds.close()
	return resp.Usage, nil
}

// PutBlob holds data in sealed memory.
func (c *Client) PutBlob(ctx context.Context, name string, data []byte) error {
	fd, err := newBlob(name, data)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return c.put(ctx, blobHeld(name), fdset{fd})
}

// Blob returns what PutBlob put.
func (c *Client) Blob(ctx context.Context, name string) ([]byte, error) {
	h, fds, err := c.get(ctx, blobKey(name))
	if err != nil {
		return nil, err
	}
	defer fds.close()
	if len(fds) != 1 {
		return nil, fmt.Errorf("%w: %s is not a blob", ErrInvalid, h.Key)
	}
	return readBlob(fds[0])
}

func blobKey(name string) Key { return Key{Kind: "blob", Name: name} }

func blobHeld(name string) held {
	return held{Key: blobKey(name), Names: []string{"blob"}, Blob: true}
}
