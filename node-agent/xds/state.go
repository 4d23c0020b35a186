package xds

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/api/node"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// The last good state is a file: a line with magic and version, the SHA-256 of the rest, and the rest, one
// delimited DeltaDiscoveryResponse a type, just as a control plane that has everything would send it. It is
// read by the same code as those. There are no secrets in it.
const stateMagic = "warren last good state 1\n"

// ErrState is wrapped by every error about a state that cannot be used.
var ErrState = errors.New("not a usable state")

// state is what is saved: values that nobody changes any more.
type state struct {
	node       string
	snapshot   *mesh.Snapshot
	pods       map[string]wds.LocalPod
	namespaces map[string]bool
	trust      *node.TrustBundle
	versions   map[string]map[string]string // by type and name
	received   map[string]bool
	journal    int // every journal below it is in here
}

func (c *Client) state() *state {
	s := &state{
		node: c.cfg.Node.Name, snapshot: c.cfg.Store.Load(),
		pods: maps.Clone(c.pods), namespaces: maps.Clone(c.namespaces), trust: c.trust,
		versions: make(map[string]map[string]string), received: make(map[string]bool),
		journal: c.journal.rotate(),
	}
	for t, ts := range c.types {
		s.versions[t] = maps.Clone(ts.versions)
		s.received[t] = ts.received
	}
	return s
}

// encode writes the state.
func (s *state) encode() ([]byte, error) {
	responses := make(map[string]*discovery.DeltaDiscoveryResponse)
	for _, t := range types {
		if s.received[t] {
			responses[t] = &discovery.DeltaDiscoveryResponse{TypeUrl: t, ControlPlane: &core.ControlPlane{Identifier: s.node}}
		}
	}
	put := func(t, name string, m proto.Message) error {
		r := responses[t]
		if r == nil {
			return nil
		}
		data, err := proto.Marshal(m)
		if err != nil {
			return fmt.Errorf("encoding %s: %w", name, err)
		}
		r.Resources = append(r.Resources, &discovery.Resource{
			Name: name, Version: s.versions[t][name], Resource: &anypb.Any{TypeUrl: t, Value: data},
		})
		return nil
	}
	var errs []error
	for w := range s.snapshot.Workloads() {
		errs = append(errs, put(wds.AddressType, w.UID, wds.EncodeWorkload(w)))
	}
	for svc := range s.snapshot.Services() {
		errs = append(errs, put(wds.AddressType, svc.Name.String(), wds.EncodeService(svc)))
	}
	for p := range s.snapshot.Policies() {
		if p.Action == mesh.Audit {
			m, err := wds.EncodeAudit(p)
			errs = append(errs, err, put(wds.AuditType, p.Name.String(), m))
			continue
		}
		m, err := wds.EncodePolicy(p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, put(wds.AuthorizationType, p.Name.String(), m))
	}
	for uid, p := range s.pods {
		errs = append(errs, put(wds.LocalPodType, uid, wds.EncodeLocalPod(p)))
	}
	for ns, enrolled := range s.namespaces {
		errs = append(errs, put(wds.NamespaceType, ns, wds.EncodeNamespace(ns, enrolled)))
	}
	if len(s.versions[wds.MeshConfigType]) > 0 {
		errs = append(errs, put(wds.MeshConfigType, wds.MeshConfigName, wds.EncodeConfig(s.snapshot.Config())))
	}
	if s.trust != nil {
		errs = append(errs, put(wds.TrustBundleType, wds.TrustBundleName, s.trust))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	var body bytes.Buffer
	for _, t := range types {
		if r := responses[t]; r != nil {
			if _, err := protodelim.MarshalTo(&body, r); err != nil {
				return nil, fmt.Errorf("encoding the state: %w", err)
			}
		}
	}
	sum := sha256.Sum256(body.Bytes())
	return append(append([]byte(stateMagic), sum[:]...), body.Bytes()...), nil
}

// decodeState reads what encode wrote, for this node.
func decodeState(data []byte, node string) ([]*discovery.DeltaDiscoveryResponse, error) {
	rest, ok := bytes.CutPrefix(data, []byte(stateMagic))
	if !ok || len(rest) < sha256.Size {
		return nil, fmt.Errorf("%w: it does not begin as one of this version", ErrState)
	}
	sum, body := rest[:sha256.Size], rest[sha256.Size:]
	if got := sha256.Sum256(body); !bytes.Equal(got[:], sum) {
		return nil, fmt.Errorf("%w: its checksum is wrong", ErrState)
	}
	var responses []*discovery.DeltaDiscoveryResponse
	in := bytes.NewReader(body)
	for {
		r := &discovery.DeltaDiscoveryResponse{}
		err := protodelim.UnmarshalOptions{MaxSize: int64(in.Len())}.UnmarshalFrom(in, r)
		if errors.Is(err, io.EOF) {
			return responses, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrState, err)
		}
		if of := r.GetControlPlane().GetIdentifier(); of != node {
			return nil, fmt.Errorf("%w: it is of the node %q", ErrState, of)
		}
		responses = append(responses, r)
	}
}

// Restore brings back the last good state into the Store, before Run. An agent does that before it accepts the
// first connection: without a state it would have to refuse it. Run announces what was restored, and does this
// itself where it has not been done. What cannot be used is reported and ignored: the control plane sends
// everything to a client that has nothing.
func (c *Client) Restore() {
	if c.cfg.StateFile == "" || c.restored {
		return
	}
	c.restored = true
	later, err := readJournals(c.cfg.StateFile, c.cfg.Node.Name)
	if err != nil {
		c.cfg.Log.Warn("some of the latest changes are ignored", "error", err)
	}
	data, err := os.ReadFile(c.cfg.StateFile)
	if errors.Is(err, fs.ErrNotExist) && len(later) == 0 {
		return
	}
	var responses []*discovery.DeltaDiscoveryResponse
	switch {
	case err == nil:
		responses, err = decodeState(data, c.cfg.Node.Name)
	case errors.Is(err, fs.ErrNotExist): // no state was written yet: the journal has everything
		err = nil
	}
	if err != nil { // without the state that they came after, the changes mean nothing
		c.cfg.Log.Warn("the last good state is ignored", "file", c.cfg.StateFile, "error", err)
		return
	}
	responses = append(responses, later...)
	for _, r := range responses {
		state := c.types[r.TypeUrl]
		if state == nil {
			continue
		}
		state.received = true
		c.dirty.pods = c.dirty.pods || r.TypeUrl == wds.LocalPodType
		c.dirty.namespaces = c.dirty.namespaces || r.TypeUrl == wds.NamespaceType
		if bad := c.take(r, state); len(bad) > 0 {
			c.cfg.Log.Warn("parts of the last good state are ignored", "type", r.TypeUrl, "error", bad)
		}
	}
	if !c.complete() {
		return
	}
	c.rev++
	c.cfg.Store.Swap(c.builder.Commit(c.rev))
	c.usable = true
	w, s, p := c.cfg.Store.Load().Len()
	c.cfg.Log.Info("serving from the last good state", "file", c.cfg.StateFile, "workloads", w, "services", s, "policies", p)
}

// saver writes the state to disk beside Run's goroutine, and not at every change. It is used by that goroutine
// alone, but for the writing.
type saver struct {
	interval time.Duration
	due      <-chan time.Time // nil: nothing to save
	in       chan *state
	done     chan struct{}
}

func startSaver(file string, interval time.Duration, journal *journal, log *slog.Logger) *saver {
	s := &saver{interval: interval, in: make(chan *state, 1), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		for st := range s.in {
			if file == "" || journal.over() {
				continue
			}
			err := writeState(file, st)
			if err == nil {
				err = journal.drop(st.journal)
			}
			if err != nil {
				log.Warn("saving the last good state", "file", file, "error", err)
			}
		}
	}()
	return s
}

// mark says that there is something to save, some time soon.
func (s *saver) mark() {
	if s.due == nil {
		s.due = time.After(s.interval)
	}
}

// flush hands over the state if there is something to save. A state that waits to be written is replaced.
func (s *saver) flush(now func() *state) {
	if s.due == nil {
		return
	}
	s.due = nil
	select {
	case <-s.in:
	default:
	}
	s.in <- now()
}

// stop returns when the last state is written.
func (s *saver) stop() {
	close(s.in)
	<-s.done
}

func writeState(file string, st *state) error {
	data, err := st.encode()
	if err != nil {
		return err
	}
	return writeFile(file, data)
}

// writeFile replaces a file as a whole: whoever reads it sees the old or the new one.
func writeFile(file string, data []byte) error {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // a no-op once it is renamed
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
