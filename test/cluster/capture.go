package cluster

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"time"

	"github.com/warrenmesh/warren/test/cluster/internal/host"
	"github.com/warrenmesh/warren/test/cluster/internal/plan"
)

// Frame is one Ethernet frame on the inter-node link, seen where it leaves its
// node. With segmentation offload a frame may be as large as 64 KiB.
type Frame struct {
	Node string // the sender
	Time time.Time
	Data []byte // valid during the callback only
}

// CaptureStats counts what a capture saw. A test that proves absence must check
// that nothing was dropped.
type CaptureStats struct {
	Frames  uint64
	Dropped uint64
}

// Capture hands every frame that a node sends over the inter-node link to f, from
// before ready is closed until ctx ends. Frames of the control plane, which runs
// beside the bridge, are not among them; those to it are.
func (c *Cluster) Capture(ctx context.Context, ready chan<- struct{}, f func(Frame)) (CaptureStats, error) {
	names := map[string]string{}
	for _, n := range c.plan.NodeList() {
		names[n.Port()] = n.Name
	}
	var s *host.Sniffer
	err := host.InNetNS(c.pid, func() (err error) {
		s, err = host.NewSniffer()
		return err
	})
	if err != nil {
		return CaptureStats{}, fmt.Errorf("capture on bridge %s: %w", plan.Bridge, err)
	}
	defer s.Close()
	if ready != nil {
		close(ready)
	}
	var st CaptureStats
	for ctx.Err() == nil {
		port, data, at, err := s.Next()
		if err != nil {
			return st, err
		}
		if node, ok := names[port]; ok {
			st.Frames++
			f(Frame{Node: node, Time: at, Data: data})
		}
	}
	st.Dropped, err = s.Dropped()
	return st, err
}

// Pcap records the frames between nodes in a file until ctx ends.
func (c *Cluster) Pcap(ctx context.Context, file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	head := make([]byte, 24)
	binary.LittleEndian.PutUint32(head[0:], 0xa1b23c4d) // nanoseconds
	binary.LittleEndian.PutUint16(head[4:], 2)
	binary.LittleEndian.PutUint16(head[6:], 4)
	binary.LittleEndian.PutUint32(head[16:], 1<<18) // snap length
	binary.LittleEndian.PutUint32(head[20:], 1)     // Ethernet
	_, _ = w.Write(head)                            // bufio keeps the first error for Flush
	st, err := c.Capture(ctx, nil, func(fr Frame) {
		rec := make([]byte, 16)
		binary.LittleEndian.PutUint32(rec[0:], uint32(fr.Time.Unix()))
		binary.LittleEndian.PutUint32(rec[4:], uint32(fr.Time.Nanosecond()))
		binary.LittleEndian.PutUint32(rec[8:], uint32(len(fr.Data)))
		binary.LittleEndian.PutUint32(rec[12:], uint32(len(fr.Data)))
		_, _ = w.Write(rec)
		_, _ = w.Write(fr.Data)
	})
	if e := w.Flush(); err == nil {
		err = e
	}
	if e := f.Close(); err == nil {
		err = e
	}
	fmt.Fprintf(os.Stderr, "%d frames, %d dropped\n", st.Frames, st.Dropped)
	return err
}
