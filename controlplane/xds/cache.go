package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/warrenmesh/warren/controlplane/index"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/wds"
)

// The types served, in the order in which a client gets them.
const (
	TypeMeshConfig    = wds.MeshConfigType
	TypeNamespace     = wds.NamespaceType
	TypeAuthorization = wds.AuthorizationType
	TypeAudit         = wds.AuditType
	TypeAddress       = wds.AddressType
	TypeLocalPod      = wds.LocalPodType
	TypeTrustBundle   = wds.TrustBundleType
)

var types = []string{TypeMeshConfig, TypeNamespace, TypeAuthorization, TypeAudit, TypeAddress, TypeLocalPod, TypeTrustBundle}

// shortNames label metrics.
var shortNames = map[string]string{
	TypeMeshConfig: "meshconfig", TypeNamespace: "namespace", TypeAuthorization: "wads", TypeAudit: "audit", TypeAddress: "wds", TypeLocalPod: "localpod", TypeTrustBundle: "trust",
}

// resource is one encoded object. It is immutable.
type resource struct {
	name    string
	version string   // hash of the content: the same from every replica and after a restart
	aliases []string // further names to subscribe by
	node    string   // the only node that gets it; "" for all
	body    *anypb.Any
}

func newResource(name string, m proto.Message) (*resource, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", name, err)
	}
	sum := sha256.Sum256(data)
	return &resource{
		name:    name,
		version: hex.EncodeToString(sum[:12]),
		body:    &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: data},
	}, nil
}

// table holds the resources of one type.
type table struct {
	byName  map[string]*resource
	byAlias map[string]map[string]*resource
}

func (t *table) set(name string, r *resource) (changed bool) {
	old := t.byName[name]
	if old != nil && r != nil && old.version == r.version && old.node == r.node {
		return false
	}
	if old != nil {
		for _, a := range old.aliases {
			delete(t.byAlias[a], name)
			if len(t.byAlias[a]) == 0 {
				delete(t.byAlias, a)
			}
		}
	}
	if r == nil {
		delete(t.byName, name)
		return old != nil
	}
	t.byName[name] = r
	for _, a := range r.aliases {
		if t.byAlias[a] == nil {
			t.byAlias[a] = map[string]*resource{}
		}
		t.byAlias[a][name] = r
	}
	return true
}

// Cache holds what is served. One goroutine updates it, any number of clients read.
type Cache struct {
	mu       sync.RWMutex
	tables   map[string]*table
	snapshot *mesh.Snapshot
	revision uint64 // counts Updates that changed something
	clients  map[*client]struct{}
	synced   bool
}

// NewCache returns an empty cache.
func NewCache() *Cache {
	c := &Cache{tables: map[string]*table{}, clients: map[*client]struct{}{}}
	for _, t := range types {
		c.tables[t] = &table{byName: map[string]*resource{}, byAlias: map[string]map[string]*resource{}}
	}
	return c
}

// Synced reports whether there was an Update: before the first, nothing is served.
func (c *Cache) Synced() bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.synced
}

// change is one resource to put, or to remove where it has none.
type change struct {
	kind string
	name string
	r    *resource
}

// Update takes over what the index derived and wakes the clients that it concerns. An object that cannot be
// encoded keeps its last state; the error names it.
func (c *Cache) Update(u *index.Update) error {
	changes, err := c.encode(u) // without the lock: this is the expensive part
	c.mu.Lock()
	defer c.mu.Unlock()
	dirty := map[string][]string{}
	for _, ch := range changes {
		if c.tables[ch.kind].set(ch.name, ch.r) {
			dirty[ch.kind] = append(dirty[ch.kind], ch.name)
		}
	}
	first := !c.synced
	c.snapshot, c.synced = u.Snapshot, true
	if len(dirty) == 0 && !first {
		return err
	}
	c.revision++
	now := time.Now()
	for cl := range c.clients {
		cl.mark(dirty, now)
	}
	return err
}

func (c *Cache) add(cl *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.clients[cl] = struct{}{}
}

func (c *Cache) remove(cl *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.clients, cl)
}

// Revision counts the changes. It tells which of two states of this replica is the later one, no more.
func (c *Cache) Revision() uint64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.revision
}

// Names lists the resources of one type.
func (c *Cache) Names(kind string) []string {
	c.mu.RLock()
	defer c.mu.RUnlock()
	t := c.tables[kind]
	if t == nil {
		return nil
	}
	out := make([]string, 0, len(t.byName))
	for n := range t.byName {
		out = append(out, n)
	}
	return out
}
