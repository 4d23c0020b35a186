package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"time"

	"github.com/warrenmesh/warren/test/cluster"
)

// Marker is what the demo plants in every request and every answer (examples/demo).
const Marker = "warren-demo-marker-7c1e"

// hbonePort is where agents take tunnels.
const hbonePort = 15008

// Wire is what crossed the link between the nodes during a watch.
type Wire struct {
	Frames  uint64 // all frames that a node sent
	TCP     uint64 // TCP segments with payload among them
	Tunnel  uint64 // of these, to or from port 15008
	Clear   uint64 // frames with the marker readable
	Dropped uint64 // frames that the watch itself lost; anything but 0 makes Clear meaningless
	Sample  string // one clear frame's addresses
}

// ErrNoCapture is returned on a cluster whose link cannot be watched.
var ErrNoCapture = errors.New("the link between the nodes of this cluster cannot be watched from here")

// Watch counts what crosses the link until the returned function is called.
func (l *Lab) Watch(ctx context.Context) (stop func() (Wire, error), err error) {
	if l.Cluster == nil {
		return nil, ErrNoCapture
	}
	ctx, cancel := context.WithCancel(ctx)
	var (
		w     Wire
		stats cluster.CaptureStats
		ended = make(chan error, 1)
		ready = make(chan struct{})
	)
	go func() {
		var err error
		stats, err = l.Cluster.Capture(ctx, ready, func(f cluster.Frame) { w.count(f) })
		ended <- err
	}()
	select {
	case <-ready:
	case err := <-ended:
		cancel()
		return nil, err
	}
	return sync.OnceValues(func() (Wire, error) {
		// What was sent just now is still on its way through the capture.
		time.Sleep(200 * time.Millisecond)
		cancel()
		err := <-ended
		w.Frames, w.Dropped = stats.Frames, stats.Dropped
		return w, err
	}), nil
}

func (w *Wire) count(f cluster.Frame) {
	src, dst, payload := tcp(f.Data)
	if len(payload) > 0 {
		w.TCP++
		if src == hbonePort || dst == hbonePort {
			w.Tunnel++
		}
	}
	if bytes.Contains(f.Data, []byte(Marker)) {
		w.Clear++
		if w.Sample == "" {
			w.Sample = describe(f)
		}
	}
}

// tcp finds the ports and the payload of a TCP segment in an Ethernet frame; payload is nil for anything else.
func tcp(frame []byte) (src, dst uint16, payload []byte) {
	if len(frame) < 14 {
		return 0, 0, nil
	}
	kind, p := binary.BigEndian.Uint16(frame[12:]), frame[14:]
	switch {
	case kind == 0x0800 && len(p) >= 20 && p[9] == 6:
		total := int(binary.BigEndian.Uint16(p[2:]))
		if total > 0 && total <= len(p) {
			p = p[:total] // without Ethernet's padding
		}
		ihl := int(p[0]&15) * 4
		if ihl > len(p) {
			return 0, 0, nil
		}
		p = p[ihl:]
	case kind == 0x86dd && len(p) >= 40 && p[6] == 6:
		if n := int(binary.BigEndian.Uint16(p[4:])); n > 0 && 40+n <= len(p) {
			p = p[:40+n]
		}
		p = p[40:]
	default:
		return 0, 0, nil
	}
	if len(p) < 20 {
		return 0, 0, nil
	}
	off := int(p[12]>>4) * 4
	if off > len(p) {
		return 0, 0, nil
	}
	return binary.BigEndian.Uint16(p), binary.BigEndian.Uint16(p[2:]), p[off:]
}

// InTunnel reports whether an Ethernet frame carries payload of a tunnel.
func InTunnel(frame []byte) bool {
	src, dst, payload := tcp(frame)
	return len(payload) > 0 && (src == hbonePort || dst == hbonePort)
}
