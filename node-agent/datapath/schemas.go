package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"github.com/warrenmesh/warren/bpf"
)

// schemas knows the data paths of other versions on this node. While agents of two versions overlap, the programs of
// both run for every connection, and each lets the agent's own pass only by its own tag: so the agents tag their
// sockets for both. The map of tags therefore has the same layout in every schema.
type schemas struct {
	dir, own string
	yielded  atomic.Bool // a successor may bring another at any time

	mu     sync.Mutex
	others map[string]*ebpf.Map // their tags, by schema
}

// find opens the tags of schemas that are new, and forgets those of schemas that are gone.
func (s *schemas) find() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	there := map[string]bool{}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		there[name] = true
		if name == s.own || s.others[name] != nil {
			continue
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.dir, name, bpf.MeshMapAgentSockets), nil)
		switch {
		case errors.Is(err, os.ErrNotExist): // it is being made, or removed
		case err != nil:
			errs = append(errs, fmt.Errorf("open the tags of data path %s: %w", name, err))
		case m.Type() != ebpf.SkStorage || m.ValueSize() != 4:
			errs = append(errs, m.Close())
		default:
			if s.others == nil {
				s.others = map[string]*ebpf.Map{}
			}
			s.others[name] = m
		}
	}
	for name, m := range s.others {
		if !there[name] {
			errs = append(errs, m.Close())
			delete(s.others, name)
		}
	}
	return errors.Join(errs...)
}

// settle lets connections that an agent of another version has tagged already, for its own data path alone, leave
// before this one's programs see them.
func (s *schemas) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.others) > 0 {
		time.Sleep(10 * inFlight)
	}
}

// tag marks a socket for the data paths of other versions. That one of them is gone meanwhile is fine.
func (s *schemas) tag(fd int) error {
	if s.yielded.Load() {
		if err := s.find(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, m := range s.others {
		if err := m.Put(uint32(fd), uint32(1)); err != nil {
			return fmt.Errorf("tag socket for data path %s: %w", name, err)
		}
	}
	return nil
}

func (s *schemas) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, m := range s.others {
		errs = append(errs, m.Close())
	}
	s.others = nil
	return errors.Join(errs...)
}

// pruneSchemas removes what an agent of another version has pinned: by now every pod is enrolled in this one's
// maps. Until then its programs hold as well, so that nothing leaks.
func (d *Datapath) pruneSchemas() error {
	entries, err := os.ReadDir(d.cfg.Dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.Name() == bpf.Schema {
			continue
		}
		dir := filepath.Join(d.cfg.Dir, e.Name())
		d.cfg.Log.Info("removing the data path of another version", "dir", dir)
		pods, _ := os.ReadDir(filepath.Join(dir, "enrolled"))
		for _, p := range pods {
			errs = append(errs, removePins(filepath.Join(dir, "enrolled", p.Name())))
		}
		for _, a := range d.attachments() {
			errs = append(errs, unpin(filepath.Join(dir, a.name)))
		}
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(append(errs, d.schemas.find())...)
}
