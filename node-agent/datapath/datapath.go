package datapath

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/warrenmesh/warren/bpf"
	"github.com/warrenmesh/warren/internal/mesh"
	"github.com/warrenmesh/warren/internal/netns"
)

// Numbers that the kernel side, the agent and the documentation share.
const (
	// Mark is the fwmark of a socket whose packets stay in the pod: captured clients and the inbound leg.
	// Istio uses the same number, so one document serves for both.
	// The bits above markMask may say which endpoint of a Service the kernel has drawn, see Drawn.
	Mark     = 0x539
	markMask = 0xfff
	// Table holds the local default route that marked packets take, and is the priority of its rule.
	Table = 1337

	PortOutbound = 15001 // captured connections
	PortInbound  = 15006 // plaintext from outside the mesh
	PortHBONE    = 15008 // the tunnel
)

// Captured reports whether a socket's fwmark says that its packets stay in the pod.
func Captured(mark uint32) bool { return mark&markMask == Mark }

// Config says where the kernel's file systems are.
type Config struct {
	// Dir is a directory on a bpffs, which is made if need be. Default /sys/fs/bpf/warren.
	Dir string
	// CgroupRoot is where the node's cgroup file system is mounted (cgroup v2, or hybrid with a "unified"
	// directory). It must be the node's, not that of the agent's container. Default /sys/fs/cgroup.
	CgroupRoot string
	// Proc is a writable /proc of the node; a container's own has a read-only sys. Default /proc.
	Proc string
	// Node is the node's network namespace. Default: the namespace that Open is called in.
	Node *netns.Handle
	// Spares is how many instances of sk_lookup are kept ready for pods to come. Default none.
	Spares int
	// Log gets what is repaired or refused. Default: discard.
	Log *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Dir == "" {
		c.Dir = "/sys/fs/bpf/warren"
	}
	if c.CgroupRoot == "" {
		c.CgroupRoot = "/sys/fs/cgroup"
	}
	if c.Proc == "" {
		c.Proc = "/proc"
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Pod is what Enroll captures.
type Pod struct {
	UID       string // Kubernetes' UID, at most 63 bytes
	Workload  string // its UID in the mesh; with it and its identity the kernel decides for it what it can
	Identity  mesh.Identity
	NetNS     *netns.Handle // stays the caller's, and open until Release
	Addrs     []netip.Addr  // one IPv4 address, one IPv6 address or both
	Listeners Listeners     // where its connections go; they stay the caller's

	ResolvesNames bool // its questions for hosts of ServiceEntries are answered, see SetNames
}

// Datapath is the loaded and attached kernel side. Its methods may be called concurrently.
type Datapath struct {
	cfg      Config
	dir      string // of this schema, below cfg.Dir
	lock     *os.File
	node     *netns.Handle
	ownsNode bool
	cgroups  cgroups
	names    []string // of the outcomes, by number
	spec     *ebpf.CollectionSpec
	kernel   bpf.MeshObjects
	canReset bool // of the kernel: it ends connections on request
	index    atomic.Pointer[eventIndex]
	schemas  schemas
	spares   spares

	mu    sync.Mutex // one writer of the kernel's state; guards what follows
	pods  map[string]record
	given map[string]Pod // as last passed to Enroll by this process
	dest  *Destinations  // what the kernel has, once SetDestinations has read it
	gates *gatekeeper
	drift map[string]uint64 // rows that an audit found wrong, by map
	near  nearby
	hosts resolver

	watches   map[string]*podWatch // of given
	nodeWatch *watch               // of the node's interfaces; nil before the first audit

	stopEvents  context.CancelFunc // nil before Events
	eventsEnded chan struct{}      // closed when Events reads nothing more from the kernel
}

// record is a row of the pods map.
type record struct {
	cookie uint64
	pod    bpf.MeshPod
}

// Open loads the programs, or takes over what an earlier process left pinned without opening a gap, and
// attaches the cgroup programs. It waits until another writer has gone or ctx is done.
// A kernel without a needed feature is a *MissingFeatureError.
//
// Taking over: the maps are reused as they are; the new programs refer to the same maps; then each pinned
// link is pointed at its new program, which is one atomic exchange. Were the links made anew instead, a
// connection between the old link's end and the new one's beginning would pass uncaptured.
func Open(ctx context.Context, cfg Config) (*Datapath, error) {
	d := &Datapath{cfg: cfg.withDefaults(), pods: map[string]record{}, given: map[string]Pod{}, watches: map[string]*podWatch{}, drift: map[string]uint64{}}
	d.dir = filepath.Join(d.cfg.Dir, bpf.Schema)
	d.schemas.dir, d.schemas.own = d.cfg.Dir, bpf.Schema
	d.spares.want = d.cfg.Spares
	if err := d.open(ctx); err != nil {
		d.Close()
		return nil, fmt.Errorf("open the data path: %w", err)
	}
	return d, nil
}

func (d *Datapath) open(ctx context.Context) (err error) {
	if d.lock, err = lockDir(ctx, d.cfg.Dir); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(d.dir, "enrolled"), 0o700); err != nil {
		return err
	}
	if d.node = d.cfg.Node; d.node == nil {
		if d.node, err = netns.Current(); err != nil {
			return err
		}
		d.ownsNode = true
	}
	if d.cgroups, err = findCgroups(d.cfg.CgroupRoot); err != nil {
		return err
	}
	if err := d.load(); err != nil {
		return err
	}
	if err := d.schemas.find(); err != nil {
		return err
	}
	d.schemas.settle()
	d.gates, d.hosts = newGatekeeper(&d.kernel), newResolver(&d.kernel)
	d.canReset = canReset(d.node)
	if err := d.readPods(); err != nil {
		return err
	}
	if err := d.updatePodLinks(); err != nil {
		return err
	}
	if err := d.attachCgroups(); err != nil {
		return err
	}
	d.spares.fill(d.loadSpare)
	return nil
}

// load puts programs and maps into the kernel. Maps that are pinned already are reused.
func (d *Datapath) load() error {
	spec, err := bpf.LoadMesh()
	if err != nil {
		return err
	}
	if d.names, err = outcomeNames(spec); err != nil {
		return err
	}
	for name, value := range map[string]any{
		bpf.MeshVarNodeCookie:  d.node.Cookie(),
		bpf.MeshVarCaptureMark: uint32(Mark),
		bpf.MeshVarHookSeesAll: d.cgroups.pods == d.cgroups.root,
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	d.spec = spec.Copy()
	if err := spec.Variables[bpf.MeshVarNearGeneration].Set(uint64(time.Now().UnixNano())); err != nil {
		return fmt.Errorf("set %s: %w", bpf.MeshVarNearGeneration, err)
	}
	err = spec.LoadAndAssign(&d.kernel, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: d.dir}})
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		return fmt.Errorf("maps in %s were made by another build with the same schema name: %w", d.dir, err)
	}
	return explain(err)
}

// outcomeNames reads the names of the counters out of the object's own types.
func outcomeNames(spec *ebpf.CollectionSpec) ([]string, error) {
	var enum *btf.Enum
	if err := spec.Types.TypeByName("outcome", &enum); err != nil {
		return nil, fmt.Errorf("find the outcomes: %w", err)
	}
	names := make([]string, bpf.MeshOutcomeOUTCOMES)
	for _, v := range enum.Values {
		if v.Value < uint64(len(names)) {
			names[v.Value] = strings.ToLower(v.Name)
		}
	}
	return names, nil
}

// readPods learns which pods are enrolled.
func (d *Datapath) readPods() error {
	clear(d.pods)
	var cookie uint64
	var pod bpf.MeshPod
	it := d.kernel.Pods.Iterate()
	for it.Next(&cookie, &pod) {
		d.pods[uidOf(&pod)] = record{cookie, pod}
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read the enrolled pods: %w", err)
	}
	return nil
}

func uidOf(p *bpf.MeshPod) string {
	return unix.ByteSliceToString(p.Uid[:])
}

// Close gives the lock back. Programs, links and pins stay: pods remain captured. Nothing may be dialled any more. It
// waits for whoever ranges over Events.
func (d *Datapath) Close() error {
	d.mu.Lock()
	stop, ended := d.stopEvents, d.eventsEnded
	d.mu.Unlock()
	if stop != nil {
		stop()
		<-ended
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.spares.close()
	d.unwatchAll()
	err := errors.Join(d.kernel.Close(), d.schemas.close())
	if d.ownsNode && d.node != nil {
		err = errors.Join(err, d.node.Close())
		d.ownsNode = false
	}
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
		d.lock = nil
	}
	return err
}

// ErrYielded is returned to a process that is not the writer any more.
var ErrYielded = errors.New("another process may be the data path's writer by now")

// Yield gives the lock to a successor that waits in Open. From then on whatever would change the kernel's state
// is refused with ErrYielded: two writers would each undo what the other has done, such as capture of a service
// that the older one has not heard of. Dial, DialInbound, Tag, Enrolled and Counters go on to work, for the
// connections that are still open.
func (d *Datapath) Yield() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.lock == nil {
		return nil
	}
	if d.stopEvents != nil {
		d.stopEvents()
	}
	d.unwatchAll()
	d.schemas.yielded.Store(true)
	err := d.lock.Close()
	d.lock = nil
	return err
}

// write locks the state for a change.
func (d *Datapath) write() error {
	d.mu.Lock()
	if d.lock == nil {
		d.mu.Unlock()
		return ErrYielded
	}
	return nil
}

// Counters returns the outcomes of all programs since they were first loaded, by name.
func (d *Datapath) Counters() (map[string]uint64, error) {
	out := make(map[string]uint64, len(d.names))
	for i, name := range d.names {
		n, err := d.counter(uint32(i))
		if err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		out[name] = n
	}
	return out, nil
}

func (d *Datapath) counter(outcome uint32) (sum uint64, err error) {
	var perCPU []uint64
	err = d.kernel.Outcomes.Lookup(outcome, &perCPU)
	for _, n := range perCPU {
		sum += n
	}
	return sum, err
}

// lockDir makes the directory and takes the lock that makes this process the only writer.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return nil, fmt.Errorf("look at %s: %w", dir, err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return nil, fmt.Errorf("%s is not on a bpffs; mount one (mount -t bpf bpf /sys/fs/bpf) and share it with the agent", dir)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another process is the writer of %s: %w", dir, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
