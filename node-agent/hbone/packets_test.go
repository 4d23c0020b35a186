package hbone

import (
	"io"
	"testing"
	"time"
)

// What fills a read may have been all: the kernel keeps nothing of it then for what does not come.
func TestTheEndOfABurstIsSentAtOnce(t *testing.T) {
	a, b, _ := newRelayed(t)
	const rounds = 40
	exchange := func(size int) time.Duration {
		p, q := make([]byte, size), make([]byte, size)
		began := time.Now()
		for range rounds {
			sent := make(chan error, 1)
			go func() { _, err := a.Write(p); sent <- err }()
			if _, err := io.ReadFull(b, q); err != nil {
				t.Fatal(err)
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if _, err := b.Write(p[:1]); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(a, q[:1]); err != nil {
				t.Fatal(err)
			}
		}
		return time.Since(began)
	}
	few := exchange(1000)
	for _, size := range []int{largeChunk, 2 * largeChunk, 4 * largeChunk, largeChunk + 1} {
		// The kernel lets go of what it keeps after 200 ms.
		if took := exchange(size); took > 4*time.Second+20*few {
			t.Errorf("%d bytes there and one back, %d times: %s; 1000 bytes: %s", size, rounds, took, few)
		}
	}
}
