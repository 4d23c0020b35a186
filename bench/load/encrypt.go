package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// A hop that encrypts shows what a transport without streams could be: on one side of it are AES-128-GCM records of TLS
// 1.3's sizes, a connection for each of the other side's, under a key that is nobody's secret. No handshake, no flow control
// but TCP's, a thread for each direction that waits in read(2) and write(2), and no buffer but the two that it needs.
const (
	recordHeader  = 5
	recordPayload = 16 << 10
	recordTag     = 16
	recordSize    = recordHeader + recordPayload + recordTag
)

const (
	readPlain  = 64 << 10
	readSealed = 128 << 10
)

// encrypting runs the hop whose connections to TARGET are encrypted, or with decrypt the one whose LISTEN has such.
func encrypting(ctx context.Context, pairs []string, decrypt bool) error {
	return hop(ctx, pairs, func(in, out *net.TCPConn) {
		if decrypt {
			in, out = out, in
		}
		if err := cross(in, out); err != nil {
			fmt.Fprintln(os.Stderr, "load:", err)
		}
	})
}

// cross joins the two ends of a hop; sealed is the one whose bytes are records.
func cross(plain, sealed *net.TCPConn) error {
	var errs [2]error
	var wg sync.WaitGroup
	p, err := blocking(plain)
	if err != nil {
		return err
	}
	defer unix.Close(p)
	s, err := blocking(sealed)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	for i, f := range []func(to, from int) error{seal, unseal} {
		to, from := s, p
		if i == 1 {
			to, from = p, s
		}
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if errs[i] = f(to, from); errs[i] != nil {
				_ = unix.Shutdown(from, unix.SHUT_RDWR)
				_ = unix.Shutdown(to, unix.SHUT_RDWR)
				return
			}
			_ = unix.Shutdown(to, unix.SHUT_WR)
		})
	}
	wg.Wait()
	return errors.Join(errs[:]...)
}

// blocking takes a connection away from Go's poller.
func blocking(c *net.TCPConn) (fd int, err error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, err
	}
	cerr := rc.Control(func(f uintptr) { fd, err = unix.FcntlInt(f, unix.F_DUPFD_CLOEXEC, 3) })
	if err := errors.Join(cerr, err, c.Close()); err != nil {
		return -1, err
	}
	return fd, unix.SetNonblock(fd, false)
}

func gcm() (cipher.AEAD, []byte) {
	b, err := aes.NewCipher(make([]byte, 16))
	if err != nil {
		panic(err)
	}
	a, err := cipher.NewGCM(b)
	if err != nil {
		panic(err)
	}
	return a, make([]byte, a.NonceSize())
}

func seal(to, from int) error {
	aead, nonce := gcm()
	in, out := make([]byte, readPlain), make([]byte, 0, readPlain/recordPayload*recordSize+recordSize)
	for seq := uint64(0); ; {
		n, err := again(unix.Read, from, in)
		if n <= 0 { // the end, or an error
			return err
		}
		out = out[:0]
		for p := in[:n]; len(p) > 0; seq++ {
			k := min(len(p), recordPayload)
			out = append(out, 23, 3, 3, byte((k+recordTag)>>8), byte(k+recordTag))
			binary.BigEndian.PutUint64(nonce[4:], seq)
			out = aead.Seal(out, nonce, p[:k], out[len(out)-recordHeader:])
			p = p[k:]
		}
		if err := writeAll(to, out); err != nil {
			return err
		}
	}
}

func unseal(to, from int) error {
	aead, nonce := gcm()
	in, out := make([]byte, readSealed), make([]byte, 0, readSealed)
	w := 0
	for seq := uint64(0); ; {
		n, err := again(unix.Read, from, in[w:])
		if n <= 0 {
			if w > 0 && err == nil {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		w += n
		out = out[:0]
		r := 0
		for w-r >= recordHeader {
			k := recordHeader + int(in[r+3])<<8 + int(in[r+4])
			if k > recordSize {
				return errors.New("a record that is too long")
			}
			if w-r < k {
				break
			}
			binary.BigEndian.PutUint64(nonce[4:], seq)
			seq++
			if out, err = aead.Open(out, nonce, in[r+recordHeader:r+k], in[r:r+recordHeader]); err != nil {
				return err
			}
			r += k
		}
		w = copy(in, in[r:w])
		if err := writeAll(to, out); err != nil {
			return err
		}
	}
}

func writeAll(fd int, p []byte) error {
	for len(p) > 0 {
		n, err := again(unix.Write, fd, p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// again is f, also where a signal interrupts it.
func again(f func(int, []byte) (int, error), fd int, p []byte) (int, error) {
	for {
		n, err := f(fd, p)
		if err != unix.EINTR {
			return n, err
		}
	}
}
