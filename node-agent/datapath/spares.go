package datapath

import (
	"sync"

	"github.com/cilium/ebpf"

	"github.com/warrenmesh/warren/bpf"
)

// spares are instances of sk_lookup that no pod has yet. The kernel takes 10 ms of a processor to check one, which is
// most of what an enrolment costs, and a new pod would wait for it.
type spares struct {
	want int

	mu      sync.Mutex
	ready   []*ebpf.Collection
	filling bool
	closed  bool
	work    sync.WaitGroup
}

// take returns a spare, or nil.
func (s *spares) take() *ebpf.Collection {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ready) == 0 {
		return nil
	}
	c := s.ready[len(s.ready)-1]
	s.ready = s.ready[:len(s.ready)-1]
	return c
}

// fill loads what is missing, in the background. What cannot be loaded is tried again by who needs it.
func (s *spares) fill(load func() (*ebpf.Collection, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.filling || s.closed || len(s.ready) >= s.want {
		return
	}
	s.filling = true
	s.work.Go(func() {
		for {
			c, err := load()
			s.mu.Lock()
			if err == nil {
				s.ready = append(s.ready, c)
			}
			if err != nil || s.closed || len(s.ready) >= s.want {
				s.filling = false
				s.mu.Unlock()
				return
			}
			s.mu.Unlock()
		}
	})
}

func (s *spares) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.work.Wait()
	for _, c := range s.ready {
		c.Close()
	}
	s.ready = nil
}

// loadLookup returns the pod's own instance of sk_lookup.
func (d *Datapath) loadLookup(pod *bpf.MeshPod) (*ebpf.Program, error) {
	c := d.spares.take()
	if c == nil {
		var err error
		if c, err = d.loadSpare(); err != nil {
			return nil, err
		}
	}
	defer c.Close()
	for name, value := range map[string]any{bpf.MeshVarPodSlot: pod.Slot, bpf.MeshVarPodV4: pod.V4, bpf.MeshVarPodV6: pod.V6} {
		if err := c.Variables[name].Set(value); err != nil {
			return nil, err
		}
	}
	return c.DetachProgram(bpf.MeshProgMeshLookup), nil
}

func (d *Datapath) loadSpare() (*ebpf.Collection, error) {
	return d.loadInstance(bpf.MeshProgMeshLookup)
}
