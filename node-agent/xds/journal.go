package xds

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/warrenmesh/warren/internal/wds"
)

// journal keeps what was applied since the last good state was written, because writing that whole takes too
// long to do it for each change. A response is in the journal before it is acknowledged: an agent that is killed
// right after an ACK leaves a successor that decides no differently, even before it is connected.
//
// It outlives the process, not the machine: a power cut may take the last seconds with it, and all connections.
// Files are numbered; a saved state replaces all with a lower number. The names begin with the time of the
// process's start, since a predecessor that drains its connections may still write.
//
//	record: SHA-256 of the rest, one delimited DeltaDiscoveryResponse
type journal struct {
	file  string      // "" where nothing is kept
	over  func() bool // another process writes now
	start int64
	n     int
	f     *os.File
	log   *slog.Logger
	node  string
}

func newJournal(file, node string, over func() bool, log *slog.Logger) *journal {
	return &journal{file: file, node: node, over: over, start: time.Now().UnixNano(), log: log}
}

func (j *journal) name(n int) string { return fmt.Sprintf("%s.journal.%020d.%06d", j.file, j.start, n) }

// append writes a response down.
func (j *journal) append(resp *discovery.DeltaDiscoveryResponse) {
	if j.file == "" || j.over() || resp.TypeUrl == wds.LocalPodType && len(resp.Resources)+len(resp.RemovedResources) == 0 {
		return // see apply on what nothing means there
	}
	if err := j.write(resp); err != nil {
		j.log.Warn("writing down a change: an agent that starts before the next save will not know it", "error", err)
	}
}

func (j *journal) write(resp *discovery.DeltaDiscoveryResponse) error {
	if j.f == nil {
		if err := os.MkdirAll(filepath.Dir(j.file), 0o700); err != nil {
			return err
		}
		f, err := os.OpenFile(j.name(j.n), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		j.f = f
	}
	own := &discovery.DeltaDiscoveryResponse{
		TypeUrl: resp.TypeUrl, Resources: resp.Resources, RemovedResources: resp.RemovedResources,
		ControlPlane: &core.ControlPlane{Identifier: j.node},
	}
	var body bytes.Buffer
	if _, err := protodelim.MarshalTo(&body, own); err != nil {
		return err
	}
	sum := sha256.Sum256(body.Bytes())
	_, err := j.f.Write(append(sum[:], body.Bytes()...)) // one write: it is there as a whole or it is the torn end
	return err
}

// rotate begins the next file and returns the number below which everything is in the state as it is now.
func (j *journal) rotate() int {
	if j.f != nil {
		j.f.Close()
		j.f = nil
		j.n++
	}
	return j.n
}

// drop removes what a saved state replaces: every file before number n of this process.
func (j *journal) drop(n int) error {
	files, err := journals(j.file)
	var errs []error
	for _, f := range files {
		if f < j.name(n) {
			if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, err)...)
}

// journals lists the files in the order in which they were written.
func journals(file string) ([]string, error) {
	files, err := filepath.Glob(file + ".journal.*")
	slices.Sort(files)
	return files, err
}

// readJournals returns what was written after the last good state. A record that is not whole ends its file.
func readJournals(file, node string) ([]*discovery.DeltaDiscoveryResponse, error) {
	files, err := journals(file)
	errs := []error{err}
	var all []*discovery.DeltaDiscoveryResponse
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for in := bytes.NewReader(data); in.Len() > 0; {
			r, err := readRecord(in, node)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", f, err))
				break
			}
			all = append(all, r)
		}
	}
	return all, errors.Join(errs...)
}

func readRecord(in *bytes.Reader, node string) (*discovery.DeltaDiscoveryResponse, error) {
	var sum [sha256.Size]byte
	if _, err := io.ReadFull(in, sum[:]); err != nil {
		return nil, fmt.Errorf("%w: the last record is cut off", ErrState)
	}
	start := in.Size() - int64(in.Len())
	r := &discovery.DeltaDiscoveryResponse{}
	if err := (protodelim.UnmarshalOptions{MaxSize: int64(in.Len())}).UnmarshalFrom(in, r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	body := make([]byte, in.Size()-int64(in.Len())-start)
	if _, err := in.ReadAt(body, start); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	if sha256.Sum256(body) != sum {
		return nil, fmt.Errorf("%w: a record's checksum is wrong", ErrState)
	}
	if of := r.GetControlPlane().GetIdentifier(); of != node {
		return nil, fmt.Errorf("%w: it is of the node %q", ErrState, of)
	}
	return r, nil
}
